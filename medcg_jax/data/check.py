"""What is wrong with a Med-MAT tree, record by record: `medcg data check ROOT`.

Nothing found ends the run: each record and each image is judged by itself.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from medcg_jax.config import DataConfig
from medcg_jax.data.duplicates import NEAR_BITS, hash_rows
from medcg_jax.data.examine import Examined, examine_all
from medcg_jax.data.hamming import FORMS, near_pairs_between
from medcg_jax.data.notices import Content, Notice, names_alike, notices_of
from medcg_jax.data.pool import Progress
from medcg_jax.data.reading import Reading, check_reading
from medcg_jax.data.records import SPLITS, DataError, Record, Split
from medcg_jax.data.release import subset_table
from medcg_jax.data.schema import ReleaseError, check_id, check_keys, image_path, parse_choice, read_list, record_name
from medcg_jax.data.schema_detection import DETECTION_KEYS, detection_problems, shares_of_image
from medcg_jax.data.splits import split_group
from medcg_jax.data.tree_files import ELEMENTS, SubsetFile, list_files, near_misses, read_manifest

# 14 bits in words of 16 take a quarter of their range, 12 a sixteenth.
MIN_RANGE_USED = 0.3
_FRAME = re.compile(r", frame \d+ of \d+")
_WINDOW = re.compile(r"window -?[\d.e+-]+/[\d.e+-]+")
# Kinds of problems that are a record's own: without it the rest of its file can be used.
RECORD_KINDS = frozenset(
    ("type", "key", "text", "options", "letter", "answer", "duplicate_id", "path", "missing_file", "image", "size")
    + ("box", "duplicate_across_splits")
)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong; `record` is "" where it is the file's as a whole."""

    file: str
    record: str
    kind: str
    reason: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.file, self.record, self.reason) if part)


@dataclass(frozen=True)
class Near:
    """A training record whose image is nearly that of a test record: `bits` of 256 of their perceptual hashes differ.

    `form`, of `hamming.FORMS`, says what of the test's image it is, such as "mirrored"; "" for the image as it is.

    No fault of either record, and so no problem: frames of one patient may be meant, or may give a test away.
    """

    file: str
    record: str
    image: str
    test_file: str
    test_record: str
    test_image: str
    bits: int
    form: str = ""


@dataclass(frozen=True)
class Dim:
    """An image whose greys take so little of the range that became black to white that it is nearly one flat grey.

    No fault of a record: which range is meant nobody but the user knows. share: in 0..1. image: below the root.
    """

    image: str
    share: float
    read_as: str


@dataclass(frozen=True)
class Report:
    """What was looked at, and every problem in the order of files and records.

    `num_detection` of the records are in detection files; `num_boxes` are in those whose keys and path are right.
    `read_as`: ways in which images became 8 bits, without the numbers of windows and frames, and how many did so, most
    frequent first; ordinary ones are not among them.
    """

    num_files: int
    num_records: int
    num_images: int
    problems: tuple[Problem, ...]
    num_detection: int = 0
    num_boxes: int = 0
    near: tuple[Near, ...] = ()
    notices: tuple[Notice, ...] = ()
    dim: tuple[Dim, ...] = ()
    read_as: tuple[tuple[str, int], ...] = ()

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def bad_records(self) -> frozenset[tuple[str, str]]:
        """(file, record) of every record that something is wrong with."""
        return frozenset((problem.file, problem.record) for problem in self.problems if problem.kind in RECORD_KINDS)

    @property
    def bad_frac(self) -> float:
        """Share of the records that something is wrong with, in 0..1."""
        return len(self.bad_records) / self.num_records if self.num_records else 0.0

    def acceptable(self, max_bad_frac: float) -> bool:
        """Whether nothing is wrong but so small a share of the records, or that a file has none. A file that cannot be
        read is not acceptable at any share, since nobody knows how many records it has."""
        own = all(problem.kind in RECORD_KINDS or problem.kind == "no_records" for problem in self.problems)
        return own and self.bad_frac <= max_bad_frac

    def counts(self) -> dict[str, int]:
        """Number of problems of each kind, most frequent first."""
        return dict(Counter(problem.kind for problem in self.problems).most_common())

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON takes it."""
        return {
            "ok": self.ok,
            "files": self.num_files,
            "records": self.num_records,
            "images": self.num_images,
            "detection_records": self.num_detection,
            "boxes": self.num_boxes,
            "bad_records": len(self.bad_records),
            "bad_frac": self.bad_frac,
            "counts": self.counts(),
            "near": [asdict(pair) for pair in self.near],
            "notices": [asdict(notice) for notice in self.notices],
            "dim": [asdict(image) for image in self.dim],
            "read_as": dict(self.read_as),
            "problems": [asdict(problem) for problem in self.problems],
        }


class Use(NamedTuple):
    """One record's use of an image."""

    file: str
    record: str
    subset: str
    split: Split
    path: Path
    # A choice record; else a detection record as it stands, to be held against the image's size.
    question: Record | None
    boxes: dict[str, Any] | None
    group: str


