"""Records as arrays: token rows of one length, supervised positions, and pixels of the model's size."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from medcg_jax.data import prompts
from medcg_jax.data.images import preprocess
from medcg_jax.data.records import DataError, Record, RecordSet, concat
from medcg_jax.data.tokenizer import Tokenizer
from medcg_jax.run_config import DataConfig

# Pixels kept decoded; a larger set is decoded again whenever a row is drawn.
MEMORY_LIMIT_BYTES = 2 << 30


@dataclass(frozen=True)
class Encoded:
    """Checked rows, ready to batch.

    Attributes:
      records: where the rows come from, in order.
      image_size_px: side of the pixels.
      arrays: [N, ...] per batch key, and `length` int32[N]; what `encode` or `encode_eval` says.
      pixels: uint8[N, h, w, 3], or None where images are decoded when drawn.
    """

    records: RecordSet
    image_size_px: int
    arrays: dict[str, np.ndarray]
    pixels: np.ndarray | None

    def __len__(self) -> int:
        return len(self.records)

    def rows(self, indices: np.ndarray) -> tuple[dict[str, np.ndarray], list[str]]:
        """The batch of these rows (`segment_ids` and `pixels` filled in) and their records' ids."""
        batch = {key: array[indices] for key, array in self.arrays.items()}
        length = batch.pop("length")
        batch["segment_ids"] = (np.arange(batch["tokens"].shape[1]) < length[:, None]).astype(np.int32)
        pixels = self.pixels[indices] if self.pixels is not None else self._decode(indices)
        batch["pixels"] = pixels[:, None]
        return batch, [self.records.records[i].id for i in indices]

    def _decode(self, indices: np.ndarray) -> np.ndarray:
        out = np.zeros((len(indices), self.image_size_px, self.image_size_px, 3), np.uint8)
        for row, index in enumerate(indices):
            out[row] = _row_pixels(self.records, int(index), self.image_size_px)
        return out


def encode(
    records: RecordSet,
    tokenizer: Tokenizer,
    data: DataConfig,
    *,
    image_size_px: int,
    num_image_tokens: int,
    memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
) -> Encoded:
    """Rows for training: the batch keys `tokens`, `target_positions`, `targets`, `target_weights`.

    T = `data.max_text_tokens` + `num_image_tokens`, L = `data.max_target_tokens`; the position p of a target is the
    one whose logits predict token p + 1.

    Raises:
      DataError: a record has too many tokens or targets, none that is supervised, or text or an image that cannot be
        used; the message names it.
    """
    rows = _empty_rows(len(records), tokenizer, data.max_text_tokens + num_image_tokens)
    positions = np.zeros((len(records), data.max_target_tokens), np.int32)
    targets, weights = np.zeros_like(positions), np.zeros(positions.shape, np.float32)

    def one(index: int, record: Record) -> None:
        tokens = prompts.conversation(
            tokenizer,
            record.turns,
            system_prompt=data.system_prompt,
            num_image_tokens=num_image_tokens if record.image else 0,
        )
        _put_row(rows, index, tokens.ids, record, num_image_tokens, data)
        supervised = np.flatnonzero(tokens.supervised)
        count = len(supervised)
        if not count:
            raise DataError("no token is supervised")
        if count > data.max_target_tokens:
            raise DataError(f"{count} supervised tokens; data.max_target_tokens={data.max_target_tokens}")
        positions[index, :count] = supervised - 1
        targets[index, :count] = rows["tokens"][index, supervised]
        weights[index, :count] = 1

    _each(records, one)
    arrays = {**rows, "target_positions": positions, "targets": targets, "target_weights": weights}
    return Encoded(records, image_size_px, arrays, _all_pixels(records, image_size_px, memory_limit_bytes))


