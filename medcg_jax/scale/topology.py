"""Devices to compile for that are not there, by name, and how much memory a device has.

`v5p:4x4x4` and other slices of TPUs need the package libtpu (`pip install medcg-jax[tpu]`), `h100:8` the CUDA plugin
(`pip install medcg-jax[cuda]`); neither needs the hardware.
"""

import math

import jax
from jax.experimental import topologies

from medcg_jax.run_config import ConfigError

GIB = 1 << 30
TPU_KINDS = ("v4", "v5e", "v5p", "v6e")
# Bytes of one device that programs may use, by what `jax.Device.device_kind` begins with; the longest match counts.
MEMORY_BYTES = {
    "TPU v4": 32e9,  # Google Cloud TPU documentation, v4: 32 GB of HBM
    "TPU v5 lite": 15.75 * GIB,  # what libtpu's compiler says that programs may use of v5e's 16 GB
    "TPU v5": 95e9,  # Google Cloud TPU documentation, v5p: 95 GB
    "TPU v6 lite": 32e9,  # the same, v6e: 32 GB
    "NVIDIA H100 80GB HBM3": 84_942_979_072,  # openxla/xla, target_config/specs/h100_sxm.txtpb, device_memory_size
    "NVIDIA H200": 141e9,  # NVIDIA H200 datasheet
}
# Without windowed einsum, which writes a gather as a loop of permutes, in which bytes cannot be told apart.
TPU_COUNTABLE = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 100_000_000}
# Triton's tiles are found by timing them on a device.
GPU_WITHOUT_DEVICE = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}

# What XLA asks about a GPU: NVIDIA's H100 SXM datasheet and CUDA's limits of compute capability 9.0, under the names of
# openxla/xla:xla/stream_executor/device_description.proto.
H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 10 }
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
"""


def get_devices(topology: str) -> list[jax.Device]:
    """Devices of a topology: "v5p:4x4x4" (v4, v5e, v5p, v6e), "h100:8", or "local" for those of this process.

    Raises:
      ConfigError: another name, or the package that compiles for it is not installed.
    """
    if topology == "local":
        return jax.devices()
    kind, sizes = parse(topology)
    try:
        if kind == "h100":
            shape = f"1x1x{math.prod(sizes)}"
            found = topologies.get_topology_desc(kind, platform="cuda", topology=shape, target_config=H100)
        else:
            found = topologies.get_topology_desc(topology, platform="tpu")
    except Exception as error:  # the plugins raise classes of their own
        text = " ".join(str(error).split())[:300]
        raise ConfigError(f"topology={topology}: {type(error).__name__}: {text}") from error
    return list(found.devices)


def parse(topology: str) -> tuple[str, tuple[int, ...]]:
    """("v5p", (4, 4, 4)) of "v5p:4x4x4".

    Raises:
      ConfigError: it is written in another way.
    """
    kind, _, shape = topology.partition(":")
    sizes = shape.split("x")
    if kind not in (*TPU_KINDS, "h100") or not all(size.isdecimal() and int(size) for size in sizes):
        kinds = "|".join(TPU_KINDS)
        raise ConfigError(f"topology={topology}: local, h100:8 or {kinds}:4x4 (v4, v5p: 2x2x2) is accepted")
    return kind, tuple(map(int, sizes))


def part(topology: str, num_parts: int) -> str:
    """One of `num_parts` equal parts, by halving the longest side, of equal ones the last.

    "v5p:4x4x4", 4 -> "v5p:4x2x2"

    Raises:
      ConfigError: that does not come out even.
    """
    kind, sizes = parse(topology)
    sides, left = list(sizes), num_parts
    while left > 1:
        longest = max(range(len(sides)), key=lambda i: (sides[i], i))
        if left % 2 or sides[longest] % 2:
            raise ConfigError(f"topology={topology} in {num_parts} parts: powers of 2 that divide it are accepted")
        sides[longest] //= 2
        left //= 2
    return f"{kind}:{'x'.join(map(str, sides))}"


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
    """What to compile with, so that the program can be compiled without the device and its collectives counted."""
    if device in jax.local_devices():
        return {}
    kind = device.device_kind
    return TPU_COUNTABLE if kind.startswith("TPU") else GPU_WITHOUT_DEVICE if kind.startswith("NVIDIA") else {}


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
