"""A Med-MAT tree, read once: its subset files, their records, its manifest, and misnamed files.

Faults do not end the reading: each `Entry` carries its own error. Strict callers raise the first error
(`Contents.checked`).
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from medcg_jax import untrusted
from medcg_jax.data import catalogue
from medcg_jax.data.records import DataError, Record, Split
from medcg_jax.data.schema import (
    DETECTION_KEYS,
    MAX_NAME_CHARS,
    RecordError,
    ReleaseError,
    appearance,
    box_corners,
    check_keys,
    image_path,
    parse_choice,
    quoted,
    record_name,
    shares_of_image,
    told_apart,
)
from medcg_jax.untrusted import FileError, shown

FOLDER, MANIFEST = "Aggregated_Subsets", "manifest.json"
NO_FILES = f"no Subset--NN-train.json in it or in its {FOLDER}"
# A subset file or a table of labels. The release's largest file has some 40 MB.
MAX_FILE_BYTES = 2**28
# JSON values of a file, counted by commas and brackets: each takes some 60 bytes of memory.
MAX_VALUES = 2**23
# A manifest has some hundred bytes for each subset.
MAX_MANIFEST_BYTES = 2**24
ELEMENTS = ("modality", "area", "task")
# Numbers in the release, names such as `ct-liver-grade` in a phantom tree.
_FILE = re.compile(r"Subset--?([A-Za-z0-9][A-Za-z0-9-]*?)(-det)?-(train|test)\.json")


@dataclass(frozen=True)
class SubsetFile:
    """One subset file of a tree."""

    path: Path
    number: str
    split: Split
    detection: bool = False


@dataclass(frozen=True)
class Entry:
    """One record of a subset file.

    Attributes:
      name: its name in messages. raw: the JSON value.
      record: None if keys, types or texts are wrong. A detection record has no boxes and size yet, which are checked
        against its image (`schema.parse_detection`).
      path: of its image's file; None if there is none that may be read.
      error: its first fault, apart from faults of the image's content and of boxes.
    """

    file: SubsetFile
    name: str
    raw: Any
    record: Record | None = None
    path: Path | None = None
    error: ReleaseError | None = None


class Contents:
    """A subset file: its JSON is read at once and strictly, its records are parsed on demand.

    Args:
      image: image name of a record -> file, as `schema.image_path` below the tree's root.

    Attributes:
      raws: the JSON values of the records. sha256: of the file's bytes.

    Raises:
      ReleaseError: kind `unreadable`, `encoding`, `json` or `not_a_list`.
    """

    def __init__(self, file: SubsetFile, image: Callable[[str], Path]):
        self.file, self._image = file, image
        content = _read_bytes(file.path)
        self.sha256, self.raws = hashlib.sha256(content).digest(), _parsed_list(content, file.path)

    @functools.cached_property
    def entries(self) -> tuple[Entry, ...]:
        """Every record, in the file's order."""
        seen: set[int] = set()
        return tuple(self._entry(index, raw, seen) for index, raw in enumerate(self.raws))

    @functools.cached_property
    def box_units(self) -> ReleaseError | None:
        """An error of kind `box_units` if the boxes of a detection file cannot be in pixels."""
        if not self.file.detection:
            return None
        reason = shares_of_image(corners for raw in self.raws for corners in box_corners(raw))
        return ReleaseError(self.file.path.name, "", "box_units", reason) if reason else None

    def checked(self, skip: Container[tuple[str, str]] = ()) -> Iterator[Entry]:
        """Every record that is not in `skip`, of (file, name).

        Raises:
          ReleaseError: the first error of one of them.
        """
        for entry in self.entries:
            if (self.file.path.name, entry.name) not in skip:
                if entry.error:
                    raise entry.error
                yield entry

    def _entry(self, index: int, raw: Any, seen: set[int]) -> Entry:
        """seen: the ids of the records before this one."""
        file, name, record = self.file, record_name(raw, index), None
        try:
            number = raw.get("id") if isinstance(raw, dict) else None
            if type(number) is int:
                if number in seen:
                    raise RecordError("duplicate_id", f"the id {shown(number)} occurs twice")
                seen.add(number)
            if file.detection:
                check_keys(raw, DETECTION_KEYS)
                record = Record(
                    f"{file.number}/{file.split}/{number}",
                    file.number,
                    (),
                    image=raw["image"],
                    data_no=raw["data-no"],
                    group=raw.get("group", ""),
                )
            else:
                record = parse_choice(raw, file.number, file.split)
            return Entry(file, name, raw, record, self._image(record.image))
        except RecordError as error:
            return Entry(file, name, raw, record, error=ReleaseError(file.path.name, name, error.kind, error.reason))


