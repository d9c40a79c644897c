"""The published numbers beside a grid's own, where a row is a row of the paper; in words alone for phantoms."""

from collections.abc import Sequence

from medcg_jax.config import MODELS
from medcg_jax.families import registry
from medcg_jax.study.design import mat, suite
from medcg_jax.study.report.load_grid import Grid
from medcg_jax.study.report.tables import Column, Table, Tables, answers_per_arm, seeds_text
from medcg_jax.study.stats.paired import paper_power

# Arm -> what tables 1 and 2 of the paper call it.
PRINTED = {"baseline": "Baseline", "single_task": "Single-task Training", "multi_task": "Multi-task Training"}
MODEL = "LLaVA-1.5-7B"
# Published table of combinations -> its file and the model that it is of.
FILES = {number: (file, family.title) for family in registry.families() for number, file in family.tables.values()}


def published(grid: Grid, summary: dict) -> list[Table]:
    """Rows of the paper that the grid repeats on released data; [] for phantoms."""
    if grid.of_phantoms:
        return []
    family = MODELS.get(grid.config["model"]["name"], "")
    numbers = {"pairs": suite.PAIR_TABLES.get(family, 3), "triples": 4}
    if family in suite.DETECTION_TABLES:
        numbers["detection_pairs"] = suite.DETECTION_TABLES[family]
    tables = Tables(grid, summary)
    made = [*(combination(tables, table, number) for table, number in numbers.items()), *per_subset(tables)]
    return [table for table in made if table.rows]


def combination(tables: Tables, table: str, number: int) -> Table:
    """A published table in its layout: green where Trained is above both baselines, else orange (red there)."""
    grid = tables.grid
    file, model = FILES[number]
    printed = {int(row["row"]): row for row in mat.paper_csv(file)}
    read = {row.row: row for row in mat.paper_rows(number)}
    arms = ("baseline", "baseline_plus", "trained")
    name = table.replace("_", " ").capitalize()
    made = Table(
        f"published_{table}", f"{name} beside table {number}",
        f"{name} beside table {number} of arXiv 2412.20070, version 1: printed accuracies ({model}) and "
        f"this grid's ({grid.config['model']['name']}), in %. Subset numbers are inferred from the printed baselines; "
        "the confidence is that of the reading.",
        [Column("paper_row", "Row", "count"), Column("related", "Related"), Column("target", "Target"),
         *(Column(f"{arm}{side}", f"{word}{text}", kind)
           for arm, word in zip(arms, ("Baseline", "Baseline+", "Trained"), strict=True)
           for side, text, kind in (("_paper", ", paper", "text"), ("", ", here", "score"))),
         Column("mark", "", "mark"), Column("p_plus", "p vs Baseline+", "p"), Column("p_base", "p vs Baseline", "p"),
         Column("n", "n here", "count"), Column("seeds", "Seeds"), Column("cost", "Seconds", "count"),
         Column("confidence", "Reading"),
         Column("evidence", "Why", "long")],
    )  # fmt: skip
    for (row, target), scores in grid.scores(table).items():
        place = suite.Row.parse(table, row).published
        if place is None or place[0] != number or place[1] not in printed:
            continue
        paper, reading = printed[place[1]], read[place[1]]
        values = {"paper_row": place[1], "related": " + ".join(reading.related), "target": target,
                  "n": answers_per_arm(scores), "seeds": seeds_text(scores), "confidence": reading.confidence,
                  "evidence": reading.evidence or None}  # fmt: skip
        for arm in arms:
            values |= {f"{arm}_paper": paper.get(arm), arm: scores.get(arm)}
        plus, base = (tables.paired(table, row, target, "trained", arm) for arm in ("baseline_plus", "baseline"))
        mark = tables.mark([plus, base])
        values |= {"mark": mark, "p_plus": plus and plus["p"], "p_base": base and base["p"],
                   "cost": tables.cost(table, row, "trained")}  # fmt: skip
        made.add(values, trained_paper=printed_mark(paper, "trained", ("baseline", "baseline_plus")), trained=mark)
    return made


