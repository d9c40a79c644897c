"""Released Qwen2-VL checkpoints: every spelling, tied heads, round trips through PyTorch, and strictness."""

import dataclasses

import hf_tiny_qwen2_vl as hf_tiny
import jax
import numpy as np
import pytest
from flax import nnx
from releases import one, same, write

from medcg_jax.families import build
from medcg_jax.families.qwen2_vl.model import qwen2_vl_2b, qwen2_vl_7b, qwen2_vl_72b, qwen2_vl_tiny
from medcg_jax.families.weights import engine, qwen2_vl
from medcg_jax.families.weights.convert import export, load_checkpoint, read_config
from medcg_jax.families.weights.files import WeightsError
from medcg_jax.parity import qwen2_vl as parity_qwen2_vl


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def model(request):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    return hf_tiny.reference(tie=request.param)


@pytest.fixture(scope="module")
def state(model):
    return {name: value.numpy() for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def ported(model):
    return hf_tiny.port(model)


def released(name: str) -> str:
    return qwen2_vl.released_name(qwen2_vl.canonical(name))


SPELLINGS = {"transformers 5": lambda name: name, "released": released, "canonical": qwen2_vl.canonical}


def test_spellings_differ():
    names = {spell("model.language_model.layers.0.mlp.up_proj.weight") for spell in SPELLINGS.values()}
    assert len(names) == 3
    assert released("model.language_model.embed_tokens.weight") == "model.embed_tokens.weight"
    assert released("model.visual.blocks.0.attn.qkv.bias") == "visual.blocks.0.attn.qkv.bias"
    assert released("lm_head.weight") == "lm_head.weight"


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_loads_to_the_same_parameters(spelling, model, state, ported, tmp_path):
    renamed = {SPELLINGS[spelling](name): value for name, value in state.items()}
    renamed["visual.rotary_pos_emb.inv_freq"] = np.zeros(3, np.float32)
    config, graphdef, params = ported
    # In memory a tied head is always there; on disk it may be.
    for head in {True, not config.text.tie_head}:
        kept = renamed if head else {name: x for name, x in renamed.items() if name != "lm_head.weight"}
        write(tmp_path, kept, model.config.to_dict())
        found, loaded = load_checkpoint(tmp_path, config, one())
        same(loaded, params)
        assert found == graphdef


def test_what_transformers_saves_loads(model, ported, tmp_path):
    model.save_pretrained(tmp_path)
    config, _, params = ported
    found = read_config(tmp_path)
    assert (found.vision, found.text, found.mrope_sections) == (config.vision, config.text, config.mrope_sections)
    same(load_checkpoint(tmp_path, config, one())[1], params)


def test_saved_here_it_reloads_in_pytorch_with_equal_logits(model, ported, tmp_path):
    import torch
    from transformers import Qwen2VLForConditionalGeneration

    config, graphdef, params = ported
    export(params, config, tmp_path / "hf")
    theirs, report = Qwen2VLForConditionalGeneration.from_pretrained(
        tmp_path / "hf", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before, after = model.state_dict(), theirs.state_dict()
    assert set(before) == set(after)
    for name, value in before.items():
        np.testing.assert_array_equal(after[name].numpy(), value.numpy())
    given = hf_tiny.inputs()
    inputs = {name: torch.from_numpy(value) for name, value in given.items()}
    with torch.no_grad():
        assert torch.equal(theirs(**inputs).logits, model(**inputs).logits)
    # A change made here arrives there.
    params = jax.tree.map(lambda w: w, params)
    params["projector"]["norm"]["scale"] = params["projector"]["norm"]["scale"] * 1.5
    export(params, config, tmp_path / "changed")
    changed = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "changed", attn_implementation="eager")
    with torch.no_grad():
        theirs = changed(**inputs).logits.numpy()
    ours = jax.jit(lambda m, given: m(**given))(nnx.merge(graphdef, params), parity_qwen2_vl.port_inputs(config, given))
    real = given["attention_mask"] != 0
    assert np.abs(np.asarray(ours) - theirs)[real].max() < 1e-4
    assert np.abs(theirs - model(**inputs).logits.detach().numpy())[real].max() > 1e-2
    # Back again, bit for bit.
    same(load_checkpoint(tmp_path / "changed", config, one())[1], params)


def test_a_head_that_is_to_be_tied_and_is_another_is_refused(state, ported, tmp_path):
    config = ported[0]
    state = {**state, "lm_head.weight": state["lm_head.weight"] + 1}
    write(tmp_path, state, {**qwen2_vl.config_to_json(config, "float32"), "tie_word_embeddings": True})
    with pytest.raises(WeightsError, match="tie_word_embeddings, but lm_head.weight is not model.language_model.embed"):
        qwen2_vl.open_release(tmp_path, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("model.visual.merger.ln_q.bias"), "1 missing: visual.merger.ln_q.bias; no unused"),
        (lambda s: s.pop("model.language_model.layers.1.self_attn.k_proj.bias"),
         "1 missing: language_model.layers.1.self_attn.k_proj.bias"),
        (lambda s: s.update({"model.visual.blocks.3.norm1.bias": np.zeros(24, np.float32)}),
         "1 unused: visual.blocks.3.norm1.bias"),
        (lambda s: s.update({"model.visual.blocks.0.attn.qkv.bias": np.zeros(71, np.float32)}),
         r"1 misshapen: visual.blocks.0.attn.qkv.bias \(71,\) instead of \(72,\)"),
        (lambda s: s.update({"visual.merger.ln_q.bias": np.zeros(24, np.float32)}),
         "holds visual.merger.ln_q.bias twice"),
    ],
)  # fmt: skip
def test_missing_unused_and_misshapen_tensors_stop_the_load(change, message, model, state, ported, tmp_path):
    state = dict(state)
    change(state)
    write(tmp_path, state, model.config.to_dict())
    with pytest.raises(WeightsError, match=message):
        load_checkpoint(tmp_path, ported[0], one())


