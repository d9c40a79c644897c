"""What a grid's trainings give away of its tests, for its report: from `contamination.csv`, which older grids lack."""

from medcg_jax.study.report_files import Grid
from medcg_jax.study.report_tables import Column, Table
from medcg_jax.study.report_text import counted

EXACT = ("same id", "same bytes", "same pixels")
SHOWN = 3


def table(grid: Grid) -> Table:
    """One row per cell with a finding; none where there is no finding, or nobody looked."""
    made = Table(
        "contamination", "Contamination",
        "Cells with training records whose image is in their test set: the same (by bytes or pixels), or nearly "
        "(perceptual hashes a few of 256 bits apart: saved again, resized, of other contrast, but also adjacent slices "
        "and frames of one patient). Each training record counts once for each subset tested on. Lineage: pairs of "
        "source datasets, one on each side, that are the same or known to be related. All of them are in "
        "contamination.csv.",
        [Column("cell", "Cell"), Column("exact", "The same", "count"), Column("near", "Nearly", "count"),
         Column("dropped", "Left out", "count"), Column("refused", "Refused", "count"),
         Column("lineage", "Lineage", "count"), Column("first", "The first of them", "long")],
        wide=True,
    )  # fmt: skip
    lines: dict[str, list[dict]] = {}
    for line in grid.contamination:
        lines.setdefault(line["cell"], []).append(line)
    for cell, own in lines.items():
        kinds, actions = [line["kind"] for line in own], [line["action"] for line in own]
        made.add({
            "cell": cell, "exact": sum(kinds.count(kind) for kind in EXACT), "near": kinds.count("near"),
            "dropped": actions.count("dropped"), "refused": actions.count("refused"),
            "lineage": kinds.count("lineage"), "first": "; ".join(map(_words, own[:SHOWN])),
        })  # fmt: skip
    return made


def limits(grid: Grid) -> list[str]:
    """What a reader must know of images that are in training and in a test."""
    left = [x for x in grid.contamination if x["action"] == "reported" and x["kind"] != "lineage"]
    if not left:
        return []
    cells = len({line["cell"] for line in left})
    return [
        f"{counted(cells, 'cell')} of {len(grid.cells):,} were trained on images that are in their test set, or nearly "
        "so, which flatters them: see the table of contamination."
    ]


def _words(line: dict) -> str:
    apart = f" ({line['distance_bits']} bits)" if line["kind"] == "near" else ""
    return f"{line['training']} and {line['test']}: {line['kind']}{apart}"
