"""`medcg report`: the page, plots and tables of a grid, from the files in its workdir alone.

The same files (and, for sample images, the data that config.json names) give the same page. `load_grid` reads, `stats`
tests, `text` writes the sentences, `tables`, `published`, `plots` and `samples` make what is shown; `page` arranges it
in sections. `compare` writes the pages of several grids.
"""

import os
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from types import MappingProxyType

import jinja2
from markupsafe import Markup

from medcg_jax.config import ConfigError, flat
from medcg_jax.study.report.curves import Curves
from medcg_jax.study.report.drawing import Figure
from medcg_jax.study.report.escape import file_names, latex, markdown, plain
from medcg_jax.study.report.file_tables import confusion, subset_scores
from medcg_jax.study.report.load_grid import Grid
from medcg_jax.study.report.plots import Plots
from medcg_jax.study.report.published import context, power, published
from medcg_jax.study.report.samples import Card, Cards, box_samples, mistakes, samples
from medcg_jax.study.report.table import MARKS, Table, text_of
from medcg_jax.study.report.tables import Tables
from medcg_jax.study.report.text import Answer, counted, letter_habits, limits, missing, summary_text, table_names
from medcg_jax.study.stats import stats
from medcg_jax.study.stats.results import choices
from medcg_jax.untrusted import FileError

# A report's files; others in its folder are not touched.
WRITTEN = ("index.html", "summary.txt", "report.md", "report.tex", "plots", "tables", "subsets")
FORMATS = ("md", "tex", "csv")
ASKED = Markup(
    "A medical image has a <b>modality</b>, an anatomical <b>area</b> and a <b>task</b> that is asked of it. Does a "
    "multimodal language model answer about a combination of the three that it was never trained on, once it has met "
    "each element in other combinations? This repeats the study of arXiv 2412.20070 (Med-MAT): models are fine-tuned "
    "on subsets which share elements with a <i>target</i> combination, and tested on the target, whose images none of "
    "them has seen. <b>Baseline</b> is the model before fine-tuning, <b>Baseline+</b> is fine-tuned on subsets that "
    "share nothing with the target, <b>Trained</b> on related ones."
)
# Table of the study -> title of its section.
STUDY = {
    "pairs": "Pairs: two related subsets",
    "triples": "Triples: three subsets, one shared element each",
    "detection_pairs": "Detection pairs: a subset with boxes, and one of questions",
    "ablation": "Ablation: what each element is worth",
    "multi_task": "Multi-task against single-task",
    "efficiency": "Data efficiency",
    "dose": "Dose-response: how many related subsets",
    "detection": "Detection: boxes asked for",
}
# Table of the study -> introduction of its section.
INTROS = {
    "pairs": "Each target is a combination that the model was not trained on. Its two training subsets share two "
    "elements with it each, and between them all three; the direction says which element both have. In the "
    "modality-area pair one shares these two and the other the task alone.",
    "triples": "The strict form: modality, area and task each come from another subset.",
    "detection_pairs": "As pairs, but one of the two training subsets has boxes in place of options: its images are of "
    "the same kind, what is asked of them is where something lies. Only answers to choice questions are tested.",
    "ablation": "All subsets that share an element with the target, less those that share a given one.",
    "multi_task": "One model of all in-distribution subsets against one model per subset, with the same records of "
    "each; and the same model on combinations that were held out.",
    "efficiency": "How many records of the target itself the related subsets are worth.",
    "dose": "More related subsets with fewer records of each: what is left to gain once each element has been met.",
    "detection": "One model of all subsets with boxes but those held out, asked where the lesions of test images are: "
    "of the subsets it was trained on, and of combinations of a modality and an area that were held out.",
}
CARDS = (
    "The bar marks the right option, the shade the one answered, and the number is its probability among those "
    "offered. Records were drawn by a hash of their names, so many right and so many wrong; how often each occurs is "
    "in the tables."
)
SUBSETS = (
    "A page for each subset that was tested: its scores in every table, what is taken for what, and the most confident "
    "mistakes with their images. The share beside a name is the accuracy of the answers looked at there: those of the "
    "one model that its page names."
)
LETTERS = (
    "Accuracy is by likelihood: the offered letter that the model finds likeliest. A model that favours a letter, or "
    "that puts little probability on letters at all, has not understood the question; both would show here."
)
BASE = (
    "What is there before a fine-tune, target by target: whether the right option can be read from the image features "
    "that the base gives its decoder, by a linear probe trained on images of the target itself (no arm of pairs, triples and ablations is); and what "
    "the words of the question give alone, beside a grey image or without one."
)
PUBLISHED = (
    "Printed accuracies are those of arXiv 2412.20070, version 1 (December 2024); version 2 moves some of them. They "
    "are printed without test sizes, and were got with another model, other splits or other settings wherever those "
    "are not stated: agreement or difference of single rows says little."
)
MADE = Markup(
    "By <code>medcg reproduce</code> with the configuration below; <code>medcg report DIR</code> writes this page "
    "again from the grid's files alone."
)
ORIGINS = Markup(
    "All numbers come from the grid's own folder: what each cell was trained and tested on, its steps and seconds from "
    "<code>cells.csv</code>; counts of right answers and Wilson intervals from <code>results.csv</code>; every paired "
    "comparison, letter, free answer and label from <code>predictions/</code>; the tests asked again from "
    "<code>controls/</code>; boxes from <code>boxes/</code>; losses from <code>metrics/</code>; images in training and "
    "tests from <code>contamination.csv</code>; what a linear probe reads from <code>probe.csv</code>; where the time went "
    "from <code>goodput.json</code> (goodput: the share of the time that went into training steps that counted); settings, "
    "versions and fingerprints from <code>config.json</code>. Images are read from the data that <code>config.json</code> "
    "names, if their fingerprint is still the one recorded. Printed numbers are those of the paper's tables, kept with "
    "the code."
)
# Tables that are folded at the end of the page.
FOLDED = ("contamination", "comparisons", "metrics", "cells", "goodput")


