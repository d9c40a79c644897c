"""The arrays that a compiled program writes to memory: what stands outside its fusions, with shape and bytes.

An upper bound on what is there at any moment: arrays of a program share their place one after another.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from medcg_jax.plan.hlo import Instruction, attribute, called_by, num_bytes, parts_of, read_program
from medcg_jax.plan.hlo_flops import dims

# What writes nothing of its own: it names other arrays, or comes from outside.
NAMES = {"parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "opt-barrier", "domain"}
# What moves numbers that another instruction made. Without a name of the model's it is the partitioner's own: pieces of
# a gradient laid beside one another may have any length.
MOVES = re.compile(r"concatenate|copy|slice|pad|transpose|reshape|all-gather|all-to-all|collective-permute")
# Computations that run for each number, not as a program of arrays.
ELEMENTWISE = {
    "fusion", "reduce", "reduce-window", "scatter", "select-and-scatter", "sort", "map", "all-reduce", "reduce-scatter",
    "all-reduce-start",
}  # fmt: skip


@dataclass(frozen=True)
class Buffer:
    """One array on one device: its instruction, lengths of its axes, bytes, and the operation it was made from."""

    name: str
    dims: tuple[int, ...]
    num_bytes: int
    where: str


def buffers(text: str) -> list[Buffer]:
    """The arrays that a program writes on one device, in the order of its text; of `jax.stages.Compiled.as_text`.

    Raises:
      ValueError: no program.
    """
    computations, entry = read_program(text)
    return [buffer for one in _written(computations, entry) for buffer in _arrays(one)]


def _written(computations: dict[str, list[Instruction]], entry: str) -> Iterator[Instruction]:
    seen, waiting = set(), [entry]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for one in computations[name]:
            if one.opcode == "while":
                waiting += [attribute(one, "body"), attribute(one, "condition")]
            elif one.opcode not in ELEMENTWISE:
                waiting += called_by(one)
            moved = MOVES.match(one.opcode) and "op_name=" not in one.rest
            if one.opcode not in NAMES and not one.opcode.endswith("-done") and not moved:
                yield one


def _arrays(one: Instruction) -> Iterator[Buffer]:
    where = re.search(r'op_name="([^"]*)"', one.rest)
    waiting = [re.sub(r"/\*.*?\*/", "", one.shape)]
    while waiting:
        shape = waiting.pop()
        if shape.startswith("("):
            waiting += parts_of(shape)
        elif re.match(r"[a-z]\w*\[\d", shape):
            yield Buffer(one.name, dims(shape), num_bytes(shape), where[1] if where else "")
