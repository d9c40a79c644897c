"""NExT-Chat's table, the spellings of its tensor names, and its config.json read, checked and written.

Layout: one checkpoint of the original's NextChatForSegLM (stage 3), or NextChatForCausalLM (stages 1 and 2, without
SAM). CLIP may come from openai/clip-vit-large-patch14-336, SAM from `sam_vit_h_4b8939.pth`.
Source: NExT-ChatV/NExT-Chat:mllm/models/nextchat/*.py, mllm/models/sam/modeling_sam.py at 1e6c20f.
"""

import dataclasses
import re
from collections.abc import Mapping
from itertools import chain
from pathlib import Path

from medcg_jax.families.next_chat.model import NextChatConfig
from medcg_jax.families.next_chat.sam import SamConfig
from medcg_jax.families.weights import llava, tables
from medcg_jax.families.weights.engine import canonical_names
from medcg_jax.families.weights.fields import dataclass_of, end_of, expect, section, token
from medcg_jax.families.weights.files import Tensors, WeightsError, joined, open_bin

SAM_FILE = "sam_vit_h_4b8939.pth"
SEGMENTS, BOXES_ONLY = "NextChatForSegLM", "NextChatForCausalLM"
# A row of a table, or a table of positions, with a leading axis of size 1.
ONE_ROW = tables.leading_ones(1)
# PyTorch's transposed conv kernel [in, out, 2, 2] <-> ours [in, 2, 2, out].
UPSCALE = tables.Transform(lambda shape: (tuple((shape[i],) for i in (0, 3, 1, 2)), (0, 2, 3, 1)))
BOXES = (
    *tables.dense("loc_encoder.0", "encode_up"),
    *tables.dense("loc_encoder.2", "encode_down"),
    *tables.dense("loc_decoder.0", "decode_up"),
    *tables.dense("loc_decoder.2", "decode_down"),
)
MASK_PROMPT = tables.dense("seg_prompt_mlp.0", "up") + tables.dense("seg_prompt_mlp.2", "down")
SAM_LAYER = (
    *tables.norm("norm1", "norm1"),
    *tables.dense("attn.qkv", "qkv"),
    *tables.dense("attn.proj", "out", tables.linear(inputs=2)),
    ("attn.rel_pos_h", "rows", tables.SAME),
    ("attn.rel_pos_w", "columns", tables.SAME),
    *tables.norm("norm2", "norm2"),
    *tables.dense("mlp.lin1", "up"),
    *tables.dense("mlp.lin2", "down"),
)
DECODER_LAYER = (
    *tables.attention("self_attn", "tokens"),
    *tables.norm("norm1", "norm1"),
    *tables.attention("cross_attn_token_to_image", "to_image"),
    *tables.norm("norm2", "norm2"),
    *tables.dense("mlp.lin1", "up"),
    *tables.dense("mlp.lin2", "down"),
    *tables.norm("norm3", "norm3"),
    *tables.norm("norm4", "norm4"),
    *tables.attention("cross_attn_image_to_token", "to_tokens"),
)
DECODER_OUTER = (
    ("iou_token.weight", "iou_token", ONE_ROW),
    ("mask_tokens.weight", "mask_tokens", tables.SAME),
    *tables.attention("transformer.final_attn_token_to_image", "to_image"),
    *tables.norm("transformer.norm_final_attn", "norm"),
    *tables.dense("output_upscaling.0", "upscale1", UPSCALE),
    *tables.norm("output_upscaling.1", "upscale_norm"),
    *tables.dense("output_upscaling.3", "upscale2", UPSCALE),
)


def table(config: NextChatConfig) -> list[tables.Entry]:
    """Canonical name -> parameter, for every tensor of a NExT-Chat checkpoint."""
    entries = llava.table(config) + tables.entries(BOXES, path="boxes")
    if config.sam is None:
        return entries
    return entries + tables.entries(MASK_PROMPT, path="mask_prompt") + sam_table(config.sam)


