"""NExT-Chat against arrays recorded from the original code: every stage, loss, gradient, mask and generated token.

The folder is that of `parity_golden_next_data`. What is not compared: `rec/input_ids`, which is an input, and
`beam5/*`, a beam search, which this port has not.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from medcg_jax.families.weights.files import WeightsError, read_json
from medcg_jax.nn.attention import take_positions
from medcg_jax.nn.rope import count_positions, rope_angles
from medcg_jax.parity.golden_next_data import TOLERANCE, batch_of, golden_row, load, mask_batch
from medcg_jax.parity.golden_next_losses import LONG_SUM_TOLERANCE, base_loss_rows, mask_loss_rows
from medcg_jax.parity.rows import Row, check_arrays, layers, read_arrays
from medcg_jax.train import losses

# Of `full_masks_sampled`: the rows and columns of the whole mask that are recorded.
SAMPLED = slice(5, None, 37), slice(3, None, 41)
# What there is one of for every `<at>` of an answer.
AT = ("hidden_at", "pred_boxes", "cycle1_encoded", "at_positions", "pred_valid")
NOT_COMPARED = ("rec/input_ids", "beam5/sequences", "beam5/pred_boxes")


def golden_rows(folder: Path) -> list[Row]:
    """A row per recorded array, or per loss and gradient, with this port's numbers beside it."""
    steps = read_arrays(folder / "expected_generate.npz")["step_logits"].shape[1]
    # Room for a box at every step.
    _, graphdef, params = load(folder, change=lambda config: dataclasses.replace(config, max_boxes=steps))
    with jax.default_matmul_precision("highest"):
        rows = [
            *base_rows(folder, nnx.merge(graphdef, params)),
            *base_loss_rows(folder, graphdef, params),
            *mask_rows(folder, nnx.merge(graphdef, params)),
            *mask_loss_rows(folder, graphdef, params),
            *generation_rows(folder, nnx.merge(graphdef, params)),
        ]
    found = {row.stage for row in rows}
    for part, prefix in (("base", ""), ("mask", "mask/"), ("generate", "generate/")):
        path = folder / f"expected_{part}.npz"
        held = {prefix + name for name in read_arrays(path) if name not in NOT_COMPARED}
        others = ("mask/", "generate/") if not prefix else ()
        check_arrays(path, held, {s for s in found if _is_array(s, prefix) and not s.startswith(others)})
    return rows


def _is_array(stage: str, prefix: str) -> bool:
    """Whether a row is of an array of the file whose rows begin with `prefix`, and not of a gradient."""
    parts = stage.removeprefix(prefix).split("/")
    gradient = {"original", "fixed", "clean", "original_norm", "fixed_norm", "clean_norm"} & set(parts[:2])
    return stage.startswith(prefix) and (not gradient or parts[0] == "loss")


def base_rows(folder: Path, model) -> list[Row]:
    """Every stage on three rows and a mock one, and the boxes of the evaluation by a fixed answer."""
    config, inputs, expected = (
        model.config,
        read_arrays(folder / "inputs.npz"),
        read_arrays(folder / "expected_base.npz"),
    )
    batch = batch_of(config, inputs, "", "mock_valid_")
    found = {f"mock_valid/{name}": value for name, value in _base_stages(model, batch).items()}
    invalid = batch_of(config, inputs, "", "mock_invalid_")
    # Of the other mock row only what the losses of boxes need is recorded.
    whole = _whole(model, invalid)
    found |= {f"mock_invalid/{name}": whole[name] for name in ("logits", *AT[:2], *AT[3:])}
    ids = jnp.asarray(expected["rec/input_ids"], jnp.int32)
    at = jnp.flatnonzero(ids[0] == config.at_token_id)[None]
    run = jax.jit(lambda model, ids, pixels, at: model.boxes_at(model.hidden(ids, {"pixels": pixels})[0], at))
    found["rec/pred_boxes"] = run(model, ids, batch["pixels"][:1], at)[0]
    # Rows behind padding hold nothing meaningful.
    real = np.asarray(batch["segment_ids"]) != 0
    per_token = [name for name in found if "llm_" in name or name.endswith("logits")]
    _all_there("expected_base.npz", expected, found)
    return [
        golden_row(name, np.asarray(ours)[real], expected[name][real])
        if name in per_token
        else golden_row(name, ours, expected[name])
        for name, ours in found.items()
    ]


def _all_there(file: str, expected, found) -> None:
    missing = [name for name in found if name not in expected]
    if missing:
        raise WeightsError(f"{file} lacks {', '.join(missing[:8])}")


