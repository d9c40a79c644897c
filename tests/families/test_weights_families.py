"""What holds for every family: both ways through files, meshes, fields that disagree, checkpoints of another model."""

import copy
import dataclasses
import functools
import json
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from releases import CONFIGS, one, random_release, released, replaced, same, same_as, tensors_of, write

import medcg_jax
from medcg_jax.config import MeshConfig
from medcg_jax.families import build
from medcg_jax.families.build import SIZES
from medcg_jax.families.llava.model import llava15_7b, llava15_tiny
from medcg_jax.families.mllama.model import llama32_vision_tiny
from medcg_jax.families.qwen2_vl.model import qwen2_vl_tiny
from medcg_jax.families.weights import engine, llava, mllama
from medcg_jax.families.weights.convert import MODEL_FILE, convert, load_checkpoint, module_of, open_leaves, read_config
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
    """A function: family -> (released directory, parameters)."""
    return functools.cache(lambda family: random_release(family, tmp_path_factory.mktemp(family)))


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back(family, releases, tmp_path):
    src, params = releases(family)
    config = CONFIGS[family]
    same_as(params, src)
    there = convert(src, tmp_path / "orbax")
    same_as(params, tmp_path / "orbax")
    back = convert(tmp_path / "orbax", tmp_path / "hf", to="hf")
    assert (back["tensors"], back["parameters"], back["dtype"]) == (there["tensors"], there["parameters"], "float32")
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == (src / "model.safetensors").read_bytes()
    assert read_json(tmp_path / "hf" / "config.json") == read_json(src / "config.json")
    # As runs restore it, on eight devices.
    if family not in ("llava", "mllama"):
        return
    mesh = make_mesh(MeshConfig(data=4, fsdp=2, tensor=1))
    _, loaded = load_checkpoint(tmp_path / "orbax", config, mesh)
    assert any(len(leaf.sharding.device_set) == 8 and not leaf.is_fully_replicated for leaf in jax.tree.leaves(loaded))
    same(jax.device_put(loaded, jax.devices()[0]), params)


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_of_another_model_are_refused_with_their_file(family, releases, tmp_path):
    """The config.json of one family beside the tensors of the next one."""
    src = releases(family)[0]
    other = releases(FAMILIES[(FAMILIES.index(family) + 1) % len(FAMILIES)])[0]
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
    src = releases(family)[0]
    for wanted in FAMILIES:
        if wanted != family:
            with pytest.raises(WeightsError, match=rf"{src} holds a {family}; expected a {wanted}"):
                load_checkpoint(src, CONFIGS[wanted], one())
    config = CONFIGS[family]
    cases = {"norm_eps": 0.25, "rope_theta": 3.0, "num_heads": 2 * config.text.num_heads}
    for field, value in cases.items():
        message = (
            rf"{src} is of another architecture: .*text.{field} {getattr(config.text, field)} \(expected {value}\)"
        )
        with pytest.raises(WeightsError, match=message):
            load_checkpoint(src, replaced(config, "text", **{field: value}), one())
    field, value = ("patch_size_px", 2) if family == "qwen2_vl" else ("image_size_px", 64)
    with pytest.raises(WeightsError, match=rf"vision.{field} .* \(expected {value}\)"):
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


# ------------------------------------------------------------------ tables


