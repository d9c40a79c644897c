"""One process's part in a grid: claims bases and jobs, trains and tests them, says when they are done.

Started as `python -m medcg_jax.study.run.worker WORKDIR PARENT [bases] [again]` where a grid has several processes;
ends with its parent.
Where `jax.distributed` spans several processes, all work on one job together; the first one decides and writes.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from medcg_jax.config import ConfigError, Interrupted, RunConfig, RunError
from medcg_jax.config_file import from_config_dict
from medcg_jax.data.records import DataError
from medcg_jax.platform import keep_freed_memory, run_process
from medcg_jax.processes import broadcast
from medcg_jax.study.design.schedule import Job, Plan, make_plan
from medcg_jax.study.run import claims
from medcg_jax.study.run.bases import Bases
from medcg_jax.study.run.cells import Trainer
from medcg_jax.study.run.progress import Reporter, base_name
from medcg_jax.study.stats import results
from medcg_jax.train.log import keep_programs
from medcg_jax.train.loop import NonFiniteLoss
from medcg_jax.train.preempt import sigterm_saves

POLL_S = 0.5
NOTHING, BASE, JOB = range(3)


class Worker:
    """Works on a grid until all of it is done, waiting for what others hold: they may die over it.

    again: whether the grid was started before (its time's "restart").
    """

    def __init__(self, run: RunConfig, workdir: Path, plan: Plan, *, again: bool):
        keep_programs()
        self._workdir, self._plan = workdir, plan
        self._seeds = list(dict.fromkeys(job.seed for job in plan.jobs))
        self._claims = results.state_dir(workdir) / "claims"
        self._goodput = results.process_goodput(workdir, again=again, writes=jax.process_index() == 0)
        self._trainer = Trainer(run, workdir, self._goodput, plan.jobs)
        self._bases = Bases(run, workdir)
        self._held: dict[str, claims.Claim] = {}

    def run(self, bases_only: bool = False) -> None:
        """Returns when the grid is done, or, with `bases_only`, when every base is there."""
        with self._goodput:
            self._work(bases_only)

    def _work(self, bases_only: bool) -> None:
        while True:
            kind, index = agree(lambda: self._choose(bases_only))
            if kind == NOTHING:
                return
            try:
                if kind == BASE:
                    self._make_base(self._seeds[index])
                else:
                    self._work_from(self._plan.jobs[index])
            finally:
                for name in list(self._held):
                    self._held.pop(name).release()

    def _choose(self, bases_only: bool) -> tuple[int, int]:
        """What this process holds from now on: (BASE, place of its seed) or (JOB, its place); or nothing is left."""
        waiting = claims.Waiting()
        while True:
            finished = results.done_jobs(self._workdir)
            left = [job for job in self._plan.jobs if job.id not in finished]
            seeds = dict.fromkeys(job.seed for job in left)
            ready = {seed for seed in seeds if self._bases.ready(seed)}
            if not seeds or bases_only and ready == set(seeds):
                return NOTHING, 0
            if not bases_only:
                place = self._claim_one([job for job in left if job.seed in ready])
                if place is not None:
                    return JOB, place
            for seed in seeds:
                name, done = self._bases.fingerprint(seed), lambda seed=seed: self._bases.ready(seed)
                if seed not in ready and self._take(self._bases.claims, name, done):
                    return BASE, self._seeds.index(seed)
            waiting.look(self._claims, (job.id for job in left))
            waiting.look(self._bases.claims, (self._bases.fingerprint(seed) for seed in seeds if seed not in ready))
            time.sleep(POLL_S)

    def _claim_one(self, jobs: Sequence[Job]) -> int | None:
        """The place in the plan of the first of these that this process holds now; None where others hold them all."""
        # What other processes have died over comes last.
        holders = claims.num_holders(self._claims)
        for job in sorted(jobs, key=lambda job: holders[job.id]):
            if self._take(self._claims, job.id, lambda job=job: job.id in results.done_jobs(self._workdir)):
                return self._plan.jobs.index(job)
        return None

    def _take(self, folder: Path, name: str, done: Callable[[], bool]) -> bool:
        """Whether this process now holds the work; not where another does, or has just finished it."""
        claim = None if name in self._held else claims.take(folder, name)
        if claim and done():
            claim.release()
            return False
        if claim:
            self._held[name] = claim
        return claim is not None

    def _make_base(self, seed: int) -> None:
        setup, report = self._trainer.setup(seed), Reporter(self._workdir, base_name(seed))
        try:
            self._bases.train(setup, seed, report, self._goodput)
            report(setup.run.base.steps, now=True)
        except NonFiniteLoss as error:  # the same at every try: none of the seed's cells can be had
            for job in self._plan.jobs:
                if job.seed == seed and jax.process_index() == 0:
                    results.mark_done(self._workdir, job.id, {"status": f"failed: {error}", "seconds": 0.0})

    def _work_from(self, first: Job) -> None:
        """Trains and tests a job, and every other of its seed and kind that is free while there is a slot for it."""
        base = self._bases.load(self._trainer.setup(first.seed), first.seed)
        given = [first]

        def waiting() -> Job | None:
            if given:
                return given.pop()
            _, place = agree(self._another_like(first))
            return self._plan.jobs[place] if place >= 0 else None

        def finish(job: Job, outcome: dict) -> None:
            if jax.process_index() == 0:
                results.mark_done(self._workdir, job.id, outcome)
                self._trainer.clean(job)
            if job.id in self._held:
                self._held.pop(job.id).release()

        self._trainer.run(waiting, base, finish, self._bases.path(first.seed))

    def _another_like(self, first: Job) -> Callable[[], tuple[int, int]]:
        def choose() -> tuple[int, int]:
            done = results.done_jobs(self._workdir)
            like = [
                job for job in self._plan.jobs
                if job.id not in done and job.steps and (job.seed, job.has_boxes) == (first.seed, first.has_boxes)
            ]  # fmt: skip
            place = self._claim_one(like)
            return (NOTHING, -1) if place is None else (JOB, place)

        return choose


def agree(choose: Callable[[], tuple[int, int]]) -> tuple[int, int]:
    """What the first process chooses, on all processes of one `jax.distributed` job."""
    kind, index = broadcast("the next work", choose)
    return kind, index


def end_with(parent: int) -> None:
    """Ends this process soon after its parent has gone, however that ended."""

    def watch():
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def read_config(workdir: Path) -> RunConfig:
    """The configuration that a workdir's grid was started with. Raises ConfigError: it cannot be read."""
    return from_config_dict(results.read_config_file(workdir)["config"])


def main(argv: list[str]) -> int:
    workdir, parent, bases_only = Path(argv[0]), int(argv[1]), "bases" in argv[2:]
    keep_freed_memory()
    end_with(parent)
    try:
        run = read_config(workdir)
        with sigterm_saves():
            Worker(run, workdir, make_plan(run), again="again" in argv[2:]).run(bases_only)
    except (ConfigError, DataError) as error:
        print(error, flush=True)
        return 2
    except RunError as error:
        print(error, flush=True)
        return 1
    except Interrupted as error:
        print(error, flush=True)
        return os.EX_TEMPFAIL
    return 0


if __name__ == "__main__":
    run_process(lambda: main(sys.argv[1:]))
