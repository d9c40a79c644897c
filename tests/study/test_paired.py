"""Published examples of the tests on paired answers."""

import numpy as np
import pytest

from medcg_jax.eval.predictions import wilson
from medcg_jax.study.stats.paired import holm, mcnemar, overall_test

# Differences in height of 15 pairs of maize plants, crossed less self-fertilised, in eighths of an inch: Darwin's, in
# Fisher, The Design of Experiments (1935), section 17; his section 21 counts 863 of 32,768 patterns on one side.
DARWIN = (49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48)


def test_overall_is_fishers_own_example():
    found = overall_test(DARWIN)
    assert found.p == pytest.approx(2 * 863 / 2**15, abs=1e-12)
    assert found.p_smallest == 2 / 2**15 and found.test == "exact sign flips of 15 targets"
    assert overall_test([abs(x) for x in DARWIN]).p == pytest.approx(found.p_smallest)
    assert overall_test(-np.array(DARWIN)).p == pytest.approx(found.p)


def test_overall_with_few_targets_can_show_little():
    assert overall_test([0.3, 0.2, 0.25, 0.4, 0.3]).p == pytest.approx(1 / 16) == overall_test([0.1] * 5).p_smallest
    assert overall_test([0.9]).p == 1.0
    assert overall_test(np.random.default_rng(0).normal(0.5, 1, 24)).p_smallest == pytest.approx(2 / (2**16 + 1))


def test_overall_is_uniform_where_nothing_is_to_be_found():
    rng = np.random.default_rng(1)
    below = [overall_test(rng.standard_normal(8)).p < 0.05 for _ in range(300)]
    assert 0.02 < np.mean(below) < 0.09


def test_mcnemar_is_the_published_one():
    # Approval ratings, Agresti, Categorical Data Analysis (2nd ed., 2002), table 10.1: 150 and 86 changed their minds;
    # the exact p as printed in the documentation of R's exact2x2.
    assert mcnemar(150, 86) == pytest.approx(3.716e-05, rel=1e-3)
    assert mcnemar(86, 150) == mcnemar(150, 86) and mcnemar(0, 0) == 1.0


def test_wilson_is_the_published_one():
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    for (correct, n), expected in {
        (81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0.0, 0.1611), (1, 29): (0.0061, 0.1718),
    }.items():  # fmt: skip
        assert wilson(correct, n) == pytest.approx(expected, abs=5e-5)


def test_holm_is_the_published_one():
    # Wright, Biometrics 48 (1992), on Holm's procedure; the example of four that encyclopedias print.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
