"""Released LLaVA checkpoints: every spelling and layout, round trips through PyTorch, and strictness."""

import dataclasses
import json

import hf_tiny
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from releases import one, same, write

from medcg_jax.config import ConfigError, MeshConfig
from medcg_jax.families import build
from medcg_jax.families.llava.model import llava15_7b, llava15_tiny
from medcg_jax.families.weights import llava
from medcg_jax.families.weights.convert import convert, export, load_checkpoint, read_config
from medcg_jax.families.weights.files import WeightsError
from medcg_jax.mesh import make_mesh
from medcg_jax.parity import llava as parity_llava


@pytest.fixture(scope="module")
def model():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    return hf_tiny.reference()


@pytest.fixture(scope="module")
def state(model):
    return {name: value.numpy() for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def ported(model):
    return hf_tiny.port(model)


@pytest.fixture(scope="module")
def released(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("released")
    model.save_pretrained(directory)
    return directory


def original(name: str) -> str:
    """liuhaotian's spelling of transformers' name."""
    name = name.replace("model.language_model.", "model.")
    name = name.replace("model.vision_tower.", "model.vision_tower.vision_tower.vision_model.")
    name = name.replace("model.multi_modal_projector.linear_1", "model.mm_projector.0")
    return name.replace("model.multi_modal_projector.linear_2", "model.mm_projector.2")


SPELLINGS = {
    "transformers 5": lambda name: name,
    "llava-hf": lambda name: llava.released_name(llava.canonical(name)),
    "transformers 4.52": lambda name: name.replace("model.vision_tower.", "model.vision_tower.vision_model."),
    "canonical": llava.canonical,
    "liuhaotian": original,
}


def test_spellings_differ():
    names = {spell("model.language_model.layers.0.mlp.up_proj.weight") for spell in SPELLINGS.values()}
    assert len(names) == 4
    names = {spell("model.vision_tower.encoder.layers.0.mlp.fc1.weight") for spell in SPELLINGS.values()}
    assert len(names) == 5


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_loads_to_the_same_parameters(spelling, model, state, ported, tmp_path):
    renamed = {SPELLINGS[spelling](name): value for name, value in state.items()}
    renamed["model.language_model.rotary_emb.inv_freq"] = np.zeros(3, np.float32)
    write(tmp_path, renamed, model.config.to_dict())
    config, graphdef, params = ported
    found, loaded = load_checkpoint(tmp_path, config, one())
    same(loaded, params)
    assert found == graphdef


def test_loads_straight_into_shardings(released, ported):
    config, _, params = ported
    mesh = make_mesh(MeshConfig(data=4, fsdp=2, tensor=1))
    _, loaded = load_checkpoint(released, config, mesh)
    same(jax.device_put(loaded, jax.devices()[0]), params)
    kernel = loaded["decoder"]["blocks"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (3, 20, 72)
    assert kernel.sharding == build.shardings(config, mesh)["decoder"]["blocks"]["up"]["kernel"]


def test_saved_here_it_reloads_in_pytorch_with_equal_logits(model, ported, released, tmp_path):
    import torch
    from transformers import LlavaForConditionalGeneration

    config, graphdef, params = ported
    export(params, config, tmp_path / "hf")
    theirs, report = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "hf", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before, after = model.state_dict(), theirs.state_dict()
    assert set(before) == set(after)
    for name, value in before.items():
        np.testing.assert_array_equal(after[name].numpy(), value.numpy())
    inputs = {name: torch.from_numpy(value) for name, value in hf_tiny.inputs().items()}
    with torch.no_grad():
        assert torch.equal(theirs(**inputs).logits, model(**inputs).logits)
    # A change made here arrives there.
    params = jax.tree.map(lambda w: w, params)
    params["decoder"]["norm"]["scale"] = params["decoder"]["norm"]["scale"] * 1.5
    export(params, config, tmp_path / "changed")
    changed = LlavaForConditionalGeneration.from_pretrained(tmp_path / "changed", attn_implementation="eager")
    with torch.no_grad():
        theirs = changed(**inputs).logits.numpy()
    given = parity_llava.port_inputs(config, hf_tiny.inputs())
    ours = jax.jit(lambda m, **given: m(**given))(nnx.merge(graphdef, params), **given)
    real = hf_tiny.inputs()["attention_mask"] != 0
    assert np.abs(np.asarray(ours) - theirs)[real].max() < 1e-4
    assert np.abs(theirs - model(**inputs).logits.detach().numpy())[real].max() > 1e-2


def test_liuhaotians_bins_and_a_whole_clip(model, state, ported, tmp_path):
    import torch

    config, _, params = ported
    llm = {original(name): torch.from_numpy(x) for name, x in state.items() if "vision_tower" not in name}
    names = sorted(llm)
    source = tmp_path / "llava-v1.5"
    source.mkdir()
    shards = [names[::2], names[1::2]]
    for i, shard in enumerate(shards):
        torch.save({name: llm[name] for name in shard}, source / f"pytorch_model-{i}.bin")
    index = {"weight_map": {name: f"pytorch_model-{i}.bin" for i, shard in enumerate(shards) for name in shard}}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    text = {**hf_tiny.TEXT, "model_type": "llava_llama", "pad_token_id": hf_tiny.PAD, "rope_theta": 500.0}
    text |= {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch"}
    (source / "config.json").write_text(json.dumps({**text, "mm_vision_tower": "openai/clip-vit-large-patch14-336"}))
    config = dataclasses.replace(config, image_token_id=32000)
    with pytest.raises(WeightsError, match="holds no vision tower; pass --clip=DIR"):
        llava.open_release(source, {})
    clip = tmp_path / "clip-vit-large-patch14-336"
    tower = {
        name.replace("model.vision_tower.", "vision_model."): x for name, x in state.items() if "vision_tower" in name
    }
    tower |= {"logit_scale": np.zeros((), np.float32), "text_model.final_layer_norm.weight": np.zeros(3, np.float32)}
    tower |= {name: np.zeros((2, 3), np.float32) for name in ("visual_projection.weight", "text_projection.weight")}
    tower["vision_model.embeddings.position_ids"] = np.zeros((1, 10), np.float32)
    write(clip, tower, {"model_type": "clip", "vision_config": hf_tiny.VISION})
    # Beside the source it is found; elsewhere it is named.
    same(load_checkpoint(source, config, one())[1], params)
    clip.rename(tmp_path / "elsewhere")
    same(load_checkpoint(source, config, one(), parts={"clip": tmp_path / "elsewhere"})[1], params)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("lm_head.weight"), "1 missing: lm_head.weight; no unused"),
        (lambda s: s.update({"model.language_model.layers.9.mlp.up_proj.weight": np.zeros(2, np.float32)}),
         "1 unused: language_model.layers.9.mlp.up_proj.weight"),
        (lambda s: s.update({"model.vision_tower.encoder.layers.3.mlp.fc1.bias": np.zeros(2, np.float32)}),
         r"1 misshapen: vision_tower.encoder.layers.3.mlp.fc1.bias \(2,\) instead of \(52,\)"),
        (lambda s: s.update({"language_model.model.norm.weight": np.zeros(40, np.float32)}),
         "holds language_model.norm.weight twice"),
        (lambda s: s.update({"lm_head.weight": s["lm_head.weight"][:-1]}), r"misshapen: lm_head.weight \(100, 40\)"),
    ],
)  # fmt: skip
def test_missing_unused_and_misshapen_tensors_stop_the_load(change, message, model, state, ported, tmp_path):
    state = dict(state)
    change(state)
    write(tmp_path, state, model.config.to_dict())
    with pytest.raises(WeightsError, match=message):
        load_checkpoint(tmp_path, ported[0], one())


def test_rows_beyond_the_vocabulary_are_dropped_and_added_again(model, released, ported, tmp_path):
    config, _, params = ported
    fewer = dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=90))
    _, loaded = load_checkpoint(released, fewer, one())
    np.testing.assert_array_equal(loaded["decoder"]["embed"]["table"], params["decoder"]["embed"]["table"][:90])
    np.testing.assert_array_equal(loaded["decoder"]["head"]["kernel"], params["decoder"]["head"]["kernel"][:, :90])
    export(loaded, fewer, tmp_path)
    found = read_config(tmp_path)
    assert found.text.vocab_size == 128
    _, again = load_checkpoint(tmp_path, found, one())
    head = np.asarray(again["decoder"]["head"]["kernel"])
    np.testing.assert_allclose(head[:, 90:], np.repeat(head[:, :90].mean(axis=1, keepdims=True), 38, axis=1), atol=1e-6)


