"""Faults that leave every shape right and no run broken: norms' epsilons, inert gates, inner layers off by one.

Held without PyTorch, at the released sizes where shapes suffice; tests of parity see the same faults in numbers.
"""

import dataclasses
import re

import family_toys
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from medcg_jax.families import build, registry
from medcg_jax.nn.layers import LayerNorm, RMSNorm
from medcg_jax.parity.rows import layers

# Part of a model, by the start of its norms' dotted names -> epsilon; the first that fits counts.
CLIP_LLAMA = {"vision|unused": 1e-5, "decoder": 1e-5}
EPSILONS = {
    "llava15_7b": CLIP_LLAMA,
    "llava15_13b": CLIP_LLAMA,
    "qwen2_vl_2b": {"vision|projector": 1e-6, "decoder": 1e-6},
    "qwen2_vl_7b": {"vision|projector": 1e-6, "decoder": 1e-6},
    "qwen2_vl_72b": {"vision|projector": 1e-6, "decoder": 1e-6},
    "llama32_vision_11b": {"vision": 1e-5, "decoder": 1e-5},
    "llama32_vision_90b": {"vision": 1e-5, "decoder": 1e-5},
    # The norm behind the tower is BLIP-2's.
    "minigpt_v2_7b": {r"vision\.norm": 1e-5, "vision": 1e-6, "decoder": 1e-5},
    "next_chat_7b_336": CLIP_LLAMA | {r"sam_encoder|sam_prompt|mask_decoder\.upscale_norm": 1e-6, "mask_decoder": 1e-5},
}


def epsilons(config) -> dict[str, float]:
    """Dotted name of every norm -> its epsilon."""
    model = nnx.eval_shape(lambda: registry.of(config).module_type(config, rngs=nnx.Rngs(0)))
    return {
        ".".join(map(str, path)): module.eps
        for path, module in nnx.iter_modules(model)
        if isinstance(module, LayerNorm | RMSNorm)
    }


def wrong(found: dict[str, float], expected: dict[str, float]) -> list[str]:
    def wanted(name: str) -> float | None:
        return next((eps for start, eps in expected.items() if re.match(rf"({start})", name)), None)

    return sorted(name for name, eps in found.items() if eps != wanted(name))


@pytest.mark.parametrize("size", EPSILONS)
def test_every_norm_has_its_epsilon(size):
    found = epsilons(build.SIZES[size]())
    assert len(found) > 4 and wrong(found, EPSILONS[size]) == []
    # Planted in one norm after the other: 1e-6 for 1e-5, or the reverse.
    for name, eps in found.items():
        assert wrong(found | {name: 1e-6 if eps == 1e-5 else 1e-5}, EPSILONS[size]) == [name]


def test_all_released_sizes_are_listed():
    assert set(EPSILONS) == set(build.SIZES)


@pytest.fixture(scope="module")
def mllama():
    """(config, rows) of the tiny Llama-3.2-Vision."""
    return family_toys.setup("mllama").model, family_toys.training_rows("mllama").rows(np.arange(4))[0]


def test_new_gates_are_not_inert(mllama):
    """A model made from nothing looks at its images: other ones give other logits. With its gates at 0 they do not."""
    config, rows = mllama
    mesh = family_toys.setup("mllama").mesh
    graphdef, _ = build.abstract(config)
    new = jax.jit(lambda: nnx.state(registry.of(config).module_type(config, rngs=nnx.Rngs(0))))
    params = family_toys.compiled(mesh, new)()
    params = jax.tree.map(lambda v: v[...], params, is_leaf=lambda x: isinstance(x, nnx.Variable))

    def run(params, images):
        return nnx.merge(graphdef, params)(rows["tokens"], images, segment_ids=rows["segment_ids"])

    images = {key: rows[key] for key in ("pixels", "aspect_ratio_ids", "num_tiles")}
    others = images | {"pixels": 255 - images["pixels"]}
    forward = family_toys.compiled(mesh, jax.jit(run), params, images)
    behind = (rows["tokens"] == config.image_token_id).cumsum(axis=1) * rows["segment_ids"] > 0

    def looked() -> float:
        return float(np.abs(np.asarray(forward(params, images) - forward(params, others)))[behind].max())

    assert looked() > 1e-2
    for name in ("attention_gate", "mlp_gate"):
        params["decoder"]["cross"][name] = params["decoder"]["cross"][name] * 0
    assert looked() == 0


def test_the_features_have_what_inner_layers_are_given(mllama):
    """Meta's rule, which is the default; the outputs of the same layers are others."""
    config, rows = mllama
    assert build.SIZES["llama32_vision_11b"]().intermediate_from == config.intermediate_from == "input"
    assert build.SIZES["llama32_vision_11b"]().vision.intermediate_layers == (3, 7, 15, 23, 30)
    given = [jnp.asarray(rows[key][:, 0]) for key in ("pixels", "aspect_ratio_ids", "num_tiles")]
    (taken,), tokens, width = config.vision.intermediate_layers, config.vision.tokens_per_tile, config.vision.embed_dim

    def inputs(vision):
        x, allowed, found = vision.embed(*given, jnp.float32), vision.allowed(given[2]), []
        for block in layers(vision.blocks):
            found.append(x)
            x = block(x, allowed)
        return found[taken].reshape(len(x), 4, -1, width)[:, :, :tokens]

    def run(config, function):
        graphdef, _ = build.abstract(config)
        on_params = jax.jit(lambda params: function(nnx.merge(graphdef, params).vision))
        params = family_toys.placed("mllama", None)
        return np.asarray(family_toys.compiled(family_toys.setup("mllama").mesh, on_params, params)(params))

    features = lambda vision: vision(*given, dtype=jnp.float32)[..., width:]
    expected = run(config, inputs)
    assert np.abs(run(config, features) - expected).max() < 1e-4
    off = dataclasses.replace(config, intermediate_from="output")
    assert np.abs(run(off, features) - expected).max() > 1e-2
