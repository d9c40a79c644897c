"""Qwen2-VL: patches of images of any size through a merger into a Qwen2 decoder with positions in three dimensions.

A text token advances all three positions (time, row, column) by one. All tokens of an image have one time, and their
rows and columns count on from it. The text behind an image continues after the longer side of its grid.
Source: huggingface/transformers:models/qwen2_vl/modeling_qwen2_vl.py at 5.23.0; arXiv 2409.12191.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from medcg_jax.families.common import FamilyConfig, VisionLanguageModel, bench, cells_of, tiny
from medcg_jax.families.decoder import DecoderConfig
from medcg_jax.families.qwen2_vl.vit import Qwen2Vit, Qwen2VitConfig
from medcg_jax.nn.layers import Dense, LayerNorm, gelu
from medcg_jax.nn.rope import Angles, frequencies

QWEN2_7B = DecoderConfig(
    vocab_size=152064, num_layers=28, embed_dim=3584, num_heads=28, num_kv_heads=4, head_dim=128, mlp_dim=18944,
    rope_theta=1e6, norm_eps=1e-6, max_positions=32768, qkv_bias=True,
)  # fmt: skip


@dataclass(frozen=True)
class Qwen2VLConfig(FamilyConfig):
    """The defaults are Qwen2-VL-7B."""

    family = "qwen2_vl"

    vision: Qwen2VitConfig = Qwen2VitConfig()
    text: DecoderConfig = QWEN2_7B
    # Numbers of a head's frequencies, in order, for time, row and column.
    mrope_sections: tuple[int, int, int] = (16, 24, 24)
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    pad_token_id: int = 151643
    eos_token_id: int = 151645
    # Bounds on the pixels of a resized image. The release allows 12,845,056 (16,384 tokens an image); this is the
    # default of its image processor, 1,280 tokens.
    min_pixels: int = 3136
    max_pixels: int = 1_003_520

    def __post_init__(self):
        if len(self.mrope_sections) != 3 or 2 * sum(self.mrope_sections) != self.text.head_dim:
            raise ValueError(
                f"mrope_sections={self.mrope_sections}; expected three of sum head_dim / 2 = {self.text.head_dim // 2}"
            )
        side = self.vision.merge * self.vision.patch_size_px
        if not side * side <= self.min_pixels <= self.max_pixels:
            raise ValueError(
                f"min_pixels={self.min_pixels}, max_pixels={self.max_pixels}; expected {side * side} or more, ascending"
            )

    @property
    def num_image_tokens(self) -> int:
        return self.max_pixels // (self.vision.merge * self.vision.patch_size_px) ** 2

    @property
    def tower_lengths(self) -> set[int]:
        return {self.num_image_tokens * self.vision.merge**2}

    def image_flops(self, vit):
        vision, out, merged = self.vision, self.text.embed_dim, self.vision.merge**2
        patches, width = self.num_image_tokens * merged, vision.embed_dim
        tower = 2.0 * patches * vision.num_frames * vision.patch_dim * width
        tower += vit(vision.num_layers, width, vision.mlp_dim, patches)
        return tower, 2.0 * patches * width * (merged * width + out)


def qwen2_vl_2b(**fields) -> Qwen2VLConfig:
    """Qwen2-VL-2B: 2,208,985,600 parameters; the embedding is the head too. `fields` are Qwen2VLConfig's own."""
    text = DecoderConfig(
        vocab_size=151936, num_layers=28, embed_dim=1536, num_heads=12, num_kv_heads=2, head_dim=128, mlp_dim=8960,
        rope_theta=1e6, norm_eps=1e-6, max_positions=32768, qkv_bias=True, tie_head=True,
    )  # fmt: skip
    return Qwen2VLConfig(**{"text": text, **fields})


def qwen2_vl_7b(**fields) -> Qwen2VLConfig:
    """Qwen2-VL-7B: 8,291,375,616 parameters."""
    return Qwen2VLConfig(**fields)


def qwen2_vl_72b(**fields) -> Qwen2VLConfig:
    """Qwen2-VL-72B: 73,405,560,320 parameters."""
    text = DecoderConfig(
        vocab_size=152064, num_layers=80, embed_dim=8192, num_heads=64, num_kv_heads=8, head_dim=128, mlp_dim=29568,
        rope_theta=1e6, norm_eps=1e-6, max_positions=32768, qkv_bias=True,
    )  # fmt: skip
    return Qwen2VLConfig(**{"text": text, **fields})


def qwen2_vl_tiny(
    vocab_size: int, image_token_id: int, *, tie_head: bool = False, num_kv_heads: int = 2, **fields
) -> Qwen2VLConfig:
    """As `common.tiny`, for images of 32 x 32 pixels, 16 tokens each."""
    fields = {
        "image_size_px": None, "patch_size_px": 4, "mrope_sections": (2, 3, 3), "min_pixels": 256, "max_pixels": 1024,
        "vision": {"rope_theta": 100.0}, "text": {"tie_head": tie_head}, "num_kv_heads": num_kv_heads, **fields,
    }  # fmt: skip
    return tiny(Qwen2VLConfig, vocab_size, image_token_id, **fields)


