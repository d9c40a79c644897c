"""Decoding of odd and hostile images, pixels equal to the reference's, limits on what takes minutes or gigabytes."""

import io
import os
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile, PngImagePlugin, TiffImagePlugin
from trees import raw_record, write_subset

from medcg_jax.data import examine, images
from medcg_jax.data.examine import Examined, examine_all
from medcg_jax.data.images import (
    BACKGROUND,
    FILL,
    ImageError,
    image_size,
    load_image,
    pad_to_square,
    preprocess,
    range_used,
    read_image,
)  # fmt: skip
from medcg_jax.data.reading import Reading, check_reading, frame_index
from medcg_jax.data.records import DataError
from medcg_jax.untrusted import open_regular

MANY = 10_000_000
SHAPES = [(1, 1), (1, 97), (5, 300), (33, 32), (64, 64), (200, 150), (301, 501), (336, 336)]


PIXELS = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8))


def noise(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def chunk(name: bytes, data: bytes = b"") -> bytes:
    return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")


def before(content: bytes, mark: bytes, more: bytes, back: int = 0) -> bytes:
    place = content.index(mark) - back
    return content[:place] + more + content[place:]


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


def test_the_first_of_several_frames_is_taken():
    frames = [Image.new("RGB", (3, 2), color) for color in ("#204060", "#ffffff")]
    content = encoded(frames[0], "PNG", save_all=True, append_images=frames[1:])
    assert (load_image(content, MANY) == (32, 64, 96)).all()


def test_size_is_refused_from_the_header(monkeypatch):
    content = encoded(Image.new("RGB", (40, 30)))
    assert load_image(content, 1600).shape == (30, 40, 3)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="40 x 30 pixels; expected at most 1199"):
        load_image(content, 1199)
    with pytest.raises(ImageError, match="pad to 40 x 40; expected at most 1599"):
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


DEEP = np.linspace(1000, 5000, 64 * 64).reshape(64, 64)


@pytest.mark.parametrize("dtype, kind, depth", [
    (np.uint16, "PNG", "16-bit"), (np.uint16, "TIFF", "16-bit"), (np.int32, "TIFF", "32-bit"),
    (np.float32, "TIFF", "32-bit floating-point"),
])  # fmt: skip
def test_deep_greys_by_percentile_and_window(dtype, kind, depth):
    content = encoded(Image.fromarray(DEEP.astype(dtype)), kind)
    found, how = read_image(content, MANY, Reading(deep_grey="percentile"))
    assert how == f"{depth} greys, percentiles 0.5 to 99.5"
    wanted = np.clip((DEEP - 1020) / 3960, 0, 1) * 255
    assert np.abs(found - wanted[..., None]).max() < 1 and (found[0, 0] == 0).all() and (found[-1, -1] == 255).all()
    found, how = read_image(content, MANY, Reading(window="3000/2000", deep_grey="window"))
    assert how == f"{depth} greys, window 3000/2000"
    assert np.abs(found - np.clip((DEEP - 2000) / 2000, 0, 1)[..., None] * 255).max() < 1


def test_what_the_range_means():
    low = Image.fromarray(np.array([[0, 4095]], np.uint16))
    assert read_image(encoded(low), MANY)[1] == "16-bit greys, range 0 to 65535"
    assert load_image(encoded(low), MANY)[0, 1, 0] == 16
    assert read_image(encoded(Image.new("L", (2, 2))), MANY)[1] == ""
    signed = TiffImagePlugin.ImageFileDirectory_v2()
    signed[TiffImagePlugin.SAMPLEFORMAT] = 2
    below = encoded(Image.fromarray(np.array([[-5, 1]], np.int32)), "TIFF", tiffinfo=signed)
    with pytest.raises(ImageError, match="from -5 to 1; .*data.deep_grey=percentile or window"):
        load_image(below, MANY)
    assert load_image(below, MANY, Reading(deep_grey="percentile"))[0, :, 0].tolist() == [0, 255]
    constant = encoded(Image.fromarray(np.full((4, 4), 700, np.uint16)))
    assert load_image(constant, MANY, Reading(deep_grey="percentile")).max() == 0


def test_numbers_that_are_none_are_refused():
    for bad in (np.nan, np.inf):
        content = encoded(Image.fromarray(np.array([[bad, 1]], np.float32)), "TIFF")
        for reading in (Reading(deep_grey="percentile"), Reading(window="3/4", deep_grey="window")):
            with pytest.raises(ImageError, match="finite"):
                load_image(content, MANY, reading)


