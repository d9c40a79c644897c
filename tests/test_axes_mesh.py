"""The axis table and the mesh: what each rule gives, and the one-line refusals."""

import dataclasses
import math
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from medcg_jax import mesh as mesh_lib
from medcg_jax.axes import MESH_AXES, RULES, spec
from medcg_jax.config import ConfigError, MeshConfig, RunConfig, replace
from medcg_jax.mesh import (
    batch_sharding,
    check_batch,
    check_batches,
    fitted,
    islands,
    make_mesh,
    mesh_shape,
    padded_rows,
    put_batch,
)  # fmt: skip
from medcg_jax.train.setup import changes


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
        (MeshConfig(fsdp=3), "needs a multiple of 3 devices; there are 8: --config.mesh.fsdp=1 would fit"),
        (MeshConfig(data=2, fsdp=2), "needs 4 devices; there are 8: --config.mesh.data=-1 would fit"),
        (MeshConfig(data=1, fsdp=16, tensor=4), "are 8: --config.mesh.fsdp=2 would fit"),
        (MeshConfig(fsdp=-1), "only one axis may be -1"),
        (MeshConfig(tensor=0), "mesh.tensor=0"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_in_one_line(config, message):
    with pytest.raises(ConfigError, match=message):
        mesh_shape(config, 8)


def elastic(batch_size: int, **sizes: int) -> RunConfig:
    mesh = MeshConfig(elastic=True, **sizes)
    return replace(RunConfig(), mesh=mesh, train__batch_size=batch_size, eval__batch_size=4 * batch_size)


@settings(deadline=None)
@given(*[st.sampled_from((1, 2, 4, 8))] * 3, st.integers(1, 8), st.integers(1, 40), st.sampled_from((1, 2)))
def test_an_elastic_mesh_takes_all_devices(data, fsdp, tensor, count, batch_size, accumulation_steps):
    """Whatever their number; a batch has the fewest empty rows with which all have as many in each microbatch."""
    asked = replace(
        elastic(batch_size * accumulation_steps, data=data, fsdp=fsdp, tensor=tensor),
        train__accumulation_steps=accumulation_steps,
    )
    run = fitted(asked, jax.devices()[:count])
    sizes, shards = run.mesh, run.mesh.data * run.mesh.fsdp
    assert shards * sizes.tensor == count
    assert tensor % sizes.tensor == fsdp % sizes.fsdp == 0
    if data * fsdp * tensor == count:
        assert sizes == asked.mesh
    rows = padded_rows(make_mesh(sizes, jax.devices()[:count]), run.train)
    assert rows % (shards * accumulation_steps) == 0
    assert 0 <= rows - run.train.batch_size < shards * accumulation_steps
    assert run.eval.batch_size % shards == 0 and 0 <= run.eval.batch_size - asked.eval.batch_size < shards
    check_batches(shards, run)


def test_an_elastic_mesh_keeps_what_splits_the_model():
    counts = (8, 7, 6, 4, 2, 1)
    on = {count: fitted(elastic(24, data=2, fsdp=2, tensor=2), jax.devices()[:count]).mesh for count in counts}
    assert {count: (sizes.data, sizes.fsdp, sizes.tensor) for count, sizes in on.items()} == {
        8: (2, 2, 2), 7: (7, 1, 1), 6: (3, 1, 2), 4: (1, 2, 2), 2: (1, 1, 2), 1: (1, 1, 1),
    }  # fmt: skip
    fixed = replace(RunConfig(), mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    assert fitted(fixed, jax.devices()[:4]) is fixed
    with pytest.raises(ConfigError, match="train.batch_size per accumulation step=24 cannot be split .* 7 devices"):
        check_batches(7, replace(RunConfig(), train__batch_size=24))


def test_what_an_elastic_mesh_costs_is_said():
    run = fitted(elastic(16, data=1, fsdp=4, tensor=2), jax.devices()[:6])
    said = list(changes(elastic(16, data=1, fsdp=4, tensor=2).mesh, make_mesh(run.mesh, jax.devices()[:6]), run))
    assert said == [
        "6 devices as data 3 x fsdp 1 x tensor 2",
        "batches have 18 rows, of which 2 stay empty",
        "a device holds 4 times as much of the parameters and their moments",
    ]


@pytest.mark.parametrize(("kind", "platform"), [("TPU v5 lite", "tpu"), ("NVIDIA H100 80GB HBM3", "gpu")])
def test_sparse_cores_are_refused_where_there_are_none(kind, platform):
    devices = [SimpleNamespace(device_kind=kind, platform=platform)]
    with pytest.raises(ConfigError, match=f"mesh.sparse_cores=true: a {kind} has none; expected false"):
        make_mesh(MeshConfig(sparse_cores=True), devices)
    assert make_mesh(MeshConfig(sparse_cores=True)).size == len(jax.devices())


@settings(deadline=None)
@given(*[st.sampled_from((-1, 1, 2, 3, 4, 8, 16))] * 4, st.integers(1, 16))
def test_the_flags_that_are_named_fit(cell, data, fsdp, tensor, devices):
    config = MeshConfig(cell, data, fsdp, tensor)
    try:
        mesh_shape(config, devices)
    except ConfigError as error:
        flags = dict(re.findall(r"--config\.mesh\.(\w+)=(-?\d+)", str(error)))
        if "only one axis" not in str(error):
            changed = dataclasses.replace(config, **{axis: int(size) for axis, size in flags.items()})
            assert flags and math.prod(mesh_shape(changed, devices)) == devices


def test_cell_is_the_outermost_axis_and_owns_consecutive_devices():
    mesh = make_mesh(MeshConfig(cell=2, data=1, fsdp=2, tensor=2))
    assert mesh.axis_names == MESH_AXES
    ids = np.vectorize(lambda device: device.id)(mesh.devices)
    assert sorted(ids[0].ravel()) == [0, 1, 2, 3]


# ------------------------------------------------------------------ several slices or hosts


def gpus(num_hosts: int, num_each: int) -> list:
    """Devices as those of `topologies.get_topology_desc` for GPUs: one slice, a process for each host."""
    return [
        SimpleNamespace(id=i, platform="gpu", device_kind="a GPU", slice_index=0, process_index=i // num_each)
        for i in range(num_hosts * num_each)
    ]


def placed(monkeypatch, config: MeshConfig, devices) -> np.ndarray:
    """The islands of a mesh's devices, in its shape; `Mesh` itself takes real devices alone."""
    monkeypatch.setattr(mesh_lib, "Mesh", lambda devices, *_, **__: devices)
    return np.vectorize(lambda device: device.process_index)(make_mesh(config, devices))


@given(st.integers(0, 1), st.integers(0, 3), st.integers(0, 3), st.integers(0, 3), st.integers(1, 3))
def test_layers_never_exchange_over_the_network(cells, data, fsdp, tensor, hosts):
    """Whatever the sizes: fsdp and tensor stay on one host, or the mesh is refused and would not have fitted."""
    cell, data, fsdp, tensor, num_hosts = 2**cells, 2**data, 2**fsdp, 2**tensor, 2**hosts
    total = cell * data * fsdp * tensor
    if total % num_hosts:
        return
    config, devices = MeshConfig(cell, data, fsdp, tensor), gpus(num_hosts, total // num_hosts)
    with pytest.MonkeyPatch.context() as patch:
        if (total // num_hosts) % (fsdp * tensor) or num_hosts > cell * data:
            with pytest.raises(ConfigError, match="would cross slices or hosts of"):
                placed(patch, config, devices)
            return
        hosts_of = placed(patch, config, devices)
    assert hosts_of.shape == (cell, data, fsdp, tensor)
    assert all(len(set(block.ravel())) == 1 for row in hosts_of for block in row)
    # Cells come first: where there are as many as hosts, none needs the network at all.
    assert cell < num_hosts or all(len(set(row.ravel())) == 1 for row in hosts_of) or cell == 1


def test_what_an_island_is():
    assert islands(gpus(2, 2)) == [0, 0, 1, 1]
    tpus = [SimpleNamespace(platform="tpu", slice_index=i // 2, process_index=i) for i in range(4)]
    assert islands(tpus) == [0, 0, 1, 1]
    alone = [SimpleNamespace(platform="tpu", process_index=i) for i in range(4)]  # a single slice has no index
    assert islands(alone) == [0, 0, 0, 0]
    assert set(islands(jax.devices())) == {0}


def test_gpus_at_hand_are_joined_by_slice_whatever_their_processes(monkeypatch):
    devices = gpus(4, 1)
    monkeypatch.setattr(mesh_lib.jax, "devices", lambda: devices)
    assert islands(devices) == [0, 0, 0, 0]


def test_hosts_of_several_sizes_are_named():
    with pytest.raises(ConfigError, match="4 in 0, 2 in 1; expected as many in each"):
        make_mesh(MeshConfig(), [*gpus(1, 4), *gpus(2, 4)[4:6]])


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
