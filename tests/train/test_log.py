"""What was compiled and what came from the cache, counted in processes of their own."""

import os
import subprocess
import sys

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
