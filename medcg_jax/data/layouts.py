"""How prepared images lie: as a model's square, shrunk to fit a limit, or as they are; and what that does to boxes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from PIL import Image

from medcg_jax.data import boxes, images
from medcg_jax.data.records import Box, DataError, Record

KINDS = ("square", "fit", "keep")


@dataclass(frozen=True)
class Layout:
    """What is done to every image once, and never again.

    Attributes:
      kind: "square", LLaVA-1.5's own preprocessing (padded to a square with CLIP's mean colour, then resized); "fit",
        shrunk so that its longer side has `size_px`, smaller ones left alone; "keep", left alone.
      size_px: side of the square, or the most that the longer side may have; 0 with "keep".
    """

    kind: str = "square"
    size_px: int = 336

    def __str__(self) -> str:
        return self.kind if self.kind == "keep" else f"{self.kind}:{self.size_px}"

    def apply(self, image: np.ndarray) -> np.ndarray:
        """uint8[h, w, 3] -> uint8 of `size_after`."""
        if self.kind == "square":
            return images.preprocess(image, self.size_px)
        height, width = self.size_after(image.shape[:2])
        if image.shape[:2] == (height, width):
            return image
        return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))

    def size_after(self, size: boxes.Size) -> boxes.Size:
        """(height, width) in pixels of an image of `size` when it is laid out."""
        if self.kind == "square":
            return self.size_px, self.size_px
        longer = max(size)
        if self.kind == "keep" or longer <= self.size_px:
            return size
        height, width = (max(1, round(side * self.size_px / longer)) for side in size)
        return height, width

    def record(self, record: Record) -> Record:
        """A detection record with its boxes and size as of the image laid out; another as it is."""
        if record.size_px == (0, 0):
            return record
        after = self.size_after(record.size_px)
        moved = boxes.resized(boxes.corners(record.boxes), record.size_px, after, squared=self.kind == "square")
        placed = tuple(Box(box.label, *corners) for box, corners in zip(record.boxes, moved.tolist(), strict=True))
        return dataclasses.replace(record, boxes=placed, size_px=after)


def parse_layout(text: str) -> Layout:
    """The layout that is written "square:336", "fit:1024" or "keep".

    Raises:
      DataError: it is written otherwise.
    """
    kind, _, size = text.partition(":")
    if kind == "keep" and not size:
        return Layout("keep", 0)
    if kind not in KINDS[:2] or not (size.isascii() and size.isdigit()) or not 1 <= int(size) <= 100_000:
        raise DataError(f"image={text!r}; square:SIZE, fit:SIZE (pixels, from 1) or keep is accepted")
    return Layout(kind, int(size))


def check_layout(layout: Layout, family: str, model) -> None:
    """Holds the layout of prepared images against the model that takes them (its configuration).

    Raises:
      DataError: the images were changed in a way that the model does not change them.
    """
    square = f"square:{model.image_size_px}" if family == "llava" else ""
    if layout.kind == "square" and str(layout) != square:
        accepted = f"{square}, " if square else ""
        raise DataError(
            f"the prepared images lie as {layout}, which is not what this model makes of images; prepare them with "
            f"--image={accepted}fit:SIZE or keep"
        )
