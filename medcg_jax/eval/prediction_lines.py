"""Lines of `predictions/` and `controls/` as they are read: whoever takes them from here can rely on their types."""

import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medcg_jax.untrusted import FileError, article_of, check_number, json_lines, shown

# A file of answers: 100,000 records with long options take some 60 MB.
MAX_ANSWER_BYTES = 2**27
# A log-probability of 1 may come out of float32 a little above 0.
MOST_LOGPROB = 0.01


def prediction_lines(path: str | Path) -> Iterator[dict[str, Any]]:
    """The lines of a predictions file (or of one of controls, which has "control" too), in order.

    Of each: "id", "subset" text; "options" texts; "answer", "predicted" one of the offered letters; "logprobs" a finite
    number for each option, or None; "generated" text or None. No question stands twice.

    Raises:
      FileError: the file cannot be read, or a line is not so; file, line and field are named.
    """
    asked: dict[tuple[str, str, str], int] = {}
    for number, line in json_lines(path, max_bytes=MAX_ANSWER_BYTES):
        name = f"{path}, line {number}"
        checked = {"logprobs": None, "generated": None, **line}
        check_line(checked, name)
        first = asked.setdefault((checked["subset"], checked["id"], checked.get("control", "")), number)
        if first != number:
            raise FileError(f"{name}: record {shown(line['id'])} stands in line {first} already; each once is accepted")
        yield checked


def check_line(line: dict, name: str) -> None:
    """Raises FileError where a line is no prediction. name: of the file and line."""
    for key in ("id", "subset", *(["control"] if "control" in line else ())):
        check_text(line, key, name)
    options = line.get("options")
    most = len(string.ascii_uppercase)
    if not isinstance(options, list) or not 0 < len(options) <= most or not all(isinstance(o, str) for o in options):
        raise FileError(f"{name}: {field(line, 'options')}: a list of 1 to {most} texts is accepted")
    letters = string.ascii_uppercase[: len(options)]
    for key in ("answer", "predicted"):
        if not isinstance(line.get(key), str) or len(line[key]) != 1 or line[key] not in letters:
            raise FileError(f"{name}: {field(line, key)}: one of {', '.join(letters)} is accepted")
    logprobs = line["logprobs"]
    if logprobs is not None:
        if not isinstance(logprobs, list) or len(logprobs) != len(options):
            count = f"{len(logprobs)} values" if isinstance(logprobs, list) else article_of(logprobs)
            raise FileError(f"{name}: logprobs: {count}; a number for each of the {len(options)} options is accepted")
        for value in logprobs:
            check_number(value, f"{name}: logprobs", most=MOST_LOGPROB)
    if line["generated"] is not None:
        check_text(line, "generated", name, empty=True)


def check_text(line: dict, key: str, name: str, *, empty: bool = False) -> None:
    """Raises FileError where a field of a line is no text, or empty where `empty` is false."""
    if not isinstance(line.get(key), str) or not (line[key] or empty):
        raise FileError(f"{name}: {field(line, key)}: text is accepted")


def field(line: dict, key: str) -> str:
    """A field with its value for a message: `answer="E"`, or that it is missing."""
    return f"{key}={shown(line[key])}" if key in line else f"{key} is missing"
