"""CLIP's vision tower as LLaVA uses it: the patch tokens of an inner layer, without the class token.

The checkpoint also has the layers after the feature layer, and the norm after the last one, which are never run.
`ClipUnused` holds them, so that a round trip to the released layout loses no tensor.
Source: huggingface/transformers:models/clip/modeling_clip.py at 5.23.0; feature layer as haotian-liu/LLaVA:
llava/model/multimodal_encoder/clip_encoder.py at c121f04.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from medcg_jax.nn.blocks import ClipBlock, run_stack
from medcg_jax.nn.context import constrain
from medcg_jax.nn.layers import Dense, LayerNorm, normal, param


@dataclass(frozen=True)
class ClipVisionConfig:
    """The defaults are CLIP ViT-L/14 at 336 pixels."""

    image_size_px: int = 336
    patch_size_px: int = 14
    num_layers: int = 24
    # Index into [embeddings, layer 1's output, ...], from the end when negative.
    feature_layer: int = -2
    embed_dim: int = 1024
    num_heads: int = 16
    mlp_dim: int = 4096
    norm_eps: float = 1e-5
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    # A name in `nn.layers.ACTIVATIONS`.
    activation: str = "quick_gelu"
    # Whether the class token goes on to the decoder, before the patches.
    keep_class_token: bool = False

    def __post_init__(self):
        if self.image_size_px < self.patch_size_px:
            raise ValueError(f"image_size_px={self.image_size_px}; expected {self.patch_size_px} (a patch) or more")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"vision embed_dim={self.embed_dim} is no multiple of num_heads={self.num_heads}")
        if not 1 <= self.num_run_layers <= self.num_layers:
            raise ValueError(
                f"feature_layer={self.feature_layer}; expected one that runs 1 to {self.num_layers} layers"
            )

    @property
    def num_run_layers(self) -> int:
        return self.feature_layer if self.feature_layer >= 0 else self.num_layers + 1 + self.feature_layer

    @property
    def num_patches(self) -> int:
        """Pixels on the right and below that do not fill a patch are dropped."""
        return (self.image_size_px // self.patch_size_px) ** 2

    @property
    def num_features(self) -> int:
        """Tokens of an image that go on to the decoder."""
        return self.num_patches + self.keep_class_token


class ClipVision(nnx.Module):
    """The layers that run: pixels to the features of `select`, float[B, P, E], row by row from the top left."""

    # Of these types here; a subclass has its own.
    config: Any
    blocks: Any

    def __init__(self, config: ClipVisionConfig, *, rngs: nnx.Rngs, param_dtype=jnp.float32, unroll: int, remat: str):
        init = dict(rngs=rngs, param_dtype=param_dtype)
        self.config, self.unroll, self.remat = config, unroll, remat
        width, patch = config.embed_dim, config.patch_size_px
        self.patch = Dense("bpc,ce->bpe", (patch * patch * 3, width), ("patch", "vision_embed"), use_bias=False, **init)
        self.class_token = param(normal(width**-0.5), (width,), ("vision_embed",), **init)
        self.positions = param(normal(width**-0.5), (config.num_patches + 1, width), ("pos", "vision_embed"), **init)
        self.norm = LayerNorm(width, eps=config.norm_eps, **init)
        self.blocks = _stack(config, config.num_run_layers, **init)

    def embed(self, pixels: jax.Array, dtype) -> jax.Array:
        """float[B, 1 + P, E]: the input of the first layer; class token first."""
        return constrain(self.norm(self.tokens(pixels, dtype)), "act_batch", "act_len", "act_embed")

    def tokens(self, pixels: jax.Array, dtype) -> jax.Array:
        """float[B, 1 + P, E]: class token and patches, with their positions."""
        x = self.patch(patches(normalise(pixels, self.config), self.config.patch_size_px).astype(dtype))
        first = jnp.broadcast_to(self.class_token[...].astype(dtype), (x.shape[0], 1, x.shape[2]))
        return jnp.concatenate([first, x], axis=1) + self.positions[...].astype(dtype)

    def __call__(self, pixels: jax.Array, *, dtype, attention: str) -> jax.Array:
        """pixels: uint8[B, h, w, 3], or float[B, h, w, 3] already normalised."""

        def body(block, x, _):
            return block(x, implementation=attention), None

        x, _ = run_stack(self.blocks, body, self.embed(pixels, dtype), unroll=self.unroll, remat=self.remat)
        return self.select(x)

    def select(self, x: jax.Array) -> jax.Array:
        """float[B, P, E]: the tokens of the last layer's output that go on to the decoder."""
        return x if self.config.keep_class_token else x[:, 1:]


class ClipUnused(nnx.Module):
    """The layers of a CLIP checkpoint after the feature layer: never run or trained."""

    def __init__(self, config: ClipVisionConfig, *, rngs: nnx.Rngs, param_dtype=jnp.float32):
        num = config.num_layers - config.num_run_layers
        self.blocks = _stack(config, num, rngs=rngs, param_dtype=param_dtype) if num else None
        self.norm = LayerNorm(config.embed_dim, eps=config.norm_eps, rngs=rngs, param_dtype=param_dtype)


def _stack(config: ClipVisionConfig, num: int, *, rngs, param_dtype) -> ClipBlock:
    shape = config.embed_dim, config.num_heads, config.mlp_dim
    return ClipBlock(
        *shape, eps=config.norm_eps, activation=config.activation, rngs=rngs, param_dtype=param_dtype, stack=(num,)
    )


def normalise(pixels: jax.Array, config) -> jax.Array:
    """float32 pixels: uint8 as (x / 255 - mean) / std per channel, float as they are. config: a tower's."""
    if pixels.dtype != jnp.uint8:
        return pixels
    mean, std = jnp.asarray(config.image_mean), jnp.asarray(config.image_std)
    return pixels.astype(jnp.float32) * (1 / (255 * std)) - mean / std


def patches(pixels: jax.Array, size: int) -> jax.Array:
    """float[B, P, size * size * 3]: the pixels of each whole patch in the order row, column, channel."""
    batch, height, width, channels = pixels.shape
    height, width = height - height % size, width - width % size
    x = pixels[:, :height, :width].reshape(batch, height // size, size, width // size, size, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, size * size * channels)
