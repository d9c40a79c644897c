"""Qwen2-VL with images of several grids on 8 devices; and shapes that are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from medcg_jax.config import MeshConfig
from medcg_jax.families import build
from medcg_jax.families.qwen2_vl import vit as qwen2_vit
from medcg_jax.families.qwen2_vl.model import Qwen2VL, qwen2_vl_tiny
from medcg_jax.mesh import make_mesh

TINY = qwen2_vl_tiny(80, 79, scan_unroll=1, max_pixels=1536)


def test_eight_devices_compute_what_one_does():
    """Rows with images of different grids over data and fsdp, heads and MLPs over tensor; loss and every gradient."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    graphdef, params = build.create(TINY, mesh, seed=3)
    assert params["vision"]["blocks"]["qkv"]["kernel"].addressable_shards[0].data.shape == (3, 32, 1, 96)
    rng = np.random.default_rng(0)
    rows, grids = 8, np.array([[[8, 8]], [[4, 16]], [[12, 8]], [[0, 0]]] * 2, np.int32)
    tokens = rng.integers(3, 79, (rows, 34))
    for row, count in enumerate(grids.prod(axis=(1, 2)) // 4):
        tokens[row, 2 : 2 + count] = TINY.image_token_id
    given = {
        "tokens": jnp.asarray(tokens, jnp.int32),
        "segment_ids": jnp.asarray((np.arange(34) < rng.integers(28, 35, (rows, 1))).astype(np.int32)),
        "images": {
            "pixels": jnp.asarray(rng.integers(0, 256, (rows, 1, 96, 48)), jnp.uint8), "grids": jnp.asarray(grids)
        },
    }  # fmt: skip

    @jax.jit
    @jax.value_and_grad
    def loss(params, given):
        logits = nnx.merge(graphdef, params)(**given)[:, :-1]
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), given["tokens"][:, 1:, None], axis=-1)[..., 0]
        return (nll * (given["segment_ids"][:, 1:] != 0)).mean()

    with jax.set_mesh(mesh):
        value, grads = loss(params, jax.device_put(given, jax.NamedSharding(mesh, jax.P(("data", "fsdp")))))
    expected, expected_grads = loss(jax.device_put(params, jax.devices()[0]), given)
    assert abs(float(value) - float(expected)) < 1e-5
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        assert np.abs(np.asarray(a) - np.asarray(b)).max() < 1e-5


def test_what_does_not_fit_is_refused():
    shapes = nnx.eval_shape(lambda: Qwen2VL(TINY, rngs=nnx.Rngs(0)))
    tokens, pixels = jnp.zeros((2, 20), jnp.int32), jnp.zeros((2, 1, 16, 48), jnp.uint8)
    for bad in (pixels[:, 0], pixels[..., :47], pixels[:, :, :14]):
        with pytest.raises(ValueError, match=r"expected \[batch, images, patches, 48\], patches a multiple of 4"):
            shapes.encode_images({"pixels": bad, "grids": jnp.zeros((2, 1, 2), jnp.int32)})
    with pytest.raises(ValueError, match=r"grids \(2, 2\) beside pixels"):
        shapes.encode_images({"pixels": pixels, "grids": jnp.zeros((2, 2), jnp.int32)})
    with pytest.raises(ValueError, match=r"positions \(2, 20\) beside tokens \(2, 20\); expected \(2, 20, 3\)"):
        shapes.hidden(tokens, positions=tokens)
    with pytest.raises(ValueError, match=r"mrope_sections=\(2, 3, 4\); expected three of sum head_dim / 2 = 8"):
        qwen2_vl_tiny(20, 19, mrope_sections=(2, 3, 4))
    with pytest.raises(ValueError, match="min_pixels=2000, max_pixels=1024; expected 64 or more, ascending"):
        qwen2_vl_tiny(20, 19, min_pixels=2000)
    with pytest.raises(ValueError, match="vision embed_dim=66"):
        qwen2_vit.Qwen2VitConfig(embed_dim=66, num_heads=3)
