"""Released tensors to parameters and back, by a model's table (`weights.tables`); strict both ways.

Parameters go from files to devices, or to other files, as `Leaf`s: a host reads its share of all rows,
one layer at a time.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from medcg_jax.families.weights.files import Tensors, WeightsError
from medcg_jax.families.weights.tables import Entry, Index, Reordered, Shape, spans_of
from medcg_jax.nn.quant import QUANTIZED, dequantize, is_quantized, quantize

# Prefixes of torch.compile, and of the wrappers DDP and peft, in a state dict.
COMPILED, WRAPPERS = "_orig_mod.", ("module.", "base_model.model.")
# Numbers checked at once for being finite, so that the mask stays small.
NUM_CHECKED = 2**18


@dataclass(frozen=True)
class Slot:
    """Where one released tensor goes: a leaf of params, or layer `layer` of a stacked leaf."""

    entry: Entry
    layer: int | None
    shape: Shape

    @property
    def released_shape(self) -> Shape:
        return self.entry.transform.released_shape(self.shape)


def slots(table: list[Entry], params) -> dict[str, Slot]:
    """Released name -> Slot for a whole table; `params` may be abstract.

    Raises:
      WeightsError: the table does not fill every parameter exactly once (a fault of the table).
    """
    by_name: dict[str, Slot] = {}
    leaves = by_path(params)
    for entry in table:
        shape = tuple(leaves.pop(entry.path).shape)
        if entry.layers is None:
            by_name[entry.name] = Slot(entry, None, shape)
            continue
        if len(entry.layers) != shape[0]:
            raise WeightsError(f"{entry.path} has {shape[0]} layers, its table {len(entry.layers)}")
        for i, layer in enumerate(entry.layers):
            by_name[entry.name.format(layer=layer)] = Slot(entry, i, shape[1:])
    if leaves:
        raise WeightsError(f"the table fills no {sorted(leaves)}")
    return by_name


def by_path(params) -> dict[tuple[str, ...], Any]:
    """Path -> leaf of a tree of arrays, shapes, shardings or `Leaf`s; a quantised matrix is one leaf."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_quantized)
    return {tuple(key.key for key in path): leaf for path, leaf in leaves}


def canonical_names(names, canonical: Callable[[str], str | None], source: str) -> dict[str, str]:
    """Canonical name -> the file's name; names for which `canonical` gives None are dropped.

    Prefixes of torch.compile are removed, and wrappers' prefixes that all names have.

    Raises:
      WeightsError: two tensors have one canonical name.
    """
    by_canonical: dict[str, str] = {}
    wrapper = _wrapper(names)
    for name in names:
        key = canonical(name.replace(COMPILED, "").removeprefix(wrapper))
        if key is None:
            continue
        if key in by_canonical:
            raise WeightsError(f"{source} holds {key} twice, as {by_canonical[key]} and {name}")
        by_canonical[key] = name
    return by_canonical


def _wrapper(names) -> str:
    """The prefix of all names, made of any number of `WRAPPERS`."""
    prefix, bare = "", [name.replace(COMPILED, "") for name in names]
    while bare and (wrapper := next((w for w in WRAPPERS if all(name.startswith(w) for name in bare)), "")):
        prefix, bare = prefix + wrapper, [name.removeprefix(wrapper) for name in bare]
    return prefix


def check(
    by_name: dict[str, Slot], shapes: dict[str, Shape], source: str, origin: Callable[[str], str] | None = None
) -> None:
    """Raises WeightsError if tensors are missing, unused or misshapen, with all three lists (canonical names).

    origin: name -> the tensor's file, for the message.
    """
    missing = [name for name in by_name if name not in shapes]
    unused = [name for name in shapes if name not in by_name]
    expected = {name: slot.released_shape for name, slot in by_name.items()}
    misshapen = [name for name, shape in expected.items() if name in shapes and shapes[name] != shape]
    if missing or unused or misshapen:
        described = [f"{name} {shapes[name]} instead of {expected[name]}" for name in misshapen]
        lists = (("missing", missing), ("unused", unused), ("misshapen", described))
        files = sorted(set(map(origin, unused + misshapen))) if origin else []
        where = f" (in {', '.join(files[:4])})" if files else ""
        if any(by_name[name].entry.rows for name in misshapen):
            where += "; a table of the vocabulary has as many rows as config.json states in vocab_size"
        raise WeightsError(f"{source} does not fit the model: " + "; ".join(_listed(*each) for each in lists) + where)


