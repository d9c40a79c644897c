"""Matrices stored in 8 or 4 bits with a scale for every block, and products with them.

They are qwix's `QArray`s: `qvalue` int8 or uint4 (indices into `NF4`), `scale` bfloat16, one for each block of up to
`BLOCK` numbers along one axis. Dequantising and quantising again gives the same matrix.
Source: google/qwix 0.1.8 (the array); arXiv 2305.14314, appendix E (NF4).
"""

import math

import jax
import jax.numpy as jnp

QUANTIZED = ("int8", "nf4")
# Numbers that share a scale: as in QLoRA, a quarter of a bit for each number.
BLOCK = 64
# Quantiles of a normal distribution between -1 and 1.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# The value that the largest number of a block is scaled to.
LARGEST = {"int8": 127.0, "nf4": 1.0}


def array_type():
    """qwix's `QArray`, imported late: only quantised matrices need the package."""
    from qwix import QArray

    return QArray


def is_quantized(x) -> bool:
    """Whether `x` is a quantised matrix, or its shapes, shardings or names in the same form."""
    return hasattr(x, "qvalue")


def blocks_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """(the axis that blocks lie along, numbers in a block) of a matrix with no layer axis.

    The first axis with a multiple of 4 whole blocks of `BLOCK`, so that a mesh can split them; else the axis with the
    largest blocks.
    """
    sizes = [math.gcd(BLOCK, size) for size in shape]
    whole = [i for i, size in enumerate(shape) if size % (4 * BLOCK) == 0]
    axis = whole[0] if whole else max(range(len(shape)), key=lambda i: (sizes[i], -i))
    return axis, sizes[axis]


def scale_shape(shape: tuple[int, ...], *, lead: int = 1) -> tuple[int, ...]:
    """Shape of the scales of a matrix of `shape`, whose first `lead` axes count layers."""
    axis, size = blocks_of(shape[lead:])
    axis += lead
    return (*shape[:axis], shape[axis] // size, *shape[axis + 1 :])


def like(shape: tuple[int, ...], dtype: str):
    """A stacked matrix of `shape` in `dtype` ("int8" or "nf4") as `jax.ShapeDtypeStruct`s."""
    number = jax.ShapeDtypeStruct(shape, jnp.int8 if dtype == "int8" else jnp.uint4)
    return array_type()(number, jax.ShapeDtypeStruct(scale_shape(shape), jnp.bfloat16), None, dtype)


def quantize(w: jax.Array, dtype: str, *, lead: int = 1):
    """`w`, float[...], in `dtype`: "int8" or "nf4"; its first `lead` axes count layers."""
    axis, size = blocks_of(w.shape[lead:])
    w = w.astype(jnp.float32)
    blocks = _split_blocks(w, axis + lead, size)
    scale = jnp.abs(blocks).max(axis=axis + lead + 1, keepdims=True) / LARGEST[dtype]
    # Rounded before the division, so that the stored scale is the one that was used. A block of zeros has the scale 1.
    scale = scale.astype(jnp.bfloat16)
    scale = jnp.where(scale == 0, jnp.ones_like(scale), scale)
    x = blocks / scale.astype(jnp.float32)
    if dtype == "int8":
        qvalue = jnp.clip(jnp.round(x), -127, 127).astype(jnp.int8)
    else:
        # The index of the nearest number is how many of the 15 midpoints between neighbours lie below.
        middles = [(a + b) / 2 for a, b in zip(NF4[:-1], NF4[1:], strict=True)]
        qvalue = sum(((x > middle).astype(jnp.int8) for middle in middles), jnp.int8(0)).astype(jnp.uint4)
    return array_type()(qvalue.reshape(w.shape), scale.reshape(scale_shape(w.shape, lead=lead)), None, dtype)


def dequantize(q, dtype) -> jax.Array:
    """The matrix in `dtype`, float[...]; the product with the scales is taken in float32."""
    values = q.qvalue.astype(jnp.float32) if q.qtype == "int8" else _nf4_values(q.qvalue)
    axis = next((i for i, (a, b) in enumerate(zip(q.qvalue.shape, q.scale.shape, strict=True)) if a != b), None)
    scale = q.scale.astype(jnp.float32)
    if axis is None:
        return (values * scale).astype(dtype)
    num = q.scale.shape[axis]
    blocks = _split_blocks(values, axis, q.qvalue.shape[axis] // num) * jnp.expand_dims(scale, axis + 1)
    return blocks.reshape(values.shape).astype(dtype)


def product(equation: str, x: jax.Array, q) -> jax.Array:
    """`einsum(equation, x, matrix)`; the backward pass dequantises the matrix again instead of keeping it."""

    def run(x, q):
        return jnp.einsum(equation, x, dequantize(q, x.dtype))

    return jax.checkpoint(run, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=False)(x, q)


def cast(w: jax.Array, dtype) -> jax.Array:
    """A parameter in the compute dtype; the numbers of a quantised matrix stay as they are."""
    return w.astype(dtype) if jnp.issubdtype(w.dtype, jnp.floating) else w


def _split_blocks(x: jax.Array, axis: int, size: int) -> jax.Array:
    """x with `axis` split in two: blocks, and the numbers of a block."""
    return x.reshape(*x.shape[:axis], x.shape[axis] // size, size, *x.shape[axis + 1 :])


def _nf4_values(numbers: jax.Array) -> jax.Array:
    """float32 values of `NF4`, chosen bit by bit, which on a TPU is far faster than a table lookup."""
    numbers = numbers.astype(jnp.int32)
    values: list = list(NF4)
    for bit in range(4):
        is_set = (numbers >> bit) & 1 == 1
        values = [jnp.where(is_set, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
    return values[0].astype(jnp.float32)
