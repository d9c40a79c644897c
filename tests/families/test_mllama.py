"""Llama-3.2-Vision against transformers on a tiny random model: stages, logits, gradients; and faults it must see."""

import copy
import dataclasses

import hf_tiny_mllama as tiny
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_toys import every_other_long
from flax import nnx

from medcg_jax.families.mllama import model as mllama
from medcg_jax.families.mllama import vit as mllama_vit
from medcg_jax.families.mllama.model import Mllama, llama32_vision_tiny
from medcg_jax.families.mllama.text import images_in_view
from medcg_jax.families.mllama.vit import MllamaVision, MllamaVisionConfig
from medcg_jax.families.weights import engine
from medcg_jax.families.weights import mllama as weights
from medcg_jax.families.weights.files import WeightsError
from medcg_jax.nn.rope import Llama3Scaling
from medcg_jax.parity import mllama as parity_mllama
from medcg_jax.parity.verb import loss

TOLERANCE = 1e-4
CASES = {"right": {}, "left": {"side": "left"}, "a row without an image": {"text_only": True}}
run = jax.jit(lambda model, given: model(**given))
encode = jax.jit(lambda model, images: model.encode_images(images))
run_text = jax.jit(lambda model, tokens, ids, features: model(tokens, segment_ids=ids, image_features=features))


@jax.jit
def step(model, tokens, features, segment_ids, cache):
    hidden, cache = model.hidden(tokens, segment_ids=segment_ids, image_features=features, cache=cache)
    return model.logits(hidden), cache


@pytest.fixture(scope="module")
def reference():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    return tiny.reference()


@pytest.fixture(scope="module")
def ported(reference):
    return tiny.port(reference)


@pytest.fixture(scope="module")
def stages(reference):
    return {name: tiny.reference_stages(reference, tiny.inputs(**case)) for name, case in CASES.items()}


def worst(ours, theirs) -> float:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.abs(ours - theirs).max() / max(1.0, np.abs(theirs).max()))


@pytest.mark.parametrize("case", CASES)
def test_every_stage_logits_and_loss(ported, stages, case):
    _, graphdef, params = ported
    inputs, theirs = tiny.inputs(**CASES[case]), stages[case]
    found = parity_mllama.port_stages(nnx.merge(graphdef, params), tiny.port_inputs(inputs))
    assert set(found) == set(theirs) - {"loss"}
    assert len(found) == 1 + 4 + 1 + 2 + 2 + 1 + 6 + 2
    real = inputs["attention_mask"] != 0
    differences = {}
    for name, ours in found.items():
        keep = ... if name.startswith(("vision", "projector")) else real
        assert ours.shape == theirs[name].shape
        differences[name] = worst(ours[keep], theirs[name][keep])
    differences["loss"] = worst(loss(found["logits"], inputs["labels"]), theirs["loss"])
    assert {name: value for name, value in differences.items() if not value < TOLERANCE} == {}
    assert 1 < np.abs(theirs["logits"][real]).max() < 30


def test_gradients_of_every_tensor(ported, reference):
    import torch

    config, graphdef, params = ported
    inputs = tiny.inputs()
    reference.zero_grad()
    reference(**{name: torch.from_numpy(value) for name, value in inputs.items()}, use_cache=False).loss.backward()
    theirs = {weights.canonical(name): p.grad.numpy() for name, p in reference.named_parameters()}

    @jax.jit
    @jax.grad
    def differentiate(params, given):
        return loss(nnx.merge(graphdef, params)(**given), inputs["labels"])

    ours = dict(engine.store(weights.table(config), differentiate(params, tiny.port_inputs(inputs)))[1])
    assert set(ours) == set(theirs)
    assert len(ours) == 13 + 1 + 4 * 12 + 2 * 14 + 2 + 4 * 9 + 2 * 13 + 2
    # Every tensor is trained: each gradient has a scale of its own.
    scales = {name: np.abs(value).max() for name, value in theirs.items()}
    assert min(scales.values()) > 1e-6
    differences = {name: np.abs(ours[name] - theirs[name]).max() / scales[name] for name in ours}
    assert {name: value for name, value in differences.items() if not value < TOLERANCE} == {}


