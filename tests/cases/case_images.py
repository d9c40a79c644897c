"""Rows about images and DICOM: the pixels that come, or one line that says why none do."""

import struct
import sys
import zlib
from pathlib import Path

import numpy as np
from harness import SHARED, call, medcg, refused, told

INPUTS = SHARED / "cases" / "inputs"
MAX_PIXELS = 50_000_000


def image(source: Path | bytes) -> np.ndarray:
    from medcg_jax.data.images import load_image

    return load_image(source, MAX_PIXELS)


def refusal(source: Path | bytes, *words: str) -> str:
    """The line of a refusal, by a process of its own so that seconds and memory are its own."""
    from medcg_jax.data.records import DataError

    def read() -> int:
        try:
            image(source)
        except DataError as error:
            print(f"medcg: {error}", file=sys.stderr)
            return 2
        return 0

    return refused(call(read, timeout_s=30), *words)


def png_many_chunks(folder: Path) -> str:
    def chunk(name: bytes, content: bytes = b"") -> bytes:
        return struct.pack(">L", len(content)) + name + content + struct.pack(">L", zlib.crc32(name + content))

    rows = zlib.compress(b"".join(b"\0" + bytes(24) for _ in range(8)))
    ihdr = chunk(b"IHDR", struct.pack(">LLBBBBB", 8, 8, 8, 2, 0, 0, 0))
    whole = b"\x89PNG\r\n\x1a\n" + ihdr + chunk(b"vpAg") * 400_000 + chunk(b"IDAT", rows) + chunk(b"IEND")
    return refusal(whole, "chunks")


def ppm_comment(folder: Path) -> str:
    return refusal(b"P6 #" + b"x" * 50_000_000)


def sparse_image(folder: Path) -> str:
    import os

    import trees

    root = trees.write_tree(folder / "tree")
    victim = root / trees.raw_record(1)["image"]
    os.truncate(victim, 60 * 2**30)
    result = medcg("data", "check", root)
    assert result.growth_mb < 500, result.growth_mb
    return told(result, victim.name, status=(1, 2))


def deep_grey_dark(folder: Path) -> str:
    tree = INPUTS / "deep_grey_dark" / "tree"
    told(medcg("data", "check", tree), "deep_grey")
    return told(medcg("data", "prepare", tree, folder / "out", "--image=keep"), "deep_grey=percentile")


def dicom_bare_refusals(folder: Path) -> str:
    base = INPUTS / "dicom_bare_refusals"
    for name in ("rgb_no_planar", "voi_item_without_data", "window_decimal_comma", "frames_0"):
        pixels = image(base / f"{name}.dcm")
        assert pixels.ndim == 3 and pixels.max() > pixels.min(), name
    try:
        pixels = image(base / "jpeg8_in_16.dcm")
        return f"five shown; jpeg8_in_16 mean {pixels.mean():.1f}"
    except ValueError as error:
        assert "BitsAllocated" in str(error), error
        return str(error)


def dicom_padding_value(folder: Path) -> str:
    """Padding is left out: the rest of the picture uses the whole range."""
    import pydicom

    base = INPUTS / "dicom_padding_value"
    plain = pydicom.dcmread(base / "us_of_signed.dcm")
    plain.add_new(0x00280120, "SS", -2000)
    plain.save_as(folder / "plain.dcm")
    expected = image(folder / "plain.dcm")
    assert np.array_equal(image(base / "us_of_signed.dcm"), expected), "US and SS padding differ"
    mean = image(base / "range_limit.dcm").mean()
    assert abs(mean - 95.6) < 3, f"mean {mean:.1f}"
    assert abs(expected.mean() - 95.6) < 3, f"mean {expected.mean():.1f}"
    return f"mean {expected.mean():.1f} and {mean:.1f}"


def dicom_pixels_longer_than_declared(folder: Path) -> str:
    base = INPUTS / "dicom_pixels_longer_than_declared"
    refusal(base / "bits8_data16.dcm")
    line = refusal(base / "frames3_undeclared.dcm")
    try:
        pixels = image(base / "ybr422_full_length.dcm")
    except ValueError as error:
        return str(error)
    left, right = pixels[pixels.shape[0] // 2, 1], pixels[pixels.shape[0] // 2, -2]
    assert left[0] > 150 > left[2] and right[2] > 150 > right[0], (left, right)
    return line


def dicom_planar1_compressed(folder: Path) -> str:
    for name in ("jpeg", "j2k", "jpeg_lossless"):
        pixels = image(INPUTS / "dicom_planar1_compressed" / f"{name}.dcm").astype(int)
        height, width = pixels.shape[:2]
        left, right = pixels[height // 2, width // 4], pixels[height // 2, 3 * width // 4]
        assert abs(left - (200, 30, 30)).max() < 20 and abs(right - (30, 30, 200)).max() < 20, (name, left, right)
    return f"red {left} left, blue {right} right"


def dicom_voi_lut_bits(folder: Path) -> str:
    pixels = image(INPUTS / "dicom_voi_lut_bits" / "cr.dcm")
    assert pixels.min() == 0 and pixels.max() >= 250, (pixels.min(), pixels.max())
    return f"values {pixels.min()} to {pixels.max()}"


def tiff_orientation_size(folder: Path) -> str:
    import shutil

    tree = shutil.copytree(INPUTS / "tiff_orientation_size" / "tree", folder / "tree")
    told(medcg("data", "check", tree))
    told(medcg("data", "prepare", tree, folder / "out", "--image=keep"))
    told(medcg("data", "stats", tree, folder / "stats"))
    base = INPUTS / "tiff_orientation_size"
    flags = ("--subset=39", "--data_no=88")
    shutil.copy(base / "labels_stored.csv", tree)
    shutil.copy(base / "labels_upright.csv", tree)
    line = refused(medcg("data", "format", tree / "labels_stored.csv", tree, *flags))
    told(medcg("data", "format", tree / "labels_upright.csv", tree, *flags))
    return line


ROWS = {
    run.__name__: run
    for run in (
        png_many_chunks, ppm_comment, sparse_image, deep_grey_dark, dicom_bare_refusals, dicom_padding_value,
        dicom_pixels_longer_than_declared, dicom_planar1_compressed, dicom_voi_lut_bits, tiff_orientation_size,
    )
}  # fmt: skip
