"""MiniGPT-v2: EVA's patch features, four neighbours to a token, through one dense layer into Llama-2-chat with LoRA.

Source: Vision-CAIR/MiniGPT-4:minigpt4/models/minigpt_v2.py and minigpt_base.py at d94738a; arXiv 2310.09478.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from medcg_jax.families import decoder as decoder_lib
from medcg_jax.families.decoder import Decoder, DecoderConfig
from medcg_jax.families.merge import merge_images
from medcg_jax.families.minigpt_v2.eva import EvaConfig, EvaVision
from medcg_jax.nn.base import Base
from medcg_jax.nn.layers import Dense
from medcg_jax.nn.lora import Adapters, LoraConfig


@dataclass(frozen=True)
class MiniGPTv2Config:
    """Architecture, special tokens, and how it runs; the defaults are MiniGPT-v2 on Llama-2-7b-chat."""

    vision: EvaConfig = EvaConfig()
    text: DecoderConfig = DecoderConfig()
    lora: LoraConfig = LoraConfig()
    base: Base = Base()
    # Patches that make one token: neighbours in a row of the image, strips of 1 x 4.
    patches_per_token: int = 4
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

    def __post_init__(self):
        if self.vision.num_patches % self.patches_per_token:
            raise ValueError(
                f"{self.vision.num_patches} patches are no multiple of patches_per_token={self.patches_per_token}"
            )

    @property
    def num_image_tokens(self) -> int:
        return self.vision.num_patches // self.patches_per_token

    @property
    def image_size_px(self) -> int:
        return self.vision.image_size_px


def minigpt_v2_7b(**fields) -> MiniGPTv2Config:
    """MiniGPT-v2: 7,782,021,504 parameters, of which 56,627,200 are trained (`projector`, `lora`).

    Forms with a bias on the keys, always zero, count 54,912 more. `fields` are MiniGPTv2Config's own.
    """
    return MiniGPTv2Config(**fields)


def minigpt_v2_tiny(
    vocab_size: int,
    image_token_id: int,
    *,
    pad_token_id: int = 0,
    eos_token_id: int = 2,
    image_size_px: int = 32,
    patch_size_px: int = 4,
    embed_dim: int = 64,
    num_vision_layers: int = 3,
    num_vision_heads: int = 2,
    vision_mlp_dim: int = 192,
    num_layers: int = 4,
    num_heads: int = 4,
    num_kv_heads: int = 4,
    mlp_dim: int = 128,
    rope_theta: float = 20.0,
    lora_rank: int = 8,
    lora_alpha: float = 16.0,
    **fields,
) -> MiniGPTv2Config:
    """The same architecture for the phantom world: thousands of steps on a CPU. `fields` are MiniGPTv2Config's own."""
    vision = EvaConfig(
        image_size_px=image_size_px, patch_size_px=patch_size_px, num_layers=num_vision_layers, embed_dim=embed_dim,
        num_heads=num_vision_heads, mlp_dim=vision_mlp_dim,
    )  # fmt: skip
    text = DecoderConfig(
        vocab_size=vocab_size, num_layers=num_layers, embed_dim=embed_dim, num_heads=num_heads,
        num_kv_heads=num_kv_heads, head_dim=embed_dim // num_heads, mlp_dim=mlp_dim, rope_theta=rope_theta,
        max_positions=512,
    )  # fmt: skip
    ids = dict(image_token_id=image_token_id, pad_token_id=pad_token_id, eos_token_id=eos_token_id)
    return MiniGPTv2Config(vision, text, **{"lora": LoraConfig(lora_rank, lora_alpha), **ids, **fields})


class MiniGPTv2(nnx.Module):
    """Submodules: `vision` (with the norm behind it), `projector`, `decoder`, and `lora`, its adapters."""

    # Keys of a batch that `encode_images` takes.
    image_keys = ("pixels",)

    def __init__(self, config: MiniGPTv2Config, *, rngs: nnx.Rngs, dtype=None, param_dtype=jnp.float32):
        made = dict(rngs=rngs, dtype=param_dtype)
        runs = dict(unroll=config.scan_unroll, remat=config.remat)
        self.config = config
        self.dtype = jnp.dtype(config.compute_dtype if dtype is None else dtype)
        self.vision = EvaVision(config.vision, **made, **runs)
        grouped, width = config.patches_per_token * config.vision.embed_dim, config.text.embed_dim
        self.projector = Dense("bpe,ed->bpd", (grouped, width), ("vision_mlp", "embed"), use_bias=True, **made)
        self.decoder = Decoder(config.text, **made, **runs)
        self.lora = Adapters(config.text, config.lora, config.text.num_layers, **made)

    def encode_images(self, images: dict[str, jax.Array]) -> jax.Array:
        """float[B, I * P, D] features of each row's images, one image behind the other.

        images: `pixels`, uint8[B, I, h, w, 3], or float[B, I, h, w, 3] already normalised.

        Raises:
          ValueError: another rank, or images that are not `image_size_px` square with three channels.
        """
        size, pixels = self.config.image_size_px, images["pixels"]
        if pixels.ndim != 5 or pixels.shape[2:] != (size, size, 3):
            raise ValueError(f"pixels {pixels.shape}: [batch, images, {size}, {size}, 3] is accepted")
        rows, num = pixels.shape[:2]
        flat = pixels.reshape(rows * num, size, size, 3)
        x = self.vision(flat, dtype=self.dtype, attention=self.config.attention)
        features = self.projector(group(x, self.config.patches_per_token))
        return features.reshape(rows, num * self.config.num_image_tokens, -1)

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
        return self.decoder(x, lora=self.lora, attention=self.config.attention, **rest)

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


def group(x: jax.Array, num: int) -> jax.Array:
    """float[B, P / num, num * E] of x[B, P, E]: so many patches, one behind the other in raster order, side by side."""
    rows, patches, width = x.shape
    return x.reshape(rows, patches // num, num * width)