def test_the_outputs_of_inner_layers_where_asked(ported, reference, stages):
    """Transformers' rule for its own indices; and the two rules differ for equal ones."""
    config, graphdef, params = tiny.port(
        reference, change=lambda config: dataclasses.replace(config, intermediate_from="output")
    )
    assert config.vision.intermediate_layers == tuple(tiny.TAKEN)
    images = tiny.port_inputs(tiny.inputs())["images"]
    found = encode(nnx.merge(graphdef, params), images)["features"]
    assert worst(found, stages["right"]["projector"].reshape(found.shape)) < TOLERANCE
    with pytest.raises(ValueError, match="intermediate_from='both'; accepted: input, output"):
        nnx.eval_shape(lambda: Mllama(dataclasses.replace(config, intermediate_from="both"), rngs=nnx.Rngs(0)))


def test_the_example_of_parity_with_the_files_own_indices(reference):
    """Of a checkpoint as it is, once transformers is told to take what Meta's model takes."""
    other = copy.deepcopy(reference)
    own = weights.config_from_json(other.config.to_dict())
    moved, notes = parity_mllama.runnable(own)
    assert (own.intermediate_from, moved.intermediate_from) == ("input", "output")
    assert len(notes) == 1 and "[0, 2] hold layer 0" in notes[0]
    parity_mllama.prepare(other, moved)
    assert other.model.vision_model.intermediate_layers_indices == [0, 2]
    other.config.vision_config.intermediate_layers_indices = [1, 3]
    other.model.vision_model.intermediate_layers_indices = [1, 3]
    config, graphdef, params = tiny.port(other, change=lambda config: config)
    inputs = parity_mllama.example(config)
    given, real = parity_mllama.port_inputs(config, inputs), inputs["attention_mask"] != 0
    found = np.asarray(run(nnx.merge(graphdef, params), given))[real]
    assert worst(found, tiny.reference_stages(other, inputs)["logits"][real]) > 10 * TOLERANCE
    parity_mllama.prepare(other, config)
    assert worst(found, tiny.reference_stages(other, inputs)["logits"][real]) < TOLERANCE
    with pytest.raises(WeightsError, match="lack aspect_ratio_mask"):
        parity_mllama.port_inputs(config, {name: x for name, x in inputs.items() if name != "aspect_ratio_mask"})
    with pytest.raises(WeightsError, match=r"pixel_values \(2, 1, 3, .*: expected \[B, T\]"):
        parity_mllama.port_inputs(config, {**inputs, "pixel_values": inputs["pixel_values"][:, :, :3]})


def test_tokens_without_an_image_attend_to_none_where_asked(ported, reference):
    """Meta's rule: transformers' numbers with its attention's output silenced there; a text-only row is text alone."""
    import torch

    config, graphdef, params = tiny.port(
        reference,
        change=lambda config: dataclasses.replace(tiny.metas_inputs(config), mask_text_only_rows_attention=True),
    )
    inputs = tiny.inputs(text_only=True)
    sees = torch.from_numpy(inputs["cross_attention_mask"].any(axis=(-2, -1)))[..., None]
    hooks = [
        reference.model.language_model.layers[i].cross_attn.register_forward_hook(
            lambda _, __, out: (out[0] * sees, out[1])
        )
        for i in config.text.cross_layers
    ]
    try:
        theirs = tiny.reference_stages(reference, inputs)["logits"]
    finally:
        for hook in hooks:
            hook.remove()
    given, real = tiny.port_inputs(inputs), inputs["attention_mask"] != 0
    model = nnx.merge(graphdef, params)
    ours = np.asarray(run(model, given))
    assert worst(ours[real], theirs[real]) < TOLERANCE
    alone = np.asarray(run(model, {**given, "images": None}))
    assert worst(ours[1][real[1]], alone[1][real[1]]) < TOLERANCE
    assert worst(ours[0][real[0]], alone[0][real[0]]) > 10 * TOLERANCE


