"""Mutations of image and JSON files, drawn from a `random.Random`: where a file is touched (its class) and how."""

import copy
import json
import re
import struct
import zlib
from random import Random

IMAGE_CLASSES = ("header", "tables", "lengths", "data", "tail", "chunks", "flood", "truncated")
JSON_CLASSES = ("structure", "strings", "numbers", "encoding", "values", "truncated")
# The smallest piece that a parser of each kind reads one by one, and before what it may stand.
FLOODS = {
    "png": (b"\0\0\0\0abCd" + zlib.crc32(b"abCd").to_bytes(4, "big"), b"....IDAT"),
    "jpeg": (b"\xff\xfe\0\x02", b"\xff\xda"),
    "gif": (b"!\xf9\0\0", b"\x2c\0\0\0\0"),
    "tiff": (b"\x9c\x9c\x03\0\x01\0\0\0\0\0\0\0", b"\0\x01\x03\0"),
    "ppm": (b"#\n", rb"\d+"),
    "webp": (b"ABCD\0\0\0\0", b"VP8"),
    "bmp": (b"\0", b"BM"),
    "dicom": (b"\x09\0\x10\x10LO\0\0", rb"\x28\0\x10\0"),
    "dicom_compressed": (b"\xfe\xff\0\xe0\0\0\0\0", b"\xfe\xff\xdd\xe0"),
}
FLOOD_SIZES = (3, 3, 3, 30, 30, 30, 300, 300, 3000, 3000, 3000, 3000, 30_000, 30_000, 200_000)
EXTREMES = {1: (0, 1, 0x7F, 0x80, 0xFF), 2: (0, 1, 2, 0x7FFF, 0x8000, 0xFFFF)}
EXTREMES[4] = (0, 1, 0xFFFF, 0x10000, 0x0FFFFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)
NUMBERS = (
    "0", "-0", "-1", "1e400", "-1e400", "1e-400", "NaN", "Infinity", "-Infinity", "1" * 4299, "1" * 5000, "0x10", "01",
    "1.", ".5", "1.5", "1e5", "true", "9007199254740993", "1" + "0" * 400, "-", "1e999999999",
)  # fmt: skip
STRINGS = (
    "\\ud800", "\\udfff\\ud800", "\\u0000", "\\u000a", "\\x41", "\\", "\u2028", "\U0001f600", "../", "/etc/passwd",
    "C:\\\\", "a" * 5000, "A: a\\nB: b", '"', "\u202e", "\\udc80", "%00", "\\uD83D\\uDE00", "",
)  # fmt: skip
VALUES = (None, True, False, 0, -1, 1.5, "", "x", [], {}, [[]], {"a": {}}, [None] * 1000, "\x00", "A", 2**70)
TOKENS = ("[", "]", "{", "}", ":", ",", '"', "[" * 100_000, '{"a":' * 50_000, "null", "//", "[" * 900 + "]" * 900)


def mutated(kind: str, where: str, content: bytes, random: Random) -> bytes:
    """The file with one to six changes of the class `where`."""
    if kind.startswith("json"):
        return _mutated_json(where, content, random)
    if where == "truncated":
        return content[: random.randrange(len(content))]
    if where == "chunks":
        return _checksums(kind, _swapped(kind, content, random), random)
    if where == "flood":
        piece, before = FLOODS[kind]
        places = [m.start() for m in re.finditer(before, content, re.DOTALL)] or [len(content)]
        place = random.choice(places[:4])
        return content[:place] + piece * random.choice(FLOOD_SIZES) + content[place:]
    found = bytearray(content)
    if where == "lengths":
        places = _length_fields(kind, content) or [(random.randrange(len(content) - 4), "<L")]
        for place, code in random.sample(places, min(len(places), random.choice((1, 1, 1, 2, 3)))):
            size = struct.calcsize(code)
            if place + size <= len(found):
                own = struct.unpack_from(code, content, place)[0]
                near = (own + 1, max(0, own - 1), min(own * 2, 2 ** (8 * size) - 1))
                value = random.choice(EXTREMES[size] + near) & (2 ** (8 * size) - 1)
                struct.pack_into(code, found, place, value)
    else:
        start, stop = _region(kind, where, content)
        for _ in range(random.choice((1, 1, 2, 6))):
            _touch(found, start, max(start + 1, min(stop, len(found))), random)
    return _checksums(kind, bytes(found), random)


