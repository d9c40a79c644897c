"""One run over two tasks of a SLURM that is started for these tests: told to stop midway, it goes on to the same."""

import hashlib
import json
import shlex
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from own_slurm import ROOT, UNENDED, Slurm, command, settings, start_slurm, wait_for

from medcg_jax.families.weights.convert import open_leaves

TRAIN = ROOT / "launch" / "slurm" / "train.sh"
STEPS, RUN_S = 60, 300
RUN = (
    "train", "--config=configs/phantom.py:tiny", "--config.data.subsets=ct-brain-state",
    f"--config.train.steps={STEPS}",
    "--config.train.epochs=1", "--config.train.batch_size=8", "--config.train.log_every_steps=1",
    "--config.train.checkpoint_every_steps=5",
)  # fmt: skip


def test_dry_run_prints_the_call_and_the_script_and_leaves_nothing(tmp_path):
    workdir = f"--workdir={tmp_path}/W"
    done = command("bash", TRAIN, "--dry-run", "--nodes=4", "--gres=gpu:8", "--time=9:00:00", "--", *RUN, workdir)
    assert done.returncode == 0, done.stderr
    what, folder, call, blank, *script = done.stdout.splitlines()
    assert what.startswith("phantom_tiny: llava15_tiny on phantom data") and what.endswith("/W")
    assert folder == f"mkdir -p {tmp_path}/W/logs" and blank == ""
    job = TRAIN.with_name("run.sh")
    assert shlex.split(call) == [
        "sbatch", "--nodes=4", "--ntasks-per-node=1", f"--output={tmp_path}/W/logs/slurm-%j.log", "--gres=gpu:8",
        "--time=9:00:00", str(job), sys.executable, *RUN, workdir,
    ]  # fmt: skip
    assert "\n".join(script) + "\n" == job.read_text() and not list(tmp_path.iterdir())


def test_paths_that_are_not_there_are_told_before_a_job_waits_for_hours(tmp_path):
    workdir = f"--workdir={tmp_path}/W"
    done = command("bash", TRAIN, "--dry-run", "--nodes=4", "--", "train", "--config=configs/llava15_7b.py", workdir)
    assert done.returncode == 0, done.stderr
    warnings = [line.split(" is not there")[0] for line in done.stderr.splitlines()]
    assert warnings == ["warning: model.checkpoint=checkpoints/llava-1.5-7b-hf", "warning: data.root=Med-MAT"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--", *RUN, "--workdir=/W"), "--nodes=: "),
        (("--nodes=0", "--", *RUN, "--workdir=/W"), "--nodes=0: "),
        (("--nodes=2-4", "--", *RUN, "--workdir=/W"), "--config.mesh.elastic=true"),
        (("--nodes=2", "--ntasks-per-node=x", "--", *RUN, "--workdir=/W"), "--ntasks-per-node=x: "),
        (("--nodes=2", "--ntasks=4", "--", *RUN, "--workdir=/W"), "--ntasks=4: "),
        (("--nodes=2", "--array=0-3", "--", *RUN, "--workdir=/W"), "--array=0-3: "),
        (("--nodes=2",), "no verb"),
        (("--nodes=2", "--", "bench", "--workdir=/W"), "bench: "),
        (("--nodes=2", "--", *RUN, "--workdir=W"), "--workdir=W: "),
        (("--nodes=2", "--", *RUN, "--workdir=/W", "--config.train.stesp=1"), "did you mean config.train.steps?"),
        (("--nodes=2", "--", "train", "--config=configs/llava15_7bb.py", "--workdir=/W"), "configs/llava15_7b.py"),
        (("--nodes=2", "--", "reproduce", "--config=configs/phantom.py:stduy", "--workdir=/W"), "did you mean study?"),
    ],
)
def test_wrong_use_is_refused_before_anything_is_submitted(arguments, said):
    done = command("bash", TRAIN, *arguments, env=settings() | {"SLURM_CONF": "/nowhere"})
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1


# ------------------------------------------------------------------ under SLURM


class Job:
    """One run of two processes with two devices each, on one node."""

    def __init__(self, slurm: Slurm, workdir: Path):
        self.slurm, self.workdir = slurm, workdir
        two = slurm.env | {"XLA_FLAGS": f"{slurm.env['XLA_FLAGS']} --xla_force_host_platform_device_count=2"}
        options = ("--nodes=1", "--ntasks-per-node=2", "--time=30")
        done = command("bash", TRAIN, *options, "--", *RUN, f"--workdir={workdir}", env=two)
        assert done.returncode == 0, done.stderr
        self.id = done.stdout.split()[-1]

    def wait(self) -> str:
        wait_for("the end of the job", lambda: self.slurm.jobs()[self.id] not in UNENDED, RUN_S)
        return self.slurm.jobs()[self.id]

    def log(self) -> str:
        return (self.workdir / "logs" / f"slurm-{self.id}.log").read_text()

    def saved(self) -> list[int]:
        return sorted(int(path.name) for path in self.workdir.glob("checkpoints/*") if path.name.isdecimal())

    def left(self) -> dict:
        """What the run leaves that does not hang on when it was made."""
        lines = [json.loads(line) for line in (self.workdir / "metrics" / "train.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
        params = self.workdir / "params"
        leaves = jax.tree.leaves(open_leaves(params))
        digests = [hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest() for leaf in leaves]
        return {"losses": [(line["loss"], line["grad_norm"]) for line in lines], "digests": digests}


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    started = start_slurm(tmp_path_factory.mktemp("slurm"))
    try:
        yield started
    finally:
        started.stop()


def test_two_tasks_train_as_one_and_told_to_stop_midway_to_the_same_bytes(slurm, tmp_path):
    undisturbed = Job(slurm, tmp_path / "undisturbed")
    assert undisturbed.wait() == "COMPLETED", undisturbed.log()
    for task in range(2):
        assert f"{task}: medcg: process {task} (" in undisturbed.log() and " of 2 by SLURM" in undisturbed.log()
    assert undisturbed.log().count("steps on ") == 1, "the result is not printed once"

    job = Job(slurm, tmp_path / "stopped")
    wait_for("a checkpoint midway", lambda: bool(job.saved()), RUN_S)
    assert max(job.saved()) < STEPS, "done before it was disturbed"
    # What SLURM does before the time limit, to the tasks alone: they save and end with status 75, and the job is queued again.
    slurm.scancel("--signal=TERM", job.id)
    wait_for("the second start", lambda: "start 1, on" in job.log(), RUN_S)
    assert job.wait() == "COMPLETED", job.log()
    assert "told to stop: train at step" in job.log() and "going on from step" in job.log()
    assert job.left() == undisturbed.left()
