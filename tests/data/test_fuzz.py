"""Some hundred broken inputs of each kind are taken rightly or refused, and the fuzzer sees what it must see."""

import os
import re
import time
from pathlib import Path

import fuzz_inputs
import numpy as np
import pytest
from fuzz_inputs import KINDS, fuzz, make, read_one, seeds

from medcg_jax.data.images import ImageError

SEED = 20241220


@pytest.fixture
def pack(shared_dir) -> Path:
    return (shared_dir / "data" / "medmat-mini").resolve()


@pytest.mark.timeout(300)
def test_three_hundred_mutations_of_each_kind(pack, tmp_path):
    count = 300 * len(KINDS)
    result = fuzz(pack, count, SEED, 1, tmp_path / "kept")
    assert not result.failures and not (tmp_path / "kept").exists()
    assert result.taken.total() + result.refused.total() == count
    for kind in KINDS:
        assert sum(number for (own, _), number in result.taken.items() if own == kind) > 5, kind
        assert sum(number for (own, _), number in result.refused.items() if own == kind) > 50, kind


def test_the_same_seed_makes_the_same_inputs(pack):
    first = [make(SEED, index, pack)[:3] for index in range(200)]
    assert first == [make(SEED, index, pack)[:3] for index in range(200)]
    assert first != [make(SEED + 1, index, pack)[:3] for index in range(200)]
    assert len({content for _, _, content in first}) > 190


def test_the_files_that_it_starts_from_are_taken(pack, tmp_path):
    for kind in KINDS:
        taken = [read_one(kind, content, fuzz_inputs.Random(0), pack, tmp_path) for content in seeds(kind, pack)]
        # Of the hostile ones some are refused as they are.
        assert sum(taken) >= min(3, len(taken) - 1) and sum(taken) > 0, kind


def hangs(kind, content, random, pack, scratch):
    time.sleep(60 if kind == "png" else 0)
    return True


def dies(kind, content, random, pack, scratch):
    return os.abort() if kind == "gif" else True


def grows(kind, content, random, pack, scratch):
    return bool(np.ones(2**29, np.uint8).any()) if kind == "bmp" else True


def raises(kind, content, random, pack, scratch):
    return {}[kind] if kind == "tiff" else True


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "read, kind, said",
    [
        (hangs, "png", "no answer in"),
        (dies, "gif", r"killed its process \(-6\)"),
        (grows, "bmp", "took "),
        (raises, "tiff", "KeyError: 'tiff'"),
    ],
)
def test_a_planted_fault_is_found_and_its_input_kept(pack, tmp_path, monkeypatch, read, kind, said):
    monkeypatch.setattr(fuzz_inputs, "MAX_SECONDS", 2.0)
    result = fuzz(pack, len(KINDS), SEED, 1, tmp_path, read)
    index = KINDS.index(kind)
    assert len(result.failures) == 1
    assert re.search(said, result.failures[0]), result.failures
    assert (tmp_path / f"{SEED}-{index}.{kind}").read_bytes() == make(SEED, index, pack)[2]


@pytest.mark.parametrize(
    "found, size",
    [
        (np.zeros((2, 3), np.uint8), (2, 3)),
        (np.zeros((2, 3, 3), np.float32), (2, 3)),
        (np.zeros((2, 3, 3), np.uint8), (3, 2)),
        (np.zeros((3000, 3000, 3), np.uint8), (3000, 3000)),
    ],
)
def test_a_wrong_image_is_no_image_taken(pack, tmp_path, monkeypatch, found, size):
    monkeypatch.setattr(fuzz_inputs, "read_image", lambda *_: (found, ""))
    monkeypatch.setattr(fuzz_inputs, "image_size", lambda *_: size)
    with pytest.raises(AssertionError):
        read_one("png", b"", fuzz_inputs.Random(0), pack, tmp_path)


@pytest.mark.parametrize("message", ["two\nlines", "of CompressedSamples^CT1", ""])
def test_a_wrong_message_is_no_refusal(pack, tmp_path, monkeypatch, message):
    def refuse(*_):
        raise ImageError(message)

    monkeypatch.setattr(fuzz_inputs, "read_image", refuse)
    with pytest.raises(AssertionError, match="message"):
        read_one("png", b"", fuzz_inputs.Random(0), pack, tmp_path)
