"""Qwen2-VL's part of `medcg parity`: inputs, and outputs by stage, of this port and of HF's model.

Vision stages hold the real patches of all images one after another, as in HF.
Source: huggingface/transformers:models/qwen2_vl/modeling_qwen2_vl.py at 5.23.0.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from medcg_jax.families.qwen2_vl.model import ImageFeatures, Qwen2VL, Qwen2VLConfig, mrope_angles
from medcg_jax.families.qwen2_vl.vit import real_patches, vision_angles
from medcg_jax.families.weights.files import WeightsError
from medcg_jax.parity.rows import example_text, layers, moved_ids, norm_and_logits, run_layers

FAMILY = "qwen2_vl"
HF_CLASS = "Qwen2VLForConditionalGeneration"
# Submodule -> canonical names of its tensors.
PREFIXES = {
    "vision": ("visual.patch_embed.", "visual.blocks."),
    "projector": ("visual.merger.",),
    "decoder": ("language_model.", "lm_head."),
}
IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def runnable(config: Qwen2VLConfig) -> tuple[Qwen2VLConfig, list[str]]:
    """(a config that both sides can run, notes on what was changed and why)."""
    moved, notes = moved_ids({name: getattr(config, name) for name in IDS}, config.text.vocab_size)
    return dataclasses.replace(config, **moved), notes


def example(config: Qwen2VLConfig, *, seed: int = 0, num_text: int = 24, blocks=(2, 3)) -> dict[str, np.ndarray]:
    """Two rows of random input as HF's forward takes it: one image each, the second row padded on the right.

    blocks: rows and columns of tokens of the first image; the second image has them swapped.
    """
    rng = np.random.default_rng(seed)
    vision = config.vision
    grid = blocks[0] * vision.merge, blocks[1] * vision.merge
    grids = np.array([[1, *grid], [1, *grid[::-1]]])
    num = grid[0] * grid[1] // vision.merge**2
    start, image, end = config.vision_start_token_id, config.image_token_id, config.vision_end_token_id
    text = example_text(
        rng, num_text=num_text - 2, num_rows=config.text.vocab_size, pad_id=config.pad_token_id,
        inserted=[(start, slice(3, 4)), (image, slice(4, 4 + num)), (end, slice(4 + num, 5 + num))],
        special={getattr(config, name) for name in IDS},
    )  # fmt: skip
    patches = rng.standard_normal((int(grids.prod(axis=1).sum()), 3, 1, vision.patch_size_px**2), dtype=np.float32)
    pixels = np.repeat(patches, vision.num_frames, axis=2).reshape(len(patches), -1)
    types = (text["input_ids"] == image).astype(np.int64)
    return text | {"pixel_values": pixels, "image_grid_thw": grids, "mm_token_type_ids": types}


def port_inputs(config: Qwen2VLConfig, inputs: dict[str, np.ndarray], num_slots: int = 0) -> dict:
    """tokens, segment_ids and images of this port, from HF's forward arguments (images one after another).

    num_slots: room for patches in every image; 0: as many as the largest image has.

    Raises:
      WeightsError: image tokens that do not fit the grids, or patches whose frames differ (a video's).
    """
    ids, grids = np.asarray(inputs["input_ids"]), np.asarray(inputs["image_grid_thw"])
    vision, merged = config.vision, config.vision.merge**2
    apart = np.asarray(inputs["pixel_values"], np.float32).reshape(-1, 3, vision.num_frames, vision.patch_size_px**2)
    if (grids[:, 0] != 1).any() or not (apart == apart[:, :, :1]).all():
        raise WeightsError("pixel_values hold frames that differ; expected still images")
    sizes = grids.prod(axis=1)
    ends, seen = np.cumsum(sizes // merged), np.cumsum((ids == config.image_token_id).sum(axis=1))
    if len(apart) != sizes.sum() or not set(seen.tolist()) <= {0, *ends.tolist()} or seen[-1] != ends[-1]:
        raise WeightsError(f"image_grid_thw {grids.tolist()}: got {len(apart)} patches, {seen[-1]} image tokens")
    row_of = np.searchsorted(seen, ends)
    order = [int((row_of[:i] == row).sum()) for i, row in enumerate(row_of)]
    pixels = np.zeros((len(ids), max(order) + 1, num_slots or sizes.max(), vision.patch_dim), np.float32)
    placed = np.zeros((*pixels.shape[:2], 2), np.int32)
    for row, slot, grid, patches in zip(
        row_of, order, grids, np.split(apart[:, :, 0], np.cumsum(sizes)[:-1]), strict=True
    ):
        pixels[row, slot, : len(patches)] = patches.reshape(len(patches), -1)
        placed[row, slot] = grid[1:]
    mask = np.asarray(inputs.get("attention_mask", np.ones_like(ids)))
    images = {"pixels": pixels, "grids": placed}
    arrays = {"tokens": ids.astype(np.int32), "segment_ids": mask.astype(np.int32), "images": images}
    return jax.tree.map(jnp.asarray, arrays)


def port_stages(model: Qwen2VL, given: dict) -> dict[str, np.ndarray]:
    """Outputs by stage; layers run one by one here, `decoder.norm` and `logits` come from the model's own path."""
    config, implementation = model.config, model.config.attention
    tokens, segment_ids, images = given["tokens"], given["segment_ids"], given["images"]
    pixels, grids = (images[key].reshape(-1, *images[key].shape[2:]) for key in model.image_keys)
    angles, ids = vision_angles(grids, pixels.shape[1], config.vision), real_patches(grids, pixels.shape[1])
    real = np.asarray(ids) != 0
    x = jax.jit(lambda model, pixels: model.vision.embed(pixels, model.dtype))(model, pixels)
    stages = {"vision.embed": np.asarray(x)[real]}
    step = jax.jit(lambda block, x: block(x, angles=angles, segment_ids=ids, implementation=implementation))
    for i, block in enumerate(layers(model.vision.blocks)):
        x = step(block, x)
        stages[f"vision.layer{i}"] = np.asarray(x)[real]
    x = jax.jit(lambda model, x: model.projector(x))(model, x)
    stages["projector"] = np.asarray(x)[real[:, :: config.vision.merge**2]]
    features = ImageFeatures(x.reshape(len(tokens), -1, x.shape[-1]), images["grids"] // config.vision.merge)
    places = model.layout(tokens, segment_ids, features)
    x = stages["embed"] = jax.jit(lambda model, *args: model.embed(*args))(model, tokens, features, places.slots)
    angles = mrope_angles(places.positions, config)
    run = jax.jit(lambda block, x: block(x, angles=angles, segment_ids=segment_ids, implementation=implementation)[0])
    run_layers(stages, "decoder.layer", model.decoder.blocks, run, x)
    stages["decoder.norm"], stages["logits"] = norm_and_logits(model, given)
    return {name: np.asarray(value) for name, value in stages.items()}


def taps(model) -> list[tuple]:
    """(stage, module of HF's model, whether the stage is the module's input, not its output)."""
    base = model.model
    return [
        ("vision.embed", base.visual.patch_embed, False),
        *((f"vision.layer{i}", layer, False) for i, layer in enumerate(base.visual.blocks)),
        ("projector", base.visual.merger, False),
        ("embed", base.language_model.layers[0], True),
        *((f"decoder.layer{i}", layer, False) for i, layer in enumerate(base.language_model.layers)),
        ("decoder.norm", base.language_model.norm, False),
    ]


def prepare(model, config: Qwen2VLConfig) -> None:
    """Sets the special ids in HF's model."""
    for name in IDS:
        setattr(model.config, name, getattr(config, name))
        setattr(model.model.config, name, getattr(config, name))
