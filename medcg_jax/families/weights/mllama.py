"""Llama-3.2-Vision's table, the spellings of its tensor names, and its config.json read, checked and written.

Layout: that of meta-llama/Llama-3.2-11B-Vision-Instruct for transformers, three spellings of the names.
Source: huggingface/transformers:conversion_mapping.py and models/mllama/configuration_mllama.py at 5.23.0.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path

from medcg_jax.families.mllama.model import MllamaConfig
from medcg_jax.families.mllama.text import MllamaTextConfig
from medcg_jax.families.mllama.vit import NUM_TILES, MllamaVisionConfig
from medcg_jax.families.weights.engine import FLAT, SAME, Entry, Transform, canonical_names, conv_patch, linear
from medcg_jax.families.weights.fields import (
    activation,
    end_of,
    expect,
    first,
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
from medcg_jax.families.weights.llava import LLAMA_LAYER

# Buffers that old versions saved: recomputed here, never parameters.
IGNORED = re.compile(r"rotary_emb\.(original_)?inv_freq$")
GRIDS = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]
# PyTorch's embedding [rows, all else] <-> ours with the other axes apart.
ROWS = Transform(
    load=lambda tensor, shape: tensor.reshape(shape),
    store=lambda ours: ours.reshape(len(ours), -1),
    released_shape=lambda shape: (shape[0], math.prod(shape[1:])),
)

VISION_LAYER = (
    ("input_layernorm.weight", "norm1 scale", SAME),
    ("input_layernorm.bias", "norm1 bias", SAME),
    ("self_attn.q_proj.weight", "q kernel", linear()),
    ("self_attn.k_proj.weight", "k kernel", linear()),
    ("self_attn.v_proj.weight", "v kernel", linear()),
    ("self_attn.o_proj.weight", "out kernel", linear(inputs=2)),
    ("post_attention_layernorm.weight", "norm2 scale", SAME),
    ("post_attention_layernorm.bias", "norm2 bias", SAME),
    ("mlp.fc1.weight", "up kernel", linear()),
    ("mlp.fc1.bias", "up bias", FLAT),
    ("mlp.fc2.weight", "down kernel", linear()),
    ("mlp.fc2.bias", "down bias", FLAT),
)
VISION_GATES = (("gate_attn", "attention_gate", FLAT), ("gate_ffn", "mlp_gate", FLAT))
CROSS_LAYER = (
    *((name.replace("self_attn", "cross_attn"), ours, transform) for name, ours, transform in LLAMA_LAYER),
    ("cross_attn.q_norm.weight", "q_norm scale", SAME),
    ("cross_attn.k_norm.weight", "k_norm scale", SAME),
    ("cross_attn_attn_gate", "attention_gate", FLAT),
    ("cross_attn_mlp_gate", "mlp_gate", FLAT),
)
OUTER = (
    ("vision_model.class_embedding", "vision class_token", SAME),
    ("vision_model.gated_positional_embedding.embedding", "vision positions", SAME),
    ("vision_model.gated_positional_embedding.gate", "vision position_gate", FLAT),
    ("vision_model.gated_positional_embedding.tile_embedding.weight", "vision tile_positions", ROWS),
    ("vision_model.pre_tile_positional_embedding.embedding.weight", "vision pre_tile", ROWS),
    ("vision_model.pre_tile_positional_embedding.gate", "vision pre_tile_gate", FLAT),
    ("vision_model.post_tile_positional_embedding.embedding.weight", "vision post_tile", ROWS),
    ("vision_model.post_tile_positional_embedding.gate", "vision post_tile_gate", FLAT),
    ("vision_model.layernorm_pre.weight", "vision norm_pre scale", SAME),
    ("vision_model.layernorm_pre.bias", "vision norm_pre bias", SAME),
    ("vision_model.layernorm_post.weight", "vision norm_post scale", SAME),
    ("vision_model.layernorm_post.bias", "vision norm_post bias", SAME),
    ("multi_modal_projector.weight", "projector kernel", linear()),
    ("multi_modal_projector.bias", "projector bias", SAME),
    ("language_model.norm.weight", "decoder norm scale", SAME),
)


def table(config: MllamaConfig) -> list[Entry]:
    """Canonical name -> parameter, for every tensor of a Llama-3.2-Vision checkpoint."""
    vision, text = config.vision, config.text
    local, outer = range(vision.num_layers), range(vision.num_global_layers)
    layer = "language_model.layers.{layer}."
    patch = conv_patch(vision.patch_size_px)
    return [
        Entry("vision_model.patch_embedding.weight", ("vision", "patch", "kernel"), patch),
        *_lines("", (), OUTER, None),
        *_lines("vision_model.transformer.layers.{layer}.", ("vision", "blocks"), VISION_LAYER, local),
        *_lines("vision_model.global_transformer.layers.{layer}.", ("vision", "global_blocks"),
                VISION_LAYER + VISION_GATES, outer),
        # The rows beyond the vocabulary are the last: exact counts, so that none is dropped or added.
        Entry("language_model.embed_tokens.weight", ("decoder", "embed", "table"), SAME),
        *_lines(layer, ("decoder", "blocks"), LLAMA_LAYER, text.self_layers),
        *_lines(layer, ("decoder", "cross"), CROSS_LAYER, text.cross_layers),
        Entry("lm_head.weight", ("decoder", "head", "kernel"), linear()),
    ]  # fmt: skip


def _lines(prefix: str, path: tuple[str, ...], lines, layers) -> list[Entry]:
    return [Entry(prefix + name, path + tuple(ours.split()), transform, layers) for name, ours, transform in lines]


def canonical(name: str) -> str | None:
    """The table's spelling of a tensor name of any layout; None for what is ignored.

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


