"""`medcg reproduce`: a whole grid from one call; called again, it goes on where it stopped.

`worker.Worker` does the work: in this process with `study.jobs` 1, else in that many processes, which share the workdir
through claims. This process expands the grid, starts the workers, shows their progress, and writes the tables.

A grid of several models (`study.models`) has a folder WORKDIR/MODEL for each, like that of a grid of one model, and a
page of all models in WORKDIR/report.
"""

import dataclasses
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from medcg_jax import processes
from medcg_jax.agreement import commit, data_fingerprint, versions
from medcg_jax.config import BOX_TABLES, ConfigError, Interrupted, RunConfig, flat, free_fields
from medcg_jax.data.general import open_general
from medcg_jax.families.weights.kind import check_weights
from medcg_jax.files import write_whole
from medcg_jax.study.design.schedule import Plan, make_plan, seeded
from medcg_jax.study.design.suite import short_of_records
from medcg_jax.study.run import claims
from medcg_jax.study.run.progress import Progress
from medcg_jax.study.stats import contamination, probe, results
from medcg_jax.train import goodput
from medcg_jax.train.preempt import sigterm_saves

if TYPE_CHECKING:
    from medcg_jax.study.report.load_grid import Grid

# XLA with one CPU thread, for processes that share the cores of one machine; no effect on accelerators.
ONE_THREAD = {"NPROC": "1", "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}
# Time to save what is under way; schedulers give 30 s and more after a SIGTERM.
STOP_WAIT_S = 60.0
# Exit status of a worker whose memory does not suffice, as of `medcg` itself.
OUT_OF_MEMORY = 3
# Names of the first process's broadcasts: whether there is work, and in the end the result.
BEGUN, REPORTED = "the grid's work", "the grid's result"
# Tables whose parts answer different questions: printed part by part.
PRINTED_BY_PART = ("multi_task", "efficiency")


def reproduce(run: RunConfig, workdir: str | Path) -> dict:
    """Trains and scores every cell of the grid that is not done yet, then writes the report.

    Returns {"workdir", "cells", "failed": {cell: why}, "unfinished": [cell], "page", "goodput", "exit_status"}: 1 where
    a cell failed or is unfinished, else 0; "goodput" (None where no process wrote its times) is of all processes
    together, as in `goodput.json`. For `study.models`: {"workdir", "models": {model: the same}, "page",
    "exit_status"}.

    Raises:
      ConfigError: the workdir holds a grid of another configuration, or the configuration cannot be used.
      Interrupted: the process was asked to stop; unfinished work is saved, its claims are released.
    """
    from medcg_jax.train.start import with_checkpoint

    workdir, run = Path(workdir), with_checkpoint(run)
    plan = make_plan(run)
    folders = {model: workdir / model if run.study.models else workdir for model in plan.runs}
    for model_run in plan.runs.values():
        check_start(model_run)
    if run.study.probe and all(job.steps for job in plan.jobs):
        raise ConfigError("study.probe=True: no cell tests the base, which is what is probed; add the arm baseline")
    if processes.count() > 1:
        if run.study.models:
            raise ConfigError(f"study.models={run.study.models}: expected () where processes share one run")
        if run.study.jobs > 1:
            raise ConfigError(
                f"study.jobs={run.study.jobs}: expected 1 where {processes.count()} processes share one run"
            )
    if not processes.is_first():
        return follow(folders, plan)
    plans = {model: plan.of(model) for model in folders}
    for model, folder in folders.items():
        write_config(plan.runs[model], folder, plans[model])
    tables = {m: results.Tables(folders[m], model_plan.cells, model_plan.jobs) for m, model_plan in plans.items()}
    done = {model: results.done_jobs(folder) for model, folder in folders.items()}
    left = [job for job in plan.jobs if job.id not in done[job.model]]
    print(f"{len(plan.cells)} cells in {len(plan.jobs)} jobs, {len(left)} to do; workdir {workdir}", flush=True)
    processes.broadcast(BEGUN, lambda: bool(left))
    bases = missing_bases(plan, folders, {(job.model, job.seed) for job in left})
    restarted = any(results.goodput_parts(folder) for folder in folders.values())
    with sigterm_saves(), Progress(folders, plan, bases, lambda model, outcomes: tables[model].write(outcomes)):
        if left:
            work(run, workdir, folders, plan, bool(bases), restarted)
    summaries = {}
    for model, folder in folders.items():
        outcomes = results.all_outcomes(folder, plans[model].jobs)
        tables[model].write(outcomes)
        contamination.join(folder, plans[model])
        probe.join(folder, plans[model])
        if run.study.models:
            print(f"-- {model}")
        summaries[model] = summary(folder, plans[model], outcomes)
    result = models_summary(workdir, summaries) if run.study.models else summaries.popitem()[1]
    return processes.broadcast(REPORTED, lambda: result)


def models_summary(workdir: Path, summaries: Mapping[str, dict]) -> dict:
    """The result of a grid of several models; writes their common page."""
    from medcg_jax.study.report.compare import models_in, write_models_page

    page = None
    if any(model["page"] for model in summaries.values()):
        page = str(write_models_page(workdir, models_in(workdir)))
        print(f"report: {page}", flush=True)
    status = max(model["exit_status"] for model in summaries.values())
    return {"workdir": str(workdir), "models": dict(summaries), "page": page, "exit_status": status}


def follow(folders: Mapping[str, Path], plan: Plan) -> dict:
    """`reproduce` on all but the first process of one run: they share the work, and write nothing."""
    with sigterm_saves():
        if processes.broadcast(BEGUN):
            from medcg_jax.study.run.worker import Worker

            Worker(folders, plan).run()
        return processes.broadcast(REPORTED)


def check_start(run: RunConfig) -> None:
    """Raises ConfigError, before anything is allocated, when weights are missing or a grid cannot use a value."""
    check_weights(run.model)
    if run.log.profile_steps:
        raise ConfigError(
            f"log.profile_steps={run.log.profile_steps!r}: expected '' in `medcg reproduce`; `medcg train` takes others"
        )
    if run.log.wandb:
        from medcg_jax.train.log import load_wandb

        load_wandb()
    if not run.study.cells_at_once:
        raise ConfigError("study.cells_at_once=0: `medcg reproduce` alone accepts it, and finds how many cells fit")


def missing_bases(plan: Plan, folders: Mapping[str, Path], keys: set[tuple[str, int]]) -> dict[tuple[str, int], int]:
    """(model, seed) of `keys` -> steps of its base, where the base is not trained yet."""
    from medcg_jax.study.run.bases import base_path, is_ready

    return {
        (model, seed): plan.runs[model].base.steps
        for model, seed in sorted(keys)
        if not is_ready(base_path(plan.runs[model], folders[model], seed))
    }


def work(
    run: RunConfig, workdir: Path, folders: Mapping[str, Path], plan: Plan, needs_bases: bool, restarted: bool
) -> None:
    """Does the remaining work, here or in `study.jobs` processes. restarted: whether the grid was started before."""
    if run.study.jobs == 1:
        from medcg_jax.study.run.worker import Worker

        Worker(folders, plan, restarted=restarted).run()
        return
    from medcg_jax.train.start import weights_dir

    for model_run in plan.runs.values():  # before the workers, which would all fetch them
        weights_dir(model_run.model)
    arguments = [*map(str, folders.values()), *(["--restarted"] if restarted else [])]
    if needs_bases and len(plan.runs) * len(run.study.seeds) < run.study.jobs:
        # Most processes would wait for the bases: one process with all cores is faster.
        with workers(workdir, 1, *arguments, "--bases_only", one_thread=False) as started:
            watch(started)
    with workers(workdir, run.study.jobs, *arguments) as started:
        watch(started)


def watch(started: "Sequence[Process]") -> None:
    """Waits for the workers; prints a line when one dies.

    Raises:
      ConfigError: a worker refused the configuration.
      Interrupted: a worker was asked to stop; all have ended.
    """
    running, stopped = list(started), []
    while running:
        time.sleep(0.2)
        for worker in [w for w in running if w.popen.poll() is not None]:
            running.remove(worker)
            status = worker.popen.returncode
            if status == 2:
                raise ConfigError(worker.last_line())
            if status == os.EX_TEMPFAIL:
                stopped.append(worker)
            elif status:
                died = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
                why = f": {worker.last_line()}" if status == OUT_OF_MEMORY else ""
                line = f"worker {worker.index} {died}{why}; {len(running)} go on; see {worker.log}"
                print(line, file=sys.stderr, flush=True)
    if stopped:
        raise Interrupted(f"worker {stopped[0].index} was told to stop: {stopped[0].last_line()}")


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
    """`count` worker processes with these arguments; leaving the block, also by an error, ends them all."""
    environment = dict(os.environ)
    if one_thread:
        for name, value in ONE_THREAD.items():
            before = environment.get(name, "") if name == "XLA_FLAGS" else ""
            environment[name] = f"{before} {value}".strip()
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    # Processes share the memory of one accelerator.
    environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{0.9 / count:.2f}")
    logs = workdir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    started: list[Process] = []
    try:
        for index in range(count):
            log = logs / f"worker-{index}.log"
            command = [sys.executable, "-m", "medcg_jax.study.run.worker", str(os.getpid()), *arguments]
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
    """Prints failed and unfinished cells, writes the report; returns one model's result of `reproduce`."""
    from medcg_jax.study.report.boards import write_boards

    failed, unfinished = {}, []
    for job in plan.jobs:
        outcome = outcomes.get(job.id)
        for cell in job.cells:
            if outcome is None:
                unfinished.append(cell.id)
            elif results.is_failure(outcome):
                failed[cell.id] = outcome["status"]
    for cell_id, status in failed.items():
        print(f"{cell_id}: {status}", file=sys.stderr)
    if unfinished:
        print(f"{len(unfinished)} cells are unfinished, as {unfinished[0]}; run the same again", file=sys.stderr)
    page, times = None, None
    if starts := results.goodput_parts(workdir):
        times = goodput.write(workdir / goodput.FILE, starts)
        print(goodput.line(times))
    if len(failed) + len(unfinished) < len(plan.cells):
        grid = write_page(workdir)
        page = str(grid.workdir / "report" / "index.html")
        print(f"report: {page}", flush=True)
        # Processes that end together write one after the other.
        with claims.lock(results.state_dir(workdir) / "claims", "boards"):
            write_boards(grid)
    return {
        "workdir": str(workdir),
        "cells": len(plan.cells),
        "failed": failed,
        "unfinished": unfinished,
        "page": page,
        "goodput": times,
        "exit_status": 1 if failed or unfinished else 0,
    }


def write_page(workdir: Path) -> "Grid":
    """Prints the effects, writes the report and returns the grid of both; of processes that end together only one
    writes."""
    from medcg_jax.study.report.load_grid import Grid
    from medcg_jax.study.report.page import write_page as write

    began, page = time.time(), workdir / "report" / "index.html"
    with claims.lock(results.state_dir(workdir) / "claims", "report"):
        grid = Grid(workdir)
        print_effects(grid.summary)
        if not page.is_file() or page.stat().st_mtime <= began:
            write(grid)
    return grid


def print_effects(summarised: dict) -> None:
    """Prints the mean accuracy of every arm, and the differences between arms with their intervals.

    summarised: of `stats.summarise`.
    """
    print(f"\n{'table':30} {'arm':31} accuracy      n")
    for arm in summarised["accuracy"]:
        if not arm["part"] or arm["table"] in PRINTED_BY_PART:
            print(f"{name_of(arm):30} {arm['arm']:31} {arm['accuracy']:8.3f} {arm['n']:6}")
    print(f"\n{'table':30} {'difference':31}   mean  95 % interval     rows above")
    for effect in summarised["effects"]:
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
    """Writes config.json; an existing one must be of the same grid.

    Raises:
      ConfigError: it is of another grid, or cannot be read; the message names the first field that differs.
      DataError: the general records cannot be read, or are too few for the largest training.
    """
    if general := open_general(run.data):  # before anything is trained
        general.require(max(sum(count for _, count in job.training) for job in plan.jobs))
    new = {
        "config": dataclasses.asdict(run),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "data": data_fingerprints(run),
        "cells": len(plan.cells),
        "short": short_of_records(plan.cells),
    }
    new = json.loads(json.dumps(new))  # tuples as lists, as they come back from the file
    path = workdir / "config.json"
    if path.exists():
        old = results.read_config_file(workdir)
        check_same(old, new, workdir)
        new["date"] = old["date"] or new["date"]  # of the first start
    for name in ("predictions", "metrics", "state/done", "state/claims", "state/progress"):
        (workdir / name).mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(new, indent=1) + "\n")


