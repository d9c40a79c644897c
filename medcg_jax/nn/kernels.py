"""Fused attention kernels, and how they run on a mesh: splash (Pallas, TPU) and cuDNN's flash attention (GPU).

Both take q[B, T, N, H], k and v [B, T, K, H] and segment ids int[B, T] (None: one segment, no padding). On rows of
padding their outputs differ from `plain`'s; nothing uses them.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from medcg_jax.axes import spec
from medcg_jax.nn.context import current_mesh, platform

# Lengths are padded to a multiple of the smallest block; larger blocks are taken where they divide the length.
BLOCKS = (512, 256, 128)
LANES = 128


def sharded(kernel, q, k, v, segment_ids, *, causal: bool) -> jax.Array:
    """`kernel` on each device's own rows and heads of the mesh in context (no mesh: on everything)."""
    kernel = partial(kernel, causal=causal)
    mesh = current_mesh()
    if mesh is None or mesh.size == 1:
        return kernel(q, k, v, segment_ids)
    rows: PartitionSpec = spec("act_batch", "act_len", "act_heads", None)
    specs = (rows, rows, rows, None if segment_ids is None else spec("act_batch", "act_len"))
    return jax.shard_map(kernel, in_specs=specs, out_specs=rows, check_vma=False)(q, k, v, segment_ids)


def splash(q, k, v, segment_ids, *, causal: bool) -> jax.Array:
    """Splash attention; off a TPU it runs interpreted, which is for tests."""
    from jax.experimental.pallas.ops.tpu import splash_attention as sa

    length, num_heads, head_dim = q.shape[1:]
    padded = -(-length // LANES) * LANES
    if padded != length and segment_ids is None:
        segment_ids = jnp.ones(q.shape[:2], jnp.int32)
    scaled = (q * head_dim**-0.5).astype(q.dtype)
    q, k, v = (_pad_to_lanes(x, padded).swapaxes(1, 2) for x in (scaled, k, v))
    mask = sa.CausalMask((padded, padded)) if causal else sa.FullMask((padded, padded))
    run = sa.make_splash_mha_single_device(
        mask=sa.MultiHeadMask([mask] * num_heads), block_sizes=_blocks(padded), interpret=platform() != "tpu"
    )
    if segment_ids is None:
        out = jax.vmap(run)(q, k, v)
    else:
        ids = jnp.pad(segment_ids.astype(jnp.int32), ((0, 0), (0, padded - length)))
        out = jax.vmap(lambda q, k, v, ids: run(q, k, v, segment_ids=sa.SegmentIds(ids, ids)))(q, k, v, ids)
    return out.swapaxes(1, 2)[:, :length, :, :head_dim]


def _pad_to_lanes(x: jax.Array, length: int) -> jax.Array:
    """x[B, T, N, H] with zeros up to `length` and to whole lanes of the head: a zero adds nothing to a product."""
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, -x.shape[3] % LANES)))


def _blocks(length: int):
    from jax.experimental.pallas.ops.tpu import splash_attention as sa

    block = next(size for size in BLOCKS if length % size == 0)
    names = "q kv kv_compute q_dkv kv_dkv kv_dkv_compute q_dq kv_dq".split()
    sizes: Any = {f"block_{name}": block for name in names}
    return sa.BlockSizes(**sizes)


def cudnn(q, k, v, segment_ids, *, causal: bool) -> jax.Array:
    """cuDNN's flash attention; segment ids must be ones and then zeros, and are read as lengths.

    Lengths and not a mask, because cuDNN's mask has no batching rule for vmap (several cells in one program).

    Raises:
      ValueError: q is not bfloat16 or float16.
    """
    if jnp.dtype(q.dtype).itemsize != 2:
        raise ValueError(f"attention='cudnn' takes bfloat16 or float16, not {q.dtype}; expected plain or auto")
    length = q.shape[1]
    lengths = None if segment_ids is None else (segment_ids != 0).sum(axis=-1, dtype=jnp.int32)
    if length % 2 and lengths is not None:
        # The backward pass takes only even lengths; rows without padding come from towers, which are frozen.
        q, k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
    out = jax.nn.dot_product_attention(
        q, k, v, is_causal=causal, query_seq_lengths=lengths, key_value_seq_lengths=lengths, implementation="cudnn"
    )
    return out[:, :length]
