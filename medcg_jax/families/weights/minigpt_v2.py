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

from medcg_jax.families.decoder import DecoderConfig
from medcg_jax.families.minigpt_v2.eva import EvaConfig
from medcg_jax.families.minigpt_v2.model import MiniGPTv2Config
from medcg_jax.families.weights.engine import (
    FLAT,
    SAME,
    Entry,
    Transform,
    canonical_names,
    conv_patch,
    fused_qkv,
    linear,
)
from medcg_jax.families.weights.fields import end_of, expect, number, refused, token
from medcg_jax.families.weights.files import Tensors, WeightsError, joined, open_bin, open_tensors, read_json
from medcg_jax.families.weights.llava import LLAMA_LAYER, llama2_config
from medcg_jax.families.weights.positions import resize_positions
from medcg_jax.nn.lora import LoraConfig

# Buffers that are saved with the adapters: recomputed here, never parameters.
IGNORED = re.compile(r"rotary_emb\.inv_freq$")
# What eva_vit_g.pth holds beside the tower.
EVA_IGNORED = re.compile(r"^(head|norm|fc_norm)\.|^mask_token$|\.relative_position_index$")
# Names of the release's files, looked for beside Llama's when `parts` does not say where they are.
EVA_FILE, OWN_FILE = "eva_vit_g.pth", "minigptv2_checkpoint.pth"
# What no file of the release states.
RELEASED = MiniGPTv2Config()
# Llama's token that opens a sequence.
BOS = 1


def leading_ones(num: int) -> Transform:
    """PyTorch's tensor with `num` axes of size 1 in front <-> ours without them."""
    return Transform(
        load=lambda tensor, shape: tensor.reshape(shape),
        store=lambda ours: ours.reshape((1,) * num + ours.shape),
        released_shape=lambda shape: (1,) * num + tuple(shape),
    )


EVA_LAYER = (
    ("norm1.weight", "norm1 scale", SAME),
    ("norm1.bias", "norm1 bias", SAME),
    ("attn.qkv.weight", "qkv kernel", fused_qkv()),
    ("attn.q_bias", "q_bias", FLAT),
    ("attn.v_bias", "v_bias", FLAT),
    ("attn.proj.weight", "out kernel", linear(inputs=2)),
    ("attn.proj.bias", "out bias", FLAT),
    ("norm2.weight", "norm2 scale", SAME),
    ("norm2.bias", "norm2 bias", SAME),
    ("mlp.fc1.weight", "up kernel", linear()),
    ("mlp.fc1.bias", "up bias", FLAT),
    ("mlp.fc2.weight", "down kernel", linear()),
    ("mlp.fc2.bias", "down bias", FLAT),
)
# Product of a layer -> its module.
MODULES = {ours.split()[0]: name.removesuffix(".weight") for name, ours, _ in LLAMA_LAYER if ours.endswith("kernel")}
OUTER = (
    ("visual_encoder.cls_token", "vision class_token", leading_ones(2)),
    ("visual_encoder.pos_embed", "vision positions", leading_ones(1)),
    ("visual_encoder.patch_embed.proj.bias", "vision patch bias", FLAT),
    ("ln_vision.weight", "vision norm scale", SAME),
    ("ln_vision.bias", "vision norm bias", SAME),
    ("llama_proj.weight", "projector kernel", linear()),
    ("llama_proj.bias", "projector bias", FLAT),
)
LLAMA_OUTER = (
    ("llama_model.model.embed_tokens.weight", "decoder embed table", SAME),
    ("llama_model.model.norm.weight", "decoder norm scale", SAME),
    ("llama_model.lm_head.weight", "decoder head kernel", linear()),
)


def table(config: MiniGPTv2Config) -> list[Entry]:
    """Canonical name -> parameter, for every tensor of MiniGPT-v2's state dict."""
    layers, llama_layer = range(config.text.num_layers), "llama_model.model.layers.{layer}."
    patch = conv_patch(config.vision.patch_size_px)
    blocks = range(config.vision.num_layers)
    return [
        Entry("visual_encoder.patch_embed.proj.weight", ("vision", "patch", "kernel"), patch),
        *_entries("", (), OUTER + LLAMA_OUTER, None),
        *_entries("visual_encoder.blocks.{layer}.", ("vision", "blocks"), EVA_LAYER, blocks),
        *_entries(llama_layer, ("decoder", "blocks"), LLAMA_LAYER, layers),
        *_entries(llama_layer, ("lora",), _lora_layer(config.lora), layers),
    ]


