"""What stands on the terminal beside a result: durations in words, how much is shown (`--quiet`, `--verbose`), and that
long work still goes on."""

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

QUIET, PLAIN, VERBOSE = range(3)
# Seconds between two lines that say that work goes on.
BEAT_S = 8.0
_shown = PLAIN
# When a line of progress was last printed, by `time.monotonic`.
_said_at = 0.0
# (what goes on, since when by `time.monotonic`), the innermost last.
_works: list[tuple[str, float]] = []


def show(amount: int) -> None:
    """Sets for this process how much is shown: results and warnings alone (`QUIET`), progress too (`PLAIN`), or also
    what libraries and compilers say (`VERBOSE`)."""
    global _shown
    _shown = amount


def shows_progress() -> bool:
    return _shown > QUIET


def shows_details() -> bool:
    return _shown == VERBOSE


def install(extra: str) -> str:
    """The command that installs an extra of the project, which no package index has."""
    return f"`pip install '.[{extra}]'` in the project's folder"


def duration(seconds: float) -> str:
    """Seconds for people: "35 s", "48 min", "9 h 31 min", "2 d 5 h"."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if minutes < 60:
        return f"{minutes} min"
    if hours < 48:
        return " ".join(f"{number} {unit}" for number, unit in ((minutes // 60, "h"), (minutes % 60, "min")) if number)
    return " ".join(f"{number} {unit}" for number, unit in ((hours // 24, "d"), (hours % 24, "h")) if number)


def said() -> None:
    """Call after a line of progress: `beating` is then silent for a while."""
    global _said_at
    _said_at = time.monotonic()


@contextmanager
def beating(verb: str) -> Iterator[None]:
    """While the block runs, a line on stderr whenever no progress was shown for `BEAT_S` seconds, with the work that goes
    on (`doing`): "loading the weights, 16 s"; none with `QUIET`."""
    if not shows_progress():
        yield
        return
    ended = threading.Event()
    said()

    def beat() -> None:
        while not ended.wait(max(0.1, _said_at + BEAT_S - time.monotonic())):
            if time.monotonic() - _said_at >= BEAT_S:
                work, began = _works[-1]
                print(f"{work}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
                said()

    thread = threading.Thread(target=beat, name="beat", daemon=True)
    with doing(verb):
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


@contextmanager
def doing(work: str) -> Iterator[None]:
    """Names the work of the block for `beating`, which tells it if it takes long."""
    _works.append((work, time.monotonic()))
    try:
        yield
    finally:
        _works.pop()


def bar(items: Iterable, total: int, name: str) -> Iterable:
    """The items, with a bar on a terminal that tells the time left; nothing is shown elsewhere, or with `QUIET`."""
    from tqdm import tqdm

    class Bar(tqdm):
        @property
        def format_dict(self):
            known = super().format_dict
            done, seconds = known["n"] - known["initial"], known["elapsed"]
            left = duration(seconds * (total - known["n"]) / done) + " left" if done else ""
            return known | {"left": left}

    shown = "{desc} {n_fmt}/{total_fmt} |{bar}| {left}"
    return Bar(items, total=total, desc=name, bar_format=shown, disable=None if shows_progress() else True)
