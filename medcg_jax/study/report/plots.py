"""Figures of reports, saved as PNG and SVG and embedded as SVG in the page's colours; all figures of a grid."""

import io
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from markupsafe import escape
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

from medcg_jax.data.phantom.source import DETECTION_TRIPLETS
from medcg_jax.data.phantom.world import TRIPLETS
from medcg_jax.study.design import mat
from medcg_jax.study.report.escape import TICK_CHARACTERS, file_names, plain, short_label
from medcg_jax.study.report.load_grid import Grid, Score, arm_name
from medcg_jax.study.report.table import points
from medcg_jax.study.report.text import PARTS, effect_name, interval, state
from medcg_jax.study.stats.paired import Unit, estimate, mean_difference

INK, MUTED, GRID = "#22262b", "#6b7280", "#d5d9df"
# Okabe and Ito's colours, which colour-blind readers can tell apart, and greys.
BLUE, ORANGE, SKY, GREEN, RED, PINK, GREY, PURPLE = (
    "#0072b2", "#d98200", "#4aa3dd", "#009e73", "#d55e00", "#c2699a", "#8b929c", "#7a68b3",
)  # fmt: skip
COLOURS = {
    "baseline": GREY, "baseline_plus": ORANGE, "trained": BLUE, "single_task": ORANGE, "multi_task": BLUE,
    "all_related": BLUE, "all_unrelated": ORANGE, "wo_modality": SKY, "wo_area": GREEN, "wo_task": RED,
    "random_removal": PURPLE, "same_task": PINK, "all_data": MUTED, "with_related": BLUE, "target_only": ORANGE,
}  # fmt: skip
# Colour -> its variable in the page's style sheet; dark pages have lighter colours.
VARIABLES = {
    INK: "ink", MUTED: "muted", GRID: "rule", BLUE: "blue", ORANGE: "orange", SKY: "sky", GREEN: "green", RED: "red",
    PINK: "pink", GREY: "grey", PURPLE: "purple", "#ffffff": "paper",
}  # fmt: skip
STYLE = {
    "font.size": 9, "font.family": "DejaVu Sans", "svg.fonttype": "none", "text.color": INK, "axes.edgecolor": GRID,
    "axes.labelcolor": INK, "xtick.color": MUTED, "ytick.color": MUTED, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.6, "axes.axisbelow": True,
    "xtick.major.size": 0, "ytick.major.size": 0, "legend.frameon": False, "legend.fontsize": 8.5,
    "figure.facecolor": "#ffffff", "axes.facecolor": "#ffffff", "savefig.dpi": 200, "path.simplify": True,
    # Dollar signs in names start no formula.
    "text.parse_math": False,
}  # fmt: skip
WIDTH_IN = 5.2
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
    "all_data", "all_related", "random_removal", "wo_modality", "wo_area", "wo_task", "same_task", "all_unrelated",
    "baseline",
)  # fmt: skip
# Figure 4's arms in the paper's order, the base before them.
FIGURE_4 = ("baseline", "all_related", "all_unrelated", "wo_modality", "wo_area", "wo_task", "all_data")
# (table, arm, against) of the gains on the map: the first that the grid has.
GAINS = (
    ("pairs", "trained", "baseline_plus"), ("pairs", "trained", "baseline"), ("triples", "trained", "baseline_plus"),
    ("triples", "trained", "baseline"), ("detection_pairs", "trained", "baseline"),
    ("ablation", "all_related", "baseline"), ("multi_task", "multi_task", "baseline"),
)  # fmt: skip
CURVES = ("with_related", "target_only")
LOSS_POINTS = 60


@dataclass(frozen=True)
class Figure:
    """A drawn figure with the files `plots/NAME.png` and `.svg`.

    Attributes:
      svg: for the page, at most `width_px` wide.
    """

    name: str
    title: str
    caption: str
    svg: str
    width_px: int


