"""The guard against leaks: no cell is trained on what it is tested on, neither a subset nor a single image.

Tables are expanded so that this holds; the guard holds it against faults of the expansion, hand-made cells, and trees
in which a test image lies in training under another name, id or subset, saved anew, or nearly the same.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from medcg_jax.data import catalogue
from medcg_jax.data.duplicates import Print, hash_rows, print_of
from medcg_jax.data.hamming import FORMS, near_pairs_between
from medcg_jax.data.records import DataError, RecordSet, Source, Split, Subset
from medcg_jax.run_config import ConfigError, StudyConfig
from medcg_jax.study import mat
from medcg_jax.study.suite import Cell, paper_row

# What a record gives away by -> how a message says it, from the surest.
KINDS = {
    "same id": "the same id as",
    "same bytes": "the same image as",
    "same pixels": "the pixels of",
    "near": "an image nearly that of",
    "lineage": "a dataset in common with, or related to that of,",
}
ACTIONS = {"refuse": "refused", "drop": "dropped", "report": "reported"}


@dataclass(frozen=True)
class Leak:
    """A training record that gives a test record away. kind: of `KINDS`; distance_bits: of their hashes where near.

    form: of `hamming.FORMS`: what of the test's image the near one is, such as "mirrored"."""

    training: str
    test: str
    kind: str
    distance_bits: int = 0
    form: str = ""


@dataclass(frozen=True)
class Finding:
    """A leak in a cell, and what is done about it: one of `ACTIONS`' values."""

    cell: str
    leak: Leak
    action: str


@dataclass(frozen=True)
class Prints:
    """What the records of a set are recognised by, in its order; None for a record without an image."""

    ids: tuple[str, ...]
    images: tuple[Print | None, ...]
    data_numbers: frozenset[str]


def prints(records: RecordSet, decoded: dict[bytes, Print] | None = None) -> Prints:
    """The prints of a set, every image read once.

    decoded: prints of images by their digest, which is added to; images that are not in it are decoded and hashed.
    None: no image that lies in a file is decoded, and each is recognised by its bytes alone.

    Raises:
      DataError: an image cannot be read or decoded.
    """
    places = [i for i, record in enumerate(records.records) if record.image]
    with ThreadPoolExecutor() as pool:
        digests = dict(zip(places, pool.map(records.image_digest, places), strict=True))
        known = {digest: Print(digest) for digest in digests.values()} if decoded is None else decoded
        new = {digest: place for place, digest in digests.items() if digest not in known}
        made = pool.map(lambda one: print_of(records.image(one[1]), one[0]), new.items())
        known |= dict(zip(new, made, strict=True))
    images = tuple(known[digests[i]] if i in digests else None for i in range(len(records)))
    ids = tuple(record.id for record in records.records)
    return Prints(ids, images, frozenset(record.data_no for record in records.records if record.data_no))


def find_leaks(training: Prints, test: Prints, near_bits: int | None = None) -> list[Leak]:
    """Every training record that gives a test record away, once, by what is surest, and by its nearest test record.

    near_bits: bits of 256 in which the hashes of near images differ at most; None: these are not looked for.
    """
    known = set(test.ids)
    files, pixels = _first(test, "file"), _first(test, "pixels")
    near = {} if near_bits is None else _nearest(training, test, near_bits)
    found = []
    for place, (name, own) in enumerate(zip(training.ids, training.images, strict=True)):
        if name in known:
            found.append(Leak(name, name, "same id"))
        elif own and own.file in files:
            found.append(Leak(name, files[own.file], "same bytes"))
        elif own and own.pixels in pixels:
            found.append(Leak(name, pixels[own.pixels], "same pixels"))
        elif place in near:
            distance, other, form = near[place]
            found.append(Leak(name, test.ids[other], "near", distance, FORMS[form]))
    return found


def _first(records: Prints, field: str) -> dict[bytes, str]:
    """Digest -> the first record that has it."""
    found: dict[bytes, str] = {}
    for name, own in zip(records.ids, records.images, strict=True):
        if own and getattr(own, field):
            found.setdefault(getattr(own, field), name)
    return found


def _nearest(training: Prints, test: Prints, bits: int) -> dict[int, tuple[int, int, int]]:
    """Place in training -> (bits apart, place in test, place in `FORMS`) of the nearest test image within `bits`."""
    (own, a), (others, b) = (hash_rows(one or Print(b"") for one in part.images) for part in (training, test))
    found: dict[int, tuple[int, int, int]] = {}
    for i, j, apart, form in zip(*(part.tolist() for part in near_pairs_between(a, b, bits)), strict=True):
        place, one = int(own[i]), (apart, int(others[j]), form)
        found[place] = min(found.get(place, one), one)
    return found


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


