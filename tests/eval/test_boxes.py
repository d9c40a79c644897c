"""Boxes: IoU's properties, matching, scores and what a missing answer counts; the file of answers; masks laid back."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medcg_jax.eval.boxes import (
    BoxAnswer,
    dice,
    iou,
    match,
    overlap,
    ratio_interval,
    read_answers,
    rounded,
    summary,
    write_answers,
)
from medcg_jax.eval.grounding import masks_in_image
from medcg_jax.eval.predictions import wilson
from medcg_jax.families.next_chat.rows import preprocess_masks

number = st.floats(-500, 500)


@st.composite
def box_sets(draw, least=0, most=5):
    side = st.floats(0.5, 300)
    rows = draw(st.lists(st.tuples(number, number, side, side), min_size=least, max_size=most))
    return np.array([(x, y, x + w, y + h) for x, y, w, h in rows]).reshape(-1, 4)


@given(box_sets(), box_sets())
@settings(deadline=None, max_examples=40)
def test_iou_is_symmetric_bounded_and_one_of_a_box_with_itself(a, b):
    found = iou(a, b)
    assert found.shape == (len(a), len(b)) and (found >= 0).all() and (found <= 1).all()
    np.testing.assert_array_equal(found, iou(b, a).T)
    np.testing.assert_array_equal(iou(a, a).diagonal(), np.ones(len(a)))
    # Moved or scaled together, boxes overlap as before.
    np.testing.assert_allclose(iou(a + 7, b + 7), found, atol=1e-9)
    np.testing.assert_allclose(iou(3 * a, 3 * b), found, atol=1e-9)


def test_worked_numbers():
    a, b = [[0, 0, 10, 10]], [[5, 5, 15, 15], [10, 0, 20, 10], [0, 0, 10, 5]]
    np.testing.assert_allclose(iou(a, b)[0], [25 / 175, 0, 0.5])
    both, union = overlap(a, b)
    assert both.tolist() == [[25, 0, 50]] and union.tolist() == [[175, 200, 100]]


INFINITE = [(math.nan, 0, 5, 5), (-math.inf, 0, 5, 5), (0, 0, math.inf, 5)]


@pytest.mark.parametrize("broken", [(5, 0, 0, 5), (0, 5, 5, 0), (5, 5, 0, 0), *INFINITE, (3, 3, 3, 3)])
def test_what_is_no_box_overlaps_nothing(broken):
    assert iou([broken, (0, 0, 5, 5)], [(0, 0, 5, 5)]).tolist() == [[0.0], [1.0]]
    assert iou([broken], [broken])[0, 0] == 0
    assert np.isfinite(iou([(0, 0, 1e300, 1e300)], [(0, 0, 5, 5)])).all()


def test_matching_is_greedy_and_one_to_one():
    truth = np.array([[0, 0, 10, 10], [8, 0, 18, 10]], float)
    assert match([[8, 0, 18, 10], [7, 0, 17, 10]], truth) == [(0, 1), (1, 0)]
    assert match([[0, 0, 10, 10]] * 3, truth) == [(0, 0), (1, 1)]
    assert match([[100, 100, 110, 110]], truth) == [] and match([], truth) == [] and match(truth, []) == []


@given(box_sets(), box_sets(), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=40)
def test_matching_is_stable(a, b, random):
    pairs, scores = match(a, b), iou(a, b)
    assert len({i for i, _ in pairs}) == len({j for _, j in pairs}) == len(pairs)
    taken = [scores[i, j] for i, j in pairs]
    assert taken == sorted(taken, reverse=True) and all(value > 0 for value in taken)
    # No two boxes that overlap are both left over, and none prefer each other to what they got.
    got_a, got_b = {i: scores[i, j] for i, j in pairs}, {j: scores[i, j] for i, j in pairs}
    for i, j in np.ndindex(scores.shape):
        assert scores[i, j] <= max(got_a.get(i, 0), got_b.get(j, 0))
    order = list(range(len(a)))
    random.shuffle(order)
    in_other_order = [scores[order[i], j] for i, j in match(a[order], b)]
    if len(set(scores[scores > 0].tolist())) == (scores > 0).sum():
        assert in_other_order == taken


BOX = ((0.0, 0.0, 10.0, 10.0),)


def located(predicted, truth=BOX) -> BoxAnswer:
    return BoxAnswer("a", "subset", "x", truth, predicted, "")


def test_summary_of_single_boxes():
    found = [located(BOX), located([[0, 0, 10, 5]]), located([[0, 0, 10, 6]]), located(None), located([])]
    scores = summary(found)
    assert (scores["questions"], scores["n"], scores["predicted"], scores["correct"]) == (5, 5, 3, 2)
    # 0.5 itself is not above 0.5; neither a missing nor an unreadable answer is left out.
    assert scores["accuracy"] == 2 / 5 and scores["precision"] == 2 / 3 and scores["unparsed_rate"] == 1 / 5
    assert scores["mean_iou"] == pytest.approx((1 + 0.5 + 0.6) / 5)
    assert scores["cumulative_iou"] == pytest.approx((100 + 50 + 60) / 500)
    assert (scores["accuracy_low"], scores["accuracy_high"]) == wilson(2, 5)
    for name in ("mean_iou", "cumulative_iou"):
        assert 0 <= scores[f"{name}_low"] < scores[name] < scores[f"{name}_high"] <= 1
    assert summary(found) == scores and json.loads(json.dumps(scores)) == scores


def test_summary_of_several_boxes():
    two = [[0, 0, 10, 10], [20, 0, 30, 10]]
    scores = summary([located([[20, 0, 30, 10], [50, 50, 60, 60], [51, 50, 61, 60]], two), located(two[:1], two)] * 4)
    assert (scores["n"], scores["predicted"], scores["correct"]) == (16, 16, 8)
    assert scores["accuracy"] == scores["precision"] == scores["mean_iou"] == 0.5
    # Boxes that nobody asked for add to the unions.
    assert scores["cumulative_iou"] == pytest.approx(200 / (400 + 200))
    # All questions have half of their boxes: drawn anew they say the same, which Wilson's interval would not.
    assert (scores["accuracy_low"], scores["accuracy_high"]) == (0.5, 0.5)


def test_a_repeated_box_is_not_found_twice():
    two = [[0, 0, 10, 10], [0, 0, 10, 11]]
    scores = summary([located([two[0]] * 2, two), located([two[0]] * 5, BOX)])
    assert scores["correct"] == 3 and scores["precision"] == 3 / 7


def test_nothing_to_score():
    scores = summary([])
    assert (scores["n"], scores["accuracy"], scores["precision"], scores["unparsed_rate"]) == (0, 0, None, 0)
    assert (scores["accuracy_low"], scores["accuracy_high"], scores["mean_iou_high"]) == (0, 1, 1)
    assert summary([located(BOX)])["mean_iou_low"] == 0


def test_intervals_keep_the_boxes_of_a_question_together():
    rng = np.random.default_rng(1)
    hits = (rng.random(60) < 0.6).astype(float)
    low, high = ratio_interval(hits, np.ones(60))
    wanted = wilson(int(hits.sum()), 60)
    assert (low, high) == pytest.approx(wanted, abs=0.03)
    # Ten boxes each that are all found or all not: as much known as of sixty boxes, not of six hundred.
    assert ratio_interval(10 * hits, np.full(60, 10.0)) == pytest.approx((low, high))


@given(st.integers(0, 2**16 - 1), st.integers(0, 2**16 - 1))
@settings(deadline=None, max_examples=40)
def test_dice(first, second):
    a, b = (np.array([value >> k & 1 for k in range(16)], bool).reshape(4, 4) for value in (first, second))
    assert dice(a, b) == dice(b, a) and dice(a, a) == 1 and 0 <= dice(a, b) <= 1
    union, both = (a | b).sum(), (a & b).sum()
    if union:
        jaccard = both / union
        assert dice(a, b) == pytest.approx(2 * jaccard / (1 + jaccard))


def test_dice_of_nothing_and_of_other_shapes():
    empty, one = np.zeros((2, 2), bool), np.eye(2, dtype=bool)
    assert dice(empty, empty) == 1 and dice(empty, one) == 0
    with pytest.raises(ValueError, match=r"\(2, 2\) and \(4,\)"):
        dice(one, one.ravel())


# ------------------------------------------------------------------ answers

pixel = st.floats(-1e4, 1e4)
box = st.tuples(pixel, pixel, pixel, pixel).map(lambda b: rounded(np.array([b]))[0])
answers = st.builds(
    BoxAnswer,
    st.text(min_size=1), st.text(min_size=1), st.text(), st.lists(box, min_size=1, max_size=3).map(tuple),
    st.none() | st.lists(box, max_size=3).map(tuple), st.text(), st.none() | st.floats(0, 1),
)  # fmt: skip


@given(st.lists(answers, max_size=4, unique_by=lambda one: (one.id, one.subset, one.label)))
@settings(deadline=None, max_examples=30)
def test_the_file_gives_back_what_was_written(tmp_path_factory, found):
    path = tmp_path_factory.mktemp("boxes") / "cell.jsonl"
    write_answers(path, found)
    assert read_answers(path) == found
    assert [p.name for p in path.parent.iterdir()] == ["cell.jsonl"]


def answer(i: int, predicted, dice=None, subset="a", label="lesion") -> BoxAnswer:
    truth = (float(10 * i), 0.0, float(10 * i + 8), 8.0)
    return BoxAnswer(f"{subset}/{i}", subset, label, (truth,), predicted, "", dice)


def test_right_answers_are_worth_more_than_the_usual_place():
    """Boxes that lie elsewhere in each image; boxes that lie at one place in all."""
    right = [answer(i, ((10.0 * i, 0.0, 10.0 * i + 8, 8.0),)) for i in range(5)]
    scores = summary(right)
    assert (scores["correct"], scores["accuracy"], scores["by_chance"], scores["dice"]) == (5, 1.0, 0.0, None)
    same = [BoxAnswer(f"a/{i}", "a", "lesion", ((0.0, 0.0, 8.0, 8.0),), ((0.0, 0.0, 8.0, 8.0),), "") for i in range(5)]
    assert summary(same)["by_chance"] == 1.0
    # One image alone, and labels and subsets that are not mixed.
    assert summary(right[:1])["by_chance"] is None
    mixed = [*right[:1], answer(0, right[0].predicted, subset="b"), answer(0, right[0].predicted, label="cell")]
    assert summary(mixed)["by_chance"] is None


def test_dice_is_the_mean_of_the_questions_that_have_one():
    scores = summary([answer(0, None, 0.5), answer(1, None, 1.0), answer(2, None)])
    assert scores["dice"] == 0.75 and scores["dice_low"] <= 0.75 <= scores["dice_high"]
    assert (scores["unparsed_rate"], scores["accuracy"]) == (1.0, 0.0)


@pytest.mark.parametrize("size", [(32, 48), (48, 32), (40, 40), (7, 90)])
def test_masks_come_back_to_where_they_were(size):
    mask = np.zeros((1, *size), bool)
    mask[0, size[0] // 4 : size[0] // 2 + 1, size[1] // 4 : size[1] // 2 + 3] = True
    laid = preprocess_masks(mask, 256)[0]
    # A quarter of SAM's size, as it gives logits.
    logits = np.where(laid[2::4, 2::4], 5.0, -5.0).astype(np.float32)
    found = masks_in_image(logits[None], size)
    assert found.shape == (1, *size)
    overlap = (found & mask).sum() / (found | mask).sum()
    assert overlap > 0.75
    # Read from the corner in place of the middle of the square, it would lie elsewhere.
    if size[0] != size[1]:
        shifted = np.roll(found[0], 5, axis=0 if size[0] > size[1] else 1)
        assert (shifted & mask[0]).sum() / (shifted | mask[0]).sum() < overlap
    assert masks_in_image(np.zeros((0, 16, 16)), size).shape == (0, *size)
