"""Published examples of the tests on paired answers, and the controls of a cell's answers by hand."""

import json

import numpy as np
import pytest

from medcg_jax.eval.intervals import wilson
from medcg_jax.study.controls import controls_of_answers
from medcg_jax.study.paired import holm, mcnemar, overall_test

# Differences in height of 15 pairs of maize plants, crossed less self-fertilised, in eighths of an inch: Darwin's, in
# Fisher, The Design of Experiments (1935), section 17; his section 21 counts 863 of 32,768 patterns on one side.
DARWIN = (49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48)


def test_overall_is_fishers_own_example():
    found = overall_test(DARWIN)
    assert found.p == pytest.approx(2 * 863 / 2**15, abs=1e-12)
    assert found.p_smallest == 2 / 2**15 and found.test == "exact sign flips of 15 targets"
    assert overall_test([abs(x) for x in DARWIN]).p == pytest.approx(found.p_smallest)
    assert overall_test(-np.array(DARWIN)).p == pytest.approx(found.p)


def test_overall_with_few_targets_can_show_little():
    assert overall_test([0.3, 0.2, 0.25, 0.4, 0.3]).p == pytest.approx(1 / 16) == overall_test([0.1] * 5).p_smallest
    assert overall_test([0.9]).p == 1.0
    assert overall_test(np.random.default_rng(0).normal(0.5, 1, 24)).p_smallest == pytest.approx(2 / (2**16 + 1))


def test_overall_is_uniform_where_nothing_is_to_be_found():
    rng = np.random.default_rng(1)
    below = [overall_test(rng.standard_normal(8)).p < 0.05 for _ in range(300)]
    assert 0.02 < np.mean(below) < 0.09


def test_mcnemar_is_the_published_one():
    # Approval ratings, Agresti, Categorical Data Analysis (2nd ed., 2002), table 10.1: 150 and 86 changed their minds;
    # the exact p as printed in the documentation of R's exact2x2.
    assert mcnemar(150, 86) == pytest.approx(3.716e-05, rel=1e-3)
    assert mcnemar(86, 150) == mcnemar(150, 86) and mcnemar(0, 0) == 1.0


def test_wilson_is_the_published_one():
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    for (correct, n), expected in {
        (81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0.0, 0.1611), (1, 29): (0.0061, 0.1718),
    }.items():  # fmt: skip
        assert wilson(correct, n) == pytest.approx(expected, abs=5e-5)


def test_holm_is_the_published_one():
    # Wright, Biometrics 48 (1992), on Holm's procedure; the example of four that encyclopedias print.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


# ------------------------------------------------------------------ controls


def write(folder, name, lines):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def line(i, answer, predicted, logprobs, generated=None, **more):
    options = ["a", "b", "c", "d"][: len(logprobs)]
    return {"id": f"r{i}", "subset": "x", "options": options, "answer": answer, "predicted": predicted,
            "logprobs": logprobs, "generated": generated} | more  # fmt: skip


RESULTS = [{"cell": "c", "table": "pairs", "arm": "trained", "target": "x", "seed": 0}]


def test_a_liking_for_a_letter_is_taken_out(tmp_path):
    # Always A, and yet the other letter is likelier where it is right: the prior is all that is wrong.
    lines = [line(i, "AB"[i % 2], "A", [-0.1, -2.0 if i % 2 else -3.0]) for i in range(10)]
    write(tmp_path, "predictions/c.jsonl", lines)
    (found,) = controls_of_answers(tmp_path, RESULTS, True)
    assert (found["accuracy"], found["most_frequent"], found["most_frequent_accuracy"]) == (0.5, "A", 0.5)
    assert found["prior_corrected_accuracy"] == 1.0 and found["letters"] == {"A": 1.0}


def test_numbers_of_options_and_generation(tmp_path):
    two = [line(i, "A", "A", [-0.1, -2.0], "A") for i in range(6)]
    four = [line(i, "B", "AB"[i % 2], [-1.0] * 4, "B" if i == 7 else "yes") for i in range(6, 12)]
    write(tmp_path, "predictions/c.jsonl", two + four)
    (found,) = controls_of_answers(tmp_path, RESULTS, True)
    by_options = [(o["options"], o["n"], o["accuracy"], o["chance"]) for o in found["by_options"]]
    assert by_options == [(2, 6, 1.0, 0.5), (4, 6, 0.5, 0.25)]
    generation = found["generation"]
    assert (generation["likelihood"], generation["generated"]) == (0.75, pytest.approx(7 / 12))
    assert (generation["only_likelihood"], generation["only_generated"], generation["p"]) == (2, 0, 0.5)
    assert found["circular"] is found["two_options"] is found["shuffled_images"] is None


def test_tests_asked_again(tmp_path):
    plain = [line(i, "A", "AAAB"[i % 4], [-1.0, -1.1, -1.2]) for i in range(8)]
    shifts = [
        line(i, "BC"[n - 1], "BC"[n - 1] if i % 2 or n == 1 else "A", [-1.0] * 3, control=f"shift_{n}")
        for i in range(8)
        for n in (1, 2)
    ]
    two = [line(i, "B", "B", [-1.0] * 2, control="two_options") for i in range(8)]
    other = [line(i, "A", "ABC"[i % 3], [-1.0] * 3, control="shuffled_images") for i in range(8)]
    write(tmp_path, "predictions/c.jsonl", plain)
    write(tmp_path, "controls/c.jsonl", shifts + two + other)
    (found,) = controls_of_answers(tmp_path, RESULTS, True)
    assert found["circular"] == {"n": 8, "plain": 0.75, "accuracy": 0.25, "by_shift": {"1": 1.0, "2": 0.5}}
    assert found["two_options"] == {"n": 8, "plain": 0.75, "accuracy": 1.0}
    shuffled = found["shuffled_images"]
    assert (shuffled["accuracy"], shuffled["chance"], shuffled["at_chance"]) == (0.375, pytest.approx(1 / 3), True)
    # A model that still answers rightly is not at chance.
    write(tmp_path, "controls/c.jsonl", [x | {"predicted": x["answer"]} for x in other * 1])
    assert not controls_of_answers(tmp_path, RESULTS, True)[0]["shuffled_images"]["at_chance"]


def test_controls_that_do_not_fit_are_refused(tmp_path):
    write(tmp_path, "predictions/c.jsonl", [line(0, "A", "A", [-1.0] * 3)])
    for wrong, message in (
        (line(1, "A", "A", [-1.0] * 3, control="shift_1"), "record r1 of x: not among the predictions"),
        (line(0, "A", "A", [-1.0] * 3, control="shift_3"), "control 'shift_3'"),
        (line(0, "B", "B", [-1.0] * 3, control="shift_1"), "no shift_2; all shifts or none"),
    ):
        write(tmp_path, "controls/c.jsonl", [wrong])
        with pytest.raises(ValueError, match=message):
            controls_of_answers(tmp_path, RESULTS, True)