class Tree:
    """The folder of a Med-MAT tree; its files are read on demand, and once.

    Args:
      field: prefix of the root in messages, such as "data.root=".

    Attributes:
      root: with every link followed.
      files: the subset files, by number and split.
      refused: errors of files that are left out: two files of the same subset and split, choice and detection files of
        one subset, or a misnamed file where the right one is missing (`near_misses`).

    Raises:
      DataError: the root is no folder.
    """

    def __init__(self, root: str | Path, field: str = ""):
        self._name = f"{field}{str(root)!r}"
        if not str(root) or not Path(root).is_dir():
            raise DataError(f"{self._name}: no such folder; expected that of a Med-MAT tree")
        self.root = Path(os.path.realpath(root))
        self.files, self.refused = self._list_files()
        self._contents: dict[SubsetFile, Contents | ReleaseError] = {}
        self._images: dict[str, Path | tuple[str, str]] = {}

    def require_files(self) -> None:
        """Raises DataError if there is no subset file, not even a refused one."""
        if not self.files and not self.refused:
            raise DataError(f"{self._name} is no Med-MAT tree: {NO_FILES}")

    def contents(self, file: SubsetFile) -> Contents:
        """The contents of a subset file. Raises ReleaseError if it cannot be read."""
        if file not in self._contents:
            try:
                self._contents[file] = Contents(file, self.image)
            except ReleaseError as error:
                self._contents[file] = error
        contents = self._contents[file]
        if isinstance(contents, ReleaseError):
            raise contents
        return contents

    def image(self, relative: str) -> Path:
        """As `schema.image_path`, cached: several records may have one image."""
        if relative not in self._images:
            try:
                self._images[relative] = image_path(self.root, relative)
            except RecordError as error:
                self._images[relative] = error.kind, error.reason
        path = self._images[relative]
        if isinstance(path, tuple):
            raise RecordError(*path)
        return path

    @functools.cached_property
    def manifest(self) -> dict[str, dict[str, Any]]:
        """As `read_manifest`."""
        return read_manifest(self.root)

    @property
    def triplets(self) -> dict[str, tuple[str, str, str]]:
        """(modality, area, task) of each subset of Med-MAT's table and of the manifest, which takes precedence.

        Raises:
          ReleaseError: as `read_manifest`.
        """
        listed = {number: tuple(entry[key] for key in ELEMENTS) for number, entry in self.manifest.items()}
        return subset_table() | listed

    def _list_files(self) -> tuple[list[SubsetFile], list[ReleaseError]]:
        refused: list[ReleaseError] = []
        files: dict[tuple[str, str], SubsetFile] = {}
        first: dict[str, SubsetFile] = {}
        for path in (
            path for folder in (self.root / FOLDER, self.root) for path in sorted(folder.glob("Subset-*.json"))
        ):
            match = _FILE.fullmatch(path.name)
            if not match:
                continue
            file = SubsetFile(path, match[1], cast(Split, match[3]), bool(match[2]))
            key, other, reason = (file.number, file.split), first.setdefault(file.number, file), ""
            if other.detection != file.detection:
                reason = f"the number of {other.path.relative_to(self.root)}; a subset has options or boxes, not both"
            elif key in files:
                reason = f"the same subset and split as {files[key].path.relative_to(self.root)}; keep one of them"
            if reason:
                refused.append(ReleaseError(str(path.relative_to(self.root)), "", "duplicate_file", reason))
            else:
                files[key] = file
        taken = [files[key] for key in sorted(files)]
        return taken, refused + [near.error for near in near_misses(self.root, list(files.values())) if near.is_wanted]


def subset_table() -> dict[str, tuple[str, str, str]]:
    """Med-MAT's own subsets: number -> (modality, area, task)."""
    return {subset.number: (subset.modality, subset.area, subset.task) for subset in catalogue.subsets().values()}


def read_text(path: Path) -> str:
    """A file's text; a byte-order mark is skipped. Raises ReleaseError of kind `unreadable` or `encoding`."""
    return _decoded(_read_bytes(path), path)


def _read_bytes(path: Path) -> bytes:
    with _refused(path, "unreadable"):
        return untrusted.read_bytes(path, MAX_FILE_BYTES)


def _decoded(content: bytes, path: Path) -> str:
    with _refused(path, "encoding"):
        return untrusted.decoded(content, path, "utf-8-sig")


def _parsed_list(content: bytes, path: Path) -> list[Any]:
    text = _decoded(content, path)
    number = sum(map(text.count, ",[{"))
    if number > MAX_VALUES:
        raise ReleaseError(path.name, "", "json", f"{number:,} values; at most {MAX_VALUES:,} are read")
    with _refused(path, "json"):
        raws = untrusted.parsed(text, path, object)
    if not isinstance(raws, list):
        raise ReleaseError(path.name, "", "not_a_list", f"a {type(raws).__name__}; expected a list of records")
    return raws


@contextmanager
def _refused(path: Path, kind: str) -> Iterator[None]:
    """Turns a FileError of the block into a ReleaseError that names the file without its folder."""
    try:
        yield
    except FileError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise ReleaseError(path.name, "", kind, reason) from error


