"""What a process sets before JAX starts (XLA's flags, the host's allocator), and how it ends.

All XLA flags are here, by platform: name, value, reason, source. Programs of TPUs are deterministic without any.
"""

import atexit
import ctypes
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec

KINDS = ("all_gather", "reduce_scatter", "all_reduce")
# Flags of libtpu with which the sparse cores of a TPU carry collectives, and its tensor core carries none in fusions.
SPARSE_CORES = {
    **{f"xla_tpu_enable_sparse_core_collective_offload_{kind}": "true" for kind in KINDS},
    # Over a ring of devices; and over two or three axes of the chips' grid, as most meshes lie.
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter": "true",
    **{f"xla_tpu_enable_{kind}_offload_tracing": "true" for kind in KINDS},
    **{f"xla_tpu_enable_async_collective_fusion_fuse_{kind}": "false" for kind in KINDS},
    "xla_tpu_use_tc_device_shape_on_sc": "true",
    "xla_sc_disable_megacore_partitioning": "true",
    "xla_sc_enable_instruction_fusion": "false",
    "xla_sc_disjoint_spmem": "false",
    "xla_tpu_use_enhanced_launch_barrier": "true",
}


@dataclass(frozen=True)
class Flag:
    """A flag of XLA_FLAGS, a TPU's of LIBTPU_INIT_ARGS. only_with: the switch of a run (`config.xla_switches`) that sets it."""

    name: str
    value: str
    platform: str
    reason: str
    source: str
    only_with: str = ""


FLAGS = (
    Flag(
        "xla_gpu_deterministic_ops", "true", "cuda",
        "no atomics in sums and scatters, and no kernels chosen by timing them, which differ between two compilations; "
        "slower where autotuning finds better ones, and a program without such kernels does not compile",
        "openxla/xla pull request 12520: a superset of xla_gpu_exclude_nondeterministic_ops",
        only_with="deterministic",
    ),
    Flag(
        "xla_gpu_enable_latency_hiding_scheduler", "true", "cuda",
        "collectives run beside computations",
        "docs.nvidia.com/jax-toolbox/environment-variables; docs.jax.dev/en/latest/gpu_performance_tips.html",
    ),
    *(
        Flag(
            f"xla_gpu_enable_pipelined_{kind}", "true", "cuda",
            "a layer's collectives run beside its neighbour's computations; with the next flag, at the same bytes, 7B on 8 "
            "and 64 H100 by the schedules of their compiled steps: 211 to 191 ms and 182 to 155 ms, .4 and .7 GiB more",
            "docs.nvidia.com/jax-toolbox/environment-variables; measured by benchmarks/schedule_exposed.py",
        )
        for kind in KINDS
    ),
    Flag(
        "xla_gpu_enable_while_loop_double_buffering", "true", "cuda",
        "two layers to an iteration, without which what the three flags before it carry over is copied",
        "xla/debug_options_flags.cc (false by default)",
    ),
    *(
        Flag(
            name, value, "tpu",
            "sums and gathers run beside computations; 7B on 64 v5p and 64 v6e by the schedules of their compiled steps: "
            "84.6 to 61.4 ms and 82.8 to 66.0; never run",
            "ENABLE_SPARSECORE_OFFLOADING_FOR_RS_AG_AR and ENHANCED_LAUNCH_BARRIER in AI-Hypercomputer/maxtext "
            "benchmarks/xla_flags_library.py; measured by benchmarks/schedule_exposed.py",
            only_with="sparse_cores",
        )
        for name, value in SPARSE_CORES.items()
    ),
    Flag(
        "xla_cpu_copy_insertion_use_region_analysis", "true", "cpu",
        "the optimizer updates moments in place; by default XLA first copies each, since the parameters' update reads them",
        "xla/debug_options_flags.cc; measured: half the time of an AdamW update",
    ),
    Flag(
        "xla_cpu_collective_call_terminate_timeout_seconds", "600", "cpu",
        "XLA ends a process whose simulated devices do not meet within 40 s, as on cores that others use too",
        "xla/debug_options_flags.cc (40 by default)",
    ),
    Flag(
        "xla_disable_hlo_passes", "while-loop-invariant-code-motion", "cpu",
        "XLA multiplies bfloat16 in float32 on a CPU, and would convert all layers of a scan before it, in twice their "
        "memory: a test of two records took 27.6 GiB beside 13.2 of LLaVA-1.5-7B's weights, and takes 2.3",
        "`medcg plan --topology=local` with the pass and without; xla/debug_options_flags.cc",
    ),
)  # fmt: skip


