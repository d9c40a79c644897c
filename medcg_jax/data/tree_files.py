"""The files of a Med-MAT tree: its subset files, its manifest, and files whose names are nearly those of one."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medcg_jax import untrusted
from medcg_jax.data import spelling
from medcg_jax.data.records import Split
from medcg_jax.data.schema import MAX_NAME_CHARS, ReleaseError
from medcg_jax.untrusted import FileError, shown

FOLDER, MANIFEST = "Aggregated_Subsets", "manifest.json"
# A manifest has some hundred bytes for each subset.
MAX_MANIFEST_BYTES = 2**24
# Numbers in the release, names such as `ct-lung-grade` in a phantom tree.
_FILE = re.compile(r"Subset--?([A-Za-z0-9][A-Za-z0-9-]*?)(-det)?-(train|test)\.json")
ELEMENTS = ("modality", "area", "task")


@dataclass(frozen=True)
class SubsetFile:
    """One subset file of a tree."""

    path: Path
    number: str
    split: Split
    detection: bool


def subset_files(root: Path) -> list[SubsetFile]:
    """The tree's subset files, by number and split.

    Raises:
      ReleaseError: two files claim the same subset and split, one subset has choice and detection files, or a file that
        no reader takes is nearly called as one that is not there (`near_misses`).
    """
    files, refused = list_files(root)
    if refused:
        raise refused[0]
    return files


def list_files(root: Path) -> tuple[list[SubsetFile], list[ReleaseError]]:
    """The tree's subset files by number and split, and the errors of those left out, as `subset_files` raises them."""
    refused: list[ReleaseError] = []
    files: dict[tuple[str, str], SubsetFile] = {}
    kinds: dict[str, SubsetFile] = {}
    for folder in (root / FOLDER, root):
        for path in sorted(folder.glob("Subset-*.json")):
            match = _FILE.fullmatch(path.name)
            if not match:
                continue
            file = SubsetFile(path, match[1], match[3], bool(match[2]))
            key, other = (file.number, file.split), kinds.setdefault(file.number, file)
            reason = ""
            if other.detection != file.detection:
                reason = f"the number of {other.path.relative_to(root)}; a subset has options or boxes, not both"
            elif key in files:
                reason = f"the same subset and split as {files[key].path.relative_to(root)}; keep one of them"
            if reason:
                refused.append(ReleaseError(str(path.relative_to(root)), "", "duplicate_file", reason))
            else:
                files[key] = file
    refused += [near.error for near in near_misses(root, list(files.values())) if near.is_wanted]
    return [files[key] for key in sorted(files)], refused


@dataclass(frozen=True)
class NearMiss:
    """A file that is nearly called as a subset file or the manifest, and is not read.

    Attributes:
      name: below the tree's root.
      is_wanted: whether the file that it may be meant for is not there: then the tree is not what its owner thinks.
    """

    name: str
    is_wanted: bool
    accepted: str

    @property
    def reason(self) -> str:
        """What is wrong with its name."""
        return f"is not read under this name; {self.accepted} is accepted"

    @property
    def error(self) -> ReleaseError:
        return ReleaseError(ascii(self.name)[1:-1], "", "file_name", f"{self.reason}, or another place for the file")


def near_misses(root: Path, files: Sequence[SubsetFile]) -> list[NearMiss]:
    """Files of the root and its `Aggregated_Subsets`, or of a folder nearly called so; hidden ones are left alone.

    files: those that are read.
    """
    misses = []
    for folder in sorted(path for path in _entries(root) if _letters(path.name) == "aggregatedsubsets"):
        misses += _near_subsets(root, folder, folder.name == FOLDER, files)
    misses += _near_subsets(root, root, True, files)
    for path in _entries(root) + _entries(root / FOLDER):
        name = str(path.relative_to(root))
        if _letters(path.name).startswith("manifest") and name != MANIFEST:
            wanted = not os.path.lexists(root / MANIFEST) and "json" in path.name.casefold()
            misses.append(NearMiss(name, wanted, MANIFEST))
    return misses


