"""Low-rank adapters (LoRA) on the products of a decoder's layers, held apart from the weights that they change.

peft's dropout before them, which acts only in training, is left out.
Source: huggingface/peft:src/peft/tuners/lora/layer.py at 0.21; arXiv 2106.09685.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from medcg_jax.nn.layers import Stack, param

# (logical name, size) of each axis.
Axes = tuple[tuple[str, int], ...]
# The products of a decoder's block that can have an adapter.
TARGETS = ("q", "k", "v", "out", "gate", "up", "down")


@dataclass(frozen=True)
class LoraConfig:
    """The defaults are MiniGPT-v2's. targets: of `TARGETS`."""

    rank: int = 64
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q", "v")

    def __post_init__(self):
        if self.rank < 1 or not self.targets or not set(self.targets) <= set(TARGETS):
            raise ValueError(
                f"lora rank={self.rank}, targets={self.targets}; expected a rank of at least 1 and one or more of "
                f"{', '.join(TARGETS)}"
            )

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class Adapter(nnx.Module):
    """The term added to one product: scale * (x a) b, where `b` starts at zero."""

    def __init__(self, inputs: Axes, outputs: Axes, config: LoraConfig, *, rngs, param_dtype, stack: Stack = ()):
        init = dict(rngs=rngs, param_dtype=param_dtype, stack=stack)
        (in_names, in_sizes), (out_names, out_sizes) = zip(*inputs, strict=True), zip(*outputs, strict=True)
        self.scale, self.num_inputs = config.scale, len(inputs)
        bound = math.prod(in_sizes) ** -0.5  # kaiming_uniform_ with a = sqrt(5)
        self.a = param(_uniform(bound), (*in_sizes, config.rank), (*in_names, _rank_beside(in_names)), **init)
        self.b = param(_uniform(0.0), (config.rank, *out_sizes), (_rank_beside(out_names), *out_names), **init)

    def __call__(self, x: jax.Array) -> jax.Array:
        """float[B, T, outputs] for x[B, T, inputs]."""
        low = jnp.tensordot(x, self.a[...].astype(x.dtype), self.num_inputs)
        return jnp.tensordot(self.scale * low, self.b[...].astype(x.dtype), 1)


class Adapters(nnx.Module):
    """Adapters of `num_layers` layers, one for each of `config.targets` under its name, for `DecoderBlock`."""

    def __init__(self, text, config: LoraConfig, num_layers: int, *, rngs: nnx.Rngs, param_dtype=jnp.float32):
        """text: the decoder's config."""
        for name in config.targets:
            axes = target_axes(text, name)
            setattr(self, name, Adapter(*axes, config, rngs=rngs, param_dtype=param_dtype, stack=(num_layers,)))


def target_axes(text, target: str) -> tuple[Axes, Axes]:
    """(input axes, output axes) of a product of a decoder's block."""
    embed, mlp = (("embed", text.embed_dim),), (("mlp", text.mlp_dim),)
    heads = (("heads", text.num_heads), ("head_dim", text.head_dim))
    kv_heads = (("kv_heads", text.num_kv_heads), ("head_dim", text.head_dim))
    return {
        "q": (embed, heads), "k": (embed, kv_heads), "v": (embed, kv_heads), "out": (heads, embed),
        "gate": (embed, mlp), "up": (embed, mlp), "down": (mlp, embed),
    }[target]  # fmt: skip


def adapted(block: nnx.Module, lora: nnx.Module | None, name: str, x: jax.Array) -> jax.Array:
    """The block's product of that name, with its adapter where `lora` has one."""
    return getattr(block, name)(x, getattr(lora, name, None))


def _rank_beside(names: tuple[str, ...]) -> str:
    """The logical name of the rank axis in a half with these other axes, so that fsdp splits each half once."""
    return "rank" if "embed" in names else "rank_parts"


def _uniform(bound: float):
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
