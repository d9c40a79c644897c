"""Rows of NExT-Chat: Vicuna's turns; a white square for CLIP, a zero-padded one for SAM; boxes as arrays.

Both squares have the image in the middle, so one box, in fractions of the square, fits both.
Source: NExT-ChatV/NExT-Chat (1e6c20f) mllm/dataset/process_function/chat_process_function.py,
box_process_function.py:BoxFormatProcess, models/nextchat/nextchat_base.py:generate_rec (text);
mllm/dataset/utils/transform.py:expand2square, box_xyxy_expand2square, norm_box_xyxy; mllm/models/sam/transforms.py:
ResizeAndPad, whose resize is PIL's bilinear filter on uint8 (images).
"""

from __future__ import annotations

import re
from functools import partial

import numpy as np
from PIL import Image

from medcg_jax.data.boxes import Asked, ask, corners
from medcg_jax.data.images import pad_to_square, resize
from medcg_jax.data.records import DataError, Record, Turn
from medcg_jax.data.row_format import Arrays, Format, MaskLayout, Tokens
from medcg_jax.data.tokenizer import Tokenizer
from medcg_jax.families.prompts import BOS, IMAGE, Text, Vicuna

FILL = (255, 255, 255)
AT, BOX = "<at>", "<boxes>"
_ADDED = re.compile(f"({AT}|{BOX})")

Size = tuple[int, int]


class BoxVicuna(Vicuna):
    """Vicuna's turns, with the image between two tokens, and each box spelled `<at> <boxes>`.

        <system> USER: <im_start><im_patch>...<im_end> Where is it? ASSISTANT: Answer: <at> <boxes> .</s>

    `<boxes>` is never supervised. Text is split at the added tokens, and each piece is tokenised separately: spaces
    beside an added token are dropped, and pieces after the first are tokenised as if after a space
    (`Tokenizer.encode_behind_added`), like a slow Llama tokenizer with `legacy: false` in transformers 4.31 (later
    versions differ).
    """

    image, unsupervised = "<im_patch>", BOX

    def pieces(self, turn, *, first, system_prompt, has_image, training):
        if not has_image:
            options = {"first": first, "system_prompt": system_prompt}
            return super().pieces(turn, has_image=False, training=training, **options)
        opening = Text(self.opening(system_prompt).rstrip())
        return [BOS, opening, "<im_start>", IMAGE, "<im_end>", Text(f"{turn.question.strip()} ASSISTANT:", start=False)]

    def answer(self, tokenizer, last, answer):
        """As `Prompts`; </s> removes the spaces before it."""
        return super().answer(tokenizer, last, answer.rstrip())

    def encode_text(self, tokenizer, piece):
        ids: list[int] = []
        texts = _ADDED.split(piece.text)
        for number, text in enumerate(texts):
            if number % 2:
                ids.append(tokenizer.special(text))
                continue
            opens = piece.start and not number
            text = text if opens else text.lstrip()
            text = text.rstrip() if number < len(texts) - 1 else text
            if text:
                ids += tokenizer.encode(text) if opens else tokenizer.encode_behind_added(text)
        return ids


PROMPTS = BoxVicuna()


def row_format(config, *, with_masks: bool = False) -> Format:
    """The format of a model's rows. config: its `NextChatConfig`.

    with_masks: rows have masks too, and images for SAM beside those for CLIP.
    """
    layout = MaskLayout(config.sam.image_size_px, config.max_boxes, preprocess_masks) if with_masks else None

    def preprocess_image(image: np.ndarray) -> Arrays:
        arrays = preprocess(image, config.image_size_px)
        return arrays | preprocess_sam(image, layout.size_px) if layout else arrays

    return Format(
        PROMPTS, preprocess_image, config.num_image_tokens, box_turn=box_turn, box_question=str, read_boxes=read_boxes,
        box_arrays=partial(record_box_arrays, max_boxes=config.max_boxes), mask_layout=layout,
    )  # fmt: skip


# ------------------------------------------------------------------ boxes


def box_answer(num_boxes: int) -> str:
    """The answer to where something is: "Answer: <at> <boxes> ." for one box, that many pairs for several."""
    return f"Answer: {' '.join([f'{AT} {BOX}'] * num_boxes)} ."


def box_turn(record: Record, asked: Asked) -> Turn:
    """Question and answer with tokens for the boxes."""
    return Turn(asked.question, box_answer(len(asked.boxes)))


def read_boxes(text: str, boxes: np.ndarray | None, size: Size) -> np.ndarray | None:
    return from_square(boxes, size) if boxes is not None and len(boxes) else None


def record_box_arrays(tokenizer: Tokenizer, record: Record, tokens: Tokens, *, max_boxes: int) -> Arrays:
    """`box_arrays` of a record's boxes, in the order of its turns."""
    boxes = corners([box for asked in ask(record) for box in asked.boxes])
    placed = to_square(boxes, record.size_px) if len(boxes) else boxes
    return box_arrays(tokenizer, tokens, placed, max_boxes=max_boxes)


