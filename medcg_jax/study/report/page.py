"""`medcg report`: the page, plots and tables of a grid, from the files in its workdir alone.

Everything on the page comes from these files (and, for sample images, from the data that config.json names): the same
files give the same page. Its parts: `report_files` reads, `stats` tests, `report_text` and `report_limits` say,
`report_tables`, `report_plots`, `report_samples` and `report_published` show.
"""

import os
import secrets
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import jinja2
from markupsafe import Markup

from medcg_jax.config import BOX_TABLES, TABLES
from medcg_jax.data.records import LETTERS
from medcg_jax.study.report import boxes, contamination, controls, goodput, lists
from medcg_jax.study.report import figures as report_figures
from medcg_jax.study.report import formats as report_formats
from medcg_jax.study.report import limits as report_limits
from medcg_jax.study.report import subsets as report_subsets
from medcg_jax.study.report import text as report_text
from medcg_jax.study.report.escape import plain
from medcg_jax.study.report.load_grid import Grid
from medcg_jax.study.report.plots import Figure, Plots
from medcg_jax.study.report.published import context, power, published
from medcg_jax.study.report.samples import letters_table, samples
from medcg_jax.study.report.subsets import SubsetPage
from medcg_jax.study.report.tables import MARKS, Table, Tables, shown
from medcg_jax.study.stats import stats
from medcg_jax.study.stats.results import choices
from medcg_jax.untrusted import FileError

# What a report consists of; other files in its folder are its reader's own.
WRITTEN = ("index.html", "summary.txt", "report.md", "report.tex", "plots", "tables", "subsets")


def write_report(workdir: str | Path, formats: Sequence[str] = ()) -> Path:
    """Writes `report/index.html`, with `plots/`, `tables/`, `subsets/` and `summary.txt` beside it; returns its path.

    Nothing of an earlier report is left, and an earlier one stays until this one is whole.

    formats: "md" and "tex" for `report.md` and `report.tex` too; "csv" (and LaTeX) of each table are always there.

    Raises:
      FileNotFoundError: the folder is not the workdir of a grid.
      FileError: a file of the grid is broken, or they do not agree; the report before stays as it is.
    """
    grid = Grid(workdir)
    with whole_folder(grid.workdir / "report") as folder:
        _write(grid, folder, formats)
    for note in grid.notes:
        print(note, file=sys.stderr, flush=True)
    return grid.workdir / "report" / "index.html"


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to write into, which takes the place of `folder` at the end of the block, unless it fails.

    Of an earlier report what others have laid beside its page and folders moves along.

    Raises:
      FileError: `folder` is there and is no report.
    """
    if os.path.lexists(folder) and (folder.is_symlink() or not (folder / "index.html").is_file()):
        raise FileError(f"{folder}: is there and holds no report (index.html); move it away, a report is written there")
    part, before = (folder.with_name(f".{folder.name}.{secrets.token_hex(6)}") for _ in range(2))
    part.mkdir()
    try:
        yield part
        if folder.exists():
            folder.rename(before)
        try:
            part.rename(folder)
        except OSError:
            if before.exists():
                before.rename(folder)
            raise
        for entry in before.iterdir() if before.exists() else ():
            if entry.name not in WRITTEN:
                entry.rename(folder / entry.name)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(before, ignore_errors=True)


@contextmanager
def added_files(folder: Path) -> Iterator[Path]:
    """An empty folder to write into; at the end its files go to the same places in `folder`, the page last.

    What else lies in `folder` stays; it is there only when all is written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f".{folder.name}.{secrets.token_hex(6)}")
    part.mkdir()
    try:
        yield part
        for path in sorted((p for p in part.rglob("*") if p.is_file()), key=lambda p: (p.name == "index.html", p)):
            place = folder / path.relative_to(part)
            place.parent.mkdir(parents=True, exist_ok=True)
            path.replace(place)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Writes a file of a report, without characters that no such file may hold (`report_escape.plain`)."""
    path.write_text(plain(text), encoding="utf-8", newline="")


def _write(grid: Grid, folder: Path, formats: Sequence[str]) -> None:
    for name in ("plots", "tables"):
        (folder / name).mkdir()
    summary = stats.summarise(grid.workdir, grid.results, grid.answers)
    tables = {table.name: table for table in Tables(grid, summary).all()}
    own = [contamination.table(grid), lists.comparisons(summary), lists.cells(grid)]
    own += [letters_table(grid), *controls.controls(summary), *published(grid, summary)]
    own.append(goodput.table(grid))
    extra = [table for table in (*own, *boxes.tables(grid)) if table.rows]
    tables |= {table.name: table for table in extra}
    for table in tables.values():
        write_text(folder / "tables" / f"{table.name}.csv", table.csv())
        write_text(folder / "tables" / f"{table.name}.tex", table.latex())
    plots = Plots(grid, summary, folder / "plots")
    answer, said = report_text.Answer(grid, summary), limits(grid, summary)
    texts = {"summary.txt": report_formats.summary_text(grid, answer, said)}
    if "md" in formats:
        texts["report.md"] = report_formats.markdown(grid, answer, said, tables.values())
    if "tex" in formats:
        texts["report.tex"] = report_formats.document(grid, answer, said, tables.values())
    subsets = report_subsets.pages(grid)
    if subsets:
        (folder / "subsets").mkdir()
    for one in subsets:
        text = page_template("subset.html.j2", marks=MARKS).render(page=one, grid=grid)
        write_text(folder / "subsets" / one.file, text)
    texts["index.html"] = render(grid, summary, tables, plots, subsets)
    for name, text in texts.items():
        write_text(folder / name, text)


def render(grid: Grid, summary: dict, tables: dict[str, Table], plots: Plots, subsets: Sequence[SubsetPage]) -> str:
    """The page's HTML; draws its figures."""
    answer = report_text.Answer(grid, summary)
    losses = plots.losses()  # what is left out of them is among what is missing
    return page_template("report.html.j2", marks=MARKS).render(
        grid=grid,
        answer=answer,
        sections=[part for part in sections(grid, tables, plots) if part["tables"] or part["figures"]],
        headline=plots.headline(),
        effects=tables.get("effects"),
        directions=tables.get("effects_by_direction"),
        missing=report_limits.missing(grid),
        limits=limits(grid, summary),
        map=report_figures.triplet_map(plots),
        samples=samples(grid),
        subsets=subsets,
        pages={one.name: one.file for one in subsets},
        boxes=boxes.samples(grid),
        letters=plots.letters(),
        habits=report_limits.letter_habits(grid),
        letters_table=tables.get("answers"),
        controls=[tables[name] for name in ("controls", "controls_again") if name in tables],
        losses=losses,
        published=[table for name, table in tables.items() if name.startswith("published_")],
        context=context() if grid.of_phantoms else "",
        power=power(),
        contamination=tables.get("contamination"),
        comparisons=tables.get("comparisons"),
        cells=tables.get("cells"),
        goodput=tables.get("goodput"),
        settings=settings(grid.config),
        choices=choices(grid.config),
        seconds=seconds(grid.cells),
        letter_names=LETTERS,
        names=lambda items: report_text.listed([name.replace("_", "-") for name in items]),
        counted=report_text.counted,
    )


