"""Checkpoints that transformers writes and reads: every spelling of the names, and the way back with equal logits."""

import dataclasses

import hf_tiny
import hf_tiny_mllama
import hf_tiny_qwen2_vl
import jax
import numpy as np
import pytest
from flax import nnx
from releases import same_as, write

from medcg_jax.families.weights import llava, mllama, qwen2_vl
from medcg_jax.families.weights.convert import export, read_config
from medcg_jax.nn.rope import Llama3Scaling
from medcg_jax.parity import llava as parity_llava
from medcg_jax.parity import qwen2_vl as parity_qwen2_vl

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def same_indices(config):
    """What transformers 5.23 computes of the file's own indices of layers."""
    return dataclasses.replace(config, intermediate_from="output")


# (map, tiny model of transformers, its module, our inputs from theirs)
KINDS = {
    "llava": (llava, hf_tiny.reference, hf_tiny, parity_llava.port_inputs),
    "qwen2_vl": (qwen2_vl, hf_tiny_qwen2_vl.reference, hf_tiny_qwen2_vl, parity_qwen2_vl.port_inputs),
    "qwen2_vl tied": (
        qwen2_vl, lambda: hf_tiny_qwen2_vl.reference(tie=True), hf_tiny_qwen2_vl, parity_qwen2_vl.port_inputs
    ),
    "mllama": (
        mllama, hf_tiny_mllama.reference, hf_tiny_mllama, lambda config, inputs: hf_tiny_mllama.port_inputs(inputs)
    ),
}  # fmt: skip


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.long) if name == "qwen2_vl" else name for name in KINDS],
)
def kind(request):
    """(map, tiny model of transformers, (config, graphdef, params) of it here, its inputs, our inputs from theirs)."""
    family, reference, tiny, port_inputs = KINDS[request.param]
    model = reference()
    ported = tiny.port(model, change=same_indices) if family is mllama else tiny.port(model)
    return family, model, ported, tiny.inputs, port_inputs


def original(name: str) -> str:
    """liuhaotian's spelling of transformers' name."""
    name = name.replace("model.language_model.", "model.")
    name = name.replace("model.vision_tower.", "model.vision_tower.vision_tower.vision_model.")
    name = name.replace("model.multi_modal_projector.linear_1", "model.mm_projector.0")
    return name.replace("model.multi_modal_projector.linear_2", "model.mm_projector.2")


SPELLINGS = {
    "transformers 5": lambda family, name: name,
    "released": lambda family, name: family.released_name(family.canonical(name)),
    "canonical": lambda family, name: family.canonical(name),
    "transformers 4.52": lambda family, name: name.replace(".vision_tower.", ".vision_tower.vision_model."),
    "liuhaotian": lambda family, name: original(name),
}
OF_LLAVA = ("transformers 4.52", "liuhaotian")


@pytest.mark.parametrize(("family", "name", "num"), [
    (llava, "model.language_model.layers.0.mlp.up_proj.weight", 4), (llava, "model.vision_tower.a.weight", 5),
    (qwen2_vl, "model.language_model.norm.weight", 3), (qwen2_vl, "model.visual.merger.ln_q.bias", 2),
    (mllama, "model.language_model.norm.weight", 3), (mllama, "lm_head.weight", 2),
])  # fmt: skip
def test_spellings_differ(family, name, num):
    spellings = [spell for key, spell in SPELLINGS.items() if family is llava or key not in OF_LLAVA]
    assert len({spell(family, name) for spell in spellings}) == num


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_the_same_parameters(spelling, kind, tmp_path):
    family, model, (config, _, params), _, _ = kind
    if spelling in OF_LLAVA and family is not llava:
        return
    state = {SPELLINGS[spelling](family, name): value.numpy() for name, value in model.state_dict().items()}
    # A buffer that old versions saved.
    state["model.language_model.rotary_emb.inv_freq"] = np.zeros(3, np.float32)
    # In memory a tied head is always there; on disk it may be.
    for has_head in {True, not getattr(config.text, "tie_head", False)}:
        written = state if has_head else {name: x for name, x in state.items() if name != "lm_head.weight"}
        same_as(params, write(tmp_path, written, model.config.to_dict()))


def test_what_transformers_saves_is_read(kind, tmp_path):
    family, model, (config, _, params), _, _ = kind
    model.save_pretrained(tmp_path)
    same_as(params, tmp_path)
    stored = read_config(tmp_path)
    assert (stored.text, stored.image_token_id) == (config.text, config.image_token_id)
    if family is mllama:
        assert dataclasses.replace(same_indices(stored), scan_unroll=1) == config
        assert stored.text.rope_scaling == Llama3Scaling(original_positions=64)


def test_saved_here_it_reloads_in_pytorch_with_equal_logits(kind, tmp_path):
    _, model, (config, graphdef, params), inputs, port_inputs = kind
    load = type(model).from_pretrained
    export(params, config, tmp_path / "hf")
    theirs, report = load(tmp_path / "hf", output_loading_info=True, attn_implementation="eager")
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before, after = model.state_dict(), theirs.state_dict()
    assert set(before) == set(after)
    for name, value in before.items():
        np.testing.assert_array_equal(after[name].numpy(), value.numpy())
    arrays = inputs()
    given = {name: torch.from_numpy(value) for name, value in arrays.items()}
    with torch.no_grad():
        expected = model(**given).logits
        assert torch.equal(theirs(**given).logits, expected)
    # A change made here arrives there.
    params = jax.tree.map(lambda w: w, params)
    params["decoder"]["norm"]["scale"] = params["decoder"]["norm"]["scale"] * 1.5
    export(params, config, tmp_path / "changed")
    with torch.no_grad():
        changed = load(tmp_path / "changed", attn_implementation="eager")(**given).logits.numpy()
    run = jax.jit(lambda model, given: model(**given))
    ours = np.asarray(run(nnx.merge(graphdef, params), port_inputs(config, arrays)))
    real = arrays["attention_mask"] != 0
    assert np.abs(ours - changed)[real].max() < 1e-4
    assert np.abs(changed - expected.numpy())[real].max() > 1e-2
    # Back again, bit for bit.
    same_as(params, tmp_path / "changed")
