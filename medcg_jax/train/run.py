"""`medcg train`: one fine-tune on chosen subsets; metrics, checkpoints and final parameters go to a workdir."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from medcg_jax.config import ConfigError, RunConfig, TrainConfig, xla_switches
from medcg_jax.config_checks import profile_steps
from medcg_jax.data.encoding import Encoded, cut_rows, row_length
from medcg_jax.data.leaks import KINDS, Leak, actions_of, actions_of_general, find_leaks, hashed, joined, remedy, words
from medcg_jax.data.pipeline import Batches
from medcg_jax.data.records import DataError, RecordSet, Source, concat
from medcg_jax.data.release import ReleaseSource
from medcg_jax.data.sources import subset_names
from medcg_jax.families.build import abstract, num_bytes, shardings, split_trainable
from medcg_jax.mesh import local_rows, padded_rows
from medcg_jax.nn.base import Base
from medcg_jax.terminal import doing
from medcg_jax.train import checkpoint, goodput
from medcg_jax.train.log import StepTrace, WandbTarget, keep_programs, load_wandb
from medcg_jax.train.loop import RunSpec, fit, loop_options
from medcg_jax.train.meta import identity
from medcg_jax.train.optim import hparams_from, make_optimizer, num_steps
from medcg_jax.train.preempt import sigterm_saves
from medcg_jax.train.setup import Setup, open_setup, peak_flops, start_params, step_flops, to_keep
from medcg_jax.train.start import with_checkpoint
from medcg_jax.train.step import Program, init_state, make_step


def train(run: RunConfig, workdir: Path) -> dict:
    """Trains on `data.subsets` (empty: all) and writes `metrics/train.jsonl`, `checkpoints/`, `params/` to `workdir`.

    A second call continues from the newest checkpoint, and returns at once if the run is complete. `goodput.json`, and
    "goodput" in the result, say how the time of all starts was spent.

    Raises:
      ConfigError, DataError: as `open_setup`; there is nothing to train on; a record leaks a test (`left_out`); or the
        disk of `workdir` has too little room.
      NonFiniteLoss: the run diverged.
      Interrupted, CheckpointError, SaveError: as `fit`.
    """
    run, path = with_checkpoint(run), workdir / goodput.FILE
    clock = goodput.Goodput(path if jax.process_index() == 0 else None, earlier=goodput.read_starts(path))
    with sigterm_saves(), clock:
        result = _train(run, workdir, clock)
        spent = clock.summary()
    print(goodput.line(spent))
    return result | {"goodput": spent}


def train_config(config: Any, workdir: str | Path = "") -> dict:
    """`medcg train` in this process: one fine-tune. A second call with the same folder goes on where it ended.

    XLA reads its flags, among them those of `deterministic`, when JAX first uses a device: call this before that.

    config: a config file as for `--config`, "FILE.py" or "FILE.py:ARG"; a ConfigDict; or a `config.RunConfig`.
    workdir: folder of the run; "": runs/NAME, by the configuration's name.

    Returns {"workdir", "steps", "records", "goodput", ...}, as `medcg train --json`.

    Raises:
      ConfigError: `config` is of another type, or the environment names a run of several processes.
      All that `train` and `config_file.load` raise.

    Example:
      >>> import medcg_jax as m
      >>> counts = m.train("configs/phantom.py:tiny", "runs/tiny")  # doctest: +ELLIPSIS
      2 steps on ... records of ... subsets; parameters in runs/tiny/params
      ...
      >>> counts["steps"]
      2
    """
    from ml_collections import ConfigDict

    from medcg_jax import cluster, platform
    from medcg_jax.config_file import from_config_dict, load, with_flags
    from medcg_jax.files import user_path

    if isinstance(config, str | Path):
        run = load(user_path(str(config), "config"))
    elif isinstance(config, ConfigDict):
        run = with_flags(from_config_dict(config), {})
    elif isinstance(config, RunConfig):
        run = with_flags(config, {})
    else:
        raise ConfigError(f"config of type {type(config).__name__}; expected a file, a ConfigDict or a RunConfig")
    if joined := cluster.detect(os.environ):
        raise ConfigError(f"this is one of several processes, by {joined.how}; `medcg train` runs them together")
    platform.apply(xla_switches(run))
    keep_programs()
    return train(run, Path(user_path(str(workdir), "workdir") if workdir else Path("runs") / run.name))


def _train(run: RunConfig, workdir: Path, clock: goodput.Goodput) -> dict:
    if run.log.wandb:
        load_wandb()
    setup = open_setup(run)
    if not run.model.checkpoint:
        print(f"model.checkpoint is empty: {run.model.name} starts from random weights")
    names = subset_names(setup.source, run.data)
    sets = [setup.source.records(name, "train") for name in names]
    general = None
    if setup.general:
        general = setup.general.draw(tuple((name, len(records)) for name, records in sorted(zip(names, sets))))
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
    trace = _trace(run, workdir, num_steps(run.train, len(encoded)))
    check_disk(setup, workdir)
    graphdef, params = start_params(setup, seed=run.train.seed)
    trainable, frozen = split_trainable(params, run.model.trainable)
    program = step_program(setup, graphdef, run.train, run.model.trainable, loss_fn=setup.loss)
    spec = run_spec(
        "train",
        setup,
        encoded,
        run.train,
        run.model.trainable,
        weights=run.data.subset_weights,
        metrics=workdir / "metrics" / "train.jsonl",
        tensorboard=workdir / "tensorboard" if run.log.tensorboard else None,
        wandb=WandbTarget(run.log.wandb, run.name, workdir, dataclasses.asdict(run)) if run.log.wandb else None,
        checkpoints=workdir / "checkpoints",
        # Absent if no record is left out, so that checkpoints of versions without the field still match.
        config=identity(run) | ({"left_out": sorted(out)} if out else {}),
    )
    with doing(f"{run.name}: compiling and training"):
        state, result = fit(
            program,
            trainable,
            frozen,
            spec,
            label=run.name,
            peak_flops=peak_flops(setup.mesh),
            goodput=clock,
            trace=trace,
            keep_start=False,
            **loop_options(run.train),
        )
    saved, base = to_keep(setup, state.params, frozen, run.model.checkpoint)
    meta = {"config": spec.config, **result.metrics}
    checkpoint.save_params(workdir / "params", saved, setup.model, meta, trained_on=base, beside=setup.companions)
    print(f"{result.step} steps on {len(encoded)} records of {len(names)} subsets; parameters in {workdir / 'params'}")
    print(f"`medcg eval` with the same config and --workdir={workdir} scores them")
    counts = {"workdir": str(workdir), "steps": result.step, "records": len(encoded)}
    return counts | result.metrics | {"skipped_checkpoints": result.skipped_checkpoints}


def step_program(
    setup: Setup, graphdef: nnx.GraphDef, train: TrainConfig, parts: tuple[str, ...], **options
) -> Program:
    """The program that trains these parts of the setup's model. options: further ones for `make_step`."""
    return make_step(
        setup.mesh,
        graphdef,
        *split_trainable(shardings(setup.model, setup.mesh), parts),
        make_optimizer(train, setup.trainable_rows(parts)),
        accumulation_steps=train.accumulation_steps,
        compute_dtype=setup.run.model.compute_dtype,
        **options,
    )


