"""Trains and tests the jobs of a grid: one program for all of them, whatever their data and number of steps."""

import dataclasses
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import jax
from flax import nnx
from tqdm import tqdm

from medcg_jax.config import ConfigError, RunConfig
from medcg_jax.data.controls import control_sets
from medcg_jax.data.encoding import MEMORY_LIMIT_BYTES, Encoded, concat_encoded, cut_rows, option_columns
from medcg_jax.data.general import SUBSET as GENERAL
from medcg_jax.data.pipeline import Batches
from medcg_jax.data.records import DataError, RecordSet, Split, concat
from medcg_jax.data.splits import balanced, labels_of
from medcg_jax.eval.predictions import NonFiniteScores, write_controls
from medcg_jax.eval.subsets import Tester, write_tested
from medcg_jax.families.build import join, shardings, split_trainable
from medcg_jax.files import write_whole
from medcg_jax.mesh import own_rows
from medcg_jax.study.design import leaks
from medcg_jax.study.design.schedule import Job, seeded
from medcg_jax.study.run import claims
from medcg_jax.study.run.progress import Reporter
from medcg_jax.study.stats import contamination, results
from medcg_jax.train import loop
from medcg_jax.train.checkpoint import save_params
from medcg_jax.train.goodput import Goodput
from medcg_jax.train.log import CompileMonitor
from medcg_jax.train.optim import hparams_from, make_optimizer
from medcg_jax.train.setup import Setup, open_setup, peak_flops, step_flops, to_keep
from medcg_jax.train.step import Program, TrainState, make_step

Base = tuple[nnx.GraphDef, nnx.State]


