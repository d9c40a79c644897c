"""A host reads the slices of a release that its devices hold, and gets the numbers that the whole tensors have."""

import functools
import json
import math

import jax
import numpy as np
import pytest
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
def test_a_slice_of_ours_is_that_of_the_whole_and_no_more_is_read(name):
    transform, shape = TRANSFORMS[name]
    ours, num_read = np.arange(math.prod(shape), dtype=np.float32).reshape(shape), 0
    stored = transform.store(ours)
    assert stored.shape == transform.released_shape(shape)

    def read(index):
        nonlocal num_read
        num_read += stored[index].size
        return stored[index]

    np.testing.assert_array_equal(transform.load(read, shape), ours)
    for axis, size in enumerate(shape):
        # Halves, quarters, and what lies across factors.
        for start, stop in ((0, size // 2), (size // 2, size), (size // 4, size // 2), (1, size - 1)):
            index, num_read = (*[slice(None)] * axis, slice(start, stop)), 0
            got = transform.load(read, shape, index)
            np.testing.assert_array_equal(got, ours[index])
            across = name in ("fused", "fused bias", "patches") and size in (6, 12)
            assert num_read == (ours.size if across else got.size) or name == "patches"


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


def bytes_read(src, config, monkeypatch, num_devices: int) -> tuple[int, int, dict[str, int]]:
    """(bytes that a host with the first of eight devices reads, bytes of the slices that they hold, bytes by tensor)."""
    mesh = make_mesh(FSDP)
    abstract, shardings = build.abstract(config)[1], build.shardings(config, mesh)
    family = module_of(config)
    tensors, names = family.open_release(src, json.loads((src / "config.json").read_text()), {})
    count: dict[str, int] = {}
    host = jax.devices()[:num_devices]

    def read(name, index=()):
        value = tensors.read(name, index)
        count[name] = count.get(name, 0) + value.nbytes
        return value

    def slices_of_host(sharding, shape):
        by_device = sharding.addressable_devices_indices_map(shape)
        return {tuple(tables.spans_of(by_device[device], shape)) for device in host}

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_local_slices", slices_of_host)
        # Nothing is put on devices.
        patch.setattr(jax, "make_array_from_callback", lambda *_: 0)
        patch.setattr(engine, "_zeros", lambda *_: 0)
        patch.setattr(engine, "_set_layer", lambda _: lambda *_: 0)
        counted = Tensors(tensors.shapes, read, tensors.dtype, tensors.origin)
        engine.load(family.table(config), abstract, shardings, counted, names, "here")
    leaves = zip(jax.tree.leaves(abstract), jax.tree.leaves(shardings), strict=True)
    slices = [slices_of_host(sharding, leaf.shape) for leaf, sharding in leaves]
    held = sum(4 * math.prod(stop - start for start, stop in spans) for each in slices for spans in each)
    return sum(count.values()), held, count


# What lies in too many pieces, and is read whole.
CUT = {"mllama": {"vision_model.gated_positional_embedding.tile_embedding.weight"}}


@pytest.mark.parametrize("family", CONFIGS)
def test_a_host_with_two_of_eight_devices_reads_a_quarter_and_what_is_replicated(family, releases, monkeypatch):
    src, config = releases(family)[0], CONFIGS[family]
    sizes = {name: 4 * math.prod(shape) for name, shape in open_tensors(src).shapes.items()}
    num_read, held, of_host = bytes_read(src, config, monkeypatch, 2)
    cut = {name for name, count in of_host.items() if name in CUT.get(family, ()) and count == sizes[name]}
    assert cut == CUT.get(family, set())
    # Each other tensor is read in a quarter or, where all devices hold it (norms, biases, gates, positions), whole.
    replicated = sum(size for name, size in sizes.items() if of_host[name] == size and name not in cut)
    assert all(of_host[name] in (size, size / 4) for name, size in sizes.items() if name not in cut)
    whole = sum(sizes.values())
    assert replicated < 0.1 * whole
    assert num_read == held + sum(0.75 * sizes[name] for name in cut)
    assert held == replicated + (whole - replicated) / 4
    print(f"{family}: {num_read:,} of {whole:,} bytes ({num_read / whole:.3f}); replicated {replicated:,}")
    # Planted: tensors that are cut after they are read.
    load = tables.Transform.load
    monkeypatch.setattr(tables.Transform, "load", lambda self, read, shape, index: load(self, read, shape)[index])
    assert bytes_read(src, config, monkeypatch, 2)[0] > 1.5 * num_read
