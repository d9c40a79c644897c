"""`medcg parity SRC`: the same input through this port and the PyTorch reference, stage by stage.

Compares the loaded weights, the outputs of every layer, logits, loss, gradients of every trained tensor and a short
AdamW curve, in float32. A small model's gradients are also compared under weights that hide no fault
(`weights.telling`), the same on both sides.

Both sides read `SRC`, so they agree where two tensors of one shape were exchanged in the files. Only `against`, the
directory that `SRC` was made from, or a record of it shows that.

A record (.npz) has HF's forward arguments by name, `logits` [B, T, V], and optionally `labels`, `loss`, `stage/NAME` for
outputs by stage and `weight/NAME` for fingerprints of tensors (canonical names). `record=FILE.npz` writes all of them;
arguments and logits are enough for `inputs=FILE.npz`, which compares with a record without PyTorch.
"""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from medcg_jax.families import build, registry
from medcg_jax.families.build import Config
from medcg_jax.families.weights import engine
from medcg_jax.families.weights.convert import load_checkpoint, read_config
from medcg_jax.families.weights.families import family_of, module_of
from medcg_jax.families.weights.files import WeightsError
from medcg_jax.families.weights.kind import check_is_released
from medcg_jax.mesh import make_mesh
from medcg_jax.parity.rows import TELLING, Row, compared, judged, read_arrays, report
from medcg_jax.parity.weights import Arrays, fingerprints, params_of, telling, tensors_of, weight_rows
from medcg_jax.train.checkpoint import check_whole

# Family -> the module that describes its reference: inputs, stages, and where HF's model has them.
FAMILIES: dict[str, ModuleType] = {family.name: family.reference for family in registry.families() if family.parity}
NUM_STEPS = 10
# AdamW's epsilon. With the usual 1e-8 a gradient of pure rounding moves a weight as far as any other gradient.
CURVE_EPS = 1e-5
# Of larger models only the projector is trained: gradients and moments of all parameters would fill a host's memory.
MAX_TRAINED_PARAMS = 500_000_000
# Smaller models also run with `weights.telling`; larger ones have trained weights, which hide no fault.
MAX_SMALL_PARAMS = 50_000_000
RECORD_NEEDS = ("input_ids", "pixel_values", "logits")
# Files that only a folder of arrays from original code has (`python -m tests.golden`).
GOLDEN_FILES = ("expected.npz", "expected_base.npz")


def parity(src: Path, *, inputs: Path | None = None, record: Path | None = None, against: Path | None = None) -> dict:
    """`rows.report` of all comparisons, with {"trained", "parameters"}.

    src: a released (HF) directory; with `inputs` or `against` any checkpoint.
    inputs: a record to compare with in place of PyTorch. record: where to write the reference's record.
    against: the released directory that the reference reads; None: `src`.

    Raises:
      CheckpointError: files of a checkpoint that has their digests are missing or damaged.
      WeightsError: no checkpoint, arrays missing or of wrong shapes, or PyTorch is needed and not installed.
    """
    if inputs is not None and (record or against):
        raise WeightsError(f"--inputs={inputs} takes the reference's place; --record and --against need one")
    if any((src / name).is_file() for name in GOLDEN_FILES):
        raise WeightsError(f"{src} holds arrays of original code; in a checkout: python -m tests.golden {src}")
    if inputs is None and against is None:
        check_is_released(src)
    for folder in filter(None, (src, against)):
        check_whole(folder)
    config, notes = _read(src)
    mesh = make_mesh(devices=jax.devices()[:1])
    with jax.default_matmul_precision("highest"):
        graphdef, params = load_checkpoint(src, config, mesh)
    trained: tuple[str, ...] = ()
    if inputs is not None:
        rows = recorded_rows(graphdef, params, read_record(inputs), inputs)
    else:
        from medcg_jax.parity.pytorch import open_reference

        family = family_module(config)
        if against is not None and family_of(_read(against)[0]) != family_of(config):
            raise WeightsError(f"--against={against} is of another model than {src}: expected a {family.FAMILY}")
        reference = open_reference(src if against is None else against, family, config)
        trained = ("projector", "decoder") if build.num_params(params) <= MAX_TRAINED_PARAMS else ("projector",)
        example = family.example(config)
        if record is not None:
            write_record(record, example, reference.stages(example), reference.tensors())
            notes.append(f"the reference's numbers are in {record}")
        rows = compare(graphdef, params, reference, example, trained, notes=notes)
    return report(src, rows, notes) | {"trained": list(trained), "parameters": build.num_params(params)}


