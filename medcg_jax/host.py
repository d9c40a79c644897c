"""What a process is told about its host before JAX starts, and how it ends."""

import atexit
import ctypes
import os
import sys
from collections.abc import Callable
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
    return all(
        [mallopt(option, value) for option, value in ((MMAP_MAX, 0), (TRIM_THRESHOLD, 2**31 - 1), (ARENA_MAX, 1))]
    )


def run_process(main: Callable[[], int]) -> None:
    """The whole life of a process: `main`, whose result is its exit status, and an end that nothing can spoil.

    When Python takes itself down, it ends threads of libraries (JAX, Orbax, Grain) where they next want its lock. Where
    C++ has called them that is an abort, "FATAL: exception not rethrown", after all was done well. So the process ends
    before that, when threads that are to be waited for have ended and what libraries do at an exit is done.
    """
    status = 1  # of an error that `main` lets through, whose traceback Python prints

    def end() -> None:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):  # whoever read it has gone
                pass
        os._exit(status)

    atexit.register(end)  # the first that is registered is called last
    try:
        status = main()
    except SystemExit as error:  # of argparse's --help
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        raise
    sys.exit(status)
