"""Encodes records as arrays: token rows of one length, supervised positions, and the model's image arrays."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from medcg_jax.config import DataConfig
from medcg_jax.data.boxes import Asked, ask
from medcg_jax.data.images import copy_into
from medcg_jax.data.records import MAX_OPTIONS, DataError, Record, RecordSet, Turn, concat
from medcg_jax.data.row_format import Arrays, Format, Tokens
from medcg_jax.data.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]

# Limit of decoded images kept in memory; images of a larger set are decoded whenever a row is drawn.
MEMORY_LIMIT_BYTES = 2 << 30
# Columns of letters unless a question has more options, so that programs have only two shapes.
USUAL_OPTIONS = 4


@dataclass(frozen=True)
class Encoded:
    """Checked rows, ready to batch.

    Attributes:
      records: the record of each row.
      format: of the model.
      arrays: [N, ...] per batch key, and `length` int32[N]; see `encode` and `encode_eval`.
      images: [N, ...] per image key of the format; None: images are decoded when drawn.
      masks: whether rows have masks of their boxes, which are laid out when drawn.
      asked: each row's question about boxes; () for other rows.
    """

    records: RecordSet
    format: Format
    arrays: Arrays
    images: Arrays | None
    masks: bool = False
    asked: tuple[Asked, ...] = ()

    def __len__(self) -> int:
        return len(self.records)

    def rows(self, indices: np.ndarray) -> tuple[Arrays, list[str]]:
        """The batch of these rows (`segment_ids` and the images filled in) and their records' ids."""
        batch = self.text_rows(indices) | self.image_rows(indices)
        if self.masks and (layout := self.format.mask_layout):
            masks = []
            for index in indices.tolist():
                with _named(self.records.records[index]) as record:
                    masks.append(layout.arrays(record, self.records.mask(index)))
            batch |= {key: np.stack([row[key] for row in masks]) for key in masks[0]}
        return batch, [self.records.records[i].id for i in indices]

    def text_rows(self, indices: np.ndarray) -> Arrays:
        """The batch of these rows without images and masks; no image is decoded."""
        batch = {key: array[indices] for key, array in self.arrays.items()}
        length = batch.pop("length")
        batch["segment_ids"] = (np.arange(batch["tokens"].shape[1]) < length[:, None]).astype(np.int32)
        return batch

    def image_rows(self, indices: np.ndarray) -> Arrays:
        """The images of these rows, [B, 1, ...] per image key of the format; zeros for a record without one."""
        if self.images is None:
            images = _empty_images(self.format, len(indices))
            for row, index in enumerate(indices.tolist()):
                _decode(self.records, index, self.format, images, row)
        else:
            images = {key: array[indices] for key, array in self.images.items()}
        return {key: array[:, None] for key, array in images.items()}


def checked_rows(rows: np.ndarray | None, batch_size: int) -> np.ndarray:
    """`rows` as an array; None means all rows of the batch.

    Raises:
      ValueError: `rows` are not rising rows of the batch.
    """
    own_rows = np.arange(batch_size) if rows is None else np.asarray(rows)
    if not len(own_rows) or own_rows[0] < 0 or own_rows[-1] >= batch_size or (np.diff(own_rows) <= 0).any():
        raise ValueError(f"rows={own_rows.tolist()} of batch_size={batch_size}: expected rising rows of the batch")
    return own_rows


def encode(
    records: RecordSet,
    tokenizer: Tokenizer,
    data: DataConfig,
    fmt: Format,
    *,
    memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
) -> Encoded:
    """Rows for training: the batch keys `tokens`, `target_positions`, `targets`, `target_weights`, the format's boxes.

    `tokens` are [N, `data.max_text_tokens` + `fmt.max_image_tokens`], targets [N, `data.max_target_tokens`]. The logits
    at target position p predict token p + 1.

    Raises:
      DataError: a record has too many tokens or targets, no supervised token, or unusable text or image; the message
        names the record.
    """
    rows = _empty_rows(len(records), tokenizer, data, fmt)
    positions = np.zeros((len(records), data.max_target_tokens), np.int32)
    targets, weights = np.zeros_like(positions), np.zeros(positions.shape, np.float32)
    boxes: list[Arrays] = []
    for index, record in enumerate(records.records):
        with _named(record):
            tokens = _conversation(records, index, tokenizer, data, fmt)
            _put(rows, index, tokens.ids)
            if fmt.box_arrays is not None:
                boxes.append(fmt.box_arrays(tokenizer, record, tokens))
            if fmt.mask_layout is not None:
                fmt.mask_layout.check(record, records.mask(index))
            supervised = np.flatnonzero(tokens.supervised)
            count = len(supervised)
            if not count:
                raise DataError("no token is supervised")
            if count > data.max_target_tokens:
                raise DataError(f"{count} supervised tokens; data.max_target_tokens={data.max_target_tokens}")
            positions[index, :count] = supervised - 1
            targets[index, :count] = rows["tokens"][index, supervised]
            weights[index, :count] = 1
    arrays = {**rows, "target_positions": positions, "targets": targets, "target_weights": weights}
    arrays |= {key: np.stack([row[key] for row in boxes]) for key in (boxes[0] if boxes else ())}
    images = _all_images(records, fmt, memory_limit_bytes)
    return Encoded(records, fmt, arrays, images, masks=fmt.mask_layout is not None)