def _lora_layer(lora: LoraConfig) -> list:
    made = {"a": lambda ours: linear(inputs=2 if ours == "out" else 1), "b": lambda ours: linear()}
    pairs = [(ours, half) for ours in lora.targets for half in "ab"]
    return [(f"{MODULES[ours]}.lora_{h.upper()}.weight", f"{ours} {h}", made[h](ours)) for ours, h in pairs]


def _entries(prefix: str, path: tuple[str, ...], lines, layers: range | None) -> list[Entry]:
    return [Entry(prefix + name, path + tuple(ours.split()), transform, layers) for name, ours, transform in lines]


def canonical(name: str) -> str | None:
    """The table's spelling of a tensor name of MiniGPT-v2's state dict; None for what is ignored.

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


def read_release(src: Path, parts: Mapping[str, Path]) -> MiniGPTv2Config:
    """The architecture of the directory `src`: a whole state dict's, or that of the released files."""
    found = read_json(src / "config.json")
    if found.get("model_type") == "llama":
        return dataclasses.replace(RELEASED, text=llama2_config(found))
    return config_from_json(found)


def open_release(src: Path, parts: Mapping[str, Path]) -> tuple[Tensors, dict[str, str]]:
    """(tensors, canonical name -> name in them) of the directory `src`.

    parts: where `src` is Llama-2-chat's, the files `eva` (eva_vit_g.pth) and `minigpt` (MiniGPT-v2's .pth); those that
      are not given are looked for in `src` and beside it.

    Positions of another grid are resized; the norm behind the tower is ones and zeros where no file has it; what
    MiniGPT-v2's own file holds goes before the others.

    Raises:
      WeightsError: a file is missing or no file of tensors.
    """
    if read_json(src / "config.json").get("model_type") != "llama":
        tensors = open_tensors(src)
        return tensors, canonical_names(tensors.shapes, canonical, str(src))
    vision = read_release(src, parts).vision
    eva_file, own_file = _part(src, parts, "eva", EVA_FILE), _part(src, parts, "minigpt", OWN_FILE)
    llama, eva, own = open_tensors(src), _resized(open_bin(eva_file), vision), open_bin(own_file, "model")
    norm = {"ln_vision.weight": np.ones(vision.embed_dim, np.float32)}
    norm["ln_vision.bias"] = 0 * norm["ln_vision.weight"]
    plain = Tensors({name: value.shape for name, value in norm.items()}, norm.__getitem__)
    return joined(
        (llama, canonical_names(llama.shapes, canonical_llama, str(src))),
        (plain, canonical_names(norm, canonical, "the default norm")),
        (eva, canonical_names(eva.shapes, lambda name: canonical_eva(name, vision.num_layers), str(eva_file))),
        (own, canonical_names(own.shapes, canonical, str(own_file))),
    )


def _part(src: Path, parts: Mapping[str, Path], part: str, name: str) -> Path:
    places = [parts[part]] if part in parts else [src / name, src.resolve().parent / name]
    for place in places:
        if place.is_file():
            return place
    raise WeightsError(
        f"{src} holds Llama alone, and {' and '.join(map(str, places))} is no file; MiniGPT-v2's release is "
        f"Llama-2-7b-chat in HF's layout, {EVA_FILE} and the released .pth ({OWN_FILE}): put them there, or name them"
    )


def _resized(eva: Tensors, vision: EvaConfig) -> Tensors:
    """`eva` with its positions on the grid of `vision`."""
    name, side = "pos_embed", vision.image_size_px // vision.patch_size_px
    shapes = dict(eva.shapes)
    if name in shapes and len(shapes[name]) == 3 and math.isqrt(shapes[name][1] - 1) ** 2 == shapes[name][1] - 1:
        shapes[name] = (1, side * side + 1, shapes[name][2])

    def read(wanted: str) -> np.ndarray:
        value = eva.read(wanted)
        return resize_positions(value[0], side)[None] if value.shape != shapes[wanted] else value

    def dtype(wanted: str) -> np.dtype:
        return np.dtype(np.float32) if shapes[wanted] != eva.shapes[wanted] else eva.dtype(wanted)

    return Tensors(shapes, read, dtype, eva.origin)