@pytest.mark.parametrize("reading", [Reading(), Reading(deep_grey="percentile"), Reading("30000/60000", "window")])
def test_white_is_zero(reading):
    image = Image.fromarray((DEEP * 13).astype(np.uint16))
    plain = encoded(image, "TIFF")
    # PhotometricInterpretation, one SHORT: 1 becomes 0.
    entry = b"\x06\x01\x03\x00\x01\x00\x00\x00"
    assert plain.count(entry) == 1
    turned = plain.replace(entry + b"\x01", entry + b"\x00")
    found, how = read_image(turned, MANY, reading)
    assert how.endswith(", inverted") and (found == 255 - load_image(plain, MANY, reading)).all()


@pytest.mark.parametrize("reading, named", [
    (Reading(window="lungs"), "data.window='lungs'"), (Reading(window="1/0"), "data.window='1/0'"),
    (Reading(window="nan/5"), "data.window="), (Reading(window="1/2/3"), "data.window="),
    (Reading(deep_grey="auto"), "data.deep_grey='auto'"), (Reading(deep_grey="window"), "data.window=''"),
    (Reading(window="lung", deep_grey="window"), "data.window='lung'"), (Reading(frame="-1"), "data.frame='-1'"),
    (Reading(frame="second"), "data.frame='second'"), (Reading(frame=""), "data.frame=''"),
])  # fmt: skip
def test_a_reading_that_there_is_not(reading, named):
    with pytest.raises(DataError, match=named) as error:
        check_reading(reading)
    assert not isinstance(error.value, ImageError) and "\n" not in str(error.value)
    with pytest.raises(DataError, match=named):
        load_image(encoded(Image.fromarray(DEEP.astype(np.uint16))), MANY, reading)


def test_readings_that_there_are():
    for reading in (Reading(), Reading("lung"), Reading("40/80", "window", "last"), Reading("-600/1500.5", frame="12")):
        check_reading(reading)
    assert [frame_index(f, 12) for f in ("first", "middle", "last", "0", "11")] == [0, 6, 11, 0, 11]
    assert frame_index("middle", 1) == 0


def test_inks_come_the_right_way_round():
    colors = Image.new("RGB", (32, 32), (250, 40, 20))
    found = load_image(encoded(colors.convert("CMYK"), "JPEG", quality=95), MANY)
    assert np.abs(found.astype(int) - (250, 40, 20)).max() < 12
    # Adobe's marker says 2 for inks stored by luminance and colour, turned round: no luminance is no ink at all.
    for cyan, light in ((255, 255), (0, 0)):
        inks = encoded(Image.new("CMYK", (16, 16), (cyan, 128, 128, 0)), "JPEG", quality=95)
        place = inks.index(b"Adobe") + 11
        assert inks[place] == 0
        ycck = inks[:place] + b"\x02" + inks[place + 1 :]
        assert np.abs(load_image(ycck, MANY).astype(int) - light).max() < 6


def test_text_of_a_png_is_not_inflated_without_bound(monkeypatch):
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", 2**40)
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_MEMORY", 2**40)
    content = encoded(Image.new("L", (4, 4)))
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**24), 9))
    with pytest.raises(ImageError):
        load_image(before(content, b"IDAT", text, 4), MANY)