def draw(
    folder: Path, name: str, title: str, caption: str, height_in: float, paint: Callable, width_in=WIDTH_IN
) -> Figure:
    """The figure that `paint(axes)` draws, saved into `folder`."""
    title = short_label(title, round(11 * width_in))  # as many letters as fit
    with plt.rc_context({**STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        # Letters missing from the font are boxes in the PNG; in the SVG they are text.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure, axes = plt.subplots(figsize=(width_in, height_in), layout="constrained")
        try:
            paint(axes)
            figure.suptitle(title, x=0.012, ha="left", fontsize=10, fontweight="bold")
            text = io.StringIO()
            figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
            figure.set_layout_engine("none")  # the PNG keeps the layout of the SVG
            figure.savefig(folder / f"{name}.png", metadata={"Software": None})
        finally:
            plt.close(figure)
    svg = plain(text.getvalue())
    (folder / f"{name}.svg").write_text(svg, encoding="utf-8", newline="")
    width_px = round(width_in * 96)
    return Figure(name, title, caption, inline(svg, title, width_px), width_px)


def inline(svg: str, title: str, width_px: int) -> str:
    """SVG to embed in a page: with the page's colour variables and fonts, without group ids and metadata."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"font: (bold |[\d]+ )?([\d.]+)px [^;\"]*", _font, svg)
    for colour, name in VARIABLES.items():
        svg = re.sub(colour, f"var(--{name})", svg, flags=re.IGNORECASE)
    label = escape(title)
    # On a phone a wide figure scrolls, so that its words stay readable.
    least = f";min-width:{round(0.7 * width_px)}px" if width_px > 96 * WIDTH_IN else ""
    opening = f'<svg role="img" aria-label="{label}" style="max-width:{width_px}px{least}"'
    return re.sub(r'<svg(.*?) width="[^"]*"', lambda m: opening + re.sub(r' height="[^"]*"', "", m[1]), svg, count=1)


def _font(match: re.Match) -> str:
    """The page's font in the size and weight of the match."""
    weight = f"font-weight: {match[1].strip()}; " if match[1] else ""
    return f"{weight}font-size: {match[2]}px"


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
            for y, effect in enumerate(reversed(effects)):
                shown = state(effect)
                colour = {"up": BLUE, "down": RED, "open": GREY}[shown]
                targets = [100 * value for value in effect["by_target"].values()]
                axes.plot(targets, [y] * len(targets), "o", color=colour, alpha=0.28, markersize=3.2, markeredgewidth=0)
                low, mean, high = (100 * effect[key] for key in ("ci_low", "mean", "ci_high"))
                axes.plot([low, high], [y, y], color=colour, linewidth=2.2, solid_capstyle="butt")
                fill = "#ffffff" if shown == "open" else colour
                axes.plot(mean, y, "o", markersize=6.5, color=colour, markerfacecolor=fill, markeredgewidth=1.6)
                # The box keeps lines off the text.
                box = {"facecolor": "#ffffff", "edgecolor": "none", "pad": 1.2}
                words = {"transform": axes.get_yaxis_transform(), "fontsize": 8.5, "va": "bottom", "bbox": box}
                axes.text(0, y + 0.28, effect_name(effect), **words)
                number = f"{points(effect['mean'], True)}  [{interval(effect).replace(' to ', ', ')}]"
                axes.text(1, y + 0.28, number, ha="right", color=MUTED, **words)
            axes.axvline(0, color=INK, linewidth=1)
            left, right = axes.get_xlim()
            axes.set_xlim(min(left, -5), max(right, 5))
            axes.set_ylim(-0.5, len(effects) - 0.25)
            axes.set_yticks([])
            axes.spines["left"].set_visible(False)
            axes.set_xlabel("difference in accuracy, points")

        caption = (
            "Differences in accuracy between arms (point: mean; line: 95 % bootstrap interval over targets, seeds and "
            "test records; faint dots: single targets). A hollow point means that the interval includes 0: no "
            "difference is shown."
        )
        return [self.draw("effects", "Differences in accuracy", caption, 0.6 + 0.4 * len(effects), paint)]

    def bars(self, table: str) -> list[Figure]:
        """Arms by target, one figure per direction."""
        title = table.replace("_", " ").capitalize()
        figures = []
        for part in dict.fromkeys(row.split("/")[0] for row, _ in self.grid.scores(table)):
            words = PARTS.get(part, part)
            caption = f"{title}, {words}: accuracy by target with 95 % Wilson intervals; the dashed line is chance."
            groups = self._by_target(table, part)
            paint, height = grouped_bars(groups, ("baseline", "baseline_plus", "trained"))
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
        """Each arm's mean over targets; targets as dots."""
        rows = [row for row in self.grid.results if row["table"] == "ablation"]
        arms = [arm for arm in ABLATION_ORDER[::-1] if any(row["arm"] == arm for row in rows)]
        if not arms:
            return []
        chances = [c for c in (self.grid.chance(t) for t in {row["target"] for row in rows}) if c is not None]

        def paint(axes):
            for y, arm in enumerate(arms):
                right = [(r["target"], r["seed"], r["n"], r["correct"]) for r in rows if r["arm"] == arm]
                units = [Unit(target, seed, n, correct, correct) for target, seed, n, correct in right]
                low, high = estimate(units).interval()
                axes.barh(y, 100 * mean_difference(units), height=0.62, color=COLOURS[arm], alpha=0.85)
                for target in sorted({unit.target for unit in units}):
                    value = mean_difference([unit for unit in units if unit.target == target])
                    axes.plot(100 * value, y, "o", color=INK, alpha=0.45, markersize=2.8, markeredgewidth=0)
                axes.plot([100 * low, 100 * high], [y, y], color=INK, linewidth=1.6)
            _percent(axes)
            axes.set_yticks(range(len(arms)), [arm_name(arm) for arm in arms], color=INK)
            if chances:
                axes.axvline(100 * float(np.mean(chances)), color=INK, linestyle="--", linewidth=1)

        caption = (
            "Mean accuracy over targets and seeds by what a model was trained on (line: 95 % interval over both; dots: "
            "single targets; dashed: mean chance). Random removal takes away as many related subsets as leaving out an "
            "element does on average."
        )
        return [self.draw("ablation", "Ablation", caption, 0.7 + 0.3 * len(arms), paint)]

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
                paint, height = partial(self._points, scores=scores), 0.85 + 0.27 * len(scores)
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
        _percent(axes)
        names = [short_label(target, TICK_CHARACTERS) for target in targets]
        axes.set_yticks(range(len(targets)), names, color=INK, fontsize=8)
        axes.set_ylim(-0.6, len(targets) - 0.4)
        axes.grid(True, axis="y")
        _legend(axes, 3)

    def efficiency(self) -> list[Figure]:
        """Both curves over all targets, and for each target where there are several."""
        curves: dict[str, dict[int, Score]] = defaultdict(dict)
        for point in self.summary["curves"]:
            score = Score(point["accuracy"], point["ci_low"], point["ci_high"], point["n"], ())
            curves[point["curve"]][point["records"]] = score
        if not curves:
            return []
        caption = (
            "Accuracy over the number of the target's own training records: mean over targets and seeds, with 95 % "
            "bootstrap intervals as bands. Steps between the numbers of records are not to scale."
        )
        paint = partial(_curves, curves=curves)
        figures = [self.draw("efficiency", "Data efficiency", caption, 3.1, paint)]
        by_target: dict[str, dict[str, dict[int, Score]]] = defaultdict(lambda: defaultdict(dict))
        for (row, target), scores in self.grid.scores("efficiency").items():
            for arm, score in scores.items():
                by_target[target][row.split("/")[0]][int(arm.rsplit("_", 1)[1])] = score
        files = file_names(by_target)
        for target, curves in by_target.items() if len(by_target) > 1 else ():
            title = self.grid.describe(target) or target
            caption = f"{title}: accuracy with 95 % Wilson intervals; dashed: chance."
            paint = partial(_curves, curves=curves, chance=self.grid.chance(target))
            figures.append(self.draw(f"efficiency_{files[target]}", title, caption, 2.6, paint, 3.4))
        return figures

    def losses(self) -> list[Figure]:
        """Training loss over the finished share of a run, one small figure per table."""
        figures = []
        for table in self.grid.tables:
            runs: dict[str, list[np.ndarray]] = defaultdict(list)
            for cell in self.grid.done(table):
                logged = [(m["step"], m["loss"]) for m in self.grid.metrics(cell) if m.get("loss") is not None]
                if len(logged) > 1:
                    steps, losses = np.array(logged, float).T
                    arm = cell["row"].split("/")[0] if table == "efficiency" else cell["arm"]
                    share = steps / max(1.0, steps[-1])
                    runs[arm].append(np.interp(np.linspace(0, 1, LOSS_POINTS), share, losses))
            if runs:
                words, num_runs = table.replace("_", "-").capitalize(), sum(map(len, runs.values()))
                caption = f"{words}: training loss, median and 10 to 90 % range over {num_runs} runs."
                height = 2.4 + 0.09 * len(runs)
                figures.append(self.draw(f"loss_{table}", words, caption, height, partial(_losses, runs=runs), 3.4))
        return figures

    def letters(self) -> list[Figure]:
        """Share of each letter among the answers, by arm, and among the right answers."""
        table = next((name for name in self.grid.tables if name != "efficiency"), "")
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
                axes.bar(at, shares, width=thick * 0.9, color=COLOURS[arm], label=arm_name(arm))
            first = answered[arms[0]]
            for i, name in enumerate(names):
                right = 100 * first.answers.get(name, 0) / first.n
                label = "right answers" if i == 0 else None
                axes.plot([i - 0.42, i + 0.42], [right, right], color=INK, linewidth=1.6, label=label)
            axes.set_xticks(range(len(names)), names, color=INK)
            axes.grid(False, axis="x")
            axes.set_ylabel("share of answers, %")
            _legend(axes, 4)

        words = table.replace("_", "-")
        caption = f"Letters answered in {words}, by arm; the black line is how often the letter is the right answer."
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
    thick, step = 0.13, 0.2 + 0.13 * len(arms)

    def paint(axes):
        for number, (name, scores, chance) in enumerate(groups):
            top = -number * step
            axes.text(0.4, top + 0.015, short_label(name), fontsize=8.5, va="bottom")
            for i, arm in enumerate(arms):
                y, score = top - thick * (i + 0.5), scores.get(arm)
                # The legend takes its labels from the first group, also for arms that this group lacks.
                label = arm_name(arm) if number == 0 else None
                axes.barh(y, 100 * score.accuracy if score else 0, thick * 0.86, color=COLOURS[arm], label=label)
                if score:
                    axes.plot([100 * score.low, 100 * score.high], [y, y], color=INK, linewidth=1)
            if chance is not None:
                axes.plot([100 * chance] * 2, [top - thick * len(arms), top], "--", color=INK, linewidth=1)
        axes.set_ylim(-len(groups) * step + 0.05, 0.2)
        _percent(axes)
        _legend(axes, 3)

    return paint, 0.8 + len(groups) * step


def _curves(axes, curves: dict[str, dict[int, Score]], chance: float | None = None) -> None:
    """Accuracy over numbers of records, at equal distances. curves: curve -> records -> score."""
    counts = sorted({count for scores in curves.values() for count in scores})
    for curve in (curve for curve in CURVES if curve in curves):
        scores = dict(sorted(curves[curve].items()))
        x = [counts.index(count) for count in scores]
        low, mean, high = ([100 * getattr(s, key) for s in scores.values()] for key in ("low", "accuracy", "high"))
        _band(axes, x, low, mean, high, COLOURS[curve], marker="o", markersize=4, label=PARTS[curve])
    if chance is not None:
        axes.axhline(100 * chance, color=INK, linestyle="--", linewidth=0.9)
    axes.set_xticks(range(len(counts)), [f"{count:,}" for count in counts])
    axes.set_xlabel("training records of the target")
    axes.set_ylabel("accuracy, %")
    _legend(axes, 2)


def _losses(axes, runs: dict[str, list[np.ndarray]]) -> None:
    for arm in (arm for arm in COLOURS if arm in runs):
        low, middle, high = np.quantile(np.stack(runs[arm]), [0.1, 0.5, 0.9], axis=0)
        label = PARTS.get(arm) or arm_name(arm)
        _band(axes, np.linspace(0, 100, LOSS_POINTS), low, middle, high, COLOURS[arm], label=label)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("training done, %")
    axes.set_ylabel("loss")
    _legend(axes, 2)


def _band(axes, x, low, middle, high, colour: str, **line) -> None:
    axes.fill_between(x, low, high, color=colour, alpha=0.14, linewidth=0)
    axes.plot(x, middle, color=colour, linewidth=1.6, **line)


def _percent(axes) -> None:
    axes.set_xlim(0, 100)
    axes.set_yticks([])
    axes.grid(False, axis="y")
    axes.spines["left"].set_color(MUTED)
    axes.set_xlabel("accuracy, %")


def _legend(axes, num_columns: int) -> None:
    axes.figure.legend(loc="outside lower left", ncols=num_columns, handlelength=1.2, columnspacing=1.2, fontsize=8)
