"""A tiny random Llama-3.2-Vision of transformers, with numbers that hide nothing, and its port: for parity tests.

torch initialises gates and biases to 0 and norms to 1, which makes cross-attention inert and hides swapped terms; here
all of them are random. A tile has 17 tokens, padded to 24.
"""

import dataclasses

import jax
import numpy as np

from medcg_jax.families import build
from medcg_jax.families.weights import engine, mllama
from medcg_jax.families.weights.files import Tensors
from medcg_jax.mesh import make_mesh
from medcg_jax.parity import mllama as parity_mllama

VOCAB, PAD, EOS = 104, 98, 99
IMAGE = VOCAB
TILE_PX, PATCH_PX, TILES = 28, 7, 4
GRIDS = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]
VISION = dict(
    hidden_size=36, intermediate_size=52, num_hidden_layers=4, num_global_layers=2, attention_heads=2,
    image_size=TILE_PX, patch_size=PATCH_PX, norm_eps=1e-4, vision_output_dim=108, supported_aspect_ratios=GRIDS,
)  # fmt: skip
# Wavelengths of the four pairs: 6, 30, 140 and 660 positions; 64 / 4 and 64 / 1 bound those that are blended.
TEXT = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=72, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2, rms_norm_eps=1e-5, max_position_embeddings=128, pad_token_id=PAD, bos_token_id=1,
    eos_token_id=EOS, cross_attention_layers=[1, 4],
    rope_parameters={"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
                     "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
)  # fmt: skip
# The layers whose outputs transformers takes; Meta's model takes the inputs of layers one number higher.
TAKEN = [0, 2]


def reference(seed: int = 0, **text):
    """transformers' MllamaForConditionalGeneration, float32, eager attention, eval mode."""
    import torch
    from transformers import MllamaConfig, MllamaForConditionalGeneration
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

    config = MllamaConfig(
        vision_config=MllamaVisionConfig(**VISION, intermediate_layers_indices=TAKEN),
        text_config=MllamaTextConfig(**{**TEXT, **text}), image_token_index=IMAGE,
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = MllamaForConditionalGeneration(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if name.split(".")[-1].startswith("gate_") or name.endswith("gate"):
                p.copy_(0.7 + 0.2 * noise)
            elif name.endswith("bias"):
                p.copy_(0.3 * noise)
            elif "norm" in name:
                p.copy_(1 + 0.3 * noise)
            elif "lm_head" in name:
                p.copy_(3 * p.shape[1] ** -0.5 * noise)
            elif "embed" in name and "patch" not in name:
                p.copy_(noise)
            else:
                p.copy_(1.3 * p[0].numel() ** -0.5 * noise)
    return model


def tensors(model) -> Tensors:
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    return Tensors.of(state)


def metas_inputs(config):
    """The config that computes, by Meta's rule, what transformers computes of `TAKEN` by its own."""
    vision = dataclasses.replace(config.vision, intermediate_layers=tuple(i + 1 for i in TAKEN))
    return dataclasses.replace(config, vision=vision)


def port(model, mesh=None, *, change=metas_inputs):
    """(config, graphdef, params) of this port with the weights of `model`; `change` alters the config first."""
    found = tensors(model)
    # Rolled: it compiles sooner.
    config = dataclasses.replace(change(mllama.config_from_json(model.config.to_dict())), scan_unroll=1)
    graphdef, abstract = build.abstract(config)
    mesh = make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    names = engine.canonical_names(found.shapes, mllama.canonical, "the model in memory")
    params = engine.load(mllama.table(config), abstract, build.shardings(config, mesh), found, names, "memory")
    return config, graphdef, params


def inputs(*, side: str = "right", seed: int = 1, text_only: bool = False) -> dict[str, np.ndarray]:
    """HF's forward arguments: rows of two images, one, and two side by side; the shorter rows padded on `side`.

    The cross-attention mask is made by transformers' own functions from the padded rows, as its processor does.
    text_only: the second row has no image instead.
    """
    from transformers.models.mllama.processing_mllama import (
        convert_sparse_cross_attention_mask_to_dense,
        get_cross_attention_token_mask,
    )

    rng = np.random.default_rng(seed)
    rows = []
    for places, length in (((2, 9), 19), ((3,), 14), ((1, 2), 11)):
        ids = rng.integers(3, 96, length)
        if not (text_only and len(places) == 1):
            ids[list(places)] = IMAGE
        rows.append(ids)
    width = max(map(len, rows))

    def padded(values, fill):
        free = width - len(values)
        return np.pad(values, (0, free) if side == "right" else (free, 0), constant_values=fill)

    ids = np.stack([padded(row, PAD) for row in rows])
    attention = np.stack([padded(np.ones_like(row), 0) for row in rows])
    answers = [np.where(np.arange(len(row)) >= len(row) - 5, row, -100) for row in rows]
    # (height, width) of each image in tiles: 2, 1; 3; 4, 2.
    grids = [[[1, 2], [1, 1]], [] if text_only else [[3, 1]], [[2, 2], [2, 1]]]
    ratios, counts = np.zeros((3, 2), np.int64), np.zeros((3, 2), np.int64)
    for row, sizes in enumerate(grids):
        for i, grid in enumerate(sizes):
            ratios[row, i], counts[row, i] = GRIDS.index(grid) + 1, grid[0] * grid[1]
    real = np.arange(TILES) < counts[..., None]
    pixels = rng.standard_normal((3, 2, TILES, 3, TILE_PX, TILE_PX)).astype(np.float32)
    pixels *= real[..., None, None, None]
    # The processor counts an image that is not there as one tile.
    tile_mask = (np.arange(TILES) < np.maximum(counts, 1)[..., None]).astype(np.int64)
    spans = [get_cross_attention_token_mask(row.tolist(), IMAGE) for row in ids]
    tiles = [[int(n) for n in row if n] for row in counts]
    mask = convert_sparse_cross_attention_mask_to_dense(spans, tiles, TILES, width)
    return {
        "input_ids": ids, "attention_mask": attention, "pixel_values": pixels, "aspect_ratio_ids": ratios,
        "aspect_ratio_mask": tile_mask, "cross_attention_mask": mask,
        "labels": np.stack([padded(answer, -100) for answer in answers]),
    }  # fmt: skip


def port_inputs(inputs: dict[str, np.ndarray]) -> dict:
    """tokens, segment_ids and images of this port, from HF's forward arguments."""
    vision = {**VISION, "intermediate_layers_indices": TAKEN}
    found = {"model_type": "mllama", "vision_config": vision, "text_config": TEXT, "image_token_index": IMAGE}
    return parity_mllama.port_inputs(mllama.config_from_json(found), inputs)


def reference_stages(model, inputs) -> dict[str, np.ndarray]:
    """HF's outputs by stage, and logits and loss."""
    import torch

    found, handles = {}, []

    def tap(name, module, of_input):
        def hook(_, args, kwargs, out):
            value = (args[0] if args else kwargs["hidden_states"]) if of_input else out
            found[name] = (value[0] if isinstance(value, tuple) else value).detach().numpy().copy()

        handles.append(module.register_forward_hook(hook, with_kwargs=True))

    for stage in parity_mllama.taps(model):
        tap(*stage)
    try:
        with torch.no_grad():
            out = model(**{name: torch.from_numpy(value) for name, value in inputs.items()}, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {**found, "logits": out.logits.numpy(), "loss": out.loss.numpy()}
