"""Tensor files of released checkpoints, read and written one tensor at a time: safetensors, PyTorch's .bin shards.

The safetensors format (8 bytes of header length, a JSON header, raw little-endian data) is read and written here, so
that bfloat16 needs no PyTorch. Source: huggingface/safetensors:README.md, "Format".
"""

import json
import math
import pickle
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from medcg_jax.run_config import ConfigError

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
# As transformers cuts: a new file when the next tensor would take this one past so many bytes.
MAX_FILE_BYTES = 5_000_000_000


class WeightsError(ConfigError):
    """A checkpoint cannot be used; the message says what is wrong with it and what would be accepted."""


class Tensors:
    """The tensors of a directory: names, shapes, and each one's numbers when asked.

    `shapes[name]` is a tuple; `read(name)` a numpy array, backed by the file where the format allows.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], read: Callable[[str], np.ndarray]):
        self.shapes = shapes
        self.read = read


def open_tensors(directory: Path) -> Tensors:
    """The tensors of the safetensors (preferred) or .bin files in `directory`, whole or in shards.

    Raises:
      WeightsError: there are none, a shard of the index is missing, a file is damaged, or PyTorch is needed and absent.
    """
    for stem, opener in (("model.safetensors", open_safetensors), ("pytorch_model.bin", open_bin)):
        files = _files(directory, stem)
        if files:
            return _joined([opener(file) for file in files])
    raise WeightsError(
        f"{directory} holds no weights; accepted: model.safetensors, pytorch_model.bin, or their shards with an index"
    )


def _files(directory: Path, stem: str) -> list[Path]:
    """The file named `stem`, or the shards that its index names; none: an empty list."""
    index = directory / f"{stem}.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise WeightsError(f"{index} names {len(names)} files, of which {len(missing)} are missing: {missing[:4]}")
        if any("/" in name or "\\" in name for name in names):
            raise WeightsError(f"{index} names files outside its directory; plain file names are accepted")
        return [directory / name for name in names]
    return [directory / stem] if (directory / stem).is_file() else []


def _joined(parts: list[Tensors]) -> Tensors:
    owner = {name: part for part in parts for name in part.shapes}
    if len(owner) != sum(len(part.shapes) for part in parts):
        raise WeightsError("a tensor name stands in two files of one checkpoint; each may stand in one")
    shapes = {name: part.shapes[name] for name, part in owner.items()}
    return Tensors(shapes, lambda name: owner[name].read(name))


def open_safetensors(path: Path) -> Tensors:
    """The tensors of one safetensors file, read when asked.

    Raises:
      WeightsError: the file is missing, cut off or damaged.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise WeightsError(f"{path} is cut off or no safetensors file: header of {length} in {size} bytes")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise WeightsError(f"{path} is no safetensors file: its header is not JSON") from error
    header.pop("__metadata__", None)
    start = 8 + length

    def read(name: str) -> np.ndarray:
        entry = header[name]
        if entry["dtype"] not in DTYPES:
            raise WeightsError(f"{path}: {name} has dtype {entry['dtype']}; accepted: {', '.join(DTYPES)}")
        dtype = np.dtype(DTYPES[entry["dtype"]])
        begin, end = entry["data_offsets"]
        if end - begin != math.prod(entry["shape"]) * dtype.itemsize or start + end > size:
            raise WeightsError(f"{path} is cut off or damaged at {name}")
        return np.memmap(path, dtype, mode="r", offset=start + begin, shape=tuple(entry["shape"]))

    return Tensors({name: tuple(entry["shape"]) for name, entry in header.items()}, read)


def open_bin(path: Path, entry: str | None = None) -> Tensors:
    """The tensors of one PyTorch file, or of the dict that it holds as `entry`; nothing in it is executed.

    Raises:
      WeightsError: PyTorch is absent, the file is damaged, holds other objects than tensors and plain values, or lacks
        `entry`.
    """
    try:
        import torch
    except ImportError as error:
        raise WeightsError(f"{path} is a PyTorch file and needs PyTorch: pip install 'medcg_jax[parity]'") from error
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    try:
        # Files of old versions are no archives, and cannot be mapped.
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise WeightsError(f"{path} is no PyTorch file of tensors and plain values: {reason}") from error
    if entry is not None:
        if not isinstance(tensors, dict) or entry not in tensors:
            held = ", ".join(map(str, tensors)) if isinstance(tensors, dict) else type(tensors).__name__
            raise WeightsError(f"{path} has no entry {entry!r}; it holds {held[:200]}")
        tensors = tensors[entry]
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise WeightsError(f"{path} holds other things than tensors by name; a state dict is accepted")

    def read(name: str) -> np.ndarray:
        tensor = tensors[name].detach()
        if tensor.dtype == torch.bfloat16:
            return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    return Tensors({name: tuple(tensor.shape) for name, tensor in tensors.items()}, read)


def read_json(path: Path) -> dict:
    """The object in a JSON file.

    Raises:
      WeightsError: it is missing, no JSON, or no object.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} is no JSON file: {error}") from error
    if not isinstance(found, dict):
        raise WeightsError(f"{path} holds a {type(found).__name__}; an object is accepted")
    return found


def write_safetensors(
    directory: Path, specs: dict[str, tuple[tuple[int, ...], np.dtype]], tensors: Iterable[tuple[str, np.ndarray]]
) -> None:
    """Writes `model.safetensors`, or shards of at most `MAX_FILE_BYTES` with their index, into `directory`.

    specs: name -> (shape, dtype) of every tensor, in the order in which `tensors` gives them.
    """
    shards = _cut(specs)
    stream: Iterator[tuple[str, np.ndarray]] = iter(tensors)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    names = ["model.safetensors"] if len(shards) == 1 else names
    for name, shard in zip(names, shards, strict=True):
        _write_shard(directory / name, shard, stream)
    if len(shards) > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(_num_bytes(spec) for spec in specs.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _num_bytes(spec) -> int:
    return math.prod(spec[0]) * np.dtype(spec[1]).itemsize


def _cut(specs) -> list[dict]:
    shards: list[dict] = [{}]
    used = 0
    for name, spec in specs.items():
        if shards[-1] and used + _num_bytes(spec) > MAX_FILE_BYTES:
            shards.append({})
            used = 0
        shards[-1][name] = spec
        used += _num_bytes(spec)
    return shards


def _write_shard(path: Path, specs, stream: Iterator[tuple[str, np.ndarray]]) -> None:
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, spec in specs.items():
        end = offset + _num_bytes(spec)
        header[name] = {"dtype": NAMES[np.dtype(spec[1])], "shape": list(spec[0]), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (shape, dtype) in specs.items():
            given, value = next(stream)
            if given != name or value.shape != tuple(shape) or value.dtype != np.dtype(dtype):
                raise WeightsError(f"writing {name} {shape} {dtype}, but got {given} {value.shape} {value.dtype}")
            file.write(np.ascontiguousarray(value).tobytes())
