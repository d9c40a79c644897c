"""Hosts read a release once, in runs of rows, and their devices get the numbers that the whole tensors have."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from releases import CONFIGS, random_release, same

from medcg_jax.config import MeshConfig
from medcg_jax.families import build
from medcg_jax.families.weights import engine, tables
from medcg_jax.families.weights.convert import convert, load_checkpoint, module_of, open_leaves
from medcg_jax.families.weights.files import Tensors, open_tensors
from medcg_jax.mesh import make_mesh

FSDP = MeshConfig(data=1, fsdp=8)
MIXED = MeshConfig(data=2, fsdp=2, tensor=2)
TRANSFORMS = {
    "same": (tables.SAME, (8, 6)),
    "flat": (tables.FLAT, (4, 6)),
    "rows": (tables.ROWS, (3, 4, 8)),
    "linear": (tables.linear(), (8, 4, 6)),
    "linear of heads": (tables.linear(inputs=2), (4, 6, 8)),
    "patches": (tables.conv_patch(2), (12, 8)),
    "fused": (tables.fused_qkv(), (8, 4, 6)),
    "fused bias": (tables.fused_qkv(), (4, 6)),
    "ones": (tables.leading_ones(2), (8,)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_ours_of_a_released_tensor_is_what_was_stored(name):
    transform, shape = TRANSFORMS[name]
    ours = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    released = transform.store(ours)
    assert released.shape == transform.released_shape(shape)
    for array in (released, jnp.asarray(released)):
        np.testing.assert_array_equal(transform.ours(shape)(array), ours)
    # Layers share a program by it.
    assert transform.ours(shape) == transform.ours(shape) and hash(transform.ours(shape)) == hash(transform.ours(shape))


@pytest.fixture(scope="module")
def releases(tmp_path_factory):
    """A function: family -> (released directory, parameters)."""
    return functools.cache(lambda family: random_release(family, tmp_path_factory.mktemp(family)))


def on_one_device(params):
    return jax.device_put(params, jax.devices()[0])


@pytest.mark.parametrize("family", CONFIGS)
def test_on_eight_devices_the_numbers_are_those_of_the_release(family, releases):
    src, params = releases(family)
    same(on_one_device(load_checkpoint(src, CONFIGS[family], make_mesh(FSDP))[1]), params)


def test_of_heads_that_devices_share_too_and_of_what_was_converted(releases, tmp_path):
    (src, params), config, mesh = releases("minigpt_v2"), CONFIGS["minigpt_v2"], make_mesh(MIXED)
    same(on_one_device(load_checkpoint(src, config, mesh)[1]), params)
    # As a start with a base of another dtype takes it.
    convert(src, tmp_path / "orbax")
    placed = engine.put(open_leaves(tmp_path / "orbax"), build.abstract(config)[1], build.shardings(config, mesh))
    same(on_one_device(placed), params)


def test_on_a_mesh_in_another_sequence_than_the_hosts(releases):
    """As on a TPU, whose meshes follow the chips' grid."""
    src, params = releases("qwen2_vl")
    mesh = make_mesh(MIXED)
    turned = Mesh(mesh.devices[..., ::-1, ::-1], mesh.axis_names, axis_types=mesh.axis_types)
    same(on_one_device(load_checkpoint(src, CONFIGS["qwen2_vl"], turned)[1]), params)


def reads_of(src, config, monkeypatch, host: range) -> dict[str, list[tuple[int, int]]]:
    """Tensor -> the (first, last) rows that a host with these of eight devices reads."""
    mesh = make_mesh(MIXED)
    abstract, shardings = build.abstract(config)[1], build.shardings(config, mesh)
    family = module_of(config)
    tensors, names = family.open_release(src, json.loads((src / "config.json").read_text()), {})
    reads: dict[str, list[tuple[int, int]]] = {}
    devices = [jax.devices()[number] for number in host]

    def read(name, index=()):
        spans = tables.spans_of(index, tensors.shapes[name]) if index else [(0, 1)]
        assert spans[1:] == [(0, size) for size in tensors.shapes[name][1:]], f"{name}: no whole rows"
        reads.setdefault(name, []).append(spans[0] if spans else (0, 1))
        return tensors.read(name, index)

    def of_host(sharding, shape):
        by_device = sharding.addressable_devices_indices_map(shape)
        return [by_device[device] for device in devices]

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_local_indices", of_host)
        counted = Tensors(tensors.shapes, read, tensors.dtype, tensors.origin)
        leaves = engine.by_path(engine.lazy(family.table(config), abstract, counted, names, "here"))
        for path, where in engine.by_path(shardings).items():
            for piece in engine._pieces_of(leaves[path], engine.by_path(abstract)[path], where):
                piece.read()
    return reads


@pytest.mark.parametrize("family", CONFIGS)
def test_four_hosts_read_a_release_once_in_runs_of_rows(family, releases, monkeypatch):
    """What has fewer rows than devices, more than one of them."""
    src, config = releases(family)[0], CONFIGS[family]
    shapes = open_tensors(src).shapes
    sizes = {name: 4 * math.prod(shape) for name, shape in shapes.items()}
    hosts = [reads_of(src, config, monkeypatch, range(first, first + 2)) for first in range(0, 8, 2)]
    num_read = 0
    for name, shape in shapes.items():
        rows = shape[0] if shape else 1
        spans = [host.get(name, []) for host in hosts]
        assert all(len(each) <= 1 for each in spans), "a tensor is read at once"
        if rows % 8 == 0:
            quarter = rows // 4
            assert [each[0] for each in spans] == [(i * quarter, (i + 1) * quarter) for i in range(4)]
        num_read += sum(last - first for each in spans for first, last in each) * (sizes[name] // rows)
    whole = sum(sizes.values())
    print(f"{family}: {num_read:,} of {whole:,} bytes by four hosts ({num_read / whole:.3f})")
    assert whole <= num_read < 1.1 * whole
    # Planted: every host reads all rows.
    monkeypatch.setattr(engine, "rows_over", lambda mesh, shape: (shape, NamedSharding(mesh, PartitionSpec())))
    everything = reads_of(src, config, monkeypatch, range(2))
    assert (
        sum((last - first) * sizes[n] // (shapes[n] or (1,))[0] for n, [(first, last)] in everything.items()) == whole
    )
