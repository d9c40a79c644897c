"""Tensor files of released checkpoints, read and written one tensor at a time: safetensors, PyTorch's .bin shards.

The `safetensors` library checks its format. It cannot read rows without mapping the file, nor write a file in parts, so both
are done here (8 bytes of header length, a JSON header, raw little-endian data). Source: huggingface/safetensors:README.md,
"Format".
"""

import json
import math
import mmap
import os
import pickletools
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path

# With it, safetensors reads bfloat16 as a numpy array.
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from medcg_jax import untrusted
from medcg_jax.config import ConfigError
from medcg_jax.terminal import install

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
# As in transformers: a new file when the next tensor would take this one past so many bytes.
MAX_FILE_BYTES = 5_000_000_000
# Limits for untrusted files. One file of tensors:
MAX_TENSOR_FILE_BYTES = 2**42
# The header of a safetensors file; a thousand tensors take some 120 kB.
MAX_HEADER_BYTES = 2**24
# A config.json, an index of shards or an adapter_config.json; the index of a thousand tensors has some 100 kB.
MAX_JSON_BYTES = 2**23
# The pickle in a PyTorch file, and its operations: a tensor takes some 40. A mark that is never closed takes one byte,
# and some hundred bytes of memory.
MAX_PICKLE_BYTES, MAX_PICKLE_STEPS = 2**24, 500_000
# The globals of a pickle outside torch and `collections`. PyTorch allows more, among them `bytearray`, which allocates
# as many bytes as the file says.
PLAIN_GLOBALS = {"builtins set", "__builtin__ set", "_codecs encode"}
# Pickles at the start of a PyTorch file of a version before 1.6.
NUM_OLD_PICKLES = 5
MAX_MESSAGE_CHARS = 2000
# Of a shard's name; no file system allows longer ones.
MAX_NAME_BYTES = 255
# Files that may be beside weights and config.json. A tokenizer:
TOKENIZER = ("tokenizer.json", "tokenizer.model")
# A tokenizer's other files.
OF_TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
OTHERS = (
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "generation_config.json",
    "chat_template.json", "chat_template.jinja",
)  # fmt: skip
# A folder of further templates, one a file.
TEMPLATES = "additional_chat_templates"
# The first bytes of a file that git-lfs has not fetched.
LFS_POINTER = b"version https://git-lfs"


class WeightsError(ConfigError):
    """A checkpoint cannot be used; the message says what is wrong and what is expected.

    The message is one line of printable characters of bounded length, whatever names a file holds.
    """

    def __init__(self, message: str):
        line = " ".join("".join(c if c.isprintable() else " " for c in message).split())
        half = MAX_MESSAGE_CHARS // 2
        super().__init__(line if len(line) <= 2 * half else f"{line[:half]} ... {line[-half:]}")


