"""What a Med-MAT tree has and lacks: of the catalogue's datasets and subsets, and of the rows of tables 1 to 8.

    ledger = read_ledger("medmat")
    print_ledger(ledger)  # study.ledger_text

Only the JSON is read, and whether the images exist: no image is opened, so boxes are not held against image sizes
(`medcg data check` does both). How many records the full release has is not known, so "complete" says nothing of it.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from medcg_jax.data import catalogue
from medcg_jax.data.records import SPLITS, DataError, Split
from medcg_jax.data.release import labels_in
from medcg_jax.data.schema import ReleaseError, check_id, check_keys, image_path, parse_choice, read_list, record_name
from medcg_jax.data.schema_detection import DETECTION_KEYS, has_label, shares_of_image
from medcg_jax.data.splits import rarest_labels, split_group, train_test_split
from medcg_jax.data.tree_files import SubsetFile, list_files, read_manifest
from medcg_jax.study.design.ledger_rows import row_states
from medcg_jax.study.design.ledger_states import NO_FILES, DatasetState, Ledger, State, SubsetState, Tally

# "(kind, reason)" of an image path that the reader refuses.
_Refusal = tuple[str, str]
_ORIGINAL = re.compile(r"ori--?(\w+?)-(train|test)\.json")


class _RecordUse(NamedTuple):
    data_no: str
    image: str
    labels: list[str]
    group: str


@dataclass
class _Part:
    """One subset file: its well-formed records, and what is wrong with the others."""

    uses: list[_RecordUse] = field(default_factory=list)
    absent: set[str] = field(default_factory=set)
    broken: Counter[str] = field(default_factory=Counter)
    file_error: str = ""
    first_error: str = ""

    @property
    def is_read(self) -> bool:
        """Whether the reader takes the file."""
        return not self.first_error


def read_ledger(root: str | Path) -> Ledger:
    """The ledger of a tree; what is broken in it is counted and ends nothing.

    Raises:
      DataError: the root is no folder.
    """
    if not str(root) or not Path(root).is_dir():
        raise DataError(f"{str(root)!r}: no such folder; that of a Med-MAT tree is accepted, also an empty one")
    root = Path(os.path.realpath(root))
    files, refused = list_files(root)
    faults, box_faults = [str(error) for error in refused], []
    try:
        manifest = read_manifest(root)
    except ReleaseError as error:
        manifest = {}
        faults.append(str(error))
    by_number: dict[str, dict[Split, SubsetFile]] = {}
    for file in files:
        by_number.setdefault(file.number, {})[file.split] = file
    if not files:
        faults.append(NO_FILES)
    states: dict[str, SubsetState] = {}
    tallies: dict[str, dict[str, Tally]] = {}
    refusals: dict[str, _Refusal | None] = {}
    known = {s.number: (s.modality, s.area, s.task) for s in catalogue.subsets()}
    known |= {name: (entry["modality"], entry["area"], entry["task"]) for name, entry in manifest.items()}
    for number, own in by_number.items():
        parts = {split: _read(file, root, refusals) for split, file in own.items()}
        states[number], tallies[number] = _subset_state(number, parts, known.get(number, ("", "", "")))
        found = faults if not next(iter(own.values())).detection else box_faults
        if number not in known:
            reason = "neither in the tree's manifest.json nor in Med-MAT's table of 53"
            found.append(f"{next(iter(own.values())).path.name}: subset {number}: {reason}")
        # With both splits the reader takes counts from the JSON; else it checks every record when it opens the tree.
        errors = [part.file_error if len(parts) == len(SPLITS) else part.first_error for part in parts.values()]
        found += filter(None, errors)
    for number in known:
        if number not in states and number in _catalogue_numbers():
            states[number] = _missing_subset(number, known[number])
    total, by_dataset = Tally(), {}
    for number, own in tallies.items():
        for data_no, tally in own.items():
            total.add(tally)
            by_dataset.setdefault(data_no, {})[number] = tally
    ordered = sorted(states.values(), key=lambda state: (not state.in_catalogue, state.number))
    return Ledger(
        str(root), tuple(ordered), _dataset_states(by_dataset, _original_files(root)), row_states(states), total,
        sum(sum(state.broken.values()) for state in ordered), tuple(faults), tuple(box_faults),
    )  # fmt: skip


def _catalogue_numbers() -> set[str]:
    return {subset.number for subset in catalogue.subsets()}


def _read(file: SubsetFile, root: Path, refusals: dict[str, _Refusal | None]) -> _Part:
    """One file's records. refusals: of each image path looked at, or None; filled as it goes."""
    part, seen = _Part(), set()
    try:
        raws = read_list(file.path)
    except ReleaseError as error:
        part.file_error = part.first_error = str(error)
        return part
    if file.detection and (reason := shares_of_image(raws)):
        part.file_error = part.first_error = f"{file.path.name}: {reason}"
    for place, raw in enumerate(raws):
        name, labels = record_name(raw, place), []
        try:
            check_id(raw, seen, file=file.path.name, place=place)
            if file.detection:
                check_keys(raw, DETECTION_KEYS, file.path.name, name)
                labels = sorted({box["label"] for box in raw["boxes"] if has_label(box)})
            else:
                where = {"file": file.path.name, "place": place, "subset": file.number, "split": file.split}
                labels = labels_in(parse_choice(raw, **where))
            if raw["image"] not in refusals:
                refusals[raw["image"]] = _refusal(root, raw["image"])
            if refusal := refusals[raw["image"]]:
                raise ReleaseError(file.path.name, name, *refusal)
        except ReleaseError as error:
            part.first_error = part.first_error or str(error)
            if error.kind != "missing_file":
                part.broken[error.kind] += 1
                continue
            part.absent.add(raw["image"])
        group = raw.get("group", "") if isinstance(raw.get("group", ""), str) else ""
        part.uses.append(_RecordUse(raw["data-no"], raw["image"], labels, group))
    return part