def run_spec(
    name: str,
    setup: Setup,
    encoded: Encoded,
    train: TrainConfig,
    parts: tuple[str, ...],
    *,
    weights: Mapping[str, float] | None = None,
    **fields,
) -> RunSpec:
    """The loop's description of a training of these parts on these rows.

    weights: subset -> how often its records are drawn (`data.pipeline.Batches`). fields: further ones of `RunSpec`.
    """

    def stream(position: int) -> Batches:
        num_rows = padded_rows(setup.mesh, train)
        return Batches(
            encoded, batch_size=train.batch_size, seed=train.seed, weights=weights, position=position,
            num_rows=num_rows, rows=local_rows(setup.mesh, num_rows),
        )  # fmt: skip

    flops = step_flops(encoded, setup.model, trainable=parts, batch_size=train.batch_size)
    hparams = hparams_from(train, len(encoded))
    return RunSpec(name, hparams, stream, pixels=setup.pixels, flops_per_step=flops, **fields)


def _trace(run: RunConfig, workdir: Path, num_steps: int) -> StepTrace | None:
    """The trace of `log.profile_steps`, on process 0; None without one."""
    if not run.log.profile_steps:
        return None
    first, last = profile_steps(run.log.profile_steps, num_steps)
    return StepTrace(workdir / "profile", first, last) if jax.process_index() == 0 else None


