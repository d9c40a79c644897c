"""MiniGPT-v2's table, the spellings of its tensor names, its config.json, and its three released files as one.

Layouts: the model's whole state dict in one directory, whose config.json names the sizes; or the release, which is
Llama-2-chat's directory (HF), `eva_vit_g.pth` and MiniGPT-v2's own .pth (projector, adapters, what else was trained).
Source: Vision-CAIR/MiniGPT-4:minigpt4/models/base_model.py, eva_vit.py:create_eva_vit_g and runners/runner_base.py at
d94738a; names of the adapters as peft 0.2.0 and later write them.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from medcg_jax.families.minigpt_v2.eva import EvaConfig
from medcg_jax.families.minigpt_v2.model import MiniGPTv2Config
from medcg_jax.families.weights import fields, tables
from medcg_jax.families.weights.engine import canonical_names
from medcg_jax.families.weights.fields import expect
from medcg_jax.families.weights.files import Tensors, WeightsError, joined, open_bin, open_tensors
from medcg_jax.families.weights.llava import LLAMA_KEYS, llama2_config, llama_layer
from medcg_jax.nn.lora import LoraConfig

# Buffers that are saved with the adapters: recomputed here, never parameters.
IGNORED = re.compile(r"rotary_emb\.inv_freq$")
# Other tensors of eva_vit_g.pth than the tower's.
EVA_IGNORED = re.compile(r"^(head|norm|fc_norm)\.|^mask_token$|\.relative_position_index$")
# Files of the release, searched for in and beside Llama's directory unless `parts` names them.
EVA_FILE, MINIGPT_FILE = "eva_vit_g.pth", "minigptv2_checkpoint.pth"
# The values that no file of the release states.
RELEASED = MiniGPTv2Config()
# Of PyTorch's cubic convolution; jax.image has -0.5.
CUBIC = -0.75
EVA_LAYER = (
    *tables.norm("norm1", "norm1"),
    ("attn.qkv.weight", "qkv kernel", tables.fused_qkv()),
    ("attn.q_bias", "q_bias", tables.FLAT),
    ("attn.v_bias", "v_bias", tables.FLAT),
    *tables.dense("attn.proj", "out", tables.linear(inputs=2)),
    *tables.norm("norm2", "norm2"),
    *tables.dense("mlp.fc1", "up"),
    *tables.dense("mlp.fc2", "down"),
)
OUTER = (
    ("visual_encoder.cls_token", "vision class_token", tables.leading_ones(2)),
    ("visual_encoder.pos_embed", "vision positions", tables.leading_ones(1)),
    *tables.norm("ln_vision", "vision norm"),
    *tables.dense("llama_proj", "projector"),
    ("llama_model.model.embed_tokens.weight", "decoder embed table", tables.SAME),
    *tables.norm("llama_model.model.norm", "decoder norm", bias=False),
    *tables.dense("llama_model.lm_head", "decoder head", bias=False),
)
# Product of a layer -> its module.
MODULES = {ours.split()[0]: name.removesuffix(".weight") for name, ours, _ in llama_layer() if ours.endswith("kernel")}
EVA_KEYS = fields.keys(
    "image_size_px=image_size patch_size_px=patch_size num_layers=vit_depth embed_dim=vit_width num_heads=vit_heads "
    "mlp_dim=vit_mlp_hidden norm_eps=vit_layer_norm_eps out_norm_eps=ln_vision_eps"
)
# Without the fields that are fixed in Llama 2.
LLAMA2_KEYS = {field: key for field, key in LLAMA_KEYS.items() if field not in ("activation", "qkv_bias", "mlp_bias")}
LLAMA2_KEYS["rope_theta"] = "rope_theta"
SIZES: tuple[str, ...] = ("image_size", "patch_size", "vit_width", "vit_depth", "vit_heads", "vit_mlp_hidden")
SIZES += ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SIZES += ("lora_r", "lora_alpha")


def table(config: MiniGPTv2Config) -> list[tables.Entry]:
    """Canonical name -> parameter, for every tensor of MiniGPT-v2's state dict."""
    layers, layer = range(config.text.num_layers), "llama_model.model.layers.{layer}."
    patch = tables.dense(
        "visual_encoder.patch_embed.proj", "vision patch", tables.conv_patch(config.vision.patch_size_px)
    )
    adapters = sum((tables.lora_halves(MODULES[target], target, target) for target in config.lora.targets), ())
    return [
        *tables.entries(patch + OUTER),
        *tables.entries(EVA_LAYER, "visual_encoder.blocks.{layer}.", "vision blocks", range(config.vision.num_layers)),
        *tables.entries(llama_layer(), layer, "decoder blocks", layers),
        *tables.entries(adapters, layer, "lora", layers),
    ]


