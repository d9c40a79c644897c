"""From a DICOM file's stored values to 8 bits: modality LUT or rescale, VOI LUT or window, palettes.

All is worked out for the table of all values that may be stored, never for the pixels. Source: DICOM PS3.3, C.7.6.3.1.5
(palette), C.7.6.16.2 (functional groups), C.11.1 (modality LUT), C.11.2 (VOI LUT).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi

from medcg_jax.data.reading import (
    PERCENTILES,
    PRESETS_HU,
    ImageError,
    Reading,
    apply_window,
    parse_window,
    stretch,
)

KEYWORDS = (
    "Modality",
    "PixelPaddingValue",
    "ModalityLUTSequence",
    "RescaleIntercept",
    "RescaleSlope",
    "RescaleType",
    "VOILUTSequence",
    "WindowCenter",
    "WindowWidth",
    "VOILUTFunction",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
    *(f"{color}PaletteColorLookupTable{part}" for color in ("Red", "Green", "Blue") for part in ("Descriptor", "Data")),
)
FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")


def grey_levels(
    domain: np.ndarray, pixels: np.ndarray, dataset: Dataset, frame: int, reading: Reading
) -> tuple[np.ndarray, str]:
    """uint8 for each value of `domain`, before MONOCHROME1 is inverted, and what was done.

    Args:
      domain: every value that may be stored, rising by 1. pixels: the frame's stored values, for percentiles.
      frame: its place, from 0, for what the file says of each frame.
    """
    values, rescaled, in_hu = _modality(domain, dataset, frame)
    if reading.window and reading.window not in PRESETS_HU:
        center, width = parse_window(reading.window)
        return apply_window(values, center, width), f"window {center:g}/{width:g}"
    if reading.window and in_hu:
        center, width = PRESETS_HU[reading.window]
        return apply_window(values, center, width), f"window {reading.window} {center:g}/{width:g}"
    why = f" ({reading.window} is for CT in HU)" if reading.window else ""
    if dataset.get("VOILUTSequence"):
        return _voi_lut(values, dataset), f"VOI LUT of the file{why}"
    window = _own_window(dataset, frame)
    if window:
        center, width, function = window
        named = "" if function == "LINEAR" else f" {function}"
        return apply_window(values, center, width, function), f"window {center:g}/{width:g}{named} of the file{why}"
    if not rescaled and domain[0] == 0 and domain[-1] <= 255:
        return stretch(values, 0, domain[-1]), f"greys as stored{why}"
    low, high = _percentiles(domain, pixels, values, dataset)
    return stretch(values, low, high), f"percentiles {PERCENTILES[0]} to {PERCENTILES[1]}{why}"


def palette_levels(domain: np.ndarray, dataset: Dataset) -> np.ndarray:
    """uint8[n, 3] RGB for each value of `domain`.

    Raises:
      ImageError: no plain palette, or its tables have other lengths than declared.
    """
    tables = [dataset.get(f"{color}PaletteColorLookupTableData") for color in ("Red", "Green", "Blue")]
    if not all(tables):
        # A few bytes of a segmented palette can expand to gigabytes.
        raise ImageError("DICOM: no palette of plain tables; segmented ones are not read")
    entries, first, bits = (int(number) for number in dataset.RedPaletteColorLookupTableDescriptor)
    entries = entries or 65536
    if bits not in (8, 16) or any(len(table) not in (entries, entries + entries % 2, 2 * entries) for table in tables):
        raise ImageError("DICOM: the palette's tables have other lengths than their descriptor says")
    found = apply_color_lut(np.clip(domain, first, first + entries - 1), dataset)
    # Entries of 8 bits are often kept in words of 16.
    return (found if found.max() <= 255 else found >> 8).astype(np.uint8)


def _modality(domain: np.ndarray, dataset: Dataset, frame: int) -> tuple[np.ndarray, bool, bool]:
    """The values that stored ones stand for, whether they differ in kind from those stored, and whether they are HU."""
    if dataset.get("ModalityLUTSequence"):
        return apply_modality_lut(domain, dataset), True, False
    item = _item(dataset, frame, "PixelValueTransformationSequence")
    slope, intercept = _first(item.get("RescaleSlope")), _first(item.get("RescaleIntercept"))
    if slope is None or intercept is None or slope == 0:
        return domain, False, False
    kind = str(item.get("RescaleType") or "HU").strip()
    return domain * slope + intercept, True, str(dataset.get("Modality")).strip() == "CT" and kind == "HU"


def _own_window(dataset: Dataset, frame: int) -> tuple[float, float, str] | None:
    """(center, width, function) of the file's first window; None where it has none that can be used."""
    item = _item(dataset, frame, "FrameVOILUTSequence")
    center, width = _first(item.get("WindowCenter")), _first(item.get("WindowWidth"))
    function = str(item.get("VOILUTFunction") or "LINEAR").strip()
    if center is None or width is None or function not in FUNCTIONS:
        return None
    return (center, width, function) if width >= 1 or (width > 0 and function != "LINEAR") else None


def _voi_lut(values: np.ndarray, dataset: Dataset) -> np.ndarray:
    """uint8 of the values through the first VOI LUT, its whole range onto 0..255."""
    bits = int(dataset.VOILUTSequence[0].LUTDescriptor[2])
    if not 8 <= bits <= 16:
        raise ImageError(f"DICOM: a VOI LUT of {bits} bits; 8 to 16 are accepted")
    return stretch(apply_voi(np.rint(values).astype(np.int64), dataset), 0, 2**bits - 1)


def _percentiles(
    domain: np.ndarray, pixels: np.ndarray, values: np.ndarray, dataset: Dataset
) -> tuple[float, float]:
    """The frame's percentiles in units of `values`, pixels of the padding's value left out."""
    padding = dataset.get("PixelPaddingValue")
    shown = pixels[pixels != padding] if isinstance(padding, int) else pixels
    found = np.percentile(shown if shown.size else pixels, PERCENTILES)
    low, high = sorted(float(value) for value in values[np.rint(found).astype(np.int64) - domain[0]])
    return low, high


def _item(dataset: Dataset, frame: int, sequence: str) -> Dataset:
    """Where a frame's values of one kind stand: its own functional group, the one of all frames, or the data set."""
    groups = dataset.get("PerFrameFunctionalGroupsSequence") or ()
    for group in (*groups[frame : frame + 1], *(dataset.get("SharedFunctionalGroupsSequence") or ())[:1]):
        if group.get(sequence):
            return group[sequence].value[0]
    return dataset


def _first(value: Any) -> float | None:
    """A number, or the first of several; None for none that is finite."""
    if isinstance(value, MultiValue):
        value = value[0] if value else None
    if value is None or value == "":
        return None
    number = float(value)
    return number if math.isfinite(number) else None
