"""Qwen2-VL against transformers on a tiny random model: stages, gradients, cache, sizes; and every fault it must see."""

import dataclasses
from functools import partial

import hf_tiny_qwen2_vl as hf_tiny
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_toys import every_other_long
from flax import nnx

from medcg_jax.families.qwen2_vl import model as qwen2_vl
from medcg_jax.families.qwen2_vl import vit as qwen2_vit
from medcg_jax.families.qwen2_vl.model import Qwen2VL
from medcg_jax.parity import qwen2_vl as parity_qwen2_vl
from medcg_jax.parity import verb as parity

TOLERANCE = 1e-4


run = jax.jit(lambda model, given: model(**given))


@pytest.fixture(scope="module")
def reference():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from medcg_jax.parity.pytorch import Reference

    return Reference(hf_tiny.reference(), parity_qwen2_vl)


@pytest.fixture(scope="module")
def ported(reference):
    return hf_tiny.port(reference.model)


@pytest.fixture(scope="module")
def model(ported):
    return nnx.merge(*ported[1:])


@pytest.fixture(scope="module")
def stages(reference):
    return {side: reference.stages(hf_tiny.inputs(side=side)) for side in ("right", "left")}


def port_inputs(config, side="right", num_slots=hf_tiny.SLOTS):
    return parity_qwen2_vl.port_inputs(config, hf_tiny.inputs(side=side), num_slots)


@pytest.mark.parametrize("side", ["right", "left"])
def test_every_stage_logits_and_loss(model, stages, side):
    rows = parity.stage_rows(model, stages[side], hf_tiny.inputs(side=side))
    assert [row.stage for row in rows] == list(stages[side])
    assert len(rows) == 1 + 3 + 1 + 1 + 3 + 1 + 2
    assert {row.stage: row.difference for row in rows if not row.ok} == {}
    assert 1 < next(row.scale for row in rows if row.stage == "logits") < 30


def test_gradients_and_ten_adamw_steps(ported):
    """Every tensor trains; on a fresh copy of the reference, since the steps change it."""
    from medcg_jax.parity.pytorch import Reference

    _, graphdef, params = ported
    fresh = Reference(hf_tiny.reference(), parity_qwen2_vl)
    rows = parity.compare(graphdef, params, fresh, hf_tiny.inputs(), ("vision", "projector", "decoder"))
    gradients = [row for row in rows if row.stage.startswith("gradient")]
    assert len(gradients) == 1 + 3 * 12 + 6 + 3 * 12 + 3
    assert {row.stage: row.difference for row in gradients if not row.difference < TOLERANCE} == {}
    losses = [row for row in rows if row.stage.startswith("loss before")]
    assert len(losses) == 10
    assert {row.stage: row.difference for row in losses if not row.difference < TOLERANCE} == {}
    assert losses[0].scale > losses[-1].scale + 0.5


def text(**fields):
    return lambda config: dataclasses.replace(config, text=dataclasses.replace(config.text, **fields))


def vision(**fields):
    return lambda config: dataclasses.replace(config, vision=dataclasses.replace(config.vision, **fields))


def no_qkv_bias(params):
    block = params["decoder"]["blocks"]
    for name in "qkv":
        block[name]["bias"] = block[name]["bias"] * 0


def keys_first(params):
    """Queries, keys and values of the vision tower in another order than the released rows have."""
    leaf = params["vision"]["blocks"]["qkv"]
    leaf["kernel"] = leaf["kernel"][..., np.r_[8:16, 0:8, 16:24]]
    leaf["bias"] = leaf["bias"][..., np.r_[8:16, 0:8, 16:24]]


def interleaved_sections(positions, config):
    order = np.argsort(np.arange(sum(config.mrope_sections)) % 3, kind="stable").argsort()
    cos, sin = mrope_angles(positions, config)
    axis = np.repeat(np.arange(3), config.mrope_sections)[order]
    turns = positions[..., axis] * qwen2_vl.frequencies(config.text.head_dim, config.text.rope_theta)
    return jnp.cos(turns)[:, :, None].reshape(cos.shape), jnp.sin(turns)[:, :, None].reshape(sin.shape)


def raster(grids, num, merge):
    return jnp.stack(jnp.divmod(jnp.arange(num), jnp.maximum(grids[:, 1:], 1)), axis=-1)


def counted(is_image, real, grids, num_slots):
    """Every token one further, as in a model of one dimension."""
    found = layout(is_image, real, grids, num_slots)
    return found._replace(positions=jnp.stack([jnp.cumsum(real, axis=1) - 1] * 3, axis=-1))


def turned(is_image, real, grids, num_slots):
    """Rows and columns of the tokens swapped."""
    found = layout(is_image, real, grids, num_slots)
    return found._replace(positions=found.positions[..., np.array([0, 2, 1])])


