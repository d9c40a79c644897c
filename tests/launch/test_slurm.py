"""A grid as a job array: what would be submitted, and two tasks under a real SLURM that is started for these tests."""

import json
import os
import shlex
import sys
from collections import Counter
from pathlib import Path

import pytest
from own_slurm import ROOT, UNENDED, Slurm, command, settings, start_slurm, wait_for

SUBMIT = ROOT / "launch" / "slurm" / "submit.sh"
GRID_S = 400

CELLS, STEPS = 8, 12
# Each cell is a training of its own, with steps enough to be stopped in the middle.
GRID = (
    "--config=configs/phantom.py:tiny",
    "--config.study.tables=('ablation',)",
    "--config.study.arms=('all_related','all_unrelated','wo_modality','wo_area','wo_task','random_removal_task',"
    "'same_task','all_data')",
    f"--config.train.steps={STEPS}",
    "--config.train.log_every_steps=1",
)


# ------------------------------------------------------------------ what would be submitted


def test_dry_run_prints_the_call_and_the_script_and_leaves_nothing(tmp_path):
    done = command(
        "bash", SUBMIT, "--dry-run", "--tasks=16%4", "--gres=gpu:1", "--comment=two words", "--",
        *GRID, f"--workdir={tmp_path}/W",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    cells, shared, trainings, cost, hours, folder, call, blank, *script = done.stdout.splitlines()
    assert cells.endswith(f" {CELLS} cells") and trainings.startswith(f"{CELLS} trainings, ")
    assert shared.endswith("0 saved by equal cells") and cost.startswith("trainings without bases and tests: ")
    assert hours.startswith("chip-hours at least, ") and " on v5e, " in hours
    assert folder == f"mkdir -p {tmp_path}/W/logs"
    task = str(SUBMIT.with_name("task.sh"))
    assert shlex.split(call) == [
        "sbatch", "--array=0-15%4", f"--output={tmp_path}/W/logs/slurm-%A_%a.log", "--gres=gpu:1",
        "--comment=two words", task, sys.executable, *GRID, f"--workdir={tmp_path}/W",
    ]  # fmt: skip
    assert blank == "" and "\n".join(script) + "\n" == Path(task).read_text()
    assert os.listdir(tmp_path) == []


def test_a_task_may_be_started_again_and_is_told_before_its_time_is_up():
    options = {line for line in SUBMIT.with_name("task.sh").read_text().splitlines() if line.startswith("#SBATCH")}
    assert options >= {"#SBATCH --requeue", "#SBATCH --open-mode=append", "#SBATCH --signal=B:USR1@120"}


WORKDIR = "--workdir=/W"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--", *GRID, WORKDIR), "--tasks=: "),
        (("--tasks=0", "--", *GRID, WORKDIR), "--tasks=0: "),
        (("--tasks=4%0", "--", *GRID, WORKDIR), "--tasks=4%0: "),
        (("--tasks=2", "--array=0-3", "--", *GRID, WORKDIR), "--array=0-3: "),
        (("--tasks=2", "gpu", "--", *GRID, WORKDIR), "gpu: "),
        (("--tasks=2", *GRID, WORKDIR), "no arguments of"),
        (("--tasks=2", "--", *GRID), "--workdir=: "),
        (("--tasks=2", "--", *GRID, "--workdir=runs/W"), "--workdir=runs/W: "),
        (("--tasks=2", "--", *GRID, WORKDIR, "--config.train.steps=many"), "train.steps"),
    ],
)
def test_wrong_use_is_refused_before_anything_is_submitted(arguments, said):
    done = command("bash", SUBMIT, *arguments, env=settings() | {"SLURM_CONF": "/nowhere"})
    assert done.returncode == 2
    assert said in done.stderr and len(done.stderr.splitlines()) == 1


# ------------------------------------------------------------------ under SLURM