def _base_stages(model, batch) -> dict[str, jax.Array]:
    """Stages by the recorded names: layers one by one, then what the model's own path gives."""
    config, attention = model.config, model.config.attention
    pixels, tokens, segment_ids = batch["pixels"][:, 0], batch["tokens"], batch["segment_ids"]
    x = jax.jit(lambda model: model.vision.embed(pixels, model.dtype))(model)
    found = {"clip_hidden_0": x}
    step = jax.jit(lambda block, x: block(x, implementation=attention))
    rest = [] if model.unused.blocks is None else layers(model.unused.blocks)
    for i, block in enumerate([*layers(model.vision.blocks), *rest]):
        x = found[f"clip_hidden_{i + 1}"] = step(block, x)
    features = found["image_features"] = found[f"clip_hidden_{config.vision.num_run_layers}"][:, 1:]
    found["projected_tokens"] = jax.jit(lambda model: model.projector(features))(model)
    embed = jax.jit(lambda model, features: model.embed(tokens, features, batch["boxes"]))
    x = found["inputs_embeds"] = embed(model, found["projected_tokens"])
    angles = rope_angles(count_positions(segment_ids), config.text.head_dim, config.text.rope_theta)
    run = jax.jit(lambda block, x: block(x, angles=angles, segment_ids=segment_ids, implementation=attention)[0])
    for i, block in enumerate(layers(model.decoder.blocks)):
        x = found[f"llm_layer_{i}"] = run(block, x)
    return found | _whole(model, batch)


def _whole(model, batch) -> dict[str, jax.Array]:
    found = _whole_program(model, batch)
    keep, given = np.asarray(batch["at_weights"]) > 0, np.asarray(batch["box_weights"]) > 0
    flat = np.arange(batch["tokens"].shape[0])[:, None] * batch["tokens"].shape[1] + batch["at_positions"]
    boxes = found["pred_boxes"]
    found |= {"at_positions": flat, "pred_valid": (boxes[..., 2:] >= boxes[..., :2]).all(axis=-1)}
    found |= {name: np.asarray(found[name])[keep] for name in AT}
    found |= {name: np.asarray(found[name])[given] for name in ("loc_embeds", "cycle2_boxes")}
    # In the order of the computation; `jit` sorts a dict's keys.
    return {name: found[name] for name in ("loc_embeds", "llm_final_norm", "logits", *AT, "cycle2_boxes")}


@jax.jit
def _whole_program(model, batch) -> dict[str, jax.Array]:
    hidden, _ = model.hidden(
        batch["tokens"], {"pixels": batch["pixels"]}, segment_ids=batch["segment_ids"], boxes=batch["boxes"]
    )
    at, embeds = take_positions(hidden, batch["at_positions"]), model.boxes.encode(batch["boxes"])
    boxes = model.boxes.decode(at)
    return {
        "llm_final_norm": hidden, "logits": model.logits(hidden), "hidden_at": at, "pred_boxes": boxes,
        "cycle1_encoded": model.boxes.encode(boxes), "loc_embeds": embeds, "cycle2_boxes": model.boxes.decode(embeds),
    }  # fmt: skip