def second_of_slots(is_image, real, grids, num_slots):
    """The second image looked for right behind the first, as if that had no padding."""
    found = layout(is_image, real, grids, num_slots)
    return found._replace(slots=jnp.cumsum(is_image, axis=1) - 1)


mrope_angles, layout, patch_places = qwen2_vl.mrope_angles, qwen2_vl._layout, qwen2_vit.patch_places
# name -> (change of config, change of params, (module, name, replacement) in the code)
FAULTS = {
    "rope theta": (text(rope_theta=510.0), None, None),
    "norm eps": (text(norm_eps=1e-3), None, None),
    "vision norm eps": (vision(norm_eps=1e-3), None, None),
    "vision rope theta": (vision(rope_theta=1e3), None, None),
    "qkv bias": (None, no_qkv_bias, None),
    "order of q, k, v": (None, keys_first, None),
    "interleaved sections": (None, None, (qwen2_vl, "mrope_angles", interleaved_sections)),
    "rows and columns in vision": (None, None, (qwen2_vit, "patch_places", lambda *a: patch_places(*a)[..., ::-1])),
    "raster order": (None, None, (qwen2_vit, "patch_places", raster)),
    "rows and columns in text": (None, None, (qwen2_vl, "_layout", turned)),
    "positions counted": (None, None, (qwen2_vl, "_layout", counted)),
    "padding of images kept": (None, None, (qwen2_vl, "_layout", second_of_slots)),
    "padding seen in vision": (None, None, (qwen2_vit, "real_patches", lambda g, n: jnp.ones((len(g), n), jnp.int32))),
    "gelu in vision": (None, None, (qwen2_vit, "quick_gelu", partial(jax.nn.gelu, approximate=False))),
    "tanh gelu in merger": (None, None, (qwen2_vl, "gelu", jax.nn.gelu)),
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
    # A new function: what `run` has traced would hide a patch.
    fresh = jax.jit(lambda model, given: model(**given))
    logits = np.asarray(fresh(nnx.merge(graphdef, params), port_inputs(config)))
    real = hf_tiny.inputs()["attention_mask"] != 0
    assert np.abs(logits - stages["right"]["logits"])[real].max() > 10 * TOLERANCE


@pytest.mark.parametrize("side", ["right", "left"])
def test_positions_are_the_references(model, reference, side):
    import torch

    reference = reference.model
    inputs = {name: torch.from_numpy(value) for name, value in hf_tiny.inputs(side=side).items()}
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
    expected, deltas = reference.model.get_rope_index(**{name: inputs[name] for name in names})
    given = port_inputs(model.config, side)
    features = qwen2_vl.ImageFeatures(jnp.zeros((3, 14, 1)), given["images"]["grids"] // 2)
    found = model.layout(given["tokens"], given["segment_ids"], features).positions
    np.testing.assert_array_equal(np.asarray(found), expected.numpy().transpose(1, 2, 0))
    # A row's next token stands behind the furthest, which is what the reference's deltas say.
    after = np.asarray(found).max(axis=(1, 2)) + 1
    np.testing.assert_array_equal(after, deltas[:, 0].numpy() + hf_tiny.inputs()["attention_mask"].sum(axis=1))


def test_example_of_the_layout():
    is_image = jnp.array([[0, 0, 1, 1, 1, 1, 1, 1, 0, 0]], bool)
    found = qwen2_vl._layout(is_image, jnp.ones_like(is_image), jnp.array([[[2, 3]]]), 7)
    assert found.positions[0].T.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6], [0, 1, 2, 2, 2, 3, 3, 3, 5, 6], [0, 1, 2, 3, 4, 2, 3, 4, 5, 6]
    ]  # fmt: skip
    assert found.slots[0, 2:8].tolist() == [0, 1, 2, 3, 4, 5]
    expected = [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]
    assert qwen2_vit.patch_places(jnp.array([[2, 4]]), 8, 2)[0].tolist() == expected