def canonical(name: str) -> str | None:
    """The table's spelling of a tensor name of MiniGPT-v2's state dict; None if it is ignored.

    Examples: "llama_model.base_model.model.lm_head.0.weight" (peft 0.2.0) is "llama_model.lm_head.weight";
    "...q_proj.lora_A.default.weight" and "...q_proj.base_layer.weight" (later) lose the word in the middle.
    """
    if IGNORED.search(name):
        return None
    name = re.sub(r"^llama_model\.base_model\.model\.", "llama_model.", name)
    name = re.sub(r"\.lm_head\.0\.", ".lm_head.", name)
    return re.sub(r"_proj\.(base_layer|(lora_[AB])\.default)\.", lambda m: f"_proj.{m[2]}." if m[2] else "_proj.", name)


def canonical_llama(name: str) -> str | None:
    """As `canonical`, for the tensors of Llama-2-chat."""
    return None if IGNORED.search(name) else f"llama_model.{name}"


def canonical_eva(name: str, num_layers: int) -> str | None:
    """As `canonical`, for the tensors of eva_vit_g.pth, whose last block is not used."""
    block = re.match(r"blocks\.(\d+)\.", name)
    beyond = block is not None and int(block[1]) >= num_layers
    return None if beyond or EVA_IGNORED.search(name) else f"visual_encoder.{name}"


def released_name(name: str) -> str:
    """The original code's spelling of a canonical name (peft 0.2.0)."""
    name = re.sub(r"^llama_model\.", "llama_model.base_model.model.", name)
    return re.sub(r"\.lm_head\.", ".lm_head.0.", name)


def peft_name(name: str) -> str | None:
    """The name of a weight in the Llama that peft's adapters are put on; None: it is not in there."""
    return name.removeprefix("llama_model.") if name.startswith("llama_model.") else None


def read_release(src: Path, stated: dict, parts: Mapping[str, Path]) -> MiniGPTv2Config:
    """The architecture of `stated`, the config.json of `src`: a whole state dict's, or the released Llama's."""
    if stated.get("model_type") == "llama":
        return dataclasses.replace(RELEASED, text=llama2_config(stated))
    return config_from_json(stated)


def open_release(src: Path, stated: dict, parts: Mapping[str, Path]) -> tuple[Tensors, dict[str, str]]:
    """(tensors, canonical name -> name in them) of the directory `src`.

    parts: if `src` is Llama-2-chat's, the files `eva` (eva_vit_g.pth) and `minigpt` (MiniGPT-v2's .pth); by default
      they are searched for in `src` and beside it.

    Positions of another grid are resized. The norm behind the tower is ones and zeros if no file has it. Tensors of
    MiniGPT-v2's .pth override the others.

    Raises:
      WeightsError: a file is missing or no file of tensors.
    """
    llama = open_tensors(src)
    if stated.get("model_type") != "llama":
        return llama, canonical_names(llama.shapes, canonical, str(src))
    vision = RELEASED.vision
    eva_file = _release_file(src, parts, "eva", EVA_FILE)
    minigpt_file = _release_file(src, parts, "minigpt", MINIGPT_FILE)
    eva, minigpt = _resized(open_bin(eva_file), vision), open_bin(minigpt_file, "model")
    width = vision.embed_dim
    default = {"ln_vision.weight": np.ones(width, np.float32), "ln_vision.bias": np.zeros(width, np.float32)}
    return joined(
        (llama, canonical_names(llama.shapes, canonical_llama, str(src))),
        (Tensors.of(default), {name: name for name in default}),
        (eva, canonical_names(eva.shapes, lambda name: canonical_eva(name, vision.num_layers), str(eva_file))),
        (minigpt, canonical_names(minigpt.shapes, canonical, str(minigpt_file))),
    )


def _release_file(src: Path, parts: Mapping[str, Path], key: str, name: str) -> Path:
    candidates = [parts[key]] if key in parts else [src / name, src.resolve().parent / name]
    for path in candidates:
        if path.is_file():
            return path
    raise WeightsError(
        f"{src} holds Llama alone, and {' and '.join(map(str, candidates))} is no file; MiniGPT-v2's release is "
        f"Llama-2-7b-chat in HF's layout, {EVA_FILE} and the .pth ({MINIGPT_FILE}): put them there, or name them"
    )


