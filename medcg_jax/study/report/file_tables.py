"""The tables of a grid's report that need its files alone: boxes, contamination, cells, letters, time, single subsets."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from medcg_jax.data.controls import WITHOUT_IMAGES
from medcg_jax.data.leaks import EXACT
from medcg_jax.data.records import LETTERS
from medcg_jax.eval import boxes as box_scores
from medcg_jax.eval.boxes import BoxAnswer
from medcg_jax.eval.predictions import wilson
from medcg_jax.eval.probe import FEATURES
from medcg_jax.study.report.load_grid import Grid, Score, arm_name
from medcg_jax.study.report.samples import SHOWN
from medcg_jax.study.report.table import Table
from medcg_jax.study.report.text import PARTS
from medcg_jax.study.stats.answers import PLAIN
from medcg_jax.study.stats.grid_files import training_of
from medcg_jax.train import goodput

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


def knowledge(grid: Grid) -> Table:
    """What the base knows of each target: its linear probe, and its answers and those after a fine-tune without images.

    Without rows where the base was not probed, and nothing was asked without images.
    """
    probed: dict[tuple[str, str], list[dict]] = {}
    for row in grid.probes:
        probed.setdefault((row["target"], row["features"]), []).append(row)
    trained = next(((t, a) for t, a in SHOWN if any(c["arm"] == a for c in grid.done(t))), ("", ""))
    rows = []
    for target in dict.fromkeys(row["target"] for row in grid.results):
        scores = {f"probe_{name}": _probe_score(grid, probed.get((target, name), [])) for name in FEATURES}
        for side, (table, arm) in (("base", (trained[0], "baseline")), ("trained", trained)):
            for control in (PLAIN, *WITHOUT_IMAGES):
                scores[f"{side}_{control}" if control else side] = _asked(grid, table, arm, target, control)
        if any(score for key, score in scores.items() if key not in ("base", "trained")):
            rows.append(
                {"target": target, "what": grid.describe(target) or None, "chance": grid.chance(target)} | scores
            )
    name = arm_name(trained[1])
    caption = (
        "What is known of a target without training on anything like it, accuracy in % [95 % Wilson interval]. Probe: a "
        "multinomial logistic regression on the image features that the base gives its decoder, averaged over an image's "
        "tokens or those of 4 x 4 cells side by side, trained on the target's own training images (strength of the L2 "
        "penalty by cross-validation on them alone) and tested on its test images among the offered options. Base and "
        f"{name}: their answers as asked, beside a grey image, and without an image."
    )
    titles = {"probe_mean": "Probe, mean", "probe_tokens": "Probe, cells", "base": "Base", "trained": name}
    for side, words in (("base", "Base"), ("trained", name)):
        titles |= {f"{side}_blank_images": f"{words}, grey image", f"{side}_text_only": f"{words}, no image"}
    return Table("knowledge", "What the base knows", caption, rows, titles)


def _probe_score(grid: Grid, rows: Sequence[dict]) -> Score | None:
    """Over the seeds, whose test records are others for phantoms alone."""
    if not rows:
        return None
    share = sum(row["correct"] for row in rows) / sum(row["n"] for row in rows)
    n = sum(row["n"] for row in rows) if grid.is_phantom else max(row["n"] for row in rows)
    return Score(share, *wilson(share * n, n), n, tuple(row["seed"] for row in rows))


def _asked(grid: Grid, table: str, arm: str, target: str, control: str) -> Score | None:
    """The accuracy of an arm's answers about a target, over rows and seeds; n and its interval are of distinct records."""
    right, records, seeds = [], set(), set()
    for cell in grid.done(table) if table else ():
        if cell["arm"] != arm or target not in cell["target"].split("+"):
            continue
        folder = "controls" if control else "predictions"
        if not grid.answers.path(cell["cell"], folder).exists():
            continue
        frame = grid.answers.frame(cell["cell"], folder)
        frame = frame[(frame["subset"] == target) & (frame["control"] == control)]
        right += frame["right"].tolist()
        records |= {(cell["seed"] if grid.is_phantom else "", name) for name in frame["id"]}
        seeds.add(int(cell["seed"]))
    if not right:
        return None
    share, n = sum(right) / len(right), len(records)
    return Score(share, *wilson(share * n, n), n, tuple(sorted(seeds)))


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
        "Per arm, in %: the share of each letter (right answers in a table's first row), the probability of the offered "
        "letters together among all that the model could say (near 0 it does not answer the question), accuracy by "
        "likelihood of the offered letters (the study's measure), and, "
        "for greedily generated answers, how many are no offered letter and the accuracy when those count as wrong."
    )
    titles = {f"letter_{name}": name for name in names} | {"n": "Answers", "mass": "Probability of the letters"}
    return Table("answers", "How the letters were used", caption, rows, titles | {"generated": "Accuracy, generated"})


