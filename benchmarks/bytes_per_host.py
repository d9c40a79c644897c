"""What each of 64 hosts reads of a checkpoint at a start: `python -m benchmarks.bytes_per_host [SIZE ...]`.

Nothing is read or allocated: the rows of each host are computed, not loaded, for a release and for what `medcg convert`
writes; beside them what the host's devices hold. Hosts have four devices, as on a v5e:16x16. Of a release the 4 KiB pages
are counted that hold the rows; a chunk of ours is read whole (before it is compressed).

`--checkpoint=FOLDER` reads instead: the rows of some of the hosts, one host after another, of a release or of what
`medcg convert` wrote, and prints the bytes that the disk gave, by Linux's count for the process, read-ahead included. The
files' cached pages are dropped first.

Exit status 1: a host reads more than 1.1 times what its devices hold.
"""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from benchmarks.records import write_record
from medcg_jax.config import MeshConfig
from medcg_jax.families import build
from medcg_jax.families.weights import engine, orbax_leaves
from medcg_jax.families.weights.convert import open_leaves, read_config
from medcg_jax.families.weights.families import module_of
from medcg_jax.families.weights.orbax_leaves import chunk_bytes
from medcg_jax.families.weights.tables import spans_of
from medcg_jax.mesh import make_mesh

HOSTS, DEVICES_PER_HOST = 64, 4
# Each number is on one device, where the model's dimensions allow: the least that a host can hold.
MESH = MeshConfig(data=1, fsdp=64, tensor=4)
# Qwen2-VL-72B's dimensions are in its release's config.json alone.
SIZES = ("llava15_7b", "llava15_13b", "qwen2_vl_7b", "llama32_vision_11b", "minigpt_v2_7b", "next_chat_7b_336")
# Releases are in sixteen bits.
ITEM, PAGE, ALLOWED = 2, 4096, 1.1
MEASURED_HOSTS = (0, 21, 42, 63)


def rows_of_hosts(shape: tuple[int, ...], mesh) -> list[tuple[int, int]]:
    """(first, last) of the rows that each host reads of a stored array."""
    padded, where = engine.rows_over(mesh, shape)
    by_device = where.devices_indices_map(padded)
    spans = [spans_of(by_device[device], padded)[0] for device in jax.devices()]
    groups = [spans[first : first + DEVICES_PER_HOST] for first in range(0, len(spans), DEVICES_PER_HOST)]
    return [
        (min(min(start for start, _ in group), shape[0]), min(max(stop for _, stop in group), shape[0]))
        for group in groups
    ]


