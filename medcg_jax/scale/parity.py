"""`medcg parity SRC`: the same input through this port and the PyTorch reference, stage by stage.

Compares the outputs of every layer, logits, loss, gradients of every trained tensor and a short AdamW curve, in
float32. With `inputs` it compares with numbers recorded elsewhere, and PyTorch is not needed.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from medcg_jax.mesh import make_mesh
from medcg_jax.models import build
from medcg_jax.models.build import Config
from medcg_jax.scale import parity_golden, parity_golden_next, parity_llava, parity_mllama, parity_qwen2_vl
from medcg_jax.scale.parity_rows import Row, compared
from medcg_jax.weights import engine
from medcg_jax.weights.convert import load_checkpoint, read_config
from medcg_jax.weights.families import family_of, module_of
from medcg_jax.weights.files import WeightsError

# Family -> the module with its inputs and stages.
FAMILIES: dict[str, ModuleType] = {"llava": parity_llava, "qwen2_vl": parity_qwen2_vl, "mllama": parity_mllama}
# File that a folder of recorded arrays has -> the function that compares them.
GOLDEN: dict[str, Callable[[Path], list[Row]]] = {
    "expected.npz": parity_golden.golden_rows,
    "expected_base.npz": parity_golden_next.golden_rows,
}
NUM_STEPS = 10
# Above so many parameters only the projector is trained: gradients and moments of all would fill a host's memory.
MAX_TRAINED_PARAMS = 500_000_000


def parity(src: Path, *, inputs: Path | None = None) -> dict:
    """{"ok", "rows", ...}, printed as a table; `exit_status` 1 where a row is out of tolerance.

    src: a released (HF) directory, or a folder of arrays recorded from original code (`GOLDEN`); with `inputs` any
      checkpoint. inputs: .npz with `input_ids`, `pixel_values`,
      `attention_mask` as HF's forward takes them, and the `logits` it gave; optionally `labels` and `loss`.

    Raises:
      WeightsError: no checkpoint, arrays missing or of shapes that do not fit, or PyTorch is needed and absent.
    """
    for name, rows_of in GOLDEN.items():
        if (src / name).is_file():
            rows = rows_of(src)
            return _result(src, rows)
    # Rolled: compiling 32 layers one by one would take longer than running them.
    config = dataclasses.replace(read_config(src), scan_unroll=1)
    if inputs is not None:
        given = _read_inputs(inputs)
        graphdef, params = _load(src, config)
        rows = recorded_rows(nnx.merge(graphdef, params), given, inputs)
        trained = ()
    else:
        from medcg_jax.scale.parity_torch import open_reference

        part = part_of(config)
        reference = open_reference(src, part)
        graphdef, params = _load(src, config)
        trained = ("projector", "decoder") if build.num_params(params) <= MAX_TRAINED_PARAMS else ("projector",)
        rows = compare(graphdef, params, reference, part.example(config), trained)
    return _result(src, rows) | {"trained": list(trained), "parameters": build.num_params(params)}


def _result(src: Path, rows: list[Row]) -> dict:
    ok = all(row.ok for row in rows)
    _print(rows, ok)
    listed = [{**vars(row), "ok": row.ok} for row in rows]
    return {"ok": ok, "src": str(src), "rows": listed, "exit_status": 0 if ok else 1}


def part_of(config: Config) -> ModuleType:
    """The module with the family's inputs and stages."""
    return FAMILIES[family_of(config)]


def _load(src: Path, config: Config):
    mesh = make_mesh(devices=jax.devices()[:1])
    with jax.default_matmul_precision("highest"):
        return load_checkpoint(src, config, mesh)


