"""The Med-MAT release's files, checked key by key: JSON lists of choice records whose images lie below the tree's root.

Source: FreedomIntelligence/Med-MAT README.md (record fields, question format); types as the release has them.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Container, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from medcg_jax.data.records import LETTERS, DataError, Record, Turn

KEYS: dict[str, type] = {
    "id": int,
    "caption": str,
    "image": str,
    "Question": str,
    "Answer": str,
    "Question-choice": str,
    "Answer-choice": str,
    "data-no": str,
}

# What a record of either kind may have beside its keys; further ones are ignored.
OPTIONAL_KEYS: dict[str, type] = {"group": str}

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_OPTION = re.compile(r"([A-Z]): (.*)")


class ReleaseError(DataError):
    """A file or record of a tree that is refused.

    Attributes:
      file: name of the file. record: which record of it; "" for the file as a whole.
      kind: one of the words that `medcg data check` counts by. reason: what is wrong, and what would be accepted.
    """

    def __init__(self, file: str, record: str, kind: str, reason: str):
        super().__init__(f"{file}: {record}: {reason}" if record else f"{file}: {reason}")
        self.file, self.record, self.kind, self.reason = file, record, kind, reason


def read_text(path: Path) -> str:
    """A file's text; a byte-order mark is skipped.

    Raises:
      ReleaseError: kind `unreadable` or `encoding`.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ReleaseError(path.name, "", "unreadable", error.strerror or str(error)) from error
    except UnicodeDecodeError as error:
        raise ReleaseError(path.name, "", "encoding", f"not UTF-8 (byte {error.start})") from error


def read_list(path: Path) -> list[Any]:
    """The records of a file as they stand in its JSON; a byte-order mark is skipped.

    Stricter than Python's reader: NaN and infinities are no JSON, a key that occurs twice in an object leaves open
    which of its values holds, and half a surrogate pair can be written to no file.

    Raises:
      ReleaseError: kind `unreadable`, `encoding`, `json` or `not_a_list`.
    """
    text = read_text(path)
    try:
        found = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
        if _SURROGATE.search(text):
            json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ReleaseError(path.name, "", "encoding", "a text with half a surrogate pair \\ud800 to \\udfff") from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise ReleaseError(path.name, "", "json", f"not JSON: {error}") from error
    if not isinstance(found, list):
        raise ReleaseError(path.name, "", "not_a_list", f"a {type(found).__name__}; a list of records is accepted")
    return found


def parse_choice(raw: Any, *, file: str, place: int, subset: str, split: str) -> Record:
    """The record that one JSON object describes; beyond the eight keys `group` is read; files are not looked at.

    Raises:
      ReleaseError: kind `type`, `key`, `options`, `letter` or `answer`.
    """
    name = record_name(raw, place)
    check_keys(raw, KEYS, file, name)
    options = parse_options(raw["Question-choice"])
    if len(options) < 2 or len(set(options)) < len(options) or not all(options):
        reason = f"Question-choice has the options {list(options)}; two or more different ones, `A: ...`, are accepted"
        raise ReleaseError(file, name, "options", reason)
    letter, letters = raw["Answer-choice"], LETTERS[: len(options)]
    if len(letter) != 1 or letter not in letters:
        raise ReleaseError(file, name, "letter", f"Answer-choice is {letter!r}; the options are {', '.join(letters)}")
    named = options[letters.index(letter)]
    if named != raw["Answer"].strip():
        reason = f"Answer-choice {letter} names {named!r}, but Answer is {raw['Answer']!r}"
        raise ReleaseError(file, name, "answer", reason)
    return Record(
        id=f"{subset}/{split}/{raw['id']}",
        subset=subset,
        turns=(Turn(raw["Question-choice"], letter),),
        options=options,
        answer=letter,
        image=raw["image"],
        data_no=raw["data-no"],
        group=raw.get("group", ""),
    )


def parse_options(question: str) -> tuple[str, ...]:
    """The texts behind `A: `, `B: `, ... on the consecutive lines of a question; () if there are none.

    Example: `parse_options("Which?\\nA: Benign\\nB: Normal\\nAnswer with ...") == ("Benign", "Normal")`.
    """
    options: list[str] = []
    for line in question.splitlines():
        found = _OPTION.fullmatch(line.strip())
        if found and found[1] == "A":
            options = [found[2].strip()]
        elif found and options and found[1] == LETTERS[len(options) : len(options) + 1]:
            options.append(found[2].strip())
        elif options:
            break
    return tuple(options)