@dataclass(frozen=True, kw_only=True)
class Section:
    """A section of a page; its contents are shown in the order of the fields.

    Attributes:
      id: of its link. answer: a first sentence and others below, in a frame.
      paragraphs, notes, items: texts, notes in a frame; HTML where they are `Markup`.
      facts: (name, text). cards: (heading, CSS class, cards). folded: tables that open on a click.
      narrow: figures and items stand in narrow columns.
    """

    id: str
    title: str
    answer: Sequence[str] = ()
    paragraphs: Sequence[str] = ()
    notes: Sequence[str] = ()
    facts: Sequence[tuple[str, str]] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    cards: Sequence[tuple[str, str, Sequence[Card]]] = ()
    items: Sequence[str] = ()
    folded: Sequence[Table] = ()
    narrow: bool = False


def page_html(
    heading: str, sub: str, sections: Iterable[Section], *, title: str = "", notes: Sequence[str] = (),
    tables: Iterable[Table] = (), links: Mapping[str, str] = MappingProxyType({}),
) -> str:  # fmt: skip
    """A page that loads nothing, with all text escaped. Empty sections are left out.

    title: of the window (default: the heading). tables: those with files in `tables/`. links: target -> its page.
    """
    names = [field.name for field in fields(Section) if field.name not in ("id", "title", "narrow")]
    shown = [section for section in sections if any(getattr(section, name) for name in names)]
    return page_template().render(
        heading=heading, sub=sub, title=title or heading, notes=notes, sections=shown, marks=MARKS,
        files={table.name for table in tables}, links=links, text_of=text_of,
    )  # fmt: skip


