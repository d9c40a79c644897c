"""What was compiled and what came from the cache, counted in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from medcg_jax import cli
from medcg_jax.train import log

CONFIG = Path(__file__).parents[2] / "configs" / "phantom.py"
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
    # Another directory holds nothing yet.
    assert counts(tmp_path / "other") == (compiled, 0)


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
    monkeypatch.setattr(log, "keep_programs", lambda: done.append("kept"))
    monkeypatch.setattr(f"medcg_jax.{work}", lambda run, workdir: done.append("worked") or {})
    assert cli.main([verb, f"--config={CONFIG}:tiny", f"--workdir={tmp_path}"]) == 0
    assert done == ["kept", "worked"]
