"""Intervals of an accuracy."""

import functools

from statsmodels.stats.proportion import proportion_confint


# A report asks for the same few counts thousands of times.
@functools.lru_cache(1 << 14)
def wilson(correct: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of an accuracy, as fractions; (0, 1) where n is 0."""
    return proportion_confint(correct, n, alpha=1 - level, method="wilson") if n else (0.0, 1.0)
