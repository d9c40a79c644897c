"""Devices to compile for that are not there, by name, and how much memory a device has.

`v5p:4x4x4` and other slices of TPUs need the package libtpu (`pip install medcg-jax[tpu]`), `h100:8` the CUDA plugin
(`pip install medcg-jax[cuda]`); neither needs the hardware. `v5e:4x4*2` is two slices joined by the data-center
network, `h100:8x8` 8 hosts with 8 GPUs each. A TPU7x chip (and a v4 chip) is two devices.
"""

import functools
import importlib.util
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
from jax.experimental import topologies

from medcg_jax.config import ConfigError
from medcg_jax.plan.gpu_targets import GPU_TARGETS

GIB = 1 << 30
TPU_KINDS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
ACCEPTED = (
    f"local, {'|'.join(TPU_KINDS)}:4x4 (chips; v4, v5p, tpu7x: 4x4x4), v5e:4x4*2 (slices), "
    f"or {'|'.join(GPU_TARGETS)}:8 or :8x8 (hosts x GPUs) is accepted"
)
# Bytes of one device that programs may use, by what `jax.Device.device_kind` begins with; the longest match counts.
# TPU: what libtpu 0.0.52 says that is available when it refuses a program that is too large.
MEMORY_BYTES = {
    "TPU v4": 15.25 * GIB,
    "TPU v5 lite": 15.75 * GIB,
    "TPU v5": 95.73 * GIB,
    "TPU v6 lite": 31.24 * GIB,
    "TPU7x": 94.74 * GIB,
} | {target.device_kind: float(target.memory_bytes) for target in GPU_TARGETS.values()}
# Without windowed einsum, which writes a gather as a loop of permutes, in which bytes cannot be told apart.
TPU_COUNTABLE = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 100_000_000}
# Triton's tiles are found by timing them on a device.
GPU_WITHOUT_DEVICE = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}


class Topology(NamedTuple):
    """sizes: sides of one slice in chips; of GPUs (hosts, GPUs of a host), or GPUs alone."""

    kind: str
    sizes: tuple[int, ...]
    num_slices: int = 1


def get_devices(topology: str) -> list[jax.Device]:
    """Devices of a topology ("v5p:4x4x4", "v5e:4x4*2", "h100:8", "h100:8x8"), or "local" for those of this process.

    Raises:
      ConfigError: another name, or the package that compiles for it is not installed.
    """
    if topology == "local":
        return jax.devices()
    kind, sizes, num_slices = parse(topology)
    gpu = kind in GPU_TARGETS
    if not (_has_cuda() if gpu else importlib.util.find_spec("libtpu")):
        extra = "cuda" if gpu else "tpu"
        raise ConfigError(
            f"topology={topology}: no compiler for it is installed; pip install 'medcg-jax[{extra}]' brings it"
        )
    try:
        if gpu:
            hosts, gpus = (1, *sizes)[-2:]
            found = topologies.get_topology_desc(
                kind, platform="cuda", topology=f"1x{hosts}x{gpus}", target_config=GPU_TARGETS[kind].text()
            )
        else:
            slices = {"num_slices": num_slices} if num_slices > 1 else {}
            found = topologies.get_topology_desc(f"{kind}:{_written(sizes)}", platform="tpu", **slices)
    except Exception as error:  # the plugins raise classes of their own
        text = " ".join(str(error).split())[:300]
        raise ConfigError(f"topology={topology}: {type(error).__name__}: {text}") from error
    return list(found.devices)


def _has_cuda() -> bool:
    return any(importlib.util.find_spec(f"jax_cuda{major}_plugin") for major in (12, 13))


def parse(topology: str) -> Topology:
    """Topology("v5p", (4, 4, 4), 1) of "v5p:4x4x4", Topology("v5e", (4, 4), 2) of "v5e:4x4*2".

    Raises:
      ConfigError: it is written in another way.
    """
    kind, _, rest = topology.partition(":")
    shape, star, slices = rest.partition("*")
    numbers = [*shape.split("x"), *([slices] if star else [])]
    gpu = kind in GPU_TARGETS
    bad = not all(number.isascii() and number.isdecimal() and int(number) for number in numbers)
    if bad or kind not in (*TPU_KINDS, *GPU_TARGETS) or gpu and (star or len(numbers) > 2):
        raise ConfigError(f"topology={topology}: {ACCEPTED}")
    return Topology(kind, tuple(map(int, shape.split("x"))), int(slices) if star else 1)