class Array:
    """Two tasks on a workdir."""

    def __init__(self, slurm: Slurm, workdir: Path):
        self.slurm, self.workdir = slurm, workdir
        done = command("bash", SUBMIT, "--tasks=2", "--time=30", "--", *GRID, f"--workdir={workdir}", env=slurm.env)
        assert done.returncode == 0, done.stderr
        self.id = done.stdout.split()[-1]
        # Every (process, cell) that has been seen to hold a claim.
        self.seen: set[tuple[int, str]] = set()

    def states(self) -> list[str]:
        jobs = self.slurm.jobs()
        return [jobs.get(f"{self.id}_{task}", "PENDING") for task in range(2)]

    def look(self) -> list[str]:
        """States of the tasks; remembers who holds what."""
        self.seen |= self.holders()
        return self.states()

    def holders(self) -> set[tuple[int, str]]:
        """(process, cell) of every claim that is not released."""
        pids = set()
        for claim in self.workdir.glob("state/claims/*"):
            try:
                pid = json.loads(claim.read_text())["pid"]
            except (OSError, ValueError):  # just being written
                continue
            if pid:
                pids.add((pid, claim.stem))
        return pids

    def wait(self) -> list[str]:
        """The states in which both tasks have ended."""
        wait_for("the end of both tasks", lambda: not set(self.look()) & set(UNENDED), GRID_S)
        return self.states()

    def log(self, task: int) -> str:
        return (self.workdir / "logs" / f"slurm-{self.id}_{task}.log").read_text()

    def claims(self) -> Counter:
        """Cell -> how many processes have held it, one after another."""
        held = Counter(path.stem for path in self.workdir.glob("state/claims/*"))
        return Counter({cell: held[cell] for cell in cell_names(self.workdir)})


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    started = start_slurm(tmp_path_factory.mktemp("slurm"))
    try:
        yield started
    finally:
        started.stop()


@pytest.fixture(scope="module")
def grids(tmp_path_factory):
    """Where workdirs lie, and between them the base that they share."""
    return tmp_path_factory.mktemp("grids")


@pytest.fixture(scope="module")
def undisturbed(slurm, grids):
    array = Array(slurm, grids / "undisturbed")
    assert array.wait() == ["COMPLETED", "COMPLETED"], [array.log(task) for task in range(2)]
    return array


def test_two_tasks_share_a_grid(undisturbed):
    assert undisturbed.claims() == Counter(cell_names(undisturbed.workdir)), "a cell had not one holder"
    holders = Counter(pid for pid, _ in undisturbed.seen)
    assert len(holders) == 2 and min(holders.values()) >= 2, holders
    for task in range(2):
        assert f"report: {undisturbed.workdir}/report/index.html" in undisturbed.log(task)


def test_a_task_that_is_killed_midway_is_made_up_for(slurm, grids, undisturbed):
    array = Array(slurm, grids / "killed")

    def midway() -> tuple[int, str] | None:
        """(process, cell) of a training that has begun, when some cells are done and most are not."""
        array.look()
        for pid, cell in array.holders():
            steps = steps_of(array.workdir, cell)
            if 2 <= len(list(array.workdir.glob("state/done/*"))) <= CELLS - 3 and 0 < len(steps) < 10:
                return pid, cell
        return None

    wait_for("a task in the middle of a cell", lambda: midway() is not None, GRID_S)
    pid, cell = midway()
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    task = next(int(v.split(b"=")[1]) for v in environment if v.startswith(b"SLURM_ARRAY_TASK_ID="))
    slurm.scancel("--signal=KILL", "--full", f"{array.id}_{task}")

    ends = array.wait()
    assert ends[1 - task] == "COMPLETED" and ends[task] in ("CANCELLED", "FAILED"), ends
    assert "report:" not in array.log(task)
    assert (array.workdir / "results.csv").read_bytes() == (undisturbed.workdir / "results.csv").read_bytes()
    # What the killed task held was taken over, once; nothing else had a second holder.
    assert array.claims() == Counter(cell_names(array.workdir)) + Counter([cell])
    assert {holder for holder, name in array.seen if name == cell} - {pid}, "the cell had no second holder"
    for name in cell_names(array.workdir):
        assert steps_of(array.workdir, name) == list(range(1, STEPS + 1)), name


def cell_names(workdir: Path) -> list[str]:
    names = [line.split(",")[0] for line in (workdir / "results.csv").read_text().splitlines()[1:]]
    assert len(names) == CELLS
    return names


def steps_of(workdir: Path, cell: str) -> list[int]:
    try:
        return [json.loads(line)["step"] for line in (workdir / "metrics" / f"{cell}.jsonl").read_text().splitlines()]
    except (FileNotFoundError, ValueError):  # not begun, or in the middle of a line
        return []
