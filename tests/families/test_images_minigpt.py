"""MiniGPT-v2's images: the whole image squashed, by PIL's bicubic filter on bytes."""

import numpy as np
import pytest
from PIL import Image

from medcg_jax.data import images
from medcg_jax.families.minigpt_v2.rows import preprocess


@pytest.mark.parametrize("shape", [(301, 500), (448, 448), (90, 33), (1, 700)])
def test_the_whole_image_is_squashed_by_pil(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
    found = preprocess(image, 448)
    assert set(found) == {"pixels"}
    assert (found["pixels"].shape, found["pixels"].dtype) == ((448, 448, 3), np.uint8)
    expected = np.asarray(Image.fromarray(image).resize((448, 448), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(found["pixels"], expected)


def test_the_squash_is_what_transformers_resize_gives():
    transformers = pytest.importorskip("transformers")
    image = np.random.default_rng(1).integers(0, 256, (61, 80, 3)).astype(np.uint8)
    processor = transformers.BlipImageProcessorPil(size={"height": 56, "width": 56})
    theirs = processor(Image.fromarray(image), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    mean, std = np.array(processor.image_mean), np.array(processor.image_std)
    ours = (preprocess(image, 56)["pixels"] / 255 - mean) / std
    assert np.abs(ours - theirs).max() < 1e-5
    # Planted: padded to a square first, as LLaVA's are.
    assert np.abs(images.preprocess(image, 56).astype(int) - preprocess(image, 56)["pixels"]).max() > 10


def test_a_point_stays_at_its_share_of_both_sides():
    image = np.zeros((100, 300, 3), np.uint8)
    image[20:30, 240:270] = 255
    rows, columns = np.nonzero(preprocess(image, 448)["pixels"][..., 0] > 127)
    assert abs(rows.mean() / 448 - 0.25) < 0.005 and abs(columns.mean() / 448 - 0.85) < 0.005
