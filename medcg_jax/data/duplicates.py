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

from medcg_jax.data.hamming import HASH_BYTES, SIDE, near_pairs
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


class Print(NamedTuple):
    """What one image is recognised by.

    Attributes:
      file: sha256 of its file's bytes. pixels: of the decoded image; b"" where it was not decoded.
      perceptual: 32 bytes; b"" where it was not decoded, or is nearly uniform.
    """

    file: bytes
    pixels: bytes = b""
    perceptual: bytes = b""


def print_of(image: np.ndarray, file: bytes) -> Print:
    """The print of uint8[h, w, 3]. file: sha256 of its file's bytes."""
    return Print(file, pixel_digest(image), perceptual_hash(image))


def print_file(path: str | Path, max_pixels: int) -> Print:
    """The print of an image file, of which nothing is kept in memory.

    Raises:
      ImageError: it cannot be read or decoded.
    """
    try:
        with opened(path) as file:
            digest = hashlib.file_digest(file, "sha256").digest()
            return print_of(load_image(file, max_pixels), digest)
    except (ImageError, OSError) as error:
        raise ImageError(f"image {str(path)!r}: {error}") from error


def pixel_digest(image: np.ndarray) -> bytes:
    """sha256 of the shape and the pixels of uint8[h, w, 3], as `RecordSet.image_digest` has it of images in memory."""
    pixels = np.ascontiguousarray(image)
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest()


def perceptual_hash(image: np.ndarray) -> bytes:
    """32 bytes of uint8[h, w, 3]: which of its 16 x 16 lowest frequencies are above 0; b"" of a blank image.

    The first bit, of the mean, is 0. A turned, mirrored or inverted image has the same bits in other places, or their
    opposite (`hamming.oriented`), since the others have a mean of nothing. Source: `imagehash.phash`, after Zauner,
    Implementation and Benchmarking of Perceptual Image Hash Functions (2010), with 0 in place of the median.
    """
    small = Image.fromarray(image).convert("L").resize((_SIDE_PX, _SIDE_PX), Image.Resampling.LANCZOS)
    grey = np.asarray(small, np.float64)
    if grey.std() < BLANK_SD:
        return b""
    above = dctn(grey)[:SIDE, :SIDE] > 0
    above[0, 0] = False
    return np.packbits(above).tobytes()


def hash_rows(prints: Iterable[Print]) -> tuple[np.ndarray, np.ndarray]:
    """(int64[M], uint8[M, 32]): the places of those that have a perceptual hash, and these."""
    found = [(place, own.perceptual) for place, own in enumerate(prints) if own.perceptual]
    places = np.array([place for place, _ in found], np.int64)
    return places, np.frombuffer(b"".join(own for _, own in found), np.uint8).reshape(-1, HASH_BYTES)


@dataclass(frozen=True)
class Group:
    """Images that are the same, through each other.

    Attributes:
      kind: of `KINDS`, the weakest that it takes to hold them together. members: their places, rising.
    """

    kind: str
    members: tuple[int, ...]


def groups(prints: Sequence[Print], bits: int = NEAR_BITS) -> list[Group]:
    """Every group of two images or more, by first member: the connected components of equal and near images."""
    places, hashes = hash_rows(prints)
    # One image of each hash is held against the others: copies are tied to it.
    distinct, first, owner = np.unique(hashes.view(f"V{HASH_BYTES}")[:, 0], return_index=True, return_inverse=True)
    near = first[near_pairs(hashes[first], bits)] if len(distinct) else np.zeros((0, 2), np.int64)
    same_hash = np.stack([first[owner], np.arange(len(places))], axis=1)
    ties = [_ties(own.file for own in prints), _ties(own.pixels for own in prints)]
    ties.append(places[np.concatenate([near, same_hash])])
    files, pixels, whole = (_components(len(prints), ties[: i + 1]) for i in range(3))
    found: dict[int, list[int]] = {}
    for place, component in enumerate(whole):
        found.setdefault(component, []).append(place)
    made = []
    for members in found.values():
        if len(members) > 1:
            level = next(i for i, own in enumerate((files, pixels, whole)) if len(set(own[members])) == 1)
            made.append(Group(KINDS[level], tuple(members)))
    return made


def _ties(digests: Iterable[bytes]) -> np.ndarray:
    """int64[M, 2]: each place with the first of its digest; an empty digest ties nothing."""
    first: dict[bytes, int] = {}
    found = [(first.setdefault(digest, place), place) for place, digest in enumerate(digests) if digest]
    return np.array(found, np.int64).reshape(-1, 2)


def _components(number: int, ties: Sequence[np.ndarray]) -> np.ndarray:
    """int[number]: which component each place is of."""
    a, b = np.concatenate(ties).T
    graph = coo_array((np.ones(len(a), bool), (a, b)), shape=(number, number))
    return connected_components(graph, directed=False)[1]
