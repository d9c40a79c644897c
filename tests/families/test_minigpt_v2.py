"""MiniGPT-v2 against transformers' parts, and decoding into a cache."""

import dataclasses

import hf_tiny_minigpt as tiny
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from medcg_jax.families import build
from medcg_jax.families.minigpt_v2.eva import EvaConfig
from medcg_jax.families.minigpt_v2.model import MiniGPTv2, MiniGPTv2Config, group, minigpt_v2_7b, minigpt_v2_tiny
from medcg_jax.mesh import make_mesh
from medcg_jax.nn.lora import LoraConfig

TOLERANCE = 1e-4
run = jax.jit(lambda model, given: model(**given))


@pytest.fixture(scope="module")
def tensors():
    return tiny.state()


@pytest.fixture(scope="module")
def ported(tensors):
    return tiny.port(tensors)


@pytest.fixture(scope="module")
def composed(tensors):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    return tiny.Composed(tensors)


@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_are_those_of_transformers_parts(ported, composed, side):
    inputs = tiny.inputs(side=side)
    real = inputs["segment_ids"] != 0
    theirs = composed.logits(inputs["tokens"], inputs["segment_ids"], inputs["pixels"])[real]
    ours = np.asarray(run(nnx.merge(*ported), tiny.given(inputs)))[real]
    assert np.abs(ours - theirs).max() < TOLERANCE
    assert 1 < np.abs(theirs).max() < 30
    # Planted: the adapters' alpha taken for their scale, and one image for another.
    for config, images in (
        (tiny.with_fields("lora", alpha=4.5), inputs["pixels"]),
        (tiny.CONFIG, inputs["pixels"][::-1]),
    ):
        graphdef, _ = build.abstract(config)
        wrong = run(nnx.merge(graphdef, ported[1]), tiny.given({**inputs, "pixels": images}))
        assert np.abs(np.asarray(wrong)[real] - theirs).max() > 100 * TOLERANCE


def test_image_features_are_those_of_transformers_parts(ported, composed):
    pixels = tiny.inputs()["pixels"]
    with composed.torch.no_grad():
        theirs = composed.encode_images(pixels).numpy()
    images = tiny.given(tiny.inputs())["images"]
    encode = jax.jit(lambda model, images: model.encode_images(images))
    assert np.abs(np.asarray(encode(nnx.merge(*ported), images)) - theirs).max() < 1e-5
    graphdef, _ = build.abstract(tiny.with_fields("vision", out_norm_eps=1e-6))
    assert np.abs(np.asarray(encode(nnx.merge(graphdef, ported[1]), images)) - theirs).max() > 10 * 1e-5


def test_a_row_by_itself_is_the_row_in_a_batch_behind_its_padding(ported):
    """Greedy with a cache, left-padded together and then one by one; right-padded prompts give the same."""
    model = nnx.merge(*ported)

    @jax.jit
    def prefill(model, given, last):
        cache = model.init_cache(len(given["tokens"]), given["tokens"].shape[1] + 4)
        hidden, cache = model.hidden(**given, cache=cache)
        return model.logits(jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]), cache

    @jax.jit
    def step(model, tokens, cache):
        hidden, cache = model.hidden(tokens[:, None], cache=cache)
        return model.logits(hidden[:, 0]), cache

    def generate(given, last):
        logits, cache = prefill(model, given, jnp.asarray(last))
        found = [logits]
        for _ in range(3):
            logits, cache = step(model, logits.argmax(axis=-1), cache)
            found.append(logits)
        return np.stack(found, axis=1)

    left, right = tiny.given(tiny.inputs(side="left")), tiny.given(tiny.inputs())
    lengths = right["segment_ids"].sum(axis=1)
    together = generate(left, [left["tokens"].shape[1] - 1] * 3)
    assert np.abs(generate(right, lengths - 1) - together).max() < TOLERANCE
    for i, length in enumerate(lengths):
        if length == lengths.max():
            continue
        alone = jax.tree.map(lambda x, i=i: x[i : i + 1], right)
        alone |= {name: alone[name][:, :length] for name in ("tokens", "segment_ids")}
        assert np.abs(generate(alone, [length - 1]) - together[i]).max() < TOLERANCE
    # Planted: padding taken for tokens.
    blind = left | {"segment_ids": np.ones_like(left["segment_ids"])}
    assert np.abs(generate(blind, [left["tokens"].shape[1] - 1] * 3) - together)[1:].max() > 100 * TOLERANCE


def test_counts():
    """The checkpoint's numbers; a form with zero biases on the keys has one more for every layer and channel."""
    config = minigpt_v2_7b()
    _, params = build.abstract(config)
    parts = {name: build.num_params(params[name]) for name in params}
    assert parts == {"vision": 986_978_688, "projector": 23_072_768, "decoder": 6_738_415_616, "lora": 33_554_432}
    key_biases = config.vision.num_layers * config.vision.embed_dim
    assert build.num_params(params) + key_biases == 7_782_076_416
    trainable, _ = build.split_trainable(params, ("projector", "lora"))
    assert build.num_params(trainable) == 56_627_200
    assert (config.num_image_tokens, config.lora.scale) == (256, 0.25)


def test_bytes_are_normalised_on_the_device_and_adapters_add_nothing_at_their_start():
    config = minigpt_v2_tiny(80, 79, scan_unroll=1)
    graphdef, params = build.create(config, make_mesh(devices=jax.devices()[:1]), seed=0)
    assert not np.asarray(params["lora"]["q"]["b"]).any() and not np.asarray(params["lora"]["v"]["b"]).any()
    model = nnx.merge(graphdef, params)
    given = {"pixels": np.random.default_rng(0).integers(0, 256, (2, 1, 32, 32, 3)).astype(np.uint8)}
    mean, std = np.array(config.vision.image_mean), np.array(config.vision.image_std)
    floats = {"pixels": ((given["pixels"] / 255 - mean) / std).astype(np.float32)}
    encode = jax.jit(lambda model, images: model.encode_images(images))
    assert np.abs(np.asarray(encode(model, given) - encode(model, floats))).max() < 1e-5


def test_neighbours_in_a_row_make_a_token():
    grid = jnp.arange(16.0).reshape(1, 16, 1)
    assert group(grid, 4)[0].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]


def test_shapes_and_sizes_that_do_not_fit_are_refused():
    config = minigpt_v2_tiny(20, 19)
    model = nnx.eval_shape(lambda: MiniGPTv2(config, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"pixels \(2, 32, 32, 3\); expected \[batch, images, 32, 32, 3\]"):
        model.encode_images({"pixels": jnp.zeros((2, 32, 32, 3), jnp.uint8)})
    with pytest.raises(ValueError, match=r"segment_ids \(2, 3\) beside tokens \(2, 20\)"):
        model.hidden(jnp.zeros((2, 20), jnp.int32), segment_ids=jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match="image_size_px=30 is no multiple of patch_size_px=4"):
        minigpt_v2_tiny(20, 19, image_size_px=30)
    with pytest.raises(ValueError, match="25 patches are no multiple of patches_per_token=4"):
        MiniGPTv2Config(vision=EvaConfig(image_size_px=70))
    with pytest.raises(ValueError, match="vision embed_dim=1408 is no multiple of num_heads=9"):
        EvaConfig(num_heads=9)
    assert dataclasses.replace(LoraConfig(), rank=4).scale == 4.0
