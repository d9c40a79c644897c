"""What each host of a pod reads of a release: `python -m benchmarks.bytes_per_host [SIZE ...]`; prints a line a size.

Nothing is read or allocated: the slices of the first host's devices are computed, not loaded. Also counted are the 4 KiB
pages that hold the slices, since a slice of columns touches a part of every row; a file system's read-ahead is not.
"""

import math
import sys

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from medcg_jax.config import MeshConfig
from medcg_jax.families import build
from medcg_jax.families.weights import engine
from medcg_jax.families.weights.families import module_of
from medcg_jax.families.weights.tables import spans_of
from medcg_jax.mesh import make_mesh

# One device a host: the slices of a host's devices are adjacent.
HOSTS = 4
SIZES = ("llava15_7b", "qwen2_vl_7b", "llama32_vision_11b", "minigpt_v2_7b", "next_chat_7b_336")
# Releases are in sixteen bits.
ITEM, PAGE = 2, 4096


def pages_of(index, shape) -> int:
    """Pages that hold a slice of a matrix, where the tensor begins at a page."""
    (first, last), *others = spans_of(index, shape)
    row, inner = math.prod(shape[1:]) * ITEM, math.prod(shape[2:]) * ITEM
    start, stop = (edge * inner for edge in others[0]) if others else (0, ITEM)
    if stop - start == row or not others:
        return (last * (row or ITEM) - 1) // PAGE - first * (row or ITEM) // PAGE + 1
    begins = np.arange(first, last) * row + start
    ends = begins + (stop - start) - 1
    return int(np.sum(ends // PAGE - begins // PAGE + 1) - np.sum(begins[1:] // PAGE == ends[:-1] // PAGE))


def measure(size: str) -> tuple[int, int, int]:
    """(bytes of a release, bytes of it that the first host reads, bytes of the pages that hold those)."""
    config, mesh = build.SIZES[size](), make_mesh(MeshConfig(data=1, fsdp=HOSTS))
    shardings, count = engine.by_path(build.shardings(config, mesh)), np.zeros(3, np.int64)
    for slot in engine.slots(module_of(config).table(config), build.abstract(config)[1]).values():
        sharding, released = shardings[slot.entry.path], slot.released_shape
        if slot.layer is not None:
            sharding = NamedSharding(mesh, PartitionSpec(*sharding.spec[1:]))

        def read(index, released=released):
            shape = [stop - start for start, stop in spans_of(index, released)]
            count[1:] += math.prod(shape) * ITEM, pages_of(index, released) * PAGE
            return np.empty(shape, np.int8)

        count[0] += math.prod(released) * ITEM
        slot.entry.transform.load(read, slot.shape, sharding.devices_indices_map(slot.shape)[jax.devices()[0]])
    return tuple(count.tolist())


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", HOSTS)
    for name in sys.argv[1:] or SIZES:
        of_all, of_host, in_pages = measure(name)
        print(
            f"{name}: {of_all / 1e9:.2f} GB; a host of {HOSTS} reads {of_host / 1e9:.2f} GB ({of_host / of_all:.3f}), "
            f"in pages {in_pages / 1e9:.2f} GB"
        )
