"""The tables of a grid's report, from its files and `stats.summarise`."""

from collections.abc import Sequence

from medcg_jax.config import DECIDING_ARMS, MODELS, NUMBERED_ARMS, REMOVAL_ARMS
from medcg_jax.study.design.overlap import LAPSES
from medcg_jax.study.design.suite import DETECTION_TABLES, PAIR_TABLES
from medcg_jax.study.report.file_tables import (
    answers_per_arm,
    boxes,
    cells,
    contamination,
    knowledge,
    letters,
    seeds_text,
    time_spent,
)
from medcg_jax.study.report.load_grid import Grid, Score, arm_name
from medcg_jax.study.report.table import Table
from medcg_jax.study.report.text import DOUBTFUL, PARTS, effect_name, efficiency_gains, state
from medcg_jax.study.stats import metrics
from medcg_jax.study.stats.calibration import NUM_BINS
from medcg_jax.study.stats.controls import BLIND
from medcg_jax.study.stats.paired import Unit, estimate

# Curves of the data efficiency.
CURVES = ("with_related", "with_unrelated", "target_only")
# The arms that the study is about.
MAIN_ARMS = ("trained", "all_related", "multi_task")
# Columns of a row's comparison that a page shows at once, the deciding ones first.
COMPARED = (
    "target", "baseline_plus", "single_task", "baseline", "trained", "multi_task", "mark", "difference", "ci", "p_plus",
    "p_single_task", "p_baseline", "chance", "n", "related", "shares", "what",
)  # fmt: skip
# `state` of an effect -> CSS class.
COLOURS = {"up": "win-sure", "down": "loss-sure", "open": ""}
# End of the ablation's arms -> what they have in common with all related subsets.
BUDGETS = {"": "epochs", "_updates": "updates"}
DECIDING = (
    "Beside Trained, with as many records and updates: each training subset alone; each with unrelated records in place "
    "of the others'; the task's words in other modalities and areas; and Trained's questions without images."
)
BOTH_SOURCES = (
    "The p is of these models on these records, not of the recipe (whose p is among all comparisons); the interval of the "
    "difference counts the spread of seeds too, so that of a significant row may include 0. Seconds are of all seeds' "
    "trainings."
)
SHARES = (
    "Shared: the elements (modality M, area A, task T) that each training subset has in common with the target; MAT is "
    "the target's own triplet."
)


