"""`medcg train`: one fine-tune on chosen subsets, with its metrics, checkpoints and final parameters in a workdir."""

import dataclasses
import json
from pathlib import Path

import jax

from medcg_jax.config import ConfigError, RunConfig, TrainConfig, free_fields
from medcg_jax.config_checks import profile_steps
from medcg_jax.data.encoding import Encoded, cut_rows, row_length
from medcg_jax.data.packing import RowShape, choose, sizes
from medcg_jax.data.pipeline import Batches, draws
from medcg_jax.data.records import concat
from medcg_jax.data.sources import subset_names
from medcg_jax.families.build import abstract, shardings, split_trainable
from medcg_jax.families.flops import forward, training
from medcg_jax.mesh import num_parts, own_rows
from medcg_jax.nn.base import Base
from medcg_jax.train import disk, goodput
from medcg_jax.train.checkpoint import save_params
from medcg_jax.train.held_out import left_out
from medcg_jax.train.loop import Cell, fit
from medcg_jax.train.optim import hparams_from, make_optimizer
from medcg_jax.train.preempt import sigterm_saves
from medcg_jax.train.profile import StepTrace
from medcg_jax.train.setup import Setup, open_setup, start_params, to_keep
from medcg_jax.train.step import init_state, make_step
from medcg_jax.train.utilisation import peak_flops, step_flops
from medcg_jax.train.wandb_log import WandbTarget, load_wandb

# Sections that, without their free fields, make a run what it is: with others it is not gone on with.
SECTIONS = ("model", "data", "train")


def identity(run: RunConfig) -> dict:
    """What a run's checkpoints must agree on, as in JSON."""
    sections, free = {name: dataclasses.asdict(getattr(run, name)) for name in SECTIONS}, free_fields()
    kept = {name: {k: v for k, v in part.items() if f"{name}.{k}" not in free} for name, part in sections.items()}
    return json.loads(json.dumps(kept))


def train(run: RunConfig, workdir: Path) -> dict:
    """Trains on `data.subsets` (empty: all) and leaves `metrics/train.jsonl`, `checkpoints/`, `params/` in `workdir`.

    Run again it goes on from its newest checkpoint, and returns at once when it is done. `goodput.json` says how the
    time of all its starts was spent, and the result has the same as "goodput".

    Raises:
      ConfigError, DataError: as `open_setup`; there is nothing to train on, or a record gives a test away
        (`held_out.left_out`); or no room for what is left in `workdir`.
      NonFiniteLoss: the run diverged.
      Interrupted, CheckpointError, SaveError, LossDiffers: as `fit`.
    """
    path = workdir / goodput.FILE
    clock = goodput.Goodput(path if jax.process_index() == 0 else None, earlier=goodput.read_starts(path))
    with sigterm_saves(), clock:
        result = _train(run, workdir, clock)
        spent = clock.summary()
    print(goodput.line(spent))
    return result | {"goodput": spent}