class Inspection(NamedTuple):
    """A tree's report with what it rests on: every use of an image, and every image file."""

    report: Report
    uses: tuple[Use, ...]
    images: dict[Path, Examined]


def check_tree(root: str | Path, *args, **kwargs) -> Report:
    """The report of `inspect`, which takes the same."""
    return inspect(root, *args, **kwargs).report


def inspect(
    root: str | Path,
    max_pixels: int = DataConfig().max_pixels,
    reading: Reading = Reading(),
    *,
    workers: int = 0,
    progress: Progress | None = None,
    known: Mapping[Path, Examined] | None = None,
    remember: Callable[[Path, Examined], None] | None = None,
) -> Inspection:
    """Every problem of the tree's subset files, of the images they name, and between train and test.

    Kinds: those of `schema` (`unreadable`, `encoding`, `json`, `not_a_list`, `type`, `key`, `options`, `letter`,
    `text`, `answer`, `duplicate_id`, `path`, `missing_file`), and `unknown_subset`, `duplicate_file`, `file_name`,
    `manifest`, `image`, `size`, `box`, `box_units`, `no_records`, `duplicate_across_splits` (the same bytes or the same
    pixels in train and in test, whatever the names). What is no fault of a record by itself is a notice (`notices`).

    Args:
      workers: processes that decode; 0: one per core.
      progress: wraps the images' iterator and takes their number: `lambda images, total: tqdm(images, total=total)`.
      known, remember: as `examine.examine_all` takes them.

    Raises:
      DataError: the root is no folder or holds no subset file; or `reading` has no such choice.
    """
    check_reading(reading)
    root = tree_root(root)
    problems: list[Problem] = []
    named = _known_subsets(root, problems)
    files, refused = list_files(root)
    problems += map(_problem, refused)
    uses: list[Use] = []
    num_records = num_detection = 0
    for file in files:
        if file.number not in named:
            reason = "neither in the tree's manifest.json nor in Med-MAT's table of 53"
            problems.append(Problem(file.path.name, f"subset {file.number}", "unknown_subset", reason))
        try:
            raws = read_list(file.path)
        except ReleaseError as error:
            problems.append(_problem(error))
            continue
        num_records += len(raws)
        num_detection += len(raws) if file.detection else 0
        if not raws:
            problems.append(Problem(file.path.name, "", "no_records", "an empty list; nothing can be drawn from it"))
        uses += check_records(raws, root, file, problems)
        if file.detection and (reason := shares_of_image(raws)):
            problems.append(Problem(file.path.name, "", "box_units", reason))
    paths = sorted({use.path for use in uses})
    images = examine_all(paths, max_pixels, reading, workers=workers, progress=progress, known=known, remember=remember)
    problems += _image_problems(uses, images)
    problems += _shared_between_splits(uses, images)
    order = {file.path.name: place for place, file in enumerate(files)}
    problems.sort(key=lambda problem: order.get(problem.file, -1))
    num_boxes = sum(len(use.boxes["boxes"]) for use in uses if use.boxes)
    near, notices = near_across_splits(uses, images), _notices(root, files, named, uses, images)
    report = Report(
        len(files), num_records, len(paths), tuple(problems), num_detection, num_boxes, near, notices,
        dim_images(root, images), ways_of_reading(images),
    )  # fmt: skip
    return Inspection(report, tuple(uses), images)


def tree_root(root: str | Path) -> Path:
    """The folder of a Med-MAT tree, every link followed.

    Raises:
      DataError: it is no folder, or holds no subset file.
    """
    if not str(root) or not Path(root).is_dir():
        raise DataError(f"{str(root)!r}: no such folder; that of a Med-MAT tree is accepted")
    found = Path(os.path.realpath(root))
    if not any(list_files(found)):
        reason = "no Subset--NN-train.json in it or in its Aggregated_Subsets"
        raise DataError(f"{str(root)!r} is no Med-MAT tree: {reason}")
    return found


