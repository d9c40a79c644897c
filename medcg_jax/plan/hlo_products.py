"""What a compiled program computes and writes: its matrix products with their FLOPs, and the arrays outside fusions.

XLA's own FLOP count takes a loop's body once and leaves fused attention out. Here products are read from the program's
text, with the trips of the loops around them: `dot`, `convolution` (a TPU's form of a dot), cuBLAS's calls, and the
attention of cuDNN and of splash by their shapes and masks. Unknown custom calls are listed as not counted.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from medcg_jax.plan.hlo import Instruction, Program, Scope, elements_of, num_bytes, operands

GEMMS = ("__cublas$gemm", "__cublas$lt$matmul", "__cublas$lt$matmul$f8", "__onednn$matmul")
FMHA = "__cudnn$fmhaSoftmax"
MOSAIC = "tpu_custom_call"
# Products for each pair of query and key, of 2 x head_dim FLOPs each. Backward passes recompute the scores: cuDNN once
# for all three gradients, splash once for those of keys and values and once for that of queries.
FMHA_PRODUCTS = {"": 2, "Backward": 5}
SPLASH_PRODUCTS = {"fwd": 2, "dkv": 4, "dq": 3}
# Splash copies the segment or position of each query and key to every lane or sublane.
LANES, SUBLANES = 128, 8
# Custom calls without a matrix product.
OTHERS = re.compile(
    r"AllocateBuffer|AssumeGatherIndicesInBound|GatherScatterIndicesBitpacked|TopK|PartialReduce|Sharding|ResizeMaster|"
    r"ResizeVirtual|AsyncCollective\w+|PrepareAsyncCall\w+|ConcatBitcast|ConsumeFakeFusionParam|\w*MoveTo\w+|annotate_device_placement|__cub\$\w+|"
    r"xla\.gpu\.\w+|BarrierStart|BarrierDone|AllReduce\w*|SliceId|PadToStatic|SliceToDynamic|LayoutConstraint"
)
# Opcodes that write no array: they name other arrays, or arguments.
NAMES = {"parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "opt-barrier", "domain"}
# Opcodes that move numbers. Without an op_name the partitioner added them: pieces of a gradient laid beside one another
# may have any length.
MOVES = re.compile(r"concatenate|copy|slice|pad|transpose|reshape|all-gather|all-to-all|collective-permute")
# Opcodes whose called computation works on single numbers, not on arrays.
ELEMENTWISE = {
    "fusion", "reduce", "reduce-window", "scatter", "select-and-scatter", "sort", "map", "all-reduce", "reduce-scatter",
    "all-reduce-start",
}  # fmt: skip


@dataclass(frozen=True)
class Product:
    """One matrix product, or one attention, on one device.

    kind: "dot", "convolution", "gemm", "cudnn" or "splash". flops: of one execution; a multiply-add counts 2.
    trips: executions in one call of the program. where: `Instruction.operation`.
    """

    name: str
    kind: str
    flops: int
    trips: int
    where: str

    @property
    def total(self) -> int:
        return self.flops * self.trips


@dataclass(frozen=True)
class Products:
    """counted: in the order of the text. unread: targets of uncounted custom calls that may have products."""

    counted: tuple[Product, ...]
    unread: tuple[str, ...]

    @property
    def flops(self) -> int:
        """FLOPs that one device executes in one call of the program."""
        return sum(product.total for product in self.counted)


def products(text: str, *, open_trips: int | None = None) -> Products:
    """The matrix products that one device executes; text: of `jax.stages.Compiled.as_text`.

    A conditional counts with all its branches. open_trips: as in `hlo.collectives`.

    Raises:
      ValueError: the text is no program; or a product, or the trip count of a loop around one, cannot be read.
    """
    program = Program(text)
    unread: dict[str, None] = {}
    shapes = {name: {op.name: op.shape for op in instructions} for name, instructions in program.computations.items()}

    def visit(op: Instruction, scope: Scope) -> list[Product] | None:
        if op.opcode not in ("dot", "convolution", "custom-call"):
            return None
        product = product_of(op, shapes[scope.computation], unread)
        return product and [Product(op.name, *product, program.trips(scope, open_trips), op.operation)]

    return Products(tuple(program.executed(visit)), tuple(unread))


# ------------------------------------------------------------------ one product


def product_of(op: Instruction, shapes: dict[str, str], unread: dict) -> tuple[str, int] | None:
    """(kind, FLOPs) of one execution of an instruction; None: no product.

    shapes: of the instructions of its computation, by name. unread: gets the target of an unknown custom call.
    """
    given = [dims(shapes[name]) for name in operands(op) if name in shapes and not shapes[name].startswith("(")]
    out = dims(elements_of(op.shape)[0])
    if op.opcode == "dot":
        return "dot", 2 * prod(out) * _contracted(op, given[0], r"lhs_contracting_dims=\{([\d,]*)\}")
    if op.opcode == "convolution":
        return "convolution", _convolution(op, given[0], given[1], out)
    named = re.search(r'custom_call_target="([^"]*)"', op.text)
    target = named[1] if named else ""
    if target in GEMMS:
        contracted = r'"lhs_contracting_dimensions":\s*\[([^\]]*)\]'
        return "gemm", 2 * prod(out) * _contracted(op, given[0], contracted)
    if target.startswith(FMHA) and target.removeprefix(FMHA) in FMHA_PRODUCTS:
        return "cudnn", FMHA_PRODUCTS[target.removeprefix(FMHA)] * _cudnn_pairs(op, given[0])
    if target == MOSAIC and (splash := re.match(r"splash_m[hq]a_(fwd|dkv|dq)(_segmented)?_", op.name)):
        return "splash", SPLASH_PRODUCTS[splash[1]] * _splash_pairs(given, bool(splash[2]))
    if not OTHERS.fullmatch(target) and not op.called():
        unread.setdefault(f"{target} ({op.name.partition('.')[0]})" if target == MOSAIC else target or op.name)
    return None


def dims(shape: str) -> tuple[int, ...]:
    """(4, 8) of "bf16[4,8]{1,0}".

    Raises:
      ValueError: it is no array.
    """
    array = re.match(r"[a-z]\w*\[([\d,]*)\]", shape)
    if not array:
        raise ValueError(f"no array: {shape[:100]}")
    return tuple(map(int, filter(None, array[1].split(","))))


def _contracted(op: Instruction, left: tuple[int, ...], pattern: str) -> int:
    """Length of the sums in a product; `pattern` finds the summed axes of its left side."""
    axes = re.search(pattern, op.text)
    if not axes:
        raise ValueError(f"unknown product: {op.name} = {op.shape} {op.opcode}({op.text[:200]}")
    return prod(left[int(axis.strip(' "'))] for axis in axes[1].split(",") if axis)


def _convolution(op: Instruction, left: tuple[int, ...], kernel: tuple[int, ...], out: tuple[int, ...]) -> int:
    """FLOPs of a convolution, which may be a TPU's batched product; products with padding and holes do not count."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.text)
    if not labels:
        raise ValueError(f"unknown convolution: {op.name} = {op.shape} {op.opcode}({op.text[:200]}")
    window = re.search(r"window=\{([^}]*)\}", op.text)
    fields = dict(field.split("=") for field in window[1].split()) if window else {}
    # Feature and batch groups are in the shapes: the result's batch and the kernel's features are of one group.
    flops = 2 * out[labels[3].index("b")] * out[labels[3].index("f")] * kernel[labels[2].index("i")]
    places = sorted(label for label in labels[3] if label.isdigit())
    for number, label in enumerate(places):
        written = {key: value.split("x")[number] for key, value in fields.items()}
        pad = int(written.get("pad", "0_0").split("_")[0])
        stride, hole, gap = (int(written.get(key, 1)) for key in ("stride", "rhs_dilate", "lhs_dilate"))
        length = (left[labels[1].index(label)] - 1) * gap + 1
        starts = range(-pad, -pad + stride * out[labels[3].index(label)], stride)
        taps = range(0, hole * kernel[labels[2].index(label)], hole)
        flops *= sum(0 <= start + tap < length and (start + tap) % gap == 0 for start in starts for tap in taps)
    return flops


