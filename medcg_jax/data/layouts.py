"""Layouts of prepared images (a model's square, shrunk to a limit, or unchanged) and what a layout does to boxes."""

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
    """What `medcg data prepare` does to every image.

    Attributes:
      kind: "square", LLaVA-1.5's own preprocessing (padded to a square with CLIP's mean colour, then resized); "fit",
        larger images shrunk to a longer side of `size_px`; "keep", unchanged.
      size_px: side of the square, or limit of the longer side; 0 with "keep".
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
        """(height, width) in pixels that `apply` makes of an image of `size`."""
        if self.kind == "square":
            return self.size_px, self.size_px
        longer = max(size)
        if self.kind == "keep" or longer <= self.size_px:
            return size
        height, width = (max(1, round(side * self.size_px / longer)) for side in size)
        return height, width

    def record(self, record: Record) -> Record:
        """The record with boxes and size moved to the laid-out image; a record without boxes is unchanged."""
        if record.size_px == (0, 0):
            return record
        after = self.size_after(record.size_px)
        moved = boxes.resized(boxes.corners(record.boxes), record.size_px, after, squared=self.kind == "square")
        placed = tuple(Box(box.label, *corners) for box, corners in zip(record.boxes, moved.tolist(), strict=True))
        return dataclasses.replace(record, boxes=placed, size_px=after)


def parse_layout(text: str) -> Layout:
    """The layout of "square:336", "fit:1024" or "keep".

    Raises:
      DataError: the text has another form.
    """
    kind, _, size = text.partition(":")
    if kind == "keep" and not size:
        return Layout("keep", 0)
    if kind not in KINDS[:2] or not (size.isascii() and size.isdigit()) or not 1 <= int(size) <= 100_000:
        raise DataError(f"image={text!r}; expected square:SIZE, fit:SIZE (pixels, from 1) or keep")
    return Layout(kind, int(size))


def check_layout(layout: Layout, family: str, model) -> None:
    """Checks that prepared images suit a model. model: its configuration.

    Raises:
      DataError: the images are squares that are not this model's own.
    """
    square = f"square:{model.image_size_px}" if family == "llava" else ""
    if layout.kind == "square" and str(layout) != square:
        accepted = f"{square}, " if square else ""
        raise DataError(
            f"the prepared images lie as {layout}, which is not what this model makes of images; prepare them with "
            f"--image={accepted}fit:SIZE or keep"
        )
