"""LLaVA-1.5's table, the spellings of its tensor names, and its config.json read, checked and written.

Layouts: llava-hf (safetensors, four spellings of the names), liuhaotian (`pytorch_model-*.bin`, usually without the
vision tower, which then comes from openai/clip-vit-large-patch14-336), and trained parts that need their Llama: a
projector (stage 1's `mm_projector.bin`), or adapters with other trained parts (`adapter_model.bin` and
`non_lora_trainables.bin`), which are added to the weights on reading.
Source: huggingface/transformers:conversion_mapping.py and models/{llava,clip,llama}/configuration_*.py at 5.23.0;
haotian-liu/LLaVA:llava/model/builder.py and llava/train/train.py at c121f04.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from medcg_jax.families.clip import ClipVisionConfig
from medcg_jax.families.decoder import DecoderConfig
from medcg_jax.families.llava.model import LlavaConfig
from medcg_jax.families.weights import fields, peft, tables
from medcg_jax.families.weights.engine import canonical_names
from medcg_jax.families.weights.fields import TEXT_KEYS, expect, first, quoted, section
from medcg_jax.families.weights.files import Tensors, WeightsError, joined, open_bin, open_tensors, read_json

HEAD, TABLE = "lm_head.weight", "language_model.embed_tokens.weight"
CLIP_REPO, BASE_REPO = "openai/clip-vit-large-patch14-336", "lmsys/vicuna-7b-v1.5"
PROJECTOR_FILE, OTHERS_FILE = "mm_projector.bin", "non_lora_trainables.bin"

# Buffers that old versions saved: recomputed here, never parameters.
IGNORED = re.compile(r"(rotary_emb\.inv_freq|embeddings\.position_ids)$")
# Tensors of a whole CLIP outside its vision tower.
CLIP_IGNORED = re.compile(r"^(text_model\.|logit_scale$|visual_projection\.|text_projection\.)")

CLIP_OUTER = (
    ("embeddings.class_embedding", "class_token", tables.SAME),
    ("embeddings.position_embedding.weight", "positions", tables.SAME),
    *tables.norm("pre_layrnorm", "norm"),
)
CLIP_LAYER = (
    *tables.norm("layer_norm1", "norm1"),
    *tables.attention("self_attn"),
    *tables.norm("layer_norm2", "norm2"),
    *tables.dense("mlp.fc1", "up"),
    *tables.dense("mlp.fc2", "down"),
)
CLIP_KEYS = fields.keys(
    "image_size_px=image_size patch_size_px=patch_size num_layers=num_hidden_layers embed_dim=hidden_size "
    "num_heads=num_attention_heads mlp_dim=intermediate_size norm_eps=layer_norm_eps activation=hidden_act"
)
# transformers' defaults for fields that a config.json leaves out.
CLIP_DEFAULTS = ClipVisionConfig(224, 32, num_layers=12, embed_dim=768, num_heads=12, mlp_dim=3072)
LLAMA_KEYS = TEXT_KEYS | fields.keys(
    "head_dim=head_dim qkv_bias=attention_bias mlp_bias=mlp_bias tie_head=tie_word_embeddings"
)
LLAMA_DEFAULTS = DecoderConfig(norm_eps=1e-6, max_positions=2048)
# A Mistral without its window of attention is a Llama: LLaVA-Med 1.5 has one.
MISTRAL = ("mistral", "llava_mistral")
MISTRAL_DEFAULTS = {"num_kv_heads": 8, "mlp_dim": 14336, "max_positions": 2**17}
MISTRAL_WINDOW = 4096


def llama_layer(text: DecoderConfig = LLAMA_DEFAULTS, attention_name: str = "self_attn") -> tables.Lines:
    """The lines of one layer of Llama, with the biases that it has."""
    mlp = (tables.dense(f"mlp.{name}_proj", name, bias=text.mlp_bias) for name in ("gate", "up", "down"))
    return (
        *tables.norm("input_layernorm", "norm1", bias=False),
        *tables.attention(attention_name, out="o_proj", bias=text.qkv_bias, out_bias=text.out_bias),
        *tables.norm("post_attention_layernorm", "norm2", bias=False),
        *sum(mlp, ()),
    )


def llama_table(text: DecoderConfig) -> list[tables.Entry]:
    """The part of a table for a decoder that is a Llama (or Qwen2); a tied head is none."""
    layers = tables.entries(
        llama_layer(text), "language_model.layers.{layer}.", "decoder blocks", range(text.num_layers)
    )
    table = [
        tables.Entry(TABLE, ("decoder", "embed", "table"), tables.SAME, rows=True),
        *layers,
        *tables.entries(tables.norm("norm", "norm", bias=False), "language_model.", "decoder"),
    ]
    head = tables.Entry(HEAD, ("decoder", "head", "kernel"), tables.linear(), rows=True)
    return table if text.tie_head else [*table, head]


def table(config) -> list[tables.Entry]:
    """Canonical name -> parameter, for every tensor of a LLaVA-1.5 checkpoint; a tied head is none.

    config: LLaVA's or NExT-Chat's, which has the same parts.
    """
    vision, layer = config.vision, "vision_tower.encoder.layers.{layer}."
    patch = ("embeddings.patch_embedding.weight", "patch kernel", tables.conv_patch(vision.patch_size_px))
    has_bias = getattr(config, "projector_bias", True)
    projector = tables.dense("linear_1", "up", bias=has_bias) + tables.dense("linear_2", "down", bias=has_bias)
    # Layers after the feature layer are kept, so that they can be written again.
    run, unused = range(vision.num_run_layers), range(vision.num_run_layers, vision.num_layers)
    return [
        *tables.entries((patch, *CLIP_OUTER), "vision_tower.", "vision"),
        *tables.entries(tables.norm("post_layernorm", "norm"), "vision_tower.", "unused"),
        *tables.entries(CLIP_LAYER, layer, "vision blocks", run),
        *(tables.entries(CLIP_LAYER, layer, "unused blocks", unused) if unused else ()),
        *tables.entries(projector, "multi_modal_projector.", "projector"),
        *llama_table(config.text),
    ]


def canonical(name: str) -> str | None:
    """The table's spelling of a tensor name of any LLaVA-1.5 layout; None if it is ignored.

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


