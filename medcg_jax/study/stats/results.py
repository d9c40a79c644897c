"""The files of a grid: finished jobs, cells.csv, results.csv and, where boxes were asked for, boxes.csv.

`results.csv` and `predictions/` hold no times, are written whole or not at all, and follow the order of the cells. So a
grid that was stopped and restarted ends in the same bytes.
"""

import csv
import io
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from medcg_jax.config import MODELS
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


# The section of choices that are no setting: the code has them so.
DESIGN = "design"
# A workdir's JSON files; config.json has some 10 kB.
MAX_JSON_BYTES = 2**24


def read_config_file(workdir: str | Path) -> dict:
    """The contents of a grid's `config.json`.

    Returns {"config": the run's sections as nested dicts, "versions": {package: version}, "data": {seed: fingerprint},
    "commit" and "date" ("" in files of an earlier version), ...}. A file of an earlier version may lack fields of "config"; each value there has its field's type.

    Raises:
      FileError: it is missing or not what a grid writes; the message names the file and the field.
    """
    path = Path(workdir) / "config.json"
    recorded = read_json(path, max_bytes=MAX_JSON_BYTES)
    if "config" not in recorded:
        raise FileError(f'{path}: "config" is missing: expected the config.json of a grid\'s workdir')
    for key in ("config", "versions", "data", "short"):
        if not isinstance(recorded.setdefault(key, {}), dict):
            raise FileError(f'{path}: "{key}" holds {article_of(recorded[key])}; expected an object')
    for key in ("commit", "date"):
        if not isinstance(recorded.setdefault(key, ""), str):
            raise FileError(f'{path}: "{key}" holds {article_of(recorded[key])}; expected text')
    for key in ("versions", "data"):
        for name, value in recorded[key].items():
            if not isinstance(value, str):
                raise FileError(f"{path}: {key}.{shown(name)[1:-1]} holds {article_of(value)}; expected text")
    check_recorded(recorded["config"], path)
    return recorded


def choices(config: Mapping[str, Any]) -> list[tuple[str, Any, bool, str]]:
    """The project's choices where the paper is silent or known at second hand, in the order of `choices.json`: (field,
    value, whether full-size configs have this value, reason). A field of the section `DESIGN` is no setting; its value
    is in words.

    "The digest" in the reasons is a third party's summary of the paper's published version (ACL 2025). It gives some
    settings that the pages of arXiv 2412.20070, as far as they were read, do not.

    config: as `config` in config.json; that of an earlier version may lack a field. A family's choice replaces the
    general one.
    """
    family, rows = MODELS[config["model"]["name"]], {}
    listed = json.loads(resources.files("medcg_jax.study.stats").joinpath("choices.json").read_text(encoding="utf-8"))
    for choice in listed:
        section, _, name = choice["field"].partition(".")
        values = {name: choice["value"]} if section == DESIGN else config.get(section, {})
        if choice["family"] in ("", family) and name in values:
            value = values[name]
            is_chosen = json.loads(json.dumps(value)) == choice["value"]
            rows[choice["field"]] = (choice["field"], value, is_chosen, choice["why"])
    return list(rows.values())


def state_dir(workdir: Path) -> Path:
    """The folder of a grid's claims, outcomes of finished jobs, and checkpoints of unfinished ones."""
    return workdir / "state"


def mark_done(workdir: Path, job: str, outcome: Mapping) -> None:
    """Marks a job as finished. outcome: {"status": "done" or "failed: why", "seconds": float}."""
    write_whole(state_dir(workdir) / "done" / f"{job}.json", json.dumps(dict(outcome)) + "\n")


def done_jobs(workdir: Path) -> set[str]:
    """The ids of the finished jobs, from one listing of a folder that processes share."""
    folder = state_dir(workdir) / "done"
    names = os.listdir(folder) if folder.is_dir() else ()
    return {name.removesuffix(".json") for name in names if name.endswith(".json") and not name.startswith(".")}


def outcome_of(workdir: Path, job: str) -> dict:
    """The outcome that `mark_done` wrote for a job.

    Raises:
      FileError: the file is not what `mark_done` writes.
    """
    path = state_dir(workdir) / "done" / f"{job}.json"
    outcome = read_json(path, max_bytes=MAX_JSON_BYTES)
    if not isinstance(outcome.get("status"), str):
        raise FileError(
            f"{path}: status={shown(outcome.get('status'))}: expected text; without the file {job} runs again"
        )
    check_number(outcome.get("seconds"), f"{path}: seconds", least=0)
    return outcome


