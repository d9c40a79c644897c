"""A page from its sections: one file that loads nothing and runs nothing, with all text escaped."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from types import MappingProxyType

import jinja2

from medcg_jax.study.report.drawing import Figure
from medcg_jax.study.report.opening import Headline, Teaser
from medcg_jax.study.report.samples import Card
from medcg_jax.study.report.table import MARKS, Table, text_of

# Sections from which on a page has a list of contents.
MOST_WITHOUT_CONTENTS = 5
# Rows of a table that are printed.
MOST_PRINTED = 120


@dataclass(frozen=True, kw_only=True)
class Section:
    """A section of a page; its contents are shown in the order of the fields.

    Attributes:
      id: of its link.
      headlines, teaser: results in large type, side by side, and the study in pictures.
      answer: a first sentence and others below, in a frame.
      paragraphs, notes, items: texts, notes in a frame; HTML where they are `Markup`.
      facts: (name, text). words: (word, its meaning), folded.
      cards: (heading, CSS class, cards). folded: tables that open on a click.
      narrow: figures and items stand in narrow columns.
    """

    id: str
    title: str
    headlines: Sequence[Headline] = ()
    teaser: Teaser | None = None
    answer: Sequence[str] = ()
    paragraphs: Sequence[str] = ()
    notes: Sequence[str] = ()
    facts: Sequence[tuple[str, str]] = ()
    words: Sequence[tuple[str, str]] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    cards: Sequence[tuple[str, str, Sequence[Card]]] = ()
    items: Sequence[str] = ()
    folded: Sequence[Table] = ()
    narrow: bool = False


def page_html(
    heading: str,
    sub: str,
    sections: Iterable[Section],
    *,
    title: str = "",
    notes: Sequence[str] = (),
    tables: Iterable[Table] = (),
    links: Mapping[str, str] = MappingProxyType({}),
    around: Sequence[tuple[str, str, str]] = (),
) -> str:
    """The page. Empty sections are left out.

    title: of the window (default: the heading). tables: those with files in `tables/`. links: target -> its page.
    around: (relation such as "previous", address, name) of the pages beside this one.
    """
    names = [field.name for field in fields(Section) if field.name not in ("id", "title", "narrow")]
    shown = [section for section in sections if any(getattr(section, name) for name in names)]
    return _template().render(
        heading=heading, sub=sub, title=title or heading, notes=notes, sections=shown, marks=MARKS, around=around,
        files={table.name for table in tables}, links=links, text_of=text_of,
        has_contents=len(shown) > MOST_WITHOUT_CONTENTS, most_printed=MOST_PRINTED,
    )  # fmt: skip


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("medcg_jax.study.report"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("page.html.j2")