def config_from_json(found: dict) -> MiniGPTv2Config:
    """The architecture that a whole state dict's config.json states.

    Raises:
      WeightsError: it is of another model, lacks a size, or differs from what this port computes; names the difference.
    """
    expect(found, "", model_type="minigpt_v2")
    sizes = (
        "image_size", "patch_size", "vit_width", "vit_depth", "vit_heads", "vit_mlp_hidden", "vocab_size",
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "lora_r", "lora_alpha",
    )  # fmt: skip
    missing = [name for name in sizes if name not in found]
    if missing:
        raise WeightsError(f"config.json of MiniGPT-v2 lacks {', '.join(missing)}")
    targets = {name.partition(".")[2]: ours for ours, name in MODULES.items()}
    modules = found.get("lora_target_modules", ["q_proj", "v_proj"])
    if not isinstance(modules, list) or not modules or any(name not in list(targets) for name in modules):
        accepted = f"['q_proj', 'v_proj'] or others of {', '.join(targets)}"
        raise WeightsError(f"config.json has lora_target_modules={str(modules)[:100]}; {accepted} are accepted")
    rank = number(found, "", "lora_r", None, "rank")
    alpha = number(found, "", "lora_alpha", None, "alpha", kind=float)
    lora = LoraConfig(rank, alpha, tuple(targets[name] for name in modules))
    scale = number(found, "", "lora_scale", lora.scale, "alpha", kind=float)
    if not math.isclose(scale, lora.scale, rel_tol=1e-6):
        raise WeightsError(f"config.json has lora_scale={scale!r}; {lora.scale!r} is accepted")
    try:
        config = _config(found, lora)
    except ValueError as error:
        raise refused(error, "") from error
    expect(found, "", num_image_tokens=config.num_image_tokens)
    return config


def _config(found: dict, lora: LoraConfig) -> MiniGPTv2Config:
    return MiniGPTv2Config(
        vision=EvaConfig(
            image_size_px=number(found, "", "image_size", None, "image_size_px"),
            patch_size_px=number(found, "", "patch_size", None, "patch_size_px"),
            num_layers=number(found, "", "vit_depth", None, "num_layers"),
            embed_dim=number(found, "", "vit_width", None, "embed_dim"),
            num_heads=number(found, "", "vit_heads", None, "num_heads"),
            mlp_dim=number(found, "", "vit_mlp_hidden", None, "mlp_dim"),
            norm_eps=number(found, "", "vit_layer_norm_eps", RELEASED.vision.norm_eps, "norm_eps", kind=float),
            out_norm_eps=number(found, "", "ln_vision_eps", RELEASED.vision.out_norm_eps, "norm_eps", kind=float),
        ),
        # Transformers' own default of this field is another model's.
        text=(text := llama2_config({"rms_norm_eps": RELEASED.text.norm_eps, **found, "model_type": "llama"})),
        lora=lora,
        patches_per_token=number(found, "", "tokens_per_group", RELEASED.patches_per_token, "patches_per_token"),
        image_token_id=token(found, "", "image_token_id", max(RELEASED.image_token_id, text.vocab_size)),
        pad_token_id=token(found, "", "pad_token_id", RELEASED.pad_token_id),
        eos_token_id=end_of(found, "", RELEASED.eos_token_id),
    )


def config_to_json(config: MiniGPTv2Config, dtype: str) -> dict:
    """config.json beside a whole state dict of this architecture."""
    vision = config.vision
    return {
        "model_type": "minigpt_v2",
        "torch_dtype": dtype,
        "image_size": vision.image_size_px,
        "patch_size": vision.patch_size_px,
        "vit_width": vision.embed_dim,
        "vit_depth": vision.num_layers,
        "vit_heads": vision.num_heads,
        "vit_mlp_hidden": vision.mlp_dim,
        "vit_layer_norm_eps": vision.norm_eps,
        "ln_vision_eps": vision.out_norm_eps,
        "tokens_per_group": config.patches_per_token,
        "num_image_tokens": config.num_image_tokens,
        "lora_r": config.lora.rank,
        "lora_alpha": config.lora.alpha,
        "lora_scale": config.lora.scale,
        "lora_target_modules": [MODULES[name].partition(".")[2] for name in config.lora.targets],
        "image_token_id": config.image_token_id,
        "pad_token_id": config.pad_token_id,
        "eos_token_id": config.eos_token_id,
        **_text_sizes(config.text),
    }


def llama_json(config: MiniGPTv2Config, dtype: str) -> dict:
    """config.json of the decoder alone, as transformers' Llama."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": dtype,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": BOS,
        "eos_token_id": config.eos_token_id,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.text.rope_theta},
        **_text_sizes(config.text),
    }


def _text_sizes(text: DecoderConfig) -> dict:
    return {
        "hidden_size": text.embed_dim,
        "intermediate_size": text.mlp_dim,
        "max_position_embeddings": text.max_positions,
        "num_attention_heads": text.num_heads,
        "num_hidden_layers": text.num_layers,
        "num_key_value_heads": text.num_kv_heads,
        "head_dim": text.head_dim,
        "rms_norm_eps": text.norm_eps,
        "rope_theta": text.rope_theta,
        "tie_word_embeddings": False,
        "vocab_size": text.vocab_size,
    }
