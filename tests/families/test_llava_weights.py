"""LLaVA-1.5: bins, a projector or adapters alone and the Llama they belong to; rows, precision, conversion."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from releases import CONFIGS, one, random_params, released, replaced, same, same_as, tensors_of, write

from medcg_jax.config import ConfigError
from medcg_jax.families import build
from medcg_jax.families.weights import llava
from medcg_jax.families.weights.convert import convert, export, load_checkpoint, open_leaves, read_config
from medcg_jax.families.weights.files import WeightsError, write_safetensors

torch = pytest.importorskip("torch")

CONFIG = CONFIGS["llava"]
HF = llava.config_to_json(CONFIG, "float32")
LLAMA_JSON = {**HF["text_config"], "torch_dtype": "float32"}
# As LLaVA's training writes it: the decoder's fields, and what belongs to images.
ORIGINAL = {
    **LLAMA_JSON, "model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"], "mm_hidden_size": 64,
    "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False, "mm_use_im_patch_token": False, "image_aspect_ratio": "pad", "use_mm_proj": True,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336", "pretraining_tp": 1, "tune_mm_mlp_adapter": False,
}  # fmt: skip
RANK, ALPHA = 4, 6
ADAPTER = {
    "peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", "fan_in_fan_out": False, "lora_dropout": 0.05,
    "target_modules": ["q_proj", "down_proj"], "modules_to_save": None, "task_type": "CAUSAL_LM",
    "inference_mode": True,
}  # fmt: skip
BIG, SMALL = "layers.1.mlp.down_proj", "layers.0.self_attn.q_proj"


def original(name: str) -> str:
    """liuhaotian's spelling of a canonical name, but for the tower's."""
    name = re.sub(r"^language_model\.", "model.", name)
    return re.sub(r"^multi_modal_projector\.linear_(\d)", lambda m: f"model.mm_projector.{2 * int(m[1]) - 2}", name)


def saved(path, tensors: dict) -> None:
    torch.save({name: torch.from_numpy(np.array(value)) for name, value in tensors.items()}, path)


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


@pytest.fixture(scope="module")
def tensors(params):
    return tensors_of(CONFIG, params)


@pytest.fixture
def parts(tensors, tmp_path):
    """Directories of the decoder alone (Vicuna) and of CLIP."""
    base = {original(name): x for name, x in tensors.items() if not name.startswith(("vision", "multi"))}
    base["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    tower = {name.replace("tower", "model"): x for name, x in tensors.items() if name.startswith("vision_tower.")}
    return {
        "base": write(tmp_path / "vicuna", base, LLAMA_JSON),
        "clip": write(tmp_path / "clip", tower, {"model_type": "clip", "vision_config": HF["vision_config"]}),
    }


def projector(tensors, prefix: str = "") -> dict:
    return {prefix + original(name): x for name, x in tensors.items() if name.startswith("multi")}


@pytest.fixture
def adapted(tensors, parts, tmp_path):
    """(directory of the adapters' form, the tensors with the adapters in them)."""
    src, rng = tmp_path / "lora", np.random.default_rng(0)
    src.mkdir()
    (src / "config.json").write_text(json.dumps(ORIGINAL))
    (src / "adapter_config.json").write_text(json.dumps(ADAPTER))
    merged, halves = dict(tensors), {}
    for layer in (SMALL, BIG):
        name = f"language_model.{layer}.weight"
        out, inputs = tensors[name].shape
        b, a = (rng.standard_normal(shape).astype(np.float32) for shape in ((out, RANK), (RANK, inputs)))
        halves |= {f"base_model.model.model.{layer}.lora_{half}.weight": x for half, x in (("A", a), ("B", b))}
        merged[name] = tensors[name] + ALPHA / RANK * (b @ a)
    merged["multi_modal_projector.linear_2.bias"] = rng.standard_normal(64).astype(np.float32)
    saved(src / "adapter_model.bin", halves)
    saved(src / "non_lora_trainables.bin", projector(merged, "base_model.model."))
    return src, merged, halves


def found_in(src, parts) -> dict:
    return tensors_of(CONFIG, open_leaves(src, parts=parts))


def assert_found(src, parts, expected):
    found = found_in(src, parts)
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_a_whole_checkpoint_with_the_tower_inside(tensors, params, parts, tmp_path):
    """As DeepSpeed's training saves it; CLIP's config.json says how large the tower is."""
    src = tmp_path / "src"
    src.mkdir()
    tower = "model.vision_tower.vision_tower.vision_model."
    saved(src / "pytorch_model.bin", {original(n).replace("vision_tower.", tower): x for n, x in tensors.items()})
    (src / "config.json").write_text(json.dumps(ORIGINAL))
    # Of the two towers it is the one inside that counts.
    wrong = {name.replace("tower", "model"): x + 1 for name, x in tensors.items() if name.startswith("vision_tower.")}
    write(parts["clip"], wrong, {"model_type": "clip", "vision_config": HF["vision_config"]})
    same_as(params, src, **parts)
    assert read_config(src, parts=parts).text == CONFIG.text


def test_bins_in_shards_and_a_whole_clip(tensors, params, parts, tmp_path):
    src = tmp_path / "llava-v1.5"
    src.mkdir()
    decoder = {original(name): x for name, x in tensors.items() if not name.startswith("vision")}
    names = sorted(decoder)
    shards = {"pytorch_model-0.bin": names[::2], "pytorch_model-1.bin": names[1::2]}
    for file, shard in shards.items():
        saved(src / file, {name: decoder[name] for name in shard})
    index = {"weight_map": {name: file for file, shard in shards.items() for name in shard}}
    (src / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (src / "config.json").write_text(json.dumps(ORIGINAL))
    clip = parts["clip"]
    tower = {name.replace("tower", "model"): x for name, x in tensors.items() if name.startswith("vision_tower.")}
    tower |= {"logit_scale": np.zeros((), np.float32), "text_model.final_layer_norm.weight": np.zeros(3, np.float32)}
    tower |= {name: np.zeros((2, 3), np.float32) for name in ("visual_projection.weight", "text_projection.weight")}
    tower["vision_model.embeddings.position_ids"] = np.zeros((1, 10), np.float32)
    write(clip, tower, {"model_type": "clip", "vision_config": HF["vision_config"]})
    same_as(params, src, clip=clip)
    # Beside the source it is found.
    with pytest.raises(WeightsError, match="holds no vision tower; pass --clip=DIR"):
        llava.open_release(src, ORIGINAL, {})
    clip.rename(tmp_path / "clip-vit-large-patch14-336")
    same_as(params, src)


def test_a_projector_alone_and_its_llama(tensors, params, parts, tmp_path):
    src = tmp_path / "stage1"
    src.mkdir()
    saved(src / "mm_projector.bin", projector(tensors))
    stage = {**ORIGINAL, "image_aspect_ratio": "square", "tune_mm_mlp_adapter": True}
    (src / "config.json").write_text(json.dumps(stage))
    with pytest.raises(WeightsError, match="holds a part of LLaVA alone; pass --base=DIR with the Llama"):
        found_in(src, {"clip": parts["clip"]})
    assert_found(src, parts, tensors)
    # A base that is itself a LLaVA: the projector here counts.
    write_safetensors(*whole(tensors, parts["base"]))
    assert_found(src, parts, tensors)


def whole(tensors, directory):
    state = {original(n): x + n.startswith("multi") for n, x in tensors.items() if not n.startswith("vision")}
    return directory, {name: (x.shape, x.dtype) for name, x in state.items()}, state.items()


def test_adapters_are_added_to_the_weights(adapted, parts):
    src, merged, _ = adapted
    assert_found(src, parts, merged)


def test_later_spellings_and_safetensors(adapted, parts):
    src, merged, halves = adapted
    (src / "adapter_model.bin").unlink()
    later = {name.replace(".weight", ".default.weight"): x for name, x in halves.items()}
    write_safetensors(src, {name: (x.shape, x.dtype) for name, x in later.items()}, later.items())
    (src / "model.safetensors").rename(src / "adapter_model.safetensors")
    assert_found(src, parts, merged)


def test_the_sum_is_taken_in_float32_and_kept_in_the_files_precision(adapted, parts, tensors):
    src, merged, _ = adapted
    name = f"language_model.{BIG}.weight"
    base = {original(n): x.astype(np.float16) for n, x in tensors.items() if not n.startswith(("vision", "multi"))}
    write(parts["base"], base, LLAMA_JSON)
    found = found_in(src, parts)[name]
    assert found.dtype == np.float16
    expected = base[original(name)].astype(np.float32) + (merged[name] - tensors[name])
    assert np.abs(found.astype(np.float32) - expected).max() < 0.01


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"base_model.model.model.{BIG}.lora_B.weight": None}, r"lora_B, lora_A \[None, .4, 128.. for .*down_proj"),
        ({f"base_model.model.model.{BIG}.lora_A.weight": np.ones((3, 192), np.float32)}, r"\(3, 192\).*and r=4"),
        ({"base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": np.ones((4, 64), np.float32)},
         "adapter_model.bin holds .*layers.7.mlp.up_proj.lora_A.weight, which belongs to no weight"),
        ({"base_model.model.model.norm.weight": np.ones(64, np.float32)},
        "holds .*norm.weight, which belongs to no weight"),
    ],
)  # fmt: skip
def test_adapters_that_do_not_fit_are_named(change, message, adapted, parts):
    src, _, halves = adapted
    saved(src / "adapter_model.bin", {name: x for name, x in (halves | change).items() if x is not None})
    with pytest.raises(WeightsError, match=message):
        found_in(src, parts)