@dataclass(frozen=True)
class Tensors:
    """The tensors of a directory: names, shapes, dtypes, and functions to read them.

    read: (name, index=()) -> the tensor, or the slices `index` of it, one for each axis. Nothing else holds the array,
      so that its memory is freed when the caller drops it.
    origin: name -> the tensor's file.
    """

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[..., np.ndarray]
    dtype: Callable[[str], np.dtype]
    origin: Callable[[str], str] = lambda name: "memory"

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> "Tensors":
        """Arrays in memory."""

        def read(name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
            return arrays[name][index]

        return cls({name: tuple(x.shape) for name, x in arrays.items()}, read, lambda name: arrays[name].dtype)


def open_tensors(directory: Path) -> Tensors:
    """The tensors of the safetensors (preferred) or .bin files in `directory`, whole or in shards.

    Raises:
      WeightsError: there are none, a shard of the index is missing, shards lie beside a whole file, a file is damaged,
        or PyTorch is needed and absent.
    """
    for stem, opener in (("model.safetensors", open_safetensors), ("pytorch_model.bin", open_bin)):
        single, index = directory / stem, directory / f"{stem}.index.json"
        weight_map = _weight_map(index) if os.path.lexists(index) else {}
        shards = sorted(set(weight_map.values()) - {stem})
        missing = [name for name in shards if not (directory / name).exists()]
        if os.path.lexists(single):
            if len(missing) < len(shards):
                raise WeightsError(
                    f"{directory} holds {stem} and shards that {index.name} names: two checkpoints, of which "
                    f"transformers reads {stem} only; move one of them away"
                )
            return _whole([opener(single)])
        if missing:
            raise WeightsError(f"{index} names {len(shards)} files, of which {len(missing)} are missing: {missing[:4]}")
        if shards:
            opened = {name: opener(directory / name) for name in shards}
            for tensor, name in weight_map.items():
                if tensor not in opened[name].shapes:
                    raise WeightsError(f"{index} places {tensor} in {name}, which does not hold it")
            return _whole(list(opened.values()))
        if weight_map or os.path.lexists(index):
            raise WeightsError(f"{index} names no shards that are there, and {stem} is missing")
    raise WeightsError(
        f"{directory} holds no weights; accepted: model.safetensors, pytorch_model.bin, or their shards with an index"
    )


def _weight_map(index: Path) -> dict[str, str]:
    """Name of a tensor -> name of its file, from an index of shards."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise WeightsError(f"{index} is no index of shards; expected an object `weight_map` of tensors and files")
    names = set(weight_map.values())
    if any(
        Path(name).name != name or name in ("", "..") or {*"\\\0"} & {*name} or len(name.encode()) > MAX_NAME_BYTES
        for name in names
    ):
        raise WeightsError(f"{index} names files outside its directory; expected plain file names")
    return weight_map


def _whole(files: list[Tensors]) -> Tensors:
    owner = {name: file for file in files for name in file.shapes}
    if len(owner) != sum(len(file.shapes) for file in files):
        raise WeightsError("a tensor name stands in two files of one checkpoint; each may stand in one")
    return joined(*((file, {name: name for name in file.shapes}) for file in files))[0]


def joined(*sources: tuple[Tensors, Mapping[str, str]]) -> tuple[Tensors, dict[str, str]]:
    """(tensors, canonical name -> name in them) of several sources as one; a later source overrides an earlier one.

    sources: (tensors, canonical name -> name in them) of each.
    """
    owner = {key: (tensors, name) for tensors, names in sources for key, name in names.items()}

    def ask(method: str, key: str, *index):
        tensors, name = owner[key]
        return getattr(tensors, method)(name, *index)

    shapes = {key: tensors.shapes[name] for key, (tensors, name) in owner.items()}
    methods = (partial(ask, method) for method in ("read", "dtype", "origin"))
    return Tensors(shapes, *methods), {key: key for key in owner}


def open_safetensors(path: Path) -> Tensors:
    """The tensors of one safetensors file, not read yet.

    Raises:
      WeightsError: the file is missing, cut off or damaged. The library checks that the tensors cover the file once,
        without holes.
    """
    header = _header(path)
    try:
        with safe_open(path, "numpy") as file:
            slices = {name: file.get_slice(name) for name in file.offset_keys()}
            stated = {name: (tuple(each.get_shape()), each.get_dtype()) for name, each in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(
            f"{path} is cut off, damaged or no safetensors file: {str(error)[:200]}{_hint(header)}"
        ) from error
    # Parsed again, because the library takes the last of two entries of one name.
    try:
        entries = untrusted.parsed(untrusted.decoded(header[8:], path), f"{path}, header")
    except untrusted.FileError as error:
        raise WeightsError(str(error)) from error

    def dtype(name: str) -> np.dtype:
        # Checked on use, because a file may hold buffers of whole numbers that are never read.
        if stated[name][1] not in DTYPES:
            raise WeightsError(f"{path}: {name} has dtype {stated[name][1]}; accepted: {', '.join(DTYPES)}")
        return np.dtype(DTYPES[stated[name][1]])

    def read(name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        shape, itemsize = stated[name][0], dtype(name).itemsize
        first, last, _ = index[0].indices(shape[0]) if index else (0, shape[0] if shape else 1, 1)
        row_bytes = math.prod(shape[1:]) * itemsize
        start = len(header) + entries[name]["data_offsets"][0] + first * row_bytes
        try:
            data = _exactly(path, start, max(last - first, 0) * row_bytes)
        except OSError as error:
            raise WeightsError(f"{path} cannot be read at {name}: {error}") from error
        return data.view(dtype(name)).reshape((max(last - first, 0), *shape[1:]) if shape else ())

    return Tensors({name: shape for name, (shape, _) in stated.items()}, read, dtype, lambda name: str(path))


def _exactly(path: Path, start: int, num_bytes: int) -> np.ndarray:
    """uint8[num_bytes] of a file from byte `start` on.

    Neither mapped nor read ahead: around each row of a mapped file a file system fetches as much as it is set to, which
    may be megabytes, and 64 hosts then fetch the file several times.

    Raises:
      OSError: it cannot be read, or ends before.
    """
    # Not from the heap, which keeps what is freed (`platform.keep_freed_memory`).
    data = np.frombuffer(mmap.mmap(-1, max(num_bytes, 1)), np.uint8, num_bytes)
    number = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    try:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(number, 0, 0, os.POSIX_FADV_RANDOM)
        done = 0
        while done < num_bytes:
            count = os.preadv(number, [data.data[done:]], start + done)
            if not count:
                raise OSError(f"it ends {num_bytes - done:,} bytes before the end of the tensor")
            done += count
    finally:
        os.close(number)
    return data


def _header(path: Path) -> bytes:
    """The first bytes of a safetensors file: its header with the header's length before it."""
    try:
        with untrusted.open_regular(path, MAX_TENSOR_FILE_BYTES) as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            size = os.fstat(file.fileno()).st_size
            if len(start) < 8 or length > size - 8:
                raise WeightsError(
                    f"{path} is cut off or no safetensors file: header of {length} in {size} bytes"
                    f"{_hint(start + file.read(32))}"
                )
            if length > MAX_HEADER_BYTES:
                raise WeightsError(f"{path}: header of {length:,} bytes; at most {MAX_HEADER_BYTES:,} are read")
            return start + file.read(length)
    except (untrusted.FileError, OSError) as error:
        raise WeightsError(str(error)) from error


def _hint(start: bytes) -> str:
    """Advice about a file with these first bytes, if there is any."""
    return "; it is a pointer of git-lfs: `git lfs pull` fetches the file" if start.startswith(LFS_POINTER) else ""


def open_bin(path: Path, entry: str | None = None) -> Tensors:
    """The tensors of one PyTorch file, or of its dict `entry`; nothing in it is executed.

    A file of a version before 1.6 cannot be read in parts, and is held whole.

    Raises:
      WeightsError: PyTorch is absent, the file is damaged, compressed, holds other objects than tensors and plain
        values, or lacks `entry`.
    """
    record_bytes = _check_bin(path)
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise WeightsError(f"{path} is a PyTorch file and needs PyTorch: {install('parity')} brings it") from error
    in_parts = record_bytes is not None
    tensors = _state_dict(path, entry, in_parts)
    for name, tensor in tensors.items():
        _check_tensor(f"{path}: {name}", tensor, record_bytes)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
    held = None if in_parts else tensors
    del tensors

    def dtype(name: str) -> np.dtype:
        stated = {str(known): known for known in NAMES}.get(dtypes[name])
        if stated is None:
            raise WeightsError(f"{path}: {name} has dtype {dtypes[name]}; accepted: {', '.join(map(str, NAMES))}")
        return stated

    def read(name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        dtype(name)
        # Mapped again for each tensor, and copied, so that its pages are freed at once.
        return np.array(_numpy((held or _state_dict(path, entry, in_parts))[name][index]))

    return Tensors(shapes, read, dtype, lambda name: str(path))


def _check_bin(path: Path) -> set[int] | None:
    """Sizes in bytes of the records in a PyTorch file; None: it is of a version before 1.6.

    Raises:
      WeightsError: a record is compressed, or a pickle exceeds the limits or names other objects than tensors.
    """
    try:
        with untrusted.open_regular(path, MAX_TENSOR_FILE_BYTES) as file:
            start = file.read(len(LFS_POINTER))
            file.seek(0)
            if not zipfile.is_zipfile(file):
                file.seek(0)
                _check_pickles(
                    f"{path}{_hint(start)}",
                    file.read(min(MAX_PICKLE_BYTES, os.fstat(file.fileno()).st_size)),
                    NUM_OLD_PICKLES,
                )
                return None
            with zipfile.ZipFile(file) as archive:
                records = archive.infolist()
                compressed = [record.filename for record in records if record.compress_type != zipfile.ZIP_STORED]
                if compressed:
                    raise WeightsError(
                        f"{path}: {compressed[0]} is compressed, as by a tool that has packed the file again; expected "
                        "PyTorch's own form, whose records are not compressed"
                    )
                if len({record.filename for record in records}) < len(records):
                    raise WeightsError(f"{path} holds two records of one name; expected PyTorch's own form")
                for record in records:
                    if record.filename.endswith("data.pkl"):
                        if record.file_size > MAX_PICKLE_BYTES:
                            raise WeightsError(f"{path}: a pickle of more than {MAX_PICKLE_BYTES:,} bytes is not read")
                        _check_pickles(str(path), archive.read(record), 1)
                return {record.file_size for record in records}
    except (untrusted.FileError, OSError) as error:
        raise WeightsError(str(error)) from error
    # A damaged archive can raise any of these.
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, RuntimeError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"{path} is damaged or no PyTorch file ({str(error)[:100]})") from error


def _check_pickles(name: str, content: bytes, count: int) -> None:
    """Checks the operations of the first `count` pickles in `content` without executing any."""
    stream, steps = BytesIO(content), 0
    try:
        for _ in range(count):
            for opcode, argument, _ in pickletools.genops(stream):
                steps += 1
                if steps > MAX_PICKLE_STEPS:
                    raise WeightsError(f"{name}: a pickle of more than {MAX_PICKLE_STEPS:,} operations is not read")
                if opcode.name in ("GLOBAL", "INST", "STACK_GLOBAL"):
                    module = str(argument).partition(" ")[0]
                    if module.partition(".")[0] not in ("torch", "collections") and argument not in PLAIN_GLOBALS:
                        raise WeightsError(
                            f"{name} names {str(argument).replace(' ', '.')}, which is no tensor and no plain value; "
                            "nothing of it was run; expected only tensors and plain values"
                        )
    except ValueError as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"{name} is damaged or no PyTorch file of tensors and plain values") from error


