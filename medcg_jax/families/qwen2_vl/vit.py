"""Qwen2-VL's vision tower: images of any grid of patches, each padded to the slots of its batch, attention per image.

Patches are ordered by blocks: the 2 x 2 patches that become one token are neighbours in the sequence, and blocks run
row by row. Rotary positions are two-dimensional: the first half of a head's frequencies for the patch's row, the other
for its column. There is no class token, and no table of positions.
Source: huggingface/transformers:models/qwen2_vl/modeling_qwen2_vl.py:Qwen2VisionTransformerPretrainedModel and
vision_utils.py:get_vision_position_ids at 5.23.0; arXiv 2409.12191.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from medcg_jax.nn.attention import attention
from medcg_jax.nn.blocks import run_stack
from medcg_jax.nn.context import constrain
from medcg_jax.nn.layers import ACTIVATIONS, Dense, LayerNorm, Stack, quick_gelu
from medcg_jax.nn.rope import Angles, frequencies, rotate


@dataclass(frozen=True)
class Qwen2VitConfig:
    """The defaults are those of every released size."""

    patch_size_px: int = 14
    # Frames of a patch; an image is repeated in all of them.
    num_frames: int = 2
    # Patches per side of the block that becomes one token.
    merge: int = 2
    num_layers: int = 32
    embed_dim: int = 1280
    num_heads: int = 16
    mlp_dim: int = 5120
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    # A name in `nn.layers.ACTIVATIONS`.
    activation: str = "quick_gelu"

    def __post_init__(self):
        if self.embed_dim % (4 * self.num_heads):
            raise ValueError(
                f"vision embed_dim={self.embed_dim}; expected a multiple of 4 * num_heads={4 * self.num_heads}, "
                "because rotary positions turn pairs by rows and by columns"
            )

    @property
    def patch_dim(self) -> int:
        """Numbers of a patch of one frame: its pixels in the order channel, row, column."""
        return 3 * self.patch_size_px**2


class VitBlock(nnx.Module):
    """Pre-norm encoder block: biases everywhere, rotary positions, patches see those of their own image."""

    def __init__(self, config: Qwen2VitConfig, *, rngs, param_dtype, stack: Stack = ()):
        self.activation = config.activation
        init = dict(use_bias=True, rngs=rngs, param_dtype=param_dtype, stack=stack)
        normed = dict(eps=config.norm_eps, rngs=rngs, param_dtype=param_dtype, stack=stack)
        width, heads, head_dim = config.embed_dim, config.num_heads, config.embed_dim // config.num_heads
        names = ("vision_embed", "vision_heads", "head_dim")
        self.norm1 = LayerNorm(width, **normed)
        # The last axis holds the query, the key and the value of a head.
        self.qkv = Dense("btd,dnh->btnh", (width, heads, 3 * head_dim), names, **init)
        self.out = Dense("btnh,nhd->btd", (heads, head_dim, width), names[1:] + names[:1], **init)
        self.norm2 = LayerNorm(width, **normed)
        self.up = Dense("btd,df->btf", (width, config.mlp_dim), ("vision_embed", "vision_mlp"), **init)
        self.down = Dense("btf,fd->btd", (config.mlp_dim, width), ("vision_mlp", "vision_embed"), **init)

    def __call__(self, x: jax.Array, *, angles: Angles, segment_ids: jax.Array, implementation: str) -> jax.Array:
        qkv = constrain(self.qkv(self.norm1(x)), "act_batch", "act_len", "act_heads", None)
        q, k, v = jnp.split(qkv, 3, axis=-1)
        q, k = rotate(q, angles), rotate(k, angles)
        x = x + self.out(attention(q, k, v, causal=False, segment_ids=segment_ids, implementation=implementation))
        act = quick_gelu if self.activation == "quick_gelu" else ACTIVATIONS[self.activation]
        hidden = constrain(act(self.up(self.norm2(x))), "act_batch", "act_len", "act_mlp")
        return constrain(x + self.down(hidden), "act_batch", "act_len", "act_embed")


class Qwen2Vit(nnx.Module):
    """One image a row: patches to features, float[B, N, E], in the patches' order."""

    def __init__(self, config: Qwen2VitConfig, *, rngs: nnx.Rngs, param_dtype=jnp.float32, unroll: int, remat: str):
        init = dict(rngs=rngs, param_dtype=param_dtype)
        self.config, self.unroll, self.remat = config, unroll, remat
        shape = (config.num_frames * config.patch_dim, config.embed_dim)
        self.patch = Dense("bpc,ce->bpe", shape, ("patch", "vision_embed"), use_bias=False, **init)
        self.blocks = VitBlock(config, stack=(config.num_layers,), **init)

    def embed(self, pixels: jax.Array, dtype) -> jax.Array:
        """float[B, N, E]: the input of the first layer."""
        x = self.patch(_frames(_normalise(pixels, self.config), self.config).astype(dtype))
        return constrain(x, "act_batch", "act_len", "act_embed")

    def __call__(self, pixels: jax.Array, grids: jax.Array, *, dtype, attention: str) -> jax.Array:
        """pixels: uint8[B, N, C], C = `patch_dim`, or float[B, N, C] already normalised; grids as in `patch_places`."""
        # An absent image attends to one patch, so that no kernel divides by zero.
        segment_ids = real_patches(grids, pixels.shape[1]).at[:, 0].set(1)
        angles = vision_angles(grids, pixels.shape[1], self.config)

        def body(block, x, _):
            return block(x, angles=angles, segment_ids=segment_ids, implementation=attention), None

        x, _ = run_stack(self.blocks, body, self.embed(pixels, dtype), unroll=self.unroll, remat=self.remat)
        return x


