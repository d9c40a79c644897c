"""Qwen2-VL's table, the spellings of its tensor names, and its config.json read, checked and written.

Layouts: the released one (`visual.*`, `model.*`, `lm_head`), that of transformers 4.52 and 5 (`model.visual.*`,
`model.language_model.*`). The 2B release ties its head to the embedding, and its files may or may not hold a copy.
Source: huggingface/transformers:conversion_mapping.py and models/qwen2_vl/configuration_qwen2_vl.py at 5.23.0.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from medcg_jax.families.decoder import DecoderConfig
from medcg_jax.families.qwen2_vl.model import Qwen2VLConfig
from medcg_jax.families.qwen2_vl.vit import Qwen2VitConfig
from medcg_jax.families.weights import fields, tables
from medcg_jax.families.weights.engine import canonical_names
from medcg_jax.families.weights.fields import TEXT_KEYS, expect, section
from medcg_jax.families.weights.files import Tensors, WeightsError, open_tensors
from medcg_jax.families.weights.llava import is_tied, llama_table, without_tied_head

# Buffers that old versions saved: recomputed here, never parameters.
IGNORED = re.compile(r"rotary_(pos_)?emb\.inv_freq$")
MERGER = tables.norm("ln_q", "norm") + tables.dense("mlp.0", "up") + tables.dense("mlp.2", "down")
# The rows of a fused bias are ordered as those of its kernel.
QKV = (("attn.qkv.weight", "qkv kernel", tables.fused_qkv()), ("attn.qkv.bias", "qkv bias", tables.fused_qkv()))
VIT_LAYER = (
    *tables.norm("norm1", "norm1"),
    *QKV,
    *tables.dense("attn.proj", "out", tables.linear(inputs=2)),
    *tables.norm("norm2", "norm2"),
    *tables.dense("mlp.fc1", "up"),
    *tables.dense("mlp.fc2", "down"),
)
TEXT_DEFAULTS = DecoderConfig(152064, 80, 8192, 64, 8, mlp_dim=29568, max_positions=32768)
VISION_KEYS = fields.keys(
    "patch_size_px=patch_size num_frames=temporal_patch_size merge=spatial_merge_size num_layers=depth "
    "embed_dim=embed_dim num_heads=num_heads activation=hidden_act"
)
VISION_DEFAULTS = Qwen2VitConfig()
# Tokens at the top of a config.json in every version.
TOKENS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}


def conv3d_patch(config: Qwen2VitConfig) -> tables.Transform:
    """PyTorch's conv kernel [E, C, frames, patch, patch] <-> ours [C * frames * patch * patch, E]."""
    patch = (3, config.num_frames, config.patch_size_px, config.patch_size_px)
    return tables.Transform(lambda shape: (((shape[1],), *((size,) for size in patch)), (1, 2, 3, 4, 0)))


def table(config: Qwen2VLConfig) -> list[tables.Entry]:
    """Canonical name -> parameter, for every tensor of a Qwen2-VL checkpoint; a tied head is none."""
    return [
        tables.Entry("visual.patch_embed.proj.weight", ("vision", "patch", "kernel"), conv3d_patch(config.vision)),
        *tables.entries(MERGER, "visual.merger.", "projector"),
        *tables.entries(VIT_LAYER, "visual.blocks.{layer}.", "vision blocks", range(config.vision.num_layers)),
        *llama_table(config.text),
    ]


def canonical(name: str) -> str | None:
    """The table's spelling of a tensor name of any Qwen2-VL layout; None if it is ignored.

    Examples: "model.norm.weight" (released) and "model.language_model.norm.weight" (transformers 5) are
    "language_model.norm.weight"; "model.visual.merger.ln_q.bias" is "visual.merger.ln_q.bias".
    """
    if IGNORED.search(name):
        return None
    name = name.removeprefix("model.")
    return re.sub(r"^(embed_tokens|layers|norm)\.", r"language_model.\1.", name)


def released_name(name: str) -> str:
    """The released spelling of a canonical name, which every version of transformers reads."""
    return re.sub(r"^language_model\.", "model.", name)


def read_release(src: Path, stated: dict, parts: Mapping[str, Path]) -> Qwen2VLConfig:
    """The architecture that `stated`, the config.json of `src`, states; it has no parts elsewhere."""
    return config_from_json(stated)


def open_release(src: Path, stated: dict, parts: Mapping[str, Path]) -> tuple[Tensors, dict[str, str]]:
    """(tensors, canonical name -> name) of a released directory; a copy of a tied head must equal the embedding.

    Raises:
      WeightsError: no weights, two tensors of one name, or a copy of a tied head that differs from the embedding.
    """
    tensors = open_tensors(src)
    return tensors, without_tied_head(tensors, canonical_names(tensors.shapes, canonical, str(src)), src, stated)


