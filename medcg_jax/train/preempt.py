"""SIGTERM, with which schedulers take a machine back: runs are saved at a step that all processes agree on.

Signals belong to a process, and so does the state of this module. Inside `at_steps` a SIGTERM is only noted: the loop
calls `told_to_stop` after each step, saves, and raises `Interrupted`. Elsewhere `Interrupted` is raised at once.
With several processes jax's own handler notes the signal, whichever process got it, and
`reached_preemption_sync_point` tells all of them at the same step.
"""

import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax

from medcg_jax.config import Interrupted

# One order to stop often comes twice: from the scheduler to every process, and from a parent that forwards it.
SAME_SIGNAL_S = 2.0

_told_at: float | None = None
_at_steps = False
# Numbers all steps of this process: the processes of a job agree on the number at which they stop.
_steps = itertools.count(1)


@contextmanager
def sigterm_saves() -> Iterator[None]:
    """Within it a SIGTERM saves the runs and raises `Interrupted`; a second SIGTERM, or Ctrl-C, ends the process."""
    if threading.current_thread() is not threading.main_thread() or jax.distributed.is_initialized():
        yield  # jax has its own handler with several processes
        return
    global _told_at
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _told_at = None


@contextmanager
def at_steps() -> Iterator[None]:
    """Within it a SIGTERM waits for `told_to_stop`.

    Raises:
      Interrupted: a SIGTERM came before.
    """
    global _at_steps
    if _told_at is not None:
        raise Interrupted("told to stop")
    _at_steps = True
    try:
        yield
    finally:
        _at_steps = False


def told_to_stop() -> bool:
    """Whether to save and stop now. Call after every step; the answer is the same on all processes of a job."""
    step = next(_steps)
    if jax.process_count() == 1:
        return _told_at is not None
    from jax.experimental import multihost_utils

    stop = multihost_utils.reached_preemption_sync_point(step)
    if stop:
        _next_ends_at_once()
    return stop


def stop_if_told() -> None:
    """Raises Interrupted if the process is told to stop; for tests, which have nothing to save."""
    if told_to_stop():
        raise Interrupted("told to stop")


def _on_sigterm(*_) -> None:
    global _told_at
    if _told_at is not None:
        if time.monotonic() - _told_at > SAME_SIGNAL_S:
            _end_at_once(signal.SIGTERM)
        return
    _told_at = time.monotonic()
    signal.signal(signal.SIGINT, _end_at_once)
    if not _at_steps:
        raise Interrupted("told to stop")


def _next_ends_at_once() -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _end_at_once(number: int, *_) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
