"""Modality-Area-Task triplets: what a subset's task counts as, and the paper's own 53 subsets and published rows.

Source: arXiv 2412.20070 v1, tables 3 and 4, and `paper/rows_to_subsets.csv` (an inference; see `paper/README.md`).
The subsets are the catalogue's (`data.catalogue`).
"""

import csv
from dataclasses import dataclass
from functools import cache
from importlib import resources

from medcg_jax.data import catalogue
from medcg_jax.data.records import Subset

ELEMENTS = ("modality", "area", "task")

# Abbreviations of table 9, written out for people.
MODALITY_NAMES = {
    "Co": "colposcopy", "CT": "computed tomography", "Der": "dermatoscopy", "DP": "digital photography",
    "End": "endoscopy", "FP": "fundus photography", "Mic": "microscopy", "MRI": "magnetic resonance imaging",
    "OCT": "optical coherence tomography", "US": "ultrasound", "X-ray": "X-ray",
}  # fmt: skip


@dataclass(frozen=True)
class TaskElement:
    """What a task's name counts as: its elements, the main one first, and why."""

    elements: tuple[str, ...]
    reason: str


def _element(*elements: str, reason: str) -> TaskElement:
    return TaskElement(elements, reason)


# Task name (table 9) -> Task element(s). The paper's rows name tasks coarsely ("Cancer", "State"), table 9 finely, and
# its own rows use some subsets under two names: two subsets share the Task where any element agrees.
# A name that is not here is its own element (the phantoms' tasks, "Body Part Classification").
TASKS: dict[str, TaskElement] = {
    "Cervical Picture Quality Evaluation": _element("Level", reason="quality is graded, as subset 17 (table 3 row 36)"),
    "Kidney Diseases Classification": _element("Diseases", reason="table 4 row 5: 02 gives Diseases"),
    "COVID-19 Classification": _element(
        "COVID", "State", reason="table 3: 03 is Lung, COVID in row 1 and Lung, State in rows 2 and 3"
    ),
    "Lung Cancer Classification": _element("Cancer", reason="table 3 row 1: 04 is Lung, Cancer"),
    "Brain Hemorrhage Classification": _element("State", reason="table 3 row 3: 05 is Brain, State"),
    "Brain Cancer Classification": _element("Cancer", reason="table 3 row 1: 06 is Brain, Cancer"),
    "Melanoma Type Classification": _element("Cancer", reason="table 3 row 30: 07 is Der, Skin, Cancer"),
    "Skin Diseases Classification": _element("Diseases", reason="table 3 row 30: 08 is Der, Skin, Diseases"),
    "Teeth Condition Classification": _element("State", reason="table 3 row 34: 09 is DP, Mouth, State"),
    "Oral Cancer Classification": _element("Cancer", reason="table 3 row 34: 10 is DP, Mouth, Cancer"),
    "Intestine Cleanliness Level": _element("Level", reason="table 5 row 5: 11 is End, Level"),
    "Cancer Degree Classification": _element("Level", reason="a degree is graded, as 19 (table 3 row 37: Level)"),
    "Intestine Diseases Classification": _element("Diseases", reason="table 5 row 5: 13 is End, Diseases"),
    "Eye Diseases Classification": _element("Diseases", reason="table 3 row 30: 14 is FP, Fundus, Diseases"),
    "Multiple-labels Eye Diseases Classification": _element("Diseases", reason="as 14, with several labels"),
    "Blindness Level": _element("Level", reason="table 3 row 37: 16 is FP, Fundus, Level"),
    "Retinal Images Quality Evaluation": _element("Level", reason="table 3 row 36: the target 17 is FP, Fundus, Level"),
    "Cell Type Classification": _element("Cell Identification", reason="table 3 row 37: 18"),
    "Prostate Cancer Degree Classification": _element("Level", reason="table 3 row 37: the target 19 is Mic, Level"),
    "Multiple-labels Blood Cell Classification": _element("Cell Identification", reason="as 18, with several labels"),
    "Cancer Classification": _element("Cancer", reason="table 3 row 38: 21 is Mic, Cell, Cancer"),
    "Head Diseases Classification": _element("Diseases", reason="named so; table 4 uses 22 for its area only"),
    "Retina Diseases Classification": _element("Diseases", reason="table 3 row 31: 23 is OCT, Retina, Diseases"),
    "Breast Cancer Classification": _element("Cancer", reason="named so; table 4 uses 24 for its area only"),
    "Degree Classification of Knee": _element("Level", reason="table 3 row 4: 25 is Bones, Level"),
    "Fractured Classification": _element("State", reason="table 3 row 4: 26 is Bones, State"),
    "Vertebrae Diseases Classification": _element("Diseases", reason="table 3 row 6: 27 is Bones, Diseases"),
    "COVID-19 and Pneumonia Classification": _element(
        "COVID",
        "State",
        "Diseases",
        reason="28 is COVID in table 3 row 11, State in row 4, and Diseases as the target of table 4 row 5",
    ),
    "Breast Diseases Classification": _element("Diseases", reason="table 3 row 6: 29 is Breast, Diseases"),
    "Tuberculosis Classification": _element(
        "Diseases", "State", reason="30 is Lung, Diseases in table 3 row 7; row 19 takes it for State"
    ),
    "Multiple-labels Chest Classification": _element("Diseases", reason="table 3 row 8: 31 is Chest, Diseases"),
    "Tumor Classification": _element(
        "State", "Cancer", reason="32 is Brain, State in table 3 row 5 and X-ray, Cancer in row 17"
    ),
    "Multi-labels Diseases": _element("Diseases", reason="table 5 row 8: 33 is Mic, Cell, Diseases"),
    "Level Identification": _element("Level", reason="named so"),
    "Spinal lesion Classification": _element("Diseases", reason="its labels are lesions of the spine, as 27's"),
    "State Classification": _element("State", reason="normal or abnormal: the paper's word"),
    "Lesion Det/Seg": _element("Cancer", reason="table 5 row 7: 38 is Der, Skin, Cancer Det"),
    "PolyP Det/Seg": _element("Diseases", reason="a polyp is a finding among subset 13's diseases"),
    "Surgical Procedures Det/Seg": _element("Surgical Procedures", reason="no other subset has this task"),
    "Multi-labels Det/Seg": _element("Diseases", reason="table 5 row 5: 45 is MRI, Diseases Det"),
    "Cancer Cell Det/Seg": _element("Cancer", reason="table 5 row 8: 42 is Mic, Cell, Cancer Det"),
    "Cancer Det/Seg": _element("Cancer", reason="named so"),
    "Thyroid Nodule Region Det/Seg": _element("Diseases", reason="nodules are found, not graded as cancer"),
    "Liver Det/Seg": _element("Organ", reason="an organ is outlined, nothing diagnosed"),
    "Lung Det/Seg": _element("Organ", reason="an organ is outlined; tables 5 and 6 use 47 for modality and area"),
    "Pneumothorax Det/Seg": _element("Diseases", reason="pneumothorax is one of subset 31's findings"),
    "Spinal Anomaly Det": _element("Diseases", reason="as 36; tables 5 and 6 use 49 for modality and area"),
    "Multi-labels Det": _element("Diseases", reason="the findings of subset 31, located"),
    "Vessel Seg": _element("Organ", reason="a structure is outlined, nothing diagnosed"),
    "Optic Disc and Cup Seg": _element("Organ", reason="a structure is outlined, nothing diagnosed"),
    "Optic Disc Seg": _element("Organ", reason="as 52"),
    # Names of medmat-mini's own detection subsets.
    "Lesion Det": _element("Cancer", reason="as Lesion Det/Seg"),
    "Cancer Det": _element("Cancer", reason="as Cancer Det/Seg"),
    "Lung Det": _element("Organ", reason="as Lung Det/Seg"),
    "Blood Cell Det": _element("Cell Identification", reason="as 20, located"),
}


