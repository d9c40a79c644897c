"""`medcg parity SRC`: the same input through this port and the PyTorch reference, stage by stage.

Compares the outputs of every layer, logits, loss, gradients of every trained tensor and a short AdamW curve, in
float32. With `inputs` it compares with numbers recorded elsewhere, and PyTorch is not needed.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from medcg_jax.mesh import make_mesh
from medcg_jax.models import build
from medcg_jax.models.llava import Llava, LlavaConfig
from medcg_jax.nn.rope import count_positions, rope_angles
from medcg_jax.weights import engine, llava
from medcg_jax.weights.convert import load_checkpoint, read_config
from medcg_jax.weights.files import WeightsError

# Largest difference allowed, as a share of the reference's largest value where that is above 1.
TOLERANCE = 1e-4
NUM_STEPS = 10
# Above so many parameters only the projector is trained: gradients and moments of all would fill a host's memory.
MAX_TRAINED_PARAMS = 500_000_000
PREFIXES = {"projector": ("multi_modal_projector.",), "decoder": ("language_model.", "lm_head.")}


@dataclass(frozen=True)
class Row:
    """One comparison: `difference` is the largest, `scale` the reference's largest value."""

    stage: str
    difference: float
    scale: float
    tolerance: float = TOLERANCE

    @property
    def ok(self) -> bool:
        return self.difference <= self.tolerance * max(1.0, self.scale)


def parity(src: Path, *, inputs: Path | None = None) -> dict:
    """{"ok", "rows", ...}, printed as a table; `exit_status` 1 where a row is out of tolerance.

    src: a released (HF) directory; with `inputs` any checkpoint. inputs: .npz with `input_ids`, `pixel_values`,
      `attention_mask` as HF's forward takes them, and the `logits` it gave; optionally `labels` and `loss`.

    Raises:
      WeightsError: no checkpoint, arrays missing or of shapes that do not fit, or PyTorch is needed and absent.
    """
    # Rolled: compiling 32 layers one by one would take longer than running them.
    config = dataclasses.replace(read_config(src), scan_unroll=1)
    if inputs is not None:
        given = _read_inputs(inputs)
        graphdef, params = _load(src, config)
        rows = recorded_rows(nnx.merge(graphdef, params), given, inputs)
        trained = ()
    else:
        from medcg_jax.scale.parity_torch import open_reference

        reference = open_reference(src)
        graphdef, params = _load(src, config)
        trained = ("projector", "decoder") if build.num_params(params) <= MAX_TRAINED_PARAMS else ("projector",)
        rows = compare(graphdef, params, reference, example(config), trained)
    ok = all(row.ok for row in rows)
    _print(rows, ok)
    return {
        "ok": ok, "src": str(src), "trained": list(trained), "parameters": build.num_params(params),
        "rows": [{**vars(row), "ok": row.ok} for row in rows], "exit_status": 0 if ok else 1,
    }  # fmt: skip


def _load(src: Path, config: LlavaConfig):
    mesh = make_mesh(devices=jax.devices()[:1])
    with jax.default_matmul_precision("highest"):
        return load_checkpoint(src, config, mesh)


def compare(graphdef, params, reference, inputs: dict[str, np.ndarray], trained: tuple[str, ...]) -> list[Row]:
    """Rows for every stage, the loss, the gradients and the curve; `reference` is trained on by the last.

    inputs: HF's forward arguments, `labels` among them.
    """
    prefixes = sum((PREFIXES[name] for name in trained), ())
    rate = 1e-3 if build.num_params(params) <= MAX_TRAINED_PARAMS else 1e-5
    config = nnx.merge(graphdef, params).config
    with jax.default_matmul_precision("highest"):
        rows = stage_rows(nnx.merge(graphdef, params), reference.stages(inputs), inputs)
        differentiate = value_and_grad(graphdef, inputs)
        rows += gradient_rows(config, differentiate, params, reference.gradients(inputs, prefixes), trained)
        theirs = reference.curve(inputs, prefixes, num_steps=NUM_STEPS, learning_rate=rate)
        ours = curve(differentiate, params, trained, num_steps=NUM_STEPS, learning_rate=rate)
    rows += [_row(f"loss before step {i}", a, b) for i, (a, b) in enumerate(zip(ours, theirs, strict=True))]
    return rows


