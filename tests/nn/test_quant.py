"""Matrices in 8 and 4 bits: errors, blocks, the published codebook, qwix's numbers, what a backward pass keeps."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medcg_jax.nn import quant

qwix = pytest.importorskip("qwix")
DTYPES = pytest.mark.parametrize("dtype", quant.QUANTIZED)


def drawn(shape, seed=0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_the_codebook_is_the_published_one():
    """Of arXiv 2305.14314: quantiles of a normal distribution, 7 below zero, 0, and 8 above it."""
    from scipy.stats import norm

    offset = 0.5 * (1 / 32 + 1 / 30)
    above = norm.ppf(np.linspace(1 - offset, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(1 - offset, 0.5, 8)[:-1])
    made = np.sort(np.concatenate([above, below, [0.0]]))
    assert np.abs(made / made.max() - quant.NF4).max() < 2e-6


@DTYPES
@given(st.integers(1, 2), st.lists(st.sampled_from([1, 3, 6, 64, 96, 256]), min_size=2, max_size=3), st.integers(0, 9))
@settings(max_examples=6, deadline=None)
def test_errors_are_those_of_the_codes_and_a_second_time_changes_nothing(dtype, layers, shape, seed):
    w = drawn((layers, *shape), seed) * 10.0 ** (seed - 5)
    q = quant.quantize(w, dtype)
    like = quant.like(w.shape, dtype)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), q) == jax.tree.map(lambda x: (x.shape, x.dtype), like)
    found = quant.dequantize(q, jnp.float32)
    axis, size = quant.blocks_of(tuple(shape))
    assert shape[axis] % size == 0 and size == math.gcd(64, shape[axis])

    def apart(x):
        return np.asarray(x).reshape(*x.shape[: axis + 1], -1, size, *x.shape[axis + 2 :])

    largest = np.abs(apart(w)).max(axis=axis + 2, keepdims=True)
    # Half the widest step of the codes, and what rounding the scale to bfloat16 adds at the ends.
    step = 0.5 / 127 if dtype == "int8" else 0.5 * max(b - a for a, b in zip(quant.NF4[:-1], quant.NF4[1:]))
    assert (np.abs(apart(found) - apart(w)) <= largest * (step + 2**-8)).all()
    again = quant.quantize(found, dtype)
    assert (again.qvalue == q.qvalue).all() and (again.scale == q.scale).all()


@DTYPES
def test_numbers_are_qwix_s(dtype):
    """Its `dequantize`, which looks up one by one, of our arrays; its `quantize` by our blocks."""
    w = drawn((2, 128, 24))
    q = quant.quantize(w, dtype)
    theirs = qwix.dequantize(jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, q))
    assert np.abs(np.asarray(theirs) - np.asarray(quant.dequantize(q, jnp.float32))).max() == 0
    made = qwix.quantize(w, jnp.int8 if dtype == "int8" else dtype, channelwise_axes=(0, 2), tiled_axes={1: 64})
    assert made.scale.shape == q.scale.shape
    # qwix gives the largest number half a step more room in int8, so its codes may be the next ones.
    apart = np.abs(np.asarray(made.qvalue, np.int32) - np.asarray(q.qvalue, np.int32))
    assert apart.max() <= 1 and (apart == 0).mean() > (0.8 if dtype == "int8" else 0.99)


def test_planted_faults_are_seen_against_qwix():
    q = quant.quantize(drawn((2, 128, 24)), "nf4")
    shifted = jax.tree.map(lambda x: x, q).replace(qvalue=(q.qvalue.astype(jnp.int32) ^ 1).astype(jnp.uint4))
    assert np.abs(np.asarray(quant.dequantize(shifted, jnp.float32) - quant.dequantize(q, jnp.float32))).max() > 0.1


@DTYPES
def test_relative_errors_of_normal_weights(dtype):
    """Root mean square over that of the weights: int8 0.6 %, nf4 9.3 %."""
    w = drawn((1, 1024, 256))
    error = jnp.sqrt(jnp.mean((quant.dequantize(quant.quantize(w, dtype), jnp.float32) - w) ** 2))
    expected = {"int8": 0.0060, "nf4": 0.0930}[dtype]
    assert float(error) == pytest.approx(expected, rel=0.03)


@DTYPES
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_a_backward_pass_keeps_no_matrix_in_the_compute_dtype(dtype, remat):
    """Residuals of a scan over layers: activations and what is quantised, whatever else is kept."""
    from medcg_jax.nn.blocks import REMAT_POLICIES

    q = quant.quantize(drawn((3, 256, 256)) / 16, dtype)

    def run(x, q, product):
        def layer(x, q):
            return jnp.tanh(product("bd,de->be", x, q)), None

        layer = layer if remat == "none" else jax.checkpoint(layer, policy=REMAT_POLICIES[remat], prevent_cse=False)
        return jax.lax.scan(layer, x, q)[0].sum()

    def kept(product) -> list[tuple[int, ...]]:
        _, pull = jax.vjp(lambda x: run(x, q, product), drawn((2, 256)))
        arrays = [x for x in jax.tree.leaves(pull) if jnp.issubdtype(x.dtype, jnp.floating)]
        return [x.shape for x in arrays if x.size >= 3 * 256 * 256]

    assert kept(quant.product) == []
    if remat == "none":  # planted: a plain product keeps it
        assert kept(lambda equation, x, q: jnp.einsum(equation, x, quant.dequantize(q, x.dtype))) == [(3, 256, 256)]
    plain = jax.grad(lambda x: run(x, q, lambda e, x, q: jnp.einsum(e, x, quant.dequantize(q, x.dtype))))
    x = drawn((2, 256))
    assert np.abs(np.asarray(jax.grad(lambda x: run(x, q, quant.product))(x) - plain(x))).max() < 1e-6


def test_blocks_lie_along_an_axis_that_a_mesh_can_split():
    assert quant.blocks_of((4096, 32, 128)) == (0, 64)
    assert quant.blocks_of((32, 128, 4096)) == (2, 64)  # 2 blocks a head are no multiple of 4
    assert quant.blocks_of((11008, 4096)) == (0, 64)
    assert quant.blocks_of((3584, 18944)) == (0, 64)
    assert quant.blocks_of((16, 88, 1408)) == (2, 64)
    assert quant.blocks_of((40, 4, 12)) == (0, 8)
    assert quant.scale_shape((32, 4096, 11008)) == (32, 64, 11008)


def test_a_cast_leaves_numbers_of_a_quantised_matrix():
    q = jax.tree.map(lambda x: quant.cast(x, jnp.float32), quant.quantize(drawn((1, 64, 4)), "nf4"))
    assert (q.qvalue.dtype, q.scale.dtype) == (jnp.uint4, jnp.float32)
