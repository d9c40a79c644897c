"""Controls of the answers: by hand, with planted habits, and with files that do not fit."""

import json
import math
import random

import pandas as pd
import pytest

from medcg_jax.study.stats import controls
from medcg_jax.study.stats.answers import Answers

LETTERS = "ABCD"


def answer(i, right, predicted, options=2, *, cell="c", control="", read=None, logprobs=None):
    logprobs = logprobs or [-0.5 if letter == predicted else -2.0 for letter in LETTERS[:options]]
    record = {"cell": cell, "control": control, "seed": 0, "subset": "x", "id": str(i)}
    answered = {"options": options, "answer": right, "predicted": predicted, "right": right == predicted, "read": read}
    return record | answered | dict(zip(LETTERS, logprobs, strict=False))


def controls_of_arm(answers):
    return controls.controls_of_arm(
        pd.DataFrame(answers).astype({"read": object}).replace({"read": {float("nan"): None}})
    )


def controls_of_answers(folder, results, fresh):
    return controls.controls_of_answers(Answers(folder), results, fresh)


def test_letters_and_numbers_of_options():
    answers = [answer(0, "A", "A"), answer(1, "B", "A"), answer(2, "A", "A"), answer(3, "D", "C", 4)]
    found = controls_of_arm(answers)
    assert found["letters"] == {"A": 0.75, "C": 0.25}
    assert (found["most_frequent"], found["most_frequent_accuracy"]) == ("A", 0.5)
    assert (found["n"], found["records"], found["accuracy"]) == (4, 4, 0.5)
    assert found["by_options"] == [
        {"options": 2, "n": 3, "accuracy": pytest.approx(2 / 3), "chance": 0.5},
        {"options": 4, "n": 1, "accuracy": 0.0, "chance": 0.25},
    ]
    assert [found[key] for key in ("generation", "circular", "two_options", "shuffled_images")] == [None] * 4


def test_a_planted_liking_for_a_letter_is_taken_out():
    draw = random.Random(0)
    fair, liking = [], []
    for i in range(400):
        right = draw.choice("AB")
        known = 1.0 if draw.random() < 0.9 else -1.0
        scores = {letter: known if letter == right else -known for letter in "AB"}
        for found, bias in ((fair, 0.0), (liking, 4.0)):
            # What the letters have together differs by record, and means nothing.
            mass = 5 * draw.random()
            logprobs = [scores["A"] + bias - mass, scores["B"] - mass]
            found.append(answer(i, right, LETTERS[logprobs.index(max(logprobs))], logprobs=logprobs))
    plain = controls_of_arm(fair)
    assert plain["prior_corrected_accuracy"] == pytest.approx(plain["accuracy"])
    found = controls_of_arm(liking)
    assert found["letters"] == {"A": 1.0} and found["accuracy"] == found["most_frequent_accuracy"] < 0.6
    assert found["prior_corrected_accuracy"] == pytest.approx(plain["accuracy"])
    assert plain["accuracy"] > 0.85


def test_the_prior_is_of_questions_with_as_many_options():
    two = [answer(i, "A", "A", logprobs=[math.log(0.6), math.log(0.4)]) for i in range(3)]
    four = [answer(i, "B", "A", 4, logprobs=[math.log(x) for x in (0.7, 0.1, 0.1, 0.1)]) for i in range(3, 6)]
    odd = answer(9, "B", "A", 4, logprobs=[math.log(x) for x in (0.6, 0.2, 0.1, 0.1)])
    assert controls.prior_corrected(pd.DataFrame([*two, *four, odd])) == [True] * 3 + [False] * 3 + [True]


def test_likelihood_against_generation():
    answers = [
        *[answer(i, "A", "A", read="") for i in range(5)],
        *[answer(i, "A", "A", read="A") for i in range(5, 8)],
        answer(8, "B", "A", read="B"),
    ]
    found = controls_of_arm([*answers, answer(9, "A", "B")])["generation"]
    assert found == {
        "n": 9, "likelihood": 8 / 9, "generated": 4 / 9, "agreement": 3 / 9, "only_likelihood": 5, "only_generated": 1,
        "p": pytest.approx(2 * (1 + 6) / 2**6),
    }  # fmt: skip
    # The same records in another cell: each still counts once.
    twice = [*answers, *(a | {"cell": "d"} for a in answers)]
    assert controls_of_arm(twice)["generation"]["p"] == found["p"]


