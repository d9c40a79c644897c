"""Image arrays of every family: equal to the references' processors bit for bit, whatever the image's shape."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from medcg_jax.data import images
from medcg_jax.data.records import DataError
from medcg_jax.families.minigpt_v2 import rows as minigpt_v2
from medcg_jax.families.mllama import rows as mllama
from medcg_jax.families.next_chat import rows as next_chat
from medcg_jax.families.next_chat import sam
from medcg_jax.families.next_chat.rows import from_square, preprocess_masks, preprocess_sam, to_square
from medcg_jax.families.qwen2_vl import rows as qwen2_vl
from medcg_jax.families.qwen2_vl import vit
from medcg_jax.families.qwen2_vl.rows import ImageSizes

# CLIP's.
MEAN, STD = np.array((0.48145466, 0.4578275, 0.40821073)), np.array((0.26862954, 0.26130258, 0.27577711))


def noise(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def processor(name: str, **options):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    return getattr(transformers, name)(**options)


# ------------------------------------------------------------------ MiniGPT-v2


@pytest.mark.parametrize("shape", [(301, 500), (448, 448), (90, 33), (1, 700)])
def test_the_whole_image_is_squashed_by_pil(shape):
    image = noise(shape)
    found = minigpt_v2.preprocess(image, 448)
    assert set(found) == {"pixels"}
    assert (found["pixels"].shape, found["pixels"].dtype) == ((448, 448, 3), np.uint8)
    expected = np.asarray(Image.fromarray(image).resize((448, 448), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(found["pixels"], expected)


def test_the_squash_is_what_transformers_resize_gives():
    image = noise((61, 80), 1)
    blip = processor("BlipImageProcessorPil", size={"height": 56, "width": 56})
    theirs = blip(Image.fromarray(image), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    mean, std = np.array(blip.image_mean), np.array(blip.image_std)
    ours = (minigpt_v2.preprocess(image, 56)["pixels"] / 255 - mean) / std
    assert np.abs(ours - theirs).max() < 1e-5
    # Planted: padded to a square first, as LLaVA's are.
    assert np.abs(images.preprocess(image, 56).astype(int) - minigpt_v2.preprocess(image, 56)["pixels"]).max() > 10


def test_a_point_stays_at_its_share_of_both_sides():
    image = np.zeros((100, 300, 3), np.uint8)
    image[20:30, 240:270] = 255
    rows, columns = np.nonzero(minigpt_v2.preprocess(image, 448)["pixels"][..., 0] > 127)
    assert abs(rows.mean() / 448 - 0.25) < 0.005 and abs(columns.mean() / 448 - 0.85) < 0.005


# ------------------------------------------------------------------ Llama-3.2-Vision

TILED = [
    (1, 1), (1, 4000), (4000, 1), (3, 700), (56, 56), (57, 56), (56, 113), (112, 112), (224, 56), (55, 225), (90, 160),
    (160, 90), (300, 501), (501, 300), (20, 30), (168, 60), (113, 400), (50, 100),
]  # fmt: skip


def tiles(tile_px, **options):
    return processor("MllamaImageProcessorPil", size={"height": tile_px, "width": tile_px}, **options)


@pytest.mark.parametrize("tile_px", [28, 56])
@pytest.mark.parametrize("shape", TILED)
def test_tiles_are_the_references(shape, tile_px):
    image = noise(shape)
    theirs = tiles(tile_px, do_rescale=False, do_normalize=False)(Image.fromarray(image), return_tensors="np")
    ours = mllama.preprocess(image, tile_px)
    assert ours["pixels"].dtype == np.uint8
    np.testing.assert_array_equal(ours["pixels"], theirs["pixel_values"][0, 0].transpose(0, 2, 3, 1))
    assert ours["aspect_ratio_ids"] == theirs["aspect_ratio_ids"][0, 0]
    assert ours["num_tiles"] == theirs["num_tiles"][0][0] == theirs["aspect_ratio_mask"][0, 0].sum()


def test_every_grid_is_chosen_by_some_image():
    found = {mllama.GRIDS[mllama.preprocess(noise(shape), 56)["aspect_ratio_ids"] - 1] for shape in TILED}
    assert found == set(mllama.GRIDS)


def test_choice_and_size_are_the_references_for_random_shapes():
    processing = pytest.importorskip("transformers.models.mllama.image_processing_pil_mllama")
    rng = np.random.default_rng(0)
    for height, width in np.exp(rng.uniform(0, np.log(5000), (1000, 2))).astype(int).tolist():
        canvas = processing.get_optimal_tiled_canvas(height, width, 4, 560)
        grid = mllama.choose_grid(height, width, 560)
        assert tuple(side * 560 for side in grid) == canvas
        assert mllama.fitted_size(height, width, grid, 560) == processing.get_image_size_fit_to_canvas(
            height, width, *canvas, 560
        )


def test_normalised_behind_the_padding_as_the_reference():
    """What the device does with the bytes: black becomes -mean / std within a tile, absent tiles are 0."""
    image = noise((50, 100))
    theirs = tiles(56, image_mean=tuple(MEAN), image_std=tuple(STD))(Image.fromarray(image), return_tensors="np")
    ours = mllama.preprocess(image, 56)
    normalised = (ours["pixels"] / 255 - MEAN) / STD
    normalised[ours["num_tiles"] :] = 0
    assert np.abs(normalised.transpose(0, 3, 1, 2) - theirs["pixel_values"][0, 0]).max() < 1e-5
    assert ours["num_tiles"] == 2


# ------------------------------------------------------------------ NExT-Chat

PADDED = [(40, 40), (31, 50), (50, 31), (1, 7), (64, 33), (90, 200)]


@pytest.mark.parametrize("shape", PADDED)
def test_clips_square_is_white_around_the_image(shape):
    """PIL's own pasting and bicubic resize, with odd remainders below and right."""
    side = max(shape)
    square = Image.new("RGB", (side, side), (255, 255, 255))
    square.paste(Image.fromarray(noise(shape)), ((side - shape[1]) // 2, (side - shape[0]) // 2))
    expected = np.asarray(square.resize((28, 28), Image.Resampling.BICUBIC))
    found = next_chat.preprocess(noise(shape), 28)
    assert list(found) == ["pixels"]
    np.testing.assert_array_equal(found["pixels"], expected)
    # Planted: LLaVA's fill is CLIP's mean colour.
    if shape[0] != shape[1]:
        assert (images.preprocess(noise(shape), 28) != expected).any()


@pytest.mark.parametrize("shape", PADDED)
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


@pytest.mark.parametrize("shape", PADDED)
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


# ------------------------------------------------------------------ Qwen2-VL

RELEASED = ImageSizes()
SMALL = ImageSizes(patch_size_px=4, min_pixels=256, max_pixels=4096)
# Of the small size those that fit.
CUT = [
    (1, 1), (28, 28), (56, 84), (1, 97), (97, 1), (5, 300), (42, 70), (333, 127), (301, 501), (3, 600), (1500, 1100),
]  # fmt: skip
CASES = [(RELEASED, shape) for shape in CUT] + [(SMALL, shape) for shape in CUT if max(shape) <= 60 * min(shape)]


def patches(sizes: ImageSizes, **options):
    limits = {"shortest_edge": sizes.min_pixels, "longest_edge": sizes.max_pixels}
    cut = {"patch_size": sizes.patch_size_px, "merge_size": sizes.merge}
    return processor("Qwen2VLImageProcessorPil", size=limits, **cut, **options)


@pytest.mark.parametrize(("sizes", "shape"), CASES)
def test_patches_are_the_references(sizes, shape):
    image = noise(shape)
    expected = patches(sizes, do_rescale=False, do_normalize=False)(Image.fromarray(image), return_tensors="np")
    found = qwen2_vl.preprocess(image, sizes)
    assert found["grids"].tolist() == expected["image_grid_thw"][0, 1:].tolist()
    number = found["grids"].prod()
    frames = expected["pixel_values"].reshape(number, 3, 2, -1)
    assert found["pixels"].dtype == np.uint8 and found["pixels"].shape == (sizes.num_slots, 3 * sizes.patch_size_px**2)
    for frame in (0, 1):
        np.testing.assert_array_equal(found["pixels"][:number], frames[:, :, frame].reshape(number, -1))
    assert not found["pixels"][number:].any()
    assert qwen2_vl.num_image_tokens(*shape, sizes) == number // 4 <= sizes.max_image_tokens


def test_normalised_on_the_device_they_are_the_references_numbers():
    image = noise((61, 90), 1)
    expected = patches(RELEASED)(Image.fromarray(image), return_tensors="np")["pixel_values"]
    found = qwen2_vl.preprocess(image, RELEASED)
    config = vit.Qwen2VitConfig()
    bytes_ = jnp.asarray(found["pixels"])[None, : found["grids"].prod()]
    ours = vit._frames(vit._normalise(bytes_, config), config)
    assert np.abs(np.asarray(ours)[0] - expected).max() < 1e-5


def test_patches_stand_block_by_block():
    sizes = ImageSizes(patch_size_px=2, min_pixels=16, max_pixels=64)
    image = np.repeat(np.arange(8, dtype=np.uint8).reshape(2, 4).repeat(2, 0).repeat(2, 1)[..., None], 3, axis=2)
    found = qwen2_vl.preprocess(image, sizes)
    assert found["grids"].tolist() == [2, 4]
    assert found["pixels"][:, 0].tolist() == [0, 1, 4, 5, 2, 3, 6, 7, *[0] * 8]


@pytest.mark.parametrize("shape", [(1, 4000), (4000, 1), (10, 2001)])
def test_too_narrow_images_are_refused(shape):
    with pytest.raises(DataError, match=r"times the other; expected at most 200"):
        qwen2_vl.preprocess(noise(shape), RELEASED)


def test_images_of_more_tokens_than_there_is_room_for_are_refused():
    with pytest.raises(DataError, match="1600 x 8 pixels become 56 x 1 tokens; expected at most 16"):
        qwen2_vl.smart_resize(8, 1600, ImageSizes(patch_size_px=4, min_pixels=256, max_pixels=1024))


def test_sizes_over_the_whole_range_are_the_references():
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as original

    rng = np.random.default_rng(2)
    for height, width in rng.integers(1, 3000, (2000, 2)).tolist():
        if max(height, width) / min(height, width) <= 200:
            limits = dict(min_pixels=RELEASED.min_pixels, max_pixels=RELEASED.max_pixels)
            assert qwen2_vl.smart_resize(height, width, RELEASED) == original(height, width, **limits)