def family_module(config: Config) -> ModuleType:
    """The module that describes the family's reference."""
    return FAMILIES[family_of(config)]


def _read(src: Path) -> tuple[Config, list[str]]:
    """(the architecture of `src` as both sides can run it, notes on what was changed)."""
    try:
        # Rolled: compiling 32 layers one by one would take longer than running them.
        config = dataclasses.replace(read_config(src), scan_unroll=1)
    except ValueError as error:
        # The model refuses its sizes.
        raise error if isinstance(error, WeightsError) else WeightsError(f"{src}: {error}") from error
    if family_of(config) not in FAMILIES:
        raise WeightsError(
            f"{src} holds a {family_of(config)}, of which transformers has no model; expected {', '.join(FAMILIES)}"
        )
    return family_module(config).runnable(config)


# ------------------------------------------------------------------ against PyTorch


def compare(
    graphdef, params, reference, inputs: dict[str, np.ndarray], trained: tuple[str, ...], *,
    notes: list[str] | None = None,
) -> list[Row]:  # fmt: skip
    """Rows for weights, every stage, the loss, the gradients and the curve, which trains `reference`.

    inputs: HF's forward arguments with `labels`. notes: gets remarks on the rows.
    """
    config, small = nnx.merge(graphdef, params).config, build.num_params(params) <= MAX_SMALL_PARAMS
    prefixes = sum((family_module(config).PREFIXES[name] for name in trained), ())
    # Small: ten large steps would lead far away from the compared weights.
    rate = 1e-4 if build.num_params(params) <= MAX_TRAINED_PARAMS else 1e-5
    rows = []
    with jax.default_matmul_precision("highest"):
        if small:
            ours, theirs = tensors_of(config, params), reference.tensors()
            rows += weight_rows(fingerprints(ours), fingerprints(theirs))
        stages = reference.stages(inputs)
        compared_rows = stage_rows(nnx.merge(graphdef, params), stages, inputs)
        differentiate = value_and_grad(graphdef, inputs)
        gradients = reference.gradients(inputs, prefixes)
        compared_rows += gradient_rows(config, differentiate, params, gradients, trained)
        if not all(row.ok for row in compared_rows) and build.num_params(params) <= MAX_TRAINED_PARAMS:
            noise = _noise(reference, inputs, prefixes, stages, gradients)
            wider = judged(compared_rows, noise)
            changed = [row for row, before in zip(wider, compared_rows, strict=True) if row != before]
            if notes is not None:
                notes += [
                    f"{row.stage}: {row.tolerance:.1e} is allowed, as the reference moves by "
                    f"{noise[row.stage].difference / noise[row.stage].scale:.1e} when its weights are rounded otherwise"
                    for row in changed
                ]
            compared_rows = wider
        rows += compared_rows
        if small:
            if notes is not None and not _sees_images(reference, inputs):
                notes.append(
                    "WARNING: no logit depends on the image with these weights (in a new Llama-3.2-Vision the gates of "
                    "cross-attention are 0); its way into the text is compared under other weights alone"
                )
            rows += _telling_rows(graphdef, params, ours, reference, inputs, trained, differentiate)
            reference.put(theirs)
        steps = reference.steps(inputs, prefixes, num_steps=NUM_STEPS, learning_rate=rate, eps=CURVE_EPS)
        return rows + step_rows(differentiate, config, params, trained, steps, learning_rate=rate, eps=CURVE_EPS)