@pytest.mark.parametrize(
    ("field", "value"),
    [("bias", "all"), ("fan_in_fan_out", True), ("use_rslora", True), ("use_dora", True), ("peft_type", "IA3"),
     ("modules_to_save", ["lm_head"]), ("rank_pattern", {"q_proj": 8})],
)  # fmt: skip
def test_adapters_of_another_kind_are_refused(field, value, adapted, parts):
    src, _, _ = adapted
    (src / "adapter_config.json").write_text(json.dumps({**ADAPTER, field: value}))
    with pytest.raises(WeightsError, match=re.escape(f"adapter_config.json has {field}={value!r}; ")):
        found_in(src, parts)


def test_what_is_missing_of_the_form_is_named(adapted, parts):
    src, _, _ = adapted
    others = src / "non_lora_trainables.bin"
    others.rename(src / "kept")
    with pytest.raises(WeightsError, match="holds adapters and no non_lora_trainables.bin, which LLaVA's training"):
        found_in(src, parts)
    (src / "kept").rename(others)
    (src / "adapter_model.bin").unlink()
    with pytest.raises(WeightsError, match="holds adapter_config.json and no adapters"):
        found_in(src, parts)
    (src / "adapter_config.json").write_text(json.dumps({k: v for k, v in ADAPTER.items() if k != "r"}))
    with pytest.raises(WeightsError, match="adapter_config.json lacks r"):
        found_in(src, parts)