class Data:
    """Encoded records of one seed's source; what fits is kept for the next cell.

    jobs: all of the grid, to whose longest record rows are cut, so that they share a program (`data.row_multiple`).
    """

    def __init__(self, setup: Setup, jobs: Sequence[Job] = ()):
        self._setup, self._jobs = setup, jobs
        self._row_lengths: dict[bool, int] = {}
        self._kept: dict[tuple, Encoded] = {}
        self._controls: dict[str, dict[str, Encoded]] = {}
        self._bytes = 0

    def training(self, parts: Sequence[tuple[str, int]], without: frozenset[str] = frozenset()) -> Encoded:
        """The training rows of these (subset, number of records), labels balanced where not all are taken; behind
        them the general records that the training has.

        without: ids of records that are left out of those taken.

        Raises:
          DataError: no record is left.
        """
        general, own = self.general(parts), {}
        if without:
            taken = self.taken(parts)
            own = {name: without & ids for name, ids in taken.items()}
            parts = [(name, count) for name, count in parts if own[name] != taken[name]]
            if not parts:
                raise DataError(f"no training record of {', '.join(taken)} is left: all of them give tests away")
            if general:
                ids = [record.id for record in general.records]
                general = general.select(place for place, name in enumerate(ids) if name not in without)
        rows = sum(count for _, count in parts) + (len(general) if general else 0)
        with_boxes = self._with_boxes(parts)
        lengths = self._box_lengths if with_boxes else {}
        length = self._row_length(with_boxes)
        if rows * sum(array.nbytes for array in self._setup.format.blank.values()) > MEMORY_LIMIT_BYTES:
            # Encoded together, so that the images are decoded when drawn.
            sets = [self._records(name, "train", count, own.get(name)) for name, count in parts]
            return cut_rows(self._setup.encode(concat([*sets, general] if general else sets), **lengths), length)
        encoded = [self._encoded(name, "train", count, own.get(name), **lengths) for name, count in parts]
        return cut_rows(
            concat_encoded([*encoded, self._setup.encode(general, **lengths)] if general else encoded), length
        )

    def taken(self, parts: Sequence[tuple[str, int]]) -> dict[str, frozenset[str]]:
        """Subset -> ids of the training records that these (subset, number of records) take."""
        return {name: frozenset(r.id for r in self._records(name, "train", count).records) for name, count in parts}

    def general(self, parts: Sequence[tuple[str, int]]) -> RecordSet | None:
        """The general records that a training of these (subset, number of records) has beside them; None: none."""
        return self._setup.general.draw(tuple(parts)) if self._setup.general else None

    def _with_boxes(self, parts: Sequence[tuple[str, int]]) -> bool:
        return any(self._setup.has_boxes(name) for name, _ in parts)

    def _row_length(self, with_boxes: bool) -> int:
        """Tokens of the rows of all the grid's trainings with boxes, or of all without."""
        if with_boxes not in self._row_lengths:
            setup, lengths = self._setup, self._box_lengths if with_boxes else {}
            like = [job.training for job in self._jobs if self._with_boxes(job.training) == with_boxes]
            names = {name for training in like for name, _ in training} if setup.run.data.row_multiple else ()
            sets = [setup.source.records(name, "train") for name in sorted(names)]
            sets += [setup.general.records] if sets and setup.general else []
            self._row_lengths[with_boxes] = setup.row_length(sets, **lengths)
        return self._row_lengths[with_boxes]

    @property
    def _box_lengths(self) -> dict[str, int]:
        """Lengths of the rows of a training with boxes, choice questions among them."""
        data = self._setup.run.data
        text, target = data.max_box_text_tokens, data.max_box_target_tokens
        return {"max_text_tokens": text or data.max_text_tokens, "max_target_tokens": target or data.max_target_tokens}

    def test(self, subset: str) -> Encoded:
        """The subset's test prompts: choice questions, or questions about boxes where it has these."""
        return self._encoded(subset, "test", self._setup.run.data.test_records_per_subset)

    def controls(self, subset: str) -> dict[str, Encoded]:
        """Control -> the subset's test questions asked again, as `eval.controls` wants; {} where it has boxes."""
        if self._setup.has_boxes(subset) or not self._setup.run.eval.controls:
            return {}
        if subset not in self._controls:
            records = self._records(subset, "test", self._setup.run.data.test_records_per_subset)
            asked = control_sets(records, self._setup.run.eval.controls, self._setup.run.data.seed)
            columns = option_columns(records)
            if "shuffled_images" in self._setup.run.eval.controls and "shuffled_images" not in asked:
                tqdm.write(f"{subset}: not asked beside other images, its test records have none or all the same")
            # Their images are those of the test, and none is decoded for them.
            self._controls[subset] = {
                name: self._setup.encode_eval(made, columns=columns, memory_limit_bytes=0)
                for name, made in asked.items()
            }
        return self._controls[subset]

    def _encoded(
        self, subset: str, split: Split, count: int, without: frozenset[str] | None = None, **lengths: int
    ) -> Encoded:
        key = (subset, split, count, without or None, *lengths.values())
        if key not in self._kept:
            asked = self._setup.encode_boxes if self._setup.has_boxes(subset) else self._setup.encode_eval
            encode = self._setup.encode if split == "train" else asked
            made = encode(self._records(subset, split, count, without), **lengths)
            size = sum(array.nbytes for array in (made.images or {}).values())
            if self._bytes + size > MEMORY_LIMIT_BYTES:
                return made
            self._kept[key] = made
            self._bytes += size
        return self._kept[key]

    def _records(self, subset: str, split: Split, count: int, without: frozenset[str] | None = None) -> RecordSet:
        records = self._setup.source.records(subset, split)
        places = balanced([labels_of(record) for record in records.records], count, self._setup.run.data.seed)
        if without:
            places = [place for place in places if records.records[place].id not in without]
        return records if len(places) == len(records) else records.select(places)


