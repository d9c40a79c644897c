"""A page for each subset that was tested: its scores in every table, what is taken for what, mistakes to look at."""

import math
from collections import Counter
from dataclasses import dataclass

from medcg_jax.data.records import LETTERS, Source
from medcg_jax.study.report.escape import file_names
from medcg_jax.study.report.load_grid import Grid, arm_name, letter_logprobs
from medcg_jax.study.report.samples import NOT_SHOWN, SHOWN, Sample, open_as_recorded, sample
from medcg_jax.study.report.tables import Column, Table, seeds_text

# Mistakes on a page. Their images take at most some 300 kB of it, and so the pages of 53 subsets 16 MB.
NUM_MISTAKES = 12
# Labels of a confusion table; of more, the most frequent.
MOST_LABELS = 12


@dataclass(frozen=True)
class SubsetPage:
    """What the page of one subset shows; `absent` says why there are no images."""

    name: str
    what: str
    file: str
    scores: Table
    confusion: Table | None
    arm: str
    mistakes: tuple[Sample, ...] = ()
    num_mistakes: int = 0
    num_answers: int = 0
    absent: str = ""


def pages(grid: Grid) -> list[SubsetPage]:
    """One page for each subset that a finished cell was asked choice questions of, in results.csv's order."""
    targets = list(dict.fromkeys(row["target"] for row in grid.results))
    source, absent = None, ""
    try:
        source = open_as_recorded(grid, grid.seeds[0]) if targets else None
    except NOT_SHOWN as error:
        absent = f"The images cannot be shown: {error}"
    files = file_names(targets)
    return [page(grid, target, f"{files[target]}.html", source, absent) for target in targets]


def page(grid: Grid, target: str, file: str, source: Source | None, absent: str) -> SubsetPage:
    cells, table, arm = shown_cells(grid, target)
    answers = [(cell, r) for cell in cells for r in grid.predictions(cell["cell"]) if r["subset"] == target]
    wrong = sorted(
        ((cell, r) for cell, r in answers if r["predicted"] != r["answer"]),
        key=lambda item: (-confidence(item[1]), item[1]["id"], item[0]["cell"]),
    )
    # A record may be tested in several rows; its most confident mistake is enough.
    first = {record["id"]: (cell, record) for cell, record in reversed(wrong)}
    chosen = sorted(first.values(), key=lambda item: (-confidence(item[1]), item[1]["id"]))[:NUM_MISTAKES]
    mistakes: tuple[Sample, ...] = ()
    if source is not None:
        try:
            mistakes = tuple(sample(grid, source, table, cell, record) for cell, record in chosen)
        except NOT_SHOWN as error:
            absent = f"The images cannot be shown: {error}"
    return SubsetPage(
        target, grid.describe(target), file, scores_of(grid, target), confusion([r for _, r in answers]),
        f"{arm_name(arm)} ({table.replace('_', '-')}, seed {grid.seeds[0]})" if cells else "", mistakes, len(wrong),
        len(answers), absent,
    )  # fmt: skip


def shown_cells(grid: Grid, target: str) -> tuple[list[dict], str, str]:
    """(cells, table, arm) of the first arm of `SHOWN` that the subset was tested with, at the grid's first seed."""
    for table, arm in SHOWN:
        cells = [
            c for c in grid.done(table)
            if c["arm"] == arm and int(c["seed"]) == grid.seeds[0] and target in c["target"].split("+")
        ]  # fmt: skip
        if cells:
            return cells, table, arm
    return [], "", ""


def confidence(prediction: dict) -> float:
    """Probability of the predicted letter among those offered; 0 where the file has no log-probabilities."""
    logprobs = letter_logprobs(prediction)
    total = sum(math.exp(value) for value in logprobs.values())
    return math.exp(logprobs[prediction["predicted"]]) / total if total and prediction["predicted"] in logprobs else 0.0


def scores_of(grid: Grid, target: str) -> Table:
    made = Table(
        f"subset_{target}", "Scores", "Accuracy in % with 95 % Wilson intervals, of every row and arm.",
        [Column("table", "Table"), Column("row", "Row"), Column("arm", "Arm"), Column("score", "Accuracy", "score"),
         Column("n", "n", "count"), Column("seeds", "Seeds"), Column("related", "Trained on", "long")],
    )  # fmt: skip
    for table in grid.tables:
        for (row, tested), arms in grid.scores(table).items():
            if tested == target:
                for arm, score in arms.items():
                    cells = [c for c in grid.done(table) if (c["row"], c["arm"]) == (row, arm)]
                    sets = list(dict.fromkeys(_trained_on(c["related"]) for c in cells))
                    made.add(
                        {"table": table.replace("_", "-"), "row": row, "arm": arm_name(arm), "score": score,
                         "n": score.n, "seeds": seeds_text({arm: score}),
                         "related": sets[0] if len(sets) == 1 else f"{len(sets)} draws"}
                    )  # fmt: skip
    return made


def _trained_on(related: str) -> str:
    names = related.split("+") if related else []
    return f"{len(names)} subsets" if len(names) > 3 else " + ".join(names) or "nothing"


def confusion(answers: list[dict]) -> Table | None:
    """Right label by answered label, counts; None where there is nothing to count."""
    counted = Counter()
    for record in answers:
        text = dict(zip(LETTERS, record["options"], strict=False))
        counted[str(text.get(record["answer"])), str(text.get(record["predicted"]))] += 1
    labels = [label for label, _ in Counter(k for pair in counted for k in set(pair)).most_common(MOST_LABELS)]
    if not counted:
        return None
    made = Table(
        "confusion", "What is taken for what", "Right label (rows) by answered label (columns); numbers of answers.",
        [Column("right", "Right label"), *(Column(f"as_{label}", label, "count") for label in sorted(labels))],
    )  # fmt: skip
    for label in sorted(labels):
        colours = {f"as_{label}": "win"}
        made.add({"right": label} | {f"as_{other}": counted[label, other] for other in labels}, **colours)
    return made
