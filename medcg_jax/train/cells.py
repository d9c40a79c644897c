"""One cell's arrays out of the stacked state of several, without moving anything between cells.

`cell` is the outermost mesh axis: a group of devices holds num_cells / mesh.shape["cell"] neighbouring cells, and a
cell's own arrays live on its group's devices alone.
"""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def group_mesh(mesh: Mesh, cell: int, num_cells: int) -> Mesh:
    """The part of `mesh` that holds cell number `cell`: the same axes, `cell` of size 1."""
    groups = mesh.shape["cell"]
    if groups == 1:
        return mesh
    group = cell * groups // num_cells
    return Mesh(mesh.devices[group : group + 1], mesh.axis_names, axis_types=mesh.axis_types)


def take_cell(stacked, cell: int, num_cells: int):
    """The tree of one cell: each array without its leading cell axis, on the cell's own devices."""
    mesh = jax.tree.leaves(stacked)[0].sharding.mesh
    group = group_mesh(mesh, cell, num_cells)
    local = num_cells // mesh.shape["cell"]
    here = stacked if group is mesh else jax.tree.map(lambda x: _on_group(x, group, local), stacked)
    wanted = jax.tree.map(lambda x: NamedSharding(group, PartitionSpec(*x.sharding.spec[1:])), stacked)
    return jax.device_put(_take(here, np.int32(cell % local)), wanted)


def _on_group(x: jax.Array, group: Mesh, local: int) -> jax.Array:
    """x's shards on one group of devices as an array of `local` cells; nothing is copied."""
    devices = set(group.devices.flat)
    shards = [shard.data for shard in x.addressable_shards if shard.device in devices]
    sharding = NamedSharding(group, x.sharding.spec)
    return jax.make_array_from_single_device_arrays((local, *x.shape[1:]), sharding, shards)


@jax.jit
def _take(tree, index):
    return jax.tree.map(lambda x: x[index], tree)
