"""NExT-Chat's table, the spellings of its tensor names, and its config.json read, checked and written.

Layout: one checkpoint of the original's NextChatForSegLM (stage 3), or NextChatForCausalLM (stages 1 and 2, without
SAM). CLIP may come from openai/clip-vit-large-patch14-336, SAM from `sam_vit_h_4b8939.pth`.
Source: NExT-ChatV/NExT-Chat:mllm/models/nextchat/*.py, mllm/models/sam/modeling_sam.py at 1e6c20f.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from medcg_jax.families.next_chat.model import NextChatConfig
from medcg_jax.families.next_chat.sam import SamConfig
from medcg_jax.families.weights import llava
from medcg_jax.families.weights.engine import FLAT, SAME, Entry, Transform, canonical_names, conv_patch, linear
from medcg_jax.families.weights.fields import end_of, expect, section, token
from medcg_jax.families.weights.files import Tensors, WeightsError, joined, open_bin, read_json
from medcg_jax.families.weights.limits import dataclass_of

SAM_FILE = "sam_vit_h_4b8939.pth"
SEGMENTS, BOXES_ONLY = "NextChatForSegLM", "NextChatForCausalLM"

# A row of a table, or a table of positions, with an axis of 1 before it.
ONE_ROW = Transform(
    load=lambda tensor, shape: tensor.reshape(shape),
    store=lambda ours: ours[None],
    released_shape=lambda shape: (1, *shape),
)
# PyTorch's transposed conv kernel [in, out, 2, 2] <-> ours [in, 2, 2, out].
UPSCALE = Transform(
    load=lambda tensor, shape: tensor.transpose(0, 2, 3, 1),
    store=lambda ours: ours.transpose(0, 3, 1, 2),
    released_shape=lambda shape: (shape[0], shape[3], shape[1], shape[2]),
)


def table(config: NextChatConfig) -> list[Entry]:
    """Canonical name -> parameter, for every tensor of a NExT-Chat checkpoint."""
    entries = llava.table(config)
    for ours, released in (("encode_up", "encoder.0"), ("encode_down", "encoder.2"), ("decode_up", "decoder.0"),
                           ("decode_down", "decoder.2")):  # fmt: skip
        entries += _dense(f"loc_{released}", ("boxes", ours))
    if config.sam is not None:
        entries += _dense("seg_prompt_mlp.0", ("mask_prompt", "up")) + _dense(
            "seg_prompt_mlp.2", ("mask_prompt", "down")
        )
        entries += sam_table(config.sam)
    return entries


def sam_table(sam: SamConfig) -> list[Entry]:
    """The part of the table for SAM, whose tensors have their names in SAM's own file behind `sam.model.`."""
    return _sam_encoder(sam) + _sam_prompt(sam) + _mask_decoder(sam)


def _dense(name: str, path: tuple[str, ...], *, kernel=None, layers: range | tuple | None = None) -> list[Entry]:
    kernel = linear() if kernel is None else kernel
    return [
        Entry(f"{name}.weight", (*path, "kernel"), kernel, layers),
        Entry(f"{name}.bias", (*path, "bias"), FLAT, layers),
    ]


def _norm(name: str, path: tuple[str, ...], layers: range | tuple | None = None) -> list[Entry]:
    return [
        Entry(f"{name}.weight", (*path, "scale"), SAME, layers),
        Entry(f"{name}.bias", (*path, "bias"), SAME, layers),
    ]


