"""Squares for CLIP and for SAM, and boxes in them: against the reference's steps, and against drawn pixels."""

import numpy as np
import pytest
from PIL import Image

from medcg_jax.data import images
from medcg_jax.families.next_chat.rows import from_square, preprocess, preprocess_masks, preprocess_sam, to_square

SHAPES = [(40, 40), (31, 50), (50, 31), (1, 7), (64, 33), (90, 200)]


def noise(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


@pytest.mark.parametrize("shape", SHAPES)
def test_clips_square_is_white_around_the_image(shape):
    """PIL's own pasting and bicubic resize, with odd remainders below and right."""
    side = max(shape)
    square = Image.new("RGB", (side, side), (255, 255, 255))
    square.paste(Image.fromarray(noise(shape)), ((side - shape[1]) // 2, (side - shape[0]) // 2))
    expected = np.asarray(square.resize((28, 28), Image.Resampling.BICUBIC))
    found = preprocess(noise(shape), 28)
    assert list(found) == ["pixels"]
    np.testing.assert_array_equal(found["pixels"], expected)
    # Planted: LLaVA's fill is CLIP's mean colour.
    if shape[0] != shape[1]:
        assert (images.preprocess(noise(shape), 28) != expected).any()


@pytest.mark.parametrize("shape", SHAPES)
def test_boxes_go_where_the_pixels_go_and_back(shape):
    height, width = shape
    x1, y1, x2, y2 = box = np.array([width // 4, height // 3, width // 4 + 1, height // 3 + 1])
    image = np.zeros((*shape, 3), np.uint8)
    image[y1:y2, x1:x2] = (0, 255, 0)
    side = max(shape)
    drawn = np.argwhere((images.pad_to_square(image, (255, 255, 255)) == (0, 255, 0)).all(axis=-1))
    found = to_square(box[None], shape)
    np.testing.assert_allclose(found[0] * side, [drawn[0, 1], drawn[0, 0], drawn[-1, 1] + 1, drawn[-1, 0] + 1])
    np.testing.assert_allclose(from_square(found, shape)[0], box)


def test_boxes_are_cut_at_the_squares_edge():
    assert to_square([[-50, -5, 30, 45]], (40, 20)).tolist() == [[0, 0, 1, 1]]
    assert to_square(np.zeros((0, 4)), (40, 20)).shape == (0, 4)


@pytest.mark.parametrize("shape", SHAPES)
def test_sams_square_is_the_references(shape):
    """segment-anything's own steps: normalised first, zeros around it after."""
    mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    scale = 100 / max(shape)
    height, width = int(shape[0] * scale + 0.5), int(shape[1] * scale + 0.5)
    resized = np.asarray(Image.fromarray(noise(shape)).resize((width, height), Image.Resampling.BILINEAR))
    top, left = (100 - height) // 2, (100 - width) // 2
    around = ((top, 100 - height - top), (left, 100 - width - left), (0, 0))
    expected = np.pad((resized - mean) / std, around)
    found = preprocess_sam(noise(shape), 100)
    assert found["sam_extent"].tolist() == [height, width]
    sam = pytest.importorskip("medcg_jax.families.next_chat.sam")
    import jax.numpy as jnp

    config = sam.SamConfig(image_size_px=100, patch_size_px=10)
    ours = sam.normalise(jnp.asarray(found["sam_pixels"])[None], jnp.asarray(found["sam_extent"])[None], config)
    assert np.abs(np.asarray(ours)[0] - expected).max() < 1e-5
    with pytest.raises(ValueError, match="sam_extent"):
        sam.normalise(jnp.asarray(found["sam_pixels"])[None], None, config)


def test_masks_lie_where_sams_image_and_the_boxes_lie():
    mask = np.zeros((30, 50), bool)
    mask[12:18, 20:40] = True
    found = preprocess_masks(np.array([mask, ~mask]), 100)
    assert found.shape == (2, 100, 100) and found.dtype == bool
    rows, columns = np.flatnonzero(found[0].any(axis=1)), np.flatnonzero(found[0].any(axis=0))
    box = to_square([[20, 12, 40, 18]], (30, 50))[0] * 100
    assert [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1] == np.rint(box).tolist() == [40, 44, 80, 56]
    assert not found[1][:20].any() and not (found[0] & found[1]).any()
    assert preprocess_masks(np.zeros((0, 30, 50), bool), 100).shape == (0, 100, 100)


@pytest.mark.parametrize("shape", [(1, 4000), (4000, 1)])
def test_an_image_as_thin_as_a_pixel_keeps_one(shape):
    image = np.full((*shape, 3), 200, np.uint8)
    found = preprocess_sam(image, 64)
    assert sorted(found["sam_extent"].tolist()) == [1, 64] and (found["sam_pixels"] > 0).any()
    assert preprocess_masks(np.ones((2, *shape), bool), 64).sum(axis=(1, 2)).tolist() == [64, 64]
