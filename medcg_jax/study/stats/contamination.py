"""What a grid's trainings give away of its tests, as `contamination.csv`: a line for each finding of `design.leaks`.

Each job writes its own part, before it is trained; at the end the parts are joined in the order of the cells. They
depend on the data and the configuration alone: the same bytes however often, and by how many processes, a grid was
started. Where cells share a training, a record that is dropped for one cell's target is dropped for all of them, and
the steps of a training stay those of all its records.
"""

from collections.abc import Sequence
from pathlib import Path

from medcg_jax.files import write_whole
from medcg_jax.study.design.leaks import Finding
from medcg_jax.study.design.schedule import Plan
from medcg_jax.study.stats.grid_files import cell_id, checked, read_rows, text, whole
from medcg_jax.study.stats.results import to_csv

# Files of older grids lack `form`.
HEADER = ("cell", "kind", "training", "test", "distance_bits", "action", "form")
FILE = "contamination.csv"
COLUMNS = {
    "cell": cell_id, "kind": text, "training": text, "test": text,
    "distance_bits": lambda value: value and checked(whole, value), "action": text, "form": str,
}  # fmt: skip


def write_part(workdir: Path, job: str, findings: Sequence[Finding]) -> None:
    """Writes the findings in a job's cells; no file where there are none."""
    rows = [
        (f.cell, f.leak.kind, f.leak.training, f.leak.test, f.leak.distance_bits, f.action, f.leak.form)
        for f in findings
    ]
    if rows:
        write_whole(_part(workdir, job), to_csv(HEADER, rows))


def join(workdir: Path, plan: Plan) -> None:
    """Writes contamination.csv of the parts there are; a header alone says that nothing was found."""
    rows: dict[str, list[Sequence[str]]] = {}
    for job in plan.jobs:
        if _part(workdir, job.id).exists():
            for row in read_rows(_part(workdir, job.id), COLUMNS, optional=("form",)):
                rows.setdefault(row["cell"], []).append(tuple(row.values()))
    write_whole(workdir / FILE, to_csv(HEADER, [row for cell in plan.cells for row in rows.get(cell.id, ())]))


def read(workdir: Path) -> list[dict[str, str]]:
    """The lines of contamination.csv by column; [] of a grid that has none. Raises FileError where it holds others."""
    path = workdir / FILE
    return read_rows(path, COLUMNS, optional=("form",)) if path.exists() else []


def _part(workdir: Path, job: str) -> Path:
    return workdir / "contamination" / f"{job}.csv"
