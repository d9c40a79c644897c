"""What a run shows of itself: traces, Weights & Biases, MFU, when it waits for its data, and what was compiled."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from micro import setup
from train_toys import TRAIN, Stream

from medcg_jax import cli
from medcg_jax.cli import main
from medcg_jax.config import MODELS, ConfigError, ModelConfig, replace
from medcg_jax.config_checks import profile_steps
from medcg_jax.families import flops
from medcg_jax.train import log
from medcg_jax.train.goodput import FROM_STEPS, LOADER_BOUND_FRAC, WORSE_BY_FRAC, LoaderWatch
from medcg_jax.train.log import METRICS, WANDB_FILE, StepTrace, WandbTarget, read_metrics
from medcg_jax.train.loop import RunSpec, fit
from medcg_jax.train.optim import hparams_from
from medcg_jax.train.setup import peak_flops, step_flops

CONFIG = Path(__file__).parents[2] / "configs" / "phantom.py"
RUN = [
    "train", f"--config={CONFIG}:tiny", "--config.data.subsets=ct-brain-state", "--config.train.steps=4",
    "--config.train.batch_size=8", "--config.train.log_every_steps=2", "--config.eval.batch_size=8",
]  # fmt: skip


@pytest.fixture(scope="module")
def toy():
    return setup()


def cell(path: Path, steps: int, **fields) -> RunSpec:
    return RunSpec("run", hparams_from(replace(TRAIN, steps=steps), 1), Stream, metrics=path / "m.jsonl", **fields)


# ------------------------------------------------------------------ traces


def traced_steps(folder: Path) -> list[int]:
    [file] = folder.rglob("*.xplane.pb")
    found = set()
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            for event in line.events:
                if event.name == "train":
                    found |= {int(value) for key, value in event.stats if key == "step_num"}
    return sorted(found)


@pytest.mark.parametrize(("first", "last", "expected"), [(3, 5, [3, 4, 5]), (6, 6, [6]), (9, 12, None)])
def test_a_trace_holds_its_steps_alone(toy, tmp_path, first, last, expected):
    fit(*toy, cell(tmp_path, 8), trace=StepTrace(tmp_path / "profile", first, last), progress=lambda *_: None)
    if expected is None:
        assert not (tmp_path / "profile").exists()
    else:
        assert traced_steps(tmp_path / "profile") == expected


def test_a_trace_ends_with_a_run_that_fails(toy, tmp_path):
    def broken(position, rows):
        if position == 4:
            raise OSError("the disk is away")
        return rows

    made = RunSpec("run", hparams_from(replace(TRAIN, steps=8), 1), lambda p: Stream(p, change=broken))
    with pytest.raises(OSError, match="away"):
        fit(*toy, made, trace=StepTrace(tmp_path / "a", 3, 8), progress=lambda *_: None)
    fit(*toy, cell(tmp_path, 2), trace=StepTrace(tmp_path / "b", 1, 2), progress=lambda *_: None)
    assert traced_steps(tmp_path / "b") == [1, 2]


@pytest.mark.parametrize("text", ["10", "a:b", "3:2", "0:2", "1:", ":", "1:2:3", "-1:2", "1:12", "٣:٤"])
def test_a_range_that_is_none_is_refused(text):
    with pytest.raises(ConfigError, match="log.profile_steps="):
        profile_steps(text, 10)


def test_a_range_is_checked_once_the_steps_are_known():
    assert profile_steps("1:12", 0) == (1, 12) and profile_steps("10:10", 10) == (10, 10)


# ------------------------------------------------------------------ the verb


class FakeWandb(types.ModuleType):
    """Records what it is told."""

    def __init__(self):
        super().__init__("wandb")
        self.calls, self.logged = [], []

    def init(self, **arguments):
        self.calls.append(arguments)
        return self

    def log(self, metrics, step):
        self.logged.append((step, metrics))

    def finish(self):
        self.calls.append("finish")


def test_train_shows_all_of_it(tmp_path, monkeypatch, capfd):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    workdir = tmp_path / "run"
    found = tmp_path / "found.json"
    extra = ["--profile_steps=2:3", "--config.log.wandb=project", "--config.log.tensorboard=False"]
    assert main([*RUN, *extra, f"--workdir={workdir}", f"--json={found}"]) == 0
    assert traced_steps(workdir / "profile") == [2, 3] and not (workdir / "tensorboard").exists()
    spent = json.loads(found.read_text())["goodput"]
    assert sum(spent["shares"].values()) == pytest.approx(1.0) and spent["num_starts"] == 1
    written = json.loads((workdir / "goodput.json").read_text())
    assert written["seconds"]["compile"] == pytest.approx(spent["seconds"]["compile"], abs=0.01)
    assert [start["reached"] for start in written["starts"]] == [{"train": 4}]
    assert "goodput " in capfd.readouterr().out.splitlines()[-1]
    init, end = wandb.calls
    known = {"project": "project", "name": "phantom_tiny", "resume": "allow", "dir": str(workdir)}
    assert init | known == init and init["config"]["train"]["steps"] == 4 and end == "finish"
    assert [step for step, _ in wandb.logged] == [2, 4]
    lines = read_metrics(workdir / "metrics" / "train.jsonl")
    assert [metrics["loss"] for _, metrics in wandb.logged] == pytest.approx([line["loss"] for line in lines])
    assert set(wandb.logged[0][1]) == {*METRICS} - {"step", "mfu"}  # a CPU has no peak


def test_a_run_that_goes_on_logs_each_step_once_under_one_id(toy, tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    target = WandbTarget("project", "run", tmp_path, {})
    for steps in (3, 6):  # without checkpoints the second starts anew
        fit(*toy, cell(tmp_path, steps, wandb=target), log_every_steps=1, progress=lambda *_: None)
    assert [step for step, _ in wandb.logged] == [1, 2, 3, 4, 5, 6]
    assert wandb.calls[0]["id"] == wandb.calls[2]["id"] == json.loads((tmp_path / WANDB_FILE).read_text())["id"]


def test_wandb_is_imported_only_where_it_is_asked_for(toy, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it fails
    fit(*toy, cell(tmp_path, 1), progress=lambda *_: None)
    program = "import sys, medcg_jax.train.run; sys.exit('wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=120, check=False).returncode == 0


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--profile_steps=3:9", "log.profile_steps='3:9'"),
        ("--profile_steps=3", "FIRST:LAST"),
        ("--config.log.wandb=project", "pip install '.[wandb]'"),
    ],
)
def test_what_cannot_be_shown_is_refused_before_anything(flag, message, tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main([*RUN, flag, f"--workdir={tmp_path / 'run'}"]) == 2
    [line] = capfd.readouterr().err.splitlines()
    assert message in line and not (tmp_path / "run").exists()


def test_epochs_say_how_far_a_trace_may_go(tmp_path, capfd):
    flags = ["--config.train.steps=0", "--config.train.epochs=1", "--profile_steps=2:900"]
    assert main([*RUN, *flags, f"--workdir={tmp_path / 'run'}"]) == 2
    assert "of the run's" in capfd.readouterr().err and not (tmp_path / "run").exists()


# ------------------------------------------------------------------ MFU


class Rows:
    """Encoded rows of three lengths."""

    def __init__(self, num_targets: int):
        self.arrays = {"length": np.array([90, 90, 110, 120]), "targets": np.zeros((4, num_targets))}


@pytest.mark.parametrize("name", [name for name in MODELS if name.endswith("tiny")])
def test_every_family_knows_what_a_step_needs(name):
    from medcg_jax.data.tokenizer import load_tokenizer
    from medcg_jax.families import registry
    from medcg_jax.train.setup import model_config

    trainable = ("lora",) if name == "minigpt_v2_tiny" else ("decoder",)
    config = model_config(ModelConfig(name=name), load_tokenizer("", registry.of_model(name).tokenizer))
    rows = [flops.forward(config, length=length, num_logits=5) for length in (90, 90, 110, 120)]
    expected = 8 / 4 * sum(flops.training(row, trainable=trainable) for row in rows)
    made = step_flops(Rows(5), config, trainable=trainable, batch_size=8)
    assert made == pytest.approx(expected) and expected > 0


def test_masks_have_no_formula_and_a_cpu_no_peak(toy):
    assert (
        step_flops(Rows(1), None, trainable=("mask_decoder",), batch_size=8) is None and peak_flops(toy[0].mesh) is None
    )


# ------------------------------------------------------------------ waiting for data


def test_one_warning_and_another_when_it_gets_worse():
    watch = LoaderWatch()
    assert watch.warning(0.9, 1.0, FROM_STEPS - 1) is None  # reading starts cold
    watch = LoaderWatch()
    assert watch.warning(0.9 * LOADER_BOUND_FRAC * 10, 10.0, 20) is None
    said = [watch.warning(3.0, 10.0, 10) for _ in range(8)]
    shares = [(0.9 * LOADER_BOUND_FRAC * 10 + 3.0 * n) / (10.0 + 10.0 * n) for n in range(1, 9)]
    assert said[0] and f"{shares[0]:.0%} of the last 30 steps" in said[0] and "medcg data prepare" in said[0]
    worse = [bool(line) for line in said]
    expected, last = [], 0.0
    for share in shares:
        expected.append(share >= (last + WORSE_BY_FRAC if last else LOADER_BOUND_FRAC))
        last = share if expected[-1] else last
    assert worse == expected and sum(worse) < 4


# ------------------------------------------------------------------ what was compiled

PROGRAM = """
import sys
from medcg_jax.train.log import CompileMonitor, enable_cache
import jax, jax.numpy as jnp
if sys.argv[1] != "none":
    enable_cache(sys.argv[1])
