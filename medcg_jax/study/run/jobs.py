"""Trains and tests the jobs of one model's grid: one program for all, whatever their data and number of steps."""

import dataclasses
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import jax
from tqdm import tqdm

from medcg_jax.config import ConfigError, RunConfig
from medcg_jax.data.controls import control_sets
from medcg_jax.data.encoding import MEMORY_LIMIT_BYTES, Encoded, concat_encoded, cut_rows, option_columns
from medcg_jax.data.general import SUBSET as GENERAL
from medcg_jax.data.records import DataError, RecordSet, Split, concat
from medcg_jax.data.splits import balanced, labels_of
from medcg_jax.eval.predictions import NonFiniteScores, write_controls
from medcg_jax.eval.subsets import Tester, write_tested
from medcg_jax.families.build import join, shardings, split_trainable
from medcg_jax.files import write_whole
from medcg_jax.study.design import leaks
from medcg_jax.study.design.schedule import Job, seeded
from medcg_jax.study.run import bases, claims
from medcg_jax.study.run.progress import Reporter
from medcg_jax.study.stats import contamination, results
from medcg_jax.train import loop
from medcg_jax.train.checkpoint import save_params
from medcg_jax.train.goodput import Goodput
from medcg_jax.train.log import CompileMonitor
from medcg_jax.train.run import run_spec, step_program
from medcg_jax.train.setup import Setup, open_setup, peak_flops, to_keep
from medcg_jax.train.step import Program, TrainState

# (subset, number of its training records) of a training.
Training = Sequence[tuple[str, int]]


class SeedData:
    """Encoded records of one seed's source, and its leak guard; what fits in memory is kept for the next job.

    jobs: all of the model's, to whose longest record rows are cut, so that they share a program (`data.row_multiple`).
    """

    def __init__(self, setup: Setup, jobs: Sequence[Job] = ()):
        self._setup, self._jobs = setup, jobs
        self._row_lengths: dict[bool, int] = {}
        self._kept: dict[tuple, Encoded] = {}
        self._controls: dict[str, dict[str, Encoded]] = {}
        self._bytes = 0
        self._guard: leaks.LeakGuard | None = None

    def training(self, training: Training, without: frozenset[str] = frozenset()) -> Encoded:
        """The rows of a training, labels balanced where not all records of a subset are taken; behind them the general
        records that the training has.

        without: ids of records that are left out of those taken.

        Raises:
          DataError: no record is left.
        """
        general, taken = self.general(training), self.taken(training) if without else {}
        out = {name: without & ids for name, ids in taken.items()}
        used = [(name, count) for name, count in training if not without or out[name] != taken[name]]
        if training and not used:
            raise DataError(f"no training record of {', '.join(taken)} is left: all of them give tests away")
        if general and without:
            general = general.select(i for i, record in enumerate(general.records) if record.id not in without)
        rows = sum(count for _, count in used) + (len(general) if general else 0)
        with_boxes = self._with_boxes(used)
        lengths = self._box_lengths if with_boxes else {}
        length = self._row_length(with_boxes)
        if rows * sum(array.nbytes for array in self._setup.format.blank.values()) > MEMORY_LIMIT_BYTES:
            # Encoded together, so that the images are decoded when drawn.
            sets = [self._records(name, "train", count, out.get(name)) for name, count in used]
            return cut_rows(self._setup.encode(concat([*sets, general] if general else sets), **lengths), length)
        encoded = [self._encoded(name, "train", count, out.get(name), **lengths) for name, count in used]
        if general:
            encoded.append(self._setup.encode(general, **lengths))
        return cut_rows(concat_encoded(encoded), length)

    def taken(self, training: Training) -> dict[str, frozenset[str]]:
        """Subset -> ids of the records that a training takes of it."""
        return {name: frozenset(r.id for r in self._records(name, "train", n).records) for name, n in training}

    def general(self, training: Training) -> RecordSet | None:
        """The general records that a training has beside its own; None: none."""
        return self._setup.general.draw(tuple(training)) if self._setup.general else None

    def test(self, subset: str) -> Encoded:
        """The subset's test prompts: choice questions, or questions about boxes where it has these."""
        return self._encoded(subset, "test", self._setup.run.data.test_records_per_subset)

    def controls(self, subset: str) -> dict[str, Encoded]:
        """Control -> the subset's test questions asked again, as `eval.controls` says; {} where it has boxes."""
        run = self._setup.run
        if self._setup.has_boxes(subset) or not run.eval.controls:
            return {}
        if subset not in self._controls:
            records = self._records(subset, "test", run.data.test_records_per_subset)
            sets, columns = control_sets(records, run.eval.controls, run.data.seed), option_columns(records)
            if "shuffled_images" in run.eval.controls and "shuffled_images" not in sets:
                tqdm.write(f"{subset}: not asked beside other images, its test records have none or all the same")
            # Their images are those of the test, and none is decoded for them.
            self._controls[subset] = {
                name: self._setup.encode_eval(asked, columns=columns, memory_limit_bytes=0)
                for name, asked in sets.items()
            }
        return self._controls[subset]

    def leaking(self, job: Job, workdir: Path) -> frozenset[str]:
        """The records to leave out of a job's training; all findings are written down first.

        Raises:
          ConfigError, DataError: a cell may not be trained.
        """
        setup = self._setup
        if self._guard is None:
            drawn, general = setup.run.data.source == "phantom", setup.general.records if setup.general else None
            self._guard = leaks.LeakGuard(setup.source, setup.run.study, drawn=drawn, general=general)
        findings = [finding for cell in job.cells for finding in self._guard.findings(cell)]
        if not findings:
            return frozenset()
        taken, general = self.taken(job.training), self.general(job.training)
        if general:
            taken |= {GENERAL: taken.get(GENERAL, frozenset()) | {record.id for record in general.records}}
        findings = leaks.relevant(findings, taken)
        if jax.process_index() == 0:
            contamination.write_findings(workdir, job.id, findings)
        leaks.refuse(findings)
        out = leaks.dropped(findings)
        if out:
            total = sum(count for _, count in job.training) + (len(general) if general else 0)
            tqdm.write(f"{job.id}: {len(out)} of {total} training records left out, which give tests away")
        return out

    def _with_boxes(self, training: Training) -> bool:
        return any(self._setup.has_boxes(name) for name, _ in training)

    def _row_length(self, with_boxes: bool) -> int:
        """Tokens of the rows of all the grid's trainings with boxes, or of all without."""
        if with_boxes not in self._row_lengths:
            setup, lengths = self._setup, self._box_lengths if with_boxes else {}
            alike = [job.training for job in self._jobs if self._with_boxes(job.training) == with_boxes]
            names = {name for training in alike for name, _ in training} if setup.run.data.row_multiple else ()
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

    def _encoded(
        self, subset: str, split: Split, count: int, without: frozenset[str] | None = None, **lengths: int
    ) -> Encoded:
        key = (subset, split, count, without or None, *lengths.values())
        if key not in self._kept:
            encode_test = self._setup.encode_boxes if self._setup.has_boxes(subset) else self._setup.encode_eval
            encode = self._setup.encode if split == "train" else encode_test
            encoded = encode(self._records(subset, split, count, without), **lengths)
            size = sum(array.nbytes for array in (encoded.images or {}).values())
            if self._bytes + size > MEMORY_LIMIT_BYTES:
                return encoded
            self._kept[key] = encoded
            self._bytes += size
        return self._kept[key]

    def _records(self, subset: str, split: Split, count: int, without: frozenset[str] | None = None) -> RecordSet:
        records = self._setup.source.records(subset, split)
        chosen = balanced([labels_of(record) for record in records.records], count, self._setup.run.data.seed)
        if without:
            chosen = [i for i in chosen if records.records[i].id not in without]
        return records if len(chosen) == len(records) else records.select(chosen)