def _listed(word: str, names: list[str], most: int = 8) -> str:
    if not names:
        return f"no {word} tensors"
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} {word}: {', '.join(names[:most])}{more}"


def check_finite(value: np.ndarray, name: str) -> None:
    """Raises WeightsError if a number is NaN or infinite. name: of the tensor and its file."""
    flat = value.reshape(-1)
    starts = range(0, flat.size, NUM_CHECKED)
    wrong = sum(int((~np.isfinite(flat[start : start + NUM_CHECKED])).sum()) for start in starts)
    if wrong:
        raise WeightsError(
            f"{name} holds NaN or infinity ({wrong:,} of {flat.size:,} numbers); take a "
            "checkpoint from before the training diverged, or fetch the file again"
        )


# ------------------------------------------------------------------ parameters that are not read yet


@dataclass(frozen=True)
class Stored:
    """A parameter, or a layer of one, as it lies in a file: rows, one after another.

    read: a slice of the first axis -> those rows; () -> all.
    ours: makes the whole stored array the parameter.
    """

    shape: Shape
    read: Callable[[Index], np.ndarray]
    ours: Reordered

    @classmethod
    def computed(cls, shape: Shape, whole: Callable[[], np.ndarray]) -> "Stored":
        """What lies in no file: `whole()` makes the parameter."""
        return cls(shape, lambda index: whole()[index], Reordered(shape, tuple(range(len(shape))), shape))


class Leaf:
    """A parameter that is not read yet: `leaf[i]` reads layer i of a stack, `np.asarray(leaf)` all of it.

    dtype: of what is read. stored: layer -> how that layer lies in its file; None -> how the whole does, if it is not
      stacked.
    stacked: whether the leading axis counts layers.
    """

    def __init__(self, shape: Shape, dtype, stored: Callable[[int | None], Stored], *, stacked: bool = False):
        self.shape, self.dtype, self.stored, self.stacked = tuple(shape), np.dtype(dtype), stored, stacked

    def __getitem__(self, layer: int) -> np.ndarray:
        return self._read(layer)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        whole = np.stack([self[layer] for layer in range(self.shape[0])]) if self.stacked else self._read(None)
        return np.asarray(whole, dtype)

    def _read(self, layer: int | None) -> np.ndarray:
        stored = self.stored(layer)
        return stored.ours(stored.read(())).astype(self.dtype, copy=False)


def lazy(table: list[Entry], abstract, tensors: Tensors, names: dict[str, str], source: str):
    """A tree of `Leaf`s with the structure of `abstract`, each in the widest dtype of its tensors.

    names: canonical name -> name in `tensors`.

    Raises:
      WeightsError: tensors missing, unused or misshapen; when a layer is read, a number that is not finite.
    """
    by_name = slots(table, abstract)
    shapes = {key: tensors.shapes[name] for key, name in names.items()}
    check(by_name, shapes, source, lambda key: tensors.origin(names[key]))
    layers: dict[tuple[str, ...], dict[int | None, tuple[Slot, str]]] = {}
    for key, slot in by_name.items():
        layers.setdefault(slot.entry.path, {})[slot.layer] = slot, names[key]

    def leaf(path, like) -> Leaf:
        by_layer = layers[tuple(key.key for key in path)]
        dtype = reduce(jnp.promote_types, (tensors.dtype(name) for _, name in by_layer.values()))

        def stored(layer: int | None) -> Stored:
            slot, name = by_layer[layer]
            return Stored(slot.released_shape, partial(_rows, tensors, name), slot.entry.transform.ours(slot.shape))

        return Leaf(like.shape, dtype, stored, stacked=None not in by_layer)

    return jax.tree_util.tree_map_with_path(leaf, abstract, is_leaf=is_quantized)


def _rows(tensors: Tensors, name: str, index: Index) -> np.ndarray:
    """A slice of a released tensor, all of it finite."""
    value = tensors.read(name, index)
    check_finite(value, f"{tensors.origin(name)}: {name}")
    return value


def dequantized(q) -> Leaf:
    """A quantised stack as a `Leaf` in float32, for files; all of it must be on devices of this process."""

    def stored(layer: int | None) -> Stored:
        return Stored.computed(q.shape[1:], lambda: np.asarray(_dequantize(jax.tree.map(lambda w: w[layer], q))))

    return Leaf(q.shape, np.float32, stored, stacked=True)


@jax.jit
def _dequantize(q) -> jax.Array:
    return dequantize(q, jnp.float32)


