"""`medcg parity` on models of any config, and what is wrong with a directory or the port, named.

The draws are `hf_draws`'; weights are often those that torch makes, of which plain comparisons say little.
"""

import dataclasses
import json
import sys

import hf_draws
import jax
import numpy as np
import pytest

from medcg_jax.families.llava import model as llava
from medcg_jax.families.mllama import vit as mllama_vit
from medcg_jax.families.weights.files import WeightsError, open_safetensors, write_safetensors
from medcg_jax.nn import blocks, rope
from medcg_jax.parity import verb as parity_lib
from medcg_jax.parity.rows import placed, text_ids
from medcg_jax.parity.verb import TELLING, parity
from medcg_jax.parity.weights import fingerprints, telling, weight_rows

pytest.importorskip("torch")
pytest.importorskip("transformers")


@pytest.fixture(autouse=True, scope="module")
def sooner():
    """A short curve says as much as a long one."""
    kept, parity_lib.NUM_STEPS = parity_lib.NUM_STEPS, 2
    yield
    parity_lib.NUM_STEPS = kept


LONG = pytest.mark.long


@pytest.mark.parametrize(
    ("family", "seed"), [("llava", 1), pytest.param("qwen2_vl", 2, marks=LONG), pytest.param("mllama", 13, marks=LONG)]
)
def test_a_drawn_config(family, seed, tmp_path):
    what = hf_draws.save(family, seed, tmp_path)
    result = parity(tmp_path)
    assert {row["stage"]: row["difference"] for row in result["rows"] if not row["ok"]} == {}, what
    assert result["exit_status"] == 0


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A directory of LLaVA as torch makes it, nothing random beside its matrices."""
    return made("llava", tmp_path_factory.mktemp("plain"), 5)


@pytest.fixture(scope="module")
def recorded(plain, tmp_path_factory):
    path = tmp_path_factory.mktemp("recorded") / "record.npz"
    assert parity(plain, record=path)["ok"]
    return path


def made(family, out, seed):
    config = hf_draws.FAMILIES[family](np.random.default_rng(seed))
    if family == "llava":
        config.vision_config.hidden_act, config.projector_hidden_act = "quick_gelu", "gelu"
        config.vision_config.num_hidden_layers, config.vision_feature_layer = 3, -2
        config.text_config.num_hidden_layers = 2
    hf_draws.build(family, config, seed, random=False).save_pretrained(out)
    return out


# name -> (object, name, replacement) in the code
FAULTS = {
    "tanh gelu in the projector": (llava, "gelu", jax.nn.gelu),
    "gelu in clip": (blocks, "quick_gelu", lambda x: jax.nn.gelu(x, approximate=False)),
}


@pytest.mark.parametrize("fault", ["norm eps", "rope base", *FAULTS])
def test_faults_show_with_the_weights_that_torch_makes(fault, plain, monkeypatch, capsys):
    read = parity_lib.read_config

    def wrong(src, **rest):
        config = read(src, **rest)
        if fault == "rope base":
            text = dataclasses.replace(config.text, rope_theta=2 * config.text.rope_theta)
            return dataclasses.replace(config, text=text)
        vision = dataclasses.replace(config.vision, norm_eps=config.vision.norm_eps / 3)
        return dataclasses.replace(config, vision=vision)

    if fault in ("norm eps", "rope base"):
        # Of the port alone: HF reads the file itself.
        monkeypatch.setattr(parity_lib, "read_config", wrong)
        monkeypatch.setattr("medcg_jax.families.weights.convert.check_same", lambda *_: None)
    else:
        monkeypatch.setattr(*FAULTS[fault])
    result = parity(plain)
    assert result["exit_status"] == 1
    stages = {"norm eps": "vision.", "gelu in clip": "vision.layer0", "rope base": "decoder.layer0"}
    # What the projector's GELU changes shows where it is normed.
    assert result["first"].removeprefix(TELLING).startswith(stages.get(fault, ("projector", "decoder.layer0")))
    assert f"the first: {result['first']}" in capsys.readouterr().out.splitlines()[-1]


def test_a_model_whose_gates_are_shut_says_so_and_is_compared_all_the_same(tmp_path, monkeypatch, capsys):
    made("mllama", tmp_path, 3)
    result = parity(tmp_path)
    assert result["ok"]
    assert any("WARNING: no logit depends on the image" in note for note in result["notes"])
    assert "WARNING: no logit" in capsys.readouterr().out
    # Planted where only open gates show it: what the global layers add.
    monkeypatch.setattr(mllama_vit, "gated", lambda x, by: x)
    result = parity(tmp_path)
    assert not result["ok"]


def tensors_of(directory):
    opened = open_safetensors(directory / "model.safetensors")
    return {name: np.array(opened.read(name)) for name in opened.shapes}


def changed(src, out, tensors):
    """A copy of `src` in `out` with these tensors."""
    out.mkdir()
    (out / "config.json").write_text((src / "config.json").read_text())
    write_safetensors(out, {n: (x.shape, x.dtype) for n, x in tensors.items()}, tensors.items())
    return out


def exchanged(tensors, first, other):
    """Tensors with those of two layers in each other's place."""
    swap = {first: other, other: first}

    def place(name):
        return next((name.replace(a, b) for a, b in swap.items() if a in name), name)

    return {name: tensors[place(name)] for name in tensors}