def printed_mark(row: dict, arm: str, others: Sequence[str]) -> str:
    """How the paper colours an accuracy: green ("win") above all others of its row, red ("loss") else; "" unprinted."""
    values = [float(row[name]) for name in others if row.get(name)]
    return "" if not row.get(arm) or not values else "win" if float(row[arm]) > max(values) else "loss"


def per_subset(tables: Tables) -> list[Table]:
    """Tables 1 and 2: subsets are printed by number there, so nothing is inferred."""
    grid, made = tables.grid, []
    for part, number, file in (
        ("in_distribution", 1, "table1_in_distribution"),
        ("out_of_distribution", 2, "table2_out_of_distribution"),
    ):
        printed = {(row["subset"], row["model"]): row["accuracy"] for row in mat.paper_csv(file)}
        arms = [arm for arm, word in PRINTED.items() if any(model == word for _, model in printed)]
        table = Table(
            f"published_{part}", f"Multi-task beside table {number}",
            f"Subsets beside table {number} of arXiv 2412.20070, version 1: printed accuracies ({MODEL}) and this "
            f"grid's ({grid.config['model']['name']}), in %. The table prints subset numbers: nothing is inferred.",
            [Column("target", "Subset"),
             *(Column(f"{arm}{side}", f"{PRINTED[arm].removesuffix(' Training')}{text}", kind)
               for arm in arms for side, text, kind in (("_paper", ", paper", "text"), ("", ", here", "score"))),
             Column("mark", "", "mark"),
             *(Column(f"p_{arm}", f"p vs {PRINTED[arm].removesuffix(' Training')}", "p") for arm in arms[:-1]),
             Column("n", "n here", "count"), Column("seeds", "Seeds")],
        )  # fmt: skip
        for (row, target), scores in grid.scores("multi_task").items():
            if row == part and (target, "Baseline") in printed:
                values = {"target": target, "n": answers_per_arm(scores), "seeds": seeds_text(scores)}
                for arm in arms:
                    values |= {f"{arm}_paper": printed.get((target, PRINTED[arm])), arm: scores.get(arm)}
                found = {arm: tables.paired("multi_task", row, target, "multi_task", arm) for arm in arms[:-1]}
                mark = tables.mark(list(found.values()))
                values |= {"mark": mark} | {f"p_{arm}": one and one["p"] for arm, one in found.items()}
                paper = {arm: printed.get((target, PRINTED[arm])) for arm in arms}
                table.add(values, multi_task_paper=printed_mark(paper, "multi_task", arms[:-1]), multi_task=mark)
        made.append(table)
    return made


def power() -> str:
    """How many of table 3's printed wins so many test records could show, in words."""
    found = {against: paper_power(against=against) for against in ("baseline_plus", "baseline")}
    plus, base = found["baseline_plus"], found["baseline"]
    sizes = ", ".join(f"{n:,} ({below} of {plus['wins']})" for n, below in plus["below"].items())
    return (
        f"Of the {plus['wins']} printed wins of Trained over Baseline+ in table 3, some are smaller than what a target "
        "of 100, 300 or 1,000 test records shows four times in five at the 5 % level, if the two models err "
        f"independently: {sizes}. Over Baseline it is {base['below'][300]} of {base['wins']} at 300 records. The test "
        "sizes are not printed."
    )


def context() -> str:
    """What the paper prints, in words, for a page whose own numbers must not stand beside it."""
    rows = [
        {arm: float(row[arm]) for arm in ("baseline", "baseline_plus", "trained")}
        for row in mat.paper_csv("table3_classification_pairs")
    ]
    both = [row for row in rows if row["trained"] > max(row["baseline"], row["baseline_plus"])]
    small = [r for r in both if r["trained"] - max(r["baseline"], r["baseline_plus"]) <= 3]
    return (
        f"Table 3 of the paper (arXiv 2412.20070, version 1; {MODEL} on real medical images) prints Trained above both "
        f"baselines in {len(both)} of {len(rows)} rows, in {len(small)} of them by 3 points or less, with no test "
        "sizes, intervals or seeds. Its numbers are not set beside these, since phantoms are not patients."
    )
