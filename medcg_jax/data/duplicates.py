"""Whether two images are the same: by their files' bytes, by their pixels, or nearly, by a perceptual hash.

Near-duplicates are images that were saved again (JPEG, another format), resized, or changed a little in brightness or
contrast; they may also be mirrored, turned by quarters or inverted. Not covered: turns by other angles, crops of more
than about 1 %, frames around an image. Frames of one patient a moment apart and adjacent slices are often near too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from medcg_jax.data.images import ImageError, load_image, opened

# Of 256 bits. Measured on 5,612 medical images, of which 401 were changed in each of 16 forms (8 orientations, each also
# inverted). In every form the search finds 100 % of JPEG 75 and 95, of sizes 0.5 and 1.5 and of 5 % less contrast, 99.3 %
# or more of JPEG 50, 99.8 % of 5 % more brightness, 92.5 % of half the size with JPEG 60. Of the 15.7 million unchanged
# pairs 182 are near as they are, 69 mirrored, 41 mirrored top to bottom, 33 turned by 180, none in the 12 other forms. Of
# the 143 in another form 136 are of two datasets (brain tumours, LC25000); 7 are fundus photographs 11 bits or more
# apart, which are alike without being copies. Nobody inspected these pairs.
NEAR_BITS = 20
# An image whose greys (0 to 255, 64 x 64 pixels) have a lower standard deviation is blank: its hash would be noise. The
# lowest among the 5,612 images that show anything is 5.6.
BLANK_SD = 2.0
_SIDE_PX = 64
KINDS = ("same bytes", "same pixels", "near")
# A hash has a bit for each of 16 x 16 frequencies.
HASH_BYTES, SIDE = 32, 16
# How one image may have been made from another: eight orientations, each also inverted (black made white).
ORIENTATIONS = (
    "", "mirrored", "mirrored top to bottom", "turned by 180", "mirrored along the diagonal", "turned right by 90",
    "turned left by 90", "mirrored along the other diagonal",
)  # fmt: skip
FORMS = (*ORIENTATIONS, *(f"{name} and inverted" if name else "inverted" for name in ORIENTATIONS))
# With more bits, half of all hashes would have to be compared in full.
MOST_BITS = 40
# The first frequency, that of the mean, has no sign: its bit is 0 in every hash.
_BITS, _FIRST_BITS = SIDE * SIDE - 1, 63
_BLOCK_ROWS, _BLOCK_COLUMNS = 32, 2048


class ImageHashes(NamedTuple):
    """The digests and the perceptual hash of one image.

    Attributes:
      file: sha256 of its file's bytes. pixels: of the decoded image; b"" where it was not decoded.
      perceptual: 32 bytes; b"" where it was not decoded, or is nearly uniform.
    """

    file: bytes
    pixels: bytes = b""
    perceptual: bytes = b""


def image_hashes(image: np.ndarray, file: bytes) -> ImageHashes:
    """The hashes of uint8[h, w, 3]. file: sha256 of the file's bytes."""
    return ImageHashes(file, pixel_digest(image), perceptual_hash(image))


def hash_file(path: str | Path, max_pixels: int) -> ImageHashes:
    """The hashes of an image file.

    Raises:
      ImageError: the file cannot be read or decoded.
    """
    try:
        with opened(path) as file:
            digest = hashlib.file_digest(file, "sha256").digest()
            return image_hashes(load_image(file, max_pixels), digest)
    except (ImageError, OSError) as error:
        raise ImageError(f"image {str(path)!r}: {error}") from error


def pixel_digest(image: np.ndarray) -> bytes:
    """sha256 of the shape and the pixels of uint8[h, w, 3], the same as `RecordSet.image_digest` of an array."""
    pixels = np.ascontiguousarray(image)
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest()


def perceptual_hash(image: np.ndarray) -> bytes:
    """32 bytes of uint8[h, w, 3]: which of its 16 x 16 lowest frequencies are above 0; b"" for a blank image.

    The first bit, of the mean, is 0. Turning, mirroring or inverting an image permutes or flips its other bits
    (`oriented`). Source: `imagehash.phash`, after Zauner, Implementation and Benchmarking of Perceptual Image Hash
    Functions (2010), with 0 in place of the median.
    """
    from scipy.fft import dctn  # most runs hash no image, and start half a second faster without it

    small = Image.fromarray(image).convert("L").resize((_SIDE_PX, _SIDE_PX), Image.Resampling.LANCZOS)
    grey = np.asarray(small, np.float64)
    if grey.std() < BLANK_SD:
        return b""
    above = dctn(grey)[:SIDE, :SIDE] > 0
    above[0, 0] = False
    return np.packbits(above).tobytes()


def hash_rows(images: Iterable[ImageHashes]) -> tuple[np.ndarray, np.ndarray]:
    """(int64[M], uint8[M, 32]): the indices of the images that have a perceptual hash, and those hashes."""
    hashes = {index: image.perceptual for index, image in enumerate(images) if image.perceptual}
    rows = np.frombuffer(b"".join(hashes.values()), np.uint8).reshape(-1, HASH_BYTES)
    return np.fromiter(hashes, np.int64, len(hashes)), rows


