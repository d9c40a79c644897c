"""NExT-Chat: LLaVA's parts, boxes as embeddings in and out of the decoder, and SAM's masks prompted by it.

`<boxes>` in the text is embedded by an MLP of its coordinates; the hidden state at `<at>` is decoded to coordinates by
another. Masks come from SAM, prompted with that box and with four tokens made of the same hidden state.
Source: NExT-ChatV/NExT-Chat:mllm/models/nextchat/nextchat_base.py, nextchat_seg.py at 1e6c20f; arXiv 2311.04498.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from medcg_jax.families import decoder as decoder_lib
from medcg_jax.families.clip import ClipUnused, ClipVision, ClipVisionConfig
from medcg_jax.families.decoder import Decoder, DecoderConfig
from medcg_jax.families.llava.model import Projector
from medcg_jax.families.merge import merge_images
from medcg_jax.families.next_chat.sam import SamConfig, SamEncoder, SamPrompt
from medcg_jax.families.next_chat.sam_decoder import MaskDecoder
from medcg_jax.nn.attention import take_positions
from medcg_jax.nn.base import Base
from medcg_jax.nn.layers import Dense
from medcg_jax.nn.lora import Adapters, LoraConfig


@dataclass(frozen=True)
class NextChatConfig:
    """Architecture, special tokens, and how it runs; the defaults are NExT-Chat-7B-336."""

    vision: ClipVisionConfig = ClipVisionConfig()
    text: DecoderConfig = DecoderConfig(vocab_size=32005)
    # None: a model of the first two stages, which gives boxes and no masks.
    sam: SamConfig | None = SamConfig()
    # Tokens that prompt SAM for one mask, made of one hidden state.
    num_mask_prompts: int = 4
    image_token_id: int = 32000
    at_token_id: int = 32003
    box_token_id: int = 32004
    pad_token_id: int = 0
    eos_token_id: int = 2
    # Boxes of a row that a cache remembers while decoding.
    max_boxes: int = 8
    compute_dtype: str = "float32"
    # As `ModelConfig`'s fields of these names.
    attention: str = "auto"
    remat: str = "none"
    scan_unroll: int = 0
    matmul: str = ""
    # Adapters on the decoder's products; None: none.
    lora: LoraConfig | None = None
    base: Base = Base()

    @property
    def num_image_tokens(self) -> int:
        return self.vision.num_patches

    @property
    def image_size_px(self) -> int:
        return self.vision.image_size_px

    @property
    def force_next(self) -> dict[int, int]:
        """Token -> the one that must follow it in generation."""
        return {self.at_token_id: self.box_token_id}


def next_chat_7b_336(**fields) -> NextChatConfig:
    """NExT-Chat-7B-336: 7,741,812,788 parameters, and 256 numbers of a buffer. `fields` are NextChatConfig's own."""
    return NextChatConfig(**fields)


def next_chat_tiny(
    vocab_size: int,
    image_token_id: int,
    *,
    at_token_id: int,
    box_token_id: int,
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
    sam: SamConfig | None = None,
    **fields,
) -> NextChatConfig:
    """The same architecture for the phantom world; sam: `sam_tiny()` for masks. `fields` are NextChatConfig's own."""
    vision = ClipVisionConfig(
        image_size_px=image_size_px, patch_size_px=patch_size_px, num_layers=num_vision_layers, embed_dim=embed_dim,
        num_heads=num_vision_heads, mlp_dim=vision_mlp_dim,
    )  # fmt: skip
    text = DecoderConfig(
        vocab_size=vocab_size, num_layers=num_layers, embed_dim=embed_dim, num_heads=num_heads,
        num_kv_heads=num_kv_heads, head_dim=embed_dim // num_heads, mlp_dim=mlp_dim, rope_theta=rope_theta,
        max_positions=512,
    )  # fmt: skip
    ids = dict(image_token_id=image_token_id, at_token_id=at_token_id, box_token_id=box_token_id)
    return NextChatConfig(vision, text, sam, **ids, pad_token_id=pad_token_id, eos_token_id=eos_token_id, **fields)


