"""The order of batches: complete epochs, the same on any number of processes, resumed exactly, mixed as asked."""

import dataclasses
import threading
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from record_sets import CountedImage, choices
from row_formats import llava

from medcg_jax.data.encoding import Encoded, concat_encoded, encode, encode_eval
from medcg_jax.data.eval_batches import eval_batches
from medcg_jax.data.pipeline import Batches
from medcg_jax.data.records import DataError, Record, RecordSet, Turn, concat

FORMAT = llava(4, 2)

ORDER = [[8, 9, 6, 5, 1], [3, 4, 2, 7, 0], [6, 0, 5, 9, 1], [4, 8, 2, 3, 7]]
MIXED = [[2, 9, 7, 3, 8], [7, 6, 8, 9, 0], [9, 7, 5, 8, 9], [4, 8, 7, 1, 9]]


def bare(sizes: dict[str, int]) -> Encoded:
    """Rows whose tokens are their own index, without a tokenizer."""
    names = [name for name, count in sizes.items() for _ in range(count)]
    records = [Record(f"{name}/{i}", name, (Turn("q", "a"),), image="x") for i, name in enumerate(names)]
    tokens = np.arange(len(records), dtype=np.int32)[:, None]
    arrays = {"tokens": tokens, "length": np.ones(len(records), np.int32)}
    pixels = np.zeros((len(records), 1, 1, 3), np.uint8)
    return Encoded(RecordSet(records, pixels), llava(1, 1), arrays, {"pixels": pixels})


def block(batch_size: int, process: int, processes: int) -> np.ndarray:
    """The rows of one of several processes that split a batch in their order."""
    return np.array_split(np.arange(batch_size), processes)[process]


def drawn(batches: Batches, count: int) -> list[list[int]]:
    found = [batch["tokens"][:, 0].tolist() for batch, _ in islice(batches, count)]
    batches.close()
    return found


small = settings(max_examples=15, deadline=None)


