"""How the wall time of a run was spent, over all its starts: goodput, and the kinds of lost time.

At every instant a run is in one of `KINDS`. The time in which the devices work on a step is "productive", whatever the
host does meanwhile: a loader or a checkpoint costs only the time in which the devices are idle. Steps that an earlier
start had already made (after its last checkpoint) are "restart", and so are start-up and restoring of every start but
the first. Time between two starts does not count.

Whether a step is still running is checked each time the host changes to another activity. A step that ended between
two checks is taken to have lasted as long as the quickest step of the run, within the time between the checks.

A start writes its times from its first step on. If it is killed, the times after its last write are lost: at most
`WRITE_EVERY_S` and the duration of one step, compilation, save or restoring.
"""

import bisect
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medcg_jax.files import write_whole
from medcg_jax.terminal import duration
from medcg_jax.untrusted import FileError, check_number, read_json, shown

KINDS = ("productive", "compile", "input", "checkpoint", "restart", "evaluation", "other")
WRITE_EVERY_S = 5.0
FILE = "goodput.json"
MAX_GOODPUT_BYTES = 2**26
# Share of the time that the devices wait for the loader at which the run is warned, and the increase at which it is
# warned again.
LOADER_BOUND_FRAC = 0.1
WORSE_BY_FRAC = 0.1
# Steps before the first warning: the first reads are slow.
FROM_STEPS = 10


@dataclass
class _Step:
    """A step on the devices, dispatched at `began_s`.

    fresh: share of its runs that make this step for the first time. at: run -> its step. ready: an array of results.
    running_s: when the step was last seen running. done_s: when it was first seen done; None until then.
    """

    began_s: float
    fresh: float
    at: Mapping[str, int]
    ready: Any
    running_s: float
    done_s: float | None = None


