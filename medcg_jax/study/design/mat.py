"""Modality-Area-Task triplets: what a subset's task counts as, and the paper's own 53 subsets and published rows.

Source: arXiv 2412.20070 v1, tables 3 and 4, and the CSV files of `paper/` (see its README). The subsets are the
catalogue's (`data.catalogue`).
"""

import csv
from dataclasses import dataclass
from functools import cache
from importlib import resources

from medcg_jax.data import catalogue
from medcg_jax.data.records import Subset

ELEMENTS = ("modality", "area", "task")


def paper_csv(name: str) -> list[dict[str, str]]:
    """The rows of one CSV file in `study/design/paper`: a published table as printed, or an inference from one."""
    text = resources.files("medcg_jax.study.design").joinpath("paper", f"{name}.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


@cache
def _task_elements() -> dict[str, tuple[str, ...]]:
    return {row["task"]: tuple(row["elements"].split("+")) for row in paper_csv("task_elements")}


def task_elements(task: str) -> tuple[str, ...]:
    """The Task element(s) that a task's name counts as, the main one first.

    The paper's rows name tasks coarsely ("Cancer", "State"), table 9 finely, and the rows use some subsets under two
    names. So two subsets share the Task where any element agrees. `paper/task_elements.csv` gives the elements of each
    name with the reason; a name not listed there (a phantom's task, for example) is its own element.
    """
    return _task_elements().get(task, (task,))


def shared(a: Subset, b: Subset) -> frozenset[str]:
    """Which of `ELEMENTS` two subsets have in common.

    CT-Lung-Cancer and CT-Brain-Cancer -> {"modality", "task"}
    """
    common = {name for name in ("modality", "area") if getattr(a, name) == getattr(b, name)}
    if set(task_elements(a.task)) & set(task_elements(b.task)):
        common.add("task")
    return frozenset(common)


@cache
def paper_subsets() -> dict[str, Subset]:
    """The 53 subsets of Med-MAT by number: table 9, and the one that the release adds."""
    return {s.number: Subset(s.number, s.modality, s.area, s.task) for s in catalogue.subsets().values()}


@cache
def paper_split() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Subset numbers in distribution (table 1) and out of distribution (table 2)."""
    subsets = catalogue.subsets().values()
    inside = tuple(s.number for s in subsets if s.distribution == "in")
    return inside, tuple(s.number for s in subsets if s.distribution == "out")


def has_boxes(subset: Subset) -> bool:
    """Whether a subset of the paper has boxes or masks in place of choice questions (38 to 53)."""
    return any(word in subset.task.replace("/", " ").split() for word in ("Det", "Seg"))


@dataclass(frozen=True)
class PaperRow:
    """One printed row of tables 3 to 8, read as subset numbers."""

    table: int
    row: int
    direction: str  # as printed: "fixed modality", "modality-area pair", "three sources", ...
    related: tuple[str, ...]
    target: str
    confidence: str  # high, medium (other readings are possible, or its baseline is another's), low
    evidence: str
    alternatives: tuple[tuple[str, ...], ...] = ()  # other training subsets that its phrases may mean


@cache
def paper_rows(table: int) -> tuple[PaperRow, ...]:
    """The printed rows of one table (3 to 8) as subset numbers, with how sure each reading is."""
    return tuple(
        PaperRow(
            table,
            int(row["row"]),
            row["direction"],
            tuple(row["related_subsets"].split("+")),
            row["target_subset"],
            row["confidence"],
            row["evidence"],
            tuple(tuple(other.split("+")) for other in row["alternatives"].split("; ") if other),
        )
        for row in paper_csv("rows_to_subsets")
        if int(row["table"]) == table
    )


@cache
def repeats(table: int) -> frozenset[int]:
    """Rows of a published table with the training subsets and the target of an earlier row: one experiment, not two."""
    first: dict[tuple[frozenset[str], str], int] = {}
    return frozenset(
        row.row
        for row in paper_rows(table)
        if first.setdefault((frozenset(row.related), row.target), row.row) != row.row
    )


def reached_targets(num_directions: int = 2) -> tuple[str, ...]:
    """Numbers of the targets that table 3 reaches in at least `num_directions` directions."""
    directions: dict[str, set[str]] = {}
    for row in paper_rows(3):
        directions.setdefault(row.target, set()).add(row.direction)
    return tuple(sorted(target for target, names in directions.items() if len(names) >= num_directions))
