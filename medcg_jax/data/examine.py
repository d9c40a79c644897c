"""Examines every image file of a tree: once, on all cores, with results kept between runs."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from medcg_jax.data.duplicates import ImageHashes, perceptual_hash, pixel_digest
from medcg_jax.data.images import ImageError, opened, range_used, read_image
from medcg_jax.data.pool import Progress, over
from medcg_jax.data.reading import Reading
from medcg_jax.untrusted import MAX_TEXT_BYTES, parsed, read_bytes

_DIGEST = re.compile(r"[0-9a-f]{64}")

# Processor time and address space that the examination of one image may take; one of 2**24 pixels takes 2 s.
MAX_SECONDS = 10
MAX_BYTES = 2**32
# Increase it when files are decoded or hashed in another way: older results then do not count.
READER = 2


@dataclass(frozen=True)
class Examined:
    """One image file.

    Attributes:
      height, width: in pixels, upright; 0 if it cannot be decoded.
      reason: why it is refused; "" if it is not.
      digest: sha256 of the file's bytes, in hex; "" if they cannot be read.
      pixels: sha256 of the shape and the decoded RGB pixels, in hex.
      perceptual: `duplicates.perceptual_hash` in hex; "" for a nearly uniform image.
      read_as: how it became 8 bits (a window, a frame); "" for an ordinary image.
      range_used: as `images.range_used`.
    """

    height: int = 0
    width: int = 0
    reason: str = ""
    digest: str = ""
    pixels: str = ""
    perceptual: str = ""
    read_as: str = ""
    range_used: float | None = None

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width); None for a refused image."""
        return None if self.reason else (self.height, self.width)

    @property
    def is_sound(self) -> bool:
        """Whether all fields have their types; fields read from a file may not."""
        texts = (self.reason, self.digest, self.pixels, self.perceptual, self.read_as)
        if not all(isinstance(text, str) for text in texts) or {type(self.height), type(self.width)} != {int}:
            return False
        return all(not text or _DIGEST.fullmatch(text) for text in (self.digest, self.pixels, self.perceptual))

    @property
    def hashes(self) -> ImageHashes:
        """The digests as bytes."""
        return ImageHashes(*(bytes.fromhex(digest) for digest in (self.digest, self.pixels, self.perceptual)))


def examine(path: Path, max_pixels: int, reading: Reading) -> Examined:
    """Decodes one image file and hashes it."""
    digest = ""
    try:
        with opened(path) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            image, read_as = read_image(file, max_pixels, reading)
        height, width = image.shape[:2]
        prints = pixel_digest(image).hex(), perceptual_hash(image).hex()
    except ImageError as error:
        return Examined(reason=str(error), digest=digest)
    except OSError as error:
        return Examined(reason=error.strerror or str(error))
    except MemoryError:
        return Examined(reason="it takes more memory than there is", digest=digest)
    return Examined(height, width, "", digest, *prints, read_as, range_used(image, read_as))


def examine_all(
    paths: Sequence[Path],
    max_pixels: int,
    reading: Reading = Reading(),
    *,
    workers: int = 0,
    progress: Progress | None = None,
    memory: Memory | None = None,
) -> dict[Path, Examined]:
    """Every file of `paths`, by path.

    Args:
      workers: processes; 0: one per core.
      progress: wraps the iterator over the files to read and takes their number.
      memory: files in it are not read again; each file whose bytes were read is added.
    """
    examined = {path: memory.known[path] for path in paths if path in memory.known} if memory else {}
    unknown = [path for path in paths if path not in examined]
    examine_one = functools.partial(examine, max_pixels=max_pixels, reading=reading)
    results: Iterable[Examined] = over(
        examine_one, unknown, workers=workers, crashed=lambda path, reason: Examined(reason=reason),
        max_seconds=MAX_SECONDS, max_bytes=MAX_BYTES,
    )  # fmt: skip
    if progress and unknown:
        results = progress(results, len(unknown))
    for path, image in zip(unknown, results, strict=True):
        examined[path] = image
        if memory and image.digest:  # an unreadable file may be readable in the next run
            memory.add(path, image)
    return {path: examined[path] for path in paths}


class Memory:
    """Results of `examine` for the files of a tree, appended to a file, one line each.

        with Memory(out / ".examined.jsonl", root, repr((max_pixels, reading))) as memory:
            examine_all(paths, max_pixels, reading, memory=memory)

    A line counts only if the file's size and time of change, `way` and `READER` are the same as then.

    Attributes:
      known: path -> result, for files that have not changed since.
    """

    def __init__(self, path: Path, root: Path, way: str):
        self._path, self._root, self._way = path, Path(os.path.realpath(root)), f"{READER}, {way}"
        self.known = dict(self._recalled())

    def __enter__(self) -> Memory:
        self._file = self._path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def add(self, path: Path, image: Examined) -> None:
        name, stamp = str(path.relative_to(self._root)), _stamp(path)
        self._file.write(json.dumps([name, self._way, stamp, asdict(image)]) + "\n")

    def _recalled(self) -> Iterator[tuple[Path, Examined]]:
        if not self._path.exists():
            return
        for line in read_bytes(self._path, MAX_TEXT_BYTES).split(b"\n"):
            try:
                name, way, stamp, fields = parsed(line.decode(), self._path.name, list)
                image = Examined(**fields)
                path = self._root / name
                if not image.is_sound:
                    continue
            except (ValueError, TypeError):  # the last line of a run that was killed
                continue
            if stamp and way == self._way and stamp == _stamp(path):
                yield path, image


def _stamp(path: Path) -> list[int]:
    """[size in bytes, time of change in ns]; [] where there is no file."""
    try:
        status = os.stat(path)
    except OSError:
        return []
    return [status.st_size, status.st_mtime_ns]
