"""Claims on work that several processes share through a folder: which process does it, and whether that still runs.

The claims on one piece of work are numbered files, `NAME.0`, `NAME.1`, ...; the highest number holds the work. O_EXCL
gives each number to one process, and the next number may be taken only when the holder is dead. Nothing is ever
deleted, so no process can remove a claim that another has just taken over.

A holder of this boot and process namespace is looked up by its process number. Any other holder (on another host, or
in a container with this host's name) is judged by when it last touched its claim.
"""

import json
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from medcg_jax.files import write_whole
from medcg_jax.untrusted import FileError, check_number, read_json

HEARTBEAT_S = 10.0
# A holder that is judged by its heartbeat counts as dead after so long without one.
STALE_S = 180.0
# A process that waits for a claim reports it after the first time, then every so often.
REPORT_AFTER_S, REPORT_EVERY_S = 10.0, 60.0
MAX_CLAIM_BYTES = 4096


def process_start(pid: int) -> str:
    """When a process started, in the system's own unit; "" where it does not exist, or the system does not tell."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    state, *fields = stat.rsplit(")", 1)[1].split()
    return "" if state in ("Z", "X") else fields[18]  # field 22; a zombie is dead


def identity() -> dict:
    """A claim's contents: its holder."""
    return {"pid": os.getpid(), "start": process_start(os.getpid())} | _world()


def _world() -> dict:
    """The scope of a process number: host, boot and process namespace; "" where the system has none."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return {"host": socket.gethostname(), "boot": boot, "namespace": namespace}


def is_alive(holder: dict | None, age_s: float) -> bool:
    """Whether the process of a claim still runs.

    holder: the claim's contents; None where they cannot be read (yet).
    age_s: seconds since the claim was last touched.
    """
    if holder is not None and not holder["pid"]:
        return False  # released
    if holder is None or any(holder.get(key) != value for key, value in _world().items()):
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
    """A piece of work that this process holds. Its file is touched every few seconds until `release`."""

    def __init__(self, path: Path, number: int):
        self.path = path
        # Number of earlier holders.
        self.number = number
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._done.wait(HEARTBEAT_S):
            try:
                os.utime(self.path)
            except OSError:
                pass  # the folder is gone or unreachable: the work itself will fail

    def release(self) -> None:
        """Frees the work for any process: the claim's file stays, without a holder."""
        self._done.set()
        self._thread.join()
        write_whole(self.path, json.dumps({"pid": 0, "start": ""} | _world()))


def take(folder: Path, name: str) -> Claim | None:
    """A claim on the work; None when a living process holds it, or was quicker."""
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
        path.unlink()  # a full disk: others would wait for an empty claim
        raise
    return Claim(path, number + 1)


def wait(folder: Path, name: str, done: Callable[[], bool], poll_s: float = 0.5) -> Claim | None:
    """A claim on the work as soon as it is free, or None as soon as `done()`."""
    waiting = Waiting()
    while not done():
        claim = take(folder, name)
        if claim:
            if done():  # the last holder finished in between
                claim.release()
                return None
            return claim
        waiting.report((folder, name))
        time.sleep(poll_s)
    return None


class Waiting:
    """Reports which holder this process waits for: after 10 s, then every minute."""

    def __init__(self):
        self._began = time.monotonic()
        self._next = self._began + REPORT_AFTER_S

    def report(self, *claims: tuple[Path, str]) -> None:
        """To be called repeatedly while waiting for one of these claims: (folder, name)."""
        now = time.monotonic()
        if now < self._next:
            return
        holder = next(filter(None, (described(folder, name) for folder, name in claims)), "")
        self._next = now + (REPORT_EVERY_S if holder else REPORT_AFTER_S)
        if holder:
            print(f"waiting since {now - self._began:.0f} s: {holder}", file=sys.stderr, flush=True)


def described(folder: Path, name: str) -> str:
    """The work's holder in words; "" where the work is free."""
    number, holder, age_s = _last(folder, name)
    if number < 0 or not is_alive(holder, age_s):
        return ""
    if holder is None:
        words = f"a claim that cannot be read ({folder / f'{name}.{number}'})"
    else:
        words = f"process {holder['pid']} on {holder['host']}"
    return f"{name} is held by {words}, last touched {age_s:.0f} s ago; without a sign of life for {STALE_S:.0f} s it is free"


@contextmanager
def lock(folder: Path, name: str, poll_s: float = 0.1) -> Iterator[None]:
    """Holds `name` for the block, waiting for its turn."""
    folder.mkdir(parents=True, exist_ok=True)
    claim = wait(folder, name, lambda: False, poll_s)
    assert claim is not None  # its work is never done
    try:
        yield
    finally:
        claim.release()


def num_holders(folder: Path) -> Counter:
    """Name -> number of processes that have held the work so far, from one listing of the folder."""
    holders: Counter[str] = Counter()
    for file in os.listdir(folder):
        name, _, number = file.rpartition(".")
        if number.isdecimal() and not file.startswith("."):
            holders[name] = max(holders[name], int(number) + 1)
    return holders


def _last(folder: Path, name: str) -> tuple[int, dict | None, float]:
    """(highest number, or -1; its holder; seconds since it was touched)."""
    number = num_holders(folder)[name] - 1
    if number < 0:
        return -1, None, 0.0
    path = folder / f"{name}.{number}"
    return number, _read(path), _age(path)


def _age(path: Path) -> float:
    """Seconds since the file was touched. Where another host's clock is ahead, its time lies in the future: seconds
    since this process first saw that time."""
    try:
        touched = path.stat().st_mtime
    except FileNotFoundError:
        return float("inf")
    age_s = time.time() - touched
    if age_s >= 0:
        return age_s
    now = time.monotonic()
    if _ahead.get(path, (0.0, 0.0))[0] != touched:
        _ahead[path] = touched, now
    return now - _ahead[path][1]


# Claim -> (its time in the future, when this process first saw it).
_ahead: dict[Path, tuple[float, float]] = {}


def _read(path: Path) -> dict | None:
    """A claim's contents, as `identity`; None where the file holds something else."""
    try:
        holder = read_json(path, max_bytes=MAX_CLAIM_BYTES)
        check_number(holder.get("pid"), "pid", least=0, most=2**31 - 1, whole=True)
    except FileError:
        return None
    return holder if all(isinstance(holder.get(key), str) for key in ("host", "start")) else None