# JAX's default is three quarters of a GPU's memory: docs.jax.dev, "GPU memory allocation". This is the share that
# `plan.programs.MARGIN` leaves to programs.
MEMORY_FRACTION = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.90")


def platform(environ: Mapping[str, str]) -> str:
    """ "cuda", "tpu" or "cpu": what JAX will use, from JAX_PLATFORMS, else from the plugins that are installed."""
    named = environ.get("JAX_PLATFORMS", "").split(",")[0]
    if named:
        return "cuda" if named in ("gpu", "cuda") else named
    if find_spec("jax_cuda12_plugin") or find_spec("jax_cuda13_plugin"):
        return "cuda"
    return "tpu" if find_spec("libtpu") else "cpu"


def variable(here: str) -> str:
    """The environment variable of a platform's flags: XLA ends a process with one in XLA_FLAGS that is libtpu's."""
    return "LIBTPU_INIT_ARGS" if here == "tpu" else "XLA_FLAGS"


def added(environ: Mapping[str, str], switches: frozenset[str], here: str) -> list[Flag]:
    """The flags that a run adds on a platform: its own, except those that the user has set."""
    set_by_user = {word.lstrip("-").partition("=")[0] for word in environ.get(variable(here), "").split()}
    return [
        flag for flag in FLAGS
        if flag.platform == here and flag.name not in set_by_user and flag.only_with in ("", *switches)
    ]  # fmt: skip


def apply(switches: frozenset[str], here: str = "", *, whole_device: bool = True) -> str:
    """Adds the run's flags to `variable`, which is read once, at the first program; returns a line for the log.

    switches: `config.xla_switches` of the run. here: the platform; "": `platform`'s. whole_device: no other process uses this one's
      GPUs, so that it may take `MEMORY_FRACTION` of their memory.
    """
    here = here or platform(os.environ)
    flags = [f"--{flag.name}={flag.value}" for flag in added(os.environ, switches, here)]
    before = os.environ.get(variable(here), "")
    if flags:
        os.environ[variable(here)] = " ".join([before, *flags]).strip()
    name, share = MEMORY_FRACTION
    if here == "cuda" and whole_device and name not in os.environ:
        os.environ[name] = share
        flags.append(f"{name}={share}")
    users = f" beside your {before}" if before else ""
    return f"XLA flags for {here}: {' '.join(flags) or 'none'}{users}"


@contextmanager
def hidden_stdout() -> Iterator[None]:
    """In the block nothing but Python prints to standard output: libraries in C++ that do are not seen."""
    sys.stdout.flush()
    shown = os.dup(1)
    with open(os.devnull, "w") as nothing, os.fdopen(shown, "w", buffering=1) as ours, redirect_stdout(ours):
        os.dup2(nothing.fileno(), 1)
        try:
            yield
        finally:
            ours.flush()
            os.dup2(shown, 1)


MMAP_MAX, TRIM_THRESHOLD, ARENA_MAX = -4, -1, -8  # parameters of mallopt, <malloc.h>


def keep_freed_memory() -> bool:
    """Makes glibc keep memory that XLA frees; returns whether that worked. Call before JAX has threads.

    Otherwise XLA's scratch memory on a CPU is mapped and zeroed anew at every step: 33 ms of the tiny model's 87 ms of
    CPU time. All threads must share one arena, since a thread's own arena cannot grow past 64 MB and maps anything
    larger; threads that already have an arena gain nothing.
    Does nothing without glibc, or if an accelerator may be used: there many threads decode images.
    """
    if os.environ.get("JAX_PLATFORMS", "") != "cpu" and (find_spec("jax_plugins") or find_spec("libtpu")):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    options = ((MMAP_MAX, 0), (TRIM_THRESHOLD, 2**31 - 1), (ARENA_MAX, 1))
    succeeded = [mallopt(option, value) for option, value in options]
    return all(succeeded)


def run_process(main: Callable[[], int]) -> None:
    """Runs `main` and exits with its result as the status, without errors of the interpreter's shutdown.

    At its shutdown Python ends threads of libraries (JAX, Orbax, Grain) when they next take the interpreter's lock. For
    a thread of C++ that is an abort, "FATAL: exception not rethrown", although the run succeeded. So the process ends
    before that, after the non-daemon threads and the libraries' exit handlers.
    """
    status = 1  # if `main` raises, in which case Python prints the traceback

    def end() -> None:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):  # its reader has closed it
                pass
        os._exit(status)

    atexit.register(end)  # registered first, so called last
    try:
        status = main()
    except SystemExit as error:  # from argparse's --help
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        raise
    sys.exit(status)