def part(topology: str, num_parts: int) -> str:
    """One of `num_parts` equal parts: fewer slices or GPU hosts while that halves, then half of the longest side.

    "v5e:4x4*2", 4 -> "v5e:2x4"; "v5p:4x4x4", 4 -> "v5p:4x2x2", of equal sides the last; "h100:8x8", 16 -> "h100:1x4"

    Raises:
      ConfigError: that does not come out even.
    """
    kind, sizes, num_slices = parse(topology)
    sides, left = list(sizes), num_parts
    while left > 1:
        longest = max(range(len(sides)), key=lambda i: (sides[i], i))
        if kind in GPU_TARGETS and sides[0] > 1:
            longest = 0
        if left % 2 or (num_slices if num_slices > 1 else sides[longest]) % 2:
            raise ConfigError(f"topology={topology} in {num_parts} parts: powers of 2 that divide it are accepted")
        if num_slices > 1:
            num_slices //= 2
        else:
            sides[longest] //= 2
        left //= 2
    return f"{kind}:{_written(sides)}" + (f"*{num_slices}" if num_slices > 1 else "")


def _written(sizes) -> str:
    return "x".join(map(str, sizes))


def get_part(topology: str, num_parts: int) -> list[jax.Device]:
    """Devices of `part`, as a machine of its own; of "local" the first of this process's.

    Raises:
      ConfigError: as `get_devices` and `part`.
    """
    if topology != "local":
        return get_devices(part(topology, num_parts))
    devices = jax.devices()
    if len(devices) % num_parts:
        raise ConfigError(f"{len(devices)} local devices in {num_parts} parts: a divisor is accepted")
    return devices[: len(devices) // num_parts]


def compiler_options(device: jax.Device) -> dict:
    """What to compile with, so that the program can be compiled without the device and its collectives counted.

    Each call is for one program: a TPU's compiler writes its text into a folder that is named here (`text_of`).
    """
    if device in jax.local_devices():
        return {}
    kind = device.device_kind
    if kind.startswith("TPU"):
        folder = tempfile.mkdtemp(dir=_dumps().name)
        return TPU_COUNTABLE | {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
    return GPU_WITHOUT_DEVICE if kind.startswith("NVIDIA") else {}


@functools.cache
def _dumps() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="medcg_hlo_")


def text_of(compiled: jax.stages.Compiled, options: dict) -> str:
    """The optimised program's text; options: what it was compiled with, from `compiler_options`.

    Of a TPU it is what the compiler wrote itself: `as_text` of jaxlib 0.10.2 fails on asynchronous operations of libtpu
    0.0.52, on TPU7x and in a v6e's program of tests ("async-update instruction should have 1 operands but sees 2").

    Raises:
      ValueError: the compiler wrote no text, or those of several programs.
    """
    folder = options.get("xla_dump_to")
    if folder is None:
        return compiled.as_text()
    found = list(Path(folder).glob("*.after_optimizations.txt"))
    if len(found) != 1:
        raise ValueError(f"{folder}: {len(found)} texts of optimised programs; one is accepted")
    return found[0].read_text()


def memory_bytes(device: jax.Device) -> float:
    """Bytes that programs may use on a device: by its own account if it is here, else by `MEMORY_BYTES`.

    Raises:
      ConfigError: neither says.
    """
    limit = None
    if device in jax.local_devices():
        limit = (device.memory_stats() or {}).get("bytes_limit")
    known = [name for name in MEMORY_BYTES if device.device_kind.startswith(name)]
    if not limit and not known:
        raise ConfigError(f"the memory of {device.device_kind} is not known; known: {', '.join(MEMORY_BYTES)}")
    return limit or MEMORY_BYTES[max(known, key=len)]