class Trainer:
    """Trains and tests one model's jobs in this process, `study.cells_at_once` at a time; each program is compiled once.

    jobs: as `SeedData` takes them.
    """

    def __init__(self, run: RunConfig, workdir: Path, goodput: Goodput, jobs: Sequence[Job] = ()):
        self._run, self._workdir, self._goodput, self._jobs = run, workdir, goodput, jobs
        self._monitor = CompileMonitor()
        self._program: Program | None = None
        self._tester: Tester | None = None
        self._has_tested = False
        self._seed: int | None = None

    def setup(self, seed: int) -> Setup:
        """What one seed's base and jobs need; kept until another seed is asked for."""
        if self._seed != seed:
            self._base = None  # its memory is needed before the next one is read
            self._setup = open_setup(seeded(self._run, seed))
            self._data = SeedData(self._setup, self._jobs)
            self._seed = seed
        return self._setup

    def run(
        self, base: Path | None, seed: int, next_job: Callable[[], Job | None], finish: Callable[[Job, dict], None]
    ) -> None:
        """Trains and tests every job that `next_job` gives, and the one that needs no training by itself.

        base: `bases.base_path` of the seed.
        next_job: the next job of this seed, or None.
        finish: called with each job and its outcome, for `results.mark_done`.
        """
        setup = self.setup(seed)
        started: dict[str, tuple[Job, float]] = {}

        def start_of() -> tuple:
            """(graphdef, params) of the base, read when a job first needs them and kept for the seed."""
            self._base = self._base or bases.load_base(base, setup)
            return self._base

        def next_spec() -> loop.RunSpec | None:
            while job := next_job():
                params = None if job.steps else start_of()[1]  # before the job's seconds begin
                started[job.id] = job, time.perf_counter()
                if not job.steps:
                    end(job, params)
                    return None
                try:
                    return self._spec(setup, job)
                except (ConfigError, DataError) as error:  # the same at every try: these cells have failed
                    end(job, None, error)
            return None

        def ended(result: loop.RunResult, state: TrainState) -> None:
            end(started[result.name][0], None if result.error else self._whole(state, frozen), result.error)

        def end(job: Job, trained, error: Exception | None = None) -> None:
            try:
                if error is None:
                    with self._goodput.within("evaluation"):
                        self._test(job, start_of()[0], trained)
                    if self._run.study.keep_weights and job.steps:
                        self._keep_weights(job, trained, str(base) if base else self._run.model.checkpoint)
            except (NonFiniteScores, DataError) as failure:
                error = failure
            shared_by = self._run.study.cells_at_once if job.steps else 1
            seconds = (time.perf_counter() - started.pop(job.id)[1]) / shared_by
            finish(job, {"status": f"failed: {error}" if error else "done", "seconds": seconds})
            tqdm.write(f"{job.id}: {job.steps} steps, {seconds:.1f} s; {self._monitor.line()}")
            sys.stdout.flush()

        first = next_spec()
        if first is None:
            return
        graphdef, params = start_of()
        trainable, frozen = split_trainable(params, setup.run.model.trainable)
        if self._program is None:
            self._make_program(setup, graphdef, trainable, frozen, first)
        specs = [first]
        reporters: dict[str, Reporter] = {}

        def report(steps: dict[str, int], _: str) -> None:
            for name, done in steps.items():
                reporters.setdefault(name, Reporter(self._workdir, name))(done)

        loop.fit_queue(
            self._program,
            trainable,
            frozen,
            lambda: specs.pop() if specs else next_spec(),
            ended,
            progress=report,
            peak_flops=peak_flops(setup.mesh),
            goodput=self._goodput,
            **loop.loop_options(setup.run.train),
        )

    def clean(self, job: Job) -> None:
        """Removes what was kept to go on with a job; it is done now."""
        shutil.rmtree(self._checkpoints(job), ignore_errors=True)

    def _checkpoints(self, job: Job) -> Path:
        return results.state_dir(self._workdir) / "checkpoints" / job.id

    def _spec(self, setup: Setup, job: Job) -> loop.RunSpec:
        encoded = self._data.training(job.training, self._data.leaking(job, self._workdir))
        config = dataclasses.replace(setup.run.train, steps=job.steps)
        metrics = self._workdir / "metrics" / f"{job.id}.jsonl"
        checkpoints = self._checkpoints(job) if config.checkpoint_every_steps else None
        parts = setup.run.model.trainable
        return run_spec(job.id, setup, encoded, config, parts, metrics=metrics, checkpoints=checkpoints)

    def _make_program(self, setup: Setup, graphdef, trainable, frozen, spec: loop.RunSpec) -> None:
        parts, num_cells = setup.run.model.trainable, self._run.study.cells_at_once
        self._program = step_program(setup, graphdef, setup.run.train, parts, num_cells=num_cells, loss_fn=setup.loss)
        # Where several processes share a grid, one of them compiles the step, and the others read it from the cache.
        if self._run.study.jobs > 1:
            stream = spec.open_stream(0)
            batch, _ = next(stream)
            stream.close()
            with self._goodput.within("compile"), self._lock("compile.train"):
                self._program.compile(trainable, frozen, batch)

    def _lock(self, name: str):
        return claims.lock(results.state_dir(self._workdir) / "claims", name)

    def _whole(self, state: TrainState, frozen):
        """The whole parameters of one job, on the whole mesh."""
        params, setup = state.params, self._setup
        if setup.mesh.shape["cell"] > 1:
            where, _ = split_trainable(shardings(setup.model, setup.mesh), setup.run.model.trainable)
            params = jax.device_put(params, where)
        return join(params, frozen)

    def _test(self, job: Job, graphdef, params) -> None:
        """Writes predictions, controls, boxes and metrics of every cell that the job serves.

        Raises:
          NonFiniteScores: the parameters are no use.
        """
        if self._tester is None:
            self._tester = Tester(self._setup, graphdef, sees=job.steps > 0)
        # As the step, the first test of a process compiles.
        compiles = self._run.study.jobs > 1 and not self._has_tested
        answers, asked_again = {}, {}
        with self._lock("compile.test") if compiles else nullcontext():
            for name in job.targets:
                test, controls = self._data.test(name), self._data.controls(name)
                answers[name], asked_again[name] = (
                    self._tester.with_controls(params, test, controls) if controls else (self._tester(params, test), {})
                )
        self._has_tested = True
        if jax.process_index() > 0:
            return
        metrics = self._workdir / "metrics"
        for cell in job.cells:
            write_tested(self._workdir, cell.id, [a for name in cell.target for a in answers[name]])
            if self._run.eval.controls:
                names = dict.fromkeys(control for name in cell.target for control in asked_again[name])
                by_control = {c: [a for name in cell.target for a in asked_again[name].get(c, ())] for c in names}
                write_controls(self._workdir / "controls" / f"{cell.id}.jsonl", by_control)
            if job.steps and cell.id != job.id:
                write_whole(metrics / f"{cell.id}.jsonl", (metrics / f"{job.id}.jsonl").read_text())

    def _keep_weights(self, job: Job, trained, base: str) -> None:
        """base: the checkpoint that the job was trained from; "": none."""
        setup = self._setup
        kept, trained_on = to_keep(setup, *split_trainable(trained, setup.run.model.trainable), base)
        path, meta = self._workdir / "weights" / job.id, {"cell": job.id}
        save_params(path, kept, setup.model, meta, trained_on=trained_on, beside=setup.companions)
