"""`medcg reproduce`: a whole grid from one call; called again, it goes on where it stopped.

The work is done by `worker.Worker`: in this process with `study.jobs` 1, else in as many processes that share the
workdir through claims. This process expands the grid, starts the workers, shows how far they are, and
writes the tables.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from medcg_jax import processes
from medcg_jax.agreement import data_fingerprint, versions
from medcg_jax.config import BOX_TABLES, ConfigError, Interrupted, RunConfig, flat, free_fields
from medcg_jax.data.general import open_general
from medcg_jax.files import write_whole
from medcg_jax.study.design.schedule import Job, Plan, make_plan, seeded
from medcg_jax.study.run import claims
from medcg_jax.study.run.progress import Progress
from medcg_jax.study.stats import contamination, results
from medcg_jax.study.stats.stats import summarise
from medcg_jax.train import goodput
from medcg_jax.train.preempt import sigterm_saves

# XLA on a CPU with one thread, for processes that share the cores of one machine; accelerators are not touched by it.
ONE_THREAD = {"NPROC": "1", "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}
# Time to save what is under way; schedulers give 30 s and more after a SIGTERM.
STOP_WAIT_S = 60.0
# What the first of several processes tells the others: whether there is work, and in the end the result.
BEGUN, REPORTED = "the grid's work", "the grid's result"
# Tables whose parts are other questions: the terminal shows them apart.
PRINTED_BY_PART = ("multi_task", "efficiency")


def reproduce(run: RunConfig, workdir: str | Path) -> dict:
    """Trains and scores every cell of the grid that is not done yet, then writes the report.

    Returns {"workdir", "cells", "failed": {cell: why}, "unfinished": [cell], "page", "goodput", "exit_status"}: 1 where
    a cell failed or is unfinished, else 0; "goodput" (None where no process left its part) is that of all processes
    together, and stands in `goodput.json`.

    Raises:
      ConfigError: the workdir holds a grid of another configuration, or the configuration cannot be used.
      Interrupted: the process was told to stop; what was under way is saved, its claims are released.
    """
    workdir = Path(workdir)
    plan = make_plan(run)
    check_start(run)
    if processes.count() > 1 and run.study.jobs > 1:
        raise ConfigError(
            f"study.jobs={run.study.jobs}: 1 is accepted where {processes.count()} processes share one run"
        )
    if not processes.is_first():
        return follow(run, workdir, plan)
    write_config(run, workdir, plan)
    tables = results.Tables(workdir, plan.cells, plan.jobs)
    done = results.done_jobs(workdir)
    waiting = [job for job in plan.jobs if job.id not in done]
    print(f"{len(plan.cells)} cells in {len(plan.jobs)} jobs, {len(waiting)} to do; workdir {workdir}", flush=True)
    processes.broadcast(BEGUN, lambda: bool(waiting))
    bases, again = missing_bases(run, workdir, waiting), bool(results.goodput_parts(workdir))
    with sigterm_saves(), Progress(workdir, plan, bases, on_change=tables.write):
        if waiting:
            work(run, workdir, plan, bool(bases), again)
    outcomes = results.all_outcomes(workdir, plan.jobs)
    tables.write(outcomes)
    contamination.join(workdir, plan)
    return processes.broadcast(REPORTED, lambda: summary(workdir, plan, outcomes))


def follow(run: RunConfig, workdir: Path, plan: Plan) -> dict:
    """`reproduce` on the other processes of one run: they do their part of the work, and the first writes."""
    with sigterm_saves():
        if processes.broadcast(BEGUN):
            from medcg_jax.study.run.worker import Worker

            Worker(run, workdir, plan, again=False).run()
        return processes.broadcast(REPORTED)


def check_start(run: RunConfig) -> None:
    """Raises ConfigError, before anything is allocated, when weights are missing or a grid has no use for a value."""
    from medcg_jax.train.setup import check_weights

    check_weights(run)
    for name in ("wandb", "profile_steps"):
        if value := getattr(run.log, name):
            raise ConfigError(f"log.{name}={value!r}: '' is accepted by `medcg reproduce`; `medcg train` takes others")
    if not run.study.cells_at_once:
        raise ConfigError("study.cells_at_once=0: `medcg reproduce` alone accepts it, and finds how many cells fit")


def missing_bases(run: RunConfig, workdir: Path, jobs: Sequence[Job]) -> dict[int, int]:
    """Seed -> steps of the bases that the jobs need and that are not there."""
    from medcg_jax.study.run.bases import Bases

    bases = Bases(run, workdir)
    seeds = dict.fromkeys(job.seed for job in jobs)
    return {seed: run.base.steps for seed in seeds if not bases.ready(seed)}


def work(run: RunConfig, workdir: Path, plan: Plan, needs_bases: bool, again: bool) -> None:
    """Does what is left, here or in `study.jobs` processes. again: the grid was started before."""
    words = ("again",) if again else ()
    if run.study.jobs == 1:
        from medcg_jax.study.run.worker import Worker

        Worker(run, workdir, plan, again=again).run()
        return
    if needs_bases and len(run.study.seeds) < run.study.jobs:
        # Most processes would wait for the bases: one with all cores makes them sooner.
        with workers(workdir, 1, "bases", *words, one_thread=False) as started:
            watch(started)
    with workers(workdir, run.study.jobs, *words) as started:
        watch(started)


def watch(started: "Sequence[Process]") -> None:
    """Waits for the workers; says so when one dies, and stops all when one refuses the configuration.

    Raises:
      ConfigError: what a worker refused.
      Interrupted: one was told to stop; the others have ended too.
    """
    running, told = list(started), []
    while running:
        time.sleep(0.2)
        for worker in [w for w in running if w.popen.poll() is not None]:
            running.remove(worker)
            status = worker.popen.returncode
            if status == 2:
                raise ConfigError(worker.last_line())
            if status == os.EX_TEMPFAIL:
                told.append(worker)
            elif status:
                died = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
                line = f"worker {worker.index} {died}; {len(running)} go on; see {worker.log}"
                print(line, file=sys.stderr, flush=True)
    if told:
        raise Interrupted(f"worker {told[0].index} was told to stop: {told[0].last_line()}")


@dataclass(frozen=True)
class Process:
    index: int
    popen: subprocess.Popen
    log: Path

    def last_line(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else f"worker {self.index} gave no reason"


@contextmanager
def workers(workdir: Path, count: int, *arguments: str, one_thread: bool = True) -> Iterator[list[Process]]:
    """So many worker processes on the workdir; all have ended when the block is left, however it is."""
    environment = dict(os.environ)
    if one_thread:
        for name, value in ONE_THREAD.items():
            before = environment.get(name, "") if name == "XLA_FLAGS" else ""
            environment[name] = f"{before} {value}".strip()
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    # Processes on one accelerator share its memory.
    environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{0.9 / count:.2f}")
    logs = workdir / "logs"
    logs.mkdir(exist_ok=True)
    started: list[Process] = []
    try:
        for index in range(count):
            log = logs / f"worker-{index}.log"
            command = [sys.executable, "-m", "medcg_jax.study.run.worker", str(workdir), str(os.getpid()), *arguments]
            with open(log, "ab") as out:
                popen = subprocess.Popen(
                    command, env=environment, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
                )
            started.append(Process(index, popen, log))
        yield started
    finally:
        for worker in started:
            if worker.popen.poll() is None:
                worker.popen.terminate()
        deadline = time.monotonic() + STOP_WAIT_S
        for worker in started:
            try:
                worker.popen.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.popen.kill()
                worker.popen.wait()


def summary(workdir: Path, plan: Plan, outcomes: dict[str, dict]) -> dict:
    """Prints what failed or is missing, writes the report; see `reproduce`."""
    failed, unfinished = {}, []
    for job in plan.jobs:
        outcome = outcomes.get(job.id)
        for cell in job.cells:
            if outcome is None:
                unfinished.append(cell.id)
            elif results.is_failure(outcome):
                failed[cell.id] = outcome["status"]
    for cell, why in failed.items():
        print(f"{cell}: {why}", file=sys.stderr)
    if unfinished:
        print(f"{len(unfinished)} cells are unfinished, as {unfinished[0]}; run the same again", file=sys.stderr)
    page, spent, parts = None, None, results.goodput_parts(workdir)
    if parts:
        spent = goodput.write(workdir / goodput.FILE, parts)
        print(goodput.line(spent))
    if len(failed) + len(unfinished) < len(plan.cells):
        print_effects(workdir)
        page = str(write_page(workdir))
        print(f"report: {page}", flush=True)
    return {"workdir": str(workdir), "cells": len(plan.cells), "failed": failed, "unfinished": unfinished,
            "page": page, "goodput": spent, "exit_status": 1 if failed or unfinished else 0}  # fmt: skip


def write_page(workdir: Path) -> Path:
    """Writes the report and returns its page; of processes that end together one does it for all."""
    from medcg_jax.study.report.page import write_report

    asked, page = time.time(), workdir / "report" / "index.html"
    with claims.lock(results.state_dir(workdir) / "claims", "report"):
        if page.is_file() and page.stat().st_mtime > asked:
            return page
        return write_report(workdir)


def print_effects(workdir: Path) -> None:
    """Prints the mean accuracy of every arm, and each difference between two with its interval; the page has the rest."""
    found = summarise(workdir)
    print(f"\n{'table':30} {'arm':15} accuracy      n")
    for arm in found["accuracy"]:
        if not arm["part"] or arm["table"] in PRINTED_BY_PART:
            print(f"{name_of(arm):30} {arm['arm']:15} {arm['accuracy']:8.3f} {arm['n']:6}")
    print(f"\n{'table':30} {'difference':31}   mean  95 % interval     rows above")
    for effect in found["effects"]:
        if not effect["part"] or effect["table"] in PRINTED_BY_PART:
            pair = f"{effect['arm']} - {effect['against']}"
            interval = f"[{effect['ci_low']:+.3f}, {effect['ci_high']:+.3f}]"
            print(
                f"{name_of(effect):30} {pair:31} {effect['mean']:+.3f}  {interval:16}  {effect['wins']} of {effect['rows']}"
            )


def name_of(line: dict) -> str:
    return " ".join(word for word in (line["table"], line["part"]) if word)


# ------------------------------------------------------------------ config.json


def write_config(run: RunConfig, workdir: Path, plan: Plan) -> None:
    """Writes config.json; where there is one already, checks that it is of the same grid.

    Raises:
      ConfigError: it is not, or cannot be read; the message names the first field that differs.
      DataError: the general records cannot be read, or are too few for the largest training.
    """
    if general := open_general(run.data):  # before anything is trained
        general.require(max(sum(count for _, count in job.training) for job in plan.jobs))
    new = {
        "config": dataclasses.asdict(run),
        "versions": versions(),
        "data": data_fingerprints(run),
        "cells": len(plan.cells),
    }
    new = json.loads(json.dumps(new))  # tuples as lists, as they come back from the file
    path = workdir / "config.json"
    if path.exists():
        check_same(results.read_config_file(workdir), new, workdir)
    for name in ("predictions", "metrics", "state/done", "state/claims", "state/progress"):
        (workdir / name).mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(new, indent=1) + "\n")


def data_fingerprints(run: RunConfig) -> dict[str, str]:
    """Seed -> fingerprint of its data: of boxes too where a table trains on them."""
    with_boxes = bool(set(run.study.tables) & set(BOX_TABLES))
    return {str(seed): data_fingerprint(seeded(run, seed), with_boxes=with_boxes) for seed in run.study.seeds}


def check_same(old: dict, new: dict, workdir: Path) -> None:
    """Raises ConfigError when two config.json are of different grids; prints a line when versions moved."""
    before, now, free = flat(old["config"]), flat(new["config"]), free_fields()
    for field in sorted(before.keys() | now.keys()):
        if field not in free and before.get(field) != now.get(field):
            raise ConfigError(
                f"{workdir} holds a grid with {field}={before.get(field)!r}, not {now.get(field)!r}: "
                "give another --workdir, or the value that it has"
            )
    if old["data"] != new["data"]:
        raise ConfigError(f"{workdir} holds a grid of other data (fingerprint {old['data']}, now {new['data']}): "
                          "give another --workdir")  # fmt: skip
    moved = [f"{k} {v} -> {new['versions'].get(k)}" for k, v in old["versions"].items() if new["versions"].get(k) != v]
    if moved:
        print(f"going on with other versions, so last digits may differ: {', '.join(moved)}", file=sys.stderr)
