"""The sections of a grid's page, in their order."""

from collections.abc import Sequence

from markupsafe import Markup

from medcg_jax.config import flat
from medcg_jax.study.report.curves import Curves
from medcg_jax.study.report.layout import Section
from medcg_jax.study.report.load_grid import Grid
from medcg_jax.study.report.opening import headline, teaser
from medcg_jax.study.report.plots import Plots
from medcg_jax.study.report.published import context, power
from medcg_jax.study.report.samples import Cards, box_samples, samples
from medcg_jax.study.report.table import MARKS, Table
from medcg_jax.study.report.text import Answer, counted, letter_habits
from medcg_jax.study.report.words import (
    ASKED,
    BASE,
    CARDS,
    CITATION,
    GLOSSARY,
    INTROS,
    LETTERS,
    MADE,
    ORIGINS,
    PUBLISHED,
    STUDY,
    SUBSETS,
)
from medcg_jax.study.stats.grid_files import training_of
from medcg_jax.study.stats.results import choices
from medcg_jax.terminal import duration
from medcg_jax.train import goodput

# Tables that are folded at the end of the page.
FOLDED = ("contamination", "comparisons", "metrics", "cells", "goodput")
DIGEST = (
    "“The digest” is a third party's summary of the paper's published version (ACL 2025): it gives some settings that "
    "the pages of arXiv 2412.20070, as far as they were read, do not."
)


def sections_of(
    grid: Grid,
    answer: Answer,
    tables: dict[str, Table],
    plots: Plots,
    curves: Curves,
    items: Sequence[str],
    against: Sequence[str],
) -> list[Section]:
    """All sections. items: a line for each subset's page. against: the limits."""
    return [
        Section(
            id="answer", title="The answer", headlines=[headline(answer)], teaser=teaser(grid), figures=plots.deciding()
        ),
        Section(id="asked", title="What was asked", paragraphs=[ASKED], words=GLOSSARY),
        Section(id="results", title="Results", tables=[tables[name] for name in ("results",) if name in tables]),
        _differences(answer, tables, plots),
        *_results(grid, tables, plots, curves),
        *_answers(grid, tables, plots, curves, items),
        Section(id="limits", title="Limits of what was shown", items=against),
        *_made(grid, tables),
    ]


def _differences(answer: Answer, tables: dict[str, Table], plots: Plots) -> Section:
    """The answer in words, and every difference between arms."""
    key = Markup('<span class="key">In the tables below: {}</span>').format(
        Markup(" ").join(Markup('<span class="{}">{}</span>{}').format(css, *words) for css, words in MARKS.items())
    )
    lead = [Markup("<b>{}</b>").format(answer.opening), *map(Markup.escape, answer.first())]
    return Section(
        id="words", title="In words and numbers", answer=[Markup(" ").join(lead), *answer.sentences()],
        paragraphs=[Markup('The same in plain text: <a href="summary.txt">summary.txt</a>'), *([key] if "effects" in tables else [])],
        figures=plots.headline(), tables=[tables[name] for name in ("effects_without_lapses",) if name in tables],
        folded=[tables[name] for name in ("effects", "effects_by_direction", "ceilings") if name in tables],
    )  # fmt: skip


def _results(grid: Grid, tables: dict[str, Table], plots: Plots, curves: Curves) -> list[Section]:
    """A section for each table of the study with results."""
    figures = {
        "pairs": plots.bars("pairs"), "triples": plots.bars("triples"), "multi_task": plots.multi_task(),
        "detection_pairs": plots.bars("detection_pairs"), "ablation": [*plots.ablation(), *plots.figure4()],
        "efficiency": curves.efficiency(), "dose": curves.dose(),
    }  # fmt: skip
    results = []
    for name, title in STUDY.items():
        # "detection_pairs" begins with "detection".
        others = tuple(other for other in STUDY if other.startswith(f"{name}_"))
        shown = [
            t for key, t in tables.items() if f"{key}_".startswith(f"{name}_") and not key.startswith(others or "-")
        ]
        boxes = box_samples(grid) if name == "detection" and shown else Cards()
        if shown or figures.get(name):
            heading = "Images with both boxes (green: those asked for; orange: those answered)"
            results.append(
                Section(id=name.replace("_", "-"), title=title, paragraphs=[INTROS[name]], tables=shown,
                        figures=figures.get(name, ()), notes=[boxes.absent] if boxes.absent else [],
                        cards=[(heading, "", boxes.right)])
            )  # fmt: skip
    return results


