"""Whether two images are the same: by their files' bytes, by their pixels, or nearly, by a perceptual hash.

Near-duplicates are images saved again (JPEG, another format), resized, or a little brighter, darker or of other
contrast, and such of them as are mirrored, turned by quarters or inverted besides. Not covered: turns by other angles,
crops of more than about 1 %, frames around an image. Of one patient, frames a moment apart and adjacent slices are
often found too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy.fft import dctn
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from medcg_jax.data.images import ImageError, load_image, opened

# Of 256 bits. Measured on 5,612 medical images, 401 of them changed on purpose in each of 16 forms (8 orientations, as
# they are and inverted). In every form 100 % are found of those saved anew as JPEG 75 and 95, resized by 0.5 and 1.5 or
# of 5 % less contrast, 99.3 % or more of JPEG 50, 99.8 % brighter by 5 %, 92.5 % after half the size with JPEG 60.
# Among the 5,612, of 15.7 million pairs, 182 are near as they are, 69 mirrored, 41 mirrored top to bottom, 33 turned by
# 180, none in the 12 other forms. Of those 143 in another form 136 are of two datasets (brain tumours, LC25000); 7 are
# fundus photographs 11 bits or more apart, which are alike without being copies. No pair of these was looked at.
NEAR_BITS = 20
# Standard deviation of grey (0 to 255) in 64 x 64 pixels, below which an image is blank: its hash would be noise. The
# least of the 5,612 that shows anything has 5.6.
BLANK_SD = 2.0
_SIDE_PX = 64
KINDS = ("same bytes", "same pixels", "near")
# A hash has a bit for each of 16 x 16 frequencies.
HASH_BYTES, SIDE = 32, 16
# What may have been done to one image to make another: orientations, and each of them inverted (black made white).
ORIENTATIONS = (
    "", "mirrored", "mirrored top to bottom", "turned by 180", "mirrored along the diagonal", "turned right by 90",
    "turned left by 90", "mirrored along the other diagonal",
)  # fmt: skip
FORMS = (*ORIENTATIONS, *(f"{name} and inverted" if name else "inverted" for name in ORIENTATIONS))
# Beyond it half of all hashes would have to be compared in full.
MOST_BITS = 40
# The first frequency, that of the mean, has no sign: its bit is 0 in every hash.
_BITS, _FIRST_BITS = SIDE * SIDE - 1, 63
_BLOCK_ROWS, _BLOCK_COLUMNS = 32, 2048


class ImageHashes(NamedTuple):
    """What one image is recognised by.

    Attributes:
      file: sha256 of its file's bytes. pixels: of the decoded image; b"" where it was not decoded.
      perceptual: 32 bytes; b"" where it was not decoded, or is nearly uniform.
    """

    file: bytes
    pixels: bytes = b""
    perceptual: bytes = b""


def image_hashes(image: np.ndarray, file: bytes) -> ImageHashes:
    """Those of uint8[h, w, 3]. file: sha256 of its file's bytes."""
    return ImageHashes(file, pixel_digest(image), perceptual_hash(image))


def hash_file(path: str | Path, max_pixels: int) -> ImageHashes:
    """The hashes of an image file, of which nothing is kept in memory.

    Raises:
      ImageError: it cannot be read or decoded.
    """
    try:
        with opened(path) as file:
            digest = hashlib.file_digest(file, "sha256").digest()
            return image_hashes(load_image(file, max_pixels), digest)
    except (ImageError, OSError) as error:
        raise ImageError(f"image {str(path)!r}: {error}") from error


def pixel_digest(image: np.ndarray) -> bytes:
    """sha256 of the shape and the pixels of uint8[h, w, 3], as `RecordSet.image_digest` has it of images in memory."""
    pixels = np.ascontiguousarray(image)
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest()


def perceptual_hash(image: np.ndarray) -> bytes:
    """32 bytes of uint8[h, w, 3]: which of its 16 x 16 lowest frequencies are above 0; b"" of a blank image.

    The first bit, of the mean, is 0. A turned, mirrored or inverted image has the same bits in other places, or their
    opposite (`oriented`), since the others have a mean of nothing. Source: `imagehash.phash`, after Zauner,
    Implementation and Benchmarking of Perceptual Image Hash Functions (2010), with 0 in place of the median.
    """
    small = Image.fromarray(image).convert("L").resize((_SIDE_PX, _SIDE_PX), Image.Resampling.LANCZOS)
    grey = np.asarray(small, np.float64)
    if grey.std() < BLANK_SD:
        return b""
    above = dctn(grey)[:SIDE, :SIDE] > 0
    above[0, 0] = False
    return np.packbits(above).tobytes()


def hash_rows(images: Iterable[ImageHashes]) -> tuple[np.ndarray, np.ndarray]:
    """(int64[M], uint8[M, 32]): the places of those that have a perceptual hash, and these."""
    hashes = {index: image.perceptual for index, image in enumerate(images) if image.perceptual}
    rows = np.frombuffer(b"".join(hashes.values()), np.uint8).reshape(-1, HASH_BYTES)
    return np.fromiter(hashes, np.int64, len(hashes)), rows


class NearPairs(NamedTuple):
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
    pairs = near_pairs_between(hashes, hashes, bits, as_is=True)
    return np.stack([pairs.a, pairs.b], axis=1)[pairs.a < pairs.b]


