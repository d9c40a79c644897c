"""Text from outside on its way into a page, a figure, a table, Markdown, LaTeX or a file's name.

Names of subsets, labels, questions and answers are whatever a manifest or a model has written. `plain` takes off what
no form of a report may hold; the others are for one form each.
"""

import hashlib
import re
from collections.abc import Iterable

# Characters of a name in a figure; longer ones would leave no room for its bars.
FIGURE_CHARACTERS = 60
TICK_CHARACTERS = 24
# Of each element of a combination on a page.
ELEMENT_CHARACTERS = 80
FILE_CHARACTERS = 100
# What XML 1.0 has no place for (and UTF-8 none for halves of a pair), and what turns the direction of the text that
# follows, beyond the end of a name.
FORBIDDEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)
# A spreadsheet takes a cell that begins so for a formula.
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "−": "$-$",
    "|": r"\textbar{}", '"': r"\textquotedbl{}", "`": r"\textasciigrave{}",
    "▲": r"$\blacktriangle$", "△": r"$\vartriangle$", "▽": r"$\triangledown$", "▼": r"$\blacktriangledown$",
    "–": "--", "“": "``", "”": "''", "·": r"$\cdot$", "≥": r"$\geq$", "×": r"$\times$",
    "◇": r"$\diamond$",
}  # fmt: skip


def plain(text: str) -> str:
    """The text with U+FFFD for each control character, half of a pair and turn of direction; lines stay."""
    return FORBIDDEN.sub("\ufffd", text)


def one_line(text: object) -> str:
    return plain(" ".join(str(text).split()))


def short_label(text: object, most: int = FIGURE_CHARACTERS) -> str:
    """A name for a figure: one line, and short. most: characters; beside an axis `TICK_CHARACTERS`."""
    line = one_line(text)
    return line if len(line) <= most else line[: most - 1] + "…"


def csv_cell(value: object) -> object:
    """A cell of a table for people: text that a spreadsheet takes for a formula gets a ' in front; numbers stay."""
    if not isinstance(value, str):
        return value
    is_number = re.fullmatch(r"[-+]?\d+(\.\d+)?", value, re.ASCII)
    return ("'" if value.startswith(FORMULA) and not is_number else "") + plain(value.replace("\n", "; "))


def markdown(text: object) -> str:
    """Text as it stands, where Markdown and HTML would see marks in it."""
    return re.sub(r"([\\`*_\[\]<>|~#!&$])", r"\\\1", one_line(text))


def latex(text: object) -> str:
    line = "".join(LATEX.get(character, character) for character in one_line(str(text).replace("\n", "; ")))
    # A row that begins so would be an argument of the one before.
    return f"{{}}{line}" if line.startswith(("[", "*")) else line


def file_names(names: Iterable[str]) -> dict[str, str]:
    """Name -> a file's name without its ending: safe, short, and no two alike, not even where case does not count."""
    taken: set[str] = set()
    files: dict[str, str] = {}
    for name in names:
        file = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in name)[:FILE_CHARACTERS]
        if file.lower() in taken or len(name) > FILE_CHARACTERS:
            file = f"{file}-{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"
        taken.add(file.lower())
        files[name] = file
    return files