def check_keys(raw: Any, keys: Mapping[str, type], file: str, name: str) -> None:
    """Raises ReleaseError of kind `type` or `key` when the object lacks a key or a value is of another type."""
    if not isinstance(raw, dict):
        raise ReleaseError(file, name, "type", f"a {type(raw).__name__}; an object is accepted")
    missing = [key for key in keys if key not in raw]
    if missing:
        raise ReleaseError(file, name, "key", f"the key {missing[0]} is missing")
    optional = {key: kind for key, kind in OPTIONAL_KEYS.items() if key in raw}
    for key, kind in {**keys, **optional}.items():
        # bool is an int to isinstance.
        if type(raw[key]) is not kind:
            reason = f"{key} is {shown(raw[key])}, a {type(raw[key]).__name__}; {kind.__name__} is accepted"
            raise ReleaseError(file, name, "type", reason)


def check_id(raw: Any, seen: set[int], *, file: str, place: int) -> None:
    """Adds the record's id to those seen; raises ReleaseError of kind `duplicate_id` when it is there already."""
    own = raw.get("id") if isinstance(raw, dict) else None
    if type(own) is not int:
        return
    if own in seen:
        raise ReleaseError(file, record_name(raw, place), "duplicate_id", f"the id {own} occurs twice")
    seen.add(own)


def image_path(root: Path, relative: str, *, file: str, record: str) -> Path:
    """The image file that a record names, which lies below `root` even when every link is followed.

    Args:
      root: the tree, already resolved.

    Raises:
      ReleaseError: kind `path` (empty, absolute, climbing, or leading out by a link) or `missing_file`.
    """

    def refuse(kind: str, reason: str) -> ReleaseError:
        return ReleaseError(file, record, kind, f"image {relative!r} {reason}")

    if not relative.strip() or "\0" in relative:
        raise refuse("path", "is no path; one below the tree's root is accepted")
    if PurePosixPath(relative).is_absolute() or PureWindowsPath(relative).anchor:
        raise refuse("path", "is absolute; one below the tree's root is accepted")
    if ".." in PurePosixPath(relative).parts or ".." in PureWindowsPath(relative).parts:
        raise refuse("path", "climbs out of its folder; one below the tree's root, without `..`, is accepted")
    try:
        found = Path(os.path.realpath(root / relative, strict=True))
    except OSError as error:
        raise refuse("missing_file", f"cannot be opened: {error.strerror}") from error
    except UnicodeError as error:  # half of a surrogate pair
        raise refuse("path", "holds a character that no file name has") from error
    if not found.is_relative_to(root):
        raise refuse("path", "leads out of the tree by a link")
    if not found.is_file():
        raise refuse("missing_file", "is no file")
    return found


def read_choice_file(
    path: Path, root: Path, *, subset: str = "", split: str = "", skip: Container[tuple[str, str]] = ()
) -> list[Record]:
    """All records of one file, every one checked, the images' paths included (their pixels are not read).

    skip: (file, record) of those that are left out unread, as `check` names them.

    Raises:
      ReleaseError: at the first thing that is wrong.
    """
    root = Path(os.path.realpath(root))
    records: list[Record] = []
    seen: set[int] = set()
    for place, raw in enumerate(read_list(path)):
        if (path.name, record_name(raw, place)) in skip:
            continue
        check_id(raw, seen, file=path.name, place=place)
        records.append(parse_choice(raw, file=path.name, place=place, subset=subset, split=split))
        image_path(root, raw["image"], file=path.name, record=record_name(raw, place))
    return records


def record_name(raw: Any, place: int) -> str:
    """How messages call a record: by its id where it has one, by its place (from 1) elsewhere."""
    own = raw.get("id") if isinstance(raw, dict) else None
    return f"record {own}" if type(own) is int else f"record in place {place + 1}"


def shown(value: Any, limit: int = 60) -> str:
    """A value as JSON for a message, at most `limit` characters; "..." for lists nested too deep to write."""
    try:
        text = json.dumps(value)
    except RecursionError:
        return "..."
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {shown(twice)} occurs twice in an object")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")
