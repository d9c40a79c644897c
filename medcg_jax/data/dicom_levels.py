"""From a DICOM file's stored values to 8 bits: modality LUT or rescale, VOI LUT or window, palettes.

Levels are computed for the table of all values that may be stored, never for the pixels. Look-up tables are read here
and not by pydicom 3.0 (`pixels.processing`), which gets tables of real scanners wrong: it takes a first value of the
wrong sign literally and wraps the indices of an 8-bit table with more than 256 entries, both without an error; and it
refuses modality LUTs of 12 bits, tables with one entry more than declared, and an empty first item.

Source: DICOM PS3.3, C.7.6.3.1.5 (palette), C.7.6.16.2 (functional groups), C.11.1 (modality LUT), C.11.2 (VOI LUT).
"""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue

from medcg_jax.data.reading import PERCENTILES, PRESETS_HU, ImageError, Reading, apply_window, parse_window, stretch

COLORS = ("Red", "Green", "Blue")
KEYWORDS = (
    *"Modality PixelPaddingValue PixelPaddingRangeLimit ModalityLUTSequence RescaleIntercept RescaleSlope RescaleType "
    "VOILUTSequence WindowCenter WindowWidth VOILUTFunction SharedFunctionalGroupsSequence "
    "PerFrameFunctionalGroupsSequence".split(),
    *(f"{color}PaletteColorLookupTable{part}" for color in COLORS for part in ("Descriptor", "Data")),
)
_TYPES = {"DS": "numbers (with a decimal point, no comma)", "IS": "a whole number", "US": "a whole number"}
FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")


def grey_levels(
    domain: np.ndarray, pixels: np.ndarray, dataset: Dataset, frame: int, reading: Reading
) -> tuple[np.ndarray, str]:
    """uint8 for each value of `domain`, before MONOCHROME1 is inverted, and what was done.

    Args:
      domain: every value that may be stored, rising by 1. pixels: the frame's stored values, for percentiles.
      frame: index of the frame, for values that the file has per frame.
    """
    values, rescaled, in_hu = _modality(domain, dataset, frame)
    if reading.window and reading.window not in PRESETS_HU:
        center, width = parse_window(reading.window)
        return apply_window(values, center, width), f"window {center:g}/{width:g}"
    if reading.window and in_hu:
        center, width = PRESETS_HU[reading.window]
        return apply_window(values, center, width), f"window {reading.window} {center:g}/{width:g}"
    why = f" ({reading.window} is for CT in HU)" if reading.window else ""
    voi = _voi_lut(values, dataset)
    if voi:
        return voi[0], f"VOI LUT of the file{voi[1]}{why}"
    window, unreadable = _file_window(dataset, frame)
    if window:
        center, width, function = window
        named = "" if function == "LINEAR" else f" {function}"
        return apply_window(values, center, width, function), f"window {center:g}/{width:g}{named} of the file{why}"
    why = f"{unreadable}{why}"
    if not rescaled and domain[0] == 0 and domain[-1] <= 255:
        return stretch(values, 0, domain[-1]), f"greys as stored{why}"
    low, high = _percentiles(domain, pixels, values, dataset)
    return stretch(values, low, high), f"percentiles {PERCENTILES[0]} to {PERCENTILES[1]}{why}"


def palette_levels(domain: np.ndarray, dataset: Dataset) -> np.ndarray:
    """uint8[n, 3] RGB for each value of `domain`.

    Raises:
      ImageError: there is no plain palette, or its tables have other lengths than declared.
    """
    name = "PaletteColorLookupTable"
    lookups = (_lookup(dataset, domain, f"{color}{name}Descriptor", f"{color}{name}Data") for color in COLORS)
    tables = [table for table in lookups if table is not None]
    if len(tables) < len(COLORS):
        # A few bytes of a segmented palette can expand to gigabytes.
        raise ImageError("DICOM: no palette of plain tables; segmented ones are not read")
    palette = np.stack(tables, axis=1)
    # Entries of 8 bits are often kept in words of 16.
    return (palette if palette.max() <= 255 else palette >> 8).astype(np.uint8)


def value_of(dataset: Dataset, keyword: str) -> Any:
    """The value of a keyword, or None.

    Raises:
      ImageError: the value does not have its type; the message names the tag and quotes nothing.
    """
    try:
        value = dataset.get(keyword)
        # pydicom leaves unreadable numbers as text.
        as_text = any(item and isinstance(item, str) for item in _several(value))
        readable = dictionary_VR(keyword) not in _TYPES or not as_text
    except Exception:  # pydicom's message quotes the value, so its error is not passed on
        readable = False
    if not readable:
        kind = _TYPES.get(dictionary_VR(keyword), "a value of its type")
        raise ImageError(f"DICOM: {named(keyword)} cannot be read as {kind}")
    return value


def named(keyword: str) -> str:
    """A keyword with its number, "Rows (0028,0010)"."""
    tag = cast(int, tag_for_keyword(keyword))
    return f"{keyword} ({tag >> 16:04X},{tag & 0xFFFF:04X})"


