"""Lengths and batches of evaluation: every question once, whole, beside its own image, in few and short lengths."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medcg_jax.data.encoding import Encoded
from medcg_jax.data.eval_batches import (
    MOST,
    batch_length,
    eval_batches,
    eval_order,
    eval_rows,
    further_questions,
    text_length,
)
from medcg_jax.data.records import Record, RecordSet
from medcg_jax.data.row_format import Format

IMAGE, IMAGE_TOKENS, TEXT = 9, 5, 20


def rows_of(
    lengths, *, text: int = TEXT, image_tokens: int = IMAGE_TOKENS, grow: bool = False, image: str = "x.png"
) -> Encoded:
    """Rows that only have lengths."""
    fmt = Format(None, lambda image: {}, image_tokens, (lambda height, width: 1) if grow else None)
    width = text + image_tokens
    arrays = {"tokens": np.zeros((len(lengths), width), np.int32), "length": np.asarray(lengths, np.int32)}
    records = [Record(str(i), "s", (), image=image) for i in range(len(lengths))]
    return Encoded(RecordSet(records, np.zeros((len(lengths), 1, 1, 3))), fmt, arrays, {})


@settings(deadline=None)
@given(st.integers(1, 600), st.integers(1, 600), st.booleans())
def test_lengths_are_few_and_hold_what_they_must(text, image_tokens, grow):
    rows = rows_of([1], text=text, image_tokens=image_tokens, grow=grow)
    most = text + image_tokens
    lengths = [batch_length(rows, longest) for longest in range(1, most + 1)]
    assert all(longest <= length <= most for longest, length in enumerate(lengths, 1))
    assert lengths == sorted(lengths) and len(set(lengths)) <= MOST
    alone = [text_length(rows, longest) for longest in range(1, most + 1)]
    assert all(longest <= length < longest + text // MOST + 4 for longest, length in enumerate(alone, 1))
    assert len(set(alone[:text])) <= MOST and max(alone) == most


def test_lengths_of_a_large_model():
    rows = rows_of([1], text=192, image_tokens=576)
    assert [batch_length(rows, n) for n in (10, 577, 640, 641, 705, 768)] == [576, 640, 640, 704, 768, 768]
    assert [text_length(rows, n) for n in (1, 48, 49, 192, 700)] == [48, 48, 96, 192, 720]


@settings(deadline=None)
@given(st.lists(st.integers(1, 520), min_size=1, max_size=30), st.integers(1, 7))
def test_batches_are_no_more_and_no_longer_than_in_the_records_order(lengths, batch_size):
    rows = rows_of(lengths, text=512, image_tokens=8)
    assert sorted(eval_order(rows)) == list(range(len(lengths)))
    batches = list(eval_batches(rows, batch_size))
    assert sorted(name for _, ids in batches for name in ids) == sorted(map(str, range(len(lengths))))
    in_order = [lengths[i : i + batch_size] for i in range(0, len(lengths), batch_size)]
    assert len(batches) == len(in_order)
    shapes = [batch["tokens"].shape for batch, _ in batches]
    assert all(shape == batch["segment_ids"].shape for shape, (batch, _) in zip(shapes, batches, strict=True))
    assert sum(shape[1] for shape in shapes) <= sum(batch_length(rows, max(part)) for part in in_order)
    for batch, ids in batches:
        assert batch["segment_ids"].sum(1)[: len(ids)].tolist() == [lengths[int(name)] for name in ids]


def test_rows_without_any_image_are_no_longer_than_their_text():
    rows = rows_of([20, 60, 33, 70], text=192, image_tokens=576, image="")
    widths = [batch["tokens"].shape[1] for batch, _ in eval_batches(rows, 2)]
    assert widths == [96, 48] and eval_order(rows).tolist() == [1, 3, 0, 2]
    assert {
        batch["tokens"].shape[1] for batch, _ in eval_batches(rows_of([20, 60], text=192, image_tokens=576), 2)
    } == {576}


@st.composite
def asked_sets(draw):
    """(records with or without an image, sets that ask about them again): a question has a number in its tokens."""
    count, random = draw(st.integers(1, 7)), np.random.default_rng(draw(st.integers(0, 99)))
    has_image = [draw(st.booleans()) for _ in range(count)]
    fmt = Format(None, lambda image: {"pixels": np.zeros(1, np.int64)}, IMAGE_TOKENS)
    openings = [[20] * random.integers(1, 3) for _ in range(count)]
    stems = [random.integers(30, 90, random.integers(0, 4)).tolist() for _ in range(count)]

    def encoded(places, numbers, records):
        tokens = np.zeros((len(places), TEXT + IMAGE_TOKENS), np.int32)
        lengths = np.zeros(len(places), np.int32)
        for i, image in enumerate(places):
            text = [*stems[image], 100 + numbers[i], *random.integers(30, 90, random.integers(0, 6))]
            row = [*openings[image], *([IMAGE] * IMAGE_TOKENS if has_image[image] else []), *text]
            tokens[i, : len(row)], lengths[i] = row, len(row)
        arrays = {"tokens": tokens, "length": lengths, "last_position": lengths - 1,
                  "option_ids": np.asarray(numbers, np.int32)[:, None]}  # fmt: skip
        return Encoded(records, fmt, arrays, {"pixels": np.asarray(places)[:, None]})

    records = [Record(str(i), "s", (), image="x.png" if has else "") for i, has in enumerate(has_image)]
    sets = [encoded(range(count), range(count), RecordSet(records, np.zeros((count, 1, 1, 3))))]
    total = count
    for _ in range(draw(st.integers(1, 3))):
        places = draw(st.lists(st.integers(0, count - 1), max_size=count))
        numbers = range(total, total + len(places))
        sets.append(encoded(places, numbers, SimpleNamespace(places=tuple(places))))
        total += len(places)
    return sets, [len(opening) + (IMAGE_TOKENS if has else 0) for opening, has in zip(openings, has_image)], stems


@settings(deadline=None)
@given(asked_sets(), st.sampled_from([(1, 1), (2, 1), (4, 1), (4, 2)]))
def test_every_question_is_asked_once_whole_and_beside_its_image(made, shape):
    (sets, ends, stems), (batch_size, processes) = made, shape
    plain, controls = sets[0], sets[1:]
    every = [(part, i) for part in controls for i in range(len(part.arrays["tokens"]))]
    own_rows = np.split(np.arange(batch_size), processes)
    firsts = [list(eval_rows(plain, batch_size, rows=rows_here)) for rows_here in own_rows]
    parts = [
        list(further_questions(plain, controls, batch_size, image_token_id=IMAGE, rows=rows_here))
        for rows_here in own_rows
    ]
    seen = []
    for drawn, together in zip(zip(*firsts, strict=True), zip(*parts, strict=True), strict=True):
        before, indices = (
            np.concatenate([batch.batch["tokens"] for batch in drawn]),
            np.concatenate([d.indices for d in drawn]),
        )
        for turn in zip(*together, strict=True):
            batch = {key: np.concatenate([asked.batch[key] for asked in turn]) for key in turn[0].batch}
            assert batch["tokens"].shape[0] == batch_size and len(turn[0].rows) > 0
            for question, row in zip(turn[0].questions, turn[0].rows, strict=True):
                part, index = every[question]
                assert part.records.places[index] == indices[row]
                real = batch["segment_ids"][row].astype(bool)
                rest, kept = batch["tokens"][row][real], batch["kept"][row]
                whole = part.arrays["tokens"][index, : part.arrays["length"][index]].tolist()
                assert [*before[row, :kept], *rest] == whole
                # All that both have in common is kept, and the image is in it.
                assert kept == ends[indices[row]] + len(stems[indices[row]]) and IMAGE not in rest
                assert batch["option_ids"][row, 0] == question + len(plain) == rest[0] - 100
                assert batch["last_position"][row] == real.sum() - 1
                assert (np.diff(real.astype(int)) <= 0).all()  # ones, then zeros
            seen += turn[0].questions.tolist()
    assert sorted(seen) == list(range(len(every)))


def test_a_question_that_differs_before_its_image_is_no_control():
    rows = rows_of([12, 12])
    rows.arrays["tokens"][:, 1 : 1 + IMAGE_TOKENS] = IMAGE
    rows.arrays["option_ids"] = np.zeros((2, 2), np.int32)
    arrays = {key: array.copy() for key, array in rows.arrays.items()}
    other = Encoded(SimpleNamespace(places=(0, 1)), rows.format, arrays, {})
    assert [len(asked) for asked in further_questions(rows, [other], 2, image_token_id=IMAGE)] == [1]
    arrays["tokens"][1, 0] = 7
    with pytest.raises(ValueError, match="record 1: .* before the end of the image"):
        list(further_questions(rows, [other], 2, image_token_id=IMAGE))
