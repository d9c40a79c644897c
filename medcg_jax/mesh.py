"""The device mesh (cell, data, fsdp, tensor), shardings of state on it, and host batches put on its devices."""

import functools
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from medcg_jax.axes import BATCH_AXES, MESH_AXES
from medcg_jax.config import ConfigError, MeshConfig


def mesh_shape(config: MeshConfig, num_devices: int) -> tuple[int, int, int, int]:
    """Sizes of `MESH_AXES` for so many devices, with the one -1 filled in.

    Raises:
      ConfigError: a size is 0 or below -1, two are -1, or their product is not `num_devices`.
    """
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    for axis, size in zip(MESH_AXES, sizes, strict=True):
        if size == 0 or size < -1:
            raise ConfigError(f"mesh.{axis}={size}: a positive number of devices is accepted, or -1 for what is left")
    if sizes.count(-1) > 1:
        raise ConfigError(f"mesh {dict(zip(MESH_AXES, sizes, strict=True))}: only one axis may be -1")
    fixed = math.prod(size for size in sizes if size != -1)
    if num_devices % fixed or (-1 not in sizes and fixed != num_devices):
        needed = f"a multiple of {fixed}" if -1 in sizes else f"{fixed}"
        raise ConfigError(
            f"mesh {dict(zip(MESH_AXES, sizes, strict=True))} needs {needed} devices; there are {num_devices}"
        )
    return tuple(num_devices // fixed if size == -1 else size for size in sizes)


def make_mesh(config: MeshConfig = MeshConfig(), devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices` (default: all) with `MESH_AXES`, `cell` outermost, every axis Auto.

    Devices of several islands (`islands`) are joined along `cell`, then `data`: within an island parameters and
    activations are exchanged at every layer; between islands each gradient's shard once, and between cells nothing.

    Raises:
      ConfigError: as `mesh_shape`; or fsdp or tensor would cross islands, or islands are not of one size.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = mesh_shape(config, len(devices))
    sizes = Counter(islands(devices))
    if len(sizes) == 1:
        # Not `jax.make_mesh`: off a v5e it refuses to split a side of the chips' grid, as four cells of a v6e:8x8 do.
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        across = _across_islands(shape, sizes)
        within = tuple(size // part for size, part in zip(shape, across, strict=True))
        placed = mesh_utils.create_hybrid_device_mesh(
            within, across, devices, process_is_granule=_by_process(devices), allow_split_physical_axes=True
        )
    return Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def islands(devices: Sequence[jax.Device]) -> list[int]:
    """For each device the number of its island: the slice of a TPU pod (ICI), or the host of GPUs (NVLink).

    Between islands there is the data-center network. On CPUs all are one: nothing there is nearer than the rest.
    """
    if _by_process(devices):
        return [device.process_index for device in devices]
    return [0 if device.platform == "cpu" else getattr(device, "slice_index", None) or 0 for device in devices]


def _by_process(devices: Sequence[jax.Device]) -> bool:
    """Whether a process is an island: of GPUs that are only compiled for, whose slice is 0 on every host.

    Of GPUs at hand slices are the hosts, with any number of processes each: openxla/xla
    xla/pjrt/distributed/topology_util.cc, BuildGlobalTopology, compares their boot ids.
    """
    return devices[0].platform == "gpu" and devices[0] not in jax.devices()


def _across_islands(shape: tuple[int, ...], sizes: Mapping[int, int]) -> tuple[int, ...]:
    """Into how many parts the islands divide each mesh axis; sizes: island -> its devices."""
    cell, data, fsdp, tensor = shape
    if len(set(sizes.values())) > 1:
        counts = ", ".join(f"{size} in {island}" for island, size in sorted(sizes.items()))
        raise ConfigError(f"devices of slices or hosts: {counts}; as many in each are accepted")
    num, size = len(sizes), next(iter(sizes.values()))
    across_cell = math.gcd(cell, num)
    if data % (num // across_cell) or size % (fsdp * tensor):
        raise ConfigError(
            f"mesh.fsdp={fsdp} x mesh.tensor={tensor} would cross slices or hosts of {size} devices, and gather "
            f"parameters over the data-center network at every layer; accepted on {num} of them: fsdp x tensor a "
            f"divisor of {size}, cell x data a multiple of {num} (cell={cell}, data={data})"
        )
    return across_cell, num // across_cell, 1, 1


def check_batch(mesh: Mesh, batch_size: int, field: str) -> None:
    """Raises ConfigError when the mesh's batch axes do not divide `batch_size`; `field` names it in the message."""
    parts = num_parts(mesh)
    if batch_size % parts:
        raise ConfigError(
            f"{field}={batch_size} cannot be split over data x fsdp = {parts} devices; "
            f"a multiple of {parts} is accepted"
        )


def num_parts(mesh: Mesh) -> int:
    """Parts that a batch is split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_sharding(mesh: Mesh, *, cells: bool = False) -> NamedSharding:
    """How a batch lies on the mesh: rows over data and fsdp; with `cells`, behind a leading cell axis."""
    lead = ("cell", BATCH_AXES) if cells else (BATCH_AXES,)
    return NamedSharding(mesh, PartitionSpec(*lead))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


@functools.cache
def own_parts(mesh: Mesh, process_index: int | None = None) -> tuple[int, ...]:
    """Which of the data x fsdp parts that a batch is split into the process (default: this one) has devices of, rising.

    Where processes share the devices of a part, as with a tensor axis wider than a host, each of them has it; and where
    the mesh's order is not that of processes, as on a TPU's grid of chips, the parts need not follow one another.
    """
    process = jax.process_index() if process_index is None else process_index
    axes = [mesh.axis_names.index(axis) for axis in BATCH_AXES]
    rows = set()
    for place, device in np.ndenumerate(mesh.devices):
        if device.process_index == process:
            rows.add(int(np.ravel_multi_index([place[a] for a in axes], [mesh.devices.shape[a] for a in axes])))
    return tuple(sorted(rows))


def own_rows(mesh: Mesh, batch_size: int, process_index: int | None = None) -> np.ndarray | None:
    """int[n] rising: the rows of a global batch that the process supplies to `put_batch`; None: all, on one process."""
    if jax.process_count() == 1:
        return None
    size = batch_size // num_parts(mesh)
    return np.concatenate([np.arange(part * size, (part + 1) * size) for part in own_parts(mesh, process_index)])


def put_batch(batch: dict[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """The global batch as device arrays, of which this process supplies the rows that `own_rows` says, in their order.

    sharding: `batch_sharding`'s, with rows on the axis that it splits over `BATCH_AXES`.
    """
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    mesh, axis = sharding.mesh, sharding.spec.index(BATCH_AXES)
    parts = own_parts(mesh)
    return {key: _put_rows(value, sharding, axis, parts, num_parts(mesh)) for key, value in batch.items()}


def _put_rows(
    rows: np.ndarray, sharding: NamedSharding, axis: int, parts: tuple[int, ...], num_parts: int
) -> jax.Array:
    size = rows.shape[axis] // len(parts)
    shape = (*rows.shape[:axis], size * num_parts, *rows.shape[axis + 1 :])

    def piece(index: tuple[slice, ...]) -> np.ndarray:
        # A device's rows are those of one part.
        place = parts.index((index[axis].start or 0) // size)
        return rows[(*index[:axis], slice(place * size, (place + 1) * size))]

    return jax.make_array_from_callback(shape, sharding, piece)
