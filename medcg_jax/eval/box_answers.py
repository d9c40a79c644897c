"""Answers to questions about boxes: kept in a file, read from it, and summed up."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medcg_jax.eval import boxes
from medcg_jax.files import write_whole

# Decimals of a pixel, and of a Dice, in the file.
DECIMALS = 2
DICE_DECIMALS = 4


@dataclass(frozen=True)
class BoxAnswer:
    """One question about boxes; the fields are the keys of a line of the file.

    Attributes:
      label: what was asked for. truth, predicted: boxes as x1, y1, x2, y2 in pixels of the stored image; predicted is
        None where the answer could not be read. generated: the text.
      dice: of the masks asked for, as one, with those answered; None where no masks are drawn or known.
    """

    id: str
    subset: str
    label: str
    truth: tuple[tuple[float, ...], ...]
    predicted: tuple[tuple[float, ...], ...] | None
    generated: str
    dice: float | None = None


def rounded(found: np.ndarray) -> tuple[tuple[float, ...], ...]:
    """Boxes [N, 4] as they stand in the file."""
    return tuple(tuple(round(float(x), DECIMALS) + 0.0 for x in box) for box in found)


def write_answers(path: Path, answers: Iterable[BoxAnswer]) -> None:
    """Writes one JSON line for each answer, in their order; the file appears whole or not at all."""
    write_whole(path, "".join(json.dumps(dataclasses.asdict(answer), ensure_ascii=False) + "\n" for answer in answers))


def read_answers(path: Path) -> list[BoxAnswer]:
    """What `write_answers` wrote."""

    def one(line: str) -> BoxAnswer:
        fields = json.loads(line)
        lists = {key: tuple(map(tuple, fields[key])) for key in ("truth", "predicted") if fields[key] is not None}
        return BoxAnswer(**fields | lists)

    # Lines of a file, not `splitlines`: generated text may hold other characters that end a line.
    with open(path, encoding="utf-8", newline="\n") as lines:
        return [one(line) for line in lines]


def summary(answers: Sequence[BoxAnswer]) -> dict:
    """`boxes.summary` of the answers, and three keys more.

    by_chance: the accuracy of the same answers to other questions, those of the next image of the same subset and
      label: what knowing a subset's usual places alone is worth. None where no subset has two images.
    dice: mean over questions that have one, with `dice_low` and `dice_high`; None without.
    """
    found = [_located(answer) for answer in answers]
    shuffled = []
    for kind in dict.fromkeys((a.subset, a.label) for a in answers):
        own = [one for one, a in zip(found, answers, strict=True) if (a.subset, a.label) == kind]
        for one, other in zip(own, own[1:] + own[:1], strict=True):
            if one.id != other.id:
                shuffled.append(dataclasses.replace(other, predicted=one.predicted))
    dices = np.array([a.dice for a in answers if a.dice is not None])
    low, high = boxes.ratio_interval(dices, np.ones(len(dices))) if len(dices) else (None, None)
    return boxes.summary(found) | {
        "by_chance": boxes.accuracy(shuffled) if shuffled else None,
        "dice": float(dices.mean()) if len(dices) else None, "dice_low": low, "dice_high": high,
    }  # fmt: skip


def _located(answer: BoxAnswer) -> boxes.Located:
    predicted = None if answer.predicted is None else np.array(answer.predicted, float)
    return boxes.Located(answer.id, answer.label, np.array(answer.truth, float), predicted)
