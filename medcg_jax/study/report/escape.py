"""Escapes text from outside for a page, a figure, a table, Markdown, LaTeX or a file's name.

Names of subsets, labels, questions and answers are whatever a manifest or a model wrote. `plain` replaces characters
that no format of a report may hold; the other functions escape for one format each.
"""

import hashlib
import re
from collections.abc import Iterable

# Characters of a name in a figure; longer names would leave no room for the bars.
FIGURE_CHARACTERS = 60
TICK_CHARACTERS = 24
# Of each element of a combination on a page.
ELEMENT_CHARACTERS = 80
FILE_CHARACTERS = 100
# Characters that XML 1.0 excludes, lone surrogates, which UTF-8 cannot encode, and direction marks, which would reverse
# the text after a name.
FORBIDDEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)
# A spreadsheet reads a cell with such a start as a formula.
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "−": "$-$",
    "|": r"\textbar{}", '"': r"\textquotedbl{}", "`": r"\textasciigrave{}",
    "▲": r"$\blacktriangle$", "△": r"$\vartriangle$", "▽": r"$\triangledown$", "▼": r"$\blacktriangledown$",
    "–": "--", "“": "``", "”": "''", "·": r"$\cdot$", "≥": r"$\geq$", "×": r"$\times$",
    "◇": r"$\diamond$", "○": r"$\circ$",
}  # fmt: skip


def plain(text: str) -> str:
    """The text with U+FFFD for each control character, lone surrogate and direction mark; line ends stay."""
    return FORBIDDEN.sub("\ufffd", text)


def one_line(text: object) -> str:
    return plain(" ".join(str(text).split()))


def short_label(text: object, most: int = FIGURE_CHARACTERS) -> str:
    """A name for a figure: one line of at most `most` characters; beside an axis `TICK_CHARACTERS`."""
    line = one_line(text)
    return line if len(line) <= most else line[: most - 1] + "…"


def csv_cell(value: object) -> object:
    """A CSV cell: text that a spreadsheet would read as a formula gets a leading '; numbers stay."""
    if not isinstance(value, str):
        return value
    is_number = re.fullmatch(r"[-+]?\d+(\.\d+)?", value, re.ASCII)
    return ("'" if value.startswith(FORMULA) and not is_number else "") + plain(value.replace("\n", "; "))


def markdown(text: object) -> str:
    """The text with marks of Markdown and HTML escaped."""
    return re.sub(r"([\\`*_\[\]<>|~#!&$])", r"\\\1", one_line(text))


def latex(text: object) -> str:
    line = "".join(LATEX.get(character, character) for character in one_line(str(text).replace("\n", "; ")))
    # At a row's start these would be read as an argument of the row before.
    return f"{{}}{line}" if line.startswith(("[", "*")) else line


def file_names(names: Iterable[str]) -> dict[str, str]:
    """Name -> file name without extension: safe, short, and unique even without regard to case."""
    taken: set[str] = set()
    files: dict[str, str] = {}
    for name in names:
        file = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in name)[:FILE_CHARACTERS]
        if file.lower() in taken or len(name) > FILE_CHARACTERS:
            file = f"{file}-{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"
        taken.add(file.lower())
        files[name] = file
    return files
