"""Training and test records: the 9:1 split by patient, and caps that balance labels.

Source of both rules, and of the definition of out of distribution: a digest of the published arXiv 2412.20070.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from medcg_jax.config import DataConfig
from medcg_jax.data import catalogue
from medcg_jax.data.records import Record, Split, Subset

Item = TypeVar("Item")

# "9:1 where no split existed".
TEST_FRAC = 0.1
# "At most 3,000 label-balanced training records per subset"; a subset with fewer is only tested on.
FULL_SUBSET = 3000
# Bound on the kinds of units tried for exchanges where patients do not come out at 9:1 by themselves.
_MAX_KINDS = 500


@dataclass
class _Unit:
    """Images that stay on one side: a patient's, or a single image. The digest of `names` decides the order of units."""

    names: set[str] = field(default_factory=set)
    counts: Counter[str] = field(default_factory=Counter)

    def digest(self) -> bytes:
        return hashlib.sha256("\n".join(sorted(self.names)).encode()).digest()


def train_test_split(items: Sequence[tuple[str, str, str]], test_frac: float = TEST_FRAC) -> list[bool]:
    """Whether each item is tested on; digests of names decide, so neither the seed nor the order matters.

    All images of a group are on one side. Of the images of each label (the label of an image's first item) a share of
    `test_frac`, rounded, goes to the test: exactly without groups; with groups so nearly that neither moving one unit
    nor exchanging two would reduce the sum over labels of missing and surplus images.

    Args:
      items: (image, label, group); group: patient or lesion, "" if unknown.
    """
    images = {image: node for node, image in enumerate(dict.fromkeys(image for image, _, _ in items))}
    label_of: dict[str, str] = {}
    groups: dict[str, int] = {}
    for image, label, group in items:
        label_of.setdefault(image, label)
        if group:
            groups.setdefault(group, len(images) + len(groups))
    unit_of = _joined(items, images, groups)
    units: dict[int, _Unit] = {}
    for group, node in groups.items():
        units.setdefault(unit_of[node], _Unit()).names.add(group)
    for image, node in images.items():
        # A unit with a group is named by the group alone, so that its number of images does not affect its digest.
        unit = units.setdefault(unit_of[node], _Unit({image}))
        unit.counts[label_of[image]] += 1
    labels = {label: column for column, label in enumerate(sorted(set(label_of.values())))}
    ordered = sorted(units, key=lambda node: units[node].digest())
    counts = np.zeros((len(ordered), len(labels)), np.int64)
    for row, node in enumerate(ordered):
        for label, number in units[node].counts.items():
            counts[row, labels[label]] = number
    target = np.array([round(number * test_frac) for number in counts.sum(0).tolist()], np.int64)
    tested = dict(zip(ordered, _nearest(counts, target).tolist(), strict=True))
    return [tested[unit_of[images[image]]] for image, _, _ in items]


def rarest_labels(labels: Sequence[Sequence[str]]) -> list[str]:
    """For each item, that of its labels which the fewest items have, the first of equals; "" without labels."""
    counts = Counter(label for item in labels for label in item)
    return [min(item, key=lambda label: (counts[label], label), default="") for item in labels]


