"""Devices of absent machines to compile for, by name; the memory of a device; and the versions installed here.

`v5p:4x4x4` and other slices of TPUs need the package libtpu (extra `tpu`), `h100:8` the CUDA plugin (extra `cuda`);
neither needs the hardware. `v5e:4x4*2` is two slices joined by the data-center
network, `h100:8x8` 8 hosts with 8 GPUs each. A TPU7x chip (and a v4 chip) is two devices.
"""

import datetime
import functools
import importlib.util
import os
import platform
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import jax
from jax.experimental import topologies

from medcg_jax.config import ConfigError
from medcg_jax.platform import FLAGS
from medcg_jax.terminal import install

GIB = 1 << 30
TPU_KINDS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
COMPILERS = ("libtpu", "jax-cuda12-pjrt", "jax-cuda13-pjrt", "nvidia-cudnn-cu12")
PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "torch", "transformers", "grain", "array_record",
    "pillow",
)  # fmt: skip
# Switches off windowed einsum, which writes a gather as a loop of permutes.
TPU_COUNTABLE = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 100_000_000}
# A run's own flags; and Triton's tiles are chosen by timing them on a device, so Triton and autotuning are off.
GPU_WITHOUT_DEVICE = {
    flag.name: flag.value == "true" for flag in FLAGS if flag.platform == "cuda" and not flag.only_with
} | {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}
# A run's own that decide how much memory its programs take.
CPU_OPTIONS = {flag.name: flag.value for flag in FLAGS if flag.name == "xla_disable_hlo_passes"}


@dataclass(frozen=True)
class GpuTarget:
    """The properties of an absent GPU that XLA needs and that differ between kinds.

    Multiprocessors, clocks, bytes of memory and of second-level cache are those reported by the devices, from
    openxla/xla:xla/backends/gpu/target_config/specs, and agree with NVIDIA's datasheets; limits of threads, registers
    and shared memory are CUDA's for the compute capability (CUDA C++ Programming Guide).
    shared_memory_bytes: of a multiprocessor. shared_memory_block_bytes: the most for one block.
    """

    device_kind: str
    compute_capability: tuple[int, int]
    num_multiprocessors: int
    fpus_per_multiprocessor: int
    clock_ghz: float
    memory_bytes: int
    memory_bytes_per_s: int
    l2_cache_bytes: int
    shared_memory_bytes: int
    shared_memory_block_bytes: int

    def text(self) -> str:
        """The GPU as XLA's `GpuTargetConfigProto` (openxla/xla:xla/stream_executor/device_description.proto).

        The cuDNN version is the one that JAX 0.10's extras `cuda12` and `cuda13` require. Without a CUDA version XLA
        turns fp8 products into 16-bit ones.
        """
        major, minor = self.compute_capability
        return f"""
platform_name: "CUDA"
device_description_str: "{self.device_kind}"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 9 }}
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  core_count: {self.num_multiprocessors}
  fpus_per_core: {self.fpus_per_multiprocessor}
  clock_rate_ghz: {self.clock_ghz}
  device_memory_size: {self.memory_bytes}
  memory_bandwidth: {self.memory_bytes_per_s}
  l2_cache_size: {self.l2_cache_bytes}
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {self.shared_memory_block_bytes}
  shared_memory_per_core: {self.shared_memory_bytes}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
"""


GPU_TARGETS = {
    "a100": GpuTarget(
        "NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 1.41, 85_100_068_864, 2_039_040_000_000, 41_943_040, 167_936, 166_912
    ),
    "h100": GpuTarget(
        "NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 1.98, 84_942_979_072, 3_352_320_000_000, 52_428_800, 233_472, 232_448
    ),
    "h200": GpuTarget(
        "NVIDIA H200", (9, 0), 132, 128, 1.98, 151_397_597_184, 4_800_000_000_000, 52_428_800, 233_472, 232_448
    ),
    "b200": GpuTarget(
        "NVIDIA B200", (10, 0), 148, 128, 1.965, 191_514_411_008, 7_672_320_000_000, 132_644_864, 233_472, 232_448
    ),
}
EXPECTED = (
    f"expected local, {'|'.join(TPU_KINDS)}:4x4 (chips; v4, v5p, tpu7x: 4x4x4), v5e:4x4*2 (slices), "
    f"or {'|'.join(GPU_TARGETS)}:8 or :8x8 (hosts x GPUs)"
)
# Usable bytes of one device, by a prefix of `jax.Device.device_kind`; the longest match counts.
# TPU: the available bytes that libtpu 0.0.52 states when it refuses a program that is too large.
MEMORY_BYTES = {
    "TPU v4": 15.25 * GIB,
    "TPU v5 lite": 15.75 * GIB,
    "TPU v5": 95.73 * GIB,
    "TPU v6 lite": 31.24 * GIB,
    "TPU7x": 94.74 * GIB,
} | {target.device_kind: float(target.memory_bytes) for target in GPU_TARGETS.values()}


class Topology(NamedTuple):
    """sizes: sides of one slice in chips; of GPUs (hosts, GPUs of a host), or GPUs alone."""

    kind: str
    sizes: tuple[int, ...]
    num_slices: int = 1


