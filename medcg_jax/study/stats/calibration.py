"""How far a model's probabilities of the letters can be trusted: reliability, calibration error, Brier score, risk.

Computed from the log-probabilities in `predictions/`. An answer's probabilities are those of the offered letters, made
to sum to 1; its confidence is the largest of them, from 1 / options to 1.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from medcg_jax.data.records import LETTERS
from medcg_jax.study.stats.answers import Answers

# Bins of equal width over confidences of 0 to 1, each without its lower end.
NUM_BINS = 10
# Points of the curve of risk over coverage.
CURVE_POINTS = 50


def calibration_of_answers(answers: Answers, results: Sequence[Mapping], fresh: bool) -> list[dict]:
    """`calibration` of each table and arm, in the order of results.csv; the curves over records are left out.

    results: rows of results.csv (`grid_files.read_results`). fresh: each seed has other test records.

    [{"table": "pairs", "arm": "trained"} | `calibration`]; arms without recorded probabilities are left out.
    """
    cells: dict[tuple[str, str], dict[tuple[str, int], set[str]]] = defaultdict(lambda: defaultdict(set))
    for row in results:
        if row["table"] not in ("efficiency", "dose"):
            cells[row["table"], row["arm"]][row["cell"], row["seed"]].add(row["target"])
    entries = []
    for (table, arm), arm_cells in cells.items():
        frames = []
        for (cell, seed), targets in arm_cells.items():
            frame = answers.frame(cell)
            frames.append(frame[frame["subset"].isin(targets)].assign(seed=seed if fresh else 0))
        if figures := calibration(pd.concat(frames, ignore_index=True)):
            entries.append({"table": table, "arm": arm} | figures)
    return entries


def calibration(answers: pd.DataFrame) -> dict | None:
    """The calibration of answers to unchanged questions; None where no probabilities are recorded.

    answers: the columns of `Answers`, and "seed".

    {"n": 7200, "records": 2400,            # answers, and test records behind them
     "accuracy": .77, "confidence": .83,    # means
     "ece": .06, "ece_of_calibrated": .01,  # `expected_calibration_error`; what perfect calibration would give
     "brier": .31,                          # `brier_score`
     "aurc": .1, "aurc_least": .03,         # `area_under_risk_coverage`; the least for this accuracy
     "bins": [{"n": 900, "confidence": .85, "accuracy": .8}],    # of `NUM_BINS`, without empty ones
     "curve": [{"coverage": .5, "risk": .1}]}                    # risk among the most confident, `CURVE_POINTS`
    """
    answers = answers[answers["A"].notna()] if "A" in answers else answers[:0]
    if answers.empty:
        return None
    shares, right = letter_shares(answers), answers["right"].to_numpy(bool)
    confidence = shares.max(1)
    records = len(answers[["seed", "subset", "id"]].drop_duplicates())
    coverage, risk = risk_coverage(confidence, right)
    at = np.unique(np.linspace(0, len(risk) - 1, min(CURVE_POINTS, len(risk))).round().astype(int))
    return {
        "n": len(answers),
        "records": records,
        "accuracy": float(right.mean()),
        "confidence": float(confidence.mean()),
        "ece": expected_calibration_error(confidence, right),
        "ece_of_calibrated": error_of_calibrated(confidence, len(answers) / records),
        "brier": brier_score(shares, answers["answer"].map(LETTERS.index).to_numpy(int)),
        "aurc": float(risk.mean()),
        "aurc_least": float(risk_coverage(right.astype(float), right)[1].mean()),
        "bins": reliability(confidence, right),
        "curve": [{"coverage": float(coverage[i]), "risk": float(risk[i])} for i in at],
    }


def letter_shares(answers: pd.DataFrame) -> np.ndarray:
    """float64[N, K]: the probability of each letter among the offered ones; 0 for letters that were not offered.

    answers: with a column of log-probabilities in nats for each letter, NaN where it was not offered.
    """
    logprobs = answers[[letter for letter in LETTERS if letter in answers]].to_numpy(float)
    logprobs = np.where(np.isnan(logprobs), -np.inf, logprobs)
    weights = np.exp(logprobs - logprobs.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def reliability(confidence: np.ndarray, right: np.ndarray) -> list[dict]:
    """{"n", "confidence", "accuracy"} of the answers in each of `NUM_BINS` bins that has any, lowest first.

    confidence: float[N] in [0, 1]. right: bool[N].
    """
    places = _bins(confidence)
    return [
        {
            "n": int((places == place).sum()),
            "confidence": float(confidence[places == place].mean()),
            "accuracy": float(right[places == place].mean()),
        }
        for place in np.unique(places)
    ]


def expected_calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Mean over the answers of |accuracy - confidence| of their bin (`NUM_BINS` of equal width), in [0, 1].

    Source: Guo et al., On Calibration of Modern Neural Networks (arXiv 1706.04599), equation 3.
    """
    bins = reliability(confidence, right)
    return sum(b["n"] * abs(b["accuracy"] - b["confidence"]) for b in bins) / len(confidence)


def error_of_calibrated(confidence: np.ndarray, answers_per_record: float = 1.0) -> float:
    """About what the expected calibration error of a perfectly calibrated model is, which chance keeps above 0.

    The mean of |x| for a normal x, with the variance of each bin's accuracy. answers_per_record: answers to one record
    are taken to be right together, so that so many count as one.
    """
    places = _bins(confidence)
    spread = [np.sqrt((confidence[places == p] * (1 - confidence[places == p])).sum()) for p in np.unique(places)]
    return float(np.sqrt(2 / np.pi * answers_per_record) * np.sum(spread) / len(confidence))


def _bins(confidence: np.ndarray) -> np.ndarray:
    """int[N]: the bin of each confidence, from 0."""
    return np.clip(np.ceil(confidence * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)


def brier_score(shares: np.ndarray, answer: np.ndarray) -> float:
    """Mean over the answers of the sum of squared differences to the right letter's 1 and the others' 0, in [0, 2].

    shares: float[N, K], summing to 1 over K. answer: int[N]. Source: Brier, Verification of Forecasts Expressed in Terms
    of Probability (1950).
    """
    return float(((shares - np.eye(shares.shape[1])[answer]) ** 2).sum(1).mean())


def risk_coverage(confidence: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(float64[N] coverage, float64[N] risk): the share of wrong answers among the 1, 2, ..., N most confident ones.

    Equally confident answers are wrong at their mean rate, whatever their order. The mean of the risks is the area
    under the curve. Source: Geifman et al., Bias-Reduced Uncertainty Estimation (arXiv 1805.08206), section 3.
    """
    _, group = np.unique(-confidence, return_inverse=True)
    size, wrong = np.bincount(group), np.bincount(group, weights=~right)
    taken = np.arange(1, len(right) + 1)
    ends = np.concatenate([[0], np.cumsum(size)])
    errors = np.interp(taken, ends, np.concatenate([[0.0], np.cumsum(wrong)]))
    return taken / len(right), errors / taken
