"""Intervals of a mean over records and seeds, as two sources of variation: mean squares of balanced layouts.

For a balanced layout these are the REML estimates, wherever none of them falls on 0; `statsmodels.MixedLM` gives the
same and takes seconds for one crossed row of a grid that has hundreds.
"""

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from medcg_jax.eval.intervals import wilson


@dataclass(frozen=True)
class Mixed:
    """A mean and where its error comes from.

    Attributes:
      mean: of the seeds' means. se, df: its standard error, and the degrees of freedom of the quantile of t.
      low, high: the interval, within [-1, 1].
      sd_seeds: standard deviation between seeds beyond what their records explain; None with one seed.
      sd_records: between records; where each seed has records of its own, between the records of a seed.
      sd_rest: of what neither explains, where records return with every seed; else None, for it is in sd_records.
    """

    mean: float
    se: float
    df: float
    low: float
    high: float
    sd_seeds: float | None
    sd_records: float
    sd_rest: float | None


def mixed_interval(by_seed: Sequence[Mapping[Hashable, float]], level: float = 0.95) -> Mixed:
    """The interval of a mean that speaks of other seeds and other records.

    by_seed: for each seed, record -> value in [-1, 1]. Where all seeds have the same records, seeds and records are
    crossed; else records are nested in their seeds.

      nested: value = mean + seed + record of the seed. The seeds' means alone tell how far it may be off: their t
        interval, with one degree of freedom less than there are seeds, exact for normal errors.
      crossed: value = mean + seed + record + rest. The variance of the mean is a sum of three mean squares, and
        Satterthwaite's formula gives its degrees of freedom (Brennan, Generalizability Theory, 2001, for the p x i
        design; Satterthwaite, Biometrics Bulletin 2, 1946).

    Two or three seeds may agree by luck: the interval is never narrower than the one over the records alone (t over the
    records' means), which is also the interval where there is one seed. Where all records are alike nothing can be
    estimated, and it reaches as far as Wilson's interval of none in so many records.

    Raises:
      ValueError: a seed without records, or no seed.
    """
    if not by_seed or not all(by_seed):
        raise ValueError(f"records of each seed: {[len(one) for one in by_seed]}; one seed or more, each with records")
    quantile = (1 + level) / 2
    mean = float(np.mean([np.mean(list(one.values())) for one in by_seed]))
    sources = [_alone(by_seed)]
    sd_seeds, sd_records, sd_rest = None, _root(sources[0].within), None
    if len(by_seed) > 1:
        layout = _crossed if all(one.keys() == by_seed[0].keys() for one in by_seed) else _nested
        source, sd_seeds, sd_records, sd_rest = layout(by_seed)
        sources.append(source)
    widest = max(sources, key=lambda s: s.se * student.ppf(quantile, s.df))
    half = widest.se * float(student.ppf(quantile, widest.df))
    if not half:
        half = wilson(0, len(set().union(*by_seed)), level)[1]
    return Mixed(
        mean, widest.se, widest.df, max(-1.0, mean - half), min(1.0, mean + half), sd_seeds, sd_records, sd_rest
    )


@dataclass(frozen=True)
class _Source:
    """A standard error with its degrees of freedom; `within`: variance of the single values."""

    se: float
    df: float
    within: float = 0.0


def _alone(by_seed: Sequence[Mapping[Hashable, float]]) -> _Source:
    """Records as the only source: each one's mean over the seeds that asked it."""
    values = defaultdict(list)
    for one in by_seed:
        for record, value in one.items():
            values[record].append(value)
    means = np.array([np.mean(own) for own in values.values()])
    if len(means) < 2:
        return _Source(0.0, 1.0)
    variance = float(means.var(ddof=1))
    return _Source((variance / len(means)) ** 0.5, len(means) - 1, variance)


def _nested(by_seed):
    """(source, sd_seeds, sd_records, None) where each seed has records of its own."""
    values = [np.array(list(one.values()), float) for one in by_seed]
    sizes = np.array([len(one) for one in values])
    left = sizes.sum() - len(values)
    within = sum(float(one.var()) * len(one) for one in values) / left if left else 0.0
    between = float(np.var([one.mean() for one in values], ddof=1))
    seeds = between - within * float(np.mean(1 / sizes))
    return _Source((between / len(values)) ** 0.5, len(values) - 1), _root(seeds), _root(within), None


def _crossed(by_seed):
    """(source, sd_seeds, sd_records, sd_rest) where the same records return with every seed."""
    values = np.array([[one[record] for record in by_seed[0]] for one in by_seed], float)  # [seeds, records]
    seeds, records = values.shape
    if records < 2:
        return _nested(by_seed)
    by_row, by_column = values.mean(1), values.mean(0)
    rest = values - by_row[:, None] - by_column + values.mean()
    of_seeds = records * float(by_row.var(ddof=1))
    of_records = seeds * float(by_column.var(ddof=1))
    of_rest = float((rest**2).sum()) / ((seeds - 1) * (records - 1))
    variance = of_seeds + of_records - of_rest  # times seeds * records
    terms = of_seeds**2 / (seeds - 1) + of_records**2 / (records - 1) + of_rest**2 / ((seeds - 1) * (records - 1))
    # Seeds closer than their records explain: the records are the only source.
    source = (
        _Source((variance / values.size) ** 0.5, variance**2 / terms) if of_seeds > of_rest
        else _Source((of_records / values.size) ** 0.5, records - 1)
    )  # fmt: skip
    return source, _root((of_seeds - of_rest) / records), _root((of_records - of_rest) / seeds), _root(of_rest)


def _root(variance: float) -> float:
    """The standard deviation; an estimate of a variance may fall below 0, and is 0 then."""
    return max(0.0, variance) ** 0.5