class NearPairs(NamedTuple):
    """Pairs as int64[M] each, sorted by `a` and `b`: two indices, the bits that differ, and an index into `FORMS`.

    `form` is what turns image `b` into image `a`: the nearest form, the first of equally near ones.
    """

    a: np.ndarray
    b: np.ndarray
    bits: np.ndarray
    form: np.ndarray


def near_pairs(hashes: np.ndarray, bits: int) -> np.ndarray:
    """int64[M, 2], sorted: every pair of indices i < j whose hashes differ in at most `bits` bits as they are.

    hashes: uint8[N, 32]. bits: 0 to `MOST_BITS`.
    """
    pairs = near_pairs_between(hashes, hashes, bits, as_is=True)
    return np.stack([pairs.a, pairs.b], axis=1)[pairs.a < pairs.b]


def near_pairs_between(a: np.ndarray, b: np.ndarray, bits: int, *, as_is: bool = False) -> NearPairs:
    """Every pair of a hash of `a` and a hash of `b` that differ in at most `bits` bits in one of the `FORMS`.

    Every pair is compared: 100,000 hashes with 11,000 in all 16 forms in 30 to 45 s on one core (measured with 2,000).

    a, b: uint8[N, 32] and uint8[K, 32]. bits: 0 to `MOST_BITS`. as_is: compares the first form only.
    """
    if not 0 <= bits <= MOST_BITS:
        raise ValueError(f"bits={bits}: expected 0 to {MOST_BITS}")
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
    """uint8[8, N, 32]: what the hashes uint8[N, 32] become when the images are put in each of the `ORIENTATIONS`.

    Mirroring flips the sign of every other frequency of an axis; mirroring along the diagonal swaps the axes.
    """
    bits = np.unpackbits(hashes, axis=1).reshape(-1, SIDE, SIDE)
    odd = (np.arange(SIDE) % 2).astype(np.uint8)
    changed = []
    for turned in (bits, bits.transpose(0, 2, 1)):
        changed += [turned, turned ^ odd, turned ^ odd[:, None], turned ^ odd ^ odd[:, None]]
    return np.packbits(np.stack(changed).reshape(8, -1, SIDE * SIDE), axis=2)


def _near_blocks(a: np.ndarray, b: np.ndarray, bits: int, form: int, as_is: bool) -> list[np.ndarray]:
    """int64[4, M] per block: the near pairs of uint64[N, 4] and uint64[K, 4], as they are and inverted."""
    blocks = []
    for top in range(0, len(a), _BLOCK_ROWS):
        for left in range(0, len(b), _BLOCK_COLUMNS):
            rows, columns = a[top : top + _BLOCK_ROWS], b[left : left + _BLOCK_COLUMNS]
            # A quarter of the bits rules out nearly all pairs.
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
    """Images that are linked as the same, directly or through others.

    Attributes:
      kind: of `KINDS`, the weakest link that the group needs. members: indices of its images, rising.
    """

    kind: str
    members: tuple[int, ...]


def groups(images: Sequence[ImageHashes], bits: int = NEAR_BITS) -> list[Group]:
    """Every group of two images or more, by first member: the connected components of equal and near images."""
    indices, hashes = hash_rows(images)
    # Only one image of each hash is compared with the others; its copies are tied to it.
    distinct, first, owner = np.unique(hashes.view(f"V{HASH_BYTES}")[:, 0], return_index=True, return_inverse=True)
    near = first[near_pairs(hashes[first], bits)] if len(distinct) else np.zeros((0, 2), np.int64)
    same_hash = np.stack([first[owner], np.arange(len(indices))], axis=1)
    ties = [_ties(image.file for image in images), _ties(image.pixels for image in images)]
    ties.append(indices[np.concatenate([near, same_hash])])
    components = [_components(len(images), ties[: kind + 1]) for kind in range(len(KINDS))]
    members: dict[int, list[int]] = {}
    for index, component in enumerate(components[-1]):
        members.setdefault(component, []).append(index)
    return [
        Group(next(kind for kind, of in zip(KINDS, components) if len(set(of[indices])) == 1), tuple(indices))
        for indices in members.values()
        if len(indices) > 1
    ]


def _ties(digests: Iterable[bytes]) -> np.ndarray:
    """int64[M, 2]: each index with the first index of the same digest; an empty digest ties nothing."""
    first: dict[bytes, int] = {}
    ties = [(first.setdefault(digest, index), index) for index, digest in enumerate(digests) if digest]
    return np.array(ties, np.int64).reshape(-1, 2)


def _components(number: int, ties: Sequence[np.ndarray]) -> np.ndarray:
    """int[number]: the connected component of each index."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    a, b = np.concatenate(ties).T
    graph = coo_array((np.ones(len(a), bool), (a, b)), shape=(number, number))
    return connected_components(graph, directed=False)[1]
