"""One run over several hosts: what a JobSet and a TPU VM are given, what is refused, a rehearsal on this machine."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from medcg_jax.cluster import Cluster, detect

ROOT = Path(__file__).resolve().parents[2]
RUN = ("train", "--config=configs/phantom.py:tiny", "--config.data.subsets=ct-brain-state")


def script(*command: str, **environment: str) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=200, check=False
    )


def jobset(*flags: str, run: tuple[str, ...] = (*RUN, "--workdir=/grids/W")) -> subprocess.CompletedProcess:
    path = str(ROOT / "launch" / "gke" / "submit_run.py")
    return script(sys.executable, "-E", path, "--name=llava", "--image=i", "--claim=c", *flags, "--", *run)


def test_a_pod_of_the_jobset_finds_its_place():
    done = jobset("--hosts=4", "--tpu=tpu-v6e-slice", "--topology=4x4", "--dry-run")
    assert done.returncode == 0, done.stderr
    manifest = yaml.safe_load(done.stdout)
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert manifest["spec"]["network"] == {"enableDNSHostnames": True}
    [hosts] = manifest["spec"]["replicatedJobs"]
    job = hosts["template"]["spec"]
    assert (job["completionMode"], job["completions"], job["parallelism"], job["backoffLimit"]) == ("Indexed", 4, 4, 0)
    [container] = job["template"]["spec"]["containers"]
    assert container["command"] + container["args"] == ["python", "-m", "medcg_jax.cli", *RUN, "--workdir=/grids/W"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    environ = {variable["name"]: variable["value"] for variable in container["env"]}
    # JobSet's host names: NAME-JOB-REPLICA-INDEX.NAME.
    for index in range(4):
        place = detect(environ | {"JOB_COMPLETION_INDEX": str(index)})
        assert place == Cluster("GKE", "llava-hosts-0-0.llava:8476", 4, index)


def test_status_75_and_preemption_restart_a_jobset_without_being_counted():
    spec = yaml.safe_load(jobset("--hosts=2", "--gpu=nvidia-h100-80gb", "--restarts=5", "--dry-run").stdout)["spec"]
    assert spec["failurePolicy"]["maxRestarts"] == 5
    [rule] = spec["failurePolicy"]["rules"]
    assert rule == {"action": "RestartJobSetAndIgnoreMaxRestarts", "onJobFailureReasons": ["PodFailurePolicy"]}
    rules = spec["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    assert [failure_rule["action"] for failure_rule in rules] == ["FailJob", "FailJob"]
    assert rules[0]["onExitCodes"]["values"] == [75] and rules[1]["onPodConditions"][0]["type"] == "DisruptionTarget"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--hosts=0",), "--hosts"),
        (("--hosts=4", "--tpu=t", "--topology=3x3"), "--topology"),
        (("--hosts=4", "--tpu=t"), "--topology"),
        (("--hosts=4", "--tpu=t", "--topology=4x4", "--gpu=g"), "--tpu"),
        (("--hosts=4", "--restarts=-1"), "--restarts"),
    ],
)
def test_a_jobset_that_cannot_be_is_refused(flags, said):
    done = jobset(*flags, "--dry-run")
    assert done.returncode == 2 and said in done.stderr


def test_a_jobset_of_another_verb_or_workdir_is_refused():
    assert "VERB" in jobset("--hosts=2", "--dry-run", run=("bench", "--workdir=/grids/W")).stderr
    assert "--workdir" in jobset("--hosts=2", "--dry-run", run=(*RUN, "--workdir=/elsewhere")).stderr


def tpu_vm(*arguments: str) -> subprocess.CompletedProcess:
    return script("bash", str(ROOT / "launch" / "tpu_vm" / "run.sh"), *arguments)


def test_every_host_of_a_tpu_vm_is_given_the_same_command():
    run = (*RUN, "--config.name=two words", "--workdir=/mnt/W")
    done = tpu_vm("--name=pod", "--zone=us-east5-b", "--dry-run", "--", *run)
    assert done.returncode == 0, done.stderr
    *call, command = shlex.split(done.stdout)
    assert call == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod", "--zone=us-east5-b", "--worker=all"]
    folder, _, remote = command.removeprefix("--command=").partition(" && exec ")
    assert folder == 'cd "$HOME/medcg-jax"'
    assert shlex.split(remote) == [".venv/bin/python", "-m", "medcg_jax.cli", *run, "--coordinator=auto"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--zone=us-east5-b", "--", *RUN, "--workdir=/W"), "--name="),
        (("--name=TPU", "--zone=us-east5-b", "--", *RUN, "--workdir=/W"), "small letters, digits and -"),
        (("--name=pod", "--zone=east", "--", *RUN, "--workdir=/W"), "--zone=east"),
        (("--name=pod", "--zone=us-east5-b", "--", *RUN, "--workdir=gs://b/W"), "--workdir=gs://b/W"),
        (("--name=pod", "--zone=us-east5-b", "--", "bench", "--workdir=/W"), "bench"),
        (("--name=pod", "--zone=us-east5-b", "--worker=0", "--", *RUN), "--worker=0"),
        (("--name=pod", "--zone=us-east5-b"), "no verb"),
    ],
)
def test_wrong_use_on_a_tpu_vm_is_refused(arguments, said):
    done = tpu_vm(*arguments)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1


# ------------------------------------------------------------------ on this machine


def local(*arguments: str) -> subprocess.CompletedProcess:
    return script("bash", str(ROOT / "launch" / "local_multiprocess.sh"), *arguments)


def test_the_rehearsal_prints_a_command_for_each_process():
    done = local("3", "--devices=2", "--dry-run", *RUN)
    assert done.returncode == 0, done.stderr
    for index, line in enumerate(done.stdout.splitlines()):
        platform, flags, *command = shlex.split(line)
        assert platform == "JAX_PLATFORMS=cpu" and flags.count("device_count=2") == flags.count("device_count") == 1
        assert command[1:6] == ["-m", "medcg_jax.cli", *RUN]
        given = dict(flag.removeprefix("--").split("=") for flag in command[6:])
        assert given.pop("coordinator").startswith("127.0.0.1:")
        assert given == {"num_processes": "3", "process_id": str(index)}
    assert index == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "no number"),
        (("0", "train"), "0 of"),
        (("2", "bench"), "bench"),
        (("2", "--devices=x", "train"), "--devices=x"),
    ],
)
def test_wrong_use_of_the_rehearsal_is_refused(arguments, said):
    done = local(*arguments)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_rehearsal_ends_with_the_worst_status_and_prefixed_lines():
    done = local("2", "train", "--config=configs/nothing.py")
    assert done.returncode == 2
    assert sorted(line[:3] for line in done.stdout.splitlines() if "no such file" in line) == ["[0]", "[1]"]


@pytest.mark.long
def test_the_same_command_goes_on_without_the_host_that_died(tmp_path):
    """Four processes, of which one is killed after two steps or more; then three, whose six devices do not divide the batches."""
    run = (
        *RUN, "--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2", "--config.mesh.elastic=true",
        "--config.train.steps=60", "--config.train.checkpoint_every_steps=1", "--config.train.log_every_steps=1",
    )  # fmt: skip
    path = str(ROOT / "launch" / "local_multiprocess.sh")
    env = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    command = ["bash", path, "4", "--devices=2", *run, f"--workdir={tmp_path / 'both'}"]
    with subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as four:
        ended = threading.Timer(200, four.kill)
        ended.start()
        for line in four.stdout:
            if "step 1/60" in line:
                wait_for_step(tmp_path / "both" / "checkpoints", 2)
                listed = subprocess.run(["pgrep", "-f", "process_id=3"], capture_output=True, text=True, check=True)
                [dying] = [pid for pid in map(int, listed.stdout.split()) if parent_of(pid) == four.pid]
                os.kill(dying, signal.SIGKILL)
        assert four.wait(100) not in (0, os.EX_TEMPFAIL)
        ended.cancel()
    three = local("3", "--devices=2", *run, f"--workdir={tmp_path / 'both'}")
    assert three.returncode == 0, three.stderr
    assert (
        "mesh.elastic: 6 devices as data 3 x fsdp 1 x tensor 2; batches have 18 rows, of which 2 stay empty"
        in three.stdout
    )
    assert "going on from step" in three.stdout
    alone = local("1", "--devices=8", *run, f"--workdir={tmp_path / 'alone'}")
    assert alone.returncode == 0, alone.stderr
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics" / "train.jsonl").open()]
        for name in ("both", "alone")
    ]
    assert len(losses[0]) == 60
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def wait_for_step(checkpoints: Path, step: int) -> None:
    while not any(path.name.isdecimal() and int(path.name) >= step for path in checkpoints.glob("*")):
        time.sleep(0.01)


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
