"""Room on disk: what a run's checkpoints need is there before anything is allocated, and can be written."""

import math
import shutil
import tempfile
from pathlib import Path

import jax

from medcg_jax.config import ConfigError

UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def amount(count: float) -> str:
    """Bytes for people: "85.2 GB", "0.7 kB"."""
    unit, size = next(((unit, size) for unit, size in UNITS if count >= size), UNITS[-1])
    return f"{count / size:.1f} {unit}"


def num_bytes(tree) -> int:
    """Bytes of all arrays (or their shapes) of a tree."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def used_bytes(directory: Path) -> int:
    """Bytes of all files below a directory; 0 where there is none."""
    total = 0
    for path in directory.rglob("*"):
        try:
            total += 0 if path.is_dir() else path.stat().st_size
        except OSError:  # removed meanwhile
            pass
    return total


def free_bytes(directory: Path) -> int:
    """Bytes that can be written where `directory` is, or will be."""
    return shutil.disk_usage(_nearest(directory)).free


def check_room(directory: Path, needed: int, what: str) -> None:
    """Makes `directory`; what lies in it already counts as room, since it makes way for what is written.

    needed: bytes. what: the fields that decide how many.

    Raises:
      ConfigError: nothing can be written there, or it has less room than is needed; the message names both amounts.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # Tried, not asked for: root may write where the mode says no, and not on a read-only disk.
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"0")
    except OSError as error:
        raise ConfigError(
            f"{directory} cannot be written ({error.strerror}), and {amount(needed)} are needed there ({what}); "
            "another --workdir is accepted"
        ) from error
    free, used = free_bytes(directory), used_bytes(directory)
    if free + used < needed:
        raise ConfigError(
            f"{directory}: {amount(needed)} are needed there ({what}), {amount(free)} are free and "
            f"{amount(used)} used by an earlier start; room, or another --workdir, is accepted"
        )


def _nearest(directory: Path) -> Path:
    """The directory or the nearest one above it that is there."""
    directory = directory.absolute()
    return next(path for path in (directory, *directory.parents) if path.exists())
