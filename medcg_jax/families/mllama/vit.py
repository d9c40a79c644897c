"""Llama-3.2-Vision's image encoder: every image as four tiles, local and then gated global layers over all of them.

Tiles that an image does not have are zeros. Each tile's tokens are padded to a multiple of eight. Padding does not see
padding; all other pairs of tokens see each other.
Source: huggingface/transformers:models/mllama/modeling_mllama.py at 5.23.0; meta-llama/llama-models:
llama3/multimodal/model.py and encoder_utils.py at a9c89c4 (which inner layers are features).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from medcg_jax.families.clip import normalise, patches
from medcg_jax.nn.attention import masked_attention
from medcg_jax.nn.blocks import run_stack
from medcg_jax.nn.context import constrain
from medcg_jax.nn.layers import ACTIVATIONS, Dense, LayerNorm, Stack, constant, gelu, normal, param

NUM_TILES = 4
# Rectangles of at most four tiles; aspect_ratio_ids count them from 1, and 0 means no image.
NUM_GRIDS = 8
# Rows of tokens are padded to a multiple of this.
MULTIPLE = 8
# Of the norms before and after the local blocks; the blocks have `norm_eps`.
OUTER_NORM_EPS = 1e-5
INTERMEDIATE_FROM = ("input", "output")
# Images with more tokens attend tile by tile: all scores of a full-size image at once take 2.6 GB in each layer.
TOKENS_AT_ONCE = 2048


@dataclass(frozen=True)
class MllamaVisionConfig:
    """The defaults are Llama-3.2-11B-Vision's; the 90B model has the same encoder."""

    # Side of one tile.
    image_size_px: int = 560
    patch_size_px: int = 14
    num_layers: int = 32
    num_global_layers: int = 8
    # Local layers, from 0, whose input (or output: `MllamaConfig.intermediate_from`) is part of the features.
    intermediate_layers: tuple[int, ...] = (3, 7, 15, 23, 30)
    embed_dim: int = 1280
    num_heads: int = 16
    mlp_dim: int = 5120
    norm_eps: float = 1e-5
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    # A name in `nn.layers.ACTIVATIONS`.
    activation: str = "gelu"

    def __post_init__(self):
        if self.image_size_px < self.patch_size_px:
            raise ValueError(f"image_size_px={self.image_size_px}; expected {self.patch_size_px} (a patch) or more")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"vision embed_dim={self.embed_dim} is no multiple of num_heads={self.num_heads}")
        inner = self.intermediate_layers
        if list(inner) != sorted(set(inner)) or not set(inner) <= set(range(self.num_layers)):
            raise ValueError(f"intermediate_layers={inner}; expected rising layers of 0 to {self.num_layers - 1}")

    @property
    def tokens_per_tile(self) -> int:
        """A class token and the patches."""
        return (self.image_size_px // self.patch_size_px) ** 2 + 1

    @property
    def num_tokens(self) -> int:
        """Of an image, its absent tiles included."""
        return NUM_TILES * self.tokens_per_tile

    @property
    def feature_dim(self) -> int:
        return self.embed_dim * (1 + len(self.intermediate_layers))


class VisionBlock(nnx.Module):
    """Pre-norm encoder block: no biases in attention; where `gated`, tanh gates on both branches."""

    def __init__(self, config: MllamaVisionConfig, *, gated: bool, rngs, param_dtype, stack: Stack = ()):
        self.activation = config.activation
        width, heads, mlp_dim = config.embed_dim, config.num_heads, config.mlp_dim
        init = dict(rngs=rngs, param_dtype=param_dtype, stack=stack)
        shape, axes = (width, heads, width // heads), ("vision_embed", "vision_heads", "head_dim")
        self.norm1 = LayerNorm(width, eps=config.norm_eps, **init)
        self.q = Dense("btd,dnh->btnh", shape, axes, use_bias=False, **init)
        self.k = Dense("btd,dnh->btnh", shape, axes, use_bias=False, **init)
        self.v = Dense("btd,dnh->btnh", shape, axes, use_bias=False, **init)
        self.out = Dense("btnh,nhd->btd", shape[1:] + shape[:1], axes[1:] + axes[:1], use_bias=False, **init)
        self.norm2 = LayerNorm(width, eps=config.norm_eps, **init)
        self.up = Dense("btd,df->btf", (width, mlp_dim), ("vision_embed", "vision_mlp"), use_bias=True, **init)
        self.down = Dense("btf,fd->btd", (mlp_dim, width), ("vision_mlp", "vision_embed"), use_bias=True, **init)
        self.attention_gate = gate(**init) if gated else None
        self.mlp_gate = gate(**init) if gated else None

    def __call__(self, x: jax.Array, allowed: jax.Array) -> jax.Array:
        """allowed: bool[B, T, T]."""
        y = self.norm1(x)
        q, k, v = (constrain(f(y), "act_batch", "act_len", "act_heads", None) for f in (self.q, self.k, self.v))
        attend = masked_attention if x.shape[1] <= TOKENS_AT_ONCE else attention_by_tile
        x = x + gated(self.out(attend(q, k, v, allowed)), self.attention_gate)
        act = gelu if self.activation == "gelu" else ACTIVATIONS[self.activation]
        hidden = constrain(act(self.up(self.norm2(x))), "act_batch", "act_len", "act_mlp")
        return constrain(x + gated(self.down(hidden), self.mlp_gate), "act_batch", "act_len", "act_embed")


class MllamaVision(nnx.Module):
    """Tiles to features, float[n, NUM_TILES, tokens, E * (1 + intermediate layers)]; class token first in each tile."""

    def __init__(
        self, config: MllamaVisionConfig, *, intermediate_from: str, rngs: nnx.Rngs, param_dtype=jnp.float32,
        unroll: int, remat: str,
    ):  # fmt: skip
        if intermediate_from not in INTERMEDIATE_FROM:
            raise ValueError(f"intermediate_from={intermediate_from!r}; accepted: {', '.join(INTERMEDIATE_FROM)}")
        init = dict(rngs=rngs, param_dtype=param_dtype)
        self.config, self.intermediate_from, self.unroll, self.remat = config, intermediate_from, unroll, remat
        width, patch, tokens = config.embed_dim, config.patch_size_px, config.tokens_per_tile
        small = normal(width**-0.5)
        self.patch = Dense("bpc,ce->bpe", (patch * patch * 3, width), ("patch", "vision_embed"), use_bias=False, **init)
        self.class_token = param(small, (width,), ("vision_embed",), **init)
        self.positions = param(small, (tokens, width), ("pos", "vision_embed"), **init)
        # 73.8 million numbers, of which an image looks up a ninth.
        shape, axes = (1 + NUM_GRIDS, NUM_TILES, tokens, width), ("pos", "pos", "pos", "table_embed")
        self.tile_positions = param(small, shape, axes, **init)
        self.position_gate = gate(**init)
        tile = (1 + NUM_GRIDS, NUM_TILES, width), ("pos", "pos", "vision_embed")
        self.pre_tile, self.pre_tile_gate = param(small, *tile, **init), gate(**init)
        self.post_tile, self.post_tile_gate = param(small, *tile, **init), gate(**init)
        self.norm_pre = LayerNorm(width, eps=OUTER_NORM_EPS, **init)
        self.norm_post = LayerNorm(width, eps=OUTER_NORM_EPS, **init)
        self.blocks = VisionBlock(config, gated=False, stack=(config.num_layers,), **init)
        self.global_blocks = VisionBlock(config, gated=True, stack=(config.num_global_layers,), **init)

    def __call__(self, pixels: jax.Array, aspect_ratio_ids: jax.Array, num_tiles: jax.Array, *, dtype) -> jax.Array:
        """Features of n images.

        pixels: uint8[n, NUM_TILES, h, w, 3], or float already normalised; absent tiles count as 0 either way.
        aspect_ratio_ids: int[n] from 1, 0 where there is no image. num_tiles: int[n].
        """
        x = self.embed(pixels, aspect_ratio_ids, num_tiles, dtype)
        allowed = self.allowed(num_tiles)
        x, features = self.local(x, allowed)
        x = self.outer(x, aspect_ratio_ids)
        x, _ = run_stack(self.global_blocks, lambda block, x, _: (block(x, allowed), None), x, **self._runs())
        # The inner layers' channels lie side by side: channel 0 of each, channel 1 of each, ...
        inner = jnp.stack(features, axis=-1).reshape(*x.shape[:2], -1) if features else x[..., :0]
        return self._by_tile(jnp.concatenate([x, inner], axis=-1))[:, :, : self.config.tokens_per_tile]

    def embed(self, pixels, aspect_ratio_ids, num_tiles, dtype) -> jax.Array:
        """float[n, T, E]: the input of the first local layer; one tile after the other, padding included."""
        count, tokens = pixels.shape[0], self.config.tokens_per_tile
        present = jnp.arange(NUM_TILES) < num_tiles[:, None]
        pixels = jnp.where(present[:, :, None, None, None], normalise(pixels, self.config), 0)
        tiles = patches(pixels.reshape(-1, *pixels.shape[2:]), self.config.patch_size_px).astype(dtype)
        x = self._by_tile(self.patch(tiles.reshape(count, -1, tiles.shape[-1])))
        x = x + gated(self.pre_tile[...][aspect_ratio_ids].astype(dtype)[:, :, None], self.pre_tile_gate)
        first = jnp.broadcast_to(self.class_token[...].astype(dtype), (count, NUM_TILES, 1, x.shape[-1]))
        x = jnp.concatenate([first, x], axis=2)
        positions = self.positions[...].astype(dtype)
        x = x + positions - gated(positions, self.position_gate)
        x = self.norm_pre(x + gated(self.tile_positions[...][aspect_ratio_ids].astype(dtype), self.position_gate))
        x = jnp.pad(x, ((0, 0), (0, 0), (0, -tokens % MULTIPLE), (0, 0)))
        return constrain(x.reshape(count, -1, x.shape[-1]), "act_batch", "act_len", "act_embed")

    def allowed(self, num_tiles: jax.Array) -> jax.Array:
        """bool[n, T, T]: True except from padding to padding. An absent image counts as one tile."""
        tokens = self.config.tokens_per_tile
        tiles = jnp.arange(NUM_TILES) < jnp.maximum(num_tiles, 1)[:, None]
        real = tiles[:, :, None] & (jnp.arange(tokens + -tokens % MULTIPLE) < tokens)
        real = real.reshape(len(tiles), -1)
        return real[:, :, None] | real[:, None, :]

    def local(self, x: jax.Array, allowed: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """(x after the local layers, x at each intermediate layer)."""
        graphdef, params = nnx.split(self.blocks)
        after = self.intermediate_from == "output"
        inner, start = [], 0
        for end in [i + after for i in self.config.intermediate_layers] + [self.config.num_layers]:
            if end > start:
                blocks = nnx.merge(graphdef, jax.tree.map(lambda w, start=start, end=end: w[start:end], params))
                x, _ = run_stack(blocks, lambda block, x, _: (block(x, allowed), None), x, **self._runs())
            inner.append(x)
            start = end
        return x, inner[:-1]

    def outer(self, x: jax.Array, aspect_ratio_ids: jax.Array) -> jax.Array:
        """The input of the first global layer: normed, plus each tile's position."""
        tiles = self._by_tile(self.norm_post(x))
        positions = self.post_tile[...][aspect_ratio_ids].astype(x.dtype)[:, :, None]
        return (tiles + gated(positions, self.post_tile_gate)).reshape(x.shape)

    def _by_tile(self, x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0], NUM_TILES, -1, x.shape[-1])

    def _runs(self) -> dict:
        return dict(unroll=self.unroll, remat=self.remat)


def gate(*, rngs: nnx.Rngs, param_dtype, stack: Stack = ()) -> nnx.Param:
    """A scalar whose tanh scales a branch; it starts at 0.5, so that a model with random weights uses its images."""
    return param(constant(0.5), (), (), rngs=rngs, param_dtype=param_dtype, stack=stack)


def gated(x: jax.Array, by: nnx.Param | None) -> jax.Array:
    """x times the gate's tanh; x itself without a gate."""
    return x if by is None else x * jnp.tanh(by[...]).astype(x.dtype)


def attention_by_tile(q: jax.Array, k: jax.Array, v: jax.Array, allowed: jax.Array) -> jax.Array:
    """`masked_attention` for one tile's queries at a time, to hold only one tile's scores in memory."""

    def tiles(x):
        return jnp.moveaxis(x.reshape(x.shape[0], NUM_TILES, -1, *x.shape[2:]), 1, 0)

    attend = jax.checkpoint(lambda tile: masked_attention(tile[0], k, v, tile[1]))
    return jnp.moveaxis(jax.lax.map(attend, (tiles(q), tiles(allowed))), 0, 1).reshape(q.shape)
