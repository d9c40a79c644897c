"""`medcg train`: one fine-tune on chosen subsets, with its metrics, checkpoints and final parameters in a workdir."""

import dataclasses
import json
from pathlib import Path

from medcg_jax.data.pipeline import Batches
from medcg_jax.data.records import concat
from medcg_jax.mesh import own_rows
from medcg_jax.models.build import join, shardings, split_trainable
from medcg_jax.run_config import ConfigError, RunConfig
from medcg_jax.train.checkpoint import save_params
from medcg_jax.train.loop import Cell, fit
from medcg_jax.train.optim import control_from, make_optimizer
from medcg_jax.train.setup import open_setup, start_params
from medcg_jax.train.step import make_step

# Sections and fields that make a run what it is: with others it is not gone on with. The mesh is none of them.
SECTIONS = ("model", "data", "train")
FREE_FIELDS = ("attention", "remat", "scan_unroll", "log_every_steps", "checkpoint_every_steps")


def identity(run: RunConfig) -> dict:
    """What a run's checkpoints must agree on, as in JSON."""
    sections = {name: dataclasses.asdict(getattr(run, name)) for name in SECTIONS}
    kept = {name: {k: v for k, v in part.items() if k not in FREE_FIELDS} for name, part in sections.items()}
    return json.loads(json.dumps(kept))


def train(run: RunConfig, workdir: Path) -> dict:
    """Trains on `data.subsets` (empty: all) and leaves `metrics/train.jsonl`, `checkpoints/`, `params/` in `workdir`.

    Run again it goes on from its newest checkpoint, and returns at once when it is done.

    Raises:
      ConfigError, DataError: as `open_setup`; or there is nothing to train on.
      NonFiniteLoss: the run diverged.
    """
    setup = open_setup(run)
    names = run.data.subsets or tuple(subset.name for subset in setup.source.subsets)
    sets = [setup.source.records(name, "train") for name in names]
    if setup.general:
        sets.append(setup.general.draw(tuple((name, len(own)) for name, own in sorted(zip(names, sets)))))
    encoded = setup.encode(concat(sets))
    if not len(encoded):
        raise ConfigError(f"data.subsets={','.join(names)}: these have no training records")
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
        control_from(run.train, len(encoded)),
        lambda position: Batches(
            encoded,
            batch_size=run.train.batch_size,
            seed=run.train.seed,
            weights=run.data.subset_weights,
            position=position,
            rows=own_rows(setup.mesh, run.train.batch_size),
        ),
        metrics=workdir / "metrics" / "train.jsonl",
        tensorboard=workdir / "tensorboard",
        checkpoints=workdir / "checkpoints",
        config=identity(run),
    )
    intervals = {name: getattr(run.train, name) for name in ("log_every_steps", "checkpoint_every_steps")}
    state, [result] = fit(program, trainable, frozen, [cell], label=run.name, **intervals)
    save_params(workdir / "params", join(state.params, frozen), setup.model, {"config": cell.config, **result.metrics})
    print(f"{result.step} steps on {len(encoded)} records of {len(names)} subsets; parameters in {workdir / 'params'}")
    return {"workdir": str(workdir), "steps": result.step, "records": len(encoded), **result.metrics}
