"""How fast a compiled program could be at most, by published peaks: a bound from below on its time, no measurement.

Three times, each as if nothing else took any: compute (executed FLOPs at the peak), memory (bytes that must cross HBM),
network (bytes of collectives at the bandwidth of what joins their devices). Where they overlap wholly a step takes the
longest of them, where not at all their sum.

What must cross HBM is a simple model, stated here: the state is read and written once; a gradient in float32 is written
and read; weights in the compute dtype are read once for every pass over them (forward, backward, and a second forward
with rematerialisation) and for each micro-batch, and written once more where they are gathered; what the program keeps
between its passes (its temporary buffers) is written and read once.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from medcg_jax.chips import Peak
from medcg_jax.plan.hlo import Collective

# What a ring of n devices sends from each, as parts of the payload.
RING = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
    "collective-broadcast": lambda n: 1.0,
}


@dataclass(frozen=True)
class Bound:
    """Seconds that a program takes at least; None: a part is not known.

    overlapped_s: the longest of the three. in_turn_s: their sum. limit: the name of the longest.
    unknown: what could not be said, and so counts nothing.
    """

    compute_s: float
    memory_s: float | None
    network_s: float | None
    overlapped_s: float
    in_turn_s: float
    limit: str
    unknown: tuple[str, ...] = ()


def crosses(collective: Collective, island_of: Sequence[int]) -> bool:
    """Whether a collective joins devices of different islands; where: `mesh.islands` in the order of the mesh."""
    return any(len({island_of[device] for device in group}) > 1 for group in collective.groups)


def network_bytes(collectives: Iterable[Collective], island_of: Sequence[int]) -> tuple[float, float]:
    """(bytes that a device sends over links, over its part of the network) in one call of the program.

    By rings: over an island's own devices; of a group in several islands all rings cross the network, one for each
    device that it has in an island.
    """
    links, network = 0.0, 0.0
    for collective in collectives:
        group = max(collective.groups, key=len, default=())
        if len(set(group)) < 2:
            continue
        sent = RING[collective.kind](len(group)) * collective.total_bytes
        if crosses(collective, island_of):
            group_islands = [island_of[device] for device in group]
            network += sent / max(1, min(group_islands.count(island) for island in set(group_islands)))
        links += sent
    return links, network


def bound(
    *, peak: Peak, num_devices: int, executed_flops: float, memory_bytes: float, sent_bytes: tuple[float, float] | None
) -> Bound:
    """The bound of one program on so many devices.

    executed_flops: of matrix products, on all devices. memory_bytes: over HBM, of one device. sent_bytes:
    `network_bytes`; None: the program's collectives could not be read.
    """
    unknown = []
    times: dict[str, float | None] = {"compute": executed_flops / num_devices / peak.bf16_flops_per_s}
    times["memory"] = memory_bytes / peak.memory_bytes_per_s if peak.memory_bytes_per_s else None
    if times["memory"] is None:
        unknown.append("the bandwidth of its memory is not in the table of peaks")
    times["network"] = None
    if sent_bytes is None:
        unknown.append("collectives could not be read")
    elif any(sent and not rate for sent, rate in zip(sent_bytes, (peak.link_bytes_per_s, peak.network_bytes_per_s))):
        unknown.append("the bandwidth between devices is not in the table of peaks")
    else:
        rates = (peak.link_bytes_per_s or 1.0, peak.network_bytes_per_s or 1.0)
        times["network"] = max(sent / rate for sent, rate in zip(sent_bytes, rates))
    known = {name: seconds for name, seconds in times.items() if seconds is not None}
    limit = max(known, key=known.get)
    return Bound(
        times["compute"], times["memory"], times["network"], known[limit], sum(known.values()), limit, tuple(unknown)
    )


def step_memory_bytes(
    *, state_bytes: float, grad_bytes: float, weight_bytes: float, temp_bytes: float, passes: int, gathered: bool
) -> float:
    """Bytes over a device's HBM in one training step, by this module's model.

    state_bytes: the state on a device. grad_bytes: float32 gradients on a device. weight_bytes: weights that a pass
    reads on a device, in the compute dtype, gathered where they are. temp_bytes: the program's temporary buffers.
    passes: over the weights, of all micro-batches.
    """
    weights = weight_bytes * passes * (2 if gathered else 1)
    return 2 * state_bytes + 2 * grad_bytes + weights + 2 * temp_bytes
