"""A grid in TensorBoard and in Weights & Biases, from the files in its workdir: losses, accuracies and effects."""

import secrets
import shutil
from collections.abc import Mapping
from typing import Any

from medcg_jax.config import flat
from medcg_jax.study.report.escape import one_line
from medcg_jax.study.report.load_grid import Grid
from medcg_jax.study.report.text import Answer, effect_name, summary_text
from medcg_jax.study.stats.grid_files import training_of
from medcg_jax.train.log import WandbLog, WandbTarget

FOLDER = "tensorboard"
# Columns of results.csv that a table in Weights & Biases has.
COLUMNS = ("table", "row", "arm", "seed", "target", "n", "correct", "accuracy", "ci_low", "ci_high")


def write_boards(grid: Grid) -> None:
    """Writes what `log.tensorboard` and `log.wandb` of the grid's configuration ask for.

    WORKDIR/tensorboard is written anew, and the grid's run in Weights & Biases is the same one after a restart.
    """
    log = grid.config.get("log", {})
    if not log.get("tensorboard") and not log.get("wandb"):
        return
    answer = Answer(grid, grid.summary)
    if log.get("tensorboard"):
        write_tensorboard(grid, answer)
    if log.get("wandb"):
        send_to_wandb(grid, answer, log["wandb"])


def values_of(grid: Grid, answer: Answer) -> dict[str, float]:
    """Accuracies of arms, and differences with the ends of their intervals, as fractions; and cells by their state."""
    values: dict[str, float] = {
        "cells/done": len(grid.done()),
        "cells/failed": len(grid.failed()),
        "cells/waiting": len(grid.waiting()),
    }
    for entry in answer.summary["accuracy"]:
        values["accuracy/" + "/".join(filter(None, (entry["table"], entry["part"], entry["arm"])))] = entry["accuracy"]
    for effect in answer.summary["effects"]:
        for key in ("mean", "ci_low", "ci_high", "p_overall"):
            if effect[key] is not None:
                values[f"effect/{effect_name(effect)}/{key}"] = effect[key]
    return values


def losses_of(grid: Grid) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """ "pairs/trained" -> "ROW seed 0" -> (step, loss) of each training, which counts once."""
    losses: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for cell in {(c["table"], c["arm"], training_of(c)): c for c in reversed(grid.done())}.values():
        lines = [(m["step"], m["loss"]) for m in grid.metrics(cell) if m.get("loss") is not None]
        if lines:
            runs = losses.setdefault(f"{cell['table']}/{cell['arm']}", {})
            runs[f"{cell['row']} seed {cell['seed']}"] = lines
    return losses


def write_tensorboard(grid: Grid, answer: Answer) -> None:
    """A run for each arm with the losses of its trainings, and one named "grid" with accuracies, effects and the text."""
    from tensorboardX import SummaryWriter

    folder = grid.workdir / FOLDER
    draft = folder.with_name(f".{FOLDER}.{secrets.token_hex(6)}")
    try:
        for arm, runs in losses_of(grid).items():
            with SummaryWriter(str(draft / arm)) as board:
                for name, lines in runs.items():
                    for step, loss in lines:
                        board.add_scalar(f"loss/{one_line(name)}", loss, step)
        with SummaryWriter(str(draft / "grid")) as board:
            for name, value in values_of(grid, answer).items():
                board.add_scalar(one_line(name), value, 0)
            board.add_text("summary", summary_text(grid, answer, []), 0)
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def send_to_wandb(grid: Grid, answer: Answer, project: str) -> None:
    """One run: the configuration, the values as its summary, and the tables of results and effects."""
    config: dict[str, Any] = flat(grid.config) | {key: grid.run[key] for key in ("commit", "date")}
    run = WandbLog(WandbTarget(project, grid.config["name"], grid.workdir, config))
    try:
        run.conclude(values_of(grid, answer), tables_of(grid, answer))
    finally:
        run.close()


def tables_of(grid: Grid, answer: Answer) -> Mapping[str, tuple[list[str], list[list]]]:
    """Name -> (columns, rows)."""
    keys = ("mean", "ci_low", "ci_high", "p_overall", "n", "targets", "seeds")
    effects = [[effect_name(effect), *(effect[key] for key in keys)] for effect in answer.summary["effects"]]
    results = [[row[key] for key in COLUMNS] for row in grid.results]
    return {"results": (list(COLUMNS), results), "effects": (["difference", *keys], effects)}
