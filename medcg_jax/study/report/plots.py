"""Figures of a grid: differences, bars, points and the map of triplets. `curves` has those over numbers."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.patches import Rectangle

from medcg_jax.config import NUMBERED_ARMS
from medcg_jax.data.phantom.source import DETECTION_TRIPLETS
from medcg_jax.data.phantom.world import TRIPLETS
from medcg_jax.study.design import mat
from medcg_jax.study.report.drawing import (
    BLUE,
    COLOURS,
    GREY,
    INK,
    MUTED,
    ORANGE,
    RED,
    WIDTH_IN,
    Figure,
    beside,
    colour_of,
    draw,
    legend,
    percent_axis,
)
from medcg_jax.study.report.escape import TICK_CHARACTERS, short_label
from medcg_jax.study.report.load_grid import Grid, Score, arm_name
from medcg_jax.study.report.table import points
from medcg_jax.study.report.text import PARTS, effect_name, interval, state
from medcg_jax.study.stats.paired import Unit, estimate, mean_difference

# Comparisons that only the table below the headline figure shows.
MINOR_EFFECTS = (
    ("pairs", "baseline_plus", "baseline"), ("ablation", "all_related", "baseline"),
    ("ablation", "all_related", "all_data"),
)  # fmt: skip
# Part of multi-task -> its comparison in the headline figure.
MULTI_TASK_EFFECTS = {
    "in_distribution": ("multi_task", "single_task"),
    "out_of_distribution": ("multi_task", "baseline"),
}
# Arms of an ablation from the most data to the least.
ABLATION_ORDER = (
    "all_data", "all_related", "random_removal", "random_removal_modality", "wo_modality", "random_removal_area",
    "wo_area", "random_removal_task", "wo_task", "same_task", "all_unrelated", "baseline",
)  # fmt: skip
# Arms of pairs and triples in the order of their bars.
BAR_ARMS = (
    "baseline", "baseline_plus", "words_only", "no_images", "single_1", "single_2", "single_3", "filler_1", "filler_2",
    "filler_3", "trained",
)  # fmt: skip
# Figure 4's arms in the paper's order, the base before them.
FIGURE_4 = ("baseline", "all_related", "all_unrelated", "wo_modality", "wo_area", "wo_task", "all_data")
# (table, arm, against) of the gains on the map: the first that the grid has.
GAINS = (
    ("pairs", "trained", "baseline_plus"), ("pairs", "trained", "baseline"), ("triples", "trained", "baseline_plus"),
    ("triples", "trained", "baseline"), ("detection_pairs", "trained", "baseline"),
    ("ablation", "all_related", "baseline"), ("multi_task", "multi_task", "baseline"),
)  # fmt: skip


class Plots:
    """Draws the figures of one grid into a folder; a method gives [] where the grid lacks the data."""

    def __init__(self, grid: Grid, summary: dict, folder: Path):
        self.grid, self.summary, self.folder = grid, summary, folder

    def draw(
        self, name: str, title: str, caption: str, height_in: float, paint: Callable, width_in: float = WIDTH_IN
    ) -> Figure:
        return draw(self.folder, name, title, caption, height_in, paint, width_in)

    def headline(self) -> list[Figure]:
        """Every main difference with its interval; targets as dots."""
        effects = [effect for effect in self.summary["effects"] if is_main(effect)]
        if not effects:
            return []

        def paint(axes):
            numbers = {"transform": axes.get_yaxis_transform(), "fontsize": 8, "va": "center"}
            for y, effect in enumerate(reversed(effects)):
                shown = state(effect)
                colour = {"up": BLUE, "down": RED, "open": GREY}[shown]
                targets = [100 * value for value in effect["by_target"].values()]
                axes.plot(targets, [y] * len(targets), "o", color=colour, alpha=0.28, markersize=3.2, markeredgewidth=0)
                low, mean, high = (100 * effect[key] for key in ("ci_low", "mean", "ci_high"))
                axes.plot([low, high], [y, y], color=colour, linewidth=2.2, solid_capstyle="butt")
                fill = "#ffffff" if shown == "open" else colour
                axes.plot(mean, y, "o", markersize=6.5, color=colour, markerfacecolor=fill, markeredgewidth=1.6)
                number = f"{points(effect['mean'], True)}  [{interval(effect).replace(' to ', ', ')}]"
                axes.text(1.02, y, f"{number}\nn {effect['n']:,}", color=MUTED, **numbers)
            axes.axvline(0, color=INK, linewidth=1)
            left, right = axes.get_xlim()
            axes.set_xlim(min(left, -5), max(right, 5))
            axes.set_ylim(-0.6, len(effects) - 0.4)
            names = [beside(effect_name(effect), width=30) for effect in reversed(effects)]
            axes.set_yticks(range(len(effects)), names, color=INK, fontsize=8)
            axes.grid(False, axis="y")
            axes.spines["left"].set_visible(False)
            axes.set_xlabel("difference in accuracy, points")

        caption = (
            "Differences in accuracy between arms (point: mean; line: 95 % interval over targets and seeds, with "
            "one seed over targets alone: nothing is said of the recipe; faint dots: "
            "single targets; n: distinct questions). A hollow point means that no difference is shown."
        )
        height = 0.6 + 0.42 * len(effects)
        return [self.draw("effects", "Differences in accuracy", caption, height, paint, 1.3 * WIDTH_IN)]

    def bars(self, table: str) -> list[Figure]:
        """Arms by target, one figure per direction."""
        title = table.replace("_", " ").capitalize()
        figures = []
        for part in dict.fromkeys(row.split("/")[0] for row, _ in self.grid.scores(table)):
            words = PARTS.get(part, part)
            caption = f"{title}, {words}: accuracy by target with 95 % Wilson intervals; the dashed line is chance."
            groups = self._by_target(table, part)
            paint, height = grouped_bars(groups, BAR_ARMS)
            figures.append(self.draw(f"{table}_{part}", words.capitalize(), caption, height, paint, 4.7))
        return figures

    def figure4(self) -> list[Figure]:
        """A group of bars for each target, as the paper draws it."""
        groups = self._by_target("ablation")
        if len({arm for _, scores, _ in groups for arm in scores} & {*FIGURE_4}) < 2:
            return []
        caption = (
            "The paper's figure 4: accuracy on each target by what a model was trained on, the target itself always "
            "left out; 95 % Wilson intervals, dashed: chance."
        )
        paint, height = grouped_bars(groups, FIGURE_4)
        return [self.draw("figure4", "By target", caption, height, paint)]

    def _by_target(self, table: str, part: str = "") -> list[tuple[str, dict[str, Score], float | None]]:
        """(name, arm -> score, chance) for each row of a table, or of one direction of it."""
        scores = {key: s for key, s in self.grid.scores(table).items() if part in ("", key[0].split("/")[0])}
        targets = [target for _, target in scores]
        names = {
            (row, target): target if targets.count(target) == 1 else f"{target} ({row.rsplit('/', 1)[-1]})"
            for row, target in scores
        }
        return [
            (f"{names[row, target]}  {self.grid.describe(target)}".strip(), by_arm, self.grid.chance(target))
            for (row, target), by_arm in scores.items()
        ]

    def ablation(self) -> list[Figure]:
        """Each arm's mean over targets, targets as dots: at equal epochs, and at equal updates."""
        figures = []
        for end, words in (("", "equal epochs"), ("_updates", "equal updates")):
            # All related subsets stand for both, the base needs no training.
            arms = [arm if arm in ("all_related", "baseline") else arm + end for arm in ABLATION_ORDER]
            rows = [row for row in self.grid.results if row["table"] == "ablation" and row["arm"] in arms]
            present = [arm for arm in arms[::-1] if any(row["arm"] == arm for row in rows)]
            if not {*present} - {"all_related", "baseline"}:
                continue
            caption = (
                f"Mean accuracy over targets and seeds by what a model was trained on, at {words} (line: 95 % interval "
                "over both; dots: single targets; dashed: mean chance; n: distinct questions). A random removal takes "
                "away as many related subsets and records as leaving out its element does."
            )
            paint, height = partial(self._ablation, rows=rows, arms=present), 0.7 + 0.36 * len(present)
            figures.append(self.draw(f"ablation{end}", f"Ablation, {words}", caption, height, paint))
        return figures

    def _ablation(self, axes, rows: Sequence[dict], arms: Sequence[str]) -> None:
        chances = [c for c in (self.grid.chance(t) for t in {row["target"] for row in rows}) if c is not None]
        numbers = {a["arm"]: a["n"] for a in self.summary["accuracy"] if (a["table"], a["part"]) == ("ablation", "")}
        for y, arm in enumerate(arms):
            right = [(r["target"], r["seed"], r["n"], r["correct"]) for r in rows if r["arm"] == arm]
            units = [Unit(target, seed, n, correct, correct) for target, seed, n, correct in right]
            mean_accuracy = estimate(units, same_records=not self.grid.is_phantom)
            (low, high), (colour, alpha) = mean_accuracy.interval(), colour_of(arm)
            axes.barh(y, 100 * mean_accuracy.mean, height=0.62, color=colour, alpha=0.85 * alpha)
            for target in sorted({unit.target for unit in units}):
                value = mean_difference([unit for unit in units if unit.target == target])
                axes.plot(100 * value, y, "o", color=INK, alpha=0.45, markersize=2.8, markeredgewidth=0)
            axes.plot([max(0.0, 100 * low), 100 * high], [y, y], color=INK, linewidth=1.6)
        percent_axis(axes)
        names = [beside(arm_name(arm).removesuffix(", equal updates"), f"n {numbers[arm]:,}") for arm in arms]
        axes.set_yticks(range(len(arms)), names, color=INK, fontsize=8)
        if chances:
            axes.axvline(100 * float(np.mean(chances)), color=INK, linestyle="--", linewidth=1)

    def multi_task(self) -> list[Figure]:
        """Subsets as lines, arms as points; one figure in and one out of distribution."""
        figures = []
        for part in ("in_distribution", "out_of_distribution"):
            scores = {target: s for (row, target), s in self.grid.scores("multi_task").items() if row == part}
            if scores:
                caption = (
                    f"One model of all subsets, {PARTS[part]}: accuracy by subset, 95 % Wilson intervals; dotted: "
                    "chance."
                )
                paint, height = partial(self._points, scores=scores), 0.85 + 0.34 * len(scores)
                figures.append(self.draw(f"multi_task_{part}", PARTS[part].capitalize(), caption, height, paint))
        return figures

    def _points(self, axes, scores: dict[str, dict[str, Score]]) -> None:
        arms = [arm for arm in ("baseline", "single_task", "multi_task") if any(arm in s for s in scores.values())]
        targets = list(scores)[::-1]
        for y, target in enumerate(targets):
            chance = self.grid.chance(target)
            if chance is not None:
                axes.plot([100 * chance] * 2, [y - 0.36, y + 0.36], color=INK, linewidth=1, linestyle=":")
            for i, arm in enumerate(arms):
                score, at = scores[target].get(arm), y + 0.2 - 0.2 * i
                if score:
                    label = arm_name(arm) if y == 0 else None
                    axes.plot([100 * score.low, 100 * score.high], [at, at], color=COLOURS[arm], linewidth=1.4)
                    axes.plot(100 * score.accuracy, at, "o", color=COLOURS[arm], markersize=4.5, label=label)
        percent_axis(axes)
        names = [f"{short_label(target, TICK_CHARACTERS)}\n{number_of(scores[target])}" for target in targets]
        axes.set_yticks(range(len(targets)), names, color=INK, fontsize=8)
        axes.set_ylim(-0.6, len(targets) - 0.4)
        axes.grid(True, axis="y")
        legend(axes, 3)

    def letters(self) -> list[Figure]:
        """Share of each letter among the answers, by arm, and among the right answers."""
        table = main_table(self.grid)
        answered = {arm: letters for (name, arm), letters in self.grid.letters.items() if name == table and letters.n}
        arms = [arm for arm in COLOURS if arm in answered]
        if not arms:
            return []
        names = sorted({name for value in answered.values() for name in (*value.predicted, *value.answers)})

        def paint(axes):
            thick = 0.8 / len(arms)
            for i, arm in enumerate(arms):
                shares = [100 * answered[arm].predicted.get(name, 0) / answered[arm].n for name in names]
                at = np.arange(len(names)) - 0.4 + thick * (i + 0.5)
                axes.bar(
                    at,
                    shares,
                    width=thick * 0.9,
                    color=colour_of(arm)[0],
                    alpha=colour_of(arm)[1],
                    label=f"{arm_name(arm)} (n {answered[arm].n:,})",
                )
            first = answered[arms[0]]
            for i, name in enumerate(names):
                right = 100 * first.answers.get(name, 0) / first.n
                label = "right answers" if i == 0 else None
                axes.plot([i - 0.42, i + 0.42], [right, right], color=INK, linewidth=1.6, label=label)
            axes.set_xticks(range(len(names)), names, color=INK)
            axes.grid(False, axis="x")
            axes.set_ylabel("share of answers, %")
            legend(axes, 2)

        words = table.replace("_", "-")
        caption = f"Letters answered in {words}, by arm (n: answers); the black line is how often the letter is the right answer."
        return [self.draw("letters", "Letters answered", caption, 2.7, paint)]

    def triplet_map(self) -> list[Figure]:
        """Modality by area and task: trained combinations, tested ones, and their gains."""
        triplets = triplets_of(self.grid)
        gains, against = gains_by_target(self.summary)
        trained = {name for cell in self.grid.done() for name in cell["related"].split("+") if name}
        known = {name: triplets[name] for name in (*gains, *sorted(trained)) if name in triplets}
        if not known or not gains:
            return []
        modalities = sorted({modality for modality, _, _ in known.values()})[::-1]
        columns = sorted({(task, area) for _, area, task in known.values()})
        most = max(0.01, *(abs(value) for value in gains.values()))
        names_of: dict[tuple[str, str, str], list[str]] = defaultdict(list)
        for name, triplet in known.items():
            names_of[triplet].append(name)

        def paint(axes):
            for (modality, area, task), names in names_of.items():
                x, y = columns.index((task, area)), modalities.index(modality)
                tested = [gains[name] for name in names if name in gains]
                if tested:
                    gain = float(np.mean(tested))
                    style: dict = {"facecolor": BLUE if gain >= 0 else ORANGE, "alpha": 0.12 + 0.6 * abs(gain) / most}
                    axes.text(x + 0.5, y + 0.5, points(gain, True), ha="center", va="center", fontsize=7)
                else:
                    style = {"fill": False, "hatch": "////", "edgecolor": MUTED}
                axes.add_patch(Rectangle((x, y), 1, 1, linewidth=0, **style))
            tasks = [task for task, _ in columns]
            for task in dict.fromkeys(tasks):
                x = tasks.index(task)
                axes.axvline(x, color=INK, linewidth=1 if x else 0)
                name = short_label(task, TICK_CHARACTERS)
                axes.text(x + 0.05, len(modalities) + 0.08, name, fontsize=8, va="bottom")
            axes.set_xlim(0, len(columns))
            axes.set_ylim(0, len(modalities))
            areas = [short_label(area, TICK_CHARACTERS) for _, area in columns]
            axes.set_xticks(np.arange(len(columns)) + 0.5, areas, rotation=90, fontsize=7)
            names = [short_label(name, TICK_CHARACTERS) for name in modalities]
            axes.set_yticks(np.arange(len(modalities)) + 0.5, names, fontsize=8)
            axes.grid(False)

        caption = (
            f"Modality by area, tasks side by side. Numbers: points of accuracy that {against[0]} gained over "
            f"{against[1]} on a target, averaged over its rows and seeds (blue: above 0, orange: below). Hatched: "
            "trained on in some cell, and no target of this comparison. Blank: neither."
        )
        width, height = max(5.2, 1.4 + 0.42 * len(columns)), 1.5 + 0.3 * len(modalities)
        return [self.draw("map", "What was trained on, and what was gained", caption, height, paint, width)]


