"""A tiny run of several processes that is killed at random times, again and again: the same bits must come out.

    python tests/train/kill_processes.py --kills=100 --signal=KILL FOLDER
    python tests/train/kill_processes.py --processes=2,4,1 FOLDER
    python tests/train/kill_processes.py --devices=8,4,8 FOLDER

With `--kills` a run of two processes (`one_of_processes.py`, `jax.distributed`, gloo) that saves after every step is
killed by SIGKILL, one process or both, or told to stop by SIGTERM, one process or both, and started again until it is
done; then the next one is begun. Final parameters and predictions must be those of a run that was left alone, bit for
bit. With `--processes` or `--devices` one run goes through these numbers, told to stop in between: the batches must be
the same records, step by step, and the losses those of the run that was left alone within `LOSS_TOLERANCE`.
"""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from medcg_jax.train.log import read_metrics

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
STEPS, TIMEOUT_S = 60, 240.0
# A process whose partner was killed is ended after so long at most, as launchers do.
PARTNER_S = 1.0
# Of kills, those at a random time of the start; the others come so long at most after the first step.
AT_START, START_S, AFTER_S = 0.15, 3.0, 2.5
# Relative, of a mean of losses in float32 whose sums are taken in another order.
LOSS_TOLERANCE = 1e-5
# Compiles quickly, and the same on every start.
FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


class Job:
    """Processes that share one run; `end` ends what still runs."""

    def __init__(
        self, workdir: Path, cache: Path, *, count: int = 2, devices: int = 1, steps: int = STEPS, seed: int = 0
    ):
        workdir.mkdir(parents=True, exist_ok=True)
        self.workdir, self._log = workdir, workdir / "log"
        self._before = self._batches()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)]), "JAX_PLATFORMS": "cpu", "NPROC": "1",
            "OMP_NUM_THREADS": "1", "XLA_FLAGS": f"{FLAGS} --xla_force_host_platform_device_count={devices}",
            "JAX_COMPILATION_CACHE_DIR": str(cache), "TOY_DATA_SEED": str(seed),
        }  # fmt: skip
        with open(self._log, "ab") as out:
            self.processes = [
                subprocess.Popen(
                    [sys.executable, str(HERE / "one_of_processes.py"), *map(str, (workdir, steps, i, count, port))],
                    env=environment, stdout=out, stderr=out, stdin=subprocess.DEVNULL,
                )
                for i in range(count)
            ]  # fmt: skip

    def _batches(self) -> int:
        path = self.workdir / "batches.0"
        return path.stat().st_size if path.exists() else 0

    def wait_for_batches(self, number: int = 1) -> None:
        """Returns when the first process has drawn so many batches, or any has ended."""
        deadline = time.monotonic() + TIMEOUT_S
        while all(p.poll() is None for p in self.processes) and time.monotonic() < deadline:
            path = self.workdir / "batches.0"
            if self._batches() > self._before and path.read_bytes()[self._before :].count(b"\n") >= number:
                return
            time.sleep(0.01)

    def statuses(self, within_s: float = TIMEOUT_S) -> list[int]:
        """Exit statuses of all; whoever still runs after so long is killed."""
        deadline = time.monotonic() + within_s
        for process in self.processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.end()
        return [process.wait() for process in self.processes]

    def send(self, which: signal.Signals, rng: random.Random) -> str:
        """Sends the signal to one process or to all; says to whom."""
        chosen = rng.choice([*range(len(self.processes)), None])
        for i, process in enumerate(self.processes):
            if chosen in (i, None) and process.poll() is None:
                process.send_signal(which)
        return "all" if chosen is None else f"process {chosen}"

    def end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()

    def tail(self) -> str:
        return self._log.read_text(errors="replace")[-3000:]


def outcome(workdir: Path) -> tuple[bytes, bytes]:
    return (workdir / "final").read_bytes(), (workdir / "predictions").read_bytes()


def saving(workdir: Path) -> bool:
    """Whether a checkpoint is being written, or an old one removed."""
    return any((workdir / "checkpoints").glob("*.part"))


def left_alone(workdir: Path, cache: Path, **how) -> None:
    """Makes the run to compare with.

    Raises:
      AssertionError: it failed.
    """
    job = Job(workdir, cache, **how)
    try:
        assert set(job.statuses()) == {0}, job.tail()
    finally:
        job.end()