def _state_dict(path: Path, entry: str | None, in_parts: bool) -> dict:
    """PyTorch's tensors by name, mapped where `in_parts`."""
    import torch

    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=in_parts)
    # PyTorch raises anything for a damaged file, and its messages advise to run the code in the file.
    except Exception as error:
        raise WeightsError(f"{path} is damaged or no PyTorch file of tensors and plain values") from error
    if entry is not None:
        if not isinstance(tensors, dict) or entry not in tensors:
            held = ", ".join(map(str, tensors)) if isinstance(tensors, dict) else type(tensors).__name__
            raise WeightsError(f"{path} has no entry {entry!r}; it holds {held[:200]}")
        tensors = tensors[entry]
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in tensors.items()
    ):
        raise WeightsError(f"{path} holds other things than tensors by name; expected a state dict")
    return tensors


def _check_tensor(name: str, tensor, record_bytes: set[int] | None) -> None:
    """Raises WeightsError if a tensor does not store each of its numbers.

    record_bytes: as `_check_bin` gives them.
    """
    import torch

    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
        kind = "quantised" if tensor.is_quantized else str(tensor.layout).removeprefix("torch.")
        raise WeightsError(f"{name} is a {kind} tensor; expected plain (strided) tensors")
    if tensor.device.type != "cpu":
        raise WeightsError(f"{name} has no numbers (device {tensor.device.type}); expected tensors with their numbers")
    num_bytes = tensor.untyped_storage().nbytes()
    if record_bytes is not None and num_bytes and num_bytes not in record_bytes:
        raise WeightsError(f"{name} states {num_bytes:,} bytes, and no record of its file has so many; it is damaged")
    if tensor.numel() * tensor.element_size() > num_bytes:
        raise WeightsError(f"{name} repeats the {num_bytes:,} bytes that it holds; expected tensors with all numbers")