class Trainer:
    """Trains and tests jobs in this process, `study.cells_at_once` at a time; what is compiled is compiled once.

    jobs: as `Data` takes them.
    """

    def __init__(self, run: RunConfig, workdir: Path, goodput: Goodput, jobs: Sequence[Job] = ()):
        self._run, self._workdir, self._goodput, self._jobs = run, workdir, goodput, jobs
        self._monitor = CompileMonitor()
        self._program: Program | None = None
        self._tester: Tester | None = None
        self._has_tested = False
        self._seed: int | None = None

    def setup(self, seed: int) -> Setup:
        """What one seed's bases and cells need; kept until another seed is asked for."""
        if self._seed != seed:
            self._setup = open_setup(seeded(self._run, seed))
            self._data = Data(self._setup, self._jobs)
            drawn = self._run.data.source == "phantom"
            general = self._setup.general.records if self._setup.general else None
            self._guard = leaks.LeakGuard(self._setup.source, self._run.study, drawn=drawn, general=general)
            self._seed = seed
        return self._setup

    def run(
        self, waiting: Callable[[], Job | None], base: Base, finish: Callable[[Job, dict], None], base_path: str
    ) -> None:
        """Trains and tests every job that `waiting` gives, and the one that needs no training by itself.

        waiting: the next job of the seed that `setup` was last asked for, or None. finish: called with each job and its
        outcome, for `results.mark_done`. base_path: the checkpoint that `base` is; "": none.
        """
        setup, (graphdef, params) = self._setup, base
        trainable, frozen = split_trainable(params, setup.run.model.trainable)
        jobs: dict[str, tuple[Job, float]] = {}

        def next_cell() -> loop.RunSpec | None:
            while job := waiting():
                jobs[job.id] = job, time.perf_counter()
                if not job.steps:
                    end(job, params)
                    return None
                try:
                    return self._cell(setup, job, self._leaking(job))
                except (ConfigError, DataError) as error:  # the same at every try: these cells have failed
                    end(job, None, error)
            return None

        def ended(result: loop.RunResult, state: TrainState) -> None:
            job, _ = jobs[result.name]
            end(job, None if result.error else self._whole(setup, state, frozen), result.error)

        def end(job: Job, trained, error: Exception | None = None) -> None:
            try:
                if error is None:
                    with self._goodput.within("evaluation"):
                        self._test(setup, job, graphdef, trained)
                    if self._run.study.keep_weights and job.steps:
                        own, rest = split_trainable(trained, setup.run.model.trainable)
                        kept, beside = to_keep(setup, own, rest, base_path)
                        path = self._workdir / "weights" / job.id
                        meta = {"cell": job.id}
                        save_params(path, kept, setup.model, meta, trained_on=beside, beside=setup.companions)
            except (NonFiniteScores, DataError) as failed:
                error = failed
            seconds = (time.perf_counter() - jobs.pop(job.id)[1]) / (self._run.study.cells_at_once if job.steps else 1)
            finish(job, {"status": f"failed: {error}" if error else "done", "seconds": seconds})
            tqdm.write(f"{job.id}: {job.steps} steps, {seconds:.1f} s; {self._monitor.line()}")
            sys.stdout.flush()

        config, first = setup.run.train, next_cell()
        if first is None:
            return
        self._make_program(setup, graphdef, trainable, frozen, first)
        given = [first]
        reports: dict[str, Reporter] = {}

        def report(steps: dict[str, int], _: str) -> None:
            for name, done in steps.items():
                reports.setdefault(name, Reporter(self._workdir, name))(done)

        loop.fit_queue(
            self._program, trainable, frozen, lambda: given.pop() if given else next_cell(), ended, progress=report,
            peak_flops=peak_flops(setup.mesh), goodput=self._goodput, **loop.loop_options(config),
        )  # fmt: skip

    def clean(self, job: Job) -> None:
        """Removes what was kept to go on with a job; it is done now."""
        shutil.rmtree(checkpoints_of(self._workdir, job), ignore_errors=True)

    def _whole(self, setup: Setup, state: TrainState, frozen):
        """The whole parameters of one job, on the whole mesh."""
        own = state.params
        if setup.mesh.shape["cell"] > 1:
            wanted, _ = split_trainable(shardings(setup.model, setup.mesh), setup.run.model.trainable)
            own = jax.device_put(own, wanted)
        return join(own, frozen)

    def _test(self, setup: Setup, job: Job, graphdef, params) -> None:
        """Writes predictions, controls, boxes and metrics of every cell that the job serves.

        Raises:
          NonFiniteScores: the parameters are no use.
        """
        if self._tester is None:
            self._tester = Tester(setup, graphdef, sees=job.steps > 0)
        first = self._run.study.jobs > 1 and not self._has_tested
        # As in `_compile`: the first test of a process compiles.
        found, again = {}, {}
        with claims.lock(results.state_dir(self._workdir) / "claims", "compile.test") if first else nullcontext():
            for name in job.targets:
                asked, controls = self._data.test(name), self._data.controls(name)
                found[name], again[name] = (
                    self._tester.with_controls(params, asked, controls)
                    if controls
                    else (self._tester(params, asked), {})
                )
        self._has_tested = True
        if jax.process_index() > 0:
            return
        metrics = self._workdir / "metrics"
        for cell in job.cells:
            answers = [a for name in cell.target for a in found[name]]
            write_tested(self._workdir, cell.id, answers)
            if self._run.eval.controls:
                names = dict.fromkeys(control for name in cell.target for control in again[name])
                asked = {c: [a for name in cell.target for a in again[name].get(c, ())] for c in names}
                write_controls(self._workdir / "controls" / f"{cell.id}.jsonl", asked)
            if job.steps and cell.id != job.id:
                write_whole(metrics / f"{cell.id}.jsonl", (metrics / f"{job.id}.jsonl").read_text())

    def _make_program(self, setup: Setup, graphdef, trainable, frozen, cell: loop.RunSpec) -> None:
        if self._program is not None:
            return
        config = setup.run.train
        self._program = make_step(
            setup.mesh, graphdef, *split_trainable(shardings(setup.model, setup.mesh), setup.run.model.trainable),
            make_optimizer(config), num_cells=self._run.study.cells_at_once, loss_fn=setup.loss,
            accumulation_steps=config.accumulation_steps, compute_dtype=setup.run.model.compute_dtype,
        )  # fmt: skip
        with self._goodput.within("compile"):
            self._compile(trainable, frozen, cell)

    def _compile(self, trainable, frozen, cell: loop.RunSpec) -> None:
        """Where several processes share a grid: one of them compiles the step, the others read it from the cache."""
        if self._run.study.jobs == 1:
            return
        stream = cell.open_stream(0)
        batch, _ = next(stream)
        stream.close()
        with claims.lock(results.state_dir(self._workdir) / "claims", "compile.train"):
            self._program.compile(trainable, frozen, batch)

    def _leaking(self, job: Job) -> frozenset[str]:
        """The records to leave out of a training; what was found is written down first.

        Raises:
          ConfigError, DataError: a cell may not be trained.
        """
        found = [one for cell in job.cells for one in self._guard.look(cell)]
        if not found:
            return frozenset()
        taken, general = self._data.taken(job.training), self._data.general(job.training)
        if general:
            taken |= {GENERAL: taken.get(GENERAL, frozenset()) | {record.id for record in general.records}}
        found = leaks.among(found, taken)
        if jax.process_index() == 0:
            contamination.write_part(self._workdir, job.id, found)
        leaks.refuse(found)
        out = leaks.dropped(found)
        if out:
            total = sum(count for _, count in job.training) + (len(general) if general else 0)
            tqdm.write(f"{job.id}: {len(out)} of {total} training records left out, which give tests away")
        return out

    def _cell(self, setup: Setup, job: Job, without: frozenset[str]) -> loop.RunSpec:
        encoded, config = self._data.training(job.training, without), setup.run.train

        def stream(position: int) -> Batches:
            return Batches(
                encoded, batch_size=config.batch_size, seed=config.seed, position=position,
                rows=own_rows(setup.mesh, config.batch_size),
            )  # fmt: skip

        return loop.RunSpec(
            job.id, hparams_from(dataclasses.replace(config, steps=job.steps), len(encoded)), stream,
            metrics=self._workdir / "metrics" / f"{job.id}.jsonl",
            checkpoints=checkpoints_of(self._workdir, job) if config.checkpoint_every_steps else None,
            pixels=setup.pixels,
            flops_per_step=step_flops(
                encoded, setup.model, trainable=setup.run.model.trainable, batch_size=config.batch_size
            ),
        )  # fmt: skip


def checkpoints_of(workdir: Path, job: Job) -> Path:
    """Where a job's training state is kept until it is done."""
    return results.state_dir(workdir) / "checkpoints" / job.id
