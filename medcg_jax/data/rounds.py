"""Many questions about the same images, in rounds: what comes before them is the model's once, each question by itself.

A round has a batch of images. Each row's beginning, up to the end of its image, is one batch; then the first question
of every row is one, then the second, and so on: a question stands in the row of its image, so that on no mesh anything
of an image is moved.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from medcg_jax.data.encoding import Encoded
from medcg_jax.data.lengths import batch_length, suffix_length
from medcg_jax.data.pipeline import checked_rows
from medcg_jax.data.row_format import Arrays


@dataclass(frozen=True)
class Round:
    """before: `tokens`, `segment_ids` int32[B, P] and the images; asked: batches of one question a row."""

    before: Arrays
    asked: tuple[Asked, ...]


@dataclass(frozen=True)
class Asked:
    """One question of each row.

    batch: `tokens`, `segment_ids` int32[B, S] of what follows the image, `last_position` in them, `option_ids`.
    questions: int[R] the questions' numbers, rows[i]: the row of the global batch that asks the i-th; others ask
      nothing that counts. free: whether one of them is of the first set.
    """

    batch: Arrays
    questions: np.ndarray
    rows: np.ndarray
    free: bool


def rounds(
    encoded: Encoded, again: Sequence[Encoded], batch_size: int, *, image_token_id: int, rows: np.ndarray | None = None
) -> Iterator[Round]:
    """Every question of `encoded` and of each set of `again` once, numbered through in this order.

    again: of `data.controls.AskedAgain` about the records of `encoded`. rows: this process's, as `Batches`; every
    process has as many rounds and batches, of the same shapes.

    Images with more questions come first, so that few rows ask nothing.
    """
    mine = checked_rows(rows, batch_size)
    sets = (encoded, *again)
    arrays = {key: np.concatenate([s.arrays[key] for s in sets]) for key in ("tokens", "length", "option_ids")}
    is_image = arrays["tokens"] == image_token_id
    width = is_image.shape[1]
    ends = np.where(is_image.any(1), width - is_image[:, ::-1].argmax(1), 0).astype(np.int32)
    places = np.concatenate([np.arange(len(encoded)), *(s.records.places for s in again)]).astype(int)
    groups = _groups(arrays, ends, places, len(encoded))
    for start in range(0, len(groups), batch_size):
        own = groups[start : start + batch_size]
        # Rows beyond the last image are copies of the first.
        filled = [*own, *[own[0]] * (batch_size - len(own))]
        firsts = np.array([group[0] for group in filled])
        most = max(int(ends[firsts].max()), 1)
        most = most if encoded.format.num_image_tokens is None else batch_length(encoded, most)
        batch, _ = encoded.rows(places[firsts[mine]])
        before = {key: batch[key] for key in encoded.format.blank}
        before |= _cut(arrays["tokens"], firsts[mine], np.zeros_like(mine), ends[firsts[mine]], most)
        asked = tuple(_asked(encoded, arrays, ends, own, filled, turn, mine) for turn in range(len(own[0])))
        yield Round(before, asked)


def _groups(arrays: Arrays, ends: np.ndarray, places: np.ndarray, num_free: int) -> list[list[int]]:
    """Questions with the same beginning and image: those of the first set first, then longer ones first."""
    found: dict[tuple, list[int]] = {}
    for question, (place, end) in enumerate(zip(places, ends, strict=True)):
        found.setdefault((int(place), arrays["tokens"][question, :end].tobytes()), []).append(question)
    lengths = arrays["length"] - ends
    for group in found.values():
        group.sort(key=lambda question: (question >= num_free, -lengths[question]))
    return sorted(found.values(), key=lambda group: (-len(group), -max(lengths[group])))


def _asked(encoded, arrays, ends, own, filled, turn: int, mine: np.ndarray) -> Asked:
    rows = np.array([row for row, group in enumerate(own) if turn < len(group)])
    questions = np.array([own[row][turn] for row in rows])
    every = np.array([group[min(turn, len(group) - 1)] for group in filled])
    lengths = arrays["length"] - ends
    length = suffix_length(encoded, int(lengths[every].max()))
    taken = every[mine]
    batch = _cut(arrays["tokens"], taken, ends[taken], lengths[taken], length)
    batch |= {"last_position": lengths[taken] - 1, "option_ids": arrays["option_ids"][taken]}
    return Asked(batch, questions, rows, bool((questions < len(encoded)).any()))


def _cut(tokens: np.ndarray, rows: np.ndarray, starts: np.ndarray, lengths: np.ndarray, width: int) -> Arrays:
    """`tokens`, `segment_ids` int32[B, width]: of each of these rows so many tokens, from its start on."""
    places = np.arange(width)
    real = places < lengths[:, None]
    found = tokens[rows[:, None], np.minimum(starts[:, None] + places, tokens.shape[1] - 1)]
    return {"tokens": np.where(real, found, 0).astype(np.int32), "segment_ids": real.astype(np.int32)}
