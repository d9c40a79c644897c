"""The guard against leaks: no cell is trained on what it is tested on, neither a subset nor an image nor a patient.

Tables are expanded so that this holds; the guard holds it against faults of the expansion, hand-made cells, general
records, and trees in which a test image lies in training under another name, id or subset, saved anew, or nearly the
same, or in which images of one patient lie on both sides. `data.leaks` finds, this says what is done.
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
from medcg_jax.study.design.suite import Cell, paper_row


@dataclass(frozen=True)
class Finding:
    """A leak in a cell, and what is done about it: one of `data.leaks.ACTIONS`' values."""

    cell: str
    leak: Leak
    action: str


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
    """Looks for leaks in the cells of one source, each image hashed once however many cells and subsets have it.

        guard = LeakGuard(setup.source, run.study)
        for cell in job.cells:
            refuse(guard.look(cell))

    All records of a training subset are looked at, also where a cell takes a part of them. Cells that may see their
    target are trained on its training records, never on a test image or a patient of its tests.

    drawn: the images are drawn for the run, as phantoms are. None is a copy of another then (no two of 32 subsets of
    the phantom world are within 20 bits): neither near ones nor related datasets are looked for.
    related: as `catalogue.related_datasets`.
    general: the supply of general records that every training has some of; None: there is none. Their questions are
    held against those of the tests too, and near images are looked for among them whatever the source.
    """

    def __init__(
        self,
        source: Source,
        study: StudyConfig = StudyConfig(),
        *,
        drawn: bool = False,
        related: Callable[[str], Mapping[str, str]] = catalogue.related_datasets,
        general: RecordSet | None = None,
    ):
        self._source, self._related, self._drawn, self._general = source, related, drawn, general
        self._near_bits = study.near_duplicate_bits if study.near_duplicates != "off" else None
        self._actions, self._actions_of_general = actions_of(study), actions_of_general(study)
        self._subsets = {subset.name: subset for subset in source.subsets}
        self._decoded: dict[bytes, ImageHashes] = {}
        self._hashed: dict[tuple[str, Split, bool], Hashed] = {}
        self._hashed_general: Hashed | None = None
        self._found: dict[tuple[str, str], list[Leak]] = {}
        self._found_in_general: dict[str, list[Leak]] = {}

    def look(self, cell: Cell) -> list[Finding]:
        """What a cell's trainings give away of its tests; by kind, training and test record.

        Raises:
          ConfigError: it is trained on a subset that it may not see; the message names the cell and the subset.
          DataError: the data cannot be read.
        """
        names = {*cell.related, *cell.target}
        if not names <= set(self._subsets):  # detection files are looked at where a cell has some, and only there
            self._subsets |= {subset.name: subset for subset in self._source.detection_subsets}
        check_cell(cell, self._subsets)
        leaks = {
            (leak, self._actions[leak.kind])
            for name in cell.related
            for target in cell.target
            for leak in self._leaks(name, target)
        }
        if self._general is not None and cell.related:
            leaks |= {
                (leak, self._actions_of_general[leak.kind])
                for target in cell.target
                for leak in self._leaks_of_general(target)
            }
        order = list(KINDS)
        return [
            Finding(cell.id, leak, action)
            for leak, action in sorted(
                leaks, key=lambda item: (order.index(item[0].kind), item[0].training, item[0].test, item[1])
            )
        ]

    def _leaks(self, name: str, target: str) -> list[Leak]:
        if (name, target) not in self._found:
            near_bits = None if self._drawn else self._near_bits
            training, test = (
                self._hashed_of(subset, split, decode=near_bits is not None)
                for subset, split in ((name, "train"), (target, "test"))
            )
            self._found[name, target] = find_leaks(training, test, near_bits)
            if name != target and not self._drawn:
                self._found[name, target] += self._lineage(name, training, target, test)
        return self._found[name, target]

    def _leaks_of_general(self, target: str) -> list[Leak]:
        decode = self._near_bits is not None
        if self._hashed_general is None:
            self._hashed_general = hashed(self._general, self._decoded if decode else None)
        if target not in self._found_in_general:
            training, test = self._hashed_general, self._hashed_of(target, "test", decode)
            leaks = find_leaks(training, test, self._near_bits, questions=True)
            self._found_in_general[target] = leaks + self._lineage(GENERAL, training, target, test)
        return self._found_in_general[target]

    def _lineage(self, name: str, training: Hashed, target: str, test: Hashed) -> list[Leak]:
        """The datasets that two subsets have in common, or that are related; named in place of records."""
        leaks = []
        for number in sorted(training.data_numbers):
            for other in sorted({number, *self._related(number)} & test.data_numbers):
                leaks.append(Leak(f"{name} data-no {number}", f"{target} data-no {other}", "lineage"))
        return leaks

    def _hashed_of(self, subset: str, split: Split, decode: bool) -> Hashed:
        if (subset, split, decode) not in self._hashed:
            records = self._source.records(subset, split)
            self._hashed[subset, split, decode] = hashed(records, self._decoded if decode else None)
        return self._hashed[subset, split, decode]


def refuse(findings: Sequence[Finding]) -> None:
    """Raises DataError when one of the findings is refused; it names the first one's cell and both its records."""
    for finding in findings:
        if finding.action == "refused":
            raise DataError(f"{finding.cell}: {words(finding.leak)}; {remedy(finding.leak)}")


def dropped(findings: Sequence[Finding]) -> frozenset[str]:
    """The training records that are left out."""
    return frozenset(finding.leak.training for finding in findings if finding.action == "dropped")


def among(findings: Sequence[Finding], taken: Mapping[str, frozenset[str]]) -> list[Finding]:
    """Those of records that a training takes, those that are refused, and those of whole datasets.

    taken: subset -> ids of the records taken of it.
    """
    every = frozenset().union(*taken.values())
    return [
        finding
        for finding in findings
        if finding.leak.training in every or finding.action == "refused" or finding.leak.kind == "lineage"
    ]
