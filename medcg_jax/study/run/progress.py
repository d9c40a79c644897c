"""A grid's progress: a bar on a terminal, plain lines elsewhere, from files that every worker writes.

The unit is one optimizer step of one run; evaluation and bases are counted in it too. A worker writes the number of
finished units of a job to `state/progress/JOB`; so progress of other processes and hosts is shown too.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

from tqdm import tqdm

from medcg_jax.files import write_whole
from medcg_jax.processes import is_first
from medcg_jax.study.design.schedule import Job, Plan
from medcg_jax.study.stats import results
from medcg_jax.untrusted import FileError, read_text

POLL_S = 0.5
LINE_EVERY_S = 20.0
# Units for the test of one subset: a guess, which only moves the bar.
EVAL_UNITS = 2
# A progress file holds one number.
MAX_PROGRESS_BYTES = 18


def job_units(job: Job) -> int:
    return job.steps + EVAL_UNITS * len(job.targets)


def base_name(seed: int) -> str:
    return f"base.s{seed}"


class Reporter:
    """Writes the progress of one job or base, at most twice a second; only the first process of a run writes."""

    def __init__(self, workdir: Path, name: str):
        self._path = results.state_dir(workdir) / "progress" / name
        self._last = 0.0

    def __call__(self, units: int, *, now: bool = False) -> None:
        if is_first() and (now or time.monotonic() - self._last > POLL_S):
            self._last = time.monotonic()
            write_whole(self._path, str(units))


class Progress:
    """Shows the grid's progress from a thread while the block runs.

    folders: model -> its workdir.
    bases: (model, seed) of each base that is not trained yet -> its steps.
    on_change: called with a model and its outcomes so far (job id -> outcome) whenever one of its jobs is done.
    """

    def __init__(
        self,
        folders: Mapping[str, Path],
        plan: Plan,
        bases: Mapping[tuple[str, int], int],
        on_change: Callable[[str, dict], None],
    ):
        self._folders, self._plan, self._bases, self._on_change = folders, plan, bases, on_change
        self._total = sum(bases.values()) + sum(map(job_units, plan.jobs))
        self._stop = threading.Event()
        self._outcomes: dict[str, dict[str, dict]] = {model: {} for model in folders}

    def __enter__(self) -> Self:
        self._began, (self._first, _) = time.monotonic(), self._read()
        self._shown_at = self._began
        self._bar = tqdm(
            total=self._total,
            initial=self._first,
            unit="step",
            disable=not sys.stderr.isatty(),
            smoothing=0.05,
            dynamic_ncols=True,
            desc=self._cells_done(),
        )
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()
        self._show(last=True)
        self._bar.close()

    def _watch(self) -> None:
        while not self._stop.wait(POLL_S):
            try:
                self._show()
            except (OSError, FileError) as error:  # a full disk, say: the work itself will fail
                print(f"progress: {error}", file=sys.stderr, flush=True)
                return

    def _show(self, last: bool = False) -> None:
        units, changed = self._read()
        for model in changed:
            self._on_change(model, self._outcomes[model])
        if not self._bar.disable:
            self._bar.set_description(self._cells_done(), refresh=False)
            self._bar.n = min(units, self._total)
            self._bar.refresh()
        elif last or changed or time.monotonic() - self._shown_at > LINE_EVERY_S:
            self._shown_at = time.monotonic()
            print(self._line(units), file=sys.stderr, flush=True)

    def _read(self) -> tuple[int, list[str]]:
        """(finished units, models with a job finished since the last call)."""
        changed = []
        for model, folder in self._folders.items():
            outcomes = self._outcomes[model]
            new = results.done_jobs(folder) - outcomes.keys()
            outcomes |= {name: results.outcome_of(folder, name) for name in new}
            changed += [model] if new else []
        units = sum(min(self._partial(model, base_name(seed)), n) for (model, seed), n in self._bases.items())
        started = {m: set(os.listdir(results.state_dir(f) / "progress")) for m, f in self._folders.items()}
        for job in self._plan.jobs:
            if job.id in self._outcomes[job.model]:
                units += job_units(job)
            elif job.id in started[job.model]:
                units += self._partial(job.model, job.id)
        return units, changed

    def _partial(self, model: str, name: str) -> int:
        try:
            text = read_text(results.state_dir(self._folders[model]) / "progress" / name, MAX_PROGRESS_BYTES)
        except FileError:
            return 0  # it only moves the bar
        return int(text) if text.isascii() and text.isdigit() else 0

    def _cells_done(self) -> str:
        cells = sum(len(job.cells) for job in self._plan.jobs if job.id in self._outcomes[job.model])
        failed = sum(results.is_failure(o) for outcomes in self._outcomes.values() for o in outcomes.values())
        return f"{cells}/{len(self._plan.cells)} cells" + (f", {failed} failed" if failed else "")

    def _line(self, units: int) -> str:
        seconds, done = time.monotonic() - self._began, units - self._first
        left = f"about {_clock(seconds * (self._total - units) / done)} left" if done else "time left unknown"
        return f"{self._cells_done()}, {100 * units / self._total:.0f} % of the work, {_clock(seconds)} gone, {left}"


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
