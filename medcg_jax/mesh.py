"""The device mesh (cell, data, fsdp, tensor), shardings of state on it, and host batches put on its devices."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from medcg_jax.axes import BATCH_AXES, MESH_AXES
from medcg_jax.run_config import ConfigError, MeshConfig


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
        wanted = f"a multiple of {fixed}" if -1 in sizes else f"{fixed}"
        raise ConfigError(
            f"mesh {dict(zip(MESH_AXES, sizes, strict=True))} needs {wanted} devices; there are {num_devices}"
        )
    return tuple(num_devices // fixed if size == -1 else size for size in sizes)


def make_mesh(config: MeshConfig = MeshConfig(), devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices` (default: all) with `MESH_AXES`, `cell` outermost, every axis Auto."""
    devices = list(jax.devices() if devices is None else devices)
    shape = mesh_shape(config, len(devices))
    # Not `jax.make_mesh`: off a v5e it refuses to split a side of the chips' grid, as four cells of a v6e:8x8 do.
    placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def check_batch(mesh: Mesh, batch_size: int, field: str) -> None:
    """Raises ConfigError when the mesh's batch axes do not divide `batch_size`; `field` names it in the message."""
    parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch_size % parts:
        raise ConfigError(
            f"{field}={batch_size} cannot be split over data x fsdp = {parts} devices; "
            f"a multiple of {parts} is accepted"
        )


def batch_sharding(mesh: Mesh, *, cells: bool = False) -> NamedSharding:
    """How a batch lies on the mesh: rows over data and fsdp; with `cells`, behind a leading cell axis."""
    lead = ("cell", BATCH_AXES) if cells else (BATCH_AXES,)
    return NamedSharding(mesh, PartitionSpec(*lead))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def put_batch(batch: dict[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """The global batch as device arrays, of which this process supplies its own rows.

    On one process the host arrays are the whole batch; on several, each passes the rows that
    `process_rows` gives it.
    """
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return {key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()}
