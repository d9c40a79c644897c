"""What holds for every family: both ways through files, meshes, fields that disagree, checkpoints of another model."""

import copy
import dataclasses
import json
import re
from pathlib import Path

import jax
import pytest
from releases import CONFIGS, one, random_params, released, replaced, same, same_as, tensors_of, write

import medcg_jax
from medcg_jax.config import MeshConfig
from medcg_jax.families.build import SIZES
from medcg_jax.families.weights.convert import MODEL_FILE, convert, load_checkpoint, module_of, read_config
from medcg_jax.families.weights.files import WeightsError, read_json
from medcg_jax.mesh import make_mesh
from medcg_jax.nn.layers import ACTIVATIONS

FAMILIES = list(CONFIGS)
# A released size of each.
NAMES = {
    "llava": "llava15_7b", "qwen2_vl": "qwen2_vl_7b", "mllama": "llama32_vision_11b", "minigpt_v2": "minigpt_v2_7b",
    "next_chat": "next_chat_7b_336",
}  # fmt: skip


@pytest.fixture(scope="module")
def releases(tmp_path_factory):
    """Family -> (released directory, parameters)."""
    made = {}
    for name, config in CONFIGS.items():
        params = random_params(config)
        folder = tmp_path_factory.mktemp(name)
        tensors = released(config, tensors_of(config, params))
        made[name] = write(folder / "src", tensors, module_of(config).config_to_json(config, "float32")), params
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back(family, releases, tmp_path):
    src, params = releases[family]
    config = CONFIGS[family]
    same_as(params, src, config)
    there = convert(src, tmp_path / "orbax")
    same_as(params, tmp_path / "orbax", config)
    back = convert(tmp_path / "orbax", tmp_path / "hf", to="hf")
    assert (back["tensors"], back["parameters"], back["dtype"]) == (there["tensors"], there["parameters"], "float32")
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == (src / "model.safetensors").read_bytes()
    assert read_json(tmp_path / "hf" / "config.json") == read_json(src / "config.json")
    # As runs restore it, on eight devices.
    mesh = make_mesh(MeshConfig(data=4, fsdp=2, tensor=1))
    _, loaded = load_checkpoint(tmp_path / "orbax", config, mesh)
    assert any(len(leaf.sharding.device_set) == 8 and not leaf.is_fully_replicated for leaf in jax.tree.leaves(loaded))
    same(jax.device_put(loaded, jax.devices()[0]), params)


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_of_another_model_are_refused_with_their_file(family, releases, tmp_path):
    """The config.json of one family beside the tensors of the next one."""
    src = releases[family][0]
    other = releases[FAMILIES[(FAMILIES.index(family) + 1) % len(FAMILIES)]][0]
    tmp_path.joinpath("config.json").write_text((src / "config.json").read_text())
    tmp_path.joinpath("model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    # LLaVA's and NExT-Chat's want a vision tower before anything else.
    unfit = rf"does not fit the model: \d+ missing: .*in {tmp_path}/model.safetensors"
    message = rf"{tmp_path} ({unfit}|holds no vision tower)"
    config = CONFIGS[family]
    for load in (lambda: load_checkpoint(tmp_path, config, one()), lambda: convert(tmp_path, tmp_path / "dst")):
        with pytest.raises(WeightsError, match=message):
            load()
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_of_another_family_or_size_is_refused_with_its_name(family, releases):
    src = releases[family][0]
    for wanted in FAMILIES:
        if wanted != family:
            with pytest.raises(WeightsError, match=rf"{src} holds a {family}; a {wanted} is wanted"):
                load_checkpoint(src, CONFIGS[wanted], one())
    config = CONFIGS[family]
    cases = {"norm_eps": 0.25, "rope_theta": 3.0, "num_heads": 2 * config.text.num_heads}
    for field, value in cases.items():
        message = rf"{src} is of another architecture: .*text.{field} {getattr(config.text, field)} \(wanted {value}\)"
        with pytest.raises(WeightsError, match=message):
            load_checkpoint(src, replaced(config, "text", **{field: value}), one())
    field, value = ("patch_size_px", 2) if family == "qwen2_vl" else ("image_size_px", 64)
    with pytest.raises(WeightsError, match=rf"vision.{field} .* \(wanted {value}\)"):
        load_checkpoint(src, replaced(config, "vision", **{field: value}), one())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_file_that_is_damaged_is_named(family, tmp_path):
    config = CONFIGS[family]
    whole = {"family": family, **dataclasses.asdict(config)}
    file = tmp_path / MODEL_FILE
    file.write_text(json.dumps(whole))
    assert read_config(tmp_path) == config
    for change, message in (
        ({"family": "gpt"}, "family='gpt'; accepted: llava, qwen2_vl"),
        ({"color": 1}, f"unknown fields of {type(config).__name__}: color"),
        ({"text": {**whole["text"], "num_kv_heads": 3}}, "num_kv_heads=3"),
    ):
        file.write_text(json.dumps({**whole, **change}))
        with pytest.raises(WeightsError, match=re.escape(f"{file}: ") + ".*" + message):
            read_config(tmp_path)
    file.write_text("{")
    with pytest.raises(WeightsError, match=re.escape(f"{file}: no JSON: ")):
        read_config(tmp_path)


# (field, a value that this port does not compute, what the message says is accepted)
LLAMA = [
    ("hidden_act", "gelu", "'silu'"), ("attention_bias", True, "False"), ("mlp_bias", True, "False"),
    ("tie_word_embeddings", True, "False"), ("rope_parameters.rope_type", "linear", "'default'"),
    ("rope_scaling.type", "dynamic", "'default'"), ("rope_scaling.partial_rotary_factor", 0.5, "1.0"),
]  # fmt: skip
ACTS = " or ".join(map(repr, ACTIVATIONS))
CLIP = [
    ("vision_config.hidden_act", "prelu", ACTS), ("vision_config.num_channels", 1, "3"),
    ("vision_config.model_type", "siglip_vision_model", "'clip_vision_model' or 'clip'"),
]  # fmt: skip
REFUSED = {
    "llava": [
        *CLIP, ("text_config.hidden_act", "prelu", ACTS),
        ("text_config.rope_parameters.rope_type", "yarn", "'default' or 'linear' or 'llama3'"),
        ("text_config.rope_scaling.type", "dynamic", "'default' or 'linear' or 'llama3'"),
        ("text_config.rope_scaling.partial_rotary_factor", 0.5, "1.0"),
        ("text_config.model_type", "mistral", "'llama' or 'llava' or 'llava_llama'"),
        ("projector_hidden_act", "prelu", ACTS), ("vision_feature_select_strategy", "cls", "'default' or 'full'"),
        ("vision_feature_layer", [-2, -5], "one layer"),
    ],
    "qwen2_vl": [
        ("hidden_act", "prelu", ACTS), ("use_sliding_window", True, "attention to all that came before"),
        ("attention_dropout", 0.1, "0.0"), ("head_dim", 64, "128"),
        ("rope_scaling.type", "yarn", "'default' or 'mrope' or 'linear' or 'llama3'"),
        ("rope_parameters.rope_type", "dynamic", "'default' or 'mrope' or 'linear' or 'llama3'"),
        ("vision_config.hidden_act", "prelu", ACTS),
        ("vision_config.hidden_size", 1280, "3584"), ("vision_config.in_chans", 1, "3"),
        ("vision_config.in_channels", 1, "3"), ("vision_config.spatial_patch_size", 16, "14"),
        ("vision_config.rope_parameters.rope_type", "default", "'axial'"),
    ],
    "mllama": [
        ("text_config.model_type", "llama", "'mllama_text_model'"), ("text_config.hidden_act", "prelu", ACTS),
        ("text_config.rope_parameters.rope_type", "yarn", "'default' or 'linear' or 'llama3'"),
        ("text_config.rope_scaling.rope_type", "yarn", "'default' or 'linear' or 'llama3'"),
        ("vision_config.hidden_act", "prelu", ACTS), ("vision_config.num_channels", 1, "3"),
        ("vision_config.max_num_tiles", 6, "4"), ("vision_config.supported_aspect_ratios", [[1, 1]], "[[1, 1], [1, 2]"),
        ("vision_config.vision_output_dim", 1280, "7680"),
        ("vision_config.model_type", "clip", "'mllama_vision_model'"),
    ],
    "minigpt_v2": [
        *LLAMA, ("lora_target_modules", ["lm_head"], "['q_proj', 'v_proj']"), ("lora_scale", 1.0, "0.25"),
        ("num_image_tokens", 64, "256"),
    ],
    "next_chat": [
        *LLAMA, *CLIP, ("mm_depth", 1, "2"), ("use_mm_proj", False, "True"), ("mm_hidden_size", 768, "1024"),
        ("architectures", ["LlamaForCausalLM"], "['NextChatForSegLM'] or ['NextChatForCausalLM']"),
    ],
}  # fmt: skip
# (field, value, part of the message): fields that do not go together, are missing, or name another model.
UNFIT = {
    "llava": [
        ("model_type", "llava_next", "model_type='llava_next'; accepted: llava"),
        ("vision_config.image_size", 13, "image_size_px=13"),
        ("vision_config.image_size", [336, 224], "the same for all sides"),
        ("vision_feature_layer", -30, "feature_layer=-30: one that runs 1 to 24 layers"),
        ("text_config.num_key_value_heads", 5, "num_kv_heads=5"),
    ],
    "qwen2_vl": [
        ("model_type", "qwen2_5_vl", "model_type='qwen2_5_vl'; accepted: llava"),
        ("num_key_value_heads", 5, "num_kv_heads=5"),
        ("rope_scaling.mrope_section", [16, 16, 24],
        "mrope_sections=(16, 16, 24): three that sum to half of head_dim=128"),
        ("layer_types", ["full_attention", "sliding_attention"],
        "layer_types=['full_attention', 'sliding_attention']; attention to all that came before is accepted"),
    ],
    "mllama": [
        ("model_type", "mllama2", "model_type='mllama2'; accepted: llava"),
        ("text_config.rope_parameters.factor", None, "lack factor"),
        ("text_config.cross_attention_layers", [3, 99], "cross_layers=(3, 99) of num_layers=40"),
        ("vision_config.intermediate_layers_indices", [3, 7, 15, 23, 32], "intermediate_layers=(3, 7"),
    ],
    "minigpt_v2": [
        ("model_type", "minigpt4", "model_type='minigpt4'; accepted: llava"), ("vit_heads", None, "lacks vit_heads"),
        ("tokens_per_group", 3, "patches_per_token=3"), ("image_size", 449, "image_size_px=449"),
    ],
    "next_chat": [
        ("model_type", "next", "model_type='next'; accepted: llava"),
        ("mm_vision_select_layer", -30, "feature_layer=-30"),
        ("sam_config.depth", 3, "sam_config: unknown fields of SamConfig: depth"), ("sam_config.num_heads", 7, "num_heads=7"),
        ("vision_config.image_size", 13, "image_size_px=13"),
    ],
}  # fmt: skip
CASES = [(family, f, v, f"config.json has {f}={v!r}; {a}") for family, cases in REFUSED.items() for f, v, a in cases]
CASES += [(family, *case) for family, cases in UNFIT.items() for case in cases]


@pytest.mark.parametrize(("family", "field", "value", "message"), CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES])
def test_fields_that_the_port_does_not_compute_are_refused_by_name(family, field, value, message, tmp_path):
    config = SIZES[NAMES[family]]()
    found = json.loads(json.dumps(module_of(config).config_to_json(config, "bfloat16")))
    *parents, last = field.split(".")
    part = found
    for name in parents:
        part = part.setdefault(name, {})
    part[last] = value
    if value is None:
        del part[last]
    file = tmp_path / "config.json"
    file.write_text(json.dumps(found))
    with pytest.raises(WeightsError) as error:
        read_config(tmp_path)
    assert str(file) in str(error.value) and message in str(error.value)


