"""How figures are drawn: colours, style, files, SVG for pages, and what several kinds of figures share."""

import io
import re
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from markupsafe import escape
from matplotlib import pyplot as plt

from medcg_jax.study.report.escape import plain, short_label

INK, MUTED, GRID = "#22262b", "#6b7280", "#d5d9df"
# Okabe and Ito's colours, which colour-blind readers can tell apart, and greys.
BLUE, ORANGE, SKY, GREEN, RED, PINK, GREY, PURPLE = (
    "#0072b2", "#d98200", "#4aa3dd", "#009e73", "#d55e00", "#c2699a", "#8b929c", "#7a68b3",
)  # fmt: skip
# Arm -> its colour; of arms that are numbered through, or paired with a control, the later ones are paler (`PALE`).
COLOURS = {
    "baseline": GREY, "baseline_plus": ORANGE, "single_1": GREEN, "single_2": GREEN, "single_3": GREEN,
    "filler_1": PINK, "filler_2": PINK, "filler_3": PINK, "words_only": RED, "no_images": MUTED, "trained": BLUE,
    "single_task": ORANGE, "multi_task": BLUE, "all_related": BLUE, "all_unrelated": ORANGE, "wo_modality": SKY,
    "random_removal_modality": SKY, "wo_area": GREEN, "random_removal_area": GREEN, "wo_task": RED,
    "random_removal_task": RED, "random_removal": PURPLE, "same_task": PINK, "all_data": MUTED,
    "with_related": BLUE, "with_unrelated": GREY, "target_only": ORANGE, "dose": BLUE,
}  # fmt: skip
PALE = {
    "single_2": 0.65, "single_3": 0.4, "filler_2": 0.65, "filler_3": 0.4, "random_removal_modality": 0.5,
    "random_removal_area": 0.5, "random_removal_task": 0.5,
}  # fmt: skip
# Colour -> its variable in the page's style sheet; dark pages have lighter colours.
VARIABLES = {
    INK: "ink", MUTED: "muted", GRID: "rule", BLUE: "blue", ORANGE: "orange", SKY: "sky", GREEN: "green", RED: "red",
    PINK: "pink", GREY: "grey", PURPLE: "purple", "#ffffff": "paper",
}  # fmt: skip
# Of labels and numbers, in points: still read where a figure is half as wide as a page's column.
SMALL_PT = 9.5
STYLE = {
    "font.size": 10.5, "font.family": "DejaVu Sans", "svg.fonttype": "none", "text.color": INK, "axes.edgecolor": GRID,
    "axes.labelcolor": INK, "xtick.color": MUTED, "ytick.color": MUTED, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.6, "axes.axisbelow": True,
    "xtick.major.size": 0, "ytick.major.size": 0, "legend.frameon": False, "legend.fontsize": SMALL_PT,
    "figure.facecolor": "#ffffff", "axes.facecolor": "#ffffff", "savefig.dpi": 300, "path.simplify": True,
    # Dollar signs in names start no formula.
    "text.parse_math": False,
}  # fmt: skip
WIDTH_IN = 5.8
# Characters of the values that a figure's alternative text names.
MOST_VALUES = 900


@dataclass(frozen=True)
class Figure:
    """A drawn figure with the files `plots/NAME.png` and `.svg`.

    Attributes:
      svg: for the page, at most `width_px` wide.
    """

    name: str
    title: str
    caption: str
    svg: str
    width_px: int


def draw(
    folder: Path, name: str, title: str, caption: str, height_in: float, paint: Callable, width_in: float = WIDTH_IN
) -> Figure:
    """The figure that `paint(axes)` draws, saved into `folder`.

    paint: may return what the figure shows in words, for readers who cannot see it.
    """
    title = short_label(title, round(10 * width_in))  # as many letters as fit
    with plt.rc_context({**STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        # Letters missing from the font are boxes in the PNG; in the SVG they are text.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure, axes = plt.subplots(figsize=(width_in, height_in), layout="constrained")
        try:
            values = paint(axes)
            figure.suptitle(title, x=0.012, ha="left", fontsize=11, fontweight="bold")
            text = io.StringIO()
            figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
            figure.set_layout_engine("none")  # the PNG keeps the layout of the SVG
            figure.savefig(folder / f"{name}.png", metadata={"Software": None})
        finally:
            plt.close(figure)
    svg = plain(text.getvalue())
    (folder / f"{name}.svg").write_text(svg, encoding="utf-8", newline="")
    width_px = round(width_in * 96)
    label = short_label(f"{title}: {values}", MOST_VALUES) if values else title
    return Figure(name, title, caption, inline(svg, label, width_px), width_px)


def inline(svg: str, label: str, width_px: int) -> str:
    """SVG to embed in a page: with the page's colour variables and fonts, without group ids and metadata.

    label: what the figure shows.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"font: (bold |[\d]+ )?([\d.]+)px [^;\"]*", _font, svg)
    for colour, name in VARIABLES.items():
        svg = re.sub(colour, f"var(--{name})", svg, flags=re.IGNORECASE)
    # On a phone a wide figure scrolls, so that its words stay readable.
    least = f";min-width:{round(0.7 * width_px)}px" if width_px > round(96 * WIDTH_IN) else ""
    opening = f'<svg role="img" aria-label="{escape(label)}" style="max-width:{width_px}px{least}"'
    return re.sub(r'<svg(.*?) width="[^"]*"', lambda m: opening + re.sub(r' height="[^"]*"', "", m[1]), svg, count=1)


def _font(match: re.Match) -> str:
    """The page's font in the size and weight of the match."""
    weight = f"font-weight: {match[1].strip()}; " if match[1] else ""
    return f"{weight}font-size: {match[2]}px"


def band(axes, x, low, middle, high, colour: str, **line) -> None:
    axes.fill_between(x, low, high, color=colour, alpha=0.14, linewidth=0)
    axes.plot(x, middle, color=colour, linewidth=1.6, **line)


def percent_axis(axes) -> None:
    axes.set_xlim(0, 100)
    axes.set_yticks([])
    axes.grid(False, axis="y")
    axes.spines["left"].set_color(MUTED)
    axes.set_xlabel("accuracy, %")


def legend(axes, num_columns: int) -> None:
    axes.figure.legend(loc="outside lower left", ncols=num_columns, handlelength=1.2, columnspacing=1.2)


def colour_of(arm: str) -> tuple[str, float]:
    """(colour, opacity) of an arm; an arm of equal updates has those of its like."""
    name = arm.removesuffix("_updates")
    return COLOURS.get(name, PURPLE), PALE.get(name, 1.0)


def beside(name: str, note: str = "", width: int = 24) -> str:
    """A label for an axis: at most two lines of the name, then the note."""
    lines = textwrap.wrap(short_label(name, 2 * width), width, max_lines=2, placeholder="…")
    return "\n".join(filter(None, [*lines, note]))
