"""`probe.csv` of a grid: what a linear probe reads from the base's image features, for each seed and target.

The job that tests a seed's base writes its rows to a file; at the end these files are joined in the order of the jobs.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from medcg_jax.eval.predictions import wilson
from medcg_jax.eval.probe import FEATURES, ProbeResult
from medcg_jax.files import write_whole
from medcg_jax.study.design.schedule import Plan
from medcg_jax.study.stats.grid_files import ROUNDING, number, read_rows, text, whole
from medcg_jax.study.stats.results import to_csv
from medcg_jax.untrusted import FileError

HEADER = (
    "seed",
    "target",
    "features",
    "records",
    "n",
    "correct",
    "accuracy",
    "ci_low",
    "ci_high",
    "strength",
    "validated",
)
FILE = "probe.csv"


def _features(value: str) -> str:
    if value not in FEATURES:
        raise ValueError(" or ".join(FEATURES))
    return value


_share = partial(number, least=0, most=1)
COLUMNS = {
    "seed": partial(whole, least=-(10**15)), "target": text, "features": _features, "records": partial(whole, least=1),
    "n": partial(whole, least=1), "correct": whole, "accuracy": _share, "ci_low": _share, "ci_high": _share,
    "strength": number, "validated": _share,
}  # fmt: skip


def write_probes(workdir: Path, job: str, seed: int, probes: Mapping[str, Sequence[ProbeResult]]) -> None:
    """Writes the probes of one base. probes: target -> its results."""
    rows = []
    for target, of_target in probes.items():
        for probe in of_target:
            shares = (probe.correct / probe.n, *wilson(probe.correct, probe.n))
            counts = (probe.records, probe.n, probe.correct, *(f"{share:.6f}" for share in shares))
            rows.append((seed, target, probe.features, *counts, f"{probe.strength:g}", f"{probe.validated:.6f}"))
    write_whole(_job_file(workdir, job), to_csv(HEADER, rows))


def join(workdir: Path, plan: Plan) -> None:
    """Joins the jobs' files as probe.csv; none where no base was probed."""
    paths = [path for job in plan.jobs if (path := _job_file(workdir, job.id)).exists()]
    if paths:
        rows = [tuple(row.values()) for path in paths for row in read_rows(path, dict.fromkeys(HEADER, str))]
        write_whole(workdir / FILE, to_csv(HEADER, rows))


def read(workdir: Path) -> list[dict[str, Any]]:
    """The rows of probe.csv; [] where a grid has none.

    Raises:
      FileError: the file holds something else, a target twice, or shares that do not follow from its counts.
    """
    path = workdir / FILE
    rows, seen = read_rows(path, COLUMNS) if path.exists() else [], set()
    for row in rows:
        key, name = (row["seed"], row["target"], row["features"]), f"{path}, target {row['target']}"
        shares = (row["correct"] / row["n"], *wilson(min(row["correct"], row["n"]), row["n"]))
        if any(abs(row[k] - s) > ROUNDING for k, s in zip(("accuracy", "ci_low", "ci_high"), shares, strict=True)):
            raise FileError(f"{name}: its shares do not follow from correct={row['correct']} of n={row['n']}")
        if key in seen:
            raise FileError(f"{name}: features {row['features']} of seed {row['seed']} stand there twice")
        seen.add(key)
    return rows


def _job_file(workdir: Path, job: str) -> Path:
    return workdir / "probe" / f"{job}.csv"
