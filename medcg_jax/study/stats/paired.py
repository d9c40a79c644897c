"""Two arms on the same records: exact McNemar, Holm, intervals over targets, seeds and records, an overall test, power.

`estimate` is for an effect over several targets and seeds, `mixed_interval` for one row's difference over its records
and seeds, `detectable` for the smallest difference that n records can show. `eval.predictions.wilson` gives Wilson's
interval of one accuracy.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import stdtr, stdtrit
from scipy.stats import permutation_test
from statsmodels.stats import contingency_tables
from statsmodels.stats.power import normal_power_het

from medcg_jax.eval.predictions import wilson
from medcg_jax.study.design import mat

# Sign patterns that the overall test draws; with 16 targets or fewer it enumerates all.
SIGN_FLIPS = 2**16
POWER = 0.8
# No smaller p of a row's interval is computed.
LEAST_P = 1e-12
# Of every test: two-sided, so that a difference in a given direction is found by chance in .025 of cases.
LEVEL = 0.05
NORMAL_95 = 1.959963984540054


def mcnemar(only_a: int, only_b: int) -> float:
    """The exact two-sided McNemar p-value. only_a, only_b: records that one arm alone answered rightly."""
    return float(contingency_tables.mcnemar([[0, only_a], [only_b, 0]], exact=True).pvalue)


def flipped(sums: Sequence[int]) -> float:
    """The exact two-sided p of sign flips of patients' sums: McNemar's test where records of one patient are not alike.

    sums: for each patient the records that the first arm alone answered rightly less those of the second. If the arms
    were alike, a patient's sum would have either sign with equal probability. With one record a patient this is the
    exact McNemar p.
    """
    steps = [abs(int(value)) for value in sums if value]
    if max(steps, default=0) < 2:
        return mcnemar(sum(value > 0 for value in sums), sum(value < 0 for value in sums))
    # shares[i]: probability that the flipped sums add up to i - reach.
    shares, reach = np.ones(1), 0
    for step in steps:
        reach += step
        wider = np.zeros(2 * reach + 1)
        wider[: len(shares)] += shares / 2
        wider[2 * step :] += shares / 2
        shares = wider
    distance = np.abs(np.arange(-reach, reach + 1))
    return min(1.0, float(shares[distance >= abs(sum(int(value) for value in sums))].sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values adjusted by Holm's step-down method over the whole list.

    (As statsmodels' `multipletests`, which collects garbage at every call: most of the time of a report.)

    Source: Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6 (1979).
    """
    order = np.argsort(p_values)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.maximum.accumulate((len(p_values) - np.arange(len(p_values))) * np.asarray(p_values)[order])
    return np.minimum(1.0, adjusted).tolist()


@dataclass(frozen=True)
class Comparison:
    """Two arms on n records: accuracies, numbers of records that one arm alone answered rightly, exact p of these two
    models: McNemar's, or over patients (`flipped`)."""

    n: int
    accuracy_a: float
    accuracy_b: float
    only_a: int
    only_b: int
    p: float

    @property
    def difference(self) -> float:
        return self.accuracy_a - self.accuracy_b


def compare(
    predictions_a: Mapping[str, bool], predictions_b: Mapping[str, bool], patients: Mapping[str, str] | None = None
) -> Comparison:
    """Arm a against arm b, paired by record.

    predictions_a, predictions_b: record id -> whether the answer was right (`Answers.correct_by_id`). patients: record
    id -> patient; records that it lacks are of a patient each.

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
    lead = {key: int(right) - int(predictions_b[key]) for key, right in predictions_a.items()}
    return Comparison(
        n, a / n if n else 0.0, b / n if n else 0.0, only_a, only_b, flipped(patient_sums(lead, patients))
    )


def patient_sums(values: Mapping[str, float], patients: Mapping[str, str] | None) -> list[float]:
    """The sum of the values of each patient's records; a record without a patient is one by itself."""
    if not patients:
        return list(values.values())
    sums: dict[tuple[bool, str], float] = defaultdict(float)
    for key, value in values.items():
        sums[key in patients, patients.get(key, key)] += value
    return list(sums.values())


def by_patient(values: Mapping[Hashable, float], patients: Mapping[Hashable, str]) -> dict[Hashable, float]:
    """Values of patients in place of records', with the same mean and the variance of records drawn patient by patient.

    A patient's value is the mean plus the sum of its records' deviations from it, times patients over records: the
    linearized ratio of the patients' sums to their numbers of records.

    Source: Cochran, Sampling Techniques (3rd ed., 1977), section 9A.1 (clusters of unequal sizes, ratio to size).
    """
    if not patients or not values:
        return dict(values)
    mean = sum(values.values()) / len(values)
    sums: dict[Hashable, float] = defaultdict(float)
    for key, value in values.items():
        sums[("patient", patients[key]) if key in patients else key] += value - mean
    return {key: mean + value * len(sums) / len(values) for key, value in sums.items()}