def mask_rows(folder: Path, model) -> list[Row]:
    """Stages of the masks, one to a row: text and boxes, SAM's encoder layer by layer, prompts, masks."""
    inputs, expected = read_arrays(folder / "inputs.npz"), read_arrays(folder / "expected_mask.npz")
    batch = mask_batch(model.config, inputs)
    whole, encoder = _whole(model, batch), model.sam_encoder
    found = {name: whole[name] for name in ("logits", "hidden_at", "pred_boxes")}
    pixels = batch["sam_pixels"][:, 0]
    found["sam_patch_embed"] = jax.jit(lambda encoder: encoder.patch(pixels))(encoder)
    x = jax.jit(lambda encoder: encoder.embed(pixels, None, model.dtype))(encoder)
    step = jax.jit(lambda block, x: block(x))
    blocks = [block for stack, start, stop in encoder.runs() for block in list(layers(stack))[start:stop]]
    for i, block in enumerate(blocks):
        x = found[f"sam_block_{i}"] = step(block, x)
    embedding = _sam_features(model, batch["sam_pixels"])
    found["sam_image_embedding"] = embedding.transpose(0, 3, 1, 2)
    at = jnp.asarray(found["hidden_at"])[:, None]
    masks, iou = jax.jit(lambda model: model.masks(at, embedding))(model)
    full = np.asarray(jax.image.resize(masks, (*masks.shape[:2], *pixels.shape[1:3]), "bilinear"))
    found |= {
        "seg_prompt": jax.jit(lambda model: model.mask_prompt(at[:, 0]))(model),
        "box_embeddings": model.sam_prompt.corners(jnp.asarray(found["pred_boxes"])),
        "dense_embeddings": np.tile(model.sam_prompt.no_mask[...][:, None, None], (len(at), 1, 1, 1)),
        "low_res_masks": masks,
        "iou_predictions": iou,
        "full_masks_sampled": full[:, :, *SAMPLED],
        "full_masks_mean": full.mean(axis=(1, 2, 3)),
        "full_masks_norm": np.sqrt(np.square(full, dtype=np.float64).sum(axis=(1, 2, 3))),
        "fraction_at_or_above_threshold": (full >= losses.MASK_LOGIT).mean(axis=(1, 2, 3)),
    }
    _all_there("expected_mask.npz", expected, found)
    # Of the model's own stages not all are recorded for these rows.
    rows = [
        golden_row(f"mask/{name}", ours, expected[name], LONG_SUM_TOLERANCE if name == "full_masks_norm" else TOLERANCE)
        for name, ours in found.items()
    ]
    near = "num_logits_within_0.01_of_threshold"
    # As a share of the pixels: rounding carries some over the border.
    ours = (np.abs(full - losses.MASK_LOGIT) < 0.01).mean(axis=(1, 2, 3))
    rows.append(golden_row(f"mask/{near}", ours, expected[near] / full[0].size))
    iou = losses.mask_iou(jnp.asarray(full[:, 0]), batch["at_masks"][:, 0].astype(jnp.float32))
    return [
        *rows,
        golden_row("mask/loss/num_masks", len(at), expected["loss/num_masks"]),
        golden_row("mask/loss/mask_iou", iou, expected["loss/mask_iou"]),
    ]


@jax.jit
def _sam_features(model, pixels) -> jax.Array:
    return model.encode_sam_images({"sam_pixels": pixels})


def generation_rows(folder: Path, model) -> list[Row]:
    """Greedy decoding into a cache, with `<boxes>` forced behind `<at>`: logits, tokens, boxes and masks."""
    config, inputs, expected = (
        model.config,
        read_arrays(folder / "inputs.npz"),
        read_arrays(folder / "expected_generate.npz"),
    )
    prompt = jnp.asarray(inputs["gen_input_ids"], jnp.int32)
    num = expected["step_logits"].shape[1]

    @jax.jit
    def step(model, tokens, images, boxes, cache):
        hidden, cache = model.hidden(tokens, images, boxes=boxes, cache=cache)
        return model.logits(hidden[:, -1]), cache

    pixels = jnp.asarray(inputs["gen_images"].transpose(0, 2, 3, 1)[:, None])
    cache = model.init_cache(1, prompt.shape[1] + num)
    given = jnp.asarray(inputs["gen_loc_inputs"])[None]
    out, cache = step(model, prompt, {"pixels": pixels}, given, cache)
    logits, sequence = [out], [read_json(folder / "config.json").get("bos_token_id", 1)]
    for _ in range(num):
        last = config.force_next.get(sequence[-1], int(out.argmax()))
        sequence.append(last)
        if len(logits) < num:
            out, cache = step(model, jnp.full((1, 1), last, jnp.int32), None, None, cache)
            logits.append(out)
    boxes, there = model.generated_boxes(cache)
    count = int(there.sum())
    if not count:
        raise WeightsError(f"{folder}: no box is generated; what was recorded has {len(expected['pred_boxes'])}")
    # Of the first image; both, so that the program is the one that is there.
    features = _sam_features(model, mask_batch(config, inputs)["sam_pixels"])[:1]
    masks, iou = jax.jit(lambda model: model.masks(cache["at_hidden"][:, :count], features))(model)
    top = np.sort(np.stack(logits, axis=1), axis=-1)[..., -2:]
    found = {
        "margin": top[..., 1] - top[..., 0], "sequences": jnp.asarray([sequence]),
        "step_logits": jnp.stack(logits, axis=1), "pred_boxes": boxes[0, :count],
        "low_res_masks": masks[0][:, None], "iou_predictions": iou[0][:, None],
    }  # fmt: skip
    _all_there("expected_generate.npz", expected, found)
    return [golden_row(f"generate/{name}", ours, expected[name]) for name, ours in found.items()]
