"""Figures by target and by triplet: the paper's figure 4, each target's curves, the map of what was gained."""

from collections import defaultdict

import numpy as np
from matplotlib.patches import Rectangle

from medcg_jax.data.phantom.source import DETECTION_TRIPLETS
from medcg_jax.data.phantom.world import TRIPLETS
from medcg_jax.study.design import mat
from medcg_jax.study.report.escape import TICK_CHARACTERS, file_names, short_label
from medcg_jax.study.report.load_grid import arm_name
from medcg_jax.study.report.plots import BLUE, COLOURS, INK, MUTED, ORANGE, Figure, Plots, draw
from medcg_jax.study.report.text import PARTS, points

# Figure 4's arms in the paper's order, the base before them.
FIGURE_4 = ("baseline", "all_related", "all_unrelated", "wo_modality", "wo_area", "wo_task", "all_data")
# Whose gain the map shows, the first that the grid has: (table, arm, against).
GAINS = (
    ("pairs", "trained", "baseline_plus"), ("pairs", "trained", "baseline"), ("triples", "trained", "baseline_plus"),
    ("triples", "trained", "baseline"), ("detection_pairs", "trained", "baseline"),
    ("ablation", "all_related", "baseline"), ("multi_task", "multi_task", "baseline"),
)  # fmt: skip


def figure4(plots: Plots) -> list[Figure]:
    """A group of bars for each target, as the paper draws it."""
    rows = [(row, target, arms) for (row, target), arms in plots.grid.scores("ablation").items()]
    arms = [arm for arm in FIGURE_4 if any(arm in row[2] for row in rows)]
    if not rows or len(arms) < 2:
        return []
    caption = (
        "The paper's figure 4: accuracy on each target by what a model was trained on, the target itself always left "
        "out; 95 % Wilson intervals, dashed: chance."
    )
    height = 0.9 + len(rows) * (0.2 + 0.13 * len(arms))
    return [draw(plots.folder, "figure4", "By target", caption, height, lambda axes: plots.grouped(axes, rows, arms))]