def _noise(reference, inputs, prefixes, stages, gradients) -> dict[str, Row]:
    """Stage -> the reference compared with itself under weights rounded differently: the precision of each number."""
    original = reference.tensors()
    reference.put(reference.nudged())
    moved, moved_gradients = reference.stages(inputs), reference.gradients(inputs, prefixes)
    reference.put(original)
    rows = [compared(name, moved[name], value) for name, value in stages.items()]
    rows += [compared(f"gradient {name}", moved_gradients[name], value) for name, value in gradients.items()]
    return {row.stage: row for row in rows}


def _telling_rows(graphdef, params, ours, reference, inputs, trained, differentiate) -> list[Row]:
    """Rows of loss and gradients under `telling` weights, which stay in `reference`.

    Raises:
      WeightsError: the logits still do not depend on the image.
    """
    config = nnx.merge(graphdef, params).config
    prefixes = sum((family_module(config).PREFIXES[name] for name in trained), ())
    params = params_of(config, params, {n: telling(n, x) for n, x in ours.items()})
    reference.put({name: telling(name, x) for name, x in reference.tensors().items()})
    if not _sees_images(reference, inputs):
        raise WeightsError("no logit of the reference depends on the image, whatever the weights: nothing is compared")
    stages = reference.stages(inputs)
    rows = [compared("loss", differentiate(*build.split_trainable(params, trained))[0], stages["loss"])]
    rows += gradient_rows(config, differentiate, params, reference.gradients(inputs, prefixes), trained)
    if not all(row.ok for row in rows):
        # Only on a difference: compiling the layers takes as long as all else.
        rows = stage_rows(nnx.merge(graphdef, params), stages, inputs) + rows[1:]
    return [dataclasses.replace(row, stage=TELLING + row.stage) for row in rows]


def _sees_images(reference, inputs) -> bool:
    """Whether the reference's logits of real tokens change with the image."""
    real = np.asarray(inputs["attention_mask"]) != 0
    signed = ({**inputs, "pixel_values": sign * inputs["pixel_values"]} for sign in (1, -1))
    logits, other = (reference.logits(given)[real] for given in signed)
    return float(np.abs(logits - other).max()) > 1e-6 * float(np.abs(logits).max())


def stage_rows(model, reference: dict[str, np.ndarray], inputs) -> list[Row]:
    """A row per stage and for the loss, in the order of the computation, without padding.

    Raises:
      WeightsError: `reference` lacks a stage. It may have more, of layers that are in the checkpoint and unused.
    """
    family = family_module(model.config)
    given = family.port_inputs(model.config, inputs)
    stages = family.port_stages(model, given)
    real = np.asarray(given["segment_ids"]) != 0
    rows, missing = [], [stage for stage in stages if stage not in reference]
    if missing:
        raise WeightsError(f"the reference has no stages {', '.join(missing)}")
    for stage, ours in stages.items():
        keep = ... if stage.startswith(("vision", "projector")) else real
        rows.append(compared(stage, ours[keep], reference[stage][keep]))
    if "loss" in reference:
        rows.append(compared("loss", loss(stages["logits"], inputs["labels"]), reference["loss"]))
    return rows


def loss(logits: jax.Array, labels: np.ndarray) -> jax.Array:
    """float32[] mean negative log-likelihood of the labels (-100: none) one position ahead, as HF computes it."""
    targets = jnp.asarray(labels)[:, 1:]
    weight = targets != -100
    nll = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], jnp.where(weight, targets, 0))
    return (nll * weight).sum() / weight.sum()


def value_and_grad(graphdef, inputs: dict[str, np.ndarray]) -> Callable:
    """The jitted function (trainable, frozen) -> (loss, gradient over trainable) on `inputs`."""

    @jax.jit
    @jax.value_and_grad
    def run(trainable, frozen):
        model = nnx.merge(graphdef, build.join(trainable, frozen))
        given = family_module(model.config).port_inputs(model.config, inputs)
        return loss(model(**given), inputs["labels"])

    return run


def gradient_rows(config: Config, differentiate, params, reference: dict[str, np.ndarray], trained) -> list[Row]:
    """A row per trained tensor of the released checkpoint, relative to the largest value of its gradient."""
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


