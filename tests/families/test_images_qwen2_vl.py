"""Patches equal to the reference's, whatever the image's shape; numbers of tokens; images that are refused."""

import numpy as np
import pytest
from PIL import Image

from medcg_jax.data.records import DataError
from medcg_jax.families.qwen2_vl.rows import ImageSizes, num_image_tokens, preprocess, smart_resize

RELEASED = ImageSizes()
SMALL = ImageSizes(patch_size_px=4, min_pixels=256, max_pixels=4096)
# (height, width); of the small size those that fit.
SHAPES = [
    (1, 1),
    (28, 28),
    (56, 84),
    (1, 97),
    (97, 1),
    (5, 300),
    (42, 70),
    (333, 127),
    (301, 501),
    (3, 600),
    (1500, 1100),
]
CASES = [(RELEASED, shape) for shape in SHAPES] + [(SMALL, shape) for shape in SHAPES if max(shape) <= 60 * min(shape)]


def noise(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def reference(sizes: ImageSizes, **options):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    limits = {"shortest_edge": sizes.min_pixels, "longest_edge": sizes.max_pixels}
    return transformers.Qwen2VLImageProcessorPil(
        size=limits, patch_size=sizes.patch_size_px, merge_size=sizes.merge, **options
    )


@pytest.mark.parametrize(("sizes", "shape"), CASES)
def test_patches_are_the_references(sizes, shape):
    processor = reference(sizes, do_rescale=False, do_normalize=False)
    image = noise(shape)
    expected = processor(Image.fromarray(image), return_tensors="np")
    found = preprocess(image, sizes)
    assert found["grids"].tolist() == expected["image_grid_thw"][0, 1:].tolist()
    number = found["grids"].prod()
    frames = expected["pixel_values"].reshape(number, 3, 2, -1)
    assert found["pixels"].dtype == np.uint8 and found["pixels"].shape == (sizes.num_slots, 3 * sizes.patch_size_px**2)
    for frame in (0, 1):
        np.testing.assert_array_equal(found["pixels"][:number], frames[:, :, frame].reshape(number, -1))
    assert not found["pixels"][number:].any()
    assert num_image_tokens(*shape, sizes) == number // 4 <= sizes.max_image_tokens


def test_normalised_on_the_device_they_are_the_references_numbers():
    jnp = pytest.importorskip("jax.numpy")

    from medcg_jax.families.qwen2_vl import vit as qwen2_vit

    image = noise((61, 90), 1)
    expected = reference(RELEASED)(Image.fromarray(image), return_tensors="np")["pixel_values"]
    found = preprocess(image, RELEASED)
    config = qwen2_vit.Qwen2VitConfig()
    patches = jnp.asarray(found["pixels"])[None, : found["grids"].prod()]
    ours = qwen2_vit._frames(qwen2_vit._normalise(patches, config), config)
    assert np.abs(np.asarray(ours)[0] - expected).max() < 1e-5


def test_patches_stand_block_by_block():
    sizes = ImageSizes(patch_size_px=2, min_pixels=16, max_pixels=64)
    image = np.repeat(np.arange(8, dtype=np.uint8).reshape(2, 4).repeat(2, 0).repeat(2, 1)[..., None], 3, axis=2)
    found = preprocess(image, sizes)
    assert found["grids"].tolist() == [2, 4]
    assert found["pixels"][:, 0].tolist() == [0, 1, 4, 5, 2, 3, 6, 7, *[0] * 8]


@pytest.mark.parametrize("shape", [(1, 4000), (4000, 1), (10, 2001)])
def test_too_narrow_images_are_refused(shape):
    with pytest.raises(DataError, match=r"times the other; at most 200 is accepted"):
        preprocess(noise(shape), RELEASED)


def test_images_of_more_tokens_than_there_is_room_for_are_refused():
    with pytest.raises(DataError, match="1600 x 8 pixels become 56 x 1 tokens; at most 16 are accepted"):
        smart_resize(8, 1600, ImageSizes(patch_size_px=4, min_pixels=256, max_pixels=1024))


def test_sizes_over_the_whole_range_are_the_references():
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as original

    rng = np.random.default_rng(2)
    for height, width in rng.integers(1, 3000, (2000, 2)).tolist():
        if max(height, width) / min(height, width) <= 200:
            limits = dict(min_pixels=RELEASED.min_pixels, max_pixels=RELEASED.max_pixels)
            assert smart_resize(height, width, RELEASED) == original(height, width, **limits)