class Tables:
    """The tables of one grid that need its statistics."""

    def __init__(self, grid: Grid, summary: dict):
        self.grid, self.summary = grid, summary
        self._rows = {(r["table"], r["row"], r["target"], r["arm"], r["against"]): r for r in summary["rows"]}
        self._measures: dict[tuple[str, str, str, str], dict | None] = {}

    def all(self) -> list[Table]:
        """All non-empty tables but those with published numbers."""
        grid, tables = self.grid, [self.results(), *self.effects(), self.ceilings(), self.without_lapses()]
        for name in ("pairs", "triples", "detection_pairs"):
            tables += self.combination(name)
        tables += [*self.ablation(), self.multi_task("in_distribution"), self.multi_task("out_of_distribution")]
        tables += [self.efficiency(), contamination(grid), self.comparisons(), cells(grid), letters(grid)]
        tables += [self.metrics(), self.controls(), self.asked_again(), self.calibration(), knowledge(grid)]
        tables += [time_spent(grid)]
        tables += [boxes(grid, part) for part in ("in_distribution", "out_of_distribution")]
        return [table for table in tables if table.rows]

    def results(self) -> Table:
        """Every arm with its n and accuracy, and how far the arm that the study is about lies above it."""
        effects = {(e["table"], e["part"], e["against"]): e for e in self.summary["effects"] if e["arm"] in MAIN_ARMS}
        rows = []
        for entry in self.summary["accuracy"]:
            table, part, arm = entry["table"], entry["part"], entry["arm"]
            # In and out of distribution answer different questions; an efficiency's curves have a table of their own.
            if table in NUMBERED_ARMS or (part == "") == (table == "multi_task"):
                continue
            effect = effects.get((table, part, arm))
            cells = [r for r in self.grid.results if (r["table"], r["arm"]) == (table, arm) and part in ("", r["part"])]
            units = [Unit(r["target"], r["seed"], r["n"], r["correct"], r["correct"]) for r in cells]
            mean_accuracy = estimate(units, same_records=not self.grid.is_phantom)
            chances = [
                chance
                for name in sorted({r["target"] for r in cells})
                if (chance := self.grid.chance(name)) is not None
            ]
            rows.append(
                {"table": " ".join([table.replace("_", "-"), PARTS.get(part, part)]).strip(), "arm": arm_name(arm)}
                | {
                    "n": entry["n"],
                    "accuracy": entry["accuracy"],
                    "stderr": max(error for error, _ in mean_accuracy.errors),
                    "chance": sum(chances) / len(chances) if chances else None,
                }
                | {"ceiling": entry["ceiling"], "mean": effect and effect["mean"]}
                | {"ci": (effect["ci_low"], effect["ci_high"]) if effect else None}
                | {"p": effect and effect["p_overall"], "p_smallest": effect and effect["p_smallest"]}
                | {"targets": entry["targets"], "seeds": entry["seeds"]}
                | {"colours": {"mean": COLOURS[state(effect)] if effect else ""}}
            )
        caption = (
            "Mean accuracy in % over targets and seeds with its standard error, n distinct questions; how far the arm that "
            "the study is about (Trained, All related, Multi-task) lies above each other one, in points with the 95 % "
            "interval over targets and seeds; the overall p, and the least that the layout allows (–: any). Green: shown to be above; orange: "
            "below."
        )
        titles = {"stderr": "Stderr", "mean": "Gain over it", "p_smallest": "Least possible p"}
        shown = "arm table accuracy mean stderr ci p p_smallest n chance ceiling targets seeds".split()
        return Table("results", "Results", caption, rows, titles, shown=shown)

    def paired(self, table: str, row: str, target: str, arm: str, against: str) -> dict | None:
        return self._rows.get((table, row, target, arm, against))

    def effects(self) -> tuple[Table, Table]:
        """(the effects of whole tables, those of their directions)."""
        caption = (
            "Mean differences between arms, in points, with 95 % intervals over targets crossed with seeds (with one seed "
            "over targets alone: nothing is said of the recipe); rows above and below (those that share their trainings "
            "count once), and how many significantly in these models (exact McNemar, Holm-adjusted over a table's distinct "
            "comparisons). Overall: the test of that interval, with one seed sign flips of the targets' means; by direction adjusted by Holm over a table's "
            "directions; and the least p that the layout allows, whatever the numbers are (–: any). Green: shown to be "
            "above 0; orange: below."
        )
        titles = {
            "name": "Difference", "mean": "Points", "wins": "Rows up", "significant": "Up, signif.", "losses": "Rows down",
            "significant_losses": "Down, signif.", "p_overall": "Overall p", "p_overall_holm": "p, Holm",
            "p_smallest": "Least possible p",
        }  # fmt: skip
        whole, directions = [], []
        for effect in self.summary["effects"]:
            row = {"name": effect_name(effect), "mean": effect["mean"], "ci": (effect["ci_low"], effect["ci_high"])}
            keys = ("rows", "wins", "significant", "losses", "significant_losses", "p_overall", "p_overall_holm",
                    "p_smallest", "targets", "seeds")  # fmt: skip
            row |= {key: effect[key] for key in keys}
            row |= {f"seed_{seed}": effect["by_seed"].get(str(seed)) for seed in self.grid.seeds}
            row["colours"] = {"mean": COLOURS[state(effect)]}
            # In and out of distribution answer different questions.
            if (effect["part"] == "") != (effect["table"] == "multi_task"):
                # Holm adjusts over a table's directions; the table as a whole needs no adjustment.
                whole.append(row | {"p_overall_holm": None})
            elif effect["table"] == "pairs":  # triples have one direction
                directions.append(row)
        shown = "name mean ci p_overall p_overall_holm p_smallest rows wins significant losses significant_losses targets seeds"
        return (
            Table("effects", "Differences", "", whole, titles, legend=caption, shown=shown.split()),
            Table(
                "effects_by_direction", "Differences by direction", "", directions, titles, legend=caption, shown=shown
            ),
        )

    def ceilings(self) -> Table:
        """Accuracy of each arm beside the ceiling of what its training holds; phantoms alone have one."""
        rows = [
            {"table": line["table"].replace("_", "-"), "direction": PARTS.get(line["part"], line["part"]) or None}
            | {"arm": arm_name(line["arm"]), "accuracy": line["accuracy"], "ceiling": line["ceiling"], "n": line["n"]}
            for line in self.summary["accuracy"]
            if line["ceiling"] is not None
        ]
        caption = (
            "Mean accuracy of each arm, beside the ceiling of a reader who knows what the arm's training subsets share "
            "with the target and nothing of the other elements: without the task the two labels cannot be told apart, "
            "without the modality or the area the best guess is the value that most properties or quadrants have. An arm "
            "may exceed it: on single targets by luck with an untrained word, and by elimination where the training "
            "holds the other modalities or areas. Where the pair stays far below its own, the words of an element were not learnt."
        )
        titles = {"accuracy": "Accuracy", "arm": "Arm", "direction": "Direction", "ceiling": "Ceiling"}
        return Table("ceilings", "What each arm could reach", caption, rows, titles)

    def without_lapses(self) -> Table:
        """The verdicts and gains once more, without printed rows that share more or less with their target than they say."""
        levels = [{"left_out": [], **self.summary}, *self.summary["without_lapses"]]
        rows = []
        for level in levels if len(levels) > 1 else ():
            effects = {(e["table"], e["part"], e["arm"], e["against"]): e for e in level["effects"]}
            for line in level["verdicts"]:
                if line["part"] == "":
                    gain = line["gain"] or {}
                    base = effects.get((line["table"], "", "trained", "baseline"))
                    rows.append(
                        {"left_out": "; ".join(LAPSES[name] for name in level["left_out"]) or "(no row)"}
                        | {"table": line["table"].replace("_", "-"), "verdict": line["these_models"] or line["verdict"]}
                        | {"rows": line["rows"], "targets": line["targets"], "seeds": line["seeds"]}
                        | {"mean": gain.get("mean"), "ci": (gain["ci_low"], gain["ci_high"]) if gain else None}
                        | {"p": gain.get("p"), "difference": base and base["mean"]}
                    )
        caption = (
            "Some printed rows share more with their target, or less, than their direction says, by this project's table "
            "of tasks: the verdict with all rows, then without one kind of these after the other. Trained less Baseline+ "
            "and less Baseline, in points, with the 95 % interval and p of the first; with one seed all of it is of these "
            "trained models alone. A printed row that reads as an earlier one is left out throughout."
        )
        titles = {"left_out": "Left out", "mean": "Points over Baseline+", "difference": "Points over Baseline"}
        return Table("effects_without_lapses", DOUBTFUL, caption, rows, titles)

    def compared(
        self, table: str, row: str, target: str, scores: dict[str, Score], arm: str, others: Sequence[str]
    ) -> dict:
        """The values of one row: an arm, others beside it, and the difference to the first of these."""
        results = [self.paired(table, row, target, arm, other) for other in others]
        first, chance = results[0] or {}, self.grid.chance(target)
        row_mark = mark(results)
        if row_mark in ("win", "win-sure") and chance is not None and arm in scores and scores[arm].low <= chance:
            row_mark = "chance"
        singles = self.mean_of_singles(row, target) if table == "multi_task" else None
        names = {} if table == "multi_task" else {"baseline_plus": "p_plus", "baseline": "p_base"}
        return (
            {"target": target, "what": self.grid.describe(target) or None}
            | ({} if table == "multi_task" else self.trained_on(table, row, target, arm))
            | {"chance": chance, "majority": self.majority(table, row, target, arm)}
            | {name: scores.get(name) for name in (*reversed(others), arm)}
            | {"mark": row_mark, "singles": singles}
            | ({} if table == "multi_task" else {name: scores.get(name) for name in DECIDING_ARMS})
            | {"n": answers_per_arm(scores)}
            | {"difference": first.get("difference"), "ci": (first["ci_low"], first["ci_high"]) if first else None}
            | {names.get(o, f"p_{o}"): r and r["p_holm"] for o, r in zip(others, results, strict=True)}
            | {"seeds": seeds_text(scores), "cost": self.seconds(table, row, arm)}
            | {"colours": {arm: row_mark, "mark": row_mark}}
        )

    def combination(self, table: str) -> list[Table]:
        """One table per direction of `pairs`, `triples` or `detection_pairs`."""
        family = MODELS.get(self.grid.config["model"]["name"], "")
        number = {"pairs": PAIR_TABLES.get(family, 3), "triples": 4}.get(table, DETECTION_TABLES.get(family, 5))
        name = table.replace("_", " ").capitalize()
        others: tuple[str, ...] = ("baseline_plus", "baseline")
        above = "both baselines, solid where both differences are"
        arms = {name for scores in self.grid.scores(table).values() for name in scores}
        if "baseline_plus" not in arms:  # older detection pairs
            others, above = ("baseline",), "Baseline, solid where the difference is"
        parts: dict[str, list[dict]] = {}
        for (row, target), scores in self.grid.scores(table).items():
            values = self.compared(table, row, target, scores, "trained", others)
            parts.setdefault(row.split("/")[0], []).append(values)
        titles = {"difference": f"Points over {arm_name(others[0])}"}
        deciding = f" {DECIDING}" if arms & {*DECIDING_ARMS} else ""
        legend = (
            "Accuracy in % [95 % Wilson interval] over n test answers; p of the exact McNemar test, paired by record, after "
            f"Holm's adjustment. Green: Trained is above {above} significant after it; orange (red in the paper): below; "
            f"grey: above, but not above chance. {BOTH_SOURCES} {SHARES}{deciding}"
        )
        return [
            Table(
                f"{table}_{part}", f"{name}: {PARTS.get(part, part)}",
                f"{name} with {PARTS.get(part, part)} (the paper's table {number}).", rows, titles, legend=legend,
                shown=COMPARED,
            )
            for part, rows in parts.items()
        ]  # fmt: skip

    def multi_task(self, part: str) -> Table:
        """In distribution (the paper's table 1) or out of distribution (table 2)."""
        others = ("single_task", "baseline") if part == "in_distribution" else ("baseline",)
        rows = [
            self.compared("multi_task", row, target, scores, "multi_task", others)
            for (row, target), scores in self.grid.scores("multi_task").items()
            if row == part
        ]
        titles = {f"p_{other}": f"Holm p vs {arm_name(other)}" for other in others}
        titles |= {"target": "Subset", "singles": "Single-task, mean of all"}
        titles |= {"difference": f"Points over {arm_name(others[0])}"}
        caption = (
            f"One model of all subsets, {PARTS[part]} (the paper's table {1 if len(others) == 2 else 2}). Accuracy in "
            "% [95 % Wilson interval]; p of the exact McNemar test after Holm's adjustment. Green: Multi-task is above all "
            f"others of the row, solid where significantly; orange: below all; grey: above, but not above chance. "
            f"{BOTH_SOURCES}"
        )
        return Table(f"multi_task_{part}", f"Multi-task: {PARTS[part]}", caption, rows, titles, shown=COMPARED)

    def mean_of_singles(self, part: str, target: str) -> float | None:
        """Mean accuracy on a target of all models of one other subset; None where none was tested on it."""
        accuracies = [
            scores["single_task"].accuracy
            for (row, tested), scores in self.grid.scores("multi_task").items()
            if row.startswith(f"{part}/") and tested == target and "single_task" in scores
        ]
        return sum(accuracies) / len(accuracies) if accuracies else None

    def measures(self, table: str, row: str, target: str, arm: str) -> dict | None:
        """`metrics.mean_over_seeds` of one row's arm; None where no letters were asked for."""
        key = table, row, target, arm
        if key not in self._measures:
            frames = [self.grid.answers.frame(cell["cell"]) for cell in self.grid.cells_of(table, row, arm)]
            of_target = [frame[frame["subset"] == target] for frame in frames]
            asked = [metrics.metrics_of(frame) for frame in of_target if len(frame)]
            self._measures[key] = metrics.mean_over_seeds(asked) if asked else None
        return self._measures[key]

    def majority(self, table: str, row: str, target: str, arm: str) -> float | None:
        """The share of the most frequent label in a row's tests; None of phantoms, whose labels are balanced."""
        measures = None if self.grid.of_phantoms else self.measures(table, row, target, arm)
        return measures and measures["majority"]

    def metrics(self) -> Table:
        """What accuracy hides where labels are not balanced, of every row and arm."""
        rows = []
        for table in self.grid.tables:
            for (row, target), scores in self.grid.scores(table).items():
                for arm, score in scores.items():
                    measures = self.measures(table, row, target, arm) or {}
                    rows.append(
                        {"table": table.replace("_", "-"), "row": row, "target": target, "arm": arm_name(arm)}
                        | {"n": score.n, "accuracy": score.accuracy}
                        | {
                            key: measures.get(key)
                            for key in ("majority", "balanced", "auroc", "labels", "auroc_labels")
                        }
                        | {"why": measures.get("why") or None}
                    )
        caption = (
            "Beside accuracy, in %, over a row's seeds: the share of the most frequent label in the test set, which is "
            "what always answering it would give where it is always offered; balanced accuracy, the mean over labels of "
            "the share of their records answered rightly; and the mean over labels of the area under the ROC curve of "
            "each against the rest (50: no order), from the probabilities of the offered options, among the records that "
            "offer the label. A label is the text of an option. Blank: not defined, with the reason."
        )
        titles = {
            "balanced": "Balanced accuracy",
            "auroc": "AUROC",
            "auroc_labels": "Labels in it",
            "why": "Why not all",
        }
        return Table("metrics", "Beside accuracy: labels that are not balanced", caption, rows, titles)

    def seconds(self, table: str, row: str, arm: str) -> int | None:
        """Training seconds of a row's arm over its seeds; None where none were recorded."""
        return round(sum(float(cell["seconds"] or 0) for cell in self.grid.cells_of(table, row, arm))) or None

    def trained_on(self, table: str, row: str, target: str, arm: str) -> dict[str, str | None]:
        """Columns: the training subsets of an arm, or the number of draws where the seeds differ, and what each shares."""
        cells = self.grid.cells_of(table, row, arm)
        names = {cell["related"].replace("+", " + "): None for cell in cells}
        shares = filter(None, {self.grid.shares(cell["related"], target): None for cell in cells})
        drawn = next(iter(names), "–") if len(names) < 2 else f"{len(names)} draws, in the list of cells"
        return {"related": drawn, "shares": " or ".join(shares) or None}

    def ablation(self) -> list[Table]:
        """Figure 4, and the same at equal updates."""
        opposite, tables = {"win-sure": "loss-sure", "loss-sure": "win-sure"}, []
        for end, budget in BUDGETS.items():
            removals, rows = [f"{arm}{end}" for arm in (*REMOVAL_ARMS, "random_removal")], []
            for (row, target), scores in self.grid.scores("ablation").items():
                marks = {arm: mark([self.paired("ablation", row, target, "all_related", arm)]) for arm in removals}
                rows.append(
                    {"target": target, "what": self.grid.describe(target) or None, "chance": self.grid.chance(target)}
                    | {arm: scores.get(arm) for arm in ("baseline", "all_related", *removals)}
                    | {"n": answers_per_arm(scores), "seeds": seeds_text(scores)}
                    | {"colours": {arm: opposite.get(name or "") for arm, name in marks.items()}}
                )
            caption = (
                f"What each element is worth, at equal {budget} (the paper's figure 4{'' if end else ', as far as stated'})"
                ", and controls: random removals of as many related subsets, and the subsets that share the task alone. "
                "Accuracy in % [95 % Wilson interval]. Orange: significantly below all related (exact McNemar, "
                "Holm-adjusted); green: significantly above."
            )
            if any(row[arm] for row in rows for arm in removals) or not end:
                title = "Ablation at equal updates" if end else "Ablation"
                tables.append(Table(f"ablation{end}", title, caption, rows))
        return tables

    def efficiency(self) -> Table:
        gains = {gain["records"]: gain for gain in efficiency_gains(self.grid)}
        rows: dict[int, dict] = {}
        for curve in sorted(self.summary["curves"], key=lambda curve: curve["records"]):
            records, gain = curve["records"], gains.get(curve["records"])
            row = rows.setdefault(records, {"records": records} | dict.fromkeys(CURVES))
            row[curve["curve"]] = Score(curve["accuracy"], curve["ci_low"], curve["ci_high"], curve["n"], ())
            row |= {"mean": gain and gain["mean"], "ci": (gain["ci_low"], gain["ci_high"]) if gain else None}
            row |= {"targets": curve["targets"], "seeds": curve["seeds"]}
            row["colours"] = {"mean": COLOURS[state(gain)] if gain else ""}
        caption = (
            "Accuracy over the number of the target's own training records, with all related subsets, with as many "
            "unrelated records, and alone; mean over targets and seeds in %, 95 % intervals over both. The difference "
            "of the first and the last is paired by record, in points. Green: shown to be above 0, by interval and test "
            "over targets (so never with one target); orange: below."
        )
        titles = {"records": "Target records", "with_related": "With all related", "with_unrelated": "With unrelated"}
        titles |= {"target_only": "Target alone"}
        return Table("efficiency", "Data efficiency", caption, rows.values(), titles | {"mean": "Difference"})

    def comparisons(self) -> Table:
        keys = ("n", "patients", "accuracy_a", "accuracy_b", "difference", "only_a", "only_b", "p", "p_holm", "p_recipe",
                "ci", "sd_seeds", "sd_records", "detectable")  # fmt: skip
        rows = [
            {"table": row["table"], "row": row["row"], "target": row["target"], "arm": arm_name(row["arm"])}
            | {"against": arm_name(row["against"])}
            | {key: row.get(key) for key in keys}
            | {"ci": (row["ci_low"], row["ci_high"]), "seeds": ", ".join(map(str, row["seeds"]))}
            for row in self.summary["rows"]
        ]
        caption = (
            "Two arms on the same test records, in %: who alone was right how often, the exact McNemar p of these models "
            "(patients drawn as a whole where they are known), the same adjusted by Holm over the distinct trainings of "
            "its table and comparison, and with several seeds the p of the recipe; the interval of the difference over "
            "records and seeds, and their standard deviations; the smallest true difference that so many records show four times in five."
        )
        titles = {"accuracy_a": "Arm", "accuracy_b": "Against", "difference": "Points", "only_a": "Only arm",
                  "only_b": "Only against", "sd_seeds": "SD of seeds", "sd_records": "SD of records"}  # fmt: skip
        return Table("comparisons", "Every paired comparison", caption, rows, titles)

    def controls(self) -> Table:
        """Accuracies from letters alone, and generation beside likelihood."""
        arms = self.summary["controls_of_answers"]
        counts = sorted({group["options"] for arm in arms for group in arm["by_options"]})
        rows = []
        for arm in arms:
            by_options = {group["options"]: group["accuracy"] for group in arm["by_options"]}
            keys = ("n", "accuracy", "most_frequent_accuracy", "prior_corrected_accuracy")
            rows.append(
                _named(arm)
                | {key: arm[key] for key in keys}
                | {f"options_{count}": by_options.get(count) for count in counts}
                | {key: (arm["generation"] or {}).get(key) for key in ("likelihood", "generated", "agreement", "p")}
            )
        caption = (
            "Per arm, in %: the accuracy; what answering its most frequent letter always would give; the accuracy "
            "after the letters' probabilities are divided by their mean (a liking for letters taken out); by number of "
            "options, beside chance; and accuracy by likelihood and by free generation on the same records, how often "
            "the two agree, and the exact McNemar p."
        )
        titles = {
            "n": "Answers", "most_frequent_accuracy": "Most frequent letter", "likelihood": "By likelihood",
            "prior_corrected_accuracy": "Liking for letters taken out", "agreement": "Agree",
        }  # fmt: skip
        titles |= {f"options_{count}": f"{count} options (chance {100 / count:.0f})" for count in counts}
        return Table("controls", "What letters and options alone give", caption, rows, titles)

    def asked_again(self) -> Table:
        """Accuracies on changed questions."""
        arms = [
            arm for arm in self.summary["controls_of_answers"] if arm["circular"] or any(arm[name] for name in BLIND)
        ]
        shifts = sorted({shift for arm in arms for shift in (arm["circular"] or {"by_shift": ()})["by_shift"]}, key=int)
        rows = []
        for arm in arms:
            circular, two = arm["circular"] or {}, arm["two_options"] or {}
            row = _named(arm) | {"plain": circular.get("plain")}
            row |= {f"shift_{shift}": circular.get("by_shift", {}).get(shift) for shift in shifts}
            row |= {"circular": circular.get("accuracy"), "two_plain": two.get("plain"), "two": two.get("accuracy")}
            blind = {name: arm[name] for name in BLIND}
            row |= {
                name: asked and Score(asked["accuracy"], asked["ci_low"], asked["ci_high"], asked["n"], ())
                for name, asked in blind.items()
            }
            row |= {"chance": next((asked["chance"] for asked in blind.values() if asked), None), "n": arm["n"]}
            row["colours"] = {
                name: "loss" if asked["ci_low"] > asked["chance"] else "win" for name, asked in blind.items() if asked
            }
            rows.append(row)
        caption = (
            "Per arm, accuracy in %: with the options moved on by one, two and three places, and right in every place "
            "(circular); of questions with more than two options, as asked and with two of them; and with another "
            "record's image, a grey one or none, which must fall to chance [95 % Wilson interval]. Orange: above "
            "chance, so something but the image gives answers away; green: not. No record keeps its own image, so a "
            "model that reads images well comes out a little below chance beside another's."
        )
        titles = {
            "plain": "As asked", "circular": "In every place", "two_plain": "More than two options",
            "two": "Two of them", "shuffled_images": "Another image", "blank_images": "Grey image",
            "text_only": "No image", "n": "Answers",
        }  # fmt: skip
        titles |= {f"shift_{shift}": f"Moved by {shift}" for shift in shifts}
        return Table("controls_again", "The same tests asked again", caption, rows, titles)

    def calibration(self) -> Table:
        """What the probabilities of the letters are worth."""
        keys = ("accuracy", "confidence", "ece", "ece_of_calibrated", "brier", "aurc", "aurc_least", "n", "records")
        rows = [_named(arm) | {key: arm[key] for key in keys} for arm in self.summary["calibration"]]
        for row in rows:
            row["colours"] = {"ece": "loss" if row["ece"] > 2 * row["ece_of_calibrated"] else ""}
        caption = (
            "Per arm, in %: the accuracy; the mean confidence, which is the probability of the letter answered among "
            f"those offered; the expected calibration error over {NUM_BINS} bins of confidence of equal width, and about "
            "what chance alone would leave of it with so many records (orange: more than twice that); the Brier score, "
            "a sum over the letters from 0 to 200 (50 for two options at random, 75 for four); and the area under the "
            "curve of risk over coverage, the mean share of wrong answers among the most confident ones, with the least "
            "that this accuracy allows. Where confidence says nothing the area is 100 less the accuracy."
        )
        titles = {
            "confidence": "Confidence", "ece": "Calibration error", "ece_of_calibrated": "By chance",
            "brier": "Brier score", "aurc": "Area under risk-coverage", "aurc_least": "Least", "n": "Answers",
            "records": "Records",
        }  # fmt: skip
        return Table("calibration", "Calibration, and risk by coverage", caption, rows, titles)


def mark(results: Sequence[dict | None]) -> str | None:
    """The mark of one arm against several: significantly above (below) all, above (below) all, or neither."""
    rows = [row for row in results if row]
    if not rows:
        return None
    suffix = "-sure" if all(row["p_holm"] < 0.05 for row in rows) else ""
    if all(row["difference"] > 0 for row in rows):
        return "win" + suffix
    return "loss" + suffix if all(row["difference"] < 0 for row in rows) else "even"


def _named(controls: dict) -> dict:
    return {"table": controls["table"].replace("_", "-"), "arm": arm_name(controls["arm"])}
