"""Intervals over records and seeds: published examples, statsmodels' REML, and coverage by simulation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t as student

from medcg_jax.eval.predictions import wilson
from medcg_jax.study.stats.mixed import mixed_interval

# Davies and Goldsmith, Statistical Methods in Research and Production (1972): yields of dyestuff, five of each of six
# batches; and diameters of six samples of penicillin on each of 24 plates, in mm. The estimates are those that lme4's
# documentation prints (Bates, lme4: Mixed-effects modeling with R, chapters 1 and 2).
DYESTUFF = """1545 1440 1440 1520 1580  1540 1555 1490 1560 1495  1595 1550 1605 1510 1560
              1445 1440 1595 1465 1545  1595 1630 1515 1635 1625  1520 1455 1450 1480 1445"""
PENICILLIN = """27 23 26 23 23 21  27 23 26 23 23 21  25 21 25 24 24 20  26 23 25 23 23 20  25 22 26 22 23 20
                24 22 25 23 22 19  24 20 23 21 22 19  26 22 26 24 24 21  24 21 24 22 22 20  24 21 24 23 22 19
                26 23 26 24 24 21  25 22 26 24 24 20  26 24 26 24 25 22  26 23 26 23 23 20  26 23 25 24 24 22
                25 22 25 23 23 20  25 21 24 23 23 20  25 22 24 23 23 19  24 21 23 21 21 19  26 23 26 24 24 21
                25 21 24 22 22 18  25 22 25 22 22 20  24 21 24 22 24 19  24 21 24 22 21 18"""


def nested(values):
    """Of float[seeds, records]: seeds with records of their own."""
    return [{(seed, i): value for i, value in enumerate(own)} for seed, own in enumerate(np.asarray(values).tolist())]


def crossed(values):
    """Of float[seeds, records]: the same records with every seed."""
    return [dict(enumerate(own)) for own in np.asarray(values).tolist()]


def dyestuff():
    return np.array(DYESTUFF.split(), float).reshape(6, 5)


def penicillin():
    """float[6, 24]: samples, plates."""
    return np.array(PENICILLIN.split(), float).reshape(24, 6).T


def test_nested_is_the_dyestuff_example():
    found = mixed_interval(nested(dyestuff() / 1e4))
    assert 1e4 * found.mean == pytest.approx(1527.5)
    assert 1e4 * found.se == pytest.approx(19.38, abs=0.005)
    assert 1e4 * found.sd_seeds == pytest.approx(42.00, abs=0.005)
    assert 1e4 * found.sd_records == pytest.approx(49.51, abs=0.005)
    assert 1e4 * (found.high - found.mean) == pytest.approx(19.383 * student.ppf(0.975, 5), abs=0.05)
    assert found.sd_rest is None


def test_crossed_is_the_penicillin_example():
    found = mixed_interval(crossed(penicillin() / 100))
    assert 100 * found.mean == pytest.approx(22.972, abs=0.0005)
    assert 100 * found.se == pytest.approx(0.8086, abs=5e-5)
    assert 100 * found.sd_seeds == pytest.approx(1.9316, abs=5e-5)
    assert 100 * found.sd_records == pytest.approx(0.8467, abs=5e-5)
    assert 100 * found.sd_rest == pytest.approx(0.5499, abs=5e-5)
    # Taken for nested, the same numbers give other estimates: the control.
    assert 100 * mixed_interval(nested(penicillin() / 100)).sd_records == pytest.approx(1.0, abs=0.03)


def mixed_lm(values, is_crossed):
    """(sd of seeds, of records or None, of the rest) by statsmodels' REML."""
    import pandas
    from statsmodels.regression.mixed_linear_model import MixedLM

    seeds, records = np.indices(values.shape)
    frame = pandas.DataFrame({"y": values.ravel(), "seed": seeds.ravel(), "record": records.ravel(), "all": 1})
    if not is_crossed:
        fitted = MixedLM.from_formula("y ~ 1", frame, groups="seed").fit(reml=True)
        return fitted.cov_re.iloc[0, 0] ** 0.5, fitted.scale**0.5, None
    parts = {"a_seed": "0 + C(seed)", "b_record": "0 + C(record)"}
    model = MixedLM.from_formula("y ~ 1", frame, groups="all", re_formula="0", vc_formula=parts)
    fitted = model.fit(reml=True)
    return fitted.vcomp[0] ** 0.5, fitted.vcomp[1] ** 0.5, fitted.scale**0.5