def get_devices(topology: str) -> list[jax.Device]:
    """Devices of a topology ("v5p:4x4x4", "v5e:4x4*2", "h100:8", "h100:8x8"), or "local" for those of this process.

    Raises:
      ConfigError: an unknown name, or the package that compiles for it is not installed.
    """
    if topology == "local":
        return jax.devices()
    kind, sizes, num_slices = parse(topology)
    gpu = kind in GPU_TARGETS
    packages = ("jax_cuda12_plugin", "jax_cuda13_plugin") if gpu else ("libtpu",)
    if not any(map(importlib.util.find_spec, packages)):
        extra = "cuda" if gpu else "tpu"
        raise ConfigError(
            f"topology={topology}: no compiler for it is installed; {install(extra)} brings it (no hardware is needed)"
        )
    if gpu:
        # The plugin asks the driver for its version, which a machine without GPUs has none of. A run never comes here.
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    try:
        if gpu:
            hosts, gpus = (1, *sizes)[-2:]
            described = topologies.get_topology_desc(
                kind, platform="cuda", topology=f"1x{hosts}x{gpus}", target_config=GPU_TARGETS[kind].text()
            )
        else:
            slices = {"num_slices": num_slices} if num_slices > 1 else {}
            name = f"{kind}:{'x'.join(map(str, sizes))}"
            described = topologies.get_topology_desc(name, platform="tpu", **slices)
    except Exception as error:  # the plugins raise classes of their own
        text = " ".join(str(error).split())[:300]
        raise ConfigError(f"topology={topology}: {type(error).__name__}: {text}") from error
    return list(described.devices)


def parse(topology: str) -> Topology:
    """Topology("v5p", (4, 4, 4), 1) of "v5p:4x4x4", Topology("v5e", (4, 4), 2) of "v5e:4x4*2".

    Raises:
      ConfigError: the name has another form.
    """
    kind, _, size = topology.partition(":")
    shape, star, slices = size.partition("*")
    numbers = [*shape.split("x"), *([slices] if star else [])]
    gpu = kind in GPU_TARGETS
    bad = not all(number.isascii() and number.isdecimal() and int(number) for number in numbers)
    if bad or kind not in (*TPU_KINDS, *GPU_TARGETS) or gpu and (star or len(numbers) > 2):
        raise ConfigError(f"topology={topology}: {EXPECTED}")
    return Topology(kind, tuple(map(int, shape.split("x"))), int(slices) if star else 1)


def compiler_options(device: jax.Device, countable: bool = True) -> dict:
    """Compiler options with which a program compiles without the device.

    countable: a TPU's gathers stay what they are; else they may become loops of permutes beside products, as in a run.
    Call it for each program: a TPU's compiler writes the program's text into the new folder named here (`text_of`).
    """
    if device in jax.local_devices():
        return CPU_OPTIONS if device.platform == "cpu" else {}
    kind = device.device_kind
    if kind.startswith("TPU"):
        folder = tempfile.mkdtemp(dir=_dumps().name)
        return (TPU_COUNTABLE if countable else {}) | {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
    return GPU_WITHOUT_DEVICE if kind.startswith("NVIDIA") else {}


@functools.cache
def _dumps() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="medcg_hlo_")


def text_of(compiled: jax.stages.Compiled, options: dict) -> str:
    """The optimised program's text; options: the `compiler_options` that it was compiled with.

    For a TPU it is the file that the compiler wrote: `as_text` of jaxlib 0.10.2 fails on asynchronous operations of
    libtpu 0.0.52, on TPU7x and in a v6e's program of tests ("async-update instruction should have 1 operands but sees
    2").

    Raises:
      ValueError: the compiler wrote no text, or several.
    """
    folder = options.get("xla_dump_to")
    if folder is None:
        return compiled.as_text() or ""
    texts = list(Path(folder).glob("*.after_optimizations.txt"))
    if len(texts) != 1:
        raise ValueError(f"{folder}: {len(texts)} texts of optimised programs; expected one")
    return texts[0].read_text()


def memory_bytes(device: jax.Device) -> float:
    """Usable bytes of a device: its own limit if it is a local device, else from `MEMORY_BYTES`.

    Raises:
      ConfigError: neither is known.
    """
    limit = None
    if device in jax.local_devices():
        limit = (device.memory_stats() or {}).get("bytes_limit")
    known = [name for name in MEMORY_BYTES if device.device_kind.startswith(name)]
    if not limit and not known:
        raise ConfigError(
            f"the memory of {device.device_kind} is not known; give --memory_gib=GIB of `medcg plan`; known: "
            f"{', '.join(MEMORY_BYTES)}"
        )
    return limit or MEMORY_BYTES[max(known, key=len)]


def limit_of(device: jax.Device) -> tuple[float, str]:
    """(usable bytes of a device, what memory that is; "": its own). A CPU device has its share of this host's memory.

    Raises:
      ConfigError: as `memory_bytes`.
    """
    if device.platform != "cpu" or device not in jax.local_devices():
        return memory_bytes(device), ""
    return host_bytes() / len(jax.local_devices()), "this host's memory"


def host_bytes() -> float:
    """Bytes of this host's memory, or those of it that the process may use."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        # Of a container; the file has the word "max" where there is no limit.
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8").strip()
        total = min(total, int(limit)) if limit.isdigit() else total
    except OSError:
        pass
    return float(total)


def about_here() -> dict:
    """Date, versions (compilers included) and devices of this process, for a record of a measurement."""
    versions = {"python": platform.python_version()}
    for package in (*PACKAGES, *COMPILERS):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            pass
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions,
        "device": jax.devices()[0].device_kind,
        "num_devices": jax.device_count(),
    }
