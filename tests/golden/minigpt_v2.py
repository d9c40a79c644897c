"""This port against arrays from the original MiniGPT-v2 code: a folder with weights, inputs and outputs.

The folder holds `weights.safetensors` (the model's state dict), `config.json` (every size), `inputs.json` (token ids
piece by piece), `inputs.npz`, `expected.npz` (outputs by stage, loss, generation) and `grads.npz`. Float32; no PyTorch
is needed.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from medcg_jax.families import build
from medcg_jax.families.minigpt_v2.model import MiniGPTv2, MiniGPTv2Config, group
from medcg_jax.families.weights import engine, minigpt_v2
from medcg_jax.families.weights.files import WeightsError, open_safetensors, read_json
from medcg_jax.families.weights.minigpt_v2 import resize_positions
from medcg_jax.mesh import make_mesh
from medcg_jax.nn.rope import count_positions, rope_angles
from medcg_jax.parity.rows import Row, check_arrays, compared, exactly, layers, read_arrays
from medcg_jax.train.losses import negative_log_likelihood

# Above the float32 rounding of these small models, below the effect of every usual mistake.
TOLERANCE = 2e-5
# The submodules that the original trains; of all other gradients the folder has only norms.
TRAINED = ("projector", "lora")
IGNORED_LABEL = -100
# Llama's token that opens a sequence.
BOS = 1


def golden_rows(folder: Path) -> list[Row]:
    """A row for every array of the folder: stages, logits, losses, gradients, generated tokens, resized positions.

    Stages come in the order of the computation. No array of `expected.npz` and `grads.npz` is left out.

    Raises:
      WeightsError: files are missing, or arrays do not fit the config.
    """
    config, graphdef, params = load(folder)
    bos = read_json(folder / "config.json").get("bos_token_id", BOS)
    pieces = read_json(folder / "inputs.json")
    inputs, expected, grads = (read_arrays(folder / f"{name}.npz") for name in ("inputs", "expected", "grads"))
    model = nnx.merge(graphdef, params)
    pixels = jnp.asarray(inputs["image"].transpose(0, 2, 3, 1))[:, None]
    with jax.default_matmul_precision("highest"):
        rows = stage_rows(model, pixels, pieces["train"], expected, bos)
        rows += gradient_rows(config, graphdef, params, pixels, pieces["train"], grads, bos)
        rows += generation_rows(model, pixels, pieces["generate"], expected)
    side = config.vision.image_size_px // config.vision.patch_size_px
    resized = resize_positions(inputs["pos_embed_small"][0], side)[None]
    rows.append(compared("pos_embed_interpolated", resized, expected["pos_embed_interpolated"]))
    compared_with = [row.stage for row in rows if not row.stage.startswith("gradient ")]
    check_arrays(folder / "expected.npz", expected, compared_with)
    return [dataclasses.replace(row, tolerance=TOLERANCE, floor=1.0) for row in rows]


def load(folder: Path) -> tuple[MiniGPTv2Config, nnx.GraphDef, nnx.State]:
    """(config, graphdef, params) of the folder's model, on one device."""
    config = minigpt_v2.config_from_json(read_json(folder / "config.json"))
    # Rolled: it compiles sooner.
    config = dataclasses.replace(config, scan_unroll=1)
    tensors = open_safetensors(folder / "weights.safetensors")
    names = engine.canonical_names(tensors.shapes, minigpt_v2.canonical, str(folder))
    graphdef, abstract = build.abstract(config)
    places = build.shardings(config, make_mesh(devices=jax.devices()[:1]))
    return config, graphdef, engine.load(minigpt_v2.table(config), abstract, places, tensors, names, str(folder))


def training_rows(config: MiniGPTv2Config, pieces: list[dict], bos_id: int = BOS) -> dict[str, np.ndarray]:
    """tokens, segment_ids and labels, int32[B, T] each: [BOS][before][image][after][answer], padded on the right.

    The original pads prompts and answers separately, so every row may be shorter than T.
    """
    image = [config.image_token_id] * config.num_image_tokens
    asked = [[bos_id, *piece["before_image"], *image, *piece["after_image"]] for piece in pieces]
    whole = [ids + piece["answer_used"] for ids, piece in zip(asked, pieces, strict=True)]
    shape = len(whole), max(map(len, asked)) + max(len(piece["answer_used"]) for piece in pieces)
    arrays = {
        "tokens": np.full(shape, config.pad_token_id, np.int32), "segment_ids": np.zeros(shape, np.int32),
        "labels": np.full(shape, IGNORED_LABEL, np.int32),
    }  # fmt: skip
    for row, (ids, start) in enumerate(zip(whole, map(len, asked), strict=True)):
        arrays["tokens"][row, : len(ids)] = ids
        arrays["segment_ids"][row, : len(ids)] = 1
        arrays["labels"][row, start : len(ids)] = ids[start:]
    return arrays


