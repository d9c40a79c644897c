"""What the phantom world is made of: modalities, areas, tasks, the triplets that exist as subsets, what is asked and
answered about them in the release's form of a choice question, and random numbers.

An image has objects in each of four quadrants; the objects of a quadrant are alike. The modality says which property of
the objects counts, the area in which quadrant, the task what the two values of a property are called. So the answer to
a question needs all three. Half of the 64 triplets are subsets. Every element occurs with every other one, and a subset
shares any two of its elements with exactly one other subset.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from medcg_jax.data.records import LETTERS, Turn

# Modality -> the property that counts, and what its values 0 and 1 are called.
PROPERTIES = {
    "shape": ("disc", "star"),
    "size": ("little", "large"),
    "light": ("dark", "bright"),
    "hue": ("warm", "cool"),
}
NUM_QUADRANTS = 4
MODALITIES = ("ct", "mri", "photo", "oct")
AREAS = ("brain", "liver", "skin", "eye")
# Task -> labels, of the values 0 and 1.
TASKS = {
    "state": ("normal", "abnormal"),
    "stage": ("early", "advanced"),
    "cancer": ("benign", "malignant"),
    "grade": ("mild", "severe"),
}


# The task of detection subsets.
DETECTION_TASK = "det"


class Triplet(NamedTuple):
    modality: str
    area: str
    task: str

    @property
    def name(self) -> str:
        """Such as "ct-liver-grade"."""
        return "-".join(self)

    @property
    def indices(self) -> tuple[int, int, int]:
        """Places in MODALITIES, AREAS and TASKS."""
        return MODALITIES.index(self.modality), AREAS.index(self.area), (*TASKS, DETECTION_TASK).index(self.task)


def _triplet(m: int, a: int, t: int) -> Triplet:
    return Triplet(MODALITIES[m], AREAS[a], list(TASKS)[t])


TRIPLETS = tuple(_triplet(m, a, t) for m in range(4) for a in range(4) for t in range(4) if (m + a + t) % 4 in (0, 1))

# Every recipe of the phantom study was chosen on the first four with data seeds of 100 and above; figures are
# reported on the others, with other seeds. Each element occurs twice in these.
TUNE_TARGETS = tuple(_triplet(*indices).name for indices in ((0, 1, 0), (1, 2, 2), (2, 0, 3), (3, 3, 3)))
REPORT_TARGETS = tuple(
    _triplet(*indices).name
    for indices in ((0, 0, 0), (0, 3, 1), (1, 1, 2), (1, 0, 3), (2, 2, 0), (2, 1, 1), (3, 3, 2), (3, 2, 3))
)

# An image's pose (a phase) falls in one of 16 sectors, an object's placement in its patch (4) and its amplitude (8
# bins) in one of 32 cells. A quarter of each is reserved for test images, spread over the whole range.
NUM_SECTORS, NUM_PLACEMENTS, NUM_BINS = 16, 4, 8


def sector_reserved(sector: np.ndarray) -> np.ndarray:
    """bool[...]: whether this sector of the pose occurs in test images alone."""
    return sector % 4 == 3


def cell_reserved(placement: np.ndarray, amplitude_bin: np.ndarray) -> np.ndarray:
    """bool[...]: whether this pair of placement and amplitude bin occurs in test images alone."""
    return (amplitude_bin - placement) % 4 == 3


SECTORS = {test: np.flatnonzero(sector_reserved(np.arange(NUM_SECTORS)) == test) for test in (False, True)}
_GRID = np.stack(np.meshgrid(np.arange(NUM_PLACEMENTS), np.arange(NUM_BINS), indexing="ij"), -1).reshape(-1, 2)
CELLS = {test: _GRID[cell_reserved(_GRID[:, 0], _GRID[:, 1]) == test] for test in (False, True)}

# A question names what counts, where, and what is asked. A base is asked in words of its own.
QUESTION = "{modality} {area} {task}?"
DESCRIBE = "Describe {quadrant}."
# Words of the pre-training alone: four for each property and quadrant, and pairs for the values 0 and 1. With one word
# each a base tells them apart by any difference, and a fine-tune on many subsets often finds no word that means a
# property: of 16 trainings on two such bases 8 did, with four words each all 16.
PROPERTY_NAMES = (
    ("shape", "form", "contour", "profile"),
    ("size", "extent", "diameter", "scale"),
    ("light", "shade", "brightness", "tone"),
    ("hue", "tint", "warmth", "paint"),
)
QUADRANT_NAMES = (
    ("northwest", "alpha", "spring", "dawn"),
    ("northeast", "beta", "summer", "noon"),
    ("southwest", "gamma", "autumn", "dusk"),
    ("southeast", "delta", "winter", "night"),
)
VALUE_WORDS = (
    ("low", "high"), ("no", "yes"), ("off", "on"), ("minus", "plus"), ("less", "more"), ("under", "over"),
    ("first", "second"), ("closed", "open"), ("weak", "strong"), ("few", "many"), ("old", "new"), ("soft", "hard"),
    ("slow", "fast"), ("narrow", "wide"), ("empty", "full"), ("never", "always"),
)  # fmt: skip


def choice(question: str, options: Sequence[str]) -> str:
    """The question with its options on lines of their own. The release's closing "Answer with the option's letter
    from the given choices directly." is left out: it would double the length of a row and say nothing new.

    Example: `choice("Which?", ("no", "yes")) == "Which?\\nA: no\\nB: yes"`.
    """
    return "\n".join([question, *(f"{letter}: {option}" for letter, option in zip(LETTERS, options))])


def choice_turn(question: str, options: Sequence[str], right: str) -> Turn:
    """The exchange whose answer is the letter of the right option."""
    return Turn(choice(question, options), LETTERS[options.index(right)])


def study_words() -> tuple[str, ...]:
    """The words that no base has read: modalities, areas, tasks and labels."""
    return (*MODALITIES, *AREAS, *TASKS, *(label for labels in TASKS.values() for label in labels))


def base_words() -> tuple[str, ...]:
    """The words that a base answers with, and those that it is asked with, beside the fillers of `pretraining`."""
    groups = (*PROPERTY_NAMES, *QUADRANT_NAMES, *PROPERTIES.values(), *VALUE_WORDS)
    return tuple(word for words in groups for word in words)


def ceiling(elements: Sequence[str], decoys: float = 1.0) -> float:
    """The accuracy that no one exceeds, on average, who knows these elements alone ("modality", "area", "task") of a test
    question, and nothing of the meaning of the others.

    Without the task the two labels cannot be told apart. Without the area or the modality, the best guess is the value
    that most of the four quadrants, of the four properties or of all 16 have, since the right one is any of them.

    Whoever knows in which quadrants three areas are can infer the fourth, and so with the modalities: such a reader may
    exceed it (an untrained word would have to be read so).

    decoys: the share of test images with decoys; in the others all values agree.
    """
    if "task" not in elements:
        return 0.5
    num = math.prod(4 for element in ("modality", "area") if element not in elements)
    best = sum(math.comb(num, k) * max(k, num - k) for k in range(num + 1)) / (num * 2**num)
    return decoys * best + (1 - decoys)


def words() -> list[str]:
    """Every text that a phantom's question, options, description or answer is made of."""
    return [QUESTION.format(modality="", area="", task=""), DESCRIBE.format(quadrant=""), *study_words(), *base_words()]


