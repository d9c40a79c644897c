"""Parameters written by Orbax, and opened to be read in parts; a stack of layers is never held whole.

Orbax writes and reads the directory (its layout, names, metadata and commit). A type handler of ours writes and reads
the leaves. The result is an ordinary checkpoint of JAX arrays.
"""

import asyncio
import logging
import math
from functools import partial
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from orbax.checkpoint import type_handlers

from medcg_jax.families.weights.engine import Leaf, Stored
from medcg_jax.families.weights.tables import Index, Reordered

# A layer of a matrix, or a whole one, is stored in about so many chunks, so that as many hosts read it once together: a
# chunk is read whole. Below `LEAST_CHUNK_BYTES` files would be slow.
NUM_CHUNKS, LEAST_CHUNK_BYTES = 64, 1 << 15
# Chunks that are read at once: all of a layer's would stand in memory beside the layer.
AT_ONCE = 16


class LeafHandler(type_handlers.TypeHandler):
    """Writes a `Leaf` as Orbax writes a JAX array, and reads a stored array as a `Leaf`."""

    def typestr(self) -> str:
        return "jax.Array"

    async def metadata(self, infos):
        raise NotImplementedError("asked of StandardCheckpointer")

    async def serialize(self, values, infos, args=None):
        stores = await _done(asyncio.gather(*map(_created, values, infos, args)))
        for leaf, arg, store in zip(values, args, stores, strict=True):
            # Each layer is written before the next one is read.
            for layer in range(leaf.shape[0]) if arg.shard_axes else (None,):
                await _done(
                    store[... if layer is None else layer].write(np.asarray(leaf if layer is None else leaf[layer]))
                )
        return []

    async def deserialize(self, infos, args=None):
        return [await _opened(info) for info in infos]


async def _created(leaf: Leaf, info, arg) -> tensorstore.TensorStore:
    await info.await_path_creation()
    spec = type_handlers.get_json_tspec_write(
        info, use_ocdbt=info.is_ocdbt_checkpoint, global_shape=leaf.shape, local_shape=leaf.shape, dtype=leaf.dtype,
        process_index=0, arg=arg,
    )  # fmt: skip
    return await tensorstore.open(tensorstore.Spec(spec), create=True, open=True, context=info.ts_context)


async def _done(operation):
    try:
        return await operation
    except ValueError as error:  # TensorStore's for any failure, such as a full disk
        reason = str(error).partition(" [tensorstore_spec")[0]
        raise OSError(f"cannot be written: {' '.join(reason.split())}") from error


# Reads what is asked for alone: through its cache a file system reads ahead, which are other hosts' chunks.
PAST_CACHE = {"file_io_mode": {"mode": "direct"}}


async def _opened(info) -> Leaf:
    spec = type_handlers.get_json_tspec_read(info, use_ocdbt=info.is_ocdbt_checkpoint)
    if is_one_of_several():
        try:
            return _leaf(await tensorstore.open(spec | {"context": PAST_CACHE}, open=True, context=info.ts_context))
        except ValueError:  # a file system that cannot; or another failure, which is met again
            pass
    return _leaf(await tensorstore.open(tensorstore.Spec(spec), open=True, context=info.ts_context))


def is_one_of_several() -> bool:
    """Whether other hosts read the other chunks."""
    return jax.process_count() > 1


def _leaf(store: tensorstore.TensorStore) -> Leaf:
    return Leaf(store.shape, store.dtype.numpy_dtype, partial(_by_chunks, store))


def _by_chunks(store: tensorstore.TensorStore, layer: int | None) -> Stored:
    """An array, or a layer of one, as it lies in its file: one chunk after another."""
    before = () if layer is None else (layer,)
    shape, chunk = store.shape[len(before) :], tuple(store.chunk_layout.read_chunk.shape or store.shape)[len(before) :]
    # Chunks at the edge of an array are larger than what is left of it, in files of other writers.
    sizes = tuple(length if length and size % length == 0 else size for size, length in zip(shape, chunk, strict=True))
    grid = tuple(size // length for size, length in zip(shape, sizes, strict=True))
    count = math.prod(grid)

    def read(index: Index) -> np.ndarray:
        numbers = range(count)[index[0]] if index else range(count)
        chunks = np.empty((len(numbers), *sizes), store.dtype.numpy_dtype)
        for first in range(0, len(numbers), AT_ONCE):
            corners = [np.unravel_index(number, grid) for number in numbers[first : first + AT_ONCE]]
            reads = [
                store[
                    (*before, *(slice(int(i) * n, int(i + 1) * n) for i, n in zip(corner, sizes, strict=True)))
                ].read()
                for corner in corners
            ]
            for place, chunk in enumerate(reads, first):
                chunks[place] = chunk.result()
        return chunks

    order = tuple(axis for pair in zip(range(len(grid)), range(len(grid), 2 * len(grid)), strict=True) for axis in pair)
    return Stored((count, *sizes), read, Reordered((*grid, *sizes), order, shape))


def save(directory: Path, tree, stacked: set[tuple[str, ...]]) -> None:
    """Writes a tree of JAX arrays or `Leaf`s.

    stacked: paths of the leaves whose leading axis counts layers. A chunk on disk belongs to one layer, so that a layer
      can be read by itself.
    """

    def cut(path, leaf) -> ocp.SaveArgs:
        axes = (0,) if tuple(key.key for key in path) in stacked else ()
        num_bytes = math.prod(leaf.shape[len(axes) :]) * np.dtype(leaf.dtype).itemsize
        return ocp.SaveArgs(chunk_byte_size=chunk_bytes(num_bytes), shard_axes=axes)

    args = ocp.args.PyTreeSave(tree, save_args=jax.tree_util.tree_map_with_path(cut, tree))
    logger = logging.getLogger("absl")
    logger.addFilter(_no_advice)
    try:
        with _checkpointer() as checkpointer:
            checkpointer.save(directory.absolute(), args=args)
    finally:
        logger.removeFilter(_no_advice)


def _no_advice(record: logging.LogRecord) -> bool:
    """Not what Orbax says of every small chunk: these were measured to be as fast as larger ones."""
    return "target_byte_size too small" not in record.getMessage()


def chunk_bytes(num_bytes: int) -> int:
    """The most bytes of a chunk of an array, or a layer of one, of `num_bytes`."""
    return max(LEAST_CHUNK_BYTES, num_bytes // NUM_CHUNKS)


def restore(directory: Path, like):
    """What is stored in `directory` as a tree of `Leaf`s in the structure of `like`."""
    kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=Leaf), like)
    with _checkpointer() as checkpointer:
        return checkpointer.restore(directory.absolute(), args=ocp.args.PyTreeRestore(like, restore_args=kinds))


def _checkpointer() -> ocp.Checkpointer:
    kinds = (Leaf, LeafHandler()), (jax.Array, type_handlers.ArrayHandler())
    registry = type_handlers.create_type_handler_registry(*kinds)
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry))
