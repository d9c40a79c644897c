"""Made-up grids for the tests of the report: the files a grid leaves, with effects as large as asked for."""

import contextlib
import csv
import dataclasses
import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from unittest import mock

from record_sets import with_four_options
from worlds import PAPER_ARMS

from medcg_jax import cli
from medcg_jax.config import CONTROLS, TABLES, DataConfig, RunConfig, StudyConfig, TrainConfig, replace
from medcg_jax.data.controls import control_sets
from medcg_jax.data.records import LETTERS, RecordSet, Source
from medcg_jax.data.sources import open_source
from medcg_jax.eval.boxes import BoxAnswer, write_answers
from medcg_jax.eval.predictions import wilson
from medcg_jax.eval.probe import FEATURES
from medcg_jax.study.design import suite
from medcg_jax.study.stats import contamination, probe, results
from medcg_jax.study.stats.controls import BLIND
from medcg_jax.train import goodput

CELLS = ("cell", "table", "row", "arm", "seed", "related", "target", "steps", "status", "seconds")
RESULTS = ("cell", "table", "row", "arm", "seed", "target", "n", "correct", "accuracy", "ci_low", "ci_high")
FULL_TARGETS = ("mri-brain-state", "oct-skin-grade")
# Target whose questions have four options; those of phantoms have two.
FOUR_OPTIONS = FULL_TARGETS[1]
SIZES = {"data__train_records_per_subset": 20, "data__test_records_per_subset": 24}
# Arm -> probability of a right answer beyond chance.
SKILL = {
    "baseline": 0.0, "baseline_plus": -0.03, "trained": 0.6, "all_related": 0.65, "all_unrelated": -0.02,
    "wo_modality": 0.55, "wo_area": 0.5, "wo_task": 0.02, "random_removal_modality": 0.56, "random_removal_area": 0.56,
    "random_removal_task": 0.56, "same_task": 0.3, "all_data": 0.68, "single_task": 0.7, "multi_task": 0.75,
    "single_1": 0.2, "single_2": 0.25, "single_3": 0.05, "filler_1": 0.2, "filler_2": 0.2, "filler_3": 0.0,
    "words_only": 0.1, "no_images": 0.0,
}  # fmt: skip


def skill_of(cell: suite.Cell) -> float:
    """How far above chance a cell is: 1 is always right."""
    if cell.arm.startswith("efficiency_"):
        records = int(cell.arm.rsplit("_", 1)[1])
        start = {"with_related": 0.55, "with_unrelated": 0.05}.get(cell.row.part, 0.0)
        return start + (0.9 - start) * (1 - math.exp(-records / 60))
    return 0.15 if (cell.table, cell.arm) == ("triples", "trained") else SKILL[cell.arm.removesuffix("_updates")]


def run_of(**changes) -> RunConfig:
    """A small phantom run of the paper's arms and controls (`study__arms=()`: all); `changes` as of `config.replace`."""
    study = StudyConfig()
    curve = [f"efficiency_{n}" for n in (*study.efficiency_records, 20)]  # and all that a target has
    run = RunConfig(
        name="made", data=DataConfig(train_records_per_subset=100, test_records_per_subset=24),
        base=TrainConfig(steps=100), train=TrainConfig(epochs=4, learning_rate=1e-3),
        study=replace(study, arms=(*PAPER_ARMS, *curve)),
    )  # fmt: skip
    return replace(run, **changes)


