"""The FLOPs of a forward pass: by hand, against PyTorch's counter, and against the parameters of every family."""

import jax
import pytest

from medcg_jax.families import build, flops
from medcg_jax.families.llava import model as llava
from medcg_jax.families.minigpt_v2 import model as minigpt_v2
from medcg_jax.families.mllama.vit import NUM_TILES

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
    assert flops.training(one, trainable=("projector",)) == 1 + 3 * 10 + 2 * 11100.0 + 1000
    assert flops.training(one, trainable=("decoder",)) == 1 + 10 + 3 * 11100.0
    assert flops.training(one, trainable=("vision",)) == 3 * 1 + 2 * 11110.0 + 1000
    # The embedding's lookup costs nothing: it is trained at the cost of the gradients that pass the decoder.
    assert flops.training(one, trainable=("embedding",)) == 1 + 10 + 2 * 11100.0 + 1000
    assert flops.training(one, trainable=("projector", "embedding")) == flops.training(one, trainable=("projector",))
    assert flops.training(one, trainable=("embedding",), remat="full") == 1 + 10 + 2 * 11100.0 + 1000 + 1100
    assert flops.training(one, trainable=("decoder",), causal=True) == 1 + 10 + 3 * (100 + 500 + 10000)
    assert flops.training(one, trainable=("decoder",), remat="full") == 1 + 10 + 3 * 11100.0 + 1100
    assert flops.training(one, trainable=("decoder",), remat="dots") == 1 + 10 + 3 * 11100.0 + 1000
    assert flops.training(one, trainable=("vision",), remat="full") == 3 * 1 + 2 * 11110.0 + 1000 + 1101


def test_logits_and_images_count_only_where_they_are_computed():
    all_of_it = flops.forward(TINY, length=40)
    fewer = flops.forward(TINY, length=40, num_logits=8, num_images=2)
    assert fewer.head == all_of_it.head / 5
    assert fewer.vision == 2 * all_of_it.vision and fewer.projector == 2 * all_of_it.projector
    assert fewer.decoder == all_of_it.decoder


def test_against_the_flop_counter_of_pytorch():
    """Our forward pass of the tiny model against what PyTorch's dispatcher counts in HF's."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from torch.utils.flop_counter import FlopCounterMode

    vision, text = TINY.vision, TINY.text
    reference = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(
                image_size=vision.image_size_px,
                patch_size=vision.patch_size_px,
                hidden_size=vision.embed_dim,
                intermediate_size=vision.mlp_dim,
                num_hidden_layers=vision.num_layers,
                num_attention_heads=vision.num_heads,
            ),
            text_config=transformers.LlamaConfig(
                vocab_size=text.vocab_size,
                hidden_size=text.embed_dim,
                intermediate_size=text.mlp_dim,
                num_hidden_layers=text.num_layers,
                num_attention_heads=text.num_heads,
                num_key_value_heads=text.num_kv_heads,
                head_dim=text.head_dim,
            ),
            image_token_index=TINY.image_token_id,
            vision_feature_layer=vision.feature_layer,
            attn_implementation="eager",
        )
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


def weights(*parts) -> float:
    """Numbers in the matrices of these parts: what a token is multiplied by, each once."""
    leaves = jax.tree_util.tree_flatten_with_path(parts)[0]
    names = [(str(getattr(path[-1], "key", path[-1])), leaf) for path, leaf in leaves]
    return sum(leaf.size for name, leaf in names if name not in ("bias", "scale", "class_token", "gate"))


@pytest.mark.parametrize("size", sorted(build.SIZES))
def test_every_weight_of_a_product_counts_once_for_each_token(size):
    """Of what is no attention score: 2 FLOPs a weight and token, by the parameters that the model has."""
    config = build.SIZES[size]()
    params = build.abstract(config)[1]
    text, vision, length = config.text, config.vision, 300
    one = flops.forward(config, length=length)
    blocks = weights({k: v for k, v in params["decoder"].items() if k not in ("embed", "head", "norm")})
    expected = 2.0 * length * blocks
    if size.startswith("llama32"):
        # Keys and values of cross-attention belong to the image's tokens.
        crossed = 2 * len(text.cross_layers) * text.embed_dim * text.head_dim * text.num_kv_heads
        expected += 2.0 * crossed * (vision.num_tokens - length)
    assert one.decoder == pytest.approx(expected, rel=2e-3)
    assert one.head == 2.0 * length * text.embed_dim * text.vocab_size
    tokens = {"qwen2_vl": 4 * config.num_image_tokens, "llama32_": getattr(vision, "num_tokens", 0)}.get(size[:8])
    tokens = tokens or vision.num_patches + 1
    layers = getattr(vision, "num_run_layers", vision.num_layers) + getattr(vision, "num_global_layers", 0)
    scores = 4.0 * layers * tokens**2 * vision.embed_dim
    tower = weights({k: v for k, v in params["vision"].items() if k in ("blocks", "global_blocks", "patch")})
    assert one.vision - scores == pytest.approx(2.0 * tokens * tower, rel=2e-3)
    projected = config.num_image_tokens if size[:8] != "llama32_" else tokens
    assert one.projector == pytest.approx(2.0 * projected * weights(params["projector"]), rel=1e-3)
    assert one.adapters == (2.0 * length * weights(params["lora"]) if "lora" in params else 0.0)


def test_adapters_train_and_gradients_pass_through_the_decoder_to_them():
    one = flops.forward(minigpt_v2.minigpt_v2_7b(), length=400)
    frozen = 2 * (one.decoder + one.head) + 3 * one.attention
    assert flops.training(one, trainable=("lora",)) == one.vision + one.projector + frozen + 3 * one.adapters
    both = flops.training(one, trainable=("projector", "lora"))
    assert both == pytest.approx(one.vision + 3 * one.projector + frozen + 3 * one.adapters)


def test_more_tokens_of_an_image_cost_more_attention_to_them():
    small = build.SIZES["llama32_vision_11b"]()
    one, none = flops.forward(small, length=200), flops.forward(small, length=200, num_images=0)
    seen = len(small.text.cross_layers) * 4.0 * 200 * NUM_TILES * small.vision.tokens_per_tile
    assert one.attention - none.attention == seen * small.text.num_heads * small.text.head_dim
    assert none.vision == none.projector == 0 < none.decoder < one.decoder
