"""Images as uint8 RGB: decoded from files that are not trusted, padded to a square and resized as LLaVA-1.5 does.

Source of the square and the resize: haotian-liu/LLaVA (c121f04) llava/mm_utils.py:expand2square and CLIP's image
processor (bicubic, by PIL on uint8); equal bit for bit to transformers' `LlavaImageProcessorPil(do_pad=True)`.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from medcg_jax.data.reading import Reading
from medcg_jax.data.records import DataError

# int(mean * 255) of CLIP's channel means.
FILL = (122, 116, 104)
# What shows through where an image is transparent.
BACKGROUND = (0, 0, 0)
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")


class ImageError(DataError):
    """An image cannot be decoded or must not be; the message says why, its caller knows whose it is."""


def load_image(source: str | Path | bytes, max_pixels: int, reading: Reading = Reading()) -> np.ndarray:
    """uint8[h, w, 3] RGB, upright, decoded by content whatever the name.

    The first frame of several is taken; 16-bit greys are scaled to 8 bits; transparency is laid over `BACKGROUND`.

    Args:
      max_pixels: what the image, and the square that it is padded to, may have; held against the header before
        anything is decoded.

    Raises:
      ImageError: no image, truncated, too large, or of a format or depth that is not read.
    """
    # Filling the rest of a truncated file with grey is a switch of the whole process, which libraries do turn on.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            _check_size(image.size, max_pixels)
            image.load()
            return _to_array(ImageOps.exif_transpose(image))
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"{error}; at most {max_pixels} pixels are accepted") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"not an image of a known format ({', '.join(FORMATS)})") from error
    except Exception as error:  # decoders raise nearly anything for broken data
        raise ImageError(f"cannot be decoded: {error}") from error


def image_size(path: str | Path, max_pixels: int) -> tuple[int, int]:
    """(height, width) in pixels of the image that `load_image` gives, from its header alone.

    Raises:
      ImageError: no image of a known format, or too large.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            _check_size(image.size, max_pixels)
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
    square[:] = fill
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = image
    return square


def resize(image: np.ndarray, size_px: int) -> np.ndarray:
    """uint8[size_px, size_px, 3] of a square image, by PIL's bicubic filter on uint8."""
    if image.shape[:2] == (size_px, size_px):
        return image
    if is_grey(image):  # each channel is filtered by itself: one takes half the time of three
        grey = Image.fromarray(np.ascontiguousarray(image[..., 0])).resize((size_px, size_px), Image.Resampling.BICUBIC)
        return grey_to_rgb(np.asarray(grey))
    return np.asarray(Image.fromarray(image).resize((size_px, size_px), Image.Resampling.BICUBIC))


def is_grey(image: np.ndarray) -> bool:
    """Whether the three channels of uint8[h, w, 3] are equal."""
    for part in (image[::16, ::16], image):  # few pixels tell nearly every colour image
        if not all(np.array_equal(part[..., 0], part[..., channel]) for channel in (1, 2)):
            return False
    return True


def grey_to_rgb(grey: np.ndarray) -> np.ndarray:
    """uint8[h, w, 3] of uint8[h, w]."""
    image = np.empty((*grey.shape, 3), np.uint8)
    for channel in range(3):  # a third of the time that a broadcast copy takes
        image[..., channel] = grey
    return image


def preprocess(image: np.ndarray, size_px: int) -> np.ndarray:
    """uint8[size_px, size_px, 3]: the image padded to a square and resized; the same in training and evaluation."""
    return resize(pad_to_square(image), size_px)


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{width} x {height} pixels")
    if width * height > max_pixels:
        raise ImageError(f"{width} x {height} pixels; at most {max_pixels} are accepted")
    side = max(width, height)
    if side * side > max_pixels:
        raise ImageError(f"{width} x {height} pixels pad to {side} x {side}; at most {max_pixels} are accepted")


def _to_array(image: Image.Image) -> np.ndarray:
    if image.mode == "L" and "transparency" not in image.info:
        return grey_to_rgb(np.asarray(image))  # quicker than by PIL, and not held by one thread
    return np.asarray(_to_rgb(image))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        return Image.fromarray(_scale16(np.asarray(image))).convert("RGB")
    if image.mode == "F":
        raise ImageError("pixels are floating-point numbers, whose range is not known")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (*BACKGROUND, 255)), image).convert("RGB")
    return image.convert("RGB")


def _scale16(grey: np.ndarray) -> np.ndarray:
    """uint8[h, w] of 16-bit greys, the whole range onto 0..255, rounded."""
    low, high = int(grey.min()), int(grey.max())
    if low < 0 or high > 65535:
        raise ImageError(f"grey values from {low} to {high}; 0 to 65535 is accepted")
    return ((grey.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
