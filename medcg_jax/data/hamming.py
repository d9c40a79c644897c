"""All pairs of 256-bit hashes that differ in few bits, by bands of bits: exact, and near linear where hashes spread.

The bits are dealt into `bits + AGREE` bands. Two hashes that differ in at most `bits` bits differ in at most so many
bands, so they agree in `AGREE` bands or more (the pigeonhole principle). Hashes are sorted by one band; a bucket of
more than `CROWDED` is sorted by a second band too, and what is still crowded by a third, wherever that seems to leave
less to compare. Every bucket is then compared member by member, however large it is: no pair is lost, and each is found
once.

Time is near linear where few agree in three bands. Of hashes that do (a thousand frames of one still scene) it grows
with the square of their number, and so may the number of pairs found; equal hashes cost nothing, they count as one.
"""

from __future__ import annotations

import numpy as np

HASH_BYTES = 32
# Bands in which two near hashes agree at least, and so levels of sorting.
AGREE = 3
# Members that a bucket may have before it is sorted by a further band: so many are compared as fast as they are sorted.
CROWDED = 256
# More than this leaves bands of less than six bits, in which many hashes agree by chance.
MOST_BITS = 40
# Bits of a band that are sorted by; of wider ones the rest is left to the comparison.
_KEY_BITS = 32
_CHUNK_ROWS = 65536


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """int64[M]: the number of bits in which each row of uint8[M, 32] differs from the same row of the other."""
    return np.bitwise_count(_words(a) ^ _words(b)).sum(1, dtype=np.int64)


def near_pairs(hashes: np.ndarray, bits: int) -> np.ndarray:
    """int64[M, 2]: every two places i < j whose hashes differ in at most `bits` bits, sorted.

    hashes: uint8[N, 32]. bits: 0 to `MOST_BITS`.
    """
    return _near(_words(hashes), np.ones(len(hashes), np.uint8), 1, bits)


def near_pairs_between(a: np.ndarray, b: np.ndarray, bits: int) -> np.ndarray:
    """int64[M, 2]: every place in `a` with a place in `b` whose hashes differ in at most `bits` bits, sorted.

    a, b: uint8[N, 32] and uint8[K, 32]; pairs within one of them are not looked for.
    """
    sides = np.repeat(np.array([1, 2], np.uint8), [len(a), len(b)])
    return _near(np.concatenate([_words(a), _words(b)]), sides, 3, bits) - [0, len(a)]


def _words(hashes: np.ndarray) -> np.ndarray:
    """uint64[N, 4] of uint8[N, 32]."""
    return np.ascontiguousarray(hashes, np.uint8).reshape(-1, HASH_BYTES).view(np.uint64)


def _near(words: np.ndarray, sides: np.ndarray, wanted: int, bits: int) -> np.ndarray:
    """The pairs of places whose sides together are `wanted` (1: of one side, 3: of sides 1 and 2); equal hashes are
    searched for once."""
    if not 0 <= bits <= MOST_BITS:
        raise ValueError(f"bits={bits}: 0 to {MOST_BITS} is accepted")
    if not len(words):
        return np.zeros((0, 2), np.int64)
    order = np.lexsort(words.T)
    starts = np.ones(len(words), bool)
    starts[1:] = (words[order[1:]] != words[order[:-1]]).any(1)
    first = np.flatnonzero(starts)
    both = np.bitwise_or.reduceat(sides[order], first)
    own = np.arange(len(first)).repeat(2).reshape(-1, 2)
    pairs = np.concatenate([own, _Search(words[order[first]], both, wanted, bits).pairs()])
    owner = np.empty(len(words), np.int64)
    owner[order] = np.cumsum(starts) - 1
    if wanted == 3:
        left, right = _Members(owner, sides == 1, len(first)), _Members(owner, sides == 2, len(first))
        turned = pairs[pairs[:, 0] != pairs[:, 1]][:, ::-1]
        found = np.concatenate([_products(left, right, pairs), _products(left, right, turned)])
    else:
        members = _Members(owner, sides == 1, len(first))
        found = np.sort(_products(members, members, pairs), axis=1)
        found = found[found[:, 0] != found[:, 1]]
        # Two members of one hash come in both orders.
        found = np.unique(found, axis=0) if len(found) else found
    return found[np.lexsort((found[:, 1], found[:, 0]))]


class _Members:
    """Which places have each distinct hash: `places[start[u] : start[u] + count[u]]`."""

    def __init__(self, owner: np.ndarray, wanted: np.ndarray, number: int):
        chosen = np.flatnonzero(wanted)
        self.places = chosen[np.argsort(owner[chosen], kind="stable")]
        self.count = np.bincount(owner[chosen], minlength=number)
        self.start = np.cumsum(self.count) - self.count


def _products(left: _Members, right: _Members, pairs: np.ndarray) -> np.ndarray:
    """Every member of a pair's first hash with every one of its second."""
    a, b = pairs.T
    sizes = left.count[a] * right.count[b]
    pair = np.arange(len(pairs)).repeat(sizes)
    within = np.arange(len(pair)) - (np.cumsum(sizes) - sizes)[pair]
    row, column = np.divmod(within, right.count[b[pair]])
    return np.stack([left.places[left.start[a[pair]] + row], right.places[right.start[b[pair]] + column]], axis=1)


