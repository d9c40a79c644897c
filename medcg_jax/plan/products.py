"""What a compiled program computes beside what its model needs, and arrays in it that a good program does not write."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax

from medcg_jax.families import build
from medcg_jax.nn.kernels import LANES
from medcg_jax.plan import hlo_buffers, hlo_flops, rules
from medcg_jax.plan.programs import Subject

RULES = ("extra-flops", "square-attention-buffer", "logits-everywhere")


@dataclass(frozen=True)
class Looked:
    """What was found.

    about: FLOPs of the compiled matrix products on all devices (`flops`), by kind (`kinds`), as ratios to the model's
      with full and with causal attention (`by_full`, `by_causal`), and what is not among them (`not_counted`).
    """

    about: dict
    findings: list[rules.Finding]
    not_looked_for: list[str]

    @property
    def flops(self) -> float | None:
        """FLOPs of the matrix products on all devices; None: not all of them are counted."""
        return None if self.about["not_counted"] else self.about["flops"]


def look(
    text: str, needed: dict, lengths: rules.Lengths, *, num_devices: int, remat: str, open_trips: int | None = None
) -> Looked:
    """The products and arrays of a program.

    text: of the compiled program; empty: it could not be read. needed: as `flops.step`; "causal" may be missing.
    remat: what the program may make again. open_trips: as of `hlo_flops.products`.
    """
    if not text:
        return Looked({"not_counted": "no text of the program"}, [], list(RULES))
    unclear = lengths.unclear()
    written = hlo_buffers.buffers(text)
    findings = rules.square_attention_buffer(written, lengths) + rules.logits_everywhere(written, lengths)
    try:
        read = hlo_flops.products(text, open_trips=open_trips)
    except ValueError as error:
        return Looked({"not_counted": str(error)[:300]}, findings, ["extra-flops", *unclear])
    flops, kinds = read.flops * num_devices, {}
    for one in read.found:
        kinds[one.kind] = kinds.get(one.kind, 0) + one.total * num_devices
    about = {"flops": flops, "kinds": kinds, "not_counted": ", ".join(read.unread)}
    about |= {f"by_{name}": flops / needed[name] for name in ("full", "causal") if name in needed}
    findings = rules.extra_flops(flops, needed["full"], remat) + findings
    return Looked(about, findings, ["extra-flops"] * bool(read.unread) + unclear)


def lengths_of(subject: Subject, lengths: Sequence[int], rows: int) -> rules.Lengths:
    """What the rules know of the axes of a subject's program.

    lengths: of a row's tokens and of the cache that they attend. rows: of the batches of all cells of one group.
    """
    mesh, config = subject.mesh, subject.setup.model
    each = math.ceil(rows / (mesh.shape["data"] * mesh.shape["fsdp"]))
    attended = {*lengths, *_image_lengths(config)}
    # Kernels pad to whole lanes, cuDNN to an even length, cuBLAS is given eights.
    attended |= {-(-length // unit) * unit for length in attended for unit in (2, 8, LANES)}
    params = jax.tree.leaves(subject.params())
    widths = {n for x in params for shape in (x.shape, x.sharding.shard_shape(x.shape)) for n in shape}
    tensor, fsdp, vocabulary = mesh.shape["tensor"], mesh.shape["fsdp"], config.text.vocab_size
    split = {vocabulary // parts for parts in (1, tensor, fsdp, tensor * fsdp) if vocabulary % parts == 0}
    own = _image_lengths(config) | split
    return rules.Lengths(frozenset(attended), lengths[0], each, frozenset(split), frozenset(widths - own))


def _image_lengths(config: build.Config) -> set[int]:
    """Lengths of the rows of a tower's tokens; a table of its positions has them too, and is no width."""
    return config.tower_lengths
