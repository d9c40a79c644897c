"""Images that would take minutes, or gigabytes, are refused within seconds by a limit that the message states."""

import io
import os
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image
from trees import raw_record, write_subset

from medcg_jax.data import examine, images
from medcg_jax.data.examine import Examined, examine_all
from medcg_jax.data.images import ImageError, image_size, load_image

MANY = 10_000_000
PIXELS = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8))


def encoded(kind: str, **options) -> bytes:
    out = io.BytesIO()
    PIXELS.save(out, kind, **options)
    return out.getvalue()


def chunk(name: bytes, data: bytes = b"") -> bytes:
    return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")


def before(content: bytes, mark: bytes, more: bytes, back: int = 0) -> bytes:
    place = content.index(mark) - back
    return content[:place] + more + content[place:]


def big_tiff(tags: int) -> bytes:
    return struct.pack("<2sHHHQQ", b"II", 43, 8, 0, 16, tags) + struct.pack("<HHQQ", 256, 3, 1, 8) * tags


def strips(number: int) -> bytes:
    tags = [(256, 4, 1, 8), (257, 4, 1, 8), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, number, 200)]
    body = b"".join(struct.pack("<HHLL", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<LH", 8, len(tags)) + body + bytes(4 * number)


def webp_exif(exif: bytes) -> bytes:
    body = b"WEBPVP8X" + struct.pack("<L", 10) + b"\x08\0\0\0" + b"\x07\0\0" * 2 + encoded("WEBP")[12:]
    body += b"EXIF" + struct.pack("<L", len(exif)) + exif
    return b"RIFF" + struct.pack("<L", len(body)) + body


PNG, JPEG, GIF = encoded("PNG"), encoded("JPEG"), encoded("GIF")
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
    out = io.BytesIO()
    Image.frombytes("L", (120, 100), tag * 1000).save(out, "TIFF")
    assert load_image(out.getvalue(), MANY).shape == (100, 120, 3)
    assert load_image(JPEG[:-2] + b"\xff\xd0" * 100_000 + JPEG[-2:], MANY).shape == (8, 8, 3)
    assert load_image(b"P3\n# one\n2 1 # two\n255 1 2 3 # three\n4 5 6", MANY).tolist() == [[[1, 2, 3], [4, 5, 6]]]
    noise = np.random.default_rng(1).integers(0, 256, (700, 700, 3), np.uint8)
    for kind in ("PNG", "GIF", "TIFF", "JPEG", "WEBP", "PPM", "BMP"):
        out = io.BytesIO()
        Image.fromarray(noise).save(out, kind)
        assert load_image(out.getvalue(), MANY).shape == (700, 700, 3), kind


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
    stored, out = Image.fromarray(turned(upright, orientation)), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    form, _, how = kind.partition(" ")
    if how == "grey":
        stored = Image.fromarray(np.asarray(stored.convert("L")).astype(np.uint16) * 257)
    options = {"deflated": {"compression": "tiff_adobe_deflate"}, "XMP": {"tiffinfo": {700: XMP % orientation}}}
    options = {"lossless": True} if form == "WEBP" else {"quality": 100} if form == "JPEG" else options.get(how, {})
    if how not in ("XMP", "late"):
        options["exif"] = exif
    stored.save(out, form, **options)
    content = out.getvalue()
    if how == "late":
        content = before(content, b"IEND", chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")), 4)
    found = load_image(content, MANY)
    assert found.shape == (40, 20, 3) and np.abs(found.astype(int) - upright).max() < 12
    assert image_size(content, MANY) == (40, 20)
