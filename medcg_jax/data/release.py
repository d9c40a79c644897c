"""Reader of a Med-MAT tree: `Aggregated_Subsets/Subset--NN-{train,test}.json`, or `Subset-NN-train.json` at its root.

Modality, area and task come from the tree's `manifest.json` where it has one, else from the catalogue of Med-MAT's 53
subsets. Detection files (`-det-`) are subsets of their own.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from medcg_jax.config import DataConfig
from medcg_jax.data import catalogue
from medcg_jax.data.images import ImageError, image_size, load_image
from medcg_jax.data.reading import Reading, check_reading
from medcg_jax.data.records import SPLITS, DataError, Record, RecordSet, Split, Subset
from medcg_jax.data.schema import ReleaseError, read_choice_file, read_list
from medcg_jax.data.schema_detection import read_detection_file
from medcg_jax.data.splits import balanced, rarest_labels, split_group, train_test_split
from medcg_jax.data.tree_files import read_manifest, subset_files


def subset_table() -> dict[str, tuple[str, str, str]]:
    """Med-MAT's own subsets: number -> (modality, area, task)."""
    return {s.number: (s.modality, s.area, s.task) for s in catalogue.subsets()}


class ReleaseSource:
    """A Med-MAT tree as a `records.Source`.

    A subset without a test file is split 9:1 by patient and label (`splits.train_test_split`), the same way whatever
    the seed. Records are capped with labels balanced, by the configuration's `train_records_per_subset` and
    `test_records_per_subset`.

    Args:
      skip: (file, record) of records that are left out, as `check` names them; the others are then counted exactly.

    Attributes:
      root: the tree, every link followed.
      subsets: the choice subsets.
      detection_subsets: the subsets that have boxes instead of options, looked at when asked for.

    Raises:
      DataError: `root` is no Med-MAT tree, a file is no list, or a subset is unknown; or there is no such window, way
        of reading deep greys, or frame.
    """

    def __init__(self, root: str | Path, config: DataConfig, skip: Container[tuple[str, str]] = ()):
        if not str(root) or not Path(root).is_dir():
            raise DataError(f"data.root={str(root)!r}: no such folder; that of a Med-MAT tree is accepted")
        check_reading(Reading(config.window, config.deep_grey, config.frame))
        self.root, self._config, self._skip = Path(os.path.realpath(root)), config, skip
        files = subset_files(self.root)
        self._files = {(file.number, file.split): file.path for file in files}
        self._with_boxes = {file.number for file in files if file.detection}
        if not files:
            reason = "no Subset--NN-train.json in it or in its Aggregated_Subsets"
            raise DataError(f"data.root={str(root)!r} is no Med-MAT tree: {reason}")
        choice = {file.number for file in files if not file.detection}
        self._parsed: dict[tuple[str, Split], list[Record]] = {}
        manifest = read_manifest(self.root)
        self.subsets = tuple(self._subset(number, manifest) for number in sorted(choice))

    @functools.cached_property
    def detection_subsets(self) -> tuple[Subset, ...]:
        manifest = read_manifest(self.root)
        return tuple(self._subset(number, manifest) for number in sorted(self._with_boxes))

    def records(self, subset: str, split: Split) -> RecordSet:
        """The subset's records, every one checked; images are decoded when asked for. See `records.Source`."""
        if split not in SPLITS:
            raise DataError(f"split {split!r}; {' or '.join(SPLITS)} is accepted")
        if subset not in {number for number, _ in self._files}:
            raise DataError(f"subset {subset!r} is no subset of {self.root}")
        records = self._records(subset, split)
        seed = cap_seed(self._config, subset, split)
        places = balanced([labels_of(record) for record in records], self._limit(split), seed)
        kept = [records[place] for place in places]
        return RecordSet(kept, [TreeImage(self.root, record.image, self._config) for record in kept])

    def fingerprint(self) -> str:
        """A digest of the choice files, of the names and sizes of their images and how these are read, and of the caps
        and their seed."""
        return self._digest(self.subsets)

    def detection_fingerprint(self) -> str:
        """The same of the detection files."""
        return self._digest(self.detection_subsets)

    def _digest(self, subsets: tuple[Subset, ...]) -> str:
        config, names = self._config, {subset.name for subset in subsets}
        caps = (config.train_records_per_subset, config.test_records_per_subset, config.seed)
        digest = hashlib.sha256(repr((caps, config.window, config.deep_grey, config.frame)).encode())
        for (number, split), path in sorted(self._files.items()):
            if number not in names:
                continue
            digest.update(f"\n{number} {split} ".encode() + hashlib.sha256(path.read_bytes()).digest())
            for raw in read_list(path):
                digest.update(f"\n{_size(self.root, raw)}".encode())
        for subset in subsets:
            digest.update(repr((subset.name, subset.modality, subset.area, subset.task)).encode())
        return digest.hexdigest()[:16]

    def _subset(self, number: str, manifest: dict[str, dict[str, Any]]) -> Subset:
        entry = manifest.get(number)
        named = (entry["modality"], entry["area"], entry["task"]) if entry else subset_table().get(number)
        if named is None:
            reason = f"subset {number} is neither in the tree's manifest.json nor in Med-MAT's table of 53"
            raise ReleaseError(self._path(number).name, "", "unknown_subset", reason)
        labels, counts = self._labels_and_counts(number)
        return Subset(number, *named, labels=labels, num_train=counts["train"], num_test=counts["test"])

    def _labels_and_counts(self, number: str) -> tuple[tuple[str, ...], dict[str, int]]:
        """Taken from the JSON alone where both splits are given: records are checked when they are used."""
        if not self._skip and all((number, split) in self._files for split in SPLITS):
            raws = {split: read_list(self._files[number, split]) for split in SPLITS}
            listed = [raw for split in SPLITS for raw in raws[split] if isinstance(raw, dict)]
            key = "Answer"
            if number in self._with_boxes:
                key, listed = "label", [box for raw in listed for box in _boxes(raw)]
            labels = {own[key] for own in listed if isinstance(own.get(key), str)}
            sizes = {split: len(raws[split]) for split in SPLITS}
        else:
            parsed = {split: self._records(number, split) for split in SPLITS}
            every = [record for split in SPLITS for record in parsed[split]]
            labels = {record.label for record in every if record.options}
            labels |= {box.label for record in every for box in record.boxes}
            sizes = {split: len(parsed[split]) for split in SPLITS}
        limits = {split: self._limit(split) or sizes[split] for split in SPLITS}
        return tuple(sorted(labels)), {split: min(sizes[split], limits[split]) for split in SPLITS}

    def _records(self, number: str, split: Split) -> list[Record]:
        """Every record of the split, before the cap."""
        if (number, split) not in self._parsed:
            if (number, "test") in self._files:
                path = self._files.get((number, split))
                self._parsed[number, split] = self._read(path, number, split) if path else []
            else:
                both = {own: self._read(self._files[number, "train"], number, own) for own in SPLITS}
                self._parsed |= _split(number, both)
        return self._parsed[number, split]

    def _read(self, path: Path, number: str, split: Split) -> list[Record]:
        where = {"subset": number, "split": split, "skip": self._skip}
        if number in self._with_boxes:
            return read_detection_file(path, self.root, self._config.max_pixels, **where)
        return read_choice_file(path, self.root, **where)

    def _path(self, number: str) -> Path:
        return next(path for (own, _), path in sorted(self._files.items()) if own == number)

    def _limit(self, split: Split) -> int:
        return self._config.train_records_per_subset if split == "train" else self._config.test_records_per_subset