@cache
def page_template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("medcg_jax.study.report"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("page.html.j2")


def check_formats(text: str) -> tuple[str, ...]:
    """ "md,tex" -> ("md", "tex").

    Raises:
      ConfigError: a format is unknown.
    """
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in FORMATS:
            raise ConfigError(f"--format={name}: expected one or more of {','.join(FORMATS)}; the page is always there")
    return names


def write_report(workdir: str | Path, formats: Sequence[str] = ()) -> Path:
    """Writes `report/index.html`, with `plots/`, `tables/`, `subsets/` and `summary.txt` beside it; returns its path.

    An earlier report stays until this one is complete, and is then replaced as a whole.

    formats: "md" and "tex" add `report.md` and `report.tex`; CSV and LaTeX of each table are always written.

    Raises:
      FileNotFoundError: the folder is not the workdir of a grid.
      FileError: a file of the grid is broken or contradicts another; an earlier report stays.
    """
    grid = Grid(workdir)
    with whole_folder(grid.workdir / "report") as folder:
        _write(grid, folder, formats)
    for note in grid.notes:
        print(note, file=sys.stderr, flush=True)
    return grid.workdir / "report" / "index.html"


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to write into; it replaces `folder` at the end of the block, unless the block fails.

    Files that do not belong to an earlier report in `folder` are moved into the new one.

    Raises:
      FileError: `folder` exists and is no report.
    """
    if os.path.lexists(folder) and (folder.is_symlink() or not (folder / "index.html").is_file()):
        raise FileError(f"{folder}: is there and holds no report (index.html); move it away, a report is written there")
    draft, before = (folder.with_name(f".{folder.name}.{secrets.token_hex(6)}") for _ in range(2))
    draft.mkdir()
    try:
        yield draft
        if folder.exists():
            folder.rename(before)
        try:
            draft.rename(folder)
        except OSError:
            if before.exists():
                before.rename(folder)
            raise
        for entry in before.iterdir() if before.exists() else ():
            if entry.name not in WRITTEN:
                entry.rename(folder / entry.name)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(before, ignore_errors=True)


@contextmanager
def added_files(folder: Path) -> Iterator[Path]:
    """An empty folder to write into; at the end of the block its files move into `folder`, the page last.

    Other files in `folder` stay.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.with_name(f".{folder.name}.{secrets.token_hex(6)}")
    draft.mkdir()
    try:
        yield draft
        for path in sorted((p for p in draft.rglob("*") if p.is_file()), key=lambda p: (p.name == "index.html", p)):
            target = folder / path.relative_to(draft)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Writes a file of a report, without forbidden characters (`escape.plain`)."""
    path.write_text(plain(text), encoding="utf-8", newline="")


def write_tables(folder: Path, tables: Iterable[Table]) -> None:
    """`tables/NAME.csv` and `.tex` of each."""
    (folder / "tables").mkdir(exist_ok=True)
    for table in tables:
        write_text(folder / "tables" / f"{table.name}.csv", table.csv())
        write_text(folder / "tables" / f"{table.name}.tex", table.latex())


def _write(grid: Grid, folder: Path, formats: Sequence[str]) -> None:
    (folder / "plots").mkdir()
    summary = stats.summarise(grid.workdir, grid.results, grid.answers, grid.cells)
    maker = Tables(grid, summary)
    tables = {table.name: table for table in (*maker.all(), *published(maker))}
    write_tables(folder, tables.values())
    answer, against = Answer(grid, summary), limits(grid, summary)
    text = summary_text(grid, answer, against)
    texts = {"summary.txt": text}
    if "md" in formats:
        texts["report.md"] = markdown_report(grid.config["name"], text, tables.values())
    if "tex" in formats:
        texts["report.tex"] = latex_report(grid.config["name"], text, tables.values())
    files = file_names(dict.fromkeys(row["target"] for row in grid.results))
    links = {name: f"{file}.html" for name, file in files.items()}
    items = [_write_subset(grid, folder / "subsets", name, file) for name, file in links.items()]
    plots, curves = (kind(grid, summary, folder / "plots") for kind in (Plots, Curves))
    sections = [
        Section(id="asked", title="What was asked", paragraphs=[ASKED]),
        *_result_sections(grid, answer, tables, plots, curves),
        *_answer_sections(grid, tables, plots, curves, items),
        Section(id="limits", title="Limits of what was shown", items=against),
        *_made_sections(grid, tables),
    ]
    sub = (
        f"Compositional generalization, grid “{grid.config['name']}”: {counted(len(grid.done()), 'cell')}, "
        f"{table_names(grid.tables) or 'no table'}, {grid.model}, "
        f"{'phantoms' if grid.of_phantoms else 'images from files'}, {counted(len(grid.seeds), 'seed')}"
    )
    texts["index.html"] = page_html(
        "Can the model read a combination it has never seen?", sub, sections, tables=tables.values(), links=links,
        title=f"Compositional generalization: {grid.config['name']}", notes=missing(grid),
    )  # fmt: skip
    for name, text in texts.items():
        write_text(folder / name, text)


def _write_subset(grid: Grid, folder: Path, target: str, file: str) -> str:
    """Writes the page of one subset; returns its line in the list of subsets."""
    cards, answers = mistakes(grid, target)
    words = (
        f"{cards.num_wrong} of {cards.num_answers} answers of {cards.model} are wrong. Shown are those with the highest "
        "probability of the wrong letter among the letters offered, at most twelve."
        if cards.model
        else "No arm that is trained for another subset was tested on this one."
    )
    labels, scores = confusion(answers), subset_scores(grid, target)
    sections = [
        Section(id="mistakes", title="Mistakes to look at", paragraphs=[words], cards=[("", "wrong", cards.wrong)],
                notes=[cards.absent] if cards.absent else []),
        Section(id="confusion", title=labels.title, tables=[labels] if answers else [],
                paragraphs=[f"Answers of {cards.model}."] if answers else []),
        Section(id="scores", title=scores.title, tables=[scores]),
    ]  # fmt: skip
    what, name = grid.describe(target), grid.config["name"]
    sub = Markup('<a href="../index.html">Grid “{}”</a>, {}').format(name, grid.model)
    heading = f"{target}: {what}" if what else target
    folder.mkdir(exist_ok=True)
    write_text(folder / file, page_html(heading, sub, sections, title=f"{target}: {name}"))
    right = cards.num_answers and f": {100 - 100 * cards.num_wrong / cards.num_answers:.1f} %"
    return Markup('<a href="subsets/{}">{}</a>{}{}').format(file, target, what and f" {what}", right or "")


def _result_sections(
    grid: Grid, answer: Answer, tables: dict[str, Table], plots: Plots, curves: Curves
) -> list[Section]:
    """The answer, and a section for each table of the study with results."""
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
    key = Markup('<span class="key">In the tables below: {}</span>').format(
        Markup(" ").join(Markup('<span class="{}">{}</span>{}').format(css, *words) for css, words in MARKS.items())
    )
    lead = [Markup("<b>{}</b>").format(answer.opening), *map(Markup.escape, answer.first())]
    first = Section(
        id="answer", title="The answer", answer=[Markup(" ").join(lead), *answer.sentences()],
        paragraphs=[Markup('The same in plain text: <a href="summary.txt">summary.txt</a>'), *([key] if results else [])],
        figures=plots.headline(), tables=[tables[name] for name in ("effects", "effects_without_lapses") if name in tables],
        folded=[tables[name] for name in ("effects_by_direction",) if name in tables],
    )  # fmt: skip
    return [first, *results]


def _answer_sections(
    grid: Grid, tables: dict[str, Table], plots: Plots, curves: Curves, items: Sequence[str]
) -> list[Section]:
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


def _made_sections(grid: Grid, tables: dict[str, Table]) -> list[Section]:
    """Versions and settings, failed cells, choices, and the folded tables."""
    facts = [
        ("versions", ", ".join(f"{name} {version}" for name, version in grid.run.get("versions", {}).items())),
        ("data fingerprint", ", ".join(f"seed {seed}: {digest}" for seed, digest in grid.run.get("data", {}).items())),
        ("cells", f"{len(grid.done())} done, {len(grid.failed())} failed, {len(grid.waiting())} not run"),
    ]
    # The sum counts each training once: its cells have the same subsets, seed, steps and seconds.
    spent = {
        (c["related"], c["seed"], c["steps"], c["seconds"]): float(c["seconds"] or 0)
        for c in grid.cells
        if c["related"]
    }
    seconds = sorted(value for value in spent.values() if value > 0)
    if seconds:
        words = f"median {seconds[len(seconds) // 2]:.1f}, {seconds[0]:.1f} to {seconds[-1]:.1f}; {len(seconds)} "
        words += f"trainings, {sum(seconds):.0f} s in all, testing included, without the base"
        facts.append(("seconds per training", words))
    failed = [Markup("<code>{}</code>: {}").format(cell["cell"], cell["status"]) for cell in grid.failed()]
    rows = [
        {"field": field, "here": setting_text(value), "same": "yes" if same else "no", "why": why}
        for field, value, same, why in choices(grid.config)
    ]
    chosen = Table("choices", "What was chosen where the paper is silent", "", rows, {"same": "As chosen"})
    rows = [{"field": field, "value": setting_text(value)} for field, value in flat(grid.config).items()]
    folded = [Table("configuration", "Configuration", "", rows), *(tables[name] for name in FOLDED if name in tables)]
    return [
        Section(id="made", title="How it was made", paragraphs=[MADE, ORIGINS], facts=facts),
        Section(id="failed", title="Cells that failed", items=failed),
        Section(id="choices", title=chosen.title, tables=[chosen], folded=folded),
    ]


def setting_text(value: object) -> str:
    if isinstance(value, list | tuple):
        value = ", ".join(map(str, value))
    return "(none)" if value is None else "(empty)" if value in ("", {}) else str(value)


def markdown_report(name: str, summary: str, tables: Iterable[Table]) -> str:
    """One Markdown file: the summary, then every table."""
    parts = [f"# {markdown(name)}"]
    for paragraph in summary.rstrip().split("\n\n"):
        sign = "- " if paragraph.startswith("- ") else ""
        parts.append(sign + markdown(paragraph.removeprefix(sign)))
    for table in tables:
        parts += [f"## {markdown(table.title)}", table.markdown(), markdown(table.caption)]
    return "\n\n".join(parts) + "\n"


def latex_report(name: str, summary: str, tables: Iterable[Table]) -> str:
    """A LaTeX document: the summary, then every table, as long tables."""
    lines = [
        r"\documentclass[a4paper,10pt]{article}", r"\usepackage[T1]{fontenc}",
        r"\usepackage{booktabs,amssymb,longtable}", r"\usepackage[margin=20mm,landscape]{geometry}",
        rf"\title{{{latex(name)}}}", r"\date{}", r"\begin{document}", r"\maketitle",
        *(latex(paragraph) + "\n" for paragraph in summary.split("\n\n")),
    ]  # fmt: skip
    for table in tables:
        lines += ["", rf"\section*{{{latex(table.title)}}}", latex(table.caption), "", table.latex(long=True)]
    return "\n".join([*lines, r"\end{document}", ""])
