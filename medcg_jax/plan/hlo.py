"""The collectives of a compiled program: which devices each joins, how many bytes it moves, how often it is executed.

A program whose cells exchange data still gives the right numbers; only its text shows the exchange. Text that this
module cannot read is an error, never a guess: a collective that is skipped would look like one that leaves no cell.

    ran = collectives(compiled.as_text())
    assert not crossing(ran, num_devices=8, num_groups=2)
"""

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip
COLLECTIVE = re.compile(rf" ({'|'.join(KINDS)})(-start)?\(")
SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
# Bits of one number, of the types without a width in their name (f32, s4 and f8e4m3fn have one).
BITS = {"pred": 8, "token": 0, "c64": 64, "c128": 128}
# The line that ends a computation, matched whole: lines of a kernel's JSON begin with braces too.
ENDED = re.compile(r'\}(, execution_thread="\w+")?$')
# A line that begins an instruction: its name and its text.
ASSIGNED = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (.*)")
CALLED = re.compile(r"\b(?:calls|to_apply|true_computation|false_computation)=%?([\w.-]+)")
# Attributes that list several computations: branches of a conditional, calls of TPU7x's sparse cores.
BRANCHES = re.compile(r"\b(?:branch|called)_computations=\{([^}]*)\}")
# Pieces of the patterns for device groups. END makes sure that a longer, unknown form is not read by half.
END = r"(?=,|$)"
LISTED = r"(\{\{[\d,]+\}(?:,\{[\d,]+\})*\})(?=,|$)"
ORDER = r"\[[\d,]+\](?:T\([\d,]+\))?"
SIZES = r"'\w+'=\d+(?:,'\w+'=\d+)*"
NAMES = r"'\w+'(?:,'\w+')*"
# On TPU a reduce-scatter is a fusion of an all-reduce and the slice of its result that is kept.
FUSED_REDUCE_SCATTER = "all-reduce-scatter"


@dataclass(frozen=True)
class Collective:
    """One collective of a program.

    kind: a name in `KINDS`.
    groups: device numbers of each group that exchanges data; of a permute (source, target).
    payload_bytes: bytes of the whole array on one device: the result of a gather, the input of a reduction.
    trips: executions in one call of the program, the product over the surrounding loops.
    """

    name: str
    kind: str
    groups: tuple[tuple[int, ...], ...]
    payload_bytes: int
    trips: int

    @property
    def total_bytes(self) -> int:
        return self.payload_bytes * self.trips


@dataclass(frozen=True)
class Instruction:
    name: str
    shape: str
    opcode: str
    text: str  # operands and attributes

    @property
    def operation(self) -> str:
        """jax's name of the operation that the instruction was made from, or ""."""
        named = re.search(r'op_name="([^"]*)"', self.text)
        return named[1] if named else ""

    def attribute(self, name: str) -> str:
        """The value of an attribute: the computation that `body` or `condition` names."""
        return re.findall(rf"\b{name}=%?([\w.-]+)", self.text)[0]

    def called(self) -> list[str]:
        """The computations that the instruction calls; a loop's body and condition are not among them."""
        branches = BRANCHES.search(self.text)
        listed = [name.strip().lstrip("%") for name in branches[1].split(",")] if branches else []
        # Metadata and a kernel's configuration may hold the same words.
        return CALLED.findall(self.text.partition(", metadata=")[0].partition(", backend_config=")[0]) + listed


class Scope(NamedTuple):
    """Where an instruction stands: its computation, the loops around it, the entry or loop body that executes it, and
    the fusion around it, or ""."""

    computation: str
    loops: tuple[Instruction, ...] = ()
    body: str = ""
    fusion: str = ""


