"""The same grid with several models: one workdir for each below the grid's own, and all of them on one page.

WORKDIR/MODEL/...            what `grid.reproduce` leaves
WORKDIR/logs/MODEL.log       what it printed
WORKDIR/bases/               the models' bases
WORKDIR/report/index.html    the models side by side (`report_backbones`)
"""

import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

from medcg_jax.config import BOX_TABLES, MODELS, ConfigError, Interrupted, RunConfig, parts_of, replace
from medcg_jax.config_file import with_flags
from medcg_jax.study.design.suite import DETECTION_TABLES
from medcg_jax.study.report.backbones import models_in, write_page
from medcg_jax.study.run import grid
from medcg_jax.train.preempt import sigterm_saves


def model_run(run: RunConfig, model: str) -> RunConfig:
    """The run of one of the study's models; its cells are done one after another.

    Tables that train on boxes are left out for a model that gives none, and parts that it does not have.

    Raises:
      ConfigError: what `study.model_flags` sets for it cannot be used.
    """
    family = MODELS[model]
    tables = tuple(t for t in run.study.tables if t not in BOX_TABLES or family in DETECTION_TABLES)
    own = dict(study__models=(), study__jobs=1, study__tables=tables)
    parts = parts_of(family, run.model.trainable, lora_rank=run.model.lora_rank)
    flags = run.study.model_flags.get(model, ())
    found = replace(
        run, name=f"{run.name}_{model}", model__name=model, model__trainable=parts, study__model_flags={}, **own
    )
    return with_flags(found, dict(flag.split("=", 1) if "=" in flag else (flag, "") for flag in flags))


def reproduce_models(run: RunConfig, workdir: str | Path) -> dict:
    """`grid.reproduce` for every model, `study.jobs` of them at a time in processes of their own, then the page.

    A process that no model is left for works on the cells of those that others are at.

    Returns {"workdir", "models": {name: `grid.reproduce`'s result}, "page", "exit_status"}.

    Raises:
      ConfigError: a model's grid cannot be run; nothing is started then.
    """
    workdir = Path(workdir)
    runs = {model: model_run(run, model) for model in run.study.models}
    for one in runs.values():
        grid.make_plan(one)
        grid.check_start(one)
    (workdir / "logs").mkdir(parents=True, exist_ok=True)
    with sigterm_saves():
        found = dict(_each(runs, workdir, run.study.jobs))
    page = None
    if any(result["page"] for result in found.values()):
        page = str(write_page(workdir, models_in(workdir)))
        print(f"report: {page}", flush=True)
    status = max(result["exit_status"] for result in found.values())
    return {"workdir": str(workdir), "models": found, "page": page, "exit_status": status}


def _each(runs: dict[str, RunConfig], workdir: Path, jobs: int):
    """(model, result) of every model, as they end."""
    before = {name: os.environ.get(name) for name in grid.ONE_THREAD}
    if jobs > 1:
        # Read when a process first uses XLA: the pool's processes are started with it.
        flags = f"{before['XLA_FLAGS'] or ''} {grid.ONE_THREAD['XLA_FLAGS']}".strip()
        os.environ.update(grid.ONE_THREAD | {"XLA_FLAGS": flags})
    started = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(jobs, mp_context=started, max_tasks_per_child=1) as pool, _ended_together(pool):
            asked = {pool.submit(_one, one, workdir, os.getpid()): model for model, one in runs.items()}
            joined = [pool.submit(_join, runs, workdir, os.getpid()) for _ in range(jobs - 1)]
            for future in as_completed(asked):
                model, result = asked[future], future.result()
                print(_line(model, result, len(runs)), flush=True)
                yield model, result
            for future in joined:
                future.result()
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


@contextmanager
def _ended_together(pool: ProcessPoolExecutor) -> Iterator[None]:
    """Where this process or one of the pool's is told to stop, tells all of the pool's, and starts no other."""
    try:
        yield
    except Interrupted:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():
            child.terminate()
        raise


def _one(run: RunConfig, workdir: Path, parent: int) -> dict:
    """One model's grid, in a process of its own whose output goes to the model's log."""
    _begin(workdir / "logs" / f"{run.model.name}.log", parent)
    try:
        return grid.reproduce(run, workdir / run.model.name)
    except ConfigError as error:
        print(error, flush=True)
        return {"workdir": str(workdir), "cells": 0, "failed": {}, "unfinished": [], "page": None, "exit_status": 2,
                "error": str(error)}  # fmt: skip


def _join(runs: dict[str, RunConfig], workdir: Path, parent: int) -> None:
    """Works on the cells of every model that is not done, in a process of its own."""
    from medcg_jax.study.run.worker import Worker

    _begin(workdir / "logs" / "joined.log", parent)
    with sigterm_saves():
        for model, run in runs.items():
            if (workdir / model / "config.json").is_file():  # else it was refused
                Worker(run, workdir / model, grid.make_plan(run), again=False).run()


def _begin(log: Path, parent: int) -> None:
    """Sends this process's output to its log, and ends it with its parent."""
    from medcg_jax.platform import keep_freed_memory
    from medcg_jax.study.run.worker import end_with

    end_with(parent)
    keep_freed_memory()
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(out, stream.fileno())


def _line(model: str, result: dict, num: int) -> str:
    state = result.get("error") or f"{result['cells'] - len(result['failed']) - len(result['unfinished'])} cells done"
    return f"{model} ({num} models): {state}"
