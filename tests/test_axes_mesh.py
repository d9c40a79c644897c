"""The axis table and the mesh: what each rule gives, and the one-line refusals."""

import math

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from medcg_jax.axes import MESH_AXES, RULES, spec
from medcg_jax.mesh import batch_sharding, check_batch, make_mesh, mesh_shape, put_batch
from medcg_jax.run_config import ConfigError, MeshConfig


def test_logical_and_mesh_names_share_no_word():
    assert not set(RULES) & set(MESH_AXES)


def test_spec_follows_the_order_of_the_axes():
    assert spec("embed", "mlp") == P("fsdp", "tensor")
    assert spec("mlp", "embed") == P("tensor", "fsdp")
    assert spec("layer", "heads", "head_dim", "embed") == P(None, "tensor", None, "fsdp")
    assert spec("act_batch", None) == P(("data", "fsdp"), None)


@pytest.mark.parametrize("names", [("embd",), ("fsdp",), ("embed", "act_batch"), ("mlp", "heads")])
def test_spec_refuses_unknown_names_mesh_axes_and_double_use(names):
    with pytest.raises(ValueError, match="|".join(("unknown", "twice"))):
        spec(*names)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_the_axis_left_open_takes_what_is_left(cell, data, fsdp, tensor):
    devices = cell * data * fsdp * tensor
    shape = mesh_shape(MeshConfig(cell=cell, data=-1, fsdp=fsdp, tensor=tensor), devices)
    assert shape == (cell, data, fsdp, tensor) and math.prod(shape) == devices


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(fsdp=3), "needs a multiple of 3 devices; there are 8"),
        (MeshConfig(data=2, fsdp=2), "needs 4 devices; there are 8"),
        (MeshConfig(fsdp=-1), "only one axis may be -1"),
        (MeshConfig(tensor=0), "mesh.tensor=0"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_in_one_line(config, message):
    with pytest.raises(ConfigError, match=message):
        mesh_shape(config, 8)


def test_cell_is_the_outermost_axis_and_owns_consecutive_devices():
    mesh = make_mesh(MeshConfig(cell=2, data=1, fsdp=2, tensor=2))
    assert mesh.axis_names == MESH_AXES
    ids = np.vectorize(lambda device: device.id)(mesh.devices)
    assert sorted(ids[0].ravel()) == [0, 1, 2, 3]


def test_a_batch_that_the_mesh_cannot_split_is_named():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    check_batch(mesh, 8, "train.batch_size")
    with pytest.raises(ConfigError, match="train.batch_size=6 cannot be split over data x fsdp = 4"):
        check_batch(mesh, 6, "train.batch_size")


def test_rows_of_a_batch_lie_on_data_and_fsdp():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    rows = np.arange(8, dtype=np.int32)[:, None]
    array = put_batch({"tokens": rows}, batch_sharding(mesh))["tokens"]
    np.testing.assert_array_equal(array, rows)
    assert {shard.data.shape for shard in array.addressable_shards} == {(2, 1)}
    assert len(jax.devices()) == 8
