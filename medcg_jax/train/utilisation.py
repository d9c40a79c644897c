"""What a run's steps need, for its MFU: FLOPs by the formulas of `models.flops`, and the peak of its devices."""

import numpy as np
from jax.sharding import Mesh

from medcg_jax.chips import peak_bf16
from medcg_jax.config import MASK_PARTS
from medcg_jax.data.encoding import Encoded
from medcg_jax.families.build import Config
from medcg_jax.families.flops import forward, training


def step_flops(encoded: Encoded, config: Config, *, trainable: tuple[str, ...], batch_size: int) -> float | None:
    """FLOPs that the model needs for a step of `batch_size` rows, on average over the records; None: no formula.

    Real tokens alone, attention as the full square, nothing computed again (arXiv 2204.02311, appendix B). Trainings of
    masks have no formula: SAM is not in `models.flops`.
    """
    if set(trainable) & set(MASK_PARTS):
        return None
    lengths, counts = np.unique(encoded.arrays["length"], return_counts=True)
    num_logits = encoded.arrays["targets"].shape[1]

    def of_row(length: int) -> float:
        return training(forward(config, length=length, num_logits=num_logits), trainable=trainable)

    mean = sum(int(n) * of_row(int(length)) for length, n in zip(lengths, counts, strict=True)) / counts.sum()
    return float(batch_size * mean)


def peak_flops(mesh: Mesh) -> float | None:
    """Dense bf16 FLOP/s of all devices of the mesh together; None where the table has none of them (a CPU, say)."""
    peak = peak_bf16(mesh.devices.flat[0].device_kind)
    return peak and peak * mesh.devices.size
