"""Claims on work that several processes share through a folder: who does what, and whether that process still lives.

Claims of one piece of work are numbered files, `NAME.0`, `NAME.1`, ...; the highest holds. A file is created with
O_EXCL, so that one process gets each number, and the next number may be taken only when the holder is dead. Nothing is
ever deleted, so no process can remove a claim that another has just taken over.
"""

import json
import os
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from medcg_jax.files import write_whole

HEARTBEAT_S = 10.0
# A holder on another host that has not touched its claim for so long is taken for dead.
STALE_S = 180.0


def process_start(pid: int) -> str:
    """When a process started, in the system's own unit; "" where there is none, or no way to know."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    state, *fields = stat.rsplit(")", 1)[1].split()
    return "" if state in ("Z", "X") else fields[18]  # field 22; a process that waits to be reaped is dead


def identity() -> dict:
    """What a claim says of its holder."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "start": process_start(os.getpid())}


def is_alive(holder: dict | None, age_s: float) -> bool:
    """Whether the process of a claim still runs.

    holder: what the claim says; None where it cannot be read (yet).
    age_s: seconds since the claim was last touched.
    """
    if holder is not None and not holder["pid"]:
        return False  # released
    if holder is None or holder["host"] != socket.gethostname():
        return age_s < STALE_S
    start = process_start(holder["pid"])
    if start or Path("/proc/self/stat").exists():
        return start == holder["start"] != ""
    try:  # a system without /proc
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return age_s < STALE_S


class Claim:
    """A piece of work that this process holds; touched every few seconds until `release`."""

    def __init__(self, path: Path, number: int):
        self.path = path
        # How many holders before this one died over the work.
        self.number = number
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._done.wait(HEARTBEAT_S):
            try:
                os.utime(self.path)
            except OSError:
                pass  # the folder is gone or unreachable; the work itself will say so

    def release(self) -> None:
        """Gives the work up, for anyone to claim again: the claim stays, marked as that of nobody."""
        self._done.set()
        self._thread.join()
        _write(self.path, {"host": socket.gethostname(), "pid": 0, "start": ""})


def take(folder: Path, name: str) -> Claim | None:
    """The work's claim, or None when a living process holds it (or was quicker)."""
    number, holder, age_s = _last(folder, name)
    if number >= 0 and is_alive(holder, age_s):
        return None
    path = folder / f"{name}.{number + 1}"
    try:
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return None
    try:
        with os.fdopen(file, "w") as opened:
            json.dump(identity(), opened)
    except OSError:
        path.unlink()  # on a full disk: a claim that says nothing would be waited for
        raise
    return Claim(path, number + 1)


def wait(folder: Path, name: str, done: Callable[[], bool], poll_s: float = 0.5) -> Claim | None:
    """The work's claim as soon as nobody else has it, or None as soon as `done()`."""
    while not done():
        claim = take(folder, name)
        if claim:
            if done():  # the holder before finished between the two looks
                claim.release()
                return None
            return claim
        time.sleep(poll_s)
    return None


@contextmanager
def lock(folder: Path, name: str, poll_s: float = 0.1) -> Iterator[None]:
    """Holds `name` for the block, waiting for its turn."""
    folder.mkdir(parents=True, exist_ok=True)
    claim = wait(folder, name, lambda: False, poll_s)
    try:
        yield
    finally:
        claim.release()


def num_holders(folder: Path) -> Counter:
    """Name -> how many processes have held the work so far, from one look at the folder."""
    found = Counter()
    for file in os.listdir(folder):
        name, _, number = file.rpartition(".")
        if number.isdecimal() and not file.startswith("."):
            found[name] = max(found[name], int(number) + 1)
    return found


def _last(folder: Path, name: str) -> tuple[int, dict | None, float]:
    """(highest number, or -1; its holder; seconds since it was touched)."""
    own = re.compile(re.escape(name) + r"\.(\d+)$")
    numbers = [int(m[1]) for m in map(own.match, os.listdir(folder)) if m]
    if not numbers:
        return -1, None, 0.0
    path = folder / f"{name}.{max(numbers)}"
    return max(numbers), _read(path), _age(path)


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return float("inf")


def _read(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _write(path: Path, holder: dict) -> None:
    write_whole(path, json.dumps(holder))
