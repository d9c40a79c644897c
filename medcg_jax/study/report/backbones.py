"""The page that shows several models' grids side by side, from the files of each."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from medcg_jax.config import MODELS
from medcg_jax.study.report import boxes as report_boxes
from medcg_jax.study.report.load_grid import Grid, Score, arm_name
from medcg_jax.study.report.page import page_template, whole_folder, write_text
from medcg_jax.study.report.plots import COLOURS, INK, Figure, draw
from medcg_jax.study.report.tables import Column, Table, shown
from medcg_jax.study.report.text import PARTS
from medcg_jax.study.stats import stats


def write_page(workdir: Path, models: Sequence[str]) -> Path:
    """Writes `report/index.html` in `workdir`, with its table and plots beside it; returns the page's path.

    models: folders of `workdir` with a grid each.

    Raises:
      FileNotFoundError: one is not the workdir of a grid.
      FileError: a file of one is broken.
    """
    grids = {model: Grid(workdir / model) for model in models}
    with whole_folder(workdir / "report") as folder:
        _write(folder, grids)
    return workdir / "report" / "index.html"


def _write(folder: Path, grids: dict[str, Grid]) -> None:
    (folder / "plots").mkdir()
    (folder / "tables").mkdir()
    rows = [row for model, grid in grids.items() for row in rows_of(model, grid)]
    write_text(folder / "tables" / "models.csv", as_csv(rows))
    boxes = [
        {"title": one.title, "name": one.name, "table": one}
        for part in ("in_distribution", "out_of_distribution")
        if (one := joined({model: report_boxes.of_part(grid, part) for model, grid in grids.items()})).rows
    ]
    for part in boxes:
        write_text(folder / "tables" / f"{part['name']}.csv", part["table"].csv())
    groups = list(dict.fromkeys((row["table"], row["part"]) for row in rows))
    parts = [
        {"title": title(*group), "rows": own, "figure": bars(folder / "plots", group, own)}
        for group in groups
        if (own := [row for row in rows if (row["table"], row["part"]) == group])
    ]
    first = next(iter(grids.values()))
    text = page_template("backbones.html.j2").render(
        models=list(grids), parts=parts, boxes=boxes, shown=shown, phantoms=first.of_phantoms,
        versions=first.run["versions"], arm_name=arm_name,
    )  # fmt: skip
    write_text(folder / "index.html", text)


def models_in(workdir: Path) -> list[str]:
    """The models whose grids lie in `workdir`, in the order of `MODELS`; [] where it is one grid's own."""
    if (workdir / "config.json").is_file():
        return []
    return [model for model in MODELS if (workdir / model / "report" / "index.html").is_file()]


def rows_of(model: str, grid: Grid) -> list[dict]:
    """A row for each table, part and arm of one model's grid: accuracy over all its test answers, and chance."""
    grouped: dict[tuple[str, str, str], list[dict]] = {}
    for result in grid.results:
        key = (result["table"], stats.part_of(result["table"], result["row"]), result["arm"])
        grouped.setdefault(key, []).append(result)
    return [
        {"model": model, "table": table, "part": part, "arm": arm, "score": pooled(results),
         "chance": mean([grid.chance(result["target"]) for result in results])}
        for (table, part, arm), results in grouped.items()
    ]  # fmt: skip


def pooled(results: Sequence[dict]) -> Score:
    n, correct = sum(r["n"] for r in results), sum(r["correct"] for r in results)
    return Score(correct / n if n else 0.0, *stats.wilson(correct, n), n, tuple(sorted({r["seed"] for r in results})))


def mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def title(table: str, part: str) -> str:
    """Such as "Multi-task: in distribution"."""
    name = table.replace("_", "-").capitalize()
    return f"{name}: {PARTS.get(part, part)}" if part else name


def bars(folder: Path, group: tuple[str, str], rows: Sequence[dict]) -> Figure:
    """Accuracy of every arm and model, with Wilson intervals; a line at chance."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    height = 0.8 / len(arms)

    def paint(axes):
        for row in rows:
            y = len(models) - 1 - models.index(row["model"]) + height * ((len(arms) - 1) / 2 - arms.index(row["arm"]))
            score, colour = row["score"], COLOURS[row["arm"]]
            label = arm_name(row["arm"]) if row["model"] == models[0] else None
            spread = [[100 * (score.accuracy - score.low)], [100 * (score.high - score.accuracy)]]
            axes.barh(y, 100 * score.accuracy, height, color=colour, label=label)
            axes.errorbar(100 * score.accuracy, y, xerr=spread, color=INK, linewidth=1, capsize=2)
        chance = mean([row["chance"] for row in rows])
        if chance is not None:
            axes.axvline(100 * chance, color=INK, linestyle="--", linewidth=0.9)
        axes.set_yticks(range(len(models)), models[::-1])
        axes.set_xlim(0, 100)
        axes.set_xlabel("accuracy, %")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))

    name = "_".join(word for word in group if word)
    caption = "Accuracy by model with 95 % Wilson intervals over all test answers; the dashed line is chance."
    return draw(folder, name, title(*group), caption, 1.2 + 0.42 * len(models) * max(1, len(arms) / 2), paint)


def joined(tables: dict[str, Table]) -> Table:
    """One table of the sums over all subsets (`report_boxes.ALL`) of each model's, with a column for the model."""
    first = next(iter(tables.values()))
    columns = [Column("model", "Model"), *(c for c in first.columns if c.key not in ("target", "what"))]
    made = Table(first.name, first.title, first.caption, columns)
    for model, table in tables.items():
        for row in table.rows:
            if row["target"] == report_boxes.ALL:
                made.add(row | {"model": model})
    return made


def as_csv(rows: Sequence[dict]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["model", "table", "part", "arm", "n", "accuracy", "ci_low", "ci_high", "chance"])
    for row in rows:
        s = row["score"]
        chance = "" if row["chance"] is None else f"{row['chance']:.6f}"
        numbers = [f"{value:.6f}" for value in (s.accuracy, s.low, s.high)]
        writer.writerow([row["model"], row["table"], row["part"], row["arm"], s.n, *numbers, chance])
    return out.getvalue()
