"""Llama-3.2-Vision's part of `medcg parity`: inputs, and outputs by stage, of this port and of HF's model.

Source: huggingface/transformers:models/mllama/modeling_mllama.py and processing_mllama.py at 5.23.0.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from medcg_jax.families.mllama.model import Mllama, MllamaConfig
from medcg_jax.families.mllama.text import EXTRA_ROWS
from medcg_jax.families.mllama.vit import NUM_TILES
from medcg_jax.families.weights.files import WeightsError
from medcg_jax.nn.rope import count_positions, rope_angles
from medcg_jax.parity.rows import example_text, layers, moved_ids, norm_and_logits, run_layers

FAMILY = "mllama"
HF_CLASS = "MllamaForConditionalGeneration"
# Submodule -> canonical names of its tensors.
PREFIXES = {"projector": ("multi_modal_projector.",), "decoder": ("language_model.", "lm_head.")}


def runnable(config: MllamaConfig) -> tuple[MllamaConfig, list[str]]:
    """(a config that both sides can run, notes on what was changed and why).

    Where layer 0 is an intermediate layer, HF cannot take its input, which is no layer's output: both sides then take
    outputs, as HF does.
    """
    moved, notes = moved_ids({"image_token_id": config.image_token_id}, config.text.vocab_size + EXTRA_ROWS)
    if min(config.vision.intermediate_layers, default=1) < 1:
        moved["intermediate_from"] = "output"
        notes.append(
            f"intermediate_layers_indices={list(config.vision.intermediate_layers)} hold layer 0, whose input "
            "transformers cannot take: both sides take the layers' outputs here, while training takes the inputs"
        )
    return dataclasses.replace(config, **moved), notes


def example(config: MllamaConfig, *, seed: int = 0, num_text: int = 24) -> dict[str, np.ndarray]:
    """Two rows of random input as HF's forward takes it: an image of two tiles and one of three; the second padded."""
    rng = np.random.default_rng(seed)
    size, start, tiles = config.image_size_px, 4, np.array([2, 3])
    text = example_text(
        rng, num_text=num_text - 1, num_rows=config.text.vocab_size, pad_id=config.pad_token_id,
        inserted=[(config.image_token_id, slice(start, start + 1))], special={config.image_token_id},
    )  # fmt: skip
    present = (np.arange(NUM_TILES) < tiles[:, None]).astype(np.int64)[:, None]
    pixels = rng.standard_normal((2, 1, NUM_TILES, 3, size, size), dtype=np.float32) * present[..., None, None, None]
    return text | {
        "pixel_values": pixels.astype(np.float32), "aspect_ratio_ids": tiles[:, None], "aspect_ratio_mask": present,
        "cross_attention_mask": present[:, None] * (np.arange(num_text) >= start)[:, None, None],
    }  # fmt: skip


def port_inputs(config: MllamaConfig, inputs: dict[str, np.ndarray]) -> dict:
    """tokens, segment_ids and images of this port, from HF's forward arguments.

    Raises:
      WeightsError: arrays are missing, or their shapes do not fit the model.
    """
    missing = [name for name in ("aspect_ratio_ids", "aspect_ratio_mask") if name not in inputs]
    if missing:
        raise WeightsError(f"the inputs lack {' and '.join(missing)}")
    ids, pixels = np.asarray(inputs["input_ids"]), np.asarray(inputs["pixel_values"], np.float32)
    mask = np.asarray(inputs.get("attention_mask", np.ones_like(ids)))
    ratios, size = np.asarray(inputs["aspect_ratio_ids"]), config.image_size_px
    expected = (len(ids), *ratios.shape[1:], NUM_TILES, 3, size, size)
    if ids.ndim != 2 or mask.shape != ids.shape or ratios.ndim != 2 or pixels.shape != expected:
        raise WeightsError(
            f"input_ids {ids.shape}, attention_mask {mask.shape}, aspect_ratio_ids {ratios.shape}, pixel_values "
            f"{pixels.shape}: expected [B, T], [B, T], [B, images], [B, images, {NUM_TILES}, 3, {size}, {size}]"
        )
    images = {
        "pixels": pixels.transpose(0, 1, 2, 4, 5, 3), "aspect_ratio_ids": ratios.astype(np.int32),
        # HF's mask counts an absent image as one tile.
        "num_tiles": (np.asarray(inputs["aspect_ratio_mask"]).sum(axis=-1) * (ratios > 0)).astype(np.int32),
    }  # fmt: skip
    given = {"tokens": ids.astype(np.int32), "segment_ids": mask.astype(np.int32), "images": images}
    return jax.tree.map(jnp.asarray, given)


