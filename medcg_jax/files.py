"""Paths as users give them, and text files that appear whole or not at all."""

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from medcg_jax.config import ConfigError


def user_path(text: str, name: str) -> str:
    """A path that a user gave, with the home folder in place of a leading ~ or ~USER: shells leave it behind "=".

    name: of the flag or field, for the message.

    Raises:
      ConfigError: there is no such user, or no home folder.
    """
    if not text.startswith("~"):
        return text
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise ConfigError(f"{name}={text}: no home folder is known for {text.partition('/')[0]}; ./{text} is accepted "
                          "for a file of that name")  # fmt: skip
    return path


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
