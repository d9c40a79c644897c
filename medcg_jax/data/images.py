"""Images as uint8 RGB: decoded from untrusted files, padded to a square and resized as LLaVA-1.5 does.

Only regular files of a bounded size are read, in a bounded number of reads. `dicom` reads DICOM files; a run's `Reading`
says how greys of more than 8 bits become 8 bits.

Source of the square and the resize: haotian-liu/LLaVA (c121f04) llava/mm_utils.py:expand2square and CLIP's image
processor (bicubic, by PIL on uint8); equal bit for bit to transformers' `LlavaImageProcessorPil(do_pad=True)`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal, cast

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

from medcg_jax.data.reading import (
    PERCENTILES,
    ImageError,
    Reading,
    apply_window,
    by_rows,
    check_reading,
    check_size,
    parse_window,
    stretch,
)
from medcg_jax.data.records import DataError
from medcg_jax.untrusted import FileError, open_regular

# int(mean * 255) of CLIP's channel means.
FILL = (122, 116, 104)
# Shown through transparent pixels.
BACKGROUND = (0, 0, 0)
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
_UNKNOWN = f"not an image of a known format (DICOM, {', '.join(FORMATS)})"
# Files other than DICOM are read whole, up to the larger of these two limits.
MAX_IMAGE_BYTES = 2**27
MAX_BYTES_PER_PIXEL = 8
# A DICOM file may hold hundreds of frames, of which one is read.
MAX_DICOM_BYTES = 2**31
# Parsers of headers read a few bytes at a time: a chunk of a PNG in four reads, a marker of a JPEG in three, a tag of a
# TIFF in two, a block of a GIF in two, a header of a PPM byte by byte, an element of DICOM in two. Pixels come in
# blocks: a PNG of 2**24 pixels of 16 bits in chunks of 8 KiB takes 50,000 reads.
MAX_READS = 300_000
# Functional groups of 2,000 frames have some 100,000 elements.
MAX_DICOM_READS = 300_000
# JPEG: encoders write about ten scans; each costs a pass over all pixels and may be only a few bytes long.
MAX_SCANS = 50
# Of a JPEG; restart markers, of which there may be one a block, are not counted.
MAX_MARKERS = 10_000
# Of a TIFF: with a row in each there are at most 65,535.
MAX_STRIPS = 2**20
MAX_TEXT_BYTES = 2**20
# Of a plain-text PPM, which Pillow parses in Python.
MAX_PLAIN_BYTES = 2**25
MAX_COMMENTS = 1000
# TIFF's PhotometricInterpretation of greys whose greatest value is black, and SampleFormat of unsigned integers.
_WHITE_IS_ZERO = 0
_UNSIGNED = 1
# StripOffsets, StripByteCounts, TileOffsets, TileByteCounts.
_STRIPS = (273, 279, 324, 325)
_WIDE_EXIF = re.compile(rb"(?:EXIF....|eXIf|\xff\xe1..)(?:Exif\0\0)*(?:II\+\0|MM\0\+)", re.DOTALL)
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_DEEP = "16-bit colours, range 0 to 65535"


def is_dicom(file: BinaryIO) -> bool:
    """Whether a file opened at its start has DICOM's mark, or begins with DICOM's file header without the preamble.

    The mark decides, whatever the preamble holds: some files are also TIFF. A data set without any header does not count,
    since it cannot be told from other bytes.
    """
    start = file.read(132)
    file.seek(0)
    return start[128:] == b"DICM" or start.startswith(b"\x02\x00\x00\x00UL\x04\x00")


def load_image(source: str | Path | bytes | BinaryIO, max_pixels: int, reading: Reading = Reading()) -> np.ndarray:
    """uint8[h, w, 3] RGB, upright, decoded by content, not name; a view for greys. See `read_image`."""
    return read_image(source, max_pixels, reading)[0]


def read_image(
    source: str | Path | bytes | BinaryIO, max_pixels: int, reading: Reading = Reading()
) -> tuple[np.ndarray, str]:
    """uint8[h, w, 3] RGB, upright, decoded by content, and how it became 8 bits: "" for an ordinary 8-bit image.

    Formats other than DICOM give their first frame; transparent pixels show `BACKGROUND`. Examples of the text: "DICOM
    window lung -600/1500, frame 3 of 12" (counted from 1), "16-bit greys, percentiles 0.5 to 99.5".

    Args:
      max_pixels: limit of the image and of its padded square, checked in the header before anything is decoded.
      reading: how DICOM and greys of more than 8 bits are read.

    Raises:
      ImageError: no image, truncated, too large, or of a format or depth that is not read.
      DataError: `reading` has an unknown choice.
    """
    _bound_pillow()
    try:
        with opened(source) as file:
            if is_dicom(file):
                from medcg_jax.data.dicom import read_dicom  # with pydicom and its plugins half a second

                return read_dicom(_bounded(file), max_pixels, reading)
            with _open_plain(file, max_pixels) as image:
                return read_opened(image, reading)
    except DataError:
        raise
    except MemoryError as error:
        raise ImageError("cannot be decoded: it takes more memory than there is") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{error}; expected at most {max_pixels} pixels") from error
    except UnidentifiedImageError as error:
        raise ImageError(_UNKNOWN) from error
    except Exception as error:  # decoders raise nearly anything for broken data
        raise ImageError(f"cannot be decoded: {_one_line(error)}") from error


def read_opened(image: Image.Image, reading: Reading = Reading()) -> tuple[np.ndarray, str]:
    """As `read_image`, of an image that Pillow has opened or made; its size is not checked.

    Raises:
      ImageError: its depth is not read. DataError: `reading` has an unknown choice. Whatever Pillow raises for a broken
        file.
    """
    deep = _is_deep_colour(image)
    image.load()
    upright = ImageOps.exif_transpose(image)
    # Tags are read from `image`: the turned copy has none.
    if image.mode == "F" or image.mode.startswith("I"):
        grey, choice = _deep_grey(np.asarray(upright), image, reading)
        return grey_view(grey), choice
    return _to_array(upright), _DEEP if deep else ""


def image_size(source: str | Path | bytes | BinaryIO, max_pixels: int) -> tuple[int, int]:
    """(height, width) in pixels of the image that `load_image` gives, from its header alone.

    Raises:
      ImageError: no image of a known format, or too large.
    """
    _bound_pillow()
    try:
        with opened(source) as file:
            if is_dicom(file):
                from medcg_jax.data.dicom import dicom_size

                return dicom_size(_bounded(file), max_pixels)
            with _open_plain(file, max_pixels) as image:
                # Only for TIFF Pillow gives the size after turning upright.
                tags = getattr(image, "tag_v2", None)
                width, height = image.size
                if tags is not None:
                    width, height = tags[TiffImagePlugin.IMAGEWIDTH], tags[TiffImagePlugin.IMAGELENGTH]
                # Orientations 5 to 8 of EXIF turn the image by a quarter.
                turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
                return (width, height) if turned else (height, width)
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError("its size cannot be read: it takes more memory than there is") from error
    except UnidentifiedImageError as error:
        raise ImageError(_UNKNOWN) from error
    except Exception as error:
        raise ImageError(f"its size cannot be read: {_one_line(error)}") from error


def range_used(image: np.ndarray, read_as: str) -> float | None:
    """Share in 0..1 of black to white that an image uses, if a whole range of deep greys or colours became its 8 bits.

    12 bits in 16-bit words use a sixteenth of the range. None for an image that was read in another way.

    Args:
      image, read_as: as `read_image` gives them.
    """
    if ", range 0 to " not in read_as:
        return None
    return (int(image.max()) - int(image.min())) / 255


def pad_to_square(image: np.ndarray, fill: tuple[int, int, int] = FILL) -> np.ndarray:
    """uint8[s, s, 3], s the longer side: the image centred (odd remainders below and right), `fill` around it."""
    height, width = image.shape[:2]
    if height == width:
        return image
    side = max(height, width)
    square = np.empty((side, side, 3), np.uint8)
    # Whole rows, since numpy is slow at three bytes at a time.
    square.reshape(side, -1)[:] = np.tile(np.asarray(fill, np.uint8), side)
    top, left = (side - height) // 2, (side - width) // 2
    copy_into(square[top : top + height, left : left + width], image)
    return square


def resize(image: np.ndarray, size_px: int) -> np.ndarray:
    """uint8[size_px, size_px, 3] of a square image, by PIL's bicubic filter on uint8."""
    if image.shape[:2] == (size_px, size_px):
        return image
    if is_grey(image):  # each channel is filtered by itself: one takes half the time of three
        grey = Image.fromarray(np.ascontiguousarray(image[..., 0])).resize((size_px, size_px), Image.Resampling.BICUBIC)
        return grey_view(np.asarray(grey))
    return np.asarray(Image.fromarray(image).resize((size_px, size_px), Image.Resampling.BICUBIC))


