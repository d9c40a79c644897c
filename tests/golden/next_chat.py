"""NExT-Chat against arrays recorded from the original code: every stage, loss, gradient, mask and generated token.

The folder holds `weights.safetensors`, `config.json`, `inputs.npz`, `expected_{base,mask,generate}.npz` and
`grads_{base,mask}.npz` of a tiny random model of any size. Not compared: `rec/input_ids`, an input, and `beam5/*`, since
this port has no beam search.
"""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from medcg_jax.families import build
from medcg_jax.families.clip import ClipVisionConfig
from medcg_jax.families.decoder import DecoderConfig
from medcg_jax.families.next_chat.model import NextChatConfig
from medcg_jax.families.next_chat.sam import SamConfig
from medcg_jax.families.weights import engine, next_chat
from medcg_jax.families.weights.fields import expect, refused
from medcg_jax.families.weights.files import WeightsError, open_safetensors, read_json
from medcg_jax.mesh import make_mesh
from medcg_jax.nn.attention import take_positions
from medcg_jax.nn.rope import count_positions, rope_angles
from medcg_jax.parity.rows import Row, check_arrays, compared, layers, read_arrays
from medcg_jax.train import losses

# Above the rounding between two machines, below what any usual mistake changes.
TOLERANCE = 2e-5
# Of the masks' gradients, sums over a million pixels, and of norms that the original summed up in float32.
LONG_SUM_TOLERANCE = 1e-4
IGNORED = -100
STAGES = {"base": ("projector", "decoder", "boxes"), "mask": ("mask_prompt", "mask_decoder")}
Arrays = dict[str, np.ndarray]
# Of `full_masks_sampled`: the rows and columns of the whole mask that are recorded.
SAMPLED = slice(5, None, 37), slice(3, None, 41)
# Arrays with one item for every `<at>` of an answer.
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
    stages = {row.stage for row in rows}
    for file, prefix in (("base", ""), ("mask", "mask/"), ("generate", "generate/")):
        path = folder / f"expected_{file}.npz"
        held = {prefix + name for name in read_arrays(path) if name not in NOT_COMPARED}
        others = ("mask/", "generate/") if not prefix else ()
        check_arrays(path, held, {s for s in stages if _is_array(s, prefix) and not s.startswith(others)})
    return rows


def _is_array(stage: str, prefix: str) -> bool:
    """Whether a row is of an array of the file whose rows begin with `prefix`, and not of a gradient."""
    parts = stage.removeprefix(prefix).split("/")
    gradient = {"original", "fixed", "clean", "original_norm", "fixed_norm", "clean_norm"} & set(parts[:2])
    return stage.startswith(prefix) and (not gradient or parts[0] == "loss")


def base_rows(folder: Path, model) -> list[Row]:
    """Every stage on three rows and a mock one, and the boxes of the evaluation by a fixed answer."""
    config, inputs = model.config, read_arrays(folder / "inputs.npz")
    expected = read_arrays(folder / "expected_base.npz")
    batch = batch_of(config, inputs, "", "mock_valid_")
    stages = {f"mock_valid/{name}": value for name, value in _base_stages(model, batch).items()}
    invalid = batch_of(config, inputs, "", "mock_invalid_")
    # Of the other mock row only the arrays that the box losses need are recorded.
    whole = _whole(model, invalid)
    stages |= {f"mock_invalid/{name}": whole[name] for name in ("logits", *AT[:2], *AT[3:])}
    ids = jnp.asarray(expected["rec/input_ids"], jnp.int32)
    at = jnp.flatnonzero(ids[0] == config.at_token_id)[None]
    run = jax.jit(lambda model, ids, pixels, at: model.boxes_at(model.hidden(ids, {"pixels": pixels})[0], at))
    stages["rec/pred_boxes"] = run(model, ids, batch["pixels"][:1], at)[0]
    # Rows behind padding hold nothing meaningful.
    real = np.asarray(batch["segment_ids"]) != 0
    per_token = [name for name in stages if "llm_" in name or name.endswith("logits")]
    _check_names("expected_base.npz", expected, stages)
    return [
        golden_row(name, np.asarray(ours)[real], expected[name][real])
        if name in per_token
        else golden_row(name, ours, expected[name])
        for name, ours in stages.items()
    ]


def _check_names(file: str, expected, stages) -> None:
    missing = [name for name in stages if name not in expected]
    if missing:
        raise WeightsError(f"{file} lacks {', '.join(missing[:8])}")


