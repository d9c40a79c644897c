"""Images as uint8 RGB: decoded from files that are not trusted, padded to a square and resized as LLaVA-1.5 does.

DICOM files are read by `dicom`; greys of more than 8 bits become 8 bits as a run's `Reading` says.

Source of the square and the resize: haotian-liu/LLaVA (c121f04) llava/mm_utils.py:expand2square and CLIP's image
processor (bicubic, by PIL on uint8); equal bit for bit to transformers' `LlavaImageProcessorPil(do_pad=True)`.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

from medcg_jax.data.dicom import dicom_size, is_dicom, read_dicom
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

# int(mean * 255) of CLIP's channel means.
FILL = (122, 116, 104)
# What shows through where an image is transparent.
BACKGROUND = (0, 0, 0)
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
# Encoders write about ten; each further one costs a pass over all pixels, and may be a few bytes long.
MAX_SCANS = 50
MAX_TEXT_BYTES = 2**20
# TIFF's PhotometricInterpretation of greys whose greatest value is black, and SampleFormat of unsigned integers.
_WHITE_IS_ZERO = 0
_UNSIGNED = 1


def load_image(source: str | Path | bytes, max_pixels: int, reading: Reading = Reading()) -> np.ndarray:
    """uint8[h, w, 3] RGB, upright, decoded by content whatever the name; of greys a view. See `read_image`."""
    return read_image(source, max_pixels, reading)[0]


def read_image(source: str | Path | bytes, max_pixels: int, reading: Reading = Reading()) -> tuple[np.ndarray, str]:
    """uint8[h, w, 3] RGB, upright, decoded by content, and how it became 8 bits: "" for an ordinary 8-bit image.

    Of formats other than DICOM the first frame of several is taken; transparency is laid over `BACKGROUND`. Examples of
    the text: "DICOM window lung -600/1500, frame 3 of 12" (counted from 1), "16-bit greys, percentiles 0.5 to 99.5".

    Args:
      max_pixels: what the image, and the square that it is padded to, may have; held against the header before
        anything is decoded.
      reading: what is done with DICOM and with greys of more than 8 bits.

    Raises:
      ImageError: no image, truncated, too large, or of a format or depth that is not read.
      DataError: `reading` holds a choice that there is not.
    """
    _bound_pillow()
    try:
        with _opened(source) as file:
            if is_dicom(file):
                return read_dicom(file, max_pixels, reading)
            with Image.open(file, formats=FORMATS) as image:
                check_size(image.size, max_pixels)
                _check_scans(image, file)
                image.load()
                upright = ImageOps.exif_transpose(image)
                # What is read of the tags is read before: the turned copy has none.
                if image.mode == "F" or image.mode.startswith("I"):
                    grey, choice = _deep_grey(np.asarray(upright), image, reading)
                    return grey_view(grey), choice
                return _to_array(upright), ""
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"{error}; at most {max_pixels} pixels are accepted") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"not an image of a known format (DICOM, {', '.join(FORMATS)})") from error
    except Exception as error:  # decoders raise nearly anything for broken data
        raise ImageError(f"cannot be decoded: {error}") from error


def image_size(source: str | Path | bytes, max_pixels: int) -> tuple[int, int]:
    """(height, width) in pixels of the image that `load_image` gives, from its header alone.

    Raises:
      ImageError: no image of a known format, or too large.
    """
    _bound_pillow()
    try:
        with _opened(source) as file:
            if is_dicom(file):
                return dicom_size(file, max_pixels)
            with Image.open(file, formats=FORMATS) as image:
                check_size(image.size, max_pixels)
                width, height = image.size
                # Orientations 5 to 8 of EXIF turn the image by a quarter.
                turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
                return (width, height) if turned else (height, width)
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(f"its size cannot be read: {error}") from error


def pad_to_square(image: np.ndarray, fill: tuple[int, int, int] = FILL) -> np.ndarray:
    """uint8[s, s, 3], s the longer side: the image in the middle (odd remainders below and right), `fill` around it."""
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
    for part in (image[::16, ::16], image):  # few pixels tell nearly every colour image
        if not all(np.array_equal(part[..., 0], part[..., channel]) for channel in (1, 2)):
            return False
    return True


def grey_view(grey: np.ndarray) -> np.ndarray:
    """uint8[h, w, 3] of uint8[h, w], without a copy; not to be written to."""
    return np.broadcast_to(grey[..., None], (*grey.shape, 3))


def preprocess(image: np.ndarray, size_px: int) -> np.ndarray:
    """uint8[size_px, size_px, 3]: the image padded to a square and resized; the same in training and evaluation.

    Of greys a view, as `grey_view`."""
    return resize(pad_to_square(image), size_px)


def copy_into(to: np.ndarray, array: np.ndarray) -> None:
    """Copies an array into another of its shape; greys that are a view (`grey_view`) channel by channel.

    numpy takes four times as long for three equal bytes at a time.
    """
    if array.ndim and array.strides[-1] == 0:
        for channel in range(array.shape[-1]):
            to[..., channel] = array[..., 0]
    else:
        to[...] = array


def _opened(source: str | Path | bytes) -> BinaryIO:
    return io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")


def _bound_pillow() -> None:
    """Sets what Pillow keeps as switches of the whole process, which libraries do turn: nothing is filled or unbounded.

    Filling the rest of a truncated file with grey is one of them. Compressed text of a PNG is inflated up to its limit.
    """
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    PngImagePlugin.MAX_TEXT_CHUNK = MAX_TEXT_BYTES
    PngImagePlugin.MAX_TEXT_MEMORY = 8 * MAX_TEXT_BYTES


def _check_scans(image: Image.Image, file: BinaryIO) -> None:
    """Raises ImageError for a progressive JPEG with so many scans that decoding it would take minutes."""
    if not image.info.get("progressive"):
        return
    place = file.tell()
    file.seek(0)
    scans = file.read().count(b"\xff\xda")
    file.seek(place)
    if scans > MAX_SCANS:
        raise ImageError(f"a progressive JPEG of {scans} scans; at most {MAX_SCANS} are accepted")


def _to_array(image: Image.Image) -> np.ndarray:
    if image.mode == "L" and "transparency" not in image.info:
        return grey_view(np.asarray(image))
    return np.asarray(_to_rgb(image))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (*BACKGROUND, 255)), image).convert("RGB")
    return image.convert("RGB")


def _deep_grey(grey: np.ndarray, image: Image.Image, reading: Reading) -> tuple[np.ndarray, str]:
    """uint8[h, w] of greys of more than 8 bits, and what was done.

    Args:
      grey: integers or floating-point numbers [h, w], upright. image: what they were read from, for its tags.
    """
    check_reading(reading)
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (32 if image.mode == "F" else 16,))[0]
    if image.mode == "I" and bits == 32 and tags.get(TiffImagePlugin.SAMPLEFORMAT, (_UNSIGNED,))[0] == _UNSIGNED:
        # Pillow has no mode for them and keeps the same bits as signed integers.
        grey = np.ascontiguousarray(grey).view(np.uint32)
    if reading.deep_grey == "range":
        if image.mode == "F":
            accepted = "data.deep_grey=percentile or window takes them"
            raise ImageError(f"pixels are floating-point numbers, whose range is not known; {accepted}")
        full = 4095 if bits == 12 else 65535
        found, how = _whole_range(grey, full), f"range 0 to {full}"
    elif not np.isfinite(grey).all():
        raise ImageError("pixels are not all finite numbers")
    elif reading.deep_grey == "percentile":
        low, high = np.percentile(grey, PERCENTILES)
        found = by_rows(grey, lambda rows: stretch(rows, low, high))
        how = f"percentiles {PERCENTILES[0]} to {PERCENTILES[1]}"
    else:
        center, width = parse_window(reading.window)
        found, how = by_rows(grey, lambda rows: apply_window(rows, center, width)), f"window {center:g}/{width:g}"
    if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == _WHITE_IS_ZERO:
        found, how = 255 - found, f"{how}, inverted"
    return found, f"{bits}-bit {'floating-point ' if image.mode == 'F' else ''}greys, {how}"


def _whole_range(grey: np.ndarray, full: int) -> np.ndarray:
    """uint8[h, w] of greys, 0 to `full` onto 0..255, rounded."""
    low, high = int(grey.min()), int(grey.max())
    if low < 0 or high > full:
        accepted = f"0 to {full} is accepted, or data.deep_grey=percentile or window"
        raise ImageError(f"grey values from {low} to {high}; {accepted}")
    return by_rows(grey, lambda rows: (rows.astype(np.uint32) * 255 + full // 2) // full)
