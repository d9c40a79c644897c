"""A web page about a Med-MAT tree: what its images look like, and whether its questions are balanced.

`medcg data stats ROOT OUT` writes OUT/index.html, a contact sheet for each subset in OUT/sheets, and OUT/stats.json.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from medcg_jax.config import DataConfig
from medcg_jax.data.check import Inspection, Near, inspect
from medcg_jax.data.duplicates import groups
from medcg_jax.data.images import load_image, pad_to_square
from medcg_jax.data.notices import letter_counts
from medcg_jax.data.pool import Progress
from medcg_jax.data.reading import Reading
from medcg_jax.data.records import SPLITS, DataError, RecordSet, Split, Subset
from medcg_jax.data.release import ReleaseSource
from medcg_jax.data.splits import labels_of
from medcg_jax.data.tree import Entry

# A contact sheet has a row of `COLUMNS` images for each of the most frequent labels.
THUMB_PX, COLUMNS, MOST_LABELS = 112, 8, 8
_CAPTION_PX, _GAP_PX = 20, 6
PITCH_PX = THUMB_PX + _GAP_PX
_BLOCK_PX, _NEAR_BLOCK_PX = _CAPTION_PX + THUMB_PX + _GAP_PX, 2 * THUMB_PX + _CAPTION_PX + _GAP_PX
# Letters are said to be uneven where so uneven ones occur less often than this by chance.
UNEVEN_P = 0.001
# Sizes and labels listed one by one; the page counts the others together.
MOST_LISTED = 12


@dataclass(frozen=True)
class SubsetStats:
    """What the page shows of one subset.

    Attributes:
      labels: (label, training records, test records), the most frequent first.
      letters: option letter -> how often it is right, training and test together. letters_p: p of a chi-square test
        against uniform letters; None: no choice questions.
      sizes: ("width x height", images), the most frequent first. side_px: the shortest and the longest side.
      duplicates: images whose pixels equal another's of the subset. across: test records with a training record's image.
    """

    name: str
    kind: str
    what: str
    train: int
    test: int
    images: int
    labels: tuple[tuple[str, int, int], ...]
    letters: dict[str, int]
    letters_p: float | None
    sizes: tuple[tuple[str, int], ...]
    side_px: tuple[int, int]
    problems: dict[str, int]
    duplicates: int
    across: int
    sheet: str = ""


@dataclass(frozen=True)
class Strip:
    """A label's row of a contact sheet: how many images it stands for, how many are shown, and where it begins."""

    label: str
    count: int
    thumbs: int
    top: int