def step_rows(differentiate, config: Config, params, trained, steps, *, learning_rate: float, eps: float) -> list[Row]:
    """A row for the loss before each step of the reference; one AdamW step of this port leads to the next loss.

    Every step starts from the reference's weights and this port's moments, so that rounding does not add up: steep curves
    are chaotic, and two correct programs soon diverge. steps: (loss, trained tensors by canonical name) before each.
    """
    trainable, frozen = build.split_trainable(params, trained)
    state, update = adamw(trainable, learning_rate=learning_rate, eps=eps)
    rows = []
    for i, (theirs, tensors) in enumerate(steps):
        value, grads = differentiate(trainable, frozen)
        rows.append(compared(f"loss before step {i}", value, theirs, floor=1.0))
        trainable, state = update(params_of(config, trainable, tensors), state, grads)
    return rows


def adamw(trainable, *, learning_rate: float, eps: float = 1e-8) -> tuple:
    """(state, jitted (trainable, state, gradient) -> (trainable, state)) of AdamW: no decay, else torch's defaults."""
    optimizer = optax.adamw(learning_rate, b1=0.9, b2=0.999, eps=eps, weight_decay=0.0)

    @jax.jit
    def update(trainable, state, grads):
        updates, state = optimizer.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state

    return optimizer.init(trainable), update


# ------------------------------------------------------------------ records


def write_record(path: Path, inputs: Arrays, stages: Arrays, tensors: Arrays) -> None:
    """Writes a record: inputs, stages (`logits` and `loss` among them), fingerprints of `tensors`."""
    outputs = {name if name in ("logits", "loss") else f"stage/{name}": value for name, value in stages.items()}
    marks = {f"weight/{name}": value for name, value in fingerprints(tensors).items()}
    # A new file first: one cut off by a full disk must not replace the old.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        np.savez(file, **inputs, **outputs, **marks)
    os.replace(temporary, path)


def read_record(path: Path) -> Arrays:
    """The arrays of a record.

    Raises:
      WeightsError: it is no .npz file of arrays, or lacks one of `RECORD_NEEDS`.
    """
    arrays = read_arrays(path)
    missing = [name for name in RECORD_NEEDS if name not in arrays]
    if missing:
        held = ", ".join(sorted(arrays)) or "nothing"
        raise WeightsError(f"--inputs={path} lacks {', '.join(missing)}; it holds {held}")
    return arrays


def recorded_rows(graphdef, params, record: Arrays, source: Path) -> list[Row]:
    """Rows for logits (real tokens only) and, where they are recorded, for weights, stages and the loss.

    Raises:
      WeightsError: the recorded logits have other rows or positions.
    """
    model = nnx.merge(graphdef, params)
    recorded = {
        prefix: {name.removeprefix(prefix): value for name, value in record.items() if name.startswith(prefix)}
        for prefix in ("stage/", "weight/")
    }
    rows = []
    with jax.default_matmul_precision("highest"):
        if recorded["weight/"]:
            rows += weight_rows(fingerprints(tensors_of(model.config, params)), recorded["weight/"])
        if recorded["stage/"]:
            outputs = {name: record[name] for name in ("logits", "loss") if name in record}
            return rows + stage_rows(model, recorded["stage/"] | outputs, record)
        given = family_module(model.config).port_inputs(model.config, record)
        logits = jax.jit(lambda model, given: model(**given))(model, given)
    theirs = record["logits"]
    if theirs.shape[:2] != logits.shape[:2] or theirs.shape[2] > logits.shape[2]:
        raise WeightsError(f"{source}: logits {theirs.shape} recorded, {logits.shape} computed")
    # The model's table may have more rows than the release has words.
    real, logits = np.asarray(given["segment_ids"]) != 0, logits[..., : theirs.shape[2]]
    rows.append(compared("logits", np.asarray(logits)[real], theirs[real]))
    if "labels" in record and "loss" in record:
        rows.append(compared("loss", loss(logits, record["labels"]), record["loss"]))
    return rows
