"""A tiny grid end to end in processes of its own: killed and started again, in two processes, with cells that fail."""

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import kill_grid
import pytest

from medcg_jax.config import CONTROLS, ConfigError, DataConfig, EvalConfig, RunConfig, StudyConfig, TrainConfig, replace
from medcg_jax.study.design.schedule import make_plan
from medcg_jax.study.run import claims
from medcg_jax.study.run.grid import reproduce
from medcg_jax.study.stats import probe

RUN = RunConfig(
    name="tiny",
    data=DataConfig(
        train_records_per_subset=24,
        test_records_per_subset=10,
        max_text_tokens=96,
        max_target_tokens=16,
        system_prompt="",
    ),
    base=TrainConfig(steps=6, epochs=1, batch_size=8, learning_rate=1e-3, log_every_steps=1),
    train=TrainConfig(epochs=1, batch_size=8, learning_rate=1e-3, log_every_steps=1, checkpoint_every_steps=2),
    eval=EvalConfig(batch_size=10, max_new_tokens=2, controls=CONTROLS),
    study=StudyConfig(
        tables=("pairs",), targets=("mri-brain-state",), arms=("baseline", "baseline_plus", "trained"), probe=True
    ),
)
TIMEOUT_S = 240
MAIN = """
import json, sys
from medcg_jax.config_file import from_config_dict
from medcg_jax.config import ConfigError
from medcg_jax.study.run.grid import reproduce
try:
    result = reproduce(from_config_dict(json.loads(sys.argv[1])), sys.argv[2])
except ConfigError as error:
    sys.exit(f"refused: {error}")
sys.exit(result["exit_status"])
"""


def start(run: RunConfig, workdir: Path, num_devices: int = 1) -> subprocess.Popen:
    # One device: as on a user's machine, and the same with one process or two.
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={num_devices}")
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": os.getcwd(), "PYTHONUNBUFFERED": "1"}
    with open(workdir.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-c", MAIN, json.dumps(dataclasses.asdict(run)), str(workdir)],
            env=environment,
            stdout=log,
            stderr=log,
        )


def finish(run: RunConfig, workdir: Path, num_devices: int = 1) -> tuple[int, str]:
    """(exit status, what this start printed) of a grid run to its end."""
    log = workdir.with_suffix(".log")
    before = log.stat().st_size if log.exists() else 0
    process = start(run, workdir, num_devices)
    try:
        status = process.wait(TIMEOUT_S)
    finally:
        process.kill()
        process.wait()
    return status, log.read_bytes()[before:].decode()


def kill_when(process: subprocess.Popen, happened) -> None:
    """SIGKILL as soon as `happened()`; fails where the process ends first."""
    wait_for(process, happened)
    kill_grid.kill(process)


def wait_for(process: subprocess.Popen, happened) -> None:
    end = time.monotonic() + TIMEOUT_S
    while not happened():
        assert process.poll() is None, "the grid ended before that"
        assert time.monotonic() < end
        time.sleep(0.005)


