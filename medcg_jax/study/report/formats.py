"""A grid's report in other forms: a summary that can be quoted, one Markdown file, one LaTeX document."""

import textwrap
from collections.abc import Iterable, Sequence

from medcg_jax.config import ConfigError
from medcg_jax.study.report.escape import latex, plain
from medcg_jax.study.report.escape import markdown as escaped
from medcg_jax.study.report.load_grid import Grid
from medcg_jax.study.report.tables import Table, shown
from medcg_jax.study.report.text import Answer, counted, listed

FORMATS = ("md", "tex", "csv")
WIDTH = 100


def check_formats(text: str) -> tuple[str, ...]:
    """ "md,tex" -> ("md", "tex").

    Raises:
      ConfigError: another format.
    """
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in FORMATS:
            raise ConfigError(f"--format={name}: one or more of {','.join(FORMATS)} is accepted beside the page")
    return names


def summary_text(grid: Grid, answer: Answer, limits: Sequence[str]) -> str:
    """Plain text: what was run, what it shows with numbers and intervals, and what it does not."""
    names = listed([name.replace("_", "-") for name in grid.tables]) if grid.tables else "no table"
    head = (
        f"{grid.config['name']}: {counted(len(grid.done()), 'cell')} of {len(grid.cells):,}, {names}; "
        f"{grid.config['model']['name']}, {'phantoms' if grid.of_phantoms else 'images from files'}, "
        f"{counted(len(grid.seeds), 'seed')} ({', '.join(map(str, grid.seeds)) or 'none'})."
    )
    said = [answer.opening, *(f"{words}: {names}." for words, names in answer.totals()), *answer.sentences()]
    parts = [head, " ".join(said), *(f"- {limit}" for limit in limits)]
    filled = (textwrap.fill(plain(part), WIDTH, subsequent_indent="  " if part[0] == "-" else "") for part in parts)
    return "\n\n".join(filled) + "\n"


def markdown(grid: Grid, answer: Answer, limits: Sequence[str], tables: Iterable[Table]) -> str:
    """The summary, then every table."""
    parts = [f"# {escaped(grid.config['name'])}"]
    for paragraph in summary_text(grid, answer, limits).rstrip().split("\n\n"):
        mark = "- " if paragraph.startswith("- ") else ""
        parts.append(mark + escaped(paragraph.removeprefix(mark)))
    for table in tables:
        parts += [f"## {escaped(table.title)}", table_markdown(table), escaped(table.caption)]
    return "\n\n".join(parts) + "\n"


def table_markdown(table: Table) -> str:
    columns = table.used()
    lines = [[column.title for column in columns], ["---" if c.kind in ("text", "long") else "--:" for c in columns]]
    lines += [[shown(column, row.get(column.key)) for column in columns] for row in table.rows]
    cells = [[escaped(str(text).replace("\n", "; ")) for text in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def document(grid: Grid, answer: Answer, limits: Sequence[str], tables: Iterable[Table]) -> str:
    """A whole LaTeX document: the summary, then every table, wide ones made to fit the page."""
    lines = [
        r"\documentclass[a4paper,10pt]{article}", r"\usepackage[T1]{fontenc}",
        r"\usepackage{booktabs,amssymb,longtable}", r"\usepackage[margin=20mm,landscape]{geometry}",
        rf"\title{{{latex(grid.config['name'])}}}", r"\date{}", r"\begin{document}", r"\maketitle",
        *(latex(part) + "\n" for part in summary_text(grid, answer, limits).split("\n\n")),
    ]  # fmt: skip
    for table in tables:
        lines += ["", rf"\section*{{{latex(table.title)}}}", latex(table.caption), "", long_table(table)]
    return "\n".join([*lines, r"\end{document}", ""])


def long_table(table: Table) -> str:
    """Rows over as many pages as they need, in small type."""
    columns = table.used()
    kinds = "".join("l" if c.kind in ("text", "mark") else "p{4cm}" if c.kind == "long" else "r" for c in columns)
    size = r"\tiny" if len(columns) > 9 else r"\scriptsize"
    head = " & ".join(latex(c.title) for c in columns) + r" \\"
    body = [" & ".join(latex(shown(c, row.get(c.key))) for c in columns) + r" \\" for row in table.rows]
    return "\n".join(
        ["{" + size, r"\setlength{\tabcolsep}{2pt}", rf"\begin{{longtable}}{{@{{}}{kinds}@{{}}}}", r"\toprule", head,
         r"\midrule\endhead", *body, r"\bottomrule", r"\end{longtable}", "}"]
    )  # fmt: skip