@dataclass(frozen=True)
class Pair:
    """A near pair on its sheet, its test image above the training one: `places` are their left and upper ends."""

    near: Near
    subsets: tuple[str, str]  # of the training and of the test record
    places: tuple[tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class Shared:
    """Images that two subsets have in common: `same` with equal pixels, `near` with nearly equal ones."""

    subsets: tuple[str, str]
    same: int
    near: int
    example: str


def write_stats(
    root: str | Path,
    out: str | Path,
    data: DataConfig = DataConfig(),
    *,
    workers: int = 0,
    progress: Progress | None = None,
    report: Callable[[str], None] = lambda text: None,
) -> Path:
    """Writes the page and returns its path; `out` appears whole, and replaces nothing but an older page.

    progress: shows how far the images are. report: called with a line on what is done next.

    Raises:
      DataError: no tree, a file of the tree cannot be read, or `out` holds something else.
    """
    out = Path(out)
    if not _is_free(out):
        raise DataError(f"{out} holds something else; expected a new folder, or one with an older page")
    reading = Reading(data.window, data.deep_grey, data.frame)
    report(f"reading the records of {root}, then every image")
    inspection = inspect(root, data.max_pixels, reading, workers=workers, progress=progress)
    counts = inspection.report
    report(f"{counts.num_records} records of {counts.num_images} images read; drawing contact sheets, then the page")
    source = ReleaseSource(inspection.tree, data, skip=inspection.report.bad_records)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        partial = Path(folder) / "page"
        (partial / "sheets").mkdir(parents=True)
        _write_into(partial, Path(root).absolute().name, source, inspection, data.max_pixels, reading)
        shutil.rmtree(out, ignore_errors=True)
        os.replace(partial, out)
    return out / "index.html"


def _is_free(out: Path) -> bool:
    """Whether `out` is missing, an empty folder, or an older page with nothing beside it."""
    if not os.path.lexists(out):
        return True
    if out.is_symlink() or not out.is_dir():
        return False
    names = {path.name for path in out.iterdir()}
    return not names or ("stats.json" in names and names <= {"stats.json", "index.html", "sheets"})


def _write_into(
    partial: Path, name: str, source: ReleaseSource, inspection: Inspection, max_pixels: int, reading: Reading
) -> None:
    """Writes the page's files. name: of the tree."""
    subsets, strips = [], {}
    kinds = [
        (kind, subset)
        for kind, group in (("choice", source.subsets), ("detection", source.detection_subsets))
        for subset in group
    ]
    for kind, subset in kinds:
        sets = {split: source.records(subset.name, split) for split in SPLITS}
        sheet = contact_sheet([sets[split] for split in SPLITS], np.random.default_rng(0))
        if sheet is not None:
            sheet.save(partial / "sheets" / f"{subset.name}.jpg", quality=85)
            strips[kind, subset.name] = sheet_strips([sets[split] for split in SPLITS])
        path = f"sheets/{subset.name}.jpg" if sheet is not None else ""
        subsets.append(_stats(subset, kind, sets, inspection, path))
    near, pairs = near_sheet(inspection, max_pixels, reading), near_pairs(inspection)
    if near is not None:
        near.save(partial / "sheets" / "near.jpg", quality=85)
    shared = shared_images(inspection)
    content = {
        "records": inspection.report.num_records,
        "images": inspection.report.num_images,
        "problems": inspection.report.counts(),
        "subsets": [asdict(item) for item in subsets],
        "shared": [asdict(item) for item in shared],
        "near": [asdict(item) for item in inspection.report.near],
        "notices": [asdict(item) for item in inspection.report.notices],
    }
    (partial / "stats.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    page = _page(name, inspection, subsets, shared, strips, pairs)
    (partial / "index.html").write_text(page, encoding="utf-8")


def findings(inspection: Inspection, subsets: Sequence[SubsetStats], shared: Sequence[Shared]) -> list[tuple[str, str]]:
    """What a reader should look at, the gravest first: (in words, id of its part of the page; "": `data check`)."""
    report = inspection.report
    across, uneven = sum(s.across for s in subsets), [s.name for s in subsets if (s.letters_p or 1) < UNEVEN_P]
    same = sum(item.same for item in shared)
    possible = [
        (
            len(report.bad_records),
            f"{_number(len(report.bad_records), 'record')} of {report.num_records:,} cannot be used ("
            + ", ".join(f"{kind} {count}" for kind, count in report.counts().items())
            + ")",
            "",
        ),
        (
            not report.ok and not report.bad_records,
            f"{_number(len(report.problems), 'file')} cannot be used ({', '.join(report.counts())})",
            "",
        ),
        (across, f"{_number(across, 'test record')} with the image of a training record of the same subset", ""),
        (
            len(report.near),
            f"{_number(len(report.near), 'pair')} of a training and a test record with nearly the same image",
            "near",
        ),
        (
            len(shared),
            f"{_number(len(shared), 'pair')} of subsets with images in common ({same:,} with the same pixels)",
            "shared",
        ),
        (len(report.notices), f"{_number(len(report.notices), 'warning')}", "warnings"),
        (
            len(uneven),
            f"letters that are not evenly right, in {', '.join(uneven)}",
            f"subset-{uneven[0]}" if uneven else "",
        ),
    ]
    return [(text, link) for holds, text, link in possible if holds]


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def shared_images(inspection: Inspection) -> list[Shared]:
    """Pairs of subsets that share images with the same or nearly the same pixels, most shared images first."""
    sound = [entry for entry in inspection.entries if not inspection.images[entry.path].reason]
    uses = list({(entry.file.number, entry.path): entry for entry in sound}.values())
    pairs: dict[tuple[str, str], Shared] = {}
    for group in groups([inspection.images[use.path].hashes for use in uses]):
        by_subset: dict[str, list[Entry]] = {}
        for member in group.members:
            by_subset.setdefault(uses[member].file.number, []).append(uses[member])
        for pair in combinations(sorted(by_subset), 2):
            first, second = ({inspection.images[use.path].pixels for use in by_subset[name]} for name in pair)
            same = len(first & second)
            use = by_subset[pair[0]][0]
            old = pairs.get(pair, Shared(pair, 0, 0, f"{use.path.name} ({use.file.path.name}, {use.name})"))
            near = old.near + min(len(first), len(second)) - same
            pairs[pair] = Shared(pair, old.same + same, near, old.example)
    return sorted(pairs.values(), key=lambda shared: (-shared.same, -shared.near, shared.subsets))


def near_pairs(inspection: Inspection) -> list[Pair]:
    """Test images with their nearest training image, nearest pairs first; at most two rows of a sheet."""
    entry_of = {(entry.file.path.name, entry.name): entry for entry in inspection.entries}
    nearest = {entry_of[near.test_file, near.test_record].path: near for near in reversed(inspection.report.near)}
    chosen = sorted(nearest.values(), key=lambda near: near.bits)[: 2 * COLUMNS]
    pairs = []
    for number, near in enumerate(chosen):
        left, top = number % COLUMNS * PITCH_PX, number // COLUMNS * _NEAR_BLOCK_PX + _CAPTION_PX
        subsets = entry_of[near.file, near.record].file.number, entry_of[near.test_file, near.test_record].file.number
        pairs.append(Pair(near, subsets, ((left, top), (left, top + THUMB_PX))))
    return pairs


def near_sheet(inspection: Inspection, max_pixels: int, reading: Reading) -> Image.Image | None:
    """Test images, each above its nearest training image, nearest pairs first; None if there are none."""
    path_of = {(entry.file.path.name, entry.name): entry.path for entry in inspection.entries}
    pairs = near_pairs(inspection)
    if not pairs:
        return None
    sheet, draw, font = _blank_sheet(-(-len(pairs) // COLUMNS) * _NEAR_BLOCK_PX, 12)
    for pair in pairs:
        near, (left, top) = pair.near, pair.places[0]
        words = f"{near.bits} bits apart{near.form and f', {near.form}'}"
        draw.text((left, top - _CAPTION_PX + 3), words, fill="black", font=font)
        paths = path_of[near.test_file, near.test_record], path_of[near.file, near.record]
        for path, place in zip(paths, pair.places, strict=True):
            sheet.paste(_thumb(load_image(path, max_pixels, reading)), place)
    return sheet


def _by_label(sets: Sequence[RecordSet]) -> dict[str, list[tuple[RecordSet, int]]]:
    """The most frequent labels -> (set, number) of the records with an image."""
    images_of: dict[str, list[tuple[RecordSet, int]]] = {}
    for records in sets:
        for record_index, record in enumerate(records.records):
            if record.image:
                images_of.setdefault(labels_of(record) or "no box", []).append((records, record_index))
    return dict(sorted(images_of.items(), key=lambda item: (-len(item[1]), item[0]))[:MOST_LABELS])


def sheet_strips(sets: Sequence[RecordSet]) -> list[Strip]:
    """The rows of `contact_sheet`."""
    return [
        Strip(label, len(images), min(COLUMNS, len(images)), row * _BLOCK_PX + _CAPTION_PX)
        for row, (label, images) in enumerate(_by_label(sets).items())
    ]


def contact_sheet(sets: Sequence[RecordSet], generator: np.random.Generator) -> Image.Image | None:
    """A row of images for each of the most frequent labels; None without any image."""
    images_of = _by_label(sets)
    if not images_of:
        return None
    sheet, draw, font = _blank_sheet(len(images_of) * _BLOCK_PX, 13)
    for row, (label, images) in enumerate(images_of.items()):
        draw.text((0, row * _BLOCK_PX + 2), f"{label} ({len(images)})", fill="black", font=font)
        chosen = generator.permutation(len(images))[:COLUMNS]
        for column, index in enumerate(sorted(chosen.tolist())):
            records, record_index = images[index]
            sheet.paste(_thumb(records.image(record_index)), (column * PITCH_PX, row * _BLOCK_PX + _CAPTION_PX))
    return sheet


def _blank_sheet(height: int, font_px: int):
    sheet = Image.new("RGB", (COLUMNS * PITCH_PX, height), "white")
    return sheet, ImageDraw.Draw(sheet), ImageFont.load_default(font_px)


def _thumb(image: np.ndarray) -> Image.Image:
    square = Image.fromarray(pad_to_square(image, (255, 255, 255)))
    return square.resize((THUMB_PX, THUMB_PX), Image.Resampling.LANCZOS)


def _stats(subset: Subset, kind: str, sets: dict[Split, RecordSet], inspection: Inspection, sheet: str) -> SubsetStats:
    entries = [entry for entry in inspection.entries if entry.file.number == subset.name]
    images = {entry.path: inspection.images[entry.path] for entry in entries}
    good = [image for image in images.values() if not image.reason]
    sizes = Counter(f"{image.width} x {image.height}" for image in good)
    sides = [side for image in good for side in (image.width, image.height)]
    labels: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    for split in SPLITS:
        for record in sets[split].records:
            labels[split].update([record.label] if record.options else [box.label for box in record.boxes])
    names = sorted(labels["train"] | labels["test"], key=lambda name: (-labels["train"][name], name))
    letters, p = letter_counts(record for split in SPLITS for record in sets[split].records)
    files = {entry.file.path.name for entry in entries}
    problems = Counter(problem.kind for problem in inspection.report.problems if problem.file in files)
    return SubsetStats(
        name=subset.name, kind=kind, what=f"{subset.modality}, {subset.area}, {subset.task}",
        train=len(sets["train"]), test=len(sets["test"]), images=len(images),
        labels=tuple((name, labels["train"][name], labels["test"][name]) for name in names),
        letters=letters, letters_p=p, sizes=tuple(sizes.most_common()),
        side_px=(min(sides, default=0), max(sides, default=0)), problems=dict(problems.most_common()),
        duplicates=len(good) - len({image.pixels for image in good}), across=problems["duplicate_across_splits"],
        sheet=sheet,
    )  # fmt: skip


def _page(
    name: str,
    inspection: Inspection,
    subsets: list[SubsetStats],
    shared: list[Shared],
    strips: Mapping[tuple[str, str], list[Strip]],
    pairs: list[Pair],
) -> str:
    import jinja2

    loader = jinja2.PackageLoader("medcg_jax.data", "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    near_height = -(-len(pairs) // COLUMNS) * _NEAR_BLOCK_PX
    return environment.get_template("stats.html.j2").render(
        most=MOST_LISTED,
        name=name,
        report=inspection.report,
        shared=shared,
        pairs=pairs,
        thumb=THUMB_PX,
        pitch=PITCH_PX,
        findings=findings(inspection, subsets, shared),
        near_size=(COLUMNS * PITCH_PX, near_height),
        subsets=[_shown(item, strips.get((item.kind, item.name), [])) for item in subsets],
    )


def _shown(item: SubsetStats, strips: list[Strip]) -> dict:
    """A subset's values for the page."""
    values = {field.name: getattr(item, field.name) for field in fields(item)}
    return values | {
        "label_rows": [(label, (train, test)) for label, train, test in item.labels],
        "most_labels": max((train + test for _, train, test in item.labels), default=1) or 1,
        "letter_rows": [(letter, (count,)) for letter, count in item.letters.items()],
        "size_rows": [(size, (count,)) for size, count in item.sizes],
        "rows": strips,
        "size": (COLUMNS * PITCH_PX, len(strips) * _BLOCK_PX),
    }
