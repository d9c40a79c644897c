"""Reads raw label tables of a dataset: CSV files of classes, boxes or masks, checked line by line; one entry an image.

    image,label                    classes; an image with several has a line for each
    image,label,x1,y1,x2,y2        a line for each box, in pixels of the upright image, corners between pixels
    image,label,mask               a line for each mask: a PNG whose pixels that are not black are the lesion

Optional columns: `split` (train or test), `group` (patient or lesion), `data-no`. In a table of boxes or masks, a line
without label and box or mask is an image without a finding.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from medcg_jax.data import boxes
from medcg_jax.data.images import ImageError, image_size
from medcg_jax.data.records import SPLITS, Box
from medcg_jax.data.schema import (
    MAX_NAME_CHARS,
    ReleaseError,
    appearance,
    image_path,
    named,
    quoted,
    shares_of_image,
    text_fault,
    told_apart,
)
from medcg_jax.data.tree import read_text

CORNERS = ("x1", "y1", "x2", "y2")
OPTIONAL = ("split", "group", "data-no")
MASK_FORMATS = ("PNG",)
# A label is an option of questions.
MAX_LABEL_CHARS = 500


@dataclass(frozen=True)
class LabelledImage:
    """A table's entry of one image.

    Attributes:
      image: path below the root.
      labels: its classes, or the labels of its boxes, each once, sorted; () for an image without a finding.
      size_px: (height, width), upright.
      split, group (patient or lesion), data_no: "" if the table does not say.
      boxes: of boxes and masks, sorted by position in the image.
    """

    image: str
    labels: tuple[str, ...]
    size_px: tuple[int, int]
    split: str = ""
    group: str = ""
    data_no: str = ""
    boxes: tuple[Box, ...] = ()


@dataclass(frozen=True)
class LabelTable:
    """A table's images, sorted by path, and whether it has boxes or masks.

    in_numbers: whether boxes are given by corners, not masks.
    """

    images: tuple[LabelledImage, ...]
    has_boxes: bool
    in_numbers: bool = False


@dataclass(frozen=True)
class _Line:
    number: int
    cells: dict[str, str]

    def error(self, file: str, column: str, reason: str) -> ReleaseError:
        value = f" {quoted(self.cells[column])}" if column in self.cells else ""
        return ReleaseError(file, f"line {self.number}", "label", f"{column}{value} {reason}")


def read_labels(path: Path, root: Path, max_pixels: int) -> LabelTable:
    """The table at `path`, whose images and masks lie below `root`; only the headers of images are read.

    Args:
      max_pixels: limit of an image, of its padded square, and of a mask.

    Raises:
      ReleaseError: for the first fault, with file, line, column, value and what was expected.
    """
    root = Path(os.path.realpath(root))
    columns, lines = _read_csv(path)
    by_image: dict[str, list[_Line]] = {}
    spelled: dict[str, tuple[str, int]] = {}
    for line in lines:
        _check_line(path.name, line, columns, spelled)
        by_image.setdefault(line.cells["image"], []).append(line)
    if not by_image:
        raise ReleaseError(path.name, "", "label", "no line below the header; expected one or more")
    files: dict[Path, _Line] = {}
    for image, (first, *_) in sorted(by_image.items()):
        with named(path.name, f"line {first.number}"):
            file = image_path(root, image)
        if other := files.get(file):
            reason = f"is the file that line {other.number} calls {other.cells['image']!r}; expected one name"
            raise first.error(path.name, "image", reason)
        files[file] = first
    images = tuple(
        _image(path.name, file, by_image[first.cells["image"]], root, max_pixels) for file, first in files.items()
    )
    _check_groups(path.name, images, by_image)
    if "x1" in columns and (reason := shares_of_image(box.corners for image in images for box in image.boxes)):
        raise ReleaseError(path.name, "", "label", reason)
    return LabelTable(images, has_boxes="x1" in columns or "mask" in columns, in_numbers="x1" in columns)


def lesion_mask(path: Path, max_pixels: int) -> np.ndarray:
    """bool[h, w]: the pixels of a PNG that are not black, whatever its depth, palette or transparency.

    Raises:
      ImageError: the file is no PNG, broken, or too large.
    """
    try:
        with Image.open(path, formats=MASK_FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise ImageError(f"{image.width} x {image.height} pixels; expected at most {max_pixels}")
            # A palette's black need not be its first colour.
            pixels = np.asarray(image.convert("RGB") if image.mode in ("P", "PA", "LA", "RGBA") else image)
    except ImageError:
        raise
    except Exception as error:  # decoders raise nearly anything for broken data
        raise ImageError(f"is no mask: {error}; expected a PNG") from error
    return np.asarray(pixels.any(-1) if pixels.ndim == 3 else pixels != 0)


def _read_csv(path: Path) -> tuple[tuple[str, ...], list[_Line]]:
    """(columns, lines); cells are stripped of white space, except paths."""
    rows = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        columns = tuple(cell.strip() for cell in next(rows, []))
        _check_columns(path.name, columns)
        return columns, list(_lines(path.name, rows, columns))
    except csv.Error as error:
        raise ReleaseError(path.name, f"line {rows.line_num}", "label", f"no CSV: {error}") from error


def _lines(file: str, rows, columns: tuple[str, ...]) -> Iterator[_Line]:
    for row in rows:
        if not row:  # an empty line
            continue
        if len(row) != len(columns):
            reason = f"{len(row)} cells; expected {len(columns)}: {', '.join(columns)}"
            raise ReleaseError(file, f"line {rows.line_num}", "label", reason)
        cells = {name: cell if name in ("image", "mask") else cell.strip() for name, cell in zip(columns, row)}
        yield _Line(rows.line_num, cells)


def _check_columns(file: str, columns: tuple[str, ...]) -> None:
    accepted = f"image, label, then nothing, mask or {', '.join(CORNERS)}, and any of {', '.join(OPTIONAL)}"
    of_boxes = [name for name in CORNERS if name in columns]
    wrong = [name for name in columns if name not in ("image", "label", "mask", *CORNERS, *OPTIONAL)]
    # Ignoring an unknown column, such as a misspelt `group`, could silently change the split.
    if wrong:
        reason = f"column {quoted(wrong[0])} is not known; expected {accepted}, with commas between them"
    elif len(set(columns)) < len(columns):
        reason = f"a column occurs twice in {', '.join(columns[:20])}"
    elif missing := [name for name in ("image", "label") if name not in columns]:
        reason = f"column {missing[0]!r} is missing; expected {accepted}"
    elif of_boxes and (len(of_boxes) < 4 or "mask" in columns):
        reason = f"columns {', '.join(columns)}: expected mask or all of {', '.join(CORNERS)}"
    else:
        return
    raise ReleaseError(file, "line 1", "label", reason)


def _check_line(file: str, line: _Line, columns: tuple[str, ...], spelled: dict[str, tuple[str, int]]) -> None:
    """Checks one line, and its label's spelling against other lines'."""
    label, region_columns = line.cells["label"], [name for name in (*CORNERS, "mask") if name in columns]
    filled = [name for name in region_columns if line.cells[name].strip()]
    if not label and not region_columns:
        raise line.error(file, "label", "is empty; expected a label")
    if not label and filled:
        raise line.error(file, "label", f"is empty where {filled[0]} is not; expected both or neither")
    if label and (empty := [name for name in region_columns if name not in filled]):
        raise line.error(file, empty[0], f"is empty where the label is {label!r}; expected both or neither")
    if not label.isprintable():
        raise line.error(file, "label", "has signs that cannot be printed; expected one line of text")
    if len(label) > MAX_LABEL_CHARS:
        raise line.error(file, "label", f"has {len(label):,} signs; expected at most {MAX_LABEL_CHARS}")
    if reason := text_fault(label):
        raise line.error(file, "label", reason)
    other, number = spelled.setdefault(appearance(label), (label, line.number))
    if other != label:
        here, there = told_apart(label, other)
        reason = f"label {here} is spelled {there} in line {number}; expected one spelling"
        raise ReleaseError(file, f"line {line.number}", "label", reason)
    if line.cells.get("split", "train") not in SPLITS:
        raise line.error(file, "split", f"is none of {', '.join(SPLITS)}")
    for name in ("group", "data-no"):
        if not line.cells.get(name, "").isprintable():
            raise line.error(file, name, "has signs that cannot be printed; expected one line of text")
        if len(line.cells.get(name, "")) > MAX_NAME_CHARS:
            raise line.error(file, name, f"has more than {MAX_NAME_CHARS} signs")


def _image(file: str, path: Path, lines: list[_Line], root: Path, max_pixels: int) -> LabelledImage:
    """The entry of the image at `path` that these lines name."""
    first, image = lines[0], lines[0].cells["image"]
    try:
        size = image_size(path, max_pixels)
    except ImageError as error:
        raise first.error(file, "image", f"cannot be used: {error}") from error
    for line in lines:
        for name in OPTIONAL:
            if line.cells.get(name) != first.cells.get(name):
                reason = f"of image {image!r}, which has {first.cells[name]!r} in line {first.number}"
                raise line.error(file, name, f"{reason}; expected one value")
        if not line.cells["label"] and len(lines) > 1:
            reason = f"is empty where image {image!r} has other lines; expected it to be the only line"
            raise line.error(file, "label", reason)
    seen: dict[tuple | Box, int] = {}
    boxes_here: list[Box] = []
    labels: set[str] = set()
    for line in lines:
        label = line.cells["label"]
        content: tuple | Box = (label, line.cells.get("mask"))
        if label and "x1" in line.cells:
            content = _box(file, line, size)
            boxes_here.append(content)
        elif label and "mask" in line.cells:
            boxes_here += _boxes_of_mask(file, line, root, size, max_pixels)
        else:
            labels |= {label} - {""}
        if content in seen:
            raise line.error(file, "image", f"has all of this in line {seen[content]}; expected once")
        seen[content] = line.number
    cells = {name: first.cells.get(name, "") for name in OPTIONAL}
    return LabelledImage(
        image, tuple(sorted(labels | {box.label for box in boxes_here})), size, cells["split"], cells["group"],
        cells["data-no"], tuple(sorted(boxes_here, key=lambda box: (box.y1, box.x1, box.y2, box.x2, box.label))),
    )  # fmt: skip


def _box(file: str, line: _Line, size: tuple[int, int]) -> Box:
    height, width = size
    corners = []
    for name, most in zip(CORNERS, (width, height, width, height)):
        try:
            corners.append(float(line.cells[name].replace("_", "?")))  # "1_0" is a number to Python alone
        except ValueError as error:
            raise line.error(file, name, "is no number; expected one in pixels") from error
        # Written so that a NaN fails.
        if not 0 <= corners[-1] <= most:
            reason = f"is not inside the image of {width} x {height} pixels; expected 0 to {most}"
            raise line.error(file, name, reason)
    for low, high in ((0, 2), (1, 3)):
        if not corners[low] < corners[high]:
            raise line.error(file, CORNERS[high], f"is not above {CORNERS[low]} {line.cells[CORNERS[low]]!r}")
    return Box(line.cells["label"], *corners)


def _boxes_of_mask(file: str, line: _Line, root: Path, size: tuple[int, int], max_pixels: int) -> list[Box]:
    """The tight box of each connected part of a mask; none if it is black."""
    with named(file, f"line {line.number}, mask"):
        path = image_path(root, line.cells["mask"])
    try:
        mask = lesion_mask(path, max_pixels)
    except ImageError as error:
        raise line.error(file, "mask", str(error)) from error
    if mask.shape != size:
        reason = f"has {mask.shape[1]} x {mask.shape[0]} pixels; expected {size[1]} x {size[0]}, as its image"
        raise line.error(file, "mask", reason)
    return [Box(line.cells["label"], *corners) for corners in boxes.of_mask(mask).tolist()]


def _check_groups(file: str, images: tuple[LabelledImage, ...], by_image: dict[str, list[_Line]]) -> None:
    """Raises ReleaseError if the table's split has a group of a dataset on both sides."""
    sides: dict[tuple[str, str], LabelledImage] = {}
    for image in images:
        if not image.split or not image.group:
            continue
        other = sides.setdefault((image.data_no, image.group), image)
        if other.split != image.split:
            line, there = by_image[image.image][0], by_image[other.image][0]
            raise line.error(file, "group", f"is in {image.split} here and in {other.split} in line {there.number}")