def real_patches(grids: jax.Array, num: int) -> jax.Array:
    """int32[B, num] segment ids: 1 on an image's patches, 0 on the padding behind them."""
    return (jnp.arange(num) < grids.prod(axis=-1)[:, None]).astype(jnp.int32)


def patch_places(grids: jax.Array, num: int, merge: int) -> jax.Array:
    """int32[B, num, 2] row and column of each patch in its image; meaningless on padding.

    grids: int32[B, 2] rows and columns of patches, multiples of `merge`; 0, 0 where there is no image.

    Example, a grid of 2 x 4: (0, 0) (0, 1) (1, 0) (1, 1) (0, 2) (0, 3) (1, 2) (1, 3).
    """
    block, inside = jnp.divmod(jnp.arange(num), merge * merge)
    row, column = jnp.divmod(block, jnp.maximum(grids[:, 1:] // merge, 1))
    return jnp.stack([row * merge + inside // merge, column * merge + inside % merge], axis=-1)


def vision_angles(grids: jax.Array, num: int, config: Qwen2VitConfig) -> Angles:
    """Cosines and sines, each float32[B, num, 1, H/2]: H/4 frequencies for the row, H/4 for the column."""
    places = patch_places(grids, num, config.merge).astype(jnp.float32)
    angles = places[..., None] * frequencies(config.embed_dim // config.num_heads // 2, config.rope_theta)
    angles = angles.reshape(*angles.shape[:2], 1, -1)
    return jnp.cos(angles), jnp.sin(angles)


def _normalise(pixels: jax.Array, config: Qwen2VitConfig) -> jax.Array:
    """float32 patches, (x / 255 - mean) / std per channel where `pixels` is uint8; float ones as they are."""
    if pixels.dtype != jnp.uint8:
        return pixels
    mean, std = (jnp.repeat(jnp.asarray(x), config.patch_size_px**2) for x in (config.image_mean, config.image_std))
    return pixels.astype(jnp.float32) * (1 / (255 * std)) - mean / std


def _frames(patches: jax.Array, config: Qwen2VitConfig) -> jax.Array:
    """[B, N, 3 * frames * size * size] of [B, N, 3 * size * size]: each channel repeated for every frame."""
    x = patches.reshape(*patches.shape[:2], 3, 1, -1)
    return jnp.repeat(x, config.num_frames, axis=3).reshape(*patches.shape[:2], -1)
