"""Tests and intervals of paired answers, and power: published examples, brute force, statsmodels' REML, coverage."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t as student
from scipy.stats import ttest_1samp
from statsmodels.stats.multitest import multipletests

from medcg_jax.eval.predictions import wilson
from medcg_jax.study.design import mat
from medcg_jax.study.stats.paired import (
    SIGN_FLIPS,
    Unit,
    by_patient,
    compare,
    detectable,
    estimate,
    flipped,
    holm,
    mcnemar,
    mean_difference,
    mixed_interval,
    overall_test,
    paper_power,
    patient_sums,
    unit_of,
)


def test_wilson():
    """Newcombe, Statistics in Medicine 17 (1998), table I, method 3."""
    printed = [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718)]
    for correct, n, *interval in printed:
        assert wilson(correct, n) == pytest.approx(tuple(interval), abs=5e-5)
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(50, 100, level=0.8)[0] > wilson(50, 100)[0]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3000), st.data())
def test_wilson_is_the_formula(n, data):
    p, z2 = data.draw(st.integers(0, n)) / n, 1.959963984540054**2
    middle, half = p + z2 / (2 * n), (z2 * (p * (1 - p) + z2 / (4 * n)) / n) ** 0.5
    wanted = (max(0.0, (middle - half) / (1 + z2 / n)), min(1.0, (middle + half) / (1 + z2 / n)))
    assert wilson(round(p * n), n) == pytest.approx(wanted, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 12), st.integers(0, 12))
def test_mcnemar_is_the_exact_sign_test(b, c):
    n = b + c
    tail = sum(math.comb(n, k) for k in range(n + 1) if math.comb(n, k) <= math.comb(n, b)) / 2**n
    assert mcnemar(b, c) == pytest.approx(tail)


def test_mcnemar_is_the_published_one():
    """9 and 2: Fay, help of `mcnemar.exact` in R's exact2x2. 150 and 86: Agresti, Categorical Data Analysis (2nd ed.,
    2002), table 10.1, with the exact p as that documentation prints it."""
    assert mcnemar(9, 2) == mcnemar(2, 9) == pytest.approx(0.06543, abs=5e-6)
    assert mcnemar(150, 86) == mcnemar(86, 150) == pytest.approx(3.716e-05, rel=1e-3)
    assert mcnemar(0, 0) == 1.0


def test_holm():
    """The example of the article "Holm-Bonferroni method" in Wikipedia, where .01 and .005 are rejected at .05."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    values = np.random.default_rng(0).uniform(size=30) ** 4
    assert holm(list(values)) == pytest.approx(multipletests(values, method="holm")[1])
    bonferroni = [4 * p for p in (0.01, 0.04, 0.03, 0.005)]
    assert holm([0.01, 0.04, 0.03, 0.005]) != pytest.approx(bonferroni)


def test_overall_test():
    """Darwin's 15 pairs of maize in eighths of an inch: Fisher, The Design of Experiments, section 21: 1,726 of 32,768
    patterns of signs lie as far out."""
    differences = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
    found = overall_test(differences)
    assert found.p == 1726 / 2**15
    assert found.p_smallest == 2 / 2**15 and found.test == "exact sign flips of 15 targets"
    # Fisher's t test of the same gives .0497: the control that this is another test.
    assert ttest_1samp(differences, 0).pvalue == pytest.approx(0.0497, abs=5e-5)


def test_overall_is_uniform_where_nothing_is_to_be_found():
    rng = np.random.default_rng(1)
    below = [overall_test(rng.standard_normal(8)).p < 0.05 for _ in range(100)]
    assert 0 <= np.mean(below) < 0.12


@pytest.mark.parametrize("targets", [1, 2, 5, 8])
def test_the_smallest_p_is_reached_and_only_by_one_sign(targets):
    means = np.linspace(0.2, 0.4, targets)
    found = overall_test(means)
    assert found.p == found.p_smallest == min(1, 2 / 2**targets)
    if targets > 1:
        assert overall_test(means * [-1, *[1] * (targets - 1)]).p > found.p


