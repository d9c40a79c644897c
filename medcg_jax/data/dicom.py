"""One frame of a DICOM file as uint8 RGB, decoded by pydicom from an untrusted file.

Decoders allocate what a codestream declares, whatever the DICOM header says. So compressed pixels are checked first:
fragments must be whole, and codestreams must have the declared size. GDCM decodes lossless JPEG in a separate process
(`decode_lossless`), since broken data can abort it.

Only tags about the storage and display of pixels are read, none that names a patient. pydicom's warnings, log lines and
errors may quote values of a file, so they are never passed on; messages here are written anew. Overlays, ICC profiles
and the aspect ratio of pixels are ignored.

Source of the codestreams' markers: ITU-T T.81, B.1.1.3 (JPEG), T.87, C.1.1 (JPEG-LS), T.800, A.5.1 (JPEG 2000).
"""

from __future__ import annotations

import io
import json
import logging
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import numpy as np
from pydicom import config, uid
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.filereader import read_dataset, read_preamble
from pydicom.multival import MultiValue
from pydicom.pixels import as_pixel_options, get_decoder
from pydicom.tag import BaseTag

from medcg_jax.data.dicom_levels import KEYWORDS, grey_levels, named, palette_levels, value_of
from medcg_jax.data.reading import ImageError, Reading, by_rows, check_reading, check_size, frame_index

# Transfer syntax -> pydicom's plugin, "" for plain pixels; fixed here, so that it does not depend on what is installed.
PLUGINS: dict[str, str] = {
    uid.ImplicitVRLittleEndian: "",
    uid.ExplicitVRLittleEndian: "",
    uid.ExplicitVRBigEndian: "",
    uid.DeflatedExplicitVRLittleEndian: "",
    uid.RLELossless: "pydicom",
    uid.JPEGBaseline8Bit: "pillow",
    uid.JPEGExtended12Bit: "pillow",
    uid.JPEGLossless: "gdcm",
    uid.JPEGLosslessSV1: "gdcm",
    uid.JPEGLSLossless: "pyjpegls",
    uid.JPEGLSNearLossless: "pyjpegls",
    uid.JPEG2000Lossless: "pillow",
    uid.JPEG2000: "pillow",
}
GREYS = ("MONOCHROME1", "MONOCHROME2")
COLORS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT")
MAX_INFLATED_BYTES = 2**26
# Of one element that is read; functional groups of 2,000 frames have some 1 MB. Empty items are the slowest to parse.
MAX_VALUE_BYTES = 2**23
_JPEG2000_COLORS = ("YBR_RCT", "YBR_ICT")
# Without a limit, counting a file full of empty fragments takes minutes.
MAX_FRAGMENTS = 100_000
MAX_FRAGMENT_BYTES = 2**28

_ITEM = 0xFFFEE000
_END = 0xFFFEE0DD
# Frame markers allowed for each transfer syntax. Progressive JPEG (C2) is not among them.
_FRAME_MARKERS: dict[str, tuple[int, ...]] = {
    uid.JPEGBaseline8Bit: (0xC0,),
    uid.JPEGExtended12Bit: (0xC0, 0xC1),
    uid.JPEGLossless: (0xC3,),
    uid.JPEGLosslessSV1: (0xC3,),
    uid.JPEGLSLossless: (0xF7,),
    uid.JPEGLSNearLossless: (0xF7,),
}
_WITHOUT_LENGTH = (0x01, *range(0xD0, 0xD9))
# Of the process that decodes lossless JPEG.
MAX_SECONDS = 60