def _moved(uses: list[_RecordUse]) -> set[str]:
    """The images that the reader splits off for the test."""
    labels = rarest_labels([use.labels for use in uses])
    groups = [split_group(use.data_no, use.image, use.group) for use in uses]
    items = [(use.image, label, group) for use, label, group in zip(uses, labels, groups, strict=True)]
    return {image for (image, _, _), test in zip(items, train_test_split(items), strict=True) if test}


def _refusal(root: Path, image: str) -> _Refusal | None:
    try:
        image_path(root, image, file="", record="")
    except ReleaseError as error:
        return error.kind, error.reason
    return None


def _subset_state(
    number: str, parts: dict[Split, _Part], triplet: tuple[str, str, str]
) -> tuple[SubsetState, dict[str, Tally]]:
    """The state of a subset with files, and its tally by data number."""
    tallies: dict[str, Tally] = {}
    split_made = "test" not in parts
    moved = _moved(parts["train"].uses) if split_made else set()
    for split, part in parts.items():
        for data_no, image, *_ in part.uses:
            tally = tallies.setdefault(data_no, Tally())
            if split == "test" or image in moved:
                tally.test += 1
            else:
                tally.train += 1
            (tally.absent if image in part.absent else tally.images).add(image)
    whole = Tally()
    for tally in tallies.values():
        whole.add(tally)
    broken = sum((part.broken for part in parts.values()), Counter())
    members = others = lacking = ()
    in_catalogue = number in _catalogue_numbers()
    if in_catalogue:
        own = catalogue.subset(number)
        printed = catalogue.numbers(own.printed.get("datasets", ""))
        members = tuple(data_no for data_no in own.datasets if data_no in tallies)
        lacking = tuple(data_no for data_no in own.datasets if data_no not in tallies)
        others = tuple(sorted(set(tallies) - {*own.datasets, *printed}, key=_number_order))
    reasons = _subset_reasons(parts, whole, lacking, broken)
    state: State = "partial" if reasons else "complete"
    read = {split: parts["train" if split_made else split].is_read for split in SPLITS if split_made or split in parts}
    found = SubsetState(
        number, in_catalogue, triplet, state if whole.train + whole.test else "missing", reasons, whole.train,
        whole.test, split_made, len(whole.images), len(whole.absent), dict(broken), members, lacking, others,
        can_train=bool(whole.train) and read.get("train", False), can_test=bool(whole.test) and read["test"],
    )  # fmt: skip
    return found, tallies


