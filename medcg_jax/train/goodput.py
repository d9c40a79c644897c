"""How the wall time of a run was spent, over all its starts: goodput, and what the rest went to.

At every instant a run is in one of `KINDS`. While the devices work on a step, that is "productive", whatever the host
does meanwhile: a loader or a checkpoint costs only what the devices stand still for. Steps that an earlier start had
made already (they came after the last checkpoint) are "restart", as are start-up and restoring of every start but the
first. Time between two starts is nobody's: a queue is not a run.

A start writes its part from its first step on. Of one that is killed, what came after its last write is lost: at most
`WRITE_EVERY_S` and what one step, compilation, save or restoring takes.
"""

import bisect
import json
import queue
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from medcg_jax.files import write_whole
from medcg_jax.untrusted import FileError, check_number, read_json, shown

KINDS = ("productive", "compile", "input", "checkpoint", "restart", "evaluation", "other")
WRITE_EVERY_S = 5.0
END_WAIT_S = 2.0
FILE = "goodput.json"
MAX_GOODPUT_BYTES = 2**26


@dataclass
class _Step:
    """A step on the devices: handed over at `began_s`; ready at `done_s`, None until then.

    fresh: share of its cells that make this step for the first time. at: cell -> its step.
    """

    began_s: float
    fresh: float
    at: Mapping[str, int]
    done_s: float | None = None


class Goodput:
    """The clock of one start. Its methods are for one thread.

    path: file that this start's part and earlier ones' are written to; None: nothing is written.
    earlier: parts of earlier starts of the same run (`read_starts`), which stay in `path`.
    others: parts that have files of their own: what they reached is not new either.
    again: whether start-up is "restart"; None: where there are earlier parts.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        earlier: Sequence[dict] = (),
        others: Sequence[dict] = (),
        again: bool | None = None,
        write_every_s: float = WRITE_EVERY_S,
    ):
        self._path, self._earlier, self._write_every_s = path, list(earlier), write_every_s
        self._before: dict[str, int] = {}
        for start in (*self._earlier, *others):
            for cell, step in start["reached"].items():
                self._before[cell] = max(step, self._before.get(cell, 0))
        self._reached: dict[str, int] = {}
        self._seconds = dict.fromkeys(KINDS, 0.0)
        self._lap = dict(self._seconds)
        # A kind, or of a step the share of it that is productive.
        self._kind: str | float = "restart" if (bool(earlier) if again is None else again) else "other"
        self._starting = True
        self._since_s = time.perf_counter()
        self._written_s: float | None = None  # None: nothing is written before there is a step, or bad input would be
        self._spans: list[tuple[str | float, float, float]] = []
        self._steps: list[_Step] = []
        self._free_s = self._since_s  # since when the devices are free of all steps before `_steps`
        self._handed: queue.SimpleQueue = queue.SimpleQueue()
        self._watch: threading.Thread | None = None

    def __enter__(self) -> "Goodput":
        return self

    def __exit__(self, error, *_) -> None:
        """Ends the start's part and writes it, unless the start failed before its first step."""
        self._settle()
        if error is None or self._written_s is not None:
            self._write()
        if self._watch is not None:
            self._handed.put(None)
            # So that it is in no code of JAX's when the process ends; not for steps that never end.
            self._watch.join(END_WAIT_S)
            self._watch = None

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
        """The block hands a step to the devices: the step number `at[cell]` of each cell that makes one."""
        if self._starting:
            self._starting = False
            self._switch("other")
        self._write_if_due()
        with self.within("compile" if compiles else self._fresh(at)):
            yield

    def handed(self, at: Mapping[str, int], ready) -> None:
        """The step is on its way; `ready` is an array of its results."""
        step = _Step(time.perf_counter(), self._fresh(at), dict(at))
        self._steps.append(step)
        if self._watch is None:
            self._watch = threading.Thread(target=_watch, args=(self._handed,), daemon=True)
            self._watch.start()
        self._handed.put((step, ready))

    def lap(self) -> dict[str, float]:
        """Seconds of each kind since the last lap (or the start)."""
        self._settle()
        gone = {kind: self._seconds[kind] - self._lap[kind] for kind in KINDS}
        self._lap = dict(self._seconds)
        return gone

    def summary(self) -> dict:
        """`summarise` of all starts, this one up to now."""
        self._settle()
        return summarise([*self._earlier, self._part()])

    def _fresh(self, at: Mapping[str, int]) -> float:
        return sum(step > self._before.get(cell, 0) for cell, step in at.items()) / len(at) if at else 1.0

    def _switch(self, kind: str | float) -> str | float:
        """Ends the kind that it was; returns it."""
        now = time.perf_counter()
        self._spans.append((self._kind, self._since_s, now))
        before, self._kind, self._since_s = self._kind, kind, now
        return before

    def _settle(self) -> None:
        """Adds up what has passed; a step still on the devices counts up to now, the rest of it later."""
        self._switch(self._kind)
        now, spans, steps = self._since_s, self._spans, self._steps
        self._spans, self._steps = [], []
        ends = [end for _, _, end in spans]
        for kind, began, end in spans:
            self._add(kind, end - began)
        for step in steps:
            done = step.done_s is not None and step.done_s <= now
            began, end = max(step.began_s, self._free_s), step.done_s if done else now
            for kind, first, last in spans[bisect.bisect(ends, began) :]:
                if first >= end:
                    break
                if isinstance(kind, str):
                    moved = min(last, end) - max(first, began)
                    self._add(kind, -moved)
                    self._add(step.fresh, moved)
            self._free_s = max(self._free_s, end)
            if done:
                self._reached |= step.at
            else:
                step.began_s = now
                self._steps.append(step)

    def _add(self, kind: str | float, seconds: float) -> None:
        if isinstance(kind, str):
            self._seconds[kind] += seconds
        else:
            self._seconds["productive"] += kind * seconds
            self._seconds["restart"] += (1 - kind) * seconds

    def _part(self) -> dict:
        return {"seconds": {kind: round(s, 6) for kind, s in self._seconds.items()}, "reached": dict(self._reached)}

    def _write_if_due(self) -> None:
        if self._written_s is None or time.perf_counter() - self._written_s > self._write_every_s:
            self._settle()
            self._write()

    def _write(self) -> None:
        self._written_s = time.perf_counter()
        if self._path is not None:
            write(self._path, [*self._earlier, self._part()])


