"""Tiles equal to those of transformers' processor, whatever the image's shape."""

import numpy as np
import pytest
from PIL import Image

from medcg_jax.families.mllama.rows import GRIDS, choose_grid, fitted_size, preprocess

SHAPES = [
    (1, 1), (1, 4000), (4000, 1), (3, 700), (56, 56), (57, 56), (56, 113), (112, 112), (224, 56), (55, 225), (90, 160),
    (160, 90), (300, 501), (501, 300), (20, 30), (168, 60), (113, 400), (50, 100),
]  # fmt: skip


def noise(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def processor(tile_px, **options):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    return transformers.MllamaImageProcessorPil(size={"height": tile_px, "width": tile_px}, **options)


@pytest.mark.parametrize("tile_px", [28, 56])
@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_are_the_references(shape, tile_px):
    image = noise(shape)
    theirs = processor(tile_px, do_rescale=False, do_normalize=False)(Image.fromarray(image), return_tensors="np")
    ours = preprocess(image, tile_px)
    assert ours["pixels"].dtype == np.uint8
    np.testing.assert_array_equal(ours["pixels"], theirs["pixel_values"][0, 0].transpose(0, 2, 3, 1))
    assert ours["aspect_ratio_ids"] == theirs["aspect_ratio_ids"][0, 0]
    assert ours["num_tiles"] == theirs["num_tiles"][0][0] == theirs["aspect_ratio_mask"][0, 0].sum()


def test_every_grid_is_chosen_by_some_image():
    found = {GRIDS[preprocess(noise(shape), 56)["aspect_ratio_ids"] - 1] for shape in SHAPES}
    assert found == set(GRIDS)


def test_choice_and_size_are_the_references_for_random_shapes():
    processing = pytest.importorskip("transformers.models.mllama.image_processing_pil_mllama")
    rng = np.random.default_rng(0)
    for height, width in np.exp(rng.uniform(0, np.log(5000), (1000, 2))).astype(int).tolist():
        canvas = processing.get_optimal_tiled_canvas(height, width, 4, 560)
        grid = choose_grid(height, width, 560)
        assert tuple(side * 560 for side in grid) == canvas
        assert fitted_size(height, width, grid, 560) == processing.get_image_size_fit_to_canvas(
            height, width, *canvas, 560
        )


def test_normalised_behind_the_padding_as_the_reference():
    """What the device does with the bytes: black becomes -mean / std within a tile, absent tiles are 0."""
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    image = noise((50, 100))
    theirs = processor(56, image_mean=mean, image_std=std)(Image.fromarray(image), return_tensors="np")
    ours = preprocess(image, 56)
    normalised = (ours["pixels"] / 255 - np.array(mean)) / np.array(std)
    normalised[ours["num_tiles"] :] = 0
    assert np.abs(normalised.transpose(0, 3, 1, 2) - theirs["pixel_values"][0, 0]).max() < 1e-5
    assert ours["num_tiles"] == 2
