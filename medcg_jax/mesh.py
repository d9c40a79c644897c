"""The device mesh (cell, data, fsdp, tensor), shardings of batches on it, and batches from hosts to devices."""

import dataclasses
import functools
import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from medcg_jax.axes import BATCH_AXES, MESH_AXES
from medcg_jax.config import ConfigError, MeshConfig, RunConfig, TrainConfig


def mesh_shape(config: MeshConfig, num_devices: int) -> tuple[int, int, int, int]:
    """Sizes of `MESH_AXES` for `num_devices`, with -1 replaced by the remaining devices.

    Raises:
      ConfigError: a size is 0 or below -1, two are -1, or their product is not `num_devices`.
    """
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    for axis, size in zip(MESH_AXES, sizes, strict=True):
        if size == 0 or size < -1:
            raise ConfigError(
                f"mesh.{axis}={size}: expected a positive number of devices, or -1 for the remaining ones"
            )
    shown = ", ".join(f"{axis} {size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
    if sizes.count(-1) > 1:
        raise ConfigError(f"mesh ({shown}): only one axis may be -1, expected a number in --config.mesh.AXIS of others")
    fixed = math.prod(size for size in sizes if size != -1)
    if num_devices % fixed or (-1 not in sizes and fixed != num_devices):
        needed = f"a multiple of {fixed}" if -1 in sizes else f"{fixed}"
        are = "is 1" if num_devices == 1 else f"are {num_devices}"
        flags = " ".join(f"--config.mesh.{axis}={size}" for axis, size in _fitting(sizes, num_devices).items())
        raise ConfigError(f"mesh ({shown}) needs {needed} devices; there {are}: {flags} would fit")
    return tuple(num_devices // fixed if size == -1 else size for size in sizes)


def _fitting(sizes: Sequence[int], num_devices: int) -> dict[str, int]:
    """The axes that must change, with sizes as large as they can be, so that a mesh fits this number of devices."""
    changed, left = {}, num_devices
    for axis, size in reversed(list(zip(MESH_AXES, sizes, strict=True))):  # inner axes first: they are the nearest
        if size != -1:
            fits = math.gcd(size, left)
            left //= fits
            if fits != size:
                changed[axis] = fits
    if -1 not in sizes and left > 1:
        changed["data"] = -1
    return dict(sorted(changed.items(), key=lambda item: MESH_AXES.index(item[0])))


def make_mesh(config: MeshConfig = MeshConfig(), devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices` (default: all) with `MESH_AXES`, `cell` outermost, every axis Auto.

    `cell`, then `data`, are the axes that cross islands (`islands`). Within an island devices exchange parameters and
    activations at every layer; between islands they exchange each gradient's shard once, and between cells nothing.

    Raises:
      ConfigError: as `mesh_shape`; or fsdp or tensor would cross islands, or islands differ in size; or sparse cores are
        asked for where there are none.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = mesh_shape(config, len(devices))
    kind = devices[0].device_kind
    # A CPU is asked about a pod's configuration in rehearsals.
    if config.sparse_cores and (kind.startswith("TPU v5 lite") or devices[0].platform == "gpu"):
        raise ConfigError(f"mesh.sparse_cores=true: a {kind} has none; expected false")
    sizes = Counter(islands(devices))
    if len(sizes) == 1:
        # Except on a v5e, `jax.make_mesh` refuses to split a side of the chips' grid, as four cells of a v6e:8x8 do.
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        across = _across_islands(shape, sizes)
        within = tuple(size // num for size, num in zip(shape, across, strict=True))
        placed = mesh_utils.create_hybrid_device_mesh(
            within, across, devices, process_is_granule=_by_process(devices), allow_split_physical_axes=True
        )
    return Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def fitted(run: RunConfig, devices: Sequence[jax.Device]) -> RunConfig:
    """With `mesh.elastic`, the run with the nearest mesh for these devices; else the run itself.

    As much of `tensor` is kept as fits, then as much of `fsdp`; `data` takes the rest. `train.batch_size` stays, so that
    losses are those of the other mesh up to rounding; the last rows of a batch are empty where devices do not divide it
    (`padded_rows`). `eval.batch_size`, which changes no prediction, becomes a multiple.

    Raises:
      ConfigError: no mesh of these devices has islands that fit.
    """
    sizes, count = run.mesh, len(devices)
    if not sizes.elastic:
        return run
    cell = math.gcd(sizes.cell, count) if sizes.cell > 0 else 1
    meshes = [
        dataclasses.replace(sizes, cell=cell, data=count // cell // (tensor * fsdp), fsdp=fsdp, tensor=tensor)
        for tensor, fsdp in itertools.product(
            _divisors(sizes.tensor, count // cell), _divisors(sizes.fsdp, count // cell)
        )
        if count // cell % (tensor * fsdp) == 0
    ]
    for config in (sizes, *meshes):
        try:
            shards = num_shards(make_mesh(config, devices))
        except ConfigError as error:
            refusal = error
        else:
            tests = dataclasses.replace(run.eval, batch_size=-(-run.eval.batch_size // shards) * shards)
            return dataclasses.replace(run, mesh=config, eval=tests)
    raise refusal


def _divisors(size: int, count: int) -> list[int]:
    """The divisors of `count`, the largest first, that divide `size` too; all of them for -1."""
    return [n for n in range(count, 0, -1) if count % n == 0 and (size == -1 or size % n == 0)]


def islands(devices: Sequence[jax.Device]) -> list[int]:
    """For each device the number of its island: the slice of a TPU pod (ICI), or the host of GPUs (NVLink).

    The data-center network connects islands. All CPU devices are one island.
    """
    if _by_process(devices):
        return [device.process_index for device in devices]
    return [0 if device.platform == "cpu" else getattr(device, "slice_index", None) or 0 for device in devices]


def _by_process(devices: Sequence[jax.Device]) -> bool:
    """Whether each process is an island, as for GPUs that are not here and only compiled for: their slice is always 0.

    GPUs that are here have a slice for each host, with any number of processes: openxla/xla
    xla/pjrt/distributed/topology_util.cc, BuildGlobalTopology, compares the hosts' boot ids.
    """
    return devices[0].platform == "gpu" and devices[0] not in jax.devices()


def _across_islands(shape: tuple[int, ...], sizes: Mapping[int, int]) -> tuple[int, ...]:
    """The number of islands along each mesh axis. sizes: island -> number of its devices."""
    cell, data, fsdp, tensor = shape
    if len(set(sizes.values())) > 1:
        counts = ", ".join(f"{size} in {island}" for island, size in sorted(sizes.items()))
        raise ConfigError(f"devices of slices or hosts: {counts}; expected as many in each")
    num, size = len(sizes), next(iter(sizes.values()))
    across_cell = math.gcd(cell, num)
    if data % (num // across_cell) or size % (fsdp * tensor):
        raise ConfigError(
            f"mesh.fsdp={fsdp} x mesh.tensor={tensor} would cross slices or hosts of {size} devices, and gather "
            f"parameters over the data-center network at every layer; expected on {num} of them: fsdp x tensor a "
            f"divisor of {size}, cell x data a multiple of {num} (cell={cell}, data={data})"
        )
    return across_cell, num // across_cell, 1, 1


def check_batch(mesh: Mesh, batch_size: int, field: str) -> None:
    """Raises ConfigError if the mesh's batch axes do not divide `batch_size`; the message calls it `field`."""
    _check_shards(num_shards(mesh), batch_size, field)


def check_batches(shards: int, run: RunConfig) -> None:
    """Raises ConfigError if one of a run's batches cannot be split into so many shards (`num_shards`).

    With `mesh.elastic` a training's batches are padded, and need not be.
    """
    for section in ("train", *(["base"] if run.base.steps else [])) if not run.mesh.elastic else ():
        train = getattr(run, section)
        name = f"{section}.batch_size per accumulation step"
        _check_shards(shards, train.batch_size // train.accumulation_steps, name)
    _check_shards(shards, run.eval.batch_size, "eval.batch_size")


def _check_shards(shards: int, batch_size: int, field: str) -> None:
    if batch_size % shards:
        raise ConfigError(
            f"{field}={batch_size} cannot be split over data x fsdp = {shards} devices; expected a multiple of {shards}"
        )


def num_shards(mesh: Mesh) -> int:
    """Number of shards of a batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def padded_rows(mesh: Mesh, train: TrainConfig) -> int:
    """Rows of a training's batch on devices: `train.batch_size`, and the empty ones with which every device has as many
    in each microbatch."""
    parts = num_shards(mesh) * train.accumulation_steps
    return -(-train.batch_size // parts) * parts


def batch_sharding(mesh: Mesh, *, cells: bool = False) -> NamedSharding:
    """A batch's sharding: rows over data and fsdp; with `cells`, after a leading cell axis."""
    lead = ("cell", BATCH_AXES) if cells else (BATCH_AXES,)
    return NamedSharding(mesh, PartitionSpec(*lead))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


@functools.cache
def local_shards(mesh: Mesh, process_index: int | None = None) -> tuple[int, ...]:
    """Numbers of those shards of a batch that are on devices of the process (default: this one), rising.

    Several processes may hold one shard, if the tensor axis is wider than a host. The numbers need not be consecutive:
    on a TPU's grid of chips the mesh has another order than the processes.
    """
    process = jax.process_index() if process_index is None else process_index
    axes = [mesh.axis_names.index(axis) for axis in BATCH_AXES]
    shards = set()
    for index, device in np.ndenumerate(mesh.devices):
        if device.process_index == process:
            shards.add(int(np.ravel_multi_index([index[a] for a in axes], [mesh.devices.shape[a] for a in axes])))
    return tuple(sorted(shards))


def local_rows(mesh: Mesh, batch_size: int, process_index: int | None = None) -> np.ndarray | None:
    """int[n] rising: rows of a global batch that the process gives to `put_batch`; None: all, of a lone process."""
    if jax.process_count() == 1:
        return None
    size = batch_size // num_shards(mesh)
    return np.concatenate([np.arange(shard * size, (shard + 1) * size) for shard in local_shards(mesh, process_index)])


def put_batch(batch: dict[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """The global batch as device arrays. batch: this process's rows (`local_rows`), in order.

    sharding: as `batch_sharding`; rows are on the axis that it splits over `BATCH_AXES`.
    """
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    mesh, axis = sharding.mesh, sharding.spec.index(BATCH_AXES)
    shards = local_shards(mesh)
    return {key: _put_rows(value, sharding, axis, shards, num_shards(mesh)) for key, value in batch.items()}


def _put_rows(
    rows: np.ndarray, sharding: NamedSharding, axis: int, shards: tuple[int, ...], num_shards: int
) -> jax.Array:
    size = rows.shape[axis] // len(shards)
    shape = (*rows.shape[:axis], size * num_shards, *rows.shape[axis + 1 :])

    def shard_rows(index: tuple[slice, ...]) -> np.ndarray:
        local = shards.index((index[axis].start or 0) // size)
        return rows[(*index[:axis], slice(local * size, (local + 1) * size))]

    return jax.make_array_from_callback(shape, sharding, shard_rows)
