"""Attention: `plain` against a loop over every pair, the kernels against `plain`, alone and on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medcg_jax.config import MeshConfig
from medcg_jax.mesh import make_mesh
from medcg_jax.nn import attention as attention_lib
from medcg_jax.nn import kernels
from medcg_jax.nn.attention import attention

RNG = np.random.default_rng(0)


def random(*shape, dtype=np.float32):
    return jnp.asarray(RNG.standard_normal(shape), dtype)


def by_pairs(q, k, v, causal, segments, kv_segments, offset=0):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(*q.shape[:3]):
        head = n // (q.shape[2] // k.shape[2])
        sees = [
            s for s in range(k.shape[1])
            if (not causal or s <= t + offset) and segments[b, t] == kv_segments[b, s] and kv_segments[b, s]
        ]  # fmt: skip
        if sees:
            score = np.array([q[b, t, n] @ k[b, s, head] for s in sees]) * q.shape[3] ** -0.5
            weight = np.exp(score - score.max())
            out[b, t, n] = (weight / weight.sum()) @ v[b, sees, head]
    return out


LEFT_RIGHT_PACKED = jnp.array([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 2, 2, 2, 0]])


@pytest.mark.parametrize("fault", ["", "no causal", "heads tiled", "padding seen"])
def test_plain_is_the_sum_over_allowed_pairs(fault):
    q, k, v = random(3, 7, 6, 4), random(3, 7, 2, 4), random(3, 7, 2, 4)
    expected = by_pairs(q, k, v, True, LEFT_RIGHT_PACKED, LEFT_RIGHT_PACKED)
    segments = jnp.ones_like(LEFT_RIGHT_PACKED) if fault == "padding seen" else LEFT_RIGHT_PACKED
    if fault == "heads tiled":
        k, v = jnp.tile(k, (1, 1, 3, 1)), jnp.tile(v, (1, 1, 3, 1))
    out = attention(q, k, v, causal=fault != "no causal", segment_ids=segments, implementation="plain")
    real = np.asarray(LEFT_RIGHT_PACKED) != 0
    assert (np.abs(np.asarray(out) - expected)[real].max() < 1e-4) == (not fault)
    assert np.isfinite(np.asarray(out)).all()


def test_queries_at_an_offset_see_the_cache_before_them():
    q, k, v = random(2, 2, 4, 4), random(2, 8, 4, 4), random(2, 8, 4, 4)
    segments, keys = jnp.ones((2, 2), jnp.int32), jnp.array([[1, 1, 0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 0, 0]])
    args = dict(causal=True, segment_ids=segments, kv_segment_ids=keys)
    expected = by_pairs(q, k, v, True, segments, keys, offset=4)
    assert np.abs(attention(q, k, v, q_offset=4, **args) - expected).max() < 1e-4
    assert np.abs(attention(q, k, v, q_offset=3, **args) - expected).max() > 1e-2


@pytest.mark.parametrize("causal", [True, False])
def test_splash_is_plain_forward_and_backward(causal):
    """130 tokens are padded to two blocks, heads of 16 to whole lanes; three query heads share a key head."""
    q, k, v = random(2, 130, 3, 16), random(2, 130, 1, 16), random(2, 130, 1, 16)
    segments = jnp.asarray(np.stack([np.arange(130) < 101, 1 + (np.arange(130) > 40)]), jnp.int32)
    weight = random(2, 130, 3, 16) * (segments != 0)[..., None, None]

    def run(implementation, segments):
        def total(q, k, v):
            out = attention(q, k, v, causal=causal, segment_ids=segments, implementation=implementation)
            return (out * weight).sum(), out

        (_, out), grads = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)
        return [out * (segments != 0)[..., None, None], *grads]

    for ours, plain in zip(run("splash", segments), run("plain", segments), strict=True):
        assert np.abs(np.asarray(ours - plain)).max() < 1e-4
    other = run("plain", jnp.ones_like(segments))
    assert np.abs(np.asarray(run("splash", segments)[1] - other[1])).max() > 1e-2


def test_splash_runs_on_every_devices_own_rows_and_heads():
    q, k, v = random(4, 128, 4, 8), random(4, 128, 2, 8), random(4, 128, 2, 8)
    segments = jnp.asarray(np.arange(128)[None] < np.array([[128], [90], [128], [7]]), jnp.int32)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    run = jax.jit(lambda *args: attention(*args, causal=True, segment_ids=segments, implementation="splash"))
    with jax.set_mesh(mesh):
        lowered = run.lower(q, k, v)
        out = lowered.compile()(q, k, v)
    assert "all-gather" not in lowered.as_text()
    assert tuple(out.sharding.spec)[:3] == (("data", "fsdp"), None, "tensor")
    plain = attention(q, k, v, causal=True, segment_ids=segments, implementation="plain")
    real = np.asarray(segments) != 0
    assert np.abs(np.asarray(out) - np.asarray(plain))[real].max() < 1e-4


def test_splash_lowers_for_a_tpu(monkeypatch):
    monkeypatch.setattr(kernels, "platform", lambda: "tpu")
    q, segments = random(2, 200, 2, 64, dtype=jnp.bfloat16), jnp.ones((2, 200), jnp.int32)

    def total(q):
        return kernels.splash(q, q, q, segments, causal=True).astype(jnp.float32).sum()

    text = jax.jit(jax.grad(total)).trace(q).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") >= 3


@pytest.mark.parametrize(("cells", "length"), [(0, 64), (2, 64), (0, 63), (2, 63)])
def test_cudnn_lowers_for_a_gpu_also_over_cells(cells, length, monkeypatch):
    # JAX looks for the library and at the card before it lowers; neither is here, and lowering needs neither.
    from jax._src.cudnn import fused_attention_stablehlo as fused

    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused, "check_compute_capability", lambda *_: True)
    monkeypatch.setattr(fused, "is_cuda_compute_capability_equal", lambda *_: False)
    shape = (2, length, 4, 64)
    q, lengths = random(*shape, dtype=jnp.bfloat16), jnp.ones(shape[:2], jnp.int32)

    def total(q, lengths):
        out = attention(q, q, q, causal=True, segment_ids=lengths, implementation="cudnn")
        return (out * q).astype(jnp.float32).sum()

    grad = jax.grad(total)
    if cells:
        # As in training, rows and what flows back differ from cell to cell: jax's rule takes nothing that all share.
        grad, (q, lengths) = jax.vmap(grad, spmd_axis_name="cell"), (jnp.stack([x] * cells) for x in (q, lengths))
    text = jax.jit(grad).trace(q, lengths).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmaxBackward" in text


def test_auto_takes_the_platforms_kernel(monkeypatch):
    choose = attention_lib._choose
    assert choose("cpu", jnp.bfloat16) == "plain"
    assert choose("tpu", jnp.float32) == choose("tpu", jnp.bfloat16) == "splash"
    assert choose("gpu", jnp.bfloat16) == "cudnn"
    assert choose("gpu", jnp.float32) == "plain"
    called = []
    monkeypatch.setattr(attention_lib, "platform", lambda: "tpu")
    monkeypatch.setattr(kernels, "splash", lambda q, *rest, causal: called.append(causal) or q)
    x = random(1, 4, 2, 8)
    attention(x, x, x, causal=True)
    attention(x, x, x, causal=True, q_offset=0, kv_segment_ids=jnp.ones((1, 4)), segment_ids=jnp.ones((1, 4)))
    assert called == [True]


def test_what_cannot_be_done_is_said():
    x = random(1, 4, 3, 8)
    with pytest.raises(ValueError, match="attention='flash'; accepted: auto, plain, splash, cudnn"):
        attention(x, x, x, causal=True, implementation="flash")
    with pytest.raises(ValueError, match="3 query heads are no multiple of 2"):
        attention(x, x[:, :, :2], x[:, :, :2], causal=True)
    with pytest.raises(ValueError, match="bfloat16 or float16, not float32"):
        attention(x, x, x, causal=True, implementation="cudnn")
    with pytest.raises(ValueError, match="cannot decode into a cache"):
        attention(x[:, :1], x, x, causal=True, q_offset=3, implementation="splash")


@pytest.mark.parametrize("length", [127, 128, 190, 300])
def test_causal_queries_in_blocks_see_what_they_saw(length, monkeypatch):
    """Values and gradients, with padding at either side; 127 queries are one block, 128 two, 300 four."""
    q, k, v, g = random(2, length, 4, 4), random(2, length, 2, 4), random(2, length, 2, 4), random(2, length, 4, 4)
    segments = jnp.ones((2, length), jnp.int32).at[0, -9:].set(0).at[1, :70].set(0)
    g = jnp.where((segments != 0)[..., None, None], g, 0)

    def run(q, k, v):
        out = attention(q, k, v, causal=True, segment_ids=segments, implementation="plain")
        return (out * g).sum(), out

    def results():
        grads, out = jax.grad(run, (0, 1, 2), has_aux=True)(q, k, v)
        return [np.asarray(x) for x in (*grads, jnp.where((segments != 0)[..., None, None], out, 0))]

    calls, real = [], attention_lib.masked_attention
    with monkeypatch.context() as patch:
        patch.setattr(attention_lib, "masked_attention", lambda *a: calls.append(a[0].shape[1]) or real(*a))
        found = results()
    assert len(calls) == {127: 1, 128: 2, 190: 2, 300: 4}[length] and sum(calls) == length
    monkeypatch.setattr(attention_lib, "CAUSAL_BLOCKS", 1)
    for ours, whole in zip(found, results(), strict=True):
        np.testing.assert_allclose(ours, whole, atol=2e-5)