@pytest.mark.parametrize("side", ["right", "left"])
def test_decoding_into_a_cache_is_the_full_forward(model, reference, side):
    """Rows of two, one and no images, prefilled with their padding; then token by token behind it, as HF continues."""
    import torch

    reference = reference.model
    given = port_inputs(model.config, side)
    tokens, segments, images = given["tokens"], given["segment_ids"], given["images"]
    rows, length = tokens.shape
    more = jnp.asarray(np.random.default_rng(5).integers(3, 90, (rows, 3)), jnp.int32)
    # What is generated may be any id, an image's too: it is text.
    more = more.at[1, 0].set(hf_tiny.IMAGE)

    @jax.jit
    def step(model, tokens, images, segments, cache):
        hidden, cache = model.hidden(tokens, images, segment_ids=segments, cache=cache)
        return model.logits(hidden), cache

    prefill, start = step(model, tokens, images, segments, model.init_cache(rows, length + 4))
    real = np.asarray(segments) != 0
    assert np.abs(np.asarray(prefill) - np.asarray(run(model, given)))[real].max() < TOLERANCE
    inputs = {name: torch.from_numpy(value) for name, value in hf_tiny.inputs(side=side).items() if name != "labels"}
    mask = inputs["attention_mask"]
    cache = start
    with torch.no_grad():
        theirs = reference(**inputs, use_cache=True)
        _, deltas = reference.model.get_rope_index(
            **{name: inputs[name] for name in ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")}
        )
        for i in range(3):
            logits, cache = step(model, more[:, i : i + 1], None, None, cache)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            at = (mask.sum(dim=1, keepdim=True) - 1 + deltas)[None].expand(3, -1, -1)
            embeds = reference.get_input_embeddings()(torch.from_numpy(np.array(more[:, i : i + 1])).long())
            theirs = reference(
                inputs_embeds=embeds, attention_mask=mask, position_ids=at, past_key_values=theirs.past_key_values,
                use_cache=True,
            )  # fmt: skip
            assert np.abs(np.asarray(logits) - theirs.logits.numpy()).max() < TOLERANCE
    assert int(cache["index"]) == length + 3
    np.testing.assert_array_equal(cache["next_position"], start["next_position"] + 3)
    # Planted: the next position counted by tokens, as if an image took one each.
    wrong = {**start, "next_position": jnp.asarray(segments.sum(axis=1), jnp.int32)}
    blind, _ = step(model, more[:, :1], None, None, wrong)
    right, _ = step(model, more[:, :1], None, None, start)
    difference = np.abs(np.asarray(blind - right)).max(axis=(1, 2))
    assert (difference[:2] > 10 * TOLERANCE).all() and difference[2] == 0


def test_a_prompt_in_two_parts_is_the_whole(model):
    """The second part has an image of its own, and stands behind the first part's."""
    given = port_inputs(model.config)
    images = {key: value[:1] for key, value in given["images"].items()}
    tokens = given["tokens"][:1, : int(given["segment_ids"][0].sum())]
    cut = int(jnp.argmax(tokens[0] == hf_tiny.END)) + 1

    @jax.jit
    def in_two(model, tokens, images):
        cache, parts = model.init_cache(1, tokens.shape[1]), []
        for i, part in enumerate((tokens[:, :cut], tokens[:, cut:])):
            own = {key: value[:, i : i + 1] for key, value in images.items()}
            hidden, cache = model.hidden(part, own, cache=cache)
            parts.append(hidden)
        return model.logits(jnp.concatenate(parts, axis=1))

    whole = run(model, {"tokens": tokens, "images": images})
    assert np.abs(np.asarray(in_two(model, tokens, images) - whole)).max() < TOLERANCE


@pytest.mark.parametrize("num_slots", [24, 40])
def test_room_for_patches_images_and_ids_outside_the_vocabulary_change_nothing(model, stages, num_slots):
    given = port_inputs(model.config, num_slots=num_slots)
    given["tokens"] = jnp.where(given["segment_ids"] == 0, 10**6, given["tokens"])
    images = (given["images"][key] for key in Qwen2VL.image_keys)
    pixels, grids = (jnp.pad(x, [(0, 0), (0, 1), *[(0, 0)] * (x.ndim - 2)]) for x in images)
    # What stands in the slots of padding is never seen.
    real = qwen2_vit.real_patches(grids.reshape(-1, 2), num_slots).reshape(pixels.shape[:3])
    given["images"] = {"pixels": jnp.where(real[..., None] != 0, pixels, 7.0), "grids": grids}
    kept = np.asarray(given["segment_ids"]) != 0
    assert np.abs(np.asarray(run(model, given)) - stages["right"]["logits"])[kept].max() < TOLERANCE


def test_bytes_are_normalised_and_features_may_be_passed(model):
    given = port_inputs(model.config)
    config = model.config.vision
    grids, shape = given["images"]["grids"], given["images"]["pixels"].shape
    bytes_ = jnp.asarray(np.random.default_rng(0).integers(0, 256, shape), jnp.uint8)
    apart = np.asarray(bytes_, np.float32).reshape(*shape[:3], 3, -1) / 255
    floats = (apart - np.array(config.image_mean)[:, None]) / np.array(config.image_std)[:, None]
    normalised = {"pixels": jnp.asarray(floats.reshape(shape), jnp.float32), "grids": grids}
    expected = run(model, {**given, "images": normalised})
    encode = jax.jit(lambda m, images: m.encode_images(images))
    features = encode(model, {"pixels": bytes_, "grids": grids})
    call = jax.jit(lambda m, tokens, segments, features: m(tokens, segment_ids=segments, image_features=features))
    found = call(model, given["tokens"], given["segment_ids"], features)
    kept = np.asarray(given["segment_ids"]) != 0
    assert np.abs(np.asarray(found - expected))[kept].max() < TOLERANCE
