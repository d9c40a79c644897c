"""Published peaks of one device: FLOP/s in bf16, and bytes/s of its memory, its links and its share of the network.

These are vendors' numbers, which no program reaches: bounds, not measurements. Bandwidths are of one direction; where a
page states both directions together, this is half of it.
"""

from dataclasses import dataclass

GBIT = 1e9 / 8


@dataclass(frozen=True)
class Peak:
    """Peaks of one `jax.Device`; None: not published for this variant of the device.

    bf16_flops_per_s: dense. memory_bytes_per_s: of HBM.
    link_bytes_per_s: of all links to devices of the same slice (ICI) or host (NVLink) together, one direction.
    network_bytes_per_s: of its share of the network between slices (DCN) or hosts (NICs), one direction.
    source: the pages that the numbers are from.
    devices_per_chip: prices are per chip.
    """

    bf16_flops_per_s: float
    memory_bytes_per_s: float | None
    link_bytes_per_s: float | None
    network_bytes_per_s: float | None
    source: str
    devices_per_chip: int = 1


TPU_DOCS = "Google Cloud documentation, docs.cloud.google.com/tpu/docs"
# 819 GB/s and 400 GB/s both ways on the page of v5e; 6.4 Tbit/s for a pod of 256 chips.
V5E = Peak(197e12, 819e9, 200e9, 6.4e12 / 8 / 256, f"{TPU_DOCS}/v5e")
V5P = Peak(459e12, 2765e9, 600e9, 50 * GBIT, f"{TPU_DOCS}/v5p")
# The network's number is in the comparison on the page of TPU7x.
V6E = Peak(918e12, 1638e9, 400e9, 100 * GBIT, f"{TPU_DOCS}/v6e and /tpu7x")
# A chip is two devices; each has half of its numbers.
TPU7X = Peak(2307e12 / 2, 7380e9 / 2, 600e9 / 2, 100 * GBIT / 2, f"{TPU_DOCS}/tpu7x", devices_per_chip=2)
H100 = Peak(989.5e12, 3.35e12, 450e9, 400 * GBIT, "NVIDIA H100 datasheet, SXM; DGX H100 datasheet, a NIC for each GPU")
H200 = Peak(989.5e12, 4.8e12, 450e9, 400 * GBIT, "NVIDIA H200 datasheet, SXM; DGX H200 datasheet, a NIC for each GPU")

# By prefix of `jax.Device.device_kind`; the longest match counts.
PEAKS = {
    "TPU v5 lite": V5E,
    "TPU v5e": V5E,
    "TPU v5": V5P,
    "TPU v6 lite": V6E,
    "TPU v6e": V6E,
    "TPU7x": TPU7X,
    "TPU v7x": TPU7X,
    "NVIDIA A100": Peak(312e12, None, 300e9, 200 * GBIT, "NVIDIA A100 datasheet; DGX A100 datasheet"),
    "NVIDIA A100-SXM4-80GB": Peak(
        312e12, 2039e9, 300e9, 200 * GBIT, "NVIDIA A100 datasheet, SXM 80 GB; DGX A100 datasheet, a NIC for each GPU"
    ),
    "NVIDIA H100 80GB HBM3": H100,
    # 1,513 and 1,671 with sparsity.
    "NVIDIA H100 PCIe": Peak(756.5e12, 2.0e12, None, None, "NVIDIA H100 datasheet, PCIe"),
    "NVIDIA H100 NVL": Peak(835.5e12, 3.9e12, None, None, "NVIDIA H100 datasheet, NVL"),
    "NVIDIA H200": H200,
    "NVIDIA H200 NVL": Peak(835.5e12, 4.8e12, None, None, "NVIDIA H200 datasheet, NVL"),
    # Eight have 36 PFLOP/s, 64 TB/s of memory and 14.4 TB/s of NVLink both ways.
    "NVIDIA B200": Peak(
        2250e12, 8e12, 900e9, 400 * GBIT, "NVIDIA HGX B200 and DGX B200 datasheets, an eighth; a NIC for each GPU"
    ),
}


# Chips by the names that `medcg plan` and `medcg reproduce --dry` take.
CHIPS = {
    "v5e": V5E,
    "v5p": V5P,
    "v6e": V6E,
    "tpu7x": TPU7X,
    "a100": PEAKS["NVIDIA A100-SXM4-80GB"],
    "h100": H100,
    "h200": H200,
    "b200": PEAKS["NVIDIA B200"],
}


def chip_hours(flops: float) -> dict[str, float]:
    """Chip -> the hours that one needs for so many FLOPs at its published bf16 peak: a bound, which no program reaches."""
    return {name: flops / (peak.bf16_flops_per_s * peak.devices_per_chip) / 3600 for name, peak in CHIPS.items()}


def peak_of(device_kind: str) -> Peak | None:
    """The peaks of a device by its `device_kind`; None if `PEAKS` lacks it (a CPU)."""
    known = [name for name in PEAKS if device_kind.startswith(name)]
    return PEAKS[max(known, key=len)] if known else None


def peak_bf16(device_kind: str) -> float | None:
    """Dense bf16 FLOP/s of a device by its `device_kind`; None if `PEAKS` lacks it (a CPU)."""
    peak = peak_of(device_kind)
    return peak and peak.bf16_flops_per_s


def utilisation(flops: dict, seconds: float, device_kind: str, num_devices: int) -> dict:
    """{"mfu", "mfu_causal", "hfu"}: shares (0-1) of the bf16 peak that a step in `seconds` reaches, or None.

    flops: of the step, as `families.flops.step`.
    """
    peak = peak_bf16(device_kind)
    names = {"mfu": "full", "mfu_causal": "causal", "hfu": "executed"}
    return {name: peak and flops[key] / seconds / (peak * num_devices) for name, key in names.items()}
