"""A page about a Med-MAT tree for people: what its images look like, and whether its questions are balanced.

`medcg data stats ROOT OUT` writes OUT/index.html, a contact sheet for each subset in OUT/sheets, and OUT/stats.json.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from medcg_jax.config import DataConfig
from medcg_jax.data.check import Inspection, Use, inspect
from medcg_jax.data.duplicates import groups
from medcg_jax.data.examine import Examined
from medcg_jax.data.images import load_image, pad_to_square
from medcg_jax.data.notices import letter_counts
from medcg_jax.data.pool import Progress
from medcg_jax.data.reading import Reading
from medcg_jax.data.records import SPLITS, DataError, RecordSet, Subset
from medcg_jax.data.release import ReleaseSource, labels_of

# A contact sheet: a row for each of the most frequent labels, so many images in each.
THUMB_PX, COLUMNS, MOST_LABELS = 112, 8, 8
# Sizes and labels that are listed; the rest are counted together.
MOST_LISTED = 12


@dataclass(frozen=True)
class SubsetStats:
    """What the page says of one subset.

    Attributes:
      labels: (label, training records, test records), the most frequent first.
      letters: option letter -> how often it is right, training and test together. `letters_p`: how likely so uneven a
        distribution is when every option of every question is as likely (chi-square); None: no choice questions.
      sizes: ("width x height", images), the most frequent first. side_px: the shortest and the longest side.
      duplicates: images whose pixels another of the subset has. across: test records with the image of a training one.
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
class Shared:
    """Images that two subsets have in common: `same` of equal pixels, `near` of others that are nearly equal."""

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
    seed: int = 0,
) -> Path:
    """Writes the page and returns its path; `out` appears whole, and replaces an older page alone.

    Raises:
      DataError: no tree, a file of it cannot be read, or `out` holds something else.
    """
    out = Path(out)
    if not _is_free(out):
        raise DataError(f"{out} holds something else; a new folder, or one with an older page, is accepted")
    reading = Reading(data.window, data.deep_grey, data.frame)
    found = inspect(root, data.max_pixels, reading, workers=workers, progress=progress)
    source = ReleaseSource(root, data, skip=found.report.bad_records)
    out.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: whatever else lies there is left alone.
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        partial = Path(folder) / "page"
        (partial / "sheets").mkdir(parents=True)
        _write_into(partial, Path(root).name, source, found, data.max_pixels, reading, seed)
        shutil.rmtree(out, ignore_errors=True)
        os.replace(partial, out)
    return out / "index.html"


def _is_free(out: Path) -> bool:
    """Whether there is nothing, an empty folder, or an older page and nothing beside it."""
    if not os.path.lexists(out):
        return True
    if out.is_symlink() or not out.is_dir():
        return False
    names = {path.name for path in out.iterdir()}
    return not names or ("stats.json" in names and names <= {"stats.json", "index.html", "sheets"})


