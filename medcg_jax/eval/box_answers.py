"""Answers to questions about boxes: kept in a file, read from it, and summed up."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medcg_jax.eval import boxes
from medcg_jax.eval.prediction_lines import MAX_ANSWER_BYTES, check_text, field
from medcg_jax.files import write_whole
from medcg_jax.untrusted import FileError, check_number, json_lines

# Decimals of a pixel, and of a Dice, in the file.
DECIMALS = 2
DICE_DECIMALS = 4
# A corner of a box; an answer of text may name any number, and beyond these no pixel lies.
FARTHEST_PX = {"least": -1e15, "most": 1e15}


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
    """What `write_answers` wrote. Raises FileError where a line is none such; file, line and field are named."""
    answers: list[BoxAnswer] = []
    asked: dict[tuple[str, str, str], int] = {}
    for number, line in json_lines(path, max_bytes=MAX_ANSWER_BYTES):
        name = f"{path}, line {number}"
        for key in ("id", "subset", "label", "generated"):
            check_text(line, key, name, empty=key in ("label", "generated"))
        if line.get("dice") is not None:
            check_number(line["dice"], f"{name}: dice", least=0, most=1)
        predicted = line.get("predicted")
        answers.append(
            BoxAnswer(
                line["id"], line["subset"], line["label"], _boxes(line, "truth", name, least=1),
                None if predicted is None else _boxes(line, "predicted", name), line["generated"], line.get("dice"),
            )
        )  # fmt: skip
        first = asked.setdefault((line["subset"], line["id"], line["label"]), number)
        if first != number:
            raise FileError(f"{name}: the question of line {first} again; each once is accepted")
    return answers


def _boxes(line: dict, key: str, name: str, least: int = 0) -> tuple[tuple[float, ...], ...]:
    value = line.get(key)
    if not isinstance(value, list) or len(value) < least or not all(isinstance(b, list) and len(b) == 4 for b in value):
        some = "of at least one box" if least else "of boxes"
        raise FileError(f"{name}: {field(line, key)}: a list {some}, each of four numbers, is accepted")
    return tuple(tuple(check_number(x, f"{name}: {key}", **FARTHEST_PX) for x in box) for box in value)


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