def grouped(items: Sequence, key: Callable) -> dict:
    """Key -> its items in their order, with sorted keys."""
    groups = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return dict(sorted(groups.items()))


# ------------------------------------------------------------------ several targets and seeds


@dataclass(frozen=True)
class Unit:
    """The values of n records in one row of one target and seed: their sum, and the sum of their squares.

    The value of a record is, for one arm, 1 where it was right; for a difference of arms, the difference of these; for
    other contrasts their sum with the contrast's weights (`unit_of`).
    """

    target: str
    seed: int
    n: int
    total: float
    squares: float

    @property
    def mean(self) -> float:
        return self.total / self.n

    @property
    def variance(self) -> float:
        """Of the mean over other records of this kind."""
        return max(0.0, self.squares - self.total**2 / self.n) / self.n / max(1, self.n - 1)


def unit_of(target: str, seed: int, values: np.ndarray, patients: Sequence[str] = ()) -> Unit:
    """values: [records], the value of each. patients: of each record, "" where it is not known; (): of none.

    With patients the unit is of them in place of records (`by_patient`): their number, and the same mean.
    """
    values = np.asarray(values, float)
    known = {i: patient for i, patient in enumerate(patients) if patient}
    if known:
        values = np.array(list(by_patient(dict(enumerate(values.tolist())), known).values()))
    return Unit(target, seed, len(values), float(values.sum()), float(values @ values))


def upper_t(tail: float, df: float) -> float:
    """The value that a t variable exceeds with that probability. df: may be infinite, for the normal one."""
    return float(-stdtrit(df, tail))


def tail_t(value: float, df: float) -> float:
    """The probability that a t variable exceeds the value."""
    return float(stdtr(df, -value))


@dataclass(frozen=True)
class Estimate:
    """A mean over targets and seeds, its interval and its test.

    Attributes:
      errors: (standard error, degrees of freedom) of each source of variation that the layout shows; the widest t
        interval of them is the interval.
      p: of a mean of 0, two-sided. p_smallest: the least p that the layout allows; None where there is no such bound.
      test: the test in words.
      most: the largest possible absolute value of the mean.
    """

    mean: float
    errors: tuple[tuple[float, float], ...]
    p: float
    p_smallest: float | None
    test: str
    targets: int
    seeds: int
    most: float = 1.0

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        half = max(error * upper_t((1 - level) / 2, df) for error, df in self.errors)
        return max(-self.most, self.mean - half), min(self.most, self.mean + half)

    @property
    def is_up(self) -> bool:
        """Whether it is shown to be above 0: by the interval and by the test."""
        return self.p < LEVEL and self.interval()[0] > 0

    @property
    def is_down(self) -> bool:
        return self.p < LEVEL and self.interval()[1] < 0

    def p_below(self, bound: float) -> float:
        """The one-sided p of a true mean at or above `bound`: small where it is shown to lie below."""
        return max(tail_t((bound - self.mean) / error, df) for error, df in self.errors)

    def p_above(self, bound: float) -> float:
        """The one-sided p of a true mean at or below `bound`: small where it is shown to lie above."""
        return max(tail_t((self.mean - bound) / error, df) for error, df in self.errors)