def is_original(stated: dict) -> bool:
    """Whether a config.json is in the form of the original LLaVA code, not of transformers.

    Some releases have the decoder's model_type.
    """
    return stated.get("model_type") != "nextchat" and ("mm_vision_tower" in stated or "mm_projector_type" in stated)


def read_release(src: Path, stated: dict, parts: Mapping[str, Path]) -> LlavaConfig:
    """The architecture that `stated`, the config.json of `src`, states; parts: `clip`, CLIP's directory."""
    return config_from_json(stated, clip_json(src, parts))


def clip_json(src: Path, parts: Mapping[str, Path]) -> dict | None:
    """The config.json of the CLIP in `parts` or beside `src`; None: there is none."""
    clip = parts.get("clip") or clip_beside(src)
    return read_json(clip / "config.json") if clip else None


def open_release(src: Path, stated: dict, parts: Mapping[str, Path]) -> tuple[Tensors, dict[str, str]]:
    """(tensors, canonical name -> name in them) of a released directory, with CLIP's tower where it has none.

    Raises:
      WeightsError: no weights, no vision tower in `src` and no CLIP, or only a part of the model and no `base`.
    """
    if peft.are_adapters(src) or (src / PROJECTOR_FILE).is_file():
        tensors, names = _with_base(src, stated, parts)
    else:
        tensors = open_tensors(src)
        names = without_tied_head(tensors, canonical_names(tensors.shapes, canonical, str(src)), src, stated)
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


