"""Reads the tables of a grid: checks columns and types, and compares the numbers with the answers.

`cells.csv` must have the number of cells in config.json; `results.csv` and `boxes.csv` must follow from `predictions/`
and `boxes/`. An error names the file and line that were edited or cut; `medcg reproduce` writes these files again.
"""

import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from medcg_jax.config import NUMBERED_ARMS, REMOVAL_ARMS, STUDY_TABLES
from medcg_jax.eval.predictions import wilson
from medcg_jax.study.design.suite import Row
from medcg_jax.study.stats import results
from medcg_jax.study.stats.answers import Answers
from medcg_jax.untrusted import FileError, read_text, shown

# A table of the grid: 10,000 cells of 50 subsets each take some 5 MB.
MAX_CSV_BYTES = 2**26
# Arm -> its name on the page.
ARMS = {
    "baseline": "Baseline",
    "baseline_plus": "Baseline+",
    "trained": "Trained",
    "single_1": "First alone",
    "single_2": "Second alone",
    "single_3": "Third alone",
    "filler_1": "First with unrelated",
    "filler_2": "Second with unrelated",
    "filler_3": "Third with unrelated",
    "words_only": "Words of the task",
    "no_images": "Without images",
    "single_task": "Single-task",
    "multi_task": "Multi-task",
    "all_related": "All related",
    "all_unrelated": "All unrelated",
    "wo_modality": "w/o Modality",
    "wo_area": "w/o Area",
    "wo_task": "w/o Task",
    "random_removal": "Random removal",
    "random_removal_modality": "Random removal (Modality)",
    "random_removal_area": "Random removal (Area)",
    "random_removal_task": "Random removal (Task)",
    "same_task": "Same task only",
    "all_data": "All data",
}
ARMS |= {f"{arm}_updates": f"{ARMS[arm]}, equal updates" for arm in REMOVAL_ARMS}
# Table -> the first parts of its rows' names; an ablation's begin with the target.
PARTS_OF = {
    "pairs": ("fixed_modality", "fixed_area", "fixed_task", "modality_area"),
    "triples": ("one_each",),
    "multi_task": ("in_distribution", "out_of_distribution"),
    "efficiency": ("with_related", "with_unrelated", "target_only"),
    "dose": ("dose",),
    "detection_pairs": ("fixed_modality", "fixed_area", "fixed_task", "modality_area"),
    "detection": ("in_distribution", "out_of_distribution"),
}
# Shares are written with six decimals.
ROUNDING = 1.5e-6
WRITE_AGAIN = "`medcg reproduce` with the grid's own configuration and workdir writes it again"


