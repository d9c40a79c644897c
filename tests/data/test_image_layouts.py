"""Layouts change images and their boxes alike."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medcg_jax.config import ModelConfig
from medcg_jax.data.layouts import Layout, check_layout, parse_layout
from medcg_jax.data.records import Box, DataError, Record
from medcg_jax.families.build import architecture

layouts = st.one_of(
    st.just(Layout("keep", 0)), st.builds(Layout, st.sampled_from(("square", "fit")), st.integers(1, 40))
)


@given(layouts)
def test_a_layout_is_read_as_it_is_written(layout):
    assert parse_layout(str(layout)) == layout


@pytest.mark.parametrize("text", ["", "square", "square:0", "fit:-3", "keep:3", "circle:3", "fit:３", "fit:1e3"])
def test_others_are_refused(text):
    with pytest.raises(DataError, match="expected square:SIZE, fit:SIZE .* or keep"):
        parse_layout(text)


@given(layouts, st.integers(1, 50), st.integers(1, 50))
def test_the_size_is_known_beforehand(layout, height, width):
    image = np.zeros((height, width, 3), np.uint8)
    after = layout.apply(image).shape[:2]
    assert after == layout.size_after((height, width))
    if layout.kind == "fit":
        assert max(after) <= max(layout.size_px, 1) or after == (height, width)


@given(layouts.filter(lambda layout: layout.size_px != 1), st.data())
def test_boxes_stay_on_what_they_mark(layout, data):
    """A white rectangle on black: where its box says, the laid out image is bright, and dark outside."""
    height, width = data.draw(st.integers(20, 48)), data.draw(st.integers(20, 48))
    layout = layout if layout.kind == "keep" else Layout(layout.kind, layout.size_px + 30)
    x1, y1 = data.draw(st.integers(0, width - 9)), data.draw(st.integers(0, height - 9))
    x2, y2 = data.draw(st.integers(x1 + 8, width)), data.draw(st.integers(y1 + 8, height))
    image = np.zeros((height, width, 3), np.uint8)
    image[y1:y2, x1:x2] = 255
    record = Record("1", "38", (), boxes=(Box("a", x1, y1, x2, y2),), size_px=(height, width))
    laid = layout.record(record)
    after, box = layout.apply(image)[..., 0] > 180, laid.boxes[0]
    rows, columns = np.flatnonzero(after.any(1)), np.flatnonzero(after.any(0))
    found = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    assert laid.size_px == after.shape and np.abs(found - box.corners).max() <= 1.5, (found, box)


def test_a_model_takes_its_own_square_alone():
    llava, qwen = (architecture(ModelConfig(name=name)) for name in ("llava15_7b", "qwen2_vl_7b"))
    own = Layout("square", llava.image_size_px)
    check_layout(own, "llava", llava)
    for layout in (Layout("keep", 0), Layout("fit", 5)):
        check_layout(layout, "llava", llava)
        check_layout(layout, "qwen2_vl", qwen)
    for layout, family, model in ((Layout("square", 99), "llava", llava), (own, "qwen2_vl", qwen)):
        with pytest.raises(DataError, match=f"lie as {layout}.*--image=.*fit:SIZE or keep"):
            check_layout(layout, family, model)
