"""What is wrong with a Med-MAT tree, record by record: `medcg data check ROOT`.

No problem ends the run: each record and each image is judged by itself.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from medcg_jax.config import DataConfig
from medcg_jax.data.duplicates import FORMS, NEAR_BITS, hash_rows, near_pairs_between
from medcg_jax.data.examine import Examined, Memory, examine_all
from medcg_jax.data.notices import Notice, names_alike, notices_of
from medcg_jax.data.pool import Progress
from medcg_jax.data.reading import Reading, check_reading
from medcg_jax.data.records import SPLITS, Split
from medcg_jax.data.schema import ReleaseError, detection_problems
from medcg_jax.data.tree import Entry, Tree, near_misses, subset_table

# 14 bits in 16-bit words use a quarter of the range, 12 bits a sixteenth.
MIN_RANGE_USED = 0.3
_FRAME = re.compile(r", frame \d+ of \d+")
_WINDOW = re.compile(r"window -?[\d.e+-]+/[\d.e+-]+")
# Kinds of problems of a single record: the other records of its file can still be used.
RECORD_KINDS = frozenset(
    ("type", "key", "text", "options", "letter", "answer", "duplicate_id", "path", "missing_file", "image", "size")
    + ("box", "duplicate_across_splits")
)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong; `record` is "" where it concerns the whole file."""

    file: str
    record: str
    kind: str
    reason: str

    def __str__(self) -> str:
        return ": ".join(text for text in (self.file, self.record, self.reason) if text)


@dataclass(frozen=True)
class Near:
    """A training record whose image is nearly that of a test record: `bits` of 256 of their perceptual hashes differ.

    `form`, of `duplicates.FORMS`, says how the test's image was changed, such as "mirrored"; "" if it was not.

    Neither record is at fault, so this is no `Problem`: frames of one patient may be intended, or may give a test away.
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
    """An image whose greys use so little of the range mapped to black..white that it is nearly one flat grey.

    This is no `Problem`: only the user knows which range is meant. share: in 0..1. image: path below the root.
    """

    image: str
    share: float
    read_as: str


@dataclass(frozen=True)
class Report:
    """What was checked, and every problem in the order of files and records.

    `num_detection` of the records are in detection files; `num_boxes` counts the boxes of those with right keys and path.
    `read_as`: (way in which images became 8 bits, without numbers of windows and frames; number of such images), most
    frequent first; ordinary 8-bit images are not counted.
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
        """Whether at most this share of the records is bad. Files without records are acceptable; a file that cannot be
        read never is, since nobody knows how many records it has."""
        is_usable = all(problem.kind in RECORD_KINDS or problem.kind == "no_records" for problem in self.problems)
        return is_usable and self.bad_frac <= max_bad_frac

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


class Inspection(NamedTuple):
    """A report, its tree, every record whose JSON and image path are right (`entries`), and every image file."""

    report: Report
    tree: Tree
    entries: tuple[Entry, ...]
    images: dict[Path, Examined]


def check_tree(root: str | Path, *args, **kwargs) -> Report:
    """The report of `inspect`, with the same arguments."""
    return inspect(root, *args, **kwargs).report


def inspect(
    root: str | Path | Tree,
    max_pixels: int = DataConfig().max_pixels,
    reading: Reading = Reading(),
    *,
    workers: int = 0,
    progress: Progress | None = None,
    memory: Memory | None = None,
) -> Inspection:
    """Every problem of the tree's subset files, of the images they name, and between train and test.

    Kinds: those of the reader (`unreadable`, `encoding`, `json`, `not_a_list`, `type`, `key`, `options`, `letter`,
    `text`, `answer`, `duplicate_id`, `path`, `missing_file`, `box_units`, `duplicate_file`, `file_name`, `manifest`),
    and `unknown_subset`, `image`, `size`, `box`, `no_records`, `duplicate_across_splits` (the same bytes or the same
    pixels in train and in test, whatever the names). What is no fault of a single record is a notice (`notices`).

    Args:
      workers: processes that decode; 0: one per core.
      progress: wraps the images' iterator and takes their number: `lambda images, total: tqdm(images, total=total)`.
      memory: as `examine.examine_all` takes it.

    Raises:
      DataError: the root is no folder or holds no subset file; or `reading` has an unknown choice.
    """
    check_reading(reading)
    tree = root if isinstance(root, Tree) else Tree(root)
    tree.require_files()
    problems: list[Problem] = []
    try:
        triplets = tree.triplets
    except ReleaseError as error:
        problems.append(_problem(error))
        triplets = subset_table()
    problems += map(_problem, tree.refused)
    entries: list[Entry] = []
    num_records = num_detection = 0
    for file in tree.files:
        name = file.path.name
        if file.number not in triplets:
            reason = "neither in the tree's manifest.json nor in Med-MAT's table of 53"
            problems.append(Problem(name, f"subset {file.number}", "unknown_subset", reason))
        try:
            contents = tree.contents(file)
        except ReleaseError as error:
            problems.append(_problem(error))
            continue
        num_records += len(contents.raws)
        num_detection += len(contents.raws) if file.detection else 0
        if not contents.raws:
            problems.append(Problem(name, "", "no_records", "an empty list; nothing can be drawn from it"))
        entries += [entry for entry in contents.entries if not entry.error]
        problems += [_problem(entry.error) for entry in contents.entries if entry.error]
        problems += [_problem(contents.box_units)] if contents.box_units else []
    paths = sorted({entry.path for entry in entries})
    images = examine_all(paths, max_pixels, reading, workers=workers, progress=progress, memory=memory)
    problems += _image_problems(entries, images)
    problems += _shared_between_splits(entries, images)
    order = {file.path.name: position for position, file in enumerate(tree.files)}
    problems.sort(key=lambda problem: order.get(problem.file, -1))
    misses = [near for near in near_misses(tree.root, tree.files) if not near.is_wanted]
    notices = [Notice(ascii(near.name)[1:-1], "file_name", 1, 1, near.reason) for near in misses]
    notices += names_alike({file.number: triplets[file.number] for file in tree.files if file.number in triplets})
    notices += notices_of(entries, {path: image.size for path, image in images.items()})
    report = Report(
        len(tree.files), num_records, len(paths), tuple(problems), num_detection,
        sum(len(entry.raw["boxes"]) for entry in entries if entry.file.detection),
        near_across_splits(entries, images), tuple(notices), dim_images(tree.root, images), ways_of_reading(images),
    )  # fmt: skip
    return Inspection(report, tree, tuple(entries), images)


