"""FLOPs of a training step by each convention, and what share of a device's peak they are (MFU, HFU)."""

from medcg_jax.models.build import Config
from medcg_jax.models.flops import forward, training

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


def step(config: Config, lengths, *, padded_length: int, num_images: int, num_logits: int, trainable) -> dict:
    """FLOPs of one training step by each convention: {"full", "causal", "executed"}.

    full: what the model needs for the real tokens, attention as the full square (arXiv 2204.02311, appendix B).
    causal: the same with attention halved. executed: rows at their padded length, and what rematerialisation computes
      again; the utilisation that comes of it is HFU and no MFU.
    lengths: real tokens of each row. num_logits: positions of a row at which the head runs.
    """
    rest = dict(num_images=num_images, num_logits=num_logits)
    rows = [forward(config, length=int(length), **rest) for length in lengths]
    padded = forward(config, length=padded_length, **rest)
    return {
        "full": sum(training(row, trainable=trainable) for row in rows),
        "causal": sum(training(row, trainable=trainable, causal=True) for row in rows),
        "executed": len(rows) * training(padded, trainable=trainable, remat=config.remat),
    }


def peak_bf16(device_kind: str) -> float | None:
    """Dense bf16 FLOP/s of a device by its `device_kind`; None where the table has none (a CPU, say)."""
    known = [name for name in PEAK_BF16 if device_kind.startswith(name)]
    return PEAK_BF16[max(known, key=len)] if known else None


def utilisation(flops: dict, seconds: float, device_kind: str, num_devices: int) -> dict:
    """{"mfu", "mfu_causal", "hfu"} in 0-1 of the bf16 peak for `step`'s FLOPs in `seconds`; None without a peak."""
    peak = peak_bf16(device_kind)
    names = {"mfu": "full", "mfu_causal": "causal", "hfu": "executed"}
    return {name: peak and flops[key] / seconds / (peak * num_devices) for name, key in names.items()}
