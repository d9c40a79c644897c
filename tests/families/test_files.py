"""Tensor files: what safetensors reads and writes is what we write and read, shards and bfloat16 included."""

import json
import zipfile

import ml_dtypes
import numpy as np
import pytest

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
