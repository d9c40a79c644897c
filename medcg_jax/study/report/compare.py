"""Pages of several grids: `medcg report A B` compares two row by row (other seeds, machines, or another
implementation), `medcg report DIR` of a folder of grids shows their models side by side."""

import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pandas
from markupsafe import Markup
from scipy.stats import norm
from statsmodels.stats.proportion import confint_proportions_2indep, proportions_ztest

from medcg_jax.config import MODELS, flat, free_fields
from medcg_jax.eval.predictions import wilson
from medcg_jax.study.report.drawing import BLUE, INK, ORANGE, Figure, beside, draw, legend
from medcg_jax.study.report.escape import short_label
from medcg_jax.study.report.file_tables import ALL_SUBSETS, boxes
from medcg_jax.study.report.folders import added_files, whole_folder, write_tables, write_text
from medcg_jax.study.report.layout import Section, page_html
from medcg_jax.study.report.load_grid import Grid, Score, arm_name, letter_logprobs
from medcg_jax.study.report.opening import headline
from medcg_jax.study.report.plots import grouped_bars
from medcg_jax.study.report.table import Table, points
from medcg_jax.study.report.tables import COLOURS
from medcg_jax.study.report.text import PARTS, Answer, counted, effect_name, state
from medcg_jax.study.stats.grid_files import training_of
from medcg_jax.study.stats.paired import by_patient, compare, holm, mixed_interval

# Settings that differ and are named in a page's first lines.
MOST_NAMED = 4
# Beginnings of names of what is no setting; they come last.
MADE_WITH = ("version of ", "data of ")


@dataclass(frozen=True)
class Matched:
    """One cell and target that both grids have.

    Attributes:
      trainings: of A's and B's cell: results of the same two on the same target are one result, in several rows.
      difference, low, high: B minus A, and its 95 % interval. paired: whether both were asked the same records.
      p: exact McNemar where paired, by sign flips of patients where they are known; else a test of two proportions.
      agreement, largest: where paired, the share of equal predicted letters, and the largest difference of a
        log-probability in nats; else None.
    """

    table: str
    row: str
    arm: str
    target: str
    seed: int
    trainings: tuple
    a: Score
    b: Score
    low: float
    high: float
    paired: bool
    p: float
    agreement: float | None = None
    largest: float | None = None

    @property
    def difference(self) -> float:
        return self.b.accuracy - self.a.accuracy


class Side:
    """One of the two grids. It keeps the answers of the last cell, since a cell may have many test subsets."""

    def __init__(self, grid: Grid):
        self.grid = grid
        self.trainings = {cell["cell"]: training_of(cell) for cell in grid.cells}
        self._cell = ""
        self._answers: dict[str, dict[str, dict]] = {}

    def answers(self, result: Mapping) -> dict[str, dict]:
        """Record id -> prediction, for one row of results.csv."""
        if result["cell"] != self._cell:
            by_subset: dict[str, dict[str, dict]] = defaultdict(dict)
            for line in self.grid.predictions(result["cell"]):
                by_subset[line["subset"]][line["id"]] = line
            self._cell, self._answers = result["cell"], by_subset
        return self._answers.get(result["target"], {})

    def data(self, seed: int) -> str | None:
        """Fingerprint of a seed's data without boxes; None where it was not recorded."""
        digest = self.grid.run.get("data", {}).get(str(seed))
        return digest and digest.partition(" ")[0]  # the fingerprint of the boxes follows


