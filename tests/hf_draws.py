"""Random configs of transformers' three models, as far as transformers itself runs them, and directories of them.

For parity of any config: head counts, shared key heads, widths, odd grids, tied heads, biases, activations, feature and
intermediate layers, scaled rotary positions; weights as torch makes them or random in everything; 16 bits, shards.
"""

import json
import math
from pathlib import Path

import numpy as np

ACTS = ("silu", "gelu", "relu", "gelu_new", "quick_gelu", "gelu_pytorch_tanh")
GRIDS = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]


def one(rng, *values):
    """One of `values`, as the plain Python object that it is."""
    return values[int(rng.integers(len(values)))]


def _text(rng, *, even: int = 2) -> dict:
    """Sizes of a decoder; heads have a multiple of `even` numbers."""
    kv, ratio = one(rng, 1, 2, 3), one(rng, 1, 2, 4)
    head_dim = even * one(rng, 1, 2, 3) * (2 if even == 2 else 1)
    return dict(
        vocab_size=int(rng.integers(40, 140)), hidden_size=kv * ratio * head_dim, num_attention_heads=kv * ratio,
        num_key_value_heads=kv, intermediate_size=int(rng.integers(20, 90)), num_hidden_layers=int(rng.integers(1, 5)),
        rms_norm_eps=one(rng, 1e-5, 1e-6, 1e-4), max_position_embeddings=one(rng, 64, 512),
    )  # fmt: skip


def _rope(rng) -> dict:
    base = {"rope_theta": one(rng, 100.0, 10000.0, 500000.0)}
    kind = one(rng, "default", "default", "linear", "llama3")
    if kind == "linear":
        return {**base, "rope_type": "linear", "factor": one(rng, 2.0, 3.5)}
    if kind == "llama3":
        return {**base, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32}  # fmt: skip
    return {**base, "rope_type": "default"}


def llava(rng):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    text = _text(rng)
    if one(rng, True, False):
        text["head_dim"] = one(rng, 4, 6, 10, 16)
    bias, heads, patch = one(rng, True, False), one(rng, 1, 2, 3), one(rng, 4, 5, 7)
    text |= dict(attention_bias=bias, mlp_bias=one(rng, True, False), hidden_act=one(rng, *ACTS), pad_token_id=1)
    vision = dict(
        hidden_size=heads * one(rng, 5, 8, 11), num_attention_heads=heads, intermediate_size=int(rng.integers(20, 60)),
        num_hidden_layers=int(rng.integers(3, 6)), patch_size=patch,
        image_size=patch * one(rng, 2, 3, 4) + one(rng, 0, 0, 2),
        layer_norm_eps=one(rng, 1e-5, 1e-6), hidden_act=one(rng, "quick_gelu", "gelu"),
    )  # fmt: skip
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**vision), text_config=LlamaConfig(**text, rope_parameters=_rope(rng)),
        image_token_index=one(rng, 2, 4, text["vocab_size"] - 1), projector_hidden_act=one(rng, "gelu", *ACTS),
        vision_feature_layer=one(rng, -1, -2, -3, 2), vision_feature_select_strategy=one(rng, "default", "full"),
        multimodal_projector_bias=one(rng, True, False), tie_word_embeddings=one(rng, True, False, False),
    )  # fmt: skip


def qwen2_vl(rng):
    from transformers import Qwen2VLConfig

    text = _text(rng, even=one(rng, 6, 8))
    half = text["hidden_size"] // text["num_attention_heads"] // 2
    first = int(rng.integers(1, half - 1)) if half > 2 else 1
    second = int(rng.integers(1, half - first)) if half - first > 1 else 1
    text |= dict(
        hidden_act=one(rng, "silu", *ACTS), pad_token_id=0, bos_token_id=None, eos_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": one(rng, 100.0, 1e6),
                         "mrope_section": [first, second, half - first - second]},
    )  # fmt: skip
    heads = one(rng, 1, 2, 3)
    vision = dict(
        depth=int(rng.integers(1, 4)), embed_dim=heads * one(rng, 4, 8, 12), num_heads=heads,
        hidden_size=text["hidden_size"], mlp_ratio=one(rng, 1, 2, 4), patch_size=one(rng, 3, 4, 7),
        spatial_merge_size=one(rng, 1, 2, 2, 3), temporal_patch_size=one(rng, 1, 2, 2, 3),
        hidden_act=one(rng, "quick_gelu", "gelu", "relu"),
    )  # fmt: skip
    at = one(rng, 3, text["vocab_size"] - 6)
    return Qwen2VLConfig(
        text_config=text, vision_config=vision, vision_start_token_id=at, vision_end_token_id=at + 1,
        image_token_id=at + 2, video_token_id=at + 3, tie_word_embeddings=one(rng, True, False),
    )  # fmt: skip


