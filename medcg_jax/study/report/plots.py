"""The figures of a grid's report: drawn once, saved as PNG and SVG, and given as SVG that takes the page's colours."""

import io
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from markupsafe import escape
from matplotlib import pyplot as plt

from medcg_jax.study.report.escape import TICK_CHARACTERS, plain, short_label
from medcg_jax.study.report.load_grid import Grid, arm_name
from medcg_jax.study.report.text import PARTS, effect_name, interval, points, verdict
from medcg_jax.study.stats import stats

INK, MUTED, GRID = "#22262b", "#6b7280", "#d5d9df"
# Okabe and Ito's colours, which colour-blind readers tell apart, and greys.
BLUE, ORANGE, SKY, GREEN, RED, PINK, GREY, PURPLE = (
    "#0072b2", "#d98200", "#4aa3dd", "#009e73", "#d55e00", "#c2699a", "#8b929c", "#7a68b3",
)  # fmt: skip
COLOURS = {
    "baseline": GREY, "baseline_plus": ORANGE, "trained": BLUE, "single_task": ORANGE, "multi_task": BLUE,
    "all_related": BLUE, "all_unrelated": ORANGE, "wo_modality": SKY, "wo_area": GREEN, "wo_task": RED,
    "random_removal": PURPLE, "same_task": PINK, "all_data": MUTED, "with_related": BLUE, "target_only": ORANGE,
}  # fmt: skip
# What the page's style sheet calls each colour, so that dark pages get lighter ones.
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
    # Names hold dollar signs, which are no formulas.
    "text.parse_math": False,
}  # fmt: skip
WIDTH_IN = 5.2


@dataclass(frozen=True)
class Figure:
    """A drawn figure: its files are `plots/NAME.png` and `.svg`.

    Attributes:
      svg: for the page; no width of its own beyond `width_px`.
    """

    name: str
    title: str
    caption: str
    svg: str
    width_px: int


