"""How a report's files take their place: whole or not at all, beside what else lies in the folder."""

import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from medcg_jax.study.report.escape import plain
from medcg_jax.study.report.table import Table
from medcg_jax.untrusted import FileError

# A report's files; others in its folder are not touched.
WRITTEN = ("index.html", "summary.txt", "report.md", "report.tex", "plots", "tables", "subsets")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to write into; it replaces `folder` at the end of the block, unless the block fails.

    Files that do not belong to an earlier report in `folder` are moved into the new one.

    Raises:
      FileError: `folder` exists and is no report.
    """
    if os.path.lexists(folder) and (folder.is_symlink() or not (folder / "index.html").is_file()):
        raise FileError(f"{folder}: is there and holds no report (index.html); move it away, a report is written there")
    draft, before = (folder.with_name(f".{folder.name}.{secrets.token_hex(6)}") for _ in range(2))
    draft.mkdir()
    try:
        yield draft
        if folder.exists():
            folder.rename(before)
        try:
            draft.rename(folder)
        except OSError:
            if before.exists():
                before.rename(folder)
            raise
        for entry in before.iterdir() if before.exists() else ():
            if entry.name not in WRITTEN:
                entry.rename(folder / entry.name)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(before, ignore_errors=True)


@contextmanager
def added_files(folder: Path) -> Iterator[Path]:
    """An empty folder to write into; at the end of the block its files move into `folder`, the page last.

    Other files in `folder` stay.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.with_name(f".{folder.name}.{secrets.token_hex(6)}")
    draft.mkdir()
    try:
        yield draft
        for path in sorted((p for p in draft.rglob("*") if p.is_file()), key=lambda p: (p.name == "index.html", p)):
            target = folder / path.relative_to(draft)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Writes a file of a report, without forbidden characters (`escape.plain`)."""
    path.write_text(plain(text), encoding="utf-8", newline="")


def write_tables(folder: Path, tables: Iterable[Table]) -> None:
    """`tables/NAME.csv` and `.tex` of each."""
    (folder / "tables").mkdir(exist_ok=True)
    for table in tables:
        write_text(folder / "tables" / f"{table.name}.csv", table.csv())
        write_text(folder / "tables" / f"{table.name}.tex", table.latex())
