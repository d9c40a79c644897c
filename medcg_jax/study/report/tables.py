"""The tables of a grid's report: each as rows of values, for the page, as CSV and as LaTeX (booktabs)."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

from medcg_jax.config import MODELS
from medcg_jax.study.design.suite import DETECTION_TABLES, PAIR_TABLES
from medcg_jax.study.report.escape import csv_cell, latex
from medcg_jax.study.report.load_grid import Grid, Score, arm_name
from medcg_jax.study.report.text import PARTS, effect_name, efficiency_gains, p_text, points, verdict

# How a row's result is marked: CSS class -> sign, words.
MARKS = {
    "win-sure": ("▲", "above, and significantly (exact McNemar, Holm-adjusted p < 0.05)"),
    "win": ("△", "above, not significantly"),
    "even": ("◇", "above one and not above the other"),
    "loss": ("▽", "below, not significantly"),
    "loss-sure": ("▼", "below, and significantly"),
}
BOTH_SOURCES = (
    "The p is of these records alone; the interval of the difference counts the spread of seeds too, so that of a "
    "significant row may include 0. Seconds are of all seeds' trainings."
)


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
      kind: "text", "long" (text that may break), "score" (a Score), "share" (a fraction shown
        in %), "points" (a difference), "interval" (two fractions), "count", "p" or "mark" (a key of MARKS).
    """

    key: str
    title: str
    kind: str = "text"


