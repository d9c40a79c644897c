"""Records of the Med-MAT release, checked key by key: choice questions, boxes, image paths, and texts.

Source: FreedomIntelligence/Med-MAT README.md (record fields, question format); types as in the released files. The
release has no detection subsets yet: the keys of boxes are those of medmat-mini's README.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from medcg_jax.data.records import LETTERS, MAX_OPTIONS, Box, DataError, Record, Turn
from medcg_jax.untrusted import shown

MAX_ID = 2**63 - 1
# Of the name of a subset, modality, area or task (Med-MAT's longest has 43), of a dataset's number, of a patient.
MAX_NAME_CHARS = 200

CHOICE_KEYS: dict[str, type] = {
    "id": int,
    "caption": str,
    "image": str,
    "Question": str,
    "Answer": str,
    "Question-choice": str,
    "Answer-choice": str,
    "data-no": str,
}
DETECTION_KEYS: dict[str, type] = {"id": int, "image": str, "width": int, "height": int, "boxes": list, "data-no": str}
# Keys that a record of either kind may have besides; any others are ignored.
OPTIONAL_KEYS: dict[str, type] = {"group": str}

_OPTION = re.compile(r"([A-Z]): (.*)")
# Marks of images and turns in the prompts of any family. Some tokenizers turn them into special tokens, others into text.
_MARKS = re.compile(
    r"<\|[A-Za-z][A-Za-z0-9_]*\|>"
    r"|</?(?:image|images|img|imagehere|video|im_patch|im_start|im_end|vid_start|vid_end|image_placeholder|at|boxes)>"
    r"|</?s>|<pad>|<unk>|<<SYS>>|\[/?INST\]|\[IMG\]",
    re.IGNORECASE,
)
_NUMBER_ENDS = re.compile(r"(?<![\d.])0+(?=\d)|(?<=\d)\.0+(?![\d.])|(?<=\d)(\.\d*?[1-9])0+(?![\d.])")
_DASHES = dict.fromkeys((0x2212, 0x2010, 0x2011, 0x2012, 0x2013, 0x2014, 0x2015), "-")
_QUOTES = {0x2018: "'", 0x2019: "'", 0x02BC: "'", 0x201C: '"', 0x201D: '"'}
# Invisible signs outside of the category Cf.
_INVISIBLE = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0") | {chr(code) for code in range(0xFE00, 0xFE10)}


class RecordError(DataError):
    """A record, or a path in it, is refused; `named` adds the file and record.

    Attributes:
      kind: the kind of problem that `medcg data check` counts. reason: what is wrong, and what was expected.
    """

    def __init__(self, kind: str, reason: str):
        super().__init__(reason)
        self.kind, self.reason = kind, reason


class ReleaseError(DataError):
    """A file of a tree, or a record of it, is refused.

    Attributes:
      file: name of the file. record: name of the record; "" for the whole file. kind, reason: as `RecordError`.
    """

    def __init__(self, file: str, record: str, kind: str, reason: str):
        super().__init__(f"{file}: {record}: {reason}" if record else f"{file}: {reason}")
        self.file, self.record, self.kind, self.reason = file, record, kind, reason


@contextmanager
def named(file: str, record: str) -> Iterator[None]:
    """Turns a RecordError of the block into a ReleaseError with these names."""
    try:
        yield
    except RecordError as error:
        raise ReleaseError(file, record, error.kind, error.reason) from error


def record_name(raw: Any, index: int) -> str:
    """The name of a record in messages: its id if it has one, else its position from 1."""
    number = raw.get("id") if isinstance(raw, dict) else None
    return f"record {shown(number)}" if type(number) is int else f"record in place {index + 1}"


def parse_choice(raw: Any, subset: str, split: str) -> Record:
    """The record that one JSON object describes; keys beyond `CHOICE_KEYS` and `group` are ignored.

    Raises:
      RecordError: kind `type`, `key`, `text`, `options`, `letter` or `answer`.
    """
    check_keys(raw, CHOICE_KEYS)
    question, letter = raw["Question-choice"], raw["Answer-choice"]
    options = parse_options(question)
    if len(options) < 2 or len(set(options)) < len(options) or not all(options):
        reason = f"has the options {str(list(options))[:200]}; expected two or more different ones, `A: ...`"
        raise RecordError("options", f"Question-choice {reason}")
    if len(options) > MAX_OPTIONS:
        reason = f"Question-choice has {len(options)} options; at most {MAX_OPTIONS} can be scored"
        raise RecordError("options", reason)
    if alike := first_alike(options):
        first, second = told_apart(*alike)
        raise RecordError("options", f"the options {first} and {second} look alike; expected one")
    if reason := text_fault(question):
        raise RecordError("text", f"Question-choice {reason}")
    letters = LETTERS[: len(options)]
    if len(letter) != 1 or letter not in letters:
        raise RecordError("letter", f"Answer-choice is {quoted(letter)}; the options are {', '.join(letters)}")
    label = options[letters.index(letter)]
    if label != raw["Answer"].strip():
        first, second = told_apart(label, raw["Answer"])
        raise RecordError("answer", f"Answer-choice {letter} names {first}, but Answer is {second}")
    return Record(
        f"{subset}/{split}/{raw['id']}",
        subset,
        (Turn(question, letter),),
        options,
        letter,
        raw["image"],
        raw["data-no"],
        group=raw.get("group", ""),
    )


def parse_options(question: str) -> tuple[str, ...]:
    """The texts behind `A: `, `B: `, ... on the consecutive lines of a question; () if there are none.

    Example: `parse_options("Which?\\nA: Benign\\nB: Normal\\nAnswer with ...") == ("Benign", "Normal")`.
    """
    options: list[str] = []
    for line in question.splitlines():
        match = _OPTION.fullmatch(line.strip())
        if match and match[1] == "A":
            options = [match[2].strip()]
        elif match and options and match[1] == LETTERS[len(options) : len(options) + 1]:
            options.append(match[2].strip())
        elif options:
            break
    return tuple(options)


def without_options(question: str) -> str:
    """A question without its lines `A: `, `B: `, ...

    Example: `without_options("Which?\\nA: Benign\\nB: Normal\\nAnswer with ...") == "Which?\\nAnswer with ..."`.
    """
    return "\n".join(line for line in question.splitlines() if not _OPTION.fullmatch(line.strip()))


def parse_detection(raw: Any, subset: str, split: str, size: tuple[int, int]) -> Record:
    """The record with boxes that one JSON object describes; its list of boxes may be empty.

    Args:
      size: (height, width) of its image in pixels, upright.

    Raises:
      RecordError: kind `type`, `key`, `text`, `size` or `box`.
    """
    check_keys(raw, DETECTION_KEYS)
    for kind, reason in detection_problems(raw, size):
        raise RecordError(kind, reason)
    boxes = tuple(Box(box["label"], *map(float, box["bbox"])) for box in raw["boxes"])
    return Record(
        f"{subset}/{split}/{raw['id']}",
        subset,
        (),
        image=raw["image"],
        data_no=raw["data-no"],
        boxes=boxes,
        size_px=size,
        group=raw.get("group", ""),
    )


def detection_problems(raw: dict[str, Any], size: tuple[int, int]) -> list[tuple[str, str]]:
    """(kind, reason) of every fault of a detection record's sizes and boxes.

    Args:
      raw: the record, with keys and types already checked.
      size: (height, width) of its image in pixels, upright.
    """
    height, width = size
    problems = []
    if (raw["width"], raw["height"]) != (width, height):
        stated = f"{shown(raw['width'])} x {shown(raw['height'])}"
        problems.append(("size", f"width and height are {stated}; the image has {width} x {height} pixels"))
    reasons = (_box_fault(box, width, height) for box in raw["boxes"])
    return problems + [("box", reason) for reason in reasons if reason]


def _box_fault(box: Any, width: int, height: int) -> str:
    label = box.get("label") if isinstance(box, dict) else None
    if not isinstance(label, str) or not label or label != label.strip() or not label.isprintable():
        return f"box {shown(box)} has no label; expected one line of text"
    if reason := text_fault(label):
        return f"label {quoted(label)} {reason}"
    corners = box.get("bbox")
    if not _are_corners(corners):
        return f"bbox {shown(corners)}; expected four numbers x1, y1, x2, y2"
    x1, y1, x2, y2 = corners
    # Written so that a NaN fails.
    if not (x1 < x2 and y1 < y2):
        return f"bbox {shown(corners)}: x1 < x2 and y1 < y2 are needed"
    if not (x1 >= 0 and y1 >= 0 and x2 <= width and y2 <= height):
        return f"bbox {shown(corners)} is not inside the image of {width} x {height} pixels"
    return ""


def box_labels(raw: Any) -> list[str]:
    """The labels of a record's unchecked boxes."""
    return [box["label"] for box in _boxes(raw) if isinstance(box.get("label"), str)]


