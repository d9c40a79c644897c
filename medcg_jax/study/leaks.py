"""The guard against leaks: no cell is trained on what it is tested on, neither a subset nor a single image.

Tables are expanded so that this holds; the guard holds it against faults of the expansion, hand-made cells, and trees
in which a test image lies in training under another name, id or subset.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from medcg_jax.data.records import DataError, RecordSet, Source, Split, Subset
from medcg_jax.run_config import ConfigError
from medcg_jax.study import mat
from medcg_jax.study.suite import Cell, paper_row


@dataclass(frozen=True)
class Leak:
    """A training record that gives a test record away, and why: "the same id" or "the same image"."""

    training: str
    test: str
    why: str


@dataclass(frozen=True)
class Prints:
    """What records are recognised by: their ids in order, and sha256 of an image -> the first record that has it."""

    ids: tuple[str, ...]
    images: Mapping[bytes, str]


def prints(records: RecordSet) -> Prints:
    """The prints of a set; every image is read once, none is decoded where it lies in a file.

    Raises:
      DataError: an image cannot be read.
    """
    places = [i for i, record in enumerate(records.records) if record.image]
    images: dict[bytes, str] = {}
    with ThreadPoolExecutor() as pool:
        for place, digest in zip(places, pool.map(records.image_digest, places), strict=True):
            images.setdefault(digest, records.records[place].id)
    return Prints(tuple(record.id for record in records.records), images)


def find_leak(training: Prints, test: Prints) -> Leak | None:
    """The first training record that has the id or the image of a test record; linear in both."""
    known = set(test.ids)
    for name in training.ids:
        if name in known:
            return Leak(name, name, "the same id")
    for digest, name in training.images.items():
        if digest in test.images:
            return Leak(name, test.images[digest], "the same image")
    return None


def find_leaks(training: Sequence[RecordSet], tests: Sequence[RecordSet]) -> Leak | None:
    """The first leak from one of the training sets to one of the test sets, in their order; None: there is none."""
    test_prints = [prints(records) for records in tests]
    for own in map(prints, training):
        for test in test_prints:
            if leak := find_leak(own, test):
                return leak
    return None


def check_cell(cell: Cell, subsets: Mapping[str, Subset]) -> None:
    """Holds a cell's training subsets against its targets.

    A cell that may not see its targets (`Cell.sees_target`) is trained neither on one nor on another subset of a
    target's whole triplet. The paper's own rows and its split of tables 1 and 2 have some of the latter (28 and 30 both
    count as X-ray, Lung, Diseases by `mat.TASKS`), and are let through as they are printed.

    subsets: by name, those of the cell.

    Raises:
      ConfigError: it is; the message names the cell and the subset.
    """
    if cell.sees_target:
        return
    for name in cell.related:
        for target in cell.target:
            if name == target:
                raise ConfigError(f"{cell.id}: its training set holds subset {name}, which it is tested on")
            whole = len(mat.shared(subsets[name], subsets[target])) == len(mat.ELEMENTS)
            if whole and not _is_published(cell, name, target):
                raise ConfigError(
                    f"{cell.id}: its training set holds subset {name}, which has modality, area and task of subset "
                    f"{target}, which it is tested on"
                )


def _is_published(cell: Cell, name: str, target: str) -> bool:
    """Whether the paper itself trains on subset `name` for this target in the cell's row."""
    if cell.row.startswith("out_of_distribution"):
        inside, outside = mat.paper_split()
        return name in inside and target in outside
    table, number = paper_row(cell.row) or (0, 0)
    row = next((row for row in mat.paper_rows(table) if row.row == number), None)
    return row is not None and cell.arm == "trained" and name in row.related and target == row.target


class LeakGuard:
    """Checks the cells of one source, each subset's records hashed once however many cells have it.

        guard = LeakGuard(setup.source)
        for cell in job.cells:
            guard.check(cell)

    All records of a training subset are looked at, also where a cell takes a part of them: a tree that leaks is to be
    mended. Cells that may see their target are trained on its training records, never on a test image.
    """

    def __init__(self, source: Source):
        self._source = source
        self._subsets = {subset.name: subset for subset in source.subsets}
        self._prints: dict[tuple[str, Split], Prints] = {}
        self._found: dict[tuple[str, str], Leak | None] = {}

    def check(self, cell: Cell) -> None:
        """Refuses a cell that is trained on a subset that it may not see, or on a record of its tests.

        Raises:
          ConfigError: a subset; the message names the cell and the subset.
          DataError: a record; the message names the cell, the training record and the test record. Or the data cannot
            be read.
        """
        names = {*cell.related, *cell.target}
        if not names <= set(self._subsets):  # detection files are looked at where a cell has some, and only there
            self._subsets |= {subset.name: subset for subset in self._source.detection_subsets}
        check_cell(cell, self._subsets)
        for name in cell.related:
            for target in cell.target:
                if leak := self._leak(name, target):
                    raise DataError(
                        f"{cell.id}: training record {leak.training} has {leak.why} as test record {leak.test}; "
                        "take one of them out of the tree (`medcg data check` lists all)"
                    )

    def _leak(self, name: str, target: str) -> Leak | None:
        if (name, target) not in self._found:
            self._found[name, target] = find_leak(self._prints_of(name, "train"), self._prints_of(target, "test"))
        return self._found[name, target]

    def _prints_of(self, subset: str, split: Split) -> Prints:
        if (subset, split) not in self._prints:
            self._prints[subset, split] = prints(self._source.records(subset, split))
        return self._prints[subset, split]
