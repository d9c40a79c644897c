"""The names for Python: light until they are used, few, documented, and the functions of the verbs."""

import importlib
import inspect
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import medcg_jax
from medcg_jax.config import ConfigError, RunConfig, replace
from medcg_jax.config_file import load, to_config_dict

ROOT = Path(__file__).resolve().parents[1]
TINY = f"{ROOT / 'configs' / 'phantom.py'}:tiny"


def test_importing_the_package_imports_nothing_heavy():
    program = (
        "import sys, time; before = set(sys.modules); began = time.process_time(); import medcg_jax\n"
        "seconds = time.process_time() - began\n"
        "names = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(seconds < 0.05, sorted(names - sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout.strip() == "True ['medcg_jax']", (done.stdout, done.stderr)


def test_the_names_are_there_and_documented():
    assert set(medcg_jax.__all__) <= set(dir(medcg_jax))
    with (ROOT / "pyproject.toml").open("rb") as file:
        assert medcg_jax.__version__ == tomllib.load(file)["project"]["version"]
    for name in medcg_jax.__all__:
        found = getattr(medcg_jax, name)
        assert isinstance(found, str) or inspect.getdoc(found), name
        assert f"m.{name}" in medcg_jax.__doc__ or name in ("Model", "Answer"), name
    with pytest.raises(AttributeError, match="has no attribute 'trian'; it has Answer, "):
        medcg_jax.trian  # noqa: B018
    assert (ROOT / "medcg_jax" / "py.typed").is_file()
    public = [name for name in vars(medcg_jax.Model) if not name.startswith("_")]
    assert all(
        inspect.getdoc(getattr(medcg_jax.Model, name)) for name in ("ask", "score", "generate", "choose", "locate")
    )
    assert len(public) < 12


def test_train_can_be_called_whatever_was_imported_before():
    importlib.import_module("medcg_jax.train.step")
    from medcg_jax.train import step

    assert medcg_jax.train.step is step and callable(medcg_jax.train)
    with pytest.raises(ConfigError, match="config of type int; expected a file, a ConfigDict or a RunConfig"):
        medcg_jax.train(3)
    with pytest.raises(ConfigError, match="--config=none.py: there is no such file"):
        medcg_jax.train("none.py")


def test_train_takes_a_file_a_config_and_a_run(tmp_path, monkeypatch):
    from medcg_jax.train import run as train_run

    seen = []
    monkeypatch.setattr(train_run, "train", lambda run, workdir: seen.append((run, workdir)) or {"steps": 1})
    monkeypatch.setattr("medcg_jax.platform.apply", lambda switches: seen.append(switches))
    expected = load(TINY)
    for config in (TINY, to_config_dict(expected), expected):
        assert medcg_jax.train(config, tmp_path / "run") == {"steps": 1}
    assert seen == [frozenset({"deterministic"}), (expected, tmp_path / "run")] * 3
    medcg_jax.train(expected)
    assert seen[-1] == (expected, Path("runs") / expected.name)
    with pytest.raises(ConfigError, match="train.batch_size"):
        medcg_jax.train(replace(RunConfig(), train__batch_size=-1))


def test_train_is_not_one_of_several_processes(monkeypatch, tmp_path):
    for name, value in (("COORDINATOR_ADDRESS", "a:9"), ("NUM_PROCESSES", "2"), ("PROCESS_ID", "0")):
        monkeypatch.setenv(f"JAX_{name}", value)
    with pytest.raises(ConfigError, match="one of several processes, by the environment; `medcg train`"):
        medcg_jax.train(TINY, tmp_path)


@pytest.mark.long
def test_the_example_of_train_runs(tmp_path):
    """In a process of its own: on this one's 8 devices the config's batches do not divide."""
    os.symlink(ROOT / "configs", tmp_path / "configs")
    program = "from docstrings import run_examples; from medcg_jax.train.run import train_config as train; run_examples(train)"
    env = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert (tmp_path / "runs" / "tiny" / "params" / "model.json").is_file()