_LAYOUT = (
    "SamplesPerPixel PhotometricInterpretation PlanarConfiguration NumberOfFrames Rows Columns BitsAllocated "
    "BitsStored HighBit PixelRepresentation ExtendedOffsetTable ExtendedOffsetTableLengths".split()
)
_TAGS: list[Any] = [tag_for_keyword(keyword) for keyword in (*_LAYOUT, *KEYWORDS)]
_TRANSFER_SYNTAX: Any = tag_for_keyword("TransferSyntaxUID")
_PIXEL_DATA = tag_for_keyword("PixelData")
# Float Pixel Data, Double Float Pixel Data.
_FLOAT_PIXELS = (0x7FE00008, 0x7FE00009)
_UNDEFINED = 0xFFFFFFFF
# pydicom's settings and Python's warning filters are process-wide, so only one thread reads a file while they are changed.
_LOCK = threading.Lock()


@dataclass(frozen=True)
class _Header:
    """The checked description of a file's pixels.

    Attributes:
      file: the data set, inflated if it was deflated; its pixels begin at byte `start` and have `length` bytes.
    """

    dataset: Dataset
    file: BinaryIO
    start: int
    length: int
    pixel_vr: str | None
    syntax: uid.UID
    rows: int
    columns: int
    samples: int
    photometric: str
    bits_allocated: int
    bits_stored: int
    signed: bool
    num_frames: int


def read_dicom(file: BinaryIO, max_pixels: int, reading: Reading) -> tuple[np.ndarray, str]:
    """uint8[h, w, 3] of one frame, and how it was made, such as "DICOM window 40/400 of the file, frame 3 of 12".

    Greys go through the file's modality LUT or rescale, then through `reading.window`. A preset is in HU and applies to
    CT with a rescale; other files, or all files without a window, use their own VOI LUT or first window. Without those,
    unsigned greys of up to 8 bits without a rescale stay unchanged, and others are stretched between percentiles.

    Args:
      max_pixels: limit checked in the header before pixels are read; only one frame is decoded.

    Raises:
      ImageError: broken, cut short, too large, or stored in a way that is not read. DataError: `reading` has an unknown
        choice.
    """
    check_reading(reading)
    failure = ""
    step = "header"
    with _silent():
        try:
            header = _read_header(file, max_pixels)
            step = f"pixels: {header.syntax.name}, {_layout_of(header)}"
            frame = frame_index(reading.frame, header.num_frames)
            pixels = _decode(header, frame)
            step = "levels, from one of its LUTs, rescale or window"
            image, how = _to_rgb(pixels, header, frame, reading)
            which = f", frame {frame + 1} of {header.num_frames}" if header.num_frames > 1 else ""
            return image, f"DICOM {how}{which}"
        except (ImageError, MemoryError):
            raise
        except Exception as error:
            failure = type(error).__name__
    # Raised outside of the handler, where it would carry pydicom's error as its context.
    raise ImageError(f"DICOM: cannot be decoded ({failure} at its {step})")


def dicom_size(file: BinaryIO, max_pixels: int) -> tuple[int, int]:
    """(height, width) of the file's frames in pixels, from its header alone.

    Raises:
      ImageError: the header is broken or declares what `read_dicom` refuses.
    """
    failure = ""
    with _silent():
        try:
            header = _read_header(file, max_pixels)
            return header.rows, header.columns
        except ImageError:
            raise
        except Exception as error:
            failure = type(error).__name__
    raise ImageError(f"DICOM: its header cannot be read ({failure})")


def _layout_of(header: _Header) -> str:
    names = ("BitsAllocated", "BitsStored", "SamplesPerPixel")
    numbers = (header.bits_allocated, header.bits_stored, header.samples)
    return ", ".join(f"{named(name)} {number}" for name, number in zip(names, numbers, strict=True))


@contextmanager
def _silent() -> Iterator[None]:
    """Silences pydicom's warnings, logs and value checks within the block."""
    logger = logging.getLogger("pydicom")
    with _LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        level, mode = logger.level, config.settings.reading_validation_mode
        logger.setLevel(logging.CRITICAL + 1)
        config.settings.reading_validation_mode = config.IGNORE
        try:
            yield
        finally:
            logger.setLevel(level)
            config.settings.reading_validation_mode = mode


