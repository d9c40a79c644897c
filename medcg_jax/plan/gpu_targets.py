"""What XLA asks about a GPU that is not there: one text per kind, in XLA's own format `GpuTargetConfigProto`.

The fields are those of openxla/xla:xla/stream_executor/device_description.proto. Multiprocessors, clocks, bytes of
memory and of second-level cache are the devices' own account as openxla/xla has it under
xla/backends/gpu/target_config/specs (a100_sxm_80, h100_sxm, h200 and b200.txtpb), and agree with NVIDIA's datasheets
(A100 and H100 SXM, H200 SXM, HGX B200); limits of threads, registers and shared memory are CUDA's of the compute
capability (CUDA C++ Programming Guide, technical specifications per compute capability).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class GpuTarget:
    """Where kinds differ. shared_memory_*: bytes of a multiprocessor, and what one block may ask for of it."""

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
        """The kind as XLA reads it; cuDNN is the version that JAX 0.10's extras `cuda12` and `cuda13` ask for.

        Without a version of CUDA XLA makes 16-bit products of those in fp8.
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


# By the name that a topology begins with.
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
