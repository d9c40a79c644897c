"""Where a grid's time went, for its report: from `goodput.json`, which older grids lack."""

from medcg_jax.study.report.load_grid import Grid
from medcg_jax.study.report.tables import Column, Table
from medcg_jax.train import goodput

WORDS = {
    "productive": "steps that counted",
    "compile": "the first step of each program",
    "input": "devices standing still for data",
    "checkpoint": "the loop held up by saving",
    "restart": "start-up after the first, restoring, steps made again",
    "evaluation": "tests",
    "other": "the first start-up, encoding data, waiting for other processes, and the rest",
}


def table(grid: Grid) -> Table:
    """One row per kind of time; none where the grid has not written its goodput."""
    made = Table(
        "goodput", "Where the time went",
        "Seconds of all processes together, over all starts, bases included; and each kind's share of them in %.",
        [Column("kind", "Kind"), Column("what", "What it is", "long"), Column("seconds", "Seconds", "count"),
         Column("share", "Share", "share")],
        wide=True,
    )  # fmt: skip
    starts = goodput.read_starts(grid.workdir / goodput.FILE)
    if starts:
        found = goodput.summarise(starts)
        for kind in goodput.KINDS:
            seconds, share = round(found["seconds"][kind]), found["shares"][kind]
            made.add({"kind": kind, "what": WORDS[kind], "seconds": seconds, "share": share})
    return made
