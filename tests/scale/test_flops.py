import dataclasses

import pytest

from medcg_jax.models import llava
from medcg_jax.scale import flops

TINY = llava.llava15_tiny(vocab_size=128, image_token_id=127, num_kv_heads=1, num_heads=2)


def test_7b_by_hand():
    one = flops.forward(llava.llava15_7b(), length=640)
    assert one.vision / 1e12 == pytest.approx(0.366, abs=5e-4)
    assert one.projector / 1e12 == pytest.approx(0.024, abs=5e-4)
    assert (one.decoder + one.attention + one.head) / 1e12 == pytest.approx(8.67, abs=5e-3)
    long = flops.forward(llava.llava15_7b(), length=2048)
    assert (long.decoder + long.attention + long.head) / 1e12 == pytest.approx(29.26, abs=5e-3)
    # Every weight of a matrix product is used once per token: 2 FLOPs each, the embedding's lookup none.
    matrices = 6_738_415_616 - 2 * 32000 * 4096 - 65 * 4096
    assert one.decoder == 2 * 640 * matrices


def test_training_multipliers():
    one = flops.Flops(vision=1.0, projector=10.0, decoder=100.0, attention=1000.0, head=10000.0)
    assert one.total == 11111.0
    assert flops.training(one, trainable=("vision", "projector", "decoder")) == 3 * 11111.0
    assert flops.training(one, trainable=("projector", "decoder")) == 1 + 3 * 11110.0
    assert flops.training(one, trainable=("projector",)) == 1 + 3 * 10 + 2 * 11100.0
    assert flops.training(one, trainable=("decoder",)) == 1 + 10 + 3 * 11100.0
    assert flops.training(one, trainable=("vision",)) == 3 * 1 + 2 * 11110.0
    assert flops.training(one, trainable=("decoder",), causal=True) == 1 + 10 + 3 * (100 + 500 + 10000)
    assert flops.training(one, trainable=("decoder",), remat="full") == 1 + 10 + 3 * 11100.0 + 1100
    assert flops.training(one, trainable=("decoder",), remat="dots") == 1 + 10 + 3 * 11100.0 + 1000
    assert flops.training(one, trainable=("vision",), remat="full") == 3 * 1 + 2 * 11110.0 + 1101


def test_a_step_counts_every_convention():
    config = dataclasses.replace(TINY, remat="full")
    trainable = ("projector", "decoder")
    made = flops.step(config, [40] * 4, padded_length=40, num_images=1, num_logits=8, trainable=trainable)
    one = flops.forward(config, length=40, num_logits=8)
    assert made["full"] == 4 * (one.vision + 3 * (one.total - one.vision))
    assert made["full"] - made["causal"] == pytest.approx(4 * 1.5 * one.attention)
    assert made["executed"] - made["full"] == pytest.approx(4 * (one.decoder + one.attention))
    padded = flops.step(config, [40, 20], padded_length=40, num_images=1, num_logits=8, trainable=trainable)
    short = flops.forward(config, length=20, num_logits=8)
    assert padded["full"] == made["full"] / 4 + short.vision + 3 * (short.total - short.vision)
    assert padded["executed"] == made["executed"] / 2


def test_logits_and_images_count_only_where_they_are_computed():
    all_of_it = flops.forward(TINY, length=40)
    fewer = flops.forward(TINY, length=40, num_logits=8, num_images=2)
    assert fewer.head == all_of_it.head / 5
    assert fewer.vision == 2 * all_of_it.vision and fewer.projector == 2 * all_of_it.projector
    assert fewer.decoder == all_of_it.decoder


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


def test_against_the_flop_counter_of_pytorch():
    """Our forward pass of the tiny model against what PyTorch's dispatcher counts in HF's."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from torch.utils.flop_counter import FlopCounterMode

    vision, text = TINY.vision, TINY.text
    reference = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(
                image_size=vision.image_size_px, patch_size=vision.patch_size_px, hidden_size=vision.embed_dim,
                intermediate_size=vision.mlp_dim, num_hidden_layers=vision.num_layers,
                num_attention_heads=vision.num_heads,
            ),  # fmt: skip
            text_config=transformers.LlamaConfig(
                vocab_size=text.vocab_size, hidden_size=text.embed_dim, intermediate_size=text.mlp_dim,
                num_hidden_layers=text.num_layers, num_attention_heads=text.num_heads,
                num_key_value_heads=text.num_kv_heads, head_dim=text.head_dim,
            ),  # fmt: skip
            image_token_index=TINY.image_token_id, vision_feature_layer=vision.feature_layer,
            attn_implementation="eager",
        )  # fmt: skip
    ).eval()
    length = 24
    tokens = torch.ones(1, length, dtype=torch.long)
    tokens[:, : vision.num_patches] = TINY.image_token_id
    pixels = torch.zeros(1, 3, vision.image_size_px, vision.image_size_px)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        reference(input_ids=tokens, pixel_values=pixels)
    ours = flops.forward(TINY, length=length)
    # HF runs every layer of its tower; ours stops at the feature layer.
    num_unused = vision.num_layers - vision.num_run_layers
    unused = flops.vit(num_unused, vision.embed_dim, vision.mlp_dim, vision.num_patches + 1)
    assert counter.get_total_flops() == ours.total + unused
