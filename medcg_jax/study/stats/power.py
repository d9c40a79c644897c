"""Power: what difference between two arms so many records can show.

Two-sided test of paired differences of answers (McNemar's, by the normal approximation). Source: Connor, Sample size
for testing differences in proportions for the paired-sample design, Biometrics 43 (1987), page 209.
"""

import functools
import math
from collections.abc import Sequence

from scipy.optimize import brentq
from statsmodels.stats.power import normal_power_het, normal_sample_size_one_tail

from medcg_jax.study.design import mat

POWER = 0.8
LEVEL = 0.05


@functools.lru_cache(1 << 12)
def detectable(n: int, discordant: float, power: float = POWER, level: float = LEVEL) -> float | None:
    """The smallest true difference of two accuracies that n records show with that power.

    discordant: share in [0, 1] of the records that just one of the two arms answers rightly; the difference cannot be
    larger. None where no records are discordant, and where not even all of them on one side would show.
    """
    if n < 1 or discordant <= 0:
        return None

    def beyond(difference: float) -> float:
        return normal_power_het(difference, n, level, *_deviations(difference, discordant)) - power

    return float(brentq(beyond, 0.0, discordant)) if beyond(discordant) >= 0 else None


def records_for(difference: float, discordant: float, power: float = POWER, level: float = LEVEL) -> int:
    """How many records show a true difference with that power.

    Raises:
      ValueError: a difference that is 0, or that the discordant share does not allow.
    """
    if not 0 < abs(difference) <= discordant <= 1:
        raise ValueError(f"difference {difference}, discordant {discordant}; 0 < |difference| <= discordant <= 1")
    deviations = _deviations(difference, discordant)
    return math.ceil(normal_sample_size_one_tail(abs(difference), power, level / 2, *deviations))


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
    return {
        "table": 3, "against": against, "rows": len(rows), "wins": len(wins),
        "below": {n: sum(not _shows(n, *win) for win in wins) for n in sizes},
    }  # fmt: skip


def _shows(n: int, difference: float, discordant: float) -> bool:
    least = detectable(n, discordant)
    return least is not None and difference >= least