def _numpy(tensor) -> np.ndarray:
    import torch

    tensor = tensor.detach().resolve_neg()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def read_json(path: Path) -> dict:
    """The object in a JSON file.

    Raises:
      WeightsError: it is missing, no JSON, or no object.
    """
    try:
        return untrusted.read_json(path, max_bytes=MAX_JSON_BYTES)
    except untrusted.FileError as error:
        raise WeightsError(f"{error}{_hint_of(path)}") from error


def _hint_of(path: Path) -> str:
    try:
        return _hint(untrusted.read_bytes(path, MAX_JSON_BYTES))
    except untrusted.FileError:
        return ""


@contextmanager
def written_whole(directory: Path):
    """A new directory that becomes `directory` when the block ends, or is removed if the block fails.

    Until then it has another name; one that a killed process left is removed. `directory` may exist and be empty.
    """
    directory = directory.absolute()
    partial_dir = directory.with_name(f".{directory.name}.part")
    if partial_dir.is_symlink() or (partial_dir.exists() and not partial_dir.is_dir()):
        raise WeightsError(
            f"{partial_dir} is in the way of {directory}: no folder that a killed conversion left; move it away"
        )
    shutil.rmtree(partial_dir, ignore_errors=True)
    partial_dir.mkdir(parents=True)
    try:
        yield partial_dir
        os.replace(partial_dir, directory)
    finally:
        shutil.rmtree(partial_dir, ignore_errors=True)


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
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
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
            file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
            # Dropped before the next one is made.
            del value


