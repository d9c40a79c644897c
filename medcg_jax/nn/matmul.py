"""Products of activations and weights in 8 bits, by qwix: forward and for the activations' gradient.

Both sides are quantised at every product, from the numbers that they are then, with a scale for each row of the
activations and each column of the weights (along what is summed over). The gradient of the weights is a sum over all
tokens of a batch, whose errors add up, and stays in the dtype computed in (arXiv 2304.13013, SwitchBack).

Where sums are taken in another order, as on another mesh, a number may be rounded to the other side, and what follows
from it in its row: results then differ by as much as rounding itself makes them.
"""

import importlib.util
from functools import partial

import jax
import jax.numpy as jnp

from medcg_jax.config import ConfigError

# Name -> (dtype of activations and weights, dtype of the gradient that comes in).
KINDS = {
    "int8": (jnp.int8, jnp.int8),
    # Three bits of mantissa; of gradients, which spread further, two.
    "fp8": (jnp.float8_e4m3fn, jnp.float8_e5m2),
}


def require(kind: str) -> None:
    """Raises ConfigError where products of this kind are asked for and qwix is not installed."""
    if kind and importlib.util.find_spec("qwix") is None:
        raise ConfigError(f"model.matmul={kind!r} needs qwix, which is not installed: `pip install qwix`")


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def einsum(kind: str, equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """`jnp.einsum(equation, x, w)` in x's dtype, its product in 8 bits.

    kind: of `KINDS`. equation: of two operands, without an ellipsis or an axis that both have and the result has.
    """
    dtype, _ = KINDS[kind]
    return _product(equation, x, w, dtype, dtype).astype(x.dtype)


def _forward(kind: str, equation: str, x: jax.Array, w: jax.Array):
    return einsum(kind, equation, x, w), (x, w)


def _backward(kind: str, equation: str, kept, g: jax.Array):
    x, w = kept
    dtype, grad_dtype = KINDS[kind]
    left, right, out = equation.replace("->", ",").split(",")
    dx = _product(f"{out},{right}->{left}", g, w, grad_dtype, dtype)
    dw = jnp.einsum(f"{left},{out}->{right}", x, g)
    return dx.astype(x.dtype), dw.astype(w.dtype)


einsum.defvjp(_forward, _backward)


def _product(equation: str, x, w, x_dtype, w_dtype) -> jax.Array:
    """float32 product of both in their 8 bits."""
    import qwix

    left, right, out = equation.replace("->", ",").split(",")

    def quantised(value, letters, dtype):
        kept = [axis for axis, letter in enumerate(letters) if letter in out]
        # From float32: qwix's scales have the dtype of what is quantised, and bfloat16's would cost a digit.
        return qwix.quantize(value.astype(jnp.float32), dtype, channelwise_axes=kept)

    return qwix.einsum(equation, quantised(x, left, x_dtype), quantised(w, right, w_dtype))
