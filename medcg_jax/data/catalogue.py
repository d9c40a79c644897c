"""Med-MAT's catalogue: 109 source datasets and 53 subsets, with slips of the printed tables mended, and their relations.

As printed in arXiv 2412.20070 v1 (read from a third party's page of it): `catalogue/table9_subsets.csv` and
`catalogue/table10_11_datasets.csv`. Written for this package:

- `added_subsets.csv`: subset 53, which the release's README lists. `subset_status.csv`: whether a subset's questions are
  released (that README), and its distribution (tables 1 and 2).
- `slips.csv`: wrongly printed values and their replacements; "none": the printed value is kept, "unknown": the right
  value is not known.
- `lineage.csv`: datasets that share images or contain each other. `groups.csv`: patterns of image names that show the
  patient. Entries of these two that are called generally known were not looked up.
"""

from __future__ import annotations

import csv
import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from types import MappingProxyType

FOLDER = Path(__file__).parent / "catalogue"
SUBSETS, DATASETS = "table9_subsets", "table10_11_datasets"
# Numbers in the paper's text.
STATED = {"datasets": 106, "subsets": 53, "modalities": 11, "areas": 14, "tasks": 13}


@dataclass(frozen=True)
class Slip:
    """A wrong or doubtful field of a printed table, the value used instead, and why.

    Attributes:
      table: file name of the table. number: of the subset, dataset or row.
      override: the value used; "none": the printed one; "unknown": none is known, and the field is empty.
    """

    table: str
    number: str
    field: str
    printed: str
    override: str
    why: str


@dataclass(frozen=True)
class Dataset:
    """One source dataset, slips mended.

    Attributes:
      number: "1" to "109", as `data-no` in records.
      name, description, citation: "" if the printed one is another dataset's and the right one is not known.
      addresses: of its web pages; () likewise.
      subsets: numbers of the subsets that contain it.
      printed: `name`, `url`, `description`, `citation` and `subsets` ("18, 22") as printed.
    """

    number: str
    name: str
    addresses: tuple[str, ...]
    description: str
    citation: str
    subsets: tuple[str, ...]
    printed: Mapping[str, str] = field(hash=False)
    slips: tuple[Slip, ...] = ()


@dataclass(frozen=True)
class CatalogueSubset:
    """One subset, slips mended.

    Attributes:
      number: "01" to "53".
      datasets: its members.
      released: whether its questions are in the release: 01 to 37 are, 38 to 53 are announced there and not given.
      distribution: "in" (table 1), "out" (table 2), "" (38 to 53).
      printed: `modality`, `area`, `task` and `datasets` ("33, 36-38") as printed; {} of 53, which is not.
    """

    number: str
    modality: str
    area: str
    task: str
    datasets: tuple[str, ...]
    released: bool
    distribution: str
    printed: Mapping[str, str] = field(hash=False)
    slips: tuple[Slip, ...] = ()


@dataclass(frozen=True)
class Count:
    """A number stated in the paper, the number in its printed tables, the names there, and a note on the difference."""

    stated: int
    printed: int
    names: tuple[str, ...]
    note: str


@functools.cache
def slips() -> tuple[Slip, ...]:
    """Every known slip of the printed tables, those without an override included."""
    return tuple(Slip(**row) for row in printed_rows("slips"))


def printed_rows(name: str) -> list[dict[str, str]]:
    """The rows of one file of the catalogue."""
    with (FOLDER / f"{name}.csv").open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def numbers(text: str) -> tuple[str, ...]:
    """Dataset numbers of a printed list: "9, 11-13" -> ("9", "11", "12", "13")."""
    listed: list[str] = []
    for item in filter(None, (item.strip() for item in text.split(","))):
        first, _, last = item.partition("-")
        listed += map(str, range(int(first), int(last or first) + 1))
    return tuple(listed)


def counts() -> dict[str, Count]:
    """Med-MAT's size as stated in the paper and as listed in its tables, by `STATED`'s keys."""
    rows = printed_rows(SUBSETS)
    listed = {
        "datasets": {number for row in rows for number in numbers(row["datasets"])},
        "subsets": {row["subset"] for row in rows},
        "modalities": {row["modality"] for row in rows},
        "areas": {row["area"] for row in rows},
        "tasks": {row["task"] for row in rows},
    }
    notes = {
        "datasets": "tables 10 and 11 list 109; without 43, 64 and 83, which are in no subset, these are 106, of which "
        "109 comes with subset 53",
        "subsets": "table 9 stops at 52; the release adds 53",
        "modalities": "agree",
        "areas": "not reconciled: which areas the paper counts as one is not stated",
        "tasks": "not reconciled: table 9 names tasks more finely than the paper counts them, and how is not stated",
    }
    return {
        name: Count(STATED[name], len(listed[name]), tuple(sorted(listed[name], key=_order)), notes[name])
        for name in STATED
    }