class Draws:
    """Random numbers that depend on (name, index, slot) alone: a record is the same whatever is drawn beside it.

    Args:
      name: names the stream, with everything it depends on, such as "seed 3/ct-liver-grade/test".
      index: int[N] places in the stream.
    """

    def __init__(self, name: str, index: np.ndarray):
        digest = hashlib.sha256(name.encode()).digest()
        self._row = _mix(np.asarray(index, np.uint64) + np.uint64(int.from_bytes(digest[:8], "little")))
        self._slot = 0

    def __len__(self) -> int:
        return len(self._row)

    def take(self, rows: np.ndarray, slot: int) -> Draws:
        """The draws of some rows, going on at `slot`: what one group uses does not move what others get."""
        part = object.__new__(Draws)
        part._row, part._slot = self._row[rows], slot
        return part

    def bits(self, *shape: int) -> np.ndarray:
        """uint64[N, *shape]"""
        size = int(np.prod(shape, dtype=int))
        slots = _mix(np.arange(self._slot, self._slot + size, dtype=np.uint64))
        self._slot += size
        return _mix(self._row[:, None] ^ slots).reshape(len(self), *shape)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> np.ndarray:
        """float32[N, *shape] in [low, high)"""
        part = (self.bits(*shape) >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)
        return np.float32(low) + np.float32(high - low) * part

    def integer(self, high: int, *shape: int) -> np.ndarray:
        """int64[N, *shape] in [0, high)"""
        return (self.bits(*shape) >> np.uint64(33)).astype(np.int64) * high >> 31

    def normal(self, *shape: int) -> np.ndarray:
        """float32[N, *shape] of mean 0 and variance 1: the sum of four uniform numbers, so within 3.5."""
        parts = self.bits(*shape).view(np.uint16).reshape(len(self), *shape, 4)
        return (parts.sum(-1, dtype=np.float32) * np.float32(2**-16) - 2) * np.float32(3**0.5)

    def order(self, num: int) -> np.ndarray:
        """int64[N, num]: a random order of 0 to num - 1 in each row."""
        return np.argsort(self.bits(num), axis=1, kind="stable")


def _mix(x: np.ndarray) -> np.ndarray:
    """uint64 to uint64, every bit of the result depending on every bit of x (the finaliser of SplitMix64)."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
