"""`medcg report`: the page, plots and tables of a grid, from the files in its workdir alone.

The same files (and, for sample images, the data that config.json names) give the same page. `load_grid` reads, `stats`
tests, `text` writes the sentences, `tables`, `published`, `plots`, `curves` and `samples` make what is shown; `sections`
arranges it, `layout` makes a page of it. `compare` writes the pages of several grids, `bench` that of benchmarks.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from medcg_jax.config import ConfigError
from medcg_jax.study.report.curves import Curves
from medcg_jax.study.report.escape import file_names, latex, markdown
from medcg_jax.study.report.folders import whole_folder, write_tables, write_text
from medcg_jax.study.report.layout import page_html
from medcg_jax.study.report.load_grid import Grid
from medcg_jax.study.report.plots import Plots
from medcg_jax.study.report.published import published
from medcg_jax.study.report.sections import sections_of
from medcg_jax.study.report.subset_pages import write_subset_pages
from medcg_jax.study.report.table import Table
from medcg_jax.study.report.tables import Tables
from medcg_jax.study.report.text import Answer, counted, limits, missing, summary_text, table_names

FORMATS = ("md", "tex", "csv")


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
    return write_page(Grid(workdir), formats)


def write_page(grid: Grid, formats: Sequence[str] = ()) -> Path:
    """`write_report` of a grid that was read already."""
    with whole_folder(grid.workdir / "report") as folder:
        _write(grid, folder, formats)
    for note in grid.notes:
        print(note, file=sys.stderr, flush=True)
    return grid.workdir / "report" / "index.html"


def _write(grid: Grid, folder: Path, formats: Sequence[str]) -> None:
    (folder / "plots").mkdir()
    summary = grid.summary
    maker = Tables(grid, summary)
    tables = {table.name: table for table in (*maker.all(), *published(maker))}
    write_tables(folder, tables.values())
    answer, against = Answer(grid, summary), limits(grid, summary)
    text = summary_text(grid, answer, against)
    texts = {"summary.txt": text}
    if "md" in formats:
        texts["report.md"] = markdown_report(grid.config["name"], text, tables)
    if "tex" in formats:
        texts["report.tex"] = latex_report(grid.config["name"], text, tables.values())
    files = file_names(dict.fromkeys(row["target"] for row in grid.results))
    links = {name: f"{file}.html" for name, file in files.items()}
    items = write_subset_pages(grid, folder / "subsets", links)
    plots, curves = (kind(grid, summary, folder / "plots") for kind in (Plots, Curves))
    sections = sections_of(grid, answer, tables, plots, curves, items, against)
    began = f", {grid.run['date'].partition('T')[0]}" if grid.run["date"] else ""
    sub = (
        f"Compositional generalization, grid “{grid.config['name']}”: {counted(len(grid.done()), 'cell')}, "
        f"{table_names(grid.tables) or 'no table'}, {grid.model}, "
        f"{'phantoms' if grid.of_phantoms else 'images from files'}, {counted(len(grid.seeds), 'seed')}{began}"
    )
    texts["index.html"] = page_html(
        "Can the model read a combination it has never seen?", sub, sections, tables=tables.values(), links=links,
        title=f"Compositional generalization: {grid.config['name']}", notes=missing(grid),
    )  # fmt: skip
    for name, text in texts.items():
        write_text(folder / name, text)


def markdown_report(name: str, summary: str, tables: Mapping[str, Table]) -> str:
    """One Markdown file: the table of results to paste elsewhere, the summary, then every other table."""
    first = [tables["results"]] if "results" in tables else []
    parts = [f"# {markdown(name)}", *(text for table in first for text in _markdown_table(table))]
    for paragraph in summary.rstrip().split("\n\n"):
        sign = "- " if paragraph.startswith("- ") else ""
        parts.append(sign + markdown(paragraph.removeprefix(sign)))
    for table in tables.values():
        parts += _markdown_table(table) if table not in first else []
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: Table) -> list[str]:
    return [f"## {markdown(table.title)}", table.markdown(), markdown(table.words)]


def latex_report(name: str, summary: str, tables: Iterable[Table]) -> str:
    """A LaTeX document: the summary, then every table, as long tables."""
    lines = [
        r"\documentclass[a4paper,10pt]{article}", r"\usepackage[T1]{fontenc}",
        r"\usepackage{booktabs,amssymb,longtable}", r"\usepackage[margin=20mm,landscape]{geometry}",
        rf"\title{{{latex(name)}}}", r"\date{}", r"\begin{document}", r"\maketitle",
        *(latex(paragraph) + "\n" for paragraph in summary.split("\n\n")),
    ]  # fmt: skip
    for table in tables:
        lines += ["", rf"\section*{{{latex(table.title)}}}", latex(table.words), "", table.latex(long=True)]
    return "\n".join([*lines, r"\end{document}", ""])
