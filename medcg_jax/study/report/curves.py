"""Figures of a grid over a number: data efficiency, doses, training loss, calibration, and risk over coverage."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from medcg_jax.study.report.drawing import (
    BLUE,
    COLOURS,
    GREY,
    INK,
    MUTED,
    SMALL_PT,
    WIDTH_IN,
    Figure,
    band,
    colour_of,
    draw,
    legend,
)
from medcg_jax.study.report.escape import file_names
from medcg_jax.study.report.load_grid import Grid, Score, arm_name
from medcg_jax.study.report.plots import main_table, number_of
from medcg_jax.study.report.tables import CURVES
from medcg_jax.study.report.text import PARTS
from medcg_jax.study.stats.calibration import NUM_BINS
from medcg_jax.study.stats.grid_files import training_of
from medcg_jax.study.stats.paired import Unit, estimate, target_means

# `study.efficiency_budget` in words; grids without it had equal epochs.
BUDGETS = {"updates": "equal updates", "epochs": "equal epochs"}
LOSS_POINTS = 60
# Arms whose calibration is drawn, at most `MOST_ARMS` of them.
CALIBRATED = (
    "trained", "all_related", "multi_task", "baseline", "baseline_plus", "all_unrelated", "single_task", "single_1",
    "single_2", "single_3", "words_only",
)  # fmt: skip
MOST_ARMS = 6


class Curves:
    """Draws these figures of one grid into a folder; a method gives [] where the grid lacks the data."""

    def __init__(self, grid: Grid, summary: dict, folder: Path):
        self.grid, self.summary, self.folder = grid, summary, folder

    def draw(self, name: str, title: str, caption: str, height_in: float, paint, width_in: float = WIDTH_IN) -> Figure:
        return draw(self.folder, name, title, caption, height_in, paint, width_in)

    def efficiency(self) -> list[Figure]:
        """The curves over all targets, and for each target where there are several."""
        curves: dict[str, dict[int, Score]] = defaultdict(dict)
        for point in self.summary["curves"]:
            score = Score(point["accuracy"], point["ci_low"], point["ci_high"], point["n"], ())
            curves[point["curve"]][point["records"]] = score
        if not curves:
            return []
        budget = BUDGETS[self.grid.config["study"].get("efficiency_budget", "epochs")]
        per_target: dict[str, dict[str, dict[int, Score]]] = defaultdict(lambda: defaultdict(dict))
        for (row, target), scores in self.grid.scores("efficiency").items():
            for arm, score in scores.items():
                per_target[target][row.split("/")[0]][int(arm.rsplit("_", 1)[1])] = score
        updates = (
            "All points of a target have as many updates, but the target's own at 0 records, which is the base." if budget == BUDGETS["updates"] else
            "Points with fewer records have fewer updates: part of what more records gain is more training."
        )  # fmt: skip
        caption = (
            f"Accuracy over the number of the target's own training records, at {budget}: mean over targets and seeds, "
            f"with 95 % intervals over both as bands; dashed: mean chance. {updates} Distances between numbers of "
            "records are not to scale."
        )
        paint = partial(_curves, curves=curves, chance=self._mean_chance(per_target))
        figures = [self.draw("efficiency", f"Data efficiency, {budget}", caption, 3.6, paint)]
        files = file_names(per_target)
        for target, curves in per_target.items() if len(per_target) > 1 else ():
            title = self.grid.describe(target) or target
            caption = f"{title}: accuracy at {budget}, with 95 % Wilson intervals; dashed: chance."
            paint = partial(_curves, curves=curves, chance=self.grid.chance(target))
            figures.append(self.draw(f"efficiency_{files[target]}", title, caption, 3.3, paint, 4.4))
        return figures

    def dose(self) -> list[Figure]:
        """Accuracy over the number of related subsets an element; single targets as thin lines."""
        units: dict[int, list[Unit]] = defaultdict(list)
        for row in self.grid.results:
            if row["table"] == "dose":
                dose = int(row["arm"].rsplit("_", 1)[1])
                units[dose].append(Unit(row["target"], row["seed"], row["n"], row["correct"], row["correct"]))
        if not units:
            return []
        doses = sorted(units)
        by_target = {dose: target_means(units[dose]) for dose in doses}
        targets = sorted({target for means in by_target.values() for target in means})
        complete = [target for target in targets if all(target in by_target[dose] for dose in doses)]

        def paint(axes):
            for target in targets:
                known = [
                    (x, 100 * by_target[dose][target]) for x, dose in enumerate(doses) if target in by_target[dose]
                ]
                axes.plot(*zip(*known, strict=True), color=GREY, linewidth=0.8, alpha=0.6)
            estimates = [estimate(units[dose], same_records=not self.grid.is_phantom) for dose in doses]
            low, high = np.transpose([item.interval() for item in estimates])
            middle = [100 * item.mean for item in estimates]
            band(axes, range(len(doses)), 100 * np.maximum(low, 0), middle, 100 * high, BLUE, marker="o", markersize=4)
            if (chance := self._mean_chance(targets)) is not None:
                axes.axhline(100 * chance, color=INK, linestyle="--", linewidth=0.9)
            numbers = [f"{dose}\n{len(by_target[dose])} targets\n{_questions(units[dose])}" for dose in doses]
            axes.set_xticks(range(len(doses)), numbers, fontsize=SMALL_PT)
            axes.set_xlabel("related subsets for each element (0: unrelated ones)")
            axes.set_ylabel("accuracy, %")

        caption = (
            "Accuracy over the number of related subsets that share each element, at equal records and equal updates: mean "
            "over targets and seeds, with 95 % intervals over both as a band; thin: single targets; dashed: mean chance; "
            "n: answers. "
        )
        if len(complete) < len(targets):
            caption += (
                f"Only {len(complete)} of {len(targets)} targets have every dose, so points are of other targets too."
            )
        return [self.draw("dose", "Dose-response", caption, 3.2, paint)]

    def losses(self) -> list[Figure]:
        """Training loss over the finished share of a run, one small figure per table."""
        figures = []
        for table in self.grid.tables:
            runs: dict[str, list[np.ndarray]] = defaultdict(list)
            # A training that serves several cells of an arm is one run.
            for cell in {(c["arm"], training_of(c)): c for c in self.grid.done(table)}.values():
                logged = [(m["step"], m["loss"]) for m in self.grid.metrics(cell) if m.get("loss") is not None]
                if len(logged) > 1:
                    steps, losses = np.array(logged, float).T
                    arm = {"efficiency": cell["row"].split("/")[0], "dose": "dose"}.get(table, cell["arm"])
                    share = steps / max(1.0, steps[-1])
                    runs[arm].append(np.interp(np.linspace(0, 1, LOSS_POINTS), share, losses))
            if runs:
                words, num_runs = table.replace("_", "-").capitalize(), sum(map(len, runs.values()))
                caption = (
                    f"{words}: training loss, median and 10 to 90 % range over {num_runs} trainings (n: an arm's)."
                )
                height = 2.7 + 0.17 * len(runs)
                figures.append(self.draw(f"loss_{table}", words, caption, height, partial(_losses, runs=runs), 4.6))
        return figures

    def calibration(self) -> list[Figure]:
        """Accuracy over confidence, and wrong answers over coverage, of the arms of the first table."""
        table = main_table(self.grid)
        by_arm = {entry["arm"]: entry for entry in self.summary["calibration"] if entry["table"] == table}
        arms = [by_arm[arm] for arm in CALIBRATED if arm in by_arm][:MOST_ARMS] or list(by_arm.values())[:MOST_ARMS]
        if not arms:
            return []
        chance, words = (
            self._mean_chance({r["target"] for r in self.grid.results if r["table"] == table}),
            "dotted: chance",
        )
        where = table.replace("_", "-")
        confident = (
            f"Share of right answers over the confidence in them ({where}; confidence: the probability of the letter "
            f"answered among those offered, in {NUM_BINS} bins; larger points: more answers; error: the expected calibration error). Dashed: as confident as right; {words}."
        )
        risk = (
            f"Share of wrong answers among the most confident ones ({where}): what would be gained by leaving the least "
            f"confident answers unanswered. {words.capitalize()}."
        )
        return [
            self.draw(
                "reliability", "Confidence and accuracy", confident, 4.2, partial(_reliability, arms, chance), 5.0
            ),
            self.draw("risk_coverage", "Risk and coverage", risk, 4.2, partial(_risk, arms, chance), 5.0),
        ]

    def _mean_chance(self, targets) -> float | None:
        chances = [chance for target in targets if (chance := self.grid.chance(target)) is not None]
        return float(np.mean(chances)) if chances else None


def _questions(units: Sequence[Unit]) -> str:
    return f"n {sum(unit.n for unit in units):,}"


def _curves(axes, curves: Mapping[str, Mapping[int, Score]], chance: float | None = None) -> None:
    """Accuracy over numbers of records, at equal distances. curves: curve -> records -> score."""
    counts = sorted({count for scores in curves.values() for count in scores})
    for curve in (curve for curve in CURVES if curve in curves):
        scores = dict(sorted(curves[curve].items()))
        x = [counts.index(count) for count in scores]
        low, mean, high = ([100 * getattr(s, key) for s in scores.values()] for key in ("low", "accuracy", "high"))
        label = f"{PARTS[curve]} ({number_of({str(count): score for count, score in scores.items()})})"
        band(axes, x, low, mean, high, COLOURS[curve], marker="o", markersize=4, label=label)
    if chance is not None:
        axes.axhline(100 * chance, color=INK, linestyle="--", linewidth=0.9)
    axes.set_xticks(range(len(counts)), [f"{count:,}" for count in counts])
    axes.set_xlabel("training records of the target")
    axes.set_ylabel("accuracy, %")
    legend(axes, 1)


def _losses(axes, runs: Mapping[str, Sequence[np.ndarray]]) -> None:
    order = [*COLOURS]
    for arm in sorted(runs, key=lambda arm: order.index(arm.removesuffix("_updates"))):
        low, middle, high = np.quantile(np.stack(runs[arm]), [0.1, 0.5, 0.9], axis=0)
        label = f"{PARTS.get(arm) or arm_name(arm)} (n {len(runs[arm])})"
        colour, alpha = colour_of(arm)
        style = "--" if arm.endswith("_updates") else "-"
        x = np.linspace(0, 100, LOSS_POINTS)
        band(axes, x, low, middle, high, colour, alpha=alpha, linestyle=style, label=label)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("training done, %")
    axes.set_ylabel("loss")
    legend(axes, 1)


def _reliability(arms: Sequence[dict], chance: float | None, axes) -> None:
    axes.plot([0, 100], [0, 100], "--", color=INK, linewidth=0.9)
    for entry in arms:
        colour, alpha = colour_of(entry["arm"])
        x, y, n = (np.array([score_bin[key] for score_bin in entry["bins"]]) for key in ("confidence", "accuracy", "n"))
        axes.plot(100 * x, 100 * y, color=colour, alpha=alpha, linewidth=1.3)
        label = f"{arm_name(entry['arm'])} (n {entry['n']:,}; error {100 * entry['ece']:.1f})"
        axes.scatter(100 * x, 100 * y, s=8 + 50 * n / n.max(), color=colour, alpha=alpha, linewidth=0, label=label)
    _chance_line(axes, chance)
    low = min(100 * score_bin["confidence"] for entry in arms for score_bin in entry["bins"])
    axes.set(xlim=(min(low, 100) - 3, 102), ylim=(0, 102), xlabel="confidence, %", ylabel="right answers, %")
    legend(axes, 1)


def _risk(arms: Sequence[dict], chance: float | None, axes) -> None:
    for entry in arms:
        colour, alpha = colour_of(entry["arm"])
        x, y = (np.array([point[key] for point in entry["curve"]]) for key in ("coverage", "risk"))
        label = f"{arm_name(entry['arm'])} (n {entry['n']:,}; area {100 * entry['aurc']:.1f})"
        axes.plot(100 * x, 100 * y, color=colour, alpha=alpha, linewidth=1.6, label=label)
    _chance_line(axes, None if chance is None else 1 - chance)
    axes.set(xlim=(0, 100), xlabel="answers given, %", ylabel="wrong among them, %")
    axes.set_ylim(bottom=0)
    legend(axes, 1)


def _chance_line(axes, share: float | None) -> None:
    if share is not None:
        axes.axhline(100 * share, color=MUTED, linestyle=":", linewidth=1.2)
