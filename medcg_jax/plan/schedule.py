"""The order in which a compiled program works: computations, copies and collectives, from its scheduled text.

XLA writes the instructions of each computation in the sequence in which a device starts them. A collective runs beside
the computations between its start and its done. A TPU's compiler also puts a gather into a fusion beside a matrix
product: its start, the fusions that carry it and its done each hold a copy of it. A collective without a start and a
done stops the device until it has ended. What is read here is made into seconds by `simulate`.

    schedule = read(compiled.as_text())
    result = simulate(schedule, machine)
"""

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass

from medcg_jax.plan.hlo import Collective, Instruction, Program, collective_of, identity, kind_of, operands
from medcg_jax.plan.hlo_products import product_of
from medcg_jax.plan.hlo_traffic import Traffic

ASYNC_CALL = re.compile(r'custom_call_target="AsyncCollective(Start|Done)"')


@dataclass(frozen=True)
class Compute:
    """One computation on one device. flops: of matrix products. num_bytes: over the device's memory."""

    name: str
    flops: int
    num_bytes: int
    operation: str = ""


@dataclass(frozen=True)
class CopyStart:
    """A copy between the device's memory and the chip begins; it runs beside computations."""

    name: str
    num_bytes: int


@dataclass(frozen=True)
class CopyDone:
    """The device waits for the copy `name`."""

    name: str


@dataclass(frozen=True)
class Start:
    """A collective begins. operation: jax's name of what it was made for. is_async: whether anything may run beside it."""

    name: str
    collective: Collective
    operation: str = ""
    is_async: bool = True


@dataclass(frozen=True)
class Done:
    """The device waits for the collective `name`."""

    name: str


@dataclass(frozen=True)
class Loop:
    """Steps that are executed `trips` times. operation: jax's name of the loop."""

    name: str
    steps: tuple["Step", ...]
    trips: int
    operation: str = ""


Step = Compute | CopyStart | CopyDone | Start | Done | Loop


def read(text: str, *, open_trips: int | None = None) -> tuple[Step, ...]:
    """The steps of a program's text (`jax.stages.Compiled.as_text`), in the sequence of its schedule.

    A conditional counts with all its branches, one after another. open_trips: as in `hlo.collectives`.

    Raises:
      ValueError: the text is not scheduled; or an instruction, the trip count of a loop, or which start a done belongs
        to cannot be read.
    """
    program = Program(text)
    if "is_scheduled=true" not in program.header:
        raise ValueError("the program's text has no schedule (is_scheduled=true)")
    reader = _Reader(program, open_trips)
    steps = tuple(reader.steps(program.entry))
    for name, ops in program.computations.items():
        if name not in reader.reached and any(kind_of(op) for op in ops):
            raise ValueError(f"the computation {name} has collectives, and no known instruction calls it")
    return steps