def read_rows(
    path: str | Path, columns: Mapping[str, Callable[[str], Any]], *, optional: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """The rows of a CSV file with a header; columns beside these are ignored.

    columns: name -> a function from text to value; its ValueError says what is expected.
    optional: columns that a file may lack; their text is then "".

    Raises:
      FileError: the file cannot be read or is cut, a column is missing, a row is too short or too long, or a value is
        invalid; the message names file and line.
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
                    raise FileError(f"{name}: expected a column {missing[0]!r} once; there is {shown(header)}")
            elif cells:
                if len(cells) != len(header):
                    raise FileError(f"{name}: {len(cells)} columns; expected {len(header)}")
                values = dict(zip(header, cells, strict=True))
                rows.append({key: _value(values.get(key, ""), kind, f"{name}: {key}") for key, kind in columns.items()})
    except csv.Error as error:
        raise FileError(f"{path}, line {reader.line_num}: no CSV: {error}") from error
    return rows


def _value(text: str, kind: Callable[[str], Any], name: str) -> Any:
    try:
        return kind(text)
    except ValueError as error:
        raise FileError(f"{name}={shown(text)}: expected {error}") from None


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
    # It becomes part of file names, so it may hold no folder.
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,239}", value):
        raise ValueError("a cell's id (letters, digits, '.', '_' and '-')")
    return value


def table(value: str) -> str:
    if value not in STUDY_TABLES:
        raise ValueError(" or ".join(STUDY_TABLES))
    return value


def arm(value: str) -> str:
    if value not in ARMS and not re.fullmatch(rf"({'|'.join(NUMBERED_ARMS)})_\d{{1,9}}", value, re.ASCII):
        raise ValueError(f"{', '.join(ARMS)}, {' or '.join(f'{name}_N' for name in NUMBERED_ARMS)}")
    return value


def status(value: str) -> str:
    if value not in ("done", "waiting") and not value.startswith("failed"):
        raise ValueError("done, waiting or failed")
    return value


def checked(kind: Callable[[str], Any], value: str) -> str:
    """The text itself, after a check that `kind` can read it."""
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
    """The rows of cells.csv as text. count: the number of cells in config.json.

    Raises:
      FileError: as `read_rows`; another number of cells, a cell twice, or a row, arm and table that do not fit.
    """
    path = Path(workdir) / "cells.csv"
    cells = _keyed_rows(path, CELLS, ("cell",))
    if len(cells) != count:
        raise FileError(f"{path}: {len(cells):,} cells; config.json says {count:,}: {WRITE_AGAIN}")
    return cells


def read_results(workdir: str | Path) -> list[dict[str, Any]]:
    """The rows of results.csv, with "part" and "published" parsed from each row's text (`suite.Row`).

    Raises:
      FileError: as `read_rows`; a row twice, more right answers than answers, or shares that do not follow from them.
    """
    path = Path(workdir) / "results.csv"
    rows = _keyed_rows(path, RESULTS, ("cell", "target"))
    for row in rows:
        name = f"{path}, cell {row['cell']}"
        if row["correct"] > row["n"]:
            raise FileError(f"{name}: correct={row['correct']} of n={row['n']}; expected at most n")
        shares = (row["correct"] / row["n"], *wilson(row["correct"], row["n"]))
        for key, value in zip(("accuracy", "ci_low", "ci_high"), shares, strict=True):
            if abs(row[key] - value) > ROUNDING:
                raise FileError(
                    f"{name}: {key}={row[key]:g}; correct={row['correct']} of n={row['n']} give {value:.6f}: "
                    f"{WRITE_AGAIN}"
                )
        parsed = Row.parse(row["table"], row["row"])
        row |= {"part": parsed.part, "published": parsed.published}
    return rows


def _keyed_rows(path: Path, columns: Mapping[str, Callable], key: Sequence[str]) -> list[dict[str, Any]]:
    """`read_rows` of a table of cells; checks that no key occurs twice and that rows and arms fit their tables."""
    rows, seen = read_rows(path, columns), set()
    for row in rows:
        name, values = f"{path}, cell {row['cell']}", tuple(row[column] for column in key)
        parts = PARTS_OF.get(row["table"])
        if parts and Row.parse(row["table"], row["row"]).part not in parts:
            expected = f"in {row['table']} a row begins with {' or '.join(parts)}"
            raise FileError(f"{name}: row={shown(row['row'])}: {expected}")
        numbered = row["arm"].rpartition("_")[0]
        if (row["table"] in NUMBERED_ARMS or numbered in NUMBERED_ARMS) and row["table"] != numbered:
            raise FileError(f"{name}: arm={row['arm']}: table {row['table']} has no such arm")
        if values in seen:
            others = "".join(f"{column} {shown(row[column])} " for column in key[1:])
            raise FileError(f"{name}: {others}stands there twice; {WRITE_AGAIN}")
        seen.add(values)
    return rows


def training_of(cell: Mapping[str, str]) -> tuple:
    """(training subsets, seed, ...) of a row of cells.csv, equal for the cells that one training serves.

    Such cells have equal subsets, seed, steps and seconds. Arms that change what is taken of the subsets, their number of
    records or their images, are trainings of their own.
    """
    arm = cell["arm"] if cell["arm"] == "no_images" or cell["arm"].startswith("efficiency_") else ""
    related = tuple(sorted(filter(None, cell["related"].split("+"))))
    return related, str(cell["seed"]), str(cell["steps"]), str(cell["seconds"]), arm


def check_results(answers: Answers, cells: Sequence[Mapping], rows: Sequence[Mapping]) -> None:
    """Compares results.csv and boxes.csv with cells.csv, `predictions/` and `boxes/`.

    Raises:
      FileError: a row belongs to no finished cell, a finished cell's row is missing, a number does not follow from the
        answers, or two cells of one target and seed were asked different records.
    """
    workdir = answers.workdir
    by_cell: dict[str, dict[str, Mapping]] = {}
    known = {cell["cell"]: cell for cell in cells}
    for row in rows:
        _check_cell(workdir / "results.csv", row, known)
        by_cell.setdefault(row["cell"], {})[row["target"]] = row
    boxes = check_boxes(workdir, known)
    first_asked: dict[tuple[str, str], tuple[set[str], Path]] = {}
    for cell in cells:
        if cell["status"] != "done":
            continue
        cell_rows = by_cell.get(cell["cell"], {})
        missing = set(cell["target"].split("+")) - cell_rows.keys() - boxes.get(cell["cell"], set())
        if missing:
            file = "boxes.csv" if cell["table"] == "detection" else "results.csv"
            raise FileError(
                f"{workdir / file}: no row of cell {cell['cell']} and target {shown(min(missing))}, which "
                f"cells.csv calls done: {WRITE_AGAIN}"
            )
        if cell_rows:
            _check_answers(answers, cell, cell_rows, first_asked)


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


def _check_answers(answers: Answers, cell: Mapping, rows: Mapping[str, Mapping], first_asked: dict) -> None:
    """rows: target -> the cell's row of results.csv. first_asked: (target, seed) -> (ids, file of the first cell)."""
    path, frame = answers.path(cell["cell"]), answers.frame(cell["cell"])
    unexpected = frame[~frame["subset"].isin(list(rows))]
    if len(unexpected):
        name, subset = unexpected.iloc[0][["id", "subset"]]
        raise FileError(f"{path}: record {shown(name)} is of {shown(subset)}; results.csv has none")
    for target, row in rows.items():
        of_target = frame[frame["subset"] == target]
        n, correct = len(of_target), int(of_target["right"].sum())
        if (row["n"], row["correct"]) != (n, correct):
            raise FileError(
                f"{answers.workdir / 'results.csv'}, target {shown(target)}: correct={row['correct']} of n={row['n']}; "
                f"{path} has {correct} of {n}: put back the one that was edited or cut (`medcg reproduce` writes "
                "results.csv)"
            )
        ids = set(of_target["id"])
        expected, first_path = first_asked.setdefault((target, cell["seed"]), (ids, path))
        if expected != ids:
            raise FileError(
                f"{path}: other records of {shown(target)} than in {first_path.name} of the same seed, as "
                f"{shown(min(expected ^ ids))}; expected the same in all"
            )


def check_boxes(workdir: Path, known: Mapping[str, Mapping]) -> dict[str, set[str]]:
    """Cell -> its targets in boxes.csv; compares each row with `boxes/`. {} for a grid without boxes.

    Raises:
      FileError: as `check_results`.
    """
    path = workdir / "boxes.csv"
    if not path.exists():
        return {}
    shares = dict.fromkeys(results.BOX_SHARES, lambda value: value and checked(_share, value))
    columns = KEY | {"seed": _seed, "target": text} | dict.fromkeys(results.BOX_COUNTS, whole) | shares
    names = (*results.BOX_COUNTS, *results.BOX_SHARES)
    targets: dict[str, set[str]] = {}
    scores: dict[str, dict[str, tuple]] = {}
    for row in read_rows(path, columns):
        _check_cell(path, row, known)
        cell, target = row["cell"], row["target"]
        if target in targets.setdefault(cell, set()):
            raise FileError(f"{path}, cell {cell}: target {shown(target)} stands there twice; {WRITE_AGAIN}")
        targets[cell].add(target)
        file = workdir / "boxes" / f"{cell}.jsonl"
        if cell not in scores:
            scores[cell] = results.box_scores(file)
        computed = scores[cell].get(target)
        for key, value in zip(names, computed or [None] * len(names), strict=True):
            if not _same(row[key], value):
                raise FileError(
                    f"{path}, target {shown(target)}: {key}={str(row[key])[:20]}; {file} gives "
                    f"{'no answer' if computed is None else value}: put back the one that was edited or cut "
                    "(`medcg reproduce` writes boxes.csv)"
                )
    return targets


def _same(written: str | int, computed: str | int | None) -> bool:
    if isinstance(written, str) and isinstance(computed, str) and written and computed:
        return abs(float(written) - float(computed)) <= ROUNDING
    return written == computed
