"""Records of choice questions and of boxes, sets of records with images loaded on demand, and the Source protocol."""

from __future__ import annotations

import hashlib
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

LETTERS = string.ascii_uppercase
# A to J, as many options as the largest question banks have.
MAX_OPTIONS = 10

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")


class DataError(ValueError):
    """Data that cannot be used; the message is one line that names the file or record and the reason."""


@dataclass(frozen=True)
class Subset:
    """All records of one modality, anatomical area and task. Counts are after the source's caps."""

    name: str
    modality: str
    area: str
    task: str
    labels: tuple[str, ...] = ()
    num_train: int = 0
    num_test: int = 0


@dataclass(frozen=True)
class Turn:
    """One exchange: the text after `USER:` and the text after `ASSISTANT:`."""

    question: str
    answer: str


@dataclass(frozen=True)
class Box:
    """A labelled box in pixels of the stored image, upright: 0 <= x1 < x2 <= width, 0 <= y1 < y2 <= height.

    Corners lie between pixels: the pixel at the top left alone is (0, 0, 1, 1).
    """

    label: str
    x1: float
    y1: float
    x2: float
    y2: float

    @property
    def corners(self) -> tuple[float, float, float, float]:
        """(x1, y1, x2, y2)"""
        return self.x1, self.y1, self.x2, self.y2


@dataclass(frozen=True)
class Record:
    """One example. A choice record has a single turn, whose answer is the letter; a detection record has boxes and no
    turns: `boxes.ask` gives its questions, a model's format the answers.

    Example:
      Record(id="04/train/17", subset="04",
             turns=(Turn("Grade the finding.\\nA: Benign\\nB: Malignant\\nAnswer with ...", "B"),),
             options=("Benign", "Malignant"), answer="B", image="med-mat/IQ/m (3).jpg", data_no="201")
    """

    id: str
    subset: str
    turns: tuple[Turn, ...]
    # Texts in letter order; () for a detection record.
    options: tuple[str, ...] = ()
    answer: str = ""
    # Path below the source's root, or a key that only the source understands; "" without an image.
    image: str = ""
    data_no: str = ""
    boxes: tuple[Box, ...] = ()
    # (height, width) in pixels of the image that the boxes lie in; (0, 0) for a choice record.
    size_px: tuple[int, int] = (0, 0)
    # Patient or lesion that the image shows, "" if unknown; a group is never in both training and test.
    group: str = ""

    @property
    def label(self) -> str:
        """The text of the right option; "" for a detection record."""
        return self.options[LETTERS.index(self.answer)] if self.options else ""


class StoredImage(Protocol):
    """An image that only `pixels` decodes."""

    def pixels(self) -> np.ndarray:
        """uint8[h, w, 3]. Raises DataError where it cannot be decoded."""

    def size(self) -> tuple[int, int]:
        """(height, width) of `pixels`, from the file's header. Raises DataError."""

    def file_digest(self) -> bytes:
        """sha256 of the bytes of the image's file. Raises DataError."""

    def kept_hashes(self) -> tuple[bytes, bytes] | None:
        """(sha256 of the file's decoded pixels, their `duplicates.perceptual_hash`) where `medcg data prepare` stored
        them; else None."""


class RecordSet:
    """Records with their images, in one order.

    Args:
      records: the records.
      images: uint8[h, w, 3] or a `StoredImage` for each record, or uint8[N, h, w, 3]. The entry of a record without an
        image is never used.
      masks: per record bool[K, h, w], a mask for each of its K boxes, or None; None where no record has masks.
    """

    def __init__(
        self,
        records: Iterable[Record],
        images: np.ndarray | Sequence[np.ndarray | StoredImage],
        masks: Sequence[np.ndarray | None] | None = None,
    ):
        self.records = tuple(records)
        self.images = images
        self.masks = masks
        if len(images) != len(self.records):
            raise ValueError(f"{len(self.records)} records with {len(images)} images")
        if masks is not None and len(masks) != len(self.records):
            raise ValueError(f"{len(self.records)} records with {len(masks)} masks")

    def __len__(self) -> int:
        return len(self.records)

    def image(self, index: int) -> np.ndarray:
        """uint8[h, w, 3] of one record."""
        image = self.images[index]
        return image if isinstance(image, np.ndarray) else image.pixels()

    def image_size(self, index: int) -> tuple[int, int]:
        """(height, width) in pixels of one record's image, without decoding it."""
        image = self.images[index]
        return image.shape[:2] if isinstance(image, np.ndarray) else image.size()

    def image_digest(self, index: int) -> bytes:
        """sha256 of one record's image: of the file's bytes where there is a file, else of the pixels.

        Raises:
          DataError: the file cannot be read.
        """
        image = self.images[index]
        if not isinstance(image, np.ndarray):
            return image.file_digest()
        return hashlib.sha256(repr(image.shape).encode() + np.ascontiguousarray(image).tobytes()).digest()

    def kept_hashes(self, index: int) -> tuple[bytes, bytes] | None:
        """As `StoredImage.kept_hashes`; None for an image in memory."""
        image = self.images[index]
        return None if isinstance(image, np.ndarray) else image.kept_hashes()

    def mask(self, index: int) -> np.ndarray | None:
        """bool[K, h, w] of one record's K boxes, or None."""
        return None if self.masks is None else self.masks[index]

    def select(self, indices: Iterable[int]) -> RecordSet:
        """The records at these indices, in the order given; decodes and copies no image."""
        indices = [int(i) for i in indices]
        masks = None if self.masks is None else [self.masks[i] for i in indices]
        return RecordSet([self.records[i] for i in indices], [self.images[i] for i in indices], masks)


def concat(sets: Sequence[RecordSet]) -> RecordSet:
    """One set of all records, in the order of the sets; decodes and copies no image."""
    records = [record for record_set in sets for record in record_set.records]
    has_masks = any(record_set.masks is not None for record_set in sets)
    masks = [record_set.mask(i) for record_set in sets for i in range(len(record_set))] if has_masks else None
    return RecordSet(records, [image for record_set in sets for image in record_set.images], masks)


class Source(Protocol):
    """Where records come from: the phantom world or a Med-MAT tree.

    Attributes:
      subsets: subsets of choice questions. detection_subsets: subsets whose records have boxes instead.
    """

    subsets: tuple[Subset, ...]

    @property
    def detection_subsets(self) -> tuple[Subset, ...]: ...

    def records(self, subset: str, split: Split) -> RecordSet:
        """The checked records of one subset and split; every call gives the same.

        Raises:
          DataError: the subset does not exist, or a record is broken.
        """

    def fingerprint(self) -> str:
        """A digest of everything that the records of choice questions depend on."""

    def detection_fingerprint(self) -> str:
        """The same for the records with boxes."""