class Program:
    """The parsed text of a compiled program (`jax.stages.Compiled.as_text`).

    Raises:
      ValueError: the text has no entry computation.
    """

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.header, current, entry = text.partition("\n")[0], None, None
        for line in text.splitlines():
            if ENDED.match(line):
                current = None
            elif current is None:
                header = re.match(r"(ENTRY )?%?([\w.-]+) (?:\(.*\) -> .*)?\{$", line)
                if header:
                    current = self.computations.setdefault(header[2], [])
                    entry = header[2] if header[1] else entry
            elif assigned := ASSIGNED.match(line):
                instruction = _instruction(assigned[1], assigned[2])
                if instruction is not None:
                    current.append(instruction)
        if entry is None:
            raise ValueError(f"no ENTRY computation in a text of {len(text)} characters: no compiled program")
        self.entry: str = entry

    def executed(self, visit: Callable[[Instruction, Scope], list | None], scope: Scope | None = None) -> Iterator[Any]:
        """The items that `visit` returns for each executed instruction, through loops, fusions and all branches.

        Where `visit` returns None, the computations that the instruction calls are visited.
        """
        scope = scope or Scope(self.entry, body=self.entry)
        for op in self.computations[scope.computation]:
            items = visit(op, scope)
            if items is not None:
                yield from items
            elif op.opcode == "while":
                # A condition may exchange data too: whether every row has ended.
                for role in ("body", "condition"):
                    inner = Scope(op.attribute(role), (*scope.loops, op), f"{scope.body}/{op.name}")
                    yield from self.executed(visit, inner)
            elif not op.opcode.endswith(("-done", "-update")):
                for name in op.called():
                    fusion = name if op.opcode == "fusion" else scope.fusion
                    yield from self.executed(visit, scope._replace(computation=name, fusion=fusion))

    @property
    def num_devices(self) -> int:
        """Raises ValueError for a program of several replicas."""
        if "replica_count=" in self.header:
            raise ValueError("a program of several replicas; expected one with partitions alone")
        partitions = re.search(r"\bnum_partitions=(\d+)", self.header)
        return int(partitions[1]) if partitions else 1

    def trips(self, scope: Scope, open_trips: int | None) -> int:
        """Executions of an instruction in this scope in one call of the program; open_trips: as in `collectives`.

        Raises:
          ValueError: the trip count of a loop cannot be read.
        """
        return math.prod(self.loop_trips(loop, open_trips) for loop in scope.loops)

    def loop_trips(self, loop: Instruction, open_trips: int | None) -> int:
        """Iterations of one loop; otherwise as `trips`."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text)
        if known:
            return int(known[1])
        # TPU programs state no trip count: the condition compares a counter from 0 with its only constant. A loop over the
        # parts of a product takes two at a time.
        constants, compared = set(), set()
        for op in self._below(loop.attribute("condition")):
            if op.opcode == "constant" and re.match(r"[su]\d+\[\]", op.shape):
                constants.add(op.text.partition(")")[0])
            elif op.opcode == "compare":
                compared.update(re.findall(r"direction=(\w+)", op.text)[:1])
        if compared != {"LT"} and open_trips is not None:
            return open_trips
        if len(constants) != 1 or compared != {"LT"}:
            raise ValueError(f"unknown trips of the loop {loop.name}: constants {constants}, compared {compared}")
        return -(-int(constants.pop()) // self._counted_by(loop))

    def _counted_by(self, loop: Instruction) -> int:
        """By how much a loop's counter grows in an iteration; 1 where that is not written as a sum with a constant."""
        condition, body = (
            {op.name: op for op in self.computations[loop.attribute(role)]} for role in ("condition", "body")
        )
        compared = [op for op in condition.values() if op.opcode == "compare"]
        counters = [operands(op)[0] for op in compared]
        places = [re.search(r"\bindex=(\d+)", condition[name].text) for name in counters if name in condition]
        results = operands(list(body.values())[-1])
        if len(places) != 1 or places[0] is None or int(places[0][1]) >= len(results):
            return 1
        grown = body.get(results[int(places[0][1])])
        added = [body.get(name) for name in operands(grown)] if grown and grown.opcode == "add" else []
        constants = [op.text.partition(")")[0] for op in added if op and op.opcode == "constant"]
        return int(constants[0]) if len(constants) == 1 and constants[0].isdecimal() else 1

    def _below(self, name: str) -> Iterator[Instruction]:
        for op in self.computations[name]:
            yield op
            for called in op.called():
                yield from self._below(called)


def collectives(text: str, *, open_trips: int | None = None) -> list[Collective]:
    """Every collective that the program executes, in the order of its text.

    A conditional counts with all its branches. An asynchronous collective counts once.
    open_trips: the count taken for a loop whose end depends on data, such as generation; None: such a loop is an error.

    Raises:
      ValueError: the text is no program; or groups, shapes or the trip count of a loop around a collective cannot be
        read.
    """
    program = Program(text)
    num_devices = program.num_devices
    reached: set[str] = set()
    copies: set[tuple[str, ...]] = set()

    def visit(op: Instruction, scope: Scope) -> list[Collective] | None:
        reached.add(scope.computation)
        if kind_of(op) is None:
            return None
        collective = collective_of(op, num_devices, fusion=scope.fusion)
        if scope.fusion:
            # TPU splits an asynchronous collective into several fusions, each with a copy of it; some may stand in loops
            # beside which it runs.
            around = itertools.accumulate(scope.body.split("/"), lambda outer, inner: f"{outer}/{inner}")
            if any((body, *identity(op)) in copies for body in around):
                return []
            copies.add((scope.body, *identity(op)))
        return [replace(collective, trips=program.trips(scope, open_trips))]

    executed = list(program.executed(visit))
    for name, instructions in program.computations.items():
        if name not in reached and any(map(kind_of, instructions)):
            raise ValueError(f"the computation {name} has collectives, and no known instruction calls it")
    return executed