@dataclass(frozen=True)
class NearMiss:
    """A file that is not read because its name is only nearly that of a subset file or the manifest.

    Attributes:
      name: path below the tree's root.
      is_wanted: whether the file with the right name is missing, so that the tree lacks what its owner expects.
    """

    name: str
    is_wanted: bool
    accepted: str

    @property
    def reason(self) -> str:
        """What is wrong with its name."""
        return f"is not read under this name; expected {self.accepted}"

    @property
    def error(self) -> ReleaseError:
        return ReleaseError(ascii(self.name)[1:-1], "", "file_name", f"{self.reason}, or another place for the file")


def near_misses(root: Path, files: list[SubsetFile]) -> list[NearMiss]:
    """Misnamed files in the root, its `Aggregated_Subsets`, or a folder of nearly that name; hidden ones are ignored.

    files: the subset files that are read.
    """
    detection = {file.number: file.detection for file in files}
    present = {(file.number, file.split) for file in files}
    folders = sorted(path for path in _listed(root) if _letters(path.name) == "aggregatedsubsets")
    misses = []
    for folder in (*folders, root):
        for path in _listed(folder):
            letters = _letters(path.name)
            is_read = folder.name == FOLDER or folder == root
            if path.is_dir() or not letters.startswith("subset") or (is_read and _FILE.fullmatch(path.name)):
                continue
            split = "train" if "train" in letters else "test"
            # If several subset names match, the longest is meant.
            owners = [number for number in detection if re.match(f"subset{_letters(number)}(?![0-9])", letters)]
            number = max(owners, key=len, default="")
            names_split = any(word in letters for word in ("train", "test", "val", "dev"))
            is_wanted = (number, split) not in present if number else names_split
            accepted = f"{FOLDER}/Subset--{number or 'NN'}{'-det' * detection.get(number, False)}-{split}.json"
            misses.append(NearMiss(str(path.relative_to(root)), is_wanted, accepted))
    for path in _listed(root) + _listed(root / FOLDER):
        name = str(path.relative_to(root))
        if _letters(path.name).startswith("manifest") and name != MANIFEST:
            is_wanted = not os.path.lexists(root / MANIFEST) and "json" in path.name.casefold()
            misses.append(NearMiss(name, is_wanted, MANIFEST))
    return misses


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError:
        return []


def _letters(name: str) -> str:
    """The letters, in lower case, and digits of a name."""
    return re.sub(r"[^a-z0-9]", "", name.casefold())


def read_manifest(root: Path) -> dict[str, dict[str, Any]]:
    """The entry of each subset in the tree's `manifest.json`, by number; {} without the file.

    Raises:
      ReleaseError: kind `manifest`: the file cannot be read, or a subset in it occurs twice, lacks modality, area or
        task, or has a name that cannot be printed or looks like another one.
    """
    if not os.path.lexists(root / MANIFEST):
        return {}
    named: dict[str, dict[str, Any]] = {}
    spelled: dict[tuple[str, str], str] = {}
    for position, entry in enumerate(manifest_content(root)["subsets"], 1):
        where = f"subset {entry['subset']}" if _is_name(entry.get("subset")) else f"subset in place {position}"
        for key in ("subset", *ELEMENTS):
            if not isinstance(entry.get(key), str) or not entry[key]:
                what = "modality, area and task must be text" if key in ELEMENTS else "subset must be text"
                raise _manifest_error(where, f"{what}; {key} is {shown(entry.get(key))}")
            if not _is_name(entry[key]):
                accepted = f"expected one line of at most {MAX_NAME_CHARS} signs, without white space around it"
                raise _manifest_error(where, f"{key} {quoted(entry[key])}; {accepted}")
        if entry["subset"] in named:
            raise _manifest_error(where, "stands twice; expected one entry")
        for key in ELEMENTS:
            other = spelled.setdefault((key, appearance(entry[key])), entry[key])
            if entry[key] != other:
                first, second = told_apart(entry[key], other)
                reason = f"{key} {first} looks like {second} elsewhere; expected one spelling"
                raise _manifest_error(where, reason)
        named[entry["subset"]] = entry
    return named


def manifest_content(root: Path) -> dict[str, Any]:
    """The JSON of the tree's `manifest.json`, which has a list of objects under the key `subsets`.

    Raises:
      ReleaseError: kind `manifest`: it has no such list, or cannot be read.
    """
    path, missing = root / MANIFEST, "no list of subsets under the key `subsets`"
    try:
        content = untrusted.read_json(path, max_bytes=MAX_MANIFEST_BYTES, encoding="utf-8-sig")
    except FileError as error:
        raise _manifest_error("", f"{missing}: {str(error).removeprefix(f'{path}: ')}") from error
    entries = content.get("subsets")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise _manifest_error("", f"{missing}: {shown(entries)}; expected a list of objects")
    return content


def _is_name(value: Any) -> bool:
    return (
        isinstance(value, str) and 0 < len(value) <= MAX_NAME_CHARS and value == value.strip() and value.isprintable()
    )


def _manifest_error(where: str, reason: str) -> ReleaseError:
    return ReleaseError(MANIFEST, where, "manifest", reason)
