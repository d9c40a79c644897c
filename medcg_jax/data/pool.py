"""Maps a function over many items in separate processes: all cores work, and no decoder can crash or hang the run."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# The fork server imports these once, so that workers start quickly; the last two are imported at their first use.
PRELOADED = ["medcg_jax.data.prepare", "medcg_jax.data.dicom", "scipy.fft"]

# `lambda items, total: tqdm(items, total=total)`, or nothing.
Progress = Callable[[Iterable, int], Iterable]


def over(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    crashed: Callable[[Item, str], Result],
    workers: int = 0,
    chunk: int = 32,
    max_seconds: int = 0,
    max_bytes: int = 0,
) -> Iterator[Result]:
    """The function's result for each item, in their order.

    Args:
      function: of a module's top level; an exception in it ends the iteration.
      crashed: (item, reason such as "took longer than 10 s of processor time") -> the result for an item that killed its
        process; other items are not affected.
      workers: processes; 0: one per core. With 1 and no `max_seconds` everything runs in this process, without bounds.
      chunk: items sent to a process at once.
      max_seconds: processor time that one item may take; 0: unbounded.
      max_bytes: address space that a process may add to what it starts with; 0: unbounded.
    """
    workers = workers or os.cpu_count() or 1
    if not items or (workers == 1 and not max_seconds):
        yield from map(function, items)
        return
    # Not plain fork: it would copy locks held by threads of JAX or Grain.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    start = partial(_Worker, context, function, max_seconds, max_bytes)
    waiting = deque((first, items[first : first + chunk]) for first in range(0, len(items), chunk))
    results: dict[int, Result] = {}
    pool = [start() for _ in range(min(workers, len(waiting)))]
    next_index = 0
    try:
        for worker in pool:
            worker.give(*waiting.popleft())
        while next_index < len(items):
            ready = wait([worker.pipe for worker in pool])
            for worker in [worker for worker in pool if worker.pipe in ready]:
                try:
                    error, result = worker.pipe.recv()
                except (EOFError, ConnectionError):
                    error, result = None, crashed(worker.left[0], worker.end(max_seconds))
                    pool.remove(worker)
                    # The rest of its chunk goes to another process.
                    left = worker.first + 1, worker.left[1:]
                    if left[1]:
                        waiting.appendleft(left)
                    if waiting:
                        pool.append(start())
                        pool[-1].give(*waiting.popleft())
                if error is not None:
                    raise error
                results[worker.first] = result
                worker.first, worker.left = worker.first + 1, worker.left[1:]
                if worker in pool and not worker.left:
                    if waiting:
                        worker.give(*waiting.popleft())
                    else:
                        worker.end(0)
                        pool.remove(worker)
            while next_index in results:
                yield results.pop(next_index)
                next_index += 1
    finally:
        for worker in pool:
            worker.end(0)


class _Worker:
    """A process and its unfinished items `left`; `first` is the index of the first of these among all items."""

    def __init__(self, context, function, max_seconds: int, max_bytes: int):
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, function, max_seconds, max_bytes), daemon=True)
        # Without this the process would first run the caller's script again.
        script, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
        try:
            self._process.start()
        finally:
            sys.modules["__main__"] = script
        theirs.close()
        self.first = 0
        self.left: Sequence = ()
        try:
            self.pipe.recv()
        except (EOFError, ConnectionError) as error:
            raise RuntimeError(f"a process for {function} does not start") from error

    def give(self, first: int, items: Sequence) -> None:
        self.first, self.left = first, items
        try:
            self.pipe.send(items)
        except ConnectionError:  # it died; `over` notices when it reads the pipe
            pass

    def end(self, max_seconds: int) -> str:
        """Ends the process and returns why it died, if it had."""
        self.pipe.close()
        if not max_seconds:
            self._process.terminate()
        self._process.join()
        if self._process.exitcode == -signal.SIGPROF:
            return f"took longer than {max_seconds} s of processor time"
        return "its decoder crashed, or took more memory than there is"


def _work(pipe: Connection, function: Callable, max_seconds: int, max_bytes: int) -> None:
    """Sends (error or None, result) for each item of each list received, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process ends this one
    if max_bytes:
        _bound_memory(max_bytes)
    try:
        pipe.send("ready")
        while True:
            for item in pipe.recv():
                if max_seconds:
                    # The kernel ends the process after that time, wherever in a decoder it is.
                    signal.setitimer(signal.ITIMER_PROF, max_seconds)
                try:
                    error, result = None, function(item)
                except Exception as raised:
                    error, result = raised, None
                pipe.send((error, result))
    except (EOFError, ConnectionError):
        pass


def _bound_memory(max_bytes: int) -> None:
    """Limits this process to `max_bytes` more address space than it has now; does nothing without /proc."""
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    except OSError:
        return
    bound, most = pages * resource.getpagesize() + max_bytes, resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (bound if most == resource.RLIM_INFINITY else min(bound, most), most))