def encode_eval(
    records: RecordSet,
    tokenizer: Tokenizer,
    data: DataConfig,
    fmt: Format,
    *,
    columns: int = 0,
    memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
) -> Encoded:
    """Rows for evaluation: `tokens` up to `ASSISTANT:`, `last_position` int32[N], `option_ids` int32[N, K].

    K = `columns`, or `option_columns` of these records; -1 fills the row of a record with fewer options.

    Raises:
      DataError: as `encode`; or a record is no choice question, or has too many options or letters that cannot be scored.
    """
    rows = _empty_rows(len(records), tokenizer, data, fmt)
    columns = columns or option_columns(records)
    options = np.full((len(records), columns), -1, np.int32)
    for index, record in enumerate(records.records):
        with _named(record):
            count = len(record.options)
            if not 2 <= count <= columns:
                reason = f"{count} options; 2 to {columns} can be scored"
                raise DataError(f"{reason}: take options out of the question, or the record out of the test")
            _put(rows, index, _prompt(records, index, record.turns, tokenizer, data, fmt))
            options[index, :count] = fmt.prompts.option_ids(
                tokenizer, record.turns, count, system_prompt=data.system_prompt, has_image=bool(record.image)
            )
    arrays = {**rows, "last_position": rows["length"] - 1, "option_ids": options}
    return Encoded(records, fmt, arrays, _all_images(records, fmt, memory_limit_bytes))


def option_columns(records: RecordSet) -> int:
    """Columns of letters for these records: `USUAL_OPTIONS`, or `MAX_OPTIONS` if a record has more options."""
    most = max((len(record.options) for record in records.records), default=0)
    return USUAL_OPTIONS if most <= USUAL_OPTIONS else MAX_OPTIONS


def encode_boxes(records: RecordSet, tokenizer: Tokenizer, data: DataConfig, fmt: Format) -> Encoded:
    """A row for each question about a record's boxes: `tokens` and `last_position` int32[N].

    `records` and `asked` of the result have one entry a row; records without boxes have no row.

    Raises:
      DataError: a record has too many tokens, or the model does not answer with boxes.
    """
    if fmt.box_turn is None:
        raise DataError("a model that gives no boxes is asked for some; MiniGPT-v2 and NExT-Chat give them")
    pairs = [(index, asked) for index, record in enumerate(records.records) for asked in ask(record)]
    records = records.select(index for index, _ in pairs)
    rows = _empty_rows(len(records), tokenizer, data, fmt)
    for index, (record, (_, asked)) in enumerate(zip(records.records, pairs, strict=True)):
        with _named(record):
            _put(rows, index, _prompt(records, index, (fmt.box_turn(record, asked),), tokenizer, data, fmt))
    arrays = {**rows, "last_position": rows["length"] - 1}
    images = _all_images(records, fmt, MEMORY_LIMIT_BYTES)
    return Encoded(records, fmt, arrays, images, asked=tuple(asked for _, asked in pairs))


def longest_row(records: RecordSet, tokenizer: Tokenizer, data: DataConfig, fmt: Format) -> int:
    """Tokens, with the image's, of the longest training row that `encode` would make of these records; 0 without records.

    Records that `encode` would refuse are ignored. Images are not decoded, and the tokenizer caches the ids of texts, so
    a later `encode` is cheap.
    """
    longest = 0
    for index in range(len(records)):
        with contextlib.suppress(DataError):
            longest = max(longest, len(_conversation(records, index, tokenizer, data, fmt).ids))
    return longest


