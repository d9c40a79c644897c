"""Known traps of a program that is compiled for a mesh. Each rule returns its findings: `full-all-reduce`,
`large-collective-in-loop`, `donation-lost`, `involuntary-rematerialization`, `gather-over-network`, `extra-flops`,
`square-attention-buffer`, `logits-everywhere`.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from medcg_jax.nn.kernels import LANES
from medcg_jax.plan.hlo import Collective
from medcg_jax.plan.hlo_products import Buffer, buffers, products
from medcg_jax.plan.programs import PlannedRun

# Smaller collectives are not reported.
LARGE_BYTES = 100e6
# Least share of the state that must be overwritten in place; scalars and counters may be copied.
DONATED = 0.99
INVOLUNTARY = "Involuntary full rematerialization"
GATHERS = ("all-gather", "reduce-scatter")
SUMS = ("all-reduce", "reduce-scatter")
# The rules of `check_products`.
PRODUCT_RULES = ("extra-flops", "square-attention-buffer", "logits-everywhere")
# Largest ratio of executed FLOPs to those that the model needs: without rematerialisation, and with any.
EXTRA, EXTRA_REMAT = 1.02, 1.34


@dataclass(frozen=True)
class Finding:
    """A rule's name, one sentence, the bytes per device and step concerned, and the instructions."""

    rule: str
    text: str
    num_bytes: float = 0.0
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """What the rules know of a mesh and of the parameters on it.

    axes: sizes of the mesh's axes, outermost first; a program numbers its devices in this order.
    whole_bytes: float32 bytes of the trainable parameters that `fsdp` does not split; their gradients have to be
      reduced whole.
    layer_bytes: the most that one gather should bring: bytes in the compute dtype of the largest layer of stacked
      blocks, or of the largest parameter outside the stacks if that is larger.
    """

    axes: dict[str, int]
    whole_bytes: float
    layer_bytes: float

    def joined(self, collective: Collective) -> set[str]:
        """The axes over which a collective exchanges data."""
        axes: set[str] = set()
        for group in collective.groups:
            coordinates = np.array(np.unravel_index(list(group), tuple(self.axes.values())))
            differs = (coordinates != coordinates[:, :1]).any(axis=1)
            axes |= {name for name, yes in zip(self.axes, differs, strict=True) if yes}
        return axes


def full_all_reduce(collectives: Iterable[Collective], layout: Layout, unless: str = "") -> list[Finding]:
    """`full-all-reduce`: gradients of parameters that fsdp splits are reduced whole, at twice the bytes.

    Only gradients of parameters that fsdp does not split, and scalars, need an all-reduce over fsdp. unless: what may
    still be otherwise, for the end of the text.
    """
    reductions = [c for c in collectives if c.kind == "all-reduce" and "fsdp" in layout.joined(c)]
    total = sum(c.total_bytes for c in reductions)
    if total - layout.whole_bytes <= LARGE_BYTES:
        return []
    reductions.sort(key=lambda c: -c.total_bytes)
    text = (
        f"{total / 1e9:.2f} GB are reduced whole over fsdp where a reduce-scatter belongs "
        f"({layout.whole_bytes / 1e9:.2f} GB are of parameters that it does not split){unless}"
    )
    return [Finding("full-all-reduce", text, total, _names(reductions))]


def large_collective_in_loop(collectives: Iterable[Collective], layout: Layout) -> list[Finding]:
    """`large-collective-in-loop`: over 100 MB in each iteration of a loop that the sharding does not need.

    The sharding needs one layer's parameters gathered over `fsdp` and their gradients scattered, gradients summed over
    `data`, and activations exchanged over `tensor`.
    """
    unasked = [c for c in collectives if c.trips > 1 and c.payload_bytes > LARGE_BYTES and not _asked_for(c, layout)]
    if not unasked:
        return []
    unasked.sort(key=lambda c: -c.total_bytes)
    worst = unasked[0]
    text = (
        f"{len(unasked)} collectives of over {LARGE_BYTES / 1e6:.0f} MB in loops that the sharding does not ask for; the "
        f"largest is {worst.kind} {worst.name}, {worst.payload_bytes / 1e6:,.0f} MB, {worst.trips} times"
    )
    return [Finding("large-collective-in-loop", text, sum(c.total_bytes for c in unasked), _names(unasked))]


