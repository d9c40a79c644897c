"""Intervals and tests against textbook values and brute force, and `summarise` on a hand-made grid."""

import csv
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medcg_jax.study import stats


def test_wilson_against_statsmodels():
    from statsmodels.stats.proportion import proportion_confint

    for n in (1, 7, 300):
        for k in {0, 1, n // 2, n}:
            assert stats.wilson(k, n) == pytest.approx(proportion_confint(k, n, method="wilson"), abs=1e-12)
    assert stats.wilson(0, 0) == (0.0, 1.0)


@given(st.integers(0, 12), st.integers(0, 12))
def test_mcnemar_is_the_exact_sign_test(b, c):
    n = b + c
    tail = sum(math.comb(n, k) for k in range(n + 1) if math.comb(n, k) <= math.comb(n, b)) / 2**n
    assert stats.mcnemar(b, c) == pytest.approx(tail)


def test_holm():
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([]) == []


def test_compare():
    a = dict(zip("abcdef", [True, True, True, True, False, False], strict=True))
    b = dict(zip("abcdef", [True, False, False, False, True, False], strict=True))
    c = stats.compare(a, b)
    assert (c.n, c.only_a, c.only_b, c.difference) == (6, 3, 1, pytest.approx(1 / 3))
    assert c.p == pytest.approx(10 / 16)
    with pytest.raises(ValueError, match="not asked the same records"):
        stats.compare(a, {"a": True})


def units(effect, targets=8, seeds=3, n=300, spread=0.0, rng=None):
    rng = rng or np.random.default_rng(1)
    made = []
    for t in range(targets):
        centre = effect + spread * rng.standard_normal()
        for s in range(seeds):
            up = int(np.clip(n * (0.3 + centre / 2), 0, n / 2))
            down = int(np.clip(n * (0.3 - centre / 2), 0, n / 2))
            made.append(stats.Unit(f"t{t}", s, n, rng.binomial(n, up / n), rng.binomial(n, down / n)))
    return made


def test_bootstrap_interval_holds_the_mean_and_widens():
    narrow, wide = units(0.2), units(0.2, spread=0.2)
    for made in (narrow, wide):
        low, high = stats.bootstrap_interval(made)
        assert low < stats.mean_difference(made) < high
        assert stats.bootstrap_interval(made) == (low, high)  # the same draws each time
    width = [high - low for low, high in (stats.bootstrap_interval(m) for m in (narrow, wide))]
    assert width[1] > 2 * width[0]


def test_bootstrap_interval_covers():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(60):
        low, high = stats.bootstrap_interval(units(0.1, targets=10, spread=0.1, rng=rng), draws=400)
        inside += low <= 0.1 <= high
    assert inside >= 50


def test_one_target_and_seed_has_the_records_interval():
    low, high = stats.bootstrap_interval([stats.Unit("t", 0, 200, 60, 20)])
    assert low == pytest.approx(0.2 - 1.96 * math.sqrt((80 - 40**2 / 200) / 200**2), abs=0.02)
    assert high < 0.32


def test_mean_difference_weighs_targets_alike():
    rows = [("a", 0, 10, 5, 0), ("a", 0, 10, 5, 0), ("a", 1, 10, 1, 0), ("b", 0, 10, 0, 1)]
    made = [stats.Unit(*row) for row in rows]
    assert stats.mean_difference(made) == pytest.approx(((0.5 + 0.1) / 2 - 0.1) / 2)


# ------------------------------------------------------------------ a grid by hand


def write_grid(folder, answers, source="phantom"):
    """answers: (table, row, arm, seed, target) -> string of 1 (right) and 0, one per record."""
    (folder / "predictions").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"config": {"data": {"source": source}}}))
    rows = []
    for i, ((table, row, arm, seed, target), marks) in enumerate(answers.items()):
        with open(folder / "predictions" / f"c{i}.jsonl", "w") as file:
            for k, mark in enumerate(marks):
                line = {
                    "id": f"{target}/test/{k}", "subset": target, "options": ["yes", "no"], "answer": "A",
                    "predicted": "BA"[int(mark)], "logprobs": [-1.0, -1.5][:: 1 if mark == "1" else -1], "generated": None,
                }  # fmt: skip
                file.write(json.dumps(line) + "\n")
        n, correct = len(marks), marks.count("1")
        low, high = stats.wilson(correct, n)
        rows.append([f"c{i}", table, row, arm, seed, target, n, correct, correct / n, low, high])
    with open(folder / "results.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow("cell,table,row,arm,seed,target,n,correct,accuracy,ci_low,ci_high".split(","))
        writer.writerows(rows)
    return folder


def test_summarise(tmp_path):
    answers = {}
    for seed in (0, 1):
        for target, (base, plus, trained) in {"x": ("0101", "0100", "1111"), "y": ("0011", "0011", "0011")}.items():
            for arm, marks in (("baseline", base), ("baseline_plus", plus), ("trained", trained)):
                answers["pairs", f"fixed_area/{target}", arm, seed, target] = marks * 10
    for arm, marks in (("all_related", "1111"), ("random_removal", "1110"), ("wo_task", "1000"), ("same_task", "1100")):
        answers["ablation", "x", arm, 0, "x"] = marks * 10
    for count, marks in ((0, "0001"), (10, "0111")):
        answers["efficiency", "target_only/x", f"efficiency_{count}", 0, "x"] = marks * 10
    answers["multi_task", "in_distribution", "multi_task", 0, "x"] = "1110"
    answers["multi_task", "in_distribution", "single_task", 0, "x"] = "1100"
    answers["multi_task", "out_of_distribution", "multi_task", 0, "y"] = "1110"
    answers["multi_task", "out_of_distribution", "baseline", 0, "y"] = "1000"
    found = stats.summarise(write_grid(tmp_path / "w", answers))
    effect = {(e["table"], e["part"], e["arm"], e["against"]): e for e in found["effects"]}
    plus = effect["pairs", "", "trained", "baseline_plus"]
    assert plus["mean"] == pytest.approx(0.375)
    assert plus["by_target"] == pytest.approx({"x": 0.75, "y": 0.0})
    counts = [plus[key] for key in ("wins", "losses", "significant", "rows", "targets", "seeds")]
    assert counts == [1, 0, 1, 2, 2, 2]
    assert plus["ci_low"] <= 0 < plus["ci_high"]
    assert effect["pairs", "fixed_area", "trained", "baseline_plus"] == {**plus, "part": "fixed_area"}
    row = next(r for r in found["rows"] if (r["row"], r["against"]) == ("fixed_area/x", "baseline_plus"))
    assert (row["n"], row["only_a"], row["only_b"], row["seeds"]) == (80, 60, 0, [0, 1])
    assert row["p"] == pytest.approx(2 * 0.5**60) and row["p_holm"] == pytest.approx(2 * row["p"])
    assert found["controls"]["wo_task"]["mean"] == pytest.approx(0.5)
    assert found["controls"]["same_task"]["mean"] == pytest.approx(0.5)
    assert set(found["controls"]) == {"wo_task", "same_task"}
    curve = [(c["curve"], c["records"], c["accuracy"]) for c in found["curves"]]
    assert curve == [("target_only", 0, 0.25), ("target_only", 10, 0.75)]
    assert effect["multi_task", "in_distribution", "multi_task", "single_task"]["mean"] == pytest.approx(0.25)
    assert effect["multi_task", "out_of_distribution", "multi_task", "baseline"]["mean"] == pytest.approx(0.5)
    accuracy = {(a["table"], a["part"], a["arm"]): a for a in found["accuracy"]}
    assert accuracy["pairs", "fixed_area", "trained"]["accuracy"] == pytest.approx(0.75)
    assert accuracy["pairs", "", "trained"]["n"] == 160
    json.dumps(found)


@pytest.mark.parametrize(("source", "n", "only"), [("phantom", 12, (6, 3)), ("release", 4, (3, 1))])
def test_records_that_return_with_every_seed_count_once(tmp_path, source, n, only):
    # over the seeds a leads on records 0, 1 and 3, b on record 2
    marks = [("1101", "0010"), ("1100", "0010"), ("1010", "0110")]
    answers = {}
    for seed, (a, b) in enumerate(marks):
        answers["pairs", "fixed_area/x", "trained", seed, "x"] = a
        answers["pairs", "fixed_area/x", "baseline", seed, "x"] = b
    row = stats.summarise(write_grid(tmp_path, answers, source))["rows"][0]
    assert row["n"] == n
    assert (row["only_a"], row["only_b"]) == only
    assert row["accuracy_a"] == pytest.approx(7 / 12) and row["accuracy_b"] == pytest.approx(4 / 12)
