"""Leaks: training records that give a test record away, by id, image, question, or the patient that both show.

Leaks are found from records and images alone: by a grid in its cells (`study.design.leaks`), by `medcg train` in its
training records (`train.run`). The settings `study.leaks` and `study.near_duplicates` decide what is done about them.
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

# Kind of leak -> its words in a message, surest kind first.
KINDS = {
    "same id": "the same id as",
    "same bytes": "the same image as",
    "same pixels": "the pixels of",
    "same question": "the question and the options of",
    "same group": "the patient or lesion (`group`) of",
    "near": "an image nearly that of",
    # By file names (`catalogue.group_of`), or by equal groups of two subsets without a `data-no`.
    "likely same group": "likely the patient or lesion of",
    "lineage": "a dataset in common with, or related to that of,",
}
# `study.leaks` -> the word for what is done.
ACTIONS = {"refuse": "refused", "drop": "dropped", "report": "reported"}
# A record with one of these needs no further leak.
EXACT = ("same id", "same bytes", "same pixels")


@dataclass(frozen=True)
class Leak:
    """A training record that gives a test record away.

    Attributes:
      kind: of `KINDS`. distance_bits: between the images' hashes, if near.
      form: of `duplicates.FORMS`: how a near image differs from the test's, such as "mirrored"; "": not changed.
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
    """Advice about a refused leak."""
    if leak.training.startswith(f"{SUBSET}/"):
        return "take it out of data.general_records, or train without it by study.leaks=drop"
    field = "near_duplicates" if leak.kind == "near" else "leaks"
    drop = "" if leak.kind == "same id" else f", or train without the first by study.{field}=drop"
    return f"take one of them out of the tree (`medcg data check` lists all){drop}"


def actions_of(study: StudyConfig) -> dict[str, str]:
    """Kind of leak -> what is done about it in the records of a training subset.

    A group that is only likely the same is never refused: nothing says that the tests of the released subsets are of
    other patients, so none of these subsets could be tested on.
    """
    act = ACTIONS[study.leaks]
    actions = dict.fromkeys(("same bytes", "same pixels", "same question", "same group"), act)
    actions["likely same group"] = "dropped" if act == "dropped" else "reported"
    # The same id is a fault of the grid's expansion; for a common lineage no record is to blame.
    return actions | {"same id": "refused", "near": ACTIONS.get(study.near_duplicates, ""), "lineage": "reported"}


def actions_of_general(study: StudyConfig) -> dict[str, str]:
    """The same for general records: these are no medical images, so one near a test image is a copy of it."""
    return actions_of(study) | {"near": ACTIONS[study.leaks]}


@dataclass(frozen=True)
class Hashed:
    """Records and the hashes of their images, in one order. images: None for a record without an image."""

    records: tuple[Record, ...]
    images: tuple[ImageHashes | None, ...]

    @property
    def data_numbers(self) -> frozenset[str]:
        return frozenset(record.data_no for record in self.records if record.data_no)


class NearImage(NamedTuple):
    """The nearest test image of a training image: distance, change, and index among the test records."""

    distance_bits: int
    form: str
    test_index: int


def hashed(records: RecordSet, decoded: dict[bytes, ImageHashes] | None = None) -> Hashed:
    """A set with the hashes of its images: those that `medcg data prepare` stored, else of the files, each read once.

    decoded: digest -> hashes. Images that have no stored hashes and are not in it are decoded and added to it. None:
      nothing is decoded, and images without stored hashes have the hash of their bytes alone.

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
        images[index] = (
            ImageHashes(digest, *pair) if (pair := stored[index]) else known.get(digest, ImageHashes(digest))
        )
    return Hashed(records.records, tuple(images))


def joined(sets: Iterable[Hashed]) -> Hashed:
    """Several sets as one."""
    sets = list(sets)
    return Hashed(
        tuple(record for item in sets for record in item.records),
        tuple(image for item in sets for image in item.images),
    )


def find_leaks(training: Hashed, test: Hashed, near_bits: int | None = None, *, questions: bool = False) -> list[Leak]:
    """The leaks of the training records: each record has one leak if its id or image is a test record's, else at most
    one by question, one by group, and one by its nearest test image.

    near_bits: bits of 256 in which the hashes of near images differ at most; None: near images are not looked for.
    questions: whether to compare questions. Questions of a medical subset differ by image alone, so this is for records
      outside of the study's subsets.
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
    """Index in training -> the nearest test image within `bits`."""
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
    """(text before the options, the options), independent of order, case and white space."""
    stem = []
    for line in record.turns[0].question.splitlines():
        if line.lstrip().startswith("A:"):
            break
        stem.append(line)
    return _plain(" ".join(stem)), frozenset(map(_plain, record.options))


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _same_groups(training: Hashed, test: Hashed) -> list[Leak]:
    """Records of one patient or lesion (`splits.group_key`): "same group" if both records state it and are of one
    data set or one subset, else "likely same group"."""
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