def _touch(found: bytearray, start: int, stop: int, random: Random) -> None:
    """One bit flip, byte set, deletion or insertion between two places."""
    if start >= len(found):
        return
    place = random.randrange(start, min(stop, len(found)))
    how = random.choice(("flip", "flip", "set", "set", "delete", "insert", "repeat"))
    if how == "flip":
        found[place] ^= 1 << random.randrange(8)
    elif how == "set":
        found[place] = random.choice((0, 0xFF, 0x7F, 0x80, random.randrange(256)))
    elif how == "delete":
        del found[place : place + random.choice((1, 1, 2, 4, 64))]
    elif how == "insert":
        found[place:place] = random.randbytes(random.choice((1, 1, 2, 4, 64)))
    else:
        found[place:place] = found[place : place + random.choice((4, 16, 256))] * random.choice((1, 1, 100))


def _region(kind: str, where: str, content: bytes) -> tuple[int, int]:
    """First and last place of a class: headers, then tables up to the coded data, the data, and the last 64 bytes."""
    start = 128 if kind.startswith("dicom") else 0
    marks = {"jpeg": b"\xff\xda", "png": b"IDAT", "gif": b"\x2c", "dicom": b"\xe0\x7f\x10\x00"}
    marks["dicom_compressed"] = marks["dicom"]
    # Behind the mark's last place: pixels come last, and thumbnails before them have marks of their own.
    last = kind in marks and kind != "gif"
    found = content.rfind(marks[kind]) if last else content.find(marks.get(kind, b"\0\0"), 13)
    data = found if found > start else min(len(content) - 1, start + 64)
    tail = max(data + 1, len(content) - 64)
    regions = {"header": (start, start + 64), "tables": (min(start + 32, data), data)}
    return {**regions, "data": (data, tail), "tail": (tail - 1, len(content))}[where]


def _length_fields(kind: str, content: bytes) -> list[tuple[int, str]]:
    """(place, struct code) of lengths, counts, offsets and sizes."""
    if kind == "jpeg":
        marks = [m.start() for m in re.finditer(rb"\xff[\xc0-\xcf\xda-\xdd\xe0-\xef\xfe]", content)]
        frames = [m.start() for m in re.finditer(rb"\xff[\xc0-\xc3]", content)][:2]
        return [(m + 2, ">H") for m in marks[:30]] + [(m + k, ">H") for m in frames for k in (5, 7)]
    if kind == "png":
        found = [(16, ">L"), (20, ">L"), (24, "<B"), (25, "<B")]
        return found + [(place, ">L") for place, _, _ in _png_chunks(content)]
    if kind == "webp":
        return [(4, "<L")] + [(m.end(), "<L") for m in re.finditer(rb"VP8[ LX]|EXIF|ALPH|ANIM|ANMF", content)]
    if kind == "ppm":
        return [(place, "<B") for place in range(2, min(20, len(content)))]
    if kind == "bmp":
        return [(place, "<L") for place in (2, 10, 14, 18, 22, 30, 34, 46)] + [(28, "<H")]
    if kind == "gif":
        images = [m.start() for m in re.finditer(rb"\x2c\0\0\0\0", content)][:4]
        return [(6, "<H"), (8, "<H"), (10, "<B")] + [(m + k, "<H") for m in images for k in (1, 3, 5, 7)]
    if kind == "tiff":
        code = "<" if content[:2] == b"II" else ">"
        start = struct.unpack_from(code + "L", content, 4)[0]
        entries = struct.unpack_from(code + "H", content, start)[0]
        places = [start + 2 + 12 * k for k in range(entries)]
        return [(4, code + "L"), (start, code + "H")] + [(p + k, code + "L") for p in places for k in (4, 8)]
    # DICOM, explicit: lengths stand behind the two letters of a type; the sizes of the image are values of type US.
    short = [m.end() for m in re.finditer(rb"(?:CS|DA|DS|IS|LO|PN|SH|UI|US|SS|UL)(?=[^\0]\0)", content[128:4000])]
    long = [m.end() for m in re.finditer(rb"(?:OB|OW|SQ|UN)(?=\0\0)", content[128:4000])]
    values = [m.end() for m in re.finditer(rb"\x28\x00..US\x02\x00", content[:4000], re.DOTALL)]
    items = [m.end() for m in re.finditer(rb"\xfe\xff\x00\xe0", content)][:20]
    fields = [(128 + place, "<H") for place in short] + [(128 + place + 2, "<L") for place in long]
    return fields + 4 * [(place, "<H") for place in values] + [(place, "<L") for place in items]


