"""NExT-Chat's weights: whole and in parts, all three stages, the way back, and strictness."""

import dataclasses

import numpy as np
import pytest
from flax import nnx
from releases import CONFIGS, one, random_params, released, same_as, tensors_of, write

from medcg_jax.families import build
from medcg_jax.families.weights import engine, next_chat
from medcg_jax.families.weights.convert import load_checkpoint, open_leaves, read_config
from medcg_jax.families.weights.files import WeightsError, open_safetensors
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
    same_as(params, tmp_path)


def test_a_tower_of_openais_clip(tensors, params, tmp_path):
    """`vision_config` is ours: a release states no sizes, which then come from CLIP's own config.json."""
    bare = {key: value for key, value in JSON.items() if key != "vision_config"}
    src = write(tmp_path / "src", without(tensors, "model.vision_tower."), bare)
    with pytest.raises(WeightsError, match="mm_hidden_size=64; expected 1024"):
        read_config(src)
    write(src, without(tensors, "model.vision_tower."), JSON)
    with pytest.raises(WeightsError, match="holds no vision tower; pass --clip=DIR"):
        open_leaves(src)
    write(src, without(tensors, "model.vision_tower."), bare)
    start = "model.vision_tower."
    tower = {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
    tower |= {"logit_scale": np.ones((), np.float32), "text_model.final_layer_norm.bias": np.ones(3, np.float32)}
    clip = write(tmp_path / "clip", tower, {"model_type": "clip", "vision_config": JSON["vision_config"]})
    assert read_config(src, parts={"clip": clip}).vision == CONFIG.vision
    same_as(params, src, clip=clip)
    # Beside the release, under its own name.
    clip.rename(tmp_path / "clip-vit-large-patch14-336")
    same_as(params, src)


def test_sam_in_a_file_of_its_own(tensors, params, tmp_path):
    torch = pytest.importorskip("torch")
    src = write(tmp_path / "src", without(tensors, "sam."), JSON)
    with pytest.raises(WeightsError, match=r"holds no SAM, and .* is no file; pass --sam=FILE with sam_vit_h"):
        open_leaves(src)
    start = "sam.model."
    sam = {name.removeprefix(start): x for name, x in tensors.items() if name.startswith(start)}
    sam = {name: torch.from_numpy(value.copy()) for name, value in sam.items()}
    file = tmp_path / "elsewhere.pth"
    torch.save(sam, file)
    same_as(params, src, sam=file)
    # Another file of tensors is named.
    other = tmp_path / "other.pth"
    torch.save({"image_encoder.foo": torch.ones(2)}, other)
    with pytest.raises(WeightsError, match=r"missing: sam.model.*1 unused: sam.model.image_encoder.foo.*in .*other"):
        open_leaves(src, parts={"sam": other})
    file.rename(tmp_path / next_chat.SAM_FILE)
    same_as(params, src)


def test_the_first_two_stages_have_no_masks(tensors, params, tmp_path):
    stage = dict(JSON, architectures=["NextChatForCausalLM"], sam_config=None)
    src = write(tmp_path / "src", without(tensors, "sam.", "seg_prompt_mlp."), stage)
    config = dataclasses.replace(CONFIG, sam=None)
    assert dataclasses.replace(read_config(src), scan_unroll=1) == config
    masks = ("sam_encoder", "sam_prompt", "mask_decoder", "mask_prompt")
    same_as(nnx.State({name: params[name] for name in params if name not in masks}), src)
    with pytest.raises(WeightsError, match=r"another architecture: .*sam None \(expected"):
        load_checkpoint(src, CONFIG, one())
    # The third stage's config.json beside it: its tensors are missed.
    write(src, without(tensors, "sam.", "seg_prompt_mlp."), JSON)
    with pytest.raises(WeightsError, match="missing: seg_prompt_mlp.0.weight"):
        open_leaves(src)


def test_a_projector_of_one_layer_is_refused(tensors, tmp_path):
    one_layer = {"model.mm_projector.weight": np.ones((64, 64), np.float32)}
    write(tmp_path, without(tensors, "model.mm_projector.") | one_layer, JSON)
    with pytest.raises(WeightsError, match="4 missing: multi_modal_projector.*1 unused: mm_projector.weight"):
        open_leaves(tmp_path)


def test_every_tensor_of_the_original_is_known(shared_dir):
    folder = shared_dir / "golden" / "next_chat" / "variant_a"
    found = open_safetensors(folder / "weights.safetensors")
    config = golden_next.read_config(folder)
    slots = engine.slots(next_chat.table(config), build.abstract(config)[1])
    theirs = {next_chat.canonical(name): shape for name, shape in found.shapes.items()}
    theirs.pop(None, None)
    assert theirs == {name: slot.released_shape for name, slot in slots.items()}
    assert {next_chat.released_name(name) for name in slots} <= set(found.shapes)