def kill_once(workdir: Path, cache: Path, which: signal.Signals, rng: random.Random, used: Counter) -> str:
    """Starts the run and interrupts it once; says how that went."""
    job = Job(workdir, cache)
    try:
        if which == signal.SIGKILL and rng.random() < AT_START:
            delay, when = rng.uniform(0, START_S), "the start"
        else:
            job.wait_for_batches(2)  # the first comes before the step is compiled
            delay, when = rng.uniform(0, AFTER_S), "the first step"
        time.sleep(delay)
        if any(p.poll() is not None for p in job.processes):
            statuses = job.statuses()
            assert set(statuses) == {0}, (statuses, job.tail())
            used["ended before"] += 1
            return "ended before it was interrupted"
        # During the start what lies there is of the kill before.
        in_save = when == "the first step" and saving(workdir)
        whom = job.send(which, rng)
        used["kills"] += 1
        used["during a save"] += in_save
        used[whom] += 1
        if which == signal.SIGKILL:
            statuses = job.statuses(rng.uniform(0, PARTNER_S))
        else:
            statuses = job.statuses()
            # All of them, whichever was told; or the run was done meanwhile.
            assert set(statuses) in ({75}, {0}), (statuses, job.tail())
            used["saved, status 75" if statuses[0] else "done, status 0"] += 1
        return f"{which.name} of {whom} {delay:.1f} s after {when}{', during a save' if in_save else ''}: {statuses}"
    finally:
        job.end()


def kills(folder: Path, number: int, which: signal.Signals, seed: int, say=print) -> Counter:
    """Interrupts runs `number` times in all; how often in each way.

    Raises:
      AssertionError: a run did not end as it should, or in other bits.
    """
    rng, used, cache = random.Random(seed), Counter(), folder / "cache"
    left_alone(folder / "reference", cache)
    expected = outcome(folder / "reference")
    while used["kills"] < number:
        workdir, began, before = folder / f"run{used['runs']}", time.monotonic(), used["kills"]
        while used["kills"] < number and not (workdir / "final").exists():
            how = kill_once(workdir, cache, which, rng, used)
            say(f"run {used['runs']}, kill {used['kills']}: {how}", flush=True)
        if not (workdir / "final").exists():
            left_alone(workdir, cache)
        assert outcome(workdir) == expected, f"{workdir}: other parameters or predictions than of a run left alone"
        assert "damaged" not in (workdir / "log").read_text(errors="replace"), workdir
        used["runs"] += 1
        used["equal"] += 1
        seconds = time.monotonic() - began
        say(f"run {used['runs'] - 1} is done after {used['kills'] - before} kills, {seconds:.0f} s: equal", flush=True)
    return used


def batches(workdir: Path) -> dict[int, set[str]]:
    """Step -> records of its rows, of all processes; a step that was made twice must have the same both times."""
    found: dict[int, set[str]] = {}
    for path in workdir.glob("batches.*"):
        for line in path.read_text().splitlines():
            step, records = json.loads(line)
            found.setdefault(step, set()).update(records)
    return found


def through(folder: Path, numbers: list[int], what: str, say=print) -> float:
    """One run that goes on with other numbers of processes or devices; the largest relative difference of its losses.

    Raises:
      AssertionError: a batch has other records, a loss differs by more than `LOSS_TOLERANCE`, or a start failed.
    """
    how = [{"count": n} if what == "processes" else {"count": 1, "devices": n} for n in numbers]
    cache, workdir = folder / "cache", folder / "run"
    left_alone(folder / "reference", cache, **how[0])
    share = STEPS // len(numbers)
    for i, one in enumerate(how):
        job = Job(workdir, cache, **one)
        try:
            if i < len(how) - 1:
                job.wait_for_batches(share if not i else share - 1)
                job.processes[-1].send_signal(signal.SIGTERM)
            statuses = job.statuses()
            assert set(statuses) == ({75} if i < len(how) - 1 else {0}), (statuses, job.tail())
            steps = [int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]
            say(f"{what} {numbers[i]}: to step {max(steps)} of {STEPS}", flush=True)
        finally:
            job.end()
    expected, found = batches(folder / "reference"), batches(workdir)
    assert found == expected and len(found) == STEPS, f"{len(found)} batches, other records"
    alone, other = (read_metrics(path / "metrics.jsonl") for path in (folder / "reference", workdir))
    worst = max(abs(a["loss"] - b["loss"]) / a["loss"] for a, b in zip(alone, other, strict=True))
    assert worst <= LOSS_TOLERANCE, worst
    say(f"{STEPS} batches of the same records; losses differ by {worst:.1e} of themselves at most")
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--signal", choices=("KILL", "TERM"), default="KILL")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", default="")
    parser.add_argument("--devices", default="")
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    began = time.monotonic()
    for what in ("processes", "devices"):
        if numbers := getattr(args, what):
            through(args.folder / what, [int(n) for n in numbers.split(",")], what)
    if not args.processes and not args.devices:
        print(dict(kills(args.folder, args.kills, getattr(signal, f"SIG{args.signal}"), args.seed)))
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