def data_fingerprints(run: RunConfig) -> dict[str, str]:
    """Seed -> fingerprint of its data, boxes included where a table trains on them."""
    with_boxes = bool(set(run.study.tables) & set(BOX_TABLES))
    return {str(seed): data_fingerprint(seeded(run, seed), with_boxes=with_boxes) for seed in run.study.seeds}


def check_same(old: dict, new: dict, workdir: Path) -> None:
    """Raises ConfigError when two config.json are of different grids; prints a line when versions differ."""
    before, now, free = flat(old["config"]), flat(new["config"]), free_fields()
    for field in sorted(before.keys() | now.keys()):
        if field not in free and before.get(field) != now.get(field):
            raise ConfigError(
                f"{workdir} holds a grid with {field}={before.get(field)!r}, not {now.get(field)!r}: "
                "give another --workdir, or the value that it has"
            )
    if old["data"] != new["data"]:
        raise ConfigError(
            f"{workdir} holds a grid of other data (fingerprint {old['data']}, now {new['data']}): "
            "give another --workdir"
        )
    changed = [
        f"{k} {v} -> {new['versions'].get(k)}" for k, v in old["versions"].items() if new["versions"].get(k) != v
    ]
    if old.get("commit", "") not in ("", new.get("commit")):
        changed.append(f"commit {old['commit']} -> {new['commit'] or 'of no checkout'}")
    if changed:
        print(f"going on with other versions, so last digits may differ: {', '.join(changed)}", file=sys.stderr)
