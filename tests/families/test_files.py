"""Tensor files: what safetensors reads and writes is what we write and read, shards and bfloat16 included."""

import json
import math
import os
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from medcg_jax.families.weights.files import WeightsError, open_tensors, write_safetensors

RNG = np.random.default_rng(0)
ARRAYS = {
    "a.weight": RNG.standard_normal((3, 5)).astype(np.float32),
    "b": RNG.standard_normal((7,)).astype(ml_dtypes.bfloat16),
    "c": RNG.standard_normal((2, 2, 2)).astype(np.float16),
}


def write(directory, arrays=ARRAYS, **options):
    directory.mkdir(exist_ok=True)
    specs = {name: (value.shape, value.dtype) for name, value in arrays.items()}
    write_safetensors(directory, specs, arrays.items(), **options)


def assert_same(directory):
    found = open_tensors(directory)
    assert found.shapes == {name: value.shape for name, value in ARRAYS.items()}
    for name, value in ARRAYS.items():
        read = found.read(name)
        assert read.dtype == value.dtype
        np.testing.assert_array_equal(np.asarray(read, np.float32), value.astype(np.float32))


def test_what_is_written_is_read_and_safetensors_reads_it_too(tmp_path):
    write(tmp_path)
    assert_same(tmp_path)
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    theirs = load_file(tmp_path / "model.safetensors")
    assert theirs["b"].dtype == torch.bfloat16
    for name, value in ARRAYS.items():
        np.testing.assert_array_equal(theirs[name].float().numpy(), value.astype(np.float32))


def test_shards_are_cut_by_size_and_found_by_their_index(tmp_path):
    write(tmp_path, max_file_bytes=64)
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    ]  # fmt: skip
    assert_same(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match="of which 1 are missing.*model-00002"):
        open_tensors(tmp_path)


def test_what_pytorch_saved_is_read(tmp_path):
    torch = pytest.importorskip("torch")
    state = {name: torch.from_numpy(value.astype(np.float32)) for name, value in ARRAYS.items()}
    state["b"], state["c"] = state["b"].bfloat16(), state["c"].half()
    torch.save({name: state[name] for name in ("a.weight", "b")}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"c": state["c"]}, tmp_path / "pytorch_model-00002-of-00002.bin")
    index = {"weight_map": {name: f"pytorch_model-0000{1 + (name == 'c')}-of-00002.bin" for name in state}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert_same(tmp_path)


def test_without_pytorch_a_bin_file_says_what_to_install(tmp_path, monkeypatch):
    zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w").close()
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(WeightsError, match=r"needs PyTorch: `pip install '\.\[parity\]'`"):
        open_tensors(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:6], "cut off"),
        (lambda data: data[:-3], "cut off, damaged or no safetensors file: .*not fully covered"),
        (lambda data: b"\x10" + b"\0" * 7 + b"x" * 40, "invalid JSON in header"),
        (lambda data: b"\xff" * 8 + data[8:], "no safetensors file"),
        (lambda data: data.replace(b'"F16"', b'"I16"'), "c has dtype I16; accepted"),
    ],
)
def test_damaged_files_are_refused(tmp_path, damage, message):
    write(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(WeightsError, match=message):
        open_tensors(tmp_path).read("c")


def test_an_empty_directory_and_tensors_out_of_order(tmp_path):
    with pytest.raises(WeightsError, match="holds no weights; accepted: model.safetensors, pytorch_model.bin"):
        open_tensors(tmp_path)
    specs = {name: (value.shape, value.dtype) for name, value in ARRAYS.items()}
    with pytest.raises(WeightsError, match="writing a.weight"):
        write_safetensors(tmp_path, specs, reversed(ARRAYS.items()))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9), inner=st.sampled_from([(), (3,), (2, 5), (0,)]), first=st.integers(0, 9),
    last=st.integers(0, 9), dtype=st.sampled_from((np.float32, np.float16, ml_dtypes.bfloat16)),
)  # fmt: skip
def test_rows_are_those_that_the_library_reads(tmp_path_factory, rows, inner, first, last, dtype):
    path = tmp_path_factory.mktemp("rows") / "model.safetensors"
    values = np.arange(rows * math.prod(inner), dtype=np.float32).reshape(rows, *inner)
    save_file({"before": np.ones(3, np.float32), "x": values.astype(dtype)}, path)
    expected = values.astype(dtype)[first:last]
    if len(expected) and expected.size:  # the library fails at empty slices
        with safe_open(path, "numpy") as file:
            assert (file.get_slice("x")[first : min(last, rows)] == expected).all()
    read = open_tensors(path.parent).read("x", (slice(first, last),))
    assert read.dtype == expected.dtype and read.shape == expected.shape
    assert (read.astype(np.float32) == expected.astype(np.float32)).all()


def test_a_file_that_was_cut_after_it_was_opened_is_refused(tmp_path):
    save_file({"x": np.ones((64, 4), np.float32)}, tmp_path / "model.safetensors")
    tensors = open_tensors(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 600)
    assert len(tensors.read("x", (slice(0, 2),))) == 2
    with pytest.raises(WeightsError, match="cannot be read at x: it ends .* bytes before the end of the tensor"):
        tensors.read("x")


def test_a_disk_gives_the_rows_and_not_their_neighbours(tmp_path):
    """By Linux's count for this process; mapped, as the library reads, a file comes with what is read ahead."""
    path = tmp_path / "model.safetensors"
    save_file({"x": np.ones((64, 1 << 16), np.float32)}, path)

    def given_by_disk(read) -> int:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        before = read_bytes()
        read()
        return read_bytes() - before

    def mapped():
        with safe_open(path, "numpy") as file:
            file.get_slice("x")[20:21]

    if not given_by_disk(path.read_bytes):
        pytest.skip("no disk below the temporary folder, or none that is counted")
    tensors = open_tensors(tmp_path)
    row = 4 << 16
    assert row <= given_by_disk(lambda: tensors.read("x", (slice(20, 21),))) <= row + 2 * 4096
    assert given_by_disk(mapped) > row + 2 * 4096


def read_bytes() -> int:
    try:
        fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text(encoding="utf-8").splitlines())
    except OSError:
        pytest.skip("this system does not count what a process reads")
    return int(fields["read_bytes"])
