"""All pairs of near 256-bit hashes of images, as they are, mirrored, turned and inverted: every one is compared.

A hash is that of `duplicates.perceptual_hash`: a bit for each of 16 x 16 frequencies, whose places and signs say what
the hash of the turned image is. All 16 forms of 100,000 training and
11,000 test images take 30 to 45 s on one core (measured with 2,000 test images).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

HASH_BYTES = 32
SIDE = 16
# What may have been done to one image to make another: orientations, and each of them inverted (black made white).
ORIENTATIONS = (
    "", "mirrored", "mirrored top to bottom", "turned by 180", "mirrored along the diagonal", "turned right by 90",
    "turned left by 90", "mirrored along the other diagonal",
)  # fmt: skip
FORMS = (*ORIENTATIONS, *(f"{name} and inverted" if name else "inverted" for name in ORIENTATIONS))
# Beyond it half of all hashes would have to be compared in full.
MOST_BITS = 40
# The first frequency, that of the mean, has no sign: its bit is 0 in every hash.
_BITS = SIDE * SIDE - 1
_FIRST_BITS = 63
_BLOCK_ROWS, _BLOCK_COLUMNS = 32, 2048


class Near(NamedTuple):
    """Pairs, int64[M] each, sorted by `a` and `b`: their places, the bits in which they differ, the place in `FORMS`.

    `form` says what, done to the image at `b`, gives that at `a` (nearest form; of equally near ones the first).
    """

    a: np.ndarray
    b: np.ndarray
    bits: np.ndarray
    form: np.ndarray


def near_pairs(hashes: np.ndarray, bits: int) -> np.ndarray:
    """int64[M, 2]: every two places i < j whose hashes differ in at most `bits` bits as they are, sorted.

    hashes: uint8[N, 32]. bits: 0 to `MOST_BITS`.
    """
    found = near_pairs_between(hashes, hashes, bits, as_is=True)
    return np.stack([found.a, found.b], axis=1)[found.a < found.b]


def near_pairs_between(a: np.ndarray, b: np.ndarray, bits: int, *, as_is: bool = False) -> Near:
    """Every place in `a` with a place in `b` whose hashes differ in at most `bits` bits in one of the `FORMS`.

    a, b: uint8[N, 32] and uint8[K, 32]; pairs within one of them are not looked for. bits: 0 to `MOST_BITS`.
    as_is: in the first form alone.
    """
    if not 0 <= bits <= MOST_BITS:
        raise ValueError(f"bits={bits}: 0 to {MOST_BITS} is accepted")
    found = [np.zeros((4, 0), np.int64)]
    for form, other in enumerate(oriented(b)[: 1 if as_is else None]):
        found += _near(_words(a), _words(other), bits, form, as_is)
    rows, columns, apart, forms = np.concatenate(found, axis=1)
    order = np.lexsort((forms, apart, columns, rows))
    rows, columns, apart, forms = (part[order] for part in (rows, columns, apart, forms))
    first = np.ones(len(rows), bool)
    first[1:] = (rows[1:] != rows[:-1]) | (columns[1:] != columns[:-1])
    return Near(*(part[first] for part in (rows, columns, apart, forms)))


def oriented(hashes: np.ndarray) -> np.ndarray:
    """uint8[8, N, 32]: what uint8[N, 32] would be of the images in each of the `ORIENTATIONS`.

    Mirrored, every other frequency of an axis has the other sign; along the diagonal, the axes change places.
    """
    bits = np.unpackbits(hashes, axis=1).reshape(-1, SIDE, SIDE)
    odd = (np.arange(SIDE) % 2).astype(np.uint8)
    found = []
    for one in (bits, bits.transpose(0, 2, 1)):
        found += [one, one ^ odd, one ^ odd[:, None], one ^ odd ^ odd[:, None]]
    return np.packbits(np.stack(found).reshape(8, -1, SIDE * SIDE), axis=2)


def _near(a: np.ndarray, b: np.ndarray, bits: int, form: int, as_is: bool) -> list[np.ndarray]:
    """int64[4, M] each: the near ones of uint64[N, 4] and uint64[K, 4], as they are and inverted, a block at a time."""
    found = []
    differ, few = np.empty((_BLOCK_ROWS, _BLOCK_COLUMNS), np.uint64), np.empty((_BLOCK_ROWS, _BLOCK_COLUMNS), np.uint8)
    # A quarter of the bits tells nearly all apart; those from here on, so many of them, are far in both forms.
    start = bits + 1
    far = 255 - bits if as_is else max(0, _FIRST_BITS - 2 * bits - 1)
    for top in range(0, len(a), _BLOCK_ROWS):
        for left in range(0, len(b), _BLOCK_COLUMNS):
            rows, columns = a[top : top + _BLOCK_ROWS], b[left : left + _BLOCK_COLUMNS]
            block = slice(len(rows)), slice(len(columns))
            np.bitwise_xor(rows[:, None, 0], columns[None, :, 0], out=differ[block])
            np.bitwise_count(differ[block], out=few[block])
            # What is below `start` wraps round to the greatest numbers.
            np.subtract(few[block], start, out=few[block])
            i, j = np.divmod(np.flatnonzero(few[block] >= far), len(columns))
            apart = np.bitwise_count(rows[i] ^ columns[j]).sum(1, dtype=np.int64)
            inverted = (apart > _BITS // 2) & (not as_is)
            apart = np.where(inverted, _BITS - apart, apart)
            kept = apart <= bits
            forms = form + len(ORIENTATIONS) * inverted
            found.append(np.stack([i + top, j + left, apart, forms])[:, kept])
    return found


def _words(hashes: np.ndarray) -> np.ndarray:
    """uint64[N, 4] of uint8[N, 32]."""
    return np.ascontiguousarray(hashes, np.uint8).reshape(-1, HASH_BYTES).view(np.uint64)
