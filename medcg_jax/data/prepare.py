"""A Med-MAT tree checked, decoded, laid out and written once as ArrayRecord shards: `medcg data prepare ROOT OUT`.

    OUT/manifest.json                               written last: settings, counts, digests of all other files
    OUT/records/NN-train.jsonl                      the records of a subset and split, one a line, without pixels
    OUT/records/NN-train-00000-of-00012.arrayrecord the same records with pixels, `RECORDS_PER_SHARD` in each
    OUT/set_aside.jsonl                             the records left out, and why

A shard's record is its line of the .jsonl, a line end, and the pixels: uint8, rows of `shape`, of one channel where all
three are equal. A shard is renamed into place when it is whole, so a killed run resumes at the next shard.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from medcg_jax.config import DataConfig
from medcg_jax.data.check import RECORD_KINDS, Inspection, Report, inspect
from medcg_jax.data.examine import Examined, Memory
from medcg_jax.data.images import is_grey, load_image, opened
from medcg_jax.data.layouts import Layout
from medcg_jax.data.pool import Progress, over
from medcg_jax.data.reading import Reading, check_reading
from medcg_jax.data.records import SPLITS, DataError, Record, Subset
from medcg_jax.data.release import ReleaseSource
from medcg_jax.data.splits import is_out_of_distribution
from medcg_jax.data.tree import Tree
from medcg_jax.files import write_whole
from medcg_jax.untrusted import FileError, kind_of, read_json, shown

# Images that are nearly one grey: the manifest names at most so many.
MOST_DIM = 20
# 2: the lines have perceptual hashes.
FORMAT = "medcg prepared 2"
OWN_FILES = (".examined.jsonl", ".plan.json", "set_aside.jsonl", "manifest.json")
RECORDS_PER_SHARD = 256
# One record a group, so that each can be read alone. Uncompressed: the fastest zstd halves the size, but reading then
# takes 3.6 times the CPU (262 against 73 us for a record of 336 x 336).
WRITER_OPTIONS = "group_size:1,uncompressed"
# Partial files that a killed run leaves in `records`.
_PARTIAL = re.compile(r"\.[A-Za-z0-9-]+-(?:train|test)(?:-\d{5}-of-\d{5}\.arrayrecord|\.jsonl)\.[0-9a-f]{12}")
# Settings that decide what the records are; a folder holds one preparation.
SETTINGS = ("train_records_per_subset", "test_records_per_subset", "seed", "max_pixels", "window", "deep_grey", "frame")


class TooManyBad(DataError):
    """More records are bad than the user accepts.

    Attributes:
      report: all that is wrong.
    """

    def __init__(self, message: str, report: Report):
        super().__init__(message)
        self.report = report


@dataclass(frozen=True)
class Prepared:
    """The manifest that `prepare` wrote, and the shards (0: all existed) and seconds of this run."""

    manifest: dict[str, Any]
    shards_written: int
    seconds: float


@dataclass(frozen=True)
class _Shard:
    """A shard to be written: its subset and split ("04-train"), its path, and its records as lines of JSON."""

    subset_split: str
    path: Path
    lines: tuple[str, ...]


def prepare(
    root: str | Path,
    out: str | Path,
    data: DataConfig,
    layout: Layout = Layout(),
    *,
    max_bad_frac: float = 0.0,
    drop_near: bool = False,
    workers: int = 0,
    progress: Progress | None = None,
) -> Prepared:
    """Writes those records of the tree that `out` does not hold yet; the bytes do not depend on `workers`.

    Prints the warnings of `check`, and a line if nothing is left to do.

    Args:
      data: which records of the tree (caps, seed) and how pixels are read; its `source` and `root` are ignored.
      max_bad_frac: share of the records that may be set aside, in 0..1; with more the run ends before it writes.
      drop_near: leave out the training records whose image is nearly a test record's.
      progress: as in `check.inspect`; used for the images and then for the shards.

    Raises:
      DataError: no tree; or `out` holds something else, a link, or a preparation with other settings or records.
      TooManyBad: see `max_bad_frac`; or a file of the tree cannot be used at all.
    """
    started, out = time.monotonic(), Path(out)
    settings = {"image": str(layout), "near": "drop" if drop_near else "keep"}
    settings |= {key: getattr(data, key) for key in SETTINGS}
    reading, tree = Reading(data.window, data.deep_grey, data.frame), Tree(root)
    check_reading(reading)
    tree.require_files()
    _check_out(out, tree.root)
    _check_settings(out, settings)
    with Memory(out / ".examined.jsonl", tree.root, repr((data.max_pixels, reading))) as memory:
        inspection = inspect(tree, data.max_pixels, reading, workers=workers, progress=progress, memory=memory)
    if not inspection.report.acceptable(max_bad_frac):
        raise TooManyBad(_refusal(inspection.report, max_bad_frac), inspection.report)
    for notice in inspection.report.notices:
        print(f"warning: {notice}")
    near = {(pair.file, pair.record) for pair in inspection.report.near}
    source = ReleaseSource(tree, data, skip=inspection.report.bad_records | (near if drop_near else set()))
    lines_by_split = dict(_lines(source, inspection, layout))
    plan = {"format": FORMAT, "settings": settings, "records": records_digest(lines_by_split)}
    if _plan_of(out).get("records", plan["records"]) != plan["records"]:
        raise DataError(f"{out} was prepared from other records or images; remove it, or choose another folder")
    shards = [shard for name, lines in lines_by_split.items() for shard in _shards(out, name, lines)]
    missing = sum(not shard.path.exists() for shard in shards)
    if not missing and (done := _finished(out, plan)):
        print(f"{out}: prepared before, nothing to do")
        return Prepared(done, 0, time.monotonic() - started)
    write_whole(out / ".plan.json", json.dumps(plan, indent=1) + "\n")
    for name, lines in lines_by_split.items():
        write_whole(out / "records" / f"{name}.jsonl", "".join(f"{line}\n" for line in lines))
    left_out: list[Any] = [*inspection.report.problems, *(inspection.report.near if drop_near else ())]
    aside = [json.dumps(asdict(problem), ensure_ascii=False) for problem in left_out]
    write_whole(out / "set_aside.jsonl", "".join(f"{line}\n" for line in aside))
    write = functools.partial(write_shard, root=tree.root, layout=layout, max_pixels=data.max_pixels, reading=reading)
    results: Iterable[str] = over(write, shards, crashed=_crashed, workers=workers, chunk=1)
    digests = dict(zip(shards, progress(results, len(shards)) if progress else results, strict=True))
    manifest = plan | {
        "prompt_fingerprint": _prompt_fingerprint(lines_by_split),
        "set_aside": {"records": len(inspection.report.bad_records), "of": inspection.report.num_records}
        | {"problems": inspection.report.counts()},
        "near": {"training_records": len(near), "kept": not drop_near},
        "read_as": dict(inspection.report.read_as),
        "dim": {
            "images": len(inspection.report.dim),
            "least": [asdict(image) for image in inspection.report.dim[:MOST_DIM]],
        },
        "subsets": [_entry(subset, kind, digests, data) for kind, subset in _subsets(source)],
    }
    write_whole(out / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    return Prepared(manifest, missing, time.monotonic() - started)


def write_shard(shard: _Shard, root: Path, layout: Layout, max_pixels: int, reading: Reading) -> str:
    """Writes a shard, whole or not at all, and returns the sha256 of its file in hex.

    An existing file with the same records is kept; another one is replaced.

    Raises:
      DataError: an image has changed since it was examined.
      OSError: an image cannot be read, or the shard cannot be written.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    if shard.path.exists() and _holds(shard):
        return _file_digest(shard.path)
    partial = shard.path.with_name(f".{shard.path.name}.{secrets.token_hex(6)}")
    try:
        try:
            writer = ArrayRecordWriter(str(partial), WRITER_OPTIONS)
            for line in shard.lines:
                writer.write(f"{line}\n".encode() + _pixels(json.loads(line), root, layout, max_pixels, reading))
            writer.close()
        except RuntimeError as error:  # the writer's error for a full or missing disk
            raise OSError(f"{shard.path} cannot be written: {str(error).partition(';')[0]}") from error
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        digest = _file_digest(partial)
        os.replace(partial, shard.path)
        return digest
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def shard_name(subset_split: str, index: int, number: int) -> str:
    """The file name of shard `index` of `number`. subset_split: "04-train"."""
    return f"{subset_split}-{index:05d}-of-{number:05d}.arrayrecord"


