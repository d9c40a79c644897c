"""A lower bound on a compiled program's time, by published peaks; no measurement.

Three times, each for itself: compute (executed FLOPs at the peak), memory (bytes that must cross HBM) and network (bytes
of collectives at the bandwidth between their devices). A step takes at least the longest of the three; their sum, if
nothing overlaps. Bytes over HBM are those that the scheduled program's instructions read and write (`hlo_traffic`).
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

    network_s: of the slower of links and network. overlapped_s: the longest of the three. in_turn_s: their sum, with
    each collective as long as its slower way. limit: the name of the longest. simulated_s: between the two, by the
    program's schedule (`simulate`); None: it could not be read. unknown: why a time is None and counts as 0.
    """

    compute_s: float
    memory_s: float | None
    network_s: float | None
    overlapped_s: float
    in_turn_s: float
    limit: str
    simulated_s: float | None = None
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
    *, peak: Peak, num_devices: int, executed_flops: float, sent_bytes: tuple[float, float] | None, why: str
) -> Bound:
    """The bound of a program on so many devices whose schedule is not simulated; where it is, `Simulation.bound`.

    executed_flops: of matrix products, on all devices. sent_bytes: `network_bytes`; None: the program's collectives
    could not be read. why: there is no simulation, so that bytes over memory are not known.
    """
    unknown = [why]
    times: dict[str, float | None] = {"compute": executed_flops / num_devices / peak.bf16_flops_per_s}
    times["memory"] = None
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
        known["compute"], times["memory"], times["network"], known[limit], sum(known.values()), limit,
        unknown=tuple(unknown),
    )  # fmt: skip