def in_pages(first: int, last: int, row_bytes: int) -> int:
    """Bytes of the pages that hold these rows, where the tensor begins at a page."""
    return (-(-last * row_bytes // PAGE) - first * row_bytes // PAGE) * PAGE if last > first else 0


def held_by_hosts(shape: tuple[int, ...], sharding) -> np.ndarray:
    """Bytes of the numbers that the devices of each host hold, equal ones once."""
    by_device = sharding.devices_indices_map(shape)
    held = []
    for first in range(0, len(jax.devices()), DEVICES_PER_HOST):
        devices = jax.devices()[first : first + DEVICES_PER_HOST]
        slices = {tuple(spans_of(by_device[device], shape)) for device in devices}
        held.append(sum(math.prod(stop - start for start, stop in spans) for spans in slices) * ITEM)
    return np.array(held)


def measure(config) -> dict[str, float]:
    """Bytes of a checkpoint; of the host for which the ratio is worst: bytes held, and read of either form."""
    mesh = make_mesh(MESH)
    shardings, abstract = engine.by_path(build.shardings(config, mesh)), engine.by_path(build.abstract(config)[1])
    whole, released, ours = 0, np.zeros(HOSTS, np.int64), np.zeros(HOSTS, np.int64)
    for slot in engine.slots(module_of(config).table(config), build.abstract(config)[1]).values():
        shape = slot.released_shape or (1,)
        whole += math.prod(shape) * ITEM
        row_bytes = math.prod(shape[1:]) * ITEM
        released += [in_pages(first, last, row_bytes) for first, last in rows_of_hosts(shape, mesh)]
        num_bytes = math.prod(slot.shape) * ITEM
        chunks = max(1, -(-num_bytes // chunk_bytes(num_bytes)))
        ours += [(last - first) * -(-num_bytes // chunks) for first, last in rows_of_hosts((chunks,), mesh)]
    held = sum(held_by_hosts(tuple(leaf.shape), shardings[path]) for path, leaf in abstract.items())
    worst = {name: int(np.argmax(read / held)) for name, read in (("released", released), ("converted", ours))}
    return {
        "bytes": whole,
        "held": int(held[worst["released"]]),
        "released": int(released[worst["released"]]),
        "converted": int(ours[worst["converted"]]),
        "released_over_held": float((released / held).max()),
        "converted_over_held": float((ours / held).max()),
    }


def read_by_hosts(directory: Path, hosts: Sequence[int]) -> list[dict[str, float]]:
    """For each host: bytes that its devices hold in the files' dtype, and that the disk gave for them.

    Raises:
      WeightsError: no checkpoint that can be read.
    """
    orbax_leaves.is_one_of_several = lambda: True  # as in each of the 64 processes
    config, mesh = read_config(directory), make_mesh(MESH)
    shardings, abstract = engine.by_path(build.shardings(config, mesh)), engine.by_path(build.abstract(config)[1])
    result = []
    for host in hosts:
        held, leaves = 0, engine.by_path(open_leaves(directory))
        for file in directory.rglob("*"):
            if file.is_file():
                with file.open("rb") as opened:
                    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        before = from_disk()
        for path, leaf in leaves.items():
            held += int(held_by_hosts(tuple(abstract[path].shape), shardings[path])[host]) // ITEM * leaf.dtype.itemsize
            for layer in range(leaf.shape[0]) if leaf.stacked else (None,):
                stored = leaf.stored(layer)
                first, last = rows_of_hosts(stored.shape or (1,), mesh)[host]
                if last > first:
                    stored.read((slice(first, last),) if stored.shape else ())
        result.append({"host": host, "held": held, "read": from_disk() - before})
    return result


def from_disk() -> int:
    """Bytes that the disk gave to this process so far."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text(encoding="utf-8").splitlines())
    return int(fields["read_bytes"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sizes", nargs="*", default=SIZES, metavar="SIZE")
    parser.add_argument("--checkpoint", default="", metavar="FOLDER")
    parser.add_argument("--json", default="", metavar="FILE")
    args = parser.parse_args(argv)
    if args.checkpoint and args.json:
        parser.error("--json with --checkpoint: expected one of them; what is read is printed alone")
    if args.checkpoint:
        read = read_by_hosts(Path(args.checkpoint), MEASURED_HOSTS)
        for of_host in read:
            ratio = of_host["read"] / of_host["held"]
            print(f"host {of_host['host']}: holds {of_host['held']:,} bytes, read {of_host['read']:,} ({ratio:.3f})")
        return int(any(of_host["read"] > ALLOWED * of_host["held"] for of_host in read))
    result = {name: measure(build.SIZES[name]()) for name in args.sizes}
    for name, of_host in result.items():
        print(
            f"{name}: {of_host['bytes'] / 1e9:.2f} GB; a host of {HOSTS} holds {of_host['held'] / 1e6:.1f} MB, reads "
            f"{of_host['released'] / 1e6:.1f} MB of a release ({of_host['released_over_held']:.3f} at most), "
            f"{of_host['converted'] / 1e6:.1f} MB converted ({of_host['converted_over_held']:.3f})"
        )
    write_record(
        args.json, {"hosts": HOSTS, "devices": DEVICES_PER_HOST, "mesh": dict(make_mesh(MESH).shape), **result}
    )
    over = (max(each["released_over_held"], each["converted_over_held"]) for each in result.values())
    return int(max(over) > ALLOWED)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", HOSTS * DEVICES_PER_HOST)
    sys.exit(main())
