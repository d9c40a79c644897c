"""Trains and tests the jobs of one model's grid, all with one program, whatever their data and number of steps."""

import dataclasses
import functools
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import jax
from tqdm import tqdm

from medcg_jax.config import ConfigError, RunConfig
from medcg_jax.data.controls import blanked, control_sets
from medcg_jax.data.encoding import MEMORY_LIMIT_BYTES, Encoded, concat_encoded, cut_rows, option_columns
from medcg_jax.data.general import SUBSET as GENERAL
from medcg_jax.data.records import DataError, RecordSet, Source, Split, concat
from medcg_jax.data.sources import open_source
from medcg_jax.data.splits import balanced, labels_of
from medcg_jax.eval.predictions import NonFiniteScores, write_controls
from medcg_jax.eval.probe import MIN_RECORDS, Prober, ProbeResult
from medcg_jax.eval.subsets import SubsetTest, Tester, write_tested
from medcg_jax.families.build import join, shardings, split_trainable
from medcg_jax.files import write_whole
from medcg_jax.study.design import leaks
from medcg_jax.study.design.schedule import Job, seeded, spare_data
from medcg_jax.study.run import bases, claims
from medcg_jax.study.run.progress import Reporter
from medcg_jax.study.stats import contamination, probe, results
from medcg_jax.train import loop
from medcg_jax.train.checkpoint import save_params
from medcg_jax.train.goodput import Goodput
from medcg_jax.train.log import CompileMonitor
from medcg_jax.train.meta import identity
from medcg_jax.train.run import run_spec, step_program
from medcg_jax.train.setup import Setup, open_setup, peak_flops, to_keep
from medcg_jax.train.step import Program, TrainState

# A training: (subset, number of its training records).
Training = Sequence[tuple[str, int]]