def is_grey(image: np.ndarray) -> bool:
    """Whether the three channels of uint8[h, w, 3] are equal."""
    if image.strides[2] == 0:
        return True
    for sample in (image[::16, ::16], image):  # few pixels tell nearly every colour image
        if not all(np.array_equal(sample[..., 0], sample[..., channel]) for channel in (1, 2)):
            return False
    return True


def grey_view(grey: np.ndarray) -> np.ndarray:
    """uint8[h, w, 3] of uint8[h, w]: a read-only view."""
    return np.broadcast_to(grey[..., None], (*grey.shape, 3))


def preprocess(image: np.ndarray, size_px: int) -> np.ndarray:
    """uint8[size_px, size_px, 3]: the image padded to a square and resized; greys may be a `grey_view`."""
    return resize(pad_to_square(image), size_px)


def copy_into(to: np.ndarray, array: np.ndarray) -> None:
    """Copies an array into another of its shape. A `grey_view` is copied channel by channel, which is four times faster."""
    if array.ndim and array.strides[-1] == 0:
        for channel in range(array.shape[-1]):
            to[..., channel] = array[..., 0]
    else:
        to[...] = array


class BoundedFile:
    """A binary file with a limited number of reads.

    Args:
      reads: the limit. what: what takes many reads, for the message.
    """

    def __init__(self, file: BinaryIO, reads: int = MAX_READS, what: str = ""):
        self._file, self._left, self._reads = file, reads, reads
        self._what = what or "chunks, markers, tags, strips, blocks or bytes of a header"
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        """As a file's `read`. Raises ImageError beyond the limit."""
        self._left -= 1
        if self._left < 0:
            raise ImageError(f"in more than {self._reads:,} pieces ({self._what}); at most so many are read")
        return self._file.read(size)


