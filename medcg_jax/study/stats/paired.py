"""Two arms on the same records: exact McNemar, Holm, intervals over targets, seeds and records, an overall test, power.

`bootstrap_interval` is for an effect over several targets, `mixed_interval` for one row's difference over its records
and seeds, `detectable` for the smallest difference that n records can show. `eval.predictions.wilson` gives Wilson's
interval of one accuracy.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.stats import permutation_test
from scipy.stats import t as student
from statsmodels.stats import contingency_tables
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import normal_power_het

from medcg_jax.eval.predictions import wilson
from medcg_jax.study.design import mat

BOOTSTRAP_DRAWS = 10_000
# Sign patterns that the overall test draws; with 16 targets or fewer it enumerates all.
SIGN_FLIPS = 2**16
POWER = 0.8
LEVEL = 0.05


def mcnemar(only_a: int, only_b: int) -> float:
    """The exact two-sided McNemar p-value. only_a, only_b: records that one arm alone answered rightly."""
    return float(contingency_tables.mcnemar([[0, only_a], [only_b, 0]], exact=True).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values adjusted by Holm's step-down method over the whole list."""
    return multipletests(p_values, method="holm")[1].tolist() if len(p_values) else []


@dataclass(frozen=True)
class Comparison:
    """Two arms on n records: accuracies, numbers of records that one arm alone answered rightly, exact McNemar p."""

    n: int
    accuracy_a: float
    accuracy_b: float
    only_a: int
    only_b: int
    p: float

    @property
    def difference(self) -> float:
        return self.accuracy_a - self.accuracy_b


def compare(predictions_a: Mapping[str, bool], predictions_b: Mapping[str, bool]) -> Comparison:
    """Arm a against arm b, paired by record.

    predictions_a, predictions_b: record id -> whether the answer was right (`Answers.correct_by_id`).

    Raises:
      ValueError: the arms were not asked the same records.
    """
    if predictions_a.keys() != predictions_b.keys():
        differing = sorted(predictions_a.keys() ^ predictions_b.keys())
        raise ValueError(f"the two arms were not asked the same records: {len(differing)} differ, e.g. {differing[0]}")
    n = len(predictions_a)
    only_a = sum(right and not predictions_b[key] for key, right in predictions_a.items())
    only_b = sum(right and not predictions_a[key] for key, right in predictions_b.items())
    a, b = sum(predictions_a.values()), sum(predictions_b.values())
    return Comparison(n, a / n if n else 0.0, b / n if n else 0.0, only_a, only_b, mcnemar(only_a, only_b))


def grouped(items: Sequence, key: Callable) -> dict:
    """Key -> its items in their order, with sorted keys."""
    groups = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return dict(sorted(groups.items()))


# ------------------------------------------------------------------ several targets


@dataclass(frozen=True)
class Unit:
    """One row of one target and seed: on how many of n records one arm alone was right."""

    target: str
    seed: int
    n: int
    only_a: int
    only_b: int