# ------------------------------------------------------------------ onto devices, and into files


def load(table: list[Entry], abstract, shardings, tensors: Tensors, names: dict[str, str], source: str):
    """Params in `shardings`, with the dtypes of `abstract`, from `tensors`.

    names: canonical name -> name in `tensors`.

    Raises:
      WeightsError: tensors missing, unused or misshapen, before anything is read; a number that is not finite.
    """
    return put(lazy(table, abstract, tensors, names, source), abstract, shardings)


def put(leaves, abstract, shardings):
    """Arrays in `shardings`, with the dtypes of `abstract`, from a tree of `Leaf`s.

    A host reads rows that lie one after another in a file, as many as its share of all devices, whatever its devices hold
    in the end: the devices exchange them. So all hosts together read a release once, in runs that a file system likes,
    where slices of columns would touch every page of it. Only the host that reads a number notices that it is not finite.
    A host holds two layers' rows at most: the next ones are read while the others are put in place. Matrices are
    quantised on the devices, one layer at a time. Vocabulary rows beyond `abstract` are cut there.
    """
    by_leaf, by_sharding, by_target = by_path(leaves), by_path(shardings), by_path(abstract)
    pieces = {path: _pieces_of(by_leaf[path], target, by_sharding[path]) for path, target in by_target.items()}
    reads, arrays = _ahead(_Piece.read, [piece for of_leaf in pieces.values() for piece in of_leaf]), []
    for path, target in by_target.items():
        placed, sharding = (piece.placed(next(reads)) for piece in pieces[path]), by_sharding[path]
        if is_quantized(target):
            arrays.append(_stacked(list(placed), sharding))
        elif by_leaf[path].stacked:
            stack = _zeros(target.shape, target.dtype, sharding)
            for layer, array in enumerate(placed):
                stack = jax.block_until_ready(_set_layer(sharding)(stack, array, layer))
            arrays.append(stack)
        else:
            arrays.extend(placed)
    return jax.tree.unflatten(jax.tree.structure(abstract, is_leaf=is_quantized), arrays)


@dataclass(frozen=True)
class _Piece:
    """A parameter, or a layer of one, that is read and put at once.

    dtype: of the files. target: the whole parameter; sharding: the piece's.
    """

    stored: Stored
    dtype: np.dtype
    layer: int | None
    target: Any
    sharding: Any

    @property
    def mesh(self) -> Mesh:
        return (self.sharding.qvalue if is_quantized(self.target) else self.sharding).mesh

    def read(self) -> np.ndarray:
        """The rows of this host's devices, one after another; zeros after the last one."""
        num_rows, *inner = self.stored.shape or (1,)
        shape, where = rows_over(self.mesh, (num_rows, *inner))
        spans = [spans_of(index, shape)[0] for index in _local_indices(where, shape)]
        first, last = min(start for start, _ in spans), max(stop for _, stop in spans)
        end = max(first, min(last, num_rows))
        if end == first:
            return np.zeros((last - first, *inner), self.dtype)
        stored = self.stored.read((slice(first, end),) if self.stored.shape else ())
        if end == last:
            return stored.astype(self.dtype, copy=False).reshape(last - first, *inner)
        rows = np.zeros((last - first, *inner), self.dtype)
        rows[: end - first] = stored
        return rows

    def placed(self, rows: np.ndarray):
        """The array, or `QArray`, of what `read` gave on every host."""
        num_rows, *inner = self.stored.shape or (1,)
        shape, where = rows_over(self.mesh, (num_rows, *inner))
        first = min(spans_of(index, shape)[0][0] for index in _local_indices(where, shape))

        def of_device(index: Any) -> np.ndarray:
            start, stop = spans_of(index, shape)[0]
            return rows[start - first : stop - first]

        array = jax.make_array_from_callback(shape, where, of_device)
        if (order := self.mesh.devices.reshape(where.mesh.devices.shape)).tolist() != where.mesh.devices.tolist():
            array = jax.device_put(array, NamedSharding(Mesh(order, ROWS), where.spec))
        to_shape = tuple(self.target.shape if self.layer is None else self.target.shape[1:])
        if is_quantized(self.target):
            of_both = self.sharding.qvalue, self.sharding.scale
            program = _program(num_rows, self.stored.ours, to_shape, self.target.qtype, of_both)
            array = replace(self.sharding, **dict(zip(("qvalue", "scale"), program(array), strict=True)))
        else:
            array = _program(num_rows, self.stored.ours, to_shape, self.target.dtype, self.sharding)(array)
        # Wait, because the host holds its rows until they are on a device.
        return jax.block_until_ready(array)


