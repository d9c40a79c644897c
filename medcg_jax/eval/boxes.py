"""Scores of boxes and masks: IoU, matching, accuracy at IoU 0.5, mean and cumulative IoU, Dice, with intervals.

Boxes are float[N, 4] of x1, y1, x2, y2 in pixels of the stored image (`data.boxes` maps a model's answer back to it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap

from medcg_jax.eval.intervals import wilson

# "Found" is above it, not at it: Vision-CAIR/MiniGPT-4 (226cb38) eval_scripts/eval_ref.py and NExT-ChatV/NExT-Chat
# (2e2f732) mllm/dataset/single_image_dataset/rec.py:RECComputeMetrics.calculate_metric.
THRESHOLD = 0.5
# What MiniGPT-v2's evaluation adds to every width and height: Vision-CAIR/MiniGPT-4 (081fb02)
# minigpt4/common/eval_utils.py:computeIoU. It makes small boxes overlap more.
MINIGPT_EXTRA_PX = 1.0
BOOTSTRAP_DRAWS = 9999


@dataclass(frozen=True)
class Located:
    """One question about boxes and what was answered; boxes of other labels are other questions.

    Attributes:
      id: of the record. label: what was asked for.
      truth: float[M, 4], M of 1 or more.
      predicted: float[K, 4]; None where the answer could not be read (counts as no box).
    """

    id: str
    label: str
    truth: np.ndarray
    predicted: np.ndarray | None


def overlap(a: np.ndarray, b: np.ndarray, *, extra_px: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """(float64[N, M], float64[N, M]): areas of the intersection and union of each of a[N, 4] with each of b[M, 4].

    A box whose ends are exchanged, or not finite, has no area.

    Args:
      extra_px: added to widths and heights; 0, or `MINIGPT_EXTRA_PX`.
    """
    a, b = _grown(a, extra_px), _grown(b, extra_px)
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    both = np.prod(np.maximum(high - low, 0), -1)
    areas = [np.prod(boxes[:, 2:] - boxes[:, :2], -1) for boxes in (a, b)]
    return both, areas[0][:, None] + areas[1][None] - both


def iou(a: np.ndarray, b: np.ndarray, *, extra_px: float = 0.0) -> np.ndarray:
    """float64[N, M] in [0, 1]: intersection over union of each of a[N, 4] with each of b[M, 4]; see `overlap`."""
    both, union = overlap(a, b, extra_px=extra_px)
    return np.divide(both, union, out=np.zeros_like(both), where=union > 0)


def match(predicted: np.ndarray, truth: np.ndarray, *, extra_px: float = 0.0) -> list[tuple[int, int]]:
    """(place in predicted, place in truth) of boxes that belong together, one to one.

    Greedy: the two that overlap most come together first (of equals the first in order), and none without overlap.
    """
    scores = iou(predicted, truth, extra_px=extra_px)
    pairs: list[tuple[int, int]] = []
    for flat in np.argsort(-scores, axis=None, kind="stable"):
        i, j = np.unravel_index(flat, scores.shape)
        if scores[i, j] <= 0:
            break
        if all(i != k and j != m for k, m in pairs):
            pairs.append((int(i), int(j)))
    return pairs


def summary(found: Sequence[Located], *, extra_px: float = 0.0) -> dict[str, float | int | None]:
    """Scores over all boxes that are there; one that was not found, or not answered readably, counts as IoU 0.

    Keys:
      questions, n: questions, and boxes in their truth. predicted: boxes in the answers.
      correct, accuracy: of the n, those matched with IoU above 0.5. precision: of the predicted ones; None without any.
      mean_iou: mean over the n. cumulative_iou: sum of intersections over sum of unions; unmatched boxes of either side
        add their area to the unions.
      unparsed_rate: of the questions, those whose answer could not be read.
      accuracy_low, accuracy_high and so on: 95 % intervals. Wilson's for the accuracy where every question has one box,
        else by drawing questions anew.
    """
    boxes, predicted, hits, ious, both, union = _columns(found, extra_px)
    n, correct = int(boxes.sum()), int(hits.sum())
    scores = {
        "questions": len(found),
        "n": n,
        "predicted": int(predicted.sum()),
        "correct": correct,
        "accuracy": float(_ratio(hits, boxes)),
        "precision": float(_ratio(hits, predicted)) if predicted.sum() else None,
        "mean_iou": float(_ratio(ious, boxes)),
        "cumulative_iou": float(_ratio(both, union)),
        "unparsed_rate": sum(one.predicted is None for one in found) / len(found) if found else 0.0,
    }
    intervals = {
        "accuracy": wilson(correct, n) if (boxes == 1).all() else ratio_interval(hits, boxes),
        "mean_iou": ratio_interval(ious, boxes),
        "cumulative_iou": ratio_interval(both, union),
    }
    for name, (low, high) in intervals.items():
        scores |= {f"{name}_low": low, f"{name}_high": high}
    return scores


def accuracy(found: Sequence[Located], *, extra_px: float = 0.0) -> float:
    """`summary`'s accuracy alone; 0 without boxes."""
    boxes, _, hits, *_ = _columns(found, extra_px)
    return float(_ratio(hits, boxes))