def write_comparison(a: str | Path, b: str | Path, out: str | Path = "") -> Path:
    """Writes the page that compares two grids into `out` (default: `compare_NAME-OF-B` in A's workdir).

    Raises:
      FileNotFoundError: a folder is not the workdir of a grid.
      FileError: a file of a grid is broken.
    """
    grids = Grid(a), Grid(b)
    name = re.sub(r"[^A-Za-z0-9._-]", "_", grids[1].workdir.absolute().name)
    folder = Path(out) if out else grids[0].workdir / f"compare_{name}"
    labels = [f"{side}: {words}" for side, words in zip("AB", folder_names(*grids), strict=True)]
    answers = [answer_of(grid) for grid in grids]
    rows = matched(*grids)
    effects, settings, comparison = effects_of_both(*answers), differing(*grids), table_of(rows)
    tables = [table for table in (effects, settings, comparison) if table.rows]
    pages = [report_link(grid, folder) for grid in grids]
    headlines = [headline(*of_side) for of_side in zip(answers, labels, pages, strict=True)]
    # Other files in the folder stay.
    with added_files(folder) as draft:
        (draft / "plots").mkdir()
        write_tables(draft, (effects, settings, comparison))
        both = [effect_points(draft / "plots", effects, labels)] if effects.rows else []
        cloud = [scatter(draft / "plots", rows, labels)] if rows else []
        sections = [
            Section(id="effects", title="The study's effect in each", headlines=headlines, figures=both,
                    tables=[effects] if effects.rows else []),
            Section(id="verdict", title="Do single results agree?", answer=[verdict(rows, *grids)], figures=cloud),
            Section(id="settings", title=settings.title, tables=[settings] if settings.rows else [],
                    paragraphs=[] if settings.rows else ["No setting, version or fingerprint of the data."]),
            Section(id="comparison", title="Row by row", folded=[comparison] if rows else []),
        ]  # fmt: skip
        differ = [
            str(row["what"])
            if row["what"].startswith(MADE_WITH)
            else f"{row['what']} ({short_label(row['a'], 30)} in A, {short_label(row['b'], 30)} in B)"
            for row in settings.rows
        ]
        others = f" and {len(differ) - MOST_NAMED} more" if len(differ) > MOST_NAMED else ""
        words = (
            f"They differ in {', '.join(differ[:MOST_NAMED])}{others}." if differ else "Their settings are the same."
        )
        sub = " ".join(
            f"{label} (grid “{grid.config['name']}”, {grid.model}, {len(grid.results)} results)."
            for label, grid in zip(labels, grids, strict=True)
        )
        title = " and ".join(labels)
        text = page_html("Two grids side by side", f"{sub} {words}", sections, title=title, tables=tables)
        write_text(draft / "index.html", text)
    return folder / "index.html"


def answer_of(grid: Grid) -> Answer:
    return Answer(grid, grid.summary)


def folder_names(a: Grid, b: Grid) -> tuple[str, str]:
    """The last parts of the workdirs' paths, as many as tell them apart."""
    parts = [grid.workdir.absolute().parts for grid in (a, b)]
    for number in range(1, max(map(len, parts)) + 1):
        names = ["/".join(folders[-number:]).replace("//", "/") for folders in parts]
        if names[0] != names[1]:
            break
    return names[0], names[1]


def report_link(grid: Grid, folder: Path) -> str:
    """The address of a grid's own page, as seen from `folder`; "" where it is not written yet."""
    page = grid.workdir.absolute() / "report" / "index.html"
    return quote(os.path.relpath(page, folder.absolute())) if page.is_file() else ""


def effects_of_both(a: Answer, b: Answer) -> Table:
    """The differences between arms, of whole tables, in both grids."""
    rows: dict[str, dict] = {}
    for side, answer in zip("ab", (a, b), strict=True):
        for effect in answer.summary["effects"]:
            if (effect["part"] == "") != (effect["table"] == "multi_task"):
                row = rows.setdefault(effect_name(effect), {"name": effect_name(effect), "colours": {}})
                row |= {f"{side}_mean": effect["mean"], f"{side}_ci": (effect["ci_low"], effect["ci_high"])}
                row["colours"] |= {f"{side}_mean": COLOURS[state(effect)]}
    caption = (
        "Differences in accuracy between arms in points, with 95 % intervals over targets and seeds, in A and in B. Green: "
        "shown to be above 0; orange: below. Whether A and B differ is another question: see the single results."
    )
    titles = {"name": "Difference", "a_mean": "A", "a_ci": "A, interval", "b_mean": "B", "b_ci": "B, interval"}
    order = ("name", "a_mean", "b_mean", "a_ci", "b_ci")
    return Table("effects", "Differences between arms", caption, rows.values(), titles, shown=order)