def dim_images(root: Path, images: Mapping[Path, Examined]) -> tuple[Dim, ...]:
    """Images that take less than `MIN_RANGE_USED` of the range that they were read by, the least first."""
    found = [
        Dim(str(path.relative_to(root)), round(image.range_used, 3), image.read_as)
        for path, image in images.items()
        if image.range_used is not None and image.range_used < MIN_RANGE_USED
    ]
    return tuple(sorted(found, key=lambda image: (image.share, image.image)))


def ways_of_reading(images: Mapping[Path, Examined]) -> tuple[tuple[str, int], ...]:
    """(way, number of images), as `Report.read_as`."""
    ways = (_WINDOW.sub("window", _FRAME.sub("", image.read_as)) for image in images.values() if image.read_as)
    return tuple(Counter(ways).most_common())


def check_records(raws: list[Any], root: Path, file: SubsetFile, problems: list[Problem]) -> list[Use]:
    """The image uses of the records whose JSON and path are right; what is wrong with others is added to `problems`."""
    uses: list[Use] = []
    seen: set[int] = set()
    own = file.path.name
    for place, raw in enumerate(raws):
        name = record_name(raw, place)
        try:
            check_id(raw, seen, file=own, place=place)
            record = None
            if file.detection:
                check_keys(raw, DETECTION_KEYS, own, name)
            else:
                record = parse_choice(raw, file=own, place=place, subset=file.number, split=file.split)
            path = image_path(root, raw["image"], file=own, record=name)
            group = split_group(raw["data-no"], raw["image"], raw.get("group", ""))
            boxes = raw if file.detection else None
            uses.append(Use(own, name, file.number, file.split, path, record, boxes, group))
        except ReleaseError as error:
            problems.append(_problem(error))
    return uses


def print_report(report: Report, *, limit: int = 20) -> None:
    """Prints what was looked at, a table of what is wrong by kind, and the first `limit` of each kind."""
    print(f"{report.num_files} subset files, {report.num_records} records, {report.num_images} images")
    if report.num_detection:
        print(f"of these {report.num_detection} detection records, {report.num_boxes} boxes")
    if report.near:
        tests = len({(pair.test_file, pair.test_record) for pair in report.near})
        first = report.near[0]
        print(
            f"{tests} test records have nearly the image of a training record, such as {first.test_image!r} "
            f"({first.test_file}, {first.test_record}) that of {first.image!r} ({first.file}, {first.record})"
            f"{f', {first.form}' if first.form else ''}"
        )
        forms = Counter(pair.form or "as it is" for pair in report.near)
        if set(forms) != {"as it is"}:
            print(f"of {len(report.near)} such pairs: {', '.join(f'{n} {form}' for form, n in forms.most_common())}")
    if report.read_as:
        print(f"read as: {', '.join(f'{count} {way}' for way, count in report.read_as)}")
    if report.dim:
        print(dim_warning(len(report.dim), report.dim[0]))
    for notice in report.notices[:limit]:
        print(f"warning: {notice}")
    if len(report.notices) > limit:
        print(f"and {len(report.notices) - limit} more warnings (--json=FILE has all)")
    if report.ok:
        print("no record is refused" if report.notices or report.dim else "nothing is wrong")
        return
    print(f"bad records: {len(report.bad_records)} of {report.num_records} ({report.bad_frac:.2%})\n")
    width = max(len("kind"), *map(len, report.counts()))
    print(f"{'kind':{width}}  problems  files")
    for kind, count in report.counts().items():
        files = len({problem.file for problem in report.problems if problem.kind == kind})
        print(f"{kind:{width}}  {count:8}  {files:5}")
    for kind, count in report.counts().items():
        print(f"\n{kind}: {count}")
        shown = [problem for problem in report.problems if problem.kind == kind][:limit]
        for problem in shown:
            print(f"  {problem}")
        if count > len(shown):
            print(f"  and {count - len(shown)} more")


def dim_warning(number: int, least: Dim) -> str:
    """What is said where so many images are nearly one grey as they are read. least: that of the least range."""
    advice = "--deep_grey=percentile takes greys from the least to the greatest of each image"
    if "colours" in least.read_as:
        advice = "bring their values to the whole range first"
    return (
        f"warning: {number} images use less than {MIN_RANGE_USED:.0%} of the range that they are read by, such as "
        f"{least.image!r} {least.share:.1%} ({least.read_as}): they are nearly one grey; {advice}"
    )


