"""Lossless JPEG of DICOM files, decoded by GDCM in a process of its own: broken data can abort the one it runs in."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
from pydicom import uid
from pydicom.encaps import encapsulate
from pydicom.pixels import get_decoder

from medcg_jax.data.reading import ImageError

MAX_SECONDS = 60


def decode_lossless(frame: bytes, options: dict[str, Any]) -> np.ndarray:
    """[h, w] stored values or [h, w, 3] RGB of one codestream; costs the start of a process, about half a second.

    Args:
      options: what pydicom's decoder takes, as JSON takes it, and `transfer_syntax`.

    Raises:
      ImageError: GDCM refuses the data, ends its process, or takes longer than `MAX_SECONDS`.
    """
    # What this process has on its path, the other one finds at the same places.
    command = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import main; main()"
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


def main() -> None:
    """Decodes the codestream on standard input by the options in the first argument; raw pixels on standard output."""
    options = json.loads(sys.argv[1])
    decoder = get_decoder(uid.UID(options.pop("transfer_syntax")))
    source = encapsulate([sys.stdin.buffer.read()])
    found, _ = decoder.as_array(source, index=0, decoding_plugin="gdcm", **options)
    sys.stdout.buffer.write(found.astype(found.dtype.newbyteorder("<")).tobytes())