def test_shuffled_images():
    plain = [answer(i, "A", "A") for i in range(400)]
    chance = [answer(i, "A", "AB"[i % 2], control="shuffled_images") for i in range(400)]
    found = controls_of_arm([*plain, *chance])
    assert found["accuracy"] == 1.0
    assert found["shuffled_images"]["at_chance"] and found["shuffled_images"]["chance"] == 0.5
    # Planted: an arm that answers without the image.
    leak = [answer(i, "A", "AAB"[i % 3], control="shuffled_images") for i in range(400)]
    shuffled = controls_of_arm([*plain, *leak])["shuffled_images"]
    assert not shuffled["at_chance"] and shuffled["ci_low"] > 0.5
    # Asked of ten cells, 400 records are still 400 records.
    many = [answer(i, "A", "AB"[i % 2], cell=str(c), control="shuffled_images") for i in range(400) for c in range(10)]
    again = controls_of_arm([*plain, *many])["shuffled_images"]
    assert (again["n"], again["ci_low"]) == (4000, found["shuffled_images"]["ci_low"])


# ------------------------------------------------------------------ from files


def write(folder, cell, lines, name="predictions"):
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / f"{cell}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def line(i, right, predicted, options, control=None, subset="x"):
    made = {
        "id": f"{subset}/test/{i}", "subset": subset, "options": list("wxyz"[:options]), "answer": right,
        "predicted": predicted, "logprobs": [-1.0 if x == predicted else -2.0 for x in LETTERS[:options]],
        "generated": f"({predicted})",
    }  # fmt: skip
    return made | ({"control": control} if control else {})


RESULTS = [{"table": "pairs", "arm": "trained", "cell": "c", "seed": 0, "target": "x"}]
PLAIN = [line(0, "A", "A", 2), line(1, "B", "B", 4), line(2, "A", "B", 2), line(5, "A", "A", 2, subset="other")]
CONTROLS = [
    line(0, "B", "B", 2, "shift_1"), line(2, "B", "B", 2, "shift_1"),
    line(1, "C", "C", 4, "shift_1"), line(1, "D", "A", 4, "shift_2"), line(1, "A", "A", 4, "shift_3"),
    line(0, "A", "B", 2, "two_options"), line(1, "A", "A", 2, "two_options"),
    line(1, "B", "B", 4, "shuffled_images"), line(0, "A", "B", 2, "blank_images"), line(0, "A", "A", 2, "text_only"),
]  # fmt: skip


def test_controls_of_a_cell(tmp_path):
    write(tmp_path, "c", PLAIN)
    assert controls_of_answers(tmp_path, RESULTS, fresh=True)[0]["circular"] is None
    write(tmp_path, "c", CONTROLS, "controls")
    (found,) = controls_of_answers(tmp_path, RESULTS, fresh=True)
    assert (found["table"], found["part"], found["arm"], found["n"]) == ("pairs", "", "trained", 3)
    # Record 0 is right throughout, 1 falls at its second shift, 2 was wrong as asked.
    assert found["circular"] == {
        "n": 3, "plain": pytest.approx(2 / 3), "accuracy": pytest.approx(1 / 3),
        "by_shift": {"1": 1.0, "2": 0.0, "3": 1.0},
    }  # fmt: skip
    assert found["two_options"] == {"n": 2, "plain": 1.0, "accuracy": 0.5}
    assert found["shuffled_images"]["chance"] == 0.25
    assert {name: found[name]["accuracy"] for name in ("blank_images", "text_only")} == {
        "blank_images": 0.0, "text_only": 1.0,
    }  # fmt: skip
    assert found["generation"]["agreement"] == 1.0


def test_seeds_share_records_only_where_they_return(tmp_path):
    for cell in ("c", "d"):
        write(tmp_path, cell, PLAIN)
    results = [*RESULTS, RESULTS[0] | {"cell": "d", "seed": 1}]
    records = {fresh: controls_of_answers(tmp_path, results, fresh)[0]["records"] for fresh in (True, False)}
    assert records == {True: 6, False: 3}
    assert controls_of_answers(tmp_path, [RESULTS[0] | {"table": "efficiency"}], True) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda made: made + [line(7, "A", "A", 2, "shuffled_images")], "record x/test/7 of x: not among"),
        (lambda made: made + [line(0, "A", "A", 2, "shift_2")], "'shift_2'; each of blank_images, shift_1, shuffled"),
        (lambda made: made + made[-1:], 'line 11: record "x/test/0" stands in line 10 already'),
        (lambda made: made + [line(0, "A", "A", 2)], "control ''"),
        (lambda made: [x for x in made if x["control"] != "shift_2"], "record x/test/1 of x: no shift_2; all"),
    ],
)
def test_controls_that_do_not_fit_are_refused(tmp_path, change, message):
    write(tmp_path, "c", PLAIN)
    write(tmp_path, "c", change(list(CONTROLS)), "controls")
    with pytest.raises(ValueError, match=message) as error:
        controls_of_answers(tmp_path, RESULTS, fresh=True)
    assert "controls/c.jsonl" in str(error.value)
