"""Published peaks by the names that devices give themselves, and the FLOPs that are divided by them."""

import dataclasses

import pytest

from medcg_jax.chips import PEAKS, peak_of, utilisation
from medcg_jax.families import flops
from medcg_jax.families.flops import forward, generation
from medcg_jax.families.llava.model import llava15_7b, llava15_tiny
from medcg_jax.families.mllama.model import llama32_vision_11b


@pytest.mark.parametrize(
    ("kind", "tflops", "memory", "links", "chips"),
    [
        ("TPU v5 lite", 197, 819, 200, 1),
        ("TPU v5", 459, 2765, 600, 1),
        ("TPU v5p", 459, 2765, 600, 1),
        ("TPU v6 lite", 918, 1638, 400, 1),
        ("TPU7x", 1153.5, 3690, 300, 2),
        ("NVIDIA A100-SXM4-80GB", 312, 2039, 300, 1),
        ("NVIDIA H100 80GB HBM3", 989.5, 3350, 450, 1),
        ("NVIDIA H200", 989.5, 4800, 450, 1),
        ("NVIDIA B200", 2250, 8000, 900, 1),
    ],
)
def test_a_device_has_its_own_peaks(kind, tflops, memory, links, chips):
    found = peak_of(kind)
    assert found.bf16_flops_per_s == tflops * 1e12 and found.memory_bytes_per_s == memory * 1e9
    assert found.link_bytes_per_s == links * 1e9 and found.devices_per_chip == chips


def test_what_is_not_known_is_not_guessed():
    assert peak_of("cpu") is None and peak_of("TPU v2") is None
    # The PCIe card has other links than the one with NVLink.
    assert peak_of("NVIDIA H100 PCIe").link_bytes_per_s is None


@pytest.mark.parametrize("kind", PEAKS)
def test_every_row_is_sourced_and_of_one_scale(kind):
    peak = PEAKS[kind]
    assert "datasheet" in peak.source or "docs.cloud.google.com" in peak.source
    assert 1e14 < peak.bf16_flops_per_s < 3e15
    # Memory is faster than links, and links than the network: a factor that slipped would show.
    rates = [peak.memory_bytes_per_s, peak.link_bytes_per_s, peak.network_bytes_per_s]
    known = [rate for rate in rates if rate]
    assert known == sorted(known, reverse=True) and all(1e9 < rate < 1e13 for rate in known)


@pytest.mark.parametrize("config", [llava15_7b(), llama32_vision_11b()], ids=["llava", "mllama"])
def test_generating_costs_what_a_longer_prompt_would(config):
    """A token at a time over a cache: products as in one pass, attention over what is seen so far."""
    length, new = 40, 5
    before, after = (forward(config, length=n, num_images=0).total for n in (length, length + new))
    at_once = after - before
    one_by_one = sum(generation(config, seen=length + place) for place in range(1, new + 1))
    text = config.text
    crossed = len(getattr(text, "cross_layers", ()))
    # The whole square counts what a row does not see: n (n - 1) / 2 of the pairs among new tokens, and old on new.
    unseen = 4 * (text.num_layers - crossed) * text.num_heads * text.head_dim * (new * length + new * (new - 1) / 2)
    image = 4 * crossed * new * text.num_heads * text.head_dim * (config.vision.num_tokens if crossed else 0)
    assert one_by_one == pytest.approx(at_once - unseen + image)


def test_a_batch_of_tests():
    config = llava15_7b()
    prompt = forward(config, length=768, num_logits=1).total
    assert flops.evaluation(config, num_rows=3, length=768, num_new=1) == 3 * prompt
    more = flops.evaluation(config, num_rows=3, length=768, num_new=4) - 3 * prompt
    assert more == pytest.approx(3 * 3 * 2 * 6.6e9, rel=0.1)  # 2 x parameters for a token


TINY = llava15_tiny(vocab_size=128, image_token_id=127, num_kv_heads=1, num_heads=2)


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


def test_utilisation():
    made = {"full": 989.5e12, "causal": 494.75e12, "executed": 1979e12}
    assert utilisation(made, 2.0, "NVIDIA H200", 1) == {"mfu": 0.5, "mfu_causal": 0.25, "hfu": 1.0}
    assert utilisation(made, 2.0, "NVIDIA H200", 2)["mfu"] == 0.25
    assert utilisation(made, 2.0, "cpu", 1) == {"mfu": None, "mfu_causal": None, "hfu": None}
