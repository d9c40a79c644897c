"""Starts a script of the tests in several processes of one run, each with its own devices and time limit."""

import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Ended:
    """How a process ended: its status (negative: the signal), its output, and seconds since all were started."""

    status: int
    out: str
    err: str


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def environment(devices: int) -> dict[str, str]:
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
    flags.append(f"--xla_force_host_platform_device_count={devices}")
    paths = [ROOT, ROOT / "tests", ROOT / "tests" / "eval", ROOT / "tests" / "processes"]
    more = {"XLA_FLAGS": " ".join(flags), "PYTHONPATH": os.pathsep.join(map(str, paths)), "PYTHONUNBUFFERED": "1"}
    return os.environ | {"JAX_PLATFORMS": "cpu"} | more


def run(script: str, *arguments: str, processes: int, devices: int, timeout_s: float = 150) -> list[Ended]:
    """Runs `tests/SCRIPT COORDINATOR N I [arguments]` in N processes; none is left, however this ends."""
    command = [sys.executable, str(ROOT / "tests" / script), f"127.0.0.1:{free_port()}", str(processes)]
    started = [
        subprocess.Popen([*command, str(i), *arguments], env=environment(devices), stdin=subprocess.DEVNULL,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for i in range(processes)
    ]  # fmt: skip
    try:
        found = [process.communicate(timeout=timeout_s) for process in started]
        return [Ended(process.returncode, *texts) for process, texts in zip(started, found, strict=True)]
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
            process.wait()