def related_datasets(number: str) -> dict[str, str]:
    """Other datasets that share images with this one, or may -> why, and how sure that is (`lineage.csv`).

    How sure: "printed" (by the tables' names or addresses), "inferred" (generally known), "possible". {} for a dataset
    that is not listed.
    """
    related = _lineage().get(number, {})
    return {other: "; ".join(related[other]) for other in sorted(related, key=_order)}


def group_of(data_no: str, image_path: str) -> str:
    """The patient, lesion, slide or case in an image's name, equal for images of one dataset that belong together; "" if
    the name shows none, or the dataset's naming is not known (`groups.csv`).

    Example: `group_of("53", "med-mat/Knee/test/3/9120059R.jpg") == "9120059"`.
    """
    pattern = _group_patterns().get(data_no)
    match = pattern.search(image_path) if pattern else None
    return match[1] if match else ""


def numbering(data_no: str) -> str:
    """The first of the data sets that number their patients as this one does: they surely share images, and their image
    names follow one pattern. Else the data set itself.

    Example: `numbering("80") == "61"`, for 61 is a sample of 80 and keeps its names.
    """
    return _numberings().get(data_no, data_no)


def _order(name: str) -> tuple[int, str]:
    return (int(name), name) if name.isdigit() else (0, name)


def _slips_of(table: str, number: str) -> tuple[Slip, ...]:
    return tuple(slip for slip in slips() if (slip.table, slip.number) == (table, number))


def _mended(row: Mapping[str, str], slips_of_row: Iterable[Slip]) -> dict[str, str]:
    """The row with its slips' values in place of printed ones."""
    changed = {slip.field: slip.override for slip in slips_of_row if slip.override != "none" and slip.field in row}
    return {**row, **{name: "" if value == "unknown" else value for name, value in changed.items()}}


def _moved(slip: Slip) -> set[str]:
    """The datasets that a slip removes from a subset's list or adds to it."""
    return set() if slip.override == "none" else set(numbers(slip.printed)) ^ set(numbers(slip.override))


@functools.cache
def subsets() -> Mapping[str, CatalogueSubset]:
    """All 53 by number."""
    status = {row["subset"]: row for row in printed_rows("subset_status")}
    printed = {row["subset"]: row for row in printed_rows(SUBSETS)}
    by_number = {}
    for number, row in (printed | {row["subset"]: row for row in printed_rows("added_subsets")}).items():
        slips_of_row = _slips_of(SUBSETS, number)
        used, as_printed = _mended(row, slips_of_row), dict(printed.get(number, {}))
        as_printed.pop("subset", None)
        released = status[number]["questions"] == "released"
        by_number[number] = CatalogueSubset(
            number, used["modality"], used["area"], used["task"], numbers(used["datasets"]), released,
            status[number]["distribution"], MappingProxyType(as_printed), slips_of_row,
        )  # fmt: skip
    return MappingProxyType(by_number)


@functools.cache
def datasets() -> Mapping[str, Dataset]:
    """All 109 by number."""
    printed_in: dict[str, list[str]] = {}
    for row in printed_rows(SUBSETS):
        for number in numbers(row["datasets"]):
            printed_in.setdefault(number, []).append(row["subset"])
    by_number = {}
    for row in printed_rows(DATASETS):
        number = row.pop("dataset")
        slips_of_row = _slips_of(DATASETS, number)
        used = _mended(row, slips_of_row)
        moved = tuple(slip for slip in slips() if slip.field == "datasets" and number in _moved(slip))
        by_number[number] = Dataset(
            number, used["name"], tuple(filter(None, used["url"].split(", "))), used["description"], used["citation"],
            tuple(s.number for s in subsets().values() if number in s.datasets),
            MappingProxyType(row | {"subsets": ", ".join(printed_in.get(number, ()))}), slips_of_row + moved,
        )  # fmt: skip
    return MappingProxyType(by_number)


@functools.cache
def _lineage() -> dict[str, dict[str, list[str]]]:
    related: dict[str, dict[str, list[str]]] = {}
    for row in printed_rows("lineage"):
        for pair in combinations(numbers(row["datasets"]), 2):
            if row["hub"] and row["hub"] not in pair:
                continue
            for number, other in (pair, pair[::-1]):
                related.setdefault(number, {}).setdefault(other, []).append(f"{row['why']} ({row['sure']})")
    return related


@functools.cache
def _group_patterns() -> dict[str, re.Pattern[str]]:
    return {row["dataset"]: re.compile(row["pattern"]) for row in printed_rows("groups")}


@functools.cache
def _numberings() -> dict[str, str]:
    patterns = {number: pattern.pattern for number, pattern in _group_patterns().items()}
    numbering_of: dict[str, str] = {}
    for number in sorted(patterns, key=_order):
        for other, whys in _lineage().get(number, {}).items():
            is_sure = any(not why.endswith("(possible)") for why in whys)
            if is_sure and patterns.get(other) == patterns[number]:
                numbering_of.setdefault(other, numbering_of.get(number, number))
    return {number: first for number, first in numbering_of.items() if number != first}
