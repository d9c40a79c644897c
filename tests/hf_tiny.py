"""A tiny random LLaVA of transformers, with numbers that hide nothing, and its port: for parity tests of any room.

torch initialises biases to 0 and norms to 1, which hides swapped or missing terms; here all of them are random, and
weights are scaled so that logits are of order 1 to 10. Sizes are odd, and heads * head width is not the model width.
"""

import dataclasses

import numpy as np

from medcg_jax.families import build
from medcg_jax.families.weights import engine, llava
from medcg_jax.families.weights.files import Tensors
from medcg_jax.mesh import make_mesh

VOCAB, IMAGE, PAD = 101, 97, 98
PATCHES = 9
VISION = dict(
    hidden_size=36, intermediate_size=52, num_hidden_layers=4, num_attention_heads=3, image_size=21, patch_size=7,
    layer_norm_eps=1e-5, hidden_act="quick_gelu",
)  # fmt: skip
TEXT = dict(
    vocab_size=VOCAB, hidden_size=40, intermediate_size=72, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=12, rms_norm_eps=1e-5, max_position_embeddings=128, pad_token_id=PAD,
    rope_parameters={"rope_type": "default", "rope_theta": 500.0},
)  # fmt: skip


def reference(seed: int = 0, **text):
    """transformers' LlavaForConditionalGeneration, float32, eager attention, eval mode."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**{**TEXT, **text}), image_token_index=IMAGE,
        pad_token_id=PAD,
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = LlavaForConditionalGeneration(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if name.endswith("bias"):
                p.copy_(0.3 * noise)
            elif "norm" in name:
                p.copy_(1 + 0.3 * noise)
            elif "lm_head" in name:
                p.copy_(3 * p.shape[1] ** -0.5 * noise)
            elif "embed" in name:
                p.copy_(noise)
            else:
                p.copy_(1.3 * p[0].numel() ** -0.5 * noise)
    return model


def tensors(model) -> Tensors:
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    return Tensors.of(state)


def port(model, mesh=None, *, change=None):
    """(config, graphdef, params) of this port with the weights of `model`; `change` alters the config first."""
    found = tensors(model)
    config = llava.config_from_json(model.config.to_dict())
    # Rolled: it compiles sooner; `test_blocks` has that it is the same unrolled.
    config = dataclasses.replace(config if change is None else change(config), scan_unroll=1)
    mesh = make_mesh(devices=one_device()) if mesh is None else mesh
    graphdef, abstract = build.abstract(config)
    names = engine.canonical_names(found.shapes, llava.canonical, "the model in memory")
    params = engine.load(llava.table(config), abstract, build.shardings(config, mesh), found, names, "memory")
    return config, graphdef, params


def one_device():
    import jax

    return jax.devices()[:1]


def inputs(*, side: str = "right", seed: int = 1) -> dict[str, np.ndarray]:
    """HF's forward arguments: three rows of two images and text, the second and third padded on `side`."""
    rng = np.random.default_rng(seed)
    rows, labels = [], []
    for num_text in (17, 12, 9):
        text = rng.integers(3, 90, num_text)
        ids = np.concatenate([text[:2], [IMAGE] * PATCHES, text[2:6], [IMAGE] * PATCHES, text[6:]])
        target = np.where(np.arange(len(ids)) >= len(ids) - 5, ids, -100)
        rows.append(ids)
        labels.append(target)
    length = max(map(len, rows))

    def padded(values, fill):
        width = [(0, length - len(values)) if side == "right" else (length - len(values), 0)]
        return np.pad(values, width, constant_values=fill)

    ids = np.stack([padded(row, PAD) for row in rows])
    mask = np.stack([padded(np.ones_like(row), 0) for row in rows])
    pixels = rng.standard_normal((6, 3, VISION["image_size"], VISION["image_size"])).astype(np.float32)
    return {
        "input_ids": ids, "attention_mask": mask, "pixel_values": pixels,
        "labels": np.stack([padded(row, -100) for row in labels]),
    }  # fmt: skip
