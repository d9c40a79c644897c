"""The tables that a grid leaves, read: columns and types are checked, and what they say is held against the answers.

`cells.csv` must have as many cells as config.json says; `results.csv` and `boxes.csv` must be what `predictions/` and
`boxes/` give. What was edited, or cut, is refused by its file and line: `medcg reproduce` writes these files again.
"""

import csv
import hashlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from medcg_jax.config import BOX_TABLES, TABLES
from medcg_jax.eval.predictions import prediction_lines, wilson
from medcg_jax.study.stats import results
from medcg_jax.untrusted import FileError, read_text, shown

# A table of the grid: 10,000 cells of 50 subsets each take some 5 MB.
MAX_CSV_BYTES = 2**26
# Arm -> how it is called on the page.
ARMS = {
    "baseline": "Baseline",
    "baseline_plus": "Baseline+",
    "trained": "Trained",
    "single_task": "Single-task",
    "multi_task": "Multi-task",
    "all_related": "All related",
    "all_unrelated": "All unrelated",
    "wo_modality": "w/o Modality",
    "wo_area": "w/o Area",
    "wo_task": "w/o Task",
    "random_removal": "Random removal",
    "same_task": "Same task only",
    "all_data": "All data",
}
# Table -> what the names of its rows begin with; of an ablation's, with the target.
PARTS_OF = {
    "pairs": ("fixed_modality", "fixed_area", "fixed_task", "modality_area"),
    "triples": ("one_each",),
    "multi_task": ("in_distribution", "out_of_distribution"),
    "efficiency": ("with_related", "target_only"),
    "detection_pairs": ("fixed_modality", "fixed_area", "fixed_task", "modality_area"),
    "detection": ("in_distribution", "out_of_distribution"),
}
# Shares are written with six decimals.
ROUNDING = 1.5e-6
WRITE_AGAIN = "`medcg reproduce` with the grid's own configuration and workdir writes it again"


def read_rows(
    path: str | Path, columns: Mapping[str, Callable[[str], Any]], *, optional: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """The rows of a CSV file with a header; other columns than these are left out.

    columns: name -> a function of the text, which gives the value; its ValueError says what is accepted.
    optional: those of the columns that a file may lack; their text is "" there.

    Raises:
      FileError: the file cannot be read or is cut, a column is missing, a row is too short or long, or a value is none;
        file and line are named.
    """
    text = read_text(path, MAX_CSV_BYTES)
    if not text.endswith("\n"):
        raise FileError(f"{path}: {'the last line is cut' if text else 'empty'}; {WRITE_AGAIN}")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[dict[str, Any]] = []
    header: list[str] = []
    try:
        for cells in reader:
            name = f"{path}, line {reader.line_num}"
            if not header:
                header = cells
                missing = [c for c in columns if header.count(c) != 1 and (c in header or c not in optional)]
                if missing:
                    raise FileError(f"{name}: a column {missing[0]!r} is accepted once; there is {shown(header)}")
            elif cells:
                if len(cells) != len(header):
                    raise FileError(f"{name}: {len(cells)} columns; {len(header)} are accepted")
                values = dict(zip(header, cells, strict=True))
                rows.append({key: _value(values.get(key, ""), kind, f"{name}: {key}") for key, kind in columns.items()})
    except csv.Error as error:
        raise FileError(f"{path}, line {reader.line_num}: no CSV: {error}") from error
    return rows


def _value(text: str, kind: Callable[[str], Any], name: str) -> Any:
    try:
        return kind(text)
    except ValueError as error:
        raise FileError(f"{name}={shown(text)}: {error} is accepted") from None


def text(value: str) -> str:
    if not value:
        raise ValueError("text")
    return value


def number(value: str, *, least: float = 0, most: float = 1e15) -> float:
    if not re.fullmatch(r"-?\d+(\.\d+)?([eE][-+]?\d+)?", value, re.ASCII) or not least <= float(value) <= most:
        raise ValueError(f"a number of {least:g} to {most:g}")
    return float(value)


def whole(value: str, *, least: int = 0) -> int:
    if not re.fullmatch(r"-?\d{1,15}", value, re.ASCII) or int(value) < least:
        raise ValueError(f"a whole number of at least {least}")
    return int(value)


def cell_id(value: str) -> str:
    # It is the name of files: no folder may come in by it.
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,239}", value):
        raise ValueError("a cell's id (letters, digits, '.', '_' and '-')")
    return value


def table(value: str) -> str:
    if value not in (*TABLES, *BOX_TABLES):
        raise ValueError(" or ".join((*TABLES, *BOX_TABLES)))
    return value