class Boxes(nnx.Module):
    """Boxes to embeddings and hidden states to boxes, each by dense, ReLU, dense; nothing keeps a box in 0 to 1.

    Computed in float32 whatever the model's dtype: 8 bits of a coordinate would be a few pixels.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        width, half = config.embed_dim, config.embed_dim // 2
        made = dict(use_bias=True, rngs=rngs, dtype=dtype)
        self.encode_up = Dense("...c,cf->...f", (4, half), ("pos", "mlp"), **made)
        self.encode_down = Dense("...f,fd->...d", (half, width), ("mlp", "embed"), **made)
        self.decode_up = Dense("...d,df->...f", (width, half), ("embed", "mlp"), **made)
        self.decode_down = Dense("...f,fc->...c", (half, 4), ("mlp", "pos"), **made)

    def encode(self, boxes: jax.Array) -> jax.Array:
        """float32[..., D] for boxes[..., 4]: left, top, right, bottom in 0 to 1 of the padded square."""
        return self.encode_down(jax.nn.relu(self.encode_up(boxes.astype(jnp.float32))))

    def decode(self, hidden: jax.Array) -> jax.Array:
        """float32[..., 4] boxes for hidden[..., D] at `<at>`; left may be beyond right."""
        return self.decode_down(jax.nn.relu(self.decode_up(hidden.astype(jnp.float32))))


class MaskPrompt(nnx.Module):
    """A hidden state to the tokens that prompt SAM: dense, ReLU, dense."""

    def __init__(self, width: int, out: int, *, rngs: nnx.Rngs, dtype=jnp.float32):
        made = dict(use_bias=True, rngs=rngs, dtype=dtype)
        self.up = Dense("...d,df->...f", (width, width), ("embed", "mlp"), **made)
        self.down = Dense("...f,fd->...d", (width, out), ("mlp", "embed"), **made)

    def __call__(self, hidden: jax.Array) -> jax.Array:
        return self.down(jax.nn.relu(self.up(hidden)))


class NextChat(nnx.Module):
    """Submodules: `vision`, `projector`, `decoder`, `boxes`, `unused`, and with SAM `mask_prompt`, `sam_encoder`,
    `sam_prompt`, `mask_decoder`.

    A cache holds besides the decoder's: `after_at` bool[B] (the row's last token was `<at>`), `box` float32[B, 4]
    (what was decoded there), `num_boxes` int32[B] and `at_hidden` [B, max_boxes, D] of all `<at>` that ended a call.
    """

    # Keys of a batch that `encode_images` takes.
    image_keys = ("pixels",)

    def __init__(self, config: NextChatConfig, *, rngs: nnx.Rngs, dtype=None, param_dtype=jnp.float32):
        made = dict(rngs=rngs, dtype=param_dtype)
        runs = dict(unroll=config.scan_unroll, remat=config.remat)
        self.config = config
        self.dtype = jnp.dtype(config.compute_dtype if dtype is None else dtype)
        self.vision = ClipVision(config.vision, **made, **runs)
        self.projector = Projector(config, **made)
        self.decoder = Decoder(config.text, **made, **runs)
        self.lora = Adapters(config.text, config.lora, config.text.num_layers, **made) if config.lora else None
        self.boxes = Boxes(config.text, **made)
        self.unused = ClipUnused(config.vision, **made)
        if config.sam is not None:
            prompts = config.num_mask_prompts * config.sam.prompt_dim
            self.mask_prompt = MaskPrompt(config.text.embed_dim, prompts, **made)
            self.sam_encoder = SamEncoder(config.sam, **made, **runs)
            self.sam_prompt = SamPrompt(config.sam, **made)
            self.mask_decoder = MaskDecoder(config.sam, **made)

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
        """(float[B, T, D] after the final norm, the cache with these tokens in it or None).

        tokens: int[B, T], every image as `num_image_tokens` copies of `image_token_id`.
        images: as in `encode_images`; or image_features: what it gave; neither: the rows hold no image token.
        boxes: float[B, N, 4] of each row's `<boxes>` in reading order; rows with fewer are filled with anything. None:
          `<boxes>` keeps its own embedding, but right after an `<at>` in the cache it is the box decoded there.
        segment_ids, positions, cache: as in `Decoder`.
        at: int[B, L]; hidden comes back at these positions alone, float[B, L, D], as in `Decoder`. None: at all.

        Raises:
          ValueError: shapes that do not fit each other.
        """
        for name, ids in (("tokens", tokens), ("segment_ids", segment_ids), ("positions", positions)):
            if ids is not None and ids.shape != tokens.shape or tokens.ndim != 2:
                raise ValueError(f"{name} {ids.shape} beside tokens {tokens.shape}: [batch, length] is accepted")
        if boxes is not None and (boxes.ndim != 3 or boxes.shape[::2] != (tokens.shape[0], 4)):
            raise ValueError(f"boxes {boxes.shape} beside tokens {tokens.shape}: [batch, boxes, 4] is accepted")
        x = self.embed(tokens, self.encode_images(images) if images is not None else image_features, boxes)
        if cache is not None and boxes is None:
            decoded = self.boxes.encode(cache["box"]).astype(x.dtype)
            x = x.at[:, 0].set(jnp.where(cache["after_at"][:, None], decoded, x[:, 0]))
        rest = dict(segment_ids=segment_ids, positions=positions, cache=cache)
        rest |= dict(attention=self.config.attention, lora=self.lora)
        if cache is None:
            return self.decoder(x, at=at, **rest)
        hidden, kept = self.decoder(x, **rest)
        kept |= self._read_boxes(tokens, hidden, segment_ids, cache)
        return hidden if at is None else take_positions(hidden, at), kept

    def embed(self, tokens, image_features=None, boxes=None) -> jax.Array:
        """float[B, T, D]: what the decoder's first layer gets, images and boxes in place of their tokens."""
        is_image = tokens == self.config.image_token_id
        # Image and padding ids may lie outside the table; what they look up is replaced, or never attended.
        ids = jnp.where(is_image, 0, jnp.minimum(tokens, self.config.text.vocab_size - 1))
        x = self.decoder.embed(ids, self.dtype)
        if image_features is not None:
            x = merge_images(x, image_features, is_image)
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

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32[..., V] for hidden[..., D]."""
        return self.decoder.logits(hidden)

    def init_cache(self, batch: int, length: int, dtype=None) -> dict[str, jax.Array]:
        kept = decoder_lib.init_cache(self.config.text, batch, length, self.dtype if dtype is None else dtype)
        return kept | {
            "after_at": jnp.zeros((batch,), bool),
            "box": jnp.zeros((batch, 4), jnp.float32),
            "num_boxes": jnp.zeros((batch,), jnp.int32),
            "at_hidden": jnp.zeros((batch, self.config.max_boxes, self.config.text.embed_dim), self.dtype),
        }

    def generated_boxes(self, cache) -> tuple[jax.Array, jax.Array]:
        """(float32[B, max_boxes, 4], bool[B, max_boxes] which are there): boxes of a cache in the order generated."""
        there = jnp.arange(self.config.max_boxes) < cache["num_boxes"][:, None]
        return self.boxes.decode(cache["at_hidden"]), there

    def _read_boxes(self, tokens, hidden, segment_ids, cache) -> dict[str, jax.Array]:
        """The cache's own entries after this call, by each row's last real token."""
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

    def __call__(self, tokens, images=None, **rest) -> jax.Array:
        """float32[B, T, V]: logits at every position; arguments as in `hidden`."""
        return self.logits(self.hidden(tokens, images, **rest)[0])