class _Reader:
    """reached: the computations whose collectives are among the steps."""

    def __init__(self, program: Program, open_trips: int | None):
        self.program, self.open_trips = program, open_trips
        self.reached: set[str] = set()
        self.num_devices = program.num_devices
        self.traffic = Traffic(program)
        self.shapes = {name: {op.name: op.shape for op in ops} for name, ops in program.computations.items()}

    def steps(self, computation: str, carried: frozenset[tuple[str, ...]] = frozenset()) -> Iterator[Step]:
        """The steps of a computation; whatever starts in it must be done in it.

        carried: keys of collectives in fusions that run beside the whole computation.

        Raises:
          ValueError: as `read`.
        """
        pending = _Pending(carried)
        self.reached.add(computation)
        for op in self.program.computations[computation]:
            if op.opcode == "while":
                trips = self.program.loop_trips(op, self.open_trips)
                beside = pending.begun()
                inner = [*self.steps(op.attribute("body"), beside), *self.steps(op.attribute("condition"), beside)]
                yield Loop(op.name, tuple(inner), trips, op.operation)
            elif op.opcode in ("call", "conditional"):
                for called in op.called():
                    yield from self.steps(called, pending.begun())
            elif op.opcode == "fusion":
                yield from self._fusion(op, computation, pending)
            elif op.opcode in ("send", "send-done", "recv", "recv-done"):
                yield from self._between_slices(op, pending)
            elif op.opcode == "async-start":
                yield from self._async_start(op, pending)
            elif op.opcode == "copy-start":
                pending.copies.add(op.name)
                yield CopyStart(op.name, self.traffic.copied(op))
            elif op.opcode.endswith("-done"):
                yield pending.done(op)
            elif op.opcode == "async-update":
                yield from pending.updated(op)
            elif kind_of(op) is not None:
                yield from self._collective(op, pending)
            else:
                yield from self._compute(op, computation)
        pending.check_empty(computation)

    def _compute(self, op: Instruction, computation: str) -> Iterator[Step]:
        flops, num_bytes = self._flops(op, computation), self.traffic.num_bytes(op, computation)
        if flops or num_bytes:
            yield Compute(op.name, flops, num_bytes, op.operation)

    def _flops(self, op: Instruction, computation: str) -> int:
        """FLOPs of the matrix products of an instruction, those inside a fusion included."""
        if op.opcode in ("dot", "convolution", "custom-call"):
            unread: dict[str, None] = {}
            product = product_of(op, self.shapes[computation], unread)
            if unread:
                raise ValueError(f"{op.name}: the work of {next(iter(unread))} is not known here")
            return product[1] if product else 0
        called = op.called() if op.opcode == "fusion" else []
        return sum(self._flops(inner, name) for name in called for inner in self.program.computations[name])

    # -------------------------------------------------------------- what runs beside computations

    def _collective(self, op: Instruction, pending: "_Pending") -> Iterator[Step]:
        is_async = op.opcode.endswith("-start")
        yield Start(op.name, collective_of(op, self.num_devices), op.operation, is_async)
        if is_async:
            pending.starts[op.name] = op.name
        else:
            yield Done(op.name)

    def _async_start(self, op: Instruction, pending: "_Pending") -> Iterator[Step]:
        """An operation in a computation of its own: a collective, or a copy of slices.

        A collective of a TPU's sparse cores is launched without operands, and begins with the update that brings them.
        """
        inside = [
            (inner, name)
            for called in op.called()
            for inner, name in self._inside(called)
            if kind_of(inner) is not None
        ]
        if len(inside) > 1:
            raise ValueError(f"{op.name}: {len(inside)} collectives in one asynchronous operation are not known here")
        pending.starts[op.name] = op.name
        if inside:
            [(inner, name)] = inside
            begins = Start(op.name, collective_of(inner, self.num_devices, fusion=name), inner.operation)
            if operands(op):
                yield begins
            else:
                pending.launched[op.name] = begins
            return
        if any(self._flops(inner, name) for called in op.called() for inner, name in self._inside(called)):
            raise ValueError(f"{op.name}: a matrix product beside the others is not known here")
        pending.copies.add(op.name)
        yield CopyStart(op.name, self.traffic.copied(op))

    def _fusion(self, op: Instruction, computation: str, pending: "_Pending") -> Iterator[Step]:
        """A fusion's own work; it may start a collective, carry one beside its work, or end one."""
        inside = list(self._inside(op.called()[0]))
        collectives = [(inner, name) for inner, name in inside if kind_of(inner) is not None]
        marks = {mark[1] for inner, _ in inside if (mark := ASYNC_CALL.search(inner.text))}
        for inner, name in collectives:
            key = identity(inner)
            if "Start" in marks or not marks and key not in pending.begun():
                starts = f"{op.name}/{inner.name}"
                collective = dataclasses.replace(collective_of(inner, self.num_devices, fusion=name), name=op.name)
                yield Start(starts, collective, inner.operation, bool(marks))
                if marks:
                    pending.fused.setdefault(key, []).append(starts)
                else:
                    yield Done(starts)
        yield from self._compute(op, computation)
        if "Done" in marks:
            for inner, _ in collectives:
                starts = pending.fused.get(identity(inner))
                if not starts:
                    raise ValueError(f"{op.name} ends {inner.name}, and nothing before it started that")
                yield Done(starts.pop(0))
                if not starts:
                    del pending.fused[identity(inner)]

    def _inside(self, computation: str) -> Iterator[tuple[Instruction, str]]:
        """(instruction, computation) of a fusion, and of fusions and calls in it; not what a reduction does with
        two numbers."""
        self.reached.add(computation)
        for op in self.program.computations[computation]:
            yield op, computation
            for called in op.called() if op.opcode in ("fusion", "custom-call", "call") else ():
                yield from self._inside(called)

    def _between_slices(self, op: Instruction, pending: "_Pending") -> Iterator[Step]:
        """A sum between slices: `send` gives one device's summand to the host, `recv-done` waits for the sum."""
        if op.opcode == "send" and kind_of(op) is not None:
            pending.sends.append(op.name)
            yield Start(op.name, collective_of(op, self.num_devices), op.operation)
        elif op.opcode == "recv-done":
            if not pending.sends:
                raise ValueError(f"{op.name} waits for a transfer that nothing before it sent")
            yield Done(pending.sends.pop(0))


class _Pending:
    """What has started in a computation and is not done.

    starts: a name that a done may give -> the start. fused: key of a collective in fusions -> starts, oldest first.
    carried: as in `_Reader.steps`. launched: what begins with an update.
    """

    def __init__(self, carried: frozenset[tuple[str, ...]]):
        self.carried = carried
        self.starts: dict[str, str] = {}
        self.copies: set[str] = set()
        self.launched: dict[str, Start] = {}
        self.fused: dict[tuple[str, ...], list[str]] = {}
        self.sends: list[str] = []

    def begun(self) -> frozenset[tuple[str, ...]]:
        """Keys of the collectives in fusions that have started, here or around this computation."""
        return self.carried | self.fused.keys()

    def updated(self, op: Instruction) -> Iterator[Start]:
        start = self.starts[op.name] = self._of(op)
        if start in self.launched:
            yield self.launched.pop(start)

    def done(self, op: Instruction) -> Done | CopyDone:
        start = operands(op)[0] if operands(op)[0] in self.copies else self._of(op)
        if start in self.launched:
            raise ValueError(f"{op.name} ends {start}, which nothing gave its operands")
        self.starts = {name: begun for name, begun in self.starts.items() if begun != start}
        if start in self.copies:
            self.copies.remove(start)
            return CopyDone(start)
        return Done(start)

    def _of(self, op: Instruction) -> str:
        name = operands(op)[0]
        if name not in self.starts:
            raise ValueError(f"{op.name} is of {name}, which nothing before it started")
        return self.starts[name]

    def check_empty(self, computation: str) -> None:
        fused = [name for names in self.fused.values() for name in names]
        open_names = [*self.starts.values(), *self.copies, *fused, *self.sends]
        if open_names:
            raise ValueError(f"{open_names[0]} starts in {computation} and is not done there")