def test_a_frame_of_a_gif_is_whole_or_refused():
    frames = [Image.fromarray(noise((40, 40), seed)) for seed in range(2)]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert load_image(content[: len(content) - 200], MANY).shape == (40, 40, 3)
    with pytest.raises(ImageError):
        load_image(content[: len(content) // 4], MANY)


def test_a_file_is_opened_once(tmp_path, monkeypatch):
    path, calls = tmp_path / "a.png", []
    Image.new("RGB", (4, 3)).save(path)
    monkeypatch.setattr(images, "open_regular", lambda *a: calls.append(a) or open_regular(*a))
    assert load_image(path, MANY).shape == (3, 4, 3) and image_size(path, MANY) == (3, 4)
    assert calls == [(path, images.MAX_DICOM_BYTES)] * 2


def test_how_much_of_the_range_is_used():
    def used(image, **reading):
        content = encoded(image, reading.pop("kind", "PNG"))
        return range_used(*read_image(content, MANY, Reading(**reading)))

    twelve = Image.fromarray(np.linspace(0, 4095, 64).astype(np.uint16).reshape(8, 8))
    hounsfield = Image.fromarray((np.linspace(-1024, 1500, 64) + 32768).astype(np.uint16).reshape(8, 8))
    whole = Image.fromarray(np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8))
    assert [used(twelve), used(whole)] == [16 / 255, 1] and 0.03 < used(hounsfield) < 0.05
    assert used(twelve, kind="TIFF") == 16 / 255
    # What was stretched uses all, and 8 bits are what they are.
    assert used(twelve, deep_grey="percentile") is None and used(Image.new("L", (8, 8))) is None


def test_colours_of_sixteen_bits_say_so():
    pixels = np.full((4, 5, 3), 4095, ">u2")
    head = b"".join(n.to_bytes(4, "big") for n in (5, 4)) + bytes([16, 2, 0, 0, 0])
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND")
    for deep in (content, b"P6 5 4 65535\n" + pixels.tobytes()):
        found, how = read_image(deep, MANY)
        assert how == "16-bit colours, range 0 to 65535" and range_used(found, how) == 0
        assert abs(int(found.max()) - 15.5) <= 1


# --- what would take minutes, or gigabytes


def big_tiff(tags: int) -> bytes:
    return struct.pack("<2sHHHQQ", b"II", 43, 8, 0, 16, tags) + struct.pack("<HHQQ", 256, 3, 1, 8) * tags


def strips(number: int) -> bytes:
    tags = [(256, 4, 1, 8), (257, 4, 1, 8), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, number, 200)]
    body = b"".join(struct.pack("<HHLL", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<LH", 8, len(tags)) + body + bytes(4 * number)


def webp_exif(exif: bytes) -> bytes:
    body = b"WEBPVP8X" + struct.pack("<L", 10) + b"\x08\0\0\0" + b"\x07\0\0" * 2 + encoded(PIXELS, "WEBP")[12:]
    body += b"EXIF" + struct.pack("<L", len(exif)) + exif
    return b"RIFF" + struct.pack("<L", len(body)) + body


PNG, JPEG, GIF = encoded(PIXELS), encoded(PIXELS, "JPEG"), encoded(PIXELS, "GIF")
PIECES = "in more than 300,000 pieces"
BOMBS = {
    "chunks before the pixels": (before(PNG, b"IDAT", chunk(b"abCd") * 150_000, 4), PIECES),
    "chunks behind the pixels": (before(PNG, b"IEND", chunk(b"abCd") * 150_000, 4), PIECES),
    "pixels in empty chunks": (before(PNG, b"IDAT", chunk(b"IDAT") * 200_000, 4), PIECES),
    "comment of a PPM": (b"P6 #" + b"x" * 2_000_000, PIECES),
    "spaces of a PPM": (b"P6" + b" " * 2_000_000, PIECES),
    "comments of a plain PPM": (b"P3 8 8 255\n" + b"#\n" * 2_000_000, "2,000,000 comments"),
    "plain PPM": (b"P2 8 8 255\n" + b" " * 40_000_000, "plain text of .* bytes"),
    "markers of a JPEG": (before(JPEG, b"\xff\xda", b"\xff\xfe\0\x02" * 500_000), PIECES),
    "bytes between markers": (before(JPEG, b"\xff\xda", b"x" * 1_000_000), PIECES),
    "markers behind the first scan": (JPEG[:-2] + b"\xff\xfe\0\x02" * 500_000 + JPEG[-2:], "more than 10,000 markers"),
    "scans": (JPEG[:-2] + JPEG[JPEG.index(b"\xff\xda") : -2] * 60 + JPEG[-2:], "more than 50 scans"),
    "blocks of a GIF": (before(GIF, b"\x2c\0\0\0\0", b"!\xf9\0\0" * 500_000), PIECES),
    "comment blocks of a GIF": (before(GIF, b"\x2c\0\0\0\0", b"!\xfe" + b"\x01x" * 500_000 + b"\0"), PIECES),
    "tags of a BigTIFF": (big_tiff(1_000_000), PIECES),
    "strips of a TIFF": (strips(2_000_000), "a TIFF of 2,000,000 strips or tiles"),
    "EXIF of a PNG": (before(PNG, b"IDAT", chunk(b"eXIf", big_tiff(100_000)), 4), "EXIF in the form of a BigTIFF"),
    "EXIF of a JPEG": (JPEG[:2] + b"\xff\xe1\xff\x00Exif\0\0" + big_tiff(3000) + JPEG[2:], "EXIF in the form"),
    "EXIF of a WebP": (webp_exif(big_tiff(100_000)), "EXIF in the form"),
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("read", [load_image, image_size])
def test_what_takes_minutes_is_refused_in_seconds(name, read):
    content, said = BOMBS[name]
    began = time.process_time()
    with pytest.raises(ImageError, match=said) as error:
        read(content, MANY)
    assert time.process_time() - began < 5 and "\n" not in str(error.value)


def test_what_only_looks_so_is_read():
    # A TIFF's pixels are no tags, restarts are no markers, and a picture has some comments.
    tag = struct.pack("<HHLL", 273, 4, 2**30, 0)
    assert load_image(encoded(Image.frombytes("L", (120, 100), tag * 1000), "TIFF"), MANY).shape == (100, 120, 3)
    assert load_image(JPEG[:-2] + b"\xff\xd0" * 100_000 + JPEG[-2:], MANY).shape == (8, 8, 3)
    assert load_image(b"P3\n# one\n2 1 # two\n255 1 2 3 # three\n4 5 6", MANY).tolist() == [[[1, 2, 3], [4, 5, 6]]]
    large = Image.fromarray(noise((700, 700)))
    for kind in ("PNG", "GIF", "TIFF", "JPEG", "WEBP", "PPM", "BMP"):
        assert load_image(encoded(large, kind), MANY).shape == (700, 700, 3), kind


def test_files_are_regular_and_bounded(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "fifo.png")
    with open(tmp_path / "big.png", "wb") as file:
        file.truncate(60 * 2**30)
    wanted = {"fifo.png": "no regular file", "no.png": "No such"}
    wanted["big.png"] = "64,424,509,440 bytes; at most 2,147,483,648"
    for name, said in wanted.items():
        for read in (load_image, image_size):
            with pytest.raises(ImageError, match=said):
                read(tmp_path / name, MANY)
        assert said in examine.examine(tmp_path / name, MANY, images.Reading()).reason
    monkeypatch.setattr(images, "MAX_IMAGE_BYTES", 100)
    monkeypatch.setattr(images, "MAX_BYTES_PER_PIXEL", 0)
    with pytest.raises(ImageError, match="more than 100 bytes"):
        load_image(PNG, MANY)


def test_memory_that_there_is_not_is_an_error_of_that_image(monkeypatch):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "load", full)
    with pytest.raises(ImageError, match="more memory than there is"):
        load_image(JPEG, MANY)


def slow(path, **_):
    while path.name == "slow.png":
        pass
    return Examined(1, 1)


def test_an_image_that_takes_too_long_is_refused_and_the_others_are_kept(tmp_path, monkeypatch):
    """With a function of this module in the place of the decoder: workers import what they call by its name."""
    monkeypatch.setattr(examine, "examine", slow)
    monkeypatch.setattr(examine, "MAX_SECONDS", 1)
    paths = [tmp_path / name for name in ("a.png", "slow.png", "b.png")]
    found = examine_all(paths, MANY)
    assert [found[path].reason for path in paths] == ["", "took longer than 1 s of processor time", ""]


def test_a_tree_with_bombs_is_judged_record_by_record(tmp_path, capsys):
    from medcg_jax.cli import main

    raws = [raw_record(number, image=f"med-mat/{number}.png") for number in range(1, 6)]
    write_subset(tmp_path, "Subset--04-train", raws)
    (tmp_path / "med-mat/2.png").write_bytes(BOMBS["comment of a PPM"][0])
    (tmp_path / "med-mat/3.png").write_bytes(BOMBS["chunks before the pixels"][0])
    os.truncate(tmp_path / "med-mat/4.png", 3 * 2**30)
    assert main(["data", "check", str(tmp_path)]) == 2
    out = capsys.readouterr().out
    assert "bad records: 3 of 5" in out and out.count(PIECES) == 2 and "at most 2,147,483,648 are read" in out
    assert images.MAX_DICOM_BYTES == 2**31


# --- orientation


def turned(upright: np.ndarray, orientation: int) -> np.ndarray:
    """The pixels as they are stored under an orientation of EXIF."""
    undo = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1]}
    undo |= {5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a), 8: lambda a: np.rot90(a, -1)}
    undo[7] = lambda a: np.rot90(a, 2).transpose(1, 0, 2)
    return np.ascontiguousarray(undo[orientation](upright))


