"""Llama-3.2-Vision with images of several grids of tiles on 8 simulated devices: the same numbers as on one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from medcg_jax.config import MeshConfig
from medcg_jax.families import build
from medcg_jax.families.mllama.model import Mllama, llama32_vision_tiny
from medcg_jax.mesh import make_mesh

CONFIG = llama32_vision_tiny(80, 79, num_vision_heads=4, scan_unroll=1)
MESHES = {
    "all axes": MeshConfig(data=2, fsdp=2, tensor=2),
    # Two key heads over four devices.
    "fewer key heads than devices": MeshConfig(data=1, fsdp=2, tensor=4),
}


@pytest.fixture(scope="module")
def variables():
    """(graphdef, the params on one device)."""
    return build.create(CONFIG, make_mesh(devices=jax.devices()[:1]), seed=3)


def batch(rows: int) -> dict:
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 79, (rows, 14))
    tokens[:, 2] = CONFIG.image_token_id
    tiles = np.array([1, 2, 4, 3, 2, 1, 4, 0])[:rows, None]
    tokens[tiles[:, 0] == 0, 2] = 5
    images = {
        "pixels": rng.integers(0, 256, (rows, 1, 4, 32, 32, 3)).astype(np.uint8), "num_tiles": tiles.astype(np.int32),
        "aspect_ratio_ids": np.array([0, 1, 2, 3, 4], np.int32)[tiles],
    }  # fmt: skip
    segments = np.arange(14) < rng.integers(9, 15, (rows, 1))
    return {"tokens": tokens.astype(np.int32), "segment_ids": segments.astype(np.int32), "images": images}


def loss(params, graphdef, given):
    logits = nnx.merge(graphdef, params)(**given)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), given["tokens"][:, 1:, None], axis=-1)[..., 0]
    return (nll * (given["segment_ids"][:, 1:] != 0)).mean()


@pytest.fixture(scope="module")
def alone(variables):
    graphdef, params = variables
    return jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, graphdef, batch(8))


def on(mesh, variables) -> tuple:
    """The params and the batch laid out over `mesh`."""
    params = jax.device_put(variables[1], build.shardings(CONFIG, mesh))
    return params, jax.device_put(batch(8), jax.NamedSharding(mesh, jax.P(("data", "fsdp"))))


def test_eight_devices_compute_what_one_does(variables, alone):
    mesh = make_mesh(MESHES["all axes"])
    params, given = on(mesh, variables)
    with jax.set_mesh(mesh):
        value, grads = jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, variables[0], given)
    assert abs(float(value) - float(alone[0])) < 1e-5
    for found, expected in zip(jax.tree.leaves(grads), jax.tree.leaves(alone[1]), strict=True):
        assert np.abs(np.asarray(found) - np.asarray(expected)).max() < 1e-5
        assert float(jnp.abs(expected).max()) > 0


def test_fewer_key_heads_than_devices_are_replicated(variables, alone):
    mesh = make_mesh(MESHES["fewer key heads than devices"])
    params, given = on(mesh, variables)
    with jax.set_mesh(mesh):
        value = jax.jit(loss, static_argnums=1)(params, variables[0], given)
    assert abs(float(value) - float(alone[0])) < 1e-5


def test_computes_in_the_dtype_asked_with_float32_weights_and_logits():
    model = nnx.eval_shape(lambda: Mllama(dataclasses.replace(CONFIG, compute_dtype="bfloat16"), rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("float32")}

    def run(state, given):
        model = nnx.merge(graphdef, state)
        hidden, cache = model.hidden(**given, cache=model.init_cache(2, 20))
        return hidden, model.logits(hidden), cache["cross_k"]

    hidden, logits, keys = jax.eval_shape(run, state, batch(2))
    assert (hidden.dtype, logits.dtype, keys.dtype) == (jnp.bfloat16, jnp.float32, jnp.bfloat16)


def test_what_is_run_again_in_the_backward_pass_changes_nothing(variables, alone):
    config = dataclasses.replace(CONFIG, remat="full")
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: Mllama(config, rngs=nnx.Rngs(0))))
    value, grads = jax.jit(jax.value_and_grad(loss), static_argnums=1)(variables[1], graphdef, batch(8))
    assert abs(float(value) - float(alone[0])) < 1e-5
    for found, expected in zip(jax.tree.leaves(grads), jax.tree.leaves(alone[1]), strict=True):
        assert np.abs(np.asarray(found) - np.asarray(expected)).max() < 1e-5
