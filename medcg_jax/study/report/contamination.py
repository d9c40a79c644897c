"""What a grid's trainings give away of its tests, for its report: from `contamination.csv`, which older grids lack."""

from collections.abc import Sequence

from medcg_jax.data.leaks import EXACT
from medcg_jax.study.report.load_grid import Grid
from medcg_jax.study.report.tables import Column, Table
from medcg_jax.study.report.text import counted

SHOWN = 3
# Kind of leak, or several that are counted together -> what a reader must know of cells that were trained so.
REPORTED: dict[Sequence[str], str] = {
    (*EXACT, "near"): "on images that are in their test set, or nearly so",
    ("same question",): "on questions of their test set, among the general records",
    ("same group",): "on patients or lesions that are in their test set",
    ("likely same group",): "on patients or lesions that are, as their names say, in their test set too",
}


def table(grid: Grid) -> Table:
    """One row per cell with a finding; none where there is no finding, or nobody looked."""
    made = Table(
        "contamination", "Contamination",
        "Cells with training records that give a test away. Their image is in the test set: the same (by bytes or "
        "pixels), or nearly (perceptual hashes a few of 256 bits apart: saved again, resized, of other contrast, but "
        "also adjacent slices and frames of one patient; “changed” are those that were mirrored, turned or inverted "
        "beside that). Or their patient or lesion is: as the records state it, or likely, as file names or equal names "
        "without a data set say. Or a general record asks a question of the test. Each training record counts once in "
        "each column for each subset tested on. Lineage: pairs of source datasets, one on each side, that are the same "
        "or known to be related. All of them are in contamination.csv.",
        [Column("cell", "Cell"), Column("exact", "The same image", "count"), Column("near", "Nearly", "count"),
         Column("changed", "of these changed", "count"), Column("group", "The same patient", "count"),
         Column("likely_group", "Likely so", "count"), Column("question", "The same question", "count"),
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
            "changed": sum(bool(line.get("form")) for line in own), "group": kinds.count("same group"),
            "likely_group": kinds.count("likely same group"), "question": kinds.count("same question"),
            "dropped": actions.count("dropped"), "refused": actions.count("refused"),
            "lineage": kinds.count("lineage"), "first": "; ".join(map(_words, own[:SHOWN])),
        })  # fmt: skip
    return made


def limits(grid: Grid) -> list[str]:
    """What a reader must know of what is in training and in a test."""
    left = [line for line in grid.contamination if line["action"] == "reported"]
    said = []
    for kinds, what in REPORTED.items():
        cells = len({line["cell"] for line in left if line["kind"] in kinds})
        if cells:
            said.append(
                f"{counted(cells, 'cell')} of {len(grid.cells):,} were trained {what}, which flatters them: see the "
                "table of contamination."
            )
    return said


def _words(line: dict) -> str:
    apart = ""
    if line["kind"] == "near":
        form = f", {line['form']}" if line.get("form") else ""
        apart = f"{form} ({line['distance_bits']} bits)"
    return f"{line['training']} and {line['test']}: {line['kind']}{apart}"
