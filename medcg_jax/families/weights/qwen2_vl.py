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
from medcg_jax.families.weights.engine import FLAT, SAME, Entry, Transform, canonical_names, fused_qkv, linear
from medcg_jax.families.weights.fields import (
    activation,
    end_of,
    expect,
    flag,
    number,
    refused,
    rope,
    rope_fields,
    section,
    size,
    token,
    whole_numbers,
)
from medcg_jax.families.weights.files import Tensors, WeightsError, open_tensors, read_json
from medcg_jax.families.weights.llava import HEAD, TABLE, is_tied, llama_layer, without_tied_head

# Buffers that old versions saved: recomputed here, never parameters.
IGNORED = re.compile(r"rotary_(pos_)?emb\.inv_freq$")
MERGER = (
    ("visual.merger.ln_q.weight", "norm scale", SAME),
    ("visual.merger.ln_q.bias", "norm bias", SAME),
    ("visual.merger.mlp.0.weight", "up kernel", linear()),
    ("visual.merger.mlp.0.bias", "up bias", FLAT),
    ("visual.merger.mlp.2.weight", "down kernel", linear()),
    ("visual.merger.mlp.2.bias", "down bias", FLAT),
)


def conv3d_patch(config: Qwen2VitConfig) -> Transform:
    """PyTorch's conv kernel [E, C, frames, patch, patch] <-> ours [C * frames * patch * patch, E]."""
    size = (3, config.num_frames, config.patch_size_px, config.patch_size_px)
    return Transform(
        load=lambda tensor, shape: tensor.reshape(shape[1], shape[0]).T,
        store=lambda ours: ours.T.reshape(-1, *size),
        released_shape=lambda shape: (shape[1], *size),
    )


VIT_LAYER = (
    ("norm1.weight", "norm1 scale", SAME),
    ("norm1.bias", "norm1 bias", SAME),
    ("attn.qkv.weight", "qkv kernel", fused_qkv()),
    ("attn.qkv.bias", "qkv bias", fused_qkv()),
    ("attn.proj.weight", "out kernel", linear(inputs=2)),
    ("attn.proj.bias", "out bias", FLAT),
    ("norm2.weight", "norm2 scale", SAME),
    ("norm2.bias", "norm2 bias", SAME),
    ("mlp.fc1.weight", "up kernel", linear()),
    ("mlp.fc1.bias", "up bias", FLAT),
    ("mlp.fc2.weight", "down kernel", linear()),
    ("mlp.fc2.bias", "down bias", FLAT),
)


def table(config: Qwen2VLConfig) -> list[Entry]:
    """Canonical name -> parameter, for every tensor of a Qwen2-VL checkpoint; a tied head is none."""
    stacks = (
        ("visual.blocks.{layer}.", "vision", VIT_LAYER, config.vision.num_layers),
        ("language_model.layers.{layer}.", "decoder", llama_layer(config.text), config.text.num_layers),
    )
    entries = [Entry("visual.patch_embed.proj.weight", ("vision", "patch", "kernel"), conv3d_patch(config.vision))]
    entries += [Entry(name, ("projector", *ours.split()), transform) for name, ours, transform in MERGER]
    for prefix, part, lines, num in stacks:
        entries += [Entry(prefix + name, (part, "blocks", *ours.split()), t, range(num)) for name, ours, t in lines]
    entries.append(Entry(TABLE, ("decoder", "embed", "table"), SAME, rows=True))
    entries.append(Entry("language_model.norm.weight", ("decoder", "norm", "scale"), SAME))
    if not config.text.tie_head:
        entries.append(Entry(HEAD, ("decoder", "head", "kernel"), linear(), rows=True))
    return entries


