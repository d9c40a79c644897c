"""A lower bound on a compiled program's time, by published peaks; no measurement.

Three times, each for itself: compute (executed FLOPs at the peak), memory (bytes that must cross HBM) and network (bytes
of collectives at the bandwidth between their devices). A step takes at least the longest of the three; their sum, if
nothing overlaps.

The bytes over HBM are a simple model: the state is read and written once; a float32 gradient is written and read;
weights in the compute dtype are read in every pass (forward, backward, and a second forward with rematerialisation) of
each microbatch, and written once more where they are gathered; temporary buffers are written and read once.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from medcg_jax.chips import Peak
from medcg_jax.plan.hlo import Collective

# What each device of a ring of n sends, as a share of the payload.
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
    """Least seconds of a program; None: not known.

    overlapped_s: the longest of the three. in_turn_s: their sum. limit: the name of the longest.
    unknown: why a time is None and counts as 0.
    """

    compute_s: float
    memory_s: float | None
    network_s: float | None
    overlapped_s: float
    in_turn_s: float
    limit: str
    unknown: tuple[str, ...] = ()


def crosses(collective: Collective, island_of: Sequence[int]) -> bool:
    """Whether a collective joins devices of different islands; island_of: `mesh.islands` in the order of the mesh."""
    return any(len({island_of[device] for device in group}) > 1 for group in collective.groups)


def network_bytes(collectives: Iterable[Collective], island_of: Sequence[int]) -> tuple[float, float]:
    """(bytes that a device sends over links, bytes over its share of the network) in one call of the program.

    Collectives run as rings. Where a group spans several islands, it has one ring for each of its devices in an island,
    and every ring crosses the network.
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

    executed_flops: of matrix products, on all devices. memory_bytes: over one device's HBM. sent_bytes:
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
    limit = max(known, key=lambda name: known[name])
    return Bound(
        known["compute"], times["memory"], times["network"], known[limit], sum(known.values()), limit, tuple(unknown)
    )


def step_memory_bytes(
    *, state_bytes: float, grad_bytes: float, weight_bytes: float, temp_bytes: float, passes: int, gathered: bool
) -> float:
    """Bytes over a device's HBM in one training step, by this module's model; arguments are bytes on one device.

    grad_bytes: float32 gradients. weight_bytes: weights that a pass reads, in the compute dtype, after gathering.
    passes: over the weights, of all microbatches together. gathered: whether weights are gathered before a pass.
    """
    weights = weight_bytes * passes * (2 if gathered else 1)
    return 2 * state_bytes + 2 * grad_bytes + weights + 2 * temp_bytes