def effect_points(folder: Path, effects: Table, labels: Sequence[str]) -> Figure:
    """The differences that both grids have, or all where they share none, with their intervals."""
    common = [row for row in effects.rows if all(row.get(f"{side}_mean") is not None for side in "ab")]
    rows = common or list(effects.rows)

    def paint(axes):
        for number, (side, colour) in enumerate((("a", BLUE), ("b", ORANGE))):
            known = [(y, row) for y, row in enumerate(rows) if row.get(f"{side}_mean") is not None]
            at = [y - 0.14 + 0.28 * number for y, _ in known]
            means = [100 * row[f"{side}_mean"] for _, row in known]
            for y, (_, row) in zip(at, known, strict=True):
                axes.plot([100 * end for end in row[f"{side}_ci"]], [y, y], color=colour, linewidth=2)
            axes.plot(means, at, "os"[number], color=colour, markersize=6, label=short_label(labels[number], 40))
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_yticks(range(len(rows)), [beside(row["name"], width=30) for row in rows], color=INK)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(False, axis="y")
        axes.set_xlabel("difference in accuracy, points")
        legend(axes, 2)

    alone = (
        f" Not drawn: {len(effects.rows) - len(rows)} that one of them alone has."
        if len(rows) < len(effects.rows)
        else ""
    )
    caption = (
        f"Differences between arms in A (round) and B (square), with 95 % intervals over targets and seeds.{alone}"
    )
    return draw(folder, "effects", "The study's effects in A and B", caption, 1.2 + 0.5 * len(rows), paint)


def matched(a: Grid, b: Grid) -> list[Matched]:
    """The results of both grids with equal table, row, arm, target and seed, in A's order. Where the grids share no seed,
    the first seed of one is matched with the first of the other, and so on."""
    seeds_a, seeds_b = (sorted({r["seed"] for r in grid.results}) for grid in (a, b))
    common = set(seeds_a) & set(seeds_b)
    seed_in_a = dict(zip(seeds_b, seeds_b if common else seeds_a, strict=False))
    results_b = {key(r, seed_in_a.get(r["seed"])): r for r in b.results}
    sides = Side(a), Side(b)
    return [compared(*sides, r, other) for r in a.results if (other := results_b.get(key(r, r["seed"])))]


def key(result: Mapping, seed: int | None) -> tuple:
    return result["table"], result["row"], result["arm"], result["target"], seed


def compared(a: Side, b: Side, result_a: Mapping, result_b: Mapping) -> Matched:
    answers = a.answers(result_a), b.answers(result_b)
    agreement = largest = None
    paired = same_records(*answers) and len({a.data(result_a["seed"]), b.data(result_b["seed"])} - {None}) < 2
    if paired:
        right = [{name: line["predicted"] == line["answer"] for name, line in side.items()} for side in answers]
        patients = {name: line["group"] for name, line in answers[0].items() if line.get("group")}
        p = compare(*right, patients).p
        difference = {name: float(right[1][name]) - float(value) for name, value in right[0].items()}
        spread = mixed_interval([by_patient(difference, patients)])
        low, high = spread.low, spread.high
        pairs = [(line, answers[1][name]) for name, line in answers[0].items()]
        agreement = sum(x["predicted"] == y["predicted"] for x, y in pairs) / len(pairs)
        largest = max((gap for x, y in pairs for gap in gaps(x, y)), default=None)
    else:
        p = two_proportions(result_a["correct"], result_a["n"], result_b["correct"], result_b["n"])
        low, high = newcombe(result_b["correct"], result_b["n"], result_a["correct"], result_a["n"])
    fields = {name: result_a[name] for name in ("table", "row", "arm", "target", "seed")}
    trainings = tuple(side.trainings[r["cell"]] for side, r in zip((a, b), (result_a, result_b), strict=True))
    return Matched(**fields, trainings=trainings, a=score(result_a), b=score(result_b), low=low, high=high, paired=paired, p=p,
                   agreement=agreement, largest=largest)  # fmt: skip


def same_records(a: Mapping[str, dict], b: Mapping[str, dict]) -> bool:
    """Whether two cells were asked the same questions: ids, options and answers alike."""
    return bool(a) and a.keys() == b.keys() and all(
        (line["options"], line["answer"]) == (b[name]["options"], b[name]["answer"]) for name, line in a.items()
    )  # fmt: skip


def gaps(x: Mapping, y: Mapping) -> list[float]:
    """Absolute differences of the letters' log-probabilities; none for a letter that one prediction lacks."""
    a, b = letter_logprobs(x), letter_logprobs(y)
    return [0.0 if a[letter] == b[letter] else abs(a[letter] - b[letter]) for letter in a if letter in b]


def score(result: Mapping) -> Score:
    return Score(result["accuracy"], result["ci_low"], result["ci_high"], result["n"], (result["seed"],))


