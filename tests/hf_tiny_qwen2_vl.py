"""A tiny random Qwen2-VL of transformers, with numbers that hide nothing, and its port: for parity tests of any room.

As `hf_tiny`: every bias and norm is random, sizes are odd, the three sections of rotary frequencies all differ.
"""

import dataclasses

import numpy as np
from hf_tiny import one_device, tensors

from medcg_jax.families import build
from medcg_jax.families.weights import engine, qwen2_vl
from medcg_jax.mesh import make_mesh

VOCAB, PAD, START, END, IMAGE, VIDEO = 103, 91, 92, 93, 94, 95
PATCH = 5
VISION = dict(depth=3, embed_dim=24, hidden_size=48, num_heads=3, mlp_ratio=2, patch_size=PATCH)
TEXT = dict(
    vocab_size=VOCAB, hidden_size=48, intermediate_size=72, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, rms_norm_eps=1e-6, max_position_embeddings=128, pad_token_id=PAD, eos_token_id=2,
    bos_token_id=None,
    rope_parameters={"rope_type": "default", "rope_theta": 500.0, "mrope_section": [1, 2, 3]},
)  # fmt: skip
IDS = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)
# Rows of images as (rows, columns) of patches; the last row is text alone.
GRIDS = (((4, 6), (2, 8)), ((6, 4),), ())
# More room than any image needs, and no power of two.
SLOTS = 28


def reference(seed: int = 0, *, tie: bool = False):
    """transformers' Qwen2VLForConditionalGeneration, float32, eager attention, eval mode."""
    import torch
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    config = Qwen2VLConfig(text_config=dict(TEXT), vision_config=dict(VISION), tie_word_embeddings=tie, **IDS)
    config._attn_implementation = "eager"
    model = Qwen2VLForConditionalGeneration(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if name.endswith("bias"):
                p.copy_(0.3 * noise)
            elif "norm" in name or "ln_q" in name:
                p.copy_(1 + 0.3 * noise)
            elif "lm_head" in name:
                p.copy_(3 * p.shape[1] ** -0.5 * noise)
            elif "embed_tokens" in name:
                p.copy_(0.5 * noise)
            else:
                p.copy_(1.3 * p[0].numel() ** -0.5 * noise)
    return model


def port(model, *, change=None):
    """(config, graphdef, params) of this port with the weights of `model`; `change` alters the config first."""
    found = tensors(model)
    config = qwen2_vl.config_from_json(model.config.to_dict())
    config = dataclasses.replace(config if change is None else change(config), scan_unroll=1)
    graphdef, abstract = build.abstract(config)
    places = build.shardings(config, make_mesh(devices=one_device()))
    names = engine.canonical_names(found.shapes, qwen2_vl.canonical, "the model in memory")
    if config.text.tie_head:
        names.pop("lm_head.weight", None)
    params = engine.load(qwen2_vl.table(config), abstract, places, found, names, "memory")
    return config, graphdef, params


def inputs(*, side: str = "right", seed: int = 1) -> dict[str, np.ndarray]:
    """HF's forward arguments: rows of two, one and no images between text, all but the longest padded on `side`."""
    rng = np.random.default_rng(seed)
    rows, labels = [], []
    for grids, num_text in zip(GRIDS, (11, 14, 17), strict=True):
        parts = [rng.integers(3, 90, 3)]
        for height, width in grids:
            parts += [[START], [IMAGE] * (height * width // 4), [END], rng.integers(3, 90, 2)]
        ids = np.concatenate([*parts, rng.integers(3, 90, num_text)]).astype(np.int64)
        rows.append(ids)
        labels.append(np.where(np.arange(len(ids)) >= len(ids) - 5, ids, -100))
    length = max(map(len, rows)) + 2

    def padded(values, fill):
        width = [(0, length - len(values)) if side == "right" else (length - len(values), 0)]
        return np.pad(values, width, constant_values=fill)

    ids = np.stack([padded(row, PAD) for row in rows])
    grids = np.array([(1, *grid) for row in GRIDS for grid in row])
    patches = rng.standard_normal((int(grids.prod(axis=1).sum()), 3, 1, PATCH**2)).astype(np.float32)
    return {
        "input_ids": ids, "attention_mask": np.stack([padded(np.ones_like(row), 0) for row in rows]),
        "pixel_values": np.repeat(patches, 2, axis=2).reshape(len(patches), -1), "image_grid_thw": grids,
        "mm_token_type_ids": (ids == IMAGE).astype(np.int64), "labels": np.stack([padded(row, -100) for row in labels]),
    }  # fmt: skip
