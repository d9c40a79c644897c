"""LLaVA-1.5: CLIP's patch features through a two-layer projector into a Llama decoder.

Source: huggingface/transformers:models/llava/modeling_llava.py at 5.23.0, haotian-liu/LLaVA at c121f04;
arXiv 2310.03744.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from medcg_jax.families import decoder as decoder_lib
from medcg_jax.families.clip import ClipUnused, ClipVision, ClipVisionConfig
from medcg_jax.families.decoder import Decoder, DecoderConfig
from medcg_jax.families.merge import merge_images
from medcg_jax.nn.base import Base
from medcg_jax.nn.layers import ACTIVATIONS, Dense, gelu
from medcg_jax.nn.lora import Adapters, LoraConfig


@dataclass(frozen=True)
class LlavaConfig:
    """Architecture, special tokens, and how it runs; the defaults are LLaVA-1.5-7B."""

    vision: ClipVisionConfig = ClipVisionConfig()
    text: DecoderConfig = DecoderConfig()
    # May lie outside the vocabulary (32000 rows are 0..31999): its row is never read.
    image_token_id: int = 32000
    pad_token_id: int = 0
    eos_token_id: int = 2
    compute_dtype: str = "float32"
    # As `ModelConfig`'s fields of these names.
    attention: str = "auto"
    remat: str = "none"
    scan_unroll: int = 0
    matmul: str = ""
    # Adapters on the decoder's products; None: none.
    lora: LoraConfig | None = None
    base: Base = Base()
    # Between the projector's layers; a name in `nn.layers.ACTIVATIONS`.
    projector_activation: str = "gelu"
    projector_bias: bool = True

    @property
    def num_image_tokens(self) -> int:
        return self.vision.num_features

    @property
    def image_size_px(self) -> int:
        return self.vision.image_size_px


def llava15_7b(**fields) -> LlavaConfig:
    """LLaVA-1.5-7B: 7,062,902,784 parameters in the checkpoint. `fields` are LlavaConfig's own."""
    return LlavaConfig(**fields)


def llava15_13b(**fields) -> LlavaConfig:
    text = DecoderConfig(num_layers=40, embed_dim=5120, num_heads=40, num_kv_heads=40, mlp_dim=13824)
    return LlavaConfig(**{"text": text, **fields})


def llava15_tiny(
    vocab_size: int,
    image_token_id: int,
    *,
    pad_token_id: int = 0,
    eos_token_id: int = 2,
    image_size_px: int = 32,
    patch_size_px: int = 8,
    embed_dim: int = 64,
    num_vision_layers: int = 3,
    num_vision_heads: int = 2,
    vision_mlp_dim: int = 192,
    num_layers: int = 4,
    num_heads: int = 4,
    num_kv_heads: int = 4,
    mlp_dim: int = 128,
    rope_theta: float = 20.0,
    **fields,
) -> LlavaConfig:
    """The same architecture for the phantom world: thousands of steps on a CPU. `fields` are LlavaConfig's own."""
    vision = ClipVisionConfig(
        image_size_px=image_size_px, patch_size_px=patch_size_px, num_layers=num_vision_layers, embed_dim=embed_dim,
        num_heads=num_vision_heads, mlp_dim=vision_mlp_dim,
    )  # fmt: skip
    text = DecoderConfig(
        vocab_size=vocab_size, num_layers=num_layers, embed_dim=embed_dim, num_heads=num_heads,
        num_kv_heads=num_kv_heads, head_dim=embed_dim // num_heads, mlp_dim=mlp_dim, rope_theta=rope_theta,
        max_positions=512,
    )  # fmt: skip
    ids = dict(image_token_id=image_token_id, pad_token_id=pad_token_id, eos_token_id=eos_token_id)
    return LlavaConfig(vision, text, **ids, **fields)


def llava15_bench(vocab_size: int, image_token_id: int, **fields) -> LlavaConfig:
    """The same at a size that two CPU cores train in half a second a step, for comparisons of speed.

    The vocabulary has 4,096 rows at least. `fields` are LlavaConfig's own.
    """
    vision = ClipVisionConfig(image_size_px=64, patch_size_px=8, num_layers=5, embed_dim=128, num_heads=4, mlp_dim=512)
    text = DecoderConfig(
        vocab_size=max(vocab_size, 4096), num_layers=6, embed_dim=256, num_heads=8, num_kv_heads=8, head_dim=32,
        mlp_dim=688, max_positions=512,
    )  # fmt: skip
    return LlavaConfig(**{"vision": vision, "text": text, "image_token_id": image_token_id, **fields})


