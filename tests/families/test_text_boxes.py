"""Boxes as text: the original's numbers, there and back, and nothing read that is not one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medcg_jax.data.records import DataError
from medcg_jax.families.minigpt_v2.boxes import BINS, format_boxes, parse_bins, parse_boxes


def test_boxes_are_hundredths_of_each_side_rounded_down():
    assert format_boxes([[25, 40, 125.9, 78]], (100, 200)) == "{<12><40><62><78>}"
    assert format_boxes([[0, 0, 200, 100]], (100, 200)) == "{<0><0><100><100>}"
    # 57 / 100 * 100 is a little below 57, and the original's labels are cut off there too.
    assert format_boxes([[29, 57, 58, 99]], (100, 100)) == "{<28><56><57><99>}"
    several = format_boxes([[0, 1, 2, 3], [4, 5, 6, 7.5]], (10, 10))
    assert several == "{<0><10><20><30>}<delim>{<40><50><60><75>}"


def test_text_comes_back_as_pixels():
    assert parse_boxes("{<12><40><62><78>}", (100, 200)).tolist() == [[24, 40, 124, 78]]
    both = parse_boxes("<p>left lung</p> {<0><10><20><30>}<delim>{<40><50><60><100>}", (50, 10))
    np.testing.assert_allclose(both, [[0, 5, 2, 15], [4, 25, 6, 50]])
    # A tokenizer may put spaces between pieces; the original's evaluation takes them out.
    assert parse_bins(" { <1 2> < 40 ><62><78> } <delim> {<0><0><9><9>}\n").tolist() == [[12, 40, 62, 78], [0, 0, 9, 9]]


sizes = st.tuples(st.integers(1, 4000), st.integers(1, 4000))
shares = st.lists(st.tuples(*[st.floats(0, 1) for _ in range(4)]), min_size=1, max_size=4)


@given(sizes, shares, st.sampled_from(["", "<p>left lung</p> ", "<p>CT contrast, 2nd</p> "]))
def test_what_is_written_is_read(size, shares, phrase):
    height, width = size
    x, y = (np.sort(np.array(shares)[:, axis::2], axis=1) * side for axis, side in ((0, width), (1, height)))
    boxes = np.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], axis=1)
    text = phrase + format_boxes(boxes, size)
    bins = parse_bins(text)
    expected = [[int(v / s * BINS) for v, s in zip(box, (width, height) * 2, strict=True)] for box in boxes.tolist()]
    assert bins.tolist() == expected
    # Nothing goes further than a hundredth of the side, and never right or down.
    lost = (boxes - parse_boxes(text, size)) / np.array((width, height) * 2)
    assert (lost >= -1e-12).all() and (lost < 1 / BINS + 1e-12).all()


@given(st.lists(st.tuples(*[st.integers(0, BINS)] * 4), min_size=1, max_size=4))
def test_every_box_of_hundredths_is_read_as_it_is_written(boxes):
    boxes = np.sort(np.array(boxes).reshape(-1, 2, 2), axis=1).reshape(-1, 4)
    text = "<delim>".join("{" + "".join(f"<{v}>" for v in box) + "}" for box in boxes.tolist())
    np.testing.assert_array_equal(parse_bins(text), boxes)
    # In an image of 100 x 100 with the bins' middles, it is written again as it was.
    middles = np.minimum(boxes + 0.5, BINS)
    assert format_boxes(middles, (BINS, BINS)) == text


@pytest.mark.parametrize(
    "text",
    [
        "", "no box", "{<1><2><3>}", "{<1><2><3><4><5>}", "{1,2,3,4}", "{<1><2><3><4>", "<1><2><3><4>",
        "{<1><2><3><101>}", "{<1><2><3><1000>}", "{<01><2><3><4>}", "{<-1><2><3><4>}", "{<1.5><2><3><4>}",
        "{<5><2><3><4>}", "{<1><9><3><4>}",
        "{<1><2><3><4>}{<1><2><3><4>}", "{<1><2><3><4>}<delim>", "<delim>{<1><2><3><4>}", "{<1><2><3><4>}, maybe",
        "It is at {<1><2><3><4>}", "{<1><2><3><4>}</s>", "<p>lung {<1><2><3><4>}", "<p>a</p><p>b</p>{<1><2><3><4>}",
        "{<١><2><3><4>}",
    ],
)  # fmt: skip
def test_anything_else_is_no_box(text):
    assert parse_bins(text) is None
    assert parse_boxes(text, (10, 10)) is None


@given(st.text(alphabet="{}<>0159 delimp/-.", max_size=30))
def test_reading_never_fails(text):
    found = parse_bins(text)
    assert found is None or (found.ndim == 2 and found.shape[1] == 4 and ((found >= 0) & (found <= BINS)).all())


@pytest.mark.parametrize(
    "box", [[0, 0, 11, 5], [-1, 0, 5, 5], [5, 0, 4, 5], [0, 0, 5, 21], [0, float("nan"), 5, 5], [0, 0, float("inf"), 5]]
)
def test_boxes_outside_the_image_are_refused(box):
    with pytest.raises(DataError, match="in an image of 10 x 20; expected 0 <= x1 <= x2 <= width"):
        format_boxes([[0, 0, 1, 1], box], (20, 10))
    with pytest.raises(DataError, match=r"boxes of shape \(0,\) cannot be written"):
        format_boxes([], (20, 10))