def _read_header(file: BinaryIO, max_pixels: int) -> _Header:
    read_preamble(file, force=True)
    meta = read_dataset(file, False, True, stop_when=lambda tag, *_: tag.group != 2, specific_tags=[_TRANSFER_SYNTAX])
    syntax = uid.UID(str(meta.get("TransferSyntaxUID", "")))
    if syntax not in PLUGINS:
        # Only a registered UID has a name; an unknown UID may be any text.
        name = f"transfer syntax {syntax.name} is not read" if syntax.is_transfer_syntax else "no known transfer syntax"
        raise ImageError(f"DICOM: {name}; expected {', '.join(uid.UID(syntax).name for syntax in PLUGINS)}")
    if syntax.is_deflated:
        file = _inflated(file)
    start = file.tell()
    size = file.seek(0, io.SEEK_END)
    file.seek(start)
    pixels: dict[str, Any] = {}

    def at_pixels(tag: BaseTag, vr: str | None, length: int) -> bool:
        if tag in _FLOAT_PIXELS:
            raise ImageError("DICOM: floating-point pixels are not read")
        if tag == _PIXEL_DATA:
            pixels.update(start=file.tell(), length=length, pixel_vr=vr)
        elif tag in _TAGS and _UNDEFINED != length > MAX_VALUE_BYTES:
            raise ImageError(f"DICOM: an element of {length:,} bytes ({tag}); at most {MAX_VALUE_BYTES:,} are read")
        elif length != _UNDEFINED and file.tell() + length > size:
            raise ImageError("DICOM: cut short within the header")
        return tag == _PIXEL_DATA

    implicit, little = syntax.is_implicit_VR, syntax.is_little_endian
    dataset = read_dataset(file, implicit, little, stop_when=at_pixels, specific_tags=_TAGS)
    if not pixels:
        raise ImageError("DICOM: holds no pixels")
    header = _Header(
        dataset,
        file,
        **pixels,
        syntax=syntax,
        rows=_number(dataset, "Rows"),
        columns=_number(dataset, "Columns"),
        samples=_number(dataset, "SamplesPerPixel", 1),
        photometric=str(dataset.get("PhotometricInterpretation", "")).strip(),
        bits_allocated=_number(dataset, "BitsAllocated"),
        bits_stored=_number(dataset, "BitsStored"),
        signed=_number(dataset, "PixelRepresentation", 0) == 1,
        # Some writers put 0 for one frame; a wrong number is refused by the length of the pixels.
        num_frames=_number(dataset, "NumberOfFrames", 1) or 1,
    )
    check_size((header.columns, header.rows), max_pixels)
    _check_layout(header)
    return _checked_length(header, size)


def _inflated(file: BinaryIO) -> BinaryIO:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    content = inflater.decompress(file.read(MAX_INFLATED_BYTES), MAX_INFLATED_BYTES)
    if not inflater.eof:
        raise ImageError(f"DICOM: deflated data are cut short or have more than {MAX_INFLATED_BYTES} bytes")
    return io.BytesIO(content)


def _number(dataset: Dataset, keyword: str, default: int | None = None) -> int:
    value = value_of(dataset, keyword)
    if value in (None, "") and default is not None:
        return default
    if not isinstance(value, int):
        what = "missing" if value in (None, "") else "several values" if isinstance(value, MultiValue) else "no number"
        raise ImageError(f"DICOM: {named(keyword)} is {what}; expected a whole number")
    return int(value)