def is_main(effect: dict) -> bool:
    """Whether the headline figure shows an effect; the table below it has all."""
    if effect["table"] == "multi_task":
        return MULTI_TASK_EFFECTS.get(effect["part"]) == (effect["arm"], effect["against"])
    return effect["part"] == "" and (effect["table"], effect["arm"], effect["against"]) not in MINOR_EFFECTS


def triplets_of(grid: Grid) -> dict[str, tuple[str, str, str]]:
    """Subset -> (modality, area, Task element)."""
    if grid.of_phantoms:
        return {t.name: (t.modality, t.area, t.task) for t in (*TRIPLETS, *DETECTION_TRIPLETS)}
    triplets = grid.triplets.items()
    return {name: (modality, area, mat.task_elements(task)[0]) for name, (modality, area, task) in triplets}


def gains_by_target(summary: dict) -> tuple[dict[str, float], tuple[str, str]]:
    """(target -> mean gain, names of (arm, against)) for the first comparison of `GAINS` that the grid has."""
    for table, arm, against in GAINS:
        gains: dict[str, list[float]] = defaultdict(list)
        for row in summary["rows"]:
            if (row["table"], row["arm"], row["against"]) == (table, arm, against):
                gains[row["target"]].append(row["difference"])
        if gains:
            return {t: float(np.mean(values)) for t, values in gains.items()}, (arm_name(arm), arm_name(against))
    return {}, ("", "")