def mllama(rng):
    from transformers import MllamaConfig
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

    text, heads, patch = _text(rng), one(rng, 1, 2, 4), one(rng, 4, 5, 7)
    depth = int(rng.integers(2, 7))
    cross = sorted(rng.choice(depth, int(rng.integers(1, depth)), replace=False).tolist())
    text |= dict(
        num_hidden_layers=depth, cross_attention_layers=cross, hidden_act=one(rng, "silu", *ACTS), pad_token_id=0,
        bos_token_id=1, eos_token_id=one(rng, 2, [2, 3]), rope_parameters=_rope(rng),
    )  # fmt: skip
    layers, width = int(rng.integers(2, 8)), heads * one(rng, 5, 8)
    # As many as a release has, where there are so many layers; the first is numbered 0 now and then.
    start = one(rng, 0, 1, 1, 1)
    num = one(rng, min(5, layers - start), int(rng.integers(1, layers - start + 1)))
    inner = sorted((start + rng.choice(layers - start, num, replace=False)).tolist())
    vision = dict(
        hidden_size=width, attention_heads=heads, intermediate_size=int(rng.integers(20, 50)), num_hidden_layers=layers,
        num_global_layers=int(rng.integers(1, 4)), patch_size=patch,
        image_size=patch * one(rng, 2, 3) + one(rng, 0, 0, 2),
        intermediate_layers_indices=inner, vision_output_dim=width * (1 + num), norm_eps=one(rng, 1e-5, 1e-4, 1e-6),
        supported_aspect_ratios=GRIDS, hidden_act=one(rng, "gelu", "gelu", "quick_gelu", "relu"),
    )  # fmt: skip
    return MllamaConfig(
        vision_config=MllamaVisionConfig(**vision), text_config=MllamaTextConfig(**text),
        image_token_index=one(rng, 4, text["vocab_size"]),
    )  # fmt: skip


FAMILIES = {"llava": llava, "qwen2_vl": qwen2_vl, "mllama": mllama}
CLASSES = {
    "llava": "LlavaForConditionalGeneration", "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "mllama": "MllamaForConditionalGeneration",
}  # fmt: skip


def build(family: str, config, seed: int, *, random: bool):
    """The model, with torch's own weights, or with random numbers in every tensor of sizes that differ by tensor."""
    import torch
    import transformers

    torch.manual_seed(seed)
    model = getattr(transformers, CLASSES[family])(config).float().eval()
    if random:
        rng = np.random.default_rng(seed)
        with torch.no_grad():
            for name, p in model.named_parameters():
                noise = torch.from_numpy(rng.standard_normal(p.shape).astype(np.float32))
                fan_in = math.prod(p.shape[1:]) if p.ndim > 1 and "embed_tokens" not in name else 1
                size = float(rng.uniform(0.3, 1.5)) * fan_in**-0.5
                p.copy_(1 + 0.3 * noise if "norm" in name and name.endswith("weight") else size * noise)
    return model


def save(family: str, seed: int, out: Path) -> dict:
    """Draws a config and writes a directory of it; what was drawn, in words."""
    import torch

    rng = np.random.default_rng(seed)
    config = FAMILIES[family](rng)
    random = one(rng, True, False)
    dtype = one(rng, "float32", "float32", "bfloat16", "float16")
    model = build(family, config, seed, random=random).to(getattr(torch, dtype))
    shards = one(rng, {}, {}, {"max_shard_size": "20KB"})
    model.save_pretrained(out, **shards)
    if one(rng, True, False, False):
        respell(family, out)
    return {"random": random, "dtype": dtype, **shards, "config": json.loads((out / "config.json").read_text())}


def respell(family: str, out: Path) -> None:
    """The tensors of `out` under the names of the release, in one file."""
    from safetensors.torch import load_file, save_file

    from medcg_jax.families.weights import llava, mllama, qwen2_vl

    module = {"llava": llava, "qwen2_vl": qwen2_vl, "mllama": mllama}[family]
    found = {}
    for file in sorted(out.glob("model*.safetensors")):
        found |= load_file(file)
        file.unlink()
    (out / "model.safetensors.index.json").unlink(missing_ok=True)
    named = {module.released_name(module.canonical(name)): value.contiguous() for name, value in found.items()}
    save_file(named, out / "model.safetensors", metadata={"format": "pt"})