def encode_eval(
    records: RecordSet,
    tokenizer: Tokenizer,
    data: DataConfig,
    *,
    image_size_px: int,
    num_image_tokens: int,
    num_options: int = 4,
    memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
) -> Encoded:
    """Rows for evaluation: `tokens` end in `ASSISTANT:`, `last_position` int32[N], `option_ids` int32[N, K].

    K = `num_options`; -1 stands where a record has fewer.

    Raises:
      DataError: as `encode`; or a record is no choice question, has too many options, or letters that cannot be scored.
    """
    rows = _empty_rows(len(records), tokenizer, data.max_text_tokens + num_image_tokens)
    options = np.full((len(records), num_options), -1, np.int32)

    def one(index: int, record: Record) -> None:
        count = len(record.options)
        if not 2 <= count <= num_options:
            raise DataError(f"{count} options; 2 to {num_options} can be scored")
        ids = prompts.evaluation_prompt(
            tokenizer,
            record.turns,
            system_prompt=data.system_prompt,
            num_image_tokens=num_image_tokens if record.image else 0,
        )
        _put_row(rows, index, ids, record, num_image_tokens, data)
        options[index, :count] = prompts.option_ids(
            tokenizer, record.turns, count, system_prompt=data.system_prompt, has_image=bool(record.image)
        )

    _each(records, one)
    arrays = {**rows, "last_position": rows["length"] - 1, "option_ids": options}
    return Encoded(records, image_size_px, arrays, _all_pixels(records, image_size_px, memory_limit_bytes))


def concat_encoded(parts: Sequence[Encoded]) -> Encoded:
    """One set of rows from several that were encoded alike; decodes nothing again.

    Raises:
      ValueError: no parts, or rows of different shapes.
    """
    if not parts:
        raise ValueError("there are no encoded records to join")
    shapes = {(p.image_size_px, *((key, array.shape[1:]) for key, array in sorted(p.arrays.items()))) for p in parts}
    if len(shapes) > 1:
        raise ValueError(f"encoded records of {len(shapes)} shapes cannot be joined: {sorted(map(str, shapes))}")
    arrays = {key: np.concatenate([part.arrays[key] for part in parts]) for key in parts[0].arrays}
    in_memory = all(part.pixels is not None for part in parts)
    pixels = np.concatenate([part.pixels for part in parts]) if in_memory else None
    return Encoded(concat([part.records for part in parts]), parts[0].image_size_px, arrays, pixels)


def _each(records: RecordSet, one: Callable[[int, Record], None]) -> None:
    for index, record in enumerate(records.records):
        try:
            one(index, record)
        except DataError as error:
            raise DataError(f"record {record.id}: {error}") from error


def _empty_rows(count: int, tokenizer: Tokenizer, length: int) -> dict[str, np.ndarray]:
    return {"tokens": np.full((count, length), tokenizer.pad_id, np.int32), "length": np.zeros(count, np.int32)}


def _put_row(rows, index: int, ids: list[int], record: Record, num_image_tokens: int, data: DataConfig) -> None:
    # A row without an image may use the image's places.
    most = rows["tokens"].shape[1]
    if len(ids) > most:
        text, room = (len(ids) - num_image_tokens, data.max_text_tokens) if record.image else (len(ids), most)
        raise DataError(f"{text} text tokens where {room} fit (data.max_text_tokens={data.max_text_tokens}); nothing is cut")
    rows["tokens"][index, : len(ids)] = ids
    rows["length"][index] = len(ids)


def _row_pixels(records: RecordSet, index: int, size_px: int) -> np.ndarray:
    record = records.records[index]
    if not record.image:
        return np.zeros((size_px, size_px, 3), np.uint8)
    try:
        return preprocess(records.image(index), size_px)
    except DataError as error:
        raise DataError(f"record {record.id}: {error}") from error


def _all_pixels(records: RecordSet, size_px: int, limit_bytes: int) -> np.ndarray | None:
    """uint8[N, size_px, size_px, 3] of all records, decoded in threads; None where they need more than the limit."""
    shape = (len(records), size_px, size_px, 3)
    if int(np.prod(shape, dtype=np.int64)) > limit_bytes:
        return None
    images = records.images
    if isinstance(images, np.ndarray) and images.shape == shape and all(r.image for r in records.records):
        return images
    out = np.zeros(shape, np.uint8)

    def fill(index: int) -> None:
        out[index] = _row_pixels(records, index, size_px)

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for _ in pool.map(fill, range(len(records))):
            pass
    return out