def balanced(labels: Sequence[str], limit: int, seed: int) -> list[int]:
    """Rising indices of at most `limit` items, with labels as balanced as their numbers allow.

    Example: 10 of a, 2 of b and 10 of c, limit 12 -> 5 a, 2 b, 5 c.
    """
    if not 0 < limit < len(labels):
        return list(range(len(labels)))
    generator = np.random.default_rng(seed)
    counts = sorted(Counter(labels).items(), key=lambda item: (item[1], item[0]))
    chosen: list[int] = []
    for done, (label, count) in enumerate(counts):
        share = min(count, (limit - len(chosen)) // (len(counts) - done))
        indices = [index for index, other in enumerate(labels) if other == label]
        chosen += generator.permutation(indices)[:share].tolist()
    return sorted(chosen)


def capped(records: Sequence[Record], config: DataConfig, subset: str, split: Split) -> list[int]:
    """Indices of a subset's records within the configuration's cap, labels balanced, drawn by the seed."""
    key = hashlib.sha256(f"{config.seed}/{subset}/{split}".encode()).digest()[:8]
    return balanced([labels_of(record) for record in records], limit_of(config, split), int.from_bytes(key, "big"))


def limit_of(config: DataConfig, split: Split) -> int:
    """The most records taken of a subset; 0: all."""
    return config.train_records_per_subset if split == "train" else config.test_records_per_subset


def labels_of(record: Record) -> str:
    """The label that a cap balances: the right option, or all labels of the boxes joined by +."""
    return "+".join(labels_in(record))


def labels_in(record: Record) -> list[str]:
    """The right option, or the labels of a record's boxes, each once, sorted."""
    return [record.label] if record.options else sorted({box.label for box in record.boxes})


def is_out_of_distribution(subset: Subset, limit: int = FULL_SUBSET) -> bool:
    """Whether a subset has too few training records for the study to train on it, so that it is only tested on."""
    return subset.num_train < limit


def split_group(data_no: str, image: str, group: str = "") -> str:
    """The patient or lesion of an image, with its dataset's number before it; "" if unknown.

    group: stated by the record; if "", the catalogue derives it from the path.
    """
    name = group or catalogue.group_of(data_no, image)
    return f"{data_no}/{name}" if name else ""


def group_key(record: Record) -> str:
    """A key that is equal for records, of any subsets, that show one patient or lesion; "" if unknown.

    The group is stated by the record, else derived from its file name by the catalogue. It holds within one data set
    (`data_no`): "patient 7" of another data set is somebody else. Data sets that share images and number their patients
    alike (`catalogue.numbering`) count as one here; so do all records without a `data_no`.
    """
    name = record.group or catalogue.group_of(record.data_no, record.image)
    return f"{catalogue.numbering(record.data_no)}/{name}" if name else ""


def shared_groups(
    training: Iterable[Item], test: Iterable[Item], key: Callable[[Any], str] = group_key
) -> dict[str, tuple[list[Item], list[Item]]]:
    """Key of each patient or lesion on both sides -> (training items, test items), most test items first.

    Args:
      training, test: records, or other items with a suitable `key`.
      key: item -> patient or lesion; "" if unknown, which is shared with nobody.
    """
    sides: dict[str, tuple[list[Item], list[Item]]] = {}
    for side, items in enumerate((training, test)):
        for item in items:
            if name := key(item):
                sides.setdefault(name, ([], []))[side].append(item)
    shared = [(name, both) for name, both in sides.items() if all(both)]
    return dict(sorted(shared, key=lambda item: (-len(item[1][1]), item[0])))


def _joined(items: Sequence[tuple[str, str, str]], images: dict[str, int], groups: dict[str, int]) -> list[int]:
    """The unit of each node (image or group): nodes linked through images and groups form one unit."""
    if not groups:
        return list(range(len(images)))
    from scipy.sparse import coo_array  # most runs split nothing, and start faster without it
    from scipy.sparse.csgraph import connected_components

    links = {(images[image], groups[group]) for image, _, group in items if group}
    size = len(images) + len(groups)
    rows, columns = zip(*links, strict=True) if links else ((), ())
    graph = coo_array((np.ones(len(links), bool), (rows, columns)), shape=(size, size))
    return connected_components(graph, directed=False)[1].tolist() if size else []


def _nearest(counts: np.ndarray, target: np.ndarray) -> np.ndarray:
    """bool[U]: units, chosen in order, whose counts add up to nearly `target`.

    Args:
      counts: int[U, L] images of each label in each unit. target: int[L].
    """
    chosen = np.zeros(len(counts), bool)
    missing = target.copy()
    for row, unit in enumerate(counts):
        if not missing.any():
            break
        if np.abs(missing - unit).sum() < np.abs(missing).sum():
            chosen[row] = True
            missing -= unit
    while missing.any() and (move := _better(counts, chosen, missing)):
        for row in move:
            missing += counts[row] if chosen[row] else -counts[row]
            chosen[row] = not chosen[row]
    return chosen


def _better(counts: np.ndarray, chosen: np.ndarray, missing: np.ndarray) -> list[int]:
    """Rows of a unit to move, or of two to exchange, that bring `missing` nearest to 0; [] if none helps."""
    nothing = np.zeros((1, counts.shape[1]), np.int64)
    inside, outside = np.flatnonzero(chosen), np.flatnonzero(~chosen)
    # Units of equal counts are interchangeable: only the first of each kind is tried.
    (out, out_rows), (into, into_rows) = _kinds(counts, inside), _kinds(counts, outside)
    out, into = np.concatenate([nothing, out]), np.concatenate([nothing, into])
    best, move = np.abs(missing).sum(), []
    for row, unit in enumerate(out):
        gaps = np.abs(missing + unit - into).sum(1)
        column = int(gaps.argmin())
        if gaps[column] < best:
            best = gaps[column]
            move = [int(out_rows[row - 1])] * (row > 0) + [int(into_rows[column - 1])] * (column > 0)
    return move


def _kinds(counts: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(int[K, L], int[K]): the distinct counts of these rows, and the first row that has each."""
    _, first = np.unique(counts[rows], axis=0, return_index=True)
    first = rows[np.sort(first)[:_MAX_KINDS]]
    return counts[first], first
