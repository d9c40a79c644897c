"""How the wall time of a run was spent, over all its starts: goodput, and what the rest went to.

At every instant a run is in one of `KINDS`. While the devices work on a step, that is "productive", whatever the host
does meanwhile: a loader or a checkpoint costs only what the devices stand still for. Steps that an earlier start had
made already (they came after the last checkpoint) are "restart", as are start-up and restoring of every start but the
first. Time between two starts is nobody's: a queue is not a run.

Whether a step is still at work is looked at whenever the host turns to something else. A step that ended between two
looks took as long as the quickest step of the run, within the time between them.

A start writes its part from its first step on. Of one that is killed, what came after its last write is lost: at most
`WRITE_EVERY_S` and what one step, compilation, save or restoring takes.
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
from medcg_jax.untrusted import FileError, check_number, read_json, shown

KINDS = ("productive", "compile", "input", "checkpoint", "restart", "evaluation", "other")
WRITE_EVERY_S = 5.0
FILE = "goodput.json"
MAX_GOODPUT_BYTES = 2**26
# A run is told from which share of the time the devices wait for the loader, and by how much more from when on again.
LOADER_BOUND_FRAC = 0.1
WORSE_BY_FRAC = 0.1
# Steps before that: reading starts cold.
FROM_STEPS = 10


@dataclass
class _Step:
    """A step on the devices, handed over at `began_s`.

    fresh: share of its runs that make this step for the first time. at: run -> its step. ready: an array of results.
    running_s: when it was last seen at work. done_s: when it was first seen done, None until then.
    """

    began_s: float
    fresh: float
    at: Mapping[str, int]
    ready: Any
    running_s: float
    done_s: float | None = None


class Goodput:
    """The clock of one start. Its methods are for one thread.

    path: file that this start's part and earlier ones' are written to; None: nothing is written.
    earlier: parts of earlier starts of the same run (`read_starts`), which stay in `path`.
    others: parts that have files of their own: what they reached is not new either.
    restarted: whether start-up is "restart"; None: where there are earlier parts.
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
        # A kind, or of a step the share of it that is productive.
        self._kind: str | float = "restart" if (bool(earlier) if restarted is None else restarted) else "other"
        self._starting = True
        self._since_s = time.perf_counter()
        self._written_s: float | None = None  # None: nothing is written before there is a step, or bad input would be
        self._spans: list[tuple[str | float, float, float]] = []
        self._steps: list[_Step] = []
        self._quickest_s = math.inf
        self._free_s = self._since_s  # since when the devices are free of all steps before `_steps`

    def __enter__(self) -> "Goodput":
        return self

    def __exit__(self, error, *_) -> None:
        """Ends the start's part and writes it, unless the start failed before its first step."""
        self._settle()
        if error is None or self._written_s is not None:
            self._write()

    @contextmanager
    def within(self, kind: str | float) -> Iterator[None]:
        """The block's time is of this kind, but for blocks inside it and for what devices do meanwhile."""
        outer = self._switch(kind)
        try:
            yield
        finally:
            self._switch(outer)

    @contextmanager
    def step(self, at: Mapping[str, int], *, compiles: bool = False) -> Iterator[None]:
        """The block hands a step to the devices: the step number `at[run]` of each run that makes one."""
        if self._starting:
            self._starting = False
            self._switch("other")
        if self._written_s is None or time.perf_counter() - self._written_s > self._write_every_s:
            self._settle()
            self._write()
        with self.within("compile" if compiles else self._fresh(at)):
            yield

    def handed(self, at: Mapping[str, int], ready) -> None:
        """The step is on its way; `ready` is an array of its results."""
        now = time.perf_counter()
        self._steps.append(_Step(now, self._fresh(at), dict(at), ready, running_s=now))

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The block waits for a step, which ends with it."""
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
        """`summarise` of all starts, this one up to now."""
        self._settle()
        return summarise([*self._earlier, self._part()])

    def _fresh(self, at: Mapping[str, int]) -> float:
        return sum(step > self._reached_before.get(run, 0) for run, step in at.items()) / len(at) if at else 1.0

    def _switch(self, kind: str | float) -> str | float:
        """Ends the kind that it was and returns it; looks which steps are still at work."""
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
        """Adds up what has passed; a step still on the devices counts up to now, what is left of it later."""
        self._switch(self._kind)
        now, spans, steps = self._since_s, self._spans, self._steps
        self._spans, self._steps = [], []
        for kind, began, end in spans:
            self._add(kind, end - began)
        free_s = self._free_s
        for step in steps:
            # One that began while the devices were free took no longer than until it was seen done.
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

    def _part(self) -> dict:
        return {"seconds": {kind: round(s, 6) for kind, s in self._seconds.items()}, "reached": dict(self._reached)}

    def _write(self) -> None:
        self._written_s = time.perf_counter()
        if self._path is not None:
            write(self._path, [*self._earlier, self._part()])


class LoaderWatch:
    """Whether training waits for its data: one line when it does, another only when it gets worse."""

    def __init__(self):
        self._waited_s = self._seconds = 0.0
        self._steps, self._reported_frac = 0, 0.0

    def warning(self, waited_s: float, seconds: float, steps: int) -> str | None:
        """The line after so many more steps in so many seconds, `waited_s` of them for data; None: nothing new."""
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
    """The parts of a run's starts, {"seconds": {kind: s}, "reached": {run: step}}.

    [] where there is no such file, and where it cannot be read, which is said: times alone are lost with it.
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
    """Writes the parts of all starts with their sum, whole or not at all; returns the sum, as `summarise`."""
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
    """For people: "goodput 83 %: compile 9, input 4, checkpoint 2, restart 1, other 1 (61 s in 2 starts)"."""
    shares = summary["shares"]
    lost = [kind for kind in KINDS[1:] if kind != "evaluation" or shares[kind]]
    words = ", ".join(f"{kind} {100 * shares[kind]:.0f}" for kind in lost)
    starts = f"{summary['num_starts']} starts" if summary["num_starts"] != 1 else "1 start"
    return f"goodput {100 * shares['productive']:.0f} %: {words} ({summary['wall_s']:.0f} s in {starts})"
