"""How far a grid is: one bar on a terminal, plain lines elsewhere, from files that every worker writes.

The unit is one optimizer step of one run; evaluation and the bases are counted in it. A worker writes how many units of
a job are behind it to `state/progress/JOB`, so that processes and hosts are shown alike.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tqdm import tqdm

from medcg_jax.files import write_whole
from medcg_jax.processes import is_first
from medcg_jax.study.design.schedule import Job, Plan
from medcg_jax.study.stats import results
from medcg_jax.untrusted import FileError, read_text

POLL_S = 0.5
LINE_EVERY_S = 20.0
# Units that testing one subset counts for: a guess that only the bar is moved by.
EVAL_UNITS = 2
# A file of progress holds one number.
MAX_PROGRESS_BYTES = 18


def job_units(job: Job) -> int:
    return job.steps + EVAL_UNITS * len(job.targets)


def base_name(seed: int) -> str:
    return f"base.s{seed}"


class Reporter:
    """Writes how far one piece of work is, at most twice a second; of several processes of one run the first writes."""

    def __init__(self, workdir: Path, name: str):
        self._path = results.state_dir(workdir) / "progress" / name
        self._last = 0.0

    def __call__(self, units: int, *, now: bool = False) -> None:
        if is_first() and (now or time.monotonic() - self._last > POLL_S):
            self._last = time.monotonic()
            write_whole(self._path, str(units))


class Progress:
    """Shows the grid's progress from a thread while the block runs.

    bases: seeds whose base is still to be trained, and its steps.
    on_change: called with every outcome so far whenever a job is done.
    """

    def __init__(self, workdir: Path, plan: Plan, bases: Mapping[int, int], on_change: Callable[[dict], None]):
        self._workdir, self._plan, self._on_change = workdir, plan, on_change
        self._bases = {base_name(seed): steps for seed, steps in bases.items()}
        self._total = sum(self._bases.values()) + sum(map(job_units, plan.jobs))
        self._stop = threading.Event()
        self._outcomes: dict[str, dict] = {}

    def __enter__(self) -> "Progress":
        self._began, self._first = time.monotonic(), self._units()
        self._said = self._began
        self._bar = tqdm(
            total=self._total, initial=self._first, unit="step", disable=not sys.stderr.isatty(), smoothing=0.05,
            dynamic_ncols=True, desc=self._words(),
        )  # fmt: skip
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()
        self._look(last=True)
        self._bar.close()

    def _watch(self) -> None:
        while not self._stop.wait(POLL_S):
            try:
                self._look()
            except (OSError, FileError) as error:  # a full disk, say: the work itself will fail where it must
                print(f"progress: {error}", file=sys.stderr, flush=True)
                return

    def _look(self, last: bool = False) -> None:
        before = len(self._outcomes)
        units = self._units()
        if len(self._outcomes) != before:
            self._on_change(self._outcomes)
        if not self._bar.disable:
            self._bar.set_description(self._words(), refresh=False)
            self._bar.n = min(units, self._total)
            self._bar.refresh()
        elif last or len(self._outcomes) != before or time.monotonic() - self._said > LINE_EVERY_S:
            self._said = time.monotonic()
            print(self._line(units), file=sys.stderr, flush=True)

    def _units(self) -> int:
        """Units behind us; also collects the outcomes of jobs done since the last look."""
        for name in results.done_jobs(self._workdir) - self._outcomes.keys():
            self._outcomes[name] = results.outcome_of(self._workdir, name)
        units = sum(min(self._partial(name), most) for name, most in self._bases.items())
        started = set(os.listdir(results.state_dir(self._workdir) / "progress"))
        for job in self._plan.jobs:
            if job.id in self._outcomes:
                units += job_units(job)
            elif job.id in started:
                units += self._partial(job.id)
        return units

    def _partial(self, name: str) -> int:
        try:
            text = read_text(results.state_dir(self._workdir) / "progress" / name, MAX_PROGRESS_BYTES)
        except FileError:
            return 0  # the bar alone is moved by it
        return int(text) if text.isascii() and text.isdigit() else 0

    def _words(self) -> str:
        cells = sum(len(job.cells) for job in self._plan.jobs if job.id in self._outcomes)
        failed = sum(map(results.is_failure, self._outcomes.values()))
        return f"{cells}/{len(self._plan.cells)} cells" + (f", {failed} failed" if failed else "")

    def _line(self, units: int) -> str:
        gone = time.monotonic() - self._began
        here = units - self._first
        left = f"about {_clock(gone * (self._total - units) / here)} left" if here else "time left unknown"
        return f"{self._words()}, {100 * units / self._total:.0f} % of the work, {_clock(gone)} gone, {left}"


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