def _asked_for(collective: Collective, layout: Layout) -> bool:
    axes = layout.joined(collective)
    if axes <= {"tensor"}:
        return True
    if collective.kind in GATHERS:
        return axes <= {"fsdp"} and collective.payload_bytes <= layout.layer_bytes
    shard_bytes = layout.layer_bytes / layout.axes["fsdp"]
    return collective.kind == "all-reduce" and axes <= {"data"} and collective.payload_bytes <= shard_bytes


def donation_lost(alias_bytes: float, state_bytes: float) -> list[Finding]:
    """`donation-lost`: the new state does not overwrite the old one, so a device holds both."""
    if alias_bytes >= DONATED * state_bytes:
        return []
    text = f"{alias_bytes / 1e9:.2f} GB of the state's {state_bytes / 1e9:.2f} GB a device are overwritten in place"
    return [Finding("donation-lost", text, state_bytes - alias_bytes)]


def involuntary_rematerialization(compiler_output: str) -> list[Finding]:
    """`involuntary-rematerialization`: XLA gathered a whole array on every device to change its sharding.

    compiler_output: what the compiler wrote to standard error.
    """
    lines = [line.strip() for line in compiler_output.splitlines() if INVOLUNTARY in line]
    if not lines:
        return []
    text = f"the compiler says {len(lines)} times that it gathers an array whole to shard it anew"
    return [Finding("involuntary-rematerialization", text, 0.0, tuple(dict.fromkeys(line[:300] for line in lines)))]


def gather_over_network(collectives: Iterable[Collective], crosses: Callable[[Collective], bool]) -> list[Finding]:
    """`gather-over-network`: slices or hosts exchange more than sums of gradients over the slow network.

    crosses: whether a collective joins devices of different slices or hosts.
    """
    exchanged = [c for c in collectives if c.kind not in SUMS and crosses(c)]
    total = sum(c.total_bytes for c in exchanged)
    if total <= LARGE_BYTES:
        return []
    exchanged.sort(key=lambda c: -c.total_bytes)
    text = f"{total / 1e9:.2f} GB that are no sums of gradients are exchanged between slices or hosts"
    return [Finding("gather-over-network", text, total, _names(exchanged))]


# ------------------------------------------------------------------ products, and arrays that should not be there


@dataclass(frozen=True)
class ProductCheck:
    """The matrix products of a program compared with those its model needs, and findings about them.

    about: FLOPs of the compiled matrix products on all devices (`flops`), by kind (`kinds`), as ratios to the model's
      with full and with causal attention (`by_full`, `by_causal`), and what was not counted (`not_counted`).
    not_looked_for: rules that could not be applied.
    """

    about: dict
    findings: list[Finding]
    not_looked_for: list[str]

    @property
    def flops(self) -> float | None:
        """FLOPs of the matrix products on all devices; None: some are not counted."""
        return None if self.about["not_counted"] else self.about["flops"]


def check_products(
    text: str, needed: dict, lengths: "Lengths", *, num_devices: int, remat: str, open_trips: int | None = None
) -> ProductCheck:
    """Checks the products and arrays of a compiled program.

    text: the program's; empty: it could not be read. needed: of `flops.step`; "causal" may be missing.
    remat: the run's policy. open_trips: as in `hlo.collectives`.
    """
    if not text:
        return ProductCheck({"not_counted": "no text of the program"}, [], list(PRODUCT_RULES))
    unclear = lengths.unclear()
    written = buffers(text)
    findings = square_attention_buffer(written, lengths) + logits_everywhere(written, lengths)
    try:
        read = products(text, open_trips=open_trips)
    except ValueError as error:
        return ProductCheck({"not_counted": str(error)[:300]}, findings, ["extra-flops", *unclear])
    flops, kinds = read.flops * num_devices, {}
    for product in read.counted:
        kinds[product.kind] = kinds.get(product.kind, 0) + product.total * num_devices
    about = {"flops": flops, "kinds": kinds, "not_counted": ", ".join(read.unread)}
    about |= {f"by_{name}": flops / needed[name] for name in ("full", "causal") if name in needed}
    findings = extra_flops(flops, needed["full"], remat) + findings
    return ProductCheck(about, findings, ["extra-flops"] * bool(read.unread) + unclear)


