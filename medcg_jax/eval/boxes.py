"""Questions about boxes: IoU, matching, accuracy at IoU 0.5, mean and cumulative IoU, Dice, intervals; the answer file.

Boxes are float[N, 4] of x1, y1, x2, y2 in pixels of the stored image (`data.boxes` maps a model's answer back to it).
"""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medcg_jax.eval.predictions import MAX_ANSWER_BYTES, check_text, field, wilson
from medcg_jax.files import write_whole
from medcg_jax.untrusted import FileError, check_number, json_lines

# A box is found if its IoU is above this, not equal to it: Vision-CAIR/MiniGPT-4 (226cb38) eval_scripts/eval_ref.py
# and NExT-ChatV/NExT-Chat (2e2f732) mllm/dataset/single_image_dataset/rec.py:RECComputeMetrics.calculate_metric.
THRESHOLD = 0.5
BOOTSTRAP_DRAWS = 9999
# Decimals in the file, of pixels and of Dice.
DECIMALS = 2
DICE_DECIMALS = 4
# Largest coordinate of a corner: an answer of text may name any number.
FARTHEST_PX = 1e15


@dataclass(frozen=True)
class BoxAnswer:
    """One question about boxes and its answer; the fields are the keys of a line of the file.

    Attributes:
      label: what was asked for. truth, predicted: boxes as x1, y1, x2, y2 in pixels of the stored image; predicted is
        None if the answer could not be read. generated: the text.
      dice: between the union of the true masks and the union of the answered ones; None without masks.
    """

    id: str
    subset: str
    label: str
    truth: tuple[tuple[float, ...], ...]
    predicted: tuple[tuple[float, ...], ...] | None
    generated: str
    dice: float | None = None