# ------------------------------------------------------------------ files beside weights and config.json


def has_tokenizer(directory: Path) -> bool:
    return any((directory / name).is_file() for name in TOKENIZER)


def copy_companions(sources: Sequence[Path], dst: Path) -> None:
    """Copies tokenizers, chat templates and processor files into `dst`; of two files of one name the first is taken.

    sources: checkpoint directories, and files of tokenizers. All files of a tokenizer come from one source.
    """
    for source in sources:
        directory = source if source.is_dir() else source.parent
        if not has_tokenizer(dst):
            for path in _tokenizer_files(source):
                _copy(path, dst / (path.name if path.name in OF_TOKENIZER else f"tokenizer{path.suffix}"))
        # The image processor beside a separate tokenizer is not the checkpoint's.
        if source.is_dir():
            for name in OTHERS:
                _copy(directory / name, dst / name)
            for path in sorted((directory / TEMPLATES).glob("*.jinja")):
                (dst / TEMPLATES).mkdir(exist_ok=True)
                _copy(path, dst / TEMPLATES / path.name)


def _tokenizer_files(source: Path) -> list[Path]:
    """The files of the tokenizer in a directory, or of the tokenizer file `source`."""
    if source.is_dir():
        names = [*TOKENIZER, *OF_TOKENIZER] if has_tokenizer(source) else OF_TOKENIZER
        return [source / name for name in names]
    # A file with another name, as the package's own, is a whole tokenizer.
    whole = source.name in TOKENIZER
    beside = [source.parent / name for name in (*TOKENIZER, *OF_TOKENIZER)] if whole else []
    return [source, *(path for path in beside if path != source)]


def _copy(source: Path, dst: Path) -> None:
    if source.is_file() and not dst.exists():
        shutil.copyfile(source, dst)
