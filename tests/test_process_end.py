"""What a process tells its host: freed memory is kept on a CPU, and a machine with an accelerator is left alone."""

import os
import platform
import subprocess
import sys

import pytest

from medcg_jax import platform as medcg_platform

# Prints the page faults of a typical run of a program with 32 MB of scratch. Typical: now and then the heap still grows.
PROGRAM = """
import resource, statistics, sys
from medcg_jax.platform import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
import jax, jax.numpy as jnp
run = jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x).T)
x = jnp.ones((16, 1 << 18))
faults = []
for i in range(50):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    run(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(int(statistics.median(faults[10:])))
"""


def faults(how: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, how], env=os.environ, capture_output=True, text=True, timeout=120, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_scratch_is_mapped_once():
    assert faults("kept") < 100
    assert faults("freed") > 1000


def test_a_machine_that_may_have_an_accelerator_is_left_alone(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(medcg_platform, "find_spec", lambda name: name == "libtpu" or None)
    assert not medcg_platform.keep_freed_memory()


def test_a_process_ends_with_its_status_and_before_python_takes_itself_down():
    program = """
import atexit, sys
from medcg_jax.platform import run_process

class Late:
    def __del__(self):
        print("taken down")

def main():
    atexit.register(print, "what libraries do at an exit")
    sys.late = Late()
    print("done")
    {ending}

run_process(main)
"""
    for ending, status in (("return 75", 75), ("raise SystemExit(0)", 0), ("raise ValueError('a bug')", 1)):
        command = [sys.executable, "-S", "-c", program.format(ending=ending)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == (status, "done\nwhat libraries do at an exit\n")
        assert ("ValueError: a bug" in done.stderr) == (status == 1)
