"""Measures beside accuracy for tests whose labels are not balanced: most frequent label, balanced accuracy, AUROC."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from medcg_jax.data.records import LETTERS

NO_SCORES = "no log-probabilities were kept"
ONE_LABEL = "no label is right in some records and wrong in others that offer it"


def metrics_of(answers: pd.DataFrame) -> dict:
    """The measures of one cell's answers to one subset; a record's label is the text of its right option.

    answers: a frame of `stats.answers.Answers`, of unchanged questions, at least one.

    {
      "labels": 4,             # different right labels in these tests
      "majority": .4,          # share of the most frequent one: what always answering it would give at most
      "balanced": .55,         # mean over labels of the share of their records that were answered rightly
      "auroc": .81,            # mean over labels, `macro_auroc`; None where it is not defined
      "auroc_labels": 4,       # labels in that mean
      "why": "",               # why "auroc" is None, or not of all labels
    }
    """
    labels = [texts[LETTERS.index(letter)] for texts, letter in zip(answers["texts"], answers["answer"], strict=True)]
    recalls = answers["right"].groupby(labels).mean()
    auroc, count, why = None, 0, NO_SCORES
    if "A" in answers and answers["A"].notna().all():
        auroc, count = macro_auroc(labels, option_probabilities(answers))
        why = (
            ONE_LABEL
            if auroc is None
            else ""
            if count == len(recalls)
            else f"{len(recalls) - count} of {len(recalls)} labels left out: {ONE_LABEL}"
        )
    return {
        "labels": len(recalls),
        "majority": majority_share(labels),
        "balanced": float(recalls.mean()),
        "auroc": auroc,
        "auroc_labels": count,
        "why": why,
    }


def majority_share(labels: Sequence[str]) -> float:
    """The share of the most frequent label among the right ones of a test set."""
    return pd.Series(labels).value_counts(normalize=True).iloc[0].item()


def option_probabilities(answers: pd.DataFrame) -> list[dict[str, float]]:
    """For each answer: text of an offered option -> its probability among the offered ones."""
    letters = [letter for letter in LETTERS if letter in answers]
    logprobs = answers[letters].to_numpy(float)
    weights = np.exp(logprobs - np.nanmax(logprobs, axis=1, keepdims=True))
    shares = weights / np.nansum(weights, axis=1, keepdims=True)
    return [dict(zip(texts, row.tolist(), strict=False)) for texts, row in zip(answers["texts"], shares, strict=True)]


def macro_auroc(labels: Sequence[str], scores: Sequence[Mapping[str, float]]) -> tuple[float | None, int]:
    """(mean over labels of the area under the ROC curve of one label against the rest, number of labels in it).

    labels: of each record, the right one. scores: of each record, offered label -> score. A label is ranked among the
    records that offer it; it is left out where it is right in all of them. (None, 0) where that leaves none.

    Source: Hanley and McNeil, The meaning and use of the area under a receiver operating characteristic (ROC) curve,
    Radiology 143 (1982): the area is the share of pairs of a positive and a negative record in the right order, a tie
    counting half, by the sum of ranks.
    """
    areas = []
    for label in dict.fromkeys(labels):
        asked = [
            (offered[label], right == label) for offered, right in zip(scores, labels, strict=True) if label in offered
        ]
        positive = np.array([is_right for _, is_right in asked])
        num_positive, num_negative = int(positive.sum()), int((~positive).sum())
        if num_positive and num_negative:
            ranks = rankdata([score for score, _ in asked])
            above = ranks[positive].sum() - num_positive * (num_positive + 1) / 2
            areas.append(above / (num_positive * num_negative))
    return (float(np.mean(areas)), len(areas)) if areas else (None, 0)


def mean_over_seeds(by_seed: Iterable[Mapping]) -> dict:
    """The measures of one row's arm over its seeds (`metrics_of` of each): means; AUROC only where every seed has it."""
    rows = list(by_seed)
    areas = [row["auroc"] for row in rows]
    return {
        "labels": max(row["labels"] for row in rows),
        **{key: float(np.mean([row[key] for row in rows])) for key in ("majority", "balanced")},
        "auroc": None if None in areas else float(np.mean(areas)),
        "auroc_labels": min(row["auroc_labels"] for row in rows),
        "why": next((row["why"] for row in rows if row["why"]), ""),
    }
