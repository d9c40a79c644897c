"""A function over many items in processes of their own, so that all cores work and no decoder ends or holds a run."""

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

Item, Result = TypeVar("Item"), TypeVar("Result")

# The processes are copies of one that has imported what takes long.
PRELOADED = "medcg_jax.data.prepare"

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
      function: of a module's top level; what it raises ends the iteration.
      crashed: the result for an item whose process died of it, and why it did, such as "took longer than 10 s of
        processor time"; all others keep theirs.
      workers: processes; 0: one per core. With 1 and no `max_seconds` all is done in this process, without any bound.
      chunk: items that travel together.
      max_seconds: processor time that one item may take; 0: not bounded.
      max_bytes: address space that a process may take beside its own start; more is refused to it; 0: not bounded.
    """
    workers = workers or os.cpu_count() or 1
    if not items or (workers == 1 and not max_seconds):
        yield from map(function, items)
        return
    # Not a fork of this process, which would copy the locks of threads that JAX or Grain may have started.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOADED])
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
                    # Others of its items are not to blame.
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
    """A process and the items that it is at: `left`, of which the next result is for the first, at place `first`."""

    def __init__(self, context, function, max_seconds: int, max_bytes: int):
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, function, max_seconds, max_bytes), daemon=True)
        # A process would first run the caller's script again, whose functions it does not need.
        script, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
        try:
            self._process.start()
        finally:
            sys.modules["__main__"] = script
        theirs.close()
        self.first, self.left = 0, []
        try:
            self.pipe.recv()
        except (EOFError, ConnectionError) as error:
            raise RuntimeError(f"a process for {function} does not start") from error

    def give(self, first: int, items: Sequence) -> None:
        self.first, self.left = first, items
        try:
            self.pipe.send(items)
        except ConnectionError:  # it has died since; its end is read
            pass

    def end(self, max_seconds: int) -> str:
        """Ends the process and says what it died of, if it has."""
        self.pipe.close()
        if not max_seconds:
            self._process.terminate()
        self._process.join()
        if self._process.exitcode == -signal.SIGPROF:
            return f"took longer than {max_seconds} s of processor time"
        return "its decoder crashed, or took more memory than there is"


def _work(pipe: Connection, function: Callable, max_seconds: int, max_bytes: int) -> None:
    """Sends (error or None, result) for each item of each list that comes, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends with the process that asks
    if max_bytes:
        _bound_memory(max_bytes)
    try:
        pipe.send("ready")
        while True:
            for item in pipe.recv():
                if max_seconds:
                    # Beyond it the system ends the process, wherever in a decoder it is.
                    signal.setitimer(signal.ITIMER_PROF, max_seconds)
                try:
                    error, result = None, function(item)
                except Exception as raised:
                    error, result = raised, None
                pipe.send((error, result))
    except (EOFError, ConnectionError):
        pass


def _bound_memory(max_bytes: int) -> None:
    """Refuses this process memory beyond so many bytes more than it has now, where the system says what it has."""
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    except OSError:
        return
    bound, most = pages * resource.getpagesize() + max_bytes, resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (bound if most == resource.RLIM_INFINITY else min(bound, most), most))
