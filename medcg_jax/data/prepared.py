"""Reader of a prepared folder: a `records.Source` whose images are read by index from ArrayRecord shards."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from medcg_jax import untrusted
from medcg_jax.config import DataConfig
from medcg_jax.data.images import grey_view
from medcg_jax.data.layouts import Layout, parse_layout
from medcg_jax.data.prepare import FORMAT, records_digest, shard_name
from medcg_jax.data.records import LETTERS, MAX_OPTIONS, SPLITS, Box, DataError, Record, RecordSet, Split, Subset, Turn
from medcg_jax.data.sources import is_prepared
from medcg_jax.data.splits import capped, limit_of
from medcg_jax.untrusted import FileError

KINDS = ("choice", "detection")
# 256 images of the largest size allowed have some 50 GB.
MAX_SHARD_BYTES = 2**37
MAX_SHARD_OVERHEAD_BYTES = 2**20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]*")
_TEXTS = ("id", "subset", "answer", "image", "data_no", "group")
_ENTRY = {
    "kind": str, "modality": str, "area": str, "task": str, "labels": list, "train": int, "test": int, "shards": dict
}  # fmt: skip


class PreparedSource:
    """A prepared folder as a `records.Source`; of the configuration only the caps apply, to the prepared records.

    Attributes:
      subsets, detection_subsets: as in `records.Source`.
      layout: what was done to the images.

    An image is read only if its shard's record begins with the record's line of the .jsonl, so that id and digests are
    its own; ArrayRecord itself checks each record's bytes. `verify` compares the digests of whole shards.

    Raises:
      DataError: `root` holds no finished preparation. `records` raises where records or shards are missing or differ
        from the manifest; reading an image raises where its record is damaged or exchanged.
    """

    def __init__(self, root: str | Path, config: DataConfig):
        self._root, self._config = Path(root), config
        self._manifest = read_manifest(self._root)
        self._entries = {entry["subset"]: entry for entry in self._manifest["subsets"]}
        self.layout: Layout = parse_layout(self._manifest["settings"]["image"])
        self.subsets = self._of_kind("choice")
        self.detection_subsets = self._of_kind("detection")

    def records(self, subset: str, split: Split) -> RecordSet:
        """The subset's records in the order of the tree; images are read on demand. See `records.Source`."""
        if split not in SPLITS:
            raise DataError(f"split {split!r}; expected {' or '.join(SPLITS)}")
        if subset not in self._entries:
            raise DataError(f"subset {subset!r} is no subset of {self._root}")
        path = self._root / "records" / f"{subset}-{split}.jsonl"
        texts = _lines(path, self._entries[subset][split])
        lines = [_read_line(text, f"{path}, line {number}", subset) for number, text in enumerate(texts, 1)]
        records = [line.record for line in lines]
        positions = capped(records, self._config, subset, split)
        shards = _Shards(self._shards(subset, split))
        images = [_ShardImage(shards, lines[position], position) for position in positions]
        return RecordSet([records[position] for position in positions], images)

    def fingerprint(self) -> str:
        """A digest of the records of choice questions, of the pixels they are prepared with, and of the caps."""
        return self._digest("choice")

    def detection_fingerprint(self) -> str:
        """The same for the records with boxes."""
        return self._digest("detection")

    def _digest(self, kind: str) -> str:
        config = self._config
        entries = [entry for entry in self._manifest["subsets"] if entry["kind"] == kind]
        caps = (config.train_records_per_subset, config.test_records_per_subset, config.seed)
        return hashlib.sha256(json.dumps([caps, self._manifest["settings"], entries]).encode()).hexdigest()[:16]

    def _of_kind(self, kind: str) -> tuple[Subset, ...]:
        return tuple(
            Subset(
                entry["subset"], entry["modality"], entry["area"], entry["task"], labels=tuple(entry["labels"]),
                num_train=self._capped(entry, "train"), num_test=self._capped(entry, "test"),
            )
            for entry in self._manifest["subsets"]
            if entry["kind"] == kind
        )  # fmt: skip

    def _capped(self, entry: dict[str, Any], split: Split) -> int:
        return min(entry[split], limit_of(self._config, split) or entry[split])

    def _shards(self, subset: str, split: Split) -> dict[Path, int]:
        """Each shard and its number of records by the manifest."""
        listed = self._entries[subset]["shards"][split]
        shards = {self._root / "records" / shard["file"]: shard["records"] for shard in listed}
        for path in shards:
            if not path.is_file():
                raise DataError(f"{path} is missing; run `medcg data prepare` again")
        return shards


