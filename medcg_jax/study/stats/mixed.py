"""Intervals of a mean over records and seeds, as two sources of variation: mean squares of balanced layouts.

For a balanced layout these are the REML estimates, wherever none of them falls on 0; `statsmodels.MixedLM` gives the
same, but needs seconds for one row of crossed records and seeds, and a grid has hundreds of rows.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from medcg_jax.eval.predictions import wilson


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
    """The interval of a mean that speaks of other seeds and other records.

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

    Source: Searle, Casella and McCulloch, Variance Components (1992), chapter 4, for the mean squares; a quantile with
    each variance: Banerjee, Approximate confidence interval for linear functions of means of k populations when the
    population variances are not equal, Sankhya 22 (1960).

    Raises:
      ValueError: no seed, or a seed without records.
    """
    if not by_seed or not all(by_seed):
        raise ValueError(f"records of each seed: {[len(one) for one in by_seed]}; one seed or more, each with records")
    same = all(one.keys() == by_seed[0].keys() for one in by_seed)
    layout = _crossed if same and len(by_seed) > 1 and len(by_seed[0]) > 1 else _nested
    found = layout(by_seed, lambda df: float(student.ppf((1 + level) / 2, max(1, df))))
    half = found.half or wilson(0, len(set().union(*by_seed)), level)[1]
    mean = float(np.mean([sum(one.values()) / len(one) for one in by_seed]))
    return Mixed(
        mean, found.se, max(-1.0, mean - half), min(1.0, mean + half), found.sd_seeds, found.sd_records, found.sd_rest
    )


@dataclass(frozen=True)
class _Spread:
    """Of a mean: half-width of its interval, standard error; and the standard deviations of `Mixed`."""

    half: float
    se: float
    sd_seeds: float | None
    sd_records: float
    sd_rest: float | None = None


def _nested(by_seed: Sequence[Mapping[Hashable, float]], quantile: Callable[[int], float]) -> _Spread:
    values = [np.fromiter(one.values(), float) for one in by_seed]
    seeds, records = len(values), len(set().union(*by_seed))
    left = sum(len(one) for one in values) - seeds
    within = sum(float(one.var()) * len(one) for one in values) / left if left else 0.0
    alone = quantile(records - seeds) * (within / records) ** 0.5
    if seeds == 1:
        return _Spread(alone, (within / records) ** 0.5, None, within**0.5)
    between = float(np.var([one.mean() for one in values], ddof=1))
    added = max(0.0, between - within * float(np.mean([1 / len(one) for one in values])))
    half = max(alone, quantile(seeds - 1) * (between / seeds) ** 0.5)
    return _Spread(half, (added / seeds + within / records) ** 0.5, added**0.5, within**0.5)


def _crossed(by_seed: Sequence[Mapping[Hashable, float]], quantile: Callable[[int], float]) -> _Spread:
    values = np.array([[one[record] for record in by_seed[0]] for one in by_seed], float)  # [seeds, records]
    seeds, records = values.shape
    by_row, by_column = values.mean(1), values.mean(0)
    rest = values - by_row[:, None] - by_column + values.mean()
    square_seeds, square_records = records * float(by_row.var(ddof=1)), seeds * float(by_column.var(ddof=1))
    square_rest = float((rest**2).sum()) / ((seeds - 1) * (records - 1))
    # An estimate of a variance may fall below 0, and is 0 then.
    added, own = max(0.0, square_seeds - square_rest) / records, max(0.0, square_records - square_rest) / seeds
    of_seeds, of_records = added / seeds, square_records / values.size
    half = (quantile(seeds - 1) ** 2 * of_seeds + quantile(records - 1) ** 2 * of_records) ** 0.5
    return _Spread(half, (of_seeds + of_records) ** 0.5, added**0.5, own**0.5, square_rest**0.5)