def check_disk(setup: Setup, workdir: Path) -> None:
    """Raises ConfigError if `workdir` cannot be written, or has no room for checkpoints and the final parameters."""
    run = setup.run
    # Files on disk are never quantised.
    _, params = abstract(dataclasses.replace(setup.model, base=Base()))
    trainable, frozen = split_trainable(params, run.model.trainable)
    saved, _ = to_keep(setup, trainable, frozen, run.model.checkpoint)
    state = jax.eval_shape(lambda tree: init_state(tree, optimizer=make_optimizer(run.train)), trainable)
    count = run.train.keep_checkpoints + 1
    needed = num_bytes(state) * count + num_bytes(saved)
    what = f"{count} checkpoints of {checkpoint.amount(num_bytes(state))} and the parameters, by train.keep_checkpoints"
    if jax.process_index() == 0:
        checkpoint.check_room(workdir, needed, what)


def present_tests(source: Source, subsets: Sequence[str]) -> list[RecordSet]:
    """The test records of each subset; prints a warning of those whose image is missing, which no training needs.

    Raises:
      DataError: the data cannot be read.
    """
    if not isinstance(source, ReleaseSource):
        return [source.records(name, "test") for name in subsets]
    tests = [source.present_tests(name) for name in subsets]
    missing = [record for _, ids in tests for record in ids]
    if missing:
        print(
            f"warning: {len(missing)} test records have no image, as {missing[0]}: no training needs them, and `medcg "
            "eval` will refuse them; `medcg data check` lists them"
        )
    return [records for records, _ in tests]


def left_out(run: RunConfig, source: Source, subsets: Sequence[str], general: RecordSet | None) -> frozenset[str]:
    """Ids of the training records that a run leaves out, since they leak a test; prints a line for each kind of leak.

    The tests are those of all these subsets: `medcg eval` with the same flags uses them. Training records of the
    subsets are compared with the tests by id, by the bytes of their files and by patient, without decoding an image.
    General records are also compared by question, and by near images. Phantom subsets share nothing.

    general: the general records that the run is trained on.

    Raises:
      DataError: a record is refused (`study.leaks`), or the data cannot be read.
    """
    is_drawn = run.data.source == "phantom"
    if is_drawn and general is None:
        return frozenset()
    near_bits = None if general is None or run.study.near_duplicates == "off" else run.study.near_duplicate_bits
    decoded: dict | None = None if near_bits is None else {}
    tests = joined(hashed(records, decoded) for records in present_tests(source, subsets))
    leaks: list[tuple[Leak, str]] = []
    if not is_drawn:
        training = joined(hashed(source.records(name, "train")) for name in subsets)
        leaks += [(leak, actions_of(run.study)[leak.kind]) for leak in find_leaks(training, tests)]
    if general is not None:
        actions = actions_of_general(run.study)
        near = find_leaks(hashed(general, decoded), tests, near_bits, questions=True)
        leaks += [(leak, actions[leak.kind]) for leak in near]
    for leak, action in leaks:
        if action == "refused":
            raise DataError(f"{words(leak)}; {remedy(leak)}")
    for action in ("dropped", "reported"):
        for kind in KINDS:
            alike = [leak for leak, done in leaks if (leak.kind, done) == (kind, action)]
            if alike:
                print(f"{action}: {len(alike)} training records that give a test away, as {words(alike[0])}")
    return frozenset(leak.training for leak, action in leaks if action == "dropped")