def all_outcomes(workdir: Path, jobs: Sequence[Job]) -> dict[str, dict]:
    """Job id -> outcome, of the finished jobs."""
    done = done_jobs(workdir)
    return {job.id: outcome_of(workdir, job.id) for job in jobs if job.id in done}


def process_goodput(
    workdir: Path, *, restarted: bool, writes: bool, devices: tuple[str, int] | None = None
) -> goodput.Goodput:
    """The clock of one process of a grid, with a file of its own in `state/goodput`.

    restarted: whether the grid was started before. writes: whether this process writes the file. devices: (kind, number)
    of all that the process computes on, together with others of its run.
    """
    folder = state_dir(workdir) / "goodput"
    path = folder / f"{secrets.token_hex(8)}.json" if writes else None
    return goodput.Goodput(path, others=goodput_parts(workdir), restarted=restarted, devices=devices)


def goodput_parts(workdir: Path) -> list[dict]:
    """The times written by all processes of the grid, earlier starts included."""
    files = sorted((state_dir(workdir) / "goodput").glob("*.json"))
    return [start for file in files for start in goodput.read_starts(file)]


def is_failure(outcome: Mapping | None) -> bool:
    return outcome is not None and outcome["status"] != "done"


class Tables:
    """Writes cells.csv, results.csv and boxes.csv of the finished cells; keeps the scores that it has read."""

    def __init__(self, workdir: Path, cells: Sequence[Cell], jobs: Sequence[Job]):
        self.workdir, self.cells = workdir, cells
        self._job = {cell.id: job for job in jobs for cell in job.cells}
        self._scores: dict[str, tuple[dict, dict]] = {}

    def write(self, outcomes: Mapping[str, Mapping]) -> None:
        """outcomes: as `all_outcomes`."""
        cells, results, boxes = [], [], []
        for cell in self.cells:
            job = self._job[cell.id]
            outcome = outcomes.get(job.id, {"status": "waiting", "seconds": 0.0})
            key = (cell.id, cell.table, str(cell.row), cell.arm, cell.seed)
            status = (outcome["status"], f"{outcome['seconds']:.1f}")
            cells.append((*key, "+".join(cell.related), "+".join(cell.target), job.steps, *status))
            if outcome["status"] == "done":
                letters, located = self._scores_of(cell)
                for target in cell.target:
                    if target in located:
                        boxes.append((*key, target, *located[target]))
                    elif target in letters:
                        n, correct = letters[target]
                        shares = (correct / n, *wilson(correct, n))
                        results.append((*key, target, n, correct, *(f"{share:.6f}" for share in shares)))
                    else:
                        path = self.workdir / "predictions" / f"{cell.id}.jsonl"
                        raise FileError(f"{path}: no answer of {target}, which the cell was tested on")
        write_whole(self.workdir / "cells.csv", to_csv(CELLS_HEADER, cells))
        write_whole(self.workdir / "results.csv", to_csv(RESULTS_HEADER, results))
        if boxes:
            write_whole(self.workdir / "boxes.csv", to_csv(BOXES_HEADER, boxes))

    def _scores_of(self, cell: Cell) -> tuple[dict, dict]:
        """(`scores`, `box_scores`) of a cell's answers."""
        if cell.id not in self._scores:
            located = box_scores(self.workdir / "boxes" / f"{cell.id}.jsonl")
            path = self.workdir / "predictions" / f"{cell.id}.jsonl"
            self._scores[cell.id] = scores(path) if set(cell.target) - located.keys() else {}, located
        return self._scores[cell.id]


def scores(path: Path) -> dict[str, tuple[int, int]]:
    """Subset -> (records, right answers) of one predictions file."""
    counts: dict[str, tuple[int, int]] = {}
    for line in prediction_lines(path):
        n, correct = counts.get(line["subset"], (0, 0))
        counts[line["subset"]] = (n + 1, correct + (line["predicted"] == line["answer"]))
    return counts


def box_scores(path: Path) -> dict[str, tuple]:
    """Subset -> its scores in the order of `BOX_COUNTS` and `BOX_SHARES`, of one file of boxes; {} without a file."""
    answers = read_answers(path) if path.exists() else []
    rows = {}
    for subset in dict.fromkeys(answer.subset for answer in answers):
        values = summary([answer for answer in answers if answer.subset == subset])
        shares = ["" if values[name] is None else f"{values[name]:.6f}" for name in BOX_SHARES]
        rows[subset] = (*(values[name] for name in BOX_COUNTS), *shares)
    return rows


def to_csv(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()
