"""Released LLaVA checkpoints: every spelling and layout, round trips through PyTorch, and strictness."""

import dataclasses
import json

import hf_tiny
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from releases import one, same, write

from medcg_jax.config import ConfigError, MeshConfig
from medcg_jax.families import build
from medcg_jax.families.weights import llava
from medcg_jax.families.weights.convert import convert, export, load_checkpoint, open_leaves, read_config
from medcg_jax.families.weights.files import WeightsError, open_tensors
from medcg_jax.mesh import make_mesh


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


def test_a_head_that_is_to_be_tied_and_is_another_is_refused(released, tmp_path):
    stated = {**json.loads((released / "config.json").read_text()), "tie_word_embeddings": True}
    state = {name: open_tensors(released).read(name) for name in open_tensors(released).shapes}
    with pytest.raises(WeightsError, match="tie_word_embeddings, but lm_head.weight is not model.language_model.embed"):
        open_leaves(write(tmp_path, state, stated))
    # An untied model needs its head.
    state.pop("lm_head.weight")
    with pytest.raises(WeightsError, match="1 missing: lm_head.weight"):
        open_leaves(write(tmp_path, state, {**stated, "tie_word_embeddings": False}))