def read_release(src: Path, parts: Mapping[str, Path]) -> MllamaConfig:
    """The architecture that the released directory `src` states; it has no `parts` elsewhere."""
    return config_from_json(read_json(src / "config.json"))


def open_release(src: Path, parts: Mapping[str, Path]) -> tuple[Tensors, dict[str, str]]:
    """(tensors, canonical name -> name in them) of a released directory."""
    tensors = open_tensors(src)
    return tensors, canonical_names(tensors.shapes, canonical, str(src))


def config_from_json(found: dict) -> MllamaConfig:
    """The architecture that a config.json states; keys that it leaves out have transformers' defaults.

    Raises:
      WeightsError: the checkpoint is of another model, or differs from what this port computes; names the difference.
    """
    if found.get("model_type") != "mllama":
        raise WeightsError(f"config.json has model_type={found.get('model_type')!r}; 'mllama' is accepted")
    # Whether the head is tied makes no difference: transformers 5 does not tie it, and files hold it.
    text = section(found, "", "text_config")
    return MllamaConfig(
        vision=_vision(section(found, "", "vision_config")),
        text=_text(text),
        image_token_id=first(token(found, "", "image_token_id"), token(found, "", "image_token_index"), 128256),
        pad_token_id=token(text, "text_config.", "pad_token_id", 128004),
        eos_token_id=end_of(text, "text_config.", 128001),
    )


def _vision(found: dict) -> MllamaVisionConfig:
    part = "vision_config."
    expect(found, part, num_channels=3, max_num_tiles=NUM_TILES, supported_aspect_ratios=GRIDS,
           model_type="mllama_vision_model")  # fmt: skip
    intermediate = whole_numbers(found, part, "intermediate_layers_indices", (3, 7, 15, 23, 30), "intermediate_layers")
    if list(intermediate) != sorted(set(intermediate)):
        # Transformers 5 stacks their outputs in the order of the list, older ones in that of the layers.
        raise WeightsError(
            f"config.json has {part}intermediate_layers_indices={list(intermediate)}: versions of transformers stack "
            "them in different orders; rising numbers are accepted"
        )
    heads = "attention_heads" if found.get("attention_heads") is not None else "num_attention_heads"
    try:
        config = MllamaVisionConfig(
            image_size_px=size(found, part, "image_size", 448),
            patch_size_px=size(found, part, "patch_size", 14),
            num_layers=number(found, part, "num_hidden_layers", 32, "num_layers"),
            num_global_layers=number(found, part, "num_global_layers", 8, "num_global_layers"),
            intermediate_layers=intermediate,
            embed_dim=number(found, part, "hidden_size", 1280, "embed_dim"),
            num_heads=number(found, part, heads, 16, "num_heads"),
            mlp_dim=number(found, part, "intermediate_size", 5120, "mlp_dim"),
            norm_eps=number(found, part, "norm_eps", 1e-5, "norm_eps", kind=float),
            activation=activation(found, part, "hidden_act", "gelu"),
        )
    except ValueError as error:
        raise refused(error, part) from error
    expect({"vision_output_dim": 7680, **found}, part, vision_output_dim=config.feature_dim)
    return config


