"""General records: questions of four options that are not medical, such as ImageWikiQA's, mixed into every training.

The study mixed them in against the bias of varying numbers of options (page prose about arXiv 2412.20070, figure 3).
They are not in the release, so the user provides the file.
"""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path

import numpy as np

from medcg_jax.config import DataConfig
from medcg_jax.data.records import DataError, Record, RecordSet
from medcg_jax.data.release import TreeImage
from medcg_jax.data.schema import ReleaseError, image_path
from medcg_jax.data.tree import Contents, SubsetFile

SUBSET = "general"
NUM_OPTIONS = 4


def num_general(num_records: int, share: float) -> int:
    """The number of general records added to a training of `num_records`: `share` times as many, rounded."""
    return round(share * num_records)


class GeneralRecords:
    """The checked records of `data.general_records`, from which each training draws some.

    The file is a JSON list with the release's eight keys; `image` is relative to the file's folder, or "" for a question
    without one. Images are decoded on demand.

    Attributes:
      records: all of them, in the file's order.

    Raises:
      DataError: the file cannot be read, or a record is broken or has not four options.
    """

    def __init__(self, config: DataConfig):
        self._config, self._path = config, Path(config.general_records)
        root = Path(os.path.realpath(self._path.parent))
        try:
            records = _checked(Contents(SubsetFile(self._path, SUBSET, "train"), functools.partial(image_path, root)))
        except ReleaseError as error:
            raise DataError(f"data.general_records: {error}") from error
        self.records = RecordSet(records, [TreeImage(root, record.image, config) for record in records])

    def __len__(self) -> int:
        return len(self.records)

    def require(self, num_records: int) -> None:
        """Raises DataError if there are too few for a training of so many records; none is used twice."""
        needed = num_general(num_records, self._config.imagewikiqa_share)
        if needed > len(self):
            raise DataError(
                f"data.general_records={self._config.general_records!r} has {len(self)} records; "
                f"data.imagewikiqa_share={self._config.imagewikiqa_share} of {num_records} wants {needed}"
            )

    def draw(self, training: tuple[tuple[str, int], ...]) -> RecordSet:
        """The general records of one training, drawn without repetition, seeded by `training` and `data.seed`.

        Args:
          training: (subset, number of its records), sorted by name.

        Raises:
          DataError: as `require`.
        """
        num_records = sum(count for _, count in training)
        self.require(num_records)
        key = hashlib.sha256(repr((self._config.seed, training)).encode()).digest()
        order = np.random.default_rng(int.from_bytes(key[:16], "big")).permutation(len(self))
        return self.records.select(sorted(order[: num_general(num_records, self._config.imagewikiqa_share)]))

    def fingerprint(self) -> str:
        """A digest of the file, and of its images' bytes."""
        digest = hashlib.sha256(self._path.read_bytes())
        for index, record in enumerate(self.records.records):
            if record.image:
                digest.update(self.records.image_digest(index))
        return digest.hexdigest()[:16]


def _checked(contents: Contents) -> list[Record]:
    records = []
    for entry in contents.entries:
        number = len(entry.record.options) if entry.record else NUM_OPTIONS
        if number != NUM_OPTIONS:
            reason = f"{number} options; expected {NUM_OPTIONS} of a general record"
            raise ReleaseError(contents.file.path.name, entry.name, "options", reason)
        if entry.error and (entry.record is None or entry.record.image):
            raise entry.error
        records.append(entry.record)
    return records


def open_general(config: DataConfig) -> GeneralRecords | None:
    """The general records of a run; None if `data.imagewikiqa_share` is 0."""
    return GeneralRecords(config) if config.imagewikiqa_share else None