def read_manifest(root: Path) -> dict[str, Any]:
    """The manifest of a prepared folder.

    Raises:
      DataError: there is no manifest, or it has another format.
    """
    path = root / "manifest.json"
    if not os.path.lexists(path):
        why = "not finished; run `medcg data prepare` again" if is_prepared(root) else "not prepared"
        raise DataError(f"data.root={str(root)!r}: {why}")
    try:
        manifest = untrusted.read_json(path)
    except FileError as error:
        raise DataError(f"{error}; run `medcg data prepare` again") from error
    if manifest.get("format") != FORMAT:
        reason = f"format={untrusted.shown(manifest.get('format'))}, where {FORMAT!r} is read"
        raise DataError(f"{path}: {reason}; run `medcg data prepare` again, into a new folder")
    if reason := _manifest_fault(manifest):
        raise DataError(f"{path}: {reason}; run `medcg data prepare` again")
    return manifest


def _manifest_fault(manifest: dict[str, Any]) -> str:
    """The first thing in a manifest that `prepare` would not have written; "" if there is none."""
    settings, entries = manifest.get("settings"), manifest.get("subsets")
    if not isinstance(settings, dict) or not isinstance(settings.get("image"), str):
        return f"settings={untrusted.shown(settings)} has no text `image`"
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        return f"subsets={untrusted.shown(entries)} is no list of objects"
    names = [entry.get("subset") for entry in entries]
    for entry, name in zip(entries, names, strict=True):
        if not isinstance(name, str) or not _NAME.fullmatch(name) or names.count(name) > 1:
            return f"subset {untrusted.shown(name)} is no name, or stands twice"
        for key, kind in _ENTRY.items():
            if type(entry.get(key)) is not kind:
                return f"subset {name}: {key}={untrusted.shown(entry.get(key))} is no {kind.__name__}"
        if entry["kind"] not in KINDS:
            return f"subset {name}: kind={untrusted.shown(entry['kind'])} is none of {', '.join(KINDS)}"
        if not all(isinstance(label, str) for label in entry["labels"]):
            return f"subset {name}: labels={untrusted.shown(entry['labels'])} are not all text"
        for split in SPLITS:
            if reason := _shards_fault(entry["shards"].get(split), f"{name}-{split}", entry[split]):
                return f"subset {name}: {reason}"
    return ""


def _shards_fault(shards: Any, subset_split: str, number: int) -> str:
    """What is wrong with the shards of `subset_split` ("04-train"), which has `number` records; "" if nothing is."""
    if not isinstance(shards, list) or not all(isinstance(shard, dict) for shard in shards):
        return f"shards of {subset_split}: {untrusted.shown(shards)} is no list of objects"
    for position, shard in enumerate(shards):
        name = shard_name(subset_split, position, len(shards))
        if shard.get("file") != name:
            return f"shard {untrusted.shown(shard.get('file'))} stands where {name} belongs"
        if type(shard.get("records")) is not int or not isinstance(shard.get("sha256"), str):
            return f"shard {name} has no whole number `records`, or no text `sha256`"
    listed = sum(shard["records"] for shard in shards)
    return "" if listed == number >= 0 else f"{subset_split} has {untrusted.shown(number)} records, its shards {listed}"