class Projector(nnx.Module):
    """Image features to the decoder's width: dense, an activation, dense."""

    def __init__(self, config, *, use_bias: bool = True, activation: str = "gelu", rngs: nnx.Rngs, dtype=jnp.float32):
        self.activation = activation
        width, out = config.vision.embed_dim, config.text.embed_dim
        made = dict(use_bias=use_bias, rngs=rngs, dtype=dtype)
        self.up = Dense("bpe,ef->bpf", (width, out), ("vision_embed", "mlp"), **made)
        self.down = Dense("bpf,fd->bpd", (out, out), ("mlp", "embed"), **made)

    def __call__(self, x: jax.Array) -> jax.Array:
        act = gelu if self.activation == "gelu" else ACTIVATIONS[self.activation]
        return self.down(act(self.up(x)))


class Llava(nnx.Module):
    """Submodules: `vision`, `projector`, `decoder`, and `unused` (tensors of the checkpoint that nothing computes)."""

    # Keys of a batch that `encode_images` takes.
    image_keys = ("pixels",)

    def __init__(self, config: LlavaConfig, *, rngs: nnx.Rngs, dtype=None, param_dtype=jnp.float32):
        made = dict(rngs=rngs, dtype=param_dtype)
        runs = dict(unroll=config.scan_unroll, remat=config.remat)
        self.config = config
        self.dtype = jnp.dtype(config.compute_dtype if dtype is None else dtype)
        self.vision = ClipVision(config.vision, **made, **runs)
        own = dict(use_bias=config.projector_bias, activation=config.projector_activation)
        self.projector = Projector(config, **own, **made)
        self.decoder = Decoder(config.text, **made, **runs)
        self.lora = Adapters(config.text, config.lora, config.text.num_layers, **made) if config.lora else None
        self.unused = ClipUnused(config.vision, **made)

    def encode_images(self, images: dict[str, jax.Array]) -> jax.Array:
        """float[B, I * P, D] features of each row's images, one image behind the other.

        images: `pixels`, uint8[B, I, h, w, 3], or float[B, I, h, w, 3] already normalised.

        Raises:
          ValueError: another rank, or images that are not `image_size_px` square with three channels.
        """
        size, pixels = self.config.image_size_px, images["pixels"]
        if pixels.ndim != 5 or pixels.shape[2:] != (size, size, 3):
            raise ValueError(f"pixels {pixels.shape}: [batch, images, {size}, {size}, 3] is accepted")
        rows, images = pixels.shape[:2]
        flat = pixels.reshape(rows * images, size, size, 3)
        features = self.projector(self.vision(flat, dtype=self.dtype, attention=self.config.attention))
        return features.reshape(rows, images * self.config.num_image_tokens, -1)

    def hidden(
        self, tokens, images=None, *, segment_ids=None, positions=None, cache=None, image_features=None, at=None
    ) -> tuple[jax.Array, dict | None]:
        """(float[B, T, D] after the final norm, the cache with these tokens in it or None).

        tokens: int[B, T], every image as `num_image_tokens` copies of `image_token_id`.
        images: as in `encode_images`; or image_features: what it gave; neither: the rows hold no image token.
        segment_ids, positions, cache, at: as in `Decoder`; at: float[B, L, D] comes back.

        Raises:
          ValueError: shapes that do not fit each other.
        """
        for name, ids in (("tokens", tokens), ("segment_ids", segment_ids), ("positions", positions)):
            if ids is not None and ids.shape != tokens.shape or tokens.ndim != 2:
                raise ValueError(f"{name} {ids.shape} beside tokens {tokens.shape}: [batch, length] is accepted")
        x = self.embed(tokens, self.encode_images(images) if images is not None else image_features)
        rest = dict(segment_ids=segment_ids, positions=positions, cache=cache, at=at)
        return self.decoder(x, attention=self.config.attention, lora=self.lora, **rest)

    def embed(self, tokens: jax.Array, image_features: jax.Array | None = None) -> jax.Array:
        """float[B, T, D]: what the decoder's first layer gets, image features in place of image tokens."""
        is_image = tokens == self.config.image_token_id
        # Image and padding ids may lie outside the table; what they look up is replaced, or never attended.
        ids = jnp.where(is_image, 0, jnp.minimum(tokens, self.config.text.vocab_size - 1))
        x = self.decoder.embed(ids, self.dtype)
        return x if image_features is None else merge_images(x, image_features, is_image)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32[..., V] for hidden[..., D]."""
        return self.decoder.logits(hidden)

    def init_cache(self, batch: int, length: int, dtype=None) -> dict[str, jax.Array]:
        return decoder_lib.init_cache(self.config.text, batch, length, self.dtype if dtype is None else dtype)

    def __call__(self, tokens, images=None, **rest) -> jax.Array:
        """float32[B, T, V]: logits at every position; arguments as in `hidden`."""
        return self.logits(self.hidden(tokens, images, **rest)[0])
