"""Runs `medcg` on an input in a process of its own, and says what came of it.

The process is a fork of one that has imported the package already, so that a run costs what the verb costs. Torch and
JAX's devices are not there yet in the parent: a fork would copy their locks.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
CHECKOUT = TESTS.parent
SHARED = CHECKOUT.parent / "shared"
# What one refusal may take.
MAX_SECONDS = 10.0
MAX_GROWTH_MB = 500.0


@dataclass(frozen=True)
class Result:
    """What a run printed and cost: its exit status (minus a signal's number), output, seconds of CPU, growth in MB."""

    status: int
    out: str
    err: str
    seconds: float
    growth_mb: float

    @property
    def text(self) -> str:
        return self.out + self.err

    @property
    def line(self) -> str:
        """The last line on standard error that is the product's own, or the last of all."""
        lines = [line for line in self.err.splitlines() if line.startswith("medcg: ")]
        return (lines or self.text.strip().splitlines() or [""])[-1]


def medcg(
    *arguments: str | Path, cwd: Path | None = None, timeout_s: float = 60.0, env: dict[str, str] | None = None
) -> Result:
    """The result of `medcg ARGUMENTS...`."""

    def run() -> int:
        from medcg_jax.cli import main

        return main([str(argument) for argument in arguments])

    return call(run, cwd=cwd, timeout_s=timeout_s, env=env)


def call(function, *, cwd: Path | None = None, timeout_s: float = 60.0, env: dict[str, str] | None = None) -> Result:
    """The result of a function that returns an exit status and prints; what it raises is a traceback and status 1."""
    began = time.monotonic()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            _run_and_exit(function, out.fileno(), err.fileno(), cwd, env or {})
        status, usage = _waited(pid, began + timeout_s)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace"))
    grown = usage.ru_maxrss / 1024 - _resident_mb()
    # Of CPU: other work on the machine does not count. What waits for ever is ended after `timeout_s`.
    return Result(status, *texts, usage.ru_utime + usage.ru_stime, max(grown, 0.0))


def _run_and_exit(function, out: int, err: int, cwd: Path | None, env: dict[str, str]) -> None:
    status = 1
    try:
        os.setsid()
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.environ.update(env)
        if cwd:
            os.chdir(cwd)
        status = function() or 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 2
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _waited(pid: int, deadline: float):
    while True:
        ended, raw, usage = os.wait4(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(raw), usage
        if time.monotonic() > deadline:
            os.killpg(pid, signal.SIGKILL)
            _, raw, usage = os.wait4(pid, 0)
            return os.waitstatus_to_exitcode(raw), usage
        time.sleep(0.02)


def _resident_mb() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def refused(result: Result, *words: str, status: int = 2, max_seconds: float = MAX_SECONDS) -> str:
    """The one line of a refusal. Raises AssertionError where the run was none, or cost more than it may."""
    own = [line for line in result.err.splitlines() if line.startswith("medcg: ")]
    assert "Traceback" not in result.text, f"a traceback: {result.text.strip().splitlines()[-1]}"
    assert result.status == status, f"status {result.status}: {result.line}"
    assert len(own) == 1, f"{len(own)} lines: {own[:3]}"
    for word in words:
        assert word in own[0], f"no {word!r} in: {own[0]}"
    assert len(own[0]) < 700, f"a line of {len(own[0])} characters: {own[0][:200]}"
    assert result.seconds < max_seconds, f"{result.seconds:.1f} s: {own[0]}"
    assert result.growth_mb < MAX_GROWTH_MB, f"{result.growth_mb:.0f} MB: {own[0]}"
    return own[0]


def told(result: Result, *words: str, status: int | tuple[int, ...] = 0) -> str:
    """The line of the output that holds all the words. Raises AssertionError where there is none."""
    accepted = status if isinstance(status, tuple) else (status,)
    assert "Traceback" not in result.text, f"a traceback: {result.text.strip().splitlines()[-1]}"
    assert result.status in accepted, f"status {result.status}: {result.line}"
    for line in result.text.splitlines():
        if all(word in line for word in words):
            return line
    raise AssertionError(f"no line with {words}: {result.text.strip()[-300:]}")
