"""Geometry of boxes: boxes of resized images lie where the pixels do; boxes of masks; questions."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from medcg_jax.data import boxes, images
from medcg_jax.data.boxes import PHRASINGS, ask, question
from medcg_jax.data.records import Box, Record


@given(st.tuples(st.integers(8, 60), st.integers(8, 60)), st.data())
@settings(deadline=None, max_examples=40)
def test_boxes_follow_the_pixels(size, data):
    """A white box in an image that is padded and resized lies where the moved box says, cut at the edge."""
    height, width = size
    x1, y1 = data.draw(st.integers(0, width - 4)), data.draw(st.integers(0, height - 4))
    x2, y2 = data.draw(st.integers(x1 + 3, width)), data.draw(st.integers(y1 + 3, height))
    image = np.zeros((*size, 3), np.uint8)
    image[y1:y2, x1:x2] = 255
    for side in (max(size), 120):
        (lit,) = boxes.of_mask(images.resize(images.pad_to_square(image, (0, 0, 0)), side)[..., 0] > 127)
        (moved,) = boxes.resized(np.array([[x1, y1, x2, y2]]), size, (side, side), squared=True)
        np.testing.assert_allclose(moved, lit, atol=0 if side == max(size) else 1.0)
    squashed = boxes.resized(np.array([[x1, y1, x2 + width, y2]]), size, (2 * height, 3 * width))
    assert squashed.tolist() == [[3 * x1, 2 * y1, 3 * width, 2 * y2]]


def test_parts_of_a_mask():
    mask = np.zeros((10, 12), bool)
    mask[0:2, 8:12] = mask[4, 1] = mask[5, 2] = mask[6, 3] = mask[9, 11] = True
    assert boxes.of_mask(mask).tolist() == [[8, 0, 12, 2], [1, 4, 4, 7], [11, 9, 12, 10]]
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
