"""`contamination.csv` of a grid: a line for each finding of `design.leaks`, where a training gives a test away.

Each job writes its findings to a file before it trains; at the end these files are joined in the order of the cells.
They depend on the data and the configuration alone, so restarts and the number of processes do not change a byte.
Where cells share a training, a record that is dropped for one cell's target is dropped for all of them. A training
keeps the number of steps that all its records would need.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from medcg_jax.files import write_whole
from medcg_jax.study.design.leaks import Finding
from medcg_jax.study.design.schedule import Plan
from medcg_jax.study.stats.grid_files import cell_id, checked, read_rows, text, whole
from medcg_jax.study.stats.results import to_csv

# Files of older grids lack `form`.
HEADER = ("cell", "kind", "training", "test", "distance_bits", "action", "form")
FILE = "contamination.csv"
COLUMNS: dict[str, Callable[[str], Any]] = {
    "cell": cell_id, "kind": text, "training": text, "test": text,
    "distance_bits": lambda value: value and checked(whole, value), "action": text, "form": str,
}  # fmt: skip


def write_findings(workdir: Path, job: str, findings: Sequence[Finding]) -> None:
    """Writes the findings on a job's cells; no file where there are none."""
    rows = [
        (f.cell, f.leak.kind, f.leak.training, f.leak.test, f.leak.distance_bits, f.action, f.leak.form)
        for f in findings
    ]
    if rows:
        write_whole(_job_file(workdir, job), to_csv(HEADER, rows))


def join(workdir: Path, plan: Plan) -> None:
    """Joins the jobs' files as contamination.csv; without findings it is a header alone."""
    rows: dict[str, list[Sequence[str]]] = {}
    for job in plan.jobs:
        for row in _read(_job_file(workdir, job.id)):
            rows.setdefault(row["cell"], []).append(tuple(row.values()))
    write_whole(workdir / FILE, to_csv(HEADER, [row for cell in plan.cells for row in rows.get(cell.id, ())]))


def read(workdir: Path) -> list[dict[str, str]]:
    """The rows of contamination.csv; [] where a grid has none. Raises FileError: the file holds something else."""
    return _read(workdir / FILE)


def _read(path: Path) -> list[dict[str, str]]:
    return read_rows(path, COLUMNS, optional=("form",)) if path.exists() else []


def _job_file(workdir: Path, job: str) -> Path:
    return workdir / "contamination" / f"{job}.csv"