def _cudnn_pairs(op: Instruction, query: tuple[int, ...]) -> int:
    """2 x head_dim x the pairs of query and key that cuDNN's attention computes; causal: half of the square."""
    square = re.search(r'"intermediate_tensor_shape":\s*\{[^}]*?"dimensions":\s*\[([^\]]*)\]', op.text)
    mask = re.search(r'"mask_type":\s*"(\w+)"', op.text)
    if not square or not mask:
        raise ValueError(f"unknown attention: {op.name} = {op.shape} {op.text[:200]}")
    batch, heads, length, keys = (int(number.strip(' "')) for number in square[1].split(","))
    pairs = 2 * batch * heads * length * keys * (prod(query) // (batch * heads * length))
    return pairs // 2 if "CAUSAL" in mask[1] else pairs


def _splash_pairs(shapes: list[tuple[int, ...]], segmented: bool) -> int:
    """2 x head_dim x the pairs in the blocks that splash attention computes.

    A causal mask comes as positions, which are one more array; blocks above the diagonal are skipped.
    """
    # The mask's blocks, [heads or 1, blocks of queries, blocks of keys], then queries, keys and values, with a leading
    # axis of rows where there are several.
    masks = [shape for shape in shapes if len(shape) == 3 and shape[0] == 1]
    arrays = [shape for shape in shapes if len(shape) > 2 and shape not in masks]
    if not masks or len(arrays) < 3 or any(shape[:-3] != arrays[0][:-3] for shape in arrays[:3]):
        raise ValueError(f"unknown splash attention of {shapes}")
    *rows, num_heads, length, width = arrays[0]
    blocks, keys = masks[0][1], arrays[1][-2]
    pairs = 2 * prod(rows) * num_heads * length * keys * width
    # Arrays of segments of queries and of keys, and for a causal mask of positions.
    along = sum(
        shape[-2:] in ((length, LANES), (SUBLANES, length)) and len(shape) in (2, len(rows) + 2) for shape in shapes
    )
    return pairs * (blocks + 1) // (2 * blocks) if along > 2 * segmented else pairs


# ------------------------------------------------------------------ arrays


@dataclass(frozen=True)
class Buffer:
    """One array on one device: the name of its instruction, its shape, its bytes, and `Instruction.operation`."""

    name: str
    dims: tuple[int, ...]
    num_bytes: int
    where: str


def buffers(text: str) -> list[Buffer]:
    """Every array that a program writes on one device; later ones reuse the memory of earlier ones.

    Raises:
      ValueError: the text is no program.
    """
    program = Program(text)
    seen, waiting, written = set(), [program.entry], []
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for op in program.computations[name]:
            if op.opcode == "while":
                waiting += [op.attribute("body"), op.attribute("condition")]
            elif op.opcode not in ELEMENTWISE:
                waiting += op.called()
            moved = MOVES.match(op.opcode) and "op_name=" not in op.text
            if op.opcode not in NAMES and not op.opcode.endswith("-done") and not moved:
                written += _arrays(op)
    return written


def _arrays(op: Instruction) -> Iterator[Buffer]:
    waiting = [re.sub(r"/\*.*?\*/", "", op.shape)]
    while waiting:
        shape = waiting.pop()
        if shape.startswith("("):
            waiting += elements_of(shape)
        elif re.match(r"[a-z]\w*\[\d", shape):
            yield Buffer(op.name, dims(shape), num_bytes(shape), op.operation)
