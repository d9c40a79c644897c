"""Lengths and rounds of evaluation: every question once, whole, beside its own image, in few and short lengths."""

from types import SimpleNamespace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from medcg_jax.data.encoding import Encoded
from medcg_jax.data.eval_batches import MOST, batch_length, eval_batches, eval_order, rounds, suffix_length
from medcg_jax.data.records import Record, RecordSet
from medcg_jax.data.row_format import Format

IMAGE, IMAGE_TOKENS, TEXT = 9, 5, 20


def rows_of(lengths, *, text: int = TEXT, image_tokens: int = IMAGE_TOKENS, grow: bool = False) -> Encoded:
    """Rows that only have lengths."""
    fmt = Format(None, lambda image: {}, image_tokens, (lambda height, width: 1) if grow else None)
    width = text + image_tokens
    arrays = {"tokens": np.zeros((len(lengths), width), np.int32), "length": np.asarray(lengths, np.int32)}
    return Encoded(RecordSet([Record(str(i), "s", ()) for i in range(len(lengths))], np.zeros((len(lengths), 1, 1, 3))),
                   fmt, arrays, {})  # fmt: skip


@settings(deadline=None)
@given(st.integers(1, 600), st.integers(1, 600), st.booleans())
def test_lengths_are_few_and_hold_what_they_must(text, image_tokens, grow):
    made = rows_of([1], text=text, image_tokens=image_tokens, grow=grow)
    most = text + image_tokens
    found = [batch_length(made, longest) for longest in range(1, most + 1)]
    assert all(longest <= length <= most for longest, length in enumerate(found, 1))
    assert found == sorted(found) and len(set(found)) <= MOST
    behind = [suffix_length(made, longest) for longest in range(1, text + 1)]
    assert all(longest <= length < longest + max(32, text // 2 + 64) for longest, length in enumerate(behind, 1))
    assert len(set(behind)) <= MOST


def test_lengths_of_a_large_model():
    made = rows_of([1], text=192, image_tokens=576)
    assert [batch_length(made, n) for n in (10, 577, 640, 641, 705, 768)] == [576, 640, 640, 704, 768, 768]
    assert [suffix_length(made, n) for n in (1, 48, 49, 192)] == [64, 64, 64, 192]


@settings(deadline=None)
@given(st.lists(st.integers(1, 520), min_size=1, max_size=30), st.integers(1, 7))
def test_batches_are_no_more_and_no_longer_than_in_the_records_order(lengths, batch_size):
    made = rows_of(lengths, text=512, image_tokens=8)
    assert sorted(eval_order(made)) == list(range(len(lengths)))
    found = list(eval_batches(made, batch_size))
    assert sorted(name for _, ids in found for name in ids) == sorted(map(str, range(len(lengths))))
    in_order = [lengths[i : i + batch_size] for i in range(0, len(lengths), batch_size)]
    assert len(found) == len(in_order)
    shapes = [batch["tokens"].shape for batch, _ in found]
    assert all(shape == batch["segment_ids"].shape for shape, (batch, _) in zip(shapes, found, strict=True))
    assert sum(shape[1] for shape in shapes) <= sum(batch_length(made, max(part)) for part in in_order)
    for batch, ids in found:
        assert batch["segment_ids"].sum(1)[: len(ids)].tolist() == [lengths[int(name)] for name in ids]


@st.composite
def asked_sets(draw):
    """(records with or without an image, sets that ask about them again): every question has tokens of its own."""
    count, random = draw(st.integers(1, 7)), np.random.default_rng(draw(st.integers(0, 99)))
    has_image = [draw(st.booleans()) for _ in range(count)]
    fmt = Format(None, lambda image: {"pixels": np.zeros(1, np.int64)}, IMAGE_TOKENS)

    def made(places, numbers, records):
        tokens = np.zeros((len(places), TEXT + IMAGE_TOKENS), np.int32)
        lengths = np.zeros(len(places), np.int32)
        for i, place in enumerate(places):
            system = [20] * random.integers(1, 3)
            text = [100 + numbers[i], *random.integers(30, 90, random.integers(0, 9))]
            row = [*system, *([IMAGE] * IMAGE_TOKENS if has_image[place] else []), *text]
            tokens[i, : len(row)], lengths[i] = row, len(row)
        arrays = {"tokens": tokens, "length": lengths, "last_position": lengths - 1,
                  "option_ids": np.asarray(numbers, np.int32)[:, None]}  # fmt: skip
        return Encoded(records, fmt, arrays, {"pixels": np.asarray(places)[:, None]})

    records = RecordSet([Record(str(i), "s", ()) for i in range(count)], np.zeros((count, 1, 1, 3)))
    sets, total = [made(range(count), range(count), records)], count
    for _ in range(draw(st.integers(0, 3))):
        places = draw(st.lists(st.integers(0, count - 1), max_size=count))
        numbers = range(total, total + len(places))
        sets.append(made(places, numbers, SimpleNamespace(places=tuple(places))))
        total += len(places)
    return sets


@settings(deadline=None)
@given(asked_sets(), st.sampled_from([(1, 1), (2, 1), (4, 1), (4, 2)]))
def test_every_question_is_asked_once_whole_and_beside_its_image(sets, shape):
    batch_size, processes = shape
    own_rows = np.split(np.arange(batch_size), processes)
    parts = [list(rounds(sets[0], sets[1:], batch_size, image_token_id=IMAGE, rows=own)) for own in own_rows]
    every = [(part, i) for part in sets for i in range(len(part.arrays["tokens"]))]
    seen = []
    for together in zip(*parts, strict=True):
        before = {key: np.concatenate([one.before[key] for one in together]) for key in together[0].before}
        for turn in zip(*(one.asked for one in together), strict=True):
            batch = {key: np.concatenate([asked.batch[key] for asked in turn]) for key in turn[0].batch}
            assert batch["tokens"].shape[0] == batch_size
            for question, row in zip(turn[0].questions, turn[0].rows, strict=True):
                part, index = every[question]
                first, rest = ((x["tokens"][row], x["segment_ids"][row].astype(bool)) for x in (before, batch))
                whole = [*first[0][first[1]], *rest[0][rest[1]]]
                assert whole == part.arrays["tokens"][index, : part.arrays["length"][index]].tolist()
                assert before["pixels"][row, 0, 0] == part.images["pixels"][index, 0]
                assert batch["option_ids"][row, 0] == question == rest[0].max() - 100
                assert batch["last_position"][row] == rest[1].sum() - 1 and IMAGE not in rest[0]
                # Ones, then zeros.
                assert (np.diff(rest[1].astype(int)) <= 0).all() and (np.diff(first[1].astype(int)) <= 0).all()
            assert turn[0].free == any(question < len(sets[0]) for question in turn[0].questions)
            seen += turn[0].questions.tolist()
    assert sorted(seen) == list(range(len(every)))
