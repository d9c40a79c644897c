"""Batches of evaluation: each record once, or many questions about the same images in rounds, in few static lengths.

A round has a batch of images. Its first batch holds each row's tokens up to the end of the image; the next ones hold the
first question of every row, then the second, and so on. A question is in the row of its image, so that no mesh moves
image features. Nothing here needs Grain, which a bare machine may lack.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from medcg_jax.data.encoding import Batch, Encoded, checked_rows
from medcg_jax.data.row_format import Arrays

# The most lengths of rows, and so of programs compiled, for one kind of batch; short prompts still get short rows.
MOST = 4
# Lengths of rows are multiples of one of these, or of a multiple of the last.
STEPS = (16, 32, 64)


def batch_length(encoded: Encoded, longest: int) -> int:
    """The length of a batch whose longest row has `longest` tokens: one of `MOST` lengths.

    Example, 576 image and at most 192 text tokens: 768, 704, 640 or 576.
    """
    # Rows differ by their text, and by their image if its tokens depend on its size.
    most, fmt = encoded.arrays["tokens"].shape[1], encoded.format
    step = _step(most if fmt.num_image_tokens is not None else most - fmt.max_image_tokens)
    return min(most, _up(max(longest, most - (MOST - 1) * step), step))


def suffix_length(encoded: Encoded, longest: int) -> int:
    """The same for the tokens behind each row's image; only rows without an image may need further lengths."""
    text = encoded.arrays["tokens"].shape[1] - encoded.format.max_image_tokens
    return _up(max(longest, 1), _step(text))


def eval_order(encoded: Encoded) -> np.ndarray:
    """int[N]: the rows in the order of evaluation, by the length they need, longest first; no order gives shorter batches."""
    needed = [batch_length(encoded, int(length)) for length in encoded.arrays["length"]]
    return np.argsort(-np.asarray(needed, np.int32), kind="stable")