def config_from_json(stated: dict) -> Qwen2VLConfig:
    """The architecture that a config.json states, with the text model's keys at the top (released) or in `text_config`.

    Keys that a released config.json leaves out have transformers' defaults. It does not state limits of image sizes.

    Raises:
      WeightsError: the checkpoint is of another model, or differs from what this port computes; names each difference.
    """
    if stated.get("model_type") != "qwen2_vl":
        raise WeightsError(f"config.json has model_type={stated.get('model_type')!r}; expected 'qwen2_vl'")
    text, vision = section(stated, "", "text_config") or stated, section(stated, "", "vision_config")
    prefix = "" if text is stated else "text_config."
    kinds = text.get("layer_types") or ()
    windows = not isinstance(kinds, list | tuple) or any(kind != "full_attention" for kind in kinds)
    if windows or (fields.flag(text, prefix, "use_sliding_window", False) and "layer_types" not in text):
        field = "layer_types" if windows else "use_sliding_window"
        raise WeightsError(
            f"config.json has {prefix}{field}={str(text[field])[:100]}; expected attention to all that came before"
        )
    expect(text, prefix, attention_dropout=0.0, model_type=("qwen2_vl", "qwen2_vl_text"))
    rope, theta, scaling = fields.rope(text, prefix, 1e6, plain=("default", "mrope"))
    width = fields.number(text, prefix, "hidden_size", 8192, "embed_dim")
    num_heads = fields.number(text, prefix, "num_attention_heads", 64, "num_heads")
    expect({"hidden_size": 3584, **vision}, "vision_config.", hidden_size=width)
    expect(text, prefix, head_dim=width // num_heads)
    absent = {"num_kv_heads": num_heads if "num_key_value_heads" in text else 8}
    given = {"head_dim": width // num_heads, "qkv_bias": True, "tie_head": is_tied(stated)}
    decoder = fields.read_dataclass(
        TEXT_KEYS, TEXT_DEFAULTS, text, prefix, absent, rope_theta=theta, rope_scaling=scaling, **given
    )
    tower = _vision(vision)
    side = tower.patch_size_px * tower.merge
    sections = fields.whole_numbers(rope, f"{prefix}rope_scaling.", "mrope_section", (16, 24, 24), "mrope_sections")
    try:
        return Qwen2VLConfig(
            vision=tower,
            text=decoder,
            mrope_sections=sections,
            **{name: fields.token(stated, "", name, default) for name, default in TOKENS.items()},
            pad_token_id=fields.token(text, prefix, "pad_token_id", 151643),
            eos_token_id=fields.end_of(text, prefix, 151645, last=False),
            # Not in config.json: the defaults, or one block if that is larger.
            min_pixels=max(Qwen2VLConfig.min_pixels, side**2),
            max_pixels=max(Qwen2VLConfig.max_pixels, side**2),
        )
    except ValueError as error:
        raise fields.refused(error, prefix) from error


def _vision(stated: dict) -> Qwen2VitConfig:
    prefix = "vision_config."
    expect(stated, prefix, in_chans=3, in_channels=3)
    rope = section(stated, prefix, "rope_parameters")
    expect(rope, f"{prefix}rope_parameters.", rope_type="axial")
    width = fields.number(stated, prefix, "embed_dim", 1280, "embed_dim")
    ratio = fields.number(stated, prefix, "mlp_ratio", 4.0, "mlp_ratio", kind=float)
    theta = fields.number(rope, f"{prefix}rope_parameters.", "rope_theta", 10000.0, "rope_theta", kind=float)
    given = {"mlp_dim": int(width * ratio), "rope_theta": theta}
    vision = fields.read_dataclass(VISION_KEYS, VISION_DEFAULTS, stated, prefix, **given)
    # A second name of `patch_size` in the releases.
    expect(stated, prefix, spatial_patch_size=vision.patch_size_px)
    return vision


def config_to_json(config: Qwen2VLConfig, dtype: str) -> dict:
    """The released config.json for a checkpoint of this architecture."""
    vision, text = config.vision, config.text
    # Without a scaling as in the releases, which every version of transformers reads.
    scaling = {"type": "mrope"} if text.rope_scaling is None else fields.rope_fields(text.rope_scaling)
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "torch_dtype": dtype,
        **{name: getattr(config, name) for name in (*TOKENS, "pad_token_id", "eos_token_id")},
        **fields.written(text, TEXT_KEYS),
        "rope_theta": text.rope_theta,
        "rope_scaling": {**scaling, "mrope_section": list(config.mrope_sections)},
        "tie_word_embeddings": text.tie_head,
        "use_sliding_window": False,
        "vision_config": {
            **fields.written(vision, VISION_KEYS),
            "hidden_size": text.embed_dim,
            "in_channels": 3,
            "mlp_ratio": vision.mlp_dim // vision.embed_dim,
            "rope_parameters": {"rope_type": "axial", "rope_theta": vision.rope_theta},
        },
    }
