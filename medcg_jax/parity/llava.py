"""LLaVA's part of `medcg parity`: inputs, and outputs by stage, of this port and of HF's model.

Vision stages hold the used images one after another, as in HF.
Source: huggingface/transformers:models/llava/modeling_llava.py at 5.23.0.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from medcg_jax.families.llava.model import Llava, LlavaConfig
from medcg_jax.families.weights.files import WeightsError
from medcg_jax.nn.rope import count_positions, rope_angles
from medcg_jax.parity.rows import example_text, moved_ids, norm_and_logits, run_layers

FAMILY = "llava"
HF_CLASS = "LlavaForConditionalGeneration"
# Submodule -> canonical names of its tensors.
PREFIXES = {"projector": ("multi_modal_projector.",), "decoder": ("language_model.", "lm_head.")}


def runnable(config: LlavaConfig) -> tuple[LlavaConfig, list[str]]:
    """(a config that both sides can run, notes on what was changed and why)."""
    moved, notes = moved_ids({"image_token_id": config.image_token_id}, config.text.vocab_size)
    return dataclasses.replace(config, **moved), notes


def example(config: LlavaConfig, *, seed: int = 0, num_text: int = 24) -> dict[str, np.ndarray]:
    """Two rows of random input as HF's forward takes it: one image each, the second row padded on the right."""
    rng = np.random.default_rng(seed)
    size, num = config.image_size_px, config.num_image_tokens
    text = example_text(
        rng, num_text=num_text, num_rows=config.text.vocab_size, pad_id=config.pad_token_id,
        inserted=[(config.image_token_id, slice(4, 4 + num))], special={config.image_token_id},
    )  # fmt: skip
    pixels = rng.standard_normal((2, 3, size, size), dtype=np.float32)
    return text | {"pixel_values": pixels}


def port_inputs(config: LlavaConfig, inputs: dict[str, np.ndarray]) -> dict:
    """tokens, segment_ids and images of this port, from HF's forward arguments (images one after another).

    Raises:
      WeightsError: shapes that do not fit the model, or image tokens that do not fit the images.
    """
    ids, images = np.asarray(inputs["input_ids"]), np.asarray(inputs["pixel_values"], np.float32)
    mask = np.asarray(inputs.get("attention_mask", np.ones_like(ids)))
    size, num = config.image_size_px, config.num_image_tokens
    if ids.ndim != 2 or mask.shape != ids.shape or images.ndim != 4 or images.shape[1:] != (3, size, size):
        raise WeightsError(
            f"input_ids {ids.shape}, attention_mask {mask.shape}, pixel_values {images.shape}: "
            f"expected [B, T], [B, T], [images, 3, {size}, {size}]"
        )
    placeholders = (ids == config.image_token_id).sum(axis=1)
    counts = placeholders // num
    if (placeholders % num).any() or counts.sum() != len(images):
        raise WeightsError(f"rows hold {placeholders.tolist()} image tokens for {len(images)} images of {num} each")
    pixels = np.zeros((len(ids), max(1, counts.max()), size, size, 3), np.float32)
    taken = iter(images.transpose(0, 2, 3, 1))
    for row, count in enumerate(counts):
        for i in range(count):
            pixels[row, i] = next(taken)
    arrays = {"tokens": ids.astype(np.int32), "segment_ids": mask.astype(np.int32), "images": {"pixels": pixels}}
    return jax.tree.map(jnp.asarray, arrays)


def port_stages(model: Llava, given: dict) -> dict[str, np.ndarray]:
    """Outputs by stage: `vision.*` and `projector` per image, then `embed`, `decoder.*` and `logits` per token.

    Layers run one by one here; `decoder.norm` and `logits` come from the model's own path.
    """
    config, attention = model.config, model.config.attention
    tokens, segment_ids, pixels = given["tokens"], given["segment_ids"], given["images"]["pixels"]
    flat = pixels.reshape(-1, *pixels.shape[2:])
    x = jax.jit(lambda model, flat: model.vision.embed(flat, model.dtype))(model, flat)
    stages = {"vision.embed": x}
    step = jax.jit(lambda block, x: block(x, implementation=attention))
    x = run_layers(stages, "vision.layer", model.vision.blocks, step, x)
    stages["projector"] = jax.jit(lambda model, x: model.projector(model.vision.select(x)))(model, x)
    features = stages["projector"].reshape(pixels.shape[0], -1, config.text.embed_dim)
    x = stages["embed"] = jax.jit(lambda model, *given: model.embed(*given))(model, tokens, features)
    text = config.text
    angles = rope_angles(count_positions(segment_ids), text.head_dim, text.rope_theta, text.rope_scaling)
    run = jax.jit(lambda block, x: block(x, angles=angles, segment_ids=segment_ids, implementation=attention)[0])
    run_layers(stages, "decoder.layer", model.decoder.blocks, run, x)
    stages["decoder.norm"], stages["logits"] = norm_and_logits(model, given)
    # Rows without an image have a zero image here, and none in HF.
    counts = np.asarray((tokens == config.image_token_id).sum(axis=1)) // config.num_image_tokens
    used = (np.arange(pixels.shape[1]) < counts[:, None]).reshape(-1)
    seen = ("vision", "projector")
    return {name: np.asarray(x)[used] if name.startswith(seen) else np.asarray(x) for name, x in stages.items()}


def taps(model) -> list[tuple]:
    """(stage, module of HF's model, whether the stage is the module's input, not its output)."""
    base = model.model
    return [
        ("vision.embed", base.vision_tower.pre_layrnorm, False),
        *((f"vision.layer{i}", layer, False) for i, layer in enumerate(base.vision_tower.encoder.layers)),
        ("projector", base.multi_modal_projector, False),
        ("embed", base.language_model.layers[0], True),
        *((f"decoder.layer{i}", layer, False) for i, layer in enumerate(base.language_model.layers)),
        ("decoder.norm", base.language_model.norm, False),
    ]


def prepare(model, config: LlavaConfig) -> None:
    """Sets the image token's id in HF's model."""
    model.config.image_token_id = model.model.config.image_token_id = config.image_token_id