def losses_and_answers(workdir: Path) -> tuple[dict[str, list[float]], dict[str, list[str]]]:
    """Of every cell: the losses of its metrics, and the letters it chose."""
    losses, answers = {}, {}
    for path in sorted((workdir / "predictions").iterdir()):
        answers[path.stem] = [json.loads(x)["predicted"] for x in path.read_text().splitlines()]
        metrics = workdir / "metrics" / path.name
        losses[path.stem] = (
            [json.loads(x)["loss"] for x in metrics.read_text().splitlines()] if metrics.exists() else []
        )
    return losses, answers


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(workdir, what was printed) of a grid that nothing disturbed, in one process."""
    workdir = tmp_path_factory.mktemp("grid") / "reference"
    status, out = finish(RUN, workdir)
    assert status == 0, out
    return workdir, out


def test_what_a_grid_leaves(finished):
    workdir, out = finished
    plan = make_plan(RUN)
    with open(workdir / "cells.csv", newline="") as file:
        cells = list(csv.DictReader(file))
    assert [c["cell"] for c in cells] == [c.id for c in plan.cells] and {c["status"] for c in cells} == {"done"}
    with open(workdir / "results.csv", newline="") as file:
        results = list(csv.DictReader(file))
    assert len(results) == len(cells) and {r["n"] for r in results} == {"10"}
    for cell in plan.cells:
        records = [json.loads(x) for x in (workdir / "predictions" / f"{cell.id}.jsonl").read_text().splitlines()]
        assert [r["subset"] for r in records] == ["mri-brain-state"] * 10
        again = [json.loads(x) for x in (workdir / "controls" / f"{cell.id}.jsonl").read_text().splitlines()]
        assert [(a["control"], a["id"]) for a in again] == [
            (name, r["id"]) for name in ("shuffled_images", "shift_1", "blank_images", "text_only") for r in records
        ]  # the target has two options
        assert [r["options"] for r in records] == [a["options"][::-1] for a in again[10:20]]
        # Test records only: nothing of the target, nor of test, was trained on.
        assert all(r["id"].split("/")[1] == "test" for r in records)
        assert lines(workdir / "metrics" / f"{cell.id}.jsonl") == (6 if cell.related else 0)
    probed = [(r["seed"], r["target"], r["features"], r["n"]) for r in probe.read(workdir)]
    assert probed == [(0, "mri-brain-state", name, 10) for name in ("mean", "tokens")]
    assert (workdir / "report" / "index.html").exists()
    assert not list((workdir / "state").glob("checkpoints/*"))
    assert f"{len(cells)}/{len(cells)} cells, 100 % of the cells' steps" in out
    spent = json.loads((workdir / "goodput.json").read_text())
    assert sum(spent["shares"].values()) == pytest.approx(1.0) and spent["num_starts"] == 1
    assert all(spent["seconds"][kind] > 0 for kind in ("productive", "compile", "input", "checkpoint", "evaluation"))
    assert f"goodput {100 * spent['shares']['productive']:.0f} %: " in out
    # One compilation for all: no job after the first two (base tested, one trained) compiled anything.
    counts = [line.rsplit("; ", 1)[1].split(" (")[0] for line in out.splitlines() if "programs" in line]
    assert len(set(counts[1:])) == 1, counts


@pytest.mark.long
def test_killed_anywhere_and_started_again_ends_in_the_same_bytes(finished, tmp_path):
    reference, _ = finished
    workdir = tmp_path / "killed"
    jobs = [job for job in make_plan(RUN).jobs if job.steps]
    metrics = workdir / "metrics"
    kill_when(start(RUN, workdir), lambda: lines(metrics / "base.s0.jsonl") >= 3)
    kill_when(start(RUN, workdir), lambda: (workdir / "state" / "checkpoints" / jobs[0].id / "2").exists())
    kill_when(start(RUN, workdir), lambda: (workdir / "state" / "done" / f"{jobs[1].id}.json").exists())
    assert kill_grid.scores(workdir) != kill_grid.scores(reference)
    status, out = finish(RUN, workdir)
    assert status == 0, out
    assert kill_grid.scores(workdir) == kill_grid.scores(reference)
    log = workdir.with_suffix(".log").read_text()
    assert f"{jobs[0].id}: going on from step" in log  # from its checkpoint, not anew
    assert f"{jobs[1].id}: " not in out  # what was done stays done
    spent = json.loads((workdir / "goodput.json").read_text())
    assert spent["num_starts"] == 4 and spent["seconds"]["restart"] > 0


def test_a_second_start_does_nothing(finished, capfd):
    reference, _ = finished
    before = kill_grid.scores(reference)
    result = reproduce(RUN, reference)
    out = capfd.readouterr().out
    assert (result["exit_status"], result["failed"], result["unfinished"]) == (0, {}, [])
    assert ", 0 to do" in out and "compiled" not in out
    assert kill_grid.scores(reference) == before


def test_another_configuration_is_refused(finished):
    reference, _ = finished
    with pytest.raises(ConfigError, match="train.learning_rate=0.001, not 0.002"):
        reproduce(replace(RUN, train__learning_rate=2e-3), reference)


@pytest.mark.long
def test_two_processes_with_one_killed_and_the_base_reused(finished, tmp_path):
    reference, _ = finished
    workdir = tmp_path / "two"
    run = replace(RUN, study__jobs=2, study__base_dir=str(tmp_path / "bases"))
    shutil.copytree(reference.parent / "bases", tmp_path / "bases")
    process = start(run, workdir)
    done = workdir / "state" / "done"
    wait_for(process, lambda: done.exists() and any(done.iterdir()))
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    os.kill(int(children[0]), signal.SIGKILL)
    try:
        status = process.wait(TIMEOUT_S)
    finally:
        process.kill()
    log = workdir.with_suffix(".log").read_text()
    assert status == 0, log
    assert "worker 0 was ended by SIGKILL; 1 go on" in log
    assert not (workdir / "metrics" / "base.s0.jsonl").exists()  # the base was not trained again
    with open(workdir / "results.csv") as ours, open(reference / "results.csv") as theirs:
        for a, b in zip(csv.DictReader(ours), csv.DictReader(theirs), strict=True):
            assert (a["cell"], a["n"]) == (b["cell"], b["n"])
            # Other threads, other last digits: at most one answer in ten may tip over.
            assert abs(int(a["correct"]) - int(b["correct"])) <= 1
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]


@pytest.mark.long
def test_a_cell_that_diverges_fails_alone(finished, tmp_path):
    reference, _ = finished
    workdir = tmp_path / "diverged"
    run = replace(
        RUN, train__learning_rate=1e30, train__clip_norm=0.0, train__warmup_frac=0.0, train__checkpoint_every_steps=0,
        study__base_dir=str(reference.parent / "bases"), study__cells_at_once=2, eval__controls=(),
    )  # fmt: skip
    status, out = finish(run, workdir)
    assert status == 1, out
    with open(workdir / "cells.csv", newline="") as file:
        cells = list(csv.DictReader(file))
    for cell in cells:
        wanted = "done" if cell["arm"] == "baseline" else "failed: "
        assert cell["status"].startswith(wanted), cell
    assert "step" in next(c["status"] for c in cells if c["arm"] == "trained")
    with open(workdir / "results.csv", newline="") as file:
        assert {r["arm"] for r in csv.DictReader(file)} == {"baseline"}
    status, out = finish(run, workdir)
    assert status == 1 and ", 0 to do" in out  # it would fail again: it is not tried again


@pytest.mark.long
def test_eight_devices_and_four_cells_at_a_time_are_one_device_and_one_cell(finished, tmp_path):
    bases = str(finished[0].parent / "bases")
    # Tests asked again are left out: they are answered by the same program.
    run = replace(RUN, train__epochs=0, train__steps=10, eval__batch_size=12, eval__controls=(), study__base_dir=bases)
    others = {
        "devices": (replace(run, mesh__data=2, mesh__fsdp=2, mesh__tensor=2), 8),
        "cells": (replace(run, study__cells_at_once=4), 1),
    }
    status, out = finish(run, tmp_path / "alone")
    assert status == 0, out
    losses, answers = losses_and_answers(tmp_path / "alone")
    assert {len(x) for x in losses.values()} == {0, 10}
    for name, (other, num_devices) in others.items():
        status, out = finish(other, tmp_path / name, num_devices)
        assert status == 0, out
        their_losses, their_answers = losses_and_answers(tmp_path / name)
        assert their_answers == answers, name
        for cell, expected in losses.items():
            assert their_losses[cell] == pytest.approx(expected, abs=1e-5), (name, cell)
    assert len({tuple(x) for x in losses.values()}) > 3  # cells that differ


# ------------------------------------------------------------------ told to stop, and faults of the disk

SMALL = kill_grid.CONFIG | {
    "study.targets": "('ct-liver-grade',)", "study.tables": "('pairs',)", "eval.controls": "()",
    "study.arms": "('trained',)", "study.seeds": "(0,)", "eval.generate": "False", "base.steps": "4",
    "train.steps": "20", "train.checkpoint_every_steps": "1000",
}  # fmt: skip


@pytest.mark.long
def test_after_sigterm_it_is_saved_given_back_and_gone_on_with(tmp_path):
    workdir, log = tmp_path / "grid", tmp_path / "log"
    more = SMALL | {"study.jobs": "2", "study.base_dir": str(tmp_path / "bases")}
    # One device, compiled as quickly as in other tests.
    quick = {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")}
    process = kill_grid.start(workdir, log, quick, **more)
    try:
        # A cell is being trained when its losses come in.
        wait_for(process, lambda: any(p.stat().st_size for p in workdir.glob("metrics/pairs*.jsonl")))
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 75, log.read_text()[-2000:]
        assert log.read_text().splitlines()[-1].startswith("medcg: ") and "told to stop" in log.read_text()
        folder = workdir / "state" / "claims"
        held = {name: claims._last(folder, name)[1]["pid"] for name in claims.num_holders(folder)}
        assert held and not any(held.values()), held  # 0: given back, where a process that died leaves its number
        saved = [p for p in (workdir / "state" / "checkpoints").glob("*/*") if p.name.isdigit()]
        assert saved  # by the signal alone: the next one was due after a thousand steps
        process = kill_grid.start(workdir, log, quick, **more)
        assert process.wait(TIMEOUT_S) == 0, log.read_text()[-2000:]
        text = log.read_text() + "".join(p.read_text() for p in Path(workdir).glob("logs/*"))
        assert "going on from step" in text
    finally:
        process.kill()
        process.wait()


@pytest.mark.long
def test_faults_of_the_disk_change_nothing(tmp_path, capfd):
    small = {"study.targets": "('ct-liver-grade',)", "study.tables": "('pairs',)"}
    used = kill_grid.run(tmp_path, kills=2, seed=1, ways=kill_grid.WAYS[2:], **small)
    if not used:
        pytest.skip("no file system can be mounted here: a full disk and a read-only workdir were not tried")
    assert used == {"full disk": 1, "read-only": 1}
    out = capfd.readouterr().out
    assert out.count("the same") >= 1 and "status 0" not in out


def test_a_job_trained_twice_is_seen(tmp_path):
    log = tmp_path / "log"
    log.write_text("a.b.s0: 12 steps, 1.0 s; compiled 0 programs\nc.s0: 12 steps, 1.0 s; x\n")
    assert kill_grid.trained_twice(log) == []
    log.write_text(log.read_text() + "a.b.s0: 12 steps, 2.0 s; compiled 0 programs\n")
    assert kill_grid.trained_twice(log) == ["a.b.s0"]
