"""NExT-Chat: LLaVA's parts, boxes as embeddings in and out of the decoder, and masks by SAM, prompted by the decoder.

`<boxes>` in the text is embedded by an MLP of its coordinates; the hidden state at `<at>` is decoded to coordinates by
another. SAM draws a mask, prompted with that box and with four tokens made of the same hidden state.
Source: NExT-ChatV/NExT-Chat:mllm/models/nextchat/nextchat_base.py, nextchat_seg.py at 1e6c20f; arXiv 2311.04498.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from medcg_jax.families.clip import ClipUnused, ClipVisionConfig
from medcg_jax.families.common import FamilyConfig, VisionLanguageModel, bench, check_shapes, tiny
from medcg_jax.families.decoder import DecoderConfig
from medcg_jax.families.llava.model import Projector
from medcg_jax.families.merge import merge_images
from medcg_jax.families.next_chat.sam import SamConfig, SamEncoder, SamPrompt, sam_tiny
from medcg_jax.families.next_chat.sam_decoder import MaskDecoder
from medcg_jax.nn.attention import take_positions
from medcg_jax.nn.layers import Dense


@dataclass(frozen=True)
class NextChatConfig(FamilyConfig):
    """The defaults are NExT-Chat-7B-336."""

    family = "next_chat"

    vision: ClipVisionConfig = ClipVisionConfig()
    text: DecoderConfig = DecoderConfig(vocab_size=32005)
    # None: a model of the first two training stages, with boxes and without masks.
    sam: SamConfig | None = SamConfig()
    # Tokens made of one hidden state that prompt SAM for one mask.
    num_mask_prompts: int = 4
    at_token_id: int = 32003
    box_token_id: int = 32004
    # Boxes of a row that a cache remembers while decoding.
    max_boxes: int = 8

    @property
    def force_next(self) -> dict[int, int]:
        """Token -> the token that must follow it in generation."""
        return {self.at_token_id: self.box_token_id}


def next_chat_7b_336(**fields) -> NextChatConfig:
    """NExT-Chat-7B-336: 7,741,812,788 parameters, and 256 numbers of a buffer. `fields` are NextChatConfig's own."""
    return NextChatConfig(**fields)


def next_chat_tiny(vocab_size: int, image_token_id: int, *, sam: SamConfig | None = None, **fields) -> NextChatConfig:
    """As `common.tiny`; without SAM it gives boxes and no masks."""
    return tiny(NextChatConfig, vocab_size, image_token_id, sam=sam, **fields)


def next_chat_tiny_sam(vocab_size: int, image_token_id: int, **fields) -> NextChatConfig:
    return next_chat_tiny(vocab_size, image_token_id, sam=sam_tiny(), **fields)


def next_chat_bench(vocab_size: int, image_token_id: int, **fields) -> NextChatConfig:
    """As `common.bench`: 64 tokens an image, boxes and no masks."""
    fields = {"sam": None, **fields}
    vision = {"image_size_px": 64, "num_layers": 5}
    return bench(NextChatConfig, vocab_size, image_token_id, vision=vision, text={}, **fields)