def make_grid(
    workdir: Path,
    run: RunConfig,
    *,
    skill: Callable[[suite.Cell], float] = skill_of,
    status: Callable[[suite.Cell], str] = lambda cell: "done",
    options_text: Callable[[str], str] = str,
) -> Path:
    """Writes a grid's files as `medcg reproduce` does; every answer is a draw with the cell's skill."""
    sources = {seed: open_source(dataclasses.replace(run.data, seed=run.data.seed + seed)) for seed in run.study.seeds}
    cells = suite.expand(run, next(iter(sources.values())).subsets)
    for name in ("predictions", "metrics"):
        (workdir / name).mkdir(parents=True)
    config = {
        "config": dataclasses.asdict(run),
        "versions": {"python": "3.11.9", "medcg-jax": "0.1.0", "jax": "0.10.2"},
        "data": {str(seed): source.fingerprint() for seed, source in sources.items()},
        "cells": len(cells),
    }
    (workdir / "config.json").write_text(json.dumps(config))
    rows, results = [], []
    for cell in cells:
        key = (cell.id, cell.table, cell.row, cell.arm, cell.seed)
        steps, state = round(run.train.epochs * cell.total_records / 32), status(cell)
        seconds = f"{0.04 * steps + 1 if state == 'done' else 0:.1f}"
        rows.append((*key, "+".join(cell.related), "+".join(cell.target), steps, state, seconds))
        if state == "done":
            scored = write_predictions(workdir, cell, sources[cell.seed], skill(cell), options_text)
            results += [(*key, t, n, c, f"{c / n:.6f}", *(f"{x:.6f}" for x in wilson(c, n))) for t, n, c in scored]
            write_metrics(workdir, cell, steps)
    write_csv(workdir / "cells.csv", CELLS, rows)
    write_csv(workdir / "results.csv", RESULTS, results)
    return workdir


def records_of(source: Source, subset: str) -> RecordSet:
    records = source.records(subset, "test")
    return with_four_options(records) if subset == FOUR_OPTIONS else records


def write_predictions(workdir, cell: suite.Cell, source, skill: float, options_text) -> list[tuple[str, int, int]]:
    scored = []
    with open(workdir / "predictions" / f"{cell.id}.jsonl", "w", encoding="utf-8") as file:
        for target in cell.target:
            random = Random(f"{cell.id}/{target}")
            records, correct = records_of(source, target).records, 0
            lean = random.uniform(-0.1, 0.1)
            for record in records:
                chance = 1 / len(record.options)
                right = random.random() < min(1.0, max(0.0, chance + (1 - chance) * (skill + lean * (skill > 0.1))))
                letters = LETTERS[: len(record.options)]
                wrong = [letter for letter in letters if letter != record.answer]
                predicted = record.answer if right else random.choice(wrong)
                correct += right
                best = random.uniform(chance, 1.0)
                others = (0.98 - 0.98 * best) / (len(letters) - 1)
                line = {
                    "id": record.id, "subset": record.subset, "options": [options_text(o) for o in record.options],
                    "answer": record.answer, "predicted": predicted,
                    "logprobs": [
                        round(math.log(max(0.98 * best if x == predicted else others, 1e-6)), 4) for x in letters
                    ],
                    "generated": predicted if random.random() > 0.05 else "the image",
                }  # fmt: skip
                file.write(json.dumps(line) + "\n")
            scored.append((target, len(records), correct))
    return scored


def write_controls(workdir: Path, seed: int, blind: bool = True) -> None:
    """Controls of every cell: right where the plain answer was; without its image A, or (not blind) still right."""
    sizes = {key.removeprefix("data__"): value for key, value in SIZES.items()}
    source = open_source(DataConfig(seed=seed, **sizes))
    for path in sorted((workdir / "predictions").glob(f"*.s{seed}.jsonl")):
        plain = {(line["subset"], line["id"]): line for line in json_lines(path)}
        lines = []
        for subset in dict.fromkeys(subset for subset, _ in plain):
            for name, asked in control_sets(records_of(source, subset), CONTROLS, 0).items():
                for record in asked.records:
                    line = plain[subset, record.id]
                    other = next(letter for letter in LETTERS if letter != record.answer)
                    predicted = record.answer if line["predicted"] == line["answer"] else other
                    if name in BLIND and blind:
                        predicted = "A"
                    lines.append(
                        {"id": record.id, "subset": subset, "options": record.options, "answer": record.answer,
                         "predicted": predicted, "logprobs": [-1.0] * len(record.options), "generated": None,
                         "control": name}
                    )  # fmt: skip
        write_json_lines(workdir / "controls" / path.name, lines)


