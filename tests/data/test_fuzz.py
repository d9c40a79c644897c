"""Some hundred broken inputs of each kind are taken rightly or refused, and the fuzzer sees what it must see."""

import os
import re
import time
from pathlib import Path

import fuzz_inputs
import numpy as np
import pytest
from fuzz_inputs import KINDS, Subject, fuzz, make, read_one, seeds

from medcg_jax.data.images import ImageError

SEED = 20241220


@pytest.fixture
def pack(shared_dir) -> Path:
    return (shared_dir / "data" / "medmat-mini").resolve()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("each", [40, pytest.param(300, marks=pytest.mark.long)])
def test_mutations_of_each_kind_are_taken_rightly_or_refused(pack, tmp_path, each):
    count = each * len(KINDS)
    result = fuzz(pack, count, SEED, 1, tmp_path / "kept")
    assert not result.failures and not (tmp_path / "kept").exists()
    assert result.taken.total() + result.refused.total() == count
    for kind in KINDS:
        assert sum(number for (own, _), number in result.taken.items() if own == kind) >= each // 50, kind
        assert sum(number for (own, _), number in result.refused.items() if own == kind) > each // 6, kind


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


FAULTS = {"png": "no answer in", "gif": r"killed its process \(-6\)", "bmp": "took ", "tiff": "KeyError: 'tiff'"}


def faulty(kind, content, random, pack, scratch):
    """Hangs, dies, takes memory or raises, by the kind of file."""
    if kind == "png":
        time.sleep(60)
    if kind == "gif":
        os.abort()
    if kind == "bmp":
        return bool(np.ones(2**29, np.uint8).any())
    return {}[kind] if kind == "tiff" else True


def finds_the_files(pack, scratch):
    """A process that has the files to start from before its first input."""
    for kind in KINDS:
        seeds(kind, pack)


@pytest.mark.timeout(300)
def test_planted_faults_are_found_and_their_inputs_kept(pack, tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz_inputs, "MAX_SECONDS", 3.0)
    result = fuzz(pack, len(KINDS), SEED, 1, tmp_path, faulty, Subject(warm=finds_the_files))
    assert len(result.failures) == len(FAULTS), result.failures
    for kind, said in FAULTS.items():
        index = KINDS.index(kind)
        [failure] = [line for line in result.failures if f"input {index}," in line]
        assert re.search(said, failure), failure
        assert (tmp_path / f"{SEED}-{index}.{kind}").read_bytes() == make(SEED, index, pack)[2]


@pytest.mark.parametrize(
    "shape, dtype, size",
    [((2, 3), "uint8", (2, 3)), ((2, 3, 3), "float32", (2, 3)), ((2, 3, 3), "uint8", (3, 2)),
     ((3000, 3000, 3), "uint8", (3000, 3000))],
)  # fmt: skip
def test_a_wrong_image_is_no_image_taken(pack, tmp_path, monkeypatch, shape, dtype, size):
    monkeypatch.setattr(fuzz_inputs, "read_image", lambda *_: (np.zeros(shape, dtype), ""))
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