def curves_by_target(plots: Plots) -> list[Figure]:
    """Efficiency: both curves of every target, where there are several."""
    by_target: dict[str, dict[str, dict[int, list]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for row in plots.grid.results:
        if row["table"] == "efficiency":
            by_target[row["target"]][row["row"].split("/")[0]][int(row["arm"].rsplit("_", 1)[1])].append(row)
    if len(by_target) < 2:
        return []

    files = file_names(by_target)

    def one(target: str, curves) -> Figure:
        counts = sorted({count for curve in curves.values() for count in curve})

        def paint(axes):
            for curve in (c for c in ("with_related", "target_only") if c in curves):
                scores = {count: plots.grid.score(rows) for count, rows in sorted(curves[curve].items())}
                x = [counts.index(count) for count in scores]
                low, mean, high = (
                    [100 * getattr(s, key) for s in scores.values()] for key in ("low", "accuracy", "high")
                )
                axes.fill_between(x, low, high, color=COLOURS[curve], alpha=0.16, linewidth=0)
                axes.plot(x, mean, "o-", color=COLOURS[curve], linewidth=1.6, markersize=4, label=PARTS[curve])
            chance = plots.grid.chance(target)
            if chance is not None:
                axes.axhline(100 * chance, color=INK, linestyle="--", linewidth=0.9)
            axes.set_xticks(range(len(counts)), [f"{count:,}" for count in counts])
            axes.set_xlabel("training records of the target")
            axes.set_ylabel("accuracy, %")
            axes.figure.legend(loc="outside lower left", ncols=2, handlelength=1.2, fontsize=7.5)

        what = plots.grid.describe(target) or target
        caption = f"{what}: accuracy with 95 % Wilson intervals; dashed: chance."
        return draw(plots.folder, f"efficiency_{files[target]}", what, caption, 2.6, paint, 3.4)

    return [one(target, curves) for target, curves in by_target.items()]


def triplet_map(plots: Plots) -> list[Figure]:
    """Modality by area and task: what was trained on, what was tested, and what Trained gained there."""
    triplets = triplets_of(plots)
    gains, against = gains_by_target(plots.summary)
    trained = {name for cell in plots.grid.done() for name in cell["related"].split("+") if name}
    known = {name: triplets[name] for name in (*gains, *sorted(trained)) if name in triplets}
    if not known or not gains:
        return []
    modalities = sorted({m for m, _, _ in known.values()})
    columns = sorted({(task, area) for _, area, task in known.values()})
    most = max(0.01, *(abs(value) for value in gains.values()))

    def paint(axes):
        for (modality, area, task), names in _by_triplet(known).items():
            x, y = columns.index((task, area)), len(modalities) - 1 - modalities.index(modality)
            tested = [gains[name] for name in names if name in gains]
            if tested:
                gain = float(np.mean(tested))
                shade = BLUE if gain >= 0 else ORANGE
                alpha = 0.12 + 0.6 * abs(gain) / most
                axes.add_patch(Rectangle((x, y), 1, 1, facecolor=shade, alpha=alpha, linewidth=0))
                axes.text(x + 0.5, y + 0.5, points(gain, True), ha="center", va="center", fontsize=7)
            else:
                axes.add_patch(Rectangle((x, y), 1, 1, fill=False, hatch="////", edgecolor=MUTED, linewidth=0))
        tasks = [task for task, _ in columns]
        for place in range(1, len(columns)):
            if tasks[place] != tasks[place - 1]:
                axes.axvline(place, color=INK, linewidth=1)
        for task in dict.fromkeys(tasks):
            name = short_label(task, TICK_CHARACTERS)
            axes.text(tasks.index(task) + 0.05, len(modalities) + 0.08, name, fontsize=8, va="bottom")
        axes.set_xlim(0, len(columns))
        axes.set_ylim(0, len(modalities))
        areas = [short_label(area, TICK_CHARACTERS) for _, area in columns]
        names = [short_label(name, TICK_CHARACTERS) for name in modalities[::-1]]
        axes.set_xticks(np.arange(len(columns)) + 0.5, areas, rotation=90, fontsize=7)
        axes.set_yticks(np.arange(len(modalities)) + 0.5, names, fontsize=8)
        axes.grid(False)

    arm, other = against
    caption = (
        f"Modality by area, tasks side by side. Numbers: points of accuracy that {arm} gained over {other} on "
        "a target, averaged over its rows and seeds (blue: above 0, orange: below). Hatched: trained on in some cell, "
        "and no target of this comparison. Blank: neither."
    )
    width, height = max(5.2, 1.4 + 0.42 * len(columns)), 1.5 + 0.3 * len(modalities)
    return [draw(plots.folder, "map", "What was trained on, and what was gained", caption, height, paint, width)]


def triplets_of(plots: Plots) -> dict[str, tuple[str, str, str]]:
    """Subset -> (modality, area, Task element)."""
    if plots.grid.of_phantoms:
        return {t.name: (t.modality, t.area, t.task) for t in (*TRIPLETS, *DETECTION_TRIPLETS)}
    found = plots.grid.triplets.items()
    return {name: (modality, area, mat.task_elements(task)[0]) for name, (modality, area, task) in found}


def gains_by_target(summary: dict) -> tuple[dict[str, float], tuple[str, str]]:
    """(target -> mean gain, (arm, against) for people) of the first comparison of `GAINS` that the grid has."""
    for table, arm, against in GAINS:
        rows = [r for r in summary["rows"] if (r["table"], r["arm"], r["against"]) == (table, arm, against)]
        if rows:
            by_target = defaultdict(list)
            for row in rows:
                by_target[row["target"]].append(row["difference"])
            return {t: float(np.mean(v)) for t, v in by_target.items()}, (arm_name(arm), arm_name(against))
    return {}, ("", "")


def _by_triplet(known: dict[str, tuple[str, str, str]]) -> dict[tuple[str, str, str], list[str]]:
    found = defaultdict(list)
    for name, triplet in known.items():
        found[triplet].append(name)
    return found
