"""The files a grid leaves: which groups are done, cells.csv and results.csv.

`results.csv` and `predictions/` hold no times, are written whole or not at all, and in the order of the cells, so that
a grid that was stopped and started again ends in the same bytes.
"""

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from medcg_jax.study.schedule import Group, Job
from medcg_jax.study.stats import wilson
from medcg_jax.study.suite import Cell

CELLS_HEADER = ("cell", "table", "row", "arm", "seed", "related", "target", "steps", "status", "seconds")
RESULTS_HEADER = ("cell", "table", "row", "arm", "seed", "target", "n", "correct", "accuracy", "ci_low", "ci_high")


def state_dir(workdir: Path) -> Path:
    """Where a grid keeps claims, what is done, and checkpoints of what is not."""
    return workdir / "state"


def write_atomically(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text, encoding="utf-8", newline="")
    os.replace(part, path)


def mark_done(workdir: Path, group: Group, outcomes: Mapping[str, Mapping]) -> None:
    """Says that a group is finished.

    outcomes: job id -> {"status": "done" or "failed: why", "seconds": float}.
    """
    write_atomically(state_dir(workdir) / "done" / f"{group.name}.json", json.dumps(dict(outcomes), indent=1) + "\n")


def outcomes_of(workdir: Path, group: Group) -> dict[str, dict] | None:
    """What `mark_done` said of the group; None while it is not done."""
    try:
        return json.loads((state_dir(workdir) / "done" / f"{group.name}.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def all_outcomes(workdir: Path, groups: Sequence[Group]) -> dict[str, dict]:
    """Job id -> outcome, of every group that is done."""
    found: dict[str, dict] = {}
    for group in groups:
        found |= outcomes_of(workdir, group) or {}
    return found


def is_failure(outcome: Mapping | None) -> bool:
    return outcome is not None and outcome["status"] != "done"


class Tables:
    """Writes cells.csv and results.csv of the cells done so far; remembers the scores it has read."""

    def __init__(self, workdir: Path, cells: Sequence[Cell], jobs: Sequence[Job]):
        self.workdir, self.cells = workdir, cells
        self._job = {cell.id: job for job in jobs for cell in job.cells}
        self._scores: dict[str, dict[str, tuple[int, int]]] = {}

    def write(self, outcomes: Mapping[str, Mapping]) -> None:
        cells, results = [], []
        for cell in self.cells:
            job = self._job[cell.id]
            outcome = outcomes.get(job.id, {"status": "waiting", "seconds": 0.0})
            cells.append((*_key(cell), "+".join(cell.related), "+".join(cell.target), job.steps, outcome["status"],
                          f"{outcome['seconds']:.1f}"))  # fmt: skip
            if outcome["status"] == "done":
                results += [(*_key(cell), target, *self._scored(cell, target)) for target in cell.target]
        write_atomically(self.workdir / "cells.csv", to_csv(CELLS_HEADER, cells))
        write_atomically(self.workdir / "results.csv", to_csv(RESULTS_HEADER, results))

    def _scored(self, cell: Cell, target: str) -> tuple:
        if cell.id not in self._scores:
            self._scores[cell.id] = scores(self.workdir / "predictions" / f"{cell.id}.jsonl")
        n, correct = self._scores[cell.id][target]
        low, high = wilson(correct, n)
        return n, correct, f"{correct / n:.6f}", f"{low:.6f}", f"{high:.6f}"


def _key(cell: Cell) -> tuple:
    return cell.id, cell.table, cell.row, cell.arm, cell.seed


def scores(path: Path) -> dict[str, tuple[int, int]]:
    """Subset -> (records, right answers) of one predictions file."""
    found: dict[str, tuple[int, int]] = {}
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            n, correct = found.get(record["subset"], (0, 0))
            found[record["subset"]] = (n + 1, correct + (record["predicted"] == record["answer"]))
    return found


def to_csv(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()
