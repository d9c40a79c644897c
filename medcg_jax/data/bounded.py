"""Image files that are not trusted, opened: regular files of a bounded size, read in a bounded number of steps."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from medcg_jax.data.reading import ImageError
from medcg_jax.untrusted import FileError, open_regular

# Of JPEG, PNG and the like the whole file is read. At least the first are, and more where more pixels are accepted.
MAX_IMAGE_BYTES = 2**27
MAX_BYTES_PER_PIXEL = 8
# A file of DICOM may hold hundreds of frames, of which one is read.
MAX_DICOM_BYTES = 2**31
# Parsers of headers read a few bytes at a time: a chunk of a PNG in four reads, a marker of a JPEG in three, a tag of a
# TIFF in two, a block of a GIF in two, a header of a PPM byte by byte, an element of DICOM in two. Pixels come in
# blocks: a PNG of 2**24 pixels of 16 bits in chunks of 8 KiB takes 50,000 reads.
MAX_READS = 300_000
# Groups of 2,000 frames have some 100,000 elements.
MAX_DICOM_READS = 300_000


class BoundedFile:
    """A binary file of which a parser may read so many times; more is refused.

    Args:
      reads: how many reads it may take. what: what takes so many, for the message.
    """

    def __init__(self, file: BinaryIO, reads: int = MAX_READS, what: str = ""):
        self._file, self._left, self._reads = file, reads, reads
        self._what = what or "chunks, markers, tags, strips, blocks or bytes of a header"
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        """As a file's. Raises ImageError beyond the bound."""
        self._left -= 1
        if self._left < 0:
            raise ImageError(f"in more than {self._reads:,} pieces ({self._what}); at most so many are read")
        return self._file.read(size)


@contextmanager
def opened(source: str | Path | bytes | BinaryIO) -> Iterator[BinaryIO]:
    """The bytes of an image, from their start; a file that is handed in stays open.

    Raises:
      ImageError: no regular file, missing, or of more than `MAX_DICOM_BYTES`.
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
