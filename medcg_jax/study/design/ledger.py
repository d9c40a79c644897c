"""What a Med-MAT tree has and lacks: of the catalogue's datasets and subsets, and of the rows of tables 1 to 8.

    ledger = read_ledger("medmat")
    print_ledger(ledger)  # ledger_text

Only the JSON is read, and whether images exist is checked. No image is opened, so boxes are not compared with image
sizes (`medcg data check` does both). The full release's number of records is unknown: "complete" makes no claim on it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas

from medcg_jax.data import catalogue
from medcg_jax.data.records import SPLITS, Split
from medcg_jax.data.schema import ReleaseError, box_labels
from medcg_jax.data.splits import labels_in, rarest_labels, split_group, train_test_split
from medcg_jax.data.tree import NO_FILES, SubsetFile, Tree, subset_table
from medcg_jax.study.design import mat, overlap

TABLES = range(1, 9)
State = Literal["complete", "partial", "missing"]
_ORIGINAL = re.compile(r"ori--?(\w+?)-(train|test)\.json")
_COLUMNS = ("subset", "split", "data_no", "image", "is_absent")


@dataclass(frozen=True)
class Tally:
    """Well-formed records by split, and the distinct images they name: those that exist and those absent."""

    train: int
    test: int
    images: int
    absent: int


@dataclass(frozen=True)
class SubsetState:
    """One subset of the catalogue or of the tree.

    Attributes:
      triplet: (modality, area, task) of the tree's manifest, else of the catalogue; three "" where neither has it.
      state: "complete": every member has records, both splits exist or can be made, no image is absent and no record
        broken; "missing": no record; else "partial". Members of the tree's own subsets are not known.
      reasons: why it is not complete.
      train, test: well-formed records; where `split_made`, after the reader's split (9:1 by image and label).
      images: distinct images that exist. absent: distinct images that are named and do not exist.
      broken: kind -> records that the reader refuses, but for an absent image.
      members, lacking: the catalogue's datasets with and without records. others: further data numbers in it.
      can_train, can_test: whether the reader gives its records of that split.
    """

    number: str
    in_catalogue: bool
    triplet: tuple[str, str, str]
    state: State
    reasons: tuple[str, ...]
    train: int = 0
    test: int = 0
    split_made: bool = False
    images: int = 0
    absent: int = 0
    broken: dict[str, int] = field(default_factory=dict)
    members: tuple[str, ...] = ()
    lacking: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    can_train: bool = False
    can_test: bool = False


@dataclass(frozen=True)
class DatasetState:
    """One dataset of the catalogue, or a data number of the tree's own.

    Attributes:
      state: "complete": records of both splits, in each subset that the catalogue lists for it (in any, where it lists
        none), and no image absent; "missing": no record; else "partial".
      name, addresses: the catalogue's, corrected.
      found_in: the tree's subsets that have records of it.
    """

    number: str
    in_catalogue: bool
    state: State
    reasons: tuple[str, ...]
    name: str = ""
    addresses: tuple[str, ...] = ()
    found_in: tuple[str, ...] = ()
    train: int = 0
    test: int = 0
    images: int = 0
    absent: int = 0


@dataclass(frozen=True)
class RowState:
    """One printed row.

    Attributes:
      row: as in `mat.paper_rows`; in tables 1 and 2 the number of the tested subset.
      related: training subsets; in tables 1 and 2 all 25 of the multi-task model. target: the test subset.
      state: "full": every subset it needs is complete; "part": it can be computed, on less or other data than the
        paper's; "blocked".
      shares: what each training subset shares with the target, such as ("MA", "MT"), and lapse: where that is not what
        the row should be (`overlap.LAPSES`, else ""); () and "" in tables 1 and 2.
      blocked_by: the needed subsets without which it cannot be computed. short_of: the other needed subsets that are
        incomplete (in tables 1 and 2 also missing ones: the model trains without them).
    """

    table: int
    row: int
    related: tuple[str, ...]
    target: str
    state: Literal["full", "part", "blocked"]
    blocked_by: tuple[str, ...]
    short_of: tuple[str, ...]
    shares: tuple[str, ...] = ()
    lapse: str = ""


@dataclass(frozen=True)
class Ledger:
    """What a tree has.

    Attributes:
      subsets, datasets: the catalogue's by number, then the tree's own. rows: of tables 1 to 8.
      total: over all subsets. num_broken: broken records.
      faults: why the reader refuses the whole tree; no row can be computed until they are mended.
      box_faults: the same for the detection files and the rows of tables 5 and 6.
    """

    root: str
    subsets: tuple[SubsetState, ...]
    datasets: tuple[DatasetState, ...]
    rows: tuple[RowState, ...]
    total: Tally
    num_broken: int
    faults: tuple[str, ...]
    box_faults: tuple[str, ...]

    @property
    def is_broken(self) -> bool:
        """Whether an existing file cannot be used; a missing file is no fault, since a tree may still be growing."""
        return any(fault != NO_FILES for fault in (*self.faults, *self.box_faults))

    def as_dict(self) -> dict[str, Any]:
        """The ledger for JSON, with the sizes of Med-MAT that the paper states."""
        return {
            "root": self.root,
            "opens": not self.faults,
            "faults": list(self.faults),
            "box_faults": list(self.box_faults),
            **asdict(self.total),
            "broken": self.num_broken,
            "subsets": [asdict(state) for state in self.subsets],
            "datasets": [asdict(state) for state in self.datasets],
            "rows": [asdict(state) for state in self.rows],
            "catalogue_counts": {name: asdict(count) for name, count in catalogue.counts().items()},
        }


def states_of(states: Iterable[SubsetState | DatasetState]) -> dict[str, int]:
    """How many are complete, partial and missing."""
    counted = Counter(state.state for state in states)
    return {name: counted[name] for name in ("complete", "partial", "missing")}


@dataclass
class _FileState:
    """One subset file.

    Attributes:
      records: (data number, image, labels, group, whether the image is absent) of each well-formed record.
      broken: kind -> broken records.
      file_error: the error of the file as a whole. first_error: the reader's first error. "" where there is none.
    """

    records: list[tuple[str, str, list[str], str, bool]] = field(default_factory=list)
    broken: Counter[str] = field(default_factory=Counter)
    file_error: str = ""
    first_error: str = ""


def read_ledger(root: str | Path) -> Ledger:
    """The ledger of a tree, which may be empty. Broken records and files are counted; they raise nothing.

    Raises:
      DataError: the root is no folder.
    """
    tree = Tree(root)
    faults, box_faults = [str(error) for error in tree.refused], list[str]()
    try:
        triplets = tree.triplets
    except ReleaseError as error:
        triplets = subset_table()
        faults.append(str(error))
    if not tree.files:
        faults.append(NO_FILES)
    by_number: dict[str, dict[Split, SubsetFile]] = {}
    for file in tree.files:
        by_number.setdefault(file.number, {})[file.split] = file
    states: dict[str, SubsetState] = {}
    frames = [pandas.DataFrame(columns=_COLUMNS, dtype=object)]
    for number, files in by_number.items():
        by_split = {split: _file_state(tree, file) for split, file in files.items()}
        frames.append(_frame(number, by_split))
        states[number] = _subset_state(number, by_split, frames[-1], triplets.get(number, ("", "", "")))
        first = next(iter(files.values()))
        subset_faults = box_faults if first.detection else faults
        if number not in triplets:
            reason = "neither in the tree's manifest.json nor in Med-MAT's table of 53"
            subset_faults.append(f"{first.path.name}: subset {number}: {reason}")
        # With both splits the reader takes counts from the JSON; else it checks every record when it opens the tree.
        has_both = len(by_split) == len(SPLITS)
        errors = [state.file_error if has_both else state.first_error for state in by_split.values()]
        subset_faults += [error for error in errors if error]
    for subset in catalogue.subsets().values():
        if subset.number not in states:
            reason = "no file" if subset.released else "no file; its questions are not released"
            states[subset.number] = SubsetState(
                subset.number, True, triplets[subset.number], "missing", (reason,), lacking=subset.datasets
            )
    records = pandas.concat(frames, ignore_index=True)
    ordered = sorted(states.values(), key=lambda state: (not state.in_catalogue, state.number))
    return Ledger(
        str(tree.root), tuple(ordered), _dataset_states(records, _original_files(tree.root)), row_states(states),
        _tally(records), sum(sum(state.broken.values()) for state in ordered), tuple(faults), tuple(box_faults),
    )  # fmt: skip


def _file_state(tree: Tree, file: SubsetFile) -> _FileState:
    state = _FileState()
    try:
        contents = tree.contents(file)
    except ReleaseError as error:
        state.file_error = state.first_error = str(error)
        return state
    if contents.box_units:
        state.file_error = state.first_error = str(contents.box_units)
    for entry in contents.entries:
        if entry.error:
            state.first_error = state.first_error or str(entry.error)
        is_absent = entry.error is not None and entry.error.kind == "missing_file"
        if entry.error and not is_absent:
            state.broken[entry.error.kind] += 1
            continue
        record = entry.record
        assert record is not None
        labels = sorted(set(box_labels(entry.raw))) if file.detection else labels_in(record)
        state.records.append((record.data_no, record.image, labels, record.group, is_absent))
    return state


def _frame(number: str, files: Mapping[Split, _FileState]) -> pandas.DataFrame:
    """A row for each well-formed record of a subset, split as the reader does where it has no test file."""
    rows = [
        (number, split, data_no, image, absent)
        for split, file in files.items()
        for data_no, image, _, _, absent in file.records
    ]
    frame = pandas.DataFrame(rows, columns=_COLUMNS, dtype=object)
    if "test" not in files:
        records = files["train"].records
        labels = rarest_labels([labels for _, _, labels, _, _ in records])
        items = [
            (image, label, split_group(data_no, image, group))
            for (data_no, image, _, group, _), label in zip(records, labels, strict=True)
        ]
        frame["split"] = ["test" if is_test else "train" for is_test in train_test_split(items)]
    return frame


def _tally(records: pandas.DataFrame) -> Tally:
    is_absent = records["is_absent"].astype(bool)
    counts = records["split"].value_counts()
    images = (int(records["image"][rows].nunique()) for rows in (~is_absent, is_absent))
    return Tally(*(int(counts.get(split, 0)) for split in SPLITS), *images)


def _subset_state(
    number: str, files: Mapping[Split, _FileState], records: pandas.DataFrame, triplet: tuple[str, str, str]
) -> SubsetState:
    """The state of a subset with files. records: as `_frame`."""
    tally, split_made, data_numbers = _tally(records), "test" not in files, set(records["data_no"])
    broken = sum((file.broken for file in files.values()), Counter())
    listed = catalogue.subsets().get(number)
    datasets = listed.datasets if listed else ()
    members = tuple(data_no for data_no in datasets if data_no in data_numbers)
    lacking = tuple(data_no for data_no in datasets if data_no not in data_numbers)
    others: tuple[str, ...] = ()
    if listed:
        printed = catalogue.numbers(listed.printed.get("datasets", ""))
        others = tuple(sorted(data_numbers - {*datasets, *printed}, key=_number_order))
    reasons = [file.file_error for file in files.values() if file.file_error]
    if lacking:
        reasons.append(f"no record of {', '.join(lacking)}")
    if not tally.train:
        reasons.append("no training record" if "train" in files else "no training file")
    if not tally.test:
        reasons.append("no test file, and too few images to split off a tenth" if split_made else "no test record")
    if tally.absent:
        reasons.append(f"{_count(tally.absent, 'image')} absent")
    if broken:
        kinds = ", ".join(f"{kind} {count}" for kind, count in broken.most_common())
        reasons.append(f"{_count(broken.total(), 'broken record')} ({kinds})")
    is_read = {
        split: not files["train" if split_made else split].first_error
        for split in SPLITS
        if split_made or split in files
    }
    return SubsetState(
        number, listed is not None, triplet,
        "missing" if records.empty else "partial" if reasons else "complete", tuple(reasons), tally.train, tally.test,
        split_made, tally.images, tally.absent, dict(broken), members, lacking, others,
        can_train=bool(tally.train) and is_read["train"], can_test=bool(tally.test) and is_read["test"],
    )  # fmt: skip


def _dataset_states(records: pandas.DataFrame, original: Mapping[str, str]) -> tuple[DatasetState, ...]:
    """records: as `_frame`, of every subset. original: as `_original_files`."""
    listed = catalogue.datasets()
    by_number = dict(list(records.groupby("data_no")))
    states = []
    for number in sorted({*listed, *by_number}, key=lambda number: (number not in listed, *_number_order(number))):
        dataset, rows = listed.get(number), by_number.get(number, records[:0])
        tally, found_in = _tally(rows), tuple(sorted(set(rows["subset"])))
        absent_from = [subset for subset in dataset.subsets if subset not in found_in] if dataset else []
        reasons = [f"no record in subset {subset}" for subset in absent_from]
        if not found_in:
            if dataset and not dataset.subsets:
                reasons.append("no record; in no subset of the catalogue")
            elif dataset and not any(catalogue.subsets()[subset].released for subset in dataset.subsets):
                reasons[-1] += ", whose questions are not released"
            if number in original:
                reasons.append(f"{original[number]} has it, no subset file does")
        elif not (tally.train and tally.test):
            reasons.append("only training records" if tally.train else "only test records")
        if tally.absent:
            reasons.append(f"{_count(tally.absent, 'image')} absent")
        state: State = "missing" if not found_in else "partial" if reasons else "complete"
        name, addresses = (dataset.name, dataset.addresses) if dataset else ("", ())
        states.append(
            DatasetState(number, dataset is not None, state, tuple(reasons), name, addresses, found_in, **asdict(tally))
        )
    return tuple(states)


def _original_files(root: Path) -> dict[str, str]:
    """Data number -> its first file in Original_Medical_Datasets, which the reader does not use."""
    first: dict[str, str] = {}
    for path in sorted((root / "Original_Medical_Datasets").glob("ori-*.json")):
        if match := _ORIGINAL.fullmatch(path.name):
            first.setdefault(match[1].lstrip("0"), f"{path.parent.name}/{path.name}")
    return first


def row_states(subsets: Mapping[str, SubsetState]) -> tuple[RowState, ...]:
    """Every row of tables 1 to 8. subsets: by number, all 53 of the catalogue among them."""
    inside, outside = mat.paper_split()
    trainable = any(subsets[number].can_train for number in inside)
    rows = []
    for target in inside:
        usable = subsets[target].can_train and subsets[target].can_test
        rows.append(_row_state(1, int(target), inside, target, () if usable else (target,), subsets))
    for target in outside:
        blocked = (() if trainable else inside) + (() if subsets[target].can_test else (target,))
        rows.append(_row_state(2, int(target), inside, target, blocked, subsets))
    for table in TABLES[2:]:
        for row in mat.paper_rows(table):
            blocked = tuple(number for number in row.related if not subsets[number].can_train)
            blocked += () if subsets[row.target].can_test else (row.target,)
            rows.append(_row_state(table, row.row, row.related, row.target, blocked, subsets))
    return tuple(rows)


def _row_state(
    table: int, row: int, related: tuple[str, ...], target: str, blocked_by: tuple[str, ...],
    subsets: Mapping[str, SubsetState],
) -> RowState:  # fmt: skip
    needed = dict.fromkeys((*related, target))
    short_of = tuple(n for n in needed if n not in blocked_by and subsets[n].state != "complete")
    state: Literal["full", "part", "blocked"] = "blocked" if blocked_by else "part" if short_of else "full"
    if table in TABLES[:2]:
        return RowState(table, row, related, target, state, blocked_by, short_of)
    known = mat.paper_subsets()
    shares = overlap.overlap(known[target], [known[number] for number in related])
    lapse = overlap.printed_lapses().get((table, row), "")
    return RowState(table, row, related, target, state, blocked_by, short_of, shares, lapse)


def _number_order(number: str) -> tuple[int, str]:
    return (int(number) if number.isdecimal() else 10**9, number)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
