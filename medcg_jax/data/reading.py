"""How pixels that are no plain 8-bit image become uint8: windows of DICOM files, deep greys, which frame."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reading:
    """The choices of a run, `data.window`, `data.deep_grey` and `data.frame`; one of them applies to each file.

    Attributes:
      window: "" (the file's own), a preset's name, or "CENTER/WIDTH" in the file's units after rescaling (HU for CT).
      deep_grey: "range" (the whole 16-bit range onto 0..255), "percentile" or "window", for PNG and TIFF of 16 bits.
      frame: "first", "middle", "last", or a number from 0, of files with several frames.
    """

    window: str = ""
    deep_grey: str = "range"
    frame: str = "middle"
