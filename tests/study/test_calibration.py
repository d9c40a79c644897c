"""Calibration, Brier score and risk-coverage against values worked out by hand, and what they must tell apart."""

import numpy as np
import pandas as pd
import pytest

from medcg_jax.study.stats.calibration import (
    brier_score,
    calibration,
    calibration_of_answers,
    error_of_calibrated,
    expected_calibration_error,
    letter_shares,
    reliability,
    risk_coverage,
)


def answers(*rows) -> pd.DataFrame:
    """rows: (record, right letter, probabilities of the letters)."""
    lines = []
    for name, answer, shares in rows:
        letters = dict(zip("ABCD", np.log(shares), strict=False))
        predicted = "ABCD"[int(np.argmax(shares))]
        lines.append(
            {"seed": 0, "subset": "s", "id": name, "options": len(shares), "answer": answer, "predicted": predicted,
             "right": predicted == answer} | letters
        )  # fmt: skip
    return pd.DataFrame(lines)


def test_probabilities_are_of_the_offered_letters():
    made = answers(("a", "A", (0.3, 0.1)), ("b", "D", (0.1, 0.1, 0.1, 0.2)))
    np.testing.assert_allclose(letter_shares(made), [[0.75, 0.25, 0, 0], [0.2, 0.2, 0.2, 0.4]])


def test_reliability_and_calibration_error_by_hand():
    # Bins (.5, .6], (.6, .7] and (.9, 1]; .6 belongs to the first, 1 to the last.
    confidence = np.array([0.55, 0.6, 0.61, 0.95, 1.0, 1.0])
    right = np.array([True, False, True, True, True, False])
    bins = reliability(confidence, right)
    assert [b["n"] for b in bins] == [2, 1, 3]
    assert [b["accuracy"] for b in bins] == pytest.approx([0.5, 1.0, 2 / 3])
    assert [b["confidence"] for b in bins] == pytest.approx([0.575, 0.61, 2.95 / 3])
    expected = (2 * 0.075 + 1 * 0.39 + 3 * (2.95 / 3 - 2 / 3)) / 6
    assert expected_calibration_error(confidence, right) == pytest.approx(expected)


def test_a_calibrated_model_has_the_error_that_chance_leaves():
    random = np.random.default_rng(0)
    confidence = random.uniform(0.5, 1.0, 400)
    errors = [expected_calibration_error(confidence, random.random(400) < confidence) for _ in range(400)]
    assert np.mean(errors) == pytest.approx(error_of_calibrated(confidence), rel=0.05)
    # Four answers to each record that rise and fall together.
    alike = [
        expected_calibration_error(np.repeat(confidence, 4), np.repeat(random.random(400) < confidence, 4))
        for _ in range(200)
    ]
    assert np.mean(alike) == pytest.approx(error_of_calibrated(np.repeat(confidence, 4), 4.0), rel=0.08)
    # Planted: one that is too sure of itself.
    assert expected_calibration_error(confidence, random.random(400) < confidence - 0.3) > 0.2


def test_brier_score_by_hand():
    shares = np.array([[0.75, 0.25, 0.0], [0.2, 0.3, 0.5], [1.0, 0.0, 0.0]])
    first, second, third = 0.25**2 + 0.25**2, 0.8**2 + 0.3**2 + 0.5**2, 1.0 + 1.0
    assert brier_score(shares, np.array([0, 0, 1])) == pytest.approx((first + second + third) / 3)
    # Two options at random: 1/2; four: 3/4.
    assert brier_score(np.full((5, 2), 0.5), np.zeros(5, int)) == 0.5
    assert brier_score(np.full((5, 4), 0.25), np.zeros(5, int)) == 0.75


def test_risk_and_coverage_by_hand():
    coverage, risk = risk_coverage(np.array([0.7, 0.9, 0.8, 0.6]), np.array([True, True, False, False]))
    np.testing.assert_allclose(coverage, [0.25, 0.5, 0.75, 1.0])
    np.testing.assert_allclose(risk, [0, 1 / 2, 1 / 3, 2 / 4])
    # Equal confidences: no order of the rows may decide.
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]):
        right = np.array([True, True, False, False])[order]
        _, risk = risk_coverage(np.full(4, 0.8), right)
        np.testing.assert_allclose(risk, [0.5] * 4)
    # Those that are sure are right, and the reverse.
    sure, right = np.linspace(0, 1, 100), np.arange(100) >= 50
    assert risk_coverage(sure, right)[1].mean() < 0.17 < 0.8 < risk_coverage(-sure, right)[1].mean()


def test_an_arm_s_entry():
    made = answers(
        ("a", "A", (0.9, 0.1)), ("b", "A", (0.9, 0.1)), ("c", "B", (0.8, 0.2)), ("c", "B", (0.3, 0.7)),
    )  # fmt: skip
    found = calibration(made)
    assert (found["n"], found["records"], found["accuracy"]) == (4, 3, 0.75)
    assert found["confidence"] == pytest.approx((0.9 + 0.9 + 0.8 + 0.7) / 4)
    assert found["aurc"] == pytest.approx((0 + 0 + 1 / 3 + 1 / 4) / 4)
    assert found["aurc_least"] == pytest.approx((1 / 4) / 4)
    assert found["curve"][0] == {"coverage": 0.25, "risk": 0.0} and found["curve"][-1]["risk"] == 0.25
    assert sum(b["n"] for b in found["bins"]) == 4
    # Answers without recorded probabilities are not counted.
    made.loc[3, ["A", "B"]] = np.nan
    assert calibration(made)["n"] == 3
    assert calibration(made[3:]) is None and calibration(made.drop(columns=["A", "B"])) is None


class Files:
    def __init__(self, frames):
        self.frame = frames.__getitem__


def test_arms_have_the_answers_to_their_targets():
    frame = answers(("a", "A", (0.9, 0.1)), ("b", "A", (0.2, 0.8)))
    frames = {"c": frame, "d": frame.assign(subset=["s", "other"]), "e": frame}
    results = [
        {"table": "pairs", "arm": "trained", "cell": "c", "seed": 0, "target": "s"},
        {"table": "pairs", "arm": "trained", "cell": "d", "seed": 1, "target": "s"},
        {"table": "pairs", "arm": "baseline", "cell": "c", "seed": 0, "target": "s"},
        {"table": "efficiency", "arm": "efficiency_3", "cell": "e", "seed": 0, "target": "s"},
        {"table": "dose", "arm": "dose_3", "cell": "e", "seed": 0, "target": "s"},
    ]
    for fresh, records in ((True, 3), (False, 2)):
        trained, baseline = calibration_of_answers(Files(frames), results, fresh)
        assert (trained["table"], trained["arm"], trained["n"], trained["records"]) == ("pairs", "trained", 3, records)
        assert (baseline["arm"], baseline["n"]) == ("baseline", 2)
