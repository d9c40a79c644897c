"""Scaled dot-product attention: one function, three implementations with the same numbers.

`plain` (einsum and softmax) takes every mask: any offset, left padding, packed segments. `splash` (TPU) and `cudnn`
(GPU) live in `medcg_jax.nn.kernels` and run under `shard_map` over the mesh in context.
"""

import jax
import jax.numpy as jnp

from medcg_jax.nn import kernels
from medcg_jax.nn.context import platform

IMPLEMENTATIONS = ("auto", "plain", "splash", "cudnn")
# Finite: a row that attends to nothing (padding) is then a plain mean, and its gradient is not NaN.
MASKED = -1e30
# Causal attention skips keys by blocks of queries: at most so many, each of at least so many queries. Two leave out a
# quarter of all pairs, four three eighths.
CAUSAL_BLOCKS, CAUSAL_BLOCK = 4, 64


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool,
    segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    q_offset: jax.Array | int | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Weighted sums of `v`, float[B, T, N, H] in q's dtype; rows of padding are meaningless.

    q: float[B, T, N, H]. k, v: float[B, S, K, H]; N is a multiple of K, head n reads head n // (N / K).
    causal: query i sees keys 0 .. i + q_offset.
    segment_ids: int[B, T], 0 on padding; a query sees the keys of its own segment. None: all real, one segment.
    kv_segment_ids: int[B, S]; None: `segment_ids`.
    q_offset: index among the keys of the first query, as when decoding into a cache; None: 0, and T == S.
    implementation: "plain", "splash", "cudnn", or "auto": splash on a TPU, cudnn on a GPU in 16 bits, else plain, and
      plain whenever q_offset is given. cudnn reads segment_ids as lengths: they must be ones, then zeros.

    Raises:
      ValueError: an unknown implementation, heads that do not divide, or a case that the kernel does not support.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention={implementation!r}; accepted: {', '.join(IMPLEMENTATIONS)}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are no multiple of {k.shape[2]} key heads")
    without_cache = q_offset is None and kv_segment_ids is None
    if implementation == "auto":
        implementation = _choose(platform(), q.dtype) if without_cache else "plain"
    if implementation == "plain":
        return _plain(q, k, v, causal, segment_ids, kv_segment_ids, q_offset)
    if not without_cache or q.shape[1] != k.shape[1]:
        raise ValueError(f"attention={implementation!r} cannot decode into a cache; expected plain or auto")
    kernel = kernels.splash if implementation == "splash" else kernels.cudnn
    return kernels.sharded(kernel, q, k, v, segment_ids, causal=causal)


def _choose(platform_name: str, dtype) -> str:
    if platform_name == "tpu":
        return "splash"
    # cuDNN's fused attention takes 16-bit numbers only.
    return "cudnn" if platform_name == "gpu" and jnp.dtype(dtype).itemsize == 2 else "plain"


def _plain(q, k, v, causal, segment_ids, kv_segment_ids, q_offset) -> jax.Array:
    offset, length = 0 if q_offset is None else q_offset, q.shape[1]
    allowed = _allowed(length, k.shape[1], causal, segment_ids, kv_segment_ids, offset)
    blocks = min(CAUSAL_BLOCKS, length // CAUSAL_BLOCK)
    if not causal or q_offset is not None or k.shape[1] != length or blocks < 2 or allowed is None:
        return masked_attention(q, k, v, allowed)
    # A block of queries without the keys behind it, which are masked for all of them.
    size, outs = -(-length // blocks), []
    for start in range(0, length, size):
        end = min(start + size, length)
        outs.append(masked_attention(q[:, start:end], k[:, :end], v[:, :end], allowed[:, start:end, :end]))
    return jnp.concatenate(outs, axis=1)


def attention_at(q: jax.Array, k: jax.Array, v: jax.Array, *, at: jax.Array, segment_ids: jax.Array | None):
    """Causal `attention` for a few queries of each row: float[B, L, N, H].

    q: float[B, L, N, H], of the tokens at positions `at` int[B, L]. k, v: float[B, T, K, H]. segment_ids: int[B, T].
    """
    keys = jnp.arange(k.shape[1])
    allowed = keys <= at[..., None]
    if segment_ids is not None:
        query_ids = jnp.take_along_axis(segment_ids, at, axis=1)
        allowed &= (query_ids[..., None] == segment_ids[:, None]) & (segment_ids != 0)[:, None]
    return masked_attention(q, k, v, allowed)


def take_positions(x: jax.Array, at: jax.Array) -> jax.Array:
    """[B, L, ...]: x[B, T, ...] at positions `at` int[B, L] of each row."""
    return jnp.take_along_axis(x, at.reshape(*at.shape, *[1] * (x.ndim - 2)), axis=1)


def masked_attention(q: jax.Array, k: jax.Array, v: jax.Array, allowed: jax.Array | None) -> jax.Array:
    """As `attention`, by einsum and softmax, for any mask: bool[B or 1, T, S] which query sees which key; None: all."""
    num_kv_heads, head_dim = k.shape[2:]
    # Heads before positions: no array of all pairs is then transposed, which on a CPU would take two fifths of the time
    # of forward and backward.
    q = q.reshape(*q.shape[:2], num_kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    scores = jnp.einsum("bkgth,bksh->bkgts", q, k, preferred_element_type=jnp.float32) * head_dim**-0.5
    if allowed is not None:
        scores = jnp.where(allowed[:, None, None], scores, MASKED)
    # Dividing after the product with the values saves passes over all pairs (10 % of a CPU step).
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    out = jnp.einsum("bkgts,bksh->bkgth", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    out = (out / weights.sum(axis=-1, keepdims=True)).astype(v.dtype)
    return out.transpose(0, 3, 1, 2, 4).reshape(out.shape[0], out.shape[3], -1, head_dim)


def _allowed(num_queries, num_keys, causal, segment_ids, kv_segment_ids, q_offset) -> jax.Array | None:
    """bool[B or 1, T, S] which query sees which key; None: all."""
    allowed = None
    if causal:
        queries = jnp.arange(num_queries)[:, None] + q_offset
        allowed = (queries >= jnp.arange(num_keys))[None]
    if segment_ids is not None:
        keys = segment_ids if kv_segment_ids is None else kv_segment_ids
        same = (segment_ids[:, :, None] == keys[:, None, :]) & (keys != 0)[:, None, :]
        allowed = same if allowed is None else allowed & same
    return allowed