def newcombe(correct_b: int, n_b: int, correct_a: int, n_a: int) -> tuple[float, float]:
    """Newcombe's 95 % interval of b minus a, two proportions of different records; (-1, 1) without records."""
    if not n_a or not n_b:
        return -1.0, 1.0
    low, high = confint_proportions_2indep(correct_b, n_b, correct_a, n_a, compare="diff", method="newcomb")
    return float(low), float(high)


def two_proportions(correct_a: int, n_a: int, correct_b: int, n_b: int) -> float:
    """Two-sided p of the pooled z test of two proportions; 1 where all answers are right or all wrong, or n is 0."""
    if not n_a or not n_b or correct_a + correct_b in (0, n_a + n_b):
        return 1.0
    z = proportions_ztest([correct_a, correct_b], [n_a, n_b])[0]
    return float(2 * norm.sf(abs(z)))


def distinct(rows: Sequence[Matched]) -> list[Matched]:
    """One of the rows whose answers come from the same trainings on the same target."""
    return list({(row.trainings, row.target, row.seed): row for row in reversed(rows)}.values())[::-1]


def adjusted(rows: Sequence[Matched]) -> list[float]:
    """Each row's p after Holm's adjustment over the distinct results."""
    once = distinct(rows)
    p_of = dict(zip([(r.trainings, r.target, r.seed) for r in once], holm([r.p for r in once]), strict=True))
    return [p_of[row.trainings, row.target, row.seed] for row in rows]


def table_of(rows: list[Matched]) -> Table:
    values = [
        {"table": row.table.replace("_", "-"), "row": row.row, "arm": arm_name(row.arm), "target": row.target}
        | {"seed": row.seed, "a": row.a, "b": row.b, "n_a": row.a.n, "n_b": row.b.n}
        | {"difference": row.difference, "ci": (row.low, row.high)}
        | {"test": "McNemar" if row.paired else "two proportions", "p": row.p, "p_holm": p}
        | {"agreement": row.agreement, "largest": None if row.largest is None else f"{row.largest:.4f}"}
        | {"colours": {"difference": ("win-sure" if row.difference > 0 else "loss-sure") if p < 0.05 else ""}}
        for row, p in zip(rows, adjusted(rows), strict=True)
    ]
    caption = (
        "Accuracies in % of both grids (A, B) with Wilson intervals, their difference in points with a 95 % interval, "
        "and p, adjusted by Holm over all distinct results: exact McNemar where both were asked the same records (the "
        "interval is that of the paired differences; records of one patient count as one draw), else a z test of two "
        "proportions (Newcombe's interval). Of the same records "
        "also the share answered alike, and the largest difference of a log-probability, in nats. Green: B is "
        "significantly above; orange: below."
    )
    titles = {"n_a": "n of A", "n_b": "n of B", "difference": "B − A", "agreement": "Answered alike"}
    titles["largest"] = "Largest difference, nats"
    shown = ("target", "arm", "a", "b", "difference", "ci", "p_holm", "test", "agreement", "largest", "row", "seed")
    return Table("comparison", "Every result of both", caption, values, titles, shown=shown)


def differing(a: Grid, b: Grid) -> Table:
    """Settings (but those that change no result), versions and data that differ."""
    settings = [
        flat(grid.config)
        | {f"version of {name}": version for name, version in grid.run.get("versions", {}).items()}
        | {f"data of seed {seed}": digest for seed, digest in grid.run.get("data", {}).items()}
        for grid in (a, b)
    ]
    names = sorted(
        (settings[0].keys() | settings[1].keys()) - free_fields(), key=lambda name: (name.startswith(MADE_WITH), name)
    )
    pairs = {name: [side.get(name) for side in settings] for name in names}
    rows = [
        {"what": name, "a": _text(values[0]), "b": _text(values[1])}
        for name, values in pairs.items()
        if values[0] != values[1]
    ]
    caption = "Settings, versions and fingerprints of the data that differ."
    return Table("settings", "What differs between the two", caption, rows, {"what": "What"})


def _text(value: object) -> str:
    if isinstance(value, list) and value:
        return ", ".join(map(str, value))
    return "(none)" if value is None else "(empty)" if value in ("", [], {}) else str(value)


