"""One process of a grid: claims bases and jobs, trains and tests them, marks them as done.

A grid with several processes starts each as `python -m medcg_jax.study.run.worker PARENT FOLDER...` (a folder for each
of the grid's models); it ends with its parent. Where `jax.distributed` spans several processes, all work on one job
together; the first one decides and writes.
"""

import argparse
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import jax

from medcg_jax.config import ConfigError, Interrupted, RunConfig, RunError
from medcg_jax.config_file import from_config_dict
from medcg_jax.data.records import DataError
from medcg_jax.memory import explained, is_out_of_memory
from medcg_jax.platform import keep_freed_memory, run_process
from medcg_jax.processes import broadcast
from medcg_jax.study.design.schedule import Job, Plan, plan_of
from medcg_jax.study.run import claims
from medcg_jax.study.run.bases import base_path, is_ready, train_base
from medcg_jax.study.run.jobs import Trainer
from medcg_jax.study.run.progress import Reporter, base_name
from medcg_jax.study.stats import results
from medcg_jax.train.log import keep_programs
from medcg_jax.train.loop import NonFiniteLoss
from medcg_jax.train.preempt import sigterm_saves

POLL_S = 0.5
# Exit status of a process whose memory does not suffice.
NO_MEMORY = 3
NOTHING, BASE, JOB = range(3)


class Worker:
    """Works on a grid until all of it is done; it also waits for claimed work, since the holder may die.

    It stays with one model as long as that has work, since each model's programs must be compiled.

    folders: model -> its workdir.
    restarted: whether the grid was started before (goodput's "restart").
    """

    def __init__(self, folders: Mapping[str, Path], plan: Plan, *, restarted: bool = False):
        keep_programs()
        self._folders, self._plan, self._restarted = folders, plan, restarted
        keys = dict.fromkeys((job.model, job.seed) for job in plan.jobs)
        self._bases = {(model, seed): base_path(plan.runs[model], folders[model], seed) for model, seed in keys}
        for path in filter(None, self._bases.values()):
            _claims_of(path).mkdir(parents=True, exist_ok=True)
        self._model, self._open_model = "", ExitStack()
        self._held: dict[Path, claims.Claim] = {}

    def run(self, bases_only: bool = False) -> None:
        """Returns when the grid is done, or, with `bases_only`, when every base exists."""
        with self._open_model:
            if len(self._folders) == 1:
                self._open(next(iter(self._folders)))  # so that waiting for others counts in its goodput
            while True:
                kind, index = broadcast("the next work", lambda: self._choose(bases_only))
                if kind == NOTHING:
                    return
                try:
                    if kind == BASE:
                        self._make_base(*list(self._bases)[index])
                    else:
                        self._work_from(self._plan.jobs[index])
                finally:
                    for path in list(self._held):
                        self._held.pop(path).release()

    def _open(self, model: str) -> None:
        """Sets `_trainer` and `_goodput` for a model; forgets the programs of the last one."""
        if model == self._model:
            return
        if self._model:
            self._open_model.close()
            del self._trainer
            jax.clear_caches()
        run, folder = self._plan.runs[model], self._folders[model]
        goodput = results.process_goodput(folder, restarted=self._restarted, writes=jax.process_index() == 0)
        self._model, self._goodput = model, self._open_model.enter_context(goodput)
        self._trainer = Trainer(run, folder, self._goodput, self._plan.of(model).jobs)

    def _choose(self, bases_only: bool) -> tuple[int, int]:
        """The work that this process now holds: (BASE, index) or (JOB, index); (NOTHING, 0) when the grid is done."""
        waiting = claims.Waiting()
        while True:
            done = {model: results.done_jobs(folder) for model, folder in self._folders.items()}
            jobs = [job for job in self._plan.jobs if job.id not in done[job.model]]
            keys = dict.fromkeys((job.model, job.seed) for job in jobs)
            missing = {key: path for key in keys if (path := self._bases[key]) and not is_ready(path)}
            if not jobs or bases_only and not missing:
                return NOTHING, 0
            for model in self._in_order(dict.fromkeys(model for model, _ in keys)):
                ready = [job for job in jobs if job.model == model and (model, job.seed) not in missing]
                index = None if bases_only else self._claim_job(ready)
                if index is not None:
                    return JOB, index
                for key, path in missing.items():
                    if key[0] == model and self._take(_claims_of(path), path.name, lambda path=path: is_ready(path)):
                        return BASE, list(self._bases).index(key)
            waiting.report(
                *((_claims_in(self._folders[job.model]), job.id) for job in jobs),
                *((_claims_of(path), path.name) for path in missing.values()),
            )
            time.sleep(POLL_S)

    def _in_order(self, models: Iterable[str]) -> list[str]:
        """The current model, then those that no other process works on, then the others."""

        def is_worked_on(model: str) -> bool:
            folder = _claims_in(self._folders[model])
            bases = [path for (name, _), path in self._bases.items() if name == model and path]
            claimed = [(folder, name) for name in claims.num_holders(folder)]
            return any(claims.described(*claim) for claim in (*claimed, *((_claims_of(b), b.name) for b in bases)))

        models = list(models)
        if len(models) == 1:
            return models
        return sorted(models, key=lambda model: (model != self._model, model != self._model and is_worked_on(model)))

    def _claim_job(self, jobs: Sequence[Job]) -> int | None:
        """Claims the first free one of one model's jobs: its index in the plan; None: others hold all."""
        if not jobs:
            return None
        folder = self._folders[jobs[0].model]
        # Jobs on which other processes have died come last.
        holders = claims.num_holders(_claims_in(folder))
        for job in sorted(jobs, key=lambda job: holders[job.id]):
            if self._take(_claims_in(folder), job.id, lambda job=job: job.id in results.done_jobs(folder)):
                return self._plan.jobs.index(job)
        return None

    def _take(self, folder: Path, name: str, done: Callable[[], bool]) -> bool:
        """Claims the work; False where another process holds it, or has just finished it."""
        claim = None if folder / name in self._held else claims.take(folder, name)
        if claim and done():
            claim.release()
            return False
        if claim:
            self._held[folder / name] = claim
        return claim is not None

    def _make_base(self, model: str, seed: int) -> None:
        self._open(model)
        folder, name = self._folders[model], base_name(seed)
        setup, report = self._trainer.setup(seed), Reporter(folder, name)
        metrics = folder / "metrics" / f"{name}.jsonl"
        try:
            base = self._bases[model, seed]
            assert base is not None  # chosen as missing
            train_base(base, setup, name=name, metrics=metrics, report=report, goodput=self._goodput)
            report(setup.run.base.steps, now=True)
        except NonFiniteLoss as error:  # no retry would help: all cells of the seed fail
            for job in self._plan.jobs:
                if (job.model, job.seed) == (model, seed) and jax.process_index() == 0:
                    results.mark_done(folder, job.id, {"status": f"failed: {error}", "seconds": 0.0})

    def _work_from(self, first: Job) -> None:
        """Trains and tests a job, and in free slots other unclaimed jobs of its model, seed and kind."""
        self._open(first.model)
        folder, jobs = self._folders[first.model], [first]

        def claim_another() -> tuple[int, int]:
            done = results.done_jobs(folder)
            kind = (first.model, first.seed, first.has_boxes)
            alike = [job for job in self._plan.jobs if job.steps and (job.model, job.seed, job.has_boxes) == kind]
            index = self._claim_job([job for job in alike if job.id not in done])
            return (NOTHING, -1) if index is None else (JOB, index)

        def next_job() -> Job | None:
            if jobs:
                return jobs.pop()
            kind, index = broadcast("the next work", claim_another)
            return self._plan.jobs[index] if kind == JOB else None

        def finish(job: Job, outcome: dict) -> None:
            if jax.process_index() == 0:
                results.mark_done(folder, job.id, outcome)
                self._trainer.clean(job)
            if claim := self._held.pop(_claims_in(folder) / job.id, None):
                claim.release()

        self._trainer.run(self._bases[first.model, first.seed], first.seed, next_job, finish)


