"""The files a grid leaves: which jobs are done, cells.csv, results.csv and, where boxes were asked for, boxes.csv.

`results.csv` and `predictions/` hold no times, are written whole or not at all, and in the order of the cells, so that
a grid that was stopped and started again ends in the same bytes.
"""

import csv
import io
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from medcg_jax.config_file import check_recorded
from medcg_jax.eval.boxes import read_answers, summary
from medcg_jax.eval.predictions import prediction_lines, wilson
from medcg_jax.files import write_whole
from medcg_jax.study.design.schedule import Job
from medcg_jax.study.design.suite import Cell
from medcg_jax.train import goodput
from medcg_jax.untrusted import FileError, article_of, check_number, read_json, shown

CELLS_HEADER = ("cell", "table", "row", "arm", "seed", "related", "target", "steps", "status", "seconds")
RESULTS_HEADER = ("cell", "table", "row", "arm", "seed", "target", "n", "correct", "accuracy", "ci_low", "ci_high")
# Scores of `eval.boxes.summary`; n are boxes.
BOX_COUNTS = ("questions", "n", "correct")
BOX_SHARES = (
    "accuracy", "accuracy_low", "accuracy_high", "by_chance", "mean_iou", "mean_iou_low", "mean_iou_high",
    "cumulative_iou", "cumulative_iou_low", "cumulative_iou_high", "unparsed_rate", "dice", "dice_low", "dice_high",
)  # fmt: skip
BOXES_HEADER = ("cell", "table", "row", "arm", "seed", "target", *BOX_COUNTS, *BOX_SHARES)


# A workdir's JSON files; config.json has some 10 kB.
MAX_JSON_BYTES = 2**24


def read_config_file(workdir: str | Path) -> dict:
    """What `config.json` of a grid's workdir holds.

    Returns {"config": the run's sections as nested dicts, "versions": {package: version}, "data": {seed: fingerprint},
    ...}. A file of an earlier version may lack fields of "config"; what is there has its field's type.

    Raises:
      FileError: it is missing or not what a grid writes; one line that names the file and the field.
    """
    path = Path(workdir) / "config.json"
    recorded = read_json(path, max_bytes=MAX_JSON_BYTES)
    if "config" not in recorded:
        raise FileError(f'{path}: "config" is missing: the config.json of a grid\'s workdir is accepted')
    for key in ("config", "versions", "data"):
        if not isinstance(recorded.setdefault(key, {}), dict):
            raise FileError(f'{path}: "{key}" holds {article_of(recorded[key])}; an object is accepted')
    for key in ("versions", "data"):
        for name, value in recorded[key].items():
            if not isinstance(value, str):
                raise FileError(f"{path}: {key}.{shown(name)[1:-1]} holds {article_of(value)}; text is accepted")
    check_recorded(recorded["config"], path)
    return recorded


def state_dir(workdir: Path) -> Path:
    """Where a grid keeps claims, what is done, and checkpoints of what is not."""
    return workdir / "state"


def mark_done(workdir: Path, job: str, outcome: Mapping) -> None:
    """Says that a job is finished. outcome: {"status": "done" or "failed: why", "seconds": float}."""
    write_whole(state_dir(workdir) / "done" / f"{job}.json", json.dumps(dict(outcome)) + "\n")


def done_jobs(workdir: Path) -> set[str]:
    """The ids of the jobs that are finished, from one look at a folder that processes share."""
    folder = state_dir(workdir) / "done"
    names = os.listdir(folder) if folder.is_dir() else ()
    return {name.removesuffix(".json") for name in names if name.endswith(".json") and not name.startswith(".")}


def outcome_of(workdir: Path, job: str) -> dict:
    """What `mark_done` said of a finished job.

    Raises:
      FileError: the file is not what `mark_done` writes.
    """
    path = state_dir(workdir) / "done" / f"{job}.json"
    outcome = read_json(path, max_bytes=MAX_JSON_BYTES)
    if not isinstance(outcome.get("status"), str):
        raise FileError(
            f"{path}: status={shown(outcome.get('status'))}: text is accepted; without the file {job} runs again"
        )
    check_number(outcome.get("seconds"), f"{path}: seconds", least=0)
    return outcome


def all_outcomes(workdir: Path, jobs: Sequence[Job]) -> dict[str, dict]:
    """Job id -> outcome, of every job that is finished."""
    done = done_jobs(workdir)
    return {job.id: outcome_of(workdir, job.id) for job in jobs if job.id in done}


