"""LLaVA against transformers on a tiny random model: stages, logits, gradients, AdamW; and every fault it must see."""

import dataclasses
from functools import partial

import hf_tiny
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_toys import every_other_long
from flax import nnx

from medcg_jax.families import clip, common
from medcg_jax.families.llava import model as llava
from medcg_jax.families.llava.model import llava15_tiny
from medcg_jax.families.merge import merge_images
from medcg_jax.nn import blocks
from medcg_jax.parity import llava as parity_llava
from medcg_jax.parity import verb as parity

TOLERANCE = 1e-4
run = jax.jit(lambda model, tokens, images, segment_ids: model(tokens, images, segment_ids=segment_ids))


@pytest.fixture(scope="module")
def reference():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from medcg_jax.parity.pytorch import Reference

    return Reference(hf_tiny.reference(), parity_llava)


@pytest.fixture(scope="module")
def ported(reference):
    return hf_tiny.port(reference.model)


@pytest.fixture(scope="module")
def stages(reference):
    return {side: reference.stages(hf_tiny.inputs(side=side)) for side in ("right", "left")}


@pytest.mark.parametrize("side", ["right", "left"])
def test_every_stage_logits_and_loss(ported, stages, side):
    _, graphdef, params = ported
    rows = parity.stage_rows(nnx.merge(graphdef, params), stages[side], hf_tiny.inputs(side=side))
    assert [row.stage for row in rows][-2:] == ["logits", "loss"]
    assert len(rows) == 1 + 3 + 2 + 3 + 2 + 1
    assert {row.stage: row.difference for row in rows if row.difference > TOLERANCE} == {}
    assert 1 < next(row.scale for row in rows if row.stage == "logits") < 30


def test_gradients_and_ten_adamw_steps(ported, reference):
    """On a fresh copy of the reference: the steps change it."""
    from medcg_jax.parity.pytorch import Reference

    _, graphdef, params = ported
    rows = parity.compare(
        graphdef, params, Reference(hf_tiny.reference(), parity_llava), hf_tiny.inputs(), ("projector", "decoder")
    )
    gradients = [row for row in rows if row.stage.startswith("gradient")]
    assert len(gradients) == 4 + 3 + 3 * 9
    assert {row.stage: row.difference for row in gradients if not row.difference < TOLERANCE} == {}
    losses = [row for row in rows if row.stage.startswith("loss before")]
    assert len(losses) == 10
    assert {row.stage: row.difference for row in losses if not row.difference < TOLERANCE} == {}
    assert losses[0].scale > losses[-1].scale + 0.5


def text(**fields):
    return lambda config: dataclasses.replace(config, text=dataclasses.replace(config.text, **fields))


def vision(**fields):
    return lambda config: dataclasses.replace(config, vision=dataclasses.replace(config.vision, **fields))


def tiled_heads(params):
    """Query heads in the order that `tile` instead of `repeat` of the key heads would give them."""
    order = np.array([0, 2, 1, 3])
    block = params["decoder"]["blocks"]
    block["q"]["kernel"] = block["q"]["kernel"][:, :, order]
    block["out"]["kernel"] = block["out"]["kernel"][:, order]


def no_class_token(params):
    params["vision"]["class_token"] = params["vision"]["class_token"] * 0


def swapped_gate(params):
    block = params["decoder"]["blocks"]
    block["gate"]["kernel"], block["up"]["kernel"] = block["up"]["kernel"], block["gate"]["kernel"]


def interleaved(x, angles):
    cos, sin = angles
    even, odd = x[..., ::2], x[..., 1::2]
    return jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1).reshape(x.shape)


def column_major(pixels, size):
    return clip_patches(pixels.swapaxes(1, 2), size)


clip_patches = clip.patches
# name -> (change of config, change of params, (module, name, replacement) in the code)
FAULTS = {
    "rope theta": (text(rope_theta=510.0), None, None),
    "norm eps": (text(norm_eps=1e-3), None, None),
    "clip norm eps": (vision(norm_eps=1e-3), None, None),
    "feature layer": (vision(feature_layer=-1), None, None),
    "class token": (None, no_class_token, None),
    "tiled heads": (None, tiled_heads, None),
    "gate and up": (None, swapped_gate, None),
    "tanh gelu": (None, None, (llava, "gelu", jax.nn.gelu)),
    "gelu in clip": (None, None, (blocks, "quick_gelu", partial(jax.nn.gelu, approximate=False))),
    "interleaved rope": (None, None, (blocks, "rotate", interleaved)),
    "patches by column": (None, None, (clip, "patches", column_major)),
    "images swapped": (
        None,
        None,
        (common, "merge_images", lambda x, f, m: merge_images(x, jnp.roll(f, 9, axis=1), m)),
    ),
}


@pytest.mark.parametrize("fault", every_other_long(FAULTS))
def test_faults_are_seen(fault, ported, reference, stages, monkeypatch):
    change, edit, patch = FAULTS[fault]
    config, graphdef, params = ported
    if change:
        config, graphdef, params = hf_tiny.port(reference.model, change=change)
    params = jax.tree.map(lambda w: w, params)
    if edit:
        edit(params)
    if patch:
        monkeypatch.setattr(*patch)
    inputs = hf_tiny.inputs()
    given = parity_llava.port_inputs(config, inputs)
    # A new function: what `run` has traced would hide a patch.
    fresh = jax.jit(lambda model, *args: run.__wrapped__(model, *args))
    logits = np.asarray(fresh(nnx.merge(graphdef, params), given["tokens"], given["images"], given["segment_ids"]))
    real = inputs["attention_mask"] != 0
    assert np.abs(logits - stages["right"]["logits"])[real].max() > 10 * TOLERANCE