def test_many_targets_are_drawn():
    found = overall_test(np.linspace(0.2, 0.4, 25))
    assert found.p == found.p_smallest == 2 / (SIGN_FLIPS + 1)
    assert found.test == "65536 drawn sign flips of 25 targets"
    alike = np.random.default_rng(0).standard_normal(25)
    assert overall_test(alike - alike.mean()).p > 0.95


def test_compare():
    a = dict(zip("abcdef", [True, True, True, True, False, False], strict=True))
    b = dict(zip("abcdef", [True, False, False, False, True, False], strict=True))
    c = compare(a, b)
    assert (c.n, c.only_a, c.only_b, c.difference) == (6, 3, 1, pytest.approx(1 / 3))
    assert c.p == pytest.approx(10 / 16)
    with pytest.raises(ValueError, match="not asked the same records"):
        compare(a, {"a": True})


def units(effect, targets=8, seeds=3, n=300, spread=0.0, rng=None):
    rng = rng or np.random.default_rng(1)
    made = []
    for t in range(targets):
        centre = effect + spread * rng.standard_normal()
        for s in range(seeds):
            up = int(np.clip(n * (0.3 + centre / 2), 0, n / 2))
            down = int(np.clip(n * (0.3 - centre / 2), 0, n / 2))
            made.append(unit(f"t{t}", s, n, rng.binomial(n, up / n), rng.binomial(n, down / n)))
    return made


def unit(target, seed, n, only_a, only_b):
    return Unit(target, seed, n, only_a - only_b, only_a + only_b)


def grid_units(values, n=10**6):
    """Units with these means ([targets, seeds], NaN: absent), with next to no variance of records."""
    return [Unit(f"t{t}", s, n, n * v, n * v**2) for (t, s), v in np.ndenumerate(values) if not np.isnan(v)]


def test_units():
    found = unit_of("t", 0, np.array([1, 0, -1, 1]))
    assert (found.n, found.total, found.squares, found.mean) == (4, 1.0, 3.0, 0.25)
    assert found.variance == pytest.approx(np.var([1, 0, -1, 1], ddof=1) / 4)


def test_estimate_of_one_seed_is_the_t_interval_of_the_targets():
    values = np.array([0.1, 0.25, -0.05, 0.3, 0.2])
    found = estimate(grid_units(values[:, None]))
    wanted = ttest_1samp(values, 0).confidence_interval()
    assert found.interval() == pytest.approx((wanted.low, wanted.high))
    assert (found.p, found.test) == (overall_test(values).p, "exact sign flips of 5 targets")
    assert not found.is_up  # 4 of 32 patterns


def test_estimate_of_one_target_is_the_t_interval_of_its_seeds_and_says_nothing_of_others():
    values = np.array([0.21, 0.25, 0.2])
    found = estimate(grid_units(values[None]))
    wanted = ttest_1samp(values, 0).confidence_interval()
    assert found.interval() == pytest.approx((wanted.low, wanted.high)) and wanted.low > 0
    assert found.p == 1.0 and not found.is_up


def test_two_way_interval_is_the_textbooks():
    """Penicillin of the section below: 24 plates by 6 samples, whose components lme4 prints: SD .847, 1.932, .550."""
    values = penicillin() / 100
    found = estimate(grid_units(values.T))
    plates, samples = values.shape[1], values.shape[0]
    se = (0.846704**2 / plates + 1.931555**2 / samples + 0.549923**2 / values.size) ** 0.5 / 100
    of_both = found.errors[2]
    assert of_both[0] == pytest.approx(se, rel=1e-4)
    assert samples - 1 <= of_both[1] < 6  # Satterthwaite: nearly all of it is between samples
    by_sample = values.mean(1)
    assert found.errors[1] == (pytest.approx(by_sample.std(ddof=1) / samples**0.5), samples - 1)
    # The widest of them is the interval.
    half = max(student.ppf(0.975, df) * error for error, df in found.errors)
    assert found.interval() == pytest.approx((found.mean - half, found.mean + half))
    low, high = found.interval(1 - found.p)
    assert found.mean < 1 and (low == pytest.approx(0, abs=1e-9) or high == 1.0)