def verdict(rows: list[Matched], a: Grid, b: Grid) -> str:
    """The comparison in words."""
    if not rows:
        return "The two grids have no cell in common: nothing can be compared."
    rows, num_rows = distinct(rows), len(rows)
    num_sure = sum(p < 0.05 for p in adjusted(rows))
    mean_difference = points(sum(row.difference for row in rows) / len(rows), True)
    sentences = [
        f"Of {counted(len(rows), 'distinct result')} that both have, {num_sure} differ significantly after Holm's adjustment; on "
        f"average B is {mean_difference} points from A."
    ]
    same = [row for row in rows if row.paired]
    if same:
        answers = sum(row.a.n for row in same)
        share = points(sum((row.agreement or 0.0) * row.a.n for row in same) / answers)
        largest = max((row.largest for row in same if row.largest is not None), default=None)
        nats = "" if largest is None else f"; no log-probability differs by more than {largest:.2g} nats"
        sentences.append(
            f"Where the same records were asked, {share} % were answered with the same letter ({answers:,} answers){nats}."
        )
    if len(same) < len(rows):
        others = counted(len(rows) - len(same), "result")
        sentences.append(f"In {others} the records are others, so nothing is paired there.")
    sentences.append("They do not agree." if num_sure else "They agree within the noise of their records.")
    unmatched = [len(grid.results) - num_rows for grid in (a, b)]
    if any(unmatched):
        sentences.append(f"Not compared, for lack of a counterpart: {unmatched[0]} of A, {unmatched[1]} of B.")
    return " ".join(sentences)


def scatter(folder: Path, rows: list[Matched], labels: Sequence[str]) -> Figure:
    """B's accuracies over A's, with the diagonal."""
    rows = distinct(rows)
    p_values = adjusted(rows)

    def paint(axes):
        axes.plot([0, 100], [0, 100], color=INK, linewidth=0.9, linestyle="--")
        for sure, colour, label in ((False, BLUE, "no significant difference"), (True, ORANGE, "significant")):
            group = [row for row, p in zip(rows, p_values, strict=True) if (p < 0.05) == sure]
            if group:
                axes.plot(
                    [100 * r.a.accuracy for r in group], [100 * r.b.accuracy for r in group], "s" if sure else "o",
                    color=colour, alpha=0.55, markersize=4, markeredgewidth=0, label=label,
                )  # fmt: skip
        axes.set_xlim(0, 100)
        axes.set_ylim(0, 100)
        axes.set_aspect("equal")
        axes.set_xlabel(short_label(f"accuracy of {labels[0]}, %", 48))
        axes.set_ylabel(short_label(f"accuracy of {labels[1]}, %", 40))
        axes.figure.legend(loc="outside lower left", ncols=2, handlelength=1)

    caption = "Each point is a distinct result that both grids have; on the dashed line they are equal."
    return draw(folder, "scatter", "B over A", caption, 5.2, paint, 5.0)


def models_in(workdir: Path) -> list[str]:
    """The models with a grid in `workdir`, in the order of `MODELS`; [] where `workdir` itself is a grid's."""
    if (workdir / "config.json").is_file():
        return []
    return [model for model in MODELS if (workdir / model / "report" / "index.html").is_file()]


def write_models_page(workdir: Path, models: Sequence[str]) -> Path:
    """Writes `report/index.html` in `workdir`, with its tables and plots beside it; returns the page's path.

    models: names of folders in `workdir`, each with a grid.

    Raises:
      FileNotFoundError: a folder is not the workdir of a grid.
      FileError: a file of a grid is broken.
    """
    grids = {model: Grid(workdir / model) for model in models}
    with whole_folder(workdir / "report") as folder:
        _write_models(folder, grids)
    return workdir / "report" / "index.html"


