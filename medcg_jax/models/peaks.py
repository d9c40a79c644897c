"""Peak FLOP/s of devices, for MFU."""

# Dense bf16 FLOP/s of one device, by what `jax.Device.device_kind` begins with; the longest match counts.
PEAK_BF16 = {
    "NVIDIA A100": 312e12,  # NVIDIA A100 datasheet, BF16 tensor core
    "NVIDIA H100 80GB HBM3": 989.5e12,  # NVIDIA H100 datasheet, SXM: 1,979 with sparsity
    "NVIDIA H100 PCIe": 756.5e12,  # the same, PCIe: 1,513 with sparsity
    "NVIDIA H100 NVL": 835.5e12,  # the same, NVL: 1,671 with sparsity
    "NVIDIA H200": 989.5e12,  # NVIDIA H200 datasheet, SXM: 1,979 with sparsity
    "NVIDIA H200 NVL": 835.5e12,  # the same, NVL: 1,671 with sparsity
    "TPU v5 lite": 197e12,  # Google Cloud TPU documentation, v5e
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v6 lite": 918e12,  # v6e
    "TPU v6e": 918e12,
}


def peak_bf16(device_kind: str) -> float | None:
    """Dense bf16 FLOP/s of a device by its `device_kind`; None where the table has none (a CPU, say)."""
    known = [name for name in PEAK_BF16 if device_kind.startswith(name)]
    return PEAK_BF16[max(known, key=len)] if known else None