def dim_images(root: Path, images: Mapping[Path, Examined]) -> tuple[Dim, ...]:
    """Images that use less than `MIN_RANGE_USED` of the range they were read with, the least first."""
    dim = [
        Dim(str(path.relative_to(root)), round(image.range_used, 3), image.read_as)
        for path, image in images.items()
        if image.range_used is not None and image.range_used < MIN_RANGE_USED
    ]
    return tuple(sorted(dim, key=lambda image: (image.share, image.image)))


def ways_of_reading(images: Mapping[Path, Examined]) -> tuple[tuple[str, int], ...]:
    """(way, number of images), as `Report.read_as`."""
    ways = (_WINDOW.sub("window", _FRAME.sub("", image.read_as)) for image in images.values() if image.read_as)
    return tuple(Counter(ways).most_common())


def print_report(report: Report, *, limit: int = 20) -> None:
    """Prints what was checked, a table of problems by kind, and the first `limit` of each kind."""
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
    """The warning about `number` images that are nearly one grey. least: the one that uses the smallest range."""
    advice = "--deep_grey=percentile takes greys from the least to the greatest of each image"
    if "colours" in least.read_as:
        advice = "bring their values to the whole range first"
    return (
        f"warning: {number} images use less than {MIN_RANGE_USED:.0%} of the range that they are read by, such as "
        f"{least.image!r} {least.share:.1%} ({least.read_as}): they are nearly one grey; {advice}"
    )


def _problem(error: ReleaseError) -> Problem:
    return Problem(error.file, error.record, error.kind, error.reason)


def _image_problems(entries: list[Entry], images: dict[Path, Examined]) -> list[Problem]:
    problems = []
    for entry in entries:
        image, faults = images[entry.path], []
        if image.size is None:
            faults = [("image", f"image {entry.path.name!r}: {image.reason}")]
        elif entry.file.detection:
            faults = detection_problems(entry.raw, image.size)
        problems += [Problem(entry.file.path.name, entry.name, kind, reason) for kind, reason in faults]
    return problems


def _shared_between_splits(entries: list[Entry], images: dict[Path, Examined]) -> list[Problem]:
    """One problem per test record whose image (bytes or pixels) a training record of any subset has too."""
    by_bytes: dict[str, Entry] = {}
    by_pixels: dict[str, Entry] = {}
    for entry in entries:
        image = images[entry.path]
        if entry.file.split == "train" and image.digest:
            by_bytes.setdefault(image.digest, entry)
            if image.pixels:
                by_pixels.setdefault(image.pixels, entry)
    problems = []
    for entry in entries:
        image, same = images[entry.path], "image"
        first = by_bytes.get(image.digest)
        if first is None:
            first, same = by_pixels.get(image.pixels), "picture, in another file,"
        if entry.file.split == "test" and first:
            reason = f"the same {same} as in {first.file.path.name}, {first.name} ({first.path.name!r})"
            problems.append(Problem(entry.file.path.name, entry.name, "duplicate_across_splits", reason))
    return problems


def near_across_splits(entries: Sequence[Entry], images: Mapping[Path, Examined]) -> tuple[Near, ...]:
    """Pairs of a training and a test record, of any subsets, whose images are near but not equal; by distance.

    Mirrored, turned and inverted images count as near (`duplicates.FORMS`).
    """
    users: dict[Split, dict[Path, list[Entry]]] = {split: {} for split in SPLITS}
    for entry in entries:
        users[entry.file.split].setdefault(entry.path, []).append(entry)
    paths = {split: sorted(users[split]) for split in SPLITS}
    (train_places, train), (test_places, test) = (
        hash_rows(images[path].hashes for path in paths[split]) for split in SPLITS
    )
    pairs, columns = [], near_pairs_between(train, test, NEAR_BITS)
    for i, j, bits, form in zip(*(column.tolist() for column in columns), strict=True):
        train_path, test_path = paths["train"][train_places[i]], paths["test"][test_places[j]]
        if images[train_path].pixels == images[test_path].pixels:
            continue
        for entry in users["train"][train_path]:
            names = entry.file.path.name, entry.name, entry.path.name
            for other in users["test"][test_path]:
                pairs.append(Near(*names, other.file.path.name, other.name, other.path.name, bits, FORMS[form]))
    return tuple(sorted(pairs, key=lambda pair: (pair.bits, pair.test_file, pair.test_record, pair.file, pair.record)))
