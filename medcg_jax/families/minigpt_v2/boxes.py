"""Boxes as text, MiniGPT-v2's way: hundredths of the image's width and height, floored, in angle brackets.

    {<25><40><62><78>}                          x1, y1, x2, y2
    {<25><40><62><78>}<delim>{<0><0><9><100>}   several

Source: Vision-CAIR/MiniGPT-4 (d94738a) minigpt4/datasets/datasets/coco_dataset.py:ReferCOCODataset.preprocess
(writing), eval_scripts/eval_ref.py (reading: spaces do not count; back to pixels by value / 100 * size), demo_v2.py
(several).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from medcg_jax.data.records import DataError

BINS = 100
DELIMITER = "<delim>"
_NUMBER = r"<(0|[1-9]\d?|100)>"
_BOX = re.compile(r"\{" + 4 * _NUMBER + r"\}")
_PHRASE = re.compile(r"^<p>[^<>]*</p>")


def format_boxes(boxes: np.ndarray | Sequence[Sequence[float]], size: tuple[int, int]) -> str:
    """The text of boxes[N, 4], x1, y1, x2, y2 in pixels, in an image of size (height, width).

    Raises:
      DataError: no boxes, or a box outside the image, with swapped ends, or with numbers that are not finite.
    """
    boxes = np.asarray(boxes, np.float64)
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not len(boxes):
        raise DataError(f"boxes of shape {boxes.shape} cannot be written; expected [N, 4] with N of 1 or more")
    height, width = size
    for box in boxes.tolist():
        x1, y1, x2, y2 = box
        # NaN fails both comparisons.
        if not (0 <= x1 <= x2 <= width and 0 <= y1 <= y2 <= height):
            expected = "0 <= x1 <= x2 <= width, 0 <= y1 <= y2 <= height"
            raise DataError(f"box {box} in an image of {width} x {height}; expected {expected}")
    # The original's order of operations: 29 / 100 * 100 is less than 29, and floors to 28 in both.
    binned = (boxes / (width, height, width, height) * BINS).astype(int).tolist()
    return DELIMITER.join("{" + "".join(f"<{value}>" for value in box) + "}" for box in binned)


def parse_bins(text: str) -> np.ndarray | None:
    """int64[N, 4] boxes in hundredths, if the text consists of boxes and nothing else; otherwise None.

    Spaces and one `<p>phrase</p>` in front are ignored. Numbers must be 0 to 100 without leading zeros, and no box may
    have swapped ends: nothing is repaired or guessed.
    """
    boxes = []
    for box_text in _PHRASE.sub("", re.sub(r"\s", "", text)).split(DELIMITER):
        matched = _BOX.fullmatch(box_text)
        if matched is None:
            return None
        x1, y1, x2, y2 = box = [int(value) for value in matched.groups()]
        if x1 > x2 or y1 > y2:
            return None
        boxes.append(box)
    return np.array(boxes, np.int64)


def parse_boxes(text: str, size: tuple[int, int]) -> np.ndarray | None:
    """float64[N, 4] boxes in pixels of an image of size (height, width); None if `parse_bins` gives None.

    Writing and reading a box moves it left and up by less than a hundredth of the image.
    """
    bins = parse_bins(text)
    return None if bins is None else bins / BINS * np.array((size[1], size[0], size[1], size[0]))
