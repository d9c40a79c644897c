"""Models from configuration: created on a mesh, split into what trains, the same numbers on 8 simulated devices."""

import dataclasses

import family_toys
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_toys import compiled
from flax import nnx

from medcg_jax.config import MeshConfig, ModelConfig
from medcg_jax.families import build
from medcg_jax.families.llava.model import llava15_tiny
from medcg_jax.mesh import make_mesh

TINY = llava15_tiny(80, 79, num_vision_heads=2, num_heads=4, num_kv_heads=2, scan_unroll=1)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


@pytest.fixture(scope="module")
def created(mesh):
    return build.create(TINY, mesh, seed=3)


def test_weights_do_not_depend_on_the_mesh_and_do_on_the_seed(created):
    _, params = created
    one = make_mesh(devices=jax.devices()[:1])
    _, alone = build.create(TINY, one, seed=3)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(alone), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    _, other = build.create(TINY, one, seed=4)
    assert float(jnp.abs(other["decoder"]["embed"]["table"] - alone["decoder"]["embed"]["table"]).max()) > 0.01


def batch(rows: int):
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 79, (rows, 26))
    tokens[:, 1:17] = TINY.image_token_id
    segments = (np.arange(26) < rng.integers(20, 27, (rows, 1))).astype(np.int32)
    return {
        "tokens": jnp.asarray(tokens, jnp.int32), "segment_ids": jnp.asarray(segments),
        "pixels": jnp.asarray(rng.integers(0, 256, (rows, 1, 32, 32, 3)), jnp.uint8),
    }  # fmt: skip


def loss(graphdef, trainable, frozen, given):
    model = nnx.merge(graphdef, build.join(trainable, frozen))
    logits = model(given["tokens"], {"pixels": given["pixels"]}, segment_ids=given["segment_ids"])
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), given["tokens"][:, 1:, None], axis=-1)[..., 0]
    return (nll * (given["segment_ids"][:, 1:] != 0)).mean()


def test_eight_devices_compute_what_one_does(created, mesh):
    graphdef, params = created
    run = jax.jit(lambda *args: jax.value_and_grad(loss, argnums=1)(graphdef, *args))
    given = batch(8)
    with jax.set_mesh(mesh):
        parts = build.split_trainable(params, ("vision", "projector", "decoder"))
        value, grads = run(*parts, jax.device_put(given, jax.NamedSharding(mesh, jax.P(("data", "fsdp")))))
    alone = jax.device_put(params, jax.devices()[0])
    expected, expected_grads = run(*build.split_trainable(alone, ("vision", "projector", "decoder")), given)
    assert abs(float(value) - float(expected)) < 1e-5
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        assert np.abs(np.asarray(a) - np.asarray(b)).max() < 1e-5
        assert float(jnp.abs(b).max()) > 0


def test_mapped_over_cells_it_computes_each_cells_numbers(created):
    graphdef, params = created
    params = jax.device_put(params, jax.devices()[0])
    trainable, frozen = build.split_trainable(params, ("projector", "decoder"))
    cells = [jax.tree.map(lambda w, f=f: w * f, trainable) for f in (1.0, 0.7)]
    given = batch(2)
    stacked = jax.tree.map(lambda *w: jnp.stack(w), *cells)
    run = jax.vmap(lambda t: loss(graphdef, t, frozen, given), spmd_axis_name="cell")
    values = jax.jit(run)(stacked)
    one_by_one = jax.jit(lambda t: loss(graphdef, t, frozen, given))
    assert np.abs(np.asarray(values) - [float(one_by_one(cell)) for cell in cells]).max() < 1e-5
    assert abs(float(values[0] - values[1])) > 1e-3


def test_trainable_parts_split_and_join(created):
    _, params = created
    trainable, frozen = build.split_trainable(params, ("projector",))
    assert set(trainable) == {"projector"}
    assert set(frozen) == {"vision", "decoder", "unused"}
    assert jax.tree.structure(build.join(trainable, frozen)) == jax.tree.structure(params)
    for names in (("embedding",), ("projector", "embedding"), ("vision", "embedding", "unused"), ("decoder",)):
        trainable, frozen = build.split_trainable(params, names)
        joined = build.join(trainable, frozen)
        assert jax.tree.structure(joined) == jax.tree.structure(params)
        assert all(a is b for a, b in zip(jax.tree.leaves(joined), jax.tree.leaves(params), strict=True))
        if "embedding" in names:
            assert set(trainable) == {*names} - {"embedding"} | {"decoder"} and list(trainable["decoder"]) == ["embed"]
            assert set(frozen["decoder"]) == set(params["decoder"]) - {"embed"}
    # What is split keeps its parts: the params are as before.
    assert "embed" in params["decoder"]
    for names in ((), ("projector", "head")):
        with pytest.raises(ValueError, match="accepted: one or more of decoder, embedding, projector"):
            build.split_trainable(params, names)