def _write_models(folder: Path, grids: Mapping[str, Grid]) -> None:
    (folder / "plots").mkdir()
    rows = [row for model, grid in grids.items() for row in model_rows(model, grid)]
    headlines = [
        headline(answer_of(grid), model, quote(f"../{model}/report/index.html")) for model, grid in grids.items()
    ]
    tables, sections = [], [Section(id="answers", title="Each model's answer", headlines=headlines)]
    for group in dict.fromkeys((row["table"], row["part"]) for row in rows):
        group_rows = [row for row in rows if (row["table"], row["part"]) == group]
        name, title = "_".join(word for word in group if word), group[0].replace("_", "-").capitalize()
        title += f": {PARTS.get(group[1], group[1])}" if group[1] else ""
        caption = (
            "Accuracy by the likelihood of the option letters, over all test answers of the rows, with 95 % Wilson "
            "intervals, in %."
        )
        values = [
            {"model": row["model"], "arm": arm_name(row["arm"]), "n": row["score"].n, "accuracy": row["score"]}
            | {"chance": row["chance"], "seeds": ", ".join(map(str, row["score"].seeds))}
            for row in group_rows
        ]
        table = Table(f"models_{name}", title, caption, values)
        figure = model_bars(folder / "plots", name, title, group_rows)
        sections.append(Section(id=name.replace("_", "-"), title=title, figures=[figure], tables=[table]))
        tables.append(table)
    for part in ("in_distribution", "out_of_distribution"):
        table = joined({model: boxes(grid, part) for model, grid in grids.items()})
        if table.rows:
            sections.append(Section(id=table.name.replace("_", "-"), title=table.title, tables=[table]))
            tables.append(table)
    write_tables(folder, tables)
    write_text(folder / "tables" / "models.csv", models_csv(rows))
    first = next(iter(grids.values()))
    links = [Markup('<a href="../{0}/report/index.html">{0}</a>').format(model) for model in grids]
    links.append(Markup('All accuracies in one file: <a href="tables/models.csv">models.csv</a>'))
    sections.append(Section(id="models", title="Each model's own page", items=links))
    sections.append(Section(id="made", title="How it was made", facts=list(first.run["versions"].items())))
    world = "phantoms" if first.of_phantoms else "images from files"
    note = (
        "Phantoms are drawings. What they show is whether each model can be trained and tested by the same code; they "
        "say nothing about patients, and nothing about the released models, of which only the architecture is here."
    )
    text = page_html(
        "The same cells, model by model", f"{counted(len(grids), 'model')} on {world}: {', '.join(grids)}", sections,
        title="Compositional generalization: models side by side", tables=tables,
        notes=[note] if first.of_phantoms else [],
    )  # fmt: skip
    write_text(folder / "index.html", text)


def model_rows(model: str, grid: Grid) -> list[dict]:
    """A row for each table, part and arm of one model's grid: accuracy over all its test answers, and chance."""
    grouped: dict[tuple[str, str, str], list[dict]] = defaultdict(list)
    for result in grid.results:
        grouped[result["table"], result["part"], result["arm"]].append(result)
    rows = []
    for (table, part, arm), results in grouped.items():
        n, correct = sum(r["n"] for r in results), sum(r["correct"] for r in results)
        seeds = tuple(sorted({r["seed"] for r in results}))
        pooled = Score(correct / n if n else 0.0, *wilson(correct, n), n, seeds)
        chance = mean([grid.chance(result["target"]) for result in results])
        rows.append({"model": model, "table": table, "part": part, "arm": arm, "score": pooled, "chance": chance})
    return rows


def mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def models_csv(rows: Sequence[dict]) -> str:
    values = [
        [*(row[key] for key in ("model", "table", "part", "arm")), s.n, s.accuracy, s.low, s.high, row["chance"]]
        for row in rows
        for s in [row["score"]]
    ]
    header = ["model", "table", "part", "arm", "n", "accuracy", "ci_low", "ci_high", "chance"]
    return pandas.DataFrame(values, columns=header).to_csv(index=False, lineterminator="\n", float_format="%.6f")


def model_bars(folder: Path, name: str, title: str, rows: Sequence[dict]) -> Figure:
    """Accuracy of every arm and model, with Wilson intervals and chance."""
    models = dict.fromkeys(row["model"] for row in rows)
    groups = [
        (model, {row["arm"]: row["score"] for row in of_model}, mean([row["chance"] for row in of_model]))
        for model, of_model in ((model, [row for row in rows if row["model"] == model]) for model in models)
    ]
    paint, height_in = grouped_bars(groups, list(dict.fromkeys(row["arm"] for row in rows)))
    caption = "Accuracy by model with 95 % Wilson intervals over all test answers; the dashed line is chance."
    return draw(folder, name, title, caption, height_in, paint)


def joined(tables: Mapping[str, Table]) -> Table:
    """The rows of the models' tables that sum over all subsets (`ALL_SUBSETS`), with a column for the model."""
    first = next(iter(tables.values()))
    rows = [
        {"model": model} | {key: value for key, value in row.items() if key not in ("target", "what")}
        for model, table in tables.items()
        for row in table.rows
        if row["target"] == ALL_SUBSETS
    ]
    return Table(first.name, first.title, first.caption, rows, {c.key: c.title for c in first.columns})