# family -> (size, its tensors, their numbers, shapes of some of them)
TABLES = {
    # 24 layers of 16, 7 around them; the projector's 4; 32 layers of 9, embedding, norm and head.
    "llava": (
        "llava15_7b", 24 * 16 + 7 + 4 + 32 * 9 + 3, 7_062_902_784,
        {"vision_tower.embeddings.patch_embedding.weight": (1024, 3, 14, 14),
         "language_model.layers.31.mlp.down_proj.weight": (4096, 11008)},
    ),
    # The patches; 32 layers of 12, the merger's 6; 28 layers of 12, embedding, norm and head.
    "qwen2_vl": (
        "qwen2_vl_7b", 1 + 32 * 12 + 6 + 28 * 12 + 3, 8_291_375_616,
        {"visual.patch_embed.proj.weight": (1280, 3, 2, 14, 14), "visual.blocks.31.attn.qkv.weight": (3840, 1280),
         "visual.blocks.31.attn.qkv.bias": (3840,), "language_model.layers.27.self_attn.k_proj.bias": (512,)},
    ),
    # 39 blocks of 13 and 4 around them; the norm's and the projector's 2 each; 32 layers of 9 and 4 halves; 3 more.
    "minigpt_v2": (
        "minigpt_v2_7b", 39 * 13 + 4 + 2 + 2 + 32 * (9 + 4) + 3, 7_782_021_504,
        {"visual_encoder.blocks.38.attn.qkv.weight": (4224, 1408), "llama_proj.weight": (4096, 5632),
         "llama_model.model.layers.31.self_attn.v_proj.lora_B.weight": (4096, 64)},
    ),
    # LLaVA's 682; boxes and mask prompt, 2 layers of 2 each; SAM: 32 blocks of 14, 3 and 6 around them; 17 of the
    # prompts; the mask decoder's 2 blocks of 3 * 8 + 4 * 2 + 4, and 48 around them. With the 256 numbers of a buffer.
    "next_chat": (
        "next_chat_7b_336", 24 * 16 + 7 + 4 + 32 * 9 + 3 + 12 + 32 * 14 + 9 + 17 + 2 * 36 + 48, 7_741_812_788 + 256,
        {"sam.model.image_encoder.blocks.31.attn.rel_pos_h": (127, 80),
         "sam.model.image_encoder.blocks.30.attn.rel_pos_h": (27, 80)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", TABLES)
def test_the_table_fills_every_parameter_of_a_release_once(family):
    size, num_tensors, num_numbers, shapes = TABLES[family]
    config = SIZES[size]()
    slots = engine.slots(module_of(config).table(config), build.abstract(config)[1])
    assert len(slots) == num_tensors
    assert sum(math.prod(slot.released_shape) for slot in slots.values()) == num_numbers
    assert {name: slots[name].released_shape for name in shapes} == shapes


# family -> (a tensor that is taken away, one that gets another shape), by their canonical names
FAULTS = {
    "llava": ("lm_head.weight", "vision_tower.encoder.layers.1.mlp.fc1.bias"),
    "qwen2_vl": ("visual.merger.ln_q.bias", "visual.blocks.0.attn.qkv.bias"),
    "mllama": ("language_model.layers.1.cross_attn_mlp_gate", "language_model.embed_tokens.weight"),
    "minigpt_v2": ("llama_proj.bias", "visual_encoder.blocks.1.attn.q_bias"),
    "next_chat": ("sam.model.mask_decoder.iou_token.weight", "loc_decoder.2.weight"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_unused_and_misshapen_tensors_and_names_held_twice_stop_the_load(family, releases, tmp_path):
    config, module = CONFIGS[family], module_of(CONFIGS[family])
    tensors = tensors_of(config, releases(family)[1])
    missing, misshapen = FAULTS[family]
    layer = next(name for name in tensors if "layers.1." in name)
    unused, shape = layer.replace("layers.1.", "layers.9."), tensors[misshapen].shape
    norm = next(name for name in tensors if name.endswith("norm.weight") and module.released_name(name) != name)
    wrong = np.concatenate([tensors[misshapen], tensors[misshapen]])
    for change, message in (
        ({missing: None}, f"1 missing: {missing}; no unused"),
        ({unused: tensors[layer]}, f"1 unused: {unused}; no misshapen"),
        ({misshapen: wrong}, f"1 misshapen: {misshapen} {wrong.shape} instead of {shape}"),
        (
            {missing: None, unused: tensors[layer], misshapen: wrong},
            f"1 missing: {missing}; 1 unused: {unused}; 1 miss",
        ),
    ):
        changed = {name: value for name, value in (tensors | change).items() if value is not None}
        src = write(tmp_path / "src", released(config, changed), module.config_to_json(config, "float32"))
        for load in (lambda: open_leaves(tmp_path / "src"), lambda: convert(tmp_path / "src", tmp_path / "dst")):
            with pytest.raises(WeightsError, match=re.escape(message)):
                load()
    write(src, released(config, tensors) | {norm: tensors[norm]}, module.config_to_json(config, "float32"))
    with pytest.raises(WeightsError, match=f"holds {norm} twice, as "):
        open_leaves(src)


# ------------------------------------------------------------------ config.json


# config.json of llava-hf/llava-1.5-7b-hf: what is left out has transformers' default.
RELEASED_LLAVA = {
    "model_type": "llava", "image_token_index": 32000, "pad_token_id": 32001, "projector_hidden_act": "gelu",
    "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
    "text_config": {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "vocab_size": 32064},
    "vision_config": {
        "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model",
        "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
        "vocab_size": 32000,
    },
}  # fmt: skip
# config.json of Qwen/Qwen2-VL-7B-Instruct, as it is known; no file of the release was at hand.
RELEASED_QWEN = {
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
# config.json of meta-llama/Llama-3.2-11B-Vision-Instruct: what concerns the architecture.
RELEASED_MLLAMA = {
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
        "patch_size": 14, "vision_output_dim": 7680, "supported_aspect_ratios": mllama.GRIDS,
    },
}  # fmt: skip
# config.json of NExT-Chat's release.
RELEASED_NEXT = {
    "architectures": ["NextChatForSegLM"], "model_type": "nextchat", "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 11008, "max_position_embeddings": 4096, "mm_depth": 2, "mm_hidden_size": 1024,
    "mm_vision_select_layer": -2, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
    "pad_token_id": 0, "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False,
    "use_mm_proj": True, "vocab_size": 32005,
}  # fmt: skip
LLAVA_7B = llava15_7b(pad_token_id=32001)


@pytest.mark.parametrize(
    ("stated", "config"),
    [
        (RELEASED_LLAVA, replaced(LLAVA_7B, "text", vocab_size=32064)), (RELEASED_QWEN, SIZES["qwen2_vl_7b"]()),
        (RELEASED_MLLAMA, SIZES["llama32_vision_11b"]()), (RELEASED_NEXT, SIZES["next_chat_7b_336"]()),
    ],
    ids=["llava", "qwen2_vl", "mllama", "next_chat"],
)  # fmt: skip
def test_the_released_config_is_the_size_that_it_is_called(stated, config):
    assert module_of(config).config_from_json(stated) == config


@pytest.mark.parametrize(
    "config",
    [
        *CONFIGS.values(), *(size() for size in SIZES.values()), llava15_tiny(40, 39, num_kv_heads=1, rope_theta=77.0),
        qwen2_vl_tiny(40, 39, num_kv_heads=1), llama32_vision_tiny(40, 39, num_kv_heads=1, rope_theta=77.0),
    ],
)  # fmt: skip
def test_config_goes_both_ways(config):
    module = module_of(config)
    stated = module.config_from_json(json.loads(json.dumps(module.config_to_json(config, "float32"))))
    # How large images may be stands in another file of a release, and how the model runs in none.
    elsewhere = ("min_pixels", "max_pixels", "scan_unroll")
    same = {name: getattr(stated, name) for name in elsewhere if hasattr(stated, name)}
    assert stated == dataclasses.replace(config, **same)


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
        ("text_config.model_type", "qwen2", "'llama' or 'llava' or 'llava_llama'"),
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
        ("vision_feature_layer", -30, "feature_layer=-30; expected one that runs 1 to 24 layers"),
        ("text_config.num_key_value_heads", 5, "num_kv_heads=5"),
    ],
    "qwen2_vl": [
        ("model_type", "qwen2_5_vl", "model_type='qwen2_5_vl'; accepted: llava"),
        ("num_key_value_heads", 5, "num_kv_heads=5"),
        ("rope_scaling.mrope_section", [16, 16, 24],
        "mrope_sections=(16, 16, 24); expected three of sum head_dim / 2 = 64"),
        ("layer_types", ["full_attention", "sliding_attention"],
        "layer_types=['full_attention', 'sliding_attention']; expected attention to all that came before"),
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
CASES = [
    (family, f, v, f"config.json has {f}={v!r}; expected {a}") for family, cases in REFUSED.items() for f, v, a in cases
]
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
    found = llava.text_to_json(SIZES["minigpt_v2_7b"]().text)
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
    pickled = [name for name, text in texts.items() if re.search(r"pickle\.loads?\(|allow_pickle=True|joblib", text)]
    assert pickled == ["__main__.py"]  # of bench: a stage reads what the process that started it has written
