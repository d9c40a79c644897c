"""What a model's rows look like: its prompts, its images as arrays, and how many tokens an image takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import numpy as np

from medcg_jax.data import images
from medcg_jax.data.boxes import Asked, ask, corners
from medcg_jax.data.records import DataError, Record, Turn
from medcg_jax.data.row_format import Arrays, Format, MaskLayout, Tokens
from medcg_jax.data.tokenizer import Tokenizer
from medcg_jax.families import prompts, prompts_chatml, prompts_llama3, prompts_minigpt, prompts_next_chat
from medcg_jax.families.minigpt_v2 import rows as minigpt_v2_rows
from medcg_jax.families.minigpt_v2.boxes import format_boxes, parse_boxes
from medcg_jax.families.mllama import rows as mllama_rows
from medcg_jax.families.next_chat import rows as next_chat_rows
from medcg_jax.families.qwen2_vl import rows as qwen2_vl_rows

# Family -> the packaged tokenizer of its tiny model.
SMALL_TOKENIZERS = {
    "llava": "tokenizer",
    "qwen2_vl": "chatml",
    "mllama": "llama3",
    "minigpt_v2": "minigpt_v2",
    "next_chat": "next_chat",
}
# Family -> field of a model's configuration -> special token.
TOKENS = {
    "qwen2_vl": {
        "image_token_id": "<|image_pad|>", "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    },
    "mllama": {"image_token_id": "<|image|>"},
    "next_chat": {"image_token_id": "<im_patch>", "at_token_id": "<at>", "box_token_id": "<boxes>"},
}  # fmt: skip


def token_ids(family: str, tokenizer: Tokenizer) -> dict[str, int]:
    """The ids that a family's configuration has of its tokenizer, by field.

    Raises:
      DataError: the tokenizer lacks one: it is of another family.
    """
    ids = {
        name: getattr(tokenizer, name.replace("token_id", "id"))
        for name in ("image_token_id", "pad_token_id", "eos_token_id")
    }
    return ids | {field: tokenizer.special(token) for field, token in TOKENS.get(family, {}).items()}


def format_of(family: str, model, *, with_masks: bool = False) -> Format:
    """The format of a model of the family; `model` is its configuration.

    with_masks: rows have masks, and images as the model that draws them takes them.

    Raises:
      DataError: masks of a model that draws none.
    """
    made = _FORMATS[family](model)
    if not with_masks:
        return made
    if getattr(model, "sam", None) is None:
        raise DataError(f"{family} without SAM draws no masks; NExT-Chat with it does")
    return _with_masks(made, MaskLayout(model.sam.image_size_px, model.max_boxes, next_chat_rows.preprocess_masks))


def llava(image_size_px: int, num_image_tokens: int) -> Format:
    """LLaVA-1.5: Vicuna's turns; images padded to a square and resized, all with as many tokens."""

    def preprocess(image: np.ndarray) -> Arrays:
        return {"pixels": images.preprocess(image, image_size_px)}

    return Format(prompts, preprocess, num_image_tokens)


def qwen2_vl(sizes: qwen2_vl_rows.ImageSizes) -> Format:
    """Qwen2-VL: ChatML turns; images keep their shape, and take as many tokens as they are large."""
    return Format(
        prompts_chatml, partial(qwen2_vl_rows.preprocess, sizes=sizes), sizes.max_image_tokens,
        partial(qwen2_vl_rows.num_image_tokens, sizes=sizes),
    )  # fmt: skip


def mllama(tile_px: int) -> Format:
    """Llama-3.2-Vision: Llama 3's turns; images cut into tiles, each image one token."""
    return Format(prompts_llama3, partial(mllama_rows.preprocess, tile_px=tile_px), 1)


def minigpt_v2(image_size_px: int, num_image_tokens: int) -> Format:
    """MiniGPT-v2: Llama 2's instructions; images squashed to a square, all with as many tokens; boxes as text."""
    preprocess = partial(minigpt_v2_rows.preprocess, size_px=image_size_px)
    return Format(prompts_minigpt, preprocess, num_image_tokens, box_turn=text_box_turn, read_boxes=read_text_boxes)


def text_box_turn(record: Record, asked: Asked) -> Turn:
    """Question and answer as MiniGPT-v2 writes boxes."""
    return Turn(f"[detection] {asked.question}", format_boxes(corners(asked.boxes), record.size_px))


def read_text_boxes(text: str, boxes: np.ndarray | None, size: tuple[int, int]) -> np.ndarray | None:
    return parse_boxes(text, size)


def next_chat(image_size_px: int, num_image_tokens: int, max_boxes: int = 8) -> Format:
    """NExT-Chat: Vicuna's turns with the image between two tokens; images on a white square; boxes as arrays."""
    preprocess = partial(next_chat_rows.preprocess, size_px=image_size_px)
    return Format(
        prompts_next_chat, preprocess, num_image_tokens, box_turn=placed_box_turn, read_boxes=read_placed_boxes,
        box_arrays=partial(placed_box_arrays, max_boxes=max_boxes),
    )  # fmt: skip


def placed_box_turn(record: Record, asked: Asked) -> Turn:
    """Question and answer with places for the boxes, as NExT-Chat answers them."""
    return Turn(asked.question, prompts_next_chat.box_answer(len(asked.boxes)))


def placed_box_arrays(tokenizer: Tokenizer, record: Record, tokens: Tokens, *, max_boxes: int) -> Arrays:
    """`prompts_next_chat.box_arrays` of a record's boxes, in the order of its turns."""
    boxes = corners([box for asked in ask(record) for box in asked.boxes])
    placed = next_chat_rows.to_square(boxes, record.size_px) if len(boxes) else boxes
    return prompts_next_chat.box_arrays(tokenizer, tokens, placed, max_boxes=max_boxes, max_answers=max_boxes)


def read_placed_boxes(text: str, boxes: np.ndarray | None, size: tuple[int, int]) -> np.ndarray | None:
    return next_chat_rows.from_square(boxes, size) if boxes is not None and len(boxes) else None


def _with_masks(made: Format, layout: MaskLayout) -> Format:
    def preprocess(image: np.ndarray) -> Arrays:
        return made.preprocess(image) | next_chat_rows.preprocess_sam(image, layout.size_px)

    return dataclasses.replace(made, preprocess=preprocess, mask_layout=layout)


_FORMATS: dict[str, Callable[..., Format]] = {
    "llava": lambda model: llava(model.image_size_px, model.num_image_tokens),
    "qwen2_vl": lambda model: qwen2_vl(
        qwen2_vl_rows.ImageSizes(model.vision.patch_size_px, model.vision.merge, model.min_pixels, model.max_pixels)
    ),
    "mllama": lambda model: mllama(model.image_size_px),
    "minigpt_v2": lambda model: minigpt_v2(model.image_size_px, model.num_image_tokens),
    "next_chat": lambda model: next_chat(model.image_size_px, model.num_image_tokens, model.max_boxes),
}
