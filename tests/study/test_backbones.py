"""One grid with several models: what it leaves, its page, and models it refuses."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from medcg_jax.cli import main
from medcg_jax.config import MODELS, ConfigError, replace
from medcg_jax.config_file import load
from medcg_jax.data.phantom.source import PhantomSource
from medcg_jax.eval.boxes import read_answers, summary
from medcg_jax.study.design.schedule import make_plan, runs_by_model
from medcg_jax.study.run.grid import reproduce

ROOT = Path(__file__).parents[2]
QUICK = str(ROOT / "configs" / "backbones_quick.py")
# What `phantom.py:tiny` changes: a few steps of everything.
TINY = {
    "data.train_records_per_subset": "8", "data.test_records_per_subset": "4", "base.steps": "2", "base.epochs": "1",
    "train.epochs": "0", "train.steps": "2", "study.models": "('llava15_tiny', 'next_chat_tiny')",
    "study.box_subsets": "('ct-liver-det', 'ct-brain-det', 'mri-liver-det', 'mri-brain-det')",
    "model.scan_unroll": "1", "data.max_box_text_tokens": "34",
}  # fmt: skip
MODELS_RUN = ("llava15_tiny", "next_chat_tiny")


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("models") / "grid"
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    command = [sys.executable, "-m", "medcg_jax.cli", "reproduce", f"--config={QUICK}", f"--workdir={workdir}"]
    done = subprocess.run(
        [*command, *(f"--config.{k}={v}" for k, v in TINY.items())],
        env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return workdir, done.stdout


def test_every_model_leaves_a_grid_and_the_page_has_all(grid):
    workdir, out = grid
    for model in MODELS_RUN:
        assert (workdir / model / "results.csv").is_file() and (workdir / model / "report" / "index.html").is_file()
        assert f"-- {model}\n" in out and f"report: {workdir / model / 'report' / 'index.html'}" in out
    with open(workdir / "report" / "tables" / "models.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    both = [(part, arm) for part in ("in_distribution", "out_of_distribution") for arm in ("baseline", "multi_task")]
    directions = ("fixed_modality", "fixed_area", "modality_area")
    expected = {"llava15_tiny": both, "next_chat_tiny": list(both)}
    expected["next_chat_tiny"] += [(part, arm) for part in directions for arm in ("baseline", "trained")]
    found = [(row["model"], row["part"], row["arm"]) for row in rows]
    assert found == [(model, *line) for model in MODELS_RUN for line in expected[model]]
    for row in rows:
        with open(workdir / row["model"] / "results.csv", newline="") as file:
            own = [
                r for r in csv.DictReader(file)
                if r["row"].split("/")[0] == row["part"] and (r["table"], r["arm"]) == (row["table"], row["arm"])
            ]  # fmt: skip
        n, correct = (sum(int(r[key]) for r in own) for key in ("n", "correct"))
        assert (int(row["n"]), float(row["accuracy"])) == (n, pytest.approx(correct / n, abs=1e-6))
        assert float(row["ci_low"]) <= float(row["accuracy"]) <= float(row["ci_high"])
        assert float(row["chance"]) == 0.5
    page = (workdir / "report" / "index.html").read_text()
    assert "../next_chat_tiny/report/index.html" in page and not re.search(r"https?://(?!www\.w3\.org)", page)


def test_boxes_are_scored_apart_from_letters_and_shown(grid):
    workdir, _ = grid
    own = workdir / "next_chat_tiny"
    assert not (workdir / "llava15_tiny" / "boxes.csv").exists()
    with open(own / "boxes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    inside, outside = ["ct-liver-det", "mri-brain-det"], ["ct-brain-det", "mri-liver-det"]
    assert [(r["row"], r["arm"], r["target"]) for r in rows] == [
        (row, arm, target)
        for row, targets in (("in_distribution", inside), ("out_of_distribution", outside))
        for arm in ("baseline", "multi_task")
        for target in sorted(targets, key=[r["target"] for r in rows].index)
    ]
    (seed,) = load(QUICK, TINY).study.seeds
    source = PhantomSource(seed, 8, 4)
    lesions = {name: sum(len(r.boxes) for r in source.records(name, "test").records) for name in (*inside, *outside)}
    for row in rows:
        answers = read_answers(own / "boxes" / f"{row['cell']}.jsonl")
        scores = summary([a for a in answers if a.subset == row["target"]])
        assert (int(row["questions"]), int(row["n"]), int(row["correct"])) == (
            4,
            lesions[row["target"]],
            scores["correct"],
        )
        assert float(row["mean_iou"]) == pytest.approx(scores["mean_iou"], abs=1e-6)
    with open(own / "results.csv", newline="") as file:
        assert "detection" not in {r["table"] for r in csv.DictReader(file)}
    page = (own / "report" / "index.html").read_text()
    assert page.count("data:image/png") >= 8 and "Images with both boxes" in page
    # The models' own page has one line for each arm: the sum over the subsets.
    with open(workdir / "report" / "tables" / "detection_in_distribution.csv", newline="") as file:
        sums = list(csv.DictReader(file))
    number = str(sum(lesions[name] for name in inside))
    assert [(r["model"], r["arm"], r["n"]) for r in sums] == [
        ("next_chat_tiny", "Baseline", number), ("next_chat_tiny", "Multi-task", number)
    ]  # fmt: skip


def test_the_page_comes_again_from_the_files_alone_and_a_second_start_trains_nothing(grid, capfd):
    workdir, _ = grid
    tables = [path for model in MODELS_RUN for path in (workdir / model).glob("*.csv")]
    files = [path for path in workdir.rglob("report/**/*") if path.suffix in (".html", ".csv", ".svg")] + tables
    before = {path: path.read_bytes() for path in files}
    assert main(["report", str(workdir)]) == 0
    assert {path: path.read_bytes() for path in before} == before and len(before) > 20
    capfd.readouterr()
    assert reproduce(load(QUICK, TINY), workdir)["exit_status"] == 0
    assert ", 0 to do; " in capfd.readouterr().out
    assert {path: path.read_bytes() for path in tables} == {path: before[path] for path in tables}


def test_every_cell_and_job_has_its_model():
    run = load(QUICK, TINY)
    plan = make_plan(run)
    assert {cell.model for cell in plan.cells} == set(MODELS_RUN) == set(plan.runs)
    assert all(cell.model == job.model for job in plan.jobs for cell in job.cells)
    for model, own in plan.runs.items():
        assert plan.of(model) == make_plan(own) and own.study.models == ()


def test_a_models_run_is_the_grids_with_its_name():
    run = load(QUICK)
    for model, own in runs_by_model(run).items():
        assert (own.model.name, own.study.models, own.study.jobs) == (model, (), 1)
        # Rows may be of another length; the recipe is the same for all.
        assert (own.train, own.data.source) == (run.train, run.data.source)
        assert replace(own.base, steps=run.base.steps) == run.base
        takes_boxes = MODELS[model] in ("minigpt_v2", "next_chat")
        assert own.study.tables == (run.study.tables if takes_boxes else ("multi_task",))
        assert ("boxes" in own.model.trainable) == (MODELS[model] == "next_chat")
    assert len({MODELS[model] for model in run.study.models}) == len(run.study.models)


def test_what_is_set_for_one_model_is_set_for_it_alone():
    flags = {"study.model_flags": "{'llava15_tiny': ('data.max_text_tokens=31', 'train.learning_rate=2e-3')}"}
    run = load(QUICK, flags)
    runs = runs_by_model(run)
    one, other = runs["llava15_tiny"], runs["qwen2_vl_tiny"]
    assert (one.data.max_text_tokens, one.train.learning_rate) == (31, 2e-3)
    assert (other.data, other.train) == (run.data, run.train)


@pytest.mark.parametrize(("field", "value", "message"), [
    ("models", ("llava2",), "study.models='llava2': .*one of .*qwen2_vl_tiny"),
    ("model_flags", {"llava16": ()}, "study.model_flags='llava16': .*one of llava15_tiny"),
    ("model_flags", {"llava15_tiny": ("data.max_text_toens=3",)}, "did you mean config.data.max_text_tokens"),
    ("model_flags", {"llava15_tiny": ("data.max_text_tokens",)}, "config.data.max_text_tokens=: .*an int"),
])  # fmt: skip
def test_models_and_flags_that_cannot_be_used_are_refused(field, value, message):
    with pytest.raises(ConfigError, match=message):
        runs_by_model(load(QUICK, {f"study.{field}": repr(value)}))