def related_datasets(number: str) -> Mapping[str, str]:
    """Datasets (`data-no`) that share images with one, or may -> why; {} of one that the catalogue does not list."""
    try:
        return catalogue.related_datasets(number)
    except DataError:  # a dataset of the user's own
        return {}


class LeakGuard:
    """Looks for leaks in the cells of one source, each image hashed once however many cells and subsets have it.

        guard = LeakGuard(setup.source, run.study)
        for cell in job.cells:
            refuse(guard.look(cell))

    All records of a training subset are looked at, also where a cell takes a part of them. Cells that may see their
    target are trained on its training records, never on a test image.

    drawn: the images are drawn for the run, as phantoms are. None is a copy of another then (no two of 32 subsets of
    the phantom world are within 20 bits): neither near ones nor related datasets are looked for.
    related: as `related_datasets`.
    """

    def __init__(
        self, source: Source, study: StudyConfig = StudyConfig(), *, drawn: bool = False,
        related: Callable[[str], Mapping[str, str]] = related_datasets,
    ):  # fmt: skip
        self._source, self._related, self._drawn = source, related, drawn
        near = study.near_duplicates
        self._near_bits = study.near_duplicate_bits if near != "off" and not drawn else None
        self._actions = dict.fromkeys(("same bytes", "same pixels"), ACTIONS[study.leaks])
        # A fault of the expansion, and what no record is to blame for.
        self._actions |= {"same id": "refused", "near": ACTIONS.get(near, ""), "lineage": "reported"}
        self._subsets = {subset.name: subset for subset in source.subsets}
        self._decoded: dict[bytes, Print] | None = None if self._near_bits is None else {}
        self._prints: dict[tuple[str, Split], Prints] = {}
        self._found: dict[tuple[str, str], list[Leak]] = {}

    def look(self, cell: Cell) -> list[Finding]:
        """What a cell's training subsets give away of its tests; by kind, training and test record.

        Raises:
          ConfigError: it is trained on a subset that it may not see; the message names the cell and the subset.
          DataError: the data cannot be read.
        """
        names = {*cell.related, *cell.target}
        if not names <= set(self._subsets):  # detection files are looked at where a cell has some, and only there
            self._subsets |= {subset.name: subset for subset in self._source.detection_subsets}
        check_cell(cell, self._subsets)
        found = {leak for name in cell.related for target in cell.target for leak in self._leaks(name, target)}
        order = list(KINDS)
        return [
            Finding(cell.id, leak, self._actions[leak.kind])
            for leak in sorted(found, key=lambda leak: (order.index(leak.kind), leak.training, leak.test))
        ]

    def _leaks(self, name: str, target: str) -> list[Leak]:
        if (name, target) not in self._found:
            training, test = self._prints_of(name, "train"), self._prints_of(target, "test")
            self._found[name, target] = find_leaks(training, test, self._near_bits)
            if name != target and not self._drawn:
                self._found[name, target] += self._lineage(name, training, target, test)
        return self._found[name, target]

    def _lineage(self, name: str, training: Prints, target: str, test: Prints) -> list[Leak]:
        """The datasets that two subsets have in common, or that are related; named in place of records."""
        found = []
        for number in sorted(training.data_numbers):
            for other in sorted({number, *self._related(number)} & test.data_numbers):
                found.append(Leak(f"{name} data-no {number}", f"{target} data-no {other}", "lineage"))
        return found

    def _prints_of(self, subset: str, split: Split) -> Prints:
        if (subset, split) not in self._prints:
            self._prints[subset, split] = prints(self._source.records(subset, split), self._decoded)
        return self._prints[subset, split]


def refuse(found: Sequence[Finding]) -> None:
    """Raises DataError when one of the findings is refused; it names the first one's cell and both its records."""
    for one in found:
        if one.action == "refused":
            leak, form = one.leak, f", {one.leak.form}" if one.leak.form else ""
            apart = f" ({leak.distance_bits} of 256 bits apart{form})" if leak.kind == "near" else ""
            raise DataError(
                f"{one.cell}: training record {leak.training} has {KINDS[leak.kind]} test record {leak.test}{apart}; "
                "take one of them out of the tree (`medcg data check` lists all)"
            )


def dropped(found: Sequence[Finding]) -> frozenset[str]:
    """The training records that are left out."""
    return frozenset(one.leak.training for one in found if one.action == "dropped")


def among(found: Sequence[Finding], taken: Mapping[str, frozenset[str]]) -> list[Finding]:
    """Those of records that a training takes, those that are refused, and those of whole datasets.

    taken: subset -> ids of the records taken of it.
    """
    every = frozenset().union(*taken.values())
    return [one for one in found if one.leak.training in every or one.action == "refused" or one.leak.kind == "lineage"]
