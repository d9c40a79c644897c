"""NExT-Chat's weights: whole and in parts, all three stages, the way back, and strictness."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from flax import nnx
from releases import CONFIGS, one, random_params, released, same, same_as, tensors_of, write

from medcg_jax.config import MeshConfig
from medcg_jax.families import build
from medcg_jax.families.next_chat import next_chat_7b_336
from medcg_jax.families.weights import engine, next_chat
from medcg_jax.families.weights.convert import convert, export, load_checkpoint, read_config
from medcg_jax.families.weights.files import WeightsError, open_safetensors
from medcg_jax.mesh import make_mesh
from tests.golden import next_chat as golden_next

CONFIG = CONFIGS["next_chat"]
JSON = next_chat.config_to_json(CONFIG, "float32")
BUFFERS = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32),
    "model.vision_tower.vision_model.embeddings.position_ids": np.ones((1, 17), np.float32),
}


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


@pytest.fixture(scope="module")
def tensors(params):
    """The original's names: "model.layers...", "model.vision_tower.vision_model...", "sam.model..."."""
    found = released(CONFIG, tensors_of(CONFIG, params))
    kinds = (
        "model.layers.0.", "model.vision_tower.vision_model.", "model.mm_projector.2.", "loc_encoder.0.",
        "loc_decoder.2.", "seg_prompt_mlp.0.", "sam.model.image_encoder.", "sam.model.prompt_encoder.",
        "sam.model.mask_decoder.", "lm_head.weight", "model.embed_tokens.weight",
    )  # fmt: skip
    assert all(any(name.startswith(kind) for name in found) for kind in kinds)
    return found


def without(tensors, *starts: str) -> dict:
    return {name: value for name, value in tensors.items() if not name.startswith(starts)}


def test_one_checkpoint_with_tower_and_sam(tensors, params, tmp_path):
    write(tmp_path, tensors | BUFFERS, JSON)
    found = read_config(tmp_path)
    assert dataclasses.replace(found, scan_unroll=1) == CONFIG
    same_as(params, tmp_path, CONFIG)
    mesh = make_mesh(MeshConfig(data=4, fsdp=2, tensor=1))
    loaded = load_checkpoint(tmp_path, CONFIG, mesh)[1]
    same(jax.device_put(loaded, jax.devices()[0]), params)
    assert loaded["decoder"]["embed"]["table"].addressable_shards[0].data.shape == (101, 32)


def test_a_tower_of_openais_clip(tensors, params, tmp_path):
    """`vision_config` is ours: a release states no sizes, which then come from CLIP's own config.json."""
    bare = {key: value for key, value in JSON.items() if key != "vision_config"}
    src = write(tmp_path / "src", without(tensors, "model.vision_tower."), bare)
    with pytest.raises(WeightsError, match="mm_hidden_size=64; 1024 is accepted"):
        read_config(src)
    write(src, without(tensors, "model.vision_tower."), JSON)
    with pytest.raises(WeightsError, match="holds no vision tower; pass --clip=DIR"):
        load_checkpoint(src, CONFIG, one())
    write(src, without(tensors, "model.vision_tower."), bare)
    start = "model.vision_tower."
    tower = {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
    tower |= {"logit_scale": np.ones((), np.float32), "text_model.final_layer_norm.bias": np.ones(3, np.float32)}
    clip = write(tmp_path / "clip", tower, {"model_type": "clip", "vision_config": JSON["vision_config"]})
    assert read_config(src, parts={"clip": clip}).vision == CONFIG.vision
    same_as(params, src, CONFIG, clip=clip)
    # Beside the release, under its own name.
    clip.rename(tmp_path / "clip-vit-large-patch14-336")
    same_as(params, src, CONFIG)


def test_sam_in_a_file_of_its_own(tensors, params, tmp_path):
    torch = pytest.importorskip("torch")
    src = write(tmp_path / "src", without(tensors, "sam."), JSON)
    with pytest.raises(WeightsError, match=r"holds no SAM, and .* is no file; pass --sam=FILE with sam_vit_h"):
        load_checkpoint(src, CONFIG, one())
    start = "sam.model."
    sam = {name.removeprefix(start): x for name, x in tensors.items() if name.startswith(start)}
    sam = {name: torch.from_numpy(value.copy()) for name, value in sam.items()}
    file = tmp_path / "elsewhere.pth"
    torch.save(sam, file)
    same_as(params, src, CONFIG, sam=file)
    # Another file of tensors is named.
    other = tmp_path / "other.pth"
    torch.save({"image_encoder.foo": torch.ones(2)}, other)
    with pytest.raises(WeightsError, match=r"missing: sam.model.*1 unused: sam.model.image_encoder.foo.*in .*other"):
        load_checkpoint(src, CONFIG, one(), parts={"sam": other})
    file.rename(tmp_path / next_chat.SAM_FILE)
    same_as(params, src, CONFIG)


def test_the_first_two_stages_have_no_masks(tensors, params, tmp_path):
    stage = dict(JSON, architectures=["NextChatForCausalLM"], sam_config=None)
    src = write(tmp_path / "src", without(tensors, "sam.", "seg_prompt_mlp."), stage)
    config = dataclasses.replace(CONFIG, sam=None)
    assert dataclasses.replace(read_config(src), scan_unroll=1) == config
    masks = ("sam_encoder", "sam_prompt", "mask_decoder", "mask_prompt")
    same_as(nnx.State({name: params[name] for name in params if name not in masks}), src, config)
    with pytest.raises(WeightsError, match=r"another architecture: .*sam None \(wanted"):
        load_checkpoint(src, CONFIG, one())
    # The third stage's config.json beside it: its tensors are missed.
    write(src, without(tensors, "sam.", "seg_prompt_mlp."), JSON)
    with pytest.raises(WeightsError, match="missing: seg_prompt_mlp.0.weight"):
        load_checkpoint(src, CONFIG, one())


def test_exported_it_has_the_originals_names(tensors, params, tmp_path):
    export(params, CONFIG, tmp_path)
    found = open_safetensors(tmp_path / "model.safetensors")
    assert found.shapes == {name: value.shape for name, value in tensors.items()}
    same_as(params, tmp_path, CONFIG)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loc_encoder.2.bias": None}, "1 missing: loc_encoder.2.bias; no unused"),
        ({"sam.model.mask_decoder.iou_token.weight": None}, "1 missing: sam.model.mask_decoder.iou_token.weight"),
        ({"model.mm_projector.4.bias": np.ones(3, np.float32)}, "1 unused: mm_projector.4.bias; no misshapen"),
        ({"sam.model.image_encoder.blocks.9.norm1.bias": np.ones(3, np.float32)},
         "1 unused: sam.model.image_encoder.blocks.9"),
        ({"loc_decoder.2.weight": np.ones((32, 4), np.float32)},
         r"1 misshapen: loc_decoder.2.weight \(32, 4\) instead of \(4, 32\)"),
        ({"model.layers.0.mlp.up_proj.weight": None, "extra": np.ones(1, np.float32),
          "lm_head.weight": np.ones(2, np.float32)},
         r"1 missing: language_model.layers.0.mlp.up_proj.weight; 1 unused: extra; 1 misshapen: lm_head.weight"),
    ],
)  # fmt: skip
def test_missing_unused_and_misshapen_tensors_stop_the_load(change, message, tensors, tmp_path):
    write(tmp_path, {name: x for name, x in (tensors | change).items() if x is not None}, JSON)
    with pytest.raises(WeightsError, match=message):
        load_checkpoint(tmp_path, CONFIG, one())
    with pytest.raises(WeightsError, match=message):
        convert(tmp_path, tmp_path / "out")


