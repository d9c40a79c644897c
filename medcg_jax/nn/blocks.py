"""Transformer blocks (CLIP's and Llama's), and the one loop that runs a stack of them.

A stack is one block whose parameters have a leading `layer` axis; `run_stack` scans over it.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from medcg_jax.nn.attention import attention, attention_at, take_positions
from medcg_jax.nn.context import constrain, platform
from medcg_jax.nn.layers import ACTIVATIONS, PRODUCT, Dense, LayerNorm, RMSNorm, Stack, quick_gelu
from medcg_jax.nn.lora import adapted
from medcg_jax.nn.quant import cast
from medcg_jax.nn.rope import Angles, rotate

# Layers that a CPU compiles at once within seconds.
MOST_UNROLLED = 12
# Name in the config -> policy of `jax.checkpoint` ("none": no checkpoint at all).
REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
}


class ClipBlock(nnx.Module):
    """Pre-norm encoder block of CLIP: biases everywhere, every token sees every token."""

    def __init__(
        self, embed_dim: int, num_heads: int, mlp_dim: int, *, eps: float, activation: str = "quick_gelu", rngs,
        param_dtype, stack: Stack = (),
    ):  # fmt: skip
        self.activation = activation
        init = dict(use_bias=True, rngs=rngs, param_dtype=param_dtype, stack=stack)
        heads = (embed_dim, num_heads, embed_dim // num_heads), ("vision_embed", "vision_heads", "head_dim")
        self.norm1 = LayerNorm(embed_dim, eps=eps, rngs=rngs, param_dtype=param_dtype, stack=stack)
        self.q = Dense("btd,dnh->btnh", *heads, **init)
        self.k = Dense("btd,dnh->btnh", *heads, **init)
        self.v = Dense("btd,dnh->btnh", *heads, **init)
        self.out = Dense("btnh,nhd->btd", heads[0][1:] + heads[0][:1], heads[1][1:] + heads[1][:1], **init)
        self.norm2 = LayerNorm(embed_dim, eps=eps, rngs=rngs, param_dtype=param_dtype, stack=stack)
        self.up = Dense("btd,df->btf", (embed_dim, mlp_dim), ("vision_embed", "vision_mlp"), **init)
        self.down = Dense("btf,fd->btd", (mlp_dim, embed_dim), ("vision_mlp", "vision_embed"), **init)

    def __call__(self, x: jax.Array, *, implementation: str) -> jax.Array:
        y = self.norm1(x)
        q, k, v = (constrain(f(y), "act_batch", "act_len", "act_heads", None) for f in (self.q, self.k, self.v))
        x = x + self.out(attention(q, k, v, causal=False, implementation=implementation))
        act = quick_gelu if self.activation == "quick_gelu" else ACTIVATIONS[self.activation]
        hidden = constrain(act(self.up(self.norm2(x))), "act_batch", "act_len", "act_mlp")
        return constrain(x + self.down(hidden), "act_batch", "act_len", "act_embed")


class DecoderBlock(nnx.Module):
    """Llama's block: RMS norms, grouped-query attention with rotary positions, a gated MLP.

    qkv_bias, out_bias, mlp_bias: whether there are biases on queries, keys and values, behind attention, in the MLP.
    """

    def __init__(
        self, embed_dim, num_heads, num_kv_heads, head_dim, mlp_dim, *, eps: float, qkv_bias: bool = False,
        out_bias: bool = False, mlp_bias: bool = False, activation: str = "silu", rngs, param_dtype, stack: Stack = (),
    ):  # fmt: skip
        init = dict(rngs=rngs, param_dtype=param_dtype, stack=stack)
        biased, mlp = dict(use_bias=qkv_bias, **init), dict(use_bias=mlp_bias, **init)
        self.activation = activation
        kv_heads = (embed_dim, num_kv_heads, head_dim), ("embed", "kv_heads", "head_dim")
        self.norm1 = RMSNorm(embed_dim, eps=eps, rngs=rngs, param_dtype=param_dtype, stack=stack)
        self.q = Dense("btd,dnh->btnh", (embed_dim, num_heads, head_dim), ("embed", "heads", "head_dim"), **biased)
        self.k = Dense("btd,dkh->btkh", *kv_heads, **biased)
        self.v = Dense("btd,dkh->btkh", *kv_heads, **biased)
        self.out = Dense("btnh,nhd->btd", (num_heads, head_dim, embed_dim), ("heads", "head_dim", "embed"),
                         use_bias=out_bias, **init)  # fmt: skip
        self.norm2 = RMSNorm(embed_dim, eps=eps, rngs=rngs, param_dtype=param_dtype, stack=stack)
        self.gate = Dense("btd,df->btf", (embed_dim, mlp_dim), ("embed", "mlp"), **mlp)
        self.up = Dense("btd,df->btf", (embed_dim, mlp_dim), ("embed", "mlp"), **mlp)
        self.down = Dense("btf,fd->btd", (mlp_dim, embed_dim), ("mlp", "embed"), **mlp)

    def __call__(self, x, *, angles: Angles, segment_ids, cache=None, lora=None, at=None, implementation: str):
        """(x after the block, the layer's keys and values in the cache).

        at: int[B, L]: only these positions are computed, and x comes back as [B, L, D]. None: all positions.
        lora: `Adapters` of one layer, which are added to the products, or None.
        cache: None, or a dict of one layer's `k`, `v` [B, S, K, H], the `segment_ids` int[B, S] of all its slots
          (those of x included) and `index`, the slot of x's first token.
        """
        run = partial(adapted, self, lora)
        y = self.norm1(x)
        k, v = run("k", y), run("v", y)
        q = run("q", y if at is None else take_positions(y, at))
        q, k, v = (constrain(z, "act_batch", "act_len", "act_heads", None) for z in (q, k, v))
        k = rotate(k, angles)
        if at is not None:
            x, angles = take_positions(x, at), (take_positions(angles[0], at), take_positions(angles[1], at))
        q = rotate(q, angles)
        if at is not None:
            y = attention_at(q, k, v, at=at, segment_ids=segment_ids)
        elif cache is None or is_empty(cache):
            y = attention(q, k, v, causal=True, segment_ids=segment_ids, implementation=implementation)
        if cache is not None:
            start = (0, cache["index"], 0, 0)
            k = jax.lax.dynamic_update_slice(cache["k"], k.astype(cache["k"].dtype), start)
            v = jax.lax.dynamic_update_slice(cache["v"], v.astype(cache["v"].dtype), start)
            if not is_empty(cache):
                y = attention(
                    q, k.astype(q.dtype), v.astype(q.dtype), causal=True, segment_ids=segment_ids,
                    kv_segment_ids=cache["segment_ids"], q_offset=cache["index"], implementation="plain",
                )  # fmt: skip
        x = x + run("out", y)
        y = self.norm2(x)
        hidden = ACTIVATIONS[self.activation](run("gate", y)) * run("up", y)
        hidden = constrain(hidden, "act_batch", "act_len", "act_mlp")
        return constrain(x + run("down", hidden), "act_batch", "act_len", "act_embed"), (k, v)


def is_empty(cache: dict) -> bool:
    """Whether the cache is known to be empty while tracing, so that fused attention can be used.

    A cache that is an argument of the traced program is never known to be empty.
    """
    return isinstance(cache["index"], int) and cache["index"] == 0


def run_stack(blocks: nnx.Module, body, x: jax.Array, per_layer=None, *, unroll: int, remat: str, last=None):
    """(x after all layers of `blocks`, the stacked outputs of `body`), by one `lax.scan`.

    body(block, x, slice of per_layer) -> (x, out): one layer; `block` has no layer axis.
    unroll: layers per iteration, see `layers_at_once`.
    remat: a name in `REMAT_POLICIES`: what the backward pass keeps of a layer.
    last: replaces `body` for the last layer, whose `out` is dropped. For unrolled stacks only: a rolled one would copy
      the weights and gradients of the other layers.

    Raises:
      ValueError: an unknown remat name.
    """
    if remat not in REMAT_POLICIES:
        raise ValueError(f"remat={remat!r}; accepted: {', '.join(REMAT_POLICIES)}")
    graphdef, params = nnx.split(blocks)
    # Cast before the scan: a sharded weight then travels in the compute dtype.
    params = jax.tree.map(partial(cast, dtype=x.dtype), params)
    num_layers = jax.tree.leaves(params)[0].shape[0]

    def layer_of(body):
        def layer(x, scanned):
            layer_params, layer_input = scanned
            return body(nnx.merge(graphdef, layer_params), x, layer_input)

        return layer if remat == "none" else jax.checkpoint(layer, policy=REMAT_POLICIES[remat], prevent_cse=False)

    scanned = params, per_layer
    if last is None:
        return jax.lax.scan(layer_of(body), x, scanned, unroll=layers_at_once(num_layers, unroll))
    leaves, treedef = jax.tree.flatten(scanned)
    first, final = (jax.tree.unflatten(treedef, part) for part in zip(*map(split_last, leaves), strict=True))
    x, out = jax.lax.scan(layer_of(body), x, first, unroll=max(num_layers - 1, 1))
    return layer_of(last)(x, final)[0], out


def split_last(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(w[:-1], w[-1]), with a gradient that is written once: JAX's is a sum of two padded arrays."""
    return _split_last(w) if jnp.issubdtype(w.dtype, jnp.floating) else (w[:-1], w[-1])


@jax.custom_vjp
def _split_last(w):
    return w[:-1], w[-1]


_split_last.defvjp(
    lambda w: (_split_last(w), None), lambda _, grads: (jnp.concatenate([grads[0], grads[1][None]]),)
)  # fmt: skip


def layers_at_once(num_layers: int, unroll: int) -> int:
    """Layers in one iteration of a scan over a stack. unroll: `ModelConfig.scan_unroll`; 0: all of a short stack on a CPU,
    else 1: thirty layers at once take minutes to compile."""
    is_quick = platform() == "cpu" and num_layers <= MOST_UNROLLED
    return min(unroll or (num_layers if is_quick else 1), num_layers)