def collective_of(op: Instruction, num_devices: int, fusion: str = "") -> Collective:
    """The collective that an instruction is or starts, executed once; fusion: the computation of the fusion around it.

    Raises:
      ValueError: it has no channel, or its groups or shapes cannot be read.
    """
    kind = kind_of(op)
    if kind is None or not re.search(r"\bchannel_id=\d+", op.text):
        raise ValueError(f"{op.name} has no channel: its groups are not of partitions")
    if op.opcode == "send":
        # Partners are named by slice, not by device: all devices are taken, so that `crossing` never misses it.
        everyone = (tuple(range(num_devices)),)
        return Collective(op.name, kind, everyone, num_bytes(elements_of(op.shape)[0]), 1)
    groups = groups_of(op.text, num_devices)
    payload = _payload(op, kind, len(groups[0]) if groups else 1)
    if kind == "all-reduce" and fusion.startswith(FUSED_REDUCE_SCATTER):
        kind = "reduce-scatter"
    return Collective(op.name, kind, tuple(map(tuple, groups)), payload, 1)


def identity(op: Instruction) -> tuple[str, ...]:
    """What the copies of one collective in several fusions share: channel, shape, and number of its chain of fusions.

    libtpu's combiner gives every collective channel 1. The layout is not shared: a copy may lie in another memory
    ("S(1)").
    """
    numbers = (re.search(pattern, op.text) for pattern in (r"\bchannel_id=(\d+)", r'chain_id="(\d+)"'))
    return re.sub(r"\{[^}]*\}", "", op.shape), *(number[1] if number else "" for number in numbers)


def attention_in(text: str) -> str:
    """The attention that a program's text calls: "cudnn", "splash", or "plain" where it calls neither."""
    return "cudnn" if "__cudnn$fmha" in text else "splash" if "tpu_custom_call" in text else "plain"


