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

    The paper's rows name tasks coarsely ("Cancer", "State"), table 9 finely, and its rows use some subsets under two
    names: two subsets share the Task where any element agrees. `paper/task_elements.csv` lists the names and gives a
    reason for each. A name that it does not list is its own element (the phantoms' tasks, for example).
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
    return tuple(
        tuple(s.number for s in catalogue.subsets().values() if s.distribution == side) for side in ("in", "out")
    )


def has_boxes(subset: Subset) -> bool:
    """Whether a subset of the paper's is one of boxes or masks, and has no choice questions (38 to 53)."""
    return any(word in subset.task.replace("/", " ").split() for word in ("Det", "Seg"))


@dataclass(frozen=True)
class PaperRow:
    """One printed row of tables 3 to 8, read as subset numbers."""

    table: int
    row: int
    direction: str  # as printed: "fixed modality", "modality-area pair", "three sources", ...
    related: tuple[str, ...]
    target: str
    confidence: str  # high, medium, low: how sure the reading is
    evidence: str


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
        )
        for row in paper_csv("rows_to_subsets")
        if int(row["table"]) == table
    )


def reached_targets(num_directions: int = 2) -> tuple[str, ...]:
    """The targets that table 3 reaches in so many directions or more, by number."""
    directions: dict[str, set[str]] = {}
    for row in paper_rows(3):
        directions.setdefault(row.target, set()).add(row.direction)
    return tuple(sorted(target for target, names in directions.items() if len(names) >= num_directions))
