"""`benchmarks.coverage` with few grids: its bounds hold, and are broken by the intervals that they were made against."""

import pytest

from benchmarks.coverage import broken_bounds, measure, summarised
from medcg_jax.study.stats import paired
from medcg_jax.study.stats.verdict import COMPOSITION, NO_CAUSE, NOT_SHOWN, TRANSFER


@pytest.mark.parametrize("seed_points", [0, 6])
def test_the_bounds_hold_with_few_grids(seed_points):
    row = measure((3, 3, 1), seed_points, 40, ("nothing", "transfer", "sum of two gains"))
    assert broken_bounds([row], [], slack=0.05) == []
    assert row["covered"] > 0.9 and set(row["verdicts"]) == {"nothing", "transfer", "sum of two gains"}


def test_one_seed_is_never_a_gain():
    row = measure((6, 1, 2), 6, 20, ("nothing", "composition"))
    assert row["verdicts"] == {"nothing": {NOT_SHOWN: 1.0}, "composition": {NOT_SHOWN: 1.0}}
    assert row["covered"] < 0.93 and broken_bounds([row], []) == [], "its interval is of these models alone"


def test_composition_is_found_without_a_seed_effect():
    row = measure((8, 3, 2), 0, 10, ("composition",))
    assert row["verdicts"]["composition"].get(COMPOSITION, 0) >= 0.6


def test_intervals_over_targets_alone_break_the_bounds(monkeypatch):
    """As `estimate` would be without seeds: eight targets that share a seed's effect are taken for eight draws."""
    both = paired._errors
    monkeypatch.setattr(paired, "_errors", lambda values, df: both(values, df)[:1])
    row = measure((8, 3, 1), 6, 30, ("nothing",))
    assert row["covered"] < 0.85 and any("covered" in words for words in broken_bounds([row], []))
    assert any("above 0.05" in words for words in broken_bounds([row], []))


def test_whole_grids_by_summarise():
    found = summarised("transfer", 3, (6, 3, 1), 30)
    assert found["grids"] == 3 and sum(found["verdicts"].values()) == 3
    assert sum(found["verdicts"].get(kind, 0) for kind in (TRANSFER, NO_CAUSE)) >= 2
    assert broken_bounds([], [found | {"verdicts": {COMPOSITION: 1}}]) == ["transfer: composition in 1 of 3 grids"]