def _with_base(src: Path, stated: dict, parts: Mapping[str, Path]) -> tuple[Tensors, dict[str, str]]:
    """As `open_release`, for a projector or adapters in `src` and the Llama `parts["base"]`.

    Raises:
      WeightsError: no base, one of another architecture, or adapters that do not fit it.
    """
    base = parts.get("base")
    if base is None:
        raise WeightsError(
            f"{src} holds a part of LLaVA alone; pass --base=DIR with the Llama that it was trained on, {BASE_REPO} "
            f"of the Hugging Face hub (`hf download {BASE_REPO} --local-dir DIR`) unless its config.json names another"
        )
    configs = (stated, read_json(base / "config.json"))
    ours, theirs = (decoder_config(section(each, "", "text_config") or each, "") for each in configs)
    for name in ("num_heads", "num_kv_heads", "head_dim", "rope_theta", "norm_eps"):
        if getattr(ours, name) != getattr(theirs, name):
            raise WeightsError(
                f"{base / 'config.json'} states {name}={getattr(theirs, name)}; expected {getattr(ours, name)}, as in "
                f"{src / 'config.json'}"
            )
    llama = open_tensors(base)
    has_adapters = peft.are_adapters(src)
    file = src / (OTHERS_FILE if has_adapters else PROJECTOR_FILE)
    if not file.is_file():
        raise WeightsError(
            f"{src} holds adapters and no {OTHERS_FILE}, which LLaVA's training writes at its end and which has the "
            "projector that was trained with them; expected the directory that the training wrote last"
        )
    others = open_bin(file)
    names = canonical_names(others.shapes, lambda name: canonical(name.removeprefix(peft.PREFIX)), str(file))
    both = joined((llama, canonical_names(llama.shapes, canonical, str(base))), (others, names))
    return peft.with_adapters(*both, src, canonical, whole=False) if has_adapters else both


def is_tied(stated: dict) -> bool:
    """Whether a config.json ties the head to the embedding: at its top, or (old versions) in `text_config`."""
    text = fields.flag(section(stated, "", "text_config"), "text_config.", "tie_word_embeddings", False)
    return fields.flag(stated, "", "tie_word_embeddings", False) or text


def without_tied_head(tensors: Tensors, names: dict[str, str], src: Path, stated: dict) -> dict[str, str]:
    """`names` without the head if config.json ties it; a copy in the file must equal the embedding.

    Every host reads both whole, so that all of them refuse a copy that differs.

    Raises:
      WeightsError: the head is stated to be tied, and differs from the embedding.
    """
    if not is_tied(stated) or HEAD not in names:
        return names
    names = dict(names)
    head = names.pop(HEAD)
    if TABLE in names and not np.array_equal(tensors.read(head), tensors.read(names[TABLE])):
        raise WeightsError(f"{src} states tie_word_embeddings, but {head} is not {names[TABLE]}")
    return names


def clip_beside(src: Path) -> Path | None:
    """CLIP's directory beside `src` under its released name; None: there is none."""
    beside = src.resolve().parent / CLIP_REPO.split("/")[1]
    return beside if (beside / "config.json").is_file() else None


def config_from_json(stated: dict, clip: dict | None = None) -> LlavaConfig:
    """The architecture that a config.json states, in llava-hf's or liuhaotian's form.

    clip: config.json of the CLIP checkpoint, which liuhaotian's form needs.
    Keys that a released config.json leaves out have transformers' defaults.

    Raises:
      WeightsError: the checkpoint is of another model, or differs from what this port computes; names each difference.
    """
    if is_original(stated):
        expect(
            stated,
            "",
            mm_projector_type="mlp2x_gelu",
            mm_vision_select_feature="patch",
            mm_use_im_start_end=False,
            mm_use_im_patch_token=False,
            mm_patch_merge_type="flat",
            image_aspect_ratio=("pad", "square"),
        )
        # The original repository uses -200, which is no token id; this is llava-hf's.
        return LlavaConfig(
            vision=original_vision(stated, clip),
            text=llama2_config(stated),
            image_token_id=32000,
            pad_token_id=fields.token(stated, "", "pad_token_id", 0),
            eos_token_id=fields.end_of(stated, "", 2),
        )
    if stated.get("model_type") != "llava":
        raise WeightsError(f"config.json has model_type={stated.get('model_type')!r}; expected 'llava'")
    layer, text = stated.get("vision_feature_layer", -2), section(stated, "", "text_config")
    if isinstance(layer, list) and len(layer) != 1:
        raise WeightsError(f"config.json has vision_feature_layer={layer}; expected one layer")
    layer = fields.size(stated, "", "vision_feature_layer", -2, "feature_layer")
    expect(stated, "", vision_feature_select_strategy=("default", "full"))
    strategy = first(stated.get("vision_feature_select_strategy"), "default")
    pad = fields.token(text, "text_config.", "pad_token_id")
    return LlavaConfig(
        vision=clip_config(section(stated, "", "vision_config"), layer, keep_class_token=strategy == "full"),
        text=decoder_config({**text, "tie_word_embeddings": is_tied(stated)}, "text_config."),
        image_token_id=fields.image_token(stated, 32000),
        pad_token_id=first(fields.token(stated, "", "pad_token_id"), pad, 0),
        eos_token_id=first(fields.end_of(stated, ""), fields.end_of(text, "text_config."), 2),
        projector_activation=fields.activation(stated, "", "projector_hidden_act", "gelu"),
        projector_bias=fields.flag(stated, "", "multimodal_projector_bias", True),
    )