def ratio_interval(top: np.ndarray, bottom: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """A percentile interval of sum(top) / sum(bottom), both float[N], over questions drawn anew.

    (0, 1) for fewer than two questions. The boxes of one question stay together: they are of one image.
    """
    if len(top) < 2 or not np.sum(bottom):
        return 0.0, 1.0
    drawn = bootstrap(
        (top, bottom), _ratio, paired=True, vectorized=True, method="percentile", confidence_level=level,
        n_resamples=BOOTSTRAP_DRAWS, batch=1000, rng=np.random.default_rng(0),
    )  # fmt: skip
    return float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """Twice the common pixels over all pixels of two masks bool[h, w], in [0, 1]; 1 where both are empty.

    Raises:
      ValueError: the masks differ in shape.
    """
    a, b = np.asarray(a, bool), np.asarray(b, bool)
    if a.shape != b.shape:
        raise ValueError(f"masks of {a.shape} and {b.shape}; two of one shape are accepted")
    total = int(a.sum()) + int(b.sum())
    return 2 * int((a & b).sum()) / total if total else 1.0


def _columns(found: Sequence[Located], extra_px: float) -> np.ndarray:
    """float64[6, N]: `_row` of every question."""
    return np.array([_row(one, extra_px) for one in found], np.float64).reshape(-1, 6).T


def _row(one: Located, extra_px: float) -> tuple[float, ...]:
    """Boxes, predicted boxes, boxes found, sum of IoU, of intersections and of unions of one question."""
    truth = _boxes(one.truth)
    predicted = _boxes([] if one.predicted is None else one.predicted)
    both, union = overlap(predicted, truth, extra_px=extra_px)
    pairs = match(predicted, truth, extra_px=extra_px)
    matched = sum(both[i, j] for i, j in pairs)
    areas = [overlap(boxes, boxes, extra_px=extra_px)[1].diagonal().sum() for boxes in (predicted, truth)]
    ious = [both[i, j] / union[i, j] for i, j in pairs]
    return len(truth), len(predicted), sum(v > THRESHOLD for v in ious), sum(ious), matched, sum(areas) - matched


def _boxes(boxes) -> np.ndarray:
    return np.asarray(boxes, np.float64).reshape(-1, 4)


def _grown(boxes: np.ndarray, extra_px: float) -> np.ndarray:
    """float64[N, 4] with `extra_px` on the right and below; zeros for what is no box."""
    boxes = _boxes(boxes)
    real = np.isfinite(boxes).all(-1) & (boxes[:, :2] <= boxes[:, 2:]).all(-1)
    # Farther than any image reaches, and near enough for an area that is a number.
    boxes = np.clip(np.where(real[:, None], boxes, 0), -1e9, 1e9)
    boxes[real, 2:] += extra_px
    return boxes


def _ratio(top: np.ndarray, bottom: np.ndarray, axis: int = -1) -> np.ndarray:
    total = np.sum(bottom, axis=axis)
    return np.sum(top, axis=axis) / np.where(total > 0, total, 1)
