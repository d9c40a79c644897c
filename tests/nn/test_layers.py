"""Layers against torch's, each to 1e-5, and each comparison against a fault it must see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from medcg_jax.axes import spec
from medcg_jax.config import MeshConfig
from medcg_jax.mesh import batch_sharding, make_mesh
from medcg_jax.nn import layers
from medcg_jax.nn.context import constrain
from medcg_jax.nn.layers import Dense, Embedding, LayerNorm, RMSNorm, gelu, param, quick_gelu
from medcg_jax.plan.hlo import bytes_by_kind, collectives

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 5, 12)).astype(np.float32) * 3 + 1


def difference(a, b) -> float:
    return float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max())


def test_dense_is_the_einsum_it_names_with_a_bias_over_the_kernels_outputs():
    dense = Dense("btd,dnh->btnh", (12, 3, 4), ("embed", "heads", "head_dim"), use_bias=True, rngs=nnx.Rngs(0))
    assert dense.bias[...].shape == (3, 4)
    assert dense.bias.get_metadata("axes") == ("heads", "head_dim")
    bias = RNG.standard_normal((3, 4)).astype(np.float32)
    dense.bias[...] = jnp.asarray(bias)
    kernel = np.asarray(dense.kernel[...])
    assert difference(dense(X), (X.reshape(-1, 12) @ kernel.reshape(12, 12)).reshape(2, 5, 3, 4) + bias) < 1e-5
    back = Dense("btnh,nhd->btd", (3, 4, 12), ("heads", "head_dim", "embed"), use_bias=True, rngs=nnx.Rngs(1))
    assert back.bias[...].shape == (12,)
    assert abs(float(jnp.std(back.kernel[...])) - 12**-0.5) < 0.05


def test_a_parameter_needs_a_known_name_for_every_axis():
    zeros = layers.normal(0.0)
    assert param(zeros, (2, 3), ("embed", "mlp"), rngs=nnx.Rngs(0), stack=(4,)).get_metadata("axes") == (
        "layer", "embed", "mlp",
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"\(2, 3\) has 2 axes"):
        param(zeros, (2, 3), ("embed",), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="'fsdp' is unknown"):
        param(zeros, (2, 3), ("embed", "fsdp"), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("eps", [1e-5, pytest.param(1e-2, id="fault: eps")])
def test_layer_norm(eps):
    torch = pytest.importorskip("torch")
    norm = LayerNorm(12, eps=eps, rngs=nnx.Rngs(0))
    scale, bias = RNG.standard_normal((2, 12)).astype(np.float32)
    norm.scale[...], norm.bias[...] = jnp.asarray(scale), jnp.asarray(bias)
    x = X * 0.1
    expected = torch.nn.functional.layer_norm(
        torch.from_numpy(x), (12,), torch.from_numpy(scale), torch.from_numpy(bias), 1e-5
    )
    assert (difference(norm(x), expected) < 1e-5) == (eps == 1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rms_norm_casts_before_the_weight(dtype):
    torch = pytest.importorskip("torch")
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    weight = (1 + RNG.standard_normal(12)).astype(np.float32)
    norm = RMSNorm(12, eps=1e-5, rngs=nnx.Rngs(0))
    norm.scale[...] = jnp.asarray(weight)
    theirs = LlamaRMSNorm(12, eps=1e-5).to(getattr(torch, dtype))
    theirs.weight.data = torch.from_numpy(weight).to(getattr(torch, dtype))
    expected = theirs(torch.from_numpy(X).to(getattr(torch, dtype))).detach().float().numpy()
    x = jnp.asarray(X, dtype)
    assert norm(x).dtype == x.dtype
    assert difference(norm(x), expected) < (1e-5 if dtype == "float32" else 1e-2)
    # Planted: the weight before the cast rounds elsewhere.
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-5)
    wrong = (y * jnp.asarray(weight)).astype(dtype)
    if dtype == "bfloat16":
        assert (np.asarray(norm(x), np.float32) != expected).sum() < (np.asarray(wrong, np.float32) != expected).sum()


@pytest.mark.parametrize("fault", [False, True])
def test_activations(fault):
    torch = pytest.importorskip("torch")
    from transformers.activations import ACT2FN

    quick, exact = (gelu, lambda x: jax.nn.gelu(x, approximate=True)) if fault else (quick_gelu, gelu)
    x = torch.from_numpy(X)
    assert (difference(quick(X), ACT2FN["quick_gelu"](x)) < 1e-5) != fault
    assert (difference(exact(X), ACT2FN["gelu"](x)) < 1e-5) != fault


def test_replicas_exchange_looked_up_parts_and_gather_no_batch():
    """Neither the rows of the whole batch nor their gradients come together on a device, as they do unasked."""
    num, rows, length, width = 8192, 64, 32, 16
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    shapes = jax.ShapeDtypeStruct((num, width), jnp.float32), jax.ShapeDtypeStruct((rows, length), jnp.int32)
    shardings = NamedSharding(mesh, spec("vocab", "embed")), batch_sharding(mesh)
    args = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at) for x, at in zip(shapes, shardings, strict=True)]
    embedding = nnx.eval_shape(lambda: Embedding(num, width, ("vocab", "embed"), rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(embedding)

    def gathered(call) -> int:
        def loss(table, ids):
            layer = nnx.merge(graphdef, jax.tree.map(lambda _: table, state))
            return jnp.square(jnp.sin(constrain(call(layer, ids), "act_batch", "act_len", "act_embed"))).sum()

        with jax.set_mesh(mesh):
            text = jax.jit(jax.grad(loss), out_shardings=shardings[0]).lower(*args).compile().as_text()
        return bytes_by_kind(collectives(text)).get("all-gather", 0)

    whole = 4 * rows * length * width
    assert gathered(lambda layer, ids: layer(ids, jnp.float32)) <= whole / 10
    if tuple(map(int, jax.__version__.split(".")[:2])) < (0, 11):  # later it finds the exchange unasked, on a CPU
        assert gathered(lambda layer, ids: layer.table[...][ids]) >= whole / 2


def test_embedding_looks_rows_up():
    table = Embedding(7, 4, ("vocab", "embed"), rngs=nnx.Rngs(0))
    ids = jnp.array([[3, 0], [6, 3]])
    out = table(ids, jnp.bfloat16)
    assert out.dtype == jnp.bfloat16
    assert difference(table(ids, jnp.float32), np.asarray(table.table[...])[np.asarray(ids)]) == 0