def _base_stages(model, batch) -> dict[str, jax.Array]:
    """Stages by the recorded names: layers one by one, then what the model's own path gives."""
    config, attention = model.config, model.config.attention
    pixels, tokens, segment_ids = batch["pixels"][:, 0], batch["tokens"], batch["segment_ids"]
    x = jax.jit(lambda model: model.vision.embed(pixels, model.dtype))(model)
    stages = {"clip_hidden_0": x}
    step = jax.jit(lambda block, x: block(x, implementation=attention))
    unused_layers = [] if model.unused.blocks is None else layers(model.unused.blocks)
    for i, block in enumerate([*layers(model.vision.blocks), *unused_layers]):
        x = stages[f"clip_hidden_{i + 1}"] = step(block, x)
    features = stages["image_features"] = stages[f"clip_hidden_{config.vision.num_run_layers}"][:, 1:]
    stages["projected_tokens"] = jax.jit(lambda model: model.projector(features))(model)
    embed = jax.jit(lambda model, features: model.embed(tokens, features, batch["boxes"]))
    x = stages["inputs_embeds"] = embed(model, stages["projected_tokens"])
    angles = rope_angles(count_positions(segment_ids), config.text.head_dim, config.text.rope_theta)
    run = jax.jit(lambda block, x: block(x, angles=angles, segment_ids=segment_ids, implementation=attention)[0])
    for i, block in enumerate(layers(model.decoder.blocks)):
        x = stages[f"llm_layer_{i}"] = run(block, x)
    return stages | _whole(model, batch)