def limits(grid: Grid, summary: dict) -> list[str]:
    own = [*contamination.limits(grid), *controls.limits(grid, summary)]
    return [*own, *report_limits.limits(grid, summary)]


def page_template(name: str, **values) -> jinja2.Template:
    """A page of `templates/`, which escapes what it is given and refuses what it is not. values: for its macros."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("medcg_jax.study.report"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"shown": shown, "svg": lambda figure: Markup(figure.svg)}  # noqa: S704 - drawn by us
    return environment.get_template(name, globals=values)


def sections(grid: Grid, tables: dict[str, Table], plots: Plots) -> list[dict]:
    """The parts of the page that hold results: one per table of the study."""

    def part(name: str, title: str, intro: str, figures: Sequence[Figure]) -> dict:
        # "detection" has parts of its own, and is how "detection_pairs" begins.
        others = [other for other in (*TABLES, *BOX_TABLES) if other.startswith(f"{name}_")]
        own = [
            table for key, table in tables.items()
            if (key == name or key.startswith(f"{name}_")) and not key.startswith(tuple(others))
        ]  # fmt: skip
        return {"id": name.replace("_", "-"), "title": title, "intro": intro, "tables": own, "figures": figures}

    return [
        part("pairs", "Pairs: two related subsets",
             "Each target is a combination that the model was not trained on. Its two training subsets share two "
             "elements with it each, and between them all three; the direction says which element both have. In the "
             "modality-area pair one shares these two and the other the task alone.",
             plots.bars("pairs")),
        part("triples", "Triples: three subsets, one shared element each",
             "The strict form: modality, area and task each come from another subset.", plots.bars("triples")),
        part("detection_pairs", "Detection pairs: a subset with boxes, and one of questions",
             "As pairs, but one of the two training subsets has boxes in place of options: its images are of the same "
             "kind, what is asked of them is where something lies. Only answers to choice questions are tested.",
             plots.bars("detection_pairs")),
        part("ablation", "Ablation: what each element is worth",
             "All subsets that share an element with the target, less those that share a given one.",
             [*plots.ablation(), *report_figures.figure4(plots)]),
        part("multi_task", "Multi-task against single-task",
             "One model of all in-distribution subsets against one model per subset, with the same records of each; "
             "and the same model on combinations that were held out.", plots.multi_task()),
        part("efficiency", "Data efficiency",
             "How many records of the target itself the related subsets are worth.",
             [*plots.efficiency(), *report_figures.curves_by_target(plots)]),
        part("detection", "Detection: boxes asked for",
             "One model of all subsets with boxes but those held out, asked where the lesions of test images are: of "
             "the subsets it was trained on, and of combinations of a modality and an area that were held out.", ()),
    ]  # fmt: skip


def settings(config: dict, prefix: str = "") -> list[tuple[str, str]]:
    """("train.batch_size", "32"), ... of the whole configuration, in its order."""
    found = []
    for key, value in config.items():
        if isinstance(value, dict):
            found += settings(value, f"{prefix}{key}.") or [(prefix + key, "(empty)")]
        elif isinstance(value, list):
            found.append((prefix + key, ", ".join(map(str, value)) or "(empty)"))
        else:
            found.append((prefix + key, '""' if value == "" else str(value)))
    return found


def seconds(cells: Sequence[dict]) -> dict | None:
    """Median, least, most and sum of the seconds of trained cells; None where none were recorded."""
    # Cells of one row of training (same subsets, seed and seconds) share it; the sum counts each once.
    spent = {
        (c["related"], c["seed"], c["steps"], c["seconds"]): float(c["seconds"] or 0) for c in cells if c["related"]
    }
    found = sorted(value for value in spent.values() if value > 0)
    if not found:
        return None
    return {
        "trainings": len(found),
        "median": found[len(found) // 2],
        "least": found[0],
        "most": found[-1],
        "sum": sum(found),
    }
