"""The Llama decoder (Vicuna, Qwen2): embedding, blocks with grouped-query attention, final norm, head, KV cache.

Source: huggingface/transformers:models/llama/modeling_llama.py at 5.23.0.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from medcg_jax.nn.attention import take_positions
from medcg_jax.nn.blocks import DecoderBlock, layers_at_once, run_stack
from medcg_jax.nn.context import constrain
from medcg_jax.nn.layers import Dense, Embedding, RMSNorm
from medcg_jax.nn.rope import Angles, Llama3Scaling, count_positions, counted_angles, rope_angles


@dataclass(frozen=True)
class DecoderConfig:
    """The defaults are Vicuna-7B v1.5."""

    vocab_size: int = 32000
    num_layers: int = 32
    embed_dim: int = 4096
    num_heads: int = 32
    num_kv_heads: int = 32
    head_dim: int = 128
    mlp_dim: int = 11008
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    # Positions the released model was trained on; nothing is allocated by it.
    max_positions: int = 4096
    # Biases only on q, k and v (Qwen2).
    qkv_bias: bool = False
    # The embedding is the head too.
    tie_head: bool = False
    rope_scaling: Llama3Scaling | None = None
    # Biases behind attention, and in the MLP.
    out_bias: bool = False
    mlp_bias: bool = False
    # Of the MLP's gate; a name in `nn.layers.ACTIVATIONS`.
    activation: str = "silu"

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is no multiple of num_kv_heads={self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary positions turn pairs")


class Decoder(nnx.Module):
    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, param_dtype=jnp.float32, unroll: int, remat: str):
        init = dict(rngs=rngs, param_dtype=param_dtype)
        self.config, self.unroll, self.remat = config, unroll, remat
        width = config.embed_dim
        self.embed = Embedding(config.vocab_size, width, ("vocab", "embed"), **init)
        self.blocks = DecoderBlock(
            width, config.num_heads, config.num_kv_heads, config.head_dim, config.mlp_dim,
            eps=config.norm_eps, qkv_bias=config.qkv_bias, out_bias=config.out_bias, mlp_bias=config.mlp_bias,
            activation=config.activation, stack=(config.num_layers,), **init,
        )  # fmt: skip
        self.norm = RMSNorm(width, eps=config.norm_eps, **init)
        head = None if config.tie_head else ((width, config.vocab_size), ("embed", "vocab"))
        self.head = None if head is None else Dense("...d,dv->...v", *head, use_bias=False, **init)

    def __call__(
        self, x, *, segment_ids=None, positions=None, angles: Angles | None = None, cache=None, lora=None,
        at=None, attention: str = "auto",
    ):  # fmt: skip
        """(hidden float[B, T, D] after the final norm, the cache with these tokens in it or None).

        x: float[B, T, D] embedded tokens.
        at: int[B, L]; hidden comes back as [B, L, D], at these positions; None: at all. The last layer computes no
          others, if layers are unrolled and there is no cache.
        segment_ids: int[B, T], 0 on padding; None: all real.
        positions: int[B, T]; None: counted over the real tokens of each segment (and of the cache).
        angles: rotary angles in place of those of `positions`.
        lora: as in `DecoderBlock`, with a leading layer axis on its parameters.
        cache: from `init_cache` or an earlier call, with room for T more tokens.
        """
        if segment_ids is None and (cache is not None or (positions is None and angles is None)):
            segment_ids = jnp.ones(x.shape[:2], jnp.int32)
        rope = self.config.head_dim, self.config.rope_theta, self.config.rope_scaling
        if angles is None and positions is None:
            positions, most = count_positions(segment_ids), x.shape[1]
            if cache is not None:
                positions += (cache["segment_ids"] != 0).sum(axis=-1, keepdims=True)
                most = cache["segment_ids"].shape[1]
            angles = counted_angles(positions, most, *rope)
        elif angles is None:
            angles = rope_angles(positions, *rope)
        x = constrain(x, "act_batch", "act_len", "act_embed")
        lora_graph: Any = None
        lora_layers = keys_values = None
        if lora is not None:
            lora_graph, lora_layers = nnx.split(lora)
        if cache is not None:
            ids = jax.lax.dynamic_update_slice(cache["segment_ids"], segment_ids.astype(jnp.int32), (0, cache["index"]))
            shared, keys_values = {"segment_ids": ids, "index": cache["index"]}, (cache["k"], cache["v"])

        def body(block, x, per_layer, at=None):
            keys_values, adapter = per_layer
            slots = None if cache is None else {"k": keys_values[0], "v": keys_values[1], **shared}
            adapter = None if lora is None else nnx.merge(lora_graph, adapter)
            options = dict(angles=angles, segment_ids=segment_ids, lora=adapter, at=at, implementation=attention)
            x, keys_values = block(x, cache=slots, **options)
            return x, None if cache is None else keys_values

        num_tokens = x.shape[1]
        unrolled = layers_at_once(self.config.num_layers, self.unroll) == self.config.num_layers
        last = partial(body, at=at) if at is not None and cache is None and unrolled else None
        x, keys_values = run_stack(
            self.blocks, body, x, (keys_values, lora_layers), unroll=self.unroll, remat=self.remat, last=last
        )
        if at is not None and last is None:
            x = take_positions(x, at)
        if cache is not None:
            cache = {"k": keys_values[0], "v": keys_values[1], "segment_ids": ids, "index": cache["index"] + num_tokens}
        return self.norm(x), cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32[..., V] for hidden[..., D]."""
        kernel = self.embed.table[...].T if self.head is None else self.head.kernel[...]
        return jnp.einsum("...d,dv->...v", hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)


def init_cache(config: DecoderConfig, batch: int, length: int, dtype) -> dict[str, Any]:
    """An empty cache with `length` slots a row: k, v [layers, B, length, K, H], segment_ids, index of the next slot."""
    shape = (config.num_layers, batch, length, config.num_kv_heads, config.head_dim)
    return {
        "k": jnp.zeros(shape, dtype),
        "v": jnp.zeros(shape, dtype),
        "segment_ids": jnp.zeros((batch, length), jnp.int32),
        # Not an array, so that tracing knows that the cache is empty (`nn.blocks.is_empty`).
        "index": 0,
    }
