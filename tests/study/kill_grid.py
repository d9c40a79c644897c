"""Grids that are interrupted at random moments, again and again, until they are done: the same scores must come out.

    python tests/study/kill_grid.py --kills=50 --seed=0 FOLDER

Ways to be interrupted: SIGKILL of the process, or of one of two that share the workdir; a full disk; a workdir that
cannot be written any more. The last two need a file system of their own, mounted by root through a loop device; where
that cannot be had they are left out, which is said. A grid that is done before all interruptions are used is compared
and started anew.
"""

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from medcg_jax.study.run.grid import ONE_THREAD

ROOT = Path(__file__).parents[2]
CONFIG = {
    "data.train_records_per_subset": "24", "data.test_records_per_subset": "12", "train.steps": "12",
    "train.checkpoint_every_steps": "3", "train.log_every_steps": "3", "base.checkpoint_every_steps": "2",
    "study.targets": "('ct-liver-grade', 'photo-skin-state')", "study.tables": "('pairs', 'triples')",
    "study.arms": "('baseline', 'baseline_plus', 'trained')",
    "eval.controls": "('shuffled_images', 'circular')", "eval.batch_size": "12",
}  # fmt: skip
WAYS = ("process", "one of two", "full disk", "read-only")
DISK_MIB = 96
TIMEOUT_S = 300
# What a start needs before it writes anything, and how much longer an interruption may wait.
FROM_S, TO_S = 3.0, 12.0


def start(workdir: Path, log: Path, settings: Mapping[str, str] = ONE_THREAD, **more: str) -> subprocess.Popen:
    """One `medcg reproduce` on the workdir, with one thread, whose output is added to the log.

    settings: environment variables. more: flags of the grid beside `CONFIG`.
    """
    flags = [f"--config.{key}={value}" for key, value in (CONFIG | more).items()]
    command = [sys.executable, "-m", "medcg_jax.cli", "reproduce", "--config=configs/phantom.py:tiny"]
    environment = os.environ | settings | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    with open(log, "ab") as out:
        return subprocess.Popen(
            [*command, *flags, f"--workdir={workdir}"], cwd=ROOT, env=environment, stdout=out, stderr=out
        )


def ended(process: subprocess.Popen, within_s: float = TIMEOUT_S) -> int | None:
    """The exit status, or None where the process still runs after so long."""
    try:
        return process.wait(within_s)
    except subprocess.TimeoutExpired:
        return None


def kill(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


@contextmanager
def disk(image: Path, mounted: Path) -> Iterator[bool]:
    """A small file system at `mounted`; False where none can be mounted, and the folder is an ordinary one."""
    mounted.mkdir(parents=True)
    with open(image, "wb") as file:
        file.truncate(DISK_MIB << 20)
    commands = (["mkfs.ext4", "-q", "-F", str(image)], ["mount", "-o", "loop", str(image), str(mounted)])
    try:
        found = all(subprocess.run(c, capture_output=True, timeout=60, check=False).returncode == 0 for c in commands)
    except FileNotFoundError:
        found = False
    try:
        yield found
    finally:
        if found:
            unlock(mounted)
            subprocess.run(["umount", str(mounted)], timeout=60, check=False)
        image.unlink()


def fill(folder: Path) -> Path:
    """Leaves no room on the folder's disk; returns the file that takes it."""
    ballast = folder / "ballast"
    with open(ballast, "wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(b"\0" * size)
            except OSError:
                pass
    return ballast


def lock(folder: Path) -> None:
    """Nothing below the folder can be made, changed or removed any more, not by root either."""
    subprocess.run(["chattr", "-R", "+i", str(folder)], capture_output=True, timeout=60, check=False)


def unlock(folder: Path) -> None:
    subprocess.run(["chattr", "-R", "-i", str(folder)], capture_output=True, timeout=60, check=False)


def interrupt(way: str, workdir: Path, log: Path, rng: random.Random, **more: str) -> str:
    """Starts the grid and interrupts it once; says how that went."""
    delay = rng.uniform(FROM_S, TO_S)
    first = start(workdir, log, **more)
    if way == "one of two":
        second = start(workdir, log, **more)
        if ended(first, delay) is None:
            kill(first)
        if ended(second, rng.uniform(0, TO_S)) is None:
            kill(second)
        return f"killed one of two after {delay:.1f} s, and the other later"
    if ended(first, delay) is not None:
        return "ended before it was interrupted"
    if way == "process":
        kill(first)
        return f"killed after {delay:.1f} s"
    ballast = fill(workdir.parent) if way == "full disk" else lock(workdir)
    try:
        status = ended(first, 30.0)
        if status is None:
            kill(first)
        assert status != 0 or is_done(workdir), f"{way}: status 0 of a grid that is not done"
        return f"{way} after {delay:.1f} s: status {'none in 30 s, killed' if status is None else status}"
    finally:
        if ballast:
            ballast.unlink()
        unlock(workdir)


def is_done(workdir: Path) -> bool:
    cells = workdir / "cells.csv"
    return cells.is_file() and "waiting" not in cells.read_text()


def scores(workdir: Path) -> dict[str, bytes]:
    """results.csv and every file of predictions/ and controls/."""
    files = [workdir / "results.csv", *sorted([*workdir.glob("predictions/*"), *workdir.glob("controls/*")])]
    return {str(path.relative_to(workdir)): path.read_bytes() for path in files}


def trained_twice(log: Path) -> list[str]:
    """Jobs that more than one process has trained to the end."""
    ends = re.findall(r"^(\S+): \d+ steps, [\d.]+ s;", log.read_text(errors="replace"), re.MULTILINE)
    return [job for job, times in Counter(ends).items() if times > 1]


def run(folder: Path, kills: int, seed: int, ways: Sequence[str] = WAYS, say=print, **more: str) -> Counter:
    """Interrupts grids `kills` times in all; how often in each way. more: flags of the grid beside `CONFIG`.

    Raises:
      AssertionError: scores differ, a job was trained twice, or a grid did not end.
    """
    rng, used, left = random.Random(seed), Counter(), kills
    log = folder / "reference.log"
    bases = {"study.base_dir": str(folder / "bases")}
    status = ended(start(folder / "reference", log, **more | bases))
    assert status == 0, log.read_text()[-2000:]
    expected = scores(folder / "reference")
    with disk(folder / "image", folder / "disk") as mounted:
        ways = [way for way in ways if mounted or way in WAYS[:2]]
        say(f"{len(expected)} files to come out; ways: {', '.join(ways)}" + ("" if mounted else " (no disk mounted)"))
        number = 0
        while left and ways:
            number += 1
            workdir, log = folder / "disk" / f"grid{number}", folder / f"grid{number}.log"
            # Each with a base of its own, so that this is interrupted too.
            own = more | {"study.base_dir": str(folder / "disk" / f"bases{number}")}
            while left and not is_done(workdir):
                way = ways[(kills - left) % len(ways)]
                left -= 1
                used[way] += 1
                say(f"{kills - left}: grid {number}, {interrupt(way, workdir, log, rng, **own)}", flush=True)
            status = ended(start(workdir, log, **own))
            assert status == 0, log.read_text(errors="replace")[-2000:]
            assert scores(workdir) == expected, f"{workdir}: other scores than those of a grid that was left alone"
            twice = trained_twice(log)
            assert not twice, f"trained twice: {twice}"
            say(f"grid {number} is done: the same {len(expected)} files, no job trained twice", flush=True)
    return used


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    began = time.monotonic()
    print(dict(run(args.folder, args.kills, args.seed)), f"{time.monotonic() - began:.0f} s")
