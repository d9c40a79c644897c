"""Decoding of odd and hostile images, and pixels equal to the reference's."""

import io

import numpy as np
import pytest
from PIL import Image, ImageFile

from medcg_jax.data.images import BACKGROUND, FILL, ImageError, load_image, pad_to_square, preprocess, resize

MANY = 10_000_000
SHAPES = [(1, 1), (1, 97), (97, 1), (5, 300), (33, 32), (32, 33), (64, 64), (200, 150), (301, 501), (336, 336)]


def noise(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size_px", [32, 336])
def test_pixels_are_the_references(shape, size_px):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    processor = transformers.LlavaImageProcessorPil(
        do_pad=True, size={"shortest_edge": size_px}, crop_size=size_px, do_rescale=False, do_normalize=False
    )
    image = noise(shape)
    expected = processor(Image.fromarray(image), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    found = preprocess(image, size_px)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_padding_is_in_the_middle_and_touches_nothing(shape):
    image = noise(shape, 1)
    square = pad_to_square(image)
    side, (height, width) = max(shape), shape
    assert square.shape == (side, side, 3)
    top, left = (side - height) // 2, (side - width) // 2
    np.testing.assert_array_equal(square[top : top + height, left : left + width], image)
    around = np.ones((side, side), bool)
    around[top : top + height, left : left + width] = False
    assert (square[around] == FILL).all()


def test_resize_of_the_right_size_changes_nothing():
    image = noise((24, 24), 2)
    np.testing.assert_array_equal(resize(image, 24), image)


def test_sixteen_bits_are_scaled_not_clipped():
    grey = np.array([[0, 257, 32896], [65535, 128, 129]], np.uint16)
    found = load_image(encoded(Image.fromarray(grey)), MANY)
    np.testing.assert_array_equal(found[..., 0], [[0, 1, 128], [255, 0, 1]])
    assert (found == found[..., :1]).all()


def test_greys_beyond_sixteen_bits_and_floats_are_refused():
    wide = Image.fromarray(np.array([[70000, 1]], np.int32))
    with pytest.raises(ImageError, match="from 1 to 70000"):
        load_image(encoded(wide, "TIFF"), MANY)
    with pytest.raises(ImageError, match="floating-point"):
        load_image(encoded(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"), MANY)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_show_the_background(mode):
    layer = Image.new("RGBA", (2, 1), (200, 200, 200, 255))
    layer.putpixel((1, 0), (200, 200, 200, 0))
    if mode == "P":
        image = Image.new("P", (2, 1))
        image.putpalette([200, 200, 200, 90, 90, 90])
        image.putpixel((1, 0), 1)
        content = encoded(image, transparency=1)
    else:
        content = encoded(layer.convert(mode))
    np.testing.assert_array_equal(load_image(content, MANY), [[[200, 200, 200], BACKGROUND]])


def test_an_image_is_turned_as_its_exif_says():
    upright = noise((6, 4), 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.fromarray(np.rot90(upright).copy())
    np.testing.assert_array_equal(load_image(encoded(stored, exif=exif), MANY), upright)


def test_the_first_of_several_frames_is_taken():
    frames = [Image.new("RGB", (3, 2), color) for color in ("#204060", "#ffffff")]
    content = encoded(frames[0], "PNG", save_all=True, append_images=frames[1:])
    assert (load_image(content, MANY) == (32, 64, 96)).all()


def test_size_is_refused_from_the_header(monkeypatch):
    content = encoded(Image.new("RGB", (40, 30)))
    assert load_image(content, 1600).shape == (30, 40, 3)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="40 x 30 pixels; at most 1199"):
        load_image(content, 1199)
    with pytest.raises(ImageError, match="pad to 40 x 40; at most 1599"):
        load_image(content, 1599)


def test_a_truncated_file_is_refused_even_when_the_process_allows_them(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for kind in ("PNG", "JPEG"):
        content = encoded(Image.fromarray(noise((64, 64))), kind)
        load_image(content, MANY)
        with pytest.raises(ImageError):
            load_image(content[: len(content) // 2], MANY)


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"plain text", b"\x89PNG\r\n\x1a\n", b"BM" + bytes(60)])
def test_what_is_no_image_is_refused(content):
    with pytest.raises(ImageError):
        load_image(content, MANY)


def test_random_damage_gives_an_image_or_a_refusal():
    generator = np.random.default_rng(7)
    refused = 0
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"):
        good = bytearray(encoded(Image.fromarray(noise((16, 16))), kind))
        for _ in range(40):
            bad = bytearray(good)
            for place in generator.integers(0, len(bad), 4):
                bad[place] = generator.integers(256)
            try:
                found = load_image(bytes(bad), MANY)
            except ImageError:
                refused += 1
            else:
                assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3
    assert refused > 20