def _holds(shard: _Shard) -> bool:
    """Whether the shard's file is whole and each of its records begins with the expected line."""
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        reader = ArrayRecordReader(str(shard.path))
        if reader.num_records() != len(shard.lines):
            return False
        return all(reader.read().startswith(f"{line}\n".encode()) for line in shard.lines)
    except (RuntimeError, ValueError, IndexError):
        return False


def _pixels(record: dict[str, Any], root: Path, layout: Layout, max_pixels: int, reading: Reading) -> bytes:
    with opened(root / record["image"]) as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != record["sha256"]:
            raise DataError(f"record {record['id']}: image {record['image']!r} has changed since it was examined")
        image = layout.apply(load_image(file, max_pixels, reading))
    return (image[..., 0] if is_grey(image) else image).tobytes()


def _subsets(source: ReleaseSource) -> list[tuple[str, Subset]]:
    """Every subset with its kind, "choice" or "detection"."""
    return [("choice", s) for s in source.subsets] + [("detection", s) for s in source.detection_subsets]


def _lines(source: ReleaseSource, inspection: Inspection, layout: Layout):
    """(subset-split, its records as lines of JSON), in order."""
    for _, subset in _subsets(source):
        for split in SPLITS:
            records = source.records(subset.name, split).records
            images = [inspection.images[source.tree.image(record.image)] for record in records]
            lines = [_line(layout.record(r), image, layout) for r, image in zip(records, images, strict=True)]
            if lines:
                yield f"{subset.name}-{split}", lines