@pytest.mark.parametrize("side", ["right", "left"])
def test_decoding_into_a_cache_is_the_full_forward(ported, side):
    """Prompts of different lengths, prefilled with their padding; then token by token behind it."""
    config, graphdef, params = ported
    model = nnx.merge(graphdef, params)
    inputs = hf_tiny.inputs(side=side)
    given = parity_llava.port_inputs(config, inputs)
    tokens, segments, images = given["tokens"], given["segment_ids"], given["images"]
    rows, length = tokens.shape
    more = jnp.asarray(np.random.default_rng(5).integers(3, 90, (rows, 3)), jnp.int32)
    all_segments = jnp.concatenate([segments, jnp.ones_like(more)], axis=1)
    full = run(model, jnp.concatenate([tokens, more], axis=1), images, all_segments)

    @jax.jit
    def step(model, tokens, images, segments, cache):
        hidden, cache = model.hidden(tokens, images, segment_ids=segments, cache=cache)
        return model.logits(hidden), cache

    prefill, cache = step(model, tokens, images, segments, model.init_cache(rows, length + 4))
    real = np.asarray(segments) != 0
    assert np.abs(np.asarray(prefill) - np.asarray(full[:, :length]))[real].max() < TOLERANCE
    for i in range(3):
        logits, cache = step(model, more[:, i : i + 1], None, None, cache)
        assert np.abs(np.asarray(logits[:, 0]) - np.asarray(full[:, length + i])).max() < TOLERANCE
    assert int(cache["index"]) == length + 3
    # Planted: padding forgotten, as if every slot were real.
    _, blind = step(model, tokens, images, jnp.ones_like(segments), model.init_cache(rows, length + 4))
    logits, _ = step(model, more[:, :1], None, None, blind)
    assert np.abs(np.asarray(logits[:, 0]) - np.asarray(full[:, length])).max() > 10 * TOLERANCE


def test_images_go_to_their_placeholders_in_order():
    x = -jnp.ones((2, 5, 1))
    features = jnp.arange(8.0).reshape(2, 4, 1)
    where = jnp.array([[0, 1, 1, 0, 1], [1, 0, 0, 0, 0]], bool)
    assert merge_images(x, features, where)[..., 0].tolist() == [[-1, 0, 1, -1, 2], [4, -1, -1, -1, -1]]


def test_bytes_are_normalised_and_floats_taken_as_they_are():
    config = clip.ClipVisionConfig()
    pixels = np.random.default_rng(0).integers(0, 256, (1, 2, 2, 3)).astype(np.uint8)
    expected = (pixels / 255 - np.array(config.image_mean)) / np.array(config.image_std)
    assert np.abs(np.asarray(clip.normalise(jnp.asarray(pixels), config)) - expected).max() < 1e-5
    given = jnp.asarray(expected, jnp.float32)
    assert clip.normalise(given, config) is given


def test_padding_images_and_ids_outside_the_vocabulary_change_nothing(ported):
    config, graphdef, params = ported
    model = nnx.merge(graphdef, params)
    given = parity_llava.port_inputs(config, hf_tiny.inputs())
    before = run(model, **given)
    other = jnp.where(given["segment_ids"] == 0, 10**6, given["tokens"])
    pixels = given["images"]["pixels"]
    more = {"pixels": jnp.concatenate([pixels, jnp.ones_like(pixels[:, :1])], axis=1)}
    after = run(model, other, more, given["segment_ids"])
    real = np.asarray(given["segment_ids"]) != 0
    assert np.abs(np.asarray(after - before))[real].max() < TOLERANCE


def test_shapes_and_sizes_that_do_not_fit_are_refused():
    config = llava15_tiny(20, 19)
    model = nnx.eval_shape(lambda: llava.Llava(config, rngs=nnx.Rngs(0)))
    tokens = jnp.zeros((2, 20), jnp.int32)
    with pytest.raises(ValueError, match=r"pixels \(2, 32, 32, 3\); expected \[batch, images, 32, 32, 3\]"):
        model.encode_images({"pixels": jnp.zeros((2, 32, 32, 3), jnp.uint8)})
    with pytest.raises(ValueError, match=r"segment_ids \(2, 3\) beside tokens \(2, 20\)"):
        model.hidden(tokens, segment_ids=jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"image_size_px=7; expected 8 \(a patch\) or more"):
        llava15_tiny(20, 19, image_size_px=7)
    # What is left over beyond whole patches belongs to none.
    assert llava15_tiny(20, 19, image_size_px=30).num_image_tokens == 9
    with pytest.raises(ValueError, match="num_heads=4 is no multiple of num_kv_heads=3"):
        llava15_tiny(20, 19, num_heads=4, num_kv_heads=3)
    with pytest.raises(ValueError, match="feature_layer=-4"):
        clip.ClipVisionConfig(num_layers=3, feature_layer=-4)