def row_length(longest: int, data: DataConfig, fmt: Format) -> int:
    """Length of padded training rows whose longest has `longest` tokens (`data.row_multiple`)."""
    most = data.max_text_tokens + fmt.max_image_tokens
    return min(most, -(-longest // data.row_multiple) * data.row_multiple) if data.row_multiple else most


def cut_rows(encoded: Encoded, length: int) -> Encoded:
    """The same rows cut to `length` tokens.

    Raises:
      ValueError: a row has more tokens than `length`, or the rows are shorter.
    """
    tokens, longest = encoded.arrays["tokens"], encoded.arrays["length"].max(initial=0)
    if not longest <= length <= tokens.shape[1]:
        raise ValueError(f"length={length}: expected {longest} to {tokens.shape[1]} of these rows")
    return dataclasses.replace(encoded, arrays={**encoded.arrays, "tokens": tokens[:, :length]})


def concat_encoded(row_sets: Sequence[Encoded]) -> Encoded:
    """Joins sets of rows that were encoded alike; decodes nothing again.

    Raises:
      ValueError: there are no sets, or their rows have different shapes.
    """
    if not row_sets:
        raise ValueError("there are no encoded records to join")
    shapes = {tuple((key, a.shape[1:]) for key, a in sorted({**p.arrays, **p.format.blank}.items())) for p in row_sets}
    if len(shapes) > 1:
        raise ValueError(f"encoded records of {len(shapes)} shapes cannot be joined: {sorted(map(str, shapes))}")

    def joined(sets: list[Arrays]) -> Arrays:
        return {key: np.concatenate([arrays[key] for arrays in sets]) for key in sets[0]}

    images = [row_set.images for row_set in row_sets if row_set.images is not None]
    records, arrays = (
        concat([row_set.records for row_set in row_sets]),
        joined([row_set.arrays for row_set in row_sets]),
    )
    all_images = joined(images) if len(images) == len(row_sets) else None
    return Encoded(records, row_sets[0].format, arrays, all_images, masks=row_sets[0].masks)


@contextlib.contextmanager
def _named(record: Record) -> Iterator[Record]:
    """Yields the record; puts its id before the message of a DataError of the block."""
    try:
        yield record
    except DataError as error:
        raise DataError(f"record {record.id}: {error}") from error


def _conversation(records: RecordSet, index: int, tokenizer: Tokenizer, data: DataConfig, fmt: Format) -> Tokens:
    """A record's training row. Raises DataError if it does not fit."""
    turns, num_image = fmt.turns(records.records[index]), _image_tokens(records, index, fmt)
    tokens = fmt.prompts.conversation(tokenizer, turns, system_prompt=data.system_prompt, num_image_tokens=num_image)
    _check_length(len(tokens.ids), num_image, data, fmt)
    return tokens


def _prompt(
    records: RecordSet, index: int, turns: tuple[Turn, ...], tokenizer: Tokenizer, data: DataConfig, fmt: Format
) -> list[int]:
    """The ids of these turns about a record's image, up to the last answer. Raises DataError if they do not fit."""
    num_image = _image_tokens(records, index, fmt)
    ids = fmt.prompts.evaluation_prompt(tokenizer, turns, system_prompt=data.system_prompt, num_image_tokens=num_image)
    _check_length(len(ids), num_image, data, fmt)
    return ids


def _image_tokens(records: RecordSet, index: int, fmt: Format) -> int:
    """Tokens of the record's image; 0 without one."""
    if not records.records[index].image:
        return 0
    return fmt.max_image_tokens if fmt.num_image_tokens is None else fmt.num_image_tokens(*records.image_size(index))


def _check_length(length: int, num_image_tokens: int, data: DataConfig, fmt: Format) -> None:
    # A row without an image may use the image's tokens for text.
    room = data.max_text_tokens + (0 if num_image_tokens else fmt.max_image_tokens)
    if length - num_image_tokens > room:
        raise DataError(
            f"{length - num_image_tokens} text tokens where {room} fit (data.max_text_tokens={data.max_text_tokens}); "
            "nothing is cut"
        )


def _empty_rows(count: int, tokenizer: Tokenizer, data: DataConfig, fmt: Format) -> Arrays:
    width = data.max_text_tokens + fmt.max_image_tokens
    return {"tokens": np.full((count, width), tokenizer.pad_id, np.int32), "length": np.zeros(count, np.int32)}


def _put(rows: Arrays, index: int, ids: list[int]) -> None:
    rows["tokens"][index, : len(ids)] = ids
    rows["length"][index] = len(ids)


def _empty_images(fmt: Format, count: int) -> Arrays:
    return {key: np.zeros((count, *array.shape), array.dtype) for key, array in fmt.blank.items()}


def _decode(records: RecordSet, index: int, fmt: Format, out: Arrays, row: int) -> None:
    """Writes the arrays of a record's image into a row of `out`, which stays zeros without an image."""
    with _named(records.records[index]) as record:
        if record.image:
            for key, array in fmt.preprocess(records.image(index)).items():
                copy_into(out[key][row, ...], array)


def _all_images(records: RecordSet, fmt: Format, limit_bytes: int) -> Arrays | None:
    """[N, ...] per image key of all records, decoded in threads; None if they need more than the limit."""
    if len(records) * sum(array.nbytes for array in fmt.blank.values()) > limit_bytes:
        return None
    images = _empty_images(fmt, len(records))
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for _ in pool.map(lambda index: _decode(records, index, fmt, images, index), range(len(records))):
            pass
    return images
