"""Names and shapes of a released checkpoint turned into parameters and back, by a table; strict both ways.

A model's table is a list of `Entry`: a name template, the path of our parameter, and how one becomes the other.
Loading goes tensor by tensor, straight into the parameters' shardings: no more than one tensor is on the host at once.
Where parameters go from file to file they are `Leaf`s, of which no more than a layer is read at a time.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, reduce

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from medcg_jax.families.weights.files import Tensors, WeightsError
from medcg_jax.nn.quant import dequantize, is_quantized, quantize

Shape = tuple[int, ...]
# What wrappers (torch.compile, DDP, peft) put before every name of a state dict.
COMPILED, WRAPPERS = "_orig_mod.", ("module.", "base_model.model.")
# Numbers that are looked at at once: what says of each whether it is finite is small beside a tensor.
NUM_LOOKED_AT = 2**18


@dataclass(frozen=True)
class Transform:
    """How a released tensor becomes ours: `load(tensor, our shape)`, `store(ours)`, `released_shape(our shape)`."""

    load: Callable[[np.ndarray, Shape], np.ndarray]
    store: Callable[[np.ndarray], np.ndarray]
    released_shape: Callable[[Shape], Shape]


@dataclass(frozen=True)
class Entry:
    """One line of a table.

    name: the released (canonical) name; `{layer}` stands for the layer's number.
    path: keys into params.
    layers: the released layers that fill our leading axis, in order; None: the parameter is not stacked.
    rows: axis 0 of the released tensor counts vocabulary rows, of which a checkpoint may have more than we hold.
    """

    name: str
    path: tuple[str, ...]
    transform: Transform
    layers: range | None = None
    rows: bool = False


def linear(inputs: int = 1) -> Transform:
    """PyTorch's [out, in] <-> ours [in..., out...] with so many input axes."""
    return Transform(
        load=lambda tensor, shape: tensor.T.reshape(shape),
        store=lambda ours: ours.reshape(math.prod(ours.shape[:inputs]), -1).T,
        released_shape=lambda shape: (math.prod(shape[inputs:]), math.prod(shape[:inputs])),
    )


def conv_patch(patch: int, channels: int = 3) -> Transform:
    """PyTorch's conv kernel [E, C, patch, patch] <-> ours [patch * patch * C, E]."""
    return Transform(
        load=lambda tensor, shape: tensor.transpose(2, 3, 1, 0).reshape(shape),
        store=lambda ours: ours.reshape(patch, patch, channels, -1).transpose(3, 2, 0, 1),
        released_shape=lambda shape: (shape[1], channels, patch, patch),
    )