def draw(
    folder: Path, name: str, title: str, caption: str, height_in: float, paint: Callable, width_in=WIDTH_IN
) -> Figure:
    """The figure that `paint(axes)` makes, saved into `folder`."""
    title = short_label(title, round(11 * width_in))  # so many letters of its size fit
    with plt.rc_context({**STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        # Letters that the font lacks are boxes in the PNG; the SVG has them as text.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure, axes = plt.subplots(figsize=(width_in, height_in), layout="constrained")
        try:
            paint(axes)
            figure.suptitle(title, x=0.012, ha="left", fontsize=10, fontweight="bold")
            text = io.StringIO()
            figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
            figure.set_layout_engine("none")  # what was laid out stays where it is
            figure.savefig(folder / f"{name}.png", metadata={"Software": None})
        finally:
            plt.close(figure)
    svg = plain(text.getvalue())
    (folder / f"{name}.svg").write_text(svg, encoding="utf-8", newline="")
    width_px = round(width_in * 96)
    return Figure(name, title, caption, inline(svg, title, width_px), width_px)


def inline(svg: str, title: str, width_px: int) -> str:
    """SVG for the inside of a page: colours by the page's variables, its fonts, no ids of groups, no metadata."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"font: (bold |[\d]+ )?([\d.]+)px [^;\"]*", _font, svg)
    for colour, name in VARIABLES.items():
        svg = re.sub(colour, f"var(--{name})", svg, flags=re.IGNORECASE)
    label = escape(title)
    # Words of a wide figure stay readable on a phone: it scrolls there.
    least = f";min-width:{round(0.7 * width_px)}px" if width_px > 96 * WIDTH_IN else ""
    opening = f'<svg role="img" aria-label="{label}" style="max-width:{width_px}px{least}"'
    return re.sub(r'<svg(.*?) width="[^"]*"', lambda m: opening + re.sub(r' height="[^"]*"', "", m[1]), svg, count=1)


def _font(match: re.Match) -> str:
    """The page's own font in the size and weight drawn."""
    weight = f"font-weight: {match[1].strip()}; " if match[1] else ""
    return f"{weight}font-size: {match[2]}px"


class Plots:
    """Draws the figures of one grid into a folder."""

    def __init__(self, grid: Grid, summary: dict, folder: Path):
        self.grid, self.summary, self.folder = grid, summary, folder

    def headline(self) -> list[Figure]:
        """Every main difference with its interval, targets as dots."""
        effects = [e for e in self.summary["effects"] if self.is_main(e)]
        if not effects:
            return []

        def paint(axes):
            for y, effect in enumerate(reversed(effects)):
                state = verdict(effect)
                colour = {"up": BLUE, "down": RED, "open": GREY}[state]
                each = [100 * value for value in effect["by_target"].values()]
                axes.plot(each, [y] * len(each), "o", color=colour, alpha=0.28, markersize=3.2, markeredgewidth=0)
                low, mean, high = (100 * effect[key] for key in ("ci_low", "mean", "ci_high"))
                axes.plot([low, high], [y, y], color=colour, linewidth=2.2, solid_capstyle="butt")
                fill = "#ffffff" if state == "open" else colour
                axes.plot(
                    mean, y, "o", markersize=6.5, markerfacecolor=fill, markeredgecolor=colour, markeredgewidth=1.6
                )
                at = axes.get_yaxis_transform()
                clear = {"facecolor": "#ffffff", "edgecolor": "none", "pad": 1.2}  # keeps lines out of the words
                axes.text(0, y + 0.28, effect_name(effect), transform=at, fontsize=8.5, va="bottom", bbox=clear)
                number = f"{points(effect['mean'], True)}  [{interval(effect).replace(' to ', ', ')}]"
                axes.text(
                    1, y + 0.28, number, transform=at, fontsize=8.5, va="bottom", ha="right", color=MUTED, bbox=clear
                )
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
        return [draw(self.folder, "effects", "Differences in accuracy", caption, 0.6 + 0.4 * len(effects), paint)]

    @staticmethod
    def is_main(effect: dict) -> bool:
        """Whether the headline figure has it; all are in the table below it."""
        if effect["table"] == "multi_task":
            wanted = {
                "in_distribution": ("multi_task", "single_task"),
                "out_of_distribution": ("multi_task", "baseline"),
            }
            return wanted.get(effect["part"]) == (effect["arm"], effect["against"])
        left_out = (("pairs", "baseline_plus", "baseline"), ("ablation", "all_related", "baseline"),
                    ("ablation", "all_related", "all_data"))  # fmt: skip
        return effect["part"] == "" and (effect["table"], effect["arm"], effect["against"]) not in left_out

    def bars(self, table: str) -> list[Figure]:
        """Arms by target, one figure per direction."""
        parts: dict[str, list] = defaultdict(list)
        for (row, target), arms in self.grid.scores(table).items():
            parts[row.split("/")[0]].append((row, target, arms))
        figures = []
        for part, rows in parts.items():
            arms = [arm for arm in ("baseline", "baseline_plus", "trained") if any(arm in row[2] for row in rows)]
            name, title = f"{table}_{part}", table.replace("_", " ").capitalize()
            caption = (
                f"{title}, {PARTS.get(part, part)}: accuracy by target with 95 % Wilson intervals; the dashed line is "
                "chance."
            )
            height = 0.75 + len(rows) * (0.2 + 0.13 * len(arms))

            def paint(axes, rows=rows, arms=arms):
                self.grouped(axes, rows, arms)

            figures.append(draw(self.folder, name, PARTS.get(part, part).capitalize(), caption, height, paint, 4.7))
        return figures

    def grouped(self, axes, rows: Sequence[tuple], arms: Sequence[str]) -> None:
        """Horizontal bars of several arms for each row, first row on top."""
        thick, step = 0.13, 0.2 + 0.13 * len(arms)
        targets = [target for _, target, _ in rows]
        for place, (row, target, scores) in enumerate(rows):
            top = -place * step
            label = target if targets.count(target) == 1 else f"{target} ({row.rsplit('/', 1)[-1]})"
            label = f"{label}  {self.grid.describe(target)}".strip()
            axes.text(0.4, top + 0.015, short_label(label), fontsize=8.5, va="bottom")
            for k, arm in enumerate(arms):
                if arm not in scores:
                    continue
                y = top - thick * (k + 0.5)
                self.bar(axes, y, scores[arm], COLOURS[arm], thick * 0.86, arm_name(arm) if place == 0 else None)
            chance = self.grid.chance(target)
            if chance is not None:
                axes.plot([100 * chance] * 2, [top - thick * len(arms), top], "--", color=INK, linewidth=1)
        for arm in arms:  # an arm that the first row lacks
            if arm not in rows[0][2]:
                axes.barh(0, 0, color=COLOURS[arm], label=arm_name(arm))
        axes.set_ylim(-len(rows) * step + 0.05, 0.2)
        self.percent(axes)
        axes.figure.legend(loc="outside lower left", ncols=3, handlelength=1, columnspacing=1.2)

    @staticmethod
    def bar(axes, y: float, score, colour: str, thick: float, label: str | None) -> None:
        axes.barh(y, 100 * score.accuracy, height=thick, color=colour, label=label)
        axes.plot([100 * score.low, 100 * score.high], [y, y], color=INK, linewidth=1)

    @staticmethod
    def percent(axes) -> None:
        axes.set_xlim(0, 100)
        axes.set_yticks([])
        axes.grid(False, axis="y")
        axes.spines["left"].set_color(MUTED)
        axes.set_xlabel("accuracy, %")

    def ablation(self) -> list[Figure]:
        """The mean of each arm over targets, each target as a dot."""
        rows = [r for r in self.grid.results if r["table"] == "ablation"]
        arms = [arm for arm in COLOURS if any(r["arm"] == arm for r in rows)]
        if not arms:
            return []
        order = ("all_data", "all_related", "random_removal", "wo_modality", "wo_area", "wo_task", "same_task",
                 "all_unrelated", "baseline")  # fmt: skip
        arms = [arm for arm in order if arm in arms]
        chances = [c for c in (self.grid.chance(t) for t in {r["target"] for r in rows}) if c is not None]

        def paint(axes):
            for y, arm in enumerate(reversed(arms)):
                own = [r for r in rows if r["arm"] == arm]
                # An accuracy is a difference against never being right.
                units = [stats.Unit(r["target"], r["seed"], r["n"], r["correct"], 0) for r in own]
                low, high = stats.bootstrap_interval(units, draws=2000)
                mean = stats.mean_difference(units)
                axes.barh(y, 100 * mean, height=0.62, color=COLOURS[arm], alpha=0.85)
                for target in sorted({u.target for u in units}):
                    value = stats.mean_difference([u for u in units if u.target == target])
                    axes.plot(100 * value, y, "o", color=INK, alpha=0.45, markersize=2.8, markeredgewidth=0)
                axes.plot([100 * low, 100 * high], [y, y], color=INK, linewidth=1.6)
            self.percent(axes)
            axes.set_yticks(range(len(arms)), [arm_name(arm) for arm in reversed(arms)], color=INK)
            if chances:
                axes.axvline(100 * float(np.mean(chances)), color=INK, linestyle="--", linewidth=1)

        caption = (
            "Mean accuracy over targets and seeds by what a model was trained on (line: 95 % bootstrap interval; dots: "
            "single targets; dashed: mean chance). Random removal takes away as many related subsets as leaving out an "
            "element does on average."
        )
        return [draw(self.folder, "ablation", "Ablation", caption, 0.7 + 0.3 * len(arms), paint)]

    def multi_task(self) -> list[Figure]:
        """Subsets as lines, arms as points; one figure in and one out of distribution."""
        figures = []
        for part in ("in_distribution", "out_of_distribution"):
            rows = [(t, s) for (row, t), s in self.grid.scores("multi_task").items() if row == part]
            arms = [arm for arm in ("baseline", "single_task", "multi_task") if any(arm in s for _, s in rows)]
            if not rows:
                continue

            def paint(axes, rows=rows, arms=arms):
                for y, (target, scores) in enumerate(reversed(rows)):
                    chance = self.grid.chance(target)
                    if chance is not None:
                        axes.plot([100 * chance] * 2, [y - 0.36, y + 0.36], color=INK, linewidth=1, linestyle=":")
                    for k, arm in enumerate(arms):
                        if arm in scores:
                            s, at = scores[arm], y + 0.2 - 0.2 * k
                            axes.plot([100 * s.low, 100 * s.high], [at, at], color=COLOURS[arm], linewidth=1.4)
                            label = arm_name(arm) if y == 0 else None
                            axes.plot(100 * s.accuracy, at, "o", color=COLOURS[arm], markersize=4.5, label=label)
                self.percent(axes)
                axes.set_yticks(range(len(rows)), [short_label(t, TICK_CHARACTERS) for t, _ in reversed(rows)],
                                color=INK, fontsize=8)  # fmt: skip
                axes.set_ylim(-0.6, len(rows) - 0.4)
                axes.grid(True, axis="y")
                axes.figure.legend(loc="outside lower left", ncols=3, handlelength=1, columnspacing=1.2)

            words = PARTS[part]
            caption = f"One model of all subsets, {words}: accuracy by subset, 95 % Wilson intervals; dotted: chance."
            height = 0.85 + 0.27 * len(rows)
            figures.append(draw(self.folder, f"multi_task_{part}", words.capitalize(), caption, height, paint))
        return figures

    def efficiency(self) -> list[Figure]:
        curves: dict[str, list[dict]] = defaultdict(list)
        for point in self.summary["curves"]:
            curves[point["curve"]].append(point)
        if not curves:
            return []
        counts = sorted({point["records"] for found in curves.values() for point in found})

        def paint(axes):
            for curve in ("with_related", "target_only"):
                found = curves.get(curve, [])
                x = [counts.index(point["records"]) for point in found]
                low, mean, high = ([100 * p[key] for p in found] for key in ("ci_low", "accuracy", "ci_high"))
                axes.fill_between(x, low, high, color=COLOURS[curve], alpha=0.16, linewidth=0)
                axes.plot(x, mean, "o-", color=COLOURS[curve], linewidth=1.8, markersize=4.5, label=PARTS[curve])
            axes.set_xticks(range(len(counts)), [f"{count:,}" for count in counts])
            axes.set_xlabel("training records of the target (steps are not to scale)")
            axes.set_ylabel("accuracy, %")
            axes.figure.legend(loc="outside lower left", ncols=2, handlelength=1.5)

        caption = (
            "Accuracy over the number of the target's own training records: mean over targets and seeds, with 95 % "
            "bootstrap intervals as bands."
        )
        return [draw(self.folder, "efficiency", "Data efficiency", caption, 3.1, paint)]

    def losses(self) -> list[Figure]:
        """Training loss over the share of a run that is done, one small figure per table."""
        figures = []
        for table in self.grid.tables:
            runs: dict[str, list[np.ndarray]] = defaultdict(list)
            for cell in self.grid.done(table):
                logged = [(m["step"], m["loss"]) for m in self.grid.metrics(cell) if m.get("loss") is not None]
                if len(logged) > 1:
                    steps, losses = np.array(logged, float).T
                    arm = cell["row"].split("/")[0] if table == "efficiency" else cell["arm"]
                    runs[arm].append(np.interp(np.linspace(0, 1, 60), steps / max(1.0, steps[-1]), losses))
            if runs:
                figures.append(self.loss(table, runs))
        return figures

    def loss(self, table: str, runs: dict[str, list[np.ndarray]]) -> Figure:
        def paint(axes):
            x = np.linspace(0, 100, 60)
            for arm in (arm for arm in COLOURS if arm in runs):
                low, middle, high = np.quantile(np.stack(runs[arm]), [0.1, 0.5, 0.9], axis=0)
                label = PARTS.get(arm) or arm_name(arm)
                axes.fill_between(x, low, high, color=COLOURS[arm], alpha=0.12, linewidth=0)
                axes.plot(x, middle, color=COLOURS[arm], linewidth=1.4, label=label)
            axes.set_ylim(bottom=0)
            axes.set_xlabel("training done, %")
            axes.set_ylabel("loss")
            axes.figure.legend(loc="outside lower left", ncols=2, handlelength=1.2, fontsize=7.5, columnspacing=1)

        words = table.replace("_", "-")
        number = sum(len(found) for found in runs.values())
        caption = f"{words.capitalize()}: training loss, median and 10 to 90 % range over {number} runs."
        return draw(self.folder, f"loss_{table}", words.capitalize(), caption, 2.4 + 0.09 * len(runs), paint, 3.4)

    def letters(self) -> list[Figure]:
        """How often each letter was answered, by arm, beside how often it was right."""
        table = next((name for name in self.grid.tables if name != "efficiency"), None)
        found = {arm: letters for (name, arm), letters in self.grid.letters.items() if name == table and letters.n}
        arms = [arm for arm in COLOURS if arm in found]
        if not arms:
            return []
        letters = sorted({letter for arm in arms for letter in (*found[arm].predicted, *found[arm].answers)})

        def paint(axes):
            thick = 0.8 / len(arms)
            for k, arm in enumerate(arms):
                share = [100 * found[arm].predicted.get(letter, 0) / found[arm].n for letter in letters]
                at = np.arange(len(letters)) - 0.4 + thick * (k + 0.5)
                axes.bar(at, share, width=thick * 0.9, color=COLOURS[arm], label=arm_name(arm))
            answers = found[arms[0]]
            for i, letter in enumerate(letters):
                right = 100 * answers.answers.get(letter, 0) / answers.n
                label = "right answers" if i == 0 else None
                axes.plot([i - 0.42, i + 0.42], [right, right], color=INK, linewidth=1.6, label=label)
            axes.set_xticks(range(len(letters)), letters, color=INK)
            axes.grid(False, axis="x")
            axes.set_ylabel("share of answers, %")
            axes.figure.legend(loc="outside lower left", ncols=4, handlelength=1, columnspacing=1.2, fontsize=8)

        words = (table or "").replace("_", "-")
        caption = f"Letters answered in {words}, by arm; the black line is how often the letter is the right answer."
        return [draw(self.folder, "letters", "Letters answered", caption, 2.7, paint)]