def arm(value: str) -> str:
    if value not in ARMS and not re.fullmatch(r"efficiency_\d{1,9}", value, re.ASCII):
        raise ValueError(f"{', '.join(ARMS)} or efficiency_N")
    return value


def status(value: str) -> str:
    if value not in ("done", "waiting") and not value.startswith("failed"):
        raise ValueError("done, waiting or failed")
    return value


def checked(kind: Callable[[str], Any], value: str) -> str:
    """The text itself, where it can be read as `kind`."""
    kind(value)
    return value


_seed = partial(whole, least=-(10**15))
_share = partial(number, least=0, most=1)
KEY: dict[str, Callable[[str], Any]] = {"cell": cell_id, "table": table, "row": text, "arm": arm}
CELLS = KEY | {
    "seed": partial(checked, _seed), "related": str, "target": text, "steps": partial(checked, whole),
    "status": status, "seconds": partial(checked, lambda value: number(value or "0")),
}  # fmt: skip
RESULTS = KEY | {
    "seed": _seed, "target": text, "n": partial(whole, least=1), "correct": whole, "accuracy": _share,
    "ci_low": _share, "ci_high": _share,
}  # fmt: skip


def read_cells(workdir: Path, count: int) -> list[dict[str, str]]:
    """The rows of cells.csv, all texts. count: cells that config.json says there are.

    Raises:
      FileError: as `read_rows`; another number of cells, one twice, or one whose row, arm and table do not fit.
    """
    path = Path(workdir) / "cells.csv"
    cells = read_rows(path, CELLS)
    known: set[str] = set()
    for cell in cells:
        _check_row(cell, path)
        if cell["cell"] in known:
            raise FileError(f"{path}: cell {cell['cell']} stands there twice; {WRITE_AGAIN}")
        known.add(cell["cell"])
    if len(cells) != count:
        raise FileError(f"{path}: {len(cells):,} cells; config.json says {count:,}: {WRITE_AGAIN}")
    return cells


def read_results(workdir: str | Path) -> list[dict[str, Any]]:
    """The rows of results.csv with numbers as numbers.

    Raises:
      FileError: as `read_rows`; a row twice, more right answers than answers, or shares that these do not give.
    """
    path = Path(workdir) / "results.csv"
    rows = read_rows(path, RESULTS)
    known: set[tuple[str, str]] = set()
    for row in rows:
        _check_row(row, path)
        name = f"{path}, cell {row['cell']}"
        if (row["cell"], row["target"]) in known:
            raise FileError(f"{name}: target {shown(row['target'])} stands there twice; {WRITE_AGAIN}")
        known.add((row["cell"], row["target"]))
        if row["correct"] > row["n"]:
            raise FileError(f"{name}: correct={row['correct']} of n={row['n']}; at most n is accepted")
        wanted = (row["correct"] / row["n"], *wilson(row["correct"], row["n"]))
        for key, value in zip(("accuracy", "ci_low", "ci_high"), wanted, strict=True):
            if abs(row[key] - value) > ROUNDING:
                raise FileError(
                    f"{name}: {key}={row[key]:g}; correct={row['correct']} of n={row['n']} give {value:.6f}: "
                    f"{WRITE_AGAIN}"
                )
    return rows


def _check_row(row: Mapping[str, Any], path: Path) -> None:
    name, parts = f"{path}, cell {row['cell']}", PARTS_OF.get(row["table"])
    if parts and row["row"].split("/")[0] not in parts:
        accepted = f"of {row['table']} what begins with {' or '.join(parts)} is accepted"
        raise FileError(f"{name}: row={shown(row['row'])}: {accepted}")
    if (row["table"] == "efficiency") != row["arm"].startswith("efficiency_"):
        raise FileError(f"{name}: arm={row['arm']}: table {row['table']} has no such arm")


def check_results(workdir: Path, cells: Sequence[Mapping], rows: Sequence[Mapping]) -> None:
    """Holds results.csv and boxes.csv against cells.csv, `predictions/` and `boxes/`.

    Raises:
      FileError: a row is of no finished cell, a finished cell's row is missing, a number is another than the answers
        give, or two cells of one target and seed were asked other records.
    """
    by_cell: dict[str, dict[str, Mapping]] = {}
    known = {cell["cell"]: cell for cell in cells}
    for row in rows:
        _check_cell(workdir / "results.csv", row, known)
        by_cell.setdefault(row["cell"], {})[row["target"]] = row
    boxes = check_boxes(workdir, known)
    asked: dict[tuple[str, str], tuple[bytes, Path]] = {}
    for cell in cells:
        if cell["status"] != "done":
            continue
        own, targets = by_cell.get(cell["cell"], {}), cell["target"].split("+")
        missing = set(targets) - own.keys() - boxes.get(cell["cell"], set())
        if missing:
            file = "boxes.csv" if cell["table"] == "detection" else "results.csv"
            raise FileError(
                f"{workdir / file}: no row of cell {cell['cell']} and target {shown(min(missing))}, which "
                f"cells.csv calls done: {WRITE_AGAIN}"
            )
        if own:
            _check_answers(workdir, cell, own, asked)


