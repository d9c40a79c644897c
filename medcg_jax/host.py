"""What a process is told about its host before JAX starts, and how it takes the signal to stop."""

import ctypes
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

MMAP_MAX, TRIM_THRESHOLD, ARENA_MAX = -4, -1, -8  # parameters of mallopt, <malloc.h>


def keep_freed_memory() -> bool:
    """Tells glibc to keep what XLA frees; returns whether that was done. To be called before JAX has threads.

    XLA's scratch on a CPU is otherwise mapped and zeroed anew at every step: of the tiny model's 87 ms of CPU time a step,
    33 ms went there. One arena for all threads is what makes it hold, since a thread's own arena cannot grow past 64 MB
    and maps what is larger; so threads that have an arena already gain nothing.
    Left alone where an accelerator may be used (many threads decode images there), and without glibc.
    """
    if os.environ.get("JAX_PLATFORMS", "") != "cpu" and (find_spec("jax_plugins") or find_spec("libtpu")):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all([mallopt(option, value) for option, value in ((MMAP_MAX, 0), (TRIM_THRESHOLD, 2**31 - 1), (ARENA_MAX, 1))])


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Lets SIGTERM, by which schedulers stop a task, end the block as Ctrl-C does: workers ended, claims released."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
