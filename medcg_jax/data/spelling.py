"""Texts that are not what they look like: two spellings of one label, invisible signs, the marks of prompts."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

# What stands for an image, or opens and closes turns, in the prompts of any family: a tokenizer makes one special token
# of it, or leaves it as text, by the family.
_MARKS = re.compile(
    r"<\|[A-Za-z][A-Za-z0-9_]*\|>"
    r"|</?(?:image|images|img|imagehere|video|im_patch|im_start|im_end|vid_start|vid_end|image_placeholder|at|boxes)>"
    r"|</?s>|<pad>|<unk>|<<SYS>>|\[/?INST\]|\[IMG\]",
    re.IGNORECASE,
)
_NUMBER_ENDS = re.compile(r"(?<![\d.])0+(?=\d)|(?<=\d)\.0+(?![\d.])|(?<=\d)(\.\d*?[1-9])0+(?![\d.])")
_DASHES = dict.fromkeys((0x2212, 0x2010, 0x2011, 0x2012, 0x2013, 0x2014, 0x2015), "-")
_QUOTES = {0x2018: "'", 0x2019: "'", 0x02BC: "'", 0x201C: '"', 0x201D: '"'}
# Beside those of the category Cf.
_INVISIBLE = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0") | {chr(code) for code in range(0xFE00, 0xFE10)}


def look(text: str) -> str:
    """What texts that look alike have in common: Unicode's form, case, white space, invisible signs, dashes, zeros.

    Example: "Naevus ", "naevus" and "nae\\u200bvus" are "naevus"; "1", "1.0" and "01" are "1".
    """
    seen = "".join(sign for sign in text if unicodedata.category(sign) != "Cf" and sign not in _INVISIBLE)
    seen = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", seen).casefold())
    seen = " ".join(seen.translate(_DASHES | _QUOTES).split())
    return _NUMBER_ENDS.sub(lambda number: number[1] or "", seen)


def look_alike(texts: Iterable[str]) -> tuple[str, str] | None:
    """The first two different texts that look alike; None where there are none."""
    first: dict[str, str] = {}
    for text in texts:
        other = first.setdefault(look(text), text)
        if other != text:
            return other, text
    return None


def quoted(text: str, limit: int = 60) -> str:
    """A text with quotes, at most so many signs of it, those that cannot be printed written as numbers."""
    return repr(text if len(text) <= limit else text[: limit - 3] + "...")


def told_apart(first: str, second: str) -> tuple[str, str]:
    """Both quoted, so that they look different: where they look alike, with numbers for all signs beyond ASCII."""
    quote = ascii if look(first) == look(second) else repr
    return quote(first[:60]), quote(second[:60])


def fault(text: str) -> str:
    """What stands in a question, option or label that no prompt can hold, and what to do; "" where nothing does."""
    mark = _MARKS.search(text)
    if mark:
        return f"spells {mark[0]!r}, which prompts put themselves, by the model; take it out"
    sign = next((sign for sign in text if unicodedata.category(sign) in ("Cc", "Cs") and sign not in "\t\n\r"), "")
    return f"has the control character {ascii(sign)}; plain text is accepted" if sign else ""
