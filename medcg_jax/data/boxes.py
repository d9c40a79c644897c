"""Boxes of resized images, boxes of masks, and the questions of a record with boxes.

Boxes are float[..., 4] of x1, y1, x2, y2 in pixels, corners between pixels; sizes are (height, width). There is one
question for each label of a record, the same for every model; the form of the answer depends on the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from medcg_jax.data.records import Box, Record

Size = tuple[int, int]

# No phrasing says how many boxes there are: that is part of the answer.
PHRASINGS = (
    "Where is the {label}?",
    "Where in this image is the {label}?",
    "Locate the {label}.",
    "Find the {label} in this image.",
    "Mark the {label} with a box.",
    "Give the place of the {label}.",
)


def resized(boxes: np.ndarray, size: Size, to: Size, *, squared: bool = False) -> np.ndarray:
    """float64[N, 4]: boxes of an image of `size` as boxes of the image resized to `to`, cut at its edges.

    Args:
      squared: whether the image is first padded to a square of its longer side (`images.pad_to_square`).
    """
    height, width = size
    side = max(size)
    top, left = ((side - height) // 2, (side - width) // 2) if squared else (0, 0)
    scale = np.tile((to[1] / (side if squared else width), to[0] / (side if squared else height)), 2)
    moved = np.asarray(boxes, np.float64) * scale + scale * np.tile((left, top), 2)
    return np.clip(moved, 0, np.tile((to[1], to[0]), 2))


def corners(boxes: Iterable[Box]) -> np.ndarray:
    """float64[N, 4] of a record's boxes, in their order."""
    return np.array([box.corners for box in boxes], np.float64).reshape(-1, 4)


def of_mask(mask: np.ndarray) -> np.ndarray:
    """float64[N, 4]: the tight box of each connected part (diagonal neighbours count) of bool[h, w], from the top."""
    from scipy import ndimage  # a run without masks starts faster without it

    parts, _ = ndimage.label(mask, structure=np.ones((3, 3)))
    boxes = [(x.start, y.start, x.stop, y.stop) for y, x in ndimage.find_objects(parts)]
    return np.array(sorted(boxes, key=lambda box: (box[1], box[0])), np.float64).reshape(-1, 4)


class Asked(NamedTuple):
    """One question, its label as the boxes have it, and the boxes of that label in the record's order."""

    question: str
    label: str
    boxes: tuple[Box, ...]


def ask(record: Record) -> tuple[Asked, ...]:
    """The questions of a record, one for each label of its boxes; () without boxes.

    Order and phrasing depend only on the record's id and the labels, not on the order of the boxes. So each label of a
    subset comes first in some records, as it does when it is asked alone.

    Example: boxes of "Left lung" and "Right lung" -> ("Locate the right lung.", ...), ("Where is the left lung?", ...).
    """
    labels = sorted(dict.fromkeys(box.label for box in record.boxes), key=lambda label: _digest(f"{record.id}/{label}"))
    return tuple(
        Asked(question(label, f"{record.id}/{label}"), label, tuple(box for box in record.boxes if box.label == label))
        for label in labels
    )


def question(label: str, key: str) -> str:
    """A phrasing chosen by `key`, with the label as it stands inside a sentence ("Skin lesion" -> "skin lesion")."""
    # "CT contrast" keeps its capitals.
    inside = label if label[:2].isupper() else label[:1].lower() + label[1:]
    return PHRASINGS[int.from_bytes(_digest(key)[:4], "big") % len(PHRASINGS)].format(label=inside)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
