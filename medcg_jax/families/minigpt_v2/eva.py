"""EVA-CLIP's ViT-g and BLIP-2's norm behind it, as in MiniGPT-v2: pixels to normed patch features.

Pre-norm blocks with the exact GELU, biases on everything but the keys, absolute positions, no norm before the blocks.
Source: Vision-CAIR/MiniGPT-4:minigpt4/models/eva_vit.py and base_model.py:LayerNorm at d94738a.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from medcg_jax.families.clip import ClipVision
from medcg_jax.nn.attention import attention
from medcg_jax.nn.context import constrain
from medcg_jax.nn.layers import Dense, LayerNorm, Stack, gelu, normal, param


@dataclass(frozen=True)
class EvaConfig:
    """The defaults are MiniGPT-v2's: EVA ViT-g/14 at 448 pixels without its last block."""

    image_size_px: int = 448
    patch_size_px: int = 14
    num_layers: int = 39
    embed_dim: int = 1408
    num_heads: int = 16
    mlp_dim: int = 6144
    norm_eps: float = 1e-6
    # Of BLIP-2's norm behind the blocks.
    out_norm_eps: float = 1e-5
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self):
        if self.image_size_px % self.patch_size_px:
            raise ValueError(f"image_size_px={self.image_size_px} is no multiple of patch_size_px={self.patch_size_px}")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"vision embed_dim={self.embed_dim} is no multiple of num_heads={self.num_heads}")

    @property
    def num_patches(self) -> int:
        return (self.image_size_px // self.patch_size_px) ** 2


class EvaBlock(nnx.Module):
    """Pre-norm encoder block; the keys have no bias, every token sees every token."""

    def __init__(self, config: EvaConfig, *, rngs, param_dtype, stack: Stack = ()):
        init = dict(rngs=rngs, param_dtype=param_dtype, stack=stack)
        width, heads, head_dim = config.embed_dim, config.num_heads, config.embed_dim // config.num_heads
        names = ("vision_embed", "vision_heads", "head_dim")
        self.norm1 = LayerNorm(width, eps=config.norm_eps, **init)
        # The last axis holds the query, the key and the value of a head.
        self.qkv = Dense("btd,dnh->btnh", (width, heads, 3 * head_dim), names, use_bias=False, **init)
        self.q_bias = param(normal(0.0), (heads, head_dim), names[1:], **init)
        self.v_bias = param(normal(0.0), (heads, head_dim), names[1:], **init)
        self.out = Dense("btnh,nhd->btd", (heads, head_dim, width), names[1:] + names[:1], use_bias=True, **init)
        self.norm2 = LayerNorm(width, eps=config.norm_eps, **init)
        self.up = Dense("btd,df->btf", (width, config.mlp_dim), ("vision_embed", "vision_mlp"), use_bias=True, **init)
        self.down = Dense("btf,fd->btd", (config.mlp_dim, width), ("vision_mlp", "vision_embed"), use_bias=True, **init)

    def __call__(self, x: jax.Array, *, implementation: str) -> jax.Array:
        qkv = constrain(self.qkv(self.norm1(x)), "act_batch", "act_len", "act_heads", None)
        q, k, v = jnp.split(qkv, 3, axis=-1)
        q, v = q + self.q_bias[...].astype(q.dtype), v + self.v_bias[...].astype(v.dtype)
        x = x + self.out(attention(q, k, v, causal=False, implementation=implementation))
        hidden = constrain(gelu(self.up(self.norm2(x))), "act_batch", "act_len", "act_mlp")
        return constrain(x + self.down(hidden), "act_batch", "act_len", "act_embed")


class EvaVision(ClipVision):
    """Pixels to patch features, float[B, P, E], row by row from the top left; the class token is dropped at the end."""

    def __init__(self, config: EvaConfig, *, rngs: nnx.Rngs, param_dtype=jnp.float32, unroll: int, remat: str):
        init = dict(rngs=rngs, param_dtype=param_dtype)
        self.config, self.unroll, self.remat = config, unroll, remat
        width, patch = config.embed_dim, config.patch_size_px
        self.patch = Dense("bpc,ce->bpe", (patch * patch * 3, width), ("patch", "vision_embed"), use_bias=True, **init)
        self.class_token = param(normal(width**-0.5), (width,), ("vision_embed",), **init)
        self.positions = param(normal(width**-0.5), (config.num_patches + 1, width), ("pos", "vision_embed"), **init)
        self.blocks = EvaBlock(config, stack=(config.num_layers,), **init)
        self.norm = LayerNorm(width, eps=config.out_norm_eps, **init)

    def embed(self, pixels: jax.Array, dtype) -> jax.Array:
        """float[B, 1 + P, E]: the input of the first block; class token first."""
        return constrain(self.tokens(pixels, dtype), "act_batch", "act_len", "act_embed")

    def select(self, x: jax.Array) -> jax.Array:
        return self.norm(x)[:, 1:]
