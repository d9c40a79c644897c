"""A Med-MAT tree (`tree`) as a source: records split and capped, images decoded on demand.

Modality, area and task come from the tree's `manifest.json` where it has one, else from the catalogue of Med-MAT's 53
subsets. Detection files (`-det-`) are subsets of their own.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from medcg_jax.config import DataConfig
from medcg_jax.data.images import ImageError, image_size, load_image
from medcg_jax.data.reading import Reading, check_reading
from medcg_jax.data.records import SPLITS, DataError, Record, RecordSet, Split, Subset
from medcg_jax.data.schema import ReleaseError, box_labels, named, parse_detection
from medcg_jax.data.splits import capped, labels_in, limit_of, rarest_labels, split_group, train_test_split
from medcg_jax.data.tree import Contents, SubsetFile, Tree


class ReleaseSource:
    """A Med-MAT tree as a `records.Source`.

    A subset without a test file is split 9:1 by patient and label (`splits.train_test_split`), whatever the seed.
    Records are capped with labels balanced, by the configuration's `train_records_per_subset` and
    `test_records_per_subset`.

    Args:
      root: the tree's folder, or the `Tree` itself.
      skip: (file, record) of records to leave out, as `check` names them; the others are then counted exactly.

    Attributes:
      tree: the tree. subsets: the choice subsets.
      detection_subsets: the subsets that have boxes instead of options, read on first use.

    Raises:
      DataError: `root` is no Med-MAT tree, a file is no list, a subset is unknown, or the configuration's window, deep
        greys or frame are.
    """

    def __init__(self, root: str | Path | Tree, config: DataConfig, skip: Container[tuple[str, str]] = ()):
        self.tree = root if isinstance(root, Tree) else Tree(root, "data.root=")
        check_reading(Reading(config.window, config.deep_grey, config.frame))
        self._config, self._skip = config, skip
        for error in self.tree.refused:
            raise error
        self.tree.require_files()
        self._files = {(file.number, file.split): file for file in self.tree.files}
        self._records: dict[str, dict[Split, list[Record]]] = {}
        self.subsets = self._subsets(detection=False)

    @functools.cached_property
    def detection_subsets(self) -> tuple[Subset, ...]:
        return self._subsets(detection=True)

    def records(self, subset: str, split: Split) -> RecordSet:
        """The subset's records, all checked; images are decoded on demand. See `records.Source`."""
        if split not in SPLITS:
            raise DataError(f"split {split!r}; expected {' or '.join(SPLITS)}")
        if subset not in {number for number, _ in self._files}:
            raise DataError(f"subset {subset!r} is no subset of {self.tree.root}")
        return self._set(self._all_records(subset, split), subset, split)

    def present_tests(self, subset: str) -> tuple[RecordSet, tuple[str, ...]]:
        """(the subset's test records as of `records`, but for those whose image is missing; the ids of these)."""
        file = self._files.get((subset, "test"))
        entries = self.tree.contents(file).entries if file else ()
        missing = [entry for entry in entries if entry.error and entry.error.kind == "missing_file"]
        if not file or not missing:
            return self.records(subset, "test"), ()
        skip = {(file.path.name, entry.name) for entry in missing}
        records = checked_records(self.tree.contents(file), self._config.max_pixels, skip)
        ids = tuple(entry.record.id if entry.record else entry.name for entry in missing)
        return self._set(records, subset, "test"), ids

    def _set(self, records: list[Record], subset: str, split: Split) -> RecordSet:
        """Those records that the caps leave, with their images."""
        records = [records[index] for index in capped(records, self._config, subset, split)]
        return RecordSet(records, [TreeImage(self.tree.root, record.image, self._config) for record in records])

    def fingerprint(self) -> str:
        """A digest of the choice files, of their images' names, sizes and way of reading, and of the caps and seed."""
        return self._digest(self.subsets)

    def detection_fingerprint(self) -> str:
        """The same for the detection files."""
        return self._digest(self.detection_subsets)

    def _digest(self, subsets: tuple[Subset, ...]) -> str:
        config, names = self._config, {subset.name for subset in subsets}
        caps = (config.train_records_per_subset, config.test_records_per_subset, config.seed)
        digest = hashlib.sha256(repr((caps, config.window, config.deep_grey, config.frame)).encode())
        for (number, split), file in sorted(self._files.items()):
            if number in names:
                contents = self.tree.contents(file)
                digest.update(f"\n{number} {split} ".encode() + contents.sha256)
                for raw in contents.raws:
                    digest.update(f"\n{_image_bytes(self.tree.root, raw)}".encode())
        for subset in subsets:
            digest.update(repr((subset.name, subset.modality, subset.area, subset.task)).encode())
        return digest.hexdigest()[:16]

    def _subsets(self, detection: bool) -> tuple[Subset, ...]:
        triplets, subsets = self.tree.triplets, []
        for number in sorted({file.number for file in self.tree.files if file.detection == detection}):
            if number not in triplets:
                first = next(file.path for file in self.tree.files if file.number == number)
                reason = f"subset {number} is neither in the tree's manifest.json nor in Med-MAT's table of 53"
                raise ReleaseError(first.name, "", "unknown_subset", reason)
            labels, sizes = self._labels_and_sizes(number)
            train, test = (min(sizes[split], limit_of(self._config, split) or sizes[split]) for split in SPLITS)
            subsets.append(Subset(number, *triplets[number], tuple(sorted(labels)), train, test))
        return tuple(subsets)

    def _labels_and_sizes(self, number: str) -> tuple[set[str], dict[Split, int]]:
        """From the JSON alone if both splits have a file: records are checked when they are used."""
        files = {split: self._files[number, split] for split in SPLITS if (number, split) in self._files}
        if not self._skip and len(files) == len(SPLITS):
            raws = {split: self.tree.contents(file).raws for split, file in files.items()}
            listed = [raw for split in SPLITS for raw in raws[split] if isinstance(raw, dict)]
            if files["train"].detection:
                labels = {label for raw in listed for label in box_labels(raw)}
            else:
                labels = {raw["Answer"] for raw in listed if isinstance(raw.get("Answer"), str)}
            return labels, {split: len(raws[split]) for split in SPLITS}
        records = {split: self._all_records(number, split) for split in SPLITS}
        labels = {label for split in SPLITS for record in records[split] for label in labels_in(record)}
        return labels, {split: len(records[split]) for split in SPLITS}

    def _all_records(self, number: str, split: Split) -> list[Record]:
        """Every record of the split, before the cap."""
        by_split = self._records.setdefault(number, {})
        if split not in by_split:
            if (number, "test") not in self._files:
                by_split |= split_records(self._checked(self._files[number, "train"]))
            else:
                file = self._files.get((number, split))
                by_split[split] = self._checked(file) if file else []
        return by_split[split]

    def _checked(self, file: SubsetFile) -> list[Record]:
        return checked_records(self.tree.contents(file), self._config.max_pixels, self._skip)