XMP = (
    b'<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf='
    b'"http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" '
    b'tiff:Orientation="%d"/></rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "TIFF deflated", "TIFF grey", "WEBP", "JPEG", "TIFF XMP", "PNG late"])
def test_the_size_of_the_header_is_that_of_the_upright_image(kind, orientation):
    upright = np.zeros((40, 20, 3), np.uint8)
    upright[:20, :10], upright[20:, :10] = (200, 200, 200), (90, 90, 90)
    stored = Image.fromarray(turned(upright, orientation))
    exif = Image.Exif()
    exif[0x0112] = orientation
    form, _, how = kind.partition(" ")
    if how == "grey":
        stored = Image.fromarray(np.asarray(stored.convert("L")).astype(np.uint16) * 257)
    options = {"deflated": {"compression": "tiff_adobe_deflate"}, "XMP": {"tiffinfo": {700: XMP % orientation}}}
    options = {"lossless": True} if form == "WEBP" else {"quality": 100} if form == "JPEG" else options.get(how, {})
    if how not in ("XMP", "late"):
        options["exif"] = exif
    content = encoded(stored, form, **options)
    if how == "late":
        content = before(content, b"IEND", chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")), 4)
    found = load_image(content, MANY)
    assert found.shape == (40, 20, 3) and np.abs(found.astype(int) - upright).max() < 12
    assert image_size(content, MANY) == (40, 20)
