"""The paper's numbers beside a grid's, for rows that the paper has too; for phantoms in words only."""

from collections import Counter
from collections.abc import Sequence

from medcg_jax.config import MODELS
from medcg_jax.data import catalogue
from medcg_jax.families import registry
from medcg_jax.study.design import mat, overlap, suite
from medcg_jax.study.report.load_grid import arm_name
from medcg_jax.study.report.table import Table
from medcg_jax.study.report.tables import Tables
from medcg_jax.study.report.text import sentence
from medcg_jax.study.stats.paired import paper_power

# Arm -> its name in tables 1 and 2 of the paper.
PRINTED = {"baseline": "Baseline", "single_task": "Single-task Training", "multi_task": "Multi-task Training"}
MODEL = "LLaVA-1.5-7B"
# Published table of combinations -> (its file, its model).
FILES = {number: (file, family.title) for family in registry.families() for number, file in family.tables.values()}


def published(tables: Tables) -> list[Table]:
    """Rows of the paper that the grid repeats on released data; [] for phantoms."""
    if tables.grid.of_phantoms:
        return []
    family = MODELS.get(tables.grid.config["model"]["name"], "")
    numbers = {"pairs": suite.PAIR_TABLES.get(family, 3), "triples": 4}
    if family in suite.DETECTION_TABLES:
        numbers["detection_pairs"] = suite.DETECTION_TABLES[family]
    result = [combination(tables, table, number) for table, number in numbers.items()]
    result += [per_subset(tables, part) for part in ("in_distribution", "out_of_distribution")]
    return [table for table in result if table.rows]


def beside(values: dict, paper: dict, arms: Sequence[str]) -> dict:
    """Columns of each arm's printed accuracy and the grid's (`Tables.compared`); the last arm has colours."""
    columns: dict[str, object] = {}
    for arm in arms:
        columns |= {f"{arm}_paper": paper.get(arm), arm: values[arm]}
    others = [float(paper[arm]) for arm in arms[:-1] if paper.get(arm)]
    colours = {arms[-1]: values["mark"]}
    if paper.get(arms[-1]) and others:
        # The paper's green ("win") means above all others of the row, its red ("loss") any other result.
        colours[f"{arms[-1]}_paper"] = "win" if float(paper[arms[-1]]) > max(others) else "loss"
    return columns | {"mark": values["mark"], "colours": colours}


def titles_of(arms: Sequence[str]) -> dict[str, str]:
    titles = {"n": "n here"}
    for arm in arms:
        titles |= {f"{arm}_paper": f"{arm_name(arm)}, paper", arm: f"{arm_name(arm)}, here"}
        titles[f"p_{arm}"] = f"Holm p vs {arm_name(arm)}"
    return titles


def combination(tables: Tables, table: str, number: int) -> Table:
    """A published table in its layout: green where Trained is above both baselines, else orange (red there)."""
    file, model = FILES[number]
    printed = {int(row["row"]): row for row in mat.paper_csv(file)}
    readings, subsets = {row.row: row for row in mat.paper_rows(number)}, mat.paper_subsets()
    arms, rows = ("baseline", "baseline_plus", "trained"), []
    for (row, target), scores in tables.grid.scores(table).items():
        paper_table, paper_row = suite.Row.parse(table, row).published or (0, 0)
        if paper_table == number and paper_row in printed:
            reading = readings[paper_row]
            values = tables.compared(table, row, target, scores, "trained", ("baseline_plus", "baseline"))
            others = "; ".join(" + ".join(related) for related in reading.alternatives)
            rows.append(
                {"paper_row": paper_row, "related": " + ".join(reading.related), "target": target}
                | {
                    "shares": " + ".join(
                        overlap.overlap(subsets[reading.target], [subsets[n] for n in reading.related])
                    )
                }
                | {"lapse": overlap.printed_lapses().get((number, paper_row))}
                | beside(values, printed[paper_row], arms)
                | {key: values[key] for key in ("p_plus", "p_base", "n", "seeds", "cost")}
                | {"confidence": reading.confidence, "others": others or None, "evidence": reading.evidence or None}
                | {"slips": slips_of(file, paper_row, (*reading.related, reading.target)) or None}
            )
    name = table.replace("_", " ").capitalize()
    caption = (
        f"{name} beside table {number} of arXiv 2412.20070, version 1: printed accuracies ({model}) and this grid's "
        f"({tables.grid.model}), in %. Subset numbers are inferred from the printed baselines and "
        "phrases; the confidence is that of the reading. Shared: the elements (modality M, area A, task T) that each "
        f"related subset has in common with the target, by this project's table of tasks. {lapses_in_words(rows)}"
    )
    titles = {
        "paper_row": "Row", "related": "Related", "lapse": "But", "confidence": "Reading", "others": "Or read as",
        "evidence": "Why", "slips": "Slips",
    }  # fmt: skip
    of_arms = [f"{arm}{end}" for arm in arms for end in ("_paper", "")]
    shown = ["paper_row", *of_arms, "mark", "n", "target", "related", "shares", "lapse"]
    titles |= titles_of(arms)
    return Table(f"published_{table}", f"{name} beside table {number}", caption, rows, titles, shown=shown)


