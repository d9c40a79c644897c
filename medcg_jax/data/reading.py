"""How other than plain 8-bit images become uint8: windows of DICOM files, deep greys, the choice of a frame."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from medcg_jax.data.records import DataError

# (center, width) in HU. Source: Radiopaedia, "Windowing (CT)"; the middle of each range.
PRESETS_HU: dict[str, tuple[float, float]] = {
    "abdomen": (50, 400),
    "bone": (400, 1800),
    "brain": (40, 80),
    "liver": (30, 150),
    "lung": (-600, 1500),
    "mediastinum": (50, 350),
    "soft_tissue": (50, 400),
    "spine": (50, 250),
    "stroke": (40, 40),
    "subdural": (75, 215),
    "temporal_bone": (600, 2800),
}
DEEP_GREYS = ("range", "percentile", "window")
FRAMES = ("first", "middle", "last")
PERCENTILES = (0.5, 99.5)
_ROWS_AT_ONCE = 64


class ImageError(DataError):
    """An image cannot or must not be decoded; callers add which image it is."""


@dataclass(frozen=True)
class Reading:
    """A run's choices `data.window`, `data.deep_grey` and `data.frame`.

    Attributes:
      window: "" (the file's own), a preset's name, or "CENTER/WIDTH" in the file's units after rescaling (HU for CT).
      deep_grey: "range" (the whole 16-bit range onto 0..255), "percentile" or "window", for PNG and TIFF of 16 bits.
      frame: "first", "middle", "last", or a number from 0, of DICOM files with several frames; other formats give
        their first.
    """

    window: str = ""
    deep_grey: str = "range"
    frame: str = "middle"


def check_reading(reading: Reading) -> None:
    """Raises DataError if a choice is unknown, or `deep_grey` needs a window in numbers and has none."""
    if reading.window not in ("", *PRESETS_HU):
        parse_window(reading.window)
    if reading.deep_grey not in DEEP_GREYS:
        raise DataError(f"data.deep_grey={reading.deep_grey!r}; expected {', '.join(DEEP_GREYS)}")
    if reading.deep_grey == "window" and (not reading.window or reading.window in PRESETS_HU):
        reason = "data.deep_grey=window needs CENTER/WIDTH in stored values, such as 2048/4096"
        raise DataError(f"data.window={reading.window!r}: {reason}")
    if reading.frame not in FRAMES:
        _frame_number(reading.frame)


def parse_window(text: str) -> tuple[float, float]:
    """(center, width) of "CENTER/WIDTH".

    Raises:
      DataError: no two finite numbers, or a width below 1.
    """
    try:
        center, width = (float(number) for number in text.split("/"))
    except ValueError:
        center = width = math.nan
    if not (math.isfinite(center) and math.isfinite(width) and width >= 1):
        accepted = f"{', '.join(PRESETS_HU)}, or CENTER/WIDTH with a width of 1 or more, such as -600/1500"
        raise DataError(f"data.window={text!r}; expected {accepted}")
    return center, width


def frame_index(frame: str, num_frames: int) -> int:
    """Index of the frame that `data.frame` means; of an even number of frames the later middle one.

    Raises:
      ImageError: the file has no such frame. DataError: `frame` is unknown.
    """
    if frame in FRAMES:
        return {"first": 0, "middle": num_frames // 2, "last": num_frames - 1}[frame]
    number = _frame_number(frame)
    if number >= num_frames:
        raise ImageError(f"{num_frames} frames; data.frame={number} (from 0) is not among them")
    return number


def apply_window(values: np.ndarray, center: float, width: float, function: str = "LINEAR") -> np.ndarray:
    """uint8 of the same shape: black below the window, white above it. Source: DICOM PS3.3, C.11.2.1.2 and C.11.2.1.3.

    Args:
      values: numbers in the window's units. function: "LINEAR", "LINEAR_EXACT" or "SIGMOID".
    """
    values = np.asarray(values, np.float64)
    if function == "SIGMOID":
        with np.errstate(over="ignore"):
            return np.rint(255 / (1 + np.exp(-4 * (values - center) / width))).astype(np.uint8)
    if function == "LINEAR_EXACT":
        return stretch(values, center - width / 2, center + width / 2)
    return stretch(values, center - 0.5 - (width - 1) / 2, center - 0.5 + (width - 1) / 2)


def stretch(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """uint8 of the same shape: `low` and less black, more than `high` white, linear and rounded between."""
    values = np.asarray(values, np.float64)
    if low >= high:
        return np.where(values > high, 255, 0).astype(np.uint8)
    return np.rint(np.clip((values - low) / (high - low), 0, 1) * 255).astype(np.uint8)


def by_rows(image: np.ndarray, to_uint8: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """uint8[h, w] of an image [h, w], some rows at a time, so that 64-bit intermediate values need little memory."""
    out = np.empty(image.shape, np.uint8)
    for start in range(0, len(image), _ROWS_AT_ONCE):
        out[start : start + _ROWS_AT_ONCE] = to_uint8(image[start : start + _ROWS_AT_ONCE])
    return out


def check_size(size: tuple[int, int], max_pixels: int) -> None:
    """Raises ImageError if an image of (width, height), or its square after padding, has too many pixels."""
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{width} x {height} pixels")
    if width * height > max_pixels:
        raise ImageError(f"{width} x {height} pixels; expected at most {max_pixels}")
    side = max(width, height)
    if side * side > max_pixels:
        raise ImageError(f"{width} x {height} pixels pad to {side} x {side}; expected at most {max_pixels}")


def _frame_number(frame: str) -> int:
    if not (frame.isascii() and frame.isdigit() and len(frame) < 10):
        raise DataError(f"data.frame={frame!r}; expected {', '.join(FRAMES)}, or a number from 0")
    return int(frame)