def _known_subsets(root: Path, problems: list[Problem]) -> dict[str, tuple[str, ...]]:
    """(modality, area, task) of each subset of Med-MAT's table and of the manifest."""
    try:
        manifest = read_manifest(root)
    except ReleaseError as error:
        problems.append(_problem(error))
        manifest = {}
    return subset_table() | {name: tuple(entry[key] for key in ELEMENTS) for name, entry in manifest.items()}


def _problem(error: ReleaseError) -> Problem:
    return Problem(error.file, error.record, error.kind, error.reason)


def _notices(
    root: Path,
    files: Sequence[SubsetFile],
    named: Mapping[str, tuple[str, ...]],
    uses: Sequence[Use],
    images: Mapping[Path, Examined],
) -> tuple[Notice, ...]:
    """named: (modality, area, task) by subset."""
    misses = [near for near in near_misses(root, files) if not near.is_wanted]
    notices = [Notice(ascii(near.name)[1:-1], "file_name", 1, 1, near.reason) for near in misses]
    notices += names_alike({file.number: named[file.number] for file in files if file.number in named})
    contents: dict[str, Content] = {}
    for use in uses:
        content = contents.setdefault(use.file, Content(use.file, use.subset, use.split))
        content.groups.append(use.group)
        if use.question:
            content.records.append(use.question)
        if use.boxes:
            content.boxes.append((use.boxes, images[use.path].size))
    return (*notices, *notices_of(list(contents.values())))


def _image_problems(uses: list[Use], images: dict[Path, Examined]) -> list[Problem]:
    found = []
    for use in uses:
        image = images[use.path]
        if image.size is None:
            found.append(Problem(use.file, use.record, "image", f"image {use.path.name!r}: {image.reason}"))
        elif use.boxes is not None:
            reasons = detection_problems(use.boxes, image.size)
            found += [Problem(use.file, use.record, kind, reason) for kind, reason in reasons]
    return found


def _shared_between_splits(uses: list[Use], images: dict[Path, Examined]) -> list[Problem]:
    """One problem per test record whose image a training record has, in any subset: its bytes, or its pixels."""
    bytes_of: dict[str, Use] = {}
    pixels_of: dict[str, Use] = {}
    for use in uses:
        if use.split == "train" and images[use.path].digest:
            bytes_of.setdefault(images[use.path].digest, use)
            if images[use.path].pixels:
                pixels_of.setdefault(images[use.path].pixels, use)
    found = []
    for use in uses:
        image, same = images[use.path], "image"
        first = bytes_of.get(image.digest)
        if first is None:
            first, same = pixels_of.get(image.pixels), "picture, in another file,"
        if use.split == "test" and first:
            reason = f"the same {same} as in {first.file}, {first.record} ({first.path.name!r})"
            found.append(Problem(use.file, use.record, "duplicate_across_splits", reason))
    return found


def near_across_splits(uses: Sequence[Use], images: Mapping[Path, Examined], bits: int = NEAR_BITS) -> tuple[Near, ...]:
    """Every training record with a test record of nearly its image, of any subset, and not the same one; by `bits`.

    Mirrored, turned and inverted images are found too (`hamming.FORMS`).

    bits: how many of 256 bits of the perceptual hashes may differ.
    """
    paths = {split: sorted({use.path for use in uses if use.split == split}) for split in SPLITS}
    (train_places, train), (test_places, test) = (
        hash_rows(images[path].print for path in paths[split]) for split in SPLITS
    )
    users: dict[tuple[Split, Path], list[Use]] = {}
    for use in uses:
        users.setdefault((use.split, use.path), []).append(use)
    found = []
    for i, j, differing, form in zip(*(part.tolist() for part in near_pairs_between(train, test, bits)), strict=True):
        train_path, test_path = paths["train"][train_places[i]], paths["test"][test_places[j]]
        if images[train_path].pixels == images[test_path].pixels:
            continue
        found += [
            Near(own.file, own.record, own.path.name, other.file, other.record, other.path.name, differing, FORMS[form])
            for own in users["train", train_path]
            for other in users["test", test_path]
        ]
    return tuple(sorted(found, key=lambda pair: (pair.bits, pair.test_file, pair.test_record, pair.file, pair.record)))