def test_text_alone_leaves_the_cross_attention_out(ported, reference):
    import torch

    _, graphdef, params = ported
    inputs = tiny.inputs()
    ids, mask = (inputs[name] for name in ("input_ids", "attention_mask"))
    ids = np.where(ids == tiny.IMAGE, 5, ids)
    with torch.no_grad():
        theirs = reference(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).logits.numpy()
    given = {"tokens": jnp.asarray(ids, jnp.int32), "segment_ids": jnp.asarray(mask, jnp.int32), "images": None}
    ours = np.asarray(run(nnx.merge(graphdef, params), given))
    assert worst(ours[mask != 0], theirs[mask != 0]) < TOLERANCE


def test_groups_that_end_in_cross_attention(reference):
    other = tiny.reference(3, num_hidden_layers=4, cross_attention_layers=[1, 3])
    _, graphdef, params = tiny.port(other)
    inputs = tiny.inputs()
    theirs = tiny.reference_stages(other, inputs)["logits"]
    ours = np.asarray(run(nnx.merge(graphdef, params), tiny.port_inputs(inputs)))
    real = inputs["attention_mask"] != 0
    assert worst(ours[real], theirs[real]) < TOLERANCE


def text(**fields):
    return lambda config: dataclasses.replace(config, text=dataclasses.replace(config.text, **fields))


def vision(**fields):
    return lambda config: dataclasses.replace(config, vision=dataclasses.replace(config.vision, **fields))


def edit(*path, to=None):
    def change(params):
        *parents, last = path
        part = params
        for name in parents:
            part = part[name]
        part[last] = to(part[last]) if callable(to) else jnp.full_like(part[last], to)

    return change


def side_by_side(kernel):
    """The projector's rows as if the inner layers' channels stood one layer behind the other."""
    return kernel.at[36:].set(kernel[36:].reshape(2, 36, -1).swapaxes(0, 1).reshape(72, -1))


def only_real_keys(self, num_tiles):
    allowed = whole_mask(self, num_tiles)
    real = allowed.all(axis=-1)
    return jnp.broadcast_to(real[:, None, :], allowed.shape)


def from_the_first(*given):
    first, following = images_in_view(*given)
    return 0 * first, following


whole_mask = MllamaVision.allowed
# name -> (change of config, change of params, (object, name, replacement) in the code)
VISION_FAULTS = {
    "intermediate layers off by one": (lambda c: dataclasses.replace(c, intermediate_from="output"), None, None),
    "plain concatenation": (None, edit("projector", "kernel", to=side_by_side), None),
    "norm eps": (vision(norm_eps=1e-2), None, None),
    "ungated attention": (None, edit("vision", "global_blocks", "attention_gate", to=20.0), None),
    "ungated mlp": (None, edit("vision", "global_blocks", "mlp_gate", to=20.0), None),
    "inert position gate": (None, edit("vision", "position_gate", to=0.0), None),
    "inert gate before": (None, edit("vision", "pre_tile_gate", to=0.0), None),
    "inert gate behind": (None, edit("vision", "post_tile_gate", to=0.0), None),
    "masked tiles": (None, None, (MllamaVision, "allowed", only_real_keys)),
    "tanh gelu": (None, None, (mllama_vit, "gelu", jax.nn.gelu)),
}
TEXT_FAULTS = {
    "rope scaling": (text(rope_scaling=None), None, None),
    "rope scaling's range": (text(rope_scaling=Llama3Scaling(original_positions=128)), None, None),
    "norm eps": (text(norm_eps=1e-3), None, None),
    "place of the cross-attention": (text(cross_layers=(0, 3)), None, None),
    "silent rows": (lambda c: dataclasses.replace(c, mask_text_only_rows_attention=True), None, None),
    "inert attention gate": (None, edit("decoder", "cross", "attention_gate", to=0.0), None),
    "inert mlp gate": (None, edit("decoder", "cross", "mlp_gate", to=0.0), None),
    "no key norm": (None, edit("decoder", "cross", "k_norm", "scale", to=1.0), None),
    "tiled heads": (None, edit("decoder", "cross", "q", "kernel", to=lambda w: w[:, :, np.array([0, 2, 1, 3])]), None),
    "every image before is in view": (None, None, (mllama, "images_in_view", from_the_first)),
}


