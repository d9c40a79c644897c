"""Intervals and tests against textbook values and brute force, and `summarise` on a hand-made grid."""

import csv
import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_1samp

from medcg_jax.config import RunConfig, replace
from medcg_jax.study.stats import paired, stats
from medcg_jax.study.stats.paired import detectable


def test_wilson():
    """Newcombe, Statistics in Medicine 17 (1998), table I, method 3."""
    printed = [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718)]
    for correct, n, *interval in printed:
        assert stats.wilson(correct, n) == pytest.approx(tuple(interval), abs=5e-5)
    assert stats.wilson(0, 0) == (0.0, 1.0)
    assert stats.wilson(50, 100, level=0.8)[0] > stats.wilson(50, 100)[0]


@settings(deadline=None)
@given(st.integers(1, 3000), st.data())
def test_wilson_is_the_formula(n, data):
    p, z2 = data.draw(st.integers(0, n)) / n, 1.959963984540054**2
    middle, half = p + z2 / (2 * n), (z2 * (p * (1 - p) + z2 / (4 * n)) / n) ** 0.5
    wanted = (max(0.0, (middle - half) / (1 + z2 / n)), min(1.0, (middle + half) / (1 + z2 / n)))
    assert stats.wilson(round(p * n), n) == pytest.approx(wanted, abs=1e-12)


@settings(deadline=None)
@given(st.integers(0, 12), st.integers(0, 12))
def test_mcnemar_is_the_exact_sign_test(b, c):
    n = b + c
    tail = sum(math.comb(n, k) for k in range(n + 1) if math.comb(n, k) <= math.comb(n, b)) / 2**n
    assert paired.mcnemar(b, c) == pytest.approx(tail)


def test_mcnemar():
    """Fay, help of `mcnemar.exact` in R's exact2x2: 9 and 2 discordant pairs."""
    assert paired.mcnemar(9, 2) == paired.mcnemar(2, 9) == pytest.approx(0.06543, abs=5e-6)
    assert paired.mcnemar(0, 0) == 1.0


def test_holm():
    """The example of the article "Holm-Bonferroni method" in Wikipedia, where .01 and .005 are rejected at .05."""
    assert paired.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert paired.holm([]) == []
    bonferroni = [4 * p for p in (0.01, 0.04, 0.03, 0.005)]
    assert paired.holm([0.01, 0.04, 0.03, 0.005]) != pytest.approx(bonferroni)


def test_overall_test():
    """Darwin's 15 pairs of maize in eighths of an inch: Fisher, The Design of Experiments, section 21: 1,726 of 32,768
    patterns of signs lie as far out."""
    differences = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
    found = paired.overall_test(differences)
    assert found.p == 1726 / 2**15
    assert found.p_smallest == 2 / 2**15 and found.test == "exact sign flips of 15 targets"
    # Fisher's t test of the same gives .0497: the control that this is another test.
    assert ttest_1samp(differences, 0).pvalue == pytest.approx(0.0497, abs=5e-5)


@pytest.mark.parametrize("targets", [1, 2, 5, 8])
def test_the_smallest_p_is_reached_and_only_by_one_sign(targets):
    means = np.linspace(0.2, 0.4, targets)
    found = paired.overall_test(means)
    assert found.p == found.p_smallest == min(1, 2 / 2**targets)
    if targets > 1:
        assert paired.overall_test(means * [-1, *[1] * (targets - 1)]).p > found.p