def _write_into(
    partial: Path, name: str, source: ReleaseSource, found: Inspection, max_pixels: int, reading: Reading, seed: int
) -> None:
    """The page's files. name: of the tree."""
    subsets = []
    for kind, group in (("choice", source.subsets), ("detection", source.detection_subsets)):
        for subset in group:
            sets = {split: source.records(subset.name, split) for split in SPLITS}
            sheet = contact_sheet([sets[split] for split in SPLITS], np.random.default_rng(seed))
            if sheet is not None:
                sheet.save(partial / "sheets" / f"{subset.name}.jpg", quality=85)
            path = f"sheets/{subset.name}.jpg" if sheet is not None else ""
            subsets.append(_stats(subset, kind, sets, found, path))
    pairs = near_sheet(found, max_pixels, reading)
    if pairs is not None:
        pairs.save(partial / "sheets" / "near.jpg", quality=85)
    shared = shared_images(found)
    content = {
        "records": found.report.num_records,
        "images": found.report.num_images,
        "problems": found.report.counts(),
        "subsets": [asdict(own) for own in subsets],
        "shared": [asdict(own) for own in shared],
        "near": [asdict(own) for own in found.report.near],
        "notices": [asdict(own) for own in found.report.notices],
    }
    (partial / "stats.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (partial / "index.html").write_text(_page(name, found, subsets, shared), encoding="utf-8")


def shared_images(found: Inspection) -> list[Shared]:
    """Pairs of subsets that have images with the same or nearly the same pixels, those with most first."""
    uses = list({(use.subset, use.path): use for use in found.uses if not found.images[use.path].reason}.values())
    pairs: dict[tuple[str, str], Shared] = {}
    for group in groups([found.images[use.path].print for use in uses]):
        of: dict[str, list[Use]] = {}
        for place in group.members:
            of.setdefault(uses[place].subset, []).append(uses[place])
        for pair in combinations(sorted(of), 2):
            first, second = ({found.images[use.path].pixels for use in of[name]} for name in pair)
            same = len(first & second)
            use = of[pair[0]][0]
            old = pairs.get(pair, Shared(pair, 0, 0, f"{use.path.name} ({use.file}, {use.record})"))
            near = old.near + min(len(first), len(second)) - same
            pairs[pair] = Shared(pair, old.same + same, near, old.example)
    return sorted(pairs.values(), key=lambda own: (-own.same, -own.near, own.subsets))


def near_sheet(found: Inspection, max_pixels: int, reading: Reading) -> Image.Image | None:
    """Test images, each with the nearest training image below it, the nearest pairs first; None without any."""
    path_of = {(use.file, use.record): use.path for use in found.uses}
    nearest = {path_of[near.test_file, near.test_record]: near for near in reversed(found.report.near)}
    chosen = sorted(nearest.values(), key=lambda near: near.bits)[: 2 * COLUMNS]
    if not chosen:
        return None
    caption, gap = 20, 6
    block = 2 * THUMB_PX + caption + gap
    rows = -(-len(chosen) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (THUMB_PX + gap), rows * block), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for number, near in enumerate(chosen):
        left, top = number % COLUMNS * (THUMB_PX + gap), number // COLUMNS * block
        draw.text((left, top + 3), f"{near.bits} bits apart{near.form and f', {near.form}'}", fill="black", font=font)
        paths = path_of[near.test_file, near.test_record], path_of[near.file, near.record]
        for place, path in enumerate(paths):
            sheet.paste(_thumb(load_image(path, max_pixels, reading)), (left, top + caption + place * THUMB_PX))
    return sheet


def _thumb(image: np.ndarray) -> Image.Image:
    square = Image.fromarray(pad_to_square(image, (255, 255, 255)))
    return square.resize((THUMB_PX, THUMB_PX), Image.Resampling.LANCZOS)


def contact_sheet(sets: Sequence[RecordSet], generator: np.random.Generator) -> Image.Image | None:
    """Images of each of the most frequent labels, a row a label; None without any image."""
    places: dict[str, list[tuple[RecordSet, int]]] = {}
    for records in sets:
        for place, record in enumerate(records.records):
            if record.image:
                places.setdefault(labels_of(record) or "no box", []).append((records, place))
    if not places:
        return None
    labels = sorted(places, key=lambda label: (-len(places[label]), label))[:MOST_LABELS]
    caption, gap = 20, 6
    height = len(labels) * (caption + THUMB_PX + gap)
    sheet = Image.new("RGB", (COLUMNS * (THUMB_PX + gap), height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for row, label in enumerate(labels):
        top = row * (caption + THUMB_PX + gap)
        draw.text((0, top + 2), f"{label} ({len(places[label])})", fill="black", font=font)
        chosen = generator.permutation(len(places[label]))[:COLUMNS]
        for column, index in enumerate(sorted(chosen.tolist())):
            records, place = places[label][index]
            sheet.paste(_thumb(records.image(place)), (column * (THUMB_PX + gap), top + caption))
    return sheet


def letters_p(sets: Sequence[RecordSet]) -> tuple[dict[str, int], float | None]:
    """How often each letter is right, and the p of a chi-square test against letters drawn uniformly."""
    return letter_counts(record for records in sets for record in records.records)


def _stats(subset: Subset, kind: str, sets: dict[str, RecordSet], found: Inspection, sheet: str) -> SubsetStats:
    uses = [use for use in found.uses if use.subset == subset.name]
    images = {use.path: found.images[use.path] for use in uses}
    good = [image for image in images.values() if not image.reason]
    sizes = Counter(f"{image.width} x {image.height}" for image in good)
    sides = [side for image in good for side in (image.width, image.height)]
    labels = {split: Counter(_label_counts(sets[split])) for split in SPLITS}
    names = sorted(labels["train"] | labels["test"], key=lambda name: (-labels["train"][name], name))
    letters, p = letters_p([sets[split] for split in SPLITS])
    files = {use.file for use in uses}
    problems = Counter(problem.kind for problem in found.report.problems if problem.file in files)
    return SubsetStats(
        name=subset.name, kind=kind, what=f"{subset.modality}, {subset.area}, {subset.task}",
        train=len(sets["train"]), test=len(sets["test"]), images=len(images),
        labels=tuple((name, labels["train"][name], labels["test"][name]) for name in names),
        letters=letters, letters_p=p, sizes=tuple(sizes.most_common()),
        side_px=(min(sides, default=0), max(sides, default=0)), problems=dict(problems.most_common()),
        duplicates=_num_duplicates(good), across=problems["duplicate_across_splits"], sheet=sheet,
    )  # fmt: skip


def _label_counts(records: RecordSet) -> list[str]:
    """The right option of each record, or the label of each of its boxes."""
    return [label for r in records.records for label in ([r.label] if r.options else [box.label for box in r.boxes])]


def _num_duplicates(images: list[Examined]) -> int:
    return len(images) - len({image.pixels for image in images})


def _page(name: str, found: Inspection, subsets: list[SubsetStats], shared: list[Shared]) -> str:
    import jinja2

    loader = jinja2.PackageLoader("medcg_jax.data", "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    context: dict[str, Any] = {"name": name, "report": found.report, "subsets": subsets, "shared": shared}
    return environment.get_template("stats.html.j2").render(most=MOST_LISTED, **context)