def score_again(workdir: Path) -> None:
    """Writes results.csv anew from predictions that a test has changed."""
    rows = [list(row.values()) for row in read_csv(workdir / "results.csv")]
    for row in rows:
        n, correct = results.scores(workdir / "predictions" / f"{row[0]}.jsonl")[row[5]]
        row[6:] = [n, correct, *(f"{x:.6f}" for x in (correct / n, *wilson(correct, n)))]
    write_csv(workdir / "results.csv", RESULTS, rows)


def write_metrics(workdir, cell: suite.Cell, steps: int) -> None:
    if not steps:
        return
    random = Random(cell.id)
    lines = [
        {"step": step, "loss": 0.3 + 1.2 * math.exp(-3 * step / steps) + random.uniform(0, 0.1), "lr": 1e-3,
         "grad_norm": 1.0, "samples_per_s": 800.0, "tokens_per_s": 4e4, "mfu": None, "data_wait": 0.01}
        for step in (*range(0, steps, 10), steps)
    ]  # fmt: skip
    write_json_lines(workdir / "metrics" / f"{cell.id}.jsonl", lines)


def make_full_grid(workdir: Path) -> Path:
    """A grid of all tables with two targets and seeds, whose tests were asked again."""
    make_grid(workdir, run_of(study__tables=TABLES, study__targets=FULL_TARGETS, study__seeds=(0, 1), **SIZES))
    for seed in (0, 1):
        write_controls(workdir, seed)
    return workdir


def small_grid(workdir: Path) -> Path:
    """A finished grid of five cells with a file of each kind that a workdir may hold."""
    run = run_of(
        study__tables=("triples", "detection"), study__targets=("mri-brain-state",), data__train_records_per_subset=20,
        data__test_records_per_subset=6, eval__controls=("shuffled_images",),
    )  # fmt: skip
    papers = ("baseline", "baseline_plus", "trained")
    make_grid(workdir, replace(run, study__tables=("triples",), study__arms=papers))
    cells = [line.split(",") for line in (workdir / "cells.csv").read_text().splitlines()]
    for path in sorted((workdir / "predictions").glob("*.jsonl")):
        lines = [line | {"control": "shuffled_images"} for line in json_lines(path)]
        write_json_lines(workdir / "controls" / path.name, lines)
    boxes, subset = [], "ct-brain-det"
    for arm, related in (("baseline", ""), ("multi_task", subset)):
        cell = f"detection.in_distribution.{arm}.s0"
        path = workdir / "boxes" / f"{cell}.jsonl"
        answers = [
            BoxAnswer(f"{subset}/test/{i}", subset, "lesion", ((4.0, 4.0, 20.0, 20.0 + i),),
                      None if i == 3 else ((4.0, 5.0 + i, 20.0, 20.0),), "[4, 5]", 0.5)
            for i in range(6)
        ]  # fmt: skip
        write_answers(path, answers)
        key = (cell, "detection", "in_distribution", arm, "0")
        cells.append([*key, related, subset, "5" if related else "0", "done", "1.5"])
        boxes += [(*key, target, *scores) for target, scores in results.box_scores(path).items()]
    write_csv(workdir / "cells.csv", CELLS, cells[1:])
    write_csv(workdir / "boxes.csv", results.BOXES_HEADER, boxes)
    trained = next(row[0] for row in cells if row[3] == "trained")
    leak = (trained, "near", "ct-brain-state/train/1", "mri-brain-state/test/2", 3, "reported", "mirrored")
    write_csv(workdir / "contamination.csv", contamination.HEADER, [leak])
    shares = [f"{share:.6f}" for share in (4 / 6, *wilson(4, 6))]
    probes = [("0", "mri-brain-state", name, 20, 6, 4, *shares, 0.01, "0.700000") for name in FEATURES]
    write_csv(workdir / probe.FILE, probe.HEADER, probes)
    goodput.write(workdir / goodput.FILE, [{"seconds": {"productive": 8.0, "compile": 2.0}, "reached": {trained: 5}}])
    config = json.loads((workdir / "config.json").read_text())
    config |= {"cells": len(cells) - 1, "config": dataclasses.asdict(run)}
    (workdir / "config.json").write_text(json.dumps(config))
    return workdir


