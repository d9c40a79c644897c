"""Llama-3.2-Vision (Mllama): an image encoder over tiles, a projector, and a decoder with cross-attention to tiles.

An image is one token of text. A token sees the tiles of the images in the last unbroken run of image tokens up to it.
Source: huggingface/transformers:models/mllama/modeling_mllama.py and processing_mllama.py at 5.23.0;
meta-llama/llama-models:llama3/multimodal/model.py at a9c89c4.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from medcg_jax.families.common import FamilyConfig, VisionLanguageModel, bench, cells_of, check_shapes, tiny
from medcg_jax.families.mllama.text import EXTRA_ROWS, MllamaAdapters, MllamaDecoder, MllamaTextConfig, images_in_view
from medcg_jax.families.mllama.vit import NUM_TILES, MllamaVision, MllamaVisionConfig
from medcg_jax.nn.context import constrain
from medcg_jax.nn.layers import Dense
from medcg_jax.nn.rope import count_positions, rope_angles


@dataclass(frozen=True)
class MllamaConfig(FamilyConfig):
    """The defaults are Llama-3.2-11B-Vision; `image_size_px` is the side of a tile."""

    family = "mllama"

    vision: MllamaVisionConfig = MllamaVisionConfig()
    text: MllamaTextConfig = MllamaTextConfig()
    image_token_id: int = 128256
    pad_token_id: int = 128004
    eos_token_id: int = 128009
    # Whether features are the "input" of `vision.intermediate_layers`, as in Meta's model (the one trained), or the
    # "output", as in transformers 4.57 to 5.23.
    intermediate_from: str = "input"
    # The cross-attention output of tokens before the first image. False, as transformers: the mean over all tiles of
    # the row, absent ones included, weighted by scores. True, as Meta: zero.
    mask_text_only_rows_attention: bool = False

    @property
    def num_image_tokens(self) -> int:
        return 1

    @property
    def tower_lengths(self) -> set[int]:
        return {self.vision.num_tokens, self.vision.tokens_per_tile}

    def image_flops(self, vit):
        vision, width = self.vision, self.vision.embed_dim
        tower = 2.0 * NUM_TILES * (vision.tokens_per_tile - 1) * 3 * vision.patch_size_px**2 * width
        tower += vit(vision.num_layers + vision.num_global_layers, width, vision.mlp_dim, vision.num_tokens)
        return tower, 2.0 * vision.num_tokens * vision.feature_dim * self.text.embed_dim


def llama32_vision_11b(**fields) -> MllamaConfig:
    """Llama-3.2-11B-Vision: 10,670,220,835 parameters. `fields` are MllamaConfig's own."""
    return MllamaConfig(**fields)


def llama32_vision_90b(**fields) -> MllamaConfig:
    text = MllamaTextConfig(
        num_layers=100, cross_layers=tuple(range(3, 100, 5)), embed_dim=8192, num_heads=64, mlp_dim=28672
    )
    return MllamaConfig(**{"text": text, **fields})


def llama32_vision_tiny(
    vocab_size: int,
    image_token_id: int,
    *,
    num_global_layers: int = 1,
    intermediate_layers: tuple[int, ...] = (1,),
    cross_layers: tuple[int, ...] = (1, 3),
    rope_scaling=None,
    **fields,
) -> MllamaConfig:
    """As `common.tiny`. vocab_size: as the tokenizer counts, the image's row included."""  # fmt: skip
    fields = {
        "num_vision_layers": 2, "num_kv_heads": 2,
        "vision": {"num_global_layers": num_global_layers, "intermediate_layers": intermediate_layers},
        "text": {"cross_layers": cross_layers, "rope_scaling": rope_scaling}, **fields,
    }  # fmt: skip
    return tiny(MllamaConfig, vocab_size, image_token_id, **fields)


def llama32_vision_bench(vocab_size: int, image_token_id: int, **fields) -> MllamaConfig:
    """As `common.bench`: four tiles of 64 patches, and two groups of four layers with one of cross-attention each."""
    vision = {"image_size_px": 64, "num_layers": 4, "num_global_layers": 1, "intermediate_layers": (1, 2, 3)}
    # transformers warns of fewer positions than those that `rope_scaling` is made for.
    text = {"num_layers": 8, "cross_layers": (3, 7), "num_kv_heads": 2, "max_positions": 16384}
    return bench(MllamaConfig, vocab_size, image_token_id, vision=vision, text=text, **fields)