class Goodput:
    """The clock of one start. Not thread-safe.

    path: file for the times of this start and of the earlier ones; None: nothing is written.
    earlier: times of earlier starts of the same run (`read_starts`), which stay in `path`.
    others: times of starts with files of their own; the steps that these reached are not new either.
    restarted: whether start-up counts as "restart"; None: if there are earlier starts.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        earlier: Sequence[dict] = (),
        others: Sequence[dict] = (),
        restarted: bool | None = None,
        write_every_s: float = WRITE_EVERY_S,
    ):
        self._path, self._earlier, self._write_every_s = path, list(earlier), write_every_s
        self._reached_before: dict[str, int] = {}
        for start in (*self._earlier, *others):
            for run, step in start["reached"].items():
                self._reached_before[run] = max(step, self._reached_before.get(run, 0))
        self._reached: dict[str, int] = {}
        self._seconds = dict.fromkeys(KINDS, 0.0)
        self._at_last_lap = dict(self._seconds)
        # A kind; for a step, the share of it that is productive.
        self._kind: str | float = "restart" if (bool(earlier) if restarted is None else restarted) else "other"
        self._starting = True
        self._since_s = time.perf_counter()
        self._written_s: float | None = None  # until the first step: a failed start-up writes nothing
        self._spans: list[tuple[str | float, float, float]] = []
        self._steps: list[_Step] = []
        self._quickest_s = math.inf
        self._free_s = self._since_s  # when the devices had finished all steps before `_steps`

    def __enter__(self) -> "Goodput":
        return self

    def __exit__(self, error, *_) -> None:
        """Writes the start's times, unless the start failed before its first step."""
        self._settle()
        if error is None or self._written_s is not None:
            self._write()

    @contextmanager
    def within(self, kind: str | float) -> Iterator[None]:
        """The block's time is of this kind, except for blocks inside it and for steps that run meanwhile."""
        outer = self._switch(kind)
        try:
            yield
        finally:
            self._switch(outer)

    @contextmanager
    def step(self, at: Mapping[str, int], *, compiles: bool = False) -> Iterator[None]:
        """The block dispatches a step: step number `at[run]` of each run that takes part."""
        if self._starting:
            self._starting = False
            self._switch("other")
        if self._written_s is None or time.perf_counter() - self._written_s > self._write_every_s:
            self._settle()
            self._write()
        with self.within("compile" if compiles else self._fresh(at)):
            yield

    def handed(self, at: Mapping[str, int], ready) -> None:
        """The step is dispatched; `ready` is an array of its results."""
        now = time.perf_counter()
        self._steps.append(_Step(now, self._fresh(at), dict(at), ready, running_s=now))

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The block waits for a step, and ends with it."""
        self._switch(self._kind)
        steps = [step for step in self._steps if step.done_s is None]
        yield
        self._switch(self._kind)
        for step in steps:
            if step.done_s is not None:
                step.running_s = step.done_s

    def lap(self) -> dict[str, float]:
        """Seconds of each kind since the last lap (or the start)."""
        self._settle()
        lap = {kind: self._seconds[kind] - self._at_last_lap[kind] for kind in KINDS}
        self._at_last_lap = dict(self._seconds)
        return lap

    def summary(self) -> dict:
        """`summarise` of all starts, up to now."""
        self._settle()
        return summarise([*self._earlier, self._times()])

    def _fresh(self, at: Mapping[str, int]) -> float:
        return sum(step > self._reached_before.get(run, 0) for run, step in at.items()) / len(at) if at else 1.0

    def _switch(self, kind: str | float) -> str | float:
        """Ends the current kind and returns it; checks which steps are still running."""
        now = time.perf_counter()
        self._spans.append((self._kind, self._since_s, now))
        before, self._kind, self._since_s = self._kind, kind, now
        for step in reversed(self._steps):
            if step.done_s is not None:
                break
            if step.ready.is_ready():
                step.done_s = now
            else:
                step.running_s = now
        return before

    def _settle(self) -> None:
        """Adds up the time so far. A step that is still running counts up to now; the rest of it is added later."""
        self._switch(self._kind)
        now, spans, steps = self._since_s, self._spans, self._steps
        self._spans, self._steps = [], []
        for kind, began, end in spans:
            self._add(kind, end - began)
        free_s = self._free_s
        for step in steps:
            # For a step that began on free devices, the time until it was seen done is an upper bound.
            if step.done_s is not None and step.began_s > free_s:
                self._quickest_s = min(self._quickest_s, step.done_s - step.began_s)
            free_s = step.done_s or now
        ends = [end for _, _, end in spans]
        for step in steps:
            began = max(step.began_s, self._free_s)
            end = now if step.done_s is None else min(step.done_s, max(step.running_s, began + self._quickest_s))
            for kind, first, last in spans[bisect.bisect(ends, began) :]:
                if first >= end:
                    break
                if isinstance(kind, str):
                    moved = min(last, end) - max(first, began)
                    self._add(kind, -moved)
                    self._add(step.fresh, moved)
            self._free_s = max(self._free_s, end)
            if step.done_s is None:
                step.began_s = now
                self._steps.append(step)
            else:
                self._reached |= step.at

    def _add(self, kind: str | float, seconds: float) -> None:
        if isinstance(kind, str):
            self._seconds[kind] += seconds
        else:
            self._seconds["productive"] += kind * seconds
            self._seconds["restart"] += (1 - kind) * seconds

    def _times(self) -> dict:
        return {"seconds": {kind: round(s, 6) for kind, s in self._seconds.items()}, "reached": dict(self._reached)}

    def _write(self) -> None:
        self._written_s = time.perf_counter()
        if self._path is not None:
            write(self._path, [*self._earlier, self._times()])


class LoaderWatch:
    """Detects that training waits for its data: one warning, and another only when the wait grows."""

    def __init__(self):
        self._waited_s = self._seconds = 0.0
        self._steps, self._reported_frac = 0, 0.0

    def warning(self, waited_s: float, seconds: float, steps: int) -> str | None:
        """The warning after `steps` more steps in `seconds`, `waited_s` of them for data; None: no new warning."""
        self._waited_s, self._seconds = self._waited_s + waited_s, self._seconds + seconds
        self._steps += steps
        if self._steps < FROM_STEPS or not self._seconds:
            return None
        share = self._waited_s / self._seconds
        if share < max(LOADER_BOUND_FRAC, self._reported_frac and self._reported_frac + WORSE_BY_FRAC):
            return None
        self._reported_frac = share
        return (
            f"the devices waited for data {share:.0%} of the last {self._steps} steps: images are decoded once by "
            "`medcg data prepare` (data.source=prepared), and otherwise more CPU cores give the loader more threads"
        )


def read_starts(path: Path) -> list[dict]:
    """The times of a run's starts, each {"seconds": {kind: s}, "reached": {run: step}}.

    [] if there is no such file. If it cannot be read, also [], with a line on stderr: only times are lost.
    """
    if not path.exists():
        return []
    try:
        starts = read_json(path, max_bytes=MAX_GOODPUT_BYTES).get("starts")
        for number, start in enumerate(starts if isinstance(starts, list) else [None]):
            name = f"{path}: starts[{number}]"
            if not isinstance(start, dict) or not all(
                isinstance(start.get(key), dict) for key in ("seconds", "reached")
            ):
                raise FileError(f'{name}: expected an object with "seconds" and "reached"')
            for kind, seconds in start["seconds"].items():
                check_number(seconds, f"{name}.seconds: {shown(kind)}", least=0, most=1e12)
            for run, step in start["reached"].items():
                check_number(step, f"{name}.reached: {shown(run)}", least=0, whole=True)
    except FileError as error:
        print(f"the time of earlier starts is not counted: {error}", file=sys.stderr, flush=True)
        return []
    return starts


def write(path: Path, starts: Sequence[dict]) -> dict:
    """Writes the times of all starts and their summary, whole or not at all; returns the summary (`summarise`)."""
    summary = summarise(starts)
    write_whole(path, json.dumps(summary | {"starts": list(starts)}, indent=1) + "\n")
    return summary


def summarise(starts: Sequence[dict]) -> dict:
    """{"wall_s": of all starts, "num_starts": N, "seconds": {kind: s}, "shares": {kind: 0-1, together 1}}."""
    seconds = {kind: sum(start["seconds"].get(kind, 0.0) for start in starts) for kind in KINDS}
    wall_s = sum(seconds.values())
    shares = {kind: s / wall_s if wall_s else 0.0 for kind, s in seconds.items()}
    return {"wall_s": wall_s, "num_starts": len(starts), "seconds": seconds, "shares": shares}


def line(summary: Mapping) -> str:
    """For people: "goodput 83 %: compile 9, input 4, checkpoint 2, restart 1, other 1 (1 min in 2 starts)"."""
    shares = summary["shares"]
    lost = [kind for kind in KINDS[1:] if kind != "evaluation" or shares[kind]]
    words = ", ".join(f"{kind} {100 * shares[kind]:.0f}" for kind in lost)
    starts = f"{summary['num_starts']} starts" if summary["num_starts"] != 1 else "1 start"
    return f"goodput {100 * shares['productive']:.0f} %: {words} ({duration(summary['wall_s'])} in {starts})"
