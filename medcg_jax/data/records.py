"""Records of choice questions and of boxes, sets of them with images loaded on demand, and what a source offers."""

from __future__ import annotations

import hashlib
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

LETTERS = string.ascii_uppercase
# Options of a question, A to J: as many as the largest question banks have.
MAX_OPTIONS = 10

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")


class DataError(ValueError):
    """Data cannot be used; the message is one line that names the file or record and the reason."""


@dataclass(frozen=True)
class Subset:
    """All records of one modality, anatomical area and task. Counts are those a reader of the source gets."""

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
    turns: `box_questions.ask` gives its questions, a model's format the answers.

    Example:
      Record(id="04/train/17", subset="04",
             turns=(Turn("Grade the finding.\\nA: Benign\\nB: Malignant\\nAnswer with ...", "B"),),
             options=("Benign", "Malignant"), answer="B", image="med-mat/IQ/m (3).jpg", data_no="201")
    """

    id: str
    subset: str
    turns: tuple[Turn, ...]
    # Texts in letter order; () where the record is no choice question.
    options: tuple[str, ...] = ()
    answer: str = ""
    # Path below the source's root, or a key of the source's own; "" where there is no image.
    image: str = ""
    data_no: str = ""
    boxes: tuple[Box, ...] = ()
    # (height, width) in pixels of the image that the boxes lie in; (0, 0) where the record is no detection record.
    size_px: tuple[int, int] = (0, 0)
    # Patient or lesion that the image shows, which is trained on or tested on, never both; "": not known.
    group: str = ""

    @property
    def label(self) -> str:
        """The text of the right option; "" where the record is no choice question."""
        return self.options[LETTERS.index(self.answer)] if self.options else ""


class RecordSet:
    """Records with their images, in one order.

    Args:
      records: the records.
      images: uint8[N, h, w, 3], or a sequence that gives uint8[h, w, 3] for an index when asked (a decoder).
        What is asked of it for a record without an image is never looked at.
      masks: bool[K, h, w] per record, of what lies in each of its K boxes; None for a record, or for all, without.
    """

    def __init__(
        self,
        records: Iterable[Record],
        images: np.ndarray | Sequence[np.ndarray],
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
        return self.images[index]

    def image_digest(self, index: int) -> bytes:
        """sha256 of one record's image: of its file's bytes where it lies in a file, else of its pixels.

        Raises:
          DataError: the file cannot be read.
        """
        return _digest(self.images, index)

    def pixel_digest(self, index: int) -> bytes:
        """sha256 of the decoded pixels of one record's file, where it was kept with the image; else b""."""
        images, place = _origin(self.images, index)
        return images.pixel_digest(place) if hasattr(images, "pixel_digest") else b""

    def mask(self, index: int) -> np.ndarray | None:
        """bool[K, h, w] of one record's K boxes, or None."""
        return None if self.masks is None else self.masks[index]

    def select(self, indices: Iterable[int]) -> RecordSet:
        """The records at these places, in the order given."""
        indices = [int(i) for i in indices]
        masks = None if self.masks is None else [self.masks[i] for i in indices]
        return RecordSet([self.records[i] for i in indices], _pick([(self.images, i) for i in indices]), masks)


def concat(sets: Sequence[RecordSet]) -> RecordSet:
    """One set of all records, in the order of the sets."""
    records = [record for part in sets for record in part.records]
    has_masks = any(part.masks is not None for part in sets)
    masks = [part.mask(i) for part in sets for i in range(len(part))] if has_masks else None
    arrays = [part.images for part in sets if len(part)]
    if arrays and all(isinstance(a, np.ndarray) and a.shape[1:] == arrays[0].shape[1:] for a in arrays):
        return RecordSet(records, np.concatenate(arrays), masks)
    return RecordSet(records, _pick([(part.images, i) for part in sets for i in range(len(part))]), masks)


def empty_images() -> np.ndarray:
    return np.zeros((0, 1, 1, 3), np.uint8)


class _Picked(Sequence):
    """Images by reference into other sequences, so that choosing and joining sets decodes nothing."""

    def __init__(self, places: list[tuple[Sequence[np.ndarray], int]]):
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> np.ndarray:
        images, place = self._places[index]
        return images[place]


def _pick(places: list[tuple[Sequence[np.ndarray], int]]) -> np.ndarray | _Picked:
    """The images at these places: an array where all are of one array, references elsewhere."""
    if not places:
        return empty_images()
    first = places[0][0]
    if isinstance(first, np.ndarray) and all(images is first for images, _ in places):
        return first[[i for _, i in places]]
    # A place in a _Picked is replaced by what it points at: chains stay one step long.
    return _Picked([_origin(images, i) for images, i in places])


def _origin(images: Sequence[np.ndarray], index: int) -> tuple[Sequence[np.ndarray], int]:
    """The sequence that an image is of, and its place there, through references."""
    return images._places[index] if isinstance(images, _Picked) else (images, index)


def _digest(images: Sequence[np.ndarray], index: int) -> bytes:
    images, index = _origin(images, index)
    if hasattr(images, "file_digest"):
        return images.file_digest(index)
    pixels = np.ascontiguousarray(images[index])
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest()


class Source(Protocol):
    """Where records come from: the phantom world or a Med-MAT tree.

    Attributes:
      subsets: those of choice questions. detection_subsets: those whose records have boxes instead.
    """

    subsets: tuple[Subset, ...]
    detection_subsets: tuple[Subset, ...]

    def records(self, subset: str, split: Split) -> RecordSet:
        """The records of one subset and split, checked; the same ones at each call.

        Raises:
          DataError: no such subset, or a record is broken.
        """

    def fingerprint(self) -> str:
        """A digest of everything that the records of choice questions depend on."""

    def detection_fingerprint(self) -> str:
        """The same of the records with boxes."""
