"""Every file of a finished grid's workdir, broken in every way that is met: one line with its name, status 2."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from fuzz_workdirs import fuzz
from report_grids import json_lines, quick, quick_report, run, run_of, write_json_lines

from medcg_jax.config import ConfigError, replace
from medcg_jax.study.design.schedule import make_plan
from medcg_jax.study.run import grid as grids
from medcg_jax.study.stats import results

TRAINED = "triples.one_each.mri-brain-state.trained.s0"
FILES = (
    "config.json", "cells.csv", "results.csv", "boxes.csv", "contamination.csv", "probe.csv", "goodput.json",
    f"predictions/{TRAINED}.jsonl", f"controls/{TRAINED}.jsonl", f"metrics/{TRAINED}.jsonl",
    "boxes/detection.in_distribution.multi_task.s0.jsonl",
)  # fmt: skip
# The page can stand without them: they are left out, and that is said.
LEFT_OUT = ("goodput.json", "metrics")


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def to_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def to_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def without_utf8(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:20] + b"\xff" + content[20:])


def to_sparse(path: Path) -> None:
    os.truncate(path, 2**40)


DAMAGES = {
    "half": halve,
    "empty": lambda path: path.write_bytes(b""),
    "folder": to_folder,
    "fifo": to_fifo,
    "device": to_device,
    "no UTF-8": without_utf8,
    "list": lambda path: path.write_text("[]\n"),
    "null": lambda path: path.write_text("null\n"),
    "deep": lambda path: path.write_text('{"a":' * 100_000 + "\n"),
    "sparse": to_sparse,
}


DEFAULT_DAMAGES = ("half", "fifo", "no UTF-8", "list")
BY_DAMAGE = pytest.mark.parametrize(
    "damage", [name if name in DEFAULT_DAMAGES else pytest.param(name, marks=pytest.mark.long) for name in DAMAGES]
)


@pytest.fixture
def clean(clean_grid):
    return clean_grid


def damaged(clean: Path, workdir: Path, file: str, damage: str) -> Path:
    shutil.copytree(clean, workdir)
    DAMAGES[damage](workdir / file)
    return workdir / file


def is_one_line(said: str, path: Path) -> bool:
    lines = [line for line in said.splitlines() if line.startswith("medcg: ")]
    return len(lines) == 1 and said.endswith(lines[0] + "\n") and str(path) in lines[0] and len(lines[0]) < 600


def test_the_grid_as_it_is_has_a_report(clean, tmp_path):
    shutil.copytree(clean, tmp_path / "w")
    assert quick_report(tmp_path / "w", "--format=md,tex,csv") == (0, "")
    page = (tmp_path / "w" / "report" / "index.html").read_text()
    for word in ("lesion", "Contamination", "productive", "Another image", "Probe, cells"):
        assert word in page


@BY_DAMAGE
def test_a_broken_file_is_named_in_one_line(clean, tmp_path, damage):
    for number, file in enumerate(FILES):
        workdir = tmp_path / str(number)
        path = damaged(clean, workdir, file, damage)
        began = time.monotonic()
        status, said = quick_report(workdir)
        assert time.monotonic() - began < 30, file
        if file.startswith(LEFT_OUT) and status == 0:
            assert str(path) in said and said.count("\n") == 1, (file, said)
        else:
            assert status == 2 and is_one_line(said, path), (file, status, said)
            assert not (workdir / "report").exists()
        assert not [p for p in workdir.iterdir() if p.name.startswith(".")]


@BY_DAMAGE
def test_two_grids_and_a_folder_of_models_name_it_too(clean, tmp_path, damage):
    folder = tmp_path / "models"
    for model in ("llava15_tiny", "qwen2_vl_tiny"):
        shutil.copytree(clean, folder / model)
        (folder / model / "report").mkdir()
        (folder / model / "report" / "index.html").write_text("before")
    for number, file in enumerate(("config.json", "results.csv", f"predictions/{TRAINED}.jsonl")):
        path = damaged(clean, tmp_path / str(number), file, damage)
        with quick():
            status, said = run("report", str(clean), str(tmp_path / str(number)), f"--out={tmp_path / 'out'}")
            assert status == 2 and is_one_line(said, path), (file, said)
            assert not (tmp_path / "out").exists()
            if number == 2:
                DAMAGES[damage](folder / "llava15_tiny" / file)
                status, said = run("report", str(folder))
                assert status == 2 and is_one_line(said, folder / "llava15_tiny" / file), said
                assert (folder / "llava15_tiny" / "report" / "index.html").read_text() == "before"
                assert not (folder / "report").exists()


@pytest.mark.parametrize("damage", ["half", "empty", "folder", "fifo", "device", "no UTF-8", "list", "sparse"])
def test_a_grid_goes_on_only_from_files_that_are_whole(tmp_path, damage):
    small = run_of(study__tables=("triples",), study__targets=("mri-brain-state",), data__train_records_per_subset=20)
    small = replace(small, data__test_records_per_subset=6, base__steps=0)
    plan = make_plan(small)
    for number, file in enumerate(("config.json", f"state/done/{plan.jobs[0].id}.json")):
        workdir = tmp_path / str(number)
        grids.write_config(small, workdir, plan)
        results.mark_done(workdir, plan.jobs[0].id, {"status": "done", "seconds": 1.5})
        (workdir / "state" / "progress" / plan.jobs[1].id).write_text("x")
        DAMAGES[damage](workdir / file)
        DAMAGES[damage](workdir / "state" / "progress" / plan.jobs[1].id)
        with pytest.raises(ConfigError) as refused:
            grids.reproduce(small, workdir)
        assert str(workdir / file) in str(refused.value) and "\n" not in str(refused.value)


def edited(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def row_of(workdir: Path, cell: str) -> list[str]:
    return next(line.split(",") for line in (workdir / "results.csv").read_text().splitlines() if line.startswith(cell))


@pytest.mark.parametrize(
    ("correct", "share", "words"),
    [
        ("6", "1.000000", "correct=6 of n=6; "),  # the predictions say another number
        ("60", "1.000000", "correct=60 of n=6; expected at most n"),
        (None, "1.000000", "accuracy=1; correct="),
        (None, "nan", 'accuracy="nan": expected a number of 0 to 1'),
    ],
)
def test_results_that_the_predictions_do_not_give_are_refused(clean, tmp_path, correct, share, words):
    shutil.copytree(clean, tmp_path / "w")
    row = row_of(clean, "triples.one_each.mri-brain-state.baseline.s0")
    assert row[6] == "6" and int(row[7]) < 6
    changed = [*row[:7], correct or row[7], share, *row[9:]]
    if correct == "6":
        changed[9:] = ["0.609666", "1.000000"]  # Wilson's of 6 of 6
    edited(tmp_path / "w" / "results.csv", ",".join(row), ",".join(changed))
    status, said = quick_report(tmp_path / "w")
    assert status == 2 and words in said and is_one_line(said, tmp_path / "w" / "results.csv"), said


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("cells.csv", lambda lines: lines[:3], "2 cells; config.json says 5"),
        ("cells.csv", lambda lines: [*lines, lines[1]], "stands there twice"),
        ("cells.csv", lambda lines: [x.replace("triples.one_each", "../../x") for x in lines], "a cell's id"),
        ("cells.csv", lambda lines: [x.replace(",done,", ",perhaps,") for x in lines], "done, waiting or failed"),
        ("cells.csv", lambda lines: [lines[0], lines[1] + ",1", *lines[2:]], "line 2: 11 columns; expected 10"),
        ("results.csv", lambda lines: lines[:-1], "no row of cell"),
        ("results.csv", lambda lines: [*lines, lines[1]], "stands there twice"),
        ("results.csv", lambda lines: [x.replace(",trained,", ",baseline,") for x in lines], 'arm="baseline"; cells'),
        ("boxes.csv", lambda lines: lines[:-1], "no row of cell"),
        ("boxes.csv", lambda lines: [lines[0], *(x.replace(",6,6,", ",6,5,") for x in lines[1:])], "n=5; "),
        (
            "contamination.csv",
            lambda lines: [x.replace("triples", "pairs") for x in lines],
            "expected one of cells.csv",
        ),
        ("probe.csv", lambda lines: [*lines, lines[1]], "stand there twice"),
        ("probe.csv", lambda lines: [x.replace(",6,4,", ",6,5,") for x in lines], "do not follow from correct=5"),
    ],
)
def test_tables_that_do_not_fit_the_grid_are_refused(clean, tmp_path, file, change, words):
    shutil.copytree(clean, tmp_path / "w")
    path = tmp_path / "w" / file
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")
    status, said = quick_report(tmp_path / "w")
    assert status == 2 and words in said and is_one_line(said, path), said


PREDICTIONS = f"predictions/{TRAINED}.jsonl"
BOXES = "boxes/detection.in_distribution.multi_task.s0.jsonl"


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        (PREDICTIONS, {"options": 5}, "options=5: expected a list of 1 to 26 texts"),
        (PREDICTIONS, {"options": None}, "options=null"),
        (PREDICTIONS, {"logprobs": ["x", "y"]}, 'logprobs="x": expected a finite number of at most 0.01'),
        (PREDICTIONS, {"logprobs": [1e308, -1]}, "logprobs=1e+308"),
        (PREDICTIONS, {"logprobs": [-1]}, "logprobs: 1 values; expected a number for each of the 2 options"),
        (PREDICTIONS, {"logprobs": [None, -1]}, "logprobs=null"),
        (PREDICTIONS, {"logprobs": [float("nan"), -1]}, "NaN is no JSON number"),
        (PREDICTIONS, {"logprobs": True}, "logprobs: true or false"),
        (PREDICTIONS, {"id": 5}, "id=5: expected text"),
        (PREDICTIONS, {"id": ["x"]}, 'id=["x"]'),
        (PREDICTIONS, {"id": "mri-brain-state/test/99"}, 'other records of "mri-brain-state"'),
        (PREDICTIONS, {"id": "first"}, "stands in line 1 already"),
        (PREDICTIONS, {"subset": ["x"]}, 'subset=["x"]'),
        (PREDICTIONS, {"subset": "ct-lung-grade"}, 'is of "ct-lung-grade"; results.csv has none'),
        (PREDICTIONS, {"answer": "E"}, 'answer="E": expected one of A, B'),
        (PREDICTIONS, {"predicted": "AB"}, 'predicted="AB"'),
        (PREDICTIONS, {"generated": 5}, "generated=5"),
        (BOXES, {"truth": []}, "truth=[]: expected a list of at least one box"),
        (BOXES, {"truth": [[1, 2, 3]]}, "truth=[[1, 2, 3]]"),
        (BOXES, {"predicted": [[1, 2, 3, "4"]]}, 'predicted="4"'),
        (BOXES, {"predicted": 7}, "predicted=7"),
        (BOXES, {"dice": 2}, "dice=2: expected a finite number of at least 0 and at most 1"),
        (BOXES, {"label": None}, "label=null"),
        (BOXES, {"id": "first"}, "the question of line 1 again"),
        (f"controls/{TRAINED}.jsonl", {"control": 3}, "control=3: expected text"),
        (f"controls/{TRAINED}.jsonl", {"logprobs": {"A": 1}}, "logprobs: an object"),
        (f"controls/{TRAINED}.jsonl", {"control": "two_options"}, "other questions are asked again"),
        (f"metrics/{TRAINED}.jsonl", {"loss": "1"}, 'loss="1"'),
        (f"metrics/{TRAINED}.jsonl", {"step": -1}, "step=-1"),
    ],
)
def test_a_hostile_value_is_refused_by_its_file_line_and_field(clean, tmp_path, file, change, words):
    shutil.copytree(clean, tmp_path / "w")
    path = tmp_path / "w" / file
    lines = path.read_text().splitlines()
    if change.get("id") == "first":
        change = {"id": json.loads(lines[0])["id"]}
    lines[-1] = json.dumps(json.loads(lines[-1]) | change)
    path.write_text("\n".join(lines) + "\n")
    status, said = quick_report(tmp_path / "w")
    if change.get("control") == "two_options":
        path = tmp_path / "w" / "controls"  # whichever of the two that differ is read last
    assert status == 2 and words in said and is_one_line(said, path), said
    if "line" not in words and "other" not in words and "results.csv" not in words:
        assert f"{path}, line {len(lines)}: " in said


def test_a_training_whose_log_ends_early_is_left_out_of_the_losses(clean, tmp_path):
    shutil.copytree(clean, tmp_path / "w")
    path = tmp_path / "w" / "metrics" / f"{TRAINED}.jsonl"
    path.write_text(path.read_text().splitlines()[0] + "\n")
    status, said = quick_report(tmp_path / "w")
    assert status == 0 and said.startswith(f"{path} ends at step 0 of ") and said.count("\n") == 1
    assert "left out of the losses" in (tmp_path / "w" / "report" / "index.html").read_text()


def test_probabilities_that_were_not_recorded_are_no_numbers(clean, tmp_path):
    shutil.copytree(clean, tmp_path / "w")
    for path in [*(tmp_path / "w").glob("predictions/*"), *(tmp_path / "w").glob("controls/*")]:
        write_json_lines(path, [line | {"logprobs": None} for line in json_lines(path)])
    with quick():
        assert run("report", str(tmp_path / "w")) == (0, "")
        assert run("report", str(clean), str(tmp_path / "w"), f"--out={tmp_path / 'out'}") == (0, "")
    table = (tmp_path / "w" / "report" / "tables" / "controls.csv").read_text()
    assert "prior_corrected_accuracy" not in table and "options_2" in table


def test_some_broken_files_of_each_kind_are_refused_or_taken_rightly(tmp_path):
    seen, failures = fuzz(25, 20241220, tmp_path)
    assert not failures
    assert sum(number for (_, how), number in seen.items() if how == "refused") > 10