def test_converted_and_back(released, ported, tmp_path):
    config, graphdef, params = ported
    (released / "tokenizer.json").write_text("{}")
    there = convert(released, tmp_path / "orbax")
    assert there["parameters"] == build.num_params(params)
    assert there["dtype"] == "float32"
    assert (tmp_path / "orbax" / "tokenizer.json").read_text() == "{}"
    assert read_config(tmp_path / "orbax").text == config.text
    mesh = make_mesh(MeshConfig(data=4, fsdp=2, tensor=1))
    found, loaded = load_checkpoint(tmp_path / "orbax", config, mesh)
    same(jax.device_put(loaded, jax.devices()[0]), params)
    assert found == graphdef
    assert loaded["decoder"]["embed"]["table"].addressable_shards[0].data.shape == (101, 20)
    fewer = dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=90))
    assert load_checkpoint(tmp_path / "orbax", fewer, one())[1]["decoder"]["head"]["kernel"].shape == (40, 90)
    back = convert(tmp_path / "orbax", tmp_path / "hf", to="hf")
    assert back["tensors"] == there["tensors"]
    same(load_checkpoint(tmp_path / "hf", config, one())[1], params)
    with pytest.raises(WeightsError, match="exists and is not empty"):
        convert(released, tmp_path / "hf")
    with pytest.raises(WeightsError, match="to='onnx'; accepted: orbax, hf"):
        convert(released, tmp_path / "new", to="onnx")