def _png_chunks(content: bytes) -> list[tuple[int, bytes, int]]:
    """(place, name, length) of a PNG's chunks as far as they are whole."""
    found, place = [], 8
    while place + 12 <= len(content):
        length = struct.unpack_from(">L", content, place)[0]
        if place + 12 + length > len(content):
            break
        found.append((place, content[place + 4 : place + 8], length))
        place += 12 + length
    return found


def _swapped(kind: str, content: bytes, random: Random) -> bytes:
    """Two pieces change places, or one is said twice: chunks of a PNG, segments of a JPEG, slices elsewhere."""
    cuts = [0, *sorted(random.randrange(len(content)) for _ in range(4)), len(content)]
    if kind == "png":
        cuts = [0, 8, *(place + 12 + length for place, _, length in _png_chunks(content))]
    elif kind == "jpeg":
        cuts = [0, *(m.start() for m in re.finditer(rb"\xff[\xc0-\xfe]", content)), len(content)]
    pieces = [content[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
    first, second = random.randrange(len(pieces)), random.randrange(len(pieces))
    if random.random() < 0.3:
        pieces.insert(second, pieces[first] * random.choice((1, 1, 20)))
    pieces[first], pieces[second] = pieces[second], pieces[first]
    return b"".join(pieces)


def _checksums(kind: str, content: bytes, random: Random) -> bytes:
    """With a PNG's checksums made right, half of the time: otherwise they alone are what is found wrong."""
    if kind != "png" or random.random() < 0.5:
        return content
    found = bytearray(content)
    for place, _, length in _png_chunks(content):
        struct.pack_into(">L", found, place + 8 + length, zlib.crc32(content[place + 4 : place + 8 + length]))
    return bytes(found)


def _mutated_json(where: str, content: bytes, random: Random) -> bytes:
    text = content.decode("utf-8", "replace")
    place = random.randrange(len(text))
    if where == "truncated":
        return content[: random.randrange(len(content))]
    if where == "structure":
        stop = place + random.choice((0, 0, 1, 20))
        return (text[:place] + random.choice(TOKENS) + text[stop:]).encode()
    if where == "strings":
        quotes = [m.end() for m in re.finditer('"', text)] or [0]
        place = random.choice(quotes)
        return (text[:place] + random.choice(STRINGS) + text[place + random.choice((0, 3)) :]).encode()
    if where == "numbers":
        found = [m.span() for m in re.finditer(r"-?\d+", text)] or [(place, place)]
        start, stop = random.choice(found)
        return (text[:start] + random.choice(NUMBERS) + text[stop:]).encode()
    if where == "encoding":
        choice = random.randrange(6)
        if choice < 2:
            broken = (b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\x00", b"\xf4\x90\x80\x80", b"\xef\xbb\xbf")
            return content[:place] + random.choice(broken) + content[place:]
        codings = {2: "utf-16", 3: "utf-32-le", 4: "utf-8-sig"}
        return text.encode(codings[choice]) if choice in codings else b"\xef\xbb\xbf" * 2 + content
    return _other_values(text, random)


def _other_values(text: str, random: Random) -> bytes:
    """Values at any depth are replaced, dropped or said twice; what is no JSON gets a value in front."""
    try:
        found = json.loads(text)
    except ValueError:
        return (json.dumps(random.choice(VALUES)) + text).encode()
    for _ in range(random.choice((1, 1, 3))):
        node = found
        while isinstance(node, dict | list) and node:
            key = random.choice(list(node) if isinstance(node, dict) else range(len(node)))
            if not isinstance(node[key], dict | list) or random.random() < 0.3:
                if random.random() < 0.2:
                    del node[key]
                else:
                    node[key] = copy.deepcopy(random.choice(VALUES))
                break
            node = node[key]
    out = json.dumps(found)
    return out.replace("{", '{"id": 1, ', 1).encode() if random.random() < 0.1 else out.encode()