def _check_layout(header: _Header) -> None:
    accepted = {1: (*GREYS, "PALETTE COLOR"), 3: COLORS}.get(header.samples, ())
    if header.photometric not in accepted:
        known = "1 sample per pixel, MONOCHROME1, MONOCHROME2 or PALETTE COLOR, or 3, " + ", ".join(COLORS)
        tag = named("PhotometricInterpretation")
        raise ImageError(f"DICOM: {tag}: a photometric interpretation that is not read; accepted are {known}")
    if header.photometric in _JPEG2000_COLORS and header.syntax not in uid.JPEG2000TransferSyntaxes:
        raise ImageError(f"DICOM: {header.photometric} colours, which are JPEG 2000's alone, in {header.syntax.name}")
    stored, allocated = header.bits_stored, header.bits_allocated
    if allocated not in ((1, 8, 16) if header.samples == 1 else (8, 16)) or not 1 <= stored <= allocated:
        reason = "expected 1, 8 or 16 bits (8 or 16 of colours), of which 1 or more are stored"
        tags = f"{named('BitsAllocated')}, {named('BitsStored')}"
        raise ImageError(f"DICOM: {allocated} bits allocated, {stored} stored ({tags}); {reason}")
    if _number(header.dataset, "HighBit", stored - 1) != stored - 1 and not header.syntax.is_encapsulated:
        tag = named("HighBit")
        raise ImageError(f"DICOM: {tag}: HighBit is not BitsStored - 1; pixels elsewhere in their words are not read")
    if header.samples > 1 and _planar(header) not in (0, 1):
        raise ImageError(f"DICOM: {named('PlanarConfiguration')} is neither 0 nor 1")
    if header.num_frames < 1:
        raise ImageError(f"DICOM: {named('NumberOfFrames')}: NumberOfFrames is below 1")


def _planar(header: _Header) -> int:
    """PlanarConfiguration of native samples; decoders of compressed ones give samples pixel by pixel whatever the header
    says (PS3.5, 8.2)."""
    return 0 if header.syntax.is_encapsulated else _number(header.dataset, "PlanarConfiguration", 0)


