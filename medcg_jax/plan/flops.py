"""FLOPs of a training step by each convention, and what share of a device's peak they are (MFU, HFU)."""

from medcg_jax.chips import peak_bf16
from medcg_jax.families.build import Config
from medcg_jax.families.flops import forward, generation, training


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


def evaluation(config: Config, *, num_rows: int, length: int, num_new: int) -> float:
    """FLOPs of one batch of tests: prompts of `length` tokens, then `num_new` tokens of every row, one at a time."""
    prompt = forward(config, length=length, num_logits=1).total
    return num_rows * (prompt + sum(generation(config, seen=length + place) for place in range(1, num_new)))


def utilisation(flops: dict, seconds: float, device_kind: str, num_devices: int) -> dict:
    """{"mfu", "mfu_causal", "hfu"} in 0-1 of the bf16 peak for `step`'s FLOPs in `seconds`; None without a peak."""
    peak = peak_bf16(device_kind)
    names = {"mfu": "full", "mfu_causal": "causal", "hfu": "executed"}
    return {name: peak and flops[key] / seconds / (peak * num_devices) for name, key in names.items()}