def _answers(grid: Grid, tables: dict[str, Table], plots: Plots, curves: Curves, items: Sequence[str]) -> list[Section]:
    """The map, single answers, subsets, letters, losses, and the published numbers."""
    cards = samples(grid)
    groups = [("Answered rightly", "right", cards.right), ("Answered wrongly", "wrong", cards.wrong)]
    contents: dict = {"notes": [cards.absent]} if cards.absent else {"cards": groups}
    if cards.model:
        contents["paragraphs"] = [f"Test records with the answers of {cards.model}. {CARDS}"]
    letters = [tables[name] for name in ("answers", "controls", "controls_again") if name in tables]
    printed = [table for name, table in tables.items() if name.startswith("published_")]
    beside = PUBLISHED if printed else "No row of this grid is a row of the paper's tables: nothing is set beside them."
    return [
        Section(id="map", title="Map of triplets", figures=plots.triplet_map()),
        Section(id="samples", title="Questions and answers", **contents),
        Section(id="subsets", title="Subset by subset", paragraphs=[SUBSETS] if items else [], items=items, narrow=True),
        Section(id="letters", title="How the letters were used", paragraphs=[LETTERS], notes=letter_habits(grid),
                figures=plots.letters(), tables=letters),
        Section(id="calibration", title="How far probabilities can be trusted", figures=curves.calibration(),
                tables=[tables[name] for name in ("calibration",) if name in tables]),
        Section(id="base", title="What the base knows", paragraphs=[BASE] if "knowledge" in tables else [],
                tables=[tables[name] for name in ("knowledge",) if name in tables]),
        Section(id="training", title="Training", figures=curves.losses(), narrow=True),
        Section(id="published", title="The published numbers", tables=printed,
                paragraphs=[power(), context() if grid.of_phantoms else beside]),
    ]  # fmt: skip


def _made(grid: Grid, tables: dict[str, Table]) -> list[Section]:
    """When and by what it was made, what it cost, failed cells, choices, and the folded tables."""
    failed = [Markup("<code>{}</code>: {}").format(cell["cell"], cell["status"]) for cell in grid.failed()]
    rows = [
        {"field": field, "here": setting_text(value), "same": "yes" if same else "no", "why": why}
        for field, value, same, why in choices(grid.config)
    ]
    caption = DIGEST if any("digest" in row["why"] for row in rows) else ""
    chosen = Table("choices", "What was chosen where the paper is silent", caption, rows, {"same": "As chosen"})
    rows = [{"field": field, "value": setting_text(value)} for field, value in flat(grid.config).items()]
    folded = [Table("configuration", "Configuration", "", rows), *(tables[name] for name in FOLDED if name in tables)]
    return [
        Section(id="made", title="How it was made", paragraphs=[MADE, ORIGINS], facts=_facts(grid)),
        Section(id="failed", title="Cells that failed", items=failed),
        Section(id="choices", title=chosen.title, tables=[chosen], folded=folded),
    ]


def _facts(grid: Grid) -> list[tuple[str, str]]:
    """(name, text); what the grid's files do not say is left out."""
    versions = ", ".join(f"{name} {version}" for name, version in grid.run["versions"].items())
    prints = ", ".join(f"seed {seed}: {digest}" for seed, digest in grid.run["data"].items())
    facts = [
        ("started", grid.run["date"].replace("T", " ").replace("+00:00", " UTC")),
        ("commit", grid.run["commit"].replace("+", ", with changes that are not committed")),
        ("versions", versions),
        ("data fingerprint", prints),
        ("cells", f"{len(grid.done())} done, {len(grid.failed())} failed, {len(grid.waiting())} not run"),
        *_cost(grid),
        ("how to cite", CITATION),
    ]
    return [(name, text) for name, text in facts if text]


def _cost(grid: Grid) -> list[tuple[str, str]]:
    # A training counts once, whatever the number of its cells.
    spent = {training_of(c): float(c["seconds"] or 0) for c in grid.done() if c["related"]}
    seconds, facts = sorted(value for value in spent.values() if value > 0), []
    if seconds:
        median = seconds[len(seconds) // 2]
        words = (
            f"{counted(len(spent), 'training')}, {duration(sum(seconds))} with their tests, without the base; median "
        )
        facts.append(("trainings", f"{words}{duration(median)}, {duration(seconds[0])} to {duration(seconds[-1])}"))
    starts, hours = grid.starts, goodput.device_hours(grid.starts)
    if hours:
        used = {start["devices"]["kind"]: start["devices"]["count"] for start in starts}
        facts.append(("devices", ", ".join(f"{count} x {kind}" for kind, count in used.items())))
        words = ", ".join(f"{value:.2g} {kind} device-hours" for kind, value in hours.items())
        facts.append(("cost", f"{words}, the base included"))
    elif starts:
        total = sum(sum(start["seconds"].values()) for start in starts)
        facts.append(("cost", f"{duration(total)} of all processes together, the base included"))
    return facts


def setting_text(value: object) -> str:
    if isinstance(value, list | tuple):
        value = ", ".join(map(str, value))
    return "(none)" if value is None else "(empty)" if value in ("", {}) else str(value)
