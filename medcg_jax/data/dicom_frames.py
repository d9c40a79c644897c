"""Checks of compressed DICOM pixels before a decoder sees them: whole fragments, and codestreams of the size declared.

Decoders allocate what the codestream declares, whatever the DICOM header says. Source of the markers: ITU-T T.81,
B.1.1.3 (JPEG), T.87, C.1.1 (JPEG-LS), T.800, A.5.1 (JPEG 2000).
"""

from __future__ import annotations

import struct
from typing import BinaryIO

from pydicom import uid

from medcg_jax.data.reading import ImageError

# A file of nothing but empty fragments takes minutes to count.
MAX_FRAGMENTS = 100_000
MAX_FRAGMENT_BYTES = 2**28

_ITEM = 0xFFFEE000
_END = 0xFFFEE0DD
# Frame markers that a file of each transfer syntax may have. Progressive JPEG (C2) is none of them.
_FRAME_MARKERS: dict[str, tuple[int, ...]] = {
    uid.JPEGBaseline8Bit: (0xC0,),
    uid.JPEGExtended12Bit: (0xC0, 0xC1),
    uid.JPEGLossless: (0xC3,),
    uid.JPEGLosslessSV1: (0xC3,),
    uid.JPEGLSLossless: (0xF7,),
    uid.JPEGLSNearLossless: (0xF7,),
}
_WITHOUT_LENGTH = (0x01, *range(0xD0, 0xD9))


def check_fragments(file: BinaryIO, syntax: str, num_frames: int) -> None:
    """Raises ImageError unless whole fragments, of no more frames than declared, and the mark of their end follow."""
    started = 0
    for number in range(MAX_FRAGMENTS):
        head = file.read(8)
        if len(head) < 8:
            raise ImageError("DICOM: cut short within the pixel data")
        group, element, length = struct.unpack("<HHL", head)
        tag = group << 16 | element
        if tag == _END:
            if started > num_frames:
                said = f"NumberOfFrames (0028,0008) declares {num_frames}"
                raise ImageError(f"DICOM: pixel data are longer than the header declares: {started} frames; {said}")
            return
        if tag != _ITEM:
            raise ImageError("DICOM: compressed pixels that are not in fragments")
        if length > MAX_FRAGMENT_BYTES:
            raise ImageError(f"DICOM: a fragment of {length:,} bytes; at most {MAX_FRAGMENT_BYTES:,} are read")
        place = file.tell()
        if number:  # the first is the table of offsets
            # Of RLE a fragment is a frame; other codestreams begin with their mark.
            started += syntax == uid.RLELossless or file.read(4).startswith((b"\xff\xd8\xff", b"\xff\x4f\xff\x51"))
        # Past the end of a file that is cut short nothing more is read.
        file.seek(place + length)
    raise ImageError(f"DICOM: more than {MAX_FRAGMENTS} fragments of pixel data")


def check_codestream(frame: bytes, syntax: str, rows: int, columns: int, samples: int) -> int:
    """Bits of the words that a frame of JPEG or lossless JPEG decodes to; 0 of other codestreams, whose decoder says.

    Args:
      frame: one frame, its fragments joined.

    Raises:
      ImageError: the frame is no codestream of its transfer syntax, or declares another image than its file.
    """
    if syntax == uid.RLELossless:
        return 0
    if syntax in (uid.JPEG2000, uid.JPEG2000Lossless):
        found, precision = _size_jpeg2000(frame)
    else:
        found, precision = _size_jpeg(frame, _FRAME_MARKERS[syntax])
    if found != (rows, columns, samples):
        raise ImageError("DICOM: the compressed image has another size or number of channels than the header declares")
    # The decoder of lossless JPEG fills what is missing with grey.
    lossless = syntax in (uid.JPEGLossless, uid.JPEGLosslessSV1)
    if lossless and not frame.rstrip(b"\0").endswith(b"\xff\xd9"):
        raise ImageError("DICOM: a JPEG without its end")
    if lossless and not 2 <= precision <= 16:
        raise ImageError(f"DICOM: lossless JPEG of {precision} bits; 2 to 16 are accepted")
    if syntax in (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit) and precision != 8:
        raise ImageError(f"DICOM: JPEG of {precision} bits; 8 are accepted")
    return (precision + 7) // 8 * 8 if lossless or syntax in (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit) else 0


def _size_jpeg(frame: bytes, accepted: tuple[int, ...]) -> tuple[tuple[int, int, int], int]:
    """((rows, columns, channels), bits) of the first frame marker."""
    place = 2
    while frame[:2] == b"\xff\xd8" and place + 10 <= len(frame) and frame[place] == 0xFF:
        marker = frame[place + 1]
        if marker in accepted:
            precision, rows, columns, channels = struct.unpack_from(">BHHB", frame, place + 4)
            return (rows, columns, channels), precision
        if marker == 0xFF:
            place += 1
        elif marker in _WITHOUT_LENGTH:
            place += 2
        else:
            place += 2 + struct.unpack_from(">H", frame, place + 2)[0]
    raise ImageError("DICOM: pixel data are no JPEG of their transfer syntax")


def _size_jpeg2000(frame: bytes) -> tuple[tuple[int, int, int], int]:
    """The same of a JPEG 2000 codestream; one inside a JP2 file, which DICOM does not allow, is refused."""
    if len(frame) < 43 or frame[:4] != b"\xff\x4f\xff\x51":
        raise ImageError("DICOM: pixel data are no JPEG 2000 codestream")
    right, bottom, left, top = struct.unpack_from(">4L", frame, 8)
    channels, depth = struct.unpack_from(">HB", frame, 40)
    return (bottom - top, right - left, channels), (depth & 0x7F) + 1
