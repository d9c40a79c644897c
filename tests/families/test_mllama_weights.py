"""Released Llama-3.2-Vision checkpoints: every spelling, the way back into PyTorch, and strictness."""

import dataclasses
import json

import hf_tiny_mllama as tiny
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from releases import same

from medcg_jax.families.mllama.model import llama32_vision_11b, llama32_vision_90b, llama32_vision_tiny
from medcg_jax.families.weights import engine, mllama
from medcg_jax.families.weights.convert import export
from medcg_jax.families.weights.files import Tensors, WeightsError
from medcg_jax.nn.rope import Llama3Scaling


def same_indices(config):
    """What transformers 5.23 computes of the file's own indices."""
    return dataclasses.replace(config, intermediate_from="output")


@pytest.fixture(scope="module")
def model():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    return tiny.reference()


@pytest.fixture(scope="module")
def ported(model):
    return tiny.port(model, change=same_indices)


@pytest.fixture(scope="module")
def state(model):
    return {name: value.numpy() for name, value in model.state_dict().items()}


def load(found: Tensors, ported):
    _, _, params = ported
    names = engine.canonical_names(found.shapes, mllama.canonical, "here")
    abstract = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype), params)
    places = jax.tree.map(lambda w: w.sharding, params)
    return engine.load(mllama.table(ported[0]), abstract, places, found, names, "here")


def held(state) -> Tensors:
    return Tensors({name: tuple(value.shape) for name, value in state.items()}, state.__getitem__)


SPELLINGS = {
    "transformers 5": lambda name: name,
    "released": lambda name: mllama.released_name(mllama.canonical(name)),
    "canonical": mllama.canonical,
}


def test_spellings_differ():
    assert len({spell("model.language_model.norm.weight") for spell in SPELLINGS.values()}) == 3
    assert SPELLINGS["released"]("lm_head.weight") == "language_model.lm_head.weight"
    assert SPELLINGS["released"]("model.vision_model.class_embedding") == "vision_model.class_embedding"


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_loads_to_the_same_parameters(spelling, state, ported):
    renamed = {SPELLINGS[spelling](name): value for name, value in state.items()}
    renamed["model.language_model.rotary_emb.inv_freq"] = np.zeros(3, np.float32)
    same(load(held(renamed), ported), ported[2])


def test_what_transformers_saves_is_read(model, ported, tmp_path):
    model.save_pretrained(tmp_path)
    tensors, names = mllama.open_release(tmp_path, {})
    assert set(names) == set(engine.slots(mllama.table(ported[0]), ported[2]))
    same(load(tensors, ported), ported[2])
    found = mllama.read_release(tmp_path, {})
    assert dataclasses.replace(same_indices(found), scan_unroll=1) == ported[0]
    assert found.text.rope_scaling == Llama3Scaling(original_positions=64)
    assert (found.vision.intermediate_layers, found.text.cross_layers) == (tuple(tiny.TAKEN), (1, 4))
    assert (found.image_token_id, found.pad_token_id, found.eos_token_id) == (tiny.IMAGE, tiny.PAD, tiny.EOS)