# Fields of liuhaotian's config.json, which names CLIP without its sizes.
ORIGINAL = {
    "model_type": "llava_llama", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11008,
    "max_position_embeddings": 4096, "mm_hidden_size": 1024, "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "num_attention_heads": 32,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "image_aspect_ratio": "pad", "num_hidden_layers": 32,
    "num_key_value_heads": 32, "pad_token_id": 0, "rms_norm_eps": 1e-05, "rope_scaling": None, "vocab_size": 32000,
    "tie_word_embeddings": False, "use_mm_proj": True, "pretraining_tp": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value", "accepted"),
    [
        ("mm_projector_type", "linear", "'mlp2x_gelu'"), ("mm_vision_select_feature", "cls_patch", "'patch'"),
        ("mm_use_im_start_end", True, "False"), ("mm_patch_merge_type", "spatial_unpad", "'flat'"),
        ("image_aspect_ratio", "anyres", "'pad'"),
        ("mm_vision_tower", "google/siglip-so400m-patch14-384", "--clip=DIR"),
        ("mm_hidden_size", 768, "1024"), ("rope_scaling", {"type": "linear", "factor": 2.0}, "'default'"),
        ("hidden_act", "gelu", "'silu'"),
    ],
)  # fmt: skip
def test_liuhaotians_fields_too(field, value, accepted, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(ORIGINAL))
    config = SIZES["llava15_7b"]()
    assert read_config(tmp_path) == dataclasses.replace(config, image_token_id=32000)
    file.write_text(json.dumps({**ORIGINAL, field: value}))
    with pytest.raises(WeightsError, match=re.escape(f"{file}: config.json has {field}")) as error:
        read_config(tmp_path)
    assert accepted in str(error.value)


def test_the_decoder_of_minigpts_release_is_checked_as_every_llama(tmp_path):
    module = module_of(CONFIGS["minigpt_v2"])
    found = module.llama_json(SIZES["minigpt_v2_7b"](), "float16")
    for field, value, accepted in LLAMA:
        *parents, last = field.split(".")
        changed = copy.deepcopy(found)
        (changed.setdefault(parents[0], {}) if parents else changed)[last] = value
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(WeightsError, match=re.escape(str(tmp_path))) as error:
            read_config(tmp_path)
        assert accepted in str(error.value)


def test_pickles_are_read_in_one_place_and_without_code():
    """Every call of `torch.load` and of numpy's for pickles, in the package's text."""

    root = Path(medcg_jax.__file__).parent
    texts = {path.name: path.read_text() for path in root.rglob("*.py")}
    calls = [(name, call) for name, text in texts.items() for call in re.findall(r"torch\.load\([^)]*\)", text)]
    assert [name for name, _ in calls] == ["files.py"] and "weights_only=True" in calls[0][1]
    assert not [name for name, text in texts.items() if re.search(r"pickle\.loads?\(|allow_pickle=True|joblib", text)]