class Boxes(nnx.Module):
    """Boxes to embeddings and hidden states to boxes, each by dense, ReLU, dense; boxes are not clipped to 0..1.

    Computed in float32 whatever the model's dtype: in bfloat16 a coordinate would be off by a few pixels.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, param_dtype=jnp.float32):
        width, half = config.embed_dim, config.embed_dim // 2
        init = dict(use_bias=True, rngs=rngs, param_dtype=param_dtype)
        self.encode_up = Dense("...c,cf->...f", (4, half), ("pos", "mlp"), **init)
        self.encode_down = Dense("...f,fd->...d", (half, width), ("mlp", "embed"), **init)
        self.decode_up = Dense("...d,df->...f", (width, half), ("embed", "mlp"), **init)
        self.decode_down = Dense("...f,fc->...c", (half, 4), ("mlp", "pos"), **init)

    def encode(self, boxes: jax.Array) -> jax.Array:
        """float32[..., D] for boxes[..., 4]: left, top, right, bottom in 0 to 1 of the padded square."""
        return self.encode_down(jax.nn.relu(self.encode_up(boxes.astype(jnp.float32))))

    def decode(self, hidden: jax.Array) -> jax.Array:
        """float32[..., 4] boxes for hidden[..., D] at `<at>`; left may exceed right."""
        return self.decode_down(jax.nn.relu(self.decode_up(hidden.astype(jnp.float32))))


class MaskPrompt(nnx.Module):
    """A hidden state to the tokens that prompt SAM: dense, ReLU, dense."""

    def __init__(self, width: int, out: int, *, rngs: nnx.Rngs, param_dtype=jnp.float32):
        init = dict(use_bias=True, rngs=rngs, param_dtype=param_dtype)
        self.up = Dense("...d,df->...f", (width, width), ("embed", "mlp"), **init)
        self.down = Dense("...f,fd->...d", (width, out), ("mlp", "embed"), **init)

    def __call__(self, hidden: jax.Array) -> jax.Array:
        return self.down(jax.nn.relu(self.up(hidden)))


class NextChat(VisionLanguageModel):
    """Common submodules, `boxes`, `unused`; with SAM also `mask_prompt`, `sam_encoder`, `sam_prompt`, `mask_decoder`.

    A cache has more than the decoder's: `after_at` bool[B] (the row's last token was `<at>`), `box` float32[B, 4] (the
    box decoded there), `num_boxes` int32[B] and `at_hidden` [B, max_boxes, D] of all `<at>` that ended a call.
    """

    config: NextChatConfig

    def __init__(self, config: NextChatConfig, *, rngs: nnx.Rngs, param_dtype=jnp.float32):
        super().__init__(config, rngs=rngs, param_dtype=param_dtype)
        init = dict(rngs=rngs, param_dtype=param_dtype)
        self.boxes = Boxes(config.text, **init)
        self.unused = ClipUnused(config.vision, **init)
        if config.sam is not None:
            prompts = config.num_mask_prompts * config.sam.prompt_dim
            self.mask_prompt = MaskPrompt(config.text.embed_dim, prompts, **init)
            self.sam_encoder = SamEncoder(config.sam, **init, unroll=config.scan_unroll, remat=config.remat)
            self.sam_prompt = SamPrompt(config.sam, **init)
            self.mask_decoder = MaskDecoder(config.sam, **init)

    def make_projector(self, **init) -> Projector:
        return Projector(self.config, **init)

    def hidden(
        self,
        tokens,
        images=None,
        *,
        segment_ids=None,
        positions=None,
        cache=None,
        image_features=None,
        boxes=None,
        at=None,
    ) -> tuple[jax.Array, dict | None]:
        """As `VisionLanguageModel.hidden`.

        boxes: float[B, N, 4] of each row's `<boxes>` in reading order, with any padding. None: `<boxes>` keeps its own
          embedding, except right after an `<at>` in the cache, where it is the box decoded there.
        """  # fmt: skip
        check_shapes(tokens, segment_ids=segment_ids, positions=positions)
        if boxes is not None and (boxes.ndim != 3 or boxes.shape[::2] != (tokens.shape[0], 4)):
            raise ValueError(f"boxes {boxes.shape} beside tokens {tokens.shape}; expected [batch, boxes, 4]")
        x = self.embed(tokens, self.encode_images(images) if images is not None else image_features, boxes)
        options = dict(segment_ids=segment_ids, positions=positions, cache=cache)
        if cache is None:
            return self.decode(x, at=at, **options)
        if boxes is None:
            decoded = self.boxes.encode(cache["box"]).astype(x.dtype)
            x = x.at[:, 0].set(jnp.where(cache["after_at"][:, None], decoded, x[:, 0]))
        hidden, new_cache = self.decode(x, **options)
        new_cache |= self._read_boxes(tokens, hidden, segment_ids, cache)
        return hidden if at is None else take_positions(hidden, at), new_cache

    def embed(self, tokens, image_features=None, boxes=None) -> jax.Array:
        """float[B, T, D]: the input of the decoder's first layer, with images and boxes in place of their tokens."""
        x = super().embed(tokens, image_features)
        return x if boxes is None else merge_images(x, self.boxes.encode(boxes), tokens == self.config.box_token_id)

    def boxes_at(self, hidden: jax.Array, positions: jax.Array) -> jax.Array:
        """float32[B, M, 4] boxes decoded at these positions int[B, M] of hidden[B, T, D]."""
        return self.boxes.decode(take_positions(hidden, positions))

    def encode_sam_images(self, images: dict[str, jax.Array]) -> jax.Array:
        """float[B, g, g, C] SAM's features of each row's one image.

        images: `sam_pixels`, uint8[B, 1, s, s, 3] and `sam_extent` int[B, 1, 2], the height and width of the image in
          the middle of the square; or `sam_pixels` in float[B, 1, s, s, 3], already normalised.
        """
        extent = images.get("sam_extent")
        return self.sam_encoder(images["sam_pixels"][:, 0], None if extent is None else extent[:, 0], dtype=self.dtype)

    def masks(self, at_hidden: jax.Array, sam_features: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(float32[B, M, s, s] logits of the masks at a quarter of SAM's size, float32[B, M] predicted IoU).

        at_hidden: [B, M, D] hidden states at `<at>`. sam_features: what `encode_sam_images` gave.
        """
        rows, num = at_hidden.shape[:2]
        prompts = self.mask_prompt(at_hidden).reshape(rows * num, self.config.num_mask_prompts, -1)
        corners = self.sam_prompt.corners(self.boxes.decode(at_hidden)).reshape(rows * num, 2, -1)
        prompts = jnp.concatenate([prompts, corners.astype(prompts.dtype)], axis=1)
        image = jnp.repeat(sam_features + self.sam_prompt.no_mask[...].astype(sam_features.dtype), num, axis=0)
        masks, iou = self.mask_decoder(image, self.sam_prompt.grid(), prompts)
        return masks.reshape(rows, num, *masks.shape[1:]), iou.reshape(rows, num)

    def init_cache(self, batch: int, length: int, dtype=None) -> dict[str, Any]:
        return super().init_cache(batch, length, dtype) | {
            "after_at": jnp.zeros((batch,), bool),
            "box": jnp.zeros((batch, 4), jnp.float32),
            "num_boxes": jnp.zeros((batch,), jnp.int32),
            "at_hidden": jnp.zeros((batch, self.config.max_boxes, self.config.text.embed_dim), self.dtype),
        }

    def generated_boxes(self, cache) -> tuple[jax.Array, jax.Array]:
        """(float32[B, max_boxes, 4] boxes of a cache in the order generated, bool[B, max_boxes] which are valid)."""
        return self.boxes.decode(cache["at_hidden"]), jnp.arange(self.config.max_boxes) < cache["num_boxes"][:, None]

    def _read_boxes(self, tokens, hidden, segment_ids, cache) -> dict[str, jax.Array]:
        """The cache's entries for boxes after this call, from each row's last real token."""
        real = jnp.ones_like(tokens, bool) if segment_ids is None else segment_ids != 0
        last = jnp.where(real, jnp.arange(tokens.shape[1]), 0).max(axis=1, keepdims=True)
        after_at = jnp.take_along_axis(tokens, last, axis=1)[:, 0] == self.config.at_token_id
        state = take_positions(hidden, last)
        slot = (jnp.arange(self.config.max_boxes) == cache["num_boxes"][:, None]) & after_at[:, None]
        return {
            "after_at": after_at,
            "box": self.boxes.decode(state[:, 0]),
            "num_boxes": cache["num_boxes"] + after_at,
            "at_hidden": jnp.where(slot[..., None], state.astype(cache["at_hidden"].dtype), cache["at_hidden"]),
        }
