"""Low-rank adapters (LoRA) on a decoder's query and value projections, kept apart from the weights that they change.

peft's dropout before them, which acts in training alone, is left out.
Source: huggingface/peft:src/peft/tuners/lora.py at 0.2.0; arXiv 2106.09685.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from medcg_jax.nn.layers import Stack, normal, param


@dataclass(frozen=True)
class LoraConfig:
    """The defaults are MiniGPT-v2's."""

    rank: int = 64
    alpha: float = 16.0

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class Adapter(nnx.Module):
    """What is added to one projection to heads: scale * (x a) b, with `b` zero at first."""

    def __init__(
        self, embed_dim: int, num_heads: int, head_dim: int, heads: str, config: LoraConfig, *, rngs, dtype,
        stack: Stack = (),
    ):  # fmt: skip
        made = dict(rngs=rngs, dtype=dtype, stack=stack)
        self.scale = config.scale
        self.a = param(normal(embed_dim**-0.5), (embed_dim, config.rank), ("embed", "rank"), **made)
        self.b = param(normal(0.0), (config.rank, num_heads, head_dim), ("rank", heads, "head_dim"), **made)

    def __call__(self, x: jax.Array) -> jax.Array:
        """float[B, T, N, H] for x[B, T, D]."""
        low = jnp.einsum("btd,dr->btr", x, self.a[...].astype(x.dtype))
        return self.scale * jnp.einsum("btr,rnh->btnh", low, self.b[...].astype(x.dtype))


class QVAdapters(nnx.Module):
    """Adapters of the query and value projections of all layers: what `models.decoder.Decoder` takes."""

    def __init__(self, text, config: LoraConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        """text: the decoder's `DecoderConfig`."""
        made = dict(rngs=rngs, dtype=dtype, stack=(text.num_layers,))
        self.q = Adapter(text.embed_dim, text.num_heads, text.head_dim, "heads", config, **made)
        self.v = Adapter(text.embed_dim, text.num_kv_heads, text.head_dim, "kv_heads", config, **made)
