"""The guard against leaks: no cell is trained on what it is tested on, neither a subset nor an image nor a patient.

Tables are expanded so that this holds. The guard holds it against faults of the expansion, hand-made cells, general
records, and trees in which a test image lies in training under another name, id or subset, saved anew, or nearly the
same, or in which images of one patient lie on both sides. `data.leaks` finds leaks, this module says what is done.
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
    """A leak in a cell, and what is done about it: one of `data.leaks.ACTIONS`' values."""

    cell: str
    leak: Leak
    action: str


def check_cell(cell: Cell, subsets: Mapping[str, Subset]) -> None:
    """Holds a cell's training subsets against its targets.

    A cell that may not see its targets (`Cell.sees_target`) is trained neither on one nor on another subset of a
    target's whole triplet. The paper's own rows and its split of tables 1 and 2 have some of the latter (28 and 30 both
    count as X-ray, Lung, Diseases), and are let through as they are printed.

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
    if cell.row.part == "out_of_distribution":
        inside, outside = mat.paper_split()
        return name in inside and target in outside
    if cell.row.published is None or cell.arm != "trained":
        return False
    table, number = cell.row.published
    return any(r.row == number and name in r.related and target == r.target for r in mat.paper_rows(table))


class LeakGuard:
    """Finds leaks in the cells of one source; each image is hashed once however many cells and subsets have it.

        guard = LeakGuard(setup.source, run.study)
        for cell in job.cells:
            refuse(guard.findings(cell))

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
        """What a cell's trainings give away of its tests; by kind, training and test record.

        Raises:
          ConfigError: it is trained on a subset that it may not see; the message names the cell and the subset.
          DataError: the data cannot be read.
        """
        if not {*cell.related, *cell.target} <= set(self._subsets):
            # Detection files are looked at where a cell has some, and only there.
            self._subsets |= {subset.name: subset for subset in self._source.detection_subsets}
        check_cell(cell, self._subsets)
        sides = [(name, self._actions) for name in cell.related]
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
        """What the training records of a subset (None: the general records) give away of a target's tests."""
        if (name, target) not in self._leaks:
            is_general = name is None
            bits = self._near_bits if is_general or not self._drawn else None
            training = self._hashed_of(name, "train", decode=bits is not None)
            test = self._hashed_of(target, "test", decode=bits is not None)
            leaks = find_leaks(training, test, bits, questions=is_general)
            if is_general or name != target and not self._drawn:
                # The datasets that both sides have in common, or that are related; named in place of records.
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
            self._hashed[key] = hashed(records, self._decoded if decode else None)
        return self._hashed[key]


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
    return [f for f in findings if f.leak.training in every or f.action == "refused" or f.leak.kind == "lineage"]