def _checked_length(header: _Header, size: int) -> _Header:
    """The header, with YBR_FULL instead of YBR_FULL_422 if the pixels are not subsampled.

    Args:
      size: bytes of the file.

    Raises:
      ImageError: there are fewer or more pixels than declared, plain or in fragments.
    """
    if header.syntax.is_encapsulated:
        if header.length != _UNDEFINED:
            raise ImageError("DICOM: compressed pixels that are not in fragments")
        header.file.seek(header.start)
        _check_fragments(header.file, header.syntax, header.num_frames)
        return header
    whole = -(-header.num_frames * header.rows * header.columns * header.samples * header.bits_allocated // 8)
    declared = whole
    if header.photometric == "YBR_FULL_422":
        declared = whole * 2 // 3
        if whole <= header.length <= whole + whole % 2 and header.length != declared:
            # Written with all samples, as decoders give them.
            header, declared = replace(header, photometric="YBR_FULL"), whole
    if min(header.length, size - header.start) < declared or header.length == _UNDEFINED:
        raise ImageError("DICOM: pixel data are shorter than the header declares")
    if header.length > declared + 1:
        tags = "Rows, Columns, SamplesPerPixel, BitsAllocated, NumberOfFrames"
        raise ImageError(
            f"DICOM: pixel data are longer than the header declares: {named('PixelData')} has {header.length:,} bytes, "
            f"{tags} declare {declared:,}"
        )
    return header


def _decode(header: _Header, frame: int) -> np.ndarray:
    """[h, w] stored values or [h, w, 3] RGB of one frame."""
    options = as_pixel_options(header.dataset, number_of_frames=header.num_frames)
    options |= {"pixel_keyword": "PixelData", "pixel_vr": header.pixel_vr, "pixel_representation": int(header.signed)}
    options |= {"photometric_interpretation": header.photometric, "samples_per_pixel": header.samples}
    options |= {"number_of_frames": header.num_frames, "planar_configuration": _planar(header)}
    source: BinaryIO | bytes = header.file
    header.file.seek(header.start)
    if header.syntax.is_encapsulated:
        offsets = options.pop("extended_offsets", None)
        content = get_frame(header.file, frame, number_of_frames=header.num_frames, extended_offsets=offsets)
        bits = _check_codestream(content, header.syntax, header.rows, header.columns, header.samples)
        if bits:
            # The decoder gives words of the codestream's size, not the header's.
            options |= {"bits_allocated": bits, "bits_stored": min(header.bits_stored, bits)}
        source, frame, options["number_of_frames"] = encapsulate([content]), 0, 1
    if PLUGINS[header.syntax] == "gdcm":
        pixels = decode_lossless(content, options | {"transfer_syntax": header.syntax})
    else:
        decoder = get_decoder(header.syntax)
        pixels, _ = decoder.as_array(source, index=frame, decoding_plugin=PLUGINS[header.syntax], **options)
    if pixels.shape[:2] != (header.rows, header.columns) or pixels.ndim != (2 if header.samples == 1 else 3):
        raise ImageError("DICOM: decodes to another shape than its header declares")
    return pixels


def _check_fragments(file: BinaryIO, syntax: str, num_frames: int) -> None:
    """Raises ImageError unless whole fragments of at most `num_frames` frames and an end mark follow."""
    started = 0
    for number in range(MAX_FRAGMENTS):
        head = file.read(8)
        if len(head) < 8:
            raise ImageError("DICOM: cut short within the pixel data")
        group, element, length = struct.unpack("<HHL", head)
        tag = group << 16 | element
        if tag == _END:
            if started > num_frames:
                declared = f"NumberOfFrames (0028,0008) declares {num_frames}"
                raise ImageError(f"DICOM: pixel data are longer than the header declares: {started} frames; {declared}")
            return
        if tag != _ITEM:
            raise ImageError("DICOM: compressed pixels that are not in fragments")
        if length > MAX_FRAGMENT_BYTES:
            raise ImageError(f"DICOM: a fragment of {length:,} bytes; at most {MAX_FRAGMENT_BYTES:,} are read")
        start = file.tell()
        if number:  # the first is the table of offsets
            # In RLE a fragment is a frame; other codestreams begin with a mark.
            started += syntax == uid.RLELossless or file.read(4).startswith((b"\xff\xd8\xff", b"\xff\x4f\xff\x51"))
        # Beyond the end of a truncated file the next read is empty.
        file.seek(start + length)
    raise ImageError(f"DICOM: more than {MAX_FRAGMENTS} fragments of pixel data")


def _check_codestream(frame: bytes, syntax: str, rows: int, columns: int, samples: int) -> int:
    """Bits of the words that a frame of JPEG or lossless JPEG decodes to; 0 for other codestreams.

    Args:
      frame: one frame, its fragments joined.

    Raises:
      ImageError: the frame is no codestream of its transfer syntax, or declares another size than the header.
    """
    if syntax == uid.RLELossless:
        return 0
    if syntax in (uid.JPEG2000, uid.JPEG2000Lossless):
        size, precision = _size_jpeg2000(frame)
    else:
        size, precision = _size_jpeg(frame, _FRAME_MARKERS[syntax])
    if size != (rows, columns, samples):
        raise ImageError("DICOM: the compressed image has another size or number of channels than the header declares")
    # The decoder of lossless JPEG fills missing data with grey.
    lossless = syntax in (uid.JPEGLossless, uid.JPEGLosslessSV1)
    if lossless and not frame.rstrip(b"\0").endswith(b"\xff\xd9"):
        raise ImageError("DICOM: a JPEG without its end")
    if lossless and not 2 <= precision <= 16:
        raise ImageError(f"DICOM: lossless JPEG of {precision} bits; expected 2 to 16")
    if syntax in (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit) and precision != 8:
        raise ImageError(f"DICOM: JPEG of {precision} bits; expected 8")
    return (precision + 7) // 8 * 8 if lossless or syntax in (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit) else 0


def _size_jpeg(frame: bytes, accepted: tuple[int, ...]) -> tuple[tuple[int, int, int], int]:
    """((rows, columns, channels), bits) of the first frame marker."""
    offset = 2
    while frame[:2] == b"\xff\xd8" and offset + 10 <= len(frame) and frame[offset] == 0xFF:
        marker = frame[offset + 1]
        if marker in accepted:
            precision, rows, columns, channels = struct.unpack_from(">BHHB", frame, offset + 4)
            return (rows, columns, channels), precision
        if marker == 0xFF:
            offset += 1
        elif marker in _WITHOUT_LENGTH:
            offset += 2
        else:
            offset += 2 + struct.unpack_from(">H", frame, offset + 2)[0]
    raise ImageError("DICOM: pixel data are no JPEG of their transfer syntax")


def _size_jpeg2000(frame: bytes) -> tuple[tuple[int, int, int], int]:
    """The same for a JPEG 2000 codestream; JP2 files, which DICOM does not allow, are refused."""
    if len(frame) < 43 or frame[:4] != b"\xff\x4f\xff\x51":
        raise ImageError("DICOM: pixel data are no JPEG 2000 codestream")
    right, bottom, left, top = struct.unpack_from(">4L", frame, 8)
    channels, depth = struct.unpack_from(">HB", frame, 40)
    return (bottom - top, right - left, channels), (depth & 0x7F) + 1


def decode_lossless(frame: bytes, options: dict[str, Any]) -> np.ndarray:
    """[h, w] stored values or [h, w, 3] RGB of one codestream; starts a process, which takes about half a second.

    Args:
      options: arguments of pydicom's decoder as JSON values, and `transfer_syntax`.

    Raises:
      ImageError: GDCM refuses the data, ends its process, or takes longer than `MAX_SECONDS`.
    """
    # The child process uses this process's path.
    command = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import _decode_stdin; _decode_stdin()"
    try:
        done = subprocess.run(
            [sys.executable, "-c", command, json.dumps(options)],
            input=frame,
            capture_output=True,
            timeout=MAX_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        done = None
    shape = (options["rows"], options["columns"], *([3] if options["samples_per_pixel"] == 3 else []))
    kind = np.dtype(f"<{'i' if options['pixel_representation'] else 'u'}{options['bits_allocated'] // 8}")
    if done is None or done.returncode or len(done.stdout) != np.prod(shape, dtype=np.int64) * kind.itemsize:
        raise ImageError("DICOM: lossless JPEG data cannot be decoded")
    return np.frombuffer(done.stdout, kind).reshape(shape)


def _decode_stdin() -> None:
    """The child process: codestream on standard input, options as first argument, raw pixels on standard output."""
    options = json.loads(sys.argv[1])
    decoder = get_decoder(uid.UID(options.pop("transfer_syntax")))
    source = encapsulate([sys.stdin.buffer.read()])
    pixels, _ = decoder.as_array(source, index=0, decoding_plugin="gdcm", **options)
    sys.stdout.buffer.write(pixels.astype(pixels.dtype.newbyteorder("<")).tobytes())


def _to_rgb(pixels: np.ndarray, header: _Header, frame: int, reading: Reading) -> tuple[np.ndarray, str]:
    full = 2**header.bits_stored - 1
    if header.samples == 3:
        if int(pixels.max()) > full:
            raise ImageError("DICOM: pixels have values beyond BitsStored")
        if full == 255:
            return np.ascontiguousarray(pixels, np.uint8), "RGB"
        scaled = by_rows(pixels, lambda rows: (rows.astype(np.uint32) * 255 + full // 2) // full)
        return scaled, f"RGB of {header.bits_stored} bits, range 0 to {full}"
    low = -(full + 1) // 2 if header.signed else 0
    domain = np.arange(low, low + full + 1)
    if int(pixels.min()) < domain[0] or int(pixels.max()) > domain[-1]:
        raise ImageError("DICOM: pixels have values beyond BitsStored")
    if header.photometric == "PALETTE COLOR":
        table = palette_levels(domain, header.dataset)
        return np.stack([table[row.astype(np.int32) - low] for row in pixels]), "palette"
    table, how = grey_levels(domain, pixels, header.dataset, frame, reading)
    if header.photometric == "MONOCHROME1":
        table, how = 255 - table, f"{how}, inverted"
    grey = by_rows(pixels, lambda rows: table[rows.astype(np.int32) - low])
    return np.repeat(grey[..., None], 3, axis=2), how