def checked_records(contents: Contents, max_pixels: int, skip: Container[tuple[str, str]] = ()) -> list[Record]:
    """All records of a file; boxes are checked against the size in their image's header, and no pixels are decoded.

    skip: (file, record) of records to leave out, as `check` names them.

    Raises:
      ReleaseError: for the first fault: kinds of `tree.Entry`, `image` (size unreadable or above `max_pixels`), `size`,
        `box`, and `box_units` of the file.
    """
    file, records = contents.file, []
    for entry in contents.checked(skip):
        record = entry.record
        if file.detection:
            try:
                size = image_size(entry.path, max_pixels)
            except ImageError as error:
                reason = f"image {record.image!r}: {error}"
                raise ReleaseError(file.path.name, entry.name, "image", reason) from error
            with named(file.path.name, entry.name):
                record = parse_detection(entry.raw, file.number, file.split, size)
        records.append(record)
    if contents.box_units:
        raise contents.box_units
    return records


def split_records(records: list[Record]) -> dict[Split, list[Record]]:
    """Splits 9:1 by patient or lesion where known, else by image; labels keep their shares.

    Args:
      records: of one subset, with training ids.
    """
    labels = rarest_labels([labels_in(record) for record in records])
    groups = [split_group(record.data_no, record.image, record.group) for record in records]
    images = [record.image for record in records]
    sides: dict[Split, list[Record]] = {split: [] for split in SPLITS}
    for record, is_test in zip(records, train_test_split(list(zip(images, labels, groups))), strict=True):
        if is_test:
            number = record.id.rpartition("/")[2]
            record = dataclasses.replace(record, id=f"{record.subset}/test/{number}")
        sides["test" if is_test else "train"].append(record)
    return sides


def _image_bytes(root: Path, raw: Any) -> str:
    """`path bytes` of a record's image; `path -` for a missing one, which is refused when its subset is read."""
    relative: Any = raw.get("image") if isinstance(raw, dict) else None
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

    def kept_hashes(self) -> None:
        return None

    def _as_it_is(self) -> tuple[str, int, int]:
        """(path, bytes, time of the last change): the cache key of a file."""
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