def time_spent(grid: Grid) -> Table:
    """A row for each kind of time in goodput.json; older grids have no such file."""
    spent = goodput.summarise(grid.starts) if grid.starts else {}
    rows = [
        {"kind": kind, "what": TIME_WORDS[kind], "seconds": round(spent["seconds"][kind])}
        | {"share": spent["shares"][kind]}
        for kind in (goodput.KINDS if spent else ())
    ]
    caption = "Seconds of all processes together, over all starts, bases included; and each kind's share of them in %."
    return Table("goodput", "Where the time went", caption, rows, {"what": "What it is"})


def subset_scores(grid: Grid, target: str) -> Table:
    """The scores of one subset, best first; rows that one training or the base answers alike are one."""
    chance, groups = grid.chance(target), {}
    for table in grid.tables:
        for (row, tested), scores in grid.scores(table).items():
            for arm, score in scores.items() if tested == target else ():
                cells = grid.cells_of(table, row, arm)
                names = {_subset_names(cell["related"]): None for cell in cells}
                related = next(iter(names)) if len(names) == 1 else f"{len(names)} draws"
                key = (table, arm, related, tuple(sorted(map(training_of, cells))))
                groups.setdefault(key, (score, []))[1].append(row.split("/")[0])
    rows = [
        {"arm": arm_name(arm), "score": score, "n": score.n, "related": related, "table": table.replace("_", "-")}
        | {"row": ", ".join(PARTS.get(part, part) for part in dict.fromkeys(parts)), "seeds": seeds_text({arm: score})}
        | {"colours": {"score": "even" if chance is not None and score.low <= chance <= score.high else ""}}
        for (table, arm, related, _), (score, parts) in sorted(groups.items(), key=lambda item: -item[1][0].accuracy)
    ]
    caption = (
        "Accuracy in % with 95 % Wilson intervals, best first; grey: chance lies in the interval. Rows that one training "
        "serves are one line."
    )
    titles = {"score": "Accuracy", "row": "Rows", "arm": "Model"}
    return Table(f"subset_{target}", "Scores", caption, rows, titles)


def confusion(answers: Sequence[dict], labels: Sequence[str], most_labels: int = 12) -> Table:
    """Counts of right label by answered label. labels: all, in their order; only the most frequent ones are shown."""
    counts: Counter = Counter()
    for record in answers:
        text = dict(zip(LETTERS, record["options"], strict=False))
        counts[str(text.get(record["answer"])), str(text.get(record["predicted"]))] += 1
    frequent = Counter(label for pair in counts for label in set(pair)).most_common(most_labels)
    labels = [label for label in labels if label in dict(frequent)]
    rows = [
        {"right": right}
        | {f"as_{label}": counts[right, label] for label in labels}
        | {"colours": {f"as_{right}": "win"}}
        for right in labels
    ]
    caption = "Right label (rows) by answered label (columns); numbers of answers."
    titles = {"right": "Right label"} | {f"as_{label}": label for label in labels}
    return Table("confusion", "What is taken for what", caption, rows, titles)


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


def _finding(line: dict) -> str:
    distance = ""
    if line["kind"] == "near":
        form = f", {line['form']}" if line.get("form") else ""
        distance = f"{form} ({line['distance_bits']} bits)"
    return f"{line['training']} and {line['test']}: {line['kind']}{distance}"


def _subset_names(related: str) -> str:
    names = related.split("+") if related else ["nothing"]
    return f"{len(names)} subsets" if len(names) > 3 else " + ".join(names)
