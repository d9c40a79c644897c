"""A grid's progress: a bar on a terminal, plain lines elsewhere, from files that every worker writes.

The unit is one optimizer step of one run; evaluation is counted in it too. A worker writes the number of finished units
of a job or base to `state/progress/NAME`; so progress of other processes and hosts is shown too. A base's step and a
cell's take different times, so each kind has a pace of its own.
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
from medcg_jax.terminal import duration, shows_progress
from medcg_jax.untrusted import FileError, read_text

POLL_S = 0.5
LINE_EVERY_S = 20.0
# Units for the test of one subset: a guess, which only moves the bar.
EVAL_UNITS = 2
# A pace is not told before it has been measured for so long.
MIN_MEASURED_S = 10.0
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


class Pace:
    """The speed of one kind of work, measured from the moment its first units were seen to be done: what came before
    was loading and compiling. total: units in all."""

    def __init__(self, total: int):
        self.total = total
        self.done = 0
        self._first: int | None = None
        self._from: tuple[float, int] | None = None

    def see(self, done: int, now_s: float) -> None:
        """Tells the units done until now; those of the first call were done by an earlier start."""
        if self._first is None:
            self._first = done
        elif self._from is None and done > self._first:
            self._from = now_s, done
        self.done = min(done, self.total)
        self._now_s = now_s

    @property
    def left(self) -> int:
        return self.total - self.done

    @property
    def seconds_left(self) -> float | None:
        """None as long as the speed is not known."""
        if not self.left:
            return 0.0
        if self._from is None:
            return None
        since_s, units = self._now_s - self._from[0], self.done - self._from[1]
        return since_s * self.left / units if units > 0 and since_s >= MIN_MEASURED_S else None


def words_left(bases: Pace, cells: Pace) -> str:
    """What is known of the time that a grid still needs: "about 9 h 31 min left"."""
    of_bases, of_cells = bases.seconds_left, cells.seconds_left
    if of_bases is not None and of_cells is not None:
        left_s = of_bases + of_cells
        return f"about {duration(left_s)} left" if left_s else "nothing left"
    if of_bases:
        return f"bases ready in about {duration(of_bases)}; how long cells take is not known yet"
    unknown = "bases" if of_bases is None else "cells"
    return f"the first steps of the {unknown} will tell the time left"


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
        self._base_pace, self._cell_pace = Pace(sum(bases.values())), Pace(sum(map(job_units, plan.jobs)))
        self._stop = threading.Event()
        self._outcomes: dict[str, dict[str, dict]] = {model: {} for model in folders}

    def __enter__(self) -> Self:
        self._began = self._shown_at = time.monotonic()
        self._read()
        self._bar = tqdm(
            total=self._base_pace.total + self._cell_pace.total,
            initial=self._base_pace.done + self._cell_pace.done,
            disable=not sys.stderr.isatty() or not shows_progress(),
            # Without tqdm's own time left, which takes all steps for equally long.
            bar_format="{desc} |{bar}|{postfix}",
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
        changed = self._read()
        for model in changed:
            self._on_change(model, self._outcomes[model])
        if not shows_progress():
            return
        if not self._bar.disable:
            self._bar.set_description_str(self._cells_done(), refresh=False)
            self._bar.set_postfix_str(self._times(), refresh=False)
            self._bar.n = self._base_pace.done + self._cell_pace.done
            self._bar.refresh()
        elif last or changed or time.monotonic() - self._shown_at > LINE_EVERY_S:
            self._shown_at = time.monotonic()
            print(f"{self._cells_done()}, {self._times()}", file=sys.stderr, flush=True)

    def _read(self) -> list[str]:
        """Reads what is done; returns the models with a job finished since the last call."""
        changed = []
        for model, folder in self._folders.items():
            outcomes = self._outcomes[model]
            new = results.done_jobs(folder) - outcomes.keys()
            outcomes |= {name: results.outcome_of(folder, name) for name in new}
            changed += [model] if new else []
        of_bases = sum(min(self._partial(model, base_name(seed)), n) for (model, seed), n in self._bases.items())
        of_jobs = 0
        started = {m: set(os.listdir(results.state_dir(f) / "progress")) for m, f in self._folders.items()}
        for job in self._plan.jobs:
            if job.id in self._outcomes[job.model]:
                of_jobs += job_units(job)
            elif job.id in started[job.model]:
                of_jobs += self._partial(job.model, job.id)
        now = time.monotonic()
        self._base_pace.see(of_bases, now)
        self._cell_pace.see(of_jobs, now)
        return changed

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

    def _times(self) -> str:
        bases, cells = self._base_pace, self._cell_pace
        kind, pace = ("bases", bases) if bases.left else ("cells' steps", cells)
        share = f"{100 * pace.done / max(pace.total, 1):.0f} % of the {kind}"
        return f"{share}, {duration(time.monotonic() - self._began)} gone, {words_left(bases, cells)}"