def process_goodput(workdir: Path, *, again: bool, writes: bool) -> goodput.Goodput:
    """The clock of one process of a grid, with a file of its own in `state/goodput`.

    again: the grid was started before. writes: whether this process writes the file.
    """
    folder = state_dir(workdir) / "goodput"
    path = folder / f"{secrets.token_hex(8)}.json" if writes else None
    return goodput.Goodput(path, others=goodput_parts(workdir), restarted=again)


def goodput_parts(workdir: Path) -> list[dict]:
    """What every process of the grid has written of its time, those of earlier starts among them."""
    files = sorted((state_dir(workdir) / "goodput").glob("*.json"))
    return [part for file in files for part in goodput.read_starts(file)]


def is_failure(outcome: Mapping | None) -> bool:
    return outcome is not None and outcome["status"] != "done"


class Tables:
    """Writes cells.csv, results.csv and boxes.csv of the cells done so far; remembers the scores it has read."""

    def __init__(self, workdir: Path, cells: Sequence[Cell], jobs: Sequence[Job]):
        self.workdir, self.cells = workdir, cells
        self._job = {cell.id: job for job in jobs for cell in job.cells}
        self._scores: dict[str, dict[str, tuple[int, int]]] = {}
        self._boxes: dict[str, dict[str, tuple]] = {}

    def write(self, outcomes: Mapping[str, Mapping]) -> None:
        cells, results, boxes = [], [], []
        for cell in self.cells:
            job = self._job[cell.id]
            outcome = outcomes.get(job.id, {"status": "waiting", "seconds": 0.0})
            cells.append((*_key(cell), "+".join(cell.related), "+".join(cell.target), job.steps, outcome["status"],
                          f"{outcome['seconds']:.1f}"))  # fmt: skip
            if outcome["status"] == "done":
                located = self._located(cell)
                boxes += [(*_key(cell), target, *located[target]) for target in cell.target if target in located]
                chosen = [target for target in cell.target if target not in located]
                results += [(*_key(cell), target, *self._scored(cell, target)) for target in chosen]
        write_whole(self.workdir / "cells.csv", to_csv(CELLS_HEADER, cells))
        write_whole(self.workdir / "results.csv", to_csv(RESULTS_HEADER, results))
        if boxes:
            write_whole(self.workdir / "boxes.csv", to_csv(BOXES_HEADER, boxes))

    def _located(self, cell: Cell) -> dict[str, tuple]:
        """Target -> the columns of its line in boxes.csv."""
        if cell.id not in self._boxes:
            self._boxes[cell.id] = box_scores(self.workdir / "boxes" / f"{cell.id}.jsonl")
        return self._boxes[cell.id]

    def _scored(self, cell: Cell, target: str) -> tuple:
        if cell.id not in self._scores:
            self._scores[cell.id] = scores(self.workdir / "predictions" / f"{cell.id}.jsonl")
        if target not in self._scores[cell.id]:
            path = self.workdir / "predictions" / f"{cell.id}.jsonl"
            raise FileError(f"{path}: no answer of {target}, which the cell was tested on")
        n, correct = self._scores[cell.id][target]
        low, high = wilson(correct, n)
        return n, correct, f"{correct / n:.6f}", f"{low:.6f}", f"{high:.6f}"


def _key(cell: Cell) -> tuple:
    return cell.id, cell.table, cell.row, cell.arm, cell.seed


def scores(path: Path) -> dict[str, tuple[int, int]]:
    """Subset -> (records, right answers) of one predictions file."""
    found: dict[str, tuple[int, int]] = {}
    for line in prediction_lines(path):
        n, correct = found.get(line["subset"], (0, 0))
        found[line["subset"]] = (n + 1, correct + (line["predicted"] == line["answer"]))
    return found


def box_scores(path: Path) -> dict[str, tuple]:
    """Subset -> its scores in the order of `BOX_COUNTS` and `BOX_SHARES`, of one file of boxes; {} without it."""
    answers = read_answers(path) if path.exists() else []
    found = {}
    for subset in dict.fromkeys(answer.subset for answer in answers):
        scores = summary([answer for answer in answers if answer.subset == subset])
        shares = ["" if scores[name] is None else f"{scores[name]:.6f}" for name in BOX_SHARES]
        found[subset] = (*(scores[name] for name in BOX_COUNTS), *shares)
    return found


def to_csv(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()