def test_no_interval_is_narrower_than_that_of_targets_seeds_or_records():
    rng = np.random.default_rng(3)
    for _ in range(50):
        values = rng.normal(0.1, 0.1, (rng.integers(2, 7), rng.integers(2, 4)))
        found = estimate(grid_units(values))
        half = (found.interval()[1] - found.interval()[0]) / 2
        for means in (values.mean(0), values.mean(1)):
            wanted = ttest_1samp(means, 0).confidence_interval()
            assert half >= min((wanted.high - wanted.low) / 2, 0.7) - 1e-9
    alike = estimate([unit(f"t{t}", s, 100, 60, 20) for t in range(4) for s in range(3)])
    assert alike.interval()[1] - alike.mean == pytest.approx(1.96 * math.sqrt((80 - 16) / 99 / 100 / 12), rel=1e-3)
    none = estimate([unit(f"t{t}", s, 100, 0, 0) for t in range(4) for s in range(3)])
    assert none.interval() == pytest.approx((-wilson(0, 1200)[1], wilson(0, 1200)[1])) and none.p == 1.0


def test_missing_cells_are_fitted_and_cost_degrees_of_freedom():
    """Of an additive layout the fit is exact: a cell that is taken away changes the mean by nothing."""
    values = np.add.outer([0.0, 0.1, 0.3, 0.2], [0.0, 0.05, -0.02])
    gap = values.copy()
    gap[2, 1] = np.nan
    full, fitted = estimate(grid_units(values)), estimate(grid_units(gap))
    assert fitted.mean == pytest.approx(full.mean, abs=1e-9)
    assert mean_difference(grid_units(gap)) != pytest.approx(full.mean, abs=1e-3)
    apart = estimate(grid_units(np.array([[0.2, np.nan], [0.3, 0.3]])))
    assert apart.interval() == (-1.0, 1.0) and not apart.is_up


def test_p_is_where_the_interval_touches_zero():
    rng = np.random.default_rng(4)
    for _ in range(30):
        found = estimate(grid_units(rng.normal(0.15, 0.1, (5, 3))))
        low, high = found.interval(1 - found.p)
        assert min(abs(low), abs(high)) == pytest.approx(0, abs=1e-6) or -1 in (low, high) or 1 in (low, high)
        assert found.is_up == (found.interval()[0] > 0) == (found.p < 0.05 and found.mean > 0)


@pytest.mark.parametrize(("targets", "seeds"), [(3, 3), (8, 3), (8, 2)])
@pytest.mark.parametrize("common", [0.0, 0.06])
def test_two_way_interval_covers(targets, seeds, common):
    """By resampling targets with seeds nested in them, .72 to .92 were covered."""
    rng = np.random.default_rng([targets, seeds, int(100 * common)])
    inside = 0
    for _ in range(500):
        of_targets, of_seeds = rng.normal(0, 0.05, (targets, 1)), rng.normal(0, common, (1, seeds))
        values = 0.1 + of_targets + of_seeds + rng.normal(0, 0.04, (targets, seeds))
        low, high = estimate(grid_units(np.clip(values, -1, 1))).interval()
        inside += low <= 0.1 <= high
    assert inside >= 0.93 * 500


def test_one_target_and_seed_has_the_records_interval():
    low, high = estimate([unit("t", 0, 200, 60, 20)]).interval()
    assert low == pytest.approx(0.2 - 1.96 * math.sqrt((80 - 40**2 / 200) / 199 / 200), abs=1e-5)
    assert high < 0.32


# ------------------------------------------------------------------ patients


def test_sign_flips_of_patients():
    """By hand: patients' sums 3, 1, -1: of 8 patterns those that reach 3 or more, either way, are 2 of +-5, 2 x 2 of +-3."""
    assert flipped([3, 1, -1]) == pytest.approx(6 / 8)
    assert flipped([3, 1, 1]) == pytest.approx(2 / 8)
    assert flipped([]) == flipped([0, 0]) == 1.0


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-3, 3), max_size=9))
def test_sign_flips_are_brute_force(sums):
    signs = np.array(np.meshgrid(*[[-1, 1]] * len(sums))).reshape(len(sums), -1).T if sums else np.zeros((1, 0))
    wanted = np.mean(np.abs(signs @ np.array(sums, int)) >= abs(sum(sums)))
    assert flipped(sums) == pytest.approx(wanted)