def verify(root: str | Path) -> list[str]:
    """The faults of a prepared folder, a line each: shards and lists of records that are missing or have changed.

    Raises:
      DataError: as `read_manifest`.
    """
    root, wrong = Path(root), []
    manifest = read_manifest(root)
    counts = {f"{entry['subset']}-{split}": entry[split] for entry in manifest["subsets"] for split in SPLITS}
    lines: dict[str, list[str]] = {}
    try:
        lines = {
            subset_split: _lines(root / "records" / f"{subset_split}.jsonl", n)
            for subset_split, n in counts.items()
            if n
        }
        if records_digest(lines) != manifest.get("records"):
            wrong.append("records/*.jsonl: not the records that were written; run `medcg data prepare` again")
    except DataError as error:
        wrong.append(str(error))
    for entry in manifest["subsets"]:
        for split in SPLITS:
            remaining = iter(lines.get(f"{entry['subset']}-{split}", ()))
            for shard in entry["shards"][split]:
                fault = _fault_of(root / "records", shard, list(islice(remaining, shard["records"])), entry["subset"])
                wrong += [f"{shard['file']}: {fault}"] if fault else []
    return wrong


def _fault_of(folder: Path, shard: Mapping[str, Any], lines: Sequence[str], subset: str) -> str:
    """What is wrong with a shard's file; "" if nothing is. lines: of its records, which bound its size."""
    try:
        with untrusted.open_regular(folder / shard["file"], _most_bytes(lines, subset)) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (FileError, OSError) as error:
        return getattr(error, "strerror", None) or str(error)
    return "" if digest == shard["sha256"] else "its bytes are not those that were written"


def _most_bytes(lines: Sequence[str], subset: str) -> int:
    """The most bytes that a shard of these records can have."""
    try:
        records = [_read_line(line, "", subset) for line in lines]
    except DataError:  # `verify` reports the list itself
        records = []
    size = sum(len(line.head) + 3 * line.shape[0] * line.shape[1] for line in records)
    # ArrayRecord's overhead is far below the size of the records.
    return 2 * size + MAX_SHARD_OVERHEAD_BYTES if records else MAX_SHARD_BYTES


def pixels(content: bytes, shape: Sequence[int]) -> np.ndarray:
    """uint8[h, w, 3] of the bytes of a shard's record: a read-only view.

    Raises:
      DataError: the bytes are no image of (height, width) `shape`.
    """
    height, width = shape
    flat = np.frombuffer(content, np.uint8, offset=content.index(b"\n") + 1)
    if flat.size == height * width * 3:
        return flat.reshape(height, width, 3)
    if flat.size != height * width:
        raise DataError(f"{flat.size} bytes of pixels for {width} x {height}; prepare it again")
    return grey_view(flat.reshape(height, width))


def _lines(path: Path, expected: int) -> list[str]:
    if not expected:
        return []
    try:
        lines = [line for line in untrusted.read_text(path).split("\n") if line]
    except FileError as error:
        raise DataError(f"{error}; run `medcg data prepare` again") from error
    if len(lines) != expected:
        raise DataError(f"{path} has {len(lines)} records, the manifest {expected}; prepare it again")
    return lines


class _Line(NamedTuple):
    """One line of a .jsonl: its record, the head of the shard's record, and (height, width) of the pixels in the shard.

    hashes: of the source image before layout: sha256 of the file's bytes, sha256 of the decoded pixels, perceptual hash.
    """

    record: Record
    head: bytes
    shape: tuple[int, int]
    hashes: tuple[bytes, bytes, bytes]