def test_a_renamed_tensor_is_named(plain, tmp_path):
    tensors = tensors_of(plain)
    name = next(n for n in tensors if n.endswith("layers.1.mlp.up_proj.weight"))
    tensors = {n.replace("up_proj", "upper_proj") if n == name else n: x for n, x in tensors.items()}
    message = r"1 missing: language_model\.layers\.1\.mlp\.up_proj\.weight; 1 unused: .*upper"
    with pytest.raises(WeightsError, match=message):
        parity(changed(plain, tmp_path / "renamed", tensors))


def test_exchanged_layers_are_named(plain, recorded, tmp_path, capsys):
    """Against a record without PyTorch, and against the directory that they come from."""
    tensors = exchanged(tensors_of(plain), "language_model.model.layers.0.", "language_model.model.layers.1.")
    if all(np.array_equal(tensors[n], x) for n, x in tensors_of(plain).items()):
        tensors = exchanged(tensors_of(plain), "language_model.layers.0.", "language_model.layers.1.")
    wrong = changed(plain, tmp_path / "wrong", tensors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch", None)
        assert parity(plain, inputs=recorded)["ok"]
        capsys.readouterr()
        result = parity(wrong, inputs=recorded)
    out = capsys.readouterr().out.splitlines()
    assert (result["exit_status"], result["first"]) == (1, "decoder.layer0")
    assert "tensors that differ: language_model.layers.0." in out[-2]
    assert "the first: decoder.layer0, " in out[-1]
    result = parity(wrong, against=plain)
    assert (result["exit_status"], result["first"]) == (1, "decoder.layer0")
    # Layers that nothing runs are told by their tensors alone.
    name = next(n for n in tensors if n.endswith("post_layernorm.bias"))
    unused = {**tensors_of(plain), name: tensors[name] + 1}
    result = parity(changed(plain, tmp_path / "unused", unused), inputs=recorded)
    assert (result["exit_status"], result["first"]) == (1, "weight vision_tower.post_layernorm.bias")


def test_a_swap_that_changes_shapes_is_an_error_of_its_own(plain, tmp_path):
    tensors = exchanged(tensors_of(plain), ".mlp.up_proj.", ".mlp.down_proj.")
    with pytest.raises(WeightsError, match=r"misshapen: language_model\.layers\.0\.mlp\.up_proj"):
        parity(changed(plain, tmp_path / "wrong", tensors))


def test_what_does_not_go_together_is_refused(plain, recorded, tmp_path):
    with pytest.raises(WeightsError, match="takes the reference's place"):
        parity(plain, inputs=recorded, record=tmp_path / "x.npz")
    about = json.loads((plain / "config.json").read_text())
    for part, field, value in (("text_config", "hidden_act", "prelu"), ("vision_config", "num_attention_heads", 7)):
        other = tmp_path / field
        other.mkdir()
        (other / "config.json").write_text(json.dumps({**about, part: {**about[part], field: value}}))
        with pytest.raises(WeightsError, match="config.json"):
            parity(other)


def test_telling_weights_keep_what_tells_tensors_apart():
    rng = np.random.default_rng(0)
    value = 0.02 * rng.standard_normal((8, 6)).astype(np.float32)
    weights = telling("language_model.layers.0.mlp.up_proj.weight", value)
    np.testing.assert_allclose(weights / weights.std(), value / value.std(), rtol=1e-5)
    assert weights.std() > 0.3
    zeros = np.zeros(8, np.float32)
    assert telling("a.fc1.bias", zeros).std() > 0.1
    assert not np.array_equal(telling("a.fc1.bias", zeros), telling("b.fc1.bias", zeros))
    gate = telling("language_model.layers.1.cross_attn_attn_gate", np.zeros(1, np.float32))
    np.testing.assert_allclose(gate, 0.7)
    ones = {"x": np.arange(6.0), "y": np.arange(6.0)[::-1]}
    assert [row.stage for row in weight_rows(fingerprints(ones), fingerprints(ones))] == ["weights"]
    other = {"x": ones["y"], "y": ones["y"]}
    assert [row.stage for row in weight_rows(fingerprints(other), fingerprints(ones))] == ["weight x"]
    with pytest.raises(WeightsError, match=r"1 only here \['y'\], 0 only there"):
        weight_rows(fingerprints(ones), fingerprints({"x": ones["x"]}))


def test_ids_stay_inside_of_the_table():
    assert placed({"image": 32000, "pad": 3}, 10) == {"image": 9}
    assert placed({"image": 9, "video": 9, "start": 99}, 10) == {"video": 8, "start": 7}
    assert placed({"image": 4}, 10) == {}
    drawn = text_ids(np.random.default_rng(0), (50,), 6, {0, 2, 5})
    assert set(drawn.tolist()) == {1, 3, 4}


def test_linear_scaling_is_a_stretch_of_every_wavelength():
    scaled = rope.frequencies(8, 100.0, rope.Llama3Scaling(2.5, original_positions=0))
    np.testing.assert_allclose(scaled, rope.frequencies(8, 100.0) / 2.5, rtol=1e-6)