def sam_table(sam: SamConfig) -> list[tables.Entry]:
    """The entries for SAM: `sam.model.` and the tensor's name in SAM's own file."""
    small = sam.mask_prompt_dim
    encoder = (
        ("pos_embed", "positions", ONE_ROW),
        *tables.dense("patch_embed.proj", "patch", tables.conv_patch(sam.patch_size_px)),
        *tables.dense("neck.0", "neck1", tables.conv_patch(1, sam.embed_dim), bias=False),
        *tables.norm("neck.1", "norm1"),
        *tables.dense("neck.2", "neck2", tables.conv_patch(3, sam.prompt_dim), bias=False),
        *tables.norm("neck.3", "norm2"),
    )
    prompt = (
        ("pe_layer.positional_encoding_gaussian_matrix", "frequencies", tables.SAME),
        ("not_a_point_embed.weight", "not_a_point", ONE_ROW),
        ("no_mask_embed.weight", "no_mask", ONE_ROW),
        *tables.dense("mask_downscaling.0", "mask1", tables.conv_patch(2, 1)),
        *tables.norm("mask_downscaling.1", "mask_norm1"),
        *tables.dense("mask_downscaling.3", "mask2", tables.conv_patch(2, small // 4)),
        *tables.norm("mask_downscaling.4", "mask_norm2"),
        *tables.dense("mask_downscaling.6", "mask3", tables.conv_patch(1, small)),
    )
    points = (("point_embeddings.{layer}.weight", "points", ONE_ROW),)
    hyper = sum((tables.dense(f"layers.{i}", f"layer{i}") for i in range(3)), ())
    iou = sum((tables.dense(f"layers.{i}", f"layer{i}") for i in range(sam.num_iou_layers)), ())
    name, prompt_name, mask_name = (
        f"sam.model.{module}." for module in ("image_encoder", "prompt_encoder", "mask_decoder")
    )
    stacks = (("windowed", sam.windowed_layers), ("whole", sam.global_layers))
    blocks = [
        tables.entries(SAM_LAYER, name + "blocks.{layer}.", f"sam_encoder {kind}", at) for kind, at in stacks if at
    ]
    decoder_layers = range(sam.num_decoder_layers)
    return [
        *tables.entries(encoder, name, "sam_encoder"),
        *chain(*blocks),
        *tables.entries(prompt, prompt_name, "sam_prompt"),
        *tables.entries(points, prompt_name, "sam_prompt", range(4)),
        *tables.entries(DECODER_OUTER, mask_name, "mask_decoder"),
        *tables.entries(
            DECODER_LAYER, mask_name + "transformer.layers.{layer}.", "mask_decoder blocks", decoder_layers
        ),
        *tables.entries(
            hyper, mask_name + "output_hypernetworks_mlps.{layer}.", "mask_decoder mask_mlps", range(sam.num_masks)
        ),
        *tables.entries(iou, mask_name + "iou_prediction_head.", "mask_decoder iou_mlp"),
    ]


def canonical(name: str) -> str | None:
    """The table's spelling of a tensor name; None if it is ignored. LLaVA's names are as there."""
    return llava.canonical(name)


def released_name(name: str) -> str:
    """The original's spelling of a canonical name."""
    name = re.sub(r"^language_model\.", "model.", name)
    name = re.sub(r"^vision_tower\.", "model.vision_tower.vision_model.", name)
    name = re.sub(r"^multi_modal_projector\.linear_1\.", "model.mm_projector.0.", name)
    return re.sub(r"^multi_modal_projector\.linear_2\.", "model.mm_projector.2.", name)


def peft_name(name: str) -> str | None:
    """The name of a weight in the Llama that peft's adapters are put on; None: it is not in there."""
    return released_name(name) if name.startswith("language_model.") else None


def read_release(src: Path, stated: dict, parts: Mapping[str, Path]) -> NextChatConfig:
    """The architecture that `stated`, the config.json of `src`, states; parts: `clip`, CLIP's directory."""
    return config_from_json(stated, llava.clip_json(src, parts))


def open_release(src: Path, stated: dict, parts: Mapping[str, Path]) -> tuple[Tensors, dict[str, str]]:
    """(tensors, canonical name -> name in them) of a released directory, with CLIP and SAM where it has none.

    Raises:
      WeightsError: no weights, or no vision tower in `src` and no CLIP, or masks in `src` and no SAM.
    """
    tensors, names = llava.open_release(src, stated, parts)
    if "seg_prompt_mlp.0.weight" not in names or any(name.startswith("sam.") for name in names):
        return tensors, names
    file = parts.get("sam", src.resolve().parent / SAM_FILE)
    if not file.is_file():
        raise WeightsError(f"{src} holds no SAM, and {file} is no file; pass --sam=FILE with {SAM_FILE}")
    sam = open_bin(file)
    sam_names = canonical_names(sam.shapes, lambda name: f"sam.model.{name}", str(file))
    return joined((tensors, names), (sam, sam_names))


def config_from_json(stated: dict, clip: dict | None = None) -> NextChatConfig:
    """The architecture that a config.json states.

    It names CLIP and SAM without their sizes. The defaults are ViT-L/14 at 336 pixels and ViT-H; `clip`, CLIP's
    config.json, or the keys `vision_config` and `sam_config` of `config_to_json` override them.

    Raises:
      WeightsError: the checkpoint is of another model, or differs from what this port computes.
    """
    expect(stated, "", model_type="nextchat", mm_depth=2, use_mm_proj=True, architectures=([SEGMENTS], [BOXES_ONLY]))
    has_masks = (stated.get("architectures") or [SEGMENTS]) == [SEGMENTS]
    text = llava.llama2_config({key: value for key, value in stated.items() if key != "model_type"})
    sam = dataclass_of(SamConfig, section(stated, "", "sam_config"), "config.json, sam_config")
    # The last five rows of the vocabulary: patch, start and end of an image, <at>, <boxes>.
    last = text.vocab_size - 1
    return NextChatConfig(
        vision=llava.original_vision(stated, section(stated, "", "vision_config") or clip),
        text=text,
        sam=sam if has_masks else None,
        image_token_id=last - 4,
        at_token_id=last - 1,
        box_token_id=last,
        pad_token_id=token(stated, "", "pad_token_id", 0),
        eos_token_id=end_of(stated, "", 2),
    )


def config_to_json(config: NextChatConfig, dtype: str) -> dict:
    """The original's config.json for a checkpoint of this architecture, with the sizes of CLIP and SAM beside it."""
    text = {key: value for key, value in llava.text_to_json(config.text).items() if key != "rope_parameters"}
    return {
        **text,
        "architectures": [BOXES_ONLY if config.sam is None else SEGMENTS],
        "model_type": "nextchat",
        "torch_dtype": dtype,
        "pad_token_id": config.pad_token_id,
        "eos_token_id": config.eos_token_id,
        "use_mm_proj": True,
        "mm_depth": 2,
        "mm_hidden_size": config.vision.embed_dim,
        "mm_vision_select_layer": config.vision.feature_layer,
        "vision_config": llava.vision_to_json(config.vision),
        "sam_config": None if config.sam is None else dataclasses.asdict(config.sam),
    }
