"""The Med-MAT release's files, checked key by key: JSON lists of choice records whose images lie below the tree's root.

Source: FreedomIntelligence/Med-MAT README.md (record fields, question format); types as the release has them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Container, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from medcg_jax import untrusted
from medcg_jax.data import spelling
from medcg_jax.data.records import LETTERS, MAX_OPTIONS, DataError, Record, Turn
from medcg_jax.untrusted import FileError, shown

# A subset file or a table of labels. The release's largest file has some 40 MB.
MAX_FILE_BYTES = 2**28
# Values of a file's JSON, counted by its commas and brackets: each takes some 60 bytes of memory.
MAX_VALUES = 2**23
MAX_ID = 2**63 - 1
# Of a subset, its modality, area or task (the longest of Med-MAT has 43), a dataset's number, a patient.
MAX_NAME_CHARS = 200

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
    content = _or_refused(path, "unreadable", untrusted.read_bytes, path, MAX_FILE_BYTES)
    return _or_refused(path, "encoding", untrusted.decoded, content, path, "utf-8-sig")


def read_list(path: Path) -> list[Any]:
    """The records of a file as they stand in its JSON, which is read strictly; a byte-order mark is skipped.

    Raises:
      ReleaseError: kind `unreadable`, `encoding`, `json` or `not_a_list`.
    """
    text = read_text(path)
    number = sum(map(text.count, ",[{"))
    if number > MAX_VALUES:
        raise ReleaseError(path.name, "", "json", f"{number:,} values; at most {MAX_VALUES:,} are read")
    raws = _or_refused(path, "json", untrusted.parsed, text, path, object)
    if not isinstance(raws, list):
        raise ReleaseError(path.name, "", "not_a_list", f"a {type(raws).__name__}; a list of records is accepted")
    return raws


def parse_choice(raw: Any, *, file: str, place: int, subset: str, split: str) -> Record:
    """The record that one JSON object describes; beyond the eight keys `group` is read; files are not looked at.

    Raises:
      ReleaseError: kind `type`, `key`, `text`, `options`, `letter` or `answer`.
    """
    name = record_name(raw, place)
    check_keys(raw, KEYS, file, name)
    options = parse_options(raw["Question-choice"])
    if len(options) < 2 or len(set(options)) < len(options) or not all(options):
        listed = str(list(options))[:200]
        reason = f"Question-choice has the options {listed}; two or more different ones, `A: ...`, are accepted"
        raise ReleaseError(file, name, "options", reason)
    if len(options) > MAX_OPTIONS:
        reason = f"Question-choice has {len(options)} options; at most {MAX_OPTIONS} can be scored"
        raise ReleaseError(file, name, "options", reason)
    if alike := spelling.look_alike(options):
        first, second = spelling.told_apart(*alike)
        raise ReleaseError(file, name, "options", f"the options {first} and {second} look alike; one is accepted")
    if reason := spelling.fault(raw["Question-choice"]):
        raise ReleaseError(file, name, "text", f"Question-choice {reason}")
    letter, letters = raw["Answer-choice"], LETTERS[: len(options)]
    if len(letter) != 1 or letter not in letters:
        reason = f"Answer-choice is {spelling.quoted(letter)}; the options are {', '.join(letters)}"
        raise ReleaseError(file, name, "letter", reason)
    named = options[letters.index(letter)]
    if named != raw["Answer"].strip():
        first, second = spelling.told_apart(named, raw["Answer"])
        reason = f"Answer-choice {letter} names {first}, but Answer is {second}"
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


def without_options(question: str) -> str:
    """What a question says beside its lines `A: `, `B: `, ...

    Example: `without_options("Which?\\nA: Benign\\nB: Normal\\nAnswer with ...") == "Which?\\nAnswer with ..."`.
    """
    return "\n".join(line for line in question.splitlines() if not _OPTION.fullmatch(line.strip()))


def check_keys(raw: Any, keys: Mapping[str, type], file: str, name: str) -> None:
    """Raises ReleaseError of kind `type`, `key` or `text` when the object lacks a key, a value is of another type, or
    the name of its dataset or group cannot be printed."""
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
    if not -MAX_ID <= raw["id"] <= MAX_ID:
        raise ReleaseError(file, name, "type", f"id is {shown(raw['id'])}; a whole number of 64 bits is accepted")
    for key in ("data-no", *optional):
        if not raw[key].isprintable() or len(raw[key]) > MAX_NAME_CHARS:
            accepted = f"one line of text of at most {MAX_NAME_CHARS} signs is accepted"
            reason = f"{key} {spelling.quoted(raw[key])} has {len(raw[key]):,} signs, or some that cannot be printed"
            raise ReleaseError(file, name, "text", f"{reason}; {accepted}")


def check_id(raw: Any, seen: set[int], *, file: str, place: int) -> None:
    """Adds the record's id to those seen; raises ReleaseError of kind `duplicate_id` when it is there already."""
    own = raw.get("id") if isinstance(raw, dict) else None
    if type(own) is not int:
        return
    if own in seen:
        raise ReleaseError(file, record_name(raw, place), "duplicate_id", f"the id {shown(own)} occurs twice")
    seen.add(own)


def image_path(root: Path, relative: str, *, file: str, record: str) -> Path:
    """The image file that a record names, which lies below `root` even when every link is followed.

    Args:
      root: the tree, already resolved.

    Raises:
      ReleaseError: kind `path` (empty, absolute, climbing, or leading out by a link) or `missing_file`.
    """

    def refuse(kind: str, reason: str) -> ReleaseError:
        return ReleaseError(file, record, kind, f"image {spelling.quoted(relative, 200)} {reason}")

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
    return f"record {shown(own)}" if type(own) is int else f"record in place {place + 1}"


def _or_refused(path: Path, kind: str, read: Callable, *args) -> Any:
    """What `read` gives; what it refuses, under the file's own name."""
    try:
        return read(*args)
    except FileError as error:
        raise ReleaseError(path.name, "", kind, str(error).removeprefix(f"{path}: ")) from error
