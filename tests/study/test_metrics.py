"""Most frequent label, balanced accuracy and AUROC: by hand, against all pairs, and where they are not defined."""

import json
import math

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medcg_jax.data.records import LETTERS
from medcg_jax.study.stats import metrics
from medcg_jax.study.stats.answers import Answers


def answers(folder, lines):
    """lines: (options, right letter, probability of each offered letter, up to a factor) of each record."""
    (folder / "predictions").mkdir(exist_ok=True)
    with open(folder / "predictions" / "c.jsonl", "w") as file:
        for i, (options, answer, weights) in enumerate(lines):
            predicted = LETTERS[weights.index(max(weights))] if weights else answer
            logprobs = [math.log(weight) for weight in weights] if weights else None
            line = {"id": str(i), "subset": "x", "options": list(options), "answer": answer, "predicted": predicted}
            file.write(json.dumps(line | {"logprobs": logprobs, "generated": None}) + "\n")
    return Answers(folder).frame("c")


# Four records are "sick", one is "well"; the letters of the two change places.
LINES = [
    (("sick", "well"), "A", [0.8, 0.2]),
    (("sick", "well"), "A", [0.06, 0.04]),  # 60 % of what is offered
    (("well", "sick"), "B", [0.3, 0.7]),
    (("well", "sick"), "B", [0.55, 0.45]),
    (("well", "sick"), "A", [0.5, 0.4]),
]


def test_by_hand(tmp_path):
    found = metrics.metrics_of(answers(tmp_path, LINES))
    # Recall of "sick" is 3/4, of "well" 1/1; "sick" scores .8 .6 .7 .45 against .444 of the one "well": all four above.
    assert found == {
        "labels": 2, "majority": 0.8, "balanced": 0.875, "auroc": 1.0, "auroc_labels": 2, "why": "",
    }  # fmt: skip
    lower = [*LINES[:4], (("well", "sick"), "A", [0.3, 0.7])]
    # The "well" record scores .7 for "sick": above .6 and .45, level with .7, below .8.
    assert metrics.metrics_of(answers(tmp_path, lower))["auroc"] == pytest.approx(1.5 / 4)


def test_always_the_most_frequent_label_is_no_better_than_chance_when_balanced(tmp_path):
    always = [(("sick", "well"), "B" if i == 0 else "A", [0.9, 0.1]) for i in range(10)]
    frame = answers(tmp_path, always)
    found = metrics.metrics_of(frame)
    assert frame["right"].mean() == found["majority"] == 0.9
    assert (found["balanced"], found["auroc"]) == (0.5, 0.5)


def test_labels_are_texts_not_letters(tmp_path):
    """Planted: letters alone are right 50 : 50, labels 4 : 1."""
    found = metrics.metrics_of(answers(tmp_path, LINES))
    letters = [answer for _, answer, _ in LINES]
    assert max(letters.count(x) for x in "AB") / 5 == 0.6 != found["majority"]


def test_what_is_not_defined_is_blank_with_a_reason(tmp_path):
    one = metrics.metrics_of(answers(tmp_path, LINES[:4]))
    assert (one["labels"], one["auroc"], one["auroc_labels"], one["why"]) == (1, None, 0, metrics.ONE_LABEL)
    bare = metrics.metrics_of(answers(tmp_path, [(options, answer, None) for options, answer, _ in LINES]))
    assert (bare["auroc"], bare["why"], bare["balanced"]) == (None, metrics.NO_SCORES, 1.0)
    # "benign" is offered once, where it is right: there is no record to rank it against.
    some = [*LINES, (("benign", "sick"), "A", [0.6, 0.4])]
    found = metrics.metrics_of(answers(tmp_path, some))
    assert (found["labels"], found["auroc_labels"], found["why"]) == (
        3,
        2,
        f"1 of 3 labels left out: {metrics.ONE_LABEL}",
    )


records = st.lists(st.tuples(st.sampled_from("abc"), st.sets(st.sampled_from("abc")), st.integers(0, 4)), min_size=1)


@given(records=records)
@settings(max_examples=150, deadline=None)
def test_auroc_is_the_share_of_pairs_in_order(records):
    labels = [label for label, _, _ in records]
    scores = [
        {name: (score * (ord(name) + i)) % 5 for name in offered | {label}}
        for i, (label, offered, score) in enumerate(records)
    ]
    areas = []
    for label in sorted(set(labels)):
        asked = [
            (offered[label], own == label) for own, offered in zip(labels, scores, strict=True) if label in offered
        ]
        pairs = [(a, b) for a, is_a in asked for b, is_b in asked if is_a and not is_b]
        if pairs:
            areas.append(sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs))
    found, count = metrics.macro_auroc(labels, scores)
    assert count == len(areas) and found == (pytest.approx(sum(areas) / len(areas)) if areas else None)


def test_seeds_are_averaged():
    base = {"labels": 2, "majority": 0.5, "balanced": 0.6, "auroc": 0.7, "auroc_labels": 2, "why": ""}
    other = base | {"majority": 0.7, "balanced": 0.8, "auroc": 0.9}
    assert metrics.mean_over_seeds([base, other]) == pytest.approx(
        base | {"majority": 0.6, "balanced": 0.7, "auroc": 0.8}
    )
    blank = metrics.mean_over_seeds([base, other | {"auroc": None, "auroc_labels": 0, "why": metrics.ONE_LABEL}])
    assert (blank["auroc"], blank["why"], blank["auroc_labels"]) == (None, metrics.ONE_LABEL, 0)


def test_probabilities_are_of_the_offered_options(tmp_path):
    frame = answers(tmp_path, [(("p", "q"), "A", [0.02, 0.06]), (("p", "q", "r"), "C", [0.1, 0.1, 0.2])])
    first, second = metrics.option_probabilities(frame)
    assert first == pytest.approx({"p": 0.25, "q": 0.75})
    assert second == pytest.approx({"p": 0.25, "q": 0.25, "r": 0.5})
    assert isinstance(frame, pd.DataFrame)