def test_many_targets_are_drawn():
    found = paired.overall_test(np.linspace(0.2, 0.4, 25))
    assert found.p == found.p_smallest == 2 / (paired.SIGN_FLIPS + 1)
    assert found.test == "65536 drawn sign flips of 25 targets"
    alike = np.random.default_rng(0).standard_normal(25)
    assert paired.overall_test(alike - alike.mean()).p > 0.95


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
    config = dataclasses.asdict(replace(RunConfig(), data__source=source))
    (folder / "config.json").write_text(json.dumps({"config": config, "versions": {}, "data": {}}))
    rows = []
    for i, ((table, row, arm, seed, target), marks) in enumerate(answers.items()):
        with open(folder / "predictions" / f"c{i}.jsonl", "w") as file:
            for k, mark in enumerate(marks):
                line = {
                    "id": f"{target}/test/{k}", "subset": target, "options": ["yes", "no"], "answer": "A",
                    "predicted": "BA"[int(mark)], "logprobs": [-1.5 + int(mark), -1.0], "generated": None,
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
    assert plus["p_overall"] == plus["p_overall_holm"] == 1.0  # one target of two differs, and one seed adds nothing
    assert (plus["p_smallest"], plus["test"]) == (0.5, "exact sign flips of 2 targets")
    row = next(r for r in found["rows"] if (r["row"], r["against"]) == ("fixed_area/x", "baseline_plus"))
    assert (row["n"], row["only_a"], row["only_b"], row["seeds"]) == (80, 60, 0, [0, 1])
    assert row["p"] == pytest.approx(2 * 0.5**60) and row["p_holm"] == pytest.approx(2 * row["p"])
    assert row["ci_low"] < row["difference"] < row["ci_high"]
    assert row["detectable"] == detectable(80, 60 / 80)
    same = next(r for r in found["rows"] if (r["row"], r["against"]) == ("fixed_area/y", "baseline_plus"))
    assert same["detectable"] is None and (same["sd_seeds"], same["sd_records"]) == (0.0, 0.0)
    assert (same["ci_low"], same["ci_high"]) == (-stats.wilson(0, 80)[1], stats.wilson(0, 80)[1])
    assert next(r for r in found["rows"] if r["table"] == "ablation")["sd_seeds"] is None
    letters = {(c["table"], c["arm"]): c["letters"] for c in found["controls_of_answers"]}
    assert letters["pairs", "trained"] == {"A": 0.75, "B": 0.25} and ("efficiency", "efficiency_0") not in letters
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


def test_parts_are_tested_apart_and_corrected_together(tmp_path):
    answers = {}
    for part, wins in (("fixed_area", "111111"), ("fixed_task", "110111")):
        for i, won in enumerate(wins):
            for arm, mark in (("trained", won), ("baseline", str(1 - int(won)))):
                answers["pairs", f"{part}/t{i}", arm, 0, f"t{i}"] = mark * 5 + "01"
    effects = stats.summarise(write_grid(tmp_path, answers))["effects"]
    p = {e["part"]: (e["p_overall"], e["p_overall_holm"], e["p_smallest"]) for e in effects}
    assert p["fixed_area"] == (2 / 2**6, 2 * 2 / 2**6, 2 / 2**6)
    assert p["fixed_task"][0] == p["fixed_task"][1] == 14 / 2**6
    # Both rows of a target are one number: t2 is won and lost, 0 in all, and its sign does not matter.
    assert p[""] == (4 / 2**6, 4 / 2**6, 2 / 2**6)


def test_seeds_that_differ_widen_a_row(tmp_path):
    alike, apart = ("1110", "1110", "1110"), ("1111", "1110", "1000")
    rows = {}
    for name, marks in (("alike", alike), ("apart", apart)):
        answers = {}
        for seed, mark in enumerate(marks):
            answers["pairs", "fixed_area/x", "trained", seed, "x"] = mark * 50
            answers["pairs", "fixed_area/x", "baseline", seed, "x"] = "0" * 200
        rows[name] = stats.summarise(write_grid(tmp_path / name, answers))["rows"][0]
    width = {name: row["ci_high"] - row["ci_low"] for name, row in rows.items()}
    assert width["apart"] > 10 * width["alike"]
    assert rows["alike"]["sd_seeds"] == 0 < 0.3 < rows["apart"]["sd_seeds"]


def test_the_same_records_at_more_seeds_are_no_more_records(tmp_path):
    answers = {}
    for seed in range(4):
        answers["pairs", "fixed_area/x", "trained", seed, "x"] = "1101" * 50
        answers["pairs", "fixed_area/x", "baseline", seed, "x"] = "0100" * 50
    rows = {s: stats.summarise(write_grid(tmp_path / s, answers, s))["rows"][0] for s in ("phantom", "release")}
    width = {source: row["ci_high"] - row["ci_low"] for source, row in rows.items()}
    assert width["release"] == pytest.approx(2 * width["phantom"], rel=0.02)