def test_a_base_of_another_kind_is_named(adapted, parts):
    src, _, _ = adapted
    (parts["base"] / "config.json").write_text(json.dumps({**LLAMA_JSON, "rms_norm_eps": 1e-3}))
    with pytest.raises(WeightsError, match=r"vicuna/config.json states norm_eps=0.001; expected 1e-05, as in "):
        found_in(src, parts)


# ------------------------------------------------------------------ llava-hf's layout


@pytest.fixture
def hf(tensors, tmp_path):
    return write(tmp_path / "hf", released(CONFIG, tensors), HF)


def test_rows_beyond_the_vocabulary_are_dropped_and_added_again(hf, params, tmp_path):
    fewer = replaced(CONFIG, "text", vocab_size=80)
    _, loaded = load_checkpoint(hf, fewer, one())
    np.testing.assert_array_equal(loaded["decoder"]["embed"]["table"], params["decoder"]["embed"]["table"][:80])
    np.testing.assert_array_equal(loaded["decoder"]["head"]["kernel"], params["decoder"]["head"]["kernel"][:, :80])
    export(loaded, fewer, tmp_path / "rows")
    assert read_config(tmp_path / "rows").text.vocab_size == 128
    head = np.asarray(open_leaves(tmp_path / "rows")["decoder"]["head"]["kernel"])
    np.testing.assert_allclose(head[:, 80:], np.repeat(head[:, :80].mean(axis=1, keepdims=True), 48, axis=1), atol=1e-6)
    # Of what was converted, too.
    convert(hf, tmp_path / "orbax")
    same(load_checkpoint(tmp_path / "orbax", fewer, one())[1], loaded)


def test_a_conversion_takes_the_tokenizer_and_refuses_what_it_would_lose(hf, params, tmp_path):
    (hf / "tokenizer.json").write_text("{}")
    there = convert(hf, tmp_path / "orbax")
    assert (there["parameters"], there["dtype"]) == (build.num_params(params), "float32")
    assert (tmp_path / "orbax" / "tokenizer.json").read_text() == "{}"
    with pytest.raises(WeightsError, match="exists and is not empty"):
        convert(hf, tmp_path / "orbax")
    with pytest.raises(WeightsError, match="to='onnx'; accepted: orbax, hf"):
        convert(hf, tmp_path / "new", to="onnx")


def test_sixteen_bits_stay_sixteen_bits_and_widen_when_asked(params, tmp_path):
    halves = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    export(halves, CONFIG, tmp_path / "hf")
    assert convert(tmp_path / "hf", tmp_path / "orbax")["dtype"] == "bfloat16"
    same(load_checkpoint(tmp_path / "orbax", CONFIG, one())[1], jax.tree.map(lambda w: w.astype(jnp.float32), halves))


def test_a_directory_without_weights_says_where_to_get_them(tmp_path):
    for error in (WeightsError, ConfigError):
        with pytest.raises(error, match="hf download llava-hf/llava-1.5-7b-hf"):
            read_config(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(WeightsError, match="holds no weights"):
        open_leaves(tmp_path)


def test_a_tied_head_that_is_another_is_refused_and_an_untied_model_needs_one(tensors, tmp_path):
    tied = {**HF, "tie_word_embeddings": True}
    with pytest.raises(
        WeightsError, match="tie_word_embeddings, but language_model.lm_head.weight is not language_mod"
    ):
        open_leaves(write(tmp_path, released(CONFIG, tensors), tied))
    embedding = tensors["language_model.embed_tokens.weight"]
    leaves = open_leaves(write(tmp_path, released(CONFIG, tensors | {"lm_head.weight": embedding}), tied))
    assert "head" not in leaves["decoder"]
    headless = {name: x for name, x in tensors.items() if name != "lm_head.weight"}
    with pytest.raises(WeightsError, match="1 missing: lm_head.weight"):
        open_leaves(write(tmp_path, released(CONFIG, headless), HF))
