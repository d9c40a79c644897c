"""Reads files from outside within limits: regular files of a bounded size, UTF-8 text, valid JSON.

All files from users, downloads or other programs are read through this module. Each limit is a named constant; callers
may pass another one.
"""

import json
import math
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from medcg_jax.config import ConfigError

# A whole file of JSON or text. The release's largest subset file has some 40 MB.
MAX_TEXT_BYTES = 2**30
# One line of a file of JSON lines.
MAX_LINE_BYTES = 2**24
PIECE_BYTES = 2**16

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class FileError(ConfigError):
    """A file cannot be used; the message is one line with the file, the fault, and what to do."""


def open_regular(path: str | Path, max_bytes: int) -> BinaryIO:
    """The file opened for reading, after a check of its kind and size; never waits for a FIFO or a device.

    Raises:
      FileError: it is missing, not a regular file, cannot be opened, or has more than `max_bytes`.
    """
    try:
        # Without O_NONBLOCK, opening a FIFO waits for a writer.
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except (OSError, ValueError) as error:
        raise FileError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    status = os.fstat(number)
    if stat.S_ISREG(status.st_mode) and status.st_size <= max_bytes:
        return os.fdopen(number, "rb")
    os.close(number)
    if not stat.S_ISREG(status.st_mode):
        raise FileError(f"{path}: no regular file ({kind_of(status.st_mode)})")
    raise FileError(f"{path}: {status.st_size:,} bytes; at most {max_bytes:,} are read")


def kind_of(mode: int) -> str:
    """The kind of a file that is not regular: "a folder", "a FIFO", "a device" or "a socket"."""
    kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket"))
    return next((word for is_kind, word in kinds if is_kind(mode)), "a device")


def read_bytes(path: str | Path, max_bytes: int) -> bytes:
    """The whole file. Raises FileError as `open_regular`, or if it cannot be read."""
    try:
        with open_regular(path, max_bytes) as file:
            # In pieces: `read(max_bytes)` would allocate that much even for a small file.
            pieces, length = [], 0
            while length <= max_bytes and (piece := file.read(PIECE_BYTES)):
                pieces.append(piece)
                length += len(piece)
            content = b"".join(pieces)
    except OSError as error:
        raise FileError(f"{path}: {error.strerror or error}") from error
    if len(content) > max_bytes:  # it has grown since its size was checked
        raise FileError(f"{path}: more than {max_bytes:,} bytes; at most so many are read")
    return content


def read_text(path: str | Path, max_bytes: int = MAX_TEXT_BYTES, encoding: str = "utf-8") -> str:
    """The whole file as text.

    encoding: "utf-8-sig" removes a byte-order mark.

    Raises:
      FileError: as `read_bytes`, or the bytes are not UTF-8; the message has the offset of the first such byte.
    """
    return decoded(read_bytes(path, max_bytes), path, encoding)


def decoded(content: bytes, name: str | Path, encoding: str = "utf-8") -> str:
    """Bytes of the file `name` as text. Raises FileError if they are not UTF-8."""
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise FileError(f"{name}: not UTF-8 (byte {error.start})") from error


def read_json(path: str | Path, kind: type = dict, *, max_bytes: int = MAX_TEXT_BYTES, encoding: str = "utf-8") -> Any:
    """The JSON value in a file, of the type `kind` (dict or list).

    Raises:
      FileError: as `read_text`; or it is not JSON, has NaN or Infinity, an object has a key twice, text has half a
        surrogate pair (which no file can store), it is nested too deep, or it has another type.
    """
    return parsed(read_text(path, max_bytes, encoding), path, kind)


def parsed(text: str, name: str | Path, kind: type = dict) -> Any:
    """The JSON value of a text, as `read_json`. name: of the file (and line), for the message."""
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise FileError(f"{name}: a text with half a surrogate pair \\ud800 to \\udfff") from error
    except RecursionError as error:
        raise FileError(f"{name}: no JSON that is read: nested too deep") from error
    except ValueError as error:
        what = "empty" if not text.strip() else f"no JSON: {' '.join(str(error).split())[:120]}"
        raise FileError(f"{name}: {what}") from error
    if not isinstance(value, kind):
        raise FileError(f"{name}: holds {article_of(value)}; expected {article_of(kind())}")
    return value


def json_lines(path: str | Path, *, max_bytes: int = MAX_TEXT_BYTES) -> Iterator[tuple[int, dict]]:
    """(number of the line, from 1; its object) for each line of a file of JSON lines; skips empty lines.

    Raises:
      FileError: as `read_json`, with the number of the line.
    """
    for number, line in enumerate(read_text(path, max_bytes).split("\n"), 1):
        if line.strip():
            yield number, parsed(line, f"{path}, line {number}")


def check_number(
    value: Any, name: str, *, least: float = -math.inf, most: float = math.inf, whole: bool = False
) -> int | float:
    """`value`, if it is a finite number from `least` to `most`, and an int if `whole`.

    name: file and field, for the message.

    Raises:
      FileError: it is not; True, False and text are not numbers.
    """
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not _is_finite(value) or not least <= value <= most:
        noun = "a whole number" if whole else "a finite number"
        low = f" of at least {least:,}" if least > -math.inf else ""
        high = f"{' and' if low else ' of'} at most {most:,}" if most < math.inf else ""
        raise FileError(f"{name}={shown(value)}: expected {noun}{low}{high}")
    return value


def shown(value: Any, limit: int = 60) -> str:
    """A value as JSON for a message, at most `limit` characters; "..." if it cannot be JSON."""
    try:
        text = json.dumps(value)
    except (RecursionError, TypeError, ValueError):
        return "..."
    return text if len(text) <= limit else text[: limit - 3] + "..."


def article_of(value: Any) -> str:
    """The JSON type of a value, with its article: "an object", "a list", "text", "a number", "null"."""
    if value is None:
        return "null"
    words = ((dict, "an object"), (list, "a list"), (str, "text"), (bool, "true or false"), ((int, float), "a number"))
    return next((word for kind, word in words if isinstance(value, kind)), type(value).__name__)


def _is_finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond the range of floats
        return True


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {shown(twice)} stands twice in one object")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")
