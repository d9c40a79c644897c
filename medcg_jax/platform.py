"""What a process sets before JAX starts (XLA's flags, the allocator of its host), and how it ends.

XLA's flags stand here, all of them, by platform: name, value, why, and where that is from. None is set for TPUs: their
programs are deterministic as they are, and no flag has been measured there to do better than libtpu's own values.
"""

import atexit
import ctypes
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec


@dataclass(frozen=True)
class Flag:
    """A flag of XLA_FLAGS. deterministic: set only where `RunConfig.deterministic` is."""

    name: str
    value: str
    platform: str
    reason: str
    source: str
    deterministic: bool = False


FLAGS = (
    Flag(
        "xla_gpu_deterministic_ops", "true", "cuda",
        "no atomics in sums and scatters, and no kernels chosen by timing them, which differ between two compilations; "
        "slower where autotuning finds better ones, and a program without such kernels does not compile",
        "openxla/xla pull request 12520: a superset of xla_gpu_exclude_nondeterministic_ops",
        deterministic=True,
    ),
    Flag(
        "xla_gpu_enable_latency_hiding_scheduler", "true", "cuda",
        "collectives run beside computations",
        "docs.nvidia.com/jax-toolbox/environment-variables; docs.jax.dev/en/latest/gpu_performance_tips.html",
    ),
    Flag(
        "xla_cpu_collective_call_terminate_timeout_seconds", "600", "cpu",
        "XLA ends a process whose simulated devices do not meet within 40 s, as on cores that others use too",
        "xla/debug_options_flags.cc (40 by default)",
    ),
)  # fmt: skip


# JAX takes three quarters of a GPU's memory at its start and no more, unless told: docs.jax.dev, "GPU memory allocation".
# As much as `scale.cells.MARGIN` leaves to programs when a run is planned.
MEMORY_FRACTION = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.90")


def platform(environ: Mapping[str, str]) -> str:
    """ "cuda", "tpu" or "cpu": what JAX will use, from JAX_PLATFORMS, else from the plugins that are installed."""
    named = environ.get("JAX_PLATFORMS", "").split(",")[0]
    if named:
        return "cuda" if named in ("gpu", "cuda") else named
    if find_spec("jax_cuda12_plugin") or find_spec("jax_cuda13_plugin"):
        return "cuda"
    return "tpu" if find_spec("libtpu") else "cpu"


def added(environ: Mapping[str, str], deterministic: bool) -> list[Flag]:
    """The flags that a run adds: its platform's, without those that the user has set, to whatever value."""
    set_by_user = {word.lstrip("-").partition("=")[0] for word in environ.get("XLA_FLAGS", "").split()}
    here = platform(environ)
    return [
        flag for flag in FLAGS
        if flag.platform == here and flag.name not in set_by_user and (deterministic or not flag.deterministic)
    ]  # fmt: skip


def apply(deterministic: bool, *, whole_device: bool = True) -> str:
    """Puts the run's flags in XLA_FLAGS, which XLA reads once, at the first program; returns a line for the log.

    whole_device: whether no other process takes memory of this one's GPUs: then `MEMORY_FRACTION` of it is this one's.
    """
    flags = [f"--{flag.name}={flag.value}" for flag in added(os.environ, deterministic)]
    before = os.environ.get("XLA_FLAGS", "")
    if flags:
        os.environ["XLA_FLAGS"] = " ".join([before, *flags]).strip()
    name, share = MEMORY_FRACTION
    if platform(os.environ) == "cuda" and whole_device and name not in os.environ:
        os.environ[name] = share
        flags.append(f"{name}={share}")
    users = f" beside your {before}" if before else ""
    return f"XLA flags for {platform(os.environ)}: {' '.join(flags) or 'none'}{users}"


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
    options = ((MMAP_MAX, 0), (TRIM_THRESHOLD, 2**31 - 1), (ARENA_MAX, 1))
    accepted = [mallopt(option, value) for option, value in options]
    return all(accepted)


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