def _sam_encoder(sam: SamConfig) -> list[Entry]:
    name, path = "sam.model.image_encoder.", ("sam_encoder",)
    entries = [Entry(name + "pos_embed", (*path, "positions"), ONE_ROW)]
    entries += _dense(name + "patch_embed.proj", (*path, "patch"), kernel=conv_patch(sam.patch_size_px))
    for stack, layers in (("windowed", sam.windowed_layers), ("whole", sam.global_layers)):
        if not layers:
            continue
        block, ours = name + "blocks.{layer}.", (*path, stack)
        entries += _norm(block + "norm1", (*ours, "norm1"), layers) + _norm(block + "norm2", (*ours, "norm2"), layers)
        entries += _dense(block + "attn.qkv", (*ours, "qkv"), layers=layers)
        entries += _dense(block + "attn.proj", (*ours, "out"), kernel=linear(inputs=2), layers=layers)
        entries.append(Entry(block + "attn.rel_pos_h", (*ours, "rows"), SAME, layers))
        entries.append(Entry(block + "attn.rel_pos_w", (*ours, "columns"), SAME, layers))
        entries += _dense(block + "mlp.lin1", (*ours, "up"), layers=layers)
        entries += _dense(block + "mlp.lin2", (*ours, "down"), layers=layers)
    entries.append(Entry(name + "neck.0.weight", (*path, "neck1", "kernel"), conv_patch(1, sam.embed_dim)))
    entries.append(Entry(name + "neck.2.weight", (*path, "neck2", "kernel"), conv_patch(3, sam.prompt_dim)))
    return entries + _norm(name + "neck.1", (*path, "norm1")) + _norm(name + "neck.3", (*path, "norm2"))


