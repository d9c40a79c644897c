"""What each image file of a tree turns out to be: read once, in all cores, and remembered between runs."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from medcg_jax.data.images import ImageError, load_image
from medcg_jax.data.processes import Progress, over
from medcg_jax.data.reading import Reading


@dataclass(frozen=True)
class Examined:
    """One image file.

    Attributes:
      height, width: in pixels, upright; 0 where it cannot be decoded.
      reason: why it is refused; "" where it is not.
      digest: sha256 of the file's bytes, in hex; "" where they cannot be read.
      pixels: sha256 of the shape and the decoded RGB pixels: the same picture in another file.
    """

    height: int = 0
    width: int = 0
    reason: str = ""
    digest: str = ""
    pixels: str = ""

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width); None where it is refused."""
        return None if self.reason else (self.height, self.width)


def examine(path: Path, max_pixels: int, reading: Reading) -> Examined:
    """One image file, decoded."""
    try:
        content = path.read_bytes()
    except OSError as error:
        return Examined(reason=error.strerror or str(error))
    digest = hashlib.sha256(content).hexdigest()
    try:
        image = load_image(content, max_pixels)
    except ImageError as error:
        return Examined(reason=str(error), digest=digest)
    height, width = image.shape[:2]
    return Examined(height, width, "", digest, pixel_digest(image))


def pixel_digest(image) -> str:
    """sha256 in hex of uint8[h, w, 3] and its shape."""
    digest = hashlib.sha256(repr(image.shape).encode())
    digest.update(image.data if image.flags.c_contiguous else image.tobytes())
    return digest.hexdigest()


def examine_all(
    paths: Sequence[Path],
    max_pixels: int,
    reading: Reading = Reading(),
    *,
    workers: int = 0,
    progress: Progress | None = None,
    known: dict[str, Examined] | None = None,
) -> dict[Path, Examined]:
    """Every file of `paths`, by path.

    Args:
      workers: processes; 0: one per core.
      progress: wraps the iterator over files that are read and takes their number.
      known: what `recall` gave; these are not read again.
    """
    known = known or {}
    found = {path: known[str(path)] for path in paths if str(path) in known}
    unknown = [path for path in paths if path not in found]
    one = functools.partial(examine, max_pixels=max_pixels, reading=reading)
    looked = over(one, unknown, workers=workers, crashed=lambda path: Examined(reason="its decoder crashed"))
    if progress and unknown:
        looked = progress(looked, len(unknown))
    found |= zip(unknown, looked, strict=True)
    return {path: found[path] for path in paths}
