"""How long a schedule takes on a machine: one queue of computations, one of links, one of the network between islands.

Each computation takes as long as its matrix products at the machine's peak or its bytes over the memory, whichever is
longer. A collective takes its ring's bytes over the links of a slice or host, and over the network where it crosses
islands; collectives of one queue run one after another, beside computations, from their start on; a done waits. Copies
between memory and chip use what the computations leave of the memory's bandwidth.

The result lies between two bounds, whatever the schedule: the longest of four sums (products, memory, links, network),
and the sum of all. It is a model at published peaks and no measurement: real computations are slower than a peak, and
a fused collective may not advance in every computation beside it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from medcg_jax.chips import Peak
from medcg_jax.plan.hlo import Collective
from medcg_jax.plan.roofline import Bound, network_bytes
from medcg_jax.plan.schedule import Compute, CopyDone, CopyStart, Done, Loop, Start, Step


@dataclass(frozen=True)
class Machine:
    """Rates of one device, and what a collective takes beside its bytes.

    island_of: `mesh.islands` in the sequence of the mesh. collective_s: fixed seconds of a collective.
    """

    flops_per_s: float
    memory_bytes_per_s: float
    link_bytes_per_s: float
    network_bytes_per_s: float
    island_of: Sequence[int]
    collective_s: float = 0.0

    @classmethod
    def published(cls, peak: Peak, island_of: Sequence[int]) -> "Machine":
        """The machine of `chips`' published peaks.

        Raises:
          ValueError: a bandwidth that is needed is not published.
        """
        links, network = peak.link_bytes_per_s, peak.network_bytes_per_s
        for name, rate, needed in (
            ("its memory", peak.memory_bytes_per_s, True),
            ("its links", links, len(island_of) > 1),
            ("the network", network, len(set(island_of)) > 1),
        ):
            if needed and not rate:
                raise ValueError(f"the bandwidth of {name} is not in the table of peaks")
        return cls(peak.bf16_flops_per_s, peak.memory_bytes_per_s or 1.0, links or 1.0, network or 1.0, island_of)

    def seconds(self, collective: Collective) -> tuple[float, float]:
        """(seconds of the links, seconds of the network) that one execution takes."""
        links, network = network_bytes([collective], self.island_of)
        fixed = self.collective_s if links else 0.0
        return links / self.link_bytes_per_s + fixed, network / self.network_bytes_per_s


@dataclass
class Exposure:
    """One collective of a program, over all its executions in one call.

    seconds: that it takes alone. beside_s: computations between its start and its done. exposed_s: the device waits for
    it. loop: jax's name of the innermost loop around it, "" for none. crosses: it takes the network between islands.
    trips: its executions.
    """

    start: Start
    loop: str
    crosses: bool
    seconds: float = 0.0
    beside_s: float = 0.0
    exposed_s: float = 0.0
    trips: int = 0


@dataclass(frozen=True)
class Simulation:
    """Seconds of one call of a program.

    step_s: simulated; it is busy_s + exposed_s + copies_s. compute_s, memory_s: of products at the peak, of bytes at the
    memory's bandwidth. busy_s: of computations, each by the longer of its two. links_s, between_s: of all bytes over
    links, and over the network between islands. collectives_s: of all collectives one after another. exposed_s: the
    device waits for collectives. copies_s: it waits for copies.
    """

    step_s: float
    compute_s: float
    memory_s: float
    busy_s: float
    links_s: float
    between_s: float
    collectives_s: float
    exposed_s: float
    copies_s: float
    exposures: tuple[Exposure, ...] = field(repr=False)

    def bound(self) -> Bound:
        """Everything at once, and one after another: the simulated step lies between the two."""
        times = {"compute": self.compute_s, "memory": self.memory_s, "network": max(self.links_s, self.between_s)}
        limit = max(times, key=lambda name: times[name])
        in_turn = self.compute_s + self.memory_s + self.collectives_s
        return Bound(*times.values(), times[limit], in_turn, limit, self.step_s)

    def exposed_by(self, key: Callable[[Exposure], str]) -> dict[str, float]:
        """Exposed seconds by `key`, the longest first."""
        sums: dict[str, float] = {}
        for exposure in self.exposures:
            sums[key(exposure)] = sums.get(key(exposure), 0.0) + exposure.exposed_s
        return dict(sorted(sums.items(), key=lambda item: -item[1]))


def simulate(steps: Iterable[Step], machine: Machine) -> Simulation:
    """The seconds that a device needs for the steps, from `schedule.read`.

    Raises:
      ValueError: a done is of nothing that started.
    """
    clock = _Clock(machine)
    clock.run(tuple(steps), (), "")
    clock.finish()
    names = ("compute", "memory", "busy", "links", "between", "collectives", "exposed", "copies")
    return Simulation(clock.now, *(clock.sums[name] for name in names), tuple(clock.exposures.values()))


class _Clock:
    """now: seconds since the start. links_free, network_free: when each queue is empty. copied, to_copy: seconds at the
    memory's bandwidth of all copies that have run, and of all that have started."""

    def __init__(self, machine: Machine):
        self.machine = machine
        self.now = self.links_free = self.network_free = self.copied = self.to_copy = 0.0
        self.sums = dict.fromkeys(
            ("compute", "memory", "busy", "links", "between", "collectives", "exposed", "copies"), 0.0
        )
        self.exposures: dict[tuple[tuple[str, ...], str], Exposure] = {}
        # Of what has started: the exposure, its end, and the seconds of computations until its start.
        self.begun: dict[str, tuple[Exposure, float, float]] = {}
        self.copies: dict[str, float] = {}
        self.known: dict[Collective, tuple[float, float]] = {}

    def run(self, steps: tuple[Step, ...], loops: tuple[str, ...], operation: str) -> None:
        for step in steps:
            match step:
                case Compute():
                    self._compute(step)
                case Start():
                    self._start(step, loops, operation)
                case Done():
                    self._done(step)
                case CopyStart():
                    seconds = step.num_bytes / self.machine.memory_bytes_per_s
                    self.to_copy += seconds
                    self.sums["memory"] += seconds
                    self.copies[step.name] = self.to_copy
                case CopyDone():
                    self._wait_for_copies(self.copies.pop(step.name))
                case Loop():
                    for _ in range(step.trips):
                        self.run(step.steps, (*loops, step.name), step.operation or step.name)

    def finish(self) -> None:
        if self.begun:
            raise ValueError(f"{next(iter(self.begun))} has started and is never done")
        self._wait_for_copies(self.to_copy)

    def _compute(self, step: Compute) -> None:
        compute = step.flops / self.machine.flops_per_s
        memory = step.num_bytes / self.machine.memory_bytes_per_s
        seconds = max(compute, memory)
        self._copy(seconds - memory)
        self.now += seconds
        for name, value in (("compute", compute), ("memory", memory), ("busy", seconds)):
            self.sums[name] += value

    def _copy(self, idle: float) -> None:
        """Copies run in the seconds that the memory is idle."""
        self.copied += min(idle, self.to_copy - self.copied)

    def _wait_for_copies(self, until: float) -> None:
        waits = max(0.0, until - self.copied)
        self.now += waits
        self.copied += waits
        self.sums["copies"] += waits

    def _start(self, step: Start, loops: tuple[str, ...], operation: str) -> None:
        if step.collective not in self.known:
            self.known[step.collective] = self.machine.seconds(step.collective)
        links, network = self.known[step.collective]
        ends = self.now
        if links:
            ends = self.links_free = max(self.now, self.links_free) + links
        if network:
            self.network_free = max(self.now, self.network_free) + network
            ends = max(ends, self.network_free)
        exposure = self.exposures.setdefault((loops, step.name), Exposure(step, operation, bool(network)))
        exposure.trips += 1
        exposure.seconds += max(links, network)
        for name, value in (("links", links), ("between", network), ("collectives", max(links, network))):
            self.sums[name] += value
        self.begun[step.name] = exposure, ends, self.sums["busy"]

    def _done(self, step: Done) -> None:
        if step.name not in self.begun:
            raise ValueError(f"{step.name} is done and has not started")
        exposure, ends, busy_before = self.begun.pop(step.name)
        waits = max(0.0, ends - self.now)
        exposure.beside_s += self.sums["busy"] - busy_before
        exposure.exposed_s += waits
        self._copy(waits)
        self.now += waits
        self.sums["exposed"] += waits