def test_records_of_one_patient_are_one_draw():
    """Ten records each of six patients that go one way: McNemar's p by records is far too small."""
    a = {f"{p}/{i}": p < 5 for p in range(6) for i in range(10)}
    b = {key: not right for key, right in a.items()}
    patients = {key: key[0] for key in a}
    assert compare(a, b).p == pytest.approx(mcnemar(50, 10)) and mcnemar(50, 10) < 1e-6
    assert compare(a, b, patients).p == pytest.approx(14 / 64)
    assert compare(a, b, {}).p == compare(a, b).p
    values = {key: int(right) - int(b[key]) for key, right in a.items()}
    assert sorted(patient_sums(values, patients)) == [-10, 10, 10, 10, 10, 10]
    alone, clustered = mixed_interval([values]), mixed_interval([by_patient(values, patients)])
    assert clustered.mean == pytest.approx(alone.mean)
    assert (clustered.mean - clustered.low) > 2.5 * (alone.mean - alone.low)
    # One record a patient: the same interval.
    same = mixed_interval([by_patient(values, {key: key for key in a})])
    assert (same.low, same.high) == pytest.approx((alone.low, alone.high))


def test_patients_of_unequal_size_keep_the_mean():
    values = {f"r{i}": float(i % 3 == 0) for i in range(20)}
    patients = {f"r{i}": "big" if i < 12 else f"p{i // 2}" for i in range(18)}
    made = by_patient(values, patients)
    assert len(made) == 1 + 3 + 2
    assert np.mean(list(made.values())) == pytest.approx(np.mean(list(values.values())))


def test_mean_difference_weighs_targets_alike():
    rows = [("a", 0, 10, 5, 0), ("a", 0, 10, 5, 0), ("a", 1, 10, 1, 0), ("b", 0, 10, 0, 1)]
    made = [unit(*row) for row in rows]
    assert mean_difference(made) == pytest.approx(((0.5 + 0.1) / 2 - 0.1) / 2)


# ------------------------------------------------------------------ records and seeds of one row

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


@settings(max_examples=40, deadline=None)
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
    rng, times, n = np.random.default_rng(seeds), 200, 60
    inside = ignoring = 0
    for _ in range(times):
        own = 0.4 * rng.standard_normal((1 if shared else seeds, n))
        values = (0.1 * rng.standard_normal((seeds, 1)) + own + 0.3 * rng.standard_normal((seeds, n))) / 10
        found = mixed_interval(make(values))
        inside += found.low <= 0 <= found.high
        ignoring += abs(values.mean()) <= student.ppf(0.975, values.size - 1) * values.std() / values.size**0.5
    # 200 draws of .95 lie within .91 and .99; few seeds are nearer to .93 where crossed and .98 where nested.
    assert inside / times >= 0.90
    assert ignoring / times < 0.85


# ------------------------------------------------------------------ power


def test_connors_example():
    """powerandsamplesize.com, "McNemar's Z-test, 2-Sided Equality", after Connor (1987): p01 .45, p10 .05, power .8 need
    23 records; 18 at a level of .1."""
    assert detectable(23, 0.5) <= 0.40 < detectable(22, 0.5)
    assert detectable(18, 0.5, level=0.1) <= 0.40 < detectable(17, 0.5, level=0.1)


def test_what_cannot_be_shown():
    assert detectable(300, 0.0) is None and detectable(0, 0.3) is None
    assert detectable(10, 0.1) is None  # one discordant record shows nothing


def test_the_power_is_that_of_mcnemar():
    n, discordant = 300, 0.3
    least = detectable(n, discordant)
    rng = np.random.default_rng(0)

    def shown(difference):
        shares = [(discordant + difference) / 2, (discordant - difference) / 2, 1 - discordant]
        return np.mean([mcnemar(*rng.multinomial(n, shares)[:2]) < 0.05 for _ in range(400)])

    # The exact test is somewhat less sharp than its approximation.
    assert 0.72 < shown(least) < 0.85
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
