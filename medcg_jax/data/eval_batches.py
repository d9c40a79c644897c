"""Batches of evaluation: each record once, and further questions about the same images, in few static lengths.

Further questions go on from a record's own: a record's row is computed whole, and of a further question only the tokens
that come after what both have in common, which includes the image. A question is in the row of its image, so that no mesh
moves what is known of an image. Nothing here needs Grain, which a bare machine may lack.
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
# Lengths of rows without images, which cost by the token, are multiples of a multiple of this.
TEXT_STEP = 4


def batch_length(encoded: Encoded, longest: int) -> int:
    """The length of a batch whose longest row has `longest` tokens: one of `MOST` lengths.

    Example, 576 image and at most 192 text tokens: 768, 704, 640 or 576.
    """
    # Rows differ by their text, and by their image if its tokens depend on its size.
    most, fmt = encoded.arrays["tokens"].shape[1], encoded.format
    step = _step(most if fmt.num_image_tokens is not None else most - fmt.max_image_tokens)
    return min(most, _up(max(longest, most - (MOST - 1) * step), step))


def text_length(encoded: Encoded, longest: int) -> int:
    """The same for rows of text alone; only those of records without an image may need further lengths."""
    text = encoded.arrays["tokens"].shape[1] - encoded.format.max_image_tokens
    step = TEXT_STEP * -(-text // (MOST * TEXT_STEP))
    return min(encoded.arrays["tokens"].shape[1], _up(max(longest, 1), step))


def row_length(encoded: Encoded, longest: int) -> int:
    """The length of a batch of whole rows: `batch_length`, and `text_length` where no record has an image."""
    has_image = any(record.image for record in encoded.records.records)
    return (batch_length if has_image else text_length)(encoded, longest)


def eval_order(encoded: Encoded) -> np.ndarray:
    """int[N]: the rows in the order of evaluation, by the length they need, longest first; no order gives shorter batches."""
    lengths, inverse = np.unique(encoded.arrays["length"], return_inverse=True)
    needed = np.array([row_length(encoded, int(length)) for length in lengths], np.int32)[inverse]
    return np.argsort(-needed, kind="stable")


def _step(differing: int) -> int:
    """The smallest step of which `MOST` cover the tokens by which rows may differ."""
    return next((step for step in STEPS if MOST * step >= differing), STEPS[-1] * -(-differing // (MOST * STEPS[-1])))


def _up(number: int, step: int) -> int:
    return -(-number // step) * step


@dataclass(frozen=True)
class Drawn:
    """A batch of records without its images.

    batch: arrays of this process's rows. indices: int[b] records of these rows; padding rows repeat the batch's first
      record. is_real: bool[b] rows that are no padding. records: int[r] records of the global batch, without padding.
    """

    batch: Arrays
    indices: np.ndarray
    is_real: np.ndarray
    records: np.ndarray


def eval_rows(encoded: Encoded, batch_size: int, *, rows: np.ndarray | None = None) -> Iterator[Drawn]:
    """Each record once, in the order of `eval_order`; no image is decoded.

    Its longest row gives a batch its length (`row_length`). The last batch is padded with copies of its first row, so
    every process has as many batches, of the same shapes. rows: as `Batches`.
    """
    own_rows, order = checked_rows(rows, batch_size), eval_order(encoded)
    for start in range(0, len(encoded), batch_size):
        records = order[start : start + batch_size]
        is_real = own_rows < len(records)
        indices = records[np.where(is_real, own_rows, 0)]
        batch = encoded.text_rows(indices)
        length = row_length(encoded, int(encoded.arrays["length"][records].max()))
        batch |= {key: batch[key][:, :length] for key in ("tokens", "segment_ids")}
        yield Drawn(batch, indices, is_real, records)


def eval_batches(
    encoded: Encoded, batch_size: int, *, rows: np.ndarray | None = None
) -> Iterator[tuple[Batch, list[str]]]:
    """As `eval_rows`, with images: `(batch, ids)`; padding rows have no id, and `row_mask` 0."""
    for drawn in eval_rows(encoded, batch_size, rows=rows):
        batch = drawn.batch | encoded.image_rows(drawn.indices) | {"row_mask": drawn.is_real.astype(np.float32)}
        yield batch, [encoded.records.records[i].id for i in drawn.indices[drawn.is_real]]


@dataclass(frozen=True)
class Asked:
    """One further question of each row of a batch.

    batch: `tokens`, `segment_ids` int32[B, S] of the tokens that follow, `last_position` in them, `option_ids`, and
      `kept` int32[B], the tokens of the row that they follow.
    questions: int[R] numbers of the questions. rows: int[R] rows of the global batch that ask them; other rows are
      padding.
    """

    batch: Arrays
    questions: np.ndarray
    rows: np.ndarray


def further_questions(
    encoded: Encoded,
    controls: Sequence[Encoded],
    batch_size: int,
    *,
    image_token_id: int,
    rows: np.ndarray | None = None,
) -> Iterator[tuple[Asked, ...]]:
    """For each batch of `eval_rows` every question of `controls` about its records, numbered set by set.

    controls: encoded `data.controls.ControlSet`s about the records of `encoded`. rows: of this process, as `Batches`;
    every process has as many batches, of the same shapes.

    Raises:
      ValueError: a question differs from the record's own before the end of the image.
    """
    own_rows = checked_rows(rows, batch_size)
    asked_of = np.concatenate([np.asarray(s.records.places, int) for s in controls])  # type: ignore[attr-defined]
    arrays = {key: np.concatenate([s.arrays[key] for s in controls]) for key in ("tokens", "length", "option_ids")}
    kept = _in_common(encoded, arrays, asked_of, image_token_id)
    lengths = arrays["length"] - kept
    of_record: dict[int, list[int]] = {}
    # The longest first, so that questions of one turn have similar lengths.
    for question in np.argsort(-lengths, kind="stable").tolist():
        of_record.setdefault(int(asked_of[question]), []).append(question)
    for drawn in eval_rows(encoded, batch_size, rows=rows):
        groups = [of_record.get(int(record), []) for record in drawn.records]
        turns = []
        for turn in range(max(map(len, groups))):
            asks = np.array([row for row, group in enumerate(groups) if turn < len(group)])
            questions = np.array([groups[row][turn] for row in asks])
            # Other rows read a question of another row, whose answer nobody looks at.
            every = np.full(batch_size, questions[0])
            every[asks] = questions
            taken = every[own_rows]
            length = text_length(encoded, int(lengths[questions].max()))
            batch = _cut(arrays["tokens"], taken, kept[taken], lengths[taken], length)
            batch |= {"last_position": lengths[taken] - 1, "option_ids": arrays["option_ids"][taken]}
            turns.append(Asked(batch | {"kept": kept[taken]}, questions, asks))
        yield tuple(turns)


def _in_common(encoded: Encoded, arrays: Arrays, asked_of: np.ndarray, image_token_id: int) -> np.ndarray:
    """int32[Q]: how many first tokens each question has in common with the record's own, without its last one.

    arrays: of the questions. asked_of: int[Q] the record of each.
    """
    record_tokens = encoded.arrays["tokens"][asked_of]
    differs = record_tokens != arrays["tokens"]
    first = np.where(differs.any(1), differs.argmax(1), record_tokens.shape[1])
    common = np.minimum(first, np.minimum(encoded.arrays["length"][asked_of], arrays["length"] - 1))
    is_image = record_tokens == image_token_id
    ends = np.where(is_image.any(1), record_tokens.shape[1] - is_image[:, ::-1].argmax(1), 0)
    if (common < ends).any():
        record = encoded.records.records[asked_of[np.argmax(common < ends)]]
        raise ValueError(f"record {record.id}: a control differs from its question before the end of the image")
    return common.astype(np.int32)


def _cut(tokens: np.ndarray, rows: np.ndarray, starts: np.ndarray, lengths: np.ndarray, width: int) -> Arrays:
    """`tokens`, `segment_ids` int32[B, width]: of each row `lengths` tokens from `starts` on."""
    columns = np.arange(width)
    real = columns < lengths[:, None]
    taken_tokens = tokens[rows[:, None], np.minimum(starts[:, None] + columns, tokens.shape[1] - 1)]
    return {"tokens": np.where(real, taken_tokens, 0).astype(np.int32), "segment_ids": real.astype(np.int32)}
