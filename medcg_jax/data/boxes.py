"""Boxes carried through what is done to an image (squash, padding to a square, flip, tile) and back; boxes of masks;
and what is asked of a record with boxes: one question a label, the same for every model. How it answers is its own.

Boxes are float[..., 4] of x1, y1, x2, y2 in pixels, corners between pixels; sizes are (height, width). All of these
changes scale and shift each axis by itself, so one `Change` holds any chain of them and its inverse.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from medcg_jax.data.records import Box, Record

Size = tuple[int, int]

# None says how many there are: that is part of the answer.
PHRASINGS = (
    "Where is the {label}?",
    "Where in this image is the {label}?",
    "Locate the {label}.",
    "Find the {label} in this image.",
    "Mark the {label} with a box.",
    "Give the place of the {label}.",
)


@dataclass(frozen=True)
class Change:
    """x -> scale * x + shift, along x and along y.

    Attributes:
      scale, shift: (x, y); a negative scale is a flip.
      before, after: (height, width) of the image in pixels.
    """

    scale: tuple[float, float]
    shift: tuple[float, float]
    before: Size
    after: Size

    def apply(self, boxes: np.ndarray) -> np.ndarray:
        """float64[..., 4]: boxes of the image before, as boxes of the image after; x1 <= x2 and y1 <= y2 stay so."""
        scale, shift = np.tile(self.scale, 2), np.tile(self.shift, 2)
        moved = np.asarray(boxes, np.float64) * scale + shift
        first, second, flipped = moved[..., :2], moved[..., 2:], np.array(self.scale) < 0
        # A flip exchanges the two ends of an axis.
        return np.concatenate([np.where(flipped, second, first), np.where(flipped, first, second)], -1)

    def then(self, other: Change) -> Change:
        """This change and the other one after it.

        Raises:
          ValueError: the other starts from an image of another size.
        """
        if self.after != other.before:
            raise ValueError(f"a change of {other.before} pixels (height, width) after one that gives {self.after}")
        scale = tuple(a * b for a, b in zip(self.scale, other.scale, strict=True))
        shift = tuple(b * s + t for b, s, t in zip(other.scale, self.shift, other.shift, strict=True))
        return Change(scale, shift, self.before, other.after)

    def inverse(self) -> Change:
        """The way back: boxes of the image after, as boxes of the image before."""
        scale = tuple(1 / s for s in self.scale)
        shift = tuple(-t / s for s, t in zip(self.scale, self.shift, strict=True))
        return Change(scale, shift, self.after, self.before)


def squash(size: Size, to: Size) -> Change:
    """The whole image resized to another size, whatever its shape."""
    return Change((to[1] / size[1], to[0] / size[0]), (0.0, 0.0), size, to)


def pad_to_square(size: Size) -> Change:
    """The image in the middle of a square of its longer side, as `images.pad_to_square` lays it with any fill."""
    side = max(size)
    return Change((1.0, 1.0), ((side - size[1]) // 2, (side - size[0]) // 2), size, (side, side))


def flip(size: Size) -> Change:
    """The image mirrored left to right; a label that names a side, such as "Left lung", is then wrong."""
    return Change((-1.0, 1.0), (float(size[1]), 0.0), size, size)


def tile(size: Size, top: int, left: int, height: int, width: int) -> Change:
    """A part of the image; boxes may reach out of it (`clip` cuts them).

    Raises:
      ValueError: the part is not inside the image.
    """
    if not (0 <= top < top + height <= size[0] and 0 <= left < left + width <= size[1]):
        raise ValueError(f"tile at {(top, left)} of {(height, width)} in an image of {size}; one inside it is accepted")
    return Change((1.0, 1.0), (-float(left), -float(top)), size, (height, width))


def clip(boxes: np.ndarray, size: Size) -> tuple[np.ndarray, np.ndarray]:
    """(float64[N, 4], bool[N]): the boxes cut at the image's edges, and which of them have any area left."""
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    cut = np.clip(boxes, 0, np.tile((size[1], size[0]), 2))
    return cut, (cut[:, 2] > cut[:, 0]) & (cut[:, 3] > cut[:, 1])


def corners(boxes: Iterable[Box]) -> np.ndarray:
    """float64[N, 4] of a record's boxes, in their order."""
    return np.array([box.corners for box in boxes], np.float64).reshape(-1, 4)


def of_mask(mask: np.ndarray, min_pixels: int = 1) -> np.ndarray:
    """float64[N, 4]: the tight box of each connected part (diagonal neighbours count) of bool[h, w], from the top.

    Args:
      min_pixels: parts of fewer pixels are left out.
    """
    parts, _ = ndimage.label(mask, structure=np.ones((3, 3)))
    found = [
        (columns.start, rows.start, columns.stop, rows.stop)
        for number, (rows, columns) in enumerate(ndimage.find_objects(parts), start=1)
        if (parts[rows, columns] == number).sum() >= min_pixels
    ]
    return np.array(sorted(found, key=lambda box: (box[1], box[0])), np.float64).reshape(-1, 4)


class Asked(NamedTuple):
    """One question, the label it names as the boxes have it, and the boxes of that label in the record's order."""

    question: str
    label: str
    boxes: tuple[Box, ...]


def ask(record: Record) -> tuple[Asked, ...]:
    """The questions of a record, one for each label of its boxes; () where it has none.

    Order and phrasing depend on the record's id and the labels alone: whatever order the boxes have, each label of a
    subset comes first in some records, as it does where it is asked alone.

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