class _Search:
    """Pairs of distinct hashes; see the module's head.

    words: uint64[N, 4]. sides: uint8[N], those that its members are on. wanted: the sides of a pair's two together.
    """

    def __init__(self, words: np.ndarray, sides: np.ndarray, wanted: int, bits: int):
        self._words, self._sides, self._wanted, self._bits = words, sides, wanted, bits
        self._keys = band_keys(words, bits + AGREE)
        self._found: list[np.ndarray] = []

    def pairs(self) -> np.ndarray:
        """int64[M, 2], the smaller place first."""
        rows = np.arange(len(self._words))
        for band in range(len(self._keys) - AGREE + 1):
            self._sort(rows, np.zeros(len(rows), np.uint64), (band,))
        return np.concatenate([np.zeros((0, 2), np.int64), *self._found])

    def _sort(self, rows: np.ndarray, bucket: np.ndarray, bands: tuple[int, ...]) -> None:
        """Finds the pairs of rows in one bucket that agree in the last of these bands, as they do in the others."""
        key = (bucket << np.uint64(_KEY_BITS)) | self._keys[bands[-1]][rows]
        order = np.argsort(key)
        rows, key = rows[order], key[order]
        first, sizes = _runs(key)
        of = np.repeat(np.arange(len(first)), sizes)
        further = range(bands[-1] + 1, len(self._keys) - AGREE + len(bands) + 1) if len(bands) < AGREE else range(0)
        crowded = (sizes > CROWDED) & (len(further) > 0)
        if crowded.any():
            inside = crowded[of]
            left = self._comparisons(rows[inside], of[inside].astype(np.uint64), further, len(first))
            crowded &= left < sizes * (sizes - 1) / 2
        self._compare(rows, np.where(crowded[of], 0, (first + sizes)[of]), bands)
        if crowded.any():
            inside = crowded[of]
            for band in further:
                self._sort(rows[inside], of[inside].astype(np.uint64), (*bands, band))

    def _comparisons(self, rows: np.ndarray, bucket: np.ndarray, bands: range, number: int) -> np.ndarray:
        """float64[number]: how many pairs of each bucket agree in these bands, summed; estimated from one in five."""
        found = np.zeros(number)
        for band in bands[::5]:
            key = np.sort((bucket << np.uint64(_KEY_BITS)) | self._keys[band][rows])
            first, sizes = _runs(key)
            owner = (key[first] >> np.uint64(_KEY_BITS)).astype(np.int64)
            found += np.bincount(owner, sizes * (sizes - 1) / 2, number)
        return found * (len(bands) / len(bands[::5]))

    def _compare(self, rows: np.ndarray, end: np.ndarray, bands: tuple[int, ...]) -> None:
        """Keeps the near ones of each row and those behind it up to its bucket's end, a place further at a time."""
        alive = np.flatnonzero(np.arange(1, len(rows) + 1) < end)
        first, keys = self._words[rows, 0], self._keys[: bands[-1] + 1]
        step = 1
        while len(alive):
            # A quarter of the bits tells nearly all apart.
            near = alive[np.bitwise_count(first[alive] ^ first[alive + step]) <= self._bits]
            if len(near):
                a, b = rows[near], rows[near + step]
                apart = np.bitwise_count(self._words[a] ^ self._words[b]).sum(1, dtype=np.int64)
                kept = (apart <= self._bits) & ((self._sides[a] | self._sides[b]) == self._wanted)
                a, b = a[kept], b[kept]
                # A pair that agrees in more bands is found by the first of them alone.
                kept = (keys[:, a] == keys[:, b]).sum(0) == len(bands)
                self._found.append(np.sort(np.stack([a[kept], b[kept]], axis=1), axis=1))
            step += 1
            alive = alive[alive + step < end[alive]]


def _runs(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(where each run of equal keys begins, how long it is) of sorted keys; at least one."""
    first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    return first, np.diff(first, append=len(keys))


def band_keys(words: np.ndarray, number: int) -> np.ndarray:
    """uint32[number, N]: the bits of each band of uint64[N, 4], dealt out in turn, since neighbours go together."""
    places = np.full((number, _KEY_BITS), HASH_BYTES * 8)
    for band in range(number):
        own = np.arange(band, HASH_BYTES * 8, number)[:_KEY_BITS]
        places[band, : len(own)] = own
    keys = np.empty((number, len(words)), np.uint32)
    for start in range(0, len(words), _CHUNK_ROWS):
        bits = np.unpackbits(words[start : start + _CHUNK_ROWS].view(np.uint8), axis=1)
        bits = np.pad(bits, ((0, 0), (0, 1)))  # what `places` points at beyond a band's end
        packed = np.packbits(bits[:, places.ravel()], axis=1)
        keys[:, start : start + _CHUNK_ROWS] = np.ascontiguousarray(packed).view(np.uint32).T
    return keys