def estimate(units: Sequence[Unit], most: float = 1.0, *, same_records: bool = False) -> Estimate:
    """The mean of units over other targets and other seeds of the same kind.

    One seed draws the base, the data and the order of training of all targets, so targets and seeds are crossed: value =
    mean + target + seed + rest. Rows of one target and seed are averaged; targets have equal weights. The interval is
    the widest of these t intervals:

      targets: of the targets' means, n - 1 degrees of freedom.
      seeds: of the seeds' means, n - 1 degrees of freedom (two seeds: t = 12.7, three: 4.3).
      both: of the sum of their variances (MS_targets + MS_seeds - MS_rest) / cells, at least either of the two, with
        Satterthwaite's degrees of freedom, at least those of the smaller side.
      records: of the records within the cells, so that targets and seeds that agree by chance narrow nothing further.
        Where all seeds of a target have the same records, these count once.

    Neither of the first two covers where the other source matters; the third alone covers too little with two or three
    seeds (.88 to .93 in `benchmarks/coverage.py`'s layouts), since a variance of so few is often estimated near 0.
    The p is the level at which this interval touches 0.

    One seed: the interval is of other targets and of these models alone, the p that of sign flips (`overall_test`):
    nothing is said of the recipe. One target: the interval is of other seeds (of one seed: of other records), and p is
    1, since nothing is said of other targets.

    Where cells of the layout are missing, they are set to the fit of target + seed and the residual loses their degrees
    of freedom (Yates); without any left, nothing is known: the interval is (-most, most).

    most: the largest possible absolute value of the mean. same_records: whether all seeds of a target have the same
    records, as released data have.

    Sources: Searle, Casella and McCulloch, Variance Components (1992), chapter 4; Satterthwaite, An approximate
    distribution of estimates of variance components, Biometrics Bulletin 2 (1946); Yates, The analysis of replicated
    experiments when the field results are incomplete, Empire Journal of Experimental Agriculture 1 (1933).

    Raises:
      ValueError: no units.
    """
    if not units:
        raise ValueError("no units: expected at least one")
    cells = grouped(units, lambda u: (u.target, u.seed))
    targets, seeds = (sorted({key[i] for key in cells}) for i in (0, 1))
    values = np.array([[np.mean([u.mean for u in cells.get((t, s), ())] or np.nan) for s in seeds] for t in targets])
    values, df_rest = _completed(values)
    mean, errors = float(values.mean()), _errors(values, df_rest)
    # Units that share records: the variance of their mean is at most the mean of their variances.
    sharing = grouped(units, lambda u: u.target).values() if same_records else cells.values()
    error = float(np.sum([np.mean([u.variance for u in group]) for group in sharing])) ** 0.5 / len(sharing)
    error = error or wilson(0, sum(max(u.n for u in group) for group in sharing))[1] / NORMAL_95
    errors = (*((error, df) for error, df in errors if error), (error, float("inf")))
    if len(targets) == 1 or len(seeds) == 1:
        overall = overall_test(values.mean(1).tolist())
    else:
        p = max(2 * tail_t(abs(mean) / error, df) for error, df in errors)
        overall = Overall(p, None, f"two-way t of {len(targets)} targets and {len(seeds)} seeds")
    return Estimate(mean, errors, overall.p, overall.p_smallest, overall.test, len(targets), len(seeds), most)


def _completed(values: np.ndarray) -> tuple[np.ndarray, int]:
    """([targets, seeds] without NaN, degrees of freedom of the residual)."""
    num_targets, num_seeds = values.shape
    known = ~np.isnan(values)
    df = (num_targets - 1) * (num_seeds - 1) - int((~known).sum())
    if known.all():
        return values, df
    targets, seeds = np.indices(values.shape)
    design = np.concatenate([np.eye(num_targets)[targets], np.eye(num_seeds)[seeds]], axis=-1)
    effects = np.linalg.lstsq(design[known], values[known], rcond=None)[0]
    return np.where(known, values, design @ effects), df


def _errors(values: np.ndarray, df_rest: int) -> tuple[tuple[float, float], ...]:
    """(standard error, degrees of freedom) of the mean: over targets, over seeds, over both, where there are several."""
    num_targets, num_seeds = values.shape
    by_target, by_seed = values.mean(1), values.mean(0)
    if num_targets == 1 or num_seeds == 1:
        means = by_target if num_seeds == 1 else by_seed
        return ((float(means.std(ddof=1) / len(means) ** 0.5), len(means) - 1),) if len(means) > 1 else ()
    if df_rest < 1:
        return ((float("inf"), 1),)
    residuals = values - by_target[:, None] - by_seed + values.mean()
    square_targets, square_seeds = num_seeds * float(by_target.var(ddof=1)), num_targets * float(by_seed.var(ddof=1))
    square_rest = float((residuals**2).sum()) / df_rest
    both = max(square_targets + square_seeds - square_rest, square_targets, square_seeds)
    spread = square_targets**2 / (num_targets - 1) + square_seeds**2 / (num_seeds - 1) + square_rest**2 / df_rest
    least = min(num_targets, num_seeds) - 1
    sides = (square_targets, num_targets - 1), (square_seeds, num_seeds - 1)
    sums = (*sides, (both, max(least, both**2 / spread) if spread else least))
    return tuple(((square / values.size) ** 0.5, df) for square, df in sums)


def mean_difference(units: Sequence[Unit]) -> float:
    """Mean over rows within a target and seed, then seeds within a target, then targets."""
    return float(np.mean(list(target_means(units).values())))


def target_means(units: Sequence[Unit]) -> dict[str, float]:
    """Target -> mean over rows within a seed, then over seeds."""

    def of_target(rows: Sequence[Unit]) -> float:
        seeds = grouped(rows, lambda u: u.seed).values()
        return float(np.mean([np.mean([u.mean for u in of_seed]) for of_seed in seeds]))

    return {target: of_target(rows) for target, rows in grouped(units, lambda u: u.target).items()}


