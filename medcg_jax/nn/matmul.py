"""Products of activations and weights in 8 bits, by qwix: forward and for the activations' gradient.

Every product quantises both sides from their current values, with a scale for each row of the activations and each
column of the weights (along the axes summed over). The gradient of the weights stays in the compute dtype: it sums over
all tokens of a batch, and rounding errors would add up (arXiv 2304.13013, SwitchBack).

On another mesh sums are taken in another order, so a number may round the other way. Results then differ by the size of
a rounding error.
"""

import importlib.util
from functools import partial

import jax
import jax.numpy as jnp

from medcg_jax.config import ConfigError

# Name -> (dtype of activations and weights, dtype of the gradient that comes in).
KINDS = {
    "int8": (jnp.int8, jnp.int8),
    # Three bits of mantissa; two for gradients, whose range is wider.
    "fp8": (jnp.float8_e4m3fn, jnp.float8_e5m2),
}


def require(kind: str) -> None:
    """Raises ConfigError if products of this kind are asked for and qwix is not installed."""
    if kind and importlib.util.find_spec("qwix") is None:
        raise ConfigError(f"model.matmul={kind!r} needs qwix, which is not installed: `pip install qwix`")


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def einsum(kind: str, equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """`jnp.einsum(equation, x, w)` in x's dtype, with the product in 8 bits.

    kind: one of `KINDS`. equation: without an ellipsis, and without an axis that x, w and the result share.
    """
    dtype, _ = KINDS[kind]
    return _product(equation, x, w, dtype, dtype).astype(x.dtype)


def _forward(kind: str, equation: str, x: jax.Array, w: jax.Array):
    return einsum(kind, equation, x, w), (x, w)


def _backward(kind: str, equation: str, residuals, g: jax.Array):
    x, w = residuals
    dtype, grad_dtype = KINDS[kind]
    left, right, out = equation.replace("->", ",").split(",")
    dx = _product(f"{out},{right}->{left}", g, w, grad_dtype, dtype)
    dw = jnp.einsum(f"{left},{out}->{right}", x, g)
    return dx.astype(x.dtype), dw.astype(w.dtype)


einsum.defvjp(_forward, _backward)


def _product(equation: str, x, w, x_dtype, w_dtype) -> jax.Array:
    """float32 product of x and w, each quantised to its 8-bit dtype."""
    import qwix

    left, right, out = equation.replace("->", ",").split(",")

    def quantised(value, letters, dtype):
        scaled_axes = [axis for axis, letter in enumerate(letters) if letter in out]
        # From float32: qwix's scales have the dtype of their input, and in bfloat16 they would lose a digit.
        return qwix.quantize(value.astype(jnp.float32), dtype, channelwise_axes=scaled_axes)

    return qwix.einsum(equation, quantised(x, left, x_dtype), quantised(w, right, w_dtype))
