"""A ledger as text: a summary, then rows, subsets and datasets, in lines of at most 100 columns but for addresses."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from medcg_jax.data.catalogue import Dataset
from medcg_jax.study.design.ledger import TABLES, DatasetState, Ledger, RowState, SubsetState, states_of
from medcg_jax.study.design.overlap import LAPSES

WIDTH = 100
TABLE_NAMES = {
    1: "in distribution", 2: "out of distribution", 3: "pairs", 4: "triples", 5: "detection pairs, NExT-Chat",
    6: "detection pairs, MiniGPT-v2", 7: "pairs, Qwen2-VL", 8: "pairs, Llama-3.2-Vision",
}  # fmt: skip
LEGEND = (
    "complete: every member dataset that the catalogue has for a subset has records, training and test records are "
    "there or can be split 9:1, no image is absent and no record broken. How many records the full release has is not "
    "known: that all of them are there is not said. Boxes and pixels: `medcg data check`."
)
ROWS_LEGEND = (
    "full: all subsets that the row needs are complete. part: it can be computed, on less or other data than the "
    "paper's. blocked by 03 (1, 2): rows 1 and 2 need subset 03, which cannot be used. Rows of tables 1 and 2 have the "
    "number of the subset that they test. By the task table some rows share more or less with their target than they "
    "say (numbers of rows below each table): a grid's report gives its effects once more without them."
)

_HEADS = f"{'train':>8}{'test':>8}{'images':>8}{'absent':>8}"


def print_ledger(ledger: Ledger) -> None:
    """Prints the summary, the rows of tables 1 to 8, what is there, and what is missing with its address."""
    for line in ledger_lines(ledger):
        print(line)


def ledger_lines(ledger: Ledger) -> list[str]:
    """The ledger's lines."""
    subsets = [state for state in ledger.subsets if state.in_catalogue]
    here = [state for state in ledger.subsets if state.state != "missing" or not state.in_catalogue]
    gone = [state for state in subsets if state.state == "missing"]
    lines = [ledger.root, "", *_summary(ledger), *_wrap(LEGEND)]
    for what, faults in (("tree", ledger.faults), ("detection files", ledger.box_faults)):
        # A tree without any file has nothing to mend.
        if faults and here:
            text = f"THE READER REFUSES THE {what.upper()} until this is mended (rows: as they will be then):"
            lines += ["", *_wrap(text)]
            for fault in faults:
                lines += _wrap(fault, 2)
    lines += ["", *_row_lines(ledger.rows)]
    if here:
        lines += ["", f"{'Subsets here':<12}{_HEADS} modality, area, task"]
        for state in here:
            lines += _subset_lines(state)
    if gone:
        lines += ["", "Missing subsets, and their datasets"]
        for state in gone:
            note = "" if "not released" not in state.reasons[0] else " (questions not released)"
            lines += _wrap(f"{state.number}  {', '.join(state.triplet)}: {', '.join(state.lacking)}{note}", 4, first="")
    lines += _dataset_lines(ledger.datasets)
    return lines


def _summary(ledger: Ledger) -> list[str]:
    lines = [f"{'':10}{'complete':>9}{'partial':>9}{'missing':>9}{'of':>5}"]
    for name, states in (("subsets", ledger.subsets), ("datasets", ledger.datasets)):
        listed = [state for state in states if state.in_catalogue]
        counts, num_unlisted = states_of(listed), len(states) - len(listed)
        line = f"{name:10}" + "".join(f"{number:>9}" for number in counts.values()) + f"{len(listed):>5}"
        notes = [f"{num_unlisted} more are the tree's own"] if num_unlisted else []
        if name == "subsets":
            closed = sum("not released" in state.reasons[0] for state in listed if state.state == "missing")
            notes = [f"{closed} missing not released"] * bool(closed) + notes
        lines.append(line + ("   " + "; ".join(notes) if notes else ""))
    total = ledger.total
    records = f"{total.train:,} training and {total.test:,} test records, {ledger.num_broken:,} broken"
    lines += _wrap(f"{records}; {total.images:,} different images, {total.absent:,} absent")
    return [*lines, ""]