def _bounded(file: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, BoundedFile(file, MAX_DICOM_READS, "DICOM elements"))


@contextmanager
def opened(source: str | Path | bytes | BinaryIO) -> Iterator[BinaryIO]:
    """The bytes of an image as a file at its start; an open `source` stays open.

    Raises:
      ImageError: the file is missing, no regular file, or has more than `MAX_DICOM_BYTES`.
    """
    if isinstance(source, bytes):
        yield io.BytesIO(source)
        return
    if not isinstance(source, str | Path):
        source.seek(0)
        yield source
        return
    try:
        file = open_regular(source, MAX_DICOM_BYTES)
    except FileError as error:
        raise ImageError(str(error).removeprefix(f"{source}: ")) from error
    with file:
        yield file


def _bound_pillow() -> None:
    """Sets Pillow's process-wide switches, which other libraries may change.

    Truncated files are not filled with grey, and compressed text of a PNG is inflated only up to a limit.
    """
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    PngImagePlugin.MAX_TEXT_CHUNK = MAX_TEXT_BYTES
    PngImagePlugin.MAX_TEXT_MEMORY = 8 * MAX_TEXT_BYTES


def _open_plain(file: BinaryIO, max_pixels: int) -> Image.Image:
    """Opens an image of `FORMATS` and checks its header against the limits."""
    max_bytes = max(MAX_IMAGE_BYTES, MAX_BYTES_PER_PIXEL * max_pixels)
    content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ImageError(f"more than {max_bytes:,} bytes; at most so many are read (of DICOM files more)")
    _check_tags(content)
    _check_plain(content)
    image = Image.open(cast(BinaryIO, BoundedFile(io.BytesIO(content))), formats=FORMATS)
    check_size(image.size, max_pixels)
    if image.format in ("JPEG", "MPO"):
        _check_scans(content)
    return image


def _check_tags(content: bytes) -> None:
    """Raises ImageError for tags of a TIFF or of EXIF that would take gigabytes or minutes in Python."""
    if _WIDE_EXIF.search(content):
        raise ImageError("EXIF in the form of a BigTIFF, which holds any number of tags; expected that of a TIFF")
    if content[:2] not in (b"II", b"MM"):
        return
    order: Literal["little", "big"] = "little" if content[:2] == b"II" else "big"
    # Bytes of an offset, and of the number of tags. A tag has a number, a type, a number of values and their offset.
    wide, narrow = {42: (4, 2), 43: (8, 8)}.get(int.from_bytes(content[2:4], order), (0, 0))
    if not wide:
        return
    start = int.from_bytes(content[wide : 2 * wide], order)
    tags = min(int.from_bytes(content[start : start + narrow], order), 2**16)
    for offset in range(start + narrow, min(len(content), start + narrow + tags * (4 + 2 * wide)), 4 + 2 * wide):
        number, kind, values = (
            int.from_bytes(content[offset + a : offset + b], order) for a, b in ((0, 2), (2, 4), (4, 4 + wide))
        )
        # Pillow keeps values of other than number types as bytes.
        if number in _STRIPS and kind not in (1, 2, 6, 7) and values > MAX_STRIPS:
            raise ImageError(f"a TIFF of {values:,} strips or tiles; at most {MAX_STRIPS:,} are read")


