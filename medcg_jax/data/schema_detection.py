"""The detection files of a Med-MAT tree (`-det-`), checked key by key: JSON lists of records with boxes.

The release's own detection subsets are not out; the keys and types are those of medmat-mini's README.
"""

from __future__ import annotations

import os
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

from medcg_jax.data import spelling
from medcg_jax.data.images import ImageError, image_size
from medcg_jax.data.records import Box, Record
from medcg_jax.data.schema import ReleaseError, check_id, check_keys, image_path, read_list, record_name
from medcg_jax.untrusted import shown

DETECTION_KEYS: dict[str, type] = {"id": int, "image": str, "width": int, "height": int, "boxes": list, "data-no": str}


def parse_detection(raw: Any, *, file: str, place: int, subset: str, split: str, size: tuple[int, int]) -> Record:
    """The record that one JSON object describes; further keys but `group` are ignored, and no box at all is accepted.

    Args:
      size: (height, width) of its image in pixels, upright.

    Raises:
      ReleaseError: kind `type`, `key`, `size` or `box`.
    """
    name = record_name(raw, place)
    check_keys(raw, DETECTION_KEYS, file, name)
    for kind, reason in detection_problems(raw, size):
        raise ReleaseError(file, name, kind, reason)
    return Record(
        id=f"{subset}/{split}/{raw['id']}",
        subset=subset,
        turns=(),
        image=raw["image"],
        data_no=raw["data-no"],
        boxes=tuple(Box(box["label"], *map(float, box["bbox"])) for box in raw["boxes"]),
        size_px=size,
        group=raw.get("group", ""),
    )


def detection_problems(raw: dict[str, Any], size: tuple[int, int]) -> list[tuple[str, str]]:
    """(kind, reason) of everything wrong with a detection record's sizes and boxes.

    Args:
      raw: the record, its keys and types checked.
      size: (height, width) of its image in pixels, upright.
    """
    found = []
    height, width = size
    if (raw["width"], raw["height"]) != (width, height):
        stated = f"{shown(raw['width'])} x {shown(raw['height'])}"
        reason = f"width and height are {stated}; the image has {width} x {height} pixels"
        found.append(("size", reason))
    for box in raw["boxes"]:
        reason = _box_reason(box, width, height)
        if reason:
            found.append(("box", reason))
    return found


def read_detection_file(
    path: Path, root: Path, max_pixels: int, *, subset: str = "", split: str = "", skip: Container[tuple[str, str]] = ()
) -> list[Record]:
    """All records of one file, every one checked against the size in its image's header (pixels are not decoded).

    skip: (file, record) of those that are left out unread, as `check` names them.

    Raises:
      ReleaseError: at the first thing that is wrong: kinds of `parse_detection`, `duplicate_id`, those of
        `schema.read_list` and `schema.image_path`, `image` (no size can be read, or it is above `max_pixels`), and
        `box_units` of the file (`shares_of_image`).
    """
    root = Path(os.path.realpath(root))
    records: list[Record] = []
    seen: set[int] = set()
    raws = read_list(path)
    for place, raw in enumerate(raws):
        name = record_name(raw, place)
        if (path.name, name) in skip:
            continue
        check_id(raw, seen, file=path.name, place=place)
        check_keys(raw, DETECTION_KEYS, path.name, name)
        image = image_path(root, raw["image"], file=path.name, record=name)
        try:
            size = image_size(image, max_pixels)
        except ImageError as error:
            raise ReleaseError(path.name, name, "image", f"image {raw['image']!r}: {error}") from error
        records.append(parse_detection(raw, file=path.name, place=place, subset=subset, split=split, size=size))
    if reason := shares_of_image(raws):
        raise ReleaseError(path.name, "", "box_units", reason)
    return records


def shares_of_image(raws: Iterable[Any]) -> str:
    """Why all boxes of a file cannot be in pixels: no corner is above 1; "" where they can, and where it has no box.

    raws: its records as they stand in the JSON.
    """
    largest = [max(corners) for raw in raws if isinstance(raw, dict) for corners in boxes_in(raw)]
    if not largest or max(largest) > 1:
        return ""
    return (
        f"all corners of {len(largest)} boxes are 0 to 1, so they are shares of the image; "
        "pixels of the upright image are accepted"
    )


def has_label(box: Any) -> bool:
    """Whether a box that nobody has checked has a text as its label."""
    return isinstance(box, dict) and isinstance(box.get("label"), str)


def boxes_in(raw: dict[str, Any]) -> list[list[float]]:
    """The corners of a record's boxes, of those that have four numbers."""
    listed = raw.get("boxes")
    boxes = [box.get("bbox") for box in listed if isinstance(box, dict)] if isinstance(listed, list) else []
    return [
        corners for corners in boxes
        if isinstance(corners, list) and len(corners) == 4 and all(type(corner) in (int, float) for corner in corners)
    ]  # fmt: skip


def _box_reason(box: Any, width: int, height: int) -> str:
    label = box.get("label") if isinstance(box, dict) else None
    if not isinstance(label, str) or not label or label != label.strip() or not label.isprintable():
        return f"box {shown(box)} has no label; one line of text is accepted"
    if reason := spelling.fault(label):
        return f"label {spelling.quoted(label)} {reason}"
    corners = box.get("bbox")
    if not isinstance(corners, list) or len(corners) != 4 or not all(type(c) in (int, float) for c in corners):
        return f"bbox {shown(corners)}; four numbers x1, y1, x2, y2 are accepted"
    x1, y1, x2, y2 = corners
    # Written so that a NaN fails.
    if not (x1 < x2 and y1 < y2):
        return f"bbox {shown(corners)}: x1 < x2 and y1 < y2 are needed"
    if not (x1 >= 0 and y1 >= 0 and x2 <= width and y2 <= height):
        return f"bbox {shown(corners)} is not inside the image of {width} x {height} pixels"
    return ""