def port_stages(model: MiniGPTv2, tokens: jax.Array, segment_ids: jax.Array, pixels: jax.Array) -> dict[str, jax.Array]:
    """Outputs by the folder's names; layers one by one, the last norm and the logits by the model's own path."""
    config, implementation = model.config, model.config.attention
    flat = pixels.reshape(-1, *pixels.shape[2:])
    x = model.vision.embed(flat, model.dtype)
    # The patches alone: what class token and positions are added to.
    stages = {"vit_patch_embed": x[:, 1:] - model.vision.positions[...][1:], "vit_embeddings": x}
    for i, block in enumerate(layers(model.vision.blocks)):
        x = stages[f"vit_block_{i}"] = block(x, implementation=implementation)
    x = stages["ln_vision"] = model.vision.norm(x)
    x = stages["grouped_tokens"] = group(x[:, 1:], config.patches_per_token)
    stages["image_tokens"] = model.projector(x)
    features = stages["image_tokens"].reshape(len(tokens), -1, config.text.embed_dim)
    x = stages["inputs_embeds"] = model.embed(tokens, features)
    angles = rope_angles(count_positions(segment_ids), config.text.head_dim, config.text.rope_theta)
    for i, (block, adapters) in enumerate(zip(layers(model.decoder.blocks), layers(model.lora), strict=True)):
        arguments = {"angles": angles, "segment_ids": segment_ids, "lora": adapters, "implementation": implementation}
        x = stages[f"llm_layer_{i}"] = block(x, **arguments)[0]
    stages["llm_final_norm"], _ = model.hidden(tokens, {"pixels": pixels}, segment_ids=segment_ids)
    stages["logits"] = model.logits(stages["llm_final_norm"])
    return stages


def stage_rows(
    model: MiniGPTv2, pixels: jax.Array, pieces: list[dict], expected: dict[str, np.ndarray], bos_id: int = BOS
) -> list[Row]:
    """Rows for every stage (of the decoder's the real tokens), the mask, the labels and both losses."""
    given = training_rows(model.config, pieces, bos_id)
    rows = [
        exactly("attention_mask", given["segment_ids"], expected["attention_mask"]),
        exactly("labels", given["labels"], expected["labels"]),
    ]
    stages = jax.jit(port_stages)(model, jnp.asarray(given["tokens"]), jnp.asarray(given["segment_ids"]), pixels)
    real = given["segment_ids"] != 0
    for stage in port_order(stages):
        if stage not in expected:
            raise WeightsError(f"expected.npz lacks {stage}")
        keep = real if stage.startswith(("inputs", "llm", "logits")) else ...
        rows.append(compared(stage, np.asarray(stages[stage])[keep], expected[stage][keep]))
    nll, weight = token_losses(stages["logits"], given["labels"])
    rows.append(compared("loss", nll.sum() / weight.sum(), expected["loss"]))
    # The original's mean runs over the whole padded row.
    return [*rows, compared("loss_per_sample", nll.sum(axis=1) / nll.shape[1], expected["loss_per_sample"])]


def port_order(stages: dict) -> list[str]:
    """Names of stages in the order of the computation; `jit` sorts the keys of a dict."""
    first = (
        "vit_patch_embed", "vit_embeddings", "vit_block", "ln_vision", "grouped", "image_tokens", "inputs", "llm_layer",
    )  # fmt: skip

    def rank(name):
        return next((i for i, start in enumerate(first) if name.startswith(start)), len(first))

    def number(name):
        return int(name.rsplit("_", 1)[1]) if name[-1].isdigit() else 0

    return sorted(stages, key=lambda name: (rank(name), number(name), name == "logits"))


def token_losses(logits: jax.Array, labels: np.ndarray) -> tuple[jax.Array, np.ndarray]:
    """(float32[B, T - 1] negative log-likelihoods of the labels one position ahead, which of them are labelled)."""
    weight = labels[:, 1:] != IGNORED_LABEL
    return negative_log_likelihood(logits[:, :-1], jnp.where(weight, labels[:, 1:], 0)) * weight, weight


