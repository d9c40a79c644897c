"""Geometry of boxes: what is done to an image done to its boxes, and back; boxes of masks; questions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medcg_jax.data import boxes, images
from medcg_jax.data.boxes import PHRASINGS, ask, question
from medcg_jax.data.records import Box, Record

sides = st.integers(1, 400)
sizes = st.tuples(sides, sides)
fraction = st.floats(0, 1)


@st.composite
def sized_boxes(draw, least: int = 1):
    """(size, float64[N, 4]): boxes inside an image of this size."""
    size = draw(st.tuples(st.integers(least, 400), st.integers(least, 400)))
    rows = draw(st.lists(st.tuples(fraction, fraction, fraction, fraction), max_size=4))
    x = np.sort([[row[0], row[2]] for row in rows], -1).reshape(-1, 2) * size[1]
    y = np.sort([[row[1], row[3]] for row in rows], -1).reshape(-1, 2) * size[0]
    return size, np.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], -1)


def changes(size, to=(30, 50)):
    height, width = size
    part = boxes.tile(size, height // 3, width // 4, height - height // 3, width - width // 4)
    return [boxes.squash(size, to), boxes.pad_to_square(size), boxes.flip(size), part]


def inside(found, size):
    x, y = found[:, 0::2], found[:, 1::2]
    return (x >= -1e-9).all() and (x <= size[1] + 1e-9).all() and (y >= -1e-9).all() and (y <= size[0] + 1e-9).all()


@given(sized_boxes(), sizes)
@settings(deadline=None)
def test_every_change_can_be_taken_back(drawn, to):
    size, found = drawn
    for change in changes(size, to):
        after = change.apply(found)
        assert after.shape == found.shape and (after[:, :2] <= after[:, 2:]).all()
        np.testing.assert_allclose(change.inverse().apply(after), found, atol=1e-6)
        assert change.then(change.inverse()).apply(found) == pytest.approx(found, abs=1e-6)


@given(sized_boxes(), sizes)
@settings(deadline=None)
def test_boxes_stay_inside_and_whole_pixels_come_back(drawn, to):
    size, found = drawn
    for change in (boxes.squash(size, to), boxes.pad_to_square(size), boxes.flip(size)):
        assert inside(change.apply(found), change.after)
        # What a model says in whole pixels of its own image is off by half a pixel of that at most.
        back = change.inverse().apply(np.round(change.apply(found)))
        assert (np.abs(back - found) <= 0.5 / np.abs(np.tile(change.scale, 2)) + 1e-6).all()


@given(sized_boxes())
@settings(deadline=None)
def test_a_flip_is_its_own_inverse(drawn):
    size, found = drawn
    twice = boxes.flip(size).then(boxes.flip(size))
    np.testing.assert_allclose(twice.apply(found), found, atol=1e-9)
    assert boxes.flip(size).inverse() == boxes.flip(size)
    flipped = boxes.flip(size).apply(found)
    np.testing.assert_allclose(flipped[:, 2] - flipped[:, 0], found[:, 2] - found[:, 0], atol=1e-9)


@given(sized_boxes(least=4), sizes)
@settings(deadline=None)
def test_a_chain_is_its_parts_in_order(drawn, to):
    size, found = drawn
    for first in changes(size, to):
        for second in changes(first.after, to):
            np.testing.assert_allclose(first.then(second).apply(found), second.apply(first.apply(found)), atol=1e-6)


def test_the_order_of_changes_matters():
    size = (2, 4)
    found = np.array([[0.0, 0.0, 1.0, 2.0]])
    pad_first = boxes.pad_to_square(size).then(boxes.squash((4, 4), (8, 8))).apply(found)
    squash_first = boxes.squash(size, (8, 8)).then(boxes.pad_to_square((8, 8))).apply(found)
    assert pad_first.tolist() == [[0, 2, 2, 6]] and squash_first.tolist() == [[0, 0, 2, 8]]
    with pytest.raises(ValueError, match=r"a change of \(8, 8\) pixels .* gives \(4, 4\)"):
        boxes.pad_to_square(size).then(boxes.flip((8, 8)))


@given(sized_boxes(least=4))
@settings(deadline=None)
def test_a_flip_commutes_with_a_squash_and_an_even_pad(drawn):
    size, found = drawn

    def both_ways(change):
        flip_last = change(size).then(boxes.flip(change(size).after))
        return boxes.flip(size).then(change(size)).apply(found), flip_last.apply(found)

    np.testing.assert_allclose(*both_ways(lambda s: boxes.squash(s, (64, 48))), atol=1e-6)
    flip_first, flip_last = both_ways(boxes.pad_to_square)
    # The odd column of a padding lies on the right, whatever is flipped.
    odd = (max(size) - size[1]) % 2
    np.testing.assert_allclose(flip_first, flip_last - odd * np.array([1, 0, 1, 0]), atol=1e-6)


def painted(size, box):
    image = np.zeros((*size, 3), np.uint8)
    x1, y1, x2, y2 = box
    image[y1:y2, x1:x2] = 255
    return image


def lit(image):
    (found,) = boxes.of_mask(image[..., 0] > 127)
    return found


@given(st.tuples(st.integers(8, 60), st.integers(8, 60)), st.data())
@settings(deadline=None, max_examples=40)
def test_boxes_follow_the_pixels(size, data):
    """A white box in an image that is padded, resized, flipped or cut lies where the changed box says."""
    height, width = size
    x1, y1 = data.draw(st.integers(0, width - 4)), data.draw(st.integers(0, height - 4))
    box = (x1, y1, data.draw(st.integers(x1 + 3, width)), data.draw(st.integers(y1 + 3, height)))
    image, found = painted(size, box), np.array([box], float)
    padded = images.pad_to_square(image, (0, 0, 0))
    pad = boxes.pad_to_square(size)
    np.testing.assert_array_equal(pad.apply(found)[0], lit(padded))
    np.testing.assert_array_equal(boxes.flip(size).apply(found)[0], lit(image[:, ::-1]))
    bigger = pad.then(boxes.squash(pad.after, (120, 120)))
    np.testing.assert_allclose(bigger.apply(found)[0], lit(images.resize(padded, 120)), atol=1.0)
    np.testing.assert_allclose(bigger.inverse().apply(lit(images.resize(padded, 120))), found[0], atol=0.5)
    top, left = data.draw(st.integers(0, height - 2)), data.draw(st.integers(0, width - 2))
    part = boxes.tile(size, top, left, height - top, width - left)
    cut, kept = boxes.clip(part.apply(found), part.after)
    visible = image[top:, left:]
    assert kept[0] == visible.any()
    if kept[0]:
        np.testing.assert_array_equal(cut[0], lit(visible))


def test_clip_and_tile_say_what_is_left():
    cut, kept = boxes.clip(np.array([[-5, -5, 2, 2], [9, 9, 12, 12], [10, 0, 20, 5]], float), (10, 10))
    assert cut.tolist() == [[0, 0, 2, 2], [9, 9, 10, 10], [10, 0, 10, 5]] and kept.tolist() == [True, True, False]
    for bad in [(-1, 0, 2, 2), (0, 0, 0, 2), (5, 5, 6, 2), (0, 9, 2, 2)]:
        with pytest.raises(ValueError, match="one inside it is accepted"):
            boxes.tile((10, 10), *bad)


def test_parts_of_a_mask():
    mask = np.zeros((10, 12), bool)
    mask[0:2, 8:12] = mask[4, 1] = mask[5, 2] = mask[6, 3] = mask[9, 11] = True
    assert boxes.of_mask(mask).tolist() == [[8, 0, 12, 2], [1, 4, 4, 7], [11, 9, 12, 10]]
    assert boxes.of_mask(mask, min_pixels=2).tolist() == [[8, 0, 12, 2], [1, 4, 4, 7]]
    # One part inside the box of another does not count for it.
    nested = np.ones((7, 7), bool)
    nested[1:6, 1:6] = False
    nested[3, 3] = True
    assert boxes.of_mask(nested, min_pixels=2).tolist() == [[0, 0, 7, 7]]
    assert boxes.of_mask(np.zeros((4, 4), bool)).shape == (0, 4)


def test_corners_of_records():
    record = Record("a", "47", (), boxes=(Box("x", 1, 2, 3, 4), Box("y", 0.5, 0, 9, 9)))
    assert boxes.corners(record.boxes).tolist() == [[1, 2, 3, 4], [0.5, 0, 9, 9]]
    assert boxes.corners(()).shape == (0, 4)


def test_one_question_per_label():
    left, right = Box("Left lung", 5, 0, 9, 9), Box("Right lung", 0, 0, 4, 9)
    record = Record("47/train/1", "47", (), boxes=(left, right, left))
    asked = ask(record)
    assert {one.label: one.boxes for one in asked} == {"Left lung": (left, left), "Right lung": (right,)}
    assert all(one.question.count(f"the {one.label.lower()}") == 1 for one in asked)
    assert ask(record) == asked and ask(Record("a", "04", ())) == ()


def test_the_order_of_the_questions_is_that_of_the_id_and_not_of_the_boxes():
    left, right = Box("Left lung", 5, 0, 9, 9), Box("Right lung", 0, 0, 4, 9)
    firsts = []
    for i in range(200):
        both = [ask(Record(f"47/train/{i}", "47", (), boxes=boxes)) for boxes in ((left, right), (right, left))]
        assert both[0] == both[1]
        firsts.append(both[0][0].label)
    # What is asked alone in a test comes first in about half of the training.
    assert 60 < firsts.count("Left lung") < 140


def test_all_phrasings_are_used_about_alike():
    found = [question("Skin lesion", f"38/train/{i}") for i in range(600)]
    counts = {text: found.count(text) for text in set(found)}
    assert set(counts) == {text.format(label="skin lesion") for text in PHRASINGS}
    assert min(counts.values()) > 60
    assert "CT contrast" in question("CT contrast", "a")