def test_a_projector_of_one_layer_is_refused(tensors, tmp_path):
    one_layer = {"model.mm_projector.weight": np.ones((64, 64), np.float32)}
    write(tmp_path, without(tensors, "model.mm_projector.") | one_layer, JSON)
    with pytest.raises(WeightsError, match="4 missing: multi_modal_projector.*1 unused: mm_projector.weight"):
        load_checkpoint(tmp_path, CONFIG, one())


def test_config_goes_both_ways_and_the_releases_is_the_7b_model():
    assert dataclasses.replace(next_chat.config_from_json(json.loads(json.dumps(JSON))), scan_unroll=1) == CONFIG
    released_7b = {
        "architectures": ["NextChatForSegLM"], "model_type": "nextchat", "hidden_act": "silu", "hidden_size": 4096,
        "intermediate_size": 11008, "max_position_embeddings": 4096, "mm_depth": 2, "mm_hidden_size": 1024,
        "mm_vision_select_layer": -2, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
        "pad_token_id": 0, "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False,
        "use_mm_proj": True, "vocab_size": 32005,
    }  # fmt: skip
    assert next_chat.config_from_json(released_7b) == next_chat_7b_336()
    with pytest.raises(WeightsError, match=re.escape("sam_config: unknown fields of SamConfig: depth")):
        next_chat.config_from_json({**JSON, "sam_config": {"depth": 3}})


def test_the_table_fills_every_parameter_of_7b_once():
    config = next_chat_7b_336()
    found = engine.slots(next_chat.table(config), build.abstract(config)[1])
    # LLaVA's 682; boxes and mask prompt, 2 layers of 2 each; SAM: 32 blocks of 14, 3 and 6 around them; 17 of the
    # prompts; the mask decoder's 2 blocks of 3 * 8 + 4 * 2 + 4, and 48 around them.
    assert len(found) == 24 * 16 + 7 + 4 + 32 * 9 + 3 + 12 + 32 * 14 + 9 + 17 + 2 * 36 + 48
    # With the 256 numbers of a buffer.
    assert sum(int(np.prod(slot.released_shape)) for slot in found.values()) == 7_741_812_788 + 256
    assert found["sam.model.image_encoder.blocks.31.attn.rel_pos_h"].released_shape == (127, 80)
    assert found["sam.model.image_encoder.blocks.30.attn.rel_pos_h"].released_shape == (27, 80)


def test_every_tensor_of_the_original_is_known(shared_dir):
    folder = shared_dir / "golden" / "next_chat" / "variant_a"
    found = open_safetensors(folder / "weights.safetensors")
    config = golden_next.read_config(folder)
    slots = engine.slots(next_chat.table(config), build.abstract(config)[1])
    theirs = {next_chat.canonical(name): shape for name, shape in found.shapes.items()}
    theirs.pop(None, None)
    assert theirs == {name: slot.released_shape for name, slot in slots.items()}
    assert {next_chat.released_name(name) for name in slots} <= set(found.shapes)