def _row_lines(rows: Sequence[RowState]) -> list[str]:
    lines = [f"{'Rows of the paper':<36}{'full':>6}{'part':>6}{'blocked':>9}{'of':>5}"]
    for table in TABLES:
        of_table = [row for row in rows if row.table == table]
        by_state = {state: [row for row in of_table if row.state == state] for state in ("full", "part", "blocked")}
        full, part, blocked = by_state.values()
        digits = 2 if table < 3 else 1
        name = f"table {table}  {TABLE_NAMES[table]}"
        lines.append(f"{name:<36}{len(full):>6}{len(part):>6}{len(blocked):>9}{len(of_table):>5}")
        for state, listed in (("full", full), ("part", part)):
            if listed:
                lines += _wrap(f"{state}: {_ranges((row.row for row in listed), digits)}", 11, first=" " * 9)
        for name in LAPSES:
            if lapsed := [row.row for row in of_table if row.lapse == name]:
                lines += _wrap(f"{LAPSES[name]}: {_ranges(lapsed)}", 11, first=" " * 9)
        if blocked:
            by_subset: dict[str, list[int]] = {}
            for row in blocked:
                for number in row.blocked_by:
                    by_subset.setdefault(number, []).append(row.row)
            if table < 3:
                text = f"blocked by {_ranges(map(int, by_subset), digits)}"
            else:
                subsets = [f"{number} ({_ranges(numbers)})" for number, numbers in sorted(by_subset.items())]
                text = f"blocked by {', '.join(subsets)}"
            lines += _wrap(text, 11, first=" " * 9)
    return [*lines, *_wrap(ROWS_LEGEND)]


def _subset_lines(state: SubsetState) -> list[str]:
    name, triplet = f"{state.number} {state.state}", ", ".join(filter(None, state.triplet)) or "not known"
    lines = [f"{name:<12}{_counts(state)} {triplet}"]
    if len(name) > 12 or len(lines[0]) > WIDTH:
        lines = [*_wrap(f"{name}  {triplet}", 4, first=""), " " * 12 + _counts(state)]
    notes = [*state.reasons]
    if state.split_made and state.test:
        notes.append("no test file: split 9:1")
    if state.others and state.in_catalogue:
        notes.append(f"also has {', '.join(state.others)}, no member by the catalogue")
    return lines + (_wrap("; ".join(notes), 4) if notes else [])


def _dataset_lines(states: Sequence[DatasetState]) -> list[str]:
    listed = [state for state in states if state.in_catalogue]
    here = [state for state in listed if state.state != "missing"]
    others = [state for state in states if not state.in_catalogue]
    gone = [state for state in listed if state.state == "missing"]
    lines = []
    if here:
        lines += ["", f"{'Data here':<12}{_HEADS} name; in subsets"]
    for state in here:
        name = f"{state.number:>3} {state.state}"
        where = f"{_short(state.name or 'name not known', 30)}; {', '.join(state.found_in)}"
        lines.append(f"{name:<12}{_counts(state)} {_short(where, WIDTH - 45)}")
        lines += _wrap("; ".join(state.reasons), 4) if state.reasons else []
    if others:
        text = ", ".join(f"{state.number} ({state.train + state.test:,})" for state in others)
        lines += ["", *_wrap(f"Data numbers of the tree's own, with their records: {text}")]
    if gone:
        lines += ["", "Missing datasets, and where they are to be had", *address_lines(gone)]
    return lines


def address_lines(datasets: Iterable[DatasetState | Dataset]) -> list[str]:
    """Where datasets are to be had: number, name and each address."""
    lines = []
    for dataset in datasets:
        name = f"{dataset.number:>3}  {_short(dataset.name or 'name not known', 36):<36}"
        for address in dataset.addresses or ("address not known",):
            line = f"{name}  {address}"
            lines += [line] if len(line) <= WIDTH else [*filter(None, [name.rstrip()]), f"     {address}"]
            name = " " * len(name)
    return lines


def _counts(state: SubsetState | DatasetState) -> str:
    return f"{state.train:>8,}{state.test:>8,}{state.images:>8,}{state.absent:>8,}"


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _wrap(text: str, indent: int = 0, first: str | None = None) -> list[str]:
    start = " " * indent if first is None else first
    return textwrap.wrap(
        text, WIDTH, initial_indent=start, subsequent_indent=" " * indent,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def _ranges(numbers: Iterable[int], digits: int = 1) -> str:
    """[1, 2, 3, 7] -> "1-3, 7", with two digits "01-03, 07"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join("-".join(f"{number:0{digits}}" for number in dict.fromkeys(run)) for run in runs)