def _split(number: str, both: dict[Split, list[Record]]) -> dict[tuple[str, Split], list[Record]]:
    """9:1 by patient or lesion where these are known, by image elsewhere; labels as they are balanced in the whole.

    Args:
      both: the same records, with ids as of either split.
    """
    records = both["train"]
    labels = rarest_labels([labels_in(record) for record in records])
    groups = [split_group(r.data_no, r.image, r.group) for r in records]
    items = [(r.image, label, group) for r, label, group in zip(records, labels, groups, strict=True)]
    tested = train_test_split(items)
    return {
        (number, split): [record for record, test in zip(both[split], tested, strict=True) if test == (split == "test")]
        for split in SPLITS
    }


def cap_seed(config: DataConfig, subset: str, split: Split) -> int:
    """The seed that `balanced` draws a subset's records with."""
    return int.from_bytes(hashlib.sha256(f"{config.seed}/{subset}/{split}".encode()).digest()[:8], "big")


def labels_of(record: Record) -> str:
    """What a cap balances: the right option, or all labels of a record's boxes."""
    return "+".join(labels_in(record))


def labels_in(record: Record) -> list[str]:
    """The right option, or the labels of a record's boxes, each once, sorted."""
    return [record.label] if record.options else sorted({box.label for box in record.boxes})


def _boxes(raw: dict[str, Any]) -> list[dict[str, Any]]:
    """The boxes of a record that nobody has checked."""
    boxes = raw.get("boxes")
    return [box for box in boxes if isinstance(box, dict)] if isinstance(boxes, list) else []


def _size(root: Path, raw: Any) -> str:
    """`path bytes` of a record's image; `-` for what cannot be found (it is refused when its subset is read)."""
    relative = raw.get("image") if isinstance(raw, dict) else None
    try:
        return f"{relative} {os.stat(root / relative).st_size}"
    except (OSError, TypeError, ValueError):
        return f"{relative} -"


class TreeImage(NamedTuple):
    """A tree's image file, `path` below `root`; a `records.StoredImage`."""

    root: Path
    path: str
    config: DataConfig

    def pixels(self) -> np.ndarray:
        config = self.config
        with self._named():
            reading = Reading(config.window, config.deep_grey, config.frame)
            return load_image(self.root / self.path, config.max_pixels, reading)

    def size(self) -> tuple[int, int]:
        with self._named():
            return _size_in_header(self._as_it_is(), self.config.max_pixels)

    def file_digest(self) -> bytes:
        with self._named():
            return _file_digest(self._as_it_is())

    def pixel_digest(self) -> bytes:
        return b""

    def _as_it_is(self) -> tuple[str, int, int]:
        """(path, bytes, time of the last change): what is remembered of a file holds until it changes."""
        path = os.path.realpath(self.root / self.path)
        status = os.stat(path)
        return path, status.st_size, status.st_mtime_ns

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except (ImageError, OSError) as error:
            raise ImageError(f"image {self.path!r}: {getattr(error, 'strerror', None) or error}") from error


# Several records, of several subsets, may have one image.
@functools.cache
def _file_digest(file: tuple[str, int, int]) -> bytes:
    with open(file[0], "rb") as content:
        return hashlib.file_digest(content, "sha256").digest()


@functools.cache
def _size_in_header(file: tuple[str, int, int], max_pixels: int) -> tuple[int, int]:
    return image_size(file[0], max_pixels)