def gradient_rows(
    config, graphdef, params, pixels, pieces: list[dict], reference: dict[str, np.ndarray], bos_id: int = BOS
) -> list[Row]:
    """A row per tensor: trained ones relative to their gradient's largest value, the norms of others' to themselves."""
    given = training_rows(config, pieces, bos_id)

    @jax.jit
    @jax.grad
    def differentiate(params):
        logits = nnx.merge(graphdef, params)(
            jnp.asarray(given["tokens"]), {"pixels": pixels}, segment_ids=jnp.asarray(given["segment_ids"])
        )
        nll, weight = token_losses(logits, given["labels"])
        return nll.sum() / weight.sum()

    table = minigpt_v2.table(config)
    trained = {name for name, slot in engine.slots(table, params).items() if slot.entry.path[0] in TRAINED}
    _, stream = engine.store(table, jax.tree.map(np.asarray, differentiate(params)))
    ours = {}
    for name, value in stream:
        released = minigpt_v2.released_name(name)
        if name in trained:
            ours[f"grad/{released}"] = value
        else:
            ours[f"norm/{released}"] = np.linalg.norm(value.astype(np.float64).reshape(-1))
    if set(ours) != set(reference):
        raise WeightsError(f"gradients differ in tensors: {sorted(set(ours) ^ set(reference))[:8]}")
    rows = []
    for name, theirs in reference.items():
        scale = max(float(np.abs(theirs).max()), 1e-12)
        rows.append(compared(f"gradient {name}", ours[name] / scale, theirs / scale))
    return rows


def generation_rows(model: MiniGPTv2, pixels, pieces: list[dict], expected: dict[str, np.ndarray]) -> list[Row]:
    """Rows for greedy generation behind left padding; steps after a row's </s> are left out."""
    config = model.config
    given = left_padded(config, pieces)
    rows, length = given["tokens"].shape
    sequences, step_logits = expected["gen_sequences"][:, 1:], expected["gen_step_logits"]
    num_new = step_logits.shape[1]

    @jax.jit
    def prefill(model):
        cache = model.init_cache(rows, length + num_new)
        features = model.encode_images({"pixels": pixels})
        hidden, cache = model.hidden(**given, cache=cache, image_features=features)
        return model.embed(given["tokens"], features), model.logits(hidden[:, -1]), cache

    @jax.jit
    def step(model, last, cache):
        hidden, cache = model.hidden(last[:, None], cache=cache)
        return model.logits(hidden[:, 0]), cache

    embedded, logits, cache = prefill(model)
    logits_by_step = [logits]
    for _ in range(num_new - 1):
        logits, cache = step(model, logits.argmax(axis=-1), cache)
        logits_by_step.append(logits)
    ours = np.stack(logits_by_step, axis=1)
    ended = np.cumsum(sequences == config.eos_token_id, axis=1) - (sequences == config.eos_token_id) > 0
    real = np.asarray(given["segment_ids"]) != 0
    top = np.sort(ours, axis=-1)[..., -2:]
    return [
        exactly("gen_attention_mask", given["segment_ids"], expected["gen_attention_mask"]),
        compared("gen_inputs_embeds", np.asarray(embedded)[real], expected["gen_inputs_embeds"][real]),
        compared("gen_step_logits", ours[~ended], step_logits[~ended]),
        exactly("gen_sequences", ours.argmax(axis=-1)[~ended], sequences[~ended]),
        compared("gen_margin", (top[..., 1] - top[..., 0])[~ended], expected["gen_margin"][~ended]),
    ]


def left_padded(config: MiniGPTv2Config, pieces: list[dict]) -> dict[str, jax.Array]:
    """tokens and segment_ids, int32[B, T] each, of prompts [before][image][after]."""
    image = [config.image_token_id] * config.num_image_tokens
    prompts = [[*piece["before_image"], *image, *piece["after_image"]] for piece in pieces]
    length = max(map(len, prompts))
    tokens = [[config.pad_token_id] * (length - len(ids)) + ids for ids in prompts]
    segments = [[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts]
    return {"tokens": jnp.asarray(tokens, jnp.int32), "segment_ids": jnp.asarray(segments, jnp.int32)}
