"""The records of a batch laid several to a row, so that less of a step is spent on padding.

A packed row has its records one behind the other, numbered 1, 2, ... by `segment_ids`: each attends to its own tokens
and counts its own positions, so a batch's loss and gradients are those of the same batch with one record a row. All
sizes are static, and found before the first step: the batches of a run are known (`pipeline.draws`), and all fit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from medcg_jax.data.encoding import Encoded
from medcg_jax.data.records import DataError

Batch = dict[str, np.ndarray]

TARGET_KEYS = ("target_positions", "targets", "target_weights")


@dataclass(frozen=True)
class RowShape:
    """Sizes of a packed batch, the same of every batch of a run.

    Attributes:
      rows: of the global batch.
      length: tokens of a row, padding included.
      images: places for images that a row has. They belong to the row, so that where a batch is split over devices no
        image's features leave theirs.
      targets: places for supervised positions that a row has.
    """

    rows: int
    length: int
    images: int
    targets: int


@dataclass(frozen=True)
class Sizes:
    """What each record takes of a row: int[N] tokens, images (0 or 1) and supervised positions."""

    length: np.ndarray
    images: np.ndarray
    targets: np.ndarray

    def of(self, indices: np.ndarray) -> Sizes:
        return Sizes(self.length[indices], self.images[indices], self.targets[indices])


def sizes(encoded: Encoded) -> Sizes:
    images = np.asarray([bool(record.image) for record in encoded.records.records], np.int64)
    targets = (encoded.arrays["target_weights"] > 0).sum(axis=1)
    return Sizes(encoded.arrays["length"].astype(np.int64), images, targets)


def lay_out(sizes: Sizes, rows: int, images: int) -> np.ndarray:
    """int[n, B]: the row of each record of n batches, of sizes int[n, B] each.

    The longest first, each to the row that is shortest so far and has a place for its image (of equal ones the first):
    the longest row is at most 4/3 of what it need be where images do not bind (Graham 1969). It depends on the sizes of
    the batch alone.

    Raises:
      ValueError: a batch has more images than all rows have places.
    """
    if (sizes.images.sum(axis=1) > rows * images).any():
        raise ValueError(f"{sizes.images.sum(axis=1).max()} images for {rows} rows of {images}")
    every, found = np.arange(len(sizes.length)), np.zeros_like(sizes.length)
    filled, seen = (np.zeros((len(every), rows), np.int64) for _ in range(2))
    for place in np.argsort(-sizes.length, axis=1, kind="stable").T:
        image = sizes.images[every, place]
        full = (seen >= images) & (image[:, None] > 0)
        row = np.where(full, np.iinfo(np.int64).max, filled).argmin(axis=1)
        filled[every, row] += sizes.length[every, place]
        seen[every, row] += image
        found[every, place] = row
    return found


def choose(
    sizes: Sizes, batches: np.ndarray, *, unit: int, multiple: int, cost: Callable[[RowShape], float]
) -> RowShape:
    """The cheapest shape that all of these batches fit; one record a row where nothing is cheaper.

    sizes: of the run's records. batches: int[n, B] records of each of its batches (`pipeline.draws`).
    unit: what the number of rows must be a multiple of. multiple: the same of a row's length; 0: any.
    cost: of a step at this shape, in any unit.
    """
    batch_size, of_batches = batches.shape[1], sizes.of(batches)
    most_images = int(of_batches.images.sum(axis=1).max())
    found = []
    for rows in range(batch_size, 0, -1):
        # Never more places than records: the tower runs on each place.
        images = max(1, -(-most_images // rows))
        if rows % unit or rows * images > batch_size:
            continue
        layout = lay_out(of_batches, rows, images)
        length, targets = (int(_sums(layout, taken, rows).max()) for taken in (of_batches.length, of_batches.targets))
        length = -(-length // (multiple or 1)) * (multiple or 1)
        found.append(RowShape(rows, length, images, targets))
    return min(found, key=cost)


def _sums(layout: np.ndarray, taken: np.ndarray, rows: int) -> np.ndarray:
    """int[n, R]: the sums of taken[n, B] over each row's records."""
    return np.stack([(taken * (layout == row)).sum(axis=1) for row in range(rows)], axis=1)


class Packer:
    """Packed batches of encoded records, all of one shape.

    Raises:
      DataError: rows have more than tokens, targets and images.
    """

    def __init__(self, encoded: Encoded, shape: RowShape):
        others = set(encoded.arrays) - {"tokens", "length", *TARGET_KEYS}
        if others or encoded.masks:
            what = ", ".join(sorted(others)) or "masks"
            raise DataError(f"data.pack=1: 0 is accepted of rows that have {what}")
        self.shape, self._encoded, self._sizes = shape, encoded, sizes(encoded)

    def rows(self, indices: np.ndarray, rows: np.ndarray) -> tuple[Batch, list[str]]:
        """These rows of the batch of these records, and the ids of the records in them; only their images are read.

        Batch keys as `Encoded.rows`, for r rows: `tokens` (0 on padding) and `segment_ids` int32[r, length];
        `target_positions`, `targets`, `target_weights` [r, targets]; the format's images [r, images, ...], those of
        a row's records in their order, zeros behind them. Records of a row stand in the batch's order.

        Raises:
          DataError: the records do not fit: they are no batch that the shape was chosen for.
        """
        shape, taken = self.shape, self._sizes.of(indices)
        try:
            layout = lay_out(self._sizes.of(indices[None]), shape.rows, shape.images)[0]
        except ValueError as error:
            raise DataError(f"a batch does not fit {shape}: {error}") from error
        members = [np.flatnonzero(layout == row) for row in rows]
        drawn, ids = self._encoded.rows(indices[np.concatenate(members)])
        batch = self._empty(len(rows))
        place = 0
        for row, own in enumerate(members):
            tokens, targets = int(taken.length[own].sum()), int(taken.targets[own].sum())
            if tokens > shape.length or targets > shape.targets:
                raise DataError(f"a batch does not fit {shape}: {tokens} tokens, {targets} targets in row {rows[row]}")
            token = target = image = 0
            for number, one in enumerate(own, start=1):
                length, count = int(taken.length[one]), int(taken.targets[one])
                batch["tokens"][row, token : token + length] = drawn["tokens"][place, :length]
                batch["segment_ids"][row, token : token + length] = number
                supervised = drawn["target_weights"][place] > 0
                for key in TARGET_KEYS:
                    batch[key][row, target : target + count] = drawn[key][place, supervised]
                batch["target_positions"][row, target : target + count] += token
                if taken.images[one]:
                    for key in self._encoded.format.blank:
                        batch[key][row, image] = drawn[key][place, 0]
                    image += 1
                token, target, place = token + length, target + count, place + 1
        return batch, ids

    def _empty(self, rows: int) -> Batch:
        shape, arrays = self.shape, self._encoded.arrays
        return {
            "tokens": np.zeros((rows, shape.length), np.int32),
            "segment_ids": np.zeros((rows, shape.length), np.int32),
            **{key: np.zeros((rows, shape.targets), arrays[key].dtype) for key in TARGET_KEYS},
            **{k: np.zeros((rows, shape.images, *a.shape), a.dtype) for k, a in self._encoded.format.blank.items()},
        }