def test_sixteen_bits_stay_sixteen_bits_and_widen_when_asked(ported, tmp_path):
    config, _, params = ported
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    export(params, config, tmp_path / "hf")
    assert convert(tmp_path / "hf", tmp_path / "orbax")["dtype"] == "bfloat16"
    _, loaded = load_checkpoint(tmp_path / "orbax", config, one())
    same(loaded, jax.tree.map(lambda w: w.astype(jnp.float32), params))


def test_another_architecture_is_refused_by_field(released, ported):
    config = dataclasses.replace(ported[0], text=dataclasses.replace(ported[0].text, rope_theta=1e4, num_layers=2))
    with pytest.raises(WeightsError, match=r"text.num_layers 3 \(wanted 2\), text.rope_theta 500.0 \(wanted 10000.0\)"):
        load_checkpoint(released, config, one())


def test_a_directory_without_weights_says_where_to_get_them(tmp_path):
    for error in (WeightsError, ConfigError):
        with pytest.raises(error, match="hf download llava-hf/llava-1.5-7b-hf"):
            read_config(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(WeightsError, match="holds no weights"):
        load_checkpoint(tmp_path, read_config(tmp_path), one())


# config.json of llava-hf/llava-1.5-7b-hf: what is left out has transformers' default.
RELEASED_7B = {
    "model_type": "llava", "image_token_index": 32000, "pad_token_id": 32001, "projector_hidden_act": "gelu",
    "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
    "text_config": {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "vocab_size": 32064},
    "vision_config": {
        "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model",
        "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
        "vocab_size": 32000,
    },
}  # fmt: skip


def test_the_released_config_is_the_7b_model():
    found = llava.config_from_json(RELEASED_7B)
    expected = llava15_7b(pad_token_id=32001)
    assert found == dataclasses.replace(expected, text=dataclasses.replace(expected.text, vocab_size=32064))


def test_config_goes_both_ways():
    config = llava15_tiny(40, 39, num_kv_heads=1, rope_theta=77.0)
    assert llava.config_from_json(llava.config_to_json(config, "float32")) == config


def test_the_table_fills_every_parameter_of_7b_once():
    from medcg_jax.families.weights import engine

    _, params = build.abstract(llava15_7b())
    found = engine.slots(llava.table(llava15_7b()), params)
    # 24 layers of 16, 7 around them; the projector's 4; 32 layers of 9, embedding, norm and head.
    assert len(found) == 24 * 16 + 7 + 4 + 32 * 9 + 3
    assert sum(int(np.prod(slot.released_shape)) for slot in found.values()) == 7_062_902_784
    assert found["vision_tower.embeddings.patch_embedding.weight"].released_shape == (1024, 3, 14, 14)
    assert found["language_model.layers.31.mlp.down_proj.weight"].released_shape == (4096, 11008)