def faulty(fault, ported, monkeypatch):
    """The model with one fault in it, and the two functions that run it, compiled anew where its program differs."""
    change, edited, patch = fault
    config, graphdef, params = ported
    if change:
        graphdef, _ = nnx.split(nnx.eval_shape(lambda: Mllama(change(config), rngs=nnx.Rngs(0))))
    params = jax.tree.map(lambda w: w, params)
    if edited:
        edited(params)
    if patch:
        monkeypatch.setattr(*patch)
    fresh = lambda f: jax.jit(lambda *args: f.__wrapped__(*args)) if patch else f
    return nnx.merge(graphdef, params), fresh(encode), fresh(run_text)


@pytest.mark.parametrize("fault", every_other_long(VISION_FAULTS))
def test_faults_of_the_encoder_are_seen(fault, ported, stages, monkeypatch):
    model, encode, _ = faulty(VISION_FAULTS[fault], ported, monkeypatch)
    found = encode(model, tiny.port_inputs(tiny.inputs())["images"])["features"]
    assert np.abs(found - stages["right"]["projector"].reshape(found.shape)).max() > 10 * TOLERANCE


def test_tile_by_tile_is_all_at_once(ported, stages, monkeypatch):
    model, _, _ = faulty((None, None, None), ported, monkeypatch)
    monkeypatch.setattr(mllama_vit, "TOKENS_AT_ONCE", 95)
    found = jax.jit(lambda model, images: model.encode_images(images))(
        model, tiny.port_inputs(tiny.inputs())["images"]
    )["features"]
    assert worst(found, stages["right"]["projector"].reshape(found.shape)) < TOLERANCE


@pytest.fixture(scope="module")
def features(ported):
    _, graphdef, params = ported
    return encode(nnx.merge(graphdef, params), tiny.port_inputs(tiny.inputs())["images"])


@pytest.mark.parametrize("fault", [*TEXT_FAULTS, "absent tiles", "none"])
def test_faults_of_the_decoder_are_seen(fault, ported, stages, features, monkeypatch):
    model, _, run_text = faulty(TEXT_FAULTS.get(fault, (None,) * 3), ported, monkeypatch)
    inputs = tiny.inputs()
    given, real = tiny.port_inputs(inputs), inputs["attention_mask"] != 0
    if fault == "absent tiles":
        features = {**features, "num_tiles": jnp.full_like(features["num_tiles"], 4)}
    logits = np.asarray(run_text(model, given["tokens"], given["segment_ids"], features))
    difference = np.abs(logits - stages["right"]["logits"])[real].max()
    assert difference < TOLERANCE if fault == "none" else difference > 10 * TOLERANCE


@pytest.mark.parametrize("side", ["right", "left"])
def test_decoding_into_a_cache_is_the_full_forward(ported, features, side):
    """Prompts of different lengths and images, prefilled with their padding; then token by token without images."""
    _, graphdef, params = ported
    model = nnx.merge(graphdef, params)
    given = tiny.port_inputs(tiny.inputs(side=side))
    tokens, segments = given["tokens"], given["segment_ids"]
    rows, length = tokens.shape
    more = jnp.asarray(np.random.default_rng(5).integers(3, 90, (rows, 3)), jnp.int32)
    whole = jnp.concatenate([tokens, more], axis=1), jnp.concatenate([segments, jnp.ones_like(more)], axis=1)
    full = np.asarray(run_text(model, *whole, features))
    prefill, cache = step(model, tokens, features, segments, model.init_cache(rows, length + 4))
    real = np.asarray(segments) != 0
    assert worst(np.asarray(prefill)[real], full[:, :length][real]) < TOLERANCE
    blind = {name: value for name, value in cache.items() if name not in ("cross_k", "cross_v", "num_tiles")}
    for i in range(3):
        logits, cache = step(model, more[:, i : i + 1], None, None, cache)
        assert worst(logits[:, 0], full[:, length + i]) < TOLERANCE
    assert int(cache["index"]) == length + 3
    # Planted: the images forgotten.
    logits, _ = step(model, more[:, :1], None, None, blind)
    assert worst(logits[:, 0], full[:, length]) > 10 * TOLERANCE


