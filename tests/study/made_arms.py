"""Made-up answers of the arms that decide, for tests of verdicts and of their words."""

import itertools

import numpy as np

RECORDS = 200
# Arm -> accuracy in points: composition.
PAIR = {"trained": 80, "baseline_plus": 40, "single_1": 55, "single_2": 60, "filler_1": 45, "filler_2": 50}


def arms_of(points, targets=8, seeds=3, parts=("fixed_area",), noise=2.0, seed=0):
    """Answers with these accuracies (of all parts, or by part), and a normal spread of every cell in points."""
    rng = np.random.default_rng(seed)
    arms = {arm: {} for arm in points}
    for arm, part, target, s in itertools.product(points, parts, range(targets), range(seeds)):
        mean = points[arm][part] if isinstance(points[arm], dict) else points[arm]
        right = int(np.clip(round(RECORDS * (mean + noise * rng.standard_normal()) / 100), 0, RECORDS))
        arms[arm][f"{part}/t{target}", f"t{target}", s] = np.arange(RECORDS) < right
    return arms


def without(points, *names):
    return {arm: value for arm, value in points.items() if arm not in names}
