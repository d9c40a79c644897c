"""`summarise` on grids made by hand."""

import csv
import dataclasses
import json

import numpy as np
import pytest

from medcg_jax.config import RunConfig, replace
from medcg_jax.eval.predictions import wilson
from medcg_jax.study.stats import stats
from medcg_jax.study.stats.grid_files import read_results
from medcg_jax.study.stats.paired import detectable, flipped, mcnemar
from medcg_jax.study.stats.results import CELLS_HEADER
from medcg_jax.untrusted import FileError


def write_grid(folder, answers, source="phantom", related=lambda key: f"{key[2]} of {key[4]}", groups=()):
    """answers: (table, row, arm, seed, target) -> string of 1 (right) and 0, one per record. related: of a key, its
    training subsets. groups: patient of each record; "": unknown."""
    (folder / "predictions").mkdir(parents=True)
    config = dataclasses.asdict(replace(RunConfig(), data__source=source))
    recorded = {"config": config, "versions": {}, "data": {}, "cells": len(answers)}
    (folder / "config.json").write_text(json.dumps(recorded))
    rows, cells = [], []
    for i, ((table, row, arm, seed, target), marks) in enumerate(answers.items()):
        with open(folder / "predictions" / f"c{i}.jsonl", "w") as file:
            for k, mark in enumerate(marks):
                line = {
                    "id": f"{target}/test/{k}", "subset": target, "options": ["yes", "no"], "answer": "A",
                    "predicted": "BA"[int(mark)], "logprobs": [-1.5 + int(mark), -1.0], "generated": None,
                }  # fmt: skip
                line |= {"group": groups[k]} if groups and groups[k] else {}
                file.write(json.dumps(line) + "\n")
        n, correct = len(marks), marks.count("1")
        low, high = wilson(correct, n)
        rows.append([f"c{i}", table, row, arm, seed, target, n, correct, correct / n, low, high])
        subsets = "" if arm == "baseline" else related((table, row, arm, seed, target))
        cells.append([f"c{i}", table, row, arm, seed, subsets, target, 10 if subsets else 0, "done", 1.5])
    with open(folder / "cells.csv", "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([CELLS_HEADER, *cells])
    with open(folder / "results.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["cell", "table", "row", "arm", "seed", "target", "n", "correct", "accuracy", "ci_low", "ci_high"]
        )
        writer.writerows(rows)
    return folder


def test_summarise(tmp_path):
    answers = {}
    for seed in (0, 1):
        for target, (base, plus, trained) in {"x": ("0101", "0100", "1111"), "y": ("0011", "0011", "0011")}.items():
            for arm, marks in (("baseline", base), ("baseline_plus", plus), ("trained", trained)):
                answers["pairs", f"fixed_area/{target}", arm, seed, target] = marks * 10
    for arm, marks in (
        ("all_related", "1111"),
        ("random_removal_task", "1110"),
        ("wo_task", "1000"),
        ("same_task", "1100"),
    ):
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
    assert plus["p_overall"] == plus["p_overall_holm"] > 0.4  # one target of two differs
    assert (plus["p_smallest"], plus["test"]) == (None, "two-way t of 2 targets and 2 seeds")
    assert not (plus["up"] or plus["down"] or plus["equivalent"])
    assert (plus["n"], plus["trainings"]) == (160, 8)
    row = next(r for r in found["rows"] if (r["row"], r["against"]) == ("fixed_area/x", "baseline_plus"))
    assert (row["n"], row["only_a"], row["only_b"], row["seeds"]) == (80, 60, 0, [0, 1])
    assert row["p"] == pytest.approx(2 * 0.5**60) and row["p_holm"] == pytest.approx(2 * row["p"])
    assert row["ci_low"] < row["difference"] < row["ci_high"]
    assert row["detectable"] == detectable(80, 60 / 80)
    same = next(r for r in found["rows"] if (r["row"], r["against"]) == ("fixed_area/y", "baseline_plus"))
    assert same["detectable"] is None and (same["sd_seeds"], same["sd_records"]) == (0.0, 0.0)
    assert (same["ci_low"], same["ci_high"]) == (-wilson(0, 80)[1], wilson(0, 80)[1])
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
    (verdict, of_part) = found["verdicts"]
    assert (verdict["verdict"], verdict["part"], of_part["part"]) == ("not shown", "", "fixed_area")
    assert (verdict["n"], verdict["trainings"], verdict["targets"], verdict["seeds"]) == (160, 8, 2, 2)
    assert verdict["missing"] == {"single_1": 4, "single_2": 4, "filler_1": 4, "filler_2": 4}
    json.dumps(found, allow_nan=False)


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


def four_arms(rows, marks):
    """Answers of `rows` of target x at one seed: trained and baseline_plus with these marks."""
    return {
        ("pairs", row, arm, 0, "x"): mark
        for row in rows
        for arm, mark in zip(("trained", "baseline_plus"), marks, strict=True)
    }


def test_a_question_of_several_rows_and_a_training_of_several_cells_count_once(tmp_path):
    answers = four_arms(("fixed_area/x", "fixed_task/x", "modality_area/x"), ("1" * 30, "01" * 15))
    same = stats.summarise(write_grid(tmp_path / "same", answers))
    accuracy = next(a for a in same["accuracy"] if (a["part"], a["arm"]) == ("", "trained"))
    effect = same["effects"][0]
    assert (accuracy["n"], effect["n"], effect["trainings"]) == (30, 30, 2)
    # One comparison, asked three times: one win, and nothing to adjust.
    assert [effect[key] for key in ("rows", "wins", "losses", "significant")] == [1, 1, 0, 1]
    assert [row["p_holm"] for row in same["rows"]] == [row["p"] for row in same["rows"]]
    apart = stats.summarise(write_grid(tmp_path / "apart", answers, related=lambda key: f"{key[2]} of {key[1]}"))
    assert [apart["effects"][0][key] for key in ("trainings", "rows", "wins", "significant")] == [6, 3, 3, 3]
    assert [row["p_holm"] for row in apart["rows"]] == pytest.approx([3 * row["p"] for row in apart["rows"]])
    swapped = stats.summarise(
        write_grid(tmp_path / "swapped", answers, related=lambda key: "b+a" if key[1] == "fixed_task/x" else "a+b")
    )
    assert swapped["effects"][0]["trainings"] == 1, "the order of subsets is no other training"


def test_rows_are_tested_for_these_models_and_for_the_recipe(tmp_path):
    """Each seed is sure of its own models; together they are three draws that differ."""
    answers = {}
    for seed, mark in enumerate(("1111", "1110", "0000")):
        answers["pairs", "fixed_area/x", "trained", seed, "x"] = mark * 50
        answers["pairs", "fixed_area/x", "baseline", seed, "x"] = "0" * 200
    row = stats.summarise(write_grid(tmp_path / "w", answers))["rows"][0]
    assert row["p"] < 1e-80 and 0.1 < row["p_recipe"] < 0.5
    one = {key: mark for key, mark in answers.items() if key[3] == 0}
    assert stats.summarise(write_grid(tmp_path / "one", one))["rows"][0]["p_recipe"] is None


@pytest.mark.parametrize("source", ["phantom", "release"])
def test_patients_are_the_draws_where_they_are_known(tmp_path, source):
    marks, groups = ("11111" * 5 + "00000", "00000" * 5 + "11111"), [f"p{i // 5}" for i in range(30)]
    answers = four_arms(("fixed_area/x",), marks)
    known, unknown = (
        stats.summarise(write_grid(tmp_path / name, answers, source, groups=g))["rows"][0]
        for name, g in (("known", groups), ("unknown", [""] * 30))
    )
    assert (known["patients"], unknown["patients"], known["n"]) == (6, None, 30)
    assert known["p"] == flipped([5] * 5 + [-5]) and unknown["p"] == mcnemar(25, 5)
    assert known["ci_high"] - known["ci_low"] > 1.5 * (unknown["ci_high"] - unknown["ci_low"])
    # With a second seed of the same records, or of others.
    answers |= {(*key[:3], 1, key[4]): mark for key, mark in answers.items()}
    row = stats.summarise(write_grid(tmp_path / "two", answers, source, groups=groups))["rows"][0]
    assert (row["patients"], row["n"]) == ((12, 60) if source == "phantom" else (6, 30))


def test_a_planned_cell_without_answers_is_a_missing_arm(tmp_path):
    rng, answers = np.random.default_rng(0), {}
    points = {"trained": 0.9, "baseline_plus": 0.4, "single_1": 0.5, "single_2": 0.5, "filler_1": 0.4, "filler_2": 0.4}
    for target in "stuvwx":
        for seed in (0, 1, 2):
            for arm, share in points.items():
                marks = rng.permutation(np.arange(100) < 100 * share + rng.normal(0, 1)).astype(int)
                answers["pairs", f"fixed_area/{target}", arm, seed, target] = "".join(map(str, marks))
    workdir = write_grid(tmp_path / "w", answers)
    assert [line["verdict"] for line in stats.summarise(workdir)["verdicts"]] == ["composition"] * 2
    results = [r for r in read_results(workdir) if (r["arm"], r["target"], r["seed"]) != ("filler_2", "s", 1)]
    line = stats.summarise(workdir, results)["verdicts"][0]
    assert line["verdict"] == "a gain over unrelated data, cause not tested" and line["missing"] == {"filler_2": 1}


def test_arms_of_one_target_and_seed_answer_the_same_records(tmp_path):
    answers = four_arms(("fixed_area/x",), ("1111", "0101"))
    answers["pairs", "fixed_area/x", "single_1", 0, "x"] = "111"
    with pytest.raises(FileError, match='1 records of "x" are in one of them alone'):
        stats.summarise(write_grid(tmp_path / "w", answers))


def test_ceilings_are_of_what_a_training_shares_with_the_target():
    """By hand: 11/16 without modality or area (the best of four values); 1/2 without the task, or without images."""
    trainings = {
        "baseline": ("", 0.5),
        "trained": ("ct-brain-stage+ct-eye-state", 1.0),
        "single_1": ("ct-brain-stage", 0.5),
        "single_2": ("ct-eye-state", 0.6875),
        "all_related": ("oct-brain-state", 0.6875),
        "baseline_plus": ("oct-skin-grade", 0.5),
        "no_images": ("ct-brain-stage+ct-eye-state", 0.5),
        "efficiency_10": ("ct-brain-state+oct-skin-grade", 1.0),
    }
    cells = [
        {"cell": arm, "arm": arm, "related": related, "target": "ct-brain-state"}
        for arm, (related, _) in trainings.items()
    ]
    decoys = {"source": "phantom", "phantom_decoys": 1.0, "phantom_rule": "shared"}
    with_decoys = stats._ceilings(cells, decoys)
    assert {cell: value for (cell, _), value in with_decoys.items()} == {
        arm: value for arm, (_, value) in trainings.items()
    }
    without = stats._ceilings(cells, decoys | {"phantom_decoys": 0.0})
    assert (without["single_2", "ct-brain-state"], without["single_1", "ct-brain-state"]) == (1.0, 0.5)
    drawn = stats._ceilings(cells, decoys | {"phantom_rule": "drawn"})
    assert {cell for (cell, _), value in drawn.items() if value > 0.5} == {"efficiency_10"}
    assert stats._ceilings(cells, {"source": "release"}) == {}
