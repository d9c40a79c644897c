"""Text files that appear whole or not at all."""

import os
import secrets
from collections.abc import Mapping
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


def write_together(texts: Mapping[Path, str]) -> None:
    """Writes several files as `write_whole` does one: none appears before all are written; then in order."""
    parts: dict[Path, Path] = {}
    try:
        for path, text in texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            parts[path] = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
            parts[path].write_text(text, encoding="utf-8", newline="")
        for path, part in parts.items():
            os.replace(part, path)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