def _text(found: dict) -> MllamaTextConfig:
    part = "text_config."
    expect(found, part, model_type="mllama_text_model")
    _, theta, scaling = rope(found, part, 500000.0)
    num_heads = number(found, part, "num_attention_heads", 32, "num_heads")
    width = number(found, part, "hidden_size", 4096, "embed_dim")
    cross = whole_numbers(found, part, "cross_attention_layers", (3, 8, 13, 18, 23, 28, 33, 38), "cross_layers")
    try:
        return MllamaTextConfig(
            vocab_size=number(found, part, "vocab_size", 128256, "vocab_size"),
            num_layers=number(found, part, "num_hidden_layers", 40, "num_layers"),
            # transformers asks of each layer whether it is among them.
            cross_layers=tuple(sorted(set(cross))),
            embed_dim=width,
            num_heads=num_heads,
            num_kv_heads=number(found, part, "num_key_value_heads", 8, "num_kv_heads", null=True),
            head_dim=width // num_heads,
            mlp_dim=number(found, part, "intermediate_size", 14336, "mlp_dim"),
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=number(found, part, "rms_norm_eps", 1e-5, "norm_eps", kind=float),
            max_positions=number(found, part, "max_position_embeddings", 131072, "max_positions"),
            activation=activation(found, part, "hidden_act", "silu"),
        )
    except ValueError as error:
        raise refused(error, part) from error


def config_to_json(config: MllamaConfig, dtype: str) -> dict:
    """The released form of config.json for a checkpoint of this architecture."""
    vision, text, scaled = config.vision, config.text, rope_fields(config.text.rope_scaling)
    return {
        "architectures": ["MllamaForConditionalGeneration"],
        "model_type": "mllama",
        "torch_dtype": dtype,
        "image_token_index": config.image_token_id,
        "tie_word_embeddings": False,
        "vision_config": {
            "model_type": "mllama_vision_model",
            "hidden_act": vision.activation,
            "hidden_size": vision.embed_dim,
            "attention_heads": vision.num_heads,
            "intermediate_size": vision.mlp_dim,
            "intermediate_layers_indices": list(vision.intermediate_layers),
            "num_hidden_layers": vision.num_layers,
            "num_global_layers": vision.num_global_layers,
            "num_channels": 3,
            "max_num_tiles": NUM_TILES,
            "supported_aspect_ratios": GRIDS,
            "vision_output_dim": vision.feature_dim,
            "image_size": vision.image_size_px,
            "patch_size": vision.patch_size_px,
            "norm_eps": vision.norm_eps,
        },
        "text_config": {
            "model_type": "mllama_text_model",
            "hidden_act": text.activation,
            "hidden_size": text.embed_dim,
            "intermediate_size": text.mlp_dim,
            "max_position_embeddings": text.max_positions,
            "num_attention_heads": text.num_heads,
            "num_hidden_layers": text.num_layers,
            "num_key_value_heads": text.num_kv_heads,
            "cross_attention_layers": list(text.cross_layers),
            "rms_norm_eps": text.norm_eps,
            "rope_theta": text.rope_theta,
            "rope_scaling": scaled,
            "rope_parameters": {**scaled, "rope_theta": text.rope_theta},
            "tie_word_embeddings": False,
            "vocab_size": text.vocab_size,
            "pad_token_id": config.pad_token_id,
            "eos_token_id": config.eos_token_id,
        },
    }
