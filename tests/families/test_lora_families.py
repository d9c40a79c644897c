"""Adapters on every family's decoder: they change logits where they are, in training and decoding alike, and count."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from medcg_jax.config import ModelConfig
from medcg_jax.families import build, flops
from medcg_jax.mesh import make_mesh
from medcg_jax.nn.lora import TARGETS, LoraConfig, target_axes
from medcg_jax.plan.programs import small_tokenizer
from medcg_jax.train.setup import model_config

FAMILIES = ("llava15_tiny", "qwen2_vl_tiny", "llama32_vision_tiny", "minigpt_v2_tiny", "next_chat_tiny")


def adapted(name: str, base_dtype: str = "float32"):
    model = ModelConfig(name=name, lora_rank=4, trainable=("projector", "lora"), base_dtype=base_dtype, scan_unroll=1)
    return model_config(model, small_tokenizer(model))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_adapter_is_in_the_text_and_decoding_is_training(name):
    config = adapted(name)
    graphdef, params = build.create(config, make_mesh(devices=jax.devices()[:1]), seed=0)
    tokens = np.random.default_rng(0).integers(3, 30, (2, 9)).astype(np.int32)

    @jax.jit
    def hidden(params):
        model = nnx.merge(graphdef, params)
        whole = model.hidden(tokens)[0]
        cache = model.init_cache(2, 9)
        _, cache = model.hidden(tokens[:, :6], cache=cache)
        return whole, model.hidden(tokens[:, 6:], cache=cache)[0]

    def with_b(by: dict):
        """params with these adapters' second half so large; by: target -> value."""

        def change(path, x):
            return x + by.get(path[-2].key, 0.0) if path[-1].key == "b" else x

        return jax.tree_util.tree_map_with_path(change, params)

    start, _ = hidden(params)
    bare = dataclasses.replace(config, lora=None)
    if name != "minigpt_v2_tiny":  # it is never without
        plain, rest = build.abstract(bare)[0], build.split_trainable(params, ("lora",))[1]
        assert np.abs(nnx.merge(plain, rest).hidden(tokens)[0] - start).max() < 1e-6
    changed = {target: hidden(with_b({target: 0.3})) for target in TARGETS}
    for whole, decoded in changed.values():
        assert np.abs(whole - start).max() > 1e-3
        assert np.abs(decoded - whole[:, 6:]).max() < 1e-5
    # No two of them do the same.
    assert len({float(np.abs(whole - start).sum()) for whole, _ in changed.values()}) == len(TARGETS)


@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_count_as_many_as_they_have_numbers(name):
    config = adapted(name)
    params = build.abstract(config)[1]["lora"]
    one = flops.forward(config, length=100, num_images=1)
    expected = 2.0 * 100 * build.num_params(params)
    if name == "llama32_vision_tiny":
        # Keys and values of cross-attention are of the image's tokens.
        sizes = [np.prod([size for _, size in axes]) for part in "kv" for axes in target_axes(config.text, part)]
        crossed = len(config.text.cross_layers) * 4 * sum(sizes)
        expected += 2.0 * crossed * (config.vision.num_tokens - 100)
    assert one.adapters == pytest.approx(expected)
    plain = flops.forward(dataclasses.replace(config, lora=LoraConfig(1, 1.0, ("q",))), length=100)
    assert plain.decoder == one.decoder and plain.adapters < one.adapters
    # Attention's products are of two activations, which both have a gradient whatever is frozen.
    found = flops.training(one, trainable=("projector", "lora"))
    rest = 2 * (one.decoder + one.head) + 3 * one.attention
    assert found == pytest.approx(one.vision + 3 * one.projector + rest + 3 * one.adapters)


def test_a_rank_that_the_mesh_does_not_divide_is_whole_on_every_device():
    from medcg_jax.config import MeshConfig

    config = dataclasses.replace(adapted("llava15_tiny"), lora=LoraConfig(3, 3.0, TARGETS))
    places = build.shardings(config, make_mesh(MeshConfig(data=1, fsdp=4, tensor=2)))["lora"]
    assert places["q"]["b"].spec == jax.P(None, None, "tensor", None)
    assert places["down"]["a"].spec == jax.P(None, "tensor", None)
    assert places["q"]["a"].spec == jax.P(None, "fsdp", None)


def test_targets_and_ranks_that_are_none_are_refused():
    with pytest.raises(ValueError, match="lora rank=0, targets=.*a rank of at least 1"):
        LoraConfig(0, 1.0)
    with pytest.raises(ValueError, match="one or more of q, k, v, out, gate, up, down"):
        LoraConfig(4, 1.0, ("head",))