def example(config: LlavaConfig, *, seed: int = 0, num_text: int = 24) -> dict[str, np.ndarray]:
    """Two rows of random input as HF's forward takes it: one image each, the second row padded on the right."""
    rng = np.random.default_rng(seed)
    size, num = config.image_size_px, config.num_image_tokens
    ids = rng.integers(3, min(config.text.vocab_size, config.image_token_id), (2, num_text + num), dtype=np.int64)
    ids[:, 4 : 4 + num] = config.image_token_id
    mask = np.ones_like(ids)
    mask[1, -num_text // 3 :] = 0
    ids[mask == 0] = config.pad_token_id
    labels = np.where(mask == 1, ids, -100)
    labels[:, : 4 + num + num_text // 3] = -100
    pixels = rng.standard_normal((2, 3, size, size), dtype=np.float32)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "labels": labels}


def port_inputs(config: LlavaConfig, inputs: dict[str, np.ndarray]) -> dict:
    """tokens, segment_ids and images of this port, from HF's forward arguments (images one behind the other).

    Raises:
      WeightsError: shapes that do not fit the model, or image tokens that do not fit the images.
    """
    ids, images = np.asarray(inputs["input_ids"]), np.asarray(inputs["pixel_values"], np.float32)
    mask = np.asarray(inputs.get("attention_mask", np.ones_like(ids)))
    size, num = config.image_size_px, config.num_image_tokens
    if ids.ndim != 2 or mask.shape != ids.shape or images.ndim != 4 or images.shape[1:] != (3, size, size):
        raise WeightsError(
            f"input_ids {ids.shape}, attention_mask {mask.shape}, pixel_values {images.shape}: "
            f"[B, T], [B, T], [images, 3, {size}, {size}] is accepted"
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
    found = {"tokens": ids.astype(np.int32), "segment_ids": mask.astype(np.int32), "images": {"pixels": pixels}}
    return jax.tree.map(jnp.asarray, found)


def port_stages(model: Llava, tokens, segment_ids, images) -> dict[str, jax.Array]:
    """Outputs by stage: `vision.*` per image, `projector`, then `embed`, `decoder.*` and `logits` per token.

    Layers run one by one here; `decoder.norm` and `logits` come from the model's own path.
    """
    config, attention = model.config, model.config.attention
    pixels = images["pixels"]
    flat = pixels.reshape(-1, *pixels.shape[2:])
    x = jax.jit(lambda model, flat: model.vision.embed(flat, model.dtype))(model, flat)
    found = {"vision.embed": x}
    step = jax.jit(lambda block, x: block(x, implementation=attention))
    for i, block in enumerate(_layers(model.vision.blocks)):
        x = found[f"vision.layer{i}"] = step(block, x)
    found["projector"] = jax.jit(lambda model, x: model.projector(x[:, 1:]))(model, x)
    features = found["projector"].reshape(pixels.shape[0], -1, config.text.embed_dim)
    x = found["embed"] = jax.jit(lambda model, *given: model.embed(*given))(model, tokens, features)
    angles = rope_angles(count_positions(segment_ids), config.text.head_dim, config.text.rope_theta)
    run = jax.jit(lambda block, x: block(x, angles=angles, segment_ids=segment_ids, implementation=attention)[0])
    for i, block in enumerate(_layers(model.decoder.blocks)):
        x = found[f"decoder.layer{i}"] = run(block, x)

    def whole(model, tokens, images, segment_ids):
        hidden, _ = model.hidden(tokens, images, segment_ids=segment_ids)
        return hidden, model.logits(hidden)

    found["decoder.norm"], found["logits"] = jax.jit(whole)(model, tokens, images, segment_ids)
    return found


def _layers(blocks: nnx.Module):
    graphdef, params = nnx.split(blocks)
    for i in range(jax.tree.leaves(params)[0].shape[0]):
        yield nnx.merge(graphdef, jax.tree.map(lambda w, i=i: w[i], params))


def stage_rows(model: Llava, reference: dict[str, np.ndarray], inputs) -> list[Row]:
    """A row per stage and for the loss; padding is left out."""
    given = port_inputs(model.config, inputs)
    found = port_stages(model, **given)
    real = np.asarray(given["segment_ids"]) != 0
    used = np.arange(given["images"]["pixels"].shape[1]) < _images_per_row(model.config, given["tokens"])[:, None]
    rows = []
    for stage, value in found.items():
        # Our rows without an image carry a zero image; HF has none there.
        keep = used.reshape(-1) if stage.startswith(("vision", "projector")) else real
        theirs = reference[stage] if stage.startswith(("vision", "projector")) else reference[stage][real]
        rows.append(_row(stage, np.asarray(value)[keep], theirs))
    if "loss" in reference:
        rows.append(_row("loss", loss(found["logits"], inputs["labels"]), reference["loss"]))
    return rows


def _images_per_row(config: LlavaConfig, tokens) -> np.ndarray:
    return np.asarray((tokens == config.image_token_id).sum(axis=1)) // config.num_image_tokens


def loss(logits: jax.Array, labels: np.ndarray) -> jax.Array:
    """float32[] mean negative log-likelihood of the labels (-100: none) one position ahead, as HF computes it."""
    labels = jnp.asarray(labels)[:, 1:]
    weight = labels != -100
    nll = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], jnp.where(weight, labels, 0))
    return (nll * weight).sum() / weight.sum()