def test_an_untied_model_needs_its_head(ported, state, tmp_path):
    config = ported[0]
    if config.text.tie_head:
        config = hf_tiny.port(hf_tiny.reference())[0]
    write(
        tmp_path, {n: x for n, x in state.items() if n != "lm_head.weight"}, qwen2_vl.config_to_json(config, "float32")
    )
    with pytest.raises(WeightsError, match="1 missing: lm_head.weight"):
        load_checkpoint(tmp_path, config, one())


# config.json of Qwen/Qwen2-VL-7B-Instruct, as it is known; no file of the release was at hand.
RELEASED_7B = {
    "architectures": ["Qwen2VLForConditionalGeneration"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "vision_start_token_id": 151652, "vision_end_token_id": 151653, "vision_token_id": 151654,
    "image_token_id": 151655, "video_token_id": 151656, "hidden_act": "silu", "hidden_size": 3584,
    "intermediate_size": 18944, "max_position_embeddings": 32768, "max_window_layers": 28, "model_type": "qwen2_vl",
    "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": False, "use_sliding_window": False,
    "vision_config": {
        "depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3, "hidden_size": 3584,
        "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "vocab_size": 152064,
}  # fmt: skip


def test_the_released_config_is_the_7b_model():
    assert qwen2_vl.config_from_json(RELEASED_7B) == qwen2_vl_7b()


@pytest.mark.parametrize(
    "config",
    [qwen2_vl_tiny(40, 39, num_kv_heads=1), qwen2_vl_tiny(40, 39, tie_head=True), qwen2_vl_2b(), qwen2_vl_72b()],
)
def test_config_goes_both_ways(config):
    found = qwen2_vl.config_from_json(qwen2_vl.config_to_json(config, "float32"))
    # How large images may be stands in another file of a release.
    assert found == dataclasses.replace(config, min_pixels=found.min_pixels, max_pixels=found.max_pixels)


def test_the_table_fills_every_parameter_of_7b_once():
    _, params = build.abstract(qwen2_vl_7b())
    found = engine.slots(qwen2_vl.table(qwen2_vl_7b()), params)
    # The patches; 32 layers of 12, the merger's 6; 28 layers of 12, embedding, norm and head.
    assert len(found) == 1 + 32 * 12 + 6 + 28 * 12 + 3
    assert sum(int(np.prod(slot.released_shape)) for slot in found.values()) == 8_291_375_616
    assert found["visual.patch_embed.proj.weight"].released_shape == (1280, 3, 2, 14, 14)
    assert found["visual.blocks.31.attn.qkv.weight"].released_shape == (3840, 1280)
    assert found["visual.blocks.31.attn.qkv.bias"].released_shape == (3840,)
    assert found["language_model.layers.27.self_attn.k_proj.bias"].released_shape == (512,)


def test_fused_rows_are_all_queries_then_keys_then_values():
    """Two heads of one number each: released rows q0 q1 k0 k1 v0 v1, ours q0 k0 v0 and q1 k1 v1."""
    rows = np.arange(6.0)
    transform = qwen2_vl.fused_qkv()
    assert transform.load(rows, (2, 3)).tolist() == [[0, 2, 4], [1, 3, 5]]
    kernel = np.arange(30.0).reshape(6, 5)
    ours = transform.load(kernel, (5, 2, 3))
    assert ours[:, 1, 2].tolist() == kernel[5].tolist()
    np.testing.assert_array_equal(transform.store(ours), kernel)
