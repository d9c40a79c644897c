"""A training step by each convention, peaks of devices, utilisation."""

import dataclasses

import pytest

from medcg_jax.families.flops import forward
from medcg_jax.families.llava import model as llava
from medcg_jax.plan import flops

TINY = llava.llava15_tiny(vocab_size=128, image_token_id=127, num_kv_heads=1, num_heads=2)


def test_a_step_counts_every_convention():
    config = dataclasses.replace(TINY, remat="full")
    trainable = ("projector", "decoder")
    made = flops.step(config, [40] * 4, padded_length=40, num_images=1, num_logits=8, trainable=trainable)
    one = forward(config, length=40, num_logits=8)
    assert made["full"] == 4 * (one.vision + 3 * (one.total - one.vision))
    assert made["full"] - made["causal"] == pytest.approx(4 * 1.5 * one.attention)
    assert made["executed"] - made["full"] == pytest.approx(4 * (one.decoder + one.attention))
    padded = flops.step(config, [40, 20], padded_length=40, num_images=1, num_logits=8, trainable=trainable)
    short = forward(config, length=20, num_logits=8)
    assert padded["full"] == made["full"] / 4 + short.vision + 3 * (short.total - short.vision)
    assert padded["executed"] == made["executed"] / 2


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("NVIDIA H200", 989.5e12),
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("cpu", None),
    ],
)
def test_peaks(kind, peak):
    assert flops.peak_bf16(kind) == peak


def test_utilisation():
    made = {"full": 989.5e12, "causal": 494.75e12, "executed": 1979e12}
    assert flops.utilisation(made, 2.0, "NVIDIA H200", 1) == {"mfu": 0.5, "mfu_causal": 0.25, "hfu": 1.0}
    assert flops.utilisation(made, 2.0, "NVIDIA H200", 2)["mfu"] == 0.25
    assert flops.utilisation(made, 2.0, "cpu", 1) == {"mfu": None, "mfu_causal": None, "hfu": None}