@dataclass(frozen=True)
class Overall:
    """A test of a mean over targets: p, the smallest p that this layout allows (None: any), and the test in words."""

    p: float
    p_smallest: float | None
    test: str


def overall_test(means: Sequence[float]) -> Overall:
    """A two-sided sign-flip permutation test that the arms are alike on every target.

    means: one mean difference for each target, over rows and seeds: these share records and are not independent.

    If the arms were alike, each target's mean would have either sign with equal probability. p is the share of all sign
    patterns whose mean lies at least as far from 0 as the observed mean. It is a statement on targets like these under
    these models' seeds, not on records, and not on other seeds: what one seed does to all targets it takes for an
    effect: more records of a target add nothing. With n targets no p is below 2 / 2**n (5 targets: .0625, so
    fewer than 6 can never show anything at .05). Beyond 16 targets `SIGN_FLIPS` patterns are drawn, and no p is below
    2 / (SIGN_FLIPS + 1).

    Source: Fisher, The Design of Experiments (1935), section 21.
    """
    n = len(means)
    if 2**n <= SIGN_FLIPS:
        sums = np.zeros(1)
        for mean in means:
            sums = np.concatenate([sums + mean, sums - mean])
        # sums[0] is that of the observed signs; equal sums may differ by rounding.
        p = float(np.mean(np.abs(sums) >= abs(sums[0]) * (1 - 1e-12)))
        return Overall(p, 2 / 2**n, f"exact sign flips of {n} target{'s' * (n > 1)}")
    p = permutation_test(
        (np.asarray(means, float),),
        np.mean,
        permutation_type="samples",
        n_resamples=SIGN_FLIPS,
        vectorized=True,
        batch=4096,
        rng=np.random.default_rng(0),
    ).pvalue
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
      p: of a mean of 0, two-sided: the level at which the interval touches 0. With several seeds it is a test of the
        recipe, with one of these models.
    """

    mean: float
    se: float
    low: float
    high: float
    sd_seeds: float | None
    sd_records: float
    sd_rest: float | None
    p: float


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
    records = len(set().union(*by_seed))

    half_of, se, *sds = layout(by_seed)

    def half_width(alpha: float) -> float:
        half = half_of(lambda df: upper_t(alpha / 2, max(1, df)))
        return half or wilson(0, records, 1 - alpha)[1]

    mean, half = float(np.mean([sum(values.values()) / len(values) for values in by_seed])), half_width(1 - level)
    return Mixed(mean, se, max(-1.0, mean - half), min(1.0, mean + half), *sds, _touching(half_width, abs(mean)))


def _touching(half_width: Callable[[float], float], distance: float) -> float:
    """The alpha at which an interval's half-width, which falls with alpha, is `distance`; at least `LEAST_P`."""
    if half_width(LEAST_P) <= distance:
        return LEAST_P
    if half_width(1.0) >= distance:
        return 1.0
    root = brentq(lambda x: half_width(math.exp(x)) - distance, math.log(LEAST_P), 0.0, xtol=1e-6)
    return math.exp(root)


def _nested(by_seed: Sequence[Mapping[Hashable, float]]) -> tuple:
    """(function from t quantiles by degrees of freedom to the half-width of the mean's interval, standard error of the
    mean, and the three standard deviations of `Mixed`)."""
    arrays = [np.fromiter(values.values(), float) for values in by_seed]
    seeds, records = len(arrays), len(set().union(*by_seed))
    df = sum(map(len, arrays)) - seeds
    within = sum(float(array.var()) * len(array) for array in arrays) / df if df else 0.0
    error = (within / records) ** 0.5
    if seeds == 1:
        return lambda quantile: quantile(records - 1) * error, error, None, within**0.5, None
    between = float(np.var([array.mean() for array in arrays], ddof=1))
    added = max(0.0, between - within * float(np.mean([1 / len(array) for array in arrays])))
    widths = (records - seeds, error), (seeds - 1, (between / seeds) ** 0.5)
    return (
        lambda quantile: max(quantile(df) * width for df, width in widths),
        (added / seeds + within / records) ** 0.5,
        added**0.5,
        within**0.5,
        None,
    )


def _crossed(by_seed: Sequence[Mapping[Hashable, float]]) -> tuple:
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

    def half_of(quantile: Callable[[int], float]) -> float:
        return (quantile(seeds - 1) ** 2 * of_seeds + quantile(records - 1) ** 2 * of_records) ** 0.5

    return half_of, (of_seeds + of_records) ** 0.5, var_seeds**0.5, var_records**0.5, square_rest**0.5


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
