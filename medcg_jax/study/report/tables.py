"""The tables of a grid's report, from its files and `stats.summarise`."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from medcg_jax.config import MODELS
from medcg_jax.data.leaks import EXACT
from medcg_jax.data.records import LETTERS
from medcg_jax.eval import boxes as box_scores
from medcg_jax.eval.boxes import BoxAnswer
from medcg_jax.study.design.suite import DETECTION_TABLES, PAIR_TABLES
from medcg_jax.study.report.load_grid import Grid, Score, arm_name
from medcg_jax.study.report.table import Table
from medcg_jax.study.report.text import PARTS, effect_name, efficiency_gains, state
from medcg_jax.train import goodput

# `state` of an effect -> CSS class.
COLOURS = {"up": "win-sure", "down": "loss-sure", "open": ""}
ABLATION_ARMS = (
    "baseline", "all_related", "all_unrelated", "wo_modality", "wo_area", "wo_task", "random_removal", "same_task",
    "all_data",
)  # fmt: skip
BOTH_SOURCES = (
    "The p is of these records alone; the interval of the difference counts the spread of seeds too, so that of a "
    "significant row may include 0. Seconds are of all seeds' trainings."
)
# The row that sums over all subsets of a table of boxes.
ALL_SUBSETS = "all subsets"
# Number of findings named in a row of the contamination table.
NUM_FINDINGS = 3
# Kind of time -> description.
TIME_WORDS = {
    "productive": "steps that counted",
    "compile": "the first step of each program",
    "input": "devices standing still for data",
    "checkpoint": "the loop held up by saving",
    "restart": "start-up after the first, restoring, steps made again",
    "evaluation": "tests",
    "other": "the first start-up, encoding data, waiting for other processes, and the rest",
}


class Tables:
    """The tables of one grid that need its statistics."""

    def __init__(self, grid: Grid, summary: dict):
        self.grid, self.summary = grid, summary
        self._rows = {(r["table"], r["row"], r["target"], r["arm"], r["against"]): r for r in summary["rows"]}

    def all(self) -> list[Table]:
        """All non-empty tables but those with published numbers."""
        grid, tables = self.grid, list(self.effects())
        for name in ("pairs", "triples", "detection_pairs"):
            tables += self.combination(name)
        tables += [self.ablation(), self.multi_task("in_distribution"), self.multi_task("out_of_distribution")]
        tables += [self.efficiency(), contamination(grid), self.comparisons(), cells(grid), letters(grid)]
        tables += [self.controls(), self.asked_again(), time_spent(grid)]
        tables += [boxes(grid, part) for part in ("in_distribution", "out_of_distribution")]
        return [table for table in tables if table.rows]

    def paired(self, table: str, row: str, target: str, arm: str, against: str) -> dict | None:
        return self._rows.get((table, row, target, arm, against))

    def effects(self) -> tuple[Table, Table]:
        """(the effects of whole tables, those of their directions)."""
        caption = (
            "Mean differences between arms, in points, with 95 % bootstrap intervals over targets, seeds and records; "
            "rows above and below, and how many significantly (exact McNemar per row, Holm-adjusted over a table). "
            "Overall: a sign-flip test of the targets' means, by direction adjusted by Holm over a table's directions, "
            "and the least p that so few targets allow. Green: the interval is above 0; orange: below."
        )
        titles = {
            "name": "Difference", "mean": "Points", "wins": "Up", "significant": "signif.", "losses": "Down",
            "significant_losses": "signif.", "p_overall": "Overall p", "p_overall_holm": "p, Holm",
            "p_smallest": "Least p",
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
        return (
            Table("effects", "Differences", caption, whole, titles),
            Table("effects_by_direction", "Differences by direction", caption, directions, titles),
        )

    def compared(
        self, table: str, row: str, target: str, scores: dict[str, Score], arm: str, others: Sequence[str]
    ) -> dict:
        """The values of one row: an arm, others beside it, and the difference to the first of these."""
        results = [self.paired(table, row, target, arm, other) for other in others]
        first = results[0] or {}
        row_mark = mark(results)
        singles = self.mean_of_singles(row, target) if table == "multi_task" else None
        names = {} if table == "multi_task" else {"baseline_plus": "p_plus", "baseline": "p_base"}
        return (
            {"target": target, "what": self.grid.describe(target) or None, "chance": self.grid.chance(target)}
            | {name: scores.get(name) for name in (*reversed(others), arm)}
            | {"mark": row_mark, "singles": singles, "n": answers_per_arm(scores)}
            | {"difference": first.get("difference"), "ci": (first["ci_low"], first["ci_high"]) if first else None}
            | {names.get(o, f"p_{o}"): r and r["p"] for o, r in zip(others, results, strict=True)}
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
        if table == "detection_pairs":
            others, above = ("baseline",), "Baseline, solid where the difference is"
        parts: dict[str, list[dict]] = {}
        for (row, target), scores in self.grid.scores(table).items():
            values = self.compared(table, row, target, scores, "trained", others)
            values["related"] = self.trained_on(table, row, "trained")
            parts.setdefault(row.split("/")[0], []).append(values)
        titles = {"difference": f"Points over {arm_name(others[0])}"}
        return [
            Table(
                f"{table}_{part}", f"{name}: {PARTS.get(part, part)}",
                f"{name} with {PARTS.get(part, part)} (the paper's table {number}). Accuracy in % "
                "[95 % Wilson interval] over n test answers; exact McNemar p, paired by record. Green: Trained is "
                f"above {above} significant after Holm's adjustment; orange (red in the paper): below. {BOTH_SOURCES}",
                rows, titles,
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
        titles = {f"p_{other}": f"p vs {arm_name(other)}" for other in others}
        titles |= {"target": "Subset", "singles": "Single-task, mean of all"}
        titles |= {"difference": f"Points over {arm_name(others[0])}"}
        caption = (
            f"One model of all subsets, {PARTS[part]} (the paper's table {1 if len(others) == 2 else 2}). Accuracy in "
            "% [95 % Wilson interval]; exact McNemar p. Green: Multi-task is above all others of the row, solid where "
            f"significantly; orange: below all. {BOTH_SOURCES}"
        )
        return Table(f"multi_task_{part}", f"Multi-task: {PARTS[part]}", caption, rows, titles)

    def mean_of_singles(self, part: str, target: str) -> float | None:
        """Mean accuracy on a target of all models of one other subset; None where none was tested on it."""
        accuracies = [
            scores["single_task"].accuracy
            for (row, tested), scores in self.grid.scores("multi_task").items()
            if row.startswith(f"{part}/") and tested == target and "single_task" in scores
        ]
        return sum(accuracies) / len(accuracies) if accuracies else None

    def seconds(self, table: str, row: str, arm: str) -> int | None:
        """Training seconds of a row's arm over its seeds; None where none were recorded."""
        return round(sum(float(cell["seconds"] or 0) for cell in self.grid.cells_of(table, row, arm))) or None

    def trained_on(self, table: str, row: str, arm: str) -> str:
        """The training subsets of an arm; the number of draws where the seeds differ."""
        names = {cell["related"].replace("+", " + "): None for cell in self.grid.cells_of(table, row, arm)}
        return next(iter(names), "–") if len(names) < 2 else f"{len(names)} draws, in the list of cells"

    def ablation(self) -> Table:
        opposite, rows = {"win-sure": "loss-sure", "loss-sure": "win-sure"}, []
        for (row, target), scores in self.grid.scores("ablation").items():
            marks = {arm: mark([self.paired("ablation", row, target, "all_related", arm)]) for arm in ABLATION_ARMS}
            rows.append(
                {"target": target, "what": self.grid.describe(target) or None, "chance": self.grid.chance(target)}
                | {arm: scores.get(arm) for arm in ABLATION_ARMS}
                | {"n": answers_per_arm(scores), "seeds": seeds_text(scores)}
                | {"colours": {arm: opposite.get(name or "") for arm, name in marks.items()}}
            )
        caption = (
            "What each element is worth (the paper's figure 4) and two controls: a random removal of as many related "
            "subsets, and the subsets that share the task alone. Accuracy in % [95 % Wilson interval]. "
            "Orange: significantly below all related (exact McNemar, Holm-adjusted); green: significantly above."
        )
        return Table("ablation", "Ablation", caption, rows)

    def efficiency(self) -> Table:
        gains = {gain["records"]: gain for gain in efficiency_gains(self.grid)}
        rows: dict[int, dict] = {}
        for curve in sorted(self.summary["curves"], key=lambda curve: curve["records"]):
            records, gain = curve["records"], gains.get(curve["records"])
            row = rows.setdefault(records, {"records": records, "with_related": None, "target_only": None})
            row[curve["curve"]] = Score(curve["accuracy"], curve["ci_low"], curve["ci_high"], curve["n"], ())
            row |= {"mean": gain and gain["mean"], "ci": (gain["ci_low"], gain["ci_high"]) if gain else None}
            row |= {"targets": curve["targets"], "seeds": curve["seeds"]}
            row["colours"] = {"mean": COLOURS[state(gain)] if gain else ""}
        caption = (
            "Accuracy over the number of the target's own training records, with all related subsets and without them; "
            "mean over targets and seeds in %, 95 % bootstrap intervals. The difference is paired by record, in "
            "points. Green: its interval is above 0; orange: below."
        )
        titles = {"records": "Target records", "with_related": "With all related", "target_only": "Target alone"}
        return Table("efficiency", "Data efficiency", caption, rows.values(), titles | {"mean": "Difference"})

    def comparisons(self) -> Table:
        keys = ("n", "accuracy_a", "accuracy_b", "difference", "only_a", "only_b", "p", "p_holm", "ci", "sd_seeds",
                "sd_records", "detectable")  # fmt: skip
        rows = [
            {"table": row["table"], "row": row["row"], "target": row["target"], "arm": arm_name(row["arm"])}
            | {"against": arm_name(row["against"])}
            | {key: row.get(key) for key in keys}
            | {"ci": (row["ci_low"], row["ci_high"]), "seeds": ", ".join(map(str, row["seeds"]))}
            for row in self.summary["rows"]
        ]
        caption = (
            "Two arms on the same test records, in %: who alone was right how often, the exact McNemar p and the same "
            "adjusted by Holm over its table and comparison; the interval of the difference over records and seeds, "
            "and their standard deviations; the smallest true difference that so many records show four times in five."
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
        arms = [arm for arm in self.summary["controls_of_answers"] if arm["circular"] or arm["shuffled_images"]]
        shifts = sorted({shift for arm in arms for shift in (arm["circular"] or {"by_shift": ()})["by_shift"]}, key=int)
        rows = []
        for arm in arms:
            circular, two, shuffled = arm["circular"] or {}, arm["two_options"] or {}, arm["shuffled_images"]
            row = _named(arm) | {"plain": circular.get("plain")}
            row |= {f"shift_{shift}": circular.get("by_shift", {}).get(shift) for shift in shifts}
            row |= {"circular": circular.get("accuracy"), "two_plain": two.get("plain"), "two": two.get("accuracy")}
            row |= {"shuffled": None, "chance": None, "n": arm["n"]}
            if shuffled:
                row["shuffled"] = Score(
                    shuffled["accuracy"], shuffled["ci_low"], shuffled["ci_high"], shuffled["n"], ()
                )
                row["chance"] = shuffled["chance"]
                row["colours"] = {"shuffled": "loss" if shuffled["ci_low"] > shuffled["chance"] else "win"}
            rows.append(row)
        caption = (
            "Per arm, accuracy in %: with the options moved on by one, two and three places, and right in every place "
            "(circular); of questions with more than two options, as asked and with two of them; and with another "
            "record's image, which must fall to chance [95 % Wilson interval]. Orange: above chance, so something but "
            "the image gives answers away; green: not. No record keeps its own image, so a model that reads images "
            "well comes out a little below chance."
        )
        titles = {
            "plain": "As asked", "circular": "In every place", "two_plain": "More than two options",
            "two": "Two of them", "shuffled": "Another image", "n": "Answers",
        }  # fmt: skip
        titles |= {f"shift_{shift}": f"Moved by {shift}" for shift in shifts}
        return Table("controls_again", "The same tests asked again", caption, rows, titles)


def boxes(grid: Grid, part: str) -> Table:
    """Box scores of one part of `detection`: over all subsets, then of each subset."""
    rows = []
    for (target, arm, seeds), answers in grouped_boxes(grid, part).items():
        scores = box_scores.summary(answers)
        shares = {
            key: None if scores[key] is None
            else Score(scores[key], scores[f"{key}_low"], scores[f"{key}_high"], scores["n"], seeds)
            for key in ("accuracy", "mean_iou", "cumulative_iou", "dice")
        }  # fmt: skip
        rows.append(
            {"target": target, "what": (target != ALL_SUBSETS and grid.describe(target)) or None, "arm": arm_name(arm)}
            | {"questions": scores["questions"], "n": scores["n"], "found": shares["accuracy"]}
            | {"by_chance": scores["by_chance"], "mean_iou": shares["mean_iou"]}
            | {"cumulative_iou": shares["cumulative_iou"], "unparsed_rate": scores["unparsed_rate"]}
            | {"dice": shares["dice"], "seeds": ", ".join(map(str, seeds))}
        )
    caption = (
        "Boxes of the test images, asked for label by label, in %. Found: matched one to one with an answer at an IoU "
        "above 0.5, with a 95 % interval (images drawn anew; Wilson's where every question has one box). Other image: "
        "the same answers against another image's boxes, what the usual places alone are worth. IoU: mean over boxes, "
        "and sum of intersections over sum of unions. Unread: answers without a box. Dice: of the masks."
    )
    titles = {"target": "Subset", "n": "Boxes", "by_chance": "Other image", "mean_iou": "Mean IoU",
              "cumulative_iou": "Cumulative IoU", "unparsed_rate": "Unread"}  # fmt: skip
    return Table(f"detection_{part}", f"Detection: {PARTS[part]}", caption, rows, titles)


def grouped_boxes(grid: Grid, part: str) -> dict[tuple[str, str, tuple[int, ...]], list[BoxAnswer]]:
    """(subset, arm, seeds) -> answers; `ALL_SUBSETS` first.

    Each seed draws other phantoms, so their seeds are pooled. All seeds have the same images from files: these seeds
    stay separate.
    """
    cells = [cell for cell in grid.done("detection") if cell["row"] == part]
    over_subsets: dict[tuple[str, str, tuple[int, ...]], list[BoxAnswer]] = {}
    by_subset: dict[tuple[str, str, tuple[int, ...]], list[BoxAnswer]] = {}
    for cell in cells:
        seeds: tuple[int, ...] = (int(cell["seed"]),)
        if grid.is_phantom:
            seeds = tuple(sorted(int(other["seed"]) for other in cells if other["arm"] == cell["arm"]))
        for answer in grid.boxes(cell["cell"]):
            # The same record of another seed is another image.
            answer = replace(answer, id=f"{cell['seed']}/{answer.id}")
            over_subsets.setdefault((ALL_SUBSETS, cell["arm"], seeds), []).append(answer)
            by_subset.setdefault((answer.subset, cell["arm"], seeds), []).append(answer)
    return over_subsets | dict(sorted(by_subset.items(), key=lambda item: item[0][0]))


def contamination(grid: Grid) -> Table:
    """A row for each cell with a finding in contamination.csv; older grids have no such file."""
    findings: dict[str, list[dict]] = {}
    for line in grid.contamination:
        findings.setdefault(line["cell"], []).append(line)
    rows = []
    for cell, lines in findings.items():
        kinds, actions = [line["kind"] for line in lines], [line["action"] for line in lines]
        rows.append(
            {"cell": cell, "exact": sum(kinds.count(kind) for kind in EXACT), "near": kinds.count("near")}
            | {"changed": sum(bool(line.get("form")) for line in lines), "group": kinds.count("same group")}
            | {"likely_group": kinds.count("likely same group"), "question": kinds.count("same question")}
            | {"dropped": actions.count("dropped"), "refused": actions.count("refused")}
            | {"lineage": kinds.count("lineage"), "first": "; ".join(map(_finding, lines[:NUM_FINDINGS]))}
        )
    caption = (
        "Cells with training records that give a test away: its image (the same bytes or pixels, or nearly by "
        "perceptual hashes: saved again, resized, but also adjacent slices of one patient; “changed” were mirrored, "
        "turned or inverted beside that), its patient or lesion (as stated, or likely by file names), or its question. "
        "Each training record counts once in each column for each subset tested on. Lineage: pairs of source datasets, "
        "one on each side, that are the same or related. All of them are in contamination.csv."
    )
    titles = {
        "exact": "The same image", "near": "Nearly", "changed": "of these changed", "group": "The same patient",
        "likely_group": "Likely so", "question": "The same question", "dropped": "Left out",
        "first": "The first of them",
    }  # fmt: skip
    return Table("contamination", "Contamination", caption, rows, titles)


def cells(grid: Grid) -> Table:
    rows = [
        {"cell": cell["cell"], "related": cell["related"].replace("+", " + ") or "nothing"}
        | {"target": cell["target"].replace("+", " + "), "steps": int(cell["steps"])}
        | {"seconds": cell["seconds"], "status": cell["status"]}
        for cell in grid.cells
    ]
    caption = (
        "Each fine-tune with its evaluation: what it was trained on, optimizer steps, status, and seconds of the "
        "training it shares with others of the same subsets and seed."
    )
    return Table("cells", "Every cell", caption, rows, {"target": "Tested on"})


def letters(grid: Grid) -> Table:
    """Each arm's use of the letters, and its generated answers."""
    counts = {key: value for key, value in grid.letters.items() if value.n}
    names = sorted({letter for value in counts.values() for letter in (*value.predicted, *value.answers)})
    rows: list[dict] = []
    for (table, arm), value in counts.items():
        table = table.replace("_", "-")
        if not any(row["table"] == table for row in rows):
            right = {f"letter_{name}": value.answers.get(name, 0) / value.n for name in names}
            rows.append({"table": table, "arm": "(right answers)", "n": value.n} | right)
        shares = {f"letter_{name}": value.predicted.get(name, 0) / value.n for name in names}
        rows.append(
            {"table": table, "arm": arm_name(arm), "n": value.n}
            | shares
            | {"mass": value.mass / value.num_mass if value.num_mass else None, "accuracy": value.right / value.n}
            | {"unparsed": value.unparsed / value.generated if value.generated else None}
            | {"generated": value.generated_right / value.generated if value.generated else None}
        )
    caption = (
        "Per arm, in %: the share of each letter (right answers in a table's first row), the probability on the offered "
        "letters before anything is ruled out, accuracy by likelihood of the offered letters (the study's measure), and, "
        "for greedily generated answers, how many are no offered letter and the accuracy when those count as wrong."
    )
    titles = {f"letter_{name}": name for name in names} | {"n": "Answers", "mass": "Mass on letters"}
    return Table("answers", "How the letters were used", caption, rows, titles | {"generated": "Accuracy, generated"})


def time_spent(grid: Grid) -> Table:
    """A row for each kind of time in goodput.json; older grids have no such file."""
    starts = goodput.read_starts(grid.workdir / goodput.FILE)
    spent = goodput.summarise(starts) if starts else {}
    rows = [
        {"kind": kind, "what": TIME_WORDS[kind], "seconds": round(spent["seconds"][kind])}
        | {"share": spent["shares"][kind]}
        for kind in (goodput.KINDS if spent else ())
    ]
    caption = "Seconds of all processes together, over all starts, bases included; and each kind's share of them in %."
    return Table("goodput", "Where the time went", caption, rows, {"what": "What it is"})


def subset_scores(grid: Grid, target: str) -> Table:
    """The scores of one subset, of every row and arm."""
    rows = []
    for table in grid.tables:
        for (row, tested), scores in grid.scores(table).items():
            for arm, score in scores.items() if tested == target else ():
                names = {_subset_names(cell["related"]): None for cell in grid.cells_of(table, row, arm)}
                rows.append(
                    {"table": table.replace("_", "-"), "row": row, "arm": arm_name(arm), "score": score, "n": score.n}
                    | {"seeds": seeds_text({arm: score})}
                    | {"related": next(iter(names)) if len(names) == 1 else f"{len(names)} draws"}
                )
    caption = "Accuracy in % with 95 % Wilson intervals, of every row and arm."
    return Table(f"subset_{target}", "Scores", caption, rows, {"score": "Accuracy"})


def confusion(answers: Sequence[dict], most_labels: int = 12) -> Table:
    """Counts of right label by answered label. most_labels: only so many, the most frequent ones, are shown."""
    counts: Counter = Counter()
    for record in answers:
        text = dict(zip(LETTERS, record["options"], strict=False))
        counts[str(text.get(record["answer"])), str(text.get(record["predicted"]))] += 1
    frequent = Counter(label for pair in counts for label in set(pair)).most_common(most_labels)
    labels = sorted(label for label, _ in frequent)
    rows = [
        {"right": right}
        | {f"as_{label}": counts[right, label] for label in labels}
        | {"colours": {f"as_{right}": "win"}}
        for right in labels
    ]
    caption = "Right label (rows) by answered label (columns); numbers of answers."
    titles = {"right": "Right label"} | {f"as_{label}": label for label in labels}
    return Table("confusion", "What is taken for what", caption, rows, titles)


def mark(results: Sequence[dict | None]) -> str | None:
    """The mark of one arm against several: significantly above (below) all, above (below) all, or neither."""
    rows = [row for row in results if row]
    if not rows:
        return None
    suffix = "-sure" if all(row["p_holm"] < 0.05 for row in rows) else ""
    if all(row["difference"] > 0 for row in rows):
        return "win" + suffix
    return "loss" + suffix if all(row["difference"] < 0 for row in rows) else "even"


def answers_per_arm(scores: dict[str, Score]) -> int | str:
    """Test answers per arm; "24–48" where arms differ, since seeds of some are missing."""
    least, most = min(score.n for score in scores.values()), max(score.n for score in scores.values())
    return most if least == most else f"{least:,}–{most:,}"


def seeds_text(scores: dict[str, Score]) -> str:
    """Such as "0, 1, 2"; an arm with other seeds is added by name."""
    common = max((score.seeds for score in scores.values()), key=len)
    text = ", ".join(map(str, common))
    others = [f"{arm_name(arm)}: {', '.join(map(str, s.seeds))}" for arm, s in scores.items() if s.seeds != common]
    return f"{text} ({'; '.join(others)})" if others else text


def _named(controls: dict) -> dict:
    return {"table": controls["table"].replace("_", "-"), "arm": arm_name(controls["arm"])}


def _finding(line: dict) -> str:
    distance = ""
    if line["kind"] == "near":
        form = f", {line['form']}" if line.get("form") else ""
        distance = f"{form} ({line['distance_bits']} bits)"
    return f"{line['training']} and {line['test']}: {line['kind']}{distance}"


def _subset_names(related: str) -> str:
    names = related.split("+") if related else ["nothing"]
    return f"{len(names)} subsets" if len(names) > 3 else " + ".join(names)