def _watch(handed: queue.SimpleQueue) -> None:
    """Notes when each step is done, in a thread: the loop itself may be waiting for data then."""
    while (item := handed.get()) is not None:
        step, ready = item
        try:
            ready.block_until_ready()
        except Exception:  # noqa: BLE001, S110 - the loop meets the same error and reports it
            pass
        step.done_s = time.perf_counter()


def read_starts(path: Path) -> list[dict]:
    """The parts of a run's starts, {"seconds": {kind: s}, "reached": {cell: step}}.

    [] where there is no such file, and where it cannot be read, which is said: times alone are lost with it.
    """
    if not path.exists():
        return []
    try:
        starts = read_json(path, max_bytes=MAX_GOODPUT_BYTES).get("starts")
        for number, start in enumerate(starts if isinstance(starts, list) else [None]):
            place = f"{path}: starts[{number}]"
            if not isinstance(start, dict) or not all(
                isinstance(start.get(key), dict) for key in ("seconds", "reached")
            ):
                raise FileError(f'{place}: an object with "seconds" and "reached" is accepted')
            for kind, seconds in start["seconds"].items():
                check_number(seconds, f"{place}.seconds: {shown(kind)}", least=0, most=1e12)
            for cell, step in start["reached"].items():
                check_number(step, f"{place}.reached: {shown(cell)}", least=0, whole=True)
    except FileError as error:
        print(f"the time of earlier starts is not counted: {error}", file=sys.stderr, flush=True)
        return []
    return starts


def write(path: Path, starts: Sequence[dict]) -> dict:
    """Writes the parts of all starts with their sum, whole or not at all; returns the sum, as `summarise`."""
    found = summarise(starts)
    write_whole(path, json.dumps(found | {"starts": list(starts)}, indent=1) + "\n")
    return found


def summarise(starts: Sequence[dict]) -> dict:
    """{"wall_s": of all starts, "num_starts": N, "seconds": {kind: s}, "shares": {kind: 0-1, together 1}}."""
    seconds = {kind: sum(start["seconds"].get(kind, 0.0) for start in starts) for kind in KINDS}
    wall_s = sum(seconds.values())
    shares = {kind: s / wall_s if wall_s else 0.0 for kind, s in seconds.items()}
    return {"wall_s": wall_s, "num_starts": len(starts), "seconds": seconds, "shares": shares}


def line(summary: Mapping) -> str:
    """For people: "goodput 83 %: compile 9, input 4, checkpoint 2, restart 1, other 1 (61 s in 2 starts)"."""
    shares = summary["shares"]
    rest = [kind for kind in KINDS[1:] if kind != "evaluation" or shares[kind]]
    words = ", ".join(f"{kind} {100 * shares[kind]:.0f}" for kind in rest)
    starts = f"{summary['num_starts']} starts" if summary["num_starts"] != 1 else "1 start"
    return f"goodput {100 * shares['productive']:.0f} %: {words} ({summary['wall_s']:.0f} s in {starts})"