def _read_line(text: str, where: str, subset: str) -> _Line:
    """Parses one line. where: file and line number, for messages.

    Raises:
      DataError: the line has another form than `prepare` writes.
    """
    try:
        line = untrusted.parsed(text, where)
    except FileError as error:
        raise DataError(f"{error}; run `medcg data prepare` again") from error
    try:
        record = Record(
            **{key: line[key] for key in _TEXTS},
            turns=tuple(Turn(question, answer) for question, answer in line["turns"]),
            options=tuple(line["options"]),
            boxes=tuple(Box(label, *map(float, corners)) for label, *corners in line["boxes"]),
            size_px=_size(line["size_px"]),
        )
        hashes = tuple(bytes.fromhex(line[key]) for key in ("sha256", "pixels", "perceptual"))
        result = _Line(record, f"{text}\n".encode(), _size(line["shape"]), hashes)
        texts = [*(getattr(record, key) for key in _TEXTS), *record.options, *(box.label for box in record.boxes)]
        texts += [text for turn in record.turns for text in (turn.question, turn.answer)]
        is_right = all(isinstance(text, str) for text in texts) and record.subset == subset
        if record.options:
            letters = LETTERS[: len(record.options)]
            is_right &= 2 <= len(letters) <= MAX_OPTIONS and len(record.answer) == 1 and record.answer in letters
            is_right &= len(record.turns) == 1
        is_right &= all(len(digest) in (0, 32) for digest in hashes)
    except (KeyError, TypeError, ValueError, OverflowError):
        is_right = False
    if not is_right:
        reason = f"no record as it was written: {untrusted.shown(line)}"
        raise DataError(f"{where}: {reason}; run `medcg data prepare` again")
    return result


def _size(pair: Any) -> tuple[int, int]:
    height, width = pair
    if type(height) is not int or type(width) is not int or min(height, width) < 0:
        raise ValueError(pair)
    return height, width


class _ShardImage(NamedTuple):
    """The image of one line of a .jsonl, at index `position` of all shards' records; a `records.StoredImage`."""

    shards: _Shards
    line: _Line
    position: int

    def pixels(self) -> np.ndarray:
        content = self.shards.read(self.position)
        # Exchanged shards, or shards of another preparation, hold other records.
        if not content.startswith(self.line.head):
            reason = f"not {self.line.record.id[:200]}, which the list of records has there"
            raise self.shards.damaged(self.position, reason)
        return pixels(content, self.line.shape)

    def size(self) -> tuple[int, int]:
        return self.line.shape

    def file_digest(self) -> bytes:
        return self.line.hashes[0]

    def kept_hashes(self) -> tuple[bytes, bytes]:
        """Hashes of the pixels before layout."""
        return self.line.hashes[1:]


class _Shards:
    """The shards of one subset and split, opened when the first record is read.

    sizes: the number of records of each shard.
    """

    def __init__(self, sizes: dict[Path, int]):
        self._sizes = sizes

    def read(self, position: int) -> bytes:
        """One record's bytes. Raises DataError if it is damaged or a shard cannot be read."""
        source = self._source
        try:
            return source[position]
        except (RuntimeError, ValueError, IndexError) as error:
            raise self.damaged(position, " ".join(str(error).split())[:120]) from error

    def damaged(self, position: int, reason: str) -> DataError:
        """The error to raise for one record."""
        ends = list(accumulate(self._sizes.values()))
        shard = list(self._sizes)[bisect_right(ends, position)]
        return DataError(f"{shard}: record {position + 1} of {ends[-1]}: {reason}; run `medcg data prepare` again")

    @functools.cached_property
    def _source(self):
        from grain.sources import ArrayRecordDataSource

        try:
            source = ArrayRecordDataSource([str(path) for path in self._sizes])
            number = len(source)
        except (RuntimeError, ValueError) as error:
            raise DataError(_unreadable(self._sizes, error)) from error
        if number != sum(self._sizes.values()):
            first, written = next(iter(self._sizes)), sum(self._sizes.values())
            raise DataError(f"{first} and those after it: {number} records, {written} were written; prepare it again")
        return source


def _unreadable(shards: Iterable[Path], error: Exception) -> str:
    """A message that names the shard that cannot be opened, and why."""
    from grain.sources import ArrayRecordDataSource

    for path in shards:
        try:
            len(ArrayRecordDataSource([str(path)]))
        except (RuntimeError, ValueError) as cause:
            return f"{path} cannot be read: {' '.join(str(cause).split())[:120]}; run `medcg data prepare` again"
    return f"{path} or a shard before it cannot be read: {' '.join(str(error).split())[:120]}; prepare it again"