def task_elements(task: str) -> tuple[str, ...]:
    """The Task element(s) that a task's name counts as, the main one first; an unlisted name is its own."""
    listed = TASKS.get(task)
    return listed.elements if listed else (task,)


def shared(a: Subset, b: Subset) -> frozenset[str]:
    """Which of `ELEMENTS` two subsets have in common.

    CT-Lung-Cancer and CT-Brain-Cancer -> {"modality", "task"}
    """
    common = {name for name in ("modality", "area") if getattr(a, name) == getattr(b, name)}
    if set(task_elements(a.task)) & set(task_elements(b.task)):
        common.add("task")
    return frozenset(common)


def label(subset: Subset) -> str:
    """A subset for people: "CT, Lung, Cancer"."""
    return f"{subset.modality}, {subset.area}, {task_elements(subset.task)[0]}"


def paper_csv(name: str) -> list[dict[str, str]]:
    """The rows of one published table kept in `study/paper`, as printed."""
    text = resources.files("medcg_jax.study.design").joinpath("paper", f"{name}.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


@cache
def paper_subsets() -> dict[str, Subset]:
    """The 53 subsets of Med-MAT by number: table 9, and the one that the release adds."""
    return {s.number: Subset(s.number, s.modality, s.area, s.task) for s in catalogue.subsets().values()}


@cache
def paper_split() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Subset numbers in distribution (table 1) and out of distribution (table 2)."""
    return tuple(
        tuple(s.number for s in catalogue.subsets().values() if s.distribution == own) for own in ("in", "out")
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
            table, int(row["row"]), row["direction"], tuple(row["related_subsets"].split("+")),
            row["target_subset"], row["confidence"], row["evidence"],
        )
        for row in paper_csv("rows_to_subsets")
        if int(row["table"]) == table
    )  # fmt: skip


def reached_targets(num_directions: int = 2) -> tuple[str, ...]:
    """The targets that table 3 reaches in so many directions or more, by number."""
    directions: dict[str, set[str]] = {}
    for row in paper_rows(3):
        directions.setdefault(row.target, set()).add(row.direction)
    return tuple(sorted(target for target, found in directions.items() if len(found) >= num_directions))
