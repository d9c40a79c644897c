"""What difference so many records can show: the published formula, exact power by enumeration, the paper's own wins."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest, norm

from medcg_jax.study import mat
from medcg_jax.study.power import detectable, paper_power, records_for


@pytest.mark.parametrize(("difference", "discordant"), [(0.1, 0.2), (0.05, 0.3), (-0.15, 0.5), (0.02, 0.05)])
def test_records_are_those_of_the_published_formula(difference, discordant):
    # Connor (Biometrics 43, 1987, page 209): (z_a sqrt(psi) + z_b sqrt(psi - d^2))^2 / d^2.
    z_a, z_b = norm.ppf(0.975), norm.ppf(0.8)
    n = (z_a * math.sqrt(discordant) + z_b * math.sqrt(discordant - difference**2)) ** 2 / difference**2
    assert records_for(difference, discordant) == math.ceil(n)


@given(st.integers(20, 3000), st.floats(0.02, 1.0))
def test_a_detectable_difference_needs_as_many_records(n, discordant):
    least = detectable(n, discordant)
    if least is None:
        assert records_for(discordant, discordant) > n
    else:
        assert 0 < least <= discordant
        assert n - 1 <= records_for(least, discordant) <= n + 1


def exact_power(n: int, difference: float, discordant: float) -> float:
    """Chance that the exact McNemar test is below .05, over every number of discordant records and their sides."""
    up = (discordant + difference) / 2 / discordant
    total = 0.0
    for m in range(n + 1):
        share = binom.pmf(m, n, discordant)
        if share > 1e-9:
            total += share * sum(
                binom.pmf(k, m, up) for k in range(m + 1) if m and binomtest(k, m, 0.5).pvalue < 0.05
            )
    return total


def test_power_is_about_what_is_said():
    least = detectable(150, 0.3)
    # The exact test is conservative by some points, and the normal approximation knows nothing of that.
    assert 0.70 < exact_power(150, least, 0.3) < 0.82
    assert exact_power(150, least / 2, 0.3) < 0.4


def test_nothing_discordant_shows_nothing():
    assert detectable(100, 0.0) is None and detectable(0, 0.3) is None and detectable(5, 0.1) is None
    with pytest.raises(ValueError, match=r"0 < \|difference\| <= discordant"):
        records_for(0.3, 0.2)


def test_the_papers_wins():
    found = paper_power()
    rows = mat.paper_csv("table3_classification_pairs")
    gains = [float(row["trained"]) - float(row["baseline_plus"]) for row in rows]
    assert (found["rows"], found["wins"]) == (len(gains), sum(gain > 0 for gain in gains)) == (42, 36)
    below = list(found["below"].values())
    assert below == sorted(below, reverse=True) and below[0] > below[-1] > 0
    # A win of three points is one that a hundred records cannot show; one of forty they can.
    assert sum(0 < gain <= 3 for gain in gains) <= below[-1] and sum(gain > 30 for gain in gains) <= 36 - below[0]
