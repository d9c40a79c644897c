"""LLaVA-1.5's table, the spellings of its tensor names, and its config.json read, checked and written.

Layouts: llava-hf (safetensors, four spellings of the names), liuhaotian (`pytorch_model-*.bin`, usually without the
vision tower, which then comes from openai/clip-vit-large-patch14-336), and its parts (`llava_base`).
Source: huggingface/transformers:conversion_mapping.py and models/{llava,clip,llama}/configuration_*.py at 5.23.0;
haotian-liu/LLaVA:llava/model/builder.py at c121f04.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from medcg_jax.families.clip import ClipVisionConfig
from medcg_jax.families.decoder import DecoderConfig
from medcg_jax.families.llava.model import LlavaConfig
from medcg_jax.families.weights.engine import FLAT, SAME, Entry, canonical_names, conv_patch, linear
from medcg_jax.families.weights.fields import (
    activation,
    end_of,
    expect,
    first,
    flag,
    number,
    old_rope_fields,
    refused,
    rope,
    rope_fields,
    section,
    size,
    token,
)
from medcg_jax.families.weights.files import Tensors, WeightsError, joined, open_tensors, read_json
from medcg_jax.families.weights.llava_base import is_part, open_with_base

HEAD, TABLE = "lm_head.weight", "language_model.embed_tokens.weight"
CLIP_REPO = "openai/clip-vit-large-patch14-336"

# Buffers that old versions saved: recomputed here, never parameters.
IGNORED = re.compile(r"(rotary_emb\.inv_freq|embeddings\.position_ids)$")
# What a whole CLIP holds beside its vision tower.
CLIP_IGNORED = re.compile(r"^(text_model\.|logit_scale$|visual_projection\.|text_projection\.)")

CLIP_LAYER = (
    ("layer_norm1.weight", "norm1 scale", SAME),
    ("layer_norm1.bias", "norm1 bias", SAME),
    ("self_attn.q_proj.weight", "q kernel", linear()),
    ("self_attn.q_proj.bias", "q bias", FLAT),
    ("self_attn.k_proj.weight", "k kernel", linear()),
    ("self_attn.k_proj.bias", "k bias", FLAT),
    ("self_attn.v_proj.weight", "v kernel", linear()),
    ("self_attn.v_proj.bias", "v bias", FLAT),
    ("self_attn.out_proj.weight", "out kernel", linear(inputs=2)),
    ("self_attn.out_proj.bias", "out bias", FLAT),
    ("layer_norm2.weight", "norm2 scale", SAME),
    ("layer_norm2.bias", "norm2 bias", SAME),
    ("mlp.fc1.weight", "up kernel", linear()),
    ("mlp.fc1.bias", "up bias", FLAT),
    ("mlp.fc2.weight", "down kernel", linear()),
    ("mlp.fc2.bias", "down bias", FLAT),
)
LLAMA_LAYER = (
    ("input_layernorm.weight", "norm1 scale", SAME),
    ("self_attn.q_proj.weight", "q kernel", linear()),
    ("self_attn.k_proj.weight", "k kernel", linear()),
    ("self_attn.v_proj.weight", "v kernel", linear()),
    ("self_attn.o_proj.weight", "out kernel", linear(inputs=2)),
    ("post_attention_layernorm.weight", "norm2 scale", SAME),
    ("mlp.gate_proj.weight", "gate kernel", linear()),
    ("mlp.up_proj.weight", "up kernel", linear()),
    ("mlp.down_proj.weight", "down kernel", linear()),
)
QKV_BIASES = tuple((f"self_attn.{name}_proj.bias", f"{name} bias", FLAT) for name in "qkv")
OUT_BIAS = (("self_attn.o_proj.bias", "out bias", FLAT),)
MLP_BIASES = tuple((f"mlp.{name}_proj.bias", f"{name} bias", FLAT) for name in ("gate", "up", "down"))


def llama_layer(text: DecoderConfig) -> tuple:
    """The lines of one layer of Llama, with the biases that it has."""
    biases = ((text.qkv_bias, QKV_BIASES), (text.out_bias, OUT_BIAS), (text.mlp_bias, MLP_BIASES))
    return sum((lines for there, lines in biases if there), LLAMA_LAYER)


def table(config: LlavaConfig) -> list[Entry]:
    """Canonical name -> parameter, for every tensor of a LLaVA-1.5 checkpoint; a tied head is none.

    config: also another with the same parts (NExT-Chat's).
    """
    vision, run, every = "vision_tower.", config.vision.num_run_layers, config.vision.num_layers
    entries = [
        Entry(vision + "embeddings.class_embedding", ("vision", "class_token"), SAME),
        Entry(
            vision + "embeddings.patch_embedding.weight", ("vision", "patch", "kernel"),
            conv_patch(config.vision.patch_size_px),
        ),
        Entry(vision + "embeddings.position_embedding.weight", ("vision", "positions"), SAME),
        Entry(vision + "pre_layrnorm.weight", ("vision", "norm", "scale"), SAME),
        Entry(vision + "pre_layrnorm.bias", ("vision", "norm", "bias"), SAME),
        Entry(vision + "post_layernorm.weight", ("unused", "norm", "scale"), SAME),
        Entry(vision + "post_layernorm.bias", ("unused", "norm", "bias"), SAME),
    ]  # fmt: skip
    clip_layer = vision + "encoder.layers.{layer}."
    entries += _layers(clip_layer, ("vision", "blocks"), CLIP_LAYER, range(run))
    if run < every:
        entries += _layers(clip_layer, ("unused", "blocks"), CLIP_LAYER, range(run, every))
    for released, ours in (("linear_1", "up"), ("linear_2", "down")):
        name = f"multi_modal_projector.{released}."
        entries += [
            Entry(name + "weight", ("projector", ours, "kernel"), linear()),
            *(
                [Entry(name + "bias", ("projector", ours, "bias"), FLAT)]
                if getattr(config, "projector_bias", True)
                else []
            ),
        ]
    entries.append(Entry(TABLE, ("decoder", "embed", "table"), SAME, rows=True))
    entries += _layers(
        "language_model.layers.{layer}.", ("decoder", "blocks"), llama_layer(config.text), range(config.text.num_layers)
    )
    entries.append(Entry("language_model.norm.weight", ("decoder", "norm", "scale"), SAME))
    if not config.text.tie_head:
        entries.append(Entry(HEAD, ("decoder", "head", "kernel"), linear(), rows=True))
    return entries


def _layers(prefix: str, path: tuple[str, ...], lines, layers: range) -> list[Entry]:
    return [Entry(prefix + name, path + tuple(ours.split()), transform, layers) for name, ours, transform in lines]


def canonical(name: str) -> str | None:
    """The table's spelling of a tensor name of any LLaVA-1.5 layout; None for what is ignored.

    Examples: "language_model.model.norm.weight" (llava-hf), "model.language_model.norm.weight" (transformers 5) and
    "model.norm.weight" (liuhaotian) are "language_model.norm.weight".
    """
    if IGNORED.search(name):
        return None
    name = name.removeprefix("model.")
    name = re.sub(r"^language_model\.lm_head\.", "lm_head.", name)
    name = re.sub(r"^language_model\.model\.", "language_model.", name)
    name = re.sub(r"^(embed_tokens|layers|norm)\.", r"language_model.\1.", name)
    name = re.sub(r"^vision_tower\.(vision_tower\.)?(vision_model\.)?", "vision_tower.", name)
    name = re.sub(r"^mm_projector\.0\.", "multi_modal_projector.linear_1.", name)
    return re.sub(r"^mm_projector\.2\.", "multi_modal_projector.linear_2.", name)


def canonical_clip(name: str) -> str | None:
    """As `canonical`, for the tensors of a CLIP checkpoint, whole or its vision model alone."""
    if IGNORED.search(name) or CLIP_IGNORED.search(name):
        return None
    return "vision_tower." + name.removeprefix("vision_model.")


def released_name(name: str) -> str:
    """llava-hf's spelling of a canonical name, which every version of transformers reads."""
    name = re.sub(r"^language_model\.", "language_model.model.", name)
    name = re.sub(r"^lm_head\.", "language_model.lm_head.", name)
    return re.sub(r"^vision_tower\.", "vision_tower.vision_model.", name)


def read_release(src: Path, parts: Mapping[str, Path]) -> LlavaConfig:
    """The architecture that the released directory `src` states; parts: `clip`, CLIP's directory."""
    clip = parts.get("clip") or clip_beside(src)
    return config_from_json(read_json(src / "config.json"), read_json(clip / "config.json") if clip else None)


def open_release(src: Path, parts: Mapping[str, Path]) -> tuple[Tensors, dict[str, str]]:
    """(tensors, canonical name -> name in them) of a released directory, with CLIP's tower where it has none.

    Raises:
      WeightsError: no weights, no vision tower in `src` and no CLIP, or a part of the model alone and no `base`.
    """
    if is_part(src):
        tensors, names = open_with_base(src, parts, canonical, decoder_config)
    else:
        tensors = open_tensors(src)
        names = without_tied_head(tensors, canonical_names(tensors.shapes, canonical, str(src)), src)
    if any(name.startswith("vision_tower.") for name in names):
        return tensors, names
    if not any(name.startswith(("language_model.", "multi_modal_projector.", "lm_head.")) for name in names):
        raise WeightsError(
            f"{src}: no tensor has a name that LLaVA's have; the first is {next(iter(names), 'missing')}"
        )
    clip = parts.get("clip") or clip_beside(src)
    if clip is None:
        raise WeightsError(
            f"{src} holds no vision tower; pass --clip=DIR with {CLIP_REPO} from the Hugging Face hub "
            f"(`hf download {CLIP_REPO} --local-dir DIR`), or put it beside {src} as {CLIP_REPO.split('/')[1]}"
        )
    tower = open_tensors(clip)
    return joined((tensors, names), (tower, canonical_names(tower.shapes, canonical_clip, str(clip))))


def is_tied(found: dict) -> bool:
    """Whether a config.json ties the head to the embedding: at its top, or (old versions) in its text's part."""
    text = section(found, "", "text_config")
    tied = [flag(found, "", "tie_word_embeddings", False), flag(text, "text_config.", "tie_word_embeddings", False)]
    return any(tied)


def without_tied_head(tensors: Tensors, names: dict[str, str], src: Path) -> dict[str, str]:
    """`names` without the head where config.json ties it; a copy that the file holds is held against the embedding.

    Raises:
      WeightsError: a head that is to be tied is another.
    """
    if not is_tied(read_json(src / "config.json")) or HEAD not in names:
        return names
    names = dict(names)
    head = names.pop(HEAD)
    if TABLE in names and not np.array_equal(tensors.read(head), tensors.read(names[TABLE])):
        raise WeightsError(f"{src} states tie_word_embeddings, but {head} is not {names[TABLE]}")
    return names


def clip_beside(src: Path) -> Path | None:
    """CLIP's directory where it lies beside `src` under its released name; None: it does not."""
    beside = src.resolve().parent / CLIP_REPO.split("/")[1]
    return beside if (beside / "config.json").is_file() else None


def config_from_json(found: dict, clip: dict | None = None) -> LlavaConfig:
    """The architecture that a config.json states, in llava-hf's or liuhaotian's form.

    clip: config.json of the CLIP checkpoint, which liuhaotian's form needs.
    Keys that a released config.json leaves out have transformers' defaults.

    Raises:
      WeightsError: the checkpoint is of another model, or differs from what this port computes; names each difference.
    """
    if "mm_projector_type" in found or "mm_vision_tower" in found:
        return _from_original(found, clip)
    if found.get("model_type") != "llava":
        raise WeightsError(f"config.json has model_type={found.get('model_type')!r}; 'llava' is accepted")
    layer, text = found.get("vision_feature_layer", -2), section(found, "", "text_config")
    if isinstance(layer, list) and len(layer) != 1:
        raise WeightsError(f"config.json has vision_feature_layer={layer}; one layer is accepted")
    layer = size(found, "", "vision_feature_layer", -2, "feature_layer")
    expect(found, "", vision_feature_select_strategy=("default", "full"))
    strategy = first(found.get("vision_feature_select_strategy"), "default")
    return LlavaConfig(
        vision=clip_config(section(found, "", "vision_config"), layer, keep_class_token=strategy == "full"),
        text=decoder_config({**text, "tie_word_embeddings": is_tied(found)}, "text_config."),
        image_token_id=first(token(found, "", "image_token_id"), token(found, "", "image_token_index"), 32000),
        pad_token_id=first(token(found, "", "pad_token_id"), token(text, "text_config.", "pad_token_id"), 0),
        eos_token_id=first(end_of(found, ""), end_of(text, "text_config."), 2),
        projector_activation=activation(found, "", "projector_hidden_act", "gelu"),
        projector_bias=flag(found, "", "multimodal_projector_bias", True),
    )


def _from_original(found: dict, clip: dict | None) -> LlavaConfig:
    expect(found, "", mm_projector_type="mlp2x_gelu", mm_vision_select_feature="patch",
           mm_use_im_start_end=False, mm_use_im_patch_token=False, mm_patch_merge_type="flat",
           image_aspect_ratio=("pad", "square"))  # fmt: skip
    # The original repository's sentinel -200 is no token id; llava-hf's choice takes its place.
    return LlavaConfig(
        vision=original_vision(found, clip),
        text=llama2_config(found),
        image_token_id=32000,
        pad_token_id=token(found, "", "pad_token_id", 0),
        eos_token_id=end_of(found, "", 2),
    )


def original_vision(found: dict, clip: dict | None) -> ClipVisionConfig:
    """The vision tower that an original's config.json names; its sizes stand in `clip`, CLIP's own config.json.

    Without that it is the one of every release, and must be named so.
    """
    layer = size(found, "", "mm_vision_select_layer", -2, "feature_layer")
    if clip is not None:
        vision = clip_config(section(clip, "", "vision_config") or clip, layer)
    else:
        name = first(found.get("mm_vision_tower"), CLIP_REPO)
        if CLIP_REPO.split("/")[1] not in str(name):
            raise WeightsError(
                f"config.json has mm_vision_tower={str(name)[:100]!r}; {CLIP_REPO!r} is accepted, or --clip=DIR"
            )
        vision = ClipVisionConfig(feature_layer=layer)
    expect(found, "", mm_hidden_size=vision.embed_dim)
    return vision


def clip_config(found: dict, feature_layer: int, *, keep_class_token: bool = False) -> ClipVisionConfig:
    """The vision tower that a `vision_config` of CLIP's fields states."""
    part = "vision_config."
    expect(found, part, num_channels=3, model_type=("clip_vision_model", "clip"))
    try:
        return ClipVisionConfig(
            image_size_px=size(found, part, "image_size", 224),
            patch_size_px=size(found, part, "patch_size", 32),
            num_layers=number(found, part, "num_hidden_layers", 12, "num_layers"),
            feature_layer=feature_layer,
            embed_dim=number(found, part, "hidden_size", 768, "embed_dim"),
            num_heads=number(found, part, "num_attention_heads", 12, "num_heads"),
            mlp_dim=number(found, part, "intermediate_size", 3072, "mlp_dim"),
            norm_eps=number(found, part, "layer_norm_eps", 1e-5, "norm_eps", kind=float),
            activation=activation(found, part, "hidden_act", "quick_gelu"),
            keep_class_token=keep_class_token,
        )
    except ValueError as error:
        raise refused(error, part) from error


def decoder_config(found: dict, prefix: str) -> DecoderConfig:
    """The decoder that Llama's config.json, or a `text_config` of its fields, states; prefix: of the fields' names."""
    expect(found, prefix, model_type=("llama", "llava", "llava_llama"))
    _, theta, scaling = rope(found, prefix, 10000.0)
    num_heads = number(found, prefix, "num_attention_heads", 32, "num_heads")
    width = number(found, prefix, "hidden_size", 4096, "embed_dim")
    biased = flag(found, prefix, "attention_bias", False)
    try:
        return DecoderConfig(
            vocab_size=number(found, prefix, "vocab_size", 32000, "vocab_size"),
            num_layers=number(found, prefix, "num_hidden_layers", 32, "num_layers"),
            embed_dim=width,
            num_heads=num_heads,
            num_kv_heads=number(found, prefix, "num_key_value_heads", num_heads, "num_kv_heads", null=True),
            head_dim=number(found, prefix, "head_dim", width // num_heads, "head_dim", null=True),
            mlp_dim=number(found, prefix, "intermediate_size", 11008, "mlp_dim"),
            rope_theta=theta,
            norm_eps=number(found, prefix, "rms_norm_eps", 1e-6, "norm_eps", kind=float),
            max_positions=number(found, prefix, "max_position_embeddings", 2048, "max_positions"),
            qkv_bias=biased,
            out_bias=biased,
            mlp_bias=flag(found, prefix, "mlp_bias", False),
            tie_head=flag(found, prefix, "tie_word_embeddings", False),
            rope_scaling=scaling,
            activation=activation(found, prefix, "hidden_act", "silu"),
        )
    except ValueError as error:
        raise refused(error, prefix) from error


def llama2_config(found: dict) -> DecoderConfig:
    """As `decoder_config`, where only what Llama 2 has is computed, or can be written again."""
    expect(found, "", hidden_act="silu", attention_bias=False, mlp_bias=False, tie_word_embeddings=False)
    rope(found, "", 10000.0, scaled=())
    return decoder_config(found, "")


def config_to_json(config: LlavaConfig, dtype: str) -> dict:
    """llava-hf's config.json for a checkpoint of this architecture."""
    vision, text = config.vision, config.text
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "torch_dtype": dtype,
        "image_token_index": config.image_token_id,
        "image_seq_length": config.num_image_tokens,
        "pad_token_id": config.pad_token_id,
        "eos_token_id": config.eos_token_id,
        "projector_hidden_act": config.projector_activation,
        "multimodal_projector_bias": config.projector_bias,
        "vision_feature_layer": vision.feature_layer,
        "vision_feature_select_strategy": "full" if vision.keep_class_token else "default",
        "tie_word_embeddings": text.tie_head,
        "vision_config": vision_to_json(vision),
        "text_config": text_to_json(text, dtype),
    }


def vision_to_json(vision: ClipVisionConfig) -> dict:
    """CLIP's fields, as `clip_config` reads them."""
    return {
        "model_type": "clip_vision_model",
        "hidden_act": vision.activation,
        "hidden_size": vision.embed_dim,
        "image_size": vision.image_size_px,
        "intermediate_size": vision.mlp_dim,
        "layer_norm_eps": vision.norm_eps,
        "num_attention_heads": vision.num_heads,
        "num_hidden_layers": vision.num_layers,
        "patch_size": vision.patch_size_px,
    }


def text_to_json(text: DecoderConfig, dtype: str) -> dict:
    """Llama's fields, as `decoder_config` reads them."""
    # Transformers 4 reads `rope_scaling` alone, transformers 5 either.
    scaled = {} if text.rope_scaling is None else {"rope_scaling": old_rope_fields(text.rope_scaling)}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": text.activation,
        "attention_bias": text.qkv_bias,
        "mlp_bias": text.mlp_bias,
        "hidden_size": text.embed_dim,
        "intermediate_size": text.mlp_dim,
        "max_position_embeddings": text.max_positions,
        "num_attention_heads": text.num_heads,
        "num_hidden_layers": text.num_layers,
        "num_key_value_heads": text.num_kv_heads,
        "head_dim": text.head_dim,
        "rms_norm_eps": text.norm_eps,
        "rope_theta": text.rope_theta,
        "rope_parameters": {**rope_fields(text.rope_scaling), "rope_theta": text.rope_theta},
        **scaled,
        "tie_word_embeddings": text.tie_head,
        "vocab_size": text.vocab_size,
    }