def test_saved_here_it_reloads_in_pytorch_with_equal_logits(model, ported, tmp_path):
    import torch
    from transformers import MllamaForConditionalGeneration

    config, graphdef, params = ported
    export(params, config, tmp_path / "same")
    options = dict(attn_implementation="eager", output_loading_info=True)
    theirs, report = MllamaForConditionalGeneration.from_pretrained(tmp_path / "same", **options)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before, after = model.state_dict(), theirs.state_dict()
    assert set(before) == set(after)
    for name, value in before.items():
        np.testing.assert_array_equal(after[name].numpy(), value.numpy())
    inputs = tiny.inputs()
    given = {name: torch.from_numpy(value) for name, value in inputs.items()}
    with torch.no_grad():
        assert torch.equal(theirs(**given).logits, model(**given).logits)
    # A change made here arrives there.
    params = jax.tree.map(lambda w: w, params)
    params["decoder"]["cross"]["attention_gate"] = params["decoder"]["cross"]["attention_gate"] * 1.5
    export(params, config, tmp_path / "changed")
    changed, _ = MllamaForConditionalGeneration.from_pretrained(tmp_path / "changed", **options)
    with torch.no_grad():
        theirs = changed(**given).logits.numpy()
    ours = np.asarray(jax.jit(lambda m, given: m(**given))(nnx.merge(graphdef, params), tiny.port_inputs(inputs)))
    real = inputs["attention_mask"] != 0
    assert np.abs(ours - theirs)[real].max() < 1e-4
    assert np.abs(theirs - model(**given).logits.detach().numpy())[real].max() > 1e-2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("lm_head.weight"), "1 missing: lm_head.weight; no unused"),
        (lambda s: s.pop("model.language_model.layers.4.cross_attn_mlp_gate"),
         "1 missing: language_model.layers.4.cross_attn_mlp_gate"),
        (lambda s: s.update({"model.language_model.layers.9.mlp.up_proj.weight": np.zeros(2, np.float32)}),
         "1 unused: language_model.layers.9.mlp.up_proj.weight"),
        (lambda s: s.update({"model.language_model.layers.1.self_attn.q_proj.weight": np.zeros((32, 32), np.float32)}),
         "1 unused: language_model.layers.1.self_attn.q_proj.weight"),
        (lambda s: s.update({"language_model.model.norm.weight": np.zeros(32, np.float32)}),
         "holds language_model.norm.weight twice"),
        (lambda s: s.update({"model.language_model.embed_tokens.weight": np.zeros((104, 32), np.float32)}),
         r"misshapen: language_model.embed_tokens.weight \(104, 32\) instead of \(112, 32\)"),
    ],
)  # fmt: skip
def test_missing_unused_and_misshapen_tensors_stop_the_load(change, message, state, ported):
    state = dict(state)
    change(state)
    with pytest.raises(WeightsError, match=message):
        load(held(state), ported)


# config.json of meta-llama/Llama-3.2-11B-Vision-Instruct: what concerns the architecture.
RELEASED_11B = {
    "architectures": ["MllamaForConditionalGeneration"], "model_type": "mllama", "image_token_index": 128256,
    "text_config": {
        "model_type": "mllama_text_model", "bos_token_id": 128000, "pad_token_id": 128004,
        "eos_token_id": [128001, 128008, 128009], "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38],
        "dropout": 0, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
        "max_position_embeddings": 131072, "num_attention_heads": 32, "num_hidden_layers": 40,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": False,
        "rope_scaling": {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "vocab_size": 128256,
    },
    "vision_config": {
        "model_type": "mllama_vision_model", "attention_heads": 16, "hidden_act": "gelu", "hidden_size": 1280,
        "image_size": 560, "intermediate_layers_indices": [3, 7, 15, 23, 30], "intermediate_size": 5120,
        "max_num_tiles": 4, "norm_eps": 1e-05, "num_channels": 3, "num_global_layers": 8, "num_hidden_layers": 32,
        "patch_size": 14, "vision_output_dim": 7680, "supported_aspect_ratios": tiny.GRIDS,
    },
}  # fmt: skip


def test_the_released_config_is_the_11b_model():
    assert mllama.config_from_json(RELEASED_11B) == llama32_vision_11b()


@pytest.mark.parametrize(
    "config",
    [llama32_vision_11b(), llama32_vision_90b(), llama32_vision_tiny(40, 39, num_kv_heads=1, rope_theta=77.0)],
    ids=["11b", "90b", "tiny"],
)
def test_config_goes_both_ways(config):
    assert mllama.config_from_json(json.loads(json.dumps(mllama.config_to_json(config, "float32")))) == config


def test_sixteen_bits_are_kept(ported):
    config, _, params = ported
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    stored = dict(engine.store(mllama.table(config), params)[1])
    assert {value.dtype for value in stored.values()} == {jnp.dtype("bfloat16")}
    same(load(held(stored), (config, None, params)), params)