def crossing(collectives: Iterable[Collective], *, num_devices: int, num_groups: int) -> list[Collective]:
    """The collectives that join devices of different groups.

    Group i is devices [i n, (i + 1) n) with n = num_devices / num_groups, as the cells of a mesh whose outermost axis is
    `cell`.

    Raises:
      ValueError: there are no collectives, so nothing is shown; a collective names a device beyond `num_devices`; or the
        groups do not divide the devices.
    """
    collectives = list(collectives)
    if not collectives:
        raise ValueError("no collective at all was found: that none leaves a cell is not shown")
    if num_devices % num_groups:
        raise ValueError(f"{num_devices} devices in {num_groups} groups: expected a divisor")
    size = num_devices // num_groups
    for collective in collectives:
        if any(device >= num_devices for group in collective.groups for device in group):
            raise ValueError(f"{collective.name} joins devices {collective.groups}; there are {num_devices}")
    return [c for c in collectives if any(len({device // size for device in group}) > 1 for group in c.groups)]


def bytes_by_kind(collectives: Iterable[Collective]) -> dict[str, int]:
    """Executed payload bytes per device and call of the program, by kind; the largest first."""
    sums: dict[str, int] = defaultdict(int)
    for c in collectives:
        # Groups of one device exchange nothing.
        sums[c.kind] += c.total_bytes if any(len(set(group)) > 1 for group in c.groups) else 0
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


# ------------------------------------------------------------------ the program's text


def _instruction(name: str, text: str) -> Instruction | None:
    end = closing(text, 0) + 1 if text.startswith("(") else text.find(" ")
    called = re.match(r" ?([\w-]+)\((.*)", text[end:])
    if called is None and COLLECTIVE.search(text):
        raise ValueError(f"unknown instruction: {name} = {text[:200]}")
    return Instruction(name, text[:end], called[1], called[2]) if called else None


def kind_of(op: Instruction) -> str | None:
    """The kind of collective that an instruction is or starts; None: no collective."""
    # Between TPU slices the hosts form a sum: `send` takes one device's summand, `recv` gives the sum.
    if transfer := op.opcode == "send" and SLICES.search(op.text):
        if transfer[1] != "ALL_REDUCE":
            raise ValueError(f"{op.name}: {transfer[1]} between slices is not known here")
        return "all-reduce"
    if op.opcode in ("send", "recv") and "is_host_transfer=true" not in op.text:
        raise ValueError(f"{op.name}: {op.opcode} between devices is not known here")
    return next((kind for kind in KINDS if op.opcode in (kind, f"{kind}-start")), None)


def operands(op: Instruction) -> list[str]:
    """Names of an instruction's operands."""
    inner = op.text[: closing("(" + op.text, 0) - 1]
    inner = re.sub(r"/\*.*?\*/", "", inner)
    return [operand.split()[-1].lstrip("%") for operand in elements_of(f"({inner})") if operand.strip()]


def closing(text: str, start: int) -> int:
    """The position of the bracket that closes the one at `start`."""
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] in "([{") - (text[position] in ")]}")
        if not depth:
            return position
    raise ValueError(f"brackets do not close: {text[start : start + 100]}")


def elements_of(shape: str) -> list[str]:
    """The shapes of a tuple's elements; [shape] for an array."""
    if not shape.startswith("("):
        return [shape]
    inner, elements, depth, start = shape[1:-1], [], 0, 0
    for position, letter in enumerate(inner):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            elements.append(inner[start:position])
            start = position + 1
    return [element.strip() for element in [*elements, inner[start:]]]


def num_bytes(shape: str) -> int:
    """Bytes of an array or a tuple: 64 for "bf16[4,8]{1,0:T(8,128)}".

    Raises:
      ValueError: an unknown dtype.
    """
    total = 0
    for element in elements_of(re.sub(r"/\*.*?\*/", "", shape)):
        if element.startswith("("):
            total += num_bytes(element)
            continue
        array = re.match(r"([a-z]\w*)\[([\d,]*)\]", element)
        width = re.match(r"[sufb]f?(\d+)", array[1]) if array else None
        if not array or not (width or array[1] in BITS):
            raise ValueError(f"unknown shape: {element[:100]}")
        bits = int(width[1]) if width else BITS[array[1]]
        total += math.prod(int(size) for size in array[2].split(",") if size) * bits // 8
    return total


def _payload(op: Instruction, kind: str, group_size: int) -> int:
    if not op.opcode.endswith("-start"):
        return num_bytes(op.shape) * (group_size if kind == "reduce-scatter" else 1)
    if kind == "all-reduce":
        return num_bytes(op.shape)
    # The shape is (inputs, outputs, and state that is neither); inputs and outputs are an array or a tuple each.
    return max(map(num_bytes, elements_of(op.shape)[:2]))


# ------------------------------------------------------------------ groups


def groups_of(attributes: str, num_devices: int) -> list[list[int]]:
    """The groups of devices in a collective's attributes, in any form that XLA writes.

    `{{0,1},{2,3}}`; `{}` for all; `[2,2]<=[4]`, also with a transposition `T(1,0)`; the joined axes of a mesh,
    `mesh['a'=2,'b'=2] {'b'}`, also with an order of its devices; `source_target_pairs={{0,1},{1,0}}`.

    Raises:
      ValueError: an unknown form.
    """
    if pairs := re.search(rf"source_target_pairs={LISTED}", attributes):
        return _listed(pairs[1])
    if groups := re.search(rf"replica_groups={LISTED}", attributes):
        return _listed(groups[1])
    if re.search(rf"replica_groups=\{{\}}{END}", attributes):
        return [list(range(num_devices))]
    if iota := re.search(rf"replica_groups=\[([\d,]+)\]<=({ORDER}){END}", attributes):
        return _device_order(iota[2]).reshape(_numbers(iota[1])).tolist()
    mesh = rf"replica_groups=mesh\[({SIZES})\](?:, device_ids=\(({ORDER})\))? \{{({NAMES})\}}{END}"
    if named := re.search(mesh, attributes):
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        joined = re.findall(r"'(\w+)'", named[3])
        if set(joined) <= set(axes):
            order = _device_order(named[2] or f"[{math.prod(axes.values())}]").reshape(tuple(axes.values()))
            joined_axes = [list(axes).index(name) for name in joined]
            last = np.moveaxis(order, joined_axes, range(-len(joined_axes), 0))
            return last.reshape(-1, math.prod(axes[name] for name in joined)).tolist()
    raise ValueError(f"unknown groups: {attributes[:300]}")


def _listed(text: str) -> list[list[int]]:
    return [_numbers(group) for group in text.strip("{}").split("},{")]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _device_order(text: str) -> np.ndarray:
    """The device ids of "[2,2,2]T(1,0,2)": 0 .. 7 in this shape, transposed."""
    shape, _, turned = text.partition("T")
    ids = np.arange(math.prod(_numbers(shape.strip("[]")))).reshape(_numbers(shape.strip("[]")))
    return ids.transpose(_numbers(turned.strip("()"))) if turned else ids
