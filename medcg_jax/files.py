"""Text files that appear whole or not at all."""

import os
import secrets
from pathlib import Path


def write_whole(path: str | Path, text: str) -> None:
    """Writes `text` (UTF-8, line ends as they are) into `path` and its missing folders; until then an older file stays."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes of several hosts, which may have the same number, write the same file.
    part = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        part.write_text(text, encoding="utf-8", newline="")
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)  # what a full disk has cut off
        raise
