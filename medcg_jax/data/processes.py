"""A function over many items in processes of their own, so that all cores work and no decoder can end the run."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import TypeVar

Item, Result = TypeVar("Item"), TypeVar("Result")

# Fewer items are done here: a process takes half a second to start.
MIN_ITEMS = 128

# `lambda items, total: tqdm(items, total=total)`, or nothing.
Progress = Callable[[Iterable, int], Iterable]


def over(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    crashed: Callable[[Item], Result],
    workers: int = 0,
    chunk: int = 32,
    min_items: int = MIN_ITEMS,
) -> Iterator[Result]:
    """The function's result for each item, in their order.

    Args:
      function: of a module's top level; what it raises ends the iteration.
      crashed: the result for an item whose process died of it (a fault in a decoder, the system's memory killer).
      workers: processes; 0: one per core.
      chunk: items that travel together.
    """
    workers = workers or os.cpu_count() or 1
    if workers == 1 or len(items) < min_items:
        yield from map(function, items)
        return
    chunks = [items[start : start + chunk] for start in range(0, len(items), chunk)]
    done = 0
    with _pool(workers) as pool:
        try:
            # A process may die while there is still more to hand in.
            futures = [pool.submit(_all, function, part) for part in chunks]
            for future in futures:
                yield from future.result()
                done += 1
        except BrokenProcessPool:
            pass
        finally:
            pool.shutdown(cancel_futures=True)
    # A process has died, and with it the pool. Nobody says which item it was: from here they go one by one.
    yield from _one_by_one(function, [item for part in chunks[done:] for item in part], crashed)


def _one_by_one(function, items, crashed):
    rest = iter(items)
    for item in rest:
        with _pool(1) as pool:
            try:
                yield pool.submit(function, item).result()
                for item in rest:
                    yield pool.submit(function, item).result()
            except BrokenProcessPool:
                yield crashed(item)


def _all(function, items):
    return [function(item) for item in items]


def _pool(workers: int) -> ProcessPoolExecutor:
    # A fork would copy the locks of threads that JAX or Grain may have started.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent)


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
