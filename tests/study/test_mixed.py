"""Intervals over records and seeds: published examples, REML as an oracle, coverage with and without seeds."""

import numpy as np
import pytest
from scipy.stats import t as student

from medcg_jax.study.mixed import mixed_interval

# Yield of dyestuff in grams of standard colour, five preparations of each of six batches: Davies and Goldsmith,
# Statistical Methods in Research and Production (4th ed., 1972), table 6.3. Estimates by REML as printed in Bates,
# lme4: Mixed-effects modeling with R (2010), section 1.3: mean 1527.50, its standard error 19.38, standard deviation
# of batches 42.00, of preparations 49.51.
DYESTUFF = (
    (1545, 1440, 1440, 1520, 1580), (1540, 1555, 1490, 1560, 1495), (1595, 1550, 1605, 1510, 1560),
    (1445, 1440, 1595, 1465, 1545), (1595, 1630, 1515, 1635, 1625), (1520, 1455, 1450, 1480, 1445),
)  # fmt: skip
SHIFT, SCALE = 1500.0, 200.0


def scaled(batches):
    """As values in [-1, 1], each preparation a record of its own."""
    return [{(i, k): (x - SHIFT) / SCALE for k, x in enumerate(batch)} for i, batch in enumerate(batches)]


def test_nested_is_the_published_dyestuff():
    found = mixed_interval(scaled(DYESTUFF))
    assert SHIFT + SCALE * found.mean == pytest.approx(1527.5)
    assert [SCALE * x for x in (found.se, found.sd_seeds, found.sd_records)] == pytest.approx(
        [19.38, 42.00, 49.51], abs=0.005
    )
    assert found.df == 5 and found.sd_rest is None
    half = 19.38 * student.ppf(0.975, 5) / SCALE
    assert (found.low, found.high) == pytest.approx((found.mean - half, found.mean + half), abs=1e-4)
    # Batches mixed up are another layout.
    mixed = mixed_interval(scaled(np.array(DYESTUFF).T.reshape(6, 5)))
    assert SCALE * mixed.se != pytest.approx(19.38, abs=0.5)


def reml(values: np.ndarray) -> tuple[float, float, float, float]:
    """(standard error of the mean, sd of seeds, of records, of the rest) of float[seeds, records], by statsmodels."""
    import pandas
    from statsmodels.regression.mixed_linear_model import MixedLM

    seeds, records = np.indices(values.shape)
    frame = pandas.DataFrame({"y": values.ravel(), "seed": seeds.ravel(), "record": records.ravel(), "one": 1})
    model = MixedLM.from_formula(
        "y ~ 1", frame, groups="one", re_formula="0", vc_formula={"seed": "0 + C(seed)", "record": "0 + C(record)"}
    )
    fit = model.fit(reml=True)
    parts = dict(zip(model.exog_vc.names, fit.vcomp, strict=True))
    return float(fit.bse.iloc[0]), parts["seed"] ** 0.5, parts["record"] ** 0.5, fit.scale**0.5


def drawn(rng, seeds, records, sd_seeds, sd_records, sd_rest):
    noise = rng.standard_normal((seeds, records))
    effects = sd_seeds * rng.standard_normal((seeds, 1)) + sd_records * rng.standard_normal(records)
    return 0.1 + effects + sd_rest * noise


def by_seed(values):
    return [dict(enumerate(row)) for row in values]


@pytest.mark.filterwarnings("ignore")
def test_crossed_is_reml_where_no_variance_is_0():
    values = drawn(np.random.default_rng(3), 5, 24, 0.08, 0.1, 0.05)
    found = mixed_interval(by_seed(values))
    se, seeds, records, rest = reml(values)
    ours = (found.se, found.sd_seeds, found.sd_records, found.sd_rest)
    assert ours == pytest.approx((se, seeds, records, rest), rel=2e-3)
    assert found.mean == pytest.approx(values.mean())
    # The same numbers taken for records of their own at each seed give another error.
    nested = mixed_interval([{(i, k): x for k, x in one.items()} for i, one in enumerate(by_seed(values))])
    assert nested.sd_rest is None and nested.sd_records != pytest.approx(found.sd_records, rel=0.05)


@pytest.mark.parametrize("crossed", [True, False], ids=["crossed", "nested"])
def test_the_interval_covers_and_one_without_seeds_does_not(crossed):
    rng = np.random.default_rng(0)
    inside = without = 0
    for _ in range(400):
        values = drawn(rng, 4, 60, 0.06, 0.1, 0.1)
        if not crossed:
            values = values - values.mean(1, keepdims=True) + rng.normal(0, 0.15 / 60**0.5, (4, 1))
            values += 0.1 + 0.06 * rng.standard_normal((4, 1))
        rows = by_seed(values) if crossed else [{(i, k): x for k, x in enumerate(r)} for i, r in enumerate(values)]
        found = mixed_interval(rows)
        inside += found.low <= 0.1 <= found.high
        half = 1.96 * values.std(ddof=1) / values.size**0.5
        without += abs(values.mean() - 0.1) <= half
    assert 0.92 <= inside / 400 <= 0.99
    assert without / 400 < 0.75


def test_one_seed_is_an_interval_over_its_records():
    values = np.random.default_rng(1).choice([-1, 0, 1], 200)
    found = mixed_interval([dict(enumerate(values))])
    half = student.ppf(0.975, 199) * values.std(ddof=1) / 200**0.5
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half))
    assert found.sd_seeds is None and found.sd_records == pytest.approx(values.std(ddof=1))


def test_records_that_are_all_alike_leave_room_for_others():
    found = mixed_interval([dict.fromkeys(range(100), 0.0)] * 2)
    assert found.low == pytest.approx(-0.037, abs=1e-3) and found.high == -found.low
    with pytest.raises(ValueError, match="each with records"):
        mixed_interval([{}])