def _line(record: Record, image: Examined, layout: Layout) -> str:
    """One record as JSON. `shape`: (height, width) of its pixels in the shard; the hashes are those of the image file."""
    fields = {
        "id": record.id,
        "subset": record.subset,
        "data_no": record.data_no,
        "group": record.group,
        "image": record.image,
        "turns": [[turn.question, turn.answer] for turn in record.turns],
        "options": record.options,
        "answer": record.answer,
        "boxes": [[box.label, *box.corners] for box in record.boxes],
        "size_px": record.size_px,
        "shape": layout.size_after((image.height, image.width)),
        "sha256": image.digest,
        "pixels": image.pixels,
        "perceptual": image.perceptual,
        "read_as": image.read_as,
    }
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":"))


def _shards(out: Path, name: str, lines: list[str]) -> list[_Shard]:
    starts = range(0, len(lines), RECORDS_PER_SHARD)
    return [
        _Shard(
            name,
            out / "records" / shard_name(name, index, len(starts)),
            tuple(lines[start : start + RECORDS_PER_SHARD]),
        )
        for index, start in enumerate(starts)
    ]


def _entry(subset: Subset, kind: str, digests: dict[_Shard, str], data: DataConfig) -> dict[str, Any]:
    """A subset's entry in the manifest."""
    shards = {split: [s for s in digests if s.subset_split == f"{subset.name}-{split}"] for split in SPLITS}
    files = {
        split: [{"file": s.path.name, "records": len(s.lines), "sha256": digests[s]} for s in shards[split]]
        for split in SPLITS
    }
    return {
        "subset": subset.name,
        "kind": kind,
        "modality": subset.modality,
        "area": subset.area,
        "task": subset.task,
        "labels": list(subset.labels),
        "out_of_distribution": is_out_of_distribution(subset, data.train_records_per_subset),
        **{split: sum(file["records"] for file in files[split]) for split in SPLITS},
        "shards": files,
    }