class Mllama(VisionLanguageModel):
    config: MllamaConfig
    image_keys = ("pixels", "aspect_ratio_ids", "num_tiles")

    def make_vision(self, **options) -> MllamaVision:
        return MllamaVision(self.config.vision, intermediate_from=self.config.intermediate_from, **options)

    def make_projector(self, **init) -> Dense:
        shape = (self.config.vision.feature_dim, self.config.text.embed_dim)
        return Dense("...e,ed->...d", shape, ("vision_mlp", "embed"), use_bias=True, **init)

    def make_decoder(self, **options) -> MllamaDecoder:
        return MllamaDecoder(self.config.text, **options)

    def make_adapters(self, lora, **init) -> MllamaAdapters:
        return MllamaAdapters(self.config.text, lora, **init)

    def tower_features(self, images: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """{"features": float[B, I, tiles * tokens, F], "num_tiles": int[B, I]}: what the tower alone makes of images.

        images: pixels uint8[B, I, 4, h, w, 3] (or float, already normalised) of each image's tiles, absent ones last;
          aspect_ratio_ids int[B, I], the grid from 1; num_tiles int[B, I], the number of tiles. Both 0: there is no
          image, and the row has no image token for it.

        Raises:
          ValueError: shapes that do not fit the model or each other.
        """
        pixels, size = images["pixels"], self.config.image_size_px
        if pixels.ndim != 6 or pixels.shape[2:] != (NUM_TILES, size, size, 3):
            raise ValueError(f"pixels {pixels.shape}; expected [batch, images, {NUM_TILES}, {size}, {size}, 3]")
        rows, count = pixels.shape[:2]
        for name in ("aspect_ratio_ids", "num_tiles"):
            if images[name].shape != (rows, count):
                raise ValueError(f"{name} {images[name].shape} beside pixels {pixels.shape}; expected [batch, images]")
        flat = (images[name].reshape(rows * count, *images[name].shape[2:]) for name in self.image_keys)
        features = self.vision(*flat, dtype=self.dtype)
        shape = (rows, count, self.config.vision.num_tokens, features.shape[-1])
        return {"features": features.reshape(shape), "num_tiles": images["num_tiles"]}

    def project_features(self, features: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """The same, "features" projected to float[B, I, tiles * tokens, D]. Keys and values are the decoder's."""
        return features | {"features": self.projector(features["features"])}

    def image_tokens(self, images: dict[str, jax.Array], side: int) -> tuple[jax.Array, jax.Array]:
        from medcg_jax.families.mllama.rows import GRIDS  # it decodes images, which a bare machine cannot

        features, per_tile = self.encode_images(images)["features"][:, 0], self.config.vision.tokens_per_tile
        tile, place = jnp.divmod(jnp.arange(features.shape[1]), per_tile)
        in_tile = math.isqrt(per_tile - 1)
        # Tiles of the image's grid; an absent image has one row and column, and no tile.
        grids = jnp.array([(1, 1), *GRIDS])[images["aspect_ratio_ids"][:, 0]]
        tile_rows, tile_columns = grids[:, :1], grids[:, 1:]
        row = tile // tile_columns * in_tile + (place - 1) // in_tile
        column = tile % tile_columns * in_tile + (place - 1) % in_tile
        places = row * tile_columns * in_tile + column
        cells = cells_of(places, tile_rows * in_tile, tile_columns * in_tile, side)
        cells = jnp.where(place == 0, side * side, cells)
        return features, jnp.where(tile < images["num_tiles"], cells, -1)

    def hidden(
        self, tokens, images=None, *, segment_ids=None, positions=None, cache=None, image_features=None, at=None
    ) -> tuple[jax.Array, dict | None]:
        """(float[B, T, D] after the final norm, the cache with these tokens and their images in it or None).

        tokens: int[B, T], every image as one `image_token_id`.
        images: as in `encode_images`; or image_features: its result. Neither: the images of the cache; without those
          the cross-attention layers are skipped.
        segment_ids: int[B, T], 0 on padding; None: all real. positions: int[B, T]; None: counted over the real tokens
          of the row (and of the cache).
        at: int[B, L]; hidden comes back at these positions only, float[B, L, D]; None: at all.
        cache: from `init_cache` or an earlier call, with room for T more tokens. Images are passed once, in the call
          with their tokens; a run of image tokens must not be split between calls.

        Raises:
          ValueError: shapes that do not fit each other.
        """
        check_shapes(tokens, segment_ids=segment_ids, positions=positions)
        if segment_ids is None:
            segment_ids = jnp.ones(tokens.shape, jnp.int32)
        if positions is None:
            positions = count_positions(segment_ids)
            positions += 0 if cache is None else (cache["segment_ids"] != 0).sum(axis=-1, keepdims=True)
        text, slots = self.config.text, None
        if cache is not None:
            ids = jax.lax.dynamic_update_slice(cache["segment_ids"], segment_ids.astype(jnp.int32), (0, cache["index"]))
            slots = {**cache, "segment_ids": ids}
        if images is not None:
            image_features = self.encode_images(images)
        memory = num_tiles = None
        if image_features is not None:
            memory, num_tiles = image_features["features"], image_features["num_tiles"]
            memory = memory.reshape(len(memory), -1, memory.shape[-1])
        elif cache is not None and "num_tiles" in cache:
            memory, num_tiles = (cache["cross_k"], cache["cross_v"]), cache["num_tiles"]
        first, following = self.in_view(tokens, segment_ids, cache)
        # Image and padding ids may lie outside the table.
        x = self.decoder.embed(jnp.clip(tokens, 0, text.vocab_size + EXTRA_ROWS - 1), self.dtype)
        x, states = self.decoder(
            constrain(x, "act_batch", "act_len", "act_embed"),
            angles=rope_angles(positions, text.head_dim, text.rope_theta, text.rope_scaling),
            segment_ids=segment_ids, cache=slots, memory=memory, attention=self.config.attention, lora=self.lora, at=at,
            visibility=None if memory is None else self.visibility(first, following, num_tiles),
        )  # fmt: skip
        if cache is None:
            return x, None
        (k, v), cross = states
        cache = {
            **cache, "k": k, "v": v, "segment_ids": ids, "index": cache["index"] + tokens.shape[1],
            "first_image": first[:, -1], "next_image": following[:, -1],
        }  # fmt: skip
        if cross is not None:
            cache |= {"cross_k": cross[0], "cross_v": cross[1], "num_tiles": num_tiles}
        return x, cache

    def in_view(self, tokens, segment_ids, cache=None) -> tuple[jax.Array, jax.Array]:
        """`images_in_view` of the real tokens, behind those of the cache."""
        is_image = (tokens == self.config.image_token_id) & (segment_ids != 0)
        return images_in_view(is_image, None if cache is None else (cache["first_image"], cache["next_image"]))

    def visibility(self, first, following, num_tiles) -> dict:
        """Keyword arguments of `CrossBlock`: which tokens see which tiles.

        first, following: int[B, T] of `images_in_view`. num_tiles: int[B, I].
        """
        rows, length = first.shape
        image = jnp.arange(num_tiles.shape[1])
        in_view = (first[..., None] <= image) & (image < following[..., None])
        present = jnp.arange(NUM_TILES) < num_tiles[..., None]
        tiles = (in_view[..., None] & present[:, None]).reshape(rows, length, -1)
        sees = tiles.any(axis=-1)
        allowed = jnp.repeat(tiles | ~sees[..., None], self.config.vision.tokens_per_tile, axis=-1)
        return {"allowed": allowed, "sees": sees, "mask_attention": self.config.mask_text_only_rows_attention}

    def init_cache(self, batch: int, length: int, dtype=None) -> dict[str, Any]:
        """An empty cache with `length` slots a row; a call with images adds their keys and values to it."""
        text, dtype = self.config.text, self.dtype if dtype is None else dtype
        shape = (len(text.self_layers), batch, length, text.num_kv_heads, text.head_dim)
        return {
            "k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype),
            "segment_ids": jnp.zeros((batch, length), jnp.int32), "index": 0,
            "first_image": jnp.zeros(batch, jnp.int32), "next_image": jnp.zeros(batch, jnp.int32),
        }  # fmt: skip
