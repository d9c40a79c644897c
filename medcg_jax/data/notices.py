"""Warnings of `medcg data check` that refuse nothing: hints that give answers away, patients on both sides.

Text burnt into an image's pixels is not detected.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medcg_jax.data.records import LETTERS, Record
from medcg_jax.data.schema import appearance, box_corners, box_labels, quoted, told_apart, without_options
from medcg_jax.data.splits import shared_groups, split_group
from medcg_jax.data.tree import Entry

# (height, width) in pixels of an image; None for a refused image.
Size = tuple[int, int] | None

# Below this p letters or answers are called uneven. Of 200 trees of 53 balanced subsets one has such a subset by chance.
MAX_P = 1e-4
# Subsets with fewer questions, files with fewer boxes, are not tested.
MIN_QUESTIONS = MIN_BOXES = 20
# Scales of corners that are no pixels, beside 0..1 (`schema.shares_of_image`).
BOX_SCALES = (100, 1000)
MOST_NAMED = 3


@dataclass(frozen=True)
class Notice:
    """A warning about a file, or a subset ("subset 03"): it concerns `count` of `of` records or boxes."""

    file: str
    kind: str
    count: int
    of: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}"


def notices_of(entries: Iterable[Entry], sizes: Mapping[Path, Size]) -> list[Notice]:
    """All notices about these records, by subset; keys and paths are already checked. sizes: of each image."""
    by_subset: dict[str, dict[str, list[Entry]]] = {}
    for entry in entries:
        files = by_subset.setdefault(entry.file.number, {})
        files.setdefault(entry.file.path.name, []).append(entry)
    notices: list[Notice | None] = []
    for number, files in by_subset.items():
        name, entries = f"subset {number}", [entry for of_file in files.values() for entry in of_file]
        for file, of_file in files.items():
            notices.append(answers_in_questions(file, [entry.record for entry in of_file if entry.record.options]))
        for file, of_file in files.items():
            notices.append(box_range(file, [(e.raw, sizes[e.path]) for e in of_file if e.file.detection]))
        notices.append(uneven_letters(name, [entry.record for entry in entries if entry.record.options]))
        notices += [labels_alike(name, entries), groups_on_both_sides(entries)]
    return [notice for notice in notices if notice]


def names_alike(triplets: Mapping[str, tuple[str, ...]]) -> list[Notice]:
    """Modalities, areas or tasks of two subsets that look alike but differ, so that the subsets share no element.

    triplets: (modality, area, task) by subset, of the manifest, else of Med-MAT.
    """
    notices = []
    for column, what in enumerate(("modality", "area", "task")):
        first: dict[str, tuple[str, str]] = {}
        for number, triplet in triplets.items():
            other, text = first.setdefault(appearance(triplet[column]), (number, triplet[column]))
            if text != triplet[column]:
                here, there = told_apart(triplet[column], text)
                reason = f"its {what} {here} looks like {there} of subset {other}, and is another one"
                notices.append(Notice(f"subset {number}", "names_alike", 1, 1, reason))
    return notices


def letter_counts(records: Iterable[Record], *, from_end: bool = False) -> tuple[dict[str, int], float | None]:
    """How often each letter is right, and p of a chi-square test against uniform letters; ({}, None) without questions.

    from_end: counts positions from the last option ("0") instead of letters.
    """
    counts: Counter[str] = Counter()
    expected: Counter[str] = Counter()
    for record in records:
        number = len(record.options)
        if number:
            names = [str(position) for position in reversed(range(number))] if from_end else list(LETTERS[:number])
            counts[names[LETTERS.index(record.answer)]] += 1
            expected.update(dict.fromkeys(names, 1 / number))
    if not counts:
        return {}, None
    names = sorted(expected)
    observed = [counts[name] for name in names]
    from scipy import stats  # every run imports this file, and few need the test

    p = stats.chisquare(observed, [expected[name] for name in names]).pvalue
    return dict(zip(names, observed, strict=True)), float(p)


def uneven_letters(name: str, records: Sequence[Record]) -> Notice | None:
    """Right letters, or positions from the end, that are not balanced (`MAX_P`, `MIN_QUESTIONS`)."""
    if len(records) < MIN_QUESTIONS:
        return None
    for from_end in (False, True):
        counts, p = letter_counts(records, from_end=from_end)
        if p is None or p >= MAX_P:
            continue
        best = max(counts, key=lambda letter: counts[letter])
        listed = ", ".join(f"{letter} {count}" for letter, count in counts.items())
        what = f"the letter {best}"
        if from_end:
            what = f"option {best} from the last" if best != "0" else "the last option"
            listed = f"places from the last: {listed}"
        reason = (
            f"the right letters are not balanced: {what} is right in {counts[best]} of {len(records)} questions "
            f"({listed}; chi-square p={p:.1e}); draw the options' order, or the letter gives the answer away"
        )
        return Notice(name, "letters", counts[best], len(records), reason)
    return None


def answers_in_questions(file: str, records: Sequence[Record]) -> Notice | None:
    """Questions that contain the text of their right option and of no other, more often than by chance."""
    right, wrong, chance = [], 0, []
    for record in records:
        named = _named(record)
        if named == {record.label}:
            right.append(record)
        elif named and record.label not in named:
            wrong += 1
        if named == {record.label} or (named and record.label not in named):
            chance.append(1 / len(record.options))
    if not right:
        return None
    from scipy import stats

    if wrong and stats.binomtest(len(right), len(chance), sum(chance) / len(chance), "greater").pvalue >= MAX_P:
        return None
    reason = (
        f"{len(right)} of {len(records)} questions hold the text of their right option and of no other, such as record "
        f"{right[0].id.rpartition('/')[2]} ({quoted(right[0].label)}); {wrong} hold a wrong one's alone"
    )
    return Notice(file, "answer_in_question", len(right), len(records), reason)


def _named(record: Record) -> set[str]:
    """The options whose text occurs in the question outside the option lines; of nested texts the longer one."""
    stem, named = appearance(without_options(record.turns[0].question)), set()
    for option in sorted(record.options, key=lambda option: -len(appearance(option))):
        text = appearance(option)
        left = re.sub(rf"(?<!\w){re.escape(text)}(?!\w)", "|", stem) if text else stem
        if left != stem:
            named.add(option)
            stem = left
    return named


def groups_on_both_sides(entries: Sequence[Entry]) -> Notice | None:
    """Patients or lesions in both training and test of one subset."""
    groups: dict[str, list[str]] = {"train": [], "test": []}
    for entry in entries:
        record = entry.record
        groups[entry.file.split].append(split_group(record.data_no, record.image, record.group))
    shared = shared_groups(groups["train"], groups["test"], key=str)
    if not shared:
        return None
    names = ", ".join(quoted(group) for group in list(shared)[:MOST_NAMED])
    more = f" and {len(shared) - MOST_NAMED} more" if len(shared) > MOST_NAMED else ""
    train, test = (sum(len(both[side]) for both in shared.values()) for side in (0, 1))
    file = next(entry.file.path.name for entry in entries if entry.file.split == "test")
    reason = (
        f"{len(shared)} patients or lesions (group) are in training and in test: {names}{more}; {test} of "
        f"{len(groups['test'])} test records share them with {train} training records: a leak"
    )
    return Notice(file, "shared_group", test, len(groups["test"]), reason)


def labels_alike(name: str, entries: Sequence[Entry]) -> Notice | None:
    """Labels of one subset that look alike but are different texts."""
    labels: Counter[str] = Counter()
    for entry in entries:
        labels.update([entry.record.label] if entry.record.options else box_labels(entry.raw))
    spellings: dict[str, list[str]] = {}
    for label in labels:
        spellings.setdefault(appearance(label), []).append(label)
    alike = [
        (alike_labels, sum(sorted(labels[label] for label in alike_labels)[:-1]))
        for alike_labels in spellings.values()
        if len(alike_labels) > 1
    ]
    if not alike:
        return None
    first, second = told_apart(*alike[0][0][:2])
    more = f", and {len(alike) - 1} more" if len(alike) > 1 else ""
    count = sum(number for _, number in alike)
    reason = f"the labels {first} and {second} look alike{more}: {count} of {labels.total()} have the rarer spelling"
    return Notice(name, "labels_alike", count, labels.total(), reason)


def box_range(file: str, boxes: Sequence[tuple[Any, Size]]) -> Notice | None:
    """Corners that fit a scale of 100 or 1,000 better than the images' pixels.

    boxes: (raw detection record, its image's size).
    """
    corners, outside, sides = [], 0, []
    for raw, size in boxes:
        box_list = box_corners(raw)
        corners += box_list
        if size and box_list:
            height, width = size
            sides.append(min(size))
            outside += sum(box[2] > width or box[3] > height for box in box_list)
    most = max((max(box) for box in corners), default=0)
    for scale in BOX_SCALES:
        within_all = len(corners) >= MIN_BOXES and min(sides, default=0) > 1.1 * scale
        if 0.9 * scale < most <= scale and (outside or within_all):
            seen = f"{outside} boxes lead out of their images" if outside else f"no image has a side below {min(sides)}"
            reason = (
                f"all corners of {len(corners)} boxes are at most {scale:,}, and {seen}: if they are shares of "
                f"{scale:,}, turn them into pixels of the upright image"
            )
            return Notice(file, "box_range", len(corners), len(corners), reason)
    return None
