"""`medcg report A B`: two grids side by side, row by row: other seeds, machines, or another implementation."""

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from scipy.stats import norm
from statsmodels.stats.proportion import proportions_ztest

from medcg_jax.run_config import flat
from medcg_jax.study import stats
from medcg_jax.study.paired import holm
from medcg_jax.study.report import page_template
from medcg_jax.study.report_files import Grid, arm_name
from medcg_jax.study.report_plots import BLUE, GREY, INK, ORANGE, draw
from medcg_jax.study.report_tables import MARKS, Column, Table
from medcg_jax.study.report_text import counted, points

# Settings that say where a grid ran, not what it is.
WHERE = ("name", "study.base_dir", "study.jobs")


@dataclass(frozen=True)
class Matched:
    """One cell and target that both grids have. p: exact McNemar where both were asked the same records ("paired"), a
    test of two proportions else."""

    table: str
    row: str
    arm: str
    target: str
    seed: int
    n_a: int
    n_b: int
    accuracy_a: float
    accuracy_b: float
    paired: bool
    p: float
    # Of the same records: share with the same predicted letter, largest difference of a log-probability in nats.
    agreement: float | None = None
    largest: float | None = None


def write_comparison(a: str | Path, b: str | Path, out: str | Path = "") -> Path:
    """Writes the page that compares two grids into `out` (default: `compare_NAME-OF-B` in A's workdir).

    Raises:
      FileNotFoundError: a folder is not the workdir of a grid.
    """
    grids = Grid(a), Grid(b)
    name = re.sub(r"[^A-Za-z0-9._-]", "_", grids[1].workdir.absolute().name)
    folder = Path(out) if out else grids[0].workdir / f"compare_{name}"
    rows = matched(*grids)
    shutil.rmtree(folder / "plots", ignore_errors=True)
    (folder / "plots").mkdir(parents=True)
    tables = [table_of(rows), differing(*grids)]
    (folder / "tables").mkdir(exist_ok=True)
    for table in tables:
        (folder / "tables" / f"{table.name}.csv").write_text(table.csv(), encoding="utf-8", newline="")
        (folder / "tables" / f"{table.name}.tex").write_text(table.latex(), encoding="utf-8", newline="")
    page = folder / "index.html"
    page.write_text(
        page_template("compare.html.j2", marks=MARKS).render(
            a=grids[0], b=grids[1], said=verdict(rows, *grids), tables=[t for t in tables if t.rows],
            figures=[scatter(folder / "plots", rows)] if rows else [],
        ),
        encoding="utf-8", newline="",
    )  # fmt: skip
    return page


def matched(a: Grid, b: Grid) -> list[Matched]:
    """What both grids have, in A's order: same table, row, arm, target and seed. Where they share no seed at all the
    first seed of one is matched with the first of the other, and so on."""
    seeds_a, seeds_b = (sorted({r["seed"] for r in grid.results}) for grid in (a, b))
    common = set(seeds_a) & set(seeds_b)
    as_a = dict(zip(seeds_b, seeds_b if common else seeds_a, strict=False))
    theirs = {key(r, as_a.get(r["seed"])): r for r in b.results}
    found = []
    for ours in a.results:
        other = theirs.get(key(ours, ours["seed"]))
        if other is not None:
            found.append(compared(a, b, ours, other))
    return found


def key(result: Mapping, seed: int | None) -> tuple:
    return result["table"], result["row"], result["arm"], result["target"], seed


def compared(a: Grid, b: Grid, ours: Mapping, theirs: Mapping) -> Matched:
    answers = [
        {line["id"]: line for line in grid.predictions(result["cell"]) if line["subset"] == result["target"]}
        for grid, result in ((a, ours), (b, theirs))
    ]
    # Phantoms of other seeds have the same ids: what the data are decides first.
    data = [grid.run["data"].get(str(result["seed"])) for grid, result in ((a, ours), (b, theirs))]
    same = data[0] == data[1] and answers[0].keys() == answers[1].keys() and all(
        line["options"] == answers[1][name]["options"] and line["answer"] == answers[1][name]["answer"]
        for name, line in answers[0].items()
    )
    agreement = largest = None
    if same and answers[0]:
        right = [{name: line["predicted"] == line["answer"] for name, line in one.items()} for one in answers]
        p = stats.compare(*right).p
        pairs = [(line, answers[1][name]) for name, line in answers[0].items()]
        agreement = sum(x["predicted"] == y["predicted"] for x, y in pairs) / len(pairs)
        largest = max(
            (abs(u - v) for x, y in pairs for u, v in zip(x["logprobs"], y["logprobs"], strict=True)), default=None
        )
    else:
        p = two_proportions(ours["correct"], ours["n"], theirs["correct"], theirs["n"])
    fields = {name: ours[name] for name in ("table", "row", "arm", "target", "seed")}
    return Matched(
        **fields, n_a=ours["n"], n_b=theirs["n"], accuracy_a=ours["accuracy"], accuracy_b=theirs["accuracy"],
        paired=same, p=p, agreement=agreement, largest=largest,
    )  # fmt: skip