def _lookup(item: Dataset, values: np.ndarray, descriptor: str, data: str) -> np.ndarray | None:
    """int64: a table's entry for each of the values; None if the item has no table.

    Values below the table's first take its first entry, values above its last the last entry.

    Raises:
      ImageError: the table has another number of entries than its descriptor says.
    """
    described, entries = value_of(item, descriptor), value_of(item, data)
    if not described or entries is None or (not isinstance(entries, int) and not len(entries)):
        return None
    if not isinstance(described, MultiValue | list) or len(described) != 3:
        raise ImageError(f"DICOM: {named(descriptor)} has not three values")
    # The sign of the first two values should follow the pixels' sign; files often get it wrong.
    number, first = int(described[0]) % 65536 or 65536, int(described[1])
    if first > 32767 and values.min() < 0:
        first -= 65536
    elif first < 0 and values.min() >= 0:
        first += 65536
    if isinstance(entries, bytes):
        order = ">" if item.original_encoding[1] is False else "<"
        wide = len(entries) >= 2 * number
        table = np.frombuffer(entries, f"{order}u2" if wide else np.uint8, len(entries) // 2 if wide else -1)
    else:
        table = np.atleast_1d(np.asarray(entries, np.int64)) % 65536
    if not number <= len(table) <= number + 1:
        raise ImageError(f"DICOM: {named(data)} has {len(table)} entries; its descriptor says {number}")
    return table.astype(np.int64)[np.clip(np.rint(values).astype(np.int64) - first, 0, number - 1)]


def _modality(domain: np.ndarray, dataset: Dataset, frame: int) -> tuple[np.ndarray, bool, bool]:
    """(values that the stored ones stand for, whether a LUT or rescale was applied, whether they are HU)."""
    for item in dataset.get("ModalityLUTSequence") or ():
        values = _lookup(item, domain, "LUTDescriptor", "LUTData")
        if values is not None:
            return values, True, False
    item = _item(dataset, frame, "PixelValueTransformationSequence")
    slope, intercept = (_first(value_of(item, keyword)) for keyword in ("RescaleSlope", "RescaleIntercept"))
    if slope is None or intercept is None or slope == 0:
        return domain, False, False
    kind = str(item.get("RescaleType") or "HU").strip()
    return domain * slope + intercept, True, str(dataset.get("Modality")).strip() == "CT" and kind == "HU"


def _file_window(dataset: Dataset, frame: int) -> tuple[tuple[float, float, str] | None, str]:
    """((center, width, function) of the file's first usable window or None, why the window cannot be read)."""
    item = _item(dataset, frame, "FrameVOILUTSequence")
    try:
        centers, widths = (value_of(item, keyword) for keyword in ("WindowCenter", "WindowWidth"))
    except ImageError as error:
        return None, f" (the file's window is left out: {str(error).removeprefix('DICOM: ')})"
    function = str(item.get("VOILUTFunction") or "LINEAR").strip()
    for center, width in zip(_several(centers), _several(widths), strict=False):
        center, width = _first(center), _first(width)
        if center is None or width is None or function not in FUNCTIONS:
            continue
        if width >= 1 or (width > 0 and function != "LINEAR"):
            return (center, width, function), ""
    return None, ""


def _voi_lut(values: np.ndarray, dataset: Dataset) -> tuple[np.ndarray, str] | None:
    """uint8 of the values through the first VOI LUT with a table, its whole range mapped to 0..255, and what was done.

    The range has the bits of the largest entry: some descriptors declare 16 bits for entries of 12.
    """
    for item in dataset.get("VOILUTSequence") or ():
        shown = _lookup(item, values, "LUTDescriptor", "LUTData")
        if shown is not None:
            every = _lookup(item, np.arange(-65536, 2 * 65536), "LUTDescriptor", "LUTData")
            bits, declared = max(8, int(every.max()).bit_length()), int(item.LUTDescriptor[2])
            note = "" if bits == declared else f" (entries of {bits} bits, {declared} declared)"
            return stretch(shown, 0, 2**bits - 1), note
    return None


def _percentiles(domain: np.ndarray, pixels: np.ndarray, values: np.ndarray, dataset: Dataset) -> tuple[float, float]:
    """The frame's percentiles in units of `values`, without pixels of the padding's value or range."""
    # Files often give padding the wrong sign; its bits are right.
    padding = [
        (value - domain[0]) % len(domain) + domain[0]
        for value in (value_of(dataset, keyword) for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit"))
        if isinstance(value, int)
    ]
    shown = pixels
    if padding and isinstance(dataset.get("PixelPaddingValue"), int):
        shown = pixels[(pixels < min(padding)) | (pixels > max(padding))]
    stored = np.percentile(shown if shown.size else pixels, PERCENTILES)
    low, high = sorted(float(value) for value in values[np.rint(stored).astype(np.int64) - domain[0]])
    return low, high


def _item(dataset: Dataset, frame: int, sequence: str) -> Dataset:
    """The data set with a frame's values of one kind: its functional group, the shared group, or the file's data set."""
    groups = dataset.get("PerFrameFunctionalGroupsSequence") or ()
    for group in (*groups[frame : frame + 1], *(dataset.get("SharedFunctionalGroupsSequence") or ())[:1]):
        if group.get(sequence):
            return group[sequence].value[0]
    return dataset


def _several(value: Any) -> list:
    return list(value) if isinstance(value, MultiValue | list) else [value]


def _first(value: Any) -> float | None:
    """A number, or the first of several; None if it is missing or not finite."""
    if isinstance(value, MultiValue):
        value = value[0] if value else None
    if value is None or value == "":
        return None
    number = float(value)
    return number if math.isfinite(number) else None
