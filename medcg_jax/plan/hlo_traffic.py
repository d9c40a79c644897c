"""The bytes that one instruction of a compiled program reads from and writes to a device's memory.

A fusion keeps what lies inside it in registers: it reads its operands and writes its results. Of an operand that it
only slices, as a scan does with a stack of layers, it reads the slice; of a result that it updates in place, it writes
the update. Arrays in a TPU's memory on the chip, "S(1)" in the program's text, cross no memory. What a collective
itself reads and writes is not counted.
"""

import re
from collections import defaultdict
from collections.abc import Iterator

from medcg_jax.plan.hlo import Instruction, Program, elements_of, kind_of, num_bytes, operands
from medcg_jax.plan.hlo_products import FMHA, GEMMS

# Instructions that move no array: they name one, or are an argument, a constant or the number of a device.
STILL = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "opt-barrier", "domain", "after-all",
    "add-dependency", "partition-id", "replica-id", "get-dimension-size", "async-update",
}  # fmt: skip
# Instructions that read a part of their first operand, as large as their result.
SLICES = {"dynamic-slice", "slice", "gather"}
# Instructions that may write into their first operand: position of the update among the operands.
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
# Custom calls that move no array of their own.
STILL_CALLS = re.compile(
    r"AllocateBuffer|ConcatBitcast|(AsyncCollective|PrepareAsyncCall)\w+|AssumeGatherIndicesInBound|Sharding"
)
# Instructions that read every operand and write every result, alone or inside a fusion.
PLAIN = {
    "abs", "add", "and", "atan2", "bitcast-convert", "broadcast", "cbrt", "ceil", "clamp", "clz", "compare", "complex",
    "concatenate", "convert", "convolution", "copy", "cosine", "custom-call", "divide", "dot", "erf", "exponential",
    "exponential-minus-one", "fft", "floor", "imag", "iota", "is-finite", "log", "log-plus-one", "logistic", "map",
    "maximum", "minimum", "multiply", "negate", "not", "or", "pad", "popcnt", "power", "real", "reduce",
    "reduce-precision", "reduce-window", "remainder", "reshape", "reverse", "rng", "rng-bit-generator",
    "rng-get-and-update-state", "round-nearest-afz", "round-nearest-even", "rsqrt", "select", "select-and-scatter",
    "set-dimension-size", "shift-left", "shift-right-arithmetic", "shift-right-logical", "sign", "sine", "sort",
    "sqrt", "stochastic-convert", "subtract", "tan", "tanh", "topk", "transpose", "triangular-solve", "xor",
}  # fmt: skip
SPACE = re.compile(r"S\((\d+)\)\}$")
HOST_SPACE = 5


