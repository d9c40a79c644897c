"""Power against a published example and against draws."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medcg_jax.study.design import mat
from medcg_jax.study.stats.paired import detectable, mcnemar, paper_power


def test_connors_example():
    """powerandsamplesize.com, "McNemar's Z-test, 2-Sided Equality", after Connor (1987): p01 .45, p10 .05, power .8."""
    assert records_for(0.40, 0.50) == 23
    assert records_for(-0.40, 0.50) == 23
    assert records_for(0.40, 0.50, level=0.1) == 18 < 23


@settings(deadline=None)
@given(st.integers(30, 5000), st.floats(0.05, 1.0))
def test_detectable_is_the_inverse_of_records_for(n, discordant):
    least = detectable(n, discordant)
    if least is not None and least < discordant:
        assert records_for(least, discordant) in (n, n + 1)
        assert records_for(0.9 * least, discordant) > n
        assert detectable(4 * n, discordant) < least


def test_what_cannot_be_shown():
    assert detectable(300, 0.0) is None and detectable(0, 0.3) is None
    assert detectable(10, 0.1) is None  # one discordant record shows nothing
    for difference, discordant in ((0.0, 0.3), (0.4, 0.3), (0.1, 1.2)):
        with pytest.raises(ValueError, match="0 < |difference| <= discordant <= 1"):
            records_for(difference, discordant)


def test_the_power_is_that_of_mcnemar():
    n, discordant = 300, 0.3
    least = detectable(n, discordant)
    rng = np.random.default_rng(0)

    def shown(difference):
        shares = [(discordant + difference) / 2, (discordant - difference) / 2, 1 - discordant]
        return np.mean([mcnemar(*rng.multinomial(n, shares)[:2]) < 0.05 for _ in range(1000)])

    # The exact test is somewhat less sharp than its approximation.
    assert 0.74 < shown(least) < 0.83
    assert shown(least / 2) < 0.4


def test_the_papers_wins():
    rows = mat.paper_csv("table3_classification_pairs")
    found = paper_power(sizes=(1, 100, 300, 1000, 10**7))
    assert found["rows"] == len(rows) == 42
    assert found["wins"] == sum(int(row["trained"]) > int(row["baseline_plus"]) for row in rows)
    below = list(found["below"].values())
    assert below[0] == found["wins"] and below[-1] == 0
    assert below == sorted(below, reverse=True) and below[1] > below[3] > 0
    # By hand: 57 against 46 differ on .57 * .54 + .46 * .43 of the records if they err independently.
    least = detectable(300, 0.57 * 0.54 + 0.46 * 0.43)
    assert 0.10 < least < 0.12