def canonical(name: str) -> str | None:
    """The table's spelling of a tensor name of any Qwen2-VL layout; None for what is ignored.

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


def read_release(src: Path, parts: Mapping[str, Path]) -> Qwen2VLConfig:
    """The architecture that the released directory `src` states; it has no parts elsewhere."""
    return config_from_json(read_json(src / "config.json"))


def open_release(src: Path, parts: Mapping[str, Path]) -> tuple[Tensors, dict[str, str]]:
    """(tensors, canonical name -> name) of a released directory; a copy of a tied head is held against the embedding.

    Raises:
      WeightsError: no weights, two tensors of one name, or a head that is to be tied and is another.
    """
    tensors = open_tensors(src)
    return tensors, without_tied_head(tensors, canonical_names(tensors.shapes, canonical, str(src)), src)


def config_from_json(found: dict) -> Qwen2VLConfig:
    """The architecture that a config.json states, with the text model's keys beside the others (released) or apart.

    Keys that a released config.json leaves out have transformers' defaults. How large images may be is not in there.

    Raises:
      WeightsError: the checkpoint is of another model, or differs from what this port computes; names each difference.
    """
    if found.get("model_type") != "qwen2_vl":
        raise WeightsError(f"config.json has model_type={found.get('model_type')!r}; 'qwen2_vl' is accepted")
    text, vision = section(found, "", "text_config") or found, section(found, "", "vision_config")
    part = "" if text is found else "text_config."
    kinds = text.get("layer_types") or ()
    windows = not isinstance(kinds, list | tuple) or any(kind != "full_attention" for kind in kinds)
    if windows or (flag(text, part, "use_sliding_window", False) and "layer_types" not in text):
        field = "layer_types" if windows else "use_sliding_window"
        raise WeightsError(
            f"config.json has {part}{field}={str(text[field])[:100]}; attention to all that came before is accepted"
        )
    expect(text, part, attention_dropout=0.0, model_type=("qwen2_vl", "qwen2_vl_text"))
    fields, theta, scaling = rope(text, part, 1e6, plain=("default", "mrope"))
    width = number(text, part, "hidden_size", 8192, "embed_dim")
    num_heads = number(text, part, "num_attention_heads", 64, "num_heads")
    expect({"hidden_size": 3584, **vision}, "vision_config.", hidden_size=width)
    expect(text, part, head_dim=width // num_heads)
    try:
        decoder = DecoderConfig(
            vocab_size=number(text, part, "vocab_size", 152064, "vocab_size"),
            num_layers=number(text, part, "num_hidden_layers", 80, "num_layers"),
            embed_dim=width,
            num_heads=num_heads,
            num_kv_heads=number(
                text,
                part,
                "num_key_value_heads",
                num_heads if "num_key_value_heads" in text else 8,
                "num_kv_heads",
                null=True,
            ),
            head_dim=width // num_heads,
            mlp_dim=number(text, part, "intermediate_size", 29568, "mlp_dim"),
            rope_theta=theta,
            norm_eps=number(text, part, "rms_norm_eps", 1e-5, "norm_eps", kind=float),
            max_positions=number(text, part, "max_position_embeddings", 32768, "max_positions"),
            qkv_bias=True,
            tie_head=is_tied(found),
            rope_scaling=scaling,
            activation=activation(text, part, "hidden_act", "silu"),
        )
        tower = _vision(vision)
        side = tower.patch_size_px * tower.merge
        return Qwen2VLConfig(
            vision=tower,
            text=decoder,
            mrope_sections=whole_numbers(
                fields, f"{part}rope_scaling.", "mrope_section", (16, 24, 24), "mrope_sections"
            ),
            image_token_id=token(found, "", "image_token_id", 151655),
            video_token_id=token(found, "", "video_token_id", 151656),
            vision_start_token_id=token(found, "", "vision_start_token_id", 151652),
            vision_end_token_id=token(found, "", "vision_end_token_id", 151653),
            pad_token_id=token(text, part, "pad_token_id", 151643),
            eos_token_id=end_of(text, part, 151645, last=False),
            # Not in there: the class's sizes, or as many tokens as a larger block makes of them.
            min_pixels=max(Qwen2VLConfig.min_pixels, side**2),
            max_pixels=max(Qwen2VLConfig.max_pixels, side**2),
        )
    except ValueError as error:
        raise refused(error, part) from error


def _vision(found: dict) -> Qwen2VitConfig:
    part = "vision_config."
    expect(found, part, in_chans=3, in_channels=3)
    fields = section(found, part, "rope_parameters")
    expect(fields, f"{part}rope_parameters.", rope_type="axial")
    width, patch = number(found, part, "embed_dim", 1280, "embed_dim"), size(found, part, "patch_size", 14)
    # A second name of `patch_size` in the releases.
    expect(found, part, spatial_patch_size=patch)
    return Qwen2VitConfig(
        patch_size_px=patch,
        num_frames=size(found, part, "temporal_patch_size", 2, "num_frames"),
        merge=number(found, part, "spatial_merge_size", 2, "merge"),
        num_layers=number(found, part, "depth", 32, "num_layers"),
        embed_dim=width,
        num_heads=number(found, part, "num_heads", 16, "num_heads"),
        mlp_dim=int(width * number(found, part, "mlp_ratio", 4.0, "mlp_ratio", kind=float)),
        rope_theta=number(fields, f"{part}rope_parameters.", "rope_theta", 10000.0, "rope_theta", kind=float),
        activation=activation(found, part, "hidden_act", "quick_gelu"),
    )


def config_to_json(config: Qwen2VLConfig, dtype: str) -> dict:
    """The released config.json for a checkpoint of this architecture."""
    vision, text = config.vision, config.text
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "torch_dtype": dtype,
        "image_token_id": config.image_token_id,
        "video_token_id": config.video_token_id,
        "vision_start_token_id": config.vision_start_token_id,
        "vision_end_token_id": config.vision_end_token_id,
        "pad_token_id": config.pad_token_id,
        "eos_token_id": config.eos_token_id,
        "hidden_act": text.activation,
        "hidden_size": text.embed_dim,
        "intermediate_size": text.mlp_dim,
        "max_position_embeddings": text.max_positions,
        "num_attention_heads": text.num_heads,
        "num_hidden_layers": text.num_layers,
        "num_key_value_heads": text.num_kv_heads,
        "rms_norm_eps": text.norm_eps,
        "rope_theta": text.rope_theta,
        "rope_scaling": {**_scaling(text.rope_scaling), "mrope_section": list(config.mrope_sections)},
        "tie_word_embeddings": text.tie_head,
        "use_sliding_window": False,
        "vocab_size": text.vocab_size,
        "vision_config": {
            "depth": vision.num_layers,
            "embed_dim": vision.embed_dim,
            "hidden_act": vision.activation,
            "hidden_size": text.embed_dim,
            "in_channels": 3,
            "mlp_ratio": vision.mlp_dim // vision.embed_dim,
            "num_heads": vision.num_heads,
            "patch_size": vision.patch_size_px,
            "rope_parameters": {"rope_type": "axial", "rope_theta": vision.rope_theta},
            "spatial_merge_size": vision.merge,
            "temporal_patch_size": vision.num_frames,
        },
    }


def _scaling(scaling) -> dict:
    """Without a scaling the releases' spelling, which every version of transformers reads."""
    return {"type": "mrope"} if scaling is None else rope_fields(scaling)
