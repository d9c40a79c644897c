"""Leaks: training records that give a test record away, by id, image, question, or the patient that both show.

Each is told from the records and their images alone. A grid looks for them in its cells (`study.leaks`), `medcg train`
in what it is trained on (`train.run.left_out`); what is done about them is `study.leaks`' and `study.near_duplicates`'.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from medcg_jax.config import StudyConfig
from medcg_jax.data.duplicates import FORMS, ImageHashes, hash_rows, image_hashes, near_pairs_between
from medcg_jax.data.general import SUBSET
from medcg_jax.data.records import Record, RecordSet
from medcg_jax.data.splits import shared_groups

# What a record gives away by -> how a message says it, from the surest.
KINDS = {
    "same id": "the same id as",
    "same bytes": "the same image as",
    "same pixels": "the pixels of",
    "same question": "the question and the options of",
    "same group": "the patient or lesion (`group`) of",
    "near": "an image nearly that of",
    # File names say so (`catalogue.group_of`), or two subsets without a `data-no` name a group alike.
    "likely same group": "likely the patient or lesion of",
    "lineage": "a dataset in common with, or related to that of,",
}
# `study.leaks` -> what is said to be done.
ACTIONS = {"refuse": "refused", "drop": "dropped", "report": "reported"}
# With one of these nothing else needs to be said of a record.
EXACT = ("same id", "same bytes", "same pixels")


@dataclass(frozen=True)
class Leak:
    """A training record that gives a test record away.

    Attributes:
      kind: of `KINDS`. distance_bits: of the images' hashes, where near.
      form: of `duplicates.FORMS`: what of the test's image a near one is, such as "mirrored"; "": as it is.
    """

    training: str
    test: str
    kind: str
    distance_bits: int = 0
    form: str = ""


def words(leak: Leak) -> str:
    """A leak as a sentence: "training record A has the pixels of test record B"."""
    apart = ""
    if leak.kind == "near":
        apart = f" ({', '.join(filter(None, (leak.form, f'{leak.distance_bits} of 256 bits apart')))})"
    return f"training record {leak.training} has {KINDS[leak.kind]} test record {leak.test}{apart}"


def remedy(leak: Leak) -> str:
    """What a user can do about a leak that is refused."""
    if leak.training.startswith(f"{SUBSET}/"):
        return "take it out of data.general_records, or train without it by study.leaks=drop"
    field = "near_duplicates" if leak.kind == "near" else "leaks"
    drop = "" if leak.kind == "same id" else f", or train without the first by study.{field}=drop"
    return f"take one of them out of the tree (`medcg data check` lists all){drop}"


def actions_of(study: StudyConfig) -> dict[str, str]:
    """Kind of leak -> what is done about it where a training subset has it.

    A group that is only likely the same is never refused: of the released subsets nobody has said that their tests are
    of other patients, and none could be tested on.
    """
    act = ACTIONS[study.leaks]
    actions = dict.fromkeys(("same bytes", "same pixels", "same question", "same group"), act)
    actions["likely same group"] = "dropped" if act == "dropped" else "reported"
    # A fault of the expansion, and what no record is to blame for.
    return actions | {"same id": "refused", "near": ACTIONS.get(study.near_duplicates, ""), "lineage": "reported"}


def actions_of_general(study: StudyConfig) -> dict[str, str]:
    """The same of general records, which are no medical images: one that is nearly a test image is a copy of it."""
    return actions_of(study) | {"near": ACTIONS[study.leaks]}


@dataclass(frozen=True)
class Hashed:
    """Records and what their images are recognised by, in one order. images: None for a record without an image."""

    records: tuple[Record, ...]
    images: tuple[ImageHashes | None, ...]

    @property
    def data_numbers(self) -> frozenset[str]:
        return frozenset(record.data_no for record in self.records if record.data_no)


class NearImage(NamedTuple):
    """The nearest test image of a training image: how far, how it was changed, and its place among the test records."""

    distance_bits: int
    form: str
    test_index: int


def hashed(records: RecordSet, decoded: dict[bytes, ImageHashes] | None = None) -> Hashed:
    """A set with the hashes of its images: those that `medcg data prepare` kept, else of the files, each read once.

    decoded: hashes of images by their digest, which is added to; images without kept hashes that are not in it are
    decoded. None: no image is decoded for it, and those without kept hashes are recognised by their bytes alone.

    Raises:
      DataError: an image cannot be read or decoded.
    """

    indices = [index for index, record in enumerate(records.records) if record.image]
    stored = {index: records.kept_hashes(index) for index in indices}
    with ThreadPoolExecutor() as pool:
        digests = dict(zip(indices, pool.map(records.image_digest, indices), strict=True))
        known = {} if decoded is None else decoded
        if decoded is not None:
            new = {digests[p]: p for p in indices if stored[p] is None and digests[p] not in decoded}
            hashes = pool.map(lambda index: image_hashes(records.image(index), digests[index]), new.values())
            decoded |= dict(zip(new, hashes, strict=True))
    images: list[ImageHashes | None] = [None] * len(records)
    for index, digest in digests.items():
        images[index] = ImageHashes(digest, *stored[index]) if stored[index] else known.get(digest, ImageHashes(digest))
    return Hashed(records.records, tuple(images))


def joined(sets: Iterable[Hashed]) -> Hashed:
    """Several sets as one."""
    sets = list(sets)
    return Hashed(
        tuple(record for item in sets for record in item.records),
        tuple(image for item in sets for image in item.images),
    )


def find_leaks(training: Hashed, test: Hashed, near_bits: int | None = None, *, questions: bool = False) -> list[Leak]:
    """What the training records give away of the test records: each by its image, its question and its group at most
    once, by what is surest, and by its nearest test image; and once alone where it has the very image.

    near_bits: bits of 256 in which the hashes of near images differ at most; None: these are not looked for.
    questions: whether questions are compared. Those of one medical subset differ by their images alone, so this is for
      records that are not of the study's subsets.
    """
    leaks = _same_images(training, test)
    exact = {leak.training for leak in leaks}
    if questions:
        leaks += [leak for leak in _same_questions(training, test) if leak.training not in exact]
    leaks += [leak for leak in _same_groups(training, test) if leak.training not in exact]
    if near_bits is not None:
        for index, near in nearest_images(training, test, near_bits).items():
            name = training.records[index].id
            if name not in exact:
                leaks.append(Leak(name, test.records[near.test_index].id, "near", near.distance_bits, near.form))
    return leaks


def _same_images(training: Hashed, test: Hashed) -> list[Leak]:
    known = {record.id for record in test.records}
    files, pixels = _first(test, "file"), _first(test, "pixels")
    leaks = []
    for record, image in zip(training.records, training.images, strict=True):
        if record.id in known:
            leaks.append(Leak(record.id, record.id, "same id"))
        elif image and image.file in files:
            leaks.append(Leak(record.id, files[image.file], "same bytes"))
        elif image and image.pixels in pixels:
            leaks.append(Leak(record.id, pixels[image.pixels], "same pixels"))
    return leaks


def _first(side: Hashed, field: str) -> dict[bytes, str]:
    """Digest -> the first record that has it."""
    first: dict[bytes, str] = {}
    for record, image in zip(side.records, side.images, strict=True):
        if image and getattr(image, field):
            first.setdefault(getattr(image, field), record.id)
    return first


def nearest_images(training: Hashed, test: Hashed, bits: int) -> dict[int, NearImage]:
    """Place in training -> the nearest test image within `bits`. The one call of the search for near images."""
    (indices, a), (others, b) = (
        hash_rows(image or ImageHashes(b"") for image in side.images) for side in (training, test)
    )
    nearest: dict[int, NearImage] = {}
    for i, j, apart, form in zip(*(column.tolist() for column in near_pairs_between(a, b, bits)), strict=True):
        index, near = int(indices[i]), NearImage(apart, FORMS[form], int(others[j]))
        nearest[index] = min(nearest.get(index, near), near)
    return nearest


def _same_questions(training: Hashed, test: Hashed) -> list[Leak]:
    known: dict[tuple, str] = {}
    for record in test.records:
        if record.options:
            known.setdefault(_question(record), record.id)
    return [
        Leak(record.id, known[_question(record)], "same question")
        for record in training.records
        if record.options and _question(record) in known
    ]


def _question(record: Record) -> tuple[str, frozenset[str]]:
    """(What stands before the options, the options), whatever their order, case and white space."""
    stem = []
    for line in record.turns[0].question.splitlines():
        if line.lstrip().startswith("A:"):
            break
        stem.append(line)
    return _plain(" ".join(stem)), frozenset(map(_plain, record.options))


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _same_groups(training: Hashed, test: Hashed) -> list[Leak]:
    """Records of one patient or lesion (`splits.group_key`): "same group" where both records state it, of one data set
    or of one subset; else "likely same group"."""
    leaks = []
    for records, tests in shared_groups(training.records, test.records).values():
        for record in records:
            stated = [
                other.id for other in tests
                if record.group and other.group and (record.data_no or other.subset == record.subset)
            ]  # fmt: skip
            kind = "same group" if stated else "likely same group"
            leaks.append(Leak(record.id, stated[0] if stated else tests[0].id, kind))
    return leaks
