"""Which records are trained on, which are tested on, and how many: 9:1 by patient, and caps that balance labels.

Source of both rules, and of what is out of distribution: a digest of the published version of arXiv 2412.20070.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from medcg_jax.config import DataConfig
from medcg_jax.data import catalogue
from medcg_jax.data.records import Record, Split, Subset

Item = TypeVar("Item")

# "9:1 where no split existed".
TEST_FRAC = 0.1
# "At most 3,000 label-balanced training records per subset"; a subset with fewer is one to test on alone.
FULL_SUBSET = 3000
# Sets of labels that units are exchanged by, at most, where patients do not come out at 9:1 by themselves.
_MAX_KINDS = 500


@dataclass
class _Unit:
    """Images that stay on one side: a patient's, or one image by itself. `names` decide its place in the order."""

    names: set[str] = field(default_factory=set)
    counts: Counter[str] = field(default_factory=Counter)

    def digest(self) -> bytes:
        return hashlib.sha256("\n".join(sorted(self.names)).encode()).digest()


def train_test_split(items: Sequence[tuple[str, str, str]], test_frac: float = TEST_FRAC) -> list[bool]:
    """Whether each item is tested on; decided by digests of names, so the same whatever the seed and the order.

    An image, and all that is in its group, goes one way. Of the images of each label (an image's is that of its first
    item) a share of `test_frac`, rounded, goes to the test: exactly where there are no groups; with groups so near that
    no one of them moved to the other side, and no two exchanged, bring it nearer (sum over labels of images too many or
    too few).

    Args:
      items: (image, label, group); group: its patient or lesion, "" where that is not known.
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
        # A unit with a group is called by it: by its images, one with many would come early, and so be tested on.
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
    """Of each item's labels the one that the fewest items have, the first of equals; "" of an item without any."""
    counts = Counter(label for item in labels for label in item)
    return [min(item, key=lambda label: (counts[label], label), default="") for item in labels]


def balanced(labels: Sequence[str], limit: int, seed: int) -> list[int]:
    """Places of at most `limit` items in their order, as many of each label as its number and the others' allow.

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
    """Places of the records of a subset that the configuration's caps leave, labels balanced, drawn by its seed."""
    key = hashlib.sha256(f"{config.seed}/{subset}/{split}".encode()).digest()[:8]
    return balanced([labels_of(record) for record in records], limit_of(config, split), int.from_bytes(key, "big"))


def limit_of(config: DataConfig, split: Split) -> int:
    """How many records of a subset are taken at most; 0: all."""
    return config.train_records_per_subset if split == "train" else config.test_records_per_subset


def labels_of(record: Record) -> str:
    """What a cap balances: the right option, or all labels of a record's boxes."""
    return "+".join(labels_in(record))


def labels_in(record: Record) -> list[str]:
    """The right option, or the labels of a record's boxes, each once, sorted."""
    return [record.label] if record.options else sorted({box.label for box in record.boxes})


def is_out_of_distribution(subset: Subset, limit: int = FULL_SUBSET) -> bool:
    """Whether a subset has too few training records to be trained on in the study, and is one of its tests alone."""
    return subset.num_train < limit


def split_group(data_no: str, image: str, group: str = "") -> str:
    """The patient or lesion of an image, apart from those that another dataset numbers alike; "" where it is not known.

    group: what its record says; without it, what its path does by the catalogue.
    """
    name = group or catalogue.group_of(data_no, image)
    return f"{data_no}/{name}" if name else ""


def group_key(record: Record) -> str:
    """What tells whether two records, of any subsets, show one patient or lesion: equal keys; "" where it is not known.

    The group is the one that the record states or, without it, its file name by the catalogue. A name holds within one
    data set (`data_no`): "patient 7" of another data set is somebody else. Data sets that share images and number their
    patients alike (`catalogue.numbering`) count as one here; so do all records without a `data_no`.
    """
    name = record.group or catalogue.group_of(record.data_no, record.image)
    return f"{catalogue.numbering(record.data_no)}/{name}" if name else ""


def shared_groups(
    training: Iterable[Item], test: Iterable[Item], key: Callable[[Item], str] = group_key
) -> dict[str, tuple[list[Item], list[Item]]]:
    """Key of each patient or lesion on both sides -> (its training items, its test items), most tested first.

    Args:
      training, test: records; or anything of which `key` says whom it shows ("": not known, shared by none).
    """
    sides: dict[str, tuple[list[Item], list[Item]]] = {}
    for side, items in enumerate((training, test)):
        for item in items:
            if name := key(item):
                sides.setdefault(name, ([], []))[side].append(item)
    shared = [(name, both) for name, both in sides.items() if all(both)]
    return dict(sorted(shared, key=lambda item: (-len(item[1][1]), item[0])))


def _joined(items: Sequence[tuple[str, str, str]], images: dict[str, int], groups: dict[str, int]) -> list[int]:
    """The number of the unit of each image and group: what is linked, by any chain of both, is one."""
    if not groups:
        return list(range(len(images)))
    from scipy.sparse import coo_array  # most runs split nothing, and start sooner without it
    from scipy.sparse.csgraph import connected_components

    links = {(images[image], groups[group]) for image, _, group in items if group}
    size = len(images) + len(groups)
    rows, columns = zip(*links, strict=True) if links else ((), ())
    graph = coo_array((np.ones(len(links), bool), (rows, columns)), shape=(size, size))
    return connected_components(graph, directed=False)[1].tolist() if size else []


def _nearest(counts: np.ndarray, target: np.ndarray) -> np.ndarray:
    """bool[U]: units, taken in their order, whose counts add up to nearly `wanted`.

    Args:
      counts: int[U, L] images of each label in each unit. wanted: int[L].
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
    """Places of a unit to move, or of two to exchange, so that less is missing or too much; [] where none helps."""
    nothing = np.zeros((1, counts.shape[1]), np.int64)
    inside, outside = np.flatnonzero(chosen), np.flatnonzero(~chosen)
    # Units of equal counts are as good as each other: the first of each kind is looked at.
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
    """(int[K, L], int[K]): the different counts of the units at these places, and the first unit that has each."""
    _, first = np.unique(counts[rows], axis=0, return_index=True)
    first = rows[np.sort(first)[:_MAX_KINDS]]
    return counts[first], first