def printed_grid(workdir: Path, rows: Sequence[tuple[str, str, str, dict[str, int]]], **changes) -> Path:
    """A grid of two seeds of the same ten records, of released data unless `changes` say otherwise.

    rows: (table, row, training subsets, arm -> its right answers at seed 0; at seed 1 one less).
    """
    run = run_of(
        **{"data__source": "release", "model__name": "llava15_7b", "study__seeds": (0, 1)} | changes,
        study__tables=tuple(dict.fromkeys(table for table, *_ in rows)),
    )
    workdir.mkdir()
    cells, results = [], []
    for table, row, related, arms in rows:
        target = related if table == "multi_task" else row.split("/")[1]
        for arm, seed in ((arm, seed) for arm in arms for seed in (0, 1)):
            right, name = arms[arm] - seed, f"{table}.{row.replace('/', '.')}.{arm}.s{seed}"
            key = (name, table, row, arm, seed)
            cells.append((*key, "" if arm == "baseline" else related, target, 10, "done", 1.0))
            results.append((*key, target, 10, right, right / 10, *wilson(right, 10)))
            lines = [
                {"id": f"{target}/test/{i}", "subset": target, "options": ["x", "y"], "answer": "A",
                 "predicted": "A" if i < right else "B", "logprobs": [-0.7, -0.7], "generated": None}
                for i in range(10)
            ]  # fmt: skip
            write_json_lines(workdir / "predictions" / f"{name}.jsonl", lines)
    config = {"config": dataclasses.asdict(run), "versions": {}, "data": {}, "cells": len(cells)}
    (workdir / "config.json").write_text(json.dumps(config))
    write_csv(workdir / "cells.csv", CELLS, cells)
    write_csv(workdir / "results.csv", RESULTS, results)
    return workdir


def bench_result(batch: int, ratio: float, device: str = "cpu") -> dict:
    """A result of `medcg bench`: a training step here and in PyTorch."""

    def spread(value: float) -> dict:
        return {"median": value, "min": 0.9 * value, "max": 1.2 * value, "n": 5}

    def step(seconds: float) -> dict:
        return {"step_s": spread(seconds), "cpu_s": spread(2 * seconds), "num_samples": batch}

    return {
        "model": "llava15_bench", "stages": ["train"], "device": device, "num_devices": 1, "compute_dtype": "float32",
        "versions": {"jax": "0.10.2", "torch": "2.13.0"}, "notes": ["a note <b>"],
        "train": {"batch": {"size": batch}, "runners": {"port": step(0.5), "torch eager": step(0.5 * ratio)}},
        "ratios": {"train_vs_eager": {**spread(ratio), "by": "cpu" if device == "cpu" else "wall"}},
    }  # fmt: skip


def read_csv(path: Path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_json_lines(path: Path, lines: Sequence[dict]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def change_config(workdir: Path, data_fields: dict | None = None, **entries) -> None:
    """Changes entries of a grid's config.json. data_fields: of the configuration's section `data`."""
    config = json.loads((workdir / "config.json").read_text()) | entries
    config["config"]["data"] |= data_fields or {}
    (workdir / "config.json").write_text(json.dumps(config))


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


@contextlib.contextmanager
def quick():
    """Reports without drawings (most of their time), and without what no file of a workdir decides."""
    from medcg_jax.study.report.drawing import Figure

    def undrawn(folder, name, title, caption, height_in, paint, width_in=1.0):
        return Figure(name, title, caption, "<svg></svg>", 1)

    with contextlib.ExitStack() as stack:
        for name in ("plots", "curves", "compare"):
            stack.enter_context(mock.patch(f"medcg_jax.study.report.{name}.draw", undrawn))
        stack.enter_context(mock.patch("medcg_jax.study.report.sections.power", lambda: ""))
        stack.enter_context(mock.patch("gc.collect"))  # by statsmodels: most of the rest
        yield


def run(*argv: str) -> tuple[int, str]:
    """(status, standard error) of the command."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        return cli.main(list(argv)), err.getvalue()


def quick_report(workdir: Path, *flags: str) -> tuple[int, str]:
    with quick():
        return run("report", str(workdir), *flags)