def _check_plain(content: bytes) -> None:
    """Raises ImageError for a plain-text PPM that is long or has many comments."""
    comments = content.count(b"#") if content[:2] in (b"P1", b"P2", b"P3") else -1
    if comments > MAX_COMMENTS or (comments >= 0 and len(content) > MAX_PLAIN_BYTES):
        accepted = f"{MAX_PLAIN_BYTES:,} bytes and {MAX_COMMENTS:,} comments at most are read; P4 to P6 may be longer"
        raise ImageError(f"a PPM in plain text of {len(content):,} bytes with {comments:,} comments; {accepted}")


def _check_scans(content: bytes) -> None:
    """Raises ImageError for a JPEG with so many scans or markers that decoding would take minutes."""
    scans, offset = 0, 2
    for _ in range(MAX_MARKERS):
        marker = _MARKER.search(content, offset)
        if marker is None or marker[0] == b"\xff\xd9":
            return
        offset = marker.end()
        if marker[0] not in (b"\xff\x01", b"\xff\xd8"):
            offset += max(2, int.from_bytes(content[offset : offset + 2], "big"))
        scans += marker[0] == b"\xff\xda"
        if scans > MAX_SCANS:
            raise ImageError(f"a JPEG of more than {MAX_SCANS} scans; expected at most {MAX_SCANS}")
    raise ImageError(f"a JPEG of more than {MAX_MARKERS:,} markers; expected at most {MAX_MARKERS:,}")


def _is_deep_colour(image: Image.Image) -> bool:
    """Whether colours, or greys with transparency, have more than 8 bits a channel, of which Pillow keeps 8."""
    tiles = getattr(image, "tile", [])  # only an ImageFile has them
    args = tiles[0].args if tiles else ""
    of_ppm = image.format == "PPM" and isinstance(args, tuple) and isinstance(args[-1], int) and args[-1] > 255
    return not image.mode.startswith(("I", "F")) and (of_ppm or ";16" in str(args))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _to_array(image: Image.Image) -> np.ndarray:
    if image.mode in ("L", "RGB") and "transparency" not in image.info:
        return grey_view(np.asarray(image)) if image.mode == "L" else np.asarray(image)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*BACKGROUND, 255)), image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


def _deep_grey(grey: np.ndarray, image: Image.Image, reading: Reading) -> tuple[np.ndarray, str]:
    """uint8[h, w] of greys of more than 8 bits, and what was done.

    Args:
      grey: integers or floating-point numbers [h, w], upright. image: its source, for the tags.
    """
    check_reading(reading)
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (32 if image.mode == "F" else 16,))[0]
    if image.mode == "I" and bits == 32 and tags.get(TiffImagePlugin.SAMPLEFORMAT, (_UNSIGNED,))[0] == _UNSIGNED:
        # Pillow has no unsigned 32-bit mode and keeps the bits as signed integers.
        grey = np.ascontiguousarray(grey).view(np.uint32)
    if reading.deep_grey == "range":
        if image.mode == "F":
            accepted = "data.deep_grey=percentile or window takes them"
            raise ImageError(f"pixels are floating-point numbers, whose range is not known; {accepted}")
        full = 4095 if bits == 12 else 65535
        levels, how = _whole_range(grey, full), f"range 0 to {full}"
    elif not np.isfinite(grey).all():
        raise ImageError("pixels are not all finite numbers")
    elif reading.deep_grey == "percentile":
        low, high = np.percentile(grey, PERCENTILES)
        levels = by_rows(grey, lambda rows: stretch(rows, low, high))
        how = f"percentiles {PERCENTILES[0]} to {PERCENTILES[1]}"
    else:
        center, width = parse_window(reading.window)
        levels, how = by_rows(grey, lambda rows: apply_window(rows, center, width)), f"window {center:g}/{width:g}"
    if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == _WHITE_IS_ZERO:
        levels, how = 255 - levels, f"{how}, inverted"
    return levels, f"{bits}-bit {'floating-point ' if image.mode == 'F' else ''}greys, {how}"


def _whole_range(grey: np.ndarray, full: int) -> np.ndarray:
    """uint8[h, w] of greys: 0..`full` mapped to 0..255, rounded."""
    low, high = int(grey.min()), int(grey.max())
    if low < 0 or high > full:
        accepted = f"expected 0 to {full}, or data.deep_grey=percentile or window"
        raise ImageError(f"grey values from {low} to {high}; {accepted}")
    return by_rows(grey, lambda rows: (rows.astype(np.uint32) * 255 + full // 2) // full)