def _check_cell(path: Path, row: Mapping, known: Mapping[str, Mapping]) -> None:
    cell = known.get(row["cell"])
    name = f"{path}, cell {row['cell']}"
    if cell is None or cell["status"] != "done":
        raise FileError(f"{name}: {'not done by' if cell else 'not in'} cells.csv; {WRITE_AGAIN}")
    for key in ("table", "row", "arm", "seed"):
        if str(row[key]) != str(cell[key]):
            raise FileError(f"{name}: {key}={shown(row[key])}; cells.csv has {shown(cell[key])}: {WRITE_AGAIN}")
    if row["target"] not in cell["target"].split("+"):
        raise FileError(f"{name}: target={shown(row['target'])}; cells.csv has {shown(cell['target'])}: {WRITE_AGAIN}")


def _check_answers(workdir: Path, cell: Mapping, own: Mapping[str, Mapping], asked: dict) -> None:
    path = workdir / "predictions" / f"{cell['cell']}.jsonl"
    counts = {target: [0, 0] for target in own}
    ids: dict[str, list[str]] = {target: [] for target in own}
    for line in prediction_lines(path):
        if line["subset"] not in counts:
            raise FileError(f"{path}: record {shown(line['id'])} is of {shown(line['subset'])}; results.csv has none")
        counts[line["subset"]][0] += 1
        counts[line["subset"]][1] += line["predicted"] == line["answer"]
        ids[line["subset"]].append(line["id"])
    for target, row in own.items():
        n, correct = counts[target]
        if (row["n"], row["correct"]) != (n, correct):
            raise FileError(
                f"{workdir / 'results.csv'}, target {shown(target)}: correct={row['correct']} of n={row['n']}; {path} "
                f"has {correct} of {n}: put back the one that was edited or cut (`medcg reproduce` writes results.csv)"
            )
        digest = hashlib.sha256("\0".join(sorted(ids[target])).encode("utf-8", "surrogatepass")).digest()
        first, other = asked.setdefault((target, cell["seed"]), (digest, path))
        if first != digest:
            theirs = {line["id"] for line in prediction_lines(other) if line["subset"] == target}
            odd = min(theirs ^ set(ids[target]))
            raise FileError(
                f"{path}: other records of {shown(target)} than in {other.name} of the same seed, as {shown(odd)}; the "
                "same in all are accepted"
            )


def check_boxes(workdir: Path, known: Mapping[str, Mapping]) -> dict[str, set[str]]:
    """Cell -> targets of boxes.csv, after each row was held against `boxes/`; {} of a grid that asks for no boxes.

    Raises:
      FileError: as `check_results`.
    """
    path = workdir / "boxes.csv"
    if not path.exists():
        return {}
    shares = dict.fromkeys(results.BOX_SHARES, lambda value: value and checked(_share, value))
    rows = read_rows(path, KEY | {"seed": _seed, "target": text} | dict.fromkeys(results.BOX_COUNTS, whole) | shares)
    targets: dict[str, set[str]] = {}
    scores: dict[str, dict[str, tuple]] = {}
    for row in rows:
        _check_cell(path, row, known)
        cell, target = row["cell"], row["target"]
        if target in targets.setdefault(cell, set()):
            raise FileError(f"{path}, cell {cell}: target {shown(target)} stands there twice; {WRITE_AGAIN}")
        targets[cell].add(target)
        if cell not in scores:
            scores[cell] = results.box_scores(workdir / "boxes" / f"{cell}.jsonl")
        wanted = scores[cell].get(target)
        names = (*results.BOX_COUNTS, *results.BOX_SHARES)
        for key, value in zip(names, wanted or [None] * len(names), strict=True):
            if not _same(row[key], value):
                raise FileError(
                    f"{path}, target {shown(target)}: {key}={str(row[key])[:20]}; {workdir / 'boxes' / cell}.jsonl gives "
                    f"{'no answer' if wanted is None else value}: put back the one that was edited or cut "
                    "(`medcg reproduce` writes boxes.csv)"
                )
    return targets


def _same(written: str | int, computed: str | int | None) -> bool:
    if isinstance(written, str) and isinstance(computed, str) and written and computed:
        return abs(float(written) - float(computed)) <= ROUNDING
    return written == computed
