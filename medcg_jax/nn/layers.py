"""Parameters with logical axis names, and layers made of them: dense by einsum, norms, embedding, activations.

A parameter is an `nnx.Param` whose metadata `axes` names its axes (`medcg_jax.axes.RULES`); nothing here needs a
mesh. `stack` adds a leading `layer` axis, so that one module holds all layers of a stack (`nn.blocks.run_stack`).
A layer computes in the dtype of what it is given; norms compute in float32.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from medcg_jax.axes import spec
from medcg_jax.nn import matmul, quant
from medcg_jax.nn.context import constrain, current_mesh

Stack = tuple[int, ...]
# Name of every `Dense`'s output, for policies of `jax.checkpoint`.
PRODUCT = "product"


def param(init, shape, axes, *, rngs: nnx.Rngs, param_dtype=jnp.float32, stack: Stack = ()) -> nnx.Param:
    """A parameter of shape `stack + shape` with the value `init(key, shape, dtype)`; `axes` names the axes of `shape`.

    Raises:
      ValueError: a number of names other than the number of axes, or an unknown name.
    """
    if len(axes) != len(shape):
        raise ValueError(f"a parameter of shape {shape} has {len(shape)} axes, but names {axes}")
    names = ("layer",) * len(stack) + tuple(axes)
    spec(*names)
    return nnx.Param(init(rngs.params(), stack + tuple(shape), param_dtype), axes=names)


def normal(stddev: float):
    return lambda key, shape, dtype: stddev * jax.random.normal(key, shape, dtype)


def constant(value: float):
    return lambda key, shape, dtype: jnp.full(shape, value, dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(equation: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`jnp.einsum(equation, x, kernel)`, where `equation` sums over axes that both have.

    The gradient of the kernel is computed in the kernel's layout. JAX's rule computes its transpose, for which a CPU
    transposes the larger of two operands; this way several kernels of one x share one transposed x.
    """
    return jnp.einsum(equation, x, kernel)


def _product_forward(equation, x, kernel):
    return jnp.einsum(equation, x, kernel), (x, kernel)


def _product_backward(equation, residuals, grad):
    x, kernel = residuals
    first, second, out = equation.replace("->", ",").split(",")
    return (jnp.einsum(f"{out},{second}->{first}", grad, kernel), jnp.einsum(f"{first},{out}->{second}", x, grad))


product.defvjp(_product_forward, _product_backward)


class Dense(nnx.Module):
    """`einsum(equation, x, kernel)` plus, where asked, a bias over the kernel's output axes.

    `Dense("btd,dnh->btnh", (D, N, H), ("embed", "heads", "head_dim"))` maps float[B, T, D] to float[B, T, N, H].
    """

    def __init__(
        self, equation: str, shape, axes, *, use_bias: bool, rngs: nnx.Rngs, param_dtype=jnp.float32, stack: Stack = ()
    ):
        _, kernel, out = equation.replace("->", ",").split(",")
        fan_in = math.prod(size for letter, size in zip(kernel, shape, strict=True) if letter not in out)
        self.equation = equation
        # Of `matmul.KINDS`: the product in 8 bits; "": in x's dtype.
        self.matmul = ""
        self.kernel = param(normal(fan_in**-0.5), shape, axes, rngs=rngs, param_dtype=param_dtype, stack=stack)
        outputs = [i for i, letter in enumerate(kernel) if letter in out]
        bias_shape, bias_axes = tuple(shape[i] for i in outputs), tuple(axes[i] for i in outputs)
        init = dict(rngs=rngs, param_dtype=param_dtype, stack=stack)
        self.bias = param(constant(0.0), bias_shape, bias_axes, **init) if use_bias else None

    def __call__(self, x: jax.Array, adapter: Callable[[jax.Array], jax.Array] | None = None) -> jax.Array:
        """adapter: its output is added to the product."""
        kernel = self.kernel.get_value()
        if quant.is_quantized(kernel):
            y = quant.product(self.equation, x, kernel)
        else:
            einsum = partial(matmul.einsum, self.matmul) if self.matmul else product
            y = einsum(self.equation, x, kernel.astype(x.dtype))
        y = y if self.bias is None else y + self.bias[...].astype(x.dtype)
        # "dots" of `nn.blocks.REMAT_POLICIES` keeps this sum and not the two products, each as large.
        return checkpoint_name(y if adapter is None else y + adapter(x), PRODUCT)


class LayerNorm(nnx.Module):
    """Layer norm over the last axis, in float32; out in x's dtype."""

    def __init__(self, size: int, *, eps: float, rngs: nnx.Rngs, param_dtype=jnp.float32, stack: Stack = ()):
        self.eps = eps
        self.scale = param(constant(1.0), (size,), ("norm",), rngs=rngs, param_dtype=param_dtype, stack=stack)
        self.bias = param(constant(0.0), (size,), ("norm",), rngs=rngs, param_dtype=param_dtype, stack=stack)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y - y.mean(axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(axis=-1, keepdims=True) + self.eps)
        y = y * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis: float32, cast to x's dtype, then times the weight (Llama's order)."""

    def __init__(self, size: int, *, eps: float, rngs: nnx.Rngs, param_dtype=jnp.float32, stack: Stack = ()):
        self.eps = eps
        self.scale = param(constant(1.0), (size,), ("norm",), rngs=rngs, param_dtype=param_dtype, stack=stack)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(axis=-1, keepdims=True) + self.eps)
        return y.astype(x.dtype) * self.scale[...].astype(x.dtype)


class Embedding(nnx.Module):
    """A table of `num` rows; called with int[...], gives dtype[..., D]."""

    def __init__(self, num: int, size: int, axes, *, rngs: nnx.Rngs, param_dtype=jnp.float32):
        self.table = param(normal(size**-0.5), (num, size), axes, rngs=rngs, param_dtype=param_dtype)

    def __call__(self, ids: jax.Array, dtype) -> jax.Array:
        """dtype[..., D]. With data replicas, a device looks up its slice of the width for the rows of its replica.

        The slices are then exchanged for rows. Without these constraints XLA looks up all rows of the batch on every
        device and gathers all their gradients (a tenth of all bytes moved, for LLaVA-1.5-7B at batch 32 on 256
        devices). Without replicas XLA finds the exchange itself.
        """
        x = self.table[...][ids].astype(dtype)
        mesh = current_mesh()
        if mesh is None or mesh.shape["data"] == 1:
            return x
        between = (None,) * (ids.ndim - 1)
        x = constrain(x, "lookup_batch", *between, "lookup_embed")
        return constrain(x, "act_batch", *between, "act_embed")


def quick_gelu(x: jax.Array) -> jax.Array:
    """x * sigmoid(1.702 x), CLIP's activation."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: jax.Array) -> jax.Array:
    """The exact (erf) GELU."""
    return jax.nn.gelu(x, approximate=False)


# By the names that released configs have for them. Source: huggingface/transformers:activations.py at 5.23.0.
ACTIVATIONS = {
    "gelu": gelu, "gelu_python": gelu, "gelu_new": jax.nn.gelu, "gelu_pytorch_tanh": jax.nn.gelu,
    "gelu_fast": jax.nn.gelu, "quick_gelu": quick_gelu, "silu": jax.nn.silu, "swish": jax.nn.silu, "relu": jax.nn.relu,
    "relu6": jax.nn.relu6, "mish": jax.nn.mish, "sigmoid": jax.nn.sigmoid, "tanh": jnp.tanh,
}  # fmt: skip