def qwen2_vl_bench(vocab_size: int, image_token_id: int, **fields) -> Qwen2VLConfig:
    """As `common.bench`: square images have 64 tokens of four patches each."""
    fields = {"mrope_sections": (4, 6, 6), "min_pixels": 128 * 128, "max_pixels": 128 * 128, **fields}
    vision, text = {"num_layers": 4}, {"num_kv_heads": 2}
    return bench(Qwen2VLConfig, vocab_size, image_token_id, vision=vision, text=text, **fields)


class Merger(nnx.Module):
    """Blocks of neighbouring patches to one token each: norm of every patch, then dense, exact GELU, dense."""

    def __init__(self, config: Qwen2VLConfig, *, rngs: nnx.Rngs, param_dtype=jnp.float32):
        width, out = config.vision.embed_dim, config.text.embed_dim
        self.block = config.vision.merge**2
        inner = self.block * width
        init = dict(use_bias=True, rngs=rngs, param_dtype=param_dtype)
        self.norm = LayerNorm(width, eps=config.vision.norm_eps, rngs=rngs, param_dtype=param_dtype)
        self.up = Dense("bpe,ef->bpf", (inner, inner), ("vision_embed", "mlp"), **init)
        self.down = Dense("bpf,fd->bpd", (inner, out), ("mlp", "embed"), **init)

    def __call__(self, x: jax.Array) -> jax.Array:
        """float[B, P, D] for x[B, N, E], P = N / patches of a block."""
        rows, num, width = x.shape
        return self.down(gelu(self.up(self.norm(x).reshape(rows, num // self.block, self.block * width))))


class ImageFeatures(NamedTuple):
    """features: float[B, I * P, D], P slots an image; grids: int32[B, I, 2] rows and columns of each image's tokens."""

    features: jax.Array
    grids: jax.Array


class Layout(NamedTuple):
    """positions: int32[B, T, 3] time, row, column; slots: int32[B, T] which feature of its row an image token takes."""

    positions: jax.Array
    slots: jax.Array


class Qwen2VL(VisionLanguageModel):
    config: Qwen2VLConfig
    image_keys = ("pixels", "grids")

    def make_vision(self, **options) -> Qwen2Vit:
        return Qwen2Vit(self.config.vision, **options)

    def make_projector(self, **init) -> Merger:
        return Merger(self.config, **init)

    def tower_features(self, images: dict[str, jax.Array]) -> ImageFeatures:
        """What the tower alone makes of each row's images: features float[B, I, N, E] of patches, and their `grids`.

        images: `pixels`, uint8[B, I, N, C] patches of C = `vision.patch_dim` numbers, or float[B, I, N, C] already
          normalised, padding last, in the order of `vit.patch_places`. `grids`, int32[B, I, 2], rows and columns of
          patches; 0, 0 where a row has fewer images.

        Raises:
          ValueError: shapes that do not fit each other, or a number of slots that does not divide into blocks.
        """
        pixels, grids, vision = images["pixels"], images["grids"], self.config.vision
        block = vision.merge**2
        if pixels.ndim != 4 or pixels.shape[3] != vision.patch_dim or pixels.shape[2] % block:
            raise ValueError(
                f"pixels {pixels.shape}; expected [batch, images, patches, {vision.patch_dim}], "
                f"patches a multiple of {block}"
            )
        if grids.shape != (*pixels.shape[:2], 2):
            raise ValueError(f"grids {grids.shape} beside pixels {pixels.shape}; expected [batch, images, 2]")
        rows, num = pixels.shape[:2]
        flat = pixels.reshape(rows * num, *pixels.shape[2:]), grids.reshape(rows * num, 2)
        features = self.vision(*flat, dtype=self.dtype, attention=self.config.attention)
        return ImageFeatures(features.reshape(rows, num, *features.shape[1:]), grids)

    def project_features(self, features: ImageFeatures) -> ImageFeatures:
        """The features of each row's images, and how many of each image's slots are real."""
        patches, grids = features
        rows, num = patches.shape[:2]
        merged = self.projector(patches.reshape(rows * num, *patches.shape[2:]))
        return ImageFeatures(merged.reshape(rows, -1, merged.shape[-1]), grids // self.config.vision.merge)

    def image_tokens(self, images: dict[str, jax.Array], side: int) -> tuple[jax.Array, jax.Array]:
        features, grids = self.encode_images(images)
        rows, columns = grids[:, 0, :1], grids[:, 0, 1:]
        places = jnp.arange(features.shape[1])
        cells = cells_of(places, jnp.maximum(rows, 1), jnp.maximum(columns, 1), side)
        return features, jnp.where(places < rows * columns, cells, -1)

    def hidden(
        self, tokens, images=None, *, segment_ids=None, positions=None, cache=None, image_features=None, at=None
    ) -> tuple[jax.Array, dict | None]:
        """(float[B, T, D] after the final norm, the cache with these tokens in it or None).

        tokens: int[B, T], every image as one `image_token_id` per merged token, images not touching each other.
        images: as in `encode_images`; or image_features: its result. Neither: the rows hold no image token.
        segment_ids, cache, at: as in `Decoder`; at: float[B, L, D] comes back.
        positions: int[B, T, 3] time, row, column; None: by `layout`, behind what the cache holds.

        Raises:
          ValueError: shapes that do not fit each other.
        """
        expected = dict(segment_ids=tokens.shape, positions=(*tokens.shape, 3))
        for name, ids in (("segment_ids", segment_ids), ("positions", positions)):
            if ids is not None and ids.shape != expected[name] or tokens.ndim != 2:
                shape = None if ids is None else ids.shape
                raise ValueError(f"{name} {shape} beside tokens {tokens.shape}; expected {expected[name]}")
        segment_ids = jnp.ones(tokens.shape, jnp.int32) if segment_ids is None else segment_ids
        features = self.encode_images(images) if images is not None else image_features
        layout = self.layout(tokens, segment_ids, features)
        if positions is None:
            positions = layout.positions + (0 if cache is None else cache["next_position"][:, None, None])
        x = self.embed(tokens, features, layout.slots)
        angles = mrope_angles(positions, self.config)
        out, new_cache = self.decode(x, segment_ids=segment_ids, angles=angles, cache=cache, at=at)
        if cache is not None:
            last = jnp.where(segment_ids[..., None] != 0, positions, -1).max(axis=(1, 2))
            new_cache["next_position"] = jnp.maximum(cache["next_position"], last + 1)
        return out, new_cache

    def layout(self, tokens: jax.Array, segment_ids: jax.Array, features: ImageFeatures | None) -> Layout:
        """The positions of the tokens, counted from the row's first real token; padding is at 0."""
        real = segment_ids != 0
        if features is None:
            # Generated tokens are text, whatever their ids.
            return _layout(jnp.zeros_like(real), real, jnp.zeros((len(tokens), 1, 2), jnp.int32), 1)
        num_slots = features.features.shape[1] // features.grids.shape[1]
        return _layout(real & (tokens == self.config.image_token_id), real, features.grids, num_slots)

    def embed(self, tokens: jax.Array, image_features: ImageFeatures | None = None, slots=None) -> jax.Array:
        """As `VisionLanguageModel.embed`. slots: as in `Layout`; unused without image features."""
        # Padding ids may lie outside the table; their rows are never attended to.
        x = self.decoder.embed(jnp.minimum(tokens, self.config.text.vocab_size - 1), self.dtype)
        if image_features is None:
            return x
        gathered = jnp.take_along_axis(image_features.features, slots[..., None], axis=1)
        return jnp.where((tokens == self.config.image_token_id)[..., None], gathered.astype(x.dtype), x)

    def init_cache(self, batch: int, length: int, dtype=None) -> dict[str, Any]:
        """That of `decoder.init_cache`, and `next_position` int32[B]: the position of the row's next token."""
        return super().init_cache(batch, length, dtype) | {"next_position": jnp.zeros(batch, jnp.int32)}


def mrope_angles(positions: jax.Array, config: Qwen2VLConfig) -> Angles:
    """Cosines and sines, each float32[B, T, 1, H/2]: every section of the frequencies with its own position.

    positions: int[B, T, 3] time, row, column.
    """
    axis = np.repeat(np.arange(3), config.mrope_sections)
    text = config.text
    angles = positions[..., axis].astype(jnp.float32) * frequencies(text.head_dim, text.rope_theta, text.rope_scaling)
    return jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]


def _layout(is_image: jax.Array, real: jax.Array, grids: jax.Array, num_slots: int) -> Layout:
    """is_image, real: bool[B, T]; grids: int32[B, I, 2] of tokens; num_slots: P, features that each image has room for.

    Example, one image of 2 x 3 tokens between two texts of two: times 0 1 2 2 2 2 2 2 5 6, rows 0 1 2 2 2 3 3 3 5 6,
    columns 0 1 2 3 4 2 3 4 5 6.
    """
    counts = grids.prod(axis=-1)
    ends = jnp.cumsum(counts, axis=1)
    is_text = real & ~is_image
    seen = jnp.cumsum(is_image, axis=1) - is_image
    passed = seen[:, :, None] >= ends[:, None, :]
    start = jnp.cumsum(is_text, axis=1) - is_text + (passed * grids.max(axis=-1)[:, None, :]).sum(axis=-1)
    image = jnp.minimum(passed.sum(axis=-1), grids.shape[1] - 1)
    offset = seen - jnp.take_along_axis(ends - counts, image, axis=1)
    row, column = jnp.divmod(offset, jnp.maximum(jnp.take_along_axis(grids[..., 1], image, axis=1), 1))
    inside = jnp.stack([jnp.zeros_like(row), row, column], axis=-1) * is_image[..., None]
    positions = jnp.where(real[..., None], start[..., None] + inside, 0)
    return Layout(positions, image * num_slots + jnp.clip(offset, 0, num_slots - 1))