@dataclass
class Table:
    """Rows of values by column key; None where there is no value.

    Attributes:
      name: of its files, `tables/NAME.csv` and `.tex`.
      colours: (row number, column key) -> CSS class.
      wide: whether the page folds it away.
    """

    name: str
    title: str
    caption: str
    columns: list[Column]
    rows: list[dict] = field(default_factory=list)
    colours: dict[tuple[int, str], str] = field(default_factory=dict)
    wide: bool = False

    def add(self, row: dict, **colours: str) -> None:
        self.colours.update({(len(self.rows), key): name for key, name in colours.items() if name})
        self.rows.append(row)

    def used(self) -> list[Column]:
        """Columns that hold a value in some row."""
        return [c for c in self.columns if any(row.get(c.key) is not None for row in self.rows)]

    def csv(self) -> str:
        """Numbers as fractions, unrounded; a score as four columns (KEY, KEY_low, KEY_high, KEY_n)."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        columns = self.used()
        rows = [[name for column in columns for name in csv_names(column)]]
        rows += [[value for c in columns for value in csv_values(c, row.get(c.key))] for row in self.rows]
        writer.writerows([csv_cell(value) for value in row] for row in rows)
        return text.getvalue()

    def latex(self) -> str:
        """A booktabs table; needs the packages booktabs and amssymb."""
        columns = self.used()
        kinds = "".join("l" if c.kind in ("text", "long", "mark") else "r" for c in columns)
        lines = [
            "% needs \\usepackage{booktabs,amssymb}",
            "\\begin{table}", "\\centering", f"\\caption{{{latex(self.caption)}}}", f"\\label{{tab:{self.name}}}",
            f"\\begin{{tabular}}{{{kinds}}}", "\\toprule",
            " & ".join(latex(c.title) for c in columns) + r" \\", "\\midrule",
            *(" & ".join(latex(shown(c, row.get(c.key))) for c in columns) + r" \\" for row in self.rows),
            "\\bottomrule", "\\end{tabular}", "\\end{table}", "",
        ]  # fmt: skip
        return "\n".join(lines)


def csv_names(column: Column) -> list[str]:
    if column.kind == "score":
        return [column.key, f"{column.key}_low", f"{column.key}_high", f"{column.key}_n"]
    return [f"{column.key}_low", f"{column.key}_high"] if column.kind == "interval" else [column.key]


def csv_values(column: Column, value) -> list:
    if column.kind == "score":
        return [value.accuracy, value.low, value.high, value.n] if value else [""] * 4
    if column.kind == "interval":
        return list(value) if value else ["", ""]
    return ["" if value is None else value]


def shown(column: Column, value) -> str:
    """A value as text: accuracies in %, differences in points; "–" where there is none."""
    if value is None:
        return "–"
    if column.kind == "score":
        return f"{100 * value.accuracy:.1f} [{100 * value.low:.1f}, {100 * value.high:.1f}]"
    if column.kind == "interval":
        return f"{points(value[0])} to {points(value[1])}"
    formats = {
        "share": lambda v: f"{100 * v:.1f}",
        "points": lambda v: points(v, True),
        "count": lambda v: v if isinstance(v, str) else f"{v:,}",
        "p": p_text,
        "mark": lambda v: MARKS[v][0],
        "text": str,
        "long": str,
    }
    return formats[column.kind](value)


class Tables:
    """Makes the tables of one grid from its files and `stats.summarise`."""

    def __init__(self, grid: Grid, summary: dict):
        self.grid, self.summary = grid, summary
        self._rows = {(r["table"], r["row"], r["target"], r["arm"], r["against"]): r for r in summary["rows"]}

    def all(self) -> list[Table]:
        made = [
            *self.effects(), *self.combination("pairs"), *self.combination("triples"),
            *self.combination("detection_pairs"), self.ablation(),
            *self.multi_task(), self.efficiency(),
        ]  # fmt: skip
        return [table for table in made if table.rows]

    def paired(self, table: str, row: str, target: str, arm: str, against: str) -> dict | None:
        return self._rows.get((table, row, target, arm, against))

    def mark(self, found: Sequence[dict | None]) -> str | None:
        """The mark of one arm against several: surely above (below) all, above (below) all, or neither."""
        found = [row for row in found if row]
        if not found:
            return None
        sure = all(row["p_holm"] < 0.05 for row in found)
        if all(row["difference"] > 0 for row in found):
            return "win-sure" if sure else "win"
        if all(row["difference"] < 0 for row in found):
            return "loss-sure" if sure else "loss"
        return "even"

    def effects(self) -> list[Table]:
        """The whole tables' effects, and, folded away, those of their directions."""
        caption = (
            "Mean differences between arms, in points of accuracy, with 95 % bootstrap intervals over targets, seeds "
            "and test records; rows above and below, and how many of these significantly (exact McNemar test per row, "
            "Holm-adjusted over a table's rows). Overall: a sign-flip test of the targets' means, its p by direction "
            "adjusted by Holm over a table's directions, and the least it can be with so few targets. Green: the "
            "interval is above 0; orange: below."
        )
        columns = [
            Column("name", "Difference", "long"), Column("mean", "Points", "points"),
            Column("ci", "95\u00a0% interval", "interval"),
            Column("rows", "Rows", "count"), Column("wins", "Up", "count"), Column("significant", "signif.", "count"),
            Column("losses", "Down", "count"), Column("significant_losses", "signif.", "count"),
            Column("p_overall", "Overall p", "p"), Column("p_overall_holm", "p, Holm", "p"),
            Column("p_smallest", "Least p", "p"),
            Column("targets", "Targets", "count"), Column("seeds", "Seeds", "count"),
            *(Column(f"seed_{seed}", f"Seed {seed}", "points") for seed in self.grid.seeds),
        ]  # fmt: skip
        # Holm's family are a table's directions: a table as a whole stands alone.
        whole = Table("effects", "Differences", caption, [c for c in columns if c.key != "p_overall_holm"])
        parts = Table("effects_by_direction", "Differences by direction", caption, columns, wide=True)
        for effect in self.summary["effects"]:
            # In and out of distribution answer different questions; triples have one direction.
            table = whole if (effect["part"] == "") != (effect["table"] == "multi_task") else parts
            if table is parts and effect["table"] != "pairs":
                continue
            colour = {"up": "win-sure", "down": "loss-sure", "open": ""}[verdict(effect)]
            values = {"name": effect_name(effect), "ci": (effect["ci_low"], effect["ci_high"])}
            values |= {f"seed_{seed}": value for seed, value in effect["by_seed"].items()}
            table.add({c.key: effect.get(c.key) for c in columns} | values, mean=colour)
        return [whole, parts]

    def combination(self, table: str) -> list[Table]:
        """One table per direction of `pairs`, `triples` or `detection_pairs`."""
        made: dict[str, Table] = {}
        family = MODELS.get(self.grid.config["model"]["name"], "")
        numbers = {"pairs": PAIR_TABLES.get(family, 3), "triples": 4}
        number, above = numbers.get(table), "both baselines, solid where both differences are"
        if table == "detection_pairs":
            number, above = DETECTION_TABLES.get(family, 5), "Baseline, solid where the difference is"
        name = table.replace("_", " ").capitalize()
        over = "Baseline" if table == "detection_pairs" else "Baseline+"
        for (row, target), arms in self.grid.scores(table).items():
            part = row.split("/")[0]
            if part not in made:
                made[part] = Table(
                    f"{table}_{part}", f"{name}: {PARTS.get(part, part)}",
                    f"{name} with {PARTS.get(part, part)} (the paper's table {number}). Accuracy in % "
                    "[95 % Wilson interval] over n test answers; exact McNemar p, paired by record. Green: Trained is "
                    f"above {above} significant after Holm's adjustment; orange (red in the paper): below. "
                    f"{BOTH_SOURCES}",
                    [Column("target", "Target"), Column("what", "Combination"),
                     Column("chance", "Chance", "share"), Column("baseline", "Baseline", "score"),
                     Column("baseline_plus", "Baseline+", "score"),
                     Column("trained", "Trained", "score"), Column("mark", "", "mark"), Column("n", "n", "count"),
                     Column("difference", f"Points over {over}", "points"),
                     Column("ci", "95\u00a0% interval", "interval"),
                     Column("p_plus", "p vs Baseline+", "p"), Column("p_base", "p vs Baseline", "p"),
                     Column("seeds", "Seeds"), Column("cost", "Seconds", "count"),
                     Column("related", "Trained on", "long")],
                )  # fmt: skip
            plus = self.paired(table, row, target, "trained", "baseline_plus")
            base = self.paired(table, row, target, "trained", "baseline")
            mark, first = self.mark([plus, base]), (base if over == "Baseline" else plus) or {}
            ci = (first["ci_low"], first["ci_high"]) if "ci_low" in first else None
            made[part].add(
                {"related": self.related(table, row, "trained"), "target": target,
                 "what": self.grid.describe(target) or None, "chance": self.grid.chance(target),
                 "baseline": arms.get("baseline"), "baseline_plus": arms.get("baseline_plus"),
                 "trained": arms.get("trained"), "mark": mark, "n": answers_per_arm(arms),
                 "difference": first.get("difference"), "ci": ci, "cost": self.cost(table, row, "trained"),
                 "p_plus": plus and plus["p"], "p_base": base and base["p"], "seeds": seeds_text(arms)},
                trained=mark, mark=mark,
            )  # fmt: skip
        return list(made.values())

    def cost(self, table: str, row: str, arm: str) -> int | None:
        """Seconds that the trainings behind a row's arm took, over its seeds; None where none were recorded."""
        cells = [c for c in self.grid.done(table) if (c["row"], c["arm"]) == (row, arm)]
        return round(sum(float(c["seconds"] or 0) for c in cells)) or None

    def related(self, table: str, row: str, arm: str) -> str:
        """What an arm was trained on; how many draws where the seeds differ, which the list of cells has."""
        found = [c for c in self.grid.done(table) if c["row"] == row and c["arm"] == arm]
        sets = dict.fromkeys(c["related"].replace("+", " + ") for c in found)
        if len(sets) <= 1:
            return next(iter(sets), "–")
        return f"{len(sets)} draws, in the list of cells"

    def ablation(self) -> Table:
        arms = ("baseline", "all_related", "all_unrelated", "wo_modality", "wo_area", "wo_task", "random_removal",
                "same_task", "all_data")  # fmt: skip
        made = Table(
            "ablation", "Ablation",
            "What each element is worth (the paper's figure 4) and two controls: a random removal of as many related "
            "subsets, and the subsets that share the task alone. Accuracy in % [95 % Wilson interval]. "
            "Orange: significantly below all related (exact McNemar, Holm-adjusted); green: significantly above.",
            [Column("target", "Target"), Column("what", "Combination"), Column("chance", "Chance", "share"),
             *(Column(arm, arm_name(arm), "score") for arm in arms), Column("n", "n", "count"),
             Column("seeds", "Seeds")],
        )  # fmt: skip
        for (row, target), scores in self.grid.scores("ablation").items():
            colours = {}
            for arm in arms:
                mark = self.mark([self.paired("ablation", row, target, "all_related", arm)])
                colours[arm] = {"win-sure": "loss-sure", "loss-sure": "win-sure"}.get(mark or "", "")
            chance = self.grid.chance(target)
            what = self.grid.describe(target) or None
            values = {
                "target": target,
                "what": what,
                "chance": chance,
                "n": answers_per_arm(scores),
                "seeds": seeds_text(scores),
            }
            made.add(values | {arm: scores.get(arm) for arm in arms}, **colours)
        return made

    def multi_task(self) -> list[Table]:
        """In distribution (the paper's table 1) and out of distribution (table 2)."""
        made = {}
        for part, number, arms in (
            ("in_distribution", 1, ("baseline", "single_task")),
            ("out_of_distribution", 2, ("baseline",)),
        ):
            made[part] = Table(
                f"multi_task_{part}", f"Multi-task: {PARTS[part]}",
                f"One model of all subsets, {PARTS[part]} (the paper's table {number}). Accuracy in % [95 % Wilson "
                "interval]; exact McNemar p. Green: Multi-task is above all others of the row, solid where "
                f"significantly; orange: below all. {BOTH_SOURCES}",
                [Column("target", "Subset"), Column("what", "Combination"), Column("chance", "Chance", "share"),
                 *(Column(arm, arm_name(arm), "score") for arm in (*arms, "multi_task")), Column("mark", "", "mark"),
                 Column("singles", "Single-task, mean of all", "share"),
                 Column("n", "n", "count"), Column("difference", f"Points over {arm_name(arms[-1])}", "points"),
                 Column("ci", "95\u00a0% interval", "interval"),
                 *(Column(f"p_{arm}", f"p vs {arm_name(arm)}", "p") for arm in reversed(arms)),
                 Column("seeds", "Seeds"), Column("cost", "Seconds", "count")],
            )  # fmt: skip
            for (row, target), scores in self.grid.scores("multi_task").items():
                if row != part:
                    continue
                found = {arm: self.paired("multi_task", row, target, "multi_task", arm) for arm in arms}
                mark = self.mark(list(found.values()))
                values = {"target": target, "what": self.grid.describe(target) or None,
                          "chance": self.grid.chance(target), "mark": mark, "n": answers_per_arm(scores),
                          "seeds": seeds_text(scores)}  # fmt: skip
                values |= {arm: scores.get(arm) for arm in (*arms, "multi_task")}
                values["singles"] = self.mean_of_singles(part, target)
                first = found[arms[-1]]
                if first:
                    values |= {"difference": first["difference"], "ci": (first["ci_low"], first["ci_high"])}
                values["cost"] = self.cost("multi_task", row, "multi_task")
                values |= {f"p_{arm}": row and row["p"] for arm, row in found.items()}
                made[part].add(values, multi_task=mark, mark=mark)
        return list(made.values())

    def mean_of_singles(self, part: str, target: str) -> float | None:
        """Mean accuracy on a target of the models of one other subset each; None where they were not asked."""
        found = [
            scores["single_task"].accuracy
            for (row, tested), scores in self.grid.scores("multi_task").items()
            if row.startswith(f"{part}/") and tested == target and "single_task" in scores
        ]
        return sum(found) / len(found) if found else None

    def efficiency(self) -> Table:
        made = Table(
            "efficiency", "Data efficiency",
            "Accuracy over the number of the target's own training records, with all related subsets and without them; "
            "mean over targets and seeds in %, 95 % bootstrap intervals. The difference is paired by record, in "
            "points. Green: its interval is above 0; orange: below.",
            [Column("records", "Target records", "count"), Column("with_related", "With all related", "score"),
             Column("target_only", "Target alone", "score"), Column("mean", "Difference", "points"),
             Column("ci", "95\u00a0% interval", "interval"), Column("targets", "Targets", "count"),
             Column("seeds", "Seeds", "count")],
        )  # fmt: skip
        gains = {g["records"]: g for g in efficiency_gains(self.grid)}
        rows: dict[int, dict] = {}
        for curve in self.summary["curves"]:
            row = rows.setdefault(curve["records"], {"records": curve["records"]})
            row[curve["curve"]] = Score(curve["accuracy"], curve["ci_low"], curve["ci_high"], curve["n"], ())
            row |= {"targets": curve["targets"], "seeds": curve["seeds"]}
        for records in sorted(rows):
            gain = gains.get(records)
            colour = {"up": "win-sure", "down": "loss-sure", "open": ""}[verdict(gain)] if gain else ""
            more = {"mean": gain["mean"], "ci": (gain["ci_low"], gain["ci_high"])} if gain else {}
            made.add(rows[records] | more, mean=colour)
        return made


def answers_per_arm(arms: dict[str, Score]) -> int | str:
    """The test answers per arm; "24–48" where arms differ, since seeds of some are missing."""
    least, top = min(score.n for score in arms.values()), max(score.n for score in arms.values())
    return top if least == top else f"{least:,}–{top:,}"


def seeds_text(arms: dict[str, Score]) -> str:
    """Such as "0, 1, 2"; where an arm has others, they are added by name."""
    common = max((score.seeds for score in arms.values()), key=len)
    text = ", ".join(map(str, common))
    odd = [f"{arm_name(arm)}: {', '.join(map(str, s.seeds))}" for arm, s in arms.items() if s.seeds != common]
    return f"{text} ({'; '.join(odd)})" if odd else text