def value_and_grad(graphdef, inputs: dict[str, np.ndarray]) -> Callable:
    """The jitted function (trainable, frozen) -> (loss, gradient over trainable) on `inputs`."""

    @jax.jit
    @jax.value_and_grad
    def run(trainable, frozen):
        model = nnx.merge(graphdef, build.join(trainable, frozen))
        given = port_inputs(model.config, inputs)
        return loss(model(**given), inputs["labels"])

    return run


def gradient_rows(config: LlavaConfig, differentiate, params, reference: dict[str, np.ndarray], trained) -> list[Row]:
    """A row per tensor of the released checkpoint that is trained, relative to its gradient's largest value."""
    _, grads = differentiate(*build.split_trainable(params, trained))
    table = [entry for entry in llava.table(config) if entry.path[0] in trained]
    _, stream = engine.store(table, grads)
    ours = dict(stream)
    if set(ours) != set(reference):
        raise WeightsError(f"gradients differ in tensors: {sorted(set(ours) ^ set(reference))[:8]}")
    rows = []
    for name, theirs in reference.items():
        # A gradient may be far below 1 everywhere.
        scale = max(float(np.abs(theirs).max()), 1e-12)
        rows.append(_row(f"gradient {name}", ours[name] / scale, theirs / scale))
    return rows


def curve(differentiate, params, trained, *, num_steps: int, learning_rate: float) -> list[float]:
    """Losses before each of `num_steps` AdamW steps of this port (weight decay 0, torch's defaults otherwise)."""
    trainable, frozen = build.split_trainable(params, trained)
    optimizer = optax.adamw(learning_rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0)

    @jax.jit
    def update(trainable, state, grads):
        updates, state = optimizer.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state

    state, losses = optimizer.init(trainable), []
    for _ in range(num_steps):
        value, grads = differentiate(trainable, frozen)
        trainable, state = update(trainable, state, grads)
        losses.append(float(value))
    return losses


def recorded_rows(model: Llava, inputs: dict[str, np.ndarray], source: Path) -> list[Row]:
    """Rows for logits (real tokens only) and, where recorded, the loss."""
    given = port_inputs(model.config, inputs)
    with jax.default_matmul_precision("highest"):
        logits = jax.jit(lambda model, given: model(**given))(model, given)
    if inputs["logits"].shape[:2] != logits.shape[:2] or inputs["logits"].shape[2] > logits.shape[2]:
        raise WeightsError(f"{source}: logits {inputs['logits'].shape} recorded, {logits.shape} computed")
    real = np.asarray(given["segment_ids"]) != 0
    logits = logits[..., : inputs["logits"].shape[2]]
    rows = [_row("logits", np.asarray(logits)[real], inputs["logits"][real])]
    if "labels" in inputs and "loss" in inputs:
        rows.append(_row("loss", loss(logits, inputs["labels"]), inputs["loss"]))
    return rows


def _read_inputs(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except (OSError, ValueError) as error:
        raise WeightsError(f"--inputs={path} is no readable .npz file: {error}") from error
    missing = [name for name in ("input_ids", "pixel_values", "logits") if name not in found]
    if missing:
        held = ", ".join(sorted(found)) or "nothing"
        raise WeightsError(f"--inputs={path} lacks {', '.join(missing)}; it holds {held}")
    return found


def _row(stage: str, ours, theirs) -> Row:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape:
        raise WeightsError(f"{stage}: shape {ours.shape} here, {theirs.shape} in the reference")
    difference = float(np.abs(ours - theirs).max())
    # A NaN on either side is a difference, not a comparison that says nothing.
    return Row(stage, math.inf if math.isnan(difference) else difference, float(np.abs(theirs).max()))


def _print(rows: list[Row], ok: bool) -> None:
    width = max(len(row.stage) for row in rows)
    print(f"{'stage':<{width}}  difference      scale")
    for row in rows:
        print(f"{row.stage:<{width}}  {row.difference:10.2e} {row.scale:10.3g}  {'ok' if row.ok else 'DIFFERS'}")
    worst = max(rows, key=lambda row: row.difference / max(1.0, row.scale))
    print(f"{'equal' if ok else 'NOT equal'} within {TOLERANCE:g}; the largest: {worst.stage}, {worst.difference:.2e}")