class Traffic:
    """Bytes that a program's instructions move over a device's memory."""

    def __init__(self, program: Program):
        self.program = program
        self.ops = {name: {op.name: op for op in ops} for name, ops in program.computations.items()}
        self.roots = {name: ops[-1] for name, ops in program.computations.items() if ops}
        self._found_users: dict[str, dict[str, list[tuple[Instruction, int]]]] = {}
        # On a GPU "S(1)" is memory for collectives, which lies in the device's.
        self.on_chip = any(":T(" in op.shape for op in program.computations[program.entry])

    def num_bytes(self, op: Instruction, computation: str) -> int:
        """Bytes of one execution.

        Raises:
          ValueError: the instruction is not known here, or an array lies in the host's memory.
        """
        if op.opcode == "fusion":
            called = op.called()[0]
            reads = sum(self._read(called, index, name, computation) for index, name in enumerate(operands(op)))
            outer, inner = elements_of(_plain(op.shape)), self._results(called)
            return reads + sum(
                self._written(*result) if self.outside(shape) else 0 for shape, result in zip(outer, inner, strict=True)
            )
        if op.opcode in STILL or kind_of(op) is not None:
            return 0
        names, whole = operands(op), self._outside_bytes(op.shape)
        if op.opcode in SLICES:
            # The slice is read and written; indices are few.
            return whole + (num_bytes(op.shape) if self._lies_outside(names[0], computation) else 0)
        if op.opcode in UPDATES:
            return 2 * self._size(names[UPDATES[op.opcode]], computation)
        if op.opcode == "custom-call":
            target = re.search(r'custom_call_target="([^"]*)"', op.text)
            if target and STILL_CALLS.fullmatch(target[1]):
                return 0
            if target and (target[1] in GEMMS or target[1].startswith(FMHA)):
                # The last result is scratch memory.
                results = [shape for shape in elements_of(_plain(op.shape)) if not re.match(r"[su]8\[\d*\]", shape)]
                whole = sum(map(self._outside_bytes, results))
        elif op.opcode not in PLAIN:
            raise ValueError(f"{op.name}: what {op.opcode} moves over memory is not known here")
        return whole + sum(self._size(name, computation) for name in names)

    def copied(self, op: Instruction) -> int:
        """Bytes over the memory of a copy that runs beside computations: `copy-start`, or an `async-start` of slices."""
        elements = elements_of(_plain(op.shape))
        if op.opcode == "copy-start":
            return self._outside_bytes(elements[0]) + self._outside_bytes(elements[1])
        called = op.called()[0]
        root = self.roots[called]
        moved = operands(root)[UPDATES[root.opcode]] if root.opcode in UPDATES else root.name
        if root.opcode not in ("copy", "dynamic-update-slice", "dynamic-slice", "slice", "bitcast"):
            return sum(self.num_bytes(inner, called) for inner in self.program.computations[called])
        size = num_bytes(self.ops[called][moved].shape)
        return size * sum(any(map(self.outside, _arrays(element))) for element in elements[:2])

    def outside(self, shape: str) -> bool:
        """Whether an array lies in the device's memory, and not on the chip.

        Raises:
          ValueError: it lies in the host's memory.
        """
        space = SPACE.search(shape)
        if space and int(space[1]) == HOST_SPACE:
            raise ValueError(f"{shape}: an array in the host's memory, whose bandwidth is not known here")
        return not (self.on_chip and space and int(space[1]))

    def _outside_bytes(self, shape: str) -> int:
        return sum(num_bytes(array) for array in _arrays(_plain(shape)) if self.outside(array))

    def _lies_outside(self, name: str, computation: str) -> bool:
        op = self.ops[computation].get(name)
        return op is not None and any(map(self.outside, _arrays(_plain(op.shape))))

    def _size(self, name: str, computation: str) -> int:
        """Bytes of an operand in the device's memory; a name without an instruction is a constant in the text."""
        op = self.ops[computation].get(name)
        return self._outside_bytes(op.shape) if op else 0

    # -------------------------------------------------------------- inside a fusion

    def _read(self, called: str, index: int, outer: str, computation: str) -> int:
        """Bytes that a fusion reads of its operand `index`, which is `outer` in `computation`."""
        if not self._lies_outside(outer, computation):
            return 0
        return self._used(called, self._parameter(called, index))

    def _parameter(self, computation: str, index: int) -> Instruction:
        ops = self.program.computations[computation]
        return next(op for op in ops if op.opcode == "parameter" and op.text.startswith(f"{index})"))

    def _used(self, computation: str, op: Instruction) -> int:
        """Bytes that a computation reads of the array that `op` is, all of it at most."""
        whole, used = num_bytes(_plain(op.shape)), 0
        for user, operand_index in self._users(computation).get(op.name, ()):
            if user.opcode in SLICES and operand_index == 0:
                used += num_bytes(user.shape)
            elif user.opcode in ("bitcast", "reshape", "get-tuple-element"):
                used += self._used(computation, user)
            elif user.opcode == "fusion":
                called = user.called()[0]
                used += self._used(called, self._parameter(called, operand_index))
            elif user.opcode in PLAIN | SLICES | UPDATES.keys():
                in_place = user.opcode in UPDATES and operand_index == 0 or "AsyncCollective" in user.text
                used += 0 if in_place else whole
            elif user.opcode not in STILL and kind_of(user) is None:
                raise ValueError(f"{user.name}: what {user.opcode} reads inside a fusion is not known here")
        return min(used, whole)

    def _users(self, computation: str) -> dict[str, list[tuple[Instruction, int]]]:
        """Name -> the instructions that take it, and its index among their operands."""
        if computation not in self._found_users:
            users = self._found_users[computation] = defaultdict(list)
            for user in self.program.computations[computation]:
                for operand_index, name in enumerate(
                    () if user.opcode in ("parameter", "constant") else operands(user)
                ):
                    users[name].append((user, operand_index))
        return self._found_users[computation]

    def _results(self, computation: str) -> list[tuple[str, str]]:
        """(computation, name) of what makes each of a computation's results."""
        root = self.roots[computation]
        if root.opcode == "fusion":
            return self._results(root.called()[0])
        if root.opcode == "tuple":
            return [(computation, name) for name in operands(root)]
        number = len(elements_of(_plain(root.shape))) if root.shape.startswith("(") else 1
        return [(computation, root.name)] * number

    def _written(self, computation: str, name: str) -> int:
        """Bytes that a fusion writes for the result `name`."""
        op = self.ops[computation][name]
        if op.opcode == "bitcast":
            return self._written(computation, operands(op)[0])
        if op.opcode in UPDATES:
            return num_bytes(_plain(self.ops[computation][operands(op)[UPDATES[op.opcode]]].shape))
        if op.opcode == "parameter" or kind_of(op) is not None or "AsyncCollective" in op.text:
            return 0
        if op.opcode == "fusion":
            return sum(self._written(*result) for result in self._results(op.called()[0]))
        if op.shape.startswith("("):
            # Of an operation with several results, as a sum of two arrays: each is a result of the fusion.
            arrays = list(_arrays(_plain(op.shape)))
            return sum(map(num_bytes, arrays)) // len(arrays)
        return num_bytes(op.shape)


def _plain(shape: str) -> str:
    return re.sub(r"/\*.*?\*/", "", shape)


def _arrays(shape: str) -> Iterator[str]:
    for element in elements_of(shape):
        if element.startswith("("):
            yield from _arrays(element)
        elif element:
            yield element
