"""The long lists of a grid's report, folded away on its page: every paired comparison, every cell."""

from medcg_jax.study.report.load_grid import Grid, arm_name
from medcg_jax.study.report.tables import Column, Table


def comparisons(summary: dict) -> Table:
    made = Table(
        "comparisons", "Every paired comparison",
        "Each comparison of two arms on the same test records: who alone was right how often, the exact McNemar p "
        "and the same adjusted by Holm over the rows of its table and comparison; the interval of the difference "
        "over records and seeds, both as sources of variation, and their standard deviations; the smallest true "
        "difference that so many records would show four times in five. Accuracies in %.",
        [Column("table", "Table"), Column("row", "Row"), Column("target", "Target"), Column("arm", "Arm"),
         Column("against", "Against"), Column("n", "n", "count"), Column("accuracy_a", "Arm", "share"),
         Column("accuracy_b", "Against", "share"), Column("difference", "Points", "points"),
         Column("only_a", "Only arm", "count"), Column("only_b", "Only against", "count"), Column("p", "p", "p"),
         Column("p_holm", "p, Holm", "p"), Column("ci", "95\u00a0% interval", "interval"),
         Column("sd_seeds", "SD of seeds", "share"), Column("sd_records", "SD of records", "share"),
         Column("detectable", "Detectable", "share"), Column("seeds", "Seeds")],
        wide=True,
    )  # fmt: skip
    for row in summary["rows"]:
        words = {"arm": arm_name(row["arm"]), "against": arm_name(row["against"]),
                 "seeds": ", ".join(map(str, row["seeds"])), "ci": (row["ci_low"], row["ci_high"])}  # fmt: skip
        made.add({c.key: row.get(c.key) for c in made.columns} | words)
    return made


def cells(grid: Grid) -> Table:
    made = Table(
        "cells", "Every cell",
        "Each fine-tune with its evaluation: what it was trained on, optimizer steps, status, and seconds of the "
        "training it shares with others of the same subsets and seed.",
        [Column("cell", "Cell"), Column("related", "Trained on", "long"), Column("target", "Tested on", "long"),
         Column("steps", "Steps", "count"), Column("seconds", "Seconds"), Column("status", "Status", "long")],
        wide=True,
    )  # fmt: skip
    for cell in grid.cells:
        related = cell["related"].replace("+", " + ") or "nothing"
        made.add(
            {**cell, "related": related, "target": cell["target"].replace("+", " + "), "steps": int(cell["steps"])}
        )
    return made