def box_arrays(tokenizer: Tokenizer, tokens: Tokens, boxes: np.ndarray, *, max_boxes: int) -> Arrays:
    """A row's arrays for `train.losses.box_terms`: all boxes of the text, and those in answers with their `<at>`.

    `boxes` float32[max_boxes, 4], `box_weights` float32[max_boxes]; of answers `at_positions` int32[max_boxes],
    `at_boxes` float32[max_boxes, 4], `at_weights` float32[max_boxes]. Weights are 0 on padding.

    Args:
      boxes: [N, 4] in 0 to 1 of the padded square, one for each `<boxes>` of the text, in reading order.

    Raises:
      DataError: another number of boxes than the text has, or more than fit.
    """
    at, box = tokenizer.special(AT), tokenizer.special(BOX)
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
    positions = [position for position, i in enumerate(tokens.ids) if i == box]
    if len(positions) != len(boxes):
        raise DataError(f"{len(boxes)} boxes for {len(positions)} {BOX} in the text")
    if len(boxes) > max_boxes:
        raise DataError(f"{len(boxes)} boxes; at most {max_boxes} fit (model.max_boxes)")
    # An `<at>` is right before its `<boxes>`.
    answered = [n for n, p in enumerate(positions) if tokens.ids[p - 1] == at and tokens.supervised[p - 1]]
    arrays = {
        "boxes": boxes, "box_weights": np.ones(len(boxes), np.float32),
        "at_positions": np.array([positions[n] - 1 for n in answered], np.int32), "at_boxes": boxes[answered],
        "at_weights": np.ones(len(answered), np.float32),
    }  # fmt: skip
    return {
        name: np.pad(array, [(0, max_boxes - len(array)), *[(0, 0)] * (array.ndim - 1)])
        for name, array in arrays.items()
    }


# ------------------------------------------------------------------ images


def preprocess(image: np.ndarray, size_px: int) -> dict[str, np.ndarray]:
    """`pixels` uint8[size_px, size_px, 3] of uint8[h, w, 3]; normalised where the model runs."""
    return {"pixels": resize(pad_to_square(image, FILL), size_px)}


def to_square(boxes: np.ndarray, size: Size) -> np.ndarray:
    """float64[N, 4] in 0 to 1 of the padded square, clipped to it.

    boxes: [N, 4] of x1, y1, x2, y2 in pixels of an image of size (height, width).
    """
    shift, side = _shift(size)
    return np.clip((np.asarray(boxes, np.float64) + shift) / side, 0, 1)


def from_square(boxes: np.ndarray, size: Size) -> np.ndarray:
    """float64[N, 4] in pixels of the image: the inverse of `to_square`; boxes may reach beyond the image."""
    shift, side = _shift(size)
    return np.asarray(boxes, np.float64) * side - shift


def preprocess_sam(image: np.ndarray, size_px: int) -> dict[str, np.ndarray]:
    """`sam_pixels` uint8[size_px, size_px, 3] and `sam_extent` int32[2], height and width of the image in its middle.

    The surroundings must be 0 after normalisation, which no byte value gives; hence `sam_extent`.
    """
    resized = _resize_longest(image, size_px)
    return {"sam_pixels": _centred(resized, size_px), "sam_extent": np.array(resized.shape[:2], np.int32)}


def preprocess_masks(masks: np.ndarray, size_px: int) -> np.ndarray:
    """bool[K, size_px, size_px] of masks bool[K, h, w], laid out as `preprocess_sam` lays the image."""
    resized = [_resize_longest(mask.astype(np.uint8), size_px) for mask in masks]
    return np.array([_centred(mask, size_px) for mask in resized], bool).reshape(-1, size_px, size_px)


def _shift(size: Size) -> tuple[np.ndarray, int]:
    """(the shift (x, y, x, y) of a box in the square, the square's side), in whole pixels as `pad_to_square`."""
    height, width = size
    side = max(size)
    return np.tile(((side - width) // 2, (side - height) // 2), 2), side


def _resize_longest(image: np.ndarray, size_px: int) -> np.ndarray:
    """uint8[h', w', ...], the longer side `size_px`."""
    scale = size_px / max(image.shape[:2])
    # At least one pixel.
    height, width = (max(1, int(side * scale + 0.5)) for side in image.shape[:2])
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def _centred(image: np.ndarray, size_px: int) -> np.ndarray:
    height, width = image.shape[:2]
    square = np.zeros((size_px, size_px, *image.shape[2:]), np.uint8)
    top, left = (size_px - height) // 2, (size_px - width) // 2
    square[top : top + height, left : left + width] = image
    return square