def box_corners(raw: Any) -> list[list[float]]:
    """The corners of those of a record's unchecked boxes that have four numbers."""
    return [box["bbox"] for box in _boxes(raw) if _are_corners(box.get("bbox"))]


def shares_of_image(corners: Iterable[Sequence[float]]) -> str:
    """Why the corners of all boxes of a file cannot be pixels (none is above 1); "" if they can."""
    largest = [max(box) for box in corners]
    if not largest or max(largest) > 1:
        return ""
    reason = f"all corners of {len(largest)} boxes are 0 to 1, so they are shares of the image"
    return f"{reason}; expected pixels of the upright image"


def _boxes(raw: Any) -> list[dict[str, Any]]:
    boxes = raw.get("boxes") if isinstance(raw, dict) else None
    return [box for box in boxes if isinstance(box, dict)] if isinstance(boxes, list) else []


def _are_corners(value: Any) -> bool:
    # bool is an int to isinstance.
    return isinstance(value, list) and len(value) == 4 and all(type(corner) in (int, float) for corner in value)


def check_keys(raw: Any, keys: Mapping[str, type]) -> None:
    """Raises RecordError of kind `type`, `key` or `text` if the object lacks a key, a value has another type, or the
    name of its dataset or group cannot be printed."""
    if not isinstance(raw, dict):
        raise RecordError("type", f"a {type(raw).__name__}; expected an object")
    if missing := [key for key in keys if key not in raw]:
        raise RecordError("key", f"the key {missing[0]} is missing")
    optional = {key: kind for key, kind in OPTIONAL_KEYS.items() if key in raw}
    for key, kind in {**keys, **optional}.items():
        if type(raw[key]) is not kind:
            reason = f"{key} is {shown(raw[key])}, a {type(raw[key]).__name__}; expected {kind.__name__}"
            raise RecordError("type", reason)
    if not -MAX_ID <= raw["id"] <= MAX_ID:
        raise RecordError("type", f"id is {shown(raw['id'])}; expected a whole number of 64 bits")
    for key in ("data-no", *optional):
        if not raw[key].isprintable() or len(raw[key]) > MAX_NAME_CHARS:
            reason = f"{key} {quoted(raw[key])} has {len(raw[key]):,} signs, or some that cannot be printed"
            raise RecordError("text", f"{reason}; expected one line of text of at most {MAX_NAME_CHARS} signs")