def _step(differing: int) -> int:
    """The smallest step of which `MOST` cover the tokens by which rows may differ."""
    return next((step for step in STEPS if MOST * step >= differing), STEPS[-1] * -(-differing // (MOST * STEPS[-1])))


def _up(number: int, step: int) -> int:
    return -(-number // step) * step


def eval_batches(
    encoded: Encoded, batch_size: int, *, rows: np.ndarray | None = None
) -> Iterator[tuple[Batch, list[str]]]:
    """Each record once, in the order of `eval_order`: `(batch, ids)` with this process's rows; padding rows have no id.

    Its longest row gives a batch its length (`batch_length`). The last batch is padded with copies of its first row,
    whose `row_mask` is 0, so every process has as many batches, of the same shapes. rows: as `Batches`.
    """
    own_rows, order = checked_rows(rows, batch_size), eval_order(encoded)
    for start in range(0, len(encoded), batch_size):
        positions = start + own_rows
        real = positions < len(encoded)
        batch, ids = encoded.rows(order[np.where(real, positions, start)])
        length = batch_length(encoded, int(encoded.arrays["length"][order[start : start + batch_size]].max()))
        batch |= {key: batch[key][:, :length] for key in ("tokens", "segment_ids")}
        batch["row_mask"] = real.astype(np.float32)
        yield batch, ids[: int(real.sum())]


@dataclass(frozen=True)
class Round:
    """before: `tokens`, `segment_ids` int32[B, P] and the images; asked: batches of one question a row."""

    before: Arrays
    asked: tuple[Asked, ...]


@dataclass(frozen=True)
class Asked:
    """One question of each row.

    batch: `tokens`, `segment_ids` int32[B, S] of the tokens behind the image, `last_position` in them, `option_ids`.
    questions: int[R] numbers of the questions. rows: int[R] rows of the global batch that ask them; other rows are
      padding. free: whether a question is of the first set.
    """

    batch: Arrays
    questions: np.ndarray
    rows: np.ndarray
    free: bool


def rounds(
    encoded: Encoded,
    controls: Sequence[Encoded],
    batch_size: int,
    *,
    image_token_id: int,
    rows: np.ndarray | None = None,
) -> Iterator[Round]:
    """Every question of `encoded` and then of each set of `controls` once, numbered in this order.

    controls: encoded `data.controls.ControlSet`s about the records of `encoded`. rows: of this process, as `Batches`;
    every process has as many rounds and batches, of the same shapes.

    Images with more questions come first, so that few rows are padding.
    """
    own_rows = checked_rows(rows, batch_size)
    sets = (encoded, *controls)
    arrays = {key: np.concatenate([s.arrays[key] for s in sets]) for key in ("tokens", "length", "option_ids")}
    is_image = arrays["tokens"] == image_token_id
    width = is_image.shape[1]
    ends = np.where(is_image.any(1), width - is_image[:, ::-1].argmax(1), 0).astype(np.int32)
    of_controls = [s.records.places for s in controls]  # type: ignore[attr-defined]  # `ControlSet`s
    image_indices = np.concatenate([np.arange(len(encoded)), *of_controls]).astype(int)
    groups = _groups(arrays, ends, image_indices, len(encoded))
    for start in range(0, len(groups), batch_size):
        in_round = groups[start : start + batch_size]
        # Padding rows are copies of the round's first row.
        filled = [*in_round, *[in_round[0]] * (batch_size - len(in_round))]
        firsts = np.array([group[0] for group in filled])
        most = max(int(ends[firsts].max()), 1)
        most = most if encoded.format.num_image_tokens is None else batch_length(encoded, most)
        batch, _ = encoded.rows(image_indices[firsts[own_rows]])
        before = {key: batch[key] for key in encoded.format.blank}
        before |= _cut(arrays["tokens"], firsts[own_rows], np.zeros_like(own_rows), ends[firsts[own_rows]], most)
        asked = tuple(
            _asked(encoded, arrays, ends, in_round, filled, turn, own_rows) for turn in range(len(in_round[0]))
        )
        yield Round(before, asked)


def _groups(arrays: Arrays, ends: np.ndarray, image_indices: np.ndarray, num_free: int) -> list[list[int]]:
    """Groups of questions with the same image and prefix; in a group the first set's come first, then longer ones."""
    groups: dict[tuple, list[int]] = {}
    for question, (image, end) in enumerate(zip(image_indices, ends, strict=True)):
        groups.setdefault((int(image), arrays["tokens"][question, :end].tobytes()), []).append(question)
    lengths = arrays["length"] - ends
    for group in groups.values():
        group.sort(key=lambda question: (question >= num_free, -lengths[question]))
    return sorted(groups.values(), key=lambda group: (-len(group), -max(lengths[group])))


def _asked(encoded, arrays, ends, groups, filled, turn: int, own_rows: np.ndarray) -> Asked:
    rows = np.array([row for row, group in enumerate(groups) if turn < len(group)])
    questions = np.array([groups[row][turn] for row in rows])
    every = np.array([group[min(turn, len(group) - 1)] for group in filled])
    lengths = arrays["length"] - ends
    length = suffix_length(encoded, int(lengths[every].max()))
    taken = every[own_rows]
    batch = _cut(arrays["tokens"], taken, ends[taken], lengths[taken], length)
    batch |= {"last_position": lengths[taken] - 1, "option_ids": arrays["option_ids"][taken]}
    return Asked(batch, questions, rows, bool((questions < len(encoded)).any()))


def _cut(tokens: np.ndarray, rows: np.ndarray, starts: np.ndarray, lengths: np.ndarray, width: int) -> Arrays:
    """`tokens`, `segment_ids` int32[B, width]: of each row `lengths` tokens from `starts` on."""
    columns = np.arange(width)
    real = columns < lengths[:, None]
    taken_tokens = tokens[rows[:, None], np.minimum(starts[:, None] + columns, tokens.shape[1] - 1)]
    return {"tokens": np.where(real, taken_tokens, 0).astype(np.int32), "segment_ids": real.astype(np.int32)}
