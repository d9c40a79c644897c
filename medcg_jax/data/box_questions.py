"""What is asked of a record with boxes: one question per label, the same for every model; how it answers is its own."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from medcg_jax.data.records import Box, Record

# None says how many there are: that is part of the answer.
PHRASINGS = (
    "Where is the {label}?",
    "Where in this image is the {label}?",
    "Locate the {label}.",
    "Find the {label} in this image.",
    "Mark the {label} with a box.",
    "Give the place of the {label}.",
)


class Asked(NamedTuple):
    """One question, the label it names as the boxes have it, and the boxes of that label in the record's order."""

    question: str
    label: str
    boxes: tuple[Box, ...]


def ask(record: Record) -> tuple[Asked, ...]:
    """The questions of a record, one for each label of its boxes; () where it has none.

    Order and phrasing depend on the record's id and the labels alone: whatever order the boxes have, each label of a
    subset comes first in some records, as it does where it is asked alone.

    Example: boxes of "Left lung" and "Right lung" -> ("Locate the right lung.", ...), ("Where is the left lung?", ...).
    """
    labels = sorted(dict.fromkeys(box.label for box in record.boxes), key=lambda label: _digest(f"{record.id}/{label}"))
    return tuple(
        Asked(question(label, f"{record.id}/{label}"), label, tuple(box for box in record.boxes if box.label == label))
        for label in labels
    )


def question(label: str, key: str) -> str:
    """A phrasing chosen by `key`, with the label as it stands inside a sentence ("Skin lesion" -> "skin lesion")."""
    # "CT contrast" keeps its capitals.
    inside = label if label[:2].isupper() else label[:1].lower() + label[1:]
    return PHRASINGS[int.from_bytes(_digest(key)[:4], "big") % len(PHRASINGS)].format(label=inside)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
