"""One process's part in a grid: claims bases and groups of cells, trains and tests them, says when they are done.

Started as `python -m medcg_jax.study.worker WORKDIR PARENT [bases]` where a grid has several processes;
ends with its parent.
Where `jax.distributed` spans several processes, all work on one group together; the first one decides and writes.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from medcg_jax.config_file import from_config_dict
from medcg_jax.data.records import DataError
from medcg_jax.host import keep_freed_memory
from medcg_jax.run_config import ConfigError, RunConfig
from medcg_jax.study import claims, results
from medcg_jax.study.bases import Bases
from medcg_jax.study.cells import Trainer
from medcg_jax.study.progress import Reporter, base_name
from medcg_jax.study.schedule import Group, Plan, make_plan
from medcg_jax.train.log import enable_cache
from medcg_jax.train.loop import NonFiniteLoss

POLL_S = 0.5
NOTHING, BASE, GROUP = range(3)


class Worker:
    """Works on a grid until all of it is done, waiting for what others hold: they may die over it."""

    def __init__(self, run: RunConfig, workdir: Path, plan: Plan):
        keep_programs()
        self._workdir, self._plan = workdir, plan
        self._seeds = list(dict.fromkeys(group.seed for group in plan.groups))
        self._claims = results.state_dir(workdir) / "claims"
        self._trainer = Trainer(run, workdir)
        self._bases = Bases(run, workdir)
        self._claim: claims.Claim | None = None

    def run(self, bases_only: bool = False) -> None:
        """Returns when the grid is done, or, with `bases_only`, when every base is there."""
        while True:
            kind, index = agree(lambda: self._choose(bases_only))
            if kind == NOTHING:
                return
            try:
                if kind == BASE:
                    self._make_base(self._seeds[index])
                else:
                    self._work_on(self._plan.groups[index])
            finally:
                if self._claim:
                    self._claim.release()
                    self._claim = None

    def _choose(self, bases_only: bool) -> tuple[int, int]:
        """What this process holds from now on: (BASE, place of its seed) or (GROUP, its place); or nothing is left."""
        while True:
            left = [i for i, g in enumerate(self._plan.groups) if results.outcomes_of(self._workdir, g) is None]
            seeds = dict.fromkeys(self._plan.groups[i].seed for i in left)
            ready = {seed for seed in seeds if self._bases.ready(seed)}
            if bases_only:
                left = []
            if not left and ready == set(seeds) or not seeds:
                return NOTHING, 0
            # What other processes have died over comes last.
            holders = {i: claims.num_holders(self._claims, self._plan.groups[i].name) for i in left}
            for i in sorted(left, key=lambda i: (holders[i], i)):
                group = self._plan.groups[i]
                if group.seed in ready and self._take(
                    self._claims, group.name, lambda: results.outcomes_of(self._workdir, group) is not None
                ):
                    return GROUP, i
            for seed in seeds:
                if seed not in ready and self._take(
                    self._bases.claims, self._bases.fingerprint(seed), lambda: self._bases.ready(seed)
                ):
                    return BASE, self._seeds.index(seed)
            time.sleep(POLL_S)

    def _take(self, folder: Path, name: str, done: Callable[[], bool]) -> bool:
        """Whether this process now holds the work; not where another does, or has just finished it."""
        claim = claims.take(folder, name)
        if claim and done():
            claim.release()
            return False
        self._claim = claim
        return claim is not None

    def _make_base(self, seed: int) -> None:
        setup, report = self._trainer.setup(seed), Reporter(self._workdir, base_name(seed))
        try:
            self._bases.train(setup, seed, report)
            report(setup.run.base.steps, now=True)
        except NonFiniteLoss as error:  # the same at every try: none of the seed's cells can be had
            for group in self._plan.groups:
                if group.seed == seed and jax.process_index() == 0:
                    failure = {"status": f"failed: {error}", "seconds": 0.0}
                    results.mark_done(self._workdir, group, {job.id: failure for job in group.jobs})

    def _work_on(self, group: Group) -> None:
        report = Reporter(self._workdir, group.name)
        base = self._bases.load(self._trainer.setup(group.seed), group.seed)
        try:
            outcomes = self._trainer.run(group, base, report)
        except DataError as error:  # the same at every try: the cells have failed, others may not
            outcomes = {job.id: {"status": f"failed: {error}", "seconds": 0.0} for job in group.jobs}
        if jax.process_index() == 0:
            results.mark_done(self._workdir, group, outcomes)
            self._trainer.clean(group)


def agree(choose: Callable[[], tuple[int, int]]) -> tuple[int, int]:
    """What the first process chooses, on all processes of one `jax.distributed` job."""
    if jax.process_count() == 1:
        return choose()
    from jax.experimental import multihost_utils

    mine = choose() if jax.process_index() == 0 else (0, 0)
    kind, index = multihost_utils.broadcast_one_to_all(np.array(mine, np.int32))
    return int(kind), int(index)


def keep_programs() -> None:
    """Keeps compiled programs for other processes and grids, where JAX_COMPILATION_CACHE_DIR says or in ~/.cache."""
    if not jax.config.jax_compilation_cache_dir:
        enable_cache(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medcg_jax" / "xla")


def end_with(parent: int) -> None:
    """Ends this process soon after its parent has gone, however that ended."""

    def watch():
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def read_config(workdir: Path) -> RunConfig:
    """The configuration that a workdir's grid was started with."""
    return from_config_dict(json.loads((workdir / "config.json").read_text(encoding="utf-8"))["config"])


def main(argv: list[str]) -> int:
    workdir, parent, bases_only = Path(argv[0]), int(argv[1]), "bases" in argv[2:]
    keep_freed_memory()
    end_with(parent)
    try:
        run = read_config(workdir)
        Worker(run, workdir, make_plan(run)).run(bases_only)
    except (ConfigError, DataError) as error:
        print(error, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