def extra_flops(executed: float, needed: float, remat: str) -> list[Finding]:
    """`extra-flops`: the program executes more matrix products than the model and the policy `remat` need.

    executed, needed: FLOPs of one call on all devices. `needed` has attention as the full square, the convention of MFU;
    kernels that skip masked blocks execute about half of that square, and recompute scores in the backward pass.
    """
    limit = EXTRA if remat == "none" else EXTRA_REMAT
    if executed <= limit * needed:
        return []
    text = (
        f"{executed / 1e12:,.1f} TFLOP of matrix products are executed, {executed / needed:.3f} of the model's "
        f"{needed / 1e12:,.1f}; with remat {remat} at most {limit}"
    )
    return [Finding("extra-flops", text)]


@dataclass(frozen=True)
class Lengths:
    """Lengths by which the rules tell what an axis of an array means.

    attended: numbers of tokens that attend one another, with every padding of the kernels.
    positions: tokens of a row. rows: most rows on a device. vocabulary: its size, whole and split.
    widths: lengths of axes of parameters and images, which are not positions.
    """

    attended: frozenset[int]
    positions: int
    rows: int
    vocabulary: frozenset[int]
    widths: frozenset[int]

    @property
    def everywhere(self) -> set[int]:
        """Lengths of an axis over all positions of one or more rows, with or without each row's last position."""
        return {rows * length for rows in range(1, self.rows + 1) for length in (self.positions, self.positions - 1)}

    def unclear(self) -> list[str]:
        """Rules that cannot tell positions from widths at these lengths."""
        rules = ["square-attention-buffer"] if self.attended & self.widths else []
        return rules + (["logits-everywhere"] if self.everywhere & (self.widths | self.vocabulary) else [])


def square_attention_buffer(written: Iterable[Buffer], lengths: Lengths) -> list[Finding]:
    """`square-attention-buffer`: an array of all queries by all keys is written; a fused kernel needs none."""
    known = lengths.attended - lengths.widths
    text = "{0} arrays of every query against every key are written; the largest, {1}, has {2:,.1f} MB a device"
    return _arrays("square-attention-buffer", text, [b for b in written if sum(n in known for n in b.dims) > 1])


def logits_everywhere(written: Iterable[Buffer], lengths: Lengths) -> list[Finding]:
    """`logits-everywhere`: logits are written at all positions of a row, though few positions need them."""
    everywhere = lengths.everywhere - lengths.widths - lengths.vocabulary

    text = "{0} arrays of the vocabulary at all positions are written; the largest, {1}, has {2:,.1f} MB a device"
    kinds = lengths.vocabulary, everywhere
    return _arrays("logits-everywhere", text, [b for b in written if all(set(kind) & set(b.dims) for kind in kinds)])


def _arrays(rule: str, text: str, largest: list[Buffer], most: int = 5) -> list[Finding]:
    if not largest:
        return []
    largest.sort(key=lambda buffer: -buffer.num_bytes)
    worst = largest[0]
    text = text.format(len(largest), worst.name, worst.num_bytes / 1e6)
    names = tuple(f"{buffer.name}: {list(buffer.dims)} of {buffer.where}" for buffer in largest[:most])
    return [Finding(rule, text, worst.num_bytes, names)]


def _names(largest: list[Collective], most: int = 5) -> tuple[str, ...]:
    return tuple(f"{c.name}: {c.trips} x {c.payload_bytes:,} bytes" for c in largest[:most])


def lengths_of(planned: PlannedRun, lengths: Sequence[int], rows: int) -> Lengths:
    """The `Lengths` of a planned run's program.

    lengths: of a row, and of the cache that it attends. rows: of the batches of all cells of one group.
    """
    mesh, config = planned.mesh, planned.setup.model
    device_rows = math.ceil(rows / (mesh.shape["data"] * mesh.shape["fsdp"]))
    attended = {*lengths, *config.tower_lengths}
    # TPU kernels pad to whole lanes, cuDNN to an even length, cuBLAS to multiples of eight.
    attended |= {-(-length // unit) * unit for length in attended for unit in (2, 8, LANES)}
    params = jax.tree.leaves(planned.params())
    widths = {n for x in params for shape in (x.shape, x.sharding.shard_shape(x.shape)) for n in shape}
    tensor, fsdp, vocabulary = mesh.shape["tensor"], mesh.shape["fsdp"], config.text.vocab_size
    split = {vocabulary // parts for parts in (1, tensor, fsdp, tensor * fsdp) if vocabulary % parts == 0}
    return Lengths(
        frozenset(attended), lengths[0], device_rows, frozenset(split), frozenset(widths - config.tower_lengths - split)
    )