def compare(graphdef, params, reference, inputs: dict[str, np.ndarray], trained: tuple[str, ...]) -> list[Row]:
    """Rows for every stage, the loss, the gradients and the curve; `reference` is trained on by the last.

    inputs: HF's forward arguments, `labels` among them.
    """
    config = nnx.merge(graphdef, params).config
    prefixes = sum((part_of(config).PREFIXES[name] for name in trained), ())
    rate = 1e-3 if build.num_params(params) <= MAX_TRAINED_PARAMS else 1e-5
    with jax.default_matmul_precision("highest"):
        rows = stage_rows(nnx.merge(graphdef, params), reference.stages(inputs), inputs)
        differentiate = value_and_grad(graphdef, inputs)
        rows += gradient_rows(config, differentiate, params, reference.gradients(inputs, prefixes), trained)
        theirs = reference.curve(inputs, prefixes, num_steps=NUM_STEPS, learning_rate=rate)
        ours = curve(differentiate, params, trained, num_steps=NUM_STEPS, learning_rate=rate)
    rows += [compared(f"loss before step {i}", a, b) for i, (a, b) in enumerate(zip(ours, theirs, strict=True))]
    return rows


def stage_rows(model: nnx.Module, reference: dict[str, np.ndarray], inputs) -> list[Row]:
    """A row per stage and for the loss; padding is left out."""
    part = part_of(model.config)
    given = part.port_inputs(model.config, inputs)
    found = part.port_stages(model, given)
    real = np.asarray(given["segment_ids"]) != 0
    rows = []
    for stage, ours in found.items():
        keep = ... if stage.startswith(("vision", "projector")) else real
        rows.append(compared(stage, ours[keep], reference[stage][keep]))
    if "loss" in reference:
        rows.append(compared("loss", loss(found["logits"], inputs["labels"]), reference["loss"]))
    return rows


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
        given = part_of(model.config).port_inputs(model.config, inputs)
        return loss(model(**given), inputs["labels"])

    return run


def gradient_rows(config: Config, differentiate, params, reference: dict[str, np.ndarray], trained) -> list[Row]:
    """A row per tensor of the released checkpoint that is trained, relative to its gradient's largest value."""
    _, grads = differentiate(*build.split_trainable(params, trained))
    table = [entry for entry in module_of(config).table(config) if entry.path[0] in trained]
    _, stream = engine.store(table, grads)
    ours = dict(stream)
    if set(ours) != set(reference):
        raise WeightsError(f"gradients differ in tensors: {sorted(set(ours) ^ set(reference))[:8]}")
    rows = []
    for name, theirs in reference.items():
        # A gradient may be far below 1 everywhere.
        scale = max(float(np.abs(theirs).max()), 1e-12)
        rows.append(compared(f"gradient {name}", ours[name] / scale, theirs / scale))
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


def recorded_rows(model: nnx.Module, inputs: dict[str, np.ndarray], source: Path) -> list[Row]:
    """Rows for logits (real tokens only) and, where recorded, the loss."""
    given = part_of(model.config).port_inputs(model.config, inputs)
    with jax.default_matmul_precision("highest"):
        logits = jax.jit(lambda model, given: model(**given))(model, given)
    if inputs["logits"].shape[:2] != logits.shape[:2] or inputs["logits"].shape[2] > logits.shape[2]:
        raise WeightsError(f"{source}: logits {inputs['logits'].shape} recorded, {logits.shape} computed")
    real = np.asarray(given["segment_ids"]) != 0
    logits = logits[..., : inputs["logits"].shape[2]]
    rows = [compared("logits", np.asarray(logits)[real], inputs["logits"][real])]
    if "labels" in inputs and "loss" in inputs:
        rows.append(compared("loss", loss(logits, inputs["labels"]), inputs["loss"]))
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


def _print(rows: list[Row], ok: bool) -> None:
    width = max(len(row.stage) for row in rows)
    print(f"{'stage':<{width}}  difference      scale")
    for row in rows:
        print(f"{row.stage:<{width}}  {row.difference:10.2e} {row.scale:10.3g}  {'ok' if row.ok else 'DIFFERS'}")
    worst = max(rows, key=lambda row: row.difference / max(1.0, row.scale))
    print(f"{'equal' if ok else 'NOT equal'} within {max(row.tolerance for row in rows):g}; the largest: {worst.stage}, {worst.difference:.2e}")