def original_vision(stated: dict, clip: dict | None) -> ClipVisionConfig:
    """The vision tower that an original config.json names, with the sizes in `clip`, CLIP's config.json.

    Without `clip` it must be the tower of every release.
    """
    layer = fields.size(stated, "", "mm_vision_select_layer", -2, "feature_layer")
    if clip is not None:
        vision = clip_config(section(clip, "", "vision_config") or clip, layer)
    else:
        name = first(stated.get("mm_vision_tower"), CLIP_REPO)
        if CLIP_REPO.split("/")[1] not in str(name):
            raise WeightsError(
                f"config.json has mm_vision_tower={str(name)[:100]!r}; expected {CLIP_REPO!r}, or pass --clip=DIR"
            )
        vision = ClipVisionConfig(feature_layer=layer)
    expect(stated, "", mm_hidden_size=vision.embed_dim)
    return vision


def clip_config(stated: dict, feature_layer: int, *, keep_class_token: bool = False) -> ClipVisionConfig:
    """The vision tower that a `vision_config` of CLIP's fields states."""
    prefix = "vision_config."
    expect(stated, prefix, num_channels=3, model_type=("clip_vision_model", "clip"))
    return fields.read_dataclass(
        CLIP_KEYS, CLIP_DEFAULTS, stated, prefix, feature_layer=feature_layer, keep_class_token=keep_class_token
    )


def decoder_config(stated: dict, prefix: str) -> DecoderConfig:
    """The decoder that Llama's or Mistral's config.json, or a `text_config` of its fields, states.

    prefix: of the fields' names.
    """
    expect(stated, prefix, model_type=("llama", "llava", "llava_llama", *MISTRAL))
    is_mistral = stated.get("model_type") in MISTRAL
    window = stated.get("sliding_window", MISTRAL_WINDOW) if is_mistral else None
    if window is not None:
        raise WeightsError(
            f"config.json has {prefix}sliding_window={quoted(window)}; expected null, attention to all that came before"
        )
    _, theta, scaling = fields.rope(stated, prefix, 10000.0)
    num_heads = fields.number(stated, prefix, "num_attention_heads", 32, "num_heads")
    width = fields.number(stated, prefix, "hidden_size", 4096, "embed_dim")
    absent = {"num_kv_heads": num_heads, "head_dim": width // num_heads} | (MISTRAL_DEFAULTS if is_mistral else {})
    out_bias = fields.flag(stated, prefix, "attention_bias", False)
    return fields.read_dataclass(
        LLAMA_KEYS, LLAMA_DEFAULTS, stated, prefix, absent, rope_theta=theta, rope_scaling=scaling, out_bias=out_bias
    )


def llama2_config(stated: dict) -> DecoderConfig:
    """As `decoder_config`, for layouts that can only state a Llama 2."""
    expect(stated, "", hidden_act="silu", attention_bias=False, mlp_bias=False, tie_word_embeddings=False)
    fields.rope(stated, "", 10000.0, scaled=())
    return decoder_config(stated, "")


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
        "text_config": text_to_json(text),
    }


def vision_to_json(vision: ClipVisionConfig) -> dict:
    """CLIP's fields, as `clip_config` reads them."""
    return {"model_type": "clip_vision_model", **fields.written(vision, CLIP_KEYS)}


def text_to_json(text: DecoderConfig) -> dict:
    """Llama's fields, as `decoder_config` reads them."""
    # Transformers 4 reads only `rope_scaling`, transformers 5 either.
    scaled = {} if text.rope_scaling is None else {"rope_scaling": fields.old_rope_fields(text.rope_scaling)}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **fields.written(text, LLAMA_KEYS | {"rope_theta": "rope_theta"}),
        "rope_parameters": {**fields.rope_fields(text.rope_scaling), "rope_theta": text.rope_theta},
        **scaled,
    }