def image_path(root: Path, relative: str) -> Path:
    """The image file that a record names; it lies below `root` even with every link followed.

    Args:
      root: the tree, already resolved.

    Raises:
      RecordError: kind `path` (empty, absolute, with `..`, or out of the tree by a link) or `missing_file`.
    """

    def refused(kind: str, reason: str) -> RecordError:
        return RecordError(kind, f"image {quoted(relative, 200)} {reason}")

    if not relative.strip() or "\0" in relative:
        raise refused("path", "is no path; expected one below the tree's root")
    if PurePosixPath(relative).is_absolute() or PureWindowsPath(relative).anchor:
        raise refused("path", "is absolute; expected one below the tree's root")
    if ".." in PurePosixPath(relative).parts or ".." in PureWindowsPath(relative).parts:
        raise refused("path", "climbs out of its folder; expected one below the tree's root, without `..`")
    try:
        path = Path(os.path.realpath(root / relative, strict=True))
    except OSError as error:
        raise refused("missing_file", f"cannot be opened: {error.strerror}") from error
    except UnicodeError as error:  # half of a surrogate pair
        raise refused("path", "holds a character that no file name has") from error
    if not path.is_relative_to(root):
        raise refused("path", "leads out of the tree by a link")
    if not path.is_file():
        raise refused("missing_file", "is no file")
    return path


def appearance(text: str) -> str:
    """A normal form that is equal for texts that look alike: Unicode, case, white space, invisible signs, dashes, zeros.

    Example: "Naevus ", "naevus" and "nae\\u200bvus" are "naevus"; "1", "1.0" and "01" are "1".
    """
    seen = "".join(sign for sign in text if unicodedata.category(sign) != "Cf" and sign not in _INVISIBLE)
    seen = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", seen).casefold())
    seen = " ".join(seen.translate(_DASHES | _QUOTES).split())
    return _NUMBER_ENDS.sub(lambda number: number[1] or "", seen)


def first_alike(texts: Iterable[str]) -> tuple[str, str] | None:
    """The first two different texts that look alike, or None."""
    first: dict[str, str] = {}
    for text in texts:
        other = first.setdefault(appearance(text), text)
        if other != text:
            return other, text
    return None


def quoted(text: str, limit: int = 60) -> str:
    """A text in quotes, cut to `limit` signs, with escapes for signs that cannot be printed."""
    return repr(text if len(text) <= limit else text[: limit - 3] + "...")


def told_apart(first: str, second: str) -> tuple[str, str]:
    """Both texts in quotes; if they look alike, with escapes for all signs beyond ASCII."""
    quote = ascii if appearance(first) == appearance(second) else repr
    return quote(first[:60]), quote(second[:60])


def text_fault(text: str) -> str:
    """Why a question, option or label cannot stand in a prompt, and what to do; "" if it can."""
    if mark := _MARKS.search(text):
        return f"spells {mark[0]!r}, which prompts put themselves, by the model; take it out"
    sign = next((sign for sign in text if unicodedata.category(sign) in ("Cc", "Cs") and sign not in "\t\n\r"), "")
    return f"has the control character {ascii(sign)}; expected plain text" if sign else ""