def test_a_prompt_in_two_calls_is_the_prompt_in_one(ported, features, stages):
    """The second call holds image tokens of the images that came with the first."""
    _, graphdef, params = ported
    model = nnx.merge(graphdef, params)
    given = tiny.port_inputs(tiny.inputs(side="left"))
    tokens, segments = given["tokens"], given["segment_ids"]
    _, cache = step(model, tokens[:, :7], features, segments[:, :7], model.init_cache(*tokens.shape))
    logits, _ = step(model, tokens[:, 7:], None, segments[:, 7:], cache)
    real = np.asarray(segments)[:, 7:] != 0
    assert worst(np.asarray(logits)[real], stages["left"]["logits"][:, 7:][real]) < TOLERANCE


def test_images_in_view_are_those_of_transformers():
    processing = pytest.importorskip("transformers.models.mllama.processing_mllama")
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 3, (40, 12))
    first, following = (np.asarray(part) for part in images_in_view(jnp.asarray(ids == 0)))
    for row, (start, end) in enumerate(zip(first, following, strict=True)):
        spans = processing.get_cross_attention_token_mask(ids[row].tolist(), 0)
        mask = processing.convert_sparse_cross_attention_mask_to_dense([spans], [[1] * len(spans)], 1, 12)[0, :, :, 0]
        images = np.arange(len(spans))
        np.testing.assert_array_equal((start[:, None] <= images) & (images < end[:, None]), mask)


def test_absent_tiles_are_zero_behind_the_norm_whatever_they_hold(ported):
    config, graphdef, params = ported
    vision = nnx.merge(graphdef, params).vision
    pixels = np.random.default_rng(2).integers(0, 256, (1, 4, 28, 28, 3)).astype(np.uint8)
    two = jnp.full(1, 2, jnp.int32)
    mean, std = np.array(config.vision.image_mean), np.array(config.vision.image_std)
    zeros = np.where(np.arange(4)[:, None, None, None] < 2, (pixels / 255 - mean) / std, 0).astype(np.float32)
    embed = jax.jit(lambda pixels, tiles: vision.embed(pixels, two, tiles, jnp.float32))
    found = embed(pixels, two)
    assert worst(found, embed(zeros, two)) < TOLERANCE
    assert worst(found, embed(pixels, two + 2)) > 10 * TOLERANCE


def test_shapes_and_sizes_that_do_not_fit_are_refused():
    config = llama32_vision_tiny(24, 23)
    model = nnx.eval_shape(lambda: Mllama(config, rngs=nnx.Rngs(0)))
    images = {"pixels": jnp.zeros((2, 32, 32, 3), jnp.uint8), "aspect_ratio_ids": jnp.zeros((2, 1), jnp.int32)}
    with pytest.raises(ValueError, match=r"pixels \(2, 32, 32, 3\); expected \[batch, images, 4, 32, 32, 3\]"):
        model.encode_images(images)
    images |= {"pixels": jnp.zeros((2, 1, 4, 32, 32, 3), jnp.uint8), "num_tiles": jnp.zeros(2, jnp.int32)}
    with pytest.raises(ValueError, match=r"num_tiles \(2,\) beside pixels .*; expected \[batch, images\]"):
        model.encode_images(images)
    with pytest.raises(ValueError, match=r"segment_ids \(2, 3\) beside tokens \(2, 20\)"):
        model.hidden(jnp.zeros((2, 20), jnp.int32), segment_ids=jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"intermediate_layers=\(5, 2\); expected rising layers of 0 to 31"):
        MllamaVisionConfig(intermediate_layers=(5, 2))
    with pytest.raises(ValueError, match="num_heads=4 is no multiple of num_kv_heads=3"):
        llama32_vision_tiny(24, 23, num_kv_heads=3)