def test_what_the_mesh_cannot_split_is_named(mesh):
    with pytest.raises(ValueError, match=r"down.*kernel.*65 cannot be split over mesh axis tensor of 2"):
        build.shardings(llava15_tiny(80, 79, mlp_dim=65), mesh)
    # A vocabulary's width is split instead, where that divides: NExT-Chat's has 32,005 rows.
    assert build.replicated(llava15_tiny(81, 80), mesh) == []
    table = build.shardings(llava15_tiny(81, 80), mesh)["decoder"]["embed"]["table"]
    assert table.spec == jax.P(None, ("fsdp", "tensor"))
    narrow = llava15_tiny(81, 80, embed_dim=68, num_heads=2, num_kv_heads=2)
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    assert build.replicated(narrow, mesh) == ["decoder.embed.table", "decoder.head.kernel"]


def test_config_by_name_carries_how_it_runs():
    how = dict(compute_dtype="bfloat16", attention="plain", remat="full", scan_unroll=4)
    config = build.architecture(ModelConfig("llava15_13b", **how), image_token_id=5)
    assert {name: getattr(config, name) for name in how} == how
    assert config.text.num_layers == 40
    assert config.image_token_id == 5
    with pytest.raises(ValueError, match="no vocabulary of its own"):
        build.architecture(ModelConfig("llava15_tiny"))
    with pytest.raises(ValueError, match="'llava2'; accepted: llava15_tiny, .*llava15_7b, llava15_13b"):
        build.architecture(ModelConfig("llava2"))


@pytest.mark.parametrize("family", family_toys.TINY)
def test_computes_in_the_dtype_asked_with_float32_weights_and_logits(family):
    config = dataclasses.replace(family_toys.setup(family).model, compute_dtype="bfloat16")
    graphdef, params = build.abstract(config)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    rows, _ = family_toys.training_rows(family).rows(np.arange(2))

    def run(params, rows):
        model = nnx.merge(graphdef, params)
        images = {key: rows[key] for key in model.image_keys}
        cache = model.init_cache(*rows["tokens"].shape)
        hidden, cache = model.hidden(rows["tokens"], images, segment_ids=rows["segment_ids"], cache=cache)
        return hidden, model.logits(hidden), cache["k"]

    hidden, logits, keys = jax.eval_shape(run, params, rows)
    assert (hidden.dtype, logits.dtype, keys.dtype) == (jnp.bfloat16, jnp.float32, jnp.bfloat16)


def test_fewer_key_heads_than_the_tensor_axis_are_replicated_and_named():
    """And a vocabulary that it does not divide is split by its width; the same numbers on one device."""
    config = llava15_tiny(81, 79, num_vision_heads=4, num_kv_heads=2, num_heads=4, scan_unroll=1)
    mesh = make_mesh(MeshConfig(data=2, tensor=4))
    names = build.replicated(config, mesh)
    assert names == ["decoder.blocks.k.kernel", "decoder.blocks.v.kernel"]
    assert build.replicated(config, make_mesh(MeshConfig(data=4, tensor=2))) == []
    places = build.shardings(config, mesh)
    assert places["decoder"]["blocks"]["k"]["kernel"].spec[2] is None
    assert places["decoder"]["blocks"]["q"]["kernel"].spec[2] == "tensor"
    assert places["decoder"]["head"]["kernel"].spec == jax.P(("fsdp", "tensor"), None)
    one = make_mesh(devices=jax.devices()[:1])
    graphdef, alone = build.create(config, one, seed=3)
    tokens = jnp.asarray(np.random.default_rng(0).integers(3, 70, (8, 9)), jnp.int32)
    run = jax.jit(lambda params: nnx.merge(graphdef, params)(tokens))
    split = jax.device_put(alone, places)
    found, expected = (np.asarray(compiled(on, run, params)(params)) for on, params in ((mesh, split), (one, alone)))
    assert np.abs(found - expected).max() < 1e-5
    # Planted: the shards of the head, which lie along the width, one device further.
    kernel = split["decoder"]["head"]["kernel"]
    split["decoder"]["head"]["kernel"] = jax.device_put(np.roll(kernel, 16, axis=0), kernel.sharding)
    assert np.abs(np.asarray(compiled(mesh, run, split)(split)) - expected).max() > 1e-2
