"""A table of a report: rows of values, written as CSV, LaTeX, Markdown and text for a page."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from numbers import Integral
from typing import Any

import pandas

from medcg_jax.study.report.escape import csv_cell, latex, markdown
from medcg_jax.study.report.load_grid import Score, arm_name

# Mark of a row's result: CSS class -> (sign, words).
MARKS = {
    "win-sure": ("▲", "above, and significantly (exact McNemar, Holm-adjusted p < 0.05)"),
    "win": ("△", "above, not significantly"),
    "chance": ("○", "above, but with chance in its own interval"),
    "even": ("◇", "above one and not above the other"),
    "loss": ("▽", "below, not significantly"),
    "loss-sure": ("▼", "below, and significantly"),
}
# Column key -> title, where `title_of` gives another.
TITLES = {
    "ci": "95\u00a0% interval", "cost": "Training seconds", "majority": "Most frequent label", "mark": "Result", "n": "n", "p": "p",
    "p_base": "Holm p vs Baseline", "p_holm": "p, Holm", "p_plus": "Holm p vs Baseline+", "related": "Trained on",
    "shares": "Shared", "what": "Combination",
}  # fmt: skip
# Kind of column -> suffixes of its keys in CSV; ("",) for all other kinds.
CSV_SUFFIXES = {"score": ("", "_low", "_high", "_n"), "interval": ("_low", "_high")}
# Kinds of left-aligned columns.
LEFT = ("text", "long", "mark")
# A column with a longer text may break lines.
LONG_CHARACTERS = 40


@dataclass(frozen=True)
class Column:
    """kind: see `kind_of`."""

    key: str
    title: str
    kind: str


class Table:
    """Rows of values.

    Attributes:
      name: of its files `tables/NAME.csv` and `.tex`.
      caption, legend: what the table is, and how it and its neighbours on a page are read: a page says it once.
      rows: column key -> value of each row; None where there is no value.
      columns: those with a value in at least one row, in the order of the rows' keys.
      shown: those that a page shows at once, the deciding ones first; the others are folded.
      colours: (row number, column key) -> CSS class.
    """

    def __init__(
        self,
        name: str,
        title: str,
        caption: str,
        rows: Iterable[dict],
        titles: Mapping[str, str] = TITLES,
        *,
        legend: str = "",
        shown: Sequence[str] = (),
    ):
        """rows: as the attribute, each with an optional "colours": column key -> CSS class. titles: added to `TITLES`.
        shown: keys of the attribute's columns; (): all.
        """
        self.name, self.title, self.caption, self.legend, self.rows = name, title, caption, legend, list(rows)
        colours = [row.pop("colours", {}) for row in self.rows]
        self.colours = {(i, key): css for i, row in enumerate(colours) for key, css in row.items() if css}
        titles = TITLES | dict(titles)
        self.columns = []
        for key in dict.fromkeys(key for row in self.rows for key in row):
            values = [row[key] for row in self.rows if row.get(key) is not None]
            if values:
                self.columns.append(Column(key, titles[key] if key in titles else title_of(key), kind_of(key, values)))
        by_key = {column.key: column for column in self.columns}
        self.shown = [by_key[key] for key in shown if key in by_key] or self.columns

    def csv(self) -> str:
        """CSV with unrounded fractions; a score takes four columns (KEY, KEY_low, KEY_high, KEY_n)."""
        suffixes = {column.key: CSV_SUFFIXES.get(column.kind, ("",)) for column in self.columns}
        header = [csv_cell(key + suffix) for key in suffixes for suffix in suffixes[key]]
        rows = [
            [csv_cell(value) for key in suffixes for value in _csv_values(row.get(key), len(suffixes[key]))]
            for row in self.rows
        ]
        return pandas.DataFrame(rows, columns=header, dtype=object).to_csv(index=False, lineterminator="\n")

    @property
    def words(self) -> str:
        """Caption and legend, for forms in which a table stands alone."""
        return f"{self.caption} {self.legend}".strip()

    def texts(self) -> list[list[str]]:
        """The cells as text, row by row."""
        return [[text_of(column.kind, row.get(column.key)) for column in self.columns] for row in self.rows]

    def latex(self, *, long: bool = False) -> str:
        """LaTeX for the packages booktabs and amssymb. long: a longtable in small type, over several pages."""
        if not self.rows:
            return "% no rows\n"
        widths = [("p{4cm}" if long and c.kind == "long" else "l") if c.kind in LEFT else "r" for c in self.columns]
        frame = pandas.DataFrame([[latex(text) for text in row] for row in self.texts()])
        style = frame.style.hide(axis="index").relabel_index([latex(c.title) for c in self.columns], axis=1)
        if long:
            size = r"\tiny" if len(widths) > 9 else r"\scriptsize"
            text = style.to_latex(environment="longtable", hrules=True, column_format=f"@{{}}{''.join(widths)}@{{}}")
            return f"{{{size}\n\\setlength{{\\tabcolsep}}{{2pt}}\n{text}}}"
        return "% needs \\usepackage{booktabs,amssymb}\n" + style.to_latex(
            hrules=True, column_format="".join(widths), position_float="centering", caption=latex(self.words),
            label=f"tab:{self.name}",
        )  # fmt: skip

    def markdown(self) -> str:
        rules = ["---" if column.kind in ("text", "long") else "--:" for column in self.columns]
        lines = [[c.title for c in self.columns], *self.texts()]
        lines = [[markdown(text.replace("\n", "; ")) for text in line] for line in lines]
        return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], rules, *lines[1:]))


def title_of(key: str) -> str:
    name = arm_name(key)
    return name if name != key else key.replace("_", " ").capitalize()


def kind_of(key: str, values: Sequence[Any]) -> str:
    """The kind of a column with these values, of which there is at least one.

    "text", "long" (text that may break), "mark" (keys of `MARKS`), "score" (`Score`), "interval" (two differences, as
    fractions), "points" (a difference), "share" (a fraction shown in %), "count" and "p".
    """
    if key == "mark":
        return "mark"
    if key == "p" or key.startswith("p_"):
        return "p"
    if key in ("difference", "mean", "a_mean", "b_mean") or key.startswith("seed_"):
        return "points"
    if key == "n" or all(isinstance(value, Integral) for value in values):
        return "count"
    if isinstance(values[0], str):
        return "long" if max(map(len, values)) > LONG_CHARACTERS else "text"
    return {Score: "score", tuple: "interval"}.get(type(values[0]), "share")


def text_of(kind: str, value: Any) -> str:
    """A value as text: accuracies in %, differences in points; "–" for None."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return MARKS[value][0] if kind == "mark" else value
    if kind == "score":
        return f"{100 * value.accuracy:.1f} [{100 * value.low:.1f}, {100 * value.high:.1f}]"
    if kind == "interval":
        return f"{points(value[0])} to {points(value[1])}"
    if kind == "points":
        return points(value, sign=True)
    if kind == "p":
        return "< 0.001" if value < 0.001 else f"{value:.3f}"
    return f"{value:,}" if kind == "count" else f"{100 * value:.1f}"


def points(value: float, sign: bool = False) -> str:
    """A fraction in points, with one decimal: .361 -> "36.1", with sign "+36.1"."""
    text = f"{abs(100 * value):.1f}"
    minus = value < 0 and text != "0.0"
    return ("−" if minus else "+" if sign else "") + text


def _csv_values(value: Any, count: int) -> Sequence[Any]:
    """The `count` CSV values of one cell."""
    if value is None:
        return [None] * count
    return [value] if count == 1 else (astuple(value) if isinstance(value, Score) else value)[:count]