class SeedData:
    """Encoded records of one seed's source, and its leak guard; records that fit in memory are kept for the next job.

    jobs: all of the model's. Rows are as long as their longest record needs, so that they share a program
      (`data.row_multiple`).
    """

    def __init__(self, setup: Setup, jobs: Sequence[Job] = ()):
        self._setup, self._jobs = setup, jobs
        self._row_lengths: dict[bool, int] = {}
        self._cache: dict[tuple, Encoded] = {}
        self._controls: dict[str, dict[str, Encoded]] = {}
        self._bytes = 0
        self._guards: dict[Source, leaks.LeakGuard] = {}

    def training(self, training: Training, without: frozenset[str] = frozenset(), *, blank: bool = False) -> Encoded:
        """The rows of a training, then its general records. Where a subset gives only some of its records, their labels
        are balanced.

        without: ids of records to leave out. blank: all images are the same grey one (`controls.blanked`).

        Raises:
          DataError: no record is left.
        """
        general, taken = self.general(training), self.taken(training) if without else {}
        removed = {name: without & ids for name, ids in taken.items()}
        used = [(name, count) for name, count in training if not without or removed[name] != taken[name]]
        if training and not used:
            raise DataError(f"no training record of {', '.join(taken)} is left: all of them give tests away")
        if general and without:
            general = general.select(i for i, record in enumerate(general.records) if record.id not in without)
        if general and blank:
            general = blanked(general)
        rows = sum(count for _, count in used) + (len(general) if general else 0)
        with_boxes = self._with_boxes(used)
        lengths = self._box_lengths if with_boxes else {}
        length = self._row_length(with_boxes)
        if rows * sum(array.nbytes for array in self._setup.format.blank.values()) > MEMORY_LIMIT_BYTES:
            # Encoded as one set, whose images are decoded when drawn.
            sets = [self._records(name, "train", count, removed.get(name), blank) for name, count in used]
            return cut_rows(self._setup.encode(concat([*sets, general] if general else sets), **lengths), length)
        encoded = [self._encoded(name, "train", count, removed.get(name), blank, **lengths) for name, count in used]
        if general:
            encoded.append(self._setup.encode(general, **lengths))
        return cut_rows(concat_encoded(encoded), length)

    def taken(self, training: Training) -> dict[str, frozenset[str]]:
        """Subset -> ids of its records in a training."""
        return {name: frozenset(r.id for r in self._records(name, "train", n).records) for name, n in training}

    def general(self, training: Training) -> RecordSet | None:
        """The general records of a training; None: none."""
        return self._setup.general.draw(tuple(training)) if self._setup.general else None

    def test(self, subset: str) -> Encoded:
        """The subset's test prompts: questions about boxes where it has boxes, else choice questions."""
        return self._encoded(subset, "test", self._setup.run.data.test_records_per_subset)

    def controls(self, subset: str) -> dict[str, Encoded]:
        """Control of `eval.controls` -> the subset's changed test questions; {} where it has boxes."""
        run = self._setup.run
        if self._setup.has_boxes(subset) or not run.eval.controls:
            return {}
        if subset not in self._controls:
            records = self._records(subset, "test", run.data.test_records_per_subset)
            sets, columns = control_sets(records, run.eval.controls, run.data.seed), option_columns(records)
            if "shuffled_images" in run.eval.controls and "shuffled_images" not in sets:
                tqdm.write(f"{subset}: not asked beside other images, its test records have none or all the same")
            # Their images are those of the test: none is decoded again.
            self._controls[subset] = {
                name: self._setup.encode_eval(questions, columns=columns, memory_limit_bytes=0)
                for name, questions in sets.items()
            }
        return self._controls[subset]

    def leaking(self, job: Job, workdir: Path) -> frozenset[str]:
        """Ids of the records to leave out of a job's training; all findings are written first.

        Raises:
          ConfigError, DataError: a cell must not be trained.
        """
        setup = self._setup
        source = self._source(max((count for _, count in job.training), default=0))
        if source not in self._guards:
            drawn, general = setup.run.data.source == "phantom", setup.general.records if setup.general else None
            self._guards[source] = leaks.LeakGuard(source, setup.run.study, drawn=drawn, general=general)
        findings = [finding for cell in job.cells for finding in self._guards[source].findings(cell)]
        if not findings:
            return frozenset()
        taken, general = self.taken(job.training), self.general(job.training)
        if general:
            taken |= {GENERAL: taken.get(GENERAL, frozenset()) | {record.id for record in general.records}}
        findings = leaks.relevant(findings, taken)
        if jax.process_index() == 0:
            contamination.write_findings(workdir, job.id, findings)
        leaks.refuse(findings)
        dropped = leaks.dropped(findings)
        if dropped:
            total = sum(count for _, count in job.training) + (len(general) if general else 0)
            tqdm.write(f"{job.id}: {len(dropped)} of {total} training records left out, which give tests away")
        return dropped

    def _with_boxes(self, training: Training) -> bool:
        return any(self._setup.has_boxes(name) for name, _ in training)

    def _row_length(self, with_boxes: bool) -> int:
        """Row length in tokens, shared by all of the grid's trainings with boxes, or by all without."""
        if with_boxes not in self._row_lengths:
            setup, lengths = self._setup, self._box_lengths if with_boxes else {}
            trainings = [job.training for job in self._jobs if self._with_boxes(job.training) == with_boxes]
            parts = {part for training in trainings for part in training} if setup.run.data.row_multiple else ()
            sets = [self._source(count).records(name, "train") for name, count in sorted(parts)]
            sets += [setup.general.records] if sets and setup.general else []
            if any(job.blank for job in self._jobs):
                sets += [blanked(records) for records in sets]
            self._row_lengths[with_boxes] = setup.row_length(sets, **lengths)
        return self._row_lengths[with_boxes]

    @property
    def _box_lengths(self) -> dict[str, int]:
        """Row lengths of a training with boxes, of its choice questions too."""
        data = self._setup.run.data
        text, target = data.max_box_text_tokens, data.max_box_target_tokens
        return {"max_text_tokens": text or data.max_text_tokens, "max_target_tokens": target or data.max_target_tokens}

    def _encoded(
        self,
        subset: str,
        split: Split,
        count: int,
        without: frozenset[str] | None = None,
        blank: bool = False,
        **lengths: int,
    ) -> Encoded:
        key = (subset, split, count, without or None, blank, *lengths.values())
        if key not in self._cache:
            encode_test = self._setup.encode_boxes if self._setup.has_boxes(subset) else self._setup.encode_eval
            encode = self._setup.encode if split == "train" else encode_test
            encoded = encode(self._records(subset, split, count, without, blank), **lengths)
            size = sum(array.nbytes for array in (encoded.images or {}).values())
            if self._bytes + size > MEMORY_LIMIT_BYTES:
                if split == "train":
                    return encoded
                # A test's images are decoded when they are drawn; where their features are kept, once for all cells.
                encoded, size = dataclasses.replace(encoded, images=None), 0
            self._cache[key] = encoded
            self._bytes += size
        return self._cache[key]

    def _records(
        self, subset: str, split: Split, count: int, without: frozenset[str] | None = None, blank: bool = False
    ) -> RecordSet:
        source = self._source(count) if split == "train" else self._setup.source
        records = source.records(subset, split)
        chosen = balanced([labels_of(record) for record in records.records], count, self._setup.run.data.seed)
        if without:
            chosen = [i for i in chosen if records.records[i].id not in without]
        records = records if len(chosen) == len(records) else records.select(chosen)
        return blanked(records) if blank else records

    def _source(self, count: int) -> Source:
        """Where `count` training records of a subset come from: beyond its share of a set, from `schedule.spare_data`."""
        return self._setup.source if count <= self._setup.run.data.train_records_per_subset else self._spare

    @functools.cached_property
    def _spare(self) -> Source:
        return open_source(spare_data(self._setup.run.data))


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
        """The setup of one seed's base and jobs; kept until another seed is asked for."""
        if self._seed != seed:
            self._base: tuple | None = None  # frees its memory before the next base is read
            if self._tester is not None:
                self._tester.forget()  # this seed's tests have other images
            self._setup = open_setup(seeded(self._run, seed))
            self._data = SeedData(self._setup, self._jobs)
            self._seed = seed
        return self._setup

    def run(
        self, base: Path | None, seed: int, next_job: Callable[[], Job | None], finish: Callable[[Job, dict], None]
    ) -> None:
        """Trains and tests every job that `next_job` gives; a first job without training is only tested.

        base: `bases.base_path` of the seed.
        next_job: the next job of this seed, or None.
        finish: called with each job and its outcome, for `results.mark_done`.
        """
        setup = self.setup(seed)
        started: dict[str, tuple[Job, float]] = {}

        def base_params() -> tuple:
            """(graphdef, params) of the base, read at first use and kept for the seed."""
            self._base = self._base or bases.load_base(base, setup)
            return self._base

        def next_spec() -> loop.RunSpec | None:
            while job := next_job():
                params = None if job.steps else base_params()[1]  # before the job's clock starts
                started[job.id] = job, time.perf_counter()
                if not job.steps:
                    end(job, params)
                    return None
                try:
                    return self._spec(setup, job)
                except (ConfigError, DataError) as error:  # no retry would help
                    end(job, None, error)
            return None

        def ended(result: loop.RunResult, state: TrainState) -> None:
            end(started[result.name][0], None if result.error else self._all_params(state, frozen), result.error)

        def end(job: Job, trained, error: Exception | None = None) -> None:
            try:
                if error is None:
                    with self._goodput.within("evaluation"):
                        self._test(job, base_params()[0], trained)
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
        graphdef, params = base_params()
        trainable, frozen = split_trainable(params, setup.run.model.trainable)
        if self._program is None:
            self._program = self._make_program(setup, graphdef, trainable, frozen, first)
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
        """Removes the checkpoints of a finished job."""
        shutil.rmtree(self._checkpoints(job), ignore_errors=True)

    def _checkpoints(self, job: Job) -> Path:
        return results.state_dir(self._workdir) / "checkpoints" / job.id

    def _spec(self, setup: Setup, job: Job) -> loop.RunSpec:
        encoded = self._data.training(job.training, self._data.leaking(job, self._workdir), blank=job.blank)
        config = dataclasses.replace(setup.run.train, steps=job.steps)
        metrics = self._workdir / "metrics" / f"{job.id}.jsonl"
        checkpoints = self._checkpoints(job) if config.checkpoint_every_steps else None
        parts = setup.run.model.trainable
        return run_spec(job.id, setup, encoded, config, parts, metrics=metrics, checkpoints=checkpoints)

    def _make_program(self, setup: Setup, graphdef, trainable, frozen, spec: loop.RunSpec) -> Program:
        parts, num_cells = setup.run.model.trainable, self._run.study.cells_at_once
        program = step_program(setup, graphdef, setup.run.train, parts, num_cells=num_cells, loss_fn=setup.loss)
        # Of several processes that share a grid one compiles the step; the others read it from the cache.
        if self._run.study.jobs > 1:
            stream = spec.open_stream(0)
            batch, _ = next(stream)
            stream.close()
            with self._goodput.within("compile"), self._lock("compile.train"):
                program.compile(trainable, frozen, batch)
        return program

    def _lock(self, name: str):
        return claims.lock(results.state_dir(self._workdir) / "claims", name)

    def _all_params(self, state: TrainState, frozen):
        """All parameters of one job, on the whole mesh."""
        params, setup = state.params, self._setup
        if setup.mesh.shape["cell"] > 1:
            placement, _ = split_trainable(shardings(setup.model, setup.mesh), setup.run.model.trainable)
            params = jax.device_put(params, placement)
        return join(params, frozen)

    def _test(self, job: Job, graphdef, params) -> None:
        """Writes predictions, controls, boxes and metrics of every cell that the job serves.

        Raises:
          NonFiniteScores: the parameters give no finite scores.
        """
        if self._tester is None:
            self._tester = Tester(self._setup, graphdef, sees=job.steps > 0)
        # Like the first step, the first test of a process compiles.
        compiles = self._run.study.jobs > 1 and not self._has_tested
        tests = (SubsetTest(self._data.test(name), self._data.controls(name), name) for name in job.targets)
        with self._lock("compile.test") if compiles else nullcontext():
            tested = dict(zip(job.targets, self._tester.run(params, tests), strict=True))
        answers, control_answers = ({name: pair[i] for name, pair in tested.items()} for i in range(2))
        self._has_tested = True
        probed = self._probe(job, graphdef, params) if self._run.study.probe and not job.steps else {}
        if jax.process_index() > 0:
            return
        if probed:
            probe.write_probes(self._workdir, job.id, job.seed, probed)
        metrics = self._workdir / "metrics"
        for cell in job.cells:
            write_tested(self._workdir, cell.id, [a for name in cell.target for a in answers[name]])
            if self._run.eval.controls:
                names = dict.fromkeys(control for name in cell.target for control in control_answers[name])
                by_control = {c: [a for name in cell.target for a in control_answers[name].get(c, ())] for c in names}
                write_controls(self._workdir / "controls" / f"{cell.id}.jsonl", by_control)
            if job.steps and cell.id != job.id:
                write_whole(metrics / f"{cell.id}.jsonl", (metrics / f"{job.id}.jsonl").read_text())

    def _probe(self, job: Job, graphdef, params) -> dict[str, list[ProbeResult]]:
        """Target with choice questions -> what a linear probe reads from the base's image features."""
        prober = Prober(self._setup, graphdef, params)
        names = [name for name in job.targets if not self._setup.has_boxes(name)]
        probed = {name: prober(self._data.test(name)) for name in names}
        for name in (name for name in names if not probed[name]):
            tqdm.write(
                f"{name}: not probed, it has no test images or fewer than {MIN_RECORDS} training records with one"
            )
        return probed

    def _keep_weights(self, job: Job, trained, base: str) -> None:
        """base: the checkpoint that the training started from; "": none."""
        setup = self._setup
        params, trained_on = to_keep(setup, *split_trainable(trained, setup.run.model.trainable), base)
        # The configuration too, as `medcg train` keeps it: what the questions of a training look like.
        path, meta = self._workdir / "weights" / job.id, {"cell": job.id, "config": identity(setup.run)}
        save_params(path, params, setup.model, meta, trained_on=trained_on, beside=setup.companions)