def near_pairs_between(a: np.ndarray, b: np.ndarray, bits: int, *, as_is: bool = False) -> NearPairs:
    """Every place in `a` with a place in `b` whose hashes differ in at most `bits` bits in one of the `FORMS`.

    Every pair is compared: 100,000 hashes with 11,000 in all 16 forms in 30 to 45 s on one core (measured with 2,000).

    a, b: uint8[N, 32] and uint8[K, 32]; pairs within one of them are not looked for. bits: 0 to `MOST_BITS`.
    as_is: in the first form alone.
    """
    if not 0 <= bits <= MOST_BITS:
        raise ValueError(f"bits={bits}: 0 to {MOST_BITS} is accepted")
    columns = [np.zeros((4, 0), np.int64)]
    for form, other in enumerate(oriented(b)[: 1 if as_is else None]):
        columns += _near_blocks(_words(a), _words(other), bits, form, as_is)
    rows, others, apart, forms = np.concatenate(columns, axis=1)
    order = np.lexsort((forms, apart, others, rows))
    rows, others, apart, forms = (column[order] for column in (rows, others, apart, forms))
    first = np.ones(len(rows), bool)
    first[1:] = (rows[1:] != rows[:-1]) | (others[1:] != others[:-1])
    return NearPairs(*(column[first] for column in (rows, others, apart, forms)))


def oriented(hashes: np.ndarray) -> np.ndarray:
    """uint8[8, N, 32]: what uint8[N, 32] would be of the images in each of the `ORIENTATIONS`.

    Mirrored, every other frequency of an axis has the other sign; along the diagonal, the axes change places.
    """
    bits = np.unpackbits(hashes, axis=1).reshape(-1, SIDE, SIDE)
    odd = (np.arange(SIDE) % 2).astype(np.uint8)
    changed = []
    for turned in (bits, bits.transpose(0, 2, 1)):
        changed += [turned, turned ^ odd, turned ^ odd[:, None], turned ^ odd ^ odd[:, None]]
    return np.packbits(np.stack(changed).reshape(8, -1, SIDE * SIDE), axis=2)


def _near_blocks(a: np.ndarray, b: np.ndarray, bits: int, form: int, as_is: bool) -> list[np.ndarray]:
    """int64[4, M] each: the near ones of uint64[N, 4] and uint64[K, 4], as they are and inverted, a block at a time."""
    blocks = []
    for top in range(0, len(a), _BLOCK_ROWS):
        for left in range(0, len(b), _BLOCK_COLUMNS):
            rows, columns = a[top : top + _BLOCK_ROWS], b[left : left + _BLOCK_COLUMNS]
            # A quarter of the bits tells nearly all apart.
            few = np.bitwise_count(rows[:, None, 0] ^ columns[None, :, 0])
            near = few <= bits
            if not as_is:
                near |= few >= _FIRST_BITS - bits
            i, j = np.divmod(np.flatnonzero(near), len(columns))
            apart = np.bitwise_count(rows[i] ^ columns[j]).sum(1, dtype=np.int64)
            inverted = (apart > _BITS // 2) & (not as_is)
            apart = np.where(inverted, _BITS - apart, apart)
            forms = form + len(ORIENTATIONS) * inverted
            blocks.append(np.stack([i + top, j + left, apart, forms])[:, apart <= bits])
    return blocks


def _words(hashes: np.ndarray) -> np.ndarray:
    """uint64[N, 4] of uint8[N, 32]."""
    return np.ascontiguousarray(hashes, np.uint8).reshape(-1, HASH_BYTES).view(np.uint64)


@dataclass(frozen=True)
class Group:
    """Images that are the same, through each other.

    Attributes:
      kind: of `KINDS`, the weakest that it takes to hold them together. members: their places, rising.
    """

    kind: str
    members: tuple[int, ...]


def groups(images: Sequence[ImageHashes], bits: int = NEAR_BITS) -> list[Group]:
    """Every group of two images or more, by first member: the connected components of equal and near images."""
    indices, hashes = hash_rows(images)
    # One image of each hash is held against the others: copies are tied to it.
    distinct, first, owner = np.unique(hashes.view(f"V{HASH_BYTES}")[:, 0], return_index=True, return_inverse=True)
    near = first[near_pairs(hashes[first], bits)] if len(distinct) else np.zeros((0, 2), np.int64)
    same_hash = np.stack([first[owner], np.arange(len(indices))], axis=1)
    ties = [_ties(image.file for image in images), _ties(image.pixels for image in images)]
    ties.append(indices[np.concatenate([near, same_hash])])
    components = [_components(len(images), ties[: kind + 1]) for kind in range(len(KINDS))]
    members: dict[int, list[int]] = {}
    for index, component in enumerate(components[-1]):
        members.setdefault(component, []).append(index)
    # The first kind whose ties hold a group together.
    return [
        Group(next(kind for kind, of in zip(KINDS, components) if len(set(of[indices])) == 1), tuple(indices))
        for indices in members.values()
        if len(indices) > 1
    ]


def _ties(digests: Iterable[bytes]) -> np.ndarray:
    """int64[M, 2]: each place with the first of its digest; an empty digest ties nothing."""
    first: dict[bytes, int] = {}
    ties = [(first.setdefault(digest, index), index) for index, digest in enumerate(digests) if digest]
    return np.array(ties, np.int64).reshape(-1, 2)


def _components(number: int, ties: Sequence[np.ndarray]) -> np.ndarray:
    """int[number]: which component each place is of."""
    a, b = np.concatenate(ties).T
    graph = coo_array((np.ones(len(a), bool), (a, b)), shape=(number, number))
    return connected_components(graph, directed=False)[1]
