"""Paths from users, and text files that appear whole or not at all."""

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from medcg_jax.config import ConfigError


def user_path(text: str, name: str) -> str:
    """A user's path with a leading ~ or ~USER replaced by the home folder; shells do not replace it after "=".

    name: of the flag or field, for the message.

    Raises:
      ConfigError: the user does not exist or has no home folder.
    """
    if not text.startswith("~"):
        return text
    path = os.path.expanduser(text)
    if path.startswith("~"):
        user = text.partition("/")[0]
        raise ConfigError(f"{name}={text}: no home folder is known for {user}; for a file of that name give ./{text}")
    return path


def write_whole(path: str | Path, text: str) -> None:
    """Writes `text` (UTF-8, line ends unchanged) to `path`, and creates its folders; an older file stays until then."""
    write_together({Path(path): text})


def write_together(texts: Mapping[Path, str]) -> None:
    """Writes several files like `write_whole`: when all are complete, they appear in order."""
    unfinished: dict[Path, Path] = {}
    try:
        for path, text in texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            # A random name: processes on several hosts, with equal process numbers, may write the same file.
            unfinished[path] = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
            unfinished[path].write_text(text, encoding="utf-8", newline="")
        for path, temporary in unfinished.items():
            os.replace(temporary, path)
    finally:
        for temporary in unfinished.values():
            temporary.unlink(missing_ok=True)
