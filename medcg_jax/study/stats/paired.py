"""Two arms on the same records: exact McNemar, Holm, a hierarchical bootstrap, an overall test over targets."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import permutation_test
from statsmodels.stats import contingency_tables
from statsmodels.stats.multitest import multipletests

BOOTSTRAP_DRAWS = 10_000
# Patterns of signs that the overall test looks at; where there are no more (16 targets or fewer), it looks at all.
SIGN_FLIPS = 2**16


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

    predictions_a, predictions_b: record id -> whether the answer was right (`stats.correct_by_id` reads them).

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
    tree: dict[str, dict[int, list[Unit]]] = defaultdict(lambda: defaultdict(list))
    for unit in units:
        tree[unit.target][unit.seed].append(unit)
    per_target = []  # float[draws] per target: the mean over its drawn seeds
    for _, seeds in sorted(tree.items()):
        drawn = np.stack([_resampled(seeds[seed], rng, draws) for seed in sorted(seeds)])  # [seeds, draws]
        pick = rng.integers(0, len(drawn), (len(drawn), draws))
        per_target.append(np.take_along_axis(drawn, pick, 0).mean(0))
    targets = np.stack(per_target)
    pick = rng.integers(0, len(targets), (len(targets), draws))
    means = np.take_along_axis(targets, pick, 0).mean(0)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _resampled(units: Sequence[Unit], rng: np.random.Generator, draws: int) -> np.ndarray:
    """float[draws] mean difference over one target's and seed's rows, with the records drawn anew."""
    total = np.zeros(draws)
    for unit in units:
        shares = np.array([unit.only_a, unit.only_b, unit.n - unit.only_a - unit.only_b]) / unit.n
        counts = rng.multinomial(unit.n, shares, draws)
        total += (counts[:, 0] - counts[:, 1]) / unit.n
    return total / len(units)


@dataclass(frozen=True)
class Overall:
    """A test of one mean over all targets: `p`, the smallest that so few targets allow, and the test in words."""

    p: float
    p_smallest: float
    test: str


def overall_test(target_means: Sequence[float]) -> Overall:
    """A two-sided sign-flip permutation test that the arms are alike on every target.

    target_means: one mean difference for each target; its rows and seeds are averaged before, for they share records
    and are not independent.

    If the arms were alike, each target's mean would as likely have come with the other sign. p is the share of all
    patterns of signs whose mean lies at least as far out as the one seen, so it speaks of targets like these, not of
    records: one more record on a target adds nothing here. With n targets no p is below 2 / 2**n (5 targets: .0625, so
    fewer than 6 can never show anything at .05); beyond 16 targets `SIGN_FLIPS` patterns are drawn, and none is below
    2 / (SIGN_FLIPS + 1).

    Source: Fisher, The Design of Experiments (1935), section 21.
    """
    means = np.asarray(target_means, float)
    n = len(means)
    exact = 2**n <= SIGN_FLIPS
    if n == 1:
        return Overall(1.0, 1.0, "exact sign flips of 1 target")
    p = permutation_test(
        (means,), np.mean, permutation_type="samples", n_resamples=SIGN_FLIPS, vectorized=True, batch=4096,
        rng=np.random.default_rng(0),
    ).pvalue  # fmt: skip
    words = f"exact sign flips of {n} targets" if exact else f"{SIGN_FLIPS} drawn sign flips of {n} targets"
    return Overall(float(p), 2 / 2**n if exact else 2 / (SIGN_FLIPS + 1), words)


def mean_difference(units: Sequence[Unit]) -> float:
    """Mean of a - b: rows averaged within a target and seed, seeds within a target, targets alike."""
    return float(np.mean(list(target_means(units).values())))


def target_means(units: Sequence[Unit]) -> dict[str, float]:
    """Target -> mean of a - b: rows averaged within a seed, then seeds."""
    return {target: _target_mean(group) for target, group in grouped(units, lambda u: u.target).items()}


def _target_mean(units: Sequence[Unit]) -> float:
    return float(np.mean([np.mean([_diff(u) for u in rows]) for rows in grouped(units, lambda u: u.seed).values()]))


def _diff(unit: Unit) -> float:
    return (unit.only_a - unit.only_b) / unit.n


def grouped(items: Sequence, key: Callable) -> dict:
    """Key -> its items in their order; keys sorted."""
    groups = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return dict(sorted(groups.items()))
