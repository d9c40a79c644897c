"""Two arms on the same records: exact McNemar, Holm, intervals over targets, seeds and records, an overall test, power.

`bootstrap_interval` is of an effect over several targets, `mixed_interval` of one row's difference over its records and
seeds, `detectable` of what so many records could show. Wilson's interval of one accuracy is `eval.predictions.wilson`.
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
# Patterns of signs that the overall test looks at; where there are no more (16 targets or fewer), it looks at all.
SIGN_FLIPS = 2**16
POWER = 0.8
LEVEL = 0.05


def mcnemar(only_a: int, only_b: int) -> float:
    """The exact two-sided McNemar p-value: records that only a, or only b, answered rightly."""
    return float(contingency_tables.mcnemar([[0, only_a], [only_b, 0]], exact=True).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values adjusted by Holm's step-down method over the whole list."""
    return multipletests(p_values, method="holm")[1].tolist() if len(p_values) else []


@dataclass(frozen=True)
class Comparison:
    """Two arms on the same records: n, both accuracies, who alone was right how often, exact McNemar."""

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
      ValueError: the two were not asked the same records.
    """
    if predictions_a.keys() != predictions_b.keys():
        odd = sorted(predictions_a.keys() ^ predictions_b.keys())
        raise ValueError(f"the two arms were not asked the same records: {len(odd)} differ, e.g. {odd[0]}")
    n = len(predictions_a)
    only_a = sum(right and not predictions_b[key] for key, right in predictions_a.items())
    only_b = sum(right and not predictions_a[key] for key, right in predictions_b.items())
    a, b = sum(predictions_a.values()), sum(predictions_b.values())
    return Comparison(n, a / n if n else 0.0, b / n if n else 0.0, only_a, only_b, mcnemar(only_a, only_b))


def grouped(items: Sequence, key: Callable) -> dict:
    """Key -> its items in their order; keys sorted."""
    groups = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return dict(sorted(groups.items()))


# ------------------------------------------------------------------ several targets


@dataclass(frozen=True)
class Unit:
    """One row of one target and seed: how the two arms' answers differ, over n records."""

    target: str
    seed: int
    n: int
    only_a: int
    only_b: int


