"""Reader of what `prepare` wrote: a `records.Source` whose images are read by number from ArrayRecord shards."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medcg_jax.data.images import grey_view
from medcg_jax.data.layouts import Layout, parse_layout
from medcg_jax.data.prepare import FORMAT
from medcg_jax.data.records import SPLITS, Box, DataError, Record, RecordSet, Split, Subset, Turn
from medcg_jax.data.release import cap_seed, labels_of
from medcg_jax.data.splits import balanced
from medcg_jax.run_config import DataConfig


class PreparedSource:
    """A prepared folder as a `records.Source`; only the caps of the configuration are applied, to what was prepared.

    Attributes:
      subsets, detection_subsets: as `records.Source` has them.
      layout: what was done to the images.

    Raises:
      DataError: `root` holds no finished preparation. Of a subset whose records or shards are missing: when it is asked
        for. `verify` reads every shard.
    """

    def __init__(self, root: str | Path, config: DataConfig):
        self._root, self._config = Path(root), config
        self._manifest = read_manifest(self._root)
        self._entries = {entry["subset"]: entry for entry in self._manifest["subsets"]}
        self.layout: Layout = parse_layout(self._manifest["settings"]["image"])
        self.subsets = self._of_kind("choice")
        self.detection_subsets = self._of_kind("detection")

    def records(self, subset: str, split: Split) -> RecordSet:
        """The subset's records in the order of the tree; images are read when asked for. See `records.Source`."""
        if split not in SPLITS:
            raise DataError(f"split {split!r}; {' or '.join(SPLITS)} is accepted")
        if subset not in self._entries:
            raise DataError(f"subset {subset!r} is no subset of {self._root}")
        lines = self._lines(subset, split)
        records = [_record(line) for line in lines]
        seed = cap_seed(self._config, subset, split)
        places = balanced([labels_of(record) for record in records], self._limit(split), seed)
        images = _ShardImages(self._shards(subset, split), [lines[place] for place in places], places)
        return RecordSet([records[place] for place in places], images)

    def fingerprint(self) -> str:
        """A digest of the records of choice questions, of the pixels they are prepared with, and of the caps."""
        return self._digest("choice")

    def detection_fingerprint(self) -> str:
        """The same of the records with boxes."""
        return self._digest("detection")

    def _digest(self, kind: str) -> str:
        config = self._config
        own = [entry for entry in self._manifest["subsets"] if entry["kind"] == kind]
        caps = (config.train_records_per_subset, config.test_records_per_subset, config.seed)
        return hashlib.sha256(json.dumps([caps, self._manifest["settings"], own]).encode()).hexdigest()[:16]

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
        return min(entry[split], self._limit(split) or entry[split])

    def _limit(self, split: Split) -> int:
        return self._config.train_records_per_subset if split == "train" else self._config.test_records_per_subset

    def _lines(self, subset: str, split: Split) -> list[dict[str, Any]]:
        path = self._root / "records" / f"{subset}-{split}.jsonl"
        if not self._entries[subset][split]:
            return []
        try:
            lines = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read; run `medcg data prepare` again") from error
        wanted = self._entries[subset][split]
        if len(lines) != wanted:
            raise DataError(f"{path} has {len(lines)} records, the manifest {wanted}; prepare it again")
        return lines

    def _shards(self, subset: str, split: Split) -> list[str]:
        paths = [self._root / "records" / shard["file"] for shard in self._entries[subset]["shards"][split]]
        for path in paths:
            if not path.is_file():
                raise DataError(f"{path} is missing; run `medcg data prepare` again")
        return [str(path) for path in paths]


def is_prepared(root: str | Path) -> bool:
    """Whether a folder holds what `prepare` wrote, finished or not."""
    return (Path(root) / ".plan.json").is_file()


def read_manifest(root: Path) -> dict[str, Any]:
    """The manifest of a prepared folder.

    Raises:
      DataError: there is none, or it is not this format's.
    """
    path = root / "manifest.json"
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        why = "not finished; run `medcg data prepare` again" if is_prepared(root) else "not prepared"
        raise DataError(f"data.root={str(root)!r}: {why}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{path} is not of the format {FORMAT!r}; a folder that `medcg data prepare` wrote is accepted")
    return manifest


def verify(root: str | Path) -> list[str]:
    """What is wrong with the shards of a prepared folder, a line each: missing, or other bytes than were written.

    Raises:
      DataError: as `read_manifest`.
    """
    root, wrong = Path(root), []
    for entry in read_manifest(root)["subsets"]:
        for shard in (shard for split in SPLITS for shard in entry["shards"][split]):
            try:
                with open(root / "records" / shard["file"], "rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                wrong.append(f"{shard['file']}: {error.strerror}")
                continue
            if digest != shard["sha256"]:
                wrong.append(f"{shard['file']}: its bytes are not those that were written")
    return wrong


def pixels(content: bytes, shape: Sequence[int]) -> np.ndarray:
    """uint8[h, w, 3] of the bytes of a shard's record, a view: it must not be written to.

    Raises:
      DataError: the bytes are not those of an image of (height, width) `shape`.
    """
    height, width = shape
    flat = np.frombuffer(content, np.uint8, offset=content.index(b"\n") + 1)
    if flat.size == height * width * 3:
        return flat.reshape(height, width, 3)
    if flat.size != height * width:
        raise DataError(f"{flat.size} bytes of pixels for {width} x {height}; prepare it again")
    return grey_view(flat.reshape(height, width))


def _record(line: dict[str, Any]) -> Record:
    return Record(
        id=line["id"],
        subset=line["subset"],
        turns=tuple(Turn(*turn) for turn in line["turns"]),
        options=tuple(line["options"]),
        answer=line["answer"],
        image=line["image"],
        data_no=line["data_no"],
        group=line["group"],
        boxes=tuple(Box(*box) for box in line["boxes"]),
        size_px=tuple(line["size_px"]),
    )


class _ShardImages(Sequence):
    """uint8[h, w, 3] of each place in the shards, read when asked for."""

    def __init__(self, shards: list[str], lines: list[dict[str, Any]], places: list[int]):
        self._shards, self._lines, self._places = shards, lines, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> np.ndarray:
        return pixels(self._source[self._places[index]], self._lines[index]["shape"])

    def file_digest(self, index: int) -> bytes:
        """sha256 of the bytes of the file that an image was read from."""
        return bytes.fromhex(self._lines[index]["sha256"])

    def pixel_digest(self, index: int) -> bytes:
        """sha256 of that file's decoded pixels, before they were laid out; b"" where none was kept."""
        return bytes.fromhex(self._lines[index].get("pixels", ""))

    @functools.cached_property
    def _source(self):
        from grain.sources import ArrayRecordDataSource

        return ArrayRecordDataSource(self._shards)