# Axes of a mesh that holds rows: devices with rows of their own, and those with the same rows.
ROWS = ("rows", "copies")


def rows_over(mesh: Mesh, shape: Shape) -> tuple[Shape, NamedSharding]:
    """(the shape with rows added, its sharding): the rows over the mesh's devices, in the sequence of their hosts.

    Rows are added so that devices hold equally many; fewer parts than devices where there are fewer rows.
    """
    devices = sorted(mesh.devices.flat, key=lambda device: (device.process_index, device.id))
    num_parts = max(n for n in range(1, len(devices) + 1) if len(devices) % n == 0 and n <= max(1, shape[0]))
    padded = -(-shape[0] // num_parts) * num_parts
    where = NamedSharding(Mesh(np.array(devices).reshape(num_parts, -1), ROWS), PartitionSpec(ROWS[0]))
    return (padded, *shape[1:]), where


def _local_indices(sharding: NamedSharding, shape: Shape) -> list[Index]:
    """The slices on this host's devices."""
    return [index for index in sharding.addressable_devices_indices_map(shape).values() if index is not None]


def _pieces_of(leaf: Leaf, target, sharding) -> list[_Piece]:
    """What is read of a parameter at once: its layers, one after another, or all of it."""
    dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
    if not (leaf.stacked or is_quantized(target)):
        return [_Piece(leaf.stored(None), dtype, None, target, sharding)]
    of_layer = jax.tree.map(lambda where: NamedSharding(where.mesh, PartitionSpec(*where.spec[1:])), sharding)
    return [_Piece(leaf.stored(layer), dtype, layer, target, of_layer) for layer in range(target.shape[0])]


def _ahead(call: Callable[[Any], Any], arguments: list) -> Iterator[Any]:
    """`map(call, arguments)`, where each call runs in a thread beside the use of the result before it."""
    with ThreadPoolExecutor(1) as thread:
        calls: deque[Future] = deque()
        for argument in arguments:
            calls.append(thread.submit(call, argument))
            if len(calls) > 1:
                yield calls.popleft().result()
        while calls:
            yield calls.popleft().result()


def _stacked(layers: list, sharding):
    """A quantised matrix of the layers in `layers`. They are kept until the last one is there: XLA's CPU would unpack all
    of a stack of four bits to write one layer into it."""

    def stack(where, *arrays):
        return jax.block_until_ready(jax.jit(lambda *each: jnp.stack(each), out_shardings=where)(*arrays))

    return jax.tree.map(stack, sharding, *layers)


def _zeros(shape, dtype, sharding) -> jax.Array:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()


@lru_cache(maxsize=256)
def _program(num_rows: int, ours: Reordered, shape: Shape, dtype, sharding):
    """From the rows of a stored array, to which some may be added, to ours of `shape`.

    dtype: of the result, or "int8", "nf4"; then `sharding` is that of the numbers and that of the scales (a `QArray` of
      shardings has no hash).
    """

    def run(rows):
        value = ours(rows[:num_rows])[tuple(map(slice, shape))]
        if dtype not in QUANTIZED:
            return value.astype(dtype)
        quantized = quantize(value.astype(jnp.float32), dtype, lead=0)
        return quantized.qvalue, quantized.scale

    return jax.jit(run, out_shardings=sharding)


@lru_cache(maxsize=256)
def _set_layer(sharding):
    # Donated and updated as a slice, so that the stack is filled in place: `.at[i].set` is a scatter, which copies it.
    def run(stack, value, i):
        return jax.lax.dynamic_update_index_in_dim(stack, value, i, 0)

    return jax.jit(run, donate_argnums=0, out_shardings=sharding)


def store(table: list[Entry], params) -> tuple[dict[str, tuple[Shape, np.dtype]], Iterator[tuple[str, np.ndarray]]]:
    """(released name -> (shape, dtype), an iterator over (name, array) in that order).

    params: arrays or `Leaf`s.
    """
    leaves, by_name = by_path(params), slots(table, params)

    def stream():
        for name, slot in by_name.items():
            leaf = leaves[slot.entry.path]
            yield name, slot.entry.transform.store(np.asarray(leaf if slot.layer is None else leaf[slot.layer]))

    specs = {name: (slot.released_shape, np.dtype(leaves[slot.entry.path].dtype)) for name, slot in by_name.items()}
    return specs, stream()
