"""Transforms between released tensors and parameters, and the entries of a family's table.

A model's table is a list of `Entry`: a name template, the path of our parameter, and the transform between them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Shape = tuple[int, ...]
Index = tuple[slice, ...]


@dataclass(frozen=True)
class Transform:
    """A released tensor becomes ours by splitting its axes into factors, reordering them, and merging them.

    layout: our shape -> (the factors of each axis of the released tensor, the order of all factors in ours).
      PyTorch's [N * H, E] as our [E, N, H] is ((N, H), (E,)) and (2, 0, 1): ours has the third factor first.
    """

    layout: Callable[[Shape], tuple[tuple[Shape, ...], tuple[int, ...]]]

    def released_shape(self, shape: Shape) -> Shape:
        return tuple(math.prod(factors) for factors in self.layout(shape)[0])

    def store(self, ours: np.ndarray) -> np.ndarray:
        """Our array as the released tensor."""
        factors, order = self.layout(ours.shape)
        sizes = [size for axis in factors for size in axis]
        split = ours.reshape([sizes[i] for i in order]).transpose(np.argsort(order).astype(int))
        return split.reshape(self.released_shape(ours.shape))

    def ours(self, shape: Shape) -> "Reordered":
        """What makes a released tensor ours of `shape`."""
        factors, order = self.layout(shape)
        return Reordered(tuple(size for axis in factors for size in axis), tuple(order), shape)


@dataclass(frozen=True)
class Reordered:
    """Called with a released tensor, an array of JAX or numpy, gives ours. Equal for equal layouts, so that layers share
    a program."""

    sizes: Shape
    order: tuple[int, ...]
    shape: Shape

    def __call__(self, released):
        return released.reshape(self.sizes).transpose(self.order).reshape(self.shape)


def spans_of(index: Index, shape: Shape) -> list[tuple[int, int]]:
    """(start, stop) of every axis; axes beyond `index` are whole."""
    whole = index + (slice(None),) * (len(shape) - len(index))
    return [axis_slice.indices(size)[:2] for axis_slice, size in zip(whole, shape, strict=True)]


# ------------------------------------------------------------------ the vocabulary of tables


def linear(inputs: int = 1) -> Transform:
    """PyTorch's [out, in] <-> ours [in..., out...]; inputs: how many input axes."""

    def layout(shape: Shape):
        num_out = len(shape) - inputs
        return (shape[inputs:], shape[:inputs]), (*range(num_out, len(shape)), *range(num_out))

    return Transform(layout)


def conv_patch(patch: int, channels: int = 3) -> Transform:
    """PyTorch's conv kernel [E, C, patch, patch] <-> ours [patch * patch * C, E]."""
    return Transform(lambda shape: (((shape[1],), (channels,), (patch,), (patch,)), (2, 3, 1, 0)))


def fused_qkv() -> Transform:
    """Rows [3 * N * H, ...] of queries, then keys, then values <-> ours [..., N, 3 * H], all three head by head."""

    def layout(shape: Shape):
        *outer, num_heads, width = shape
        order = (*range(3, 3 + len(outer)), 1, 0, 2)
        return ((3, num_heads, width // 3), *((size,) for size in outer)), order

    return Transform(layout)


def leading_ones(num: int) -> Transform:
    """PyTorch's tensor with `num` axes of size 1 in front <-> ours without them."""
    return Transform(lambda shape: (((),) * num + tuple((size,) for size in shape), tuple(range(len(shape)))))


SAME = leading_ones(0)
FLAT = Transform(lambda shape: ((shape,), tuple(range(len(shape)))))
# PyTorch's embedding [rows, product of the other axes] <-> ours [rows, other axes...].
ROWS = Transform(lambda shape: ((shape[:1], shape[1:]), tuple(range(len(shape)))))


@dataclass(frozen=True)
class Entry:
    """One line of a table.

    name: the released (canonical) name; `{layer}` stands for the layer's number.
    path: keys into params.
    layers: the released layers that fill our leading axis, in order; None: the parameter is not stacked.
    rows: axis 0 of the released tensor counts vocabulary rows; a checkpoint may have more than the model.
    """

    name: str
    path: tuple[str, ...]
    transform: Transform
    layers: range | tuple | None = None
    rows: bool = False


# (released name, our path with spaces between its keys, transform)
Lines = tuple[tuple[str, str, Transform], ...]


def dense(name: str, path: str, kernel: Transform | None = None, *, bias: bool = True) -> Lines:
    """The weight of a product (by default [out, in] <-> [in, out]), and its bias."""
    weight = ((f"{name}.weight", f"{path} kernel", kernel or linear()),)
    return weight + (((f"{name}.bias", f"{path} bias", FLAT),) if bias else ())


def norm(name: str, path: str, *, bias: bool = True) -> Lines:
    """The scale of a norm, and its bias."""
    scale = ((f"{name}.weight", f"{path} scale", SAME),)
    return scale + (((f"{name}.bias", f"{path} bias", SAME),) if bias else ())


def attention(
    name: str, path: str = "", *, out: str = "out_proj", bias: bool = True, out_bias: bool | None = None
) -> Lines:
    """The four products of attention over heads; out_bias: None: as `bias`."""
    lines = sum((dense(f"{name}.{each}_proj", f"{path} {each}", bias=bias) for each in "qkv"), ())
    out_bias = bias if out_bias is None else out_bias
    return lines + dense(f"{name}.{out}", f"{path} out", linear(inputs=2), bias=out_bias)


def lora_halves(name: str, path: str, layer_path: str) -> Lines:
    """The halves of the adapter of the product at `layer_path`, as peft names them."""
    first = linear(inputs=2 if layer_path.split()[-1] == "out" else 1)
    return (f"{name}.lora_A.weight", f"{path} a", first), (f"{name}.lora_B.weight", f"{path} b", linear())


def entries(lines: Lines, prefix: str = "", path: str = "", layers: range | tuple | None = None) -> list[Entry]:
    """Lines of a table with `prefix` before their names and `path` before their paths."""
    return [Entry(prefix + name, (*path.split(), *ours.split()), kind, layers) for name, ours, kind in lines]
