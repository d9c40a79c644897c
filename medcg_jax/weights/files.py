"""Tensor files of released checkpoints, read and written one tensor at a time: safetensors, PyTorch's .bin shards.

The safetensors format (8 bytes of header length, a JSON header, raw little-endian data) is read and written here, so
that bfloat16 needs no PyTorch. Source: huggingface/safetensors:README.md, "Format".
"""

import json
import math
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
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
    """The tensors of a directory: names, shapes, dtypes, and each one's numbers when asked.

    `shapes[name]` is a tuple, `dtype(name)` numpy's; `read(name)` gives an array that nothing else holds, so that a
    tensor's memory is free again when its reader has dropped it.
    dtype: None: of tensors in memory, which are asked themselves. `origin(name)` says in which file a tensor is.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        read: Callable[[str], np.ndarray],
        dtype: Callable[[str], np.dtype] | None = None,
        origin: Callable[[str], str] = lambda name: "memory",
    ):
        self.shapes = shapes
        self.read = read
        self.dtype = dtype or (lambda name: read(name).dtype)
        self.origin = origin


def open_tensors(directory: Path) -> Tensors:
    """The tensors of the safetensors (preferred) or .bin files in `directory`, whole or in shards.

    Raises:
      WeightsError: there are none, a shard of the index is missing, a file is damaged, or PyTorch is needed and absent.
    """
    for stem, opener in (("model.safetensors", open_safetensors), ("pytorch_model.bin", open_bin)):
        files = _files(directory, stem)
        if files:
            return _whole([opener(file) for file in files])
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


def _whole(parts: list[Tensors]) -> Tensors:
    owner = {name: part for part in parts for name in part.shapes}
    if len(owner) != sum(len(part.shapes) for part in parts):
        raise WeightsError("a tensor name stands in two files of one checkpoint; each may stand in one")
    return _owned({name: (part, name) for name, part in owner.items()})


def joined(*sources: tuple[Tensors, Mapping[str, str]]) -> tuple[Tensors, dict[str, str]]:
    """(tensors, canonical name -> name in them) of several sources as one; of two equal names the later one counts.

    sources: each one's tensors, and canonical name -> its own name.
    """
    owner = {key: (part, name) for part, names in sources for key, name in names.items()}
    return _owned(owner), {key: key for key in owner}


def _owned(owner: dict[str, tuple[Tensors, str]]) -> Tensors:
    def ask(what: str, key: str):
        part, name = owner[key]
        return getattr(part, what)(name)

    shapes = {key: part.shapes[name] for key, (part, name) in owner.items()}
    return Tensors(shapes, partial(ask, "read"), partial(ask, "dtype"), partial(ask, "origin"))


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

    def dtype(name: str) -> np.dtype:
        # Asked when a tensor is used: a file may hold buffers of whole numbers that nobody needs.
        stated = header[name]["dtype"]
        if stated not in DTYPES:
            raise WeightsError(f"{path}: {name} has dtype {stated}; accepted: {', '.join(DTYPES)}")
        return np.dtype(DTYPES[stated])

    start = 8 + length
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        num_bytes = math.prod(entry["shape"]) * dtype(name).itemsize if entry["dtype"] in DTYPES else end - begin
        if start + end > size or end - begin != num_bytes:
            raise WeightsError(f"{path} is cut off or damaged at {name}")

    def read(name: str) -> np.ndarray:
        # Read and not mapped: pages of a mapped file stay in a process's memory until others need it.
        shape, offset = header[name]["shape"], start + header[name]["data_offsets"][0]
        value = np.fromfile(path, dtype(name), math.prod(shape), offset=offset)
        if value.size != math.prod(shape):
            raise WeightsError(f"{path} is cut off at {name}")
        return value.reshape(shape)

    return Tensors({name: tuple(entry["shape"]) for name, entry in header.items()}, read, dtype, lambda name: str(path))


def open_bin(path: Path, entry: str | None = None) -> Tensors:
    """The tensors of one PyTorch file, or of the dict that it holds as `entry`; nothing in it is executed.

    A file of a version before 1.6 cannot be read in parts, and is held whole.

    Raises:
      WeightsError: PyTorch is absent, the file is damaged, holds other objects than tensors and plain values, or lacks
        `entry`.
    """
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise WeightsError(f"{path} is a PyTorch file and needs PyTorch: pip install 'medcg_jax[parity]'") from error
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    in_parts = zipfile.is_zipfile(path)
    tensors = _state_dict(path, entry, in_parts)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
    held = None if in_parts else tensors
    del tensors

    def dtype(name: str) -> np.dtype:
        try:
            found = np.dtype(dtypes[name])
        except TypeError:
            found = None
        if found not in NAMES:
            raise WeightsError(f"{path}: {name} has dtype {dtypes[name]}; accepted: {', '.join(map(str, NAMES))}")
        return found

    def read(name: str) -> np.ndarray:
        dtype(name)
        # Mapped anew for each tensor, and copied: what is dropped at once are the pages of that tensor alone.
        return np.array(_numpy((held or _state_dict(path, entry, in_parts))[name]))

    return Tensors(shapes, read, dtype, lambda name: str(path))


def _state_dict(path: Path, entry: str | None, in_parts: bool) -> dict:
    """PyTorch's tensors by name, mapped where `in_parts`."""
    import torch

    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=in_parts)
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
    return tensors


def _numpy(tensor) -> np.ndarray:
    import torch

    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


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


@contextmanager
def written_whole(directory: Path):
    """A new directory beside `directory`, which takes its place when the block ends; gone where the block fails.

    What a killed process leaves bears another name, and makes way for the next one. `directory` may be there and empty.
    """
    directory = directory.absolute()
    part = directory.with_name(f".{directory.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        os.replace(part, directory)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_safetensors(
    directory: Path,
    specs: dict[str, tuple[tuple[int, ...], np.dtype]],
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Writes `model.safetensors`, or shards of at most `max_file_bytes` with their index, into `directory`.

    specs: name -> (shape, dtype) of every tensor, in the order in which `tensors` gives them.
    """
    shards = _cut(specs, max_file_bytes)
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


def _cut(specs, max_file_bytes: int) -> list[dict]:
    shards: list[dict] = [{}]
    used = 0
    for name, spec in specs.items():
        if shards[-1] and used + _num_bytes(spec) > max_file_bytes:
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
            file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8))
            # Dropped before the next is made.
            del value
