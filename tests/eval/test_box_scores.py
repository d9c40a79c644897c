"""Scores of boxes: IoU's properties, MiniGPT's convention, matching, and what a missing answer counts."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medcg_jax.eval.boxes import MINIGPT_EXTRA_PX, Located, dice, iou, match, overlap, ratio_interval, summary
from medcg_jax.eval.intervals import wilson

number = st.floats(-500, 500)


@st.composite
def box_sets(draw, least=0, most=5):
    side = st.floats(0.5, 300)
    rows = draw(st.lists(st.tuples(number, number, side, side), min_size=least, max_size=most))
    return np.array([(x, y, x + w, y + h) for x, y, w, h in rows]).reshape(-1, 4)


@given(box_sets(), box_sets(), st.sampled_from([0.0, MINIGPT_EXTRA_PX]))
@settings(deadline=None)
def test_iou_is_symmetric_bounded_and_one_of_a_box_with_itself(a, b, extra):
    found = iou(a, b, extra_px=extra)
    assert found.shape == (len(a), len(b)) and (found >= 0).all() and (found <= 1).all()
    np.testing.assert_array_equal(found, iou(b, a, extra_px=extra).T)
    np.testing.assert_array_equal(iou(a, a, extra_px=extra).diagonal(), np.ones(len(a)))
    # Moved or scaled together, boxes overlap as before.
    np.testing.assert_allclose(iou(a + 7, b + 7, extra_px=extra), found, atol=1e-9)
    np.testing.assert_allclose(iou(3 * a, 3 * b, extra_px=3 * extra), found, atol=1e-9)


def minigpt(one, two):
    """The formula with a pixel added to each side, in plain numbers."""
    wide = max(0, min(one[2], two[2]) - max(one[0], two[0]) + 1)
    high = max(0, min(one[3], two[3]) - max(one[1], two[1]) + 1)
    areas = [(x2 - x1 + 1) * (y2 - y1 + 1) for x1, y1, x2, y2 in (one, two)]
    return wide * high / (sum(areas) - wide * high)


@given(box_sets(least=1), box_sets(least=1))
@settings(deadline=None)
def test_the_minigpt_convention(a, b):
    found = iou(a, b, extra_px=MINIGPT_EXTRA_PX)
    wanted = [[minigpt(one, two) for two in b.tolist()] for one in a.tolist()]
    np.testing.assert_allclose(found, wanted, atol=1e-9)


def test_worked_numbers():
    a, b = [[0, 0, 10, 10]], [[5, 5, 15, 15], [10, 0, 20, 10], [0, 0, 10, 5]]
    np.testing.assert_allclose(iou(a, b)[0], [25 / 175, 0, 0.5])
    np.testing.assert_allclose(iou(a, b, extra_px=1)[0], [36 / 206, 11 / 231, 66 / 121])
    both, union = overlap(a, b)
    assert both.tolist() == [[25, 0, 50]] and union.tolist() == [[175, 200, 100]]


INFINITE = [(math.nan, 0, 5, 5), (-math.inf, 0, 5, 5), (0, 0, math.inf, 5)]


@pytest.mark.parametrize("broken", [(5, 0, 0, 5), (0, 5, 5, 0), (5, 5, 0, 0), *INFINITE, (3, 3, 3, 3)])
@pytest.mark.parametrize("extra", [0.0, 1.0])
def test_what_is_no_box_overlaps_nothing(broken, extra):
    found = iou([broken, (0, 0, 5, 5)], [(0, 0, 5, 5)], extra_px=extra)
    # A point has no area, but with MiniGPT's pixel one of 1 x 1.
    assert found.tolist() == [[1 / 36 if extra and broken == (3, 3, 3, 3) else 0.0], [1.0]]
    assert iou([broken], [broken])[0, 0] == 0
    assert np.isfinite(iou([(0, 0, 1e300, 1e300)], [(0, 0, 5, 5)], extra_px=extra)).all()


def test_matching_is_greedy_and_one_to_one():
    truth = np.array([[0, 0, 10, 10], [8, 0, 18, 10]], float)
    assert match([[8, 0, 18, 10], [7, 0, 17, 10]], truth) == [(0, 1), (1, 0)]
    assert match([[0, 0, 10, 10]] * 3, truth) == [(0, 0), (1, 1)]
    assert match([[100, 100, 110, 110]], truth) == [] and match([], truth) == [] and match(truth, []) == []


@given(box_sets(), box_sets(), st.randoms(use_true_random=False))
@settings(deadline=None)
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
    again = [scores[order[i], j] for i, j in match(a[order], b)]
    if len(set(scores[scores > 0].tolist())) == (scores > 0).sum():
        assert again == taken


BOX = np.array([[0.0, 0.0, 10.0, 10.0]])


def located(predicted, truth=BOX, name="a"):
    return Located(name, "x", np.asarray(truth, float), None if predicted is None else np.asarray(predicted, float))


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


def test_minigpt_convention_in_a_summary():
    found = [located([[0, 0, 10, 5]])] * 2
    assert summary(found)["accuracy"] == 0 and summary(found, extra_px=MINIGPT_EXTRA_PX)["accuracy"] == 1


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
@settings(deadline=None)
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
