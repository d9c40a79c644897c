"""MiniGPT-v2's weights: three released files as one, later spellings, what the original names, positions resized."""

import dataclasses
from pathlib import Path

import hf_tiny_minigpt as tiny
import jax
import numpy as np
import pytest
from flax import nnx
from releases import same, same_as, write

from medcg_jax.families import build
from medcg_jax.families.weights import engine, llava, minigpt_v2
from medcg_jax.families.weights.convert import open_leaves, read_config
from medcg_jax.families.weights.files import WeightsError, open_bin, open_safetensors, read_json
from medcg_jax.families.weights.minigpt_v2 import cubic_weights, resize_positions


@pytest.fixture(scope="module")
def tensors():
    return tiny.state()


@pytest.fixture(scope="module")
def params(tensors):
    return tiny.port(tensors)[1]


def released_parts(tensors: dict[str, np.ndarray]) -> tuple[dict, dict, dict]:
    """The tensors as the release's files name them: Llama's, eva_vit_g.pth's and MiniGPT-v2's own."""
    llama, eva, own = {}, {}, {}
    for name, value in tensors.items():
        if name.startswith("visual_encoder."):
            eva[name.removeprefix("visual_encoder.")] = value
        elif name.startswith(("llama_proj", "ln_vision")) or "lora" in name:
            own[minigpt_v2.released_name(name)] = value
        else:
            llama[name.removeprefix("llama_model.")] = value
    # What is in the files and belongs to nothing that is computed.
    beyond = {name.replace("blocks.2.", "blocks.3."): x for name, x in eva.items() if name.startswith("blocks.2.")}
    eva |= beyond | {"head.weight": np.ones((5, 36), np.float32), "fc_norm.bias": np.ones(36, np.float32)}
    own["llama_model.base_model.model.model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(6, np.float32)
    return llama, eva, own


@pytest.fixture
def released(tensors, tmp_path, monkeypatch):
    """(directory of Llama, function that writes the two .pth files, as changed, beside it)."""
    torch = pytest.importorskip("torch")
    # The sizes that no released file states.
    monkeypatch.setattr(minigpt_v2, "RELEASED", dataclasses.replace(tiny.CONFIG, text=minigpt_v2.RELEASED.text))
    llama, eva, own = released_parts(tensors)
    directory = write(tmp_path / "Llama-2-7b-chat-hf", llama, llava.text_to_json(tiny.CONFIG.text))

    def save(eva_changes: dict | None = None, own_changes: dict | None = None, *, where: Path = directory) -> None:
        files = ((minigpt_v2.EVA_FILE, eva, eva_changes, False), (minigpt_v2.MINIGPT_FILE, own, own_changes, True))
        for name, found, changes, is_nested in files:
            found = {key: x for key, x in (found | (changes or {})).items() if x is not None}
            state = {key: torch.from_numpy(x.copy()) for key, x in found.items()}
            whole = {"model": state, "optimizer": {"lr": 1e-5}, "config": {"arch": "minigpt_v2"}, "epoch": 49}
            torch.save(whole if is_nested else state, where / name)

    return directory, save


def pure(params) -> dict:
    return jax.tree.map(np.asarray, nnx.to_pure_dict(params))


def leaves_of(directory) -> dict:
    return jax.tree.map(np.asarray, open_leaves(directory))


def test_three_released_files_are_one_model(released, params, tmp_path):
    directory, save = released
    with pytest.raises(WeightsError, match="holds Llama alone, and .*eva_vit_g.pth and .* is no file"):
        open_leaves(directory)
    # Beside Llama's directory, in it, and named.
    save(where=tmp_path)
    assert read_config(directory) == dataclasses.replace(minigpt_v2.RELEASED, text=tiny.CONFIG.text)
    same_as(params, directory)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in (minigpt_v2.EVA_FILE, minigpt_v2.MINIGPT_FILE):
        (tmp_path / name).rename(elsewhere / name)
    parts = {"eva": elsewhere / minigpt_v2.EVA_FILE, "minigpt": elsewhere / minigpt_v2.MINIGPT_FILE}
    same_as(params, directory, **parts)


def test_the_norm_behind_the_tower_is_plain_where_no_file_has_it(released, params):
    directory, save = released
    save(own_changes={"ln_vision.weight": None, "ln_vision.bias": None})
    loaded = leaves_of(directory)
    assert np.asarray(loaded["vision"]["norm"]["scale"]).tolist() == [1.0] * 36
    assert np.asarray(loaded["vision"]["norm"]["bias"]).tolist() == [0.0] * 36
    same(loaded["lora"], pure(params)["lora"])


def test_positions_of_a_smaller_image_are_resized(released, params):
    directory, save = released
    small = np.random.default_rng(0).standard_normal((1, 17, 36)).astype(np.float32)
    save(eva_changes={"pos_embed": small})
    loaded = leaves_of(directory)
    np.testing.assert_array_equal(loaded["vision"]["positions"], resize_positions(small[0], 6))


def test_later_spellings_and_what_was_trained_besides_are_read(released, tensors, params):
    directory, save = released
    later = {}
    for name in ("q_proj.lora_A", "v_proj.lora_B"):
        old = f"llama_model.base_model.model.model.layers.1.self_attn.{name}.weight"
        later |= {old: None, old.replace(".weight", ".default.weight"): tensors[minigpt_v2.canonical(old)]}
    trained = 2 * tensors["llama_model.model.layers.0.self_attn.q_proj.weight"]
    name = "llama_model.base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
    save(own_changes={**later, name: trained})
    loaded = leaves_of(directory)
    same(loaded["lora"], pure(params)["lora"])
    np.testing.assert_array_equal(loaded["decoder"]["blocks"]["q"]["kernel"][0], trained.T.reshape(40, 4, 12))


@pytest.mark.parametrize(
    ("eva", "own", "message"),
    [
        ({"blocks.1.attn.q_bias": None}, {}, "1 missing: visual_encoder.blocks.1.attn.q_bias; no unused"),
        ({}, {"llama_proj.bias": None}, "1 missing: llama_proj.bias"),
        ({"blocks.1.attn.k_bias": np.ones(36, np.float32)}, {}, "1 unused: visual_encoder.blocks.1.attn.k_bias"),
        ({}, {"t5_proj.weight": np.ones(3, np.float32)}, "1 unused: t5_proj.weight"),
        ({}, {"llama_proj.weight": np.ones((40, 36), np.float32)}, r"misshapen: llama_proj.weight \(40, 36\) instead"),
        ({"pos_embed": np.ones((1, 18, 36), np.float32)}, {}, r"misshapen: visual_encoder.pos_embed \(1, 18, 36\)"),
    ],
)
def test_missing_unused_and_misshapen_tensors_stop_the_load(eva, own, message, released):
    directory, save = released
    save(eva, own)
    with pytest.raises(WeightsError, match=message):
        open_leaves(directory)


def test_the_entry_of_a_file_is_found_or_named(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "file.pth"
    torch.save({"state": {"a": torch.ones(2)}}, path)
    with pytest.raises(WeightsError, match="has no entry 'model'; it holds state"):
        open_bin(path, "model")
    with pytest.raises(WeightsError, match="holds other things than tensors by name"):
        open_bin(path)
    # As versions before 1.6 wrote it: no archive.
    torch.save({"a": torch.full((2,), 3.0)}, path, _use_new_zipfile_serialization=False)
    assert open_bin(path).read("a").tolist() == [3.0, 3.0]


def test_golden_names_and_files(shared_dir):
    """Every tensor of the original's state dict is known, and stands in the file of the release that is read for it."""
    golden = shared_dir / "golden" / "minigpt_v2" / "variant_a"
    found = open_safetensors(golden / "weights.safetensors")
    config = minigpt_v2.config_from_json(read_json(golden / "config.json"))
    slots = engine.slots(minigpt_v2.table(config), build.abstract(config)[1])
    ours = {minigpt_v2.released_name(name): slot.released_shape for name, slot in slots.items()}
    assert ours == {name: shape for name, shape in found.shapes.items() if not name.endswith("inv_freq")}
    readers = {
        "Llama": minigpt_v2.canonical_llama,
        "eva_vit_g.pth": lambda name: minigpt_v2.canonical_eva(name, config.vision.num_layers),
        "minigptv2": minigpt_v2.canonical,
    }
    seen = set()
    for name, (file, key) in read_json(golden / "key_map.json").items():
        start = next((start for start in readers if (file or "").startswith(start)), None)
        seen.add(start)
        if start is None:
            assert name.startswith("ln_vision.")
        else:
            assert readers[start](key) == minigpt_v2.canonical(name)
    assert seen == {*readers, None}


def test_a_config_without_a_size_is_refused():
    stated = minigpt_v2.config_to_json(tiny.CONFIG, "float32")
    lacking = {key: value for key, value in stated.items() if key not in ("vit_heads", "lora_r")}
    with pytest.raises(WeightsError, match="lacks vit_heads, lora_r"):
        minigpt_v2.config_from_json(lacking)


@pytest.mark.parametrize(("old", "new"), [(16, 32), (5, 10), (4, 6), (7, 3), (3, 3)])
def test_positions_are_resized_as_pytorch_does(old, new):
    torch = pytest.importorskip("torch")
    table = np.random.default_rng(old).standard_normal((1 + old * old, 8)).astype(np.float32)
    grid = torch.from_numpy(table[1:]).reshape(1, old, old, 8).permute(0, 3, 1, 2)
    theirs = torch.nn.functional.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    theirs = theirs.permute(0, 2, 3, 1).reshape(-1, 8).numpy()
    ours = resize_positions(table, new)
    np.testing.assert_array_equal(ours[0], table[0])
    assert np.abs(ours[1:] - theirs).max() < 1e-5
    np.testing.assert_allclose(cubic_weights(old, new).sum(axis=1), 1, atol=1e-12)


def test_another_cubic_or_other_corners_would_be_seen(monkeypatch):
    table = np.random.default_rng(0).standard_normal((17, 3)).astype(np.float32)
    before = resize_positions(table, 6)
    monkeypatch.setattr("medcg_jax.families.weights.minigpt_v2.CUBIC", -0.5)
    assert np.abs(resize_positions(table, 6) - before).max() > 1e-2