def _claims_in(workdir: Path) -> Path:
    return results.state_dir(workdir) / "claims"


def _claims_of(base: Path) -> Path:
    return base.with_name("claims")


def end_with(parent: int) -> None:
    """Ends this process soon after its parent has ended, however that happened."""

    def watch():
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def read_config(workdir: Path) -> RunConfig:
    """The configuration of a workdir's grid. Raises ConfigError: it cannot be read."""
    return from_config_dict(results.read_config_file(workdir)["config"])


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("parent", type=int)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--bases_only", action="store_true")
    parser.add_argument("--restarted", action="store_true")
    args = parser.parse_args(argv)
    keep_freed_memory()
    end_with(args.parent)
    try:
        runs = {folder: read_config(folder) for folder in args.folders}
        folders = {run.model.name: folder for folder, run in runs.items()}
        plan = plan_of({run.model.name: run for run in runs.values()})
        with sigterm_saves():
            Worker(folders, plan, restarted=args.restarted).run(args.bases_only)
    except (ConfigError, DataError) as error:
        print(error, flush=True)
        return 2
    except RunError as error:
        print(error, flush=True)
        return 1
    except Interrupted as error:
        print(error, flush=True)
        return os.EX_TEMPFAIL
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        print(explained(error, "reproduce"), flush=True)
        return NO_MEMORY
    return 0


if __name__ == "__main__":
    run_process(lambda: main(sys.argv[1:]))