def _near_subsets(root: Path, folder: Path, is_read: bool, files: Sequence[SubsetFile]) -> list[NearMiss]:
    kinds = {file.number: file.detection for file in files}
    there = {(file.number, file.split) for file in files}
    misses = []
    for path in _entries(folder):
        letters = _letters(path.name)
        if path.is_dir() or not letters.startswith("subset") or (is_read and _FILE.fullmatch(path.name)):
            continue
        split = "train" if "train" in letters else "test"
        # Of subsets whose names begin alike the longest is meant.
        owners = [number for number in kinds if re.match(f"subset{_letters(number)}(?![0-9])", letters)]
        number = max(owners, key=len, default="")
        of_split = any(word in letters for word in ("train", "test", "val", "dev"))
        is_wanted = (number, split) not in there if number else of_split
        accepted = f"{FOLDER}/Subset--{number or 'NN'}{'-det' * kinds.get(number, False)}-{split}.json"
        misses.append(NearMiss(str(path.relative_to(root)), is_wanted, accepted))
    return misses


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError:
        return []


def _letters(name: str) -> str:
    """Small letters and digits of a name."""
    return re.sub(r"[^a-z0-9]", "", name.casefold())


def read_manifest(root: Path) -> dict[str, dict[str, Any]]:
    """What the tree's `manifest.json` says of each subset, by number; {} where there is none.

    Raises:
      ReleaseError: kind `manifest`: it cannot be read, or a subset in it stands twice, lacks a name for modality, area
        or task, or has one that cannot be printed or looks like another one.
    """
    if not os.path.lexists(root / MANIFEST):
        return {}
    entries = manifest_content(root)["subsets"]
    named: dict[str, dict[str, Any]] = {}
    looks: dict[str, dict[str, str]] = {key: {} for key in ELEMENTS}
    for place, entry in enumerate(entries, 1):
        where = f"subset {entry['subset']}" if _is_name(entry.get("subset")) else f"subset in place {place}"
        for key in ("subset", *ELEMENTS):
            if not isinstance(entry.get(key), str) or not entry[key]:
                what = "modality, area and task must be text" if key in ELEMENTS else "subset must be text"
                raise _bad(where, f"{what}; {key} is {shown(entry.get(key))}")
            if not _is_name(entry[key]):
                accepted = f"one line of at most {MAX_NAME_CHARS} signs, without white space around it, is accepted"
                raise _bad(where, f"{key} {spelling.quoted(entry[key])}; {accepted}")
        if entry["subset"] in named:
            raise _bad(where, "stands twice; one entry is accepted")
        for key in ELEMENTS:
            other = looks[key].setdefault(spelling.look(entry[key]), entry[key])
            if entry[key] != other:
                first, second = spelling.told_apart(entry[key], other)
                raise _bad(where, f"{key} {first} looks like {second} elsewhere; one spelling is accepted")
        named[entry["subset"]] = entry
    return named


def manifest_content(root: Path) -> dict[str, Any]:
    """The tree's `manifest.json` as it stands, with a list of objects under the key `subsets`.

    Raises:
      ReleaseError: kind `manifest`: it has none, or cannot be read.
    """
    path, missing = root / MANIFEST, "no list of subsets under the key `subsets`"
    try:
        content = untrusted.read_json(path, max_bytes=MAX_MANIFEST_BYTES, encoding="utf-8-sig")
    except FileError as error:
        raise _bad("", f"{missing}: {str(error).removeprefix(f'{path}: ')}") from error
    entries = content.get("subsets")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise _bad("", f"{missing}: {shown(entries)}; a list of objects is accepted")
    return content


def _is_name(value: Any) -> bool:
    return (
        isinstance(value, str) and 0 < len(value) <= MAX_NAME_CHARS and value == value.strip() and value.isprintable()
    )


def _bad(where: str, reason: str) -> ReleaseError:
    return ReleaseError(MANIFEST, where, "manifest", reason)