def _subset_reasons(
    parts: dict[Split, _Part], whole: Tally, lacking: tuple[str, ...], broken: Counter[str]
) -> tuple[str, ...]:
    """Why a subset with files is not complete; () where it is."""
    reasons = [part.file_error for part in parts.values() if part.file_error]
    if lacking:
        reasons.append(f"no record of {', '.join(lacking)}")
    if not whole.train:
        reasons.append("no training record" if "train" in parts else "no training file")
    if not whole.test:
        reasons.append("no test record" if "test" in parts else "no test file, and too few images to split off a tenth")
    if whole.absent:
        reasons.append(f"{_count(len(whole.absent), 'image')} absent")
    if broken:
        kinds = ", ".join(f"{kind} {count}" for kind, count in broken.most_common())
        reasons.append(f"{_count(broken.total(), 'broken record')} ({kinds})")
    return tuple(reasons)


def _missing_subset(number: str, triplet: tuple[str, str, str]) -> SubsetState:
    own = catalogue.subset(number)
    reason = "no file" if own.released else "no file; its questions are not released"
    return SubsetState(number, True, triplet, "missing", (reason,), lacking=own.datasets)


def _dataset_states(by_dataset: dict[str, dict[str, Tally]], original: dict[str, str]) -> tuple[DatasetState, ...]:
    """by_dataset: data number -> subset -> its tally there."""
    listed = {own.number: own for own in catalogue.datasets()}
    found = []
    for number in sorted({*listed, *by_dataset}, key=lambda number: (number not in listed, *_number_order(number))):
        own, tallies, whole = listed.get(number), by_dataset.get(number, {}), Tally()
        for tally in tallies.values():
            whole.add(tally)
        absent_from = [subset for subset in own.subsets if subset not in tallies] if own else []
        reasons = [f"no record in subset {subset}" for subset in absent_from]
        if not tallies:
            if own and not own.subsets:
                reasons.append("no record; in no subset of the catalogue")
            elif own and not any(catalogue.subset(subset).released for subset in own.subsets):
                reasons[-1] += ", whose questions are not released"
            if number in original:
                reasons.append(f"{original[number]} has it, no subset file does")
        elif not (whole.train and whole.test):
            reasons.append("only training records" if whole.train else "only test records")
        if whole.absent:
            reasons.append(f"{_count(len(whole.absent), 'image')} absent")
        state: State = "missing" if not tallies else "partial" if reasons else "complete"
        found.append(
            DatasetState(
                number,
                own is not None,
                state,
                tuple(reasons),
                own.name if own else "",
                own.addresses if own else (),
                tuple(sorted(tallies)),
                whole.train,
                whole.test,
                len(whole.images),
                len(whole.absent),
            )
        )
    return tuple(found)


def _original_files(root: Path) -> dict[str, str]:
    """Data number -> the first file of it in Original_Medical_Datasets, which the reader does not take."""
    found: dict[str, str] = {}
    for path in sorted((root / "Original_Medical_Datasets").glob("ori-*.json")):
        if match := _ORIGINAL.fullmatch(path.name):
            found.setdefault(match[1].lstrip("0"), f"{path.parent.name}/{path.name}")
    return found


def _number_order(number: str) -> tuple[int, str]:
    return (int(number) if number.isdecimal() else 10**9, number)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