def two_proportions(correct_a: int, n_a: int, correct_b: int, n_b: int) -> float:
    """Two-sided p of the pooled z test of two proportions; 1 where both are all right or all wrong, or n is 0."""
    if not n_a or not n_b or correct_a + correct_b in (0, n_a + n_b):
        return 1.0
    z = proportions_ztest([correct_a, correct_b], [n_a, n_b])[0]
    return float(2 * norm.sf(abs(z)))


def table_of(rows: list[Matched]) -> Table:
    made = Table(
        "comparison", "Row by row",
        "Accuracies in % of both grids (A, B), their difference in points, and p, adjusted by Holm over all rows: "
        "exact McNemar where both were asked the same records, else a z test of two proportions. Of the same records "
        "also the share answered alike, and the largest difference of a log-probability, in nats. Green: B is "
        "significantly above; orange: below.",
        [Column("table", "Table"), Column("row", "Row"), Column("arm", "Arm"), Column("target", "Target"),
         Column("seed", "Seed", "count"), Column("n_a", "n of A", "count"), Column("n_b", "n of B", "count"),
         Column("accuracy_a", "A", "share"), Column("accuracy_b", "B", "share"),
         Column("difference", "B − A", "points"), Column("test", "Test"), Column("p", "p", "p"),
         Column("p_holm", "p, Holm", "p"), Column("agreement", "Answered alike", "share"),
         Column("largest", "Largest difference, nats")],
    )  # fmt: skip
    for row, p in zip(rows, holm([row.p for row in rows]), strict=True):
        difference = row.accuracy_b - row.accuracy_a
        colour = ("win-sure" if difference > 0 else "loss-sure") if p < 0.05 else ""
        made.add(
            vars(row) | {
                "table": row.table.replace("_", "-"), "arm": arm_name(row.arm), "difference": difference, "p_holm": p,
                "test": "McNemar" if row.paired else "two proportions",
                "largest": None if row.largest is None else f"{row.largest:.4f}",
            },
            difference=colour,
        )  # fmt: skip
    return made


def differing(a: Grid, b: Grid) -> Table:
    """Settings, versions and data that are not the same."""
    made = Table(
        "settings", "What differs between the two", "Settings, versions and fingerprints of the data that differ.",
        [Column("what", "What"), Column("a", "A", "long"), Column("b", "B", "long")],
    )  # fmt: skip
    parts = [
        flat(grid.config)
        | {f"version of {name}": version for name, version in grid.run["versions"].items()}
        | {f"data of seed {seed}": digest for seed, digest in grid.run["data"].items()}
        for grid in (a, b)
    ]
    for name in sorted(parts[0].keys() | parts[1].keys()):
        values = [part.get(name) for part in parts]
        if values[0] != values[1] and name not in WHERE:
            made.add({"what": name, "a": _text(values[0]), "b": _text(values[1])})
    return made


def _text(value) -> str:
    return "(none)" if value is None else "(empty)" if value in ("", [], {}) else str(value)


def verdict(rows: list[Matched], a: Grid, b: Grid) -> str:
    """The comparison in words."""
    if not rows:
        return "The two grids have no cell in common: nothing can be compared."
    adjusted = holm([row.p for row in rows])
    sure = [row for row, p in zip(rows, adjusted, strict=True) if p < 0.05]
    mean = sum(row.accuracy_b - row.accuracy_a for row in rows) / len(rows)
    said = f"Of {counted(len(rows), 'result')} that both have, {len(sure)} differ significantly after Holm's "
    said += f"adjustment; on average B is {points(mean, True)} points from A. "
    alike = [row.agreement for row in rows if row.agreement is not None]
    if alike:
        share = points(sum(alike) / len(alike))
        said += f"Where the same records were asked, {share} % were answered with the same letter. "
    said += "They agree within the noise of their records. " if not sure else "They do not agree. "
    only = [len(grid.results) - len(rows) for grid in (a, b)]
    if any(only):
        said += f"Not compared, for lack of a counterpart: {only[0]} of A, {only[1]} of B."
    return said.strip()


def scatter(folder: Path, rows: list[Matched]):
    """Every result of B over that of A, with the diagonal."""
    adjusted = holm([row.p for row in rows])

    def paint(axes):
        axes.plot([0, 100], [0, 100], color=INK, linewidth=0.9, linestyle="--")
        for sure, colour, label in ((False, GREY, "no significant difference"), (True, ORANGE, "significant")):
            own = [row for row, p in zip(rows, adjusted, strict=True) if (p < 0.05) == sure]
            if own:
                axes.plot(
                    [100 * r.accuracy_a for r in own], [100 * r.accuracy_b for r in own], "o",
                    color=colour if sure else BLUE, alpha=0.55, markersize=4, markeredgewidth=0, label=label,
                )  # fmt: skip
        axes.set_xlim(0, 100)
        axes.set_ylim(0, 100)
        axes.set_aspect("equal")
        axes.set_xlabel("accuracy of A, %")
        axes.set_ylabel("accuracy of B, %")
        axes.figure.legend(loc="outside lower left", ncols=2, handlelength=1)

    caption = "Each point is a result that both grids have; on the dashed line they are equal."
    return draw(folder, "scatter", "B over A", caption, 4.6, paint, 4.4)
