"""Known traps of a program that is compiled for a mesh, each a rule with a name that looks at what was compiled.

A rule gives its findings, and none where all is well: `full-all-reduce`, `large-collective-in-loop`, `donation-lost`,
`involuntary-rematerialization`, `gather-over-network`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from medcg_jax.scale.hlo import Collective

# Below it a collective is not worth a word. The study of compiled steps that the rules come of took the same.
LARGE_BYTES = 100e6
# Part of the state that may stand beside it: scalars and counters.
DONATED = 0.99
INVOLUNTARY = "Involuntary full rematerialization"
GATHERS = ("all-gather", "reduce-scatter")
SUMS = ("all-reduce", "reduce-scatter")


@dataclass(frozen=True)
class Finding:
    """What a rule found: its name, one sentence, the bytes per device and step that it is about, and instructions."""

    rule: str
    text: str
    num_bytes: float = 0.0
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """What the rules know of a mesh and of the parameters on it.

    axes: sizes of the mesh's axes, outermost first; devices of a program are numbered in their order.
    whole_bytes: float32 bytes of the trainable parameters that the axis `fsdp` does not split; their gradients are
      reduced whole, and should be.
    layer_bytes: bytes in the compute dtype of the largest layer of stacked blocks, all its parameters together, and
      never less than the largest parameter outside the stacks: what one gather may bring at once.
    """

    axes: dict[str, int]
    whole_bytes: float
    layer_bytes: float

    def joined(self, one: Collective) -> set[str]:
        """The axes over which a collective exchanges data."""
        found: set[str] = set()
        for group in one.groups:
            places = np.array(np.unravel_index(list(group), tuple(self.axes.values())))
            differs = (places != places[:, :1]).any(axis=1)
            found |= {name for name, yes in zip(self.axes, differs, strict=True) if yes}
        return found


def full_all_reduce(collectives: Iterable[Collective], layout: Layout) -> list[Finding]:
    """`full-all-reduce`: gradients of parameters that fsdp splits are reduced whole, at twice the bytes.

    All that an all-reduce over fsdp may carry are the gradients of parameters that are not split, and scalars.
    """
    # Over tensor and fsdp together it is no gradient of a split weight: the tensor axis splits those too.
    over = [one for one in collectives if one.kind == "all-reduce" and "fsdp" in layout.joined(one)]
    total = sum(one.total_bytes for one in over)
    if total - layout.whole_bytes <= LARGE_BYTES:
        return []
    over.sort(key=lambda one: -one.total_bytes)
    text = (
        f"{total / 1e9:.2f} GB are reduced whole over fsdp where a reduce-scatter belongs "
        f"({layout.whole_bytes / 1e9:.2f} GB are of parameters that it does not split)"
    )
    return [Finding("full-all-reduce", text, total, _names(over))]


def large_collective_in_loop(collectives: Iterable[Collective], layout: Layout) -> list[Finding]:
    """`large-collective-in-loop`: over 100 MB each time round a loop, which the sharding does not ask for.

    It asks for the parameters of one layer gathered over fsdp and their gradients scattered, for gradients summed over
    `data`, and for activations exchanged over `tensor`.
    """
    found = [
        one for one in collectives
        if one.trips > 1 and one.payload_bytes > LARGE_BYTES and not _asked_for(one, layout)
    ]  # fmt: skip
    if not found:
        return []
    found.sort(key=lambda one: -one.total_bytes)
    worst = found[0]
    text = (
        f"{len(found)} collectives of over {LARGE_BYTES / 1e6:.0f} MB in loops that the sharding does not ask for; the "
        f"largest is {worst.kind} {worst.name}, {worst.payload_bytes / 1e6:,.0f} MB, {worst.trips} times"
    )
    return [Finding("large-collective-in-loop", text, sum(one.total_bytes for one in found), _names(found))]


def _asked_for(one: Collective, layout: Layout) -> bool:
    axes = layout.joined(one)
    if axes <= {"tensor"}:
        return True
    if one.kind in GATHERS:
        return axes <= {"fsdp"} and one.payload_bytes <= layout.layer_bytes
    shard_bytes = layout.layer_bytes / layout.axes["fsdp"]
    return one.kind == "all-reduce" and axes <= {"data"} and one.payload_bytes <= shard_bytes


def donation_lost(alias_bytes: float, state_bytes: float) -> list[Finding]:
    """`donation-lost`: the old state is not overwritten by the new one, so a device holds both."""
    if alias_bytes >= DONATED * state_bytes:
        return []
    text = f"{alias_bytes / 1e9:.2f} GB of the state's {state_bytes / 1e9:.2f} GB a device are overwritten in place"
    return [Finding("donation-lost", text, state_bytes - alias_bytes)]


def involuntary_rematerialization(compiler_output: str) -> list[Finding]:
    """`involuntary-rematerialization`: XLA gathered an array whole on every device to give it another sharding.

    compiler_output: what the compiler wrote to standard error.
    """
    lines = [line.strip() for line in compiler_output.splitlines() if INVOLUNTARY in line]
    if not lines:
        return []
    text = f"the compiler says {len(lines)} times that it gathers an array whole to shard it anew"
    return [Finding("involuntary-rematerialization", text, 0.0, tuple(dict.fromkeys(line[:300] for line in lines)))]


def gather_over_network(collectives: Iterable[Collective], crosses: Callable[[Collective], bool]) -> list[Finding]:
    """`gather-over-network`: slices or hosts exchange over the slow network what is no sum of gradients.

    crosses: whether a collective joins devices of different slices or hosts.
    """
    found = [one for one in collectives if one.kind not in SUMS and crosses(one)]
    total = sum(one.total_bytes for one in found)
    if total <= LARGE_BYTES:
        return []
    found.sort(key=lambda one: -one.total_bytes)
    text = f"{total / 1e9:.2f} GB that are no sums of gradients are exchanged between slices or hosts"
    return [Finding("gather-over-network", text, total, _names(found))]


def _names(found: list[Collective], most: int = 5) -> tuple[str, ...]:
    return tuple(f"{one.name}: {one.trips} x {one.payload_bytes:,} bytes" for one in found[:most])