monitor = CompileMonitor()
f = jax.jit(lambda x: jnp.sin(x) * 2)
f(jnp.ones(3)); f(jnp.ones(3)); f(jnp.ones(4))
print(monitor.compiled, monitor.from_cache)
print(monitor.line())
"""


def counts(directory) -> tuple[int, int]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMPILATION", "JAX_PERSISTENT"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(directory)], env=environment, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    first, line = done.stdout.splitlines()
    compiled, cached = map(int, first.split())
    assert line.startswith(f"compiled {compiled} programs, {cached} from cache")
    return compiled, cached


def test_a_second_process_compiles_nothing(tmp_path):
    compiled, cached = counts(tmp_path / "cache")
    assert compiled >= 2 and cached == 0
    assert counts(tmp_path / "cache") == (0, compiled)


def test_programs_are_kept_unless_the_user_says_where(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(log, "enable_cache", kept.append)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(log.jax, "config", SimpleNamespace(jax_compilation_cache_dir="/somewhere"))
    log.keep_programs()
    assert not kept
    monkeypatch.setattr(log.jax, "config", SimpleNamespace(jax_compilation_cache_dir=None))
    log.keep_programs()
    assert kept == [tmp_path / "medcg_jax" / "xla"]


@pytest.mark.parametrize(("verb", "work"), [("train", "train.run.train"), ("eval", "eval.subsets.evaluate_subsets")])
def test_training_and_evaluation_keep_their_programs(verb, work, monkeypatch, tmp_path):
    """Before they compile the first."""
    done = []
    (tmp_path / "params").mkdir()  # without parameters there is nothing to evaluate
    monkeypatch.setattr(log, "keep_programs", lambda: done.append("kept"))
    monkeypatch.setattr(f"medcg_jax.{work}", lambda run, workdir: done.append("worked") or {})
    assert cli.main([verb, f"--config={CONFIG}:tiny", "--config.eval.batch_size=8", f"--workdir={tmp_path}"]) == 0
    assert done == ["kept", "worked"]