def _sam_prompt(sam: SamConfig) -> list[Entry]:
    name, path, small = "sam.model.prompt_encoder.", ("sam_prompt",), sam.mask_prompt_dim
    masks = name + "mask_downscaling."
    entries = [
        Entry(name + "pe_layer.positional_encoding_gaussian_matrix", (*path, "frequencies"), SAME),
        Entry(name + "point_embeddings.{layer}.weight", (*path, "points"), ONE_ROW, range(4)),
        Entry(name + "not_a_point_embed.weight", (*path, "not_a_point"), ONE_ROW),
        Entry(name + "no_mask_embed.weight", (*path, "no_mask"), ONE_ROW),
    ]
    for i, ours, kernel in ((0, "mask1", conv_patch(2, 1)), (3, "mask2", conv_patch(2, small // 4)),
                            (6, "mask3", conv_patch(1, small))):  # fmt: skip
        entries += _dense(f"{masks}{i}", (*path, ours), kernel=kernel)
    return entries + _norm(masks + "1", (*path, "mask_norm1")) + _norm(masks + "4", (*path, "mask_norm2"))


def _mask_decoder(sam: SamConfig) -> list[Entry]:
    name, path = "sam.model.mask_decoder.", ("mask_decoder",)
    layers, masks = range(sam.num_decoder_layers), range(sam.num_masks)
    block, ours = name + "transformer.layers.{layer}.", (*path, "blocks")
    entries = [
        Entry(name + "iou_token.weight", (*path, "iou_token"), ONE_ROW),
        Entry(name + "mask_tokens.weight", (*path, "mask_tokens"), SAME),
    ]
    for released, own in (("self_attn", "tokens"), ("cross_attn_token_to_image", "to_image"),
                          ("cross_attn_image_to_token", "to_tokens")):  # fmt: skip
        entries += _attention(block + released, (*ours, own), layers)
    for i in range(1, 5):
        entries += _norm(f"{block}norm{i}", (*ours, f"norm{i}"), layers)
    entries += _dense(block + "mlp.lin1", (*ours, "up"), layers=layers)
    entries += _dense(block + "mlp.lin2", (*ours, "down"), layers=layers)
    entries += _attention(name + "transformer.final_attn_token_to_image", (*path, "to_image"))
    entries += _norm(name + "transformer.norm_final_attn", (*path, "norm"))
    entries += _dense(name + "output_upscaling.0", (*path, "upscale1"), kernel=UPSCALE)
    entries += _norm(name + "output_upscaling.1", (*path, "upscale_norm"))
    entries += _dense(name + "output_upscaling.3", (*path, "upscale2"), kernel=UPSCALE)
    for i in range(3):
        mlp = name + "output_hypernetworks_mlps.{layer}.layers." + str(i)
        entries += _dense(mlp, (*path, "mask_mlps", f"layer{i}"), layers=masks)
    for i in range(sam.num_iou_layers):
        entries += _dense(f"{name}iou_prediction_head.layers.{i}", (*path, "iou_mlp", f"layer{i}"))
    return entries


def _attention(name: str, path: tuple[str, ...], layers: range | None = None) -> list[Entry]:
    parts = [_dense(f"{name}.{part}_proj", (*path, part), layers=layers) for part in "qkv"]
    return sum(parts, _dense(f"{name}.out_proj", (*path, "out"), kernel=linear(inputs=2), layers=layers))


def canonical(name: str) -> str | None:
    """The table's spelling of a tensor name; None for what is ignored. Names that LLaVA has are as there."""
    return llava.canonical(name)


def released_name(name: str) -> str:
    """The original's spelling of a canonical name."""
    name = re.sub(r"^language_model\.", "model.", name)
    name = re.sub(r"^vision_tower\.", "model.vision_tower.vision_model.", name)
    name = re.sub(r"^multi_modal_projector\.linear_1\.", "model.mm_projector.0.", name)
    return re.sub(r"^multi_modal_projector\.linear_2\.", "model.mm_projector.2.", name)


def read_release(src: Path, parts: Mapping[str, Path]) -> NextChatConfig:
    """The architecture that the released directory `src` states; parts: `clip`, CLIP's directory."""
    clip = parts.get("clip") or llava.clip_beside(src)
    return config_from_json(read_json(src / "config.json"), read_json(clip / "config.json") if clip else None)


def open_release(src: Path, parts: Mapping[str, Path]) -> tuple[Tensors, dict[str, str]]:
    """(tensors, canonical name -> name in them) of a released directory, with CLIP and SAM where it has none.

    parts: `clip`, CLIP's directory; `sam`, SAM's file; or what lies beside `src` under their released names.

    Raises:
      WeightsError: no weights, or no vision tower in `src` and no CLIP, or masks in `src` and no SAM.
    """
    tensors, names = llava.open_release(src, parts)
    if "seg_prompt_mlp.0.weight" not in names or any(name.startswith("sam.") for name in names):
        return tensors, names
    file = parts.get("sam", src.resolve().parent / SAM_FILE)
    if not file.is_file():
        raise WeightsError(f"{src} holds no SAM, and {file} is no file; pass --sam=FILE with {SAM_FILE}")
    sam = open_bin(file)
    sam_names = canonical_names(sam.shapes, lambda name: f"sam.model.{name}", str(file))
    return joined((tensors, names), (sam, sam_names))


def config_from_json(found: dict, clip: dict | None = None) -> NextChatConfig:
    """The architecture that a config.json states.

    It names CLIP and SAM without their sizes: those are ViT-L/14 at 336 pixels and ViT-H unless `clip`, CLIP's own
    config.json, or the keys `vision_config` and `sam_config` of `config_to_json` say otherwise.

    Raises:
      WeightsError: the checkpoint is of another model, or differs from what this port computes.
    """
    expect(found, "", model_type="nextchat", mm_depth=2, use_mm_proj=True, architectures=([SEGMENTS], [BOXES_ONLY]))
    has_masks = (found.get("architectures") or [SEGMENTS]) == [SEGMENTS]
    text = llava.llama2_config({key: value for key, value in found.items() if key != "model_type"})
    sam = dataclass_of(SamConfig, section(found, "", "sam_config"), "config.json, sam_config")
    # Five rows are added to the vocabulary: patch, start and end of an image, <at>, <boxes>.
    last = text.vocab_size - 1
    return NextChatConfig(
        vision=llava.original_vision(found, section(found, "", "vision_config") or clip),
        text=text,
        sam=sam if has_masks else None,
        image_token_id=last - 4,
        at_token_id=last - 1,
        box_token_id=last,
        pad_token_id=token(found, "", "pad_token_id", 0),
        eos_token_id=end_of(found, "", 2),
    )


def config_to_json(config: NextChatConfig, dtype: str) -> dict:
    """The original's config.json for a checkpoint of this architecture, with the sizes of CLIP and SAM beside it."""
    text = {key: value for key, value in llava.text_to_json(config.text, dtype).items() if key != "rope_parameters"}
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