def _check_out(out: Path, root: Path) -> None:
    if os.path.lexists(out) and not out.is_dir():
        raise DataError(f"{out} is no folder; expected one, or a new name")
    if out.resolve() == root.resolve():
        raise DataError(f"{out}: the tree itself; expected another folder")
    if out.is_dir() and any(out.iterdir()) and not (out / ".examined.jsonl").exists():
        raise DataError(f"{out} holds something else; expected an empty folder, a new one, or one that was prepared")
    records = out / "records"
    _check_kind(records, is_folder=True)
    for name in OWN_FILES:
        _check_kind(out / name)
    records.mkdir(parents=True, exist_ok=True)
    for path in records.iterdir():
        _check_kind(path)
        if _PARTIAL.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _check_kind(path: Path, is_folder: bool = False) -> None:
    """Raises DataError if the path is a link, or no regular file (or no folder, if `is_folder`)."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not (stat.S_ISDIR(mode) if is_folder else stat.S_ISREG(mode)):
        kind = "a link" if stat.S_ISLNK(mode) else "a file" if stat.S_ISREG(mode) else kind_of(mode)
        accepted = "a folder" if is_folder else "a regular file"
        raise DataError(f"{path} is {kind}, and nothing is written through it; expected {accepted}, or nothing there")


def _plan_of(out: Path) -> dict[str, Any]:
    """The plan that the folder was begun with; {} if there is none."""
    path = out / ".plan.json"
    if not path.exists():
        return {}
    try:
        plan = read_json(path)
    except FileError as error:
        raise DataError(f"{error}; remove {out} and prepare it again") from error
    if plan.get("format") != FORMAT:
        raise DataError(f"{out} was prepared by another version of medcg; choose another folder, or remove it")
    if not isinstance(plan.get("settings"), dict):
        raise DataError(f"{path}: no object under the key `settings`; remove {out} and prepare it again")
    return plan


def _check_settings(out: Path, settings: dict[str, Any]) -> None:
    """Raises DataError if the folder holds a preparation with other settings."""
    old = _plan_of(out).get("settings", settings)
    differ = [
        f"{key}={shown(old.get(key))}, not {shown(value)}" for key, value in settings.items() if old.get(key) != value
    ]
    if differ:
        raise DataError(f"{out} was prepared with {'; '.join(differ)}; choose another folder, or remove it")


def _finished(out: Path, plan: dict[str, Any]) -> dict[str, Any] | None:
    try:
        manifest = read_json(out / "manifest.json")
    except FileError:  # missing or damaged: written again
        return None
    return manifest if all(manifest.get(key) == value for key, value in plan.items()) else None


def _refusal(report: Report, max_bad_frac: float) -> str:
    kinds = ", ".join(f"{kind} {count}" for kind, count in report.counts().items())
    if report.bad_frac <= max_bad_frac:
        first = next(problem for problem in report.problems if problem.kind not in RECORD_KINDS | {"no_records"})
        return f"files of the tree cannot be used ({kinds}), the first of them {first}; `medcg data check` names each"
    return (
        f"{len(report.bad_records)} of {report.num_records} records are bad ({kinds}); --max_bad_frac={max_bad_frac} "
        f"accepts fewer, --max_bad_frac={report.bad_frac:.4f} would set them aside; `medcg data check` names each"
    )


def _crashed(shard: _Shard, reason: str):
    raise DataError(f"{shard.path.name}: the process that wrote it died (memory?); run the command again")


def records_digest(lines_by_split: dict[str, list[str]]) -> str:
    """A digest of all records. lines_by_split: "04-train" -> lines, in the manifest's order."""
    digest = hashlib.sha256()
    for name, lines in lines_by_split.items():
        digest.update("\n".join([name, *lines, ""]).encode())
    return digest.hexdigest()


def _prompt_fingerprint(lines_by_split: dict[str, list[str]]) -> str:
    """A digest of all questions, options, answers and boxes."""
    digest = hashlib.sha256()
    for lines in lines_by_split.values():
        for line in lines:
            record = json.loads(line)
            digest.update(json.dumps([record["turns"], record["options"], record["boxes"]]).encode())
    return digest.hexdigest()[:16]


def _file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