def bootstrap_interval(units: Sequence[Unit], draws: int = BOOTSTRAP_DRAWS, level: float = 0.95) -> tuple[float, float]:
    """A percentile interval of the mean difference (a - b) over targets and seeds.

    Targets are resampled, seeds within each target, and records within each (row, target, seed), so the interval holds
    for other targets, seeds and records of the same kind. Rows of one target and seed are averaged; targets have equal
    weights. With few targets or seeds it is rough, and too narrow.
    """
    rng = np.random.default_rng(0)

    def means_of_drawn(rows: np.ndarray) -> np.ndarray:
        """float[n, draws] -> float[draws]: in each column, the mean of n rows drawn with replacement."""
        indices = rng.integers(0, len(rows), (len(rows), draws))
        return np.take_along_axis(rows, indices, 0).mean(0)

    per_target = []
    for of_target in grouped(units, lambda u: u.target).values():
        seeds = grouped(of_target, lambda u: u.seed).values()
        per_target.append(means_of_drawn(np.stack([_resampled(rows, rng, draws) for rows in seeds])))
    low, high = np.quantile(means_of_drawn(np.stack(per_target)), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _resampled(units: Sequence[Unit], rng: np.random.Generator, draws: int) -> np.ndarray:
    """float[draws]: mean difference over the rows of one target and seed, with resampled records."""
    total = np.zeros(draws)
    for unit in units:
        shares = np.array([unit.only_a, unit.only_b, unit.n - unit.only_a - unit.only_b]) / unit.n
        counts = rng.multinomial(unit.n, shares, draws)
        total += (counts[:, 0] - counts[:, 1]) / unit.n
    return total / len(units)


def mean_difference(units: Sequence[Unit]) -> float:
    """Mean of a - b: over rows within a target and seed, then seeds within a target, then targets."""
    return float(np.mean(list(target_means(units).values())))


def target_means(units: Sequence[Unit]) -> dict[str, float]:
    """Target -> mean of a - b: over rows within a seed, then over seeds."""

    def of_target(rows: Sequence[Unit]) -> float:
        seeds = grouped(rows, lambda u: u.seed).values()
        return float(np.mean([np.mean([(u.only_a - u.only_b) / u.n for u in of_seed]) for of_seed in seeds]))

    return {target: of_target(rows) for target, rows in grouped(units, lambda u: u.target).items()}


@dataclass(frozen=True)
class Overall:
    """A test of a mean over targets: p, the smallest p that this number of targets allows, and the test in words."""

    p: float
    p_smallest: float
    test: str


def overall_test(means: Sequence[float]) -> Overall:
    """A two-sided sign-flip permutation test that the arms are alike on every target.

    means: one mean difference for each target, over rows and seeds: these share records and are not independent.

    If the arms were alike, each target's mean would have either sign with equal probability. p is the share of all sign
    patterns whose mean lies at least as far from 0 as the observed mean. It is a statement on targets like these, not
    on records: more records of a target add nothing. With n targets no p is below 2 / 2**n (5 targets: .0625, so
    fewer than 6 can never show anything at .05). Beyond 16 targets `SIGN_FLIPS` patterns are drawn, and no p is below
    2 / (SIGN_FLIPS + 1).

    Source: Fisher, The Design of Experiments (1935), section 21.
    """
    n = len(means)
    if n == 1:
        return Overall(1.0, 1.0, "exact sign flips of 1 target")
    p = permutation_test(
        (np.asarray(means, float),),
        np.mean,
        permutation_type="samples",
        n_resamples=SIGN_FLIPS,
        vectorized=True,
        batch=4096,
        rng=np.random.default_rng(0),
    ).pvalue
    if 2**n <= SIGN_FLIPS:
        return Overall(float(p), 2 / 2**n, f"exact sign flips of {n} targets")
    return Overall(float(p), 2 / (SIGN_FLIPS + 1), f"{SIGN_FLIPS} drawn sign flips of {n} targets")


# ------------------------------------------------------------------ one row: records and seeds


@dataclass(frozen=True)
class Mixed:
    """A mean and the components of its error.

    Attributes:
      mean: of the seeds' means. se: its standard error. low, high: the interval, within [-1, 1].
      sd_seeds: standard deviation between seeds beyond what their records explain; None with one seed.
      sd_records: between records; where seeds have different records, between the records of a seed.
      sd_rest: of the residual, where all seeds have the same records; else None, and sd_records contains it.
    """

    mean: float
    se: float
    low: float
    high: float
    sd_seeds: float | None
    sd_records: float
    sd_rest: float | None


def mixed_interval(by_seed: Sequence[Mapping[Hashable, float]], level: float = 0.95) -> Mixed:
    """The interval of a mean over other seeds and other records, from the mean squares of balanced layouts.

    by_seed: for each seed, record -> value in [-1, 1]. Seeds and records are random samples of all possible ones.
    Where all seeds have the same records the two are crossed, else records are nested in seeds. (Records that only some
    seeds share count as nested, each as one record.) Each t quantile has the degrees of freedom of its variance; for n
    seeds n - 1 (two seeds: t = 12.7, three: 4.3).

      nested, value = mean + seed + record: the wider one of the t interval of the seeds' means, exact for normal
        errors, and the t interval of the records around their seeds' means.
      crossed, value = mean + seed + record + rest: the squared half-width is t_S**2 * V_S + t_R**2 * V_R, where V_S is
        the seeds' share of the variance of the mean and V_R the variance with these seeds fixed. (Satterthwaite's
        single quantile for the sum covers too little with two or three seeds.)
      one seed: the t interval over its records.

    So no interval is narrower than the one over records alone, even where seeds agree by chance.

    Where all values are equal no variance can be estimated: the half-width is then the upper end of Wilson's interval
    for 0 successes in as many records.

    For a balanced layout these are the REML estimates, unless one of them is 0. `statsmodels.MixedLM` gives the same,
    but takes seconds for one row of crossed records and seeds, and a grid has hundreds of rows.

    Source: Searle, Casella and McCulloch, Variance Components (1992), chapter 4, for the mean squares; a quantile with
    each variance: Banerjee, Approximate confidence interval for linear functions of means of k populations when the
    population variances are not equal, Sankhya 22 (1960).

    Raises:
      ValueError: no seed, or a seed without records.
    """
    if not by_seed or not all(by_seed):
        raise ValueError(
            f"records of each seed: {list(map(len, by_seed))}; expected at least one seed, each with records"
        )
    same = all(values.keys() == by_seed[0].keys() for values in by_seed)
    layout = _crossed if same and len(by_seed) > 1 and len(by_seed[0]) > 1 else _nested
    half, se, *sds = layout(by_seed, lambda df: float(student.ppf((1 + level) / 2, max(1, df))))
    half = half or wilson(0, len(set().union(*by_seed)), level)[1]
    mean = float(np.mean([sum(values.values()) / len(values) for values in by_seed]))
    return Mixed(mean, se, max(-1.0, mean - half), min(1.0, mean + half), *sds)


def _nested(by_seed: Sequence[Mapping[Hashable, float]], quantile: Callable[[int], float]) -> tuple:
    """(half-width of the mean's interval, its standard error, and the three standard deviations of `Mixed`)."""
    arrays = [np.fromiter(values.values(), float) for values in by_seed]
    seeds, records = len(arrays), len(set().union(*by_seed))
    df = sum(map(len, arrays)) - seeds
    within = sum(float(array.var()) * len(array) for array in arrays) / df if df else 0.0
    half_of_records = quantile(records - seeds) * (within / records) ** 0.5
    if seeds == 1:
        return half_of_records, (within / records) ** 0.5, None, within**0.5, None
    between = float(np.var([array.mean() for array in arrays], ddof=1))
    added = max(0.0, between - within * float(np.mean([1 / len(array) for array in arrays])))
    half = max(half_of_records, quantile(seeds - 1) * (between / seeds) ** 0.5)
    return half, (added / seeds + within / records) ** 0.5, added**0.5, within**0.5, None


def _crossed(by_seed: Sequence[Mapping[Hashable, float]], quantile: Callable[[int], float]) -> tuple:
    """As `_nested`."""
    values = np.array([[row[record] for record in by_seed[0]] for row in by_seed], float)  # [seeds, records]
    seeds, records = values.shape
    by_row, by_column = values.mean(1), values.mean(0)
    residuals = values - by_row[:, None] - by_column + values.mean()
    square_seeds, square_records = records * float(by_row.var(ddof=1)), seeds * float(by_column.var(ddof=1))
    square_rest = float((residuals**2).sum()) / ((seeds - 1) * (records - 1))
    # A variance estimate may fall below 0; it is 0 then.
    var_seeds = max(0.0, square_seeds - square_rest) / records
    var_records = max(0.0, square_records - square_rest) / seeds
    of_seeds, of_records = var_seeds / seeds, square_records / values.size
    half = (quantile(seeds - 1) ** 2 * of_seeds + quantile(records - 1) ** 2 * of_records) ** 0.5
    return half, (of_seeds + of_records) ** 0.5, var_seeds**0.5, var_records**0.5, square_rest**0.5


# ------------------------------------------------------------------ power


@functools.lru_cache(1 << 12)
def detectable(n: int, discordant: float, power: float = POWER, level: float = LEVEL) -> float | None:
    """The smallest true difference of two accuracies that n records show with that power.

    Of a two-sided test of paired differences (McNemar's, by the normal approximation).

    discordant: share in [0, 1] of the records that exactly one of the arms answers rightly; the difference cannot be
    larger. None where no record is discordant, or where even all discordant records on one side would not suffice.

    Source: Connor, Sample size for testing differences in proportions for the paired-sample design, Biometrics 43
    (1987), page 209.
    """
    if n < 1 or discordant <= 0:
        return None

    def beyond(difference: float) -> float:
        # Standard deviations of one record's difference (-1, 0 or 1): of equal arms, and of arms that differ so much.
        deviations = discordant**0.5, max(discordant - difference**2, 1e-12) ** 0.5
        return normal_power_het(difference, n, level, *deviations) - power

    return float(brentq(beyond, 0.0, discordant)) if beyond(discordant) >= 0 else None


def paper_power(sizes: Sequence[int] = (100, 300, 1000), against: str = "baseline_plus") -> dict:
    """How many of table 3's printed wins are smaller than n test records can show, at 80 % power and the 5 % level.

    The paper prints neither test sizes nor discordant shares. The shares here are those of two models that err
    independently, a (1 - b) + b (1 - a); models that err on the same records could show smaller differences.

    Returns {"table", "against", "rows", "wins": rows where the trained arm is above `against`,
    "below": {n: number of wins that n records would not show}}.
    """
    rows = mat.paper_csv("table3_classification_pairs")
    pairs = [(float(row["trained"]) / 100, float(row[against]) / 100) for row in rows]
    wins = [(a - b, a * (1 - b) + b * (1 - a)) for a, b in pairs if a > b]

    def shows(n: int, difference: float, discordant: float) -> bool:
        smallest = detectable(n, discordant)
        return smallest is not None and difference >= smallest

    below = {n: sum(not shows(n, *win) for win in wins) for n in sizes}
    return {"table": 3, "against": against, "rows": len(rows), "wins": len(wins), "below": below}