@pytest.mark.parametrize("is_crossed", [False, True])
def test_mean_squares_are_reml(is_crossed):
    rng = np.random.default_rng(3)
    values = rng.standard_normal((4, 1)) + rng.standard_normal((1, 25)) + rng.standard_normal((4, 25))
    found = mixed_interval((crossed if is_crossed else nested)(values / 100))
    wanted = mixed_lm(values, is_crossed)
    sds = [sd and 100 * sd for sd in (found.sd_seeds, found.sd_records, found.sd_rest)]
    assert [sd for sd in sds if sd] == pytest.approx([sd for sd in wanted if sd], rel=2e-3)
    assert (sds[2] is None) == (not is_crossed)


def test_one_seed_is_the_t_interval_of_its_records():
    values = np.random.default_rng(0).choice([-1, 0, 1], 200, p=[0.1, 0.5, 0.4])
    found = mixed_interval(nested([values]))
    half = student.ppf(0.975, 199) * values.std(ddof=1) / 200**0.5
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half))
    assert found.sd_seeds is None and found.sd_records == pytest.approx(values.std(ddof=1))


def test_records_that_partly_return_are_not_counted_twice():
    rng = np.random.default_rng(0)
    values = rng.choice([-1.0, 1.0], 40)
    same = [dict(enumerate(values)), dict(enumerate(values))]
    partly = [dict(enumerate(values)), dict(enumerate(values)) | {99: 1.0}]
    alone = mixed_interval(same[:1])
    for found in (mixed_interval(same), mixed_interval(partly)):
        assert found.high - found.low > 0.95 * (alone.high - alone.low)
    apart = mixed_interval(nested(np.tile(values, (2, 1))))
    assert apart.high - apart.low < 0.8 * (alone.high - alone.low)


def test_where_nothing_varies_the_interval_is_not_a_point():
    found = mixed_interval(crossed(np.zeros((3, 20))))
    assert (found.low, found.high) == (-wilson(0, 20)[1], wilson(0, 20)[1])
    assert mixed_interval(nested(np.ones((2, 20)))).high == 1.0
    assert mixed_interval([{"a": 1.0}]).low == 1.0 - wilson(0, 1)[1]


@pytest.mark.parametrize("bad", [[], [{}], [{"a": 1.0}, {}]])
def test_a_seed_without_records_is_refused(bad):
    with pytest.raises(ValueError, match="each with records"):
        mixed_interval(bad)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4), st.integers(2, 30), st.booleans(), st.integers(0, 2**31))
def test_seeds_never_make_an_interval_narrower(seeds, records, is_crossed, key):
    values = np.random.default_rng(key).choice([-1.0, 0.0, 1.0], (seeds, records))
    found = mixed_interval((crossed if is_crossed else nested)(values))
    assert -1 <= found.low <= found.mean <= found.high <= 1
    around = values.mean(0) if is_crossed else (values - values.mean(1, keepdims=True)).ravel()
    free = records - 1 if is_crossed else values.size - seeds
    alone = student.ppf(0.975, free) * (around.var() / free) ** 0.5
    assert found.mean - found.low >= min(alone, found.mean + 1) - 1e-12


@pytest.mark.parametrize(("make", "shared"), [(nested, False), (crossed, True)])
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_coverage(make, shared, seeds):
    """Records that move the mean by less than seeds do; an interval that takes all answers for independent is the
    control."""
    rng, times, n = np.random.default_rng(seeds), 400, 60
    inside = ignoring = 0
    for _ in range(times):
        own = 0.4 * rng.standard_normal((1 if shared else seeds, n))
        values = (0.1 * rng.standard_normal((seeds, 1)) + own + 0.3 * rng.standard_normal((seeds, n))) / 10
        found = mixed_interval(make(values))
        inside += found.low <= 0 <= found.high
        ignoring += abs(values.mean()) <= student.ppf(0.975, values.size - 1) * values.std() / values.size**0.5
    # 400 draws of .95 lie within .92 and .98; few seeds are nearer to .93 where crossed and .98 where nested.
    assert inside / times >= 0.91
    assert ignoring / times < 0.85