def slips_of(file: str, row: int, subsets: Sequence[str]) -> str:
    """The known slips of a printed row, and of the triplets of subsets; "" where none is known."""
    return "; ".join(
        f"{slip.field} {slip.printed!r}: {slip.why}" if slip.table == file else f"subset {slip.number}: {slip.why}"
        for slip in catalogue.slips()
        if (slip.table, slip.number) == (file, str(row))
        or (slip.table == catalogue.SUBSETS and slip.number in subsets and slip.field in mat.ELEMENTS)
    )


def lapses_in_words(rows: Sequence[dict]) -> str:
    """How many of the shown rows share more or less with their target than they should, or rest on a doubtful subset."""
    num_rows = Counter(row["lapse"] for row in rows if row["lapse"])
    doubtful = sum("subset " in (row["slips"] or "") for row in rows)
    texts = [
        f"in {num_rows[name]} of these {len(rows)} rows {words}"
        for name, words in overlap.LAPSES.items()
        if num_rows[name]
    ]
    texts += [f"in {doubtful} a subset has a doubtful triplet as printed"] * bool(doubtful)
    return sentence(f"{'; '.join(texts)}: see the columns “But” and “Slips”") if texts else ""


def per_subset(tables: Tables, part: str) -> Table:
    """Table 1 or 2: both print subset numbers, so nothing is inferred."""
    number = 1 if part == "in_distribution" else 2
    printed = {(row["subset"], row["model"]): row["accuracy"] for row in mat.paper_csv(f"table{number}_{part}")}
    arms = [arm for arm, word in PRINTED.items() if any(model == word for _, model in printed)]
    rows = []
    for (row, target), scores in tables.grid.scores("multi_task").items():
        if row == part and (target, "Baseline") in printed:
            values = tables.compared("multi_task", row, target, scores, "multi_task", arms[-2::-1])
            paper = {arm: printed.get((target, PRINTED[arm])) for arm in arms}
            rows.append(
                {"target": target}
                | beside(values, paper, arms)
                | {key: values[key] for key in (*(f"p_{arm}" for arm in arms[:-1]), "n", "seeds")}
                | {"slips": slips_of(f"table{number}_{part}", int(target), (target,)) or None}
            )
    caption = (
        f"Subsets beside table {number} of arXiv 2412.20070, version 1: printed accuracies ({MODEL}) and this grid's "
        f"({tables.grid.model}), in %. The table prints subset numbers: nothing is inferred."
    )
    titles = titles_of(arms) | {"target": "Subset"}
    return Table(f"published_{part}", f"Multi-task beside table {number}", caption, rows, titles)


def power() -> str:
    """How many of table 3's printed wins 100, 300 or 1,000 test records could show, in words."""
    plus, base = paper_power(against="baseline_plus"), paper_power(against="baseline")
    sizes = [f"with {n:,} records {below}" for n, below in plus["below"].items()]
    return (
        f"Table 3 of the paper prints {plus['wins']} wins of Trained over Baseline+, and no test sizes. How many of them "
        "are too small to be told from noise depends on the size: "
        f"{', '.join(sizes)} (over Baseline, with 300 records, {base['below'][300]} of {base['wins']}). Too small: such a "
        "win comes out significant at 5 % less than four times in five, where the two models err independently."
    )


def context() -> str:
    """Table 3 of the paper in words, for pages of phantoms, whose numbers must not stand beside it."""
    arms = ("trained", "baseline", "baseline_plus")
    rows = [[float(row[arm]) for arm in arms] for row in mat.paper_csv("table3_classification_pairs")]
    gains = [trained - max(others) for trained, *others in rows if trained > max(others)]
    return (
        f"Table 3 of the paper (arXiv 2412.20070, version 1; {MODEL} on real medical images) prints Trained above both "
        f"baselines in {len(gains)} of {len(rows)} rows, in {sum(gain <= 3 for gain in gains)} of them by 3 points or "
        "less, with no test sizes, intervals or seeds. Its numbers are not set beside these, since phantoms are not "
        "patients."
    )