def port_stages(model: Mllama, given: dict) -> dict[str, np.ndarray]:
    """Outputs by stage: `vision.*` and `projector` per image, then `embed`, `decoder.*` and `logits` per token.

    Layers run one by one here; `vision`, `projector`, `decoder.norm` and `logits` come from the model's own path.
    """
    text, vision, decoder, attention = model.config.text, model.vision, model.decoder, model.config.attention
    tokens, segment_ids, images = given["tokens"], given["segment_ids"], given["images"]
    flat = [images[name].reshape(-1, *images[name].shape[2:]) for name in model.image_keys]
    allowed = vision.allowed(flat[2])
    x = jax.jit(lambda vision, *flat: vision.embed(*flat, model.dtype))(vision, *flat)
    stages = {"vision.embed": x}
    step = jax.jit(lambda block, x: block(x, allowed))
    x = run_layers(stages, "vision.local", vision.blocks, step, x)
    x = stages["vision.outer"] = jax.jit(lambda vision, x: vision.outer(x, flat[1]))(vision, x)
    run_layers(stages, "vision.global", vision.global_blocks, step, x)
    features = jax.jit(lambda vision: vision(*flat, dtype=model.dtype))(vision)
    stages["vision"] = features.reshape(*images["num_tiles"].shape, *features.shape[1:])
    stages["projector"] = jax.jit(lambda project, x: project(x))(model.projector, stages["vision"])
    memory = stages["projector"].reshape(len(tokens), -1, text.embed_dim)
    x = stages["embed"] = decoder.embed(tokens, model.dtype)
    angles = rope_angles(count_positions(segment_ids), text.head_dim, text.rope_theta, text.rope_scaling)
    visibility = model.visibility(*model.in_view(tokens, segment_ids), images["num_tiles"])
    at_text = {"angles": angles, "segment_ids": segment_ids, "implementation": attention}
    run_self = jax.jit(lambda block, x: block(x, **at_text)[0])
    run_cross = jax.jit(lambda block, x, memory: block(x, block.keys_values(memory), **visibility))
    blocks, cross = layers(decoder.blocks), layers(decoder.cross)
    for i in range(text.num_layers):
        is_cross = i in text.cross_layers
        x = stages[f"decoder.layer{i}"] = run_cross(next(cross), x, memory) if is_cross else run_self(next(blocks), x)
    stages["decoder.norm"], stages["logits"] = norm_and_logits(model, given)
    return {name: np.asarray(x) for name, x in stages.items()}


def taps(model) -> list[tuple]:
    """(stage, module of HF's model, whether the stage is the module's input, not its output)."""
    vision, text = model.model.vision_model, model.model.language_model
    return [
        ("vision.embed", vision.transformer.layers[0], True),
        *((f"vision.local{i}", layer, False) for i, layer in enumerate(vision.transformer.layers)),
        ("vision.outer", vision.global_transformer.layers[0], True),
        *((f"vision.global{i}", layer, False) for i, layer in enumerate(vision.global_transformer.layers)),
        ("vision", model.model.multi_modal_projector, True),
        ("projector", model.model.multi_modal_projector, False),
        ("embed", text.layers[0], True),
        *((f"decoder.layer{i}", layer, False) for i, layer in enumerate(text.layers)),
        ("decoder.norm", text.norm, False),
    ]


def prepare(model, config: MllamaConfig) -> None:
    """Makes HF's model take the inputs of the intermediate layers, as Meta's model does, not their outputs."""
    if config.intermediate_from == "input":
        vision = model.model.vision_model
        vision.intermediate_layers_indices = [i - 1 for i in vision.intermediate_layers_indices]