def bootstrap_interval(units: Sequence[Unit], draws: int = BOOTSTRAP_DRAWS, level: float = 0.95) -> tuple[float, float]:
    """A percentile interval of the mean difference (a - b) over targets and seeds.

    Targets are drawn anew, seeds within each target, and records within each (row, target, seed), so the interval
    speaks of other targets, seeds and records of the same kind. Rows of one target and seed are averaged, targets
    weigh alike. With few targets or seeds it is rough, and too narrow.
    """
    rng = np.random.default_rng(0)

    def means_of_drawn(rows: np.ndarray) -> np.ndarray:
        """float[draws]: the mean over as many of the rows of float[n, draws] as there are, drawn anew for each draw."""
        pick = rng.integers(0, len(rows), (len(rows), draws))
        return np.take_along_axis(rows, pick, 0).mean(0)

    per_target = []
    for of_target in grouped(units, lambda u: u.target).values():
        seeds = grouped(of_target, lambda u: u.seed).values()
        per_target.append(means_of_drawn(np.stack([_resampled(rows, rng, draws) for rows in seeds])))
    low, high = np.quantile(means_of_drawn(np.stack(per_target)), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _resampled(units: Sequence[Unit], rng: np.random.Generator, draws: int) -> np.ndarray:
    """float[draws] mean difference over one target's and seed's rows, with the records drawn anew."""
    total = np.zeros(draws)
    for unit in units:
        shares = np.array([unit.only_a, unit.only_b, unit.n - unit.only_a - unit.only_b]) / unit.n
        counts = rng.multinomial(unit.n, shares, draws)
        total += (counts[:, 0] - counts[:, 1]) / unit.n
    return total / len(units)


def mean_difference(units: Sequence[Unit]) -> float:
    """Mean of a - b: rows averaged within a target and seed, seeds within a target, targets alike."""
    return float(np.mean(list(target_means(units).values())))


def target_means(units: Sequence[Unit]) -> dict[str, float]:
    """Target -> mean of a - b: rows averaged within a seed, then seeds."""

    def of_target(rows: Sequence[Unit]) -> float:
        seeds = grouped(rows, lambda u: u.seed).values()
        return float(np.mean([np.mean([(u.only_a - u.only_b) / u.n for u in of_seed]) for of_seed in seeds]))

    return {target: of_target(rows) for target, rows in grouped(units, lambda u: u.target).items()}


@dataclass(frozen=True)
class Overall:
    """A test of one mean over all targets: `p`, the smallest that so few targets allow, and the test in words."""

    p: float
    p_smallest: float
    test: str


def overall_test(means: Sequence[float]) -> Overall:
    """A two-sided sign-flip permutation test that the arms are alike on every target.

    means: one mean difference for each target; its rows and seeds are averaged before, for they share records and are
      not independent.

    If the arms were alike, each target's mean would as likely have come with the other sign. p is the share of all
    patterns of signs whose mean lies at least as far out as the one seen, so it speaks of targets like these, not of
    records: one more record on a target adds nothing here. With n targets no p is below 2 / 2**n (5 targets: .0625, so
    fewer than 6 can never show anything at .05); beyond 16 targets `SIGN_FLIPS` patterns are drawn, and none is below
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
    """A mean and where its error comes from.

    Attributes:
      mean: of the seeds' means. se: its standard error. low, high: the interval, within [-1, 1].
      sd_seeds: standard deviation between seeds beyond what their records explain; None with one seed.
      sd_records: between records; where seeds have records of their own, between the records of a seed.
      sd_rest: of what neither explains, where the same records return with every seed; else it is in sd_records, and
        this is None.
    """

    mean: float
    se: float
    low: float
    high: float
    sd_seeds: float | None
    sd_records: float
    sd_rest: float | None


def mixed_interval(by_seed: Sequence[Mapping[Hashable, float]], level: float = 0.95) -> Mixed:
    """The interval of a mean that speaks of other seeds and other records, from mean squares of balanced layouts.

    by_seed: for each seed, record -> value in [-1, 1]. Seeds and records are random, drawn from all there could be.
    Where all seeds have the same records the two are crossed, else records are nested in their seeds. (Records of which
    only some return count as nested, each as one record.) Quantiles of t have the degrees of freedom of what they go
    with; seeds have one less than there are (two seeds: t = 12.7, three: 4.3).

      nested, value = mean + seed + record: the t interval of the seeds' means, exact for normal errors, or the one of
        the records around their seeds' means, whichever is wider.
      crossed, value = mean + seed + record + rest: the squared half-width is t_S**2 * V_S + t_R**2 * V_R, with V_S what
        the seeds add to the variance of the mean, and V_R what it is with these seeds. (Satterthwaite's one quantile
        for the sum covers less than it should with two or three seeds.)
      one seed: the t interval over its records.

    So no interval is narrower than the one over the records alone, where seeds agree by luck.

    Where all values are alike nothing can be estimated; the half-width is then where Wilson's interval of none in so
    many records ends.

    For a balanced layout these are the REML estimates, wherever none of them falls on 0; `statsmodels.MixedLM` gives
    the same, but needs seconds for one row of crossed records and seeds, and a grid has hundreds of rows.

    Source: Searle, Casella and McCulloch, Variance Components (1992), chapter 4, for the mean squares; a quantile with
    each variance: Banerjee, Approximate confidence interval for linear functions of means of k populations when the
    population variances are not equal, Sankhya 22 (1960).

    Raises:
      ValueError: no seed, or a seed without records.
    """
    if not by_seed or not all(by_seed):
        raise ValueError(f"records of each seed: {[len(own) for own in by_seed]}; one seed or more, each with records")
    same = all(own.keys() == by_seed[0].keys() for own in by_seed)
    layout = _crossed if same and len(by_seed) > 1 and len(by_seed[0]) > 1 else _nested
    half, se, *sds = layout(by_seed, lambda df: float(student.ppf((1 + level) / 2, max(1, df))))
    half = half or wilson(0, len(set().union(*by_seed)), level)[1]
    mean = float(np.mean([sum(own.values()) / len(own) for own in by_seed]))
    return Mixed(mean, se, max(-1.0, mean - half), min(1.0, mean + half), *sds)


def _nested(by_seed: Sequence[Mapping[Hashable, float]], quantile: Callable[[int], float]) -> tuple:
    """(half-width of the mean's interval, its standard error, and the three standard deviations of `Mixed`)."""
    values = [np.fromiter(own.values(), float) for own in by_seed]
    seeds, records = len(values), len(set().union(*by_seed))
    df = sum(map(len, values)) - seeds
    within = sum(float(own.var()) * len(own) for own in values) / df if df else 0.0
    alone = quantile(records - seeds) * (within / records) ** 0.5
    if seeds == 1:
        return alone, (within / records) ** 0.5, None, within**0.5, None
    between = float(np.var([own.mean() for own in values], ddof=1))
    added = max(0.0, between - within * float(np.mean([1 / len(own) for own in values])))
    half = max(alone, quantile(seeds - 1) * (between / seeds) ** 0.5)
    return half, (added / seeds + within / records) ** 0.5, added**0.5, within**0.5, None


def _crossed(by_seed: Sequence[Mapping[Hashable, float]], quantile: Callable[[int], float]) -> tuple:
    """As `_nested`."""
    values = np.array([[own[record] for record in by_seed[0]] for own in by_seed], float)  # [seeds, records]
    seeds, records = values.shape
    by_row, by_column = values.mean(1), values.mean(0)
    residuals = values - by_row[:, None] - by_column + values.mean()
    square_seeds, square_records = records * float(by_row.var(ddof=1)), seeds * float(by_column.var(ddof=1))
    square_rest = float((residuals**2).sum()) / ((seeds - 1) * (records - 1))
    # An estimate of a variance may fall below 0, and is 0 then.
    var_seeds = max(0.0, square_seeds - square_rest) / records
    var_records = max(0.0, square_records - square_rest) / seeds
    of_seeds, of_records = var_seeds / seeds, square_records / values.size
    half = (quantile(seeds - 1) ** 2 * of_seeds + quantile(records - 1) ** 2 * of_records) ** 0.5
    return half, (of_seeds + of_records) ** 0.5, var_seeds**0.5, var_records**0.5, square_rest**0.5


# ------------------------------------------------------------------ power


@functools.lru_cache(1 << 12)
def detectable(n: int, discordant: float, power: float = POWER, level: float = LEVEL) -> float | None:
    """The smallest true difference of two accuracies that n records show with that power.

    Two-sided test of paired differences of answers (McNemar's, by the normal approximation).

    discordant: share in [0, 1] of the records that just one of the two arms answers rightly; the difference cannot be
    larger. None where no records are discordant, and where not even all of them on one side would show.

    Source: Connor, Sample size for testing differences in proportions for the paired-sample design, Biometrics 43
    (1987), page 209.
    """
    if n < 1 or discordant <= 0:
        return None

    def beyond(difference: float) -> float:
        return normal_power_het(difference, n, level, *_deviations(difference, discordant)) - power

    return float(brentq(beyond, 0.0, discordant)) if beyond(discordant) >= 0 else None


def _deviations(difference: float, discordant: float) -> tuple[float, float]:
    """Standard deviations of one record's difference (-1, 0 or 1) if the arms are alike, and if they differ so much."""
    return discordant**0.5, max(discordant - difference**2, 1e-12) ** 0.5


def paper_power(sizes: Sequence[int] = (100, 300, 1000), against: str = "baseline_plus") -> dict:
    """How many of table 3's printed wins lie below what so many test records could show, at 80 % power and 5 %.

    The paper prints neither test sizes nor discordant shares. The shares here are those of two models that err
    independently, a (1 - b) + b (1 - a); models that err on the same records would show smaller differences.

    Returns {"table", "against", "rows", "wins": rows where the trained arm is above `against`,
    "below": {records: of these wins, how many so many records would not show}}.
    """
    rows = mat.paper_csv("table3_classification_pairs")
    pairs = [(float(row["trained"]) / 100, float(row[against]) / 100) for row in rows]
    wins = [(a - b, a * (1 - b) + b * (1 - a)) for a, b in pairs if a > b]

    def shows(n: int, difference: float, discordant: float) -> bool:
        least = detectable(n, discordant)
        return least is not None and difference >= least

    below = {n: sum(not shows(n, *win) for win in wins) for n in sizes}
    return {"table": 3, "against": against, "rows": len(rows), "wins": len(wins), "below": below}