def _train(run: RunConfig, workdir: Path, clock: goodput.Goodput) -> dict:
    if run.log.wandb:
        load_wandb()
    setup = open_setup(run)
    names = subset_names(setup.source, run.data)
    sets = [setup.source.records(name, "train") for name in names]
    general = None
    if setup.general:
        general = setup.general.draw(tuple((name, len(own)) for name, own in sorted(zip(names, sets))))
        sets.append(general)
    records = concat(sets)
    out = left_out(run, setup.source, names, general)
    if out:
        records = records.select(i for i, record in enumerate(records.records) if record.id not in out)
    encoded = setup.encode(records)
    if not len(encoded):
        raise ConfigError(f"data.subsets={','.join(names)}: these have no training records")
    longest = int(encoded.arrays["length"].max())
    encoded = cut_rows(encoded, row_length(longest, run.data, setup.format))
    hparams = hparams_from(run.train, len(encoded))
    shape = packed_shape(setup, encoded, int(hparams["total_steps"])) if run.data.pack else None
    trace = _trace(run, workdir, int(hparams["total_steps"]))
    check_disk(setup, workdir)
    graphdef, params = start_params(setup, seed=run.train.seed)
    trainable, frozen = split_trainable(params, run.model.trainable)
    program = make_step(
        setup.mesh,
        graphdef,
        *split_trainable(shardings(setup.model, setup.mesh), run.model.trainable),
        make_optimizer(run.train),
        loss_fn=setup.loss,
        accumulation_steps=run.train.accumulation_steps,
        compute_dtype=run.model.compute_dtype,
    )
    cell = Cell(
        "train",
        hparams,
        lambda position: Batches(
            encoded,
            batch_size=run.train.batch_size,
            seed=run.train.seed,
            weights=run.data.subset_weights,
            position=position,
            rows=own_rows(setup.mesh, shape.rows if shape else run.train.batch_size),
            pack=shape,
        ),
        metrics=workdir / "metrics" / "train.jsonl",
        tensorboard=workdir / "tensorboard" if run.log.tensorboard else None,
        wandb=WandbTarget(run.log.wandb, run.name, workdir, dataclasses.asdict(run)) if run.log.wandb else None,
        checkpoints=workdir / "checkpoints",
        pixels=setup.pixels,
        # Named where there are some alone, so that other runs are gone on with as before.
        config=identity(run) | ({"left_out": sorted(out)} if out else {}),
        flops_per_step=step_flops(encoded, setup.model, trainable=run.model.trainable, batch_size=run.train.batch_size),
    )
    state, [result] = fit(
        program, trainable, frozen, [cell], label=run.name, peak_flops=peak_flops(setup.mesh), goodput=clock,
        trace=trace, keep_start=False, **loop_options(run.train),
    )  # fmt: skip
    kept, base = to_keep(setup, state.params, frozen, run.model.checkpoint)
    meta = {"config": cell.config, **result.metrics}
    save_params(workdir / "params", kept, setup.model, meta, trained_on=base, beside=setup.companions)
    print(f"{result.step} steps on {len(encoded)} records of {len(names)} subsets; parameters in {workdir / 'params'}")
    return {"workdir": str(workdir), "steps": result.step, "records": len(encoded), **result.metrics,
            "skipped_checkpoints": result.skipped_checkpoints}  # fmt: skip


def packed_shape(setup: Setup, encoded: Encoded, num_steps: int) -> RowShape:
    """The shape of a run's packed batches: the one whose step executes the fewest FLOPs. Told in a line."""
    run = setup.run
    train, trainable = run.train, run.model.trainable
    drawn = draws(
        encoded, batch_size=train.batch_size, seed=train.seed, weights=run.data.subset_weights, num_batches=num_steps
    )

    def cost(shape: RowShape) -> float:
        row = forward(setup.model, length=shape.length, num_images=shape.images, num_logits=shape.targets)
        return shape.rows * training(row, trainable=trainable, remat=run.model.remat)

    unit = num_parts(setup.mesh) * train.accumulation_steps
    shape = choose(sizes(encoded), drawn, unit=unit, multiple=run.data.row_multiple, cost=cost)
    real = encoded.arrays["length"][drawn].sum() / (num_steps * shape.rows * shape.length)
    alone = encoded.arrays["length"].mean() / encoded.arrays["tokens"].shape[1]
    rows = f"{shape.rows} rows of {shape.length} tokens and {shape.images} images at most"
    print(f"{train.batch_size} records a batch in {rows}: {real:.1%} of it is real, {alone:.1%} with a record a row")
    return shape


def _trace(run: RunConfig, workdir: Path, num_steps: int) -> StepTrace | None:
    """The trace that `log.profile_steps` asks for, of process 0; None: none."""
    if not run.log.profile_steps:
        return None
    first, last = profile_steps(run.log.profile_steps, num_steps)
    return StepTrace(workdir / "profile", first, last) if jax.process_index() == 0 else None


def loop_options(train: TrainConfig) -> dict[str, int]:
    """What of a training's configuration the loop takes (`loop.Options`)."""
    names = ("log_every_steps", "checkpoint_every_steps", "keep_checkpoints", "keep_every_steps")
    return {name: getattr(train, name) for name in names}


def check_disk(setup: Setup, workdir: Path) -> None:
    """Raises ConfigError where `workdir` cannot be written, or has no room for checkpoints and the final parameters."""
    run = setup.run
    # On disk nothing is quantised.
    _, params = abstract(dataclasses.replace(setup.model, base=Base()))
    trainable, frozen = split_trainable(params, run.model.trainable)
    kept, _ = to_keep(setup, trainable, frozen, run.model.checkpoint)
    state = jax.eval_shape(lambda tree: init_state(tree, optimizer=make_optimizer(run.train)), trainable)
    count = run.train.keep_checkpoints + 1
    needed = disk.num_bytes(state) * count + disk.num_bytes(kept)
    what = f"{count} checkpoints of {disk.amount(disk.num_bytes(state))} and the parameters, by train.keep_checkpoints"
    if jax.process_index() == 0:
        disk.check_room(workdir, needed, what)