def overlap(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(float64[N, M], float64[N, M]): areas of the intersection and union of each of a[N, 4] with each of b[M, 4].

    A box with corners out of order, or not finite, has the area 0.
    """
    a, b = _real_boxes(a), _real_boxes(b)
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    both = np.prod(np.maximum(high - low, 0), -1)
    areas = [np.prod(boxes[:, 2:] - boxes[:, :2], -1) for boxes in (a, b)]
    return both, areas[0][:, None] + areas[1][None] - both


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float64[N, M] in [0, 1]: intersection over union of each of a[N, 4] with each of b[M, 4]; see `overlap`."""
    both, union = overlap(a, b)
    return np.divide(both, union, out=np.zeros_like(both), where=union > 0)


def match(predicted: np.ndarray, truth: np.ndarray) -> list[tuple[int, int]]:
    """(index in predicted, index in truth) of each matched pair; every box is in at most one pair.

    Greedy: the pair with the largest IoU comes first (of equals the first in order); boxes without overlap never match.
    """
    scores = iou(predicted, truth)
    pairs: list[tuple[int, int]] = []
    for flat in np.argsort(-scores, axis=None, kind="stable"):
        i, j = np.unravel_index(flat, scores.shape)
        if scores[i, j] <= 0:
            break
        if all(i != k and j != m for k, m in pairs):
            pairs.append((int(i), int(j)))
    return pairs


def summary(answers: Sequence[BoxAnswer]) -> dict[str, float | int | None]:
    """Scores over all true boxes; a box without a match, or with an unreadable answer, counts as IoU 0.

    Keys:
      questions, n: numbers of questions, and of boxes in their truth. predicted: number of boxes in the answers.
      correct, accuracy: number and share of the n with a match of IoU above 0.5. precision: correct over predicted;
        None without predicted boxes.
      mean_iou: mean over the n. cumulative_iou: sum of intersections over sum of unions; unmatched boxes of either side
        add their area to the unions.
      unparsed_rate: share of the questions whose answer could not be read.
      by_chance: accuracy if each answer is scored on the next image of the same subset and label: what the usual places
        of a subset's boxes are worth alone. None if no subset has two images.
      dice: mean over the questions with a Dice; None without any.
      accuracy_low, accuracy_high and so on: 95 % intervals. Wilson's for the accuracy if every question has one box,
        else by resampling questions.
    """
    boxes, predicted, hits, ious, both, union = _columns(answers)
    n, correct = int(boxes.sum()), int(hits.sum())
    dices = np.array([a.dice for a in answers if a.dice is not None])
    intervals = {
        "accuracy": wilson(correct, n) if (boxes == 1).all() else ratio_interval(hits, boxes),
        "mean_iou": ratio_interval(ious, boxes),
        "cumulative_iou": ratio_interval(both, union),
    }
    scores = {
        "questions": len(answers),
        "n": n,
        "predicted": int(predicted.sum()),
        "correct": correct,
        "accuracy": float(_ratio(hits, boxes)),
        "precision": float(_ratio(hits, predicted)) if predicted.sum() else None,
        "mean_iou": float(_ratio(ious, boxes)),
        "cumulative_iou": float(_ratio(both, union)),
        "unparsed_rate": sum(a.predicted is None for a in answers) / len(answers) if answers else 0.0,
    }
    for name, (low, high) in intervals.items():
        scores |= {f"{name}_low": low, f"{name}_high": high}
    dice_low, dice_high = ratio_interval(dices, np.ones(len(dices))) if len(dices) else (None, None)
    scores |= {"by_chance": _accuracy_by_chance(answers), "dice": float(dices.mean()) if len(dices) else None}
    return scores | {"dice_low": dice_low, "dice_high": dice_high}


def _accuracy_by_chance(answers: Sequence[BoxAnswer]) -> float | None:
    shuffled = []
    for kind in dict.fromkeys((a.subset, a.label) for a in answers):
        alike = [a for a in answers if (a.subset, a.label) == kind]
        for answer, question in zip(alike, alike[1:] + alike[:1], strict=True):
            if answer.id != question.id:
                shuffled.append(dataclasses.replace(question, predicted=answer.predicted))
    boxes, _, hits, *_ = _columns(shuffled)
    return float(_ratio(hits, boxes)) if shuffled else None


def ratio_interval(top: np.ndarray, bottom: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Bootstrap percentile interval of sum(top) / sum(bottom), both float[N]; (0, 1) for fewer than two questions.

    Whole questions are resampled, since the boxes of a question are on one image.
    """
    if len(top) < 2 or not np.sum(bottom):
        return 0.0, 1.0
    from scipy.stats import bootstrap  # slow to import, and needed for a test's summary alone

    drawn = bootstrap(
        (top, bottom), _ratio, paired=True, vectorized=True, method="percentile", confidence_level=level,
        n_resamples=BOOTSTRAP_DRAWS, batch=1000, rng=np.random.default_rng(0),
    )  # fmt: skip
    return float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)


def dice(a: np.typing.ArrayLike, b: np.typing.ArrayLike) -> float:
    """Twice the common pixels over all pixels of two masks bool[h, w], in [0, 1]; 1 if both are empty.

    Raises:
      ValueError: the masks differ in shape.
    """
    a, b = np.asarray(a, bool), np.asarray(b, bool)
    if a.shape != b.shape:
        raise ValueError(f"masks of {a.shape} and {b.shape}: expected two of one shape")
    total = int(a.sum()) + int(b.sum())
    return 2 * int((a & b).sum()) / total if total else 1.0


def _columns(answers: Sequence[BoxAnswer]) -> np.ndarray:
    """float64[6, N]: `_row` of every question."""
    return np.array([_row(answer) for answer in answers], np.float64).reshape(-1, 6).T


def _row(answer: BoxAnswer) -> tuple[float, ...]:
    """Numbers of true, predicted and found boxes, and sums of IoU, intersections and unions, of one question."""
    truth, predicted = _as_boxes(answer.truth), _as_boxes(answer.predicted or ())
    both, union = overlap(predicted, truth)
    pairs = match(predicted, truth)
    matched = sum(both[i, j] for i, j in pairs)
    areas = [overlap(boxes, boxes)[1].diagonal().sum() for boxes in (predicted, truth)]
    ious = [both[i, j] / union[i, j] for i, j in pairs]
    return len(truth), len(predicted), sum(v > THRESHOLD for v in ious), sum(ious), matched, sum(areas) - matched


def _as_boxes(boxes) -> np.ndarray:
    return np.asarray(boxes, np.float64).reshape(-1, 4)


def _real_boxes(boxes) -> np.ndarray:
    """float64[N, 4], with zeros for boxes that are not finite or have corners out of order."""
    boxes = _as_boxes(boxes)
    real = np.isfinite(boxes).all(-1) & (boxes[:, :2] <= boxes[:, 2:]).all(-1)
    # Larger than any image, and small enough for a finite area.
    return np.clip(np.where(real[:, None], boxes, 0), -1e9, 1e9)


def _ratio(top: np.ndarray, bottom: np.ndarray, axis: int = -1) -> np.ndarray:
    total = np.sum(bottom, axis=axis)
    return np.sum(top, axis=axis) / np.where(total > 0, total, 1)


def rounded(boxes: np.ndarray) -> tuple[tuple[float, ...], ...]:
    """Boxes [N, 4] with the decimals of the file."""
    return tuple(tuple(round(float(x), DECIMALS) + 0.0 for x in box) for box in boxes)


def write_answers(path: Path, answers: Iterable[BoxAnswer]) -> None:
    """Writes one JSON line for each answer, in their order; the file appears whole or not at all."""
    write_whole(path, "".join(json.dumps(dataclasses.asdict(answer), ensure_ascii=False) + "\n" for answer in answers))


def read_answers(path: Path) -> list[BoxAnswer]:
    """What `write_answers` wrote. Raises FileError for any other line, with the file, line and field."""
    answers: list[BoxAnswer] = []
    asked: dict[tuple[str, str, str], int] = {}
    for number, line in json_lines(path, max_bytes=MAX_ANSWER_BYTES):
        name = f"{path}, line {number}"
        for key in ("id", "subset", "label", "generated"):
            check_text(line, key, name, empty=key in ("label", "generated"))
        if line.get("dice") is not None:
            check_number(line["dice"], f"{name}: dice", least=0, most=1)
        truth, predicted = _read_boxes(line, "truth", name, least=1), line.get("predicted")
        predicted = None if predicted is None else _read_boxes(line, "predicted", name)
        fields: dict[str, Any] = {key: line.get(key) for key in ("id", "subset", "label", "generated", "dice")}
        answers.append(BoxAnswer(truth=truth, predicted=predicted, **fields))
        first = asked.setdefault((line["subset"], line["id"], line["label"]), number)
        if first != number:
            raise FileError(f"{name}: the question of line {first} again")
    return answers


def _read_boxes(line: dict, key: str, name: str, least: int = 0) -> tuple[tuple[float, ...], ...]:
    value = line.get(key)
    boxes = [box for box in value if isinstance(box, list) and len(box) == 4] if isinstance(value, list) else []
    if boxes != value or len(boxes) < least:
        some = "of at least one box" if least else "of boxes"
        raise FileError(f"{name}: {field(line, key)}: expected a list {some}, each of four numbers")
    return tuple(
        tuple(check_number(x, f"{name}: {key}", least=-FARTHEST_PX, most=FARTHEST_PX) for x in box) for box in boxes
    )
