"""The guard against leaks: no cell is trained on what it is tested on, neither a subset nor an image nor a patient.

The expansion of tables already avoids this. The guard catches faults of the expansion, hand-made cells, general
records, and trees where a training image is a test image (under another name, id or subset, saved again, or nearly the
same) or of a test patient. `data.leaks` finds the leaks; this module decides what happens to them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from medcg_jax.config import ConfigError, StudyConfig
from medcg_jax.data import catalogue
from medcg_jax.data.duplicates import ImageHashes
from medcg_jax.data.general import SUBSET as GENERAL
from medcg_jax.data.leaks import KINDS, Hashed, Leak, actions_of, actions_of_general, find_leaks, hashed, remedy, words
from medcg_jax.data.records import DataError, RecordSet, Source, Split, Subset
from medcg_jax.study.design import mat
from medcg_jax.study.design.suite import Cell


@dataclass(frozen=True)
class Finding:
    """A leak in a cell, and the action against it: one of `data.leaks.ACTIONS`' values."""

    cell: str
    leak: Leak
    action: str


def check_cell(cell: Cell, subsets: Mapping[str, Subset]) -> None:
    """Checks a cell's training subsets against its targets.

    A cell that may not see its targets (`Cell.sees_target`) may train on no target and on no subset with a target's
    whole triplet. The paper's printed rows and its split of tables 1 and 2 have some of the latter (28 and 30 both
    count as X-ray, Lung, Diseases); these pass.

    subsets: name -> subset, of at least the cell's.

    Raises:
      ConfigError: the cell trains on one; the message names the cell and the subset.
    """
    if cell.sees_target:
        return
    for name in cell.related:
        for target in cell.target:
            if name == target:
                raise ConfigError(f"{cell.id}: its training set holds subset {name}, which it is tested on")
            same_triplet = len(mat.shared(subsets[name], subsets[target])) == len(mat.ELEMENTS)
            if same_triplet and not _is_published(cell, name, target):
                raise ConfigError(
                    f"{cell.id}: its training set holds subset {name}, which has modality, area and task of subset "
                    f"{target}, which it is tested on"
                )


def _is_published(cell: Cell, name: str, target: str) -> bool:
    """Whether the paper itself trains on subset `name` for this target in the cell's row."""
    if cell.row.part == "out_of_distribution":
        inside, outside = mat.paper_split()
        return name in inside and target in outside
    if cell.row.published is None or cell.arm not in ("trained", "no_images"):  # the same training set
        return False
    table, number = cell.row.published
    return any(r.row == number and name in r.related and target == r.target for r in mat.paper_rows(table))


class LeakGuard:
    """Finds leaks in the cells of one source; each image is hashed once however many cells and subsets have it.

        guard = LeakGuard(setup.source, run.study)
        for cell in job.cells:
            refuse(guard.findings(cell))

    All records of a training subset are compared, even where a cell takes only some of them. Cells that may see their
    target train on its training records, never on a test image or a test patient.

    drawn: the images are drawn for the run, as phantoms are. No image is then a copy of another (no two of 32 subsets
      of the phantom world are within 20 bits), so near images and related datasets are not searched for.
    related: as `catalogue.related_datasets`.
    general: the supply of general records in every training; None: there is none. Their questions are compared with
      the test questions too, and near images are searched for among them whatever the source.
    """

    def __init__(
        self,
        source: Source,
        study: StudyConfig | None = None,
        *,
        drawn: bool = False,
        related: Callable[[str], Mapping[str, str]] = catalogue.related_datasets,
        general: RecordSet | None = None,
    ):
        study = study or StudyConfig()
        self._source, self._related, self._drawn, self._general = source, related, drawn, general
        self._near_bits = study.near_duplicate_bits if study.near_duplicates != "off" else None
        self._actions, self._actions_of_general = actions_of(study), actions_of_general(study)
        self._subsets = {subset.name: subset for subset in source.subsets}
        self._decoded: dict[bytes, ImageHashes] = {}
        self._hashed: dict[tuple[str | None, Split, bool], Hashed] = {}
        self._leaks: dict[tuple[str | None, str], list[Leak]] = {}

    def findings(self, cell: Cell) -> list[Finding]:
        """The leaks from a cell's training records to its tests, sorted by kind, training and test record.

        Raises:
          ConfigError: the cell trains on a subset that it may not see; the message names the cell and the subset.
          DataError: the data cannot be read.
        """
        if not {*cell.related, *cell.target} <= set(self._subsets):
            # Detection files are read only where a cell uses them.
            self._subsets |= {subset.name: subset for subset in self._source.detection_subsets}
        check_cell(cell, self._subsets)
        sides: list[tuple[str | None, dict[str, str]]] = [(name, self._actions) for name in cell.related]
        if self._general is not None and cell.related:
            sides.append((None, self._actions_of_general))
        leaks = {
            (leak, actions[leak.kind])
            for name, actions in sides
            for target in cell.target
            for leak in self._leaks_between(name, target)
        }
        kinds = list(KINDS)

        def order(item: tuple[Leak, str]) -> tuple:
            leak, action = item
            return kinds.index(leak.kind), leak.training, leak.test, action

        return [Finding(cell.id, leak, action) for leak, action in sorted(leaks, key=order)]

    def _leaks_between(self, name: str | None, target: str) -> list[Leak]:
        """The leaks from the training records of a subset (None: the general records) to a target's tests."""
        if (name, target) not in self._leaks:
            is_general = name is None
            bits = self._near_bits if is_general or not self._drawn else None
            training = self._hashed_of(name, "train", decode=bits is not None)
            test = self._hashed_of(target, "test", decode=bits is not None)
            leaks = find_leaks(training, test, bits, questions=is_general)
            if is_general or name != target and not self._drawn:
                # Equal or related datasets on the two sides, named in place of records.
                leaks += [
                    Leak(f"{name or GENERAL} data-no {number}", f"{target} data-no {other}", "lineage")
                    for number in sorted(training.data_numbers)
                    for other in sorted({number, *self._related(number)} & test.data_numbers)
                ]
            self._leaks[name, target] = leaks
        return self._leaks[name, target]

    def _hashed_of(self, name: str | None, split: Split, *, decode: bool) -> Hashed:
        key = name, split, decode
        if key not in self._hashed:
            records = self._general if name is None else self._source.records(name, split)
            assert records is not None  # None as a name stands for general records that exist
            self._hashed[key] = hashed(records, self._decoded if decode else None)
        return self._hashed[key]


def refuse(findings: Sequence[Finding]) -> None:
    """Raises DataError for the first refused finding; the message names its cell and both records."""
    for finding in findings:
        if finding.action == "refused":
            raise DataError(f"{finding.cell}: {words(finding.leak)}; {remedy(finding.leak)}")


def dropped(findings: Sequence[Finding]) -> frozenset[str]:
    """Ids of the training records to leave out."""
    return frozenset(finding.leak.training for finding in findings if finding.action == "dropped")


def relevant(findings: Sequence[Finding], taken: Mapping[str, frozenset[str]]) -> list[Finding]:
    """The findings on records that a training takes, those that are refused, and those on whole datasets.

    taken: subset -> ids of its records in the training.
    """
    ids = frozenset().union(*taken.values())
    return [f for f in findings if f.leak.training in ids or f.action == "refused" or f.leak.kind == "lineage"]