def fused_qkv() -> Transform:
    """Rows [3 * N * H, ...] of all queries, then keys, then values <-> ours [..., N, 3 * H], the three of each head."""

    def load(tensor: np.ndarray, shape) -> np.ndarray:
        num_heads, width = shape[-2:]
        apart = tensor.reshape(3, num_heads, width // 3, *tensor.shape[1:])
        return np.moveaxis(apart, (0, 1, 2), (-2, -3, -1)).reshape(shape)

    def store(ours: np.ndarray) -> np.ndarray:
        apart = ours.reshape(*ours.shape[:-1], 3, ours.shape[-1] // 3)
        return np.moveaxis(apart, (-2, -3, -1), (0, 1, 2)).reshape(math.prod(ours.shape[-2:]), *ours.shape[:-2])

    return Transform(load, store, lambda shape: (math.prod(shape[-2:]), *shape[:-2]))


class Leaf:
    """A parameter that is not held: `leaf[i]` reads layer i of a stack, `np.asarray(leaf)` all of it.

    read: gives the layer of that number, or the whole for None.
    """

    def __init__(self, shape: Shape, dtype, read: Callable[[int | None], np.ndarray]):
        self.shape, self.dtype, self.read = tuple(shape), np.dtype(dtype), read

    def __getitem__(self, layer: int) -> np.ndarray:
        return self.read(layer)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self.read(None), dtype)


FLAT = Transform(
    load=lambda tensor, shape: tensor.reshape(shape),
    store=lambda ours: ours.reshape(-1),
    released_shape=lambda shape: (math.prod(shape),),
)
SAME = Transform(load=lambda tensor, shape: tensor, store=lambda ours: ours, released_shape=lambda shape: shape)


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
    found: dict[str, Slot] = {}
    leaves = by_path(params)
    for entry in table:
        shape = tuple(leaves.pop(entry.path).shape)
        if entry.layers is None:
            found[entry.name] = Slot(entry, None, shape)
            continue
        if len(entry.layers) != shape[0]:
            raise WeightsError(f"{entry.path} has {shape[0]} layers, its table {len(entry.layers)}")
        for i, layer in enumerate(entry.layers):
            found[entry.name.format(layer=layer)] = Slot(entry, i, shape[1:])
    if leaves:
        raise WeightsError(f"the table fills no {sorted(leaves)}")
    return found


def by_path(params) -> dict[tuple[str, ...], object]:
    """Path -> leaf of a tree of arrays, shapes, shardings or `Leaf`s; a quantised matrix is one leaf."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_quantized)
    return {tuple(key.key for key in path): leaf for path, leaf in leaves}


def canonical_names(names, canonical: Callable[[str], str | None], source: str) -> dict[str, str]:
    """Canonical name -> the file's own; names for which `canonical` gives None are dropped.

    What torch.compile puts into names is taken off, and what another wrapper puts before all of them.

    Raises:
      WeightsError: two tensors have one canonical name.
    """
    found: dict[str, str] = {}
    wrapper = _wrapper(names)
    for name in names:
        key = canonical(name.replace(COMPILED, "").removeprefix(wrapper))
        if key is None:
            continue
        if key in found:
            raise WeightsError(f"{source} holds {key} twice, as {found[key]} and {name}")
        found[key] = name
    return found


def _wrapper(names) -> str:
    """What stands before all names, of any number of `WRAPPERS` one behind the other."""
    prefix, bare = "", [name.replace(COMPILED, "") for name in names]
    while bare and (wrapper := next((w for w in WRAPPERS if all(name.startswith(w) for name in bare)), "")):
        prefix, bare = prefix + wrapper, [name.removeprefix(wrapper) for name in bare]
    return prefix


def check(
    wanted: dict[str, Slot],
    shapes: dict[str, Shape],
    source: str,
    origin: Callable[[str], str] | None = None,
    num_rows: int | None = None,
) -> None:
    """Raises WeightsError, with all three lists, on missing, unused and misshapen tensors (canonical names).

    origin: gives the file in which a tensor is, for the message. num_rows: as in `load`.
    """
    missing = [name for name in wanted if name not in shapes]
    unused = [name for name in shapes if name not in wanted]
    expected = {name: _file_shape(slot, num_rows) for name, slot in wanted.items()}
    misshapen = [name for name, shape in expected.items() if name in shapes and shapes[name] != shape]
    if missing or unused or misshapen:
        described = [f"{name} {shapes[name]} instead of {expected[name]}" for name in misshapen]
        lists = (("missing", missing), ("unused", unused), ("misshapen", described))
        files = sorted(set(map(origin, unused + misshapen))) if origin else []
        place = f" (in {', '.join(files[:4])})" if files else ""
        if any(wanted[name].entry.rows for name in misshapen):
            place += "; a table of the vocabulary has as many rows as config.json states in vocab_size"
        raise WeightsError(f"{source} does not fit the model: " + "; ".join(_listed(*part) for part in lists) + place)


def _file_shape(slot: Slot, num_rows: int | None) -> Shape:
    shape = slot.released_shape
    return (num_rows, *shape[1:]) if slot.entry.rows and num_rows is not None else shape


def _listed(word: str, names: list[str], most: int = 8) -> str:
    if not names:
        return f"no {word} tensors"
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} {word}: {', '.join(names[:most])}{more}"


def load(
    table: list[Entry], abstract, shardings, tensors: Tensors, names: dict[str, str], source: str, *,
    num_rows: int | None = None,
):  # fmt: skip
    """Params in `shardings`, with the dtypes of `abstract`, from `tensors`.

    What is to be quantised is so on the devices, as it is read: one layer of one matrix is there in float32 at a time.
    names: canonical name -> name in `tensors`.
    num_rows: of the vocabulary, as the checkpoint's own config.json states them; those beyond `abstract` are dropped.
      None: as many as `abstract` has.

    Raises:
      WeightsError: tensors missing, unused or misshapen, before anything is read; a number that is not finite.
    """
    wanted = _checked(table, abstract, tensors, names, source, num_rows)
    treedef = jax.tree.structure(abstract, is_leaf=is_quantized)
    targets, places = by_path(abstract), by_path(shardings)
    made = {}
    for key, name in names.items():
        slot = wanted[key]
        path, layer = slot.entry.path, slot.layer
        target, place = targets[path], places[path]
        value = _read(slot, tensors, name, np.float32 if is_quantized(target) else target.dtype)
        if layer is None:
            made[path] = _put(value, place)
        else:
            made[path] = _with_layer(made.get(path), target, place, value, layer)
        # Waited for: tensors that are under way to a device are held by the host.
        jax.block_until_ready(made[path])
    return jax.tree.unflatten(treedef, [made[path] for path in targets])


def place(leaves, abstract, shardings):
    """As `load`, of a tree of `Leaf`s; vocabulary rows beyond those of `abstract` are dropped."""
    treedef = jax.tree.structure(abstract, is_leaf=is_quantized)
    found, places, made = by_path(leaves), by_path(shardings), []
    for path, target in by_path(abstract).items():
        leaf, one = found[path], None
        if is_quantized(target):
            for layer in range(target.shape[0]):
                one = _with_layer(one, target, places[path], leaf[layer].astype(np.float32), layer)
                jax.block_until_ready(one)
        else:
            value = np.asarray(leaf)[tuple(map(slice, target.shape))]
            one = jax.block_until_ready(_put(value.astype(target.dtype), places[path]))
        made.append(one)
    return jax.tree.unflatten(treedef, made)


def lazy(table: list[Entry], abstract, tensors: Tensors, names: dict[str, str], source: str):
    """A tree of `Leaf`s as `abstract`, each with the dtype of its tensors (the wider one, where they differ).

    Raises:
      WeightsError: tensors missing, unused or misshapen; when a layer is read, a number that is not finite.
    """
    wanted = _checked(table, abstract, tensors, names, source)
    parts: dict[tuple[str, ...], dict[int | None, tuple[Slot, str]]] = {}
    for key, slot in wanted.items():
        parts.setdefault(slot.entry.path, {})[slot.layer] = slot, names[key]

    def leaf(path, like) -> Leaf:
        found = parts[tuple(key.key for key in path)]
        dtype = reduce(jnp.promote_types, (tensors.dtype(name) for _, name in found.values()))

        def read(layer: int | None) -> np.ndarray:
            if layer not in found:
                return np.stack([read(i) for i in range(len(found))])
            slot, name = found[layer]
            return _read(slot, tensors, name, dtype)

        return Leaf(like.shape, dtype, read)

    return jax.tree_util.tree_map_with_path(leaf, abstract)


def store(table: list[Entry], params) -> tuple[dict[str, tuple[Shape, np.dtype]], Iterator[tuple[str, np.ndarray]]]:
    """(released name -> (shape, dtype), an iterator over (name, array) in that order), one tensor at a time.

    params: arrays or `Leaf`s.
    """
    leaves, wanted = by_path(params), slots(table, params)

    def stream():
        for name, slot in wanted.items():
            leaf = leaves[slot.entry.path]
            yield name, slot.entry.transform.store(np.asarray(leaf if slot.layer is None else leaf[slot.layer]))

    specs = {name: (slot.released_shape, np.dtype(leaves[slot.entry.path].dtype)) for name, slot in wanted.items()}
    return specs, stream()


def _checked(table, abstract, tensors: Tensors, names: dict[str, str], source: str, num_rows=None) -> dict[str, Slot]:
    wanted = slots(table, abstract)
    shapes = {key: tensors.shapes[name] for key, name in names.items()}
    check(wanted, shapes, source, lambda key: tensors.origin(names[key]), num_rows)
    return wanted


def _read(slot: Slot, tensors: Tensors, name: str, dtype) -> np.ndarray:
    """A released tensor as the part of a parameter that it is."""
    value = tensors.read(name)
    if slot.entry.rows:
        value = value[: slot.released_shape[0]]
    check_finite(value, f"{tensors.origin(name)}: {name}")
    return slot.entry.transform.load(value, slot.shape).astype(dtype, copy=False)


def check_finite(value: np.ndarray, name: str) -> None:
    """Raises WeightsError where a number is NaN or infinite; name: of the tensor and its file."""
    flat = value.reshape(-1)
    for start in range(0, flat.size, NUM_LOOKED_AT):
        if not np.isfinite(flat[start : start + NUM_LOOKED_AT]).all():
            wrong = sum(
                int((~np.isfinite(flat[i : i + NUM_LOOKED_AT])).sum()) for i in range(start, flat.size, NUM_LOOKED_AT)
            )
            raise WeightsError(
                f"{name} holds NaN or infinity ({wrong:,} of {flat.size:,} numbers); finite numbers are accepted: take a "
                "checkpoint from before the training diverged, or fetch the file again"
            )


def _with_layer(stack, target, place, value: np.ndarray, layer: int):
    """`stack` (None: zeros; donated) with `value` as its layer: a shape and its sharding, or those of a `QArray`."""
    if stack is None:
        stack = jax.tree.map(lambda part, where: _zeros(part.shape, part.dtype, where), target, place)
    inner = jax.tree.map(lambda where: NamedSharding(where.mesh, PartitionSpec(*where.spec[1:])), place)
    if is_quantized(target):
        qvalue, scale = _quantizer(inner.qvalue, inner.scale, target.qtype)(_put(value, inner.qvalue))
        value = replace(inner, qvalue=qvalue, scale=scale)
    else:
        value = _put(value, inner)
    return jax.tree.map(lambda whole, part, where: _set_layer(where)(whole, part, layer), stack, value, place)


def dequantized(q) -> Leaf:
    """A quantised stack as a `Leaf` in float32, for files: all of it must be on devices of this process."""

    def read(layer: int | None) -> np.ndarray:
        part = q if layer is None else jax.tree.map(lambda w: w[layer], q)
        return np.asarray(_dequantize(part))

    return Leaf(q.shape, np.float32, read)


def _put(value: np.ndarray, sharding) -> jax.Array:
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def _zeros(shape, dtype, sharding) -> jax.Array:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()


@jax.jit
def _dequantize(q) -> jax.Array:
    return dequantize(q, jnp.float32)


# A sharding of each part of a `QArray` cannot be hashed; matrices of one shape share theirs.
@lru_cache(maxsize=256)
def _quantizer(qvalue, scale, dtype: str):
    def run(w):
        made = quantize(w, dtype, lead=0)
        return made.qvalue, made.scale

    return jax.jit(run, out_shardings=(qvalue, scale))


@lru_cache(maxsize=256)
def _set_layer(sharding):
    # Donated: the stack is filled in place, so that it is never held twice.
    return jax.jit(lambda stack, value, i: stack.at[i].set(value), donate_argnums=0, out_shardings=sharding)