@small
@given(count=st.integers(1, 40), batch=st.integers(1, 16), seed=st.integers(0, 2**40), epochs=st.integers(1, 3))
def test_every_record_once_an_epoch(count, batch, seed, epochs):
    rows = drawn(Batches(bare({"a": count}), batch_size=batch, seed=seed, prefetch=0), -(-count * epochs // batch))
    flat = [i for row in rows for i in row]
    for epoch in range(epochs):
        assert sorted(flat[epoch * count : (epoch + 1) * count]) == list(range(count))


@settings(max_examples=12, deadline=None)
@given(
    count=st.integers(1, 60),
    seed=st.integers(0, 99),
    weighted=st.booleans(),
    legs=st.lists(st.tuples(st.sampled_from((1, 2, 4, 7)), st.integers(0, 4)), min_size=1, max_size=5),
)
def test_the_order_is_one_whatever_the_processes_and_the_stops(count, seed, weighted, legs):
    """Stopped anywhere a run goes on with another number of hosts, whether they build ahead or not."""
    encoded = bare({"a": count, "b": 5})
    options = {"batch_size": 28, "seed": seed, "weights": {"a": 2.0, "b": 1.0} if weighted else None}
    total = sum(steps for _, steps in legs)
    whole, joined, position = drawn(Batches(encoded, **options, prefetch=0), total), [], 0
    for hosts, steps in legs:
        own = [{"rows": block(28, host, hosts), "prefetch": 2 * (host % 2)} for host in range(hosts)]
        parts = [drawn(Batches(encoded, **options, **one, position=position), steps) for one in own]
        joined += [sum((part[step] for part in parts), []) for step in range(steps)]
        position += steps
    assert joined == whole


@settings(max_examples=12, deadline=None)
@given(batch_size=st.integers(1, 12), empty=st.integers(0, 7), hosts=st.integers(1, 4))
def test_rows_beyond_the_records_are_empty_and_the_others_stay(batch_size, empty, hosts):
    """Twelve records in batches that devices do not divide; a process may have empty rows alone."""
    num_rows = -(-(batch_size + empty) // hosts) * hosts
    options = {"batch_size": batch_size, "seed": 1, "prefetch": 0}
    encoded = bare({"a": 12})
    encoded = dataclasses.replace(encoded, arrays=encoded.arrays | {"at_weights": np.ones((12, 3), np.float32)})
    whole, ids = next(Batches(encoded, **options))
    parts = [
        next(Batches(encoded, **options, num_rows=num_rows, rows=block(num_rows, host, hosts))) for host in range(hosts)
    ]
    assert sum((part_ids for _, part_ids in parts), []) == ids
    for key, array in whole.items():
        rows = np.concatenate([part[key] for part, _ in parts])
        np.testing.assert_array_equal(rows[:batch_size], array)
        assert len(rows) == num_rows
    for key in ("segment_ids", "at_weights"):
        assert not np.concatenate([part[key] for part, _ in parts])[batch_size:].any()
        assert whole[key].any(axis=1).all()


@small
@given(
    weights=st.dictionaries(st.sampled_from("abcd"), st.floats(0.05, 20), min_size=1),
    seed=st.integers(0, 9),
    start=st.integers(0, 30),
)
def test_mixture_fractions(weights, seed, start):
    encoded = bare({name: 3 + 4 * place for place, name in enumerate(sorted(weights))})
    options = {"batch_size": 16, "seed": seed, "weights": weights, "prefetch": 0}
    flat = sum(drawn(Batches(encoded, position=start, **options), 40), [])
    counts = Counter(encoded.records.records[i].subset for i in flat)
    total = sum(weights.values())
    for name, weight in weights.items():
        # Grain rounds weights to hundredths of the smallest, and any stretch is at most a record or two off.
        assert abs(counts[name] - len(flat) * weight / total) <= 2 + 0.02 * len(flat)


def test_a_mixture_goes_through_each_subset_in_epochs_of_its_own():
    encoded = bare({"a": 5, "b": 7})
    flat = sum(drawn(Batches(encoded, batch_size=6, seed=0, weights={"a": 1, "b": 2}), 20), [])
    for low, high in ((0, 5), (5, 12)):
        own = [i for i in flat if low <= i < high]
        for at in range(0, len(own) - (high - low) + 1, high - low):
            assert sorted(own[at : at + high - low]) == list(range(low, high))


def test_epochs_and_neighbouring_seeds_differ():
    encoded = bare({"a": 50})
    by_seed = [sum(drawn(Batches(encoded, batch_size=50, seed=seed), 3), []) for seed in range(3)]
    orders = [tuple(flat[at : at + 50]) for flat in by_seed for at in (0, 50, 100)]
    assert len(set(orders)) == 9


def test_the_order_is_this_one():
    # Frozen: a run resumed under another version of the libraries must go on with the same records.
    encoded = bare({"a": 7, "b": 3})
    assert drawn(Batches(encoded, batch_size=5, seed=1), 4) == ORDER
    assert drawn(Batches(encoded, batch_size=5, seed=1, weights={"a": 1, "b": 2}), 4) == MIXED


def test_position_counts_batches_drawn_and_not_those_built_ahead():
    batches = Batches(bare({"a": 9}), batch_size=2, seed=0, position=5, prefetch=4)
    assert batches.position == 5
    next(batches), next(batches)
    assert batches.position == 7
    batches.close()


def test_close_ends_the_threads():
    before = set(threading.enumerate())
    batches = Batches(bare({"a": 9}), batch_size=2, seed=0, prefetch=4)
    next(batches)
    started = set(threading.enumerate()) - before
    assert started
    batches.close()
    for thread in started:
        thread.join(5)
        assert not thread.is_alive()


def test_a_batch_is_what_the_model_takes(word_tokenizer, plain_config):
    encoded = encode(choices(6), word_tokenizer, plain_config, FORMAT)
    batch, ids = next(Batches(encoded, batch_size=4, seed=3))
    shapes = {key: (value.shape, value.dtype.name) for key, value in batch.items()}
    assert shapes == {
        "tokens": ((4, 42), "int32"),
        "segment_ids": ((4, 42), "int32"),
        "pixels": ((4, 1, 4, 4, 3), "uint8"),
        "target_positions": ((4, 6), "int32"),
        "targets": ((4, 6), "int32"),
        "target_weights": ((4, 6), "float32"),
    }
    for row, name in enumerate(ids):
        index = int(name.split("/")[-1])
        assert (batch["pixels"][row] == index).all()
        real = batch["segment_ids"][row] == 1
        assert (batch["tokens"][row][~real] == word_tokenizer.pad_id).all() and real[: real.sum()].all()
        letter = word_tokenizer.encode("AB"[index % 2])[0]
        assert batch["targets"][row].tolist() == [letter, word_tokenizer.eos_id, 0, 0, 0, 0]
        assert batch["target_weights"][row].tolist() == [1, 1, 0, 0, 0, 0]
        next_tokens = batch["tokens"][row][batch["target_positions"][row][:2] + 1]
        assert next_tokens.tolist() == [letter, word_tokenizer.eos_id]


def test_each_process_decodes_its_own_rows_only(word_tokenizer, plain_config):
    decoded = []
    records = RecordSet(choices(16).records, [CountedImage(i, decoded) for i in range(16)])
    encoded = encode(records, word_tokenizer, plain_config, FORMAT, memory_limit_bytes=0)
    assert encoded.images is None and not decoded
    options = {"batch_size": 8, "seed": 1, "prefetch": 0}
    batch, ids = next(Batches(encoded, rows=np.array([2, 3]), **options))
    assert [f"04/train/{i}" for i in decoded] == ids and len(ids) == 2
    kept = encode(choices(16), word_tokenizer, plain_config, FORMAT)
    whole, _ = next(Batches(kept, **options))
    for key, value in batch.items():
        np.testing.assert_array_equal(value, whole[key][2:4])


def test_a_decoding_error_names_its_record(word_tokenizer, plain_config):
    class Broken(CountedImage):
        def pixels(self):
            raise DataError("truncated")

    records = RecordSet(choices(4).records, [Broken(i, []) for i in range(4)])
    with pytest.raises(DataError, match=r"record 04/train/0: truncated"):
        encode(records, word_tokenizer, plain_config, FORMAT)
    late = encode(records, word_tokenizer, plain_config, FORMAT, memory_limit_bytes=0)
    with pytest.raises(DataError, match=r"record 04/train/\d: truncated"):
        next(Batches(late, batch_size=2, seed=0))


def test_joined_parts_draw_as_one_encoding(word_tokenizer, plain_config):
    parts = [choices(5, subset="04"), choices(3, subset="07")]
    joined = concat_encoded([encode(part, word_tokenizer, plain_config, FORMAT) for part in parts])
    assert [r.subset for r in joined.records.records] == ["04"] * 5 + ["07"] * 3
    at_once = encode(concat(parts), word_tokenizer, plain_config, FORMAT)
    (batch, ids), (other, other_ids) = (next(Batches(rows, batch_size=8, seed=2)) for rows in (joined, at_once))
    assert ids == other_ids
    for key, value in batch.items():
        np.testing.assert_array_equal(value, other[key])


@pytest.mark.parametrize(("count", "batch", "processes"), [(7, 3, 1), (8, 4, 2), (5, 4, 4), (1, 4, 2), (9, 8, 4)])
def test_evaluation_gives_each_record_once(word_tokenizer, plain_config, count, batch, processes):
    encoded = encode_eval(choices(count), word_tokenizer, plain_config, FORMAT)
    per_process = [list(eval_batches(encoded, batch, rows=block(batch, p, processes))) for p in range(processes)]
    assert len({len(found) for found in per_process}) == 1
    names = []
    for step in zip(*per_process, strict=True):
        for rows, ids in step:
            # Four lengths at most; no row of these needs more than the first.
            assert rows["tokens"].shape == (batch // processes, 32)
            assert rows["row_mask"].sum() == len(ids) and rows["row_mask"].dtype == np.float32
            assert (rows["segment_ids"].sum(1) == rows["last_position"] + 1).all()
            first = step[0][0]["pixels"][0]
            assert all((pixels == first).all() for pixels in rows["pixels"][len(ids) :])
            names += ids
    assert names == [record.id for record in encoded.records.records]


def test_wrong_use_is_one_clear_line():
    encoded = bare({"a": 3})
    with pytest.raises(DataError, match="no records"):
        Batches(bare({}), batch_size=1, seed=0)
    with pytest.raises(ValueError, match=r"rows=\[1, 3\] of batch_size=3"):
        Batches(encoded, batch_size=3, seed=0, rows=np.array([1, 3]))
    with pytest.raises(DataError, match="subset_weights names a, b; the records are of a"):
        Batches(encoded, batch_size=1, seed=0, weights={"a": 1, "b": 1})
    with pytest.raises(DataError, match="positive numbers"):
        Batches(encoded, batch_size=1, seed=0, weights={"a": 0})
