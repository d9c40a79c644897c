"""What `encoding` needs of a model to make rows: prompts, image arrays, tokens of an image.

Each family builds its `Format` in `rows.row_format` of its folder.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from medcg_jax.data.boxes import Asked, ask
from medcg_jax.data.records import DataError, Record, Turn
from medcg_jax.data.tokenizer import Tokenizer

Arrays = dict[str, np.ndarray]


class Tokens(NamedTuple):
    """ids: the tokens; supervised: whether each is to be predicted (part of an answer, or the </s> after it)."""

    ids: list[int]
    supervised: list[bool]


@dataclass(frozen=True)
class MaskLayout:
    """The square of side `size_px`, image centred, in which a model draws masks; at most `max_masks` a row.

    resize: (bool[K, h, w], size_px) -> bool[K, size_px, size_px].
    """

    size_px: int
    max_masks: int
    resize: Callable[[np.ndarray, int], np.ndarray]

    def arrays(self, record: Record, masks: np.ndarray | None) -> Arrays:
        """`at_masks` bool[max_masks, size_px, size_px] of bool[K, h, w], in the order of the answers' boxes.

        Raises:
          DataError: as `check`.
        """
        self.check(record, masks)
        out = np.zeros((self.max_masks, self.size_px, self.size_px), bool)
        if not record.boxes or masks is None:
            return {"at_masks": out}
        index_of = {id(box): index for index, box in enumerate(record.boxes)}
        order = [index_of[id(box)] for asked in ask(record) for box in asked.boxes]
        out[: len(masks)] = self.resize(masks[order], self.size_px)
        return {"at_masks": out}

    def check(self, record: Record, masks: np.ndarray | None) -> None:
        """Raises DataError if a record with boxes has no masks, or more than fit."""
        if not record.boxes:
            return
        if masks is None:
            raise DataError("it has boxes and no masks, and masks are what is trained")
        if len(masks) > self.max_masks:
            raise DataError(f"{len(masks)} masks; at most {self.max_masks} fit (model.max_boxes)")


@dataclass(frozen=True)
class Format:
    """How one model's rows are made from records.

    Attributes:
      prompts: a `families.prompts` object with `conversation`, `evaluation_prompt`, `option_ids` and `template`.
      preprocess: uint8[h, w, 3] -> the arrays of one image by batch key, always of the same shapes and dtypes.
      max_image_tokens: the most tokens of an image; every row reserves as many.
      num_image_tokens: (height, width) in pixels -> tokens of that image; None: always `max_image_tokens`.
      box_turn: (record, question about its boxes) -> question and answer; None: the model does not answer with boxes.
      box_question: question about boxes -> the text that asks the model for it; None where `box_turn` is None.
      read_boxes: (generated text, boxes decoded beside it, (height, width) in pixels) -> float64[N, 4] in pixels of the
        image, or None if the answer has no readable box.
      box_arrays: (tokenizer, record, its tokens) -> further arrays of a training row; None: there are none.
      mask_layout: the layout of masks; None: rows have no masks.
    """

    prompts: Any
    preprocess: Callable[[np.ndarray], Arrays]
    max_image_tokens: int
    num_image_tokens: Callable[[int, int], int] | None = None
    box_turn: Callable[[Record, Asked], Turn] | None = None
    box_question: Callable[[str], str] | None = None
    read_boxes: Callable[[str, np.ndarray | None, tuple[int, int]], np.ndarray | None] | None = None
    box_arrays: Callable[[Tokenizer, Record, Tokens], Arrays] | None = None
    mask_layout: MaskLayout | None = None

    def turns(self, record: Record) -> tuple[Turn, ...]:
        """The training turns of a record: its own, or one for each label of its boxes.

        Raises:
          DataError: the record has boxes, and the model does not answer with boxes.
        """
        if not record.boxes:
            return record.turns
        if self.box_turn is None:
            raise DataError("it has boxes; MiniGPT-v2 and NExT-Chat take them, other models do not")
        return tuple(self.box_turn(record, asked) for asked in ask(record))

    @functools.cached_property
    def blank(self) -> Arrays:
        """The arrays of a row without an image: zeros."""
        return {key: np.zeros_like(array) for key, array in self.preprocess(np.zeros((28, 28, 3), np.uint8)).items()}