def _resized(eva: Tensors, vision: EvaConfig) -> Tensors:
    """`eva` with its positions on the grid of `vision`."""
    name, side = "pos_embed", vision.image_size_px // vision.patch_size_px
    shapes = dict(eva.shapes)
    if name in shapes and len(shapes[name]) == 3 and math.isqrt(shapes[name][1] - 1) ** 2 == shapes[name][1] - 1:
        shapes[name] = (1, side * side + 1, shapes[name][2])
    is_same = shapes == eva.shapes

    def read(key: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        if key != name or is_same:
            return eva.read(key, index)
        # Read whole: each new position depends on sixteen old ones.
        return resize_positions(eva.read(key, ())[0], side)[None][index]

    def dtype(key: str) -> np.dtype:
        return eva.dtype(key) if key != name or is_same else np.dtype(np.float32)

    return Tensors(shapes, read, dtype, eva.origin)


def resize_positions(positions: np.ndarray, side: int) -> np.ndarray:
    """float32[1 + side * side, E]: the class token's row as it is, the square grid behind it by bicubic interpolation.

    positions: float[1 + s * s, E]. Equal to `torch.nn.functional.interpolate(mode="bicubic", align_corners=False)`.
    Source: Vision-CAIR/MiniGPT-4:minigpt4/models/eva_vit.py:interpolate_pos_embed at d94738a.
    """
    positions = np.asarray(positions, np.float64)
    old = round((len(positions) - 1) ** 0.5)
    grid = positions[1:].reshape(old, old, -1)
    weights = cubic_weights(old, side)
    resized = np.einsum("ia,jb,abe->ije", weights, weights, grid, optimize=True)
    return np.concatenate([positions[:1], resized.reshape(side * side, -1)]).astype(np.float32)


def cubic_weights(old: int, new: int) -> np.ndarray:
    """float64[new, old] the weight of each old point in each new one; pixel centres, the border repeated outwards."""
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(centres).astype(int)
    weights = np.zeros((new, old))
    for tap in range(-1, 3):
        distance = np.abs(centres - (first + tap))
        near = ((CUBIC + 2) * distance - (CUBIC + 3)) * distance**2 + 1
        far = CUBIC * (((distance - 5) * distance + 8) * distance - 4)
        index = np.clip(first + tap, 0, old - 1)
        np.add.at(weights, (np.arange(new), index), np.where(distance <= 1, near, far))
    return weights


def config_from_json(stated: dict) -> MiniGPTv2Config:
    """The architecture that a whole state dict's config.json states.

    Raises:
      WeightsError: it is of another model, lacks a size, or differs from what this port computes; names the difference.
    """
    expect(stated, "", model_type="minigpt_v2")
    missing = [name for name in SIZES if stated.get(name) is None]
    if missing:
        raise WeightsError(f"config.json of MiniGPT-v2 lacks {', '.join(missing)}")
    vision = fields.read_dataclass(EVA_KEYS, RELEASED.vision, stated)
    # Transformers' own default of the norm's epsilon is another model's.
    text = llama2_config({"rms_norm_eps": RELEASED.text.norm_eps, **stated, "model_type": "llama"})
    groups = fields.number(stated, "", "tokens_per_group", RELEASED.patches_per_token, "patches_per_token")
    lora = _lora(stated)
    try:
        config = MiniGPTv2Config(
            vision=vision,
            text=text,
            lora=lora,
            patches_per_token=groups,
            image_token_id=fields.token(stated, "", "image_token_id", max(RELEASED.image_token_id, text.vocab_size)),
            pad_token_id=fields.token(stated, "", "pad_token_id", RELEASED.pad_token_id),
            eos_token_id=fields.end_of(stated, "", RELEASED.eos_token_id),
        )
    except ValueError as error:
        raise fields.refused(error, "") from error
    expect(stated, "", num_image_tokens=config.num_image_tokens)
    return config


def _lora(stated: dict) -> LoraConfig:
    targets = {name.partition(".")[2]: ours for ours, name in MODULES.items()}
    modules = stated.get("lora_target_modules", ["q_proj", "v_proj"])
    if not isinstance(modules, list) or not modules or any(name not in list(targets) for name in modules):
        expected = f"['q_proj', 'v_proj'] or others of {', '.join(targets)}"
        raise WeightsError(f"config.json has lora_target_modules={str(modules)[:100]}; expected {expected}")
    rank = fields.number(stated, "", "lora_r", None, "rank")
    alpha = fields.number(stated, "", "lora_alpha", None, "alpha", kind=float)
    lora = LoraConfig(rank, alpha, tuple(targets[name] for name in modules))
    scale = fields.number(stated, "", "lora_scale", lora.scale, "alpha", kind=float)
    if not math.isclose(scale, lora.scale, rel_tol=1e-6):
        raise WeightsError(f"config.json has lora_scale={scale!r}; expected {lora.scale!r}")
    return lora


def config_to_json(config: MiniGPTv2Config, dtype: str) -> dict:
    """config.json beside a whole state dict of this architecture."""
    return {
        "model_type": "minigpt_v2",
        "torch_dtype": dtype,
        **fields.written(config.vision, EVA_KEYS),
        "tokens_per_group": config.patches_per_token,
        "num_image_tokens": config.num_image_tokens,
        "lora_r": config.lora.rank,
        "lora_alpha": config.lora.alpha,
        "lora_scale": config.lora.scale,
        "lora_target_modules": [MODULES[name].partition(".")[2] for name in config.lora.targets],
        "image_token_id": config.image_token_id,
        "pad_token_id": config.pad_token_id,
        "eos_token_id": config.eos_token_id,
        **fields.written(config.text, LLAMA2_KEYS),
    }
