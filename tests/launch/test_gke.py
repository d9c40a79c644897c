"""The indexed Job given to kubectl: its fields, what is refused, what kubectl gets. No cluster is used."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

SUBMIT = Path(__file__).resolve().parents[2] / "launch" / "gke" / "submit.py"
FLAGS = ("--name=pairs", "--tasks=8", "--image=registry.example/medcg:1", "--claim=shared")
REPRODUCE = ("--config=configs/phantom.py", "--config.study.targets=('ct-liver-grade',)", "--workdir=/grids/pairs")


def submit(*flags: str, reproduce: tuple[str, ...] = REPRODUCE, path: str | None = None) -> subprocess.CompletedProcess:
    env = os.environ | ({"PATH": path} if path else {})
    command = [sys.executable, "-I", str(SUBMIT), *flags, "--", *reproduce]
    return subprocess.run(
        command, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60, check=False
    )


def printed(*flags: str, **options) -> dict:
    done = submit(*FLAGS, *flags, "--dry-run", **options)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


def pod(job: dict) -> dict:
    return job["spec"]["template"]["spec"]


def test_every_pod_runs_the_same_command_on_the_shared_volume():
    job = printed()
    assert (job["apiVersion"], job["kind"], job["metadata"]) == ("batch/v1", "Job", {"name": "pairs"})
    [container], [volume] = pod(job)["containers"], pod(job)["volumes"]
    assert container["image"] == "registry.example/medcg:1"
    assert container["command"] == ["python", "-m", "medcg_jax.cli", "reproduce"]
    assert container["args"] == list(REPRODUCE)
    assert volume == {"name": "grids", "persistentVolumeClaim": {"claimName": "shared"}}
    assert container["volumeMounts"] == [{"name": "grids", "mountPath": "/grids"}]
    assert container["env"] == [{"name": "JAX_COMPILATION_CACHE_DIR", "value": "/grids/xla"}]


def test_a_pod_that_dies_is_replaced_and_what_never_fits_ends_the_job():
    """By batch/v1 limits per index want an indexed Job and `Never`, and a failure policy `Never` and `Failed`."""
    job = printed()
    spec = job["spec"]
    assert (spec["completionMode"], spec["backoffLimitPerIndex"], pod(job)["restartPolicy"]) == ("Indexed", 3, "Never")
    assert spec["podReplacementPolicy"] == "Failed"
    disrupted, saved, too_large = spec["podFailurePolicy"]["rules"]
    assert disrupted == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    name = pod(job)["containers"][0]["name"]
    assert saved == {"action": "Ignore", "onExitCodes": {"containerName": name, "operator": "In", "values": [75]}}
    assert too_large == {"action": "FailJob", "onExitCodes": {"containerName": name, "operator": "In", "values": [3]}}
    assert pod(job)["shareProcessNamespace"] is True


def test_nothing_is_written_that_batch_v1_does_not_know():
    job = printed("--tpu=tpu-v6e-slice", "--topology=2x4", "--cpu=8", "--memory=64Gi")
    assert set(job) == {"apiVersion", "kind", "metadata", "spec"}
    assert set(job["spec"]) == {
        "completionMode", "completions", "parallelism", "backoffLimitPerIndex", "podFailurePolicy",
        "podReplacementPolicy", "template",
    }  # fmt: skip
    assert set(pod(job)) == {"restartPolicy", "shareProcessNamespace", "nodeSelector", "containers", "volumes"}
    assert set(pod(job)["containers"][0]) == {"name", "image", "command", "args", "env", "resources", "volumeMounts"}


@pytest.mark.parametrize(
    ("flags", "completions", "parallelism"), [((), 8, 8), (("--at-once=3",), 8, 3), (("--at-once=9",), 8, 8)]
)
def test_pods_at_a_time(flags, completions, parallelism):
    spec = printed(*flags)["spec"]
    assert (spec["completions"], spec["parallelism"]) == (completions, parallelism)


@pytest.mark.parametrize(
    ("flags", "selector", "resources"),
    [
        ((), {}, {"requests": {}, "limits": {}}),
        (
            ("--tpu=tpu-v6e-slice", "--topology=2x4", "--memory=64Gi"),
            {"cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice", "cloud.google.com/gke-tpu-topology": "2x4"},
            {"requests": {"memory": "64Gi"}, "limits": {"google.com/tpu": 8}},
        ),
        (
            ("--tpu=tpu-v5p-slice", "--topology=2x2x1"),
            {"cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice", "cloud.google.com/gke-tpu-topology": "2x2x1"},
            {"requests": {}, "limits": {"google.com/tpu": 4}},
        ),
        (
            ("--gpu=nvidia-h100-80gb", "--gpus=8", "--cpu=64", "--select=cloud.google.com/gke-spot=true"),
            {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb", "cloud.google.com/gke-spot": "true"},
            {"requests": {"cpu": "64"}, "limits": {"nvidia.com/gpu": 8}},
        ),
    ],
)
def test_accelerators_select_nodes_and_are_asked_for(flags, selector, resources):
    job = printed(*flags)
    assert pod(job)["nodeSelector"] == selector
    assert pod(job)["containers"][0]["resources"] == resources


def test_text_cannot_become_yaml():
    """Quotes, colons, dollar signs and a name that YAML would read as a number stay text."""
    hostile = ("--config=a.py:b: {c: d}", "--config.name=$name 'a' \"b\"", "--workdir=/grids/1e3", "- x\n- y")
    job = printed("--select=note=1e3", "--select=other=yes", reproduce=hostile)
    assert pod(job)["containers"][0]["args"] == list(hostile)
    assert pod(job)["nodeSelector"] == {"note": "1e3", "other": "yes"}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--name=Pairs",), "--name: 'Pairs'"),
        ((f"--name={'x' * 62}",), "at most 63"),
        (("--tasks=0",), "--tasks: '0'"),
        (("--at-once=few",), "--at-once: 'few'"),
        (("--tpu=tpu-v6e-slice",), "--topology: with --tpu"),
        (("--topology=2x4",), "--topology: with --tpu"),
        (("--tpu=tpu-v6e-slice", "--topology=4x4"), "--topology: '4x4'"),
        (("--tpu=tpu-v6e-slice", "--topology=two"), "--topology: 'two'"),
        (("--tpu=tpu-v6e-slice", "--topology=2x4", "--gpu=nvidia-l4"), "--tpu: not with --gpu"),
        (("--select=spot",), "--select: 'spot'"),
        (("--spot",), "--spot"),
    ],
)
def test_wrong_use_is_refused(flags, said):
    done = submit(*FLAGS, *flags, "--dry-run")
    assert (done.returncode, done.stdout) == (2, "") and said in done.stderr


@pytest.mark.parametrize("workdir", ["", "--workdir=runs/pairs", "--workdir=/grids", "--workdir=/grids/../pairs"])
def test_a_workdir_off_the_volume_is_refused(workdir):
    done = submit(*FLAGS, "--dry-run", reproduce=("--config=configs/phantom.py", *([workdir] if workdir else [])))
    assert (done.returncode, done.stdout) == (2, "") and "--workdir" in done.stderr


@pytest.fixture
def kubectl(tmp_path):
    """A folder with a kubectl that writes down what it was given, and fails."""
    script = tmp_path / "kubectl"
    script.write_text(f'#!/bin/sh\necho "$*" >{tmp_path}/arguments\n/bin/cat >{tmp_path}/input\nexit 7\n')
    script.chmod(0o755)
    return tmp_path


def test_kubectl_is_given_what_the_dry_run_prints(kubectl):
    done = submit(*FLAGS, path=str(kubectl))
    assert done.returncode == 7
    assert (kubectl / "arguments").read_text() == "apply -f -\n"
    assert (kubectl / "input").read_text() == submit(*FLAGS, "--dry-run").stdout


def test_the_dry_run_submits_nothing(kubectl):
    assert submit(*FLAGS, "--dry-run", path=str(kubectl)).returncode == 0
    assert not (kubectl / "arguments").exists()


def test_no_kubectl_is_said_in_one_line(tmp_path):
    done = submit(*FLAGS, path=str(tmp_path))
    assert done.returncode == 1 and done.stderr.startswith("submit.py: no kubectl") and done.stderr.count("\n") == 1