def _whole(model, batch) -> dict[str, jax.Array]:
    outputs = _whole_program(model, batch)
    keep, given = np.asarray(batch["at_weights"]) > 0, np.asarray(batch["box_weights"]) > 0
    flat = np.arange(batch["tokens"].shape[0])[:, None] * batch["tokens"].shape[1] + batch["at_positions"]
    boxes = outputs["pred_boxes"]
    outputs |= {"at_positions": flat, "pred_valid": (boxes[..., 2:] >= boxes[..., :2]).all(axis=-1)}
    outputs |= {name: np.asarray(outputs[name])[keep] for name in AT}
    outputs |= {name: np.asarray(outputs[name])[given] for name in ("loc_embeds", "cycle2_boxes")}
    # In the order of the computation; `jit` sorts a dict's keys.
    return {name: outputs[name] for name in ("loc_embeds", "llm_final_norm", "logits", *AT, "cycle2_boxes")}


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
    stages = {name: whole[name] for name in ("logits", "hidden_at", "pred_boxes")}
    pixels = batch["sam_pixels"][:, 0]
    stages["sam_patch_embed"] = jax.jit(lambda encoder: encoder.patch(pixels))(encoder)
    x = jax.jit(lambda encoder: encoder.embed(pixels, None, model.dtype))(encoder)
    step = jax.jit(lambda block, x: block(x))
    blocks = [block for stack, start, stop in encoder.runs() for block in list(layers(stack))[start:stop]]
    for i, block in enumerate(blocks):
        x = stages[f"sam_block_{i}"] = step(block, x)
    embedding = _sam_features(model, batch["sam_pixels"])
    stages["sam_image_embedding"] = embedding.transpose(0, 3, 1, 2)
    at = jnp.asarray(stages["hidden_at"])[:, None]
    masks, iou = jax.jit(lambda model: model.masks(at, embedding))(model)
    full = np.asarray(jax.image.resize(masks, (*masks.shape[:2], *pixels.shape[1:3]), "bilinear"))
    stages |= {
        "seg_prompt": jax.jit(lambda model: model.mask_prompt(at[:, 0]))(model),
        "box_embeddings": model.sam_prompt.corners(jnp.asarray(stages["pred_boxes"])),
        "dense_embeddings": np.tile(model.sam_prompt.no_mask[...][:, None, None], (len(at), 1, 1, 1)),
        "low_res_masks": masks,
        "iou_predictions": iou,
        "full_masks_sampled": full[:, :, *SAMPLED],
        "full_masks_mean": full.mean(axis=(1, 2, 3)),
        "full_masks_norm": np.sqrt(np.square(full, dtype=np.float64).sum(axis=(1, 2, 3))),
        "fraction_at_or_above_threshold": (full >= losses.MASK_LOGIT).mean(axis=(1, 2, 3)),
    }
    _check_names("expected_mask.npz", expected, stages)
    rows = [
        golden_row(f"mask/{name}", ours, expected[name], LONG_SUM_TOLERANCE if name == "full_masks_norm" else TOLERANCE)
        for name, ours in stages.items()
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
    config, inputs = model.config, read_arrays(folder / "inputs.npz")
    expected = read_arrays(folder / "expected_generate.npz")
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
    # Both images are encoded, to use the compiled program again; the first is needed.
    features = _sam_features(model, mask_batch(config, inputs)["sam_pixels"])[:1]
    masks, iou = jax.jit(lambda model: model.masks(cache["at_hidden"][:, :count], features))(model)
    top = np.sort(np.stack(logits, axis=1), axis=-1)[..., -2:]
    outputs = {
        "margin": top[..., 1] - top[..., 0], "sequences": jnp.asarray([sequence]),
        "step_logits": jnp.stack(logits, axis=1), "pred_boxes": boxes[0, :count],
        "low_res_masks": masks[0][:, None], "iou_predictions": iou[0][:, None],
    }  # fmt: skip
    _check_names("expected_generate.npz", expected, outputs)
    return [golden_row(f"generate/{name}", ours, expected[name]) for name, ours in outputs.items()]


# ------------------------------------------------------------------ losses and gradients


def base_loss_rows(folder: Path, graphdef, params) -> list[Row]:
    """Losses and gradients: the original's with either mock row, and those of the real rows alone, term by term."""
    inputs, expected = read_arrays(folder / "inputs.npz"), read_arrays(folder / "expected_base.npz")
    grads, names = read_arrays(folder / "grads_base.npz"), list(losses.TERMS)
    weights = jnp.asarray(list(losses.TERMS.values()))
    config = nnx.merge(graphdef, params).config
    trainable, frozen = build.split_trainable(params, STAGES["base"])

    def terms(trainable, batch, quirks: bool):
        model = nnx.merge(graphdef, build.join(trainable, frozen))
        values = losses.box_terms(model, batch, original_loss_quirks=quirks)
        return jnp.stack([values[name] for name in names])

    def total(trainable, batch):
        values = terms(trainable, batch, True)
        return weights @ values, values

    rows = []
    original = jax.jit(jax.value_and_grad(total, has_aux=True))
    for mock in ("mock_valid", "mock_invalid"):
        (value, values), gradient = original(trainable, batch_of(config, inputs, "", f"{mock}_"))
        rows += _loss_rows(f"{mock}/loss_original/", expected, dict(zip(names, values, strict=True)), value)
        rows += _gradient_rows(f"{mock}/original/", grads, _by_name(config, gradient))
    values, gradients = jax.jit(partial(_jacobian, partial(terms, batch=batch_of(config, inputs, ""), quirks=False)))(
        trainable
    )
    for mock in ("mock_valid", "mock_invalid"):
        rows += _loss_rows(f"{mock}/loss_clean/", expected, dict(zip(names, values, strict=True)), weights @ values)
    whole = jax.tree.map(lambda g: jnp.tensordot(weights, g, 1), gradients)
    rows += _gradient_rows("clean/", grads, _by_name(config, whole))
    for i, name in enumerate(names):
        named = _by_name(config, jax.tree.map(lambda g, i=i: g[i], gradients))
        rows += _norm_rows(f"clean_norm/{name}/", grads, named)
    return rows


def _jacobian(function, params):
    """(function(params): float[K], its gradients with a leading axis K)."""
    values, pull = jax.vjp(function, params)
    return values, jax.vmap(lambda unit: pull(unit)[0])(jnp.eye(len(values)))


def _loss_rows(prefix: str, expected: Arrays, terms: dict, total) -> list[Row]:
    return [
        golden_row(prefix + name, value, expected[prefix + name]) for name, value in {**terms, "total": total}.items()
    ]


def mask_loss_rows(folder: Path, graphdef, params) -> list[Row]:
    """Terms, totals and gradients of the loss of stage 3, as the original computes it and as it is meant."""
    inputs, expected = read_arrays(folder / "inputs.npz"), read_arrays(folder / "expected_mask.npz")
    grads, config = read_arrays(folder / "grads_mask.npz"), nnx.merge(graphdef, params).config
    batch = mask_batch(config, inputs)
    rows = []
    trained, _ = build.split_trainable(params, STAGES["mask"])
    # CLIP has no gradient in the original.
    others = tuple(name for name in params if name not in ("vision", "unused"))
    trainable, frozen = build.split_trainable(params, others)

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def loss(trainable, quirks):
        model = nnx.merge(graphdef, build.join(trainable, frozen))
        terms = losses.mask_terms(model, batch, original_loss_quirks=quirks)
        return losses.mask_total(*terms), terms

    for kind in ("original", "fixed"):
        (total, (focal, dice, iou, weights)), gradients = loss(trainable, kind == "original")
        values = {"focal": focal[:, 0], "dice": dice[:, 0], "total": total}
        rows += [
            golden_row(f"mask/loss/{kind}/{name}", x, expected[f"loss/{kind}/{name}"]) for name, x in values.items()
        ]
        named = _by_name(config, gradients)
        # The original's positional encoding is a buffer without a gradient; here its gradient must be 0.
        named = {name: g for name, g in named.items() if "positional_encoding" not in name or np.any(g)}
        ours = set(_by_name(config, trained))
        rows += _gradient_rows(f"{kind}/", grads, {name: g for name, g in named.items() if name in ours}, "mask/")
        rows += _norm_rows(f"{kind}_norm/", grads, {name: g for name, g in named.items() if name not in ours}, "mask/")
    rows.append(golden_row("mask/loss/iou", iou[:, 0] / weights.sum(), expected["loss/iou"]))
    return rows


def _by_name(config: NextChatConfig, state) -> Arrays:
    """The arrays of some of the submodules by the original's names and in its layout."""
    table = [entry for entry in next_chat.table(config) if entry.path[0] in state]
    return {next_chat.released_name(name): array for name, array in engine.store(table, state)[1]}


def _gradient_rows(prefix: str, recorded: Arrays, ours: Arrays, shown: str = "") -> list[Row]:
    """A row per tensor, relative to its largest recorded number: gradients may be far below 1 everywhere."""
    theirs = {name.removeprefix(prefix): value for name, value in recorded.items() if name.startswith(prefix)}
    if set(theirs) != set(ours):
        raise WeightsError(f"{prefix}: tensors differ: {sorted(set(theirs) ^ set(ours))[:8]}")
    largest = {name: max(float(np.abs(value).max()), 1e-12) for name, value in theirs.items()}
    rows = []
    for name, value in theirs.items():
        # All keys moved alike change no attention: what is recorded for their bias is rounding of its weight's.
        scale = largest[name.replace("k_proj.bias", "k_proj.weight")]
        tolerance = LONG_SUM_TOLERANCE if shown else TOLERANCE
        rows.append(golden_row(shown + prefix + name, ours[name] / scale, value / scale, tolerance))
    return rows


def _norm_rows(prefix: str, recorded: Arrays, ours: Arrays, shown: str = "") -> list[Row]:
    norms = {name: np.linalg.norm(np.asarray(value, np.float64)) for name, value in ours.items()}
    return _gradient_rows(prefix, recorded, norms, shown)


# ------------------------------------------------------------------ the model, and batches of its inputs


def load(folder: Path, *, change=None):
    """(config, graphdef, params) of a folder on one device; `change` alters the config first."""
    config = read_config(folder) if change is None else change(read_config(folder))
    graphdef, abstract = build.abstract(config)
    tensors = open_safetensors(folder / "weights.safetensors")
    names = engine.canonical_names(tensors.shapes, next_chat.canonical, str(folder))
    places = build.shardings(config, make_mesh(devices=jax.devices()[:1]))
    return config, graphdef, engine.load(next_chat.table(config), abstract, places, tensors, names, str(folder))


def read_config(folder: Path) -> NextChatConfig:
    """The architecture that a folder's config.json states (its own form, not a release's).

    Raises:
      WeightsError: a size is missing, or it differs from what this port computes.
    """
    fields = read_json(folder / "config.json")
    expect(fields, "", attention_downsample_rate=2, mm_projector_depth=2, tie_word_embeddings=False)
    # The norms of SAM's neck and upscaler, which have one epsilon with the encoder's blocks.
    expect(fields, "", sam_layer_norm_2d_eps=1e-6, sam_encoder_layer_norm_eps=1e-6)
    try:
        return _config(fields)
    except KeyError as error:
        raise WeightsError(f"{folder / 'config.json'} lacks {error}") from error
    except ValueError as error:
        raise refused(error, "") from error


def _config(fields: dict) -> NextChatConfig:
    clip, sam, width = fields["clip"], fields["sam"], fields["hidden_size"]
    heads = fields["num_attention_heads"]
    return NextChatConfig(
        vision=ClipVisionConfig(
            clip["image_size"], clip["patch_size"], clip["num_hidden_layers"], fields["mm_vision_select_layer"],
            clip["hidden_size"], clip["num_attention_heads"], clip["intermediate_size"], fields["clip_layer_norm_eps"],
            activation=fields["clip_hidden_act"],
        ),
        text=DecoderConfig(
            fields["vocab_size"], fields["num_hidden_layers"], width, heads, heads, width // heads,
            fields["intermediate_size"], fields["rope_theta"], fields["rms_norm_eps"], fields["max_position_embeddings"],
        ),
        sam=SamConfig(
            fields["sam_image_size"], sam["patch_size"], sam["depth"], sam["embed_dim"], sam["num_heads"],
            sam["embed_dim"] * sam["mlp_ratio"], sam["window_size"], tuple(sam["global_attn_indexes"]),
            fields["sam_encoder_layer_norm_eps"], sam["prompt_dim"], sam["mask_in_chans"], sam["decoder_depth"],
            sam["decoder_heads"], sam["decoder_mlp_dim"], fields["sam_decoder_layer_norm_eps"],
            fields["num_multimask_outputs"] + 1, sam["iou_head_hidden_dim"], sam["iou_head_depth"],
        ),
        num_mask_prompts=fields["prompt_tokens"],
        image_token_id=fields["im_patch_token"],
        at_token_id=fields["at_token"],
        box_token_id=fields["box_token"],
        pad_token_id=fields["pad_token_id"],
        eos_token_id=fields["eos_token_id"],
        scan_unroll=1,
    )  # fmt: skip


def batch_of(config: NextChatConfig, inputs: Arrays, *prefixes: str) -> dict[str, jax.Array]:
    """A batch of this port from the arrays `{prefix}input_ids`, ... of the original's calls, rows one behind the other.

    Boxes come in one list for all rows there; here each row has its own, in reading order.
    """

    def joined(name: str) -> np.ndarray:
        return np.concatenate([inputs[prefix + name] for prefix in prefixes])

    ids, labels = joined("input_ids"), joined("labels")
    answered = [np.flatnonzero(row) for row in (ids == config.at_token_id) & (labels > 0)]
    ahead = np.where(labels == config.box_token_id, IGNORED, labels)[:, 1:]
    supervised = [np.flatnonzero(row != IGNORED) for row in ahead]
    given, target = iter(joined("loc_inputs")), iter(joined("loc_targets"))
    boxes = [[next(given) for _ in range(num)] for num in (ids == config.box_token_id).sum(axis=1)]
    at_boxes = [[next(target) for _ in row] for row in answered]
    batch = {
        "tokens": ids.astype(np.int32),
        "segment_ids": joined("attention_mask").astype(np.int32),
        "pixels": joined("images").transpose(0, 2, 3, 1)[:, None],
        "target_positions": _packed(supervised, np.int32),
        "targets": _packed([row[at] for row, at in zip(ahead, supervised, strict=True)], np.int32),
        "target_weights": _packed([np.ones(len(row)) for row in supervised], np.float32),
        "boxes": _packed(boxes, np.float32, 4),
        "box_weights": _packed([np.ones(len(row)) for row in boxes], np.float32),
        "at_positions": _packed(answered, np.int32),
        "at_boxes": _packed(at_boxes, np.float32, 4),
        "at_weights": _packed([np.ones(len(row)) for row in answered], np.float32),
    }
    return jax.tree.map(jnp.asarray, batch)


def _packed(rows: list, dtype, *inner: int) -> np.ndarray:
    """[B, most, *inner] of rows of different lengths, zeros behind them."""
    out = np.zeros((len(rows), max(map(len, rows)), *inner), dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = np.reshape(row, (len(row), *inner))
    return out


def mask_batch(config: NextChatConfig, inputs: Arrays) -> dict[str, jax.Array]:
    size = config.sam.image_size_px
    tile = inputs["sam_image_tile"]
    times = -(-size // tile.shape[2])
    pixels = np.tile(tile, (1, 1, times, times))[:, :, :size, :size].transpose(0, 2, 3, 1)[:, None]
    masks = np.unpackbits(inputs["seg_masks_packed"], axis=1).reshape(-1, 1, size, size)
    sam_arrays = {"sam_pixels": jnp.asarray(pixels), "at_masks": jnp.asarray(masks, bool)}
    return batch_of(config, inputs, "seg_") | sam_arrays


def golden_row(stage: str, ours, theirs, tolerance: float = TOLERANCE) -> Row:
    return dataclasses.replace(compared(stage, ours, theirs, floor=1.0), tolerance=tolerance)