def grouped_bars(
    groups: Sequence[tuple[str, dict[str, Score], float | None]], arms: Sequence[str]
) -> tuple[Callable, float]:
    """(paint, height in inches) of horizontal bars of several arms for each (name, arm -> score, chance).

    arms: in the order of their bars; arms that no group has are left out.
    """
    arms = [arm for arm in arms if any(arm in scores for _, scores, _ in groups)]
    thick = 0.13
    step = max(0.46, 0.12 + thick * len(arms))

    def paint(axes):
        for number, (_, scores, chance) in enumerate(groups):
            top = -number * step
            for i, arm in enumerate(arms):
                y, score, (colour, alpha) = top - thick * (i + 0.5), scores.get(arm), colour_of(arm)
                # The legend takes its labels from the first group, also for arms that this group lacks.
                label = arm_name(arm) if number == 0 else None
                width = 100 * score.accuracy if score else 0
                axes.barh(y, width, thick * 0.86, color=colour, alpha=alpha, label=label)
                if score:
                    axes.plot([100 * score.low, 100 * score.high], [y, y], color=INK, linewidth=1)
            if chance is not None:
                axes.plot([100 * chance] * 2, [top - thick * len(arms), top], "--", color=INK, linewidth=1)
        axes.set_ylim(-len(groups) * step + 0.05, 0.08)
        percent_axis(axes)
        middles = [-number * step - thick * len(arms) / 2 for number in range(len(groups))]
        names = [beside(name, number_of(scores)) for name, scores, _ in groups]
        axes.set_yticks(middles, names, color=INK, fontsize=8)
        legend(axes, 3)

    return paint, 0.8 + 0.2 * (len(arms) // 3) + len(groups) * step


def number_of(scores: dict[str, Score]) -> str:
    """The answers behind each of these scores, such as "n 300"."""
    numbers = sorted({score.n for score in scores.values()})
    return f"n {' to '.join(f'{n:,}' for n in dict.fromkeys((numbers[0], numbers[-1])))}" if numbers else ""


def main_table(grid: Grid) -> str:
    """The first table whose arms are compared with each other, not over a number; "": none."""
    return next((name for name in grid.tables if name not in NUMBERED_ARMS), "")
