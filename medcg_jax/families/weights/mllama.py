"""Llama-3.2-Vision's table, the spellings of its tensor names, and its config.json read, checked and written.

Layout: that of meta-llama/Llama-3.2-11B-Vision-Instruct for transformers, three spellings of the names.
Source: huggingface/transformers:conversion_mapping.py and models/mllama/configuration_mllama.py at 5.23.0.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from medcg_jax.families.mllama.model import MllamaConfig
from medcg_jax.families.mllama.text import MllamaTextConfig
from medcg_jax.families.mllama.vit import NUM_TILES, MllamaVisionConfig
from medcg_jax.families.weights import fields, tables
from medcg_jax.families.weights.engine import canonical_names
from medcg_jax.families.weights.fields import TEXT_KEYS, expect, section
from medcg_jax.families.weights.files import Tensors, WeightsError, open_tensors
from medcg_jax.families.weights.llava import llama_layer

# Buffers that old versions saved: recomputed here, never parameters.
IGNORED = re.compile(r"rotary_emb\.(original_)?inv_freq$")
GRIDS = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]
VISION_LAYER = (
    *tables.norm("input_layernorm", "norm1"),
    *tables.attention("self_attn", out="o_proj", bias=False),
    *tables.norm("post_attention_layernorm", "norm2"),
    *tables.dense("mlp.fc1", "up"),
    *tables.dense("mlp.fc2", "down"),
)
VISION_GATES = (("gate_attn", "attention_gate", tables.FLAT), ("gate_ffn", "mlp_gate", tables.FLAT))
CROSS_LAYER = (
    *llama_layer(attention_name="cross_attn"),
    *tables.norm("cross_attn.q_norm", "q_norm", bias=False),
    *tables.norm("cross_attn.k_norm", "k_norm", bias=False),
    ("cross_attn_attn_gate", "attention_gate", tables.FLAT),
    ("cross_attn_mlp_gate", "mlp_gate", tables.FLAT),
)
VISION_OUTER = (
    ("class_embedding", "class_token", tables.SAME),
    ("gated_positional_embedding.embedding", "positions", tables.SAME),
    ("gated_positional_embedding.gate", "position_gate", tables.FLAT),
    ("gated_positional_embedding.tile_embedding.weight", "tile_positions", tables.ROWS),
    ("pre_tile_positional_embedding.embedding.weight", "pre_tile", tables.ROWS),
    ("pre_tile_positional_embedding.gate", "pre_tile_gate", tables.FLAT),
    ("post_tile_positional_embedding.embedding.weight", "post_tile", tables.ROWS),
    ("post_tile_positional_embedding.gate", "post_tile_gate", tables.FLAT),
    *tables.norm("layernorm_pre", "norm_pre"),
    *tables.norm("layernorm_post", "norm_post"),
)
VISION_KEYS = fields.keys(
    "image_size_px=image_size patch_size_px=patch_size num_layers=num_hidden_layers "
    "num_global_layers=num_global_layers intermediate_layers=intermediate_layers_indices embed_dim=hidden_size "
    "num_heads=attention_heads mlp_dim=intermediate_size norm_eps=norm_eps activation=hidden_act"
)
VISION_DEFAULTS = MllamaVisionConfig(image_size_px=448)
TEXT_DEFAULTS = MllamaTextConfig()


def table(config: MllamaConfig) -> list[tables.Entry]:
    """Canonical name -> parameter, for every tensor of a Llama-3.2-Vision checkpoint."""
    vision, text, layer = config.vision, config.text, "language_model.layers.{layer}."
    patch = ("patch_embedding.weight", "patch kernel", tables.conv_patch(vision.patch_size_px))
    local, outer = range(vision.num_layers), range(vision.num_global_layers)
    return [
        *tables.entries((patch, *VISION_OUTER), "vision_model.", "vision"),
        *tables.entries(VISION_LAYER, "vision_model.transformer.layers.{layer}.", "vision blocks", local),
        *tables.entries(
            VISION_LAYER + VISION_GATES,
            "vision_model.global_transformer.layers.{layer}.",
            "vision global_blocks",
            outer,
        ),
        *tables.entries(tables.dense("multi_modal_projector", "projector")),
        # The rows beyond the vocabulary are the last: exact counts, so that none is dropped or added.
        tables.Entry("language_model.embed_tokens.weight", ("decoder", "embed", "table"), tables.SAME),
        *tables.entries(llama_layer(), layer, "decoder blocks", text.self_layers),
        *tables.entries(CROSS_LAYER, layer, "decoder cross", text.cross_layers),
        *tables.entries(tables.norm("language_model.norm", "decoder norm", bias=False)),
        tables.Entry("lm_head.weight", ("decoder", "head", "kernel"), tables.linear()),
    ]


def canonical(name: str) -> str | None:
    """The table's spelling of a tensor name of any layout; None if it is ignored.

    Examples: "language_model.model.norm.weight" (released) and "model.language_model.norm.weight" (transformers 5) are
    "language_model.norm.weight".
    """
    if IGNORED.search(name):
        return None
    name = name.removeprefix("model.")
    name = re.sub(r"^language_model\.lm_head\.", "lm_head.", name)
    return re.sub(r"^language_model\.model\.", "language_model.", name)


def released_name(name: str) -> str:
    """The released spelling of a canonical name, which every version of transformers reads."""
    name = re.sub(r"^language_model\.", "language_model.model.", name)
    return re.sub(r"^lm_head\.", "language_model.lm_head.", name)


def read_release(src: Path, stated: dict, parts: Mapping[str, Path]) -> MllamaConfig:
    """The architecture that `stated`, the config.json of `src`, states; it has no parts elsewhere."""
    return config_from_json(stated)


def open_release(src: Path, stated: dict, parts: Mapping[str, Path]) -> tuple[Tensors, dict[str, str]]:
    """(tensors, canonical name -> name in them) of a released directory."""
    tensors = open_tensors(src)
    return tensors, canonical_names(tensors.shapes, canonical, str(src))


def config_from_json(stated: dict) -> MllamaConfig:
    """The architecture that a config.json states; keys that it leaves out have transformers' defaults.

    Raises:
      WeightsError: the checkpoint is of another model, or differs from what this port computes; names the difference.
    """
    if stated.get("model_type") != "mllama":
        raise WeightsError(f"config.json has model_type={stated.get('model_type')!r}; expected 'mllama'")
    # Whether the head is tied does not matter: transformers 5 does not tie it, and files hold it.
    text = section(stated, "", "text_config")
    return MllamaConfig(
        vision=_vision(section(stated, "", "vision_config")),
        text=_text(text),
        image_token_id=fields.image_token(stated, 128256),
        pad_token_id=fields.token(text, "text_config.", "pad_token_id", 128004),
        eos_token_id=fields.end_of(text, "text_config.", 128001),
    )


def _vision(stated: dict) -> MllamaVisionConfig:
    prefix = "vision_config."
    expect(
        stated,
        prefix,
        num_channels=3,
        max_num_tiles=NUM_TILES,
        supported_aspect_ratios=GRIDS,
        model_type="mllama_vision_model",
    )
    heads = "attention_heads" if stated.get("attention_heads") is not None else "num_attention_heads"
    config = fields.read_dataclass(VISION_KEYS | {"num_heads": heads}, VISION_DEFAULTS, stated, prefix)
    intermediate = config.intermediate_layers
    if list(intermediate) != sorted(set(intermediate)):
        # Transformers 5 stacks their outputs in the order of the list, older ones in that of the layers.
        raise WeightsError(
            f"config.json has {prefix}intermediate_layers_indices={list(intermediate)}: versions of transformers stack "
            "them in different orders; expected rising numbers"
        )
    expect({"vision_output_dim": 7680, **stated}, prefix, vision_output_dim=config.feature_dim)
    return config


def _text(stated: dict) -> MllamaTextConfig:
    prefix = "text_config."
    expect(stated, prefix, model_type="mllama_text_model")
    _, theta, scaling = fields.rope(stated, prefix, 500000.0)
    num_heads = fields.number(stated, prefix, "num_attention_heads", 32, "num_heads")
    width = fields.number(stated, prefix, "hidden_size", 4096, "embed_dim")
    layers = (3, 8, 13, 18, 23, 28, 33, 38)
    # transformers asks of each layer whether it is among them.
    cross = sorted(set(fields.whole_numbers(stated, prefix, "cross_attention_layers", layers, "cross_layers")))
    given = {"cross_layers": tuple(cross), "head_dim": width // num_heads}
    return fields.read_dataclass(
        TEXT_KEYS, TEXT_DEFAULTS, stated, prefix, rope_theta=theta, rope_scaling=scaling, **given
    )


def config_to_json(config: MllamaConfig, dtype: str) -> dict:
    """The released form of config.json for a checkpoint of this architecture."""
    vision, text, scaled = config.vision, config.text, fields.rope_fields(config.text.rope_scaling)
    return {
        "architectures": ["MllamaForConditionalGeneration"],
        "model_type": "mllama",
        "torch_dtype": dtype,
        "image_token_index": config.image_token_id,
        "tie_word_embeddings": False,
        "vision_config": {
            "model_type": "mllama_vision_model",
            **fields.written(vision, VISION_KEYS),
            "num_channels": 3,
            "max_num_tiles": NUM_TILES,
            "supported_aspect_ratios": GRIDS,
            "vision_output_dim": vision.feature_dim,
        },
        "text_config": {
            "model_type": "mllama_text_model",
            **fields.written(text, TEXT_KEYS | {"cross_layers": "cross_attention_layers", "rope_theta": "rope_theta"}),
            "rope_scaling": scaled,
            "rope_parameters": {**scaled, "rope_theta": text.rope_theta},
            "tie_word_embeddings": False,
            "pad_token_id": config.pad_token_id,
            "eos_token_id": config.eos_token_id,
        },
    }
