"""Intervals of an accuracy."""

from scipy.stats import norm


def wilson(correct: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of an accuracy, as fractions; (0, 1) where n is 0."""
    if n == 0:
        return 0.0, 1.0
    z = float(norm.ppf(0.5 + level / 2))
    p, z2 = correct / n, z * z
    middle, half = p + z2 / (2 * n), z * ((p * (1 - p) + z2 / (4 * n)) / n) ** 0.5
    low, high = (middle - half) / (1 + z2 / n), (middle + half) / (1 + z2 / n)
    return max(0.0, low if correct else 0.0), min(1.0, high if correct < n else 1.0)
