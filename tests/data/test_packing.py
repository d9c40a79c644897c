"""Batches laid several records to a row: each record whole and once, the same on any number of processes."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from record_sets import choice

from medcg_jax.data.encoding import Encoded, encode
from medcg_jax.data.packing import Packer, RowShape, Sizes, choose, lay_out, sizes
from medcg_jax.data.pipeline import Batches, draws
from medcg_jax.data.records import DataError, Record, RecordSet, Turn
from medcg_jax.families.formats import llava

IMAGE_TOKENS, TARGETS = 3, 4
FORMAT = llava(2, IMAGE_TOKENS)
small = settings(max_examples=60, deadline=None)


def made(texts: list[int], images: list[bool], targets: list[int]) -> Encoded:
    """Rows whose tokens, targets and pixels name their record: token t of record i is 100 (i + 1) + t."""
    images, texts = np.asarray(images), np.asarray(texts)
    length = texts + IMAGE_TOKENS * images
    place = np.arange(length.max())
    records = [Record(f"a/{i}", "a", (Turn("q", "a"),), image="x" if has else "") for i, has in enumerate(images)]
    tokens = np.where(place < length[:, None], 100 * np.arange(1, len(texts) + 1)[:, None] + place, 7)
    counts = np.minimum(targets, texts - 1)[:, None]
    positions = np.maximum(length[:, None] - 2 - np.arange(TARGETS), 0)
    pixels = np.where(images, np.arange(1, len(texts) + 1), 0).astype(np.uint8)
    return Encoded(
        RecordSet(records, np.zeros((len(texts), 2, 2, 3), np.uint8)), FORMAT,
        {
            "tokens": tokens.astype(np.int32), "length": length.astype(np.int32),
            "target_positions": positions.astype(np.int32),
            "targets": np.take_along_axis(tokens, positions + 1, axis=1).astype(np.int32),
            "target_weights": (np.arange(TARGETS) < counts).astype(np.float32),
        },
        {"pixels": np.broadcast_to(pixels[:, None, None, None], (len(texts), 2, 2, 3))},
    )  # fmt: skip


@st.composite
def encodings(draw, least: int = 1) -> Encoded:
    count = draw(st.integers(least, 30))
    lists = [st.integers(2, 9), st.booleans(), st.integers(1, TARGETS)]
    return made(*(draw(st.lists(one, min_size=count, max_size=count)) for one in lists))


def tokens_of(shape: RowShape) -> float:
    return shape.rows * shape.length


def shape_for(encoded: Encoded, batches: np.ndarray, unit: int = 1, multiple: int = 0) -> RowShape:
    return choose(sizes(encoded), batches, unit=unit, multiple=multiple, cost=tokens_of)


def unpacked(batch: dict) -> list[dict]:
    """What a model sees of each record of packed rows: its tokens, targets with what is read for them, its image."""
    found = []
    for row, ids in enumerate(batch["segment_ids"]):
        image = 0
        weighted = batch["target_weights"][row] > 0
        at = batch["target_positions"][row][weighted]
        for number in range(1, ids.max() + 1):
            place = np.flatnonzero(ids == number)
            tokens = batch["tokens"][row, place]
            record = int(tokens[0]) // 100
            own = np.isin(at, place)
            assert (np.diff(place) == 1).all()
            has_image = record in batch["with_image"]
            found.append({
                "record": record, "tokens": tokens.tolist(), "at": (at[own] - place[0]).tolist(),
                "targets": batch["targets"][row][weighted][own].tolist(),
                "pixels": int(batch["pixels"][row, image : image + has_image].max(initial=0)),
            })  # fmt: skip
            image += has_image
    return found


def expected(encoded: Encoded, index: int) -> dict:
    arrays, length = encoded.arrays, int(encoded.arrays["length"][index])
    real = arrays["target_weights"][index] > 0
    return {
        "record": index + 1, "tokens": arrays["tokens"][index, :length].tolist(),
        "at": arrays["target_positions"][index][real].tolist(), "targets": arrays["targets"][index][real].tolist(),
        "pixels": (index + 1) * bool(encoded.records.records[index].image),
    }  # fmt: skip


def seen(encoded: Encoded, batch: dict) -> list[dict]:
    with_image = {i + 1 for i, record in enumerate(encoded.records.records) if record.image}
    return unpacked(batch | {"with_image": with_image})


@small
@given(encoded=encodings(), batch=st.integers(1, 12), seed=st.integers(0, 99), multiple=st.sampled_from((0, 8)))
def test_every_record_is_there_once_and_whole(encoded, batch, seed, multiple):
    drawn = draws(encoded, batch_size=batch, seed=seed, num_batches=4)
    shape = shape_for(encoded, drawn, multiple=multiple)
    assert shape.rows * shape.images <= max(batch, 1) and (not multiple or shape.length % multiple == 0)
    batches = Batches(encoded, batch_size=batch, seed=seed, pack=shape, prefetch=0)
    for indices, (rows, ids) in zip(drawn, islice(batches, 4), strict=True):
        assert rows["tokens"].shape == rows["segment_ids"].shape == (shape.rows, shape.length)
        assert rows["pixels"].shape == (shape.rows, shape.images, 2, 2, 3)
        assert rows["targets"].shape == (shape.rows, shape.targets)
        assert not rows["tokens"][rows["segment_ids"] == 0].any()
        found = seen(encoded, rows)
        assert [f"a/{one['record'] - 1}" for one in found] == ids
        assert sorted(found, key=str) == sorted((expected(encoded, i) for i in indices), key=str)


@pytest.mark.parametrize("fault", ["", "cut", "doubled", "image", "target"])
def test_a_fault_would_be_seen(fault):
    encoded = made([5, 4, 3], [True, False, True], [2, 1, 1])
    packed, _ = Packer(encoded, RowShape(rows=2, length=12, images=1, targets=4)).rows(np.arange(3), np.arange(2))
    row, start = np.argwhere(packed["tokens"] == 200)[0]
    if fault == "cut":
        packed["segment_ids"][row, start + 3] = 0
    elif fault == "doubled":
        packed["tokens"][row, start : start + 3] = 300
    elif fault == "image":
        packed["pixels"] = packed["pixels"][::-1]
    elif fault == "target":
        packed["target_positions"][row] -= 1
    found = sorted(seen(encoded, packed), key=lambda one: one["record"])
    assert (found == [expected(encoded, i) for i in range(3)]) == (not fault)


@small
@given(
    encoded=encodings(), rows=st.integers(1, 3), processes=st.sampled_from((1, 2, 3)), seed=st.integers(0, 9),
    position=st.integers(0, 5),
)  # fmt: skip
def test_processes_together_have_the_rows_of_one_and_go_on_anywhere(encoded, rows, processes, seed, position):
    batch = 6 * rows
    drawn = draws(encoded, batch_size=batch, seed=seed, num_batches=position + 2)
    shape, options = shape_for(encoded, drawn, unit=processes), {"batch_size": batch, "seed": seed, "prefetch": 0}
    assert shape.rows % processes == 0
    whole = list(islice(Batches(encoded, **options, pack=shape), position + 2))[position:]
    parts = [
        islice(Batches(encoded, **options, pack=shape, position=position, rows=own), 2)
        for own in np.array_split(np.arange(shape.rows), processes)
    ]
    for (expected_rows, expected_ids), *own in zip(whole, *parts, strict=True):
        for key, array in expected_rows.items():
            np.testing.assert_array_equal(np.concatenate([part[0][key] for part in own]), array)
        assert sum((ids for _, ids in own), []) == expected_ids


@small
@given(encoded=encodings(4), batch=st.integers(2, 12), data=st.data())
def test_a_layout_keeps_what_rows_hold_and_is_near_the_shortest(encoded, batch, data):
    every = sizes(encoded)
    drawn = draws(encoded, batch_size=batch, seed=data.draw(st.integers(0, 9)), num_batches=3)
    rows, of = data.draw(st.integers(1, batch)), every.of(drawn)
    images = max(1, -(-int(of.images.sum(axis=1).max()) // rows))
    layout = lay_out(of, rows, images)
    np.testing.assert_array_equal(layout, lay_out(of, rows, images))
    # A batch lies as it does alone, whatever others are looked at beside it.
    alone = lay_out(every.of(drawn[1:2]), rows, images)
    np.testing.assert_array_equal(layout[1:2], alone)
    for batch_layout, length, has_image in zip(layout, of.length, of.images, strict=True):
        loads = np.bincount(batch_layout, length, minlength=rows)
        assert np.bincount(batch_layout, has_image, minlength=rows).max() <= images
        if images >= of.images.sum(axis=1).max():  # images do not bind: Graham's bound holds
            assert loads.max() <= 4 / 3 * max(-(-length.sum() // rows), length.max()) + length.max()


def test_rows_with_a_place_for_one_image_are_filled_with_text():
    # Images of 576 tokens and text alone: rows as long as the longest record, and the tower runs on four, not on eight.
    text = np.full(8, 64)
    images = np.asarray([1, 0] * 4)
    shape = choose(
        Sizes(text + 576 * images, images, np.full(8, 2)), np.arange(8)[None], unit=1, multiple=64, cost=tokens_of
    )
    assert shape == RowShape(rows=4, length=704, images=1, targets=4)
    # Equal records gain nothing: one a row.
    same = Sizes(text + 576, np.ones(8, int), np.full(8, 2))
    assert choose(same, np.arange(8)[None], unit=1, multiple=64, cost=tokens_of).rows == 8


def test_draws_are_what_batches_draw():
    encoded = made([3] * 9, [True] * 9, [1] * 9)
    for weights in (None, {"a": 2.0}):
        drawn = draws(encoded, batch_size=4, seed=5, num_batches=5, weights=weights)
        batches = islice(Batches(encoded, batch_size=4, seed=5, weights=weights), 5)
        assert [[f"a/{i}" for i in indices] for indices in drawn] == [ids for _, ids in batches]


def test_only_the_images_of_own_rows_are_decoded(word_tokenizer, plain_config):
    class Counting:
        asked: list[int] = []

        def __len__(self):
            return 8

        def __getitem__(self, index):
            self.asked.append(index)
            return np.full((2, 2, 3), index, np.uint8)

    records = RecordSet([choice(i, image=i != 3) for i in range(8)], Counting())
    encoded = encode(records, word_tokenizer, plain_config, FORMAT, memory_limit_bytes=0)
    _, ids = Packer(encoded, RowShape(4, 80, 2, 12)).rows(np.arange(8), np.array([0, 2]))
    assert sorted(f"04/train/{i}" for i in Counting.asked) == sorted(set(ids) - {"04/train/3"}) and len(ids) < 8


def test_what_does_not_fit_is_said():
    encoded = made([5, 4, 3], [True, True, True], [2, 1, 1])
    with pytest.raises(DataError, match=r"does not fit RowShape\(rows=2, length=8, .*: 13 tokens, 2 targets in row 1"):
        Packer(encoded, RowShape(2, 8, 2, 4)).rows(np.arange(3), np.arange(2))
    with pytest.raises(DataError, match="does not fit .*3 images for 2 rows of 1"):
        Packer(encoded, RowShape(2, 99, 1, 9)).rows(np.arange(3), np.arange(2))
    boxes = Encoded(encoded.records, FORMAT, {**encoded.arrays, "box_targets": np.zeros(3)}, encoded.images)
    with pytest.raises(DataError, match="data.pack=1: 0 is accepted of rows that have box_targets"):
        Packer(boxes, RowShape(2, 99, 2, 9))
