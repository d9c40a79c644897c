"""Llama-3.2-Vision's decoder: Llama's blocks, and among them gated cross-attention to the tokens of the images.

In every release the layers form equal groups with one cross-attention layer each, and one `lax.scan` runs over the
groups. Otherwise the layers run one by one.
Source: huggingface/transformers:models/mllama/modeling_mllama.py and processing_mllama.py at 5.23.0;
meta-llama/llama-models:llama3/multimodal/model.py at a9c89c4.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from medcg_jax.families.mllama.vit import gate, gated
from medcg_jax.nn.attention import masked_attention, take_positions
from medcg_jax.nn.blocks import REMAT_POLICIES, DecoderBlock, layers_at_once, run_stack
from medcg_jax.nn.context import constrain
from medcg_jax.nn.layers import ACTIVATIONS, Dense, Embedding, RMSNorm, Stack
from medcg_jax.nn.lora import Adapters, LoraConfig, adapted
from medcg_jax.nn.quant import cast
from medcg_jax.nn.rope import Llama3Scaling

# Rows of the embedding beyond the vocabulary, the image token's first. The head does not have them.
EXTRA_ROWS = 8


@dataclass(frozen=True)
class MllamaTextConfig:
    """The defaults are Llama-3.2-11B-Vision's."""

    vocab_size: int = 128256
    # Cross-attention layers included.
    num_layers: int = 40
    cross_layers: tuple[int, ...] = (3, 8, 13, 18, 23, 28, 33, 38)
    embed_dim: int = 4096
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    mlp_dim: int = 14336
    rope_theta: float = 500000.0
    rope_scaling: Llama3Scaling | None = Llama3Scaling()
    norm_eps: float = 1e-5
    # Positions the released model was trained on; nothing is allocated by it.
    max_positions: int = 131072
    # Of the MLP's gate; a name in `nn.layers.ACTIVATIONS`.
    activation: str = "silu"

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is no multiple of num_kv_heads={self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary positions turn pairs")
        inner = self.cross_layers
        if not inner or list(inner) != sorted(set(inner)) or not set(inner) < set(range(self.num_layers)):
            raise ValueError(
                f"cross_layers={inner} of num_layers={self.num_layers}; expected rising layers from 0, not none or all"
            )

    @property
    def group_size(self) -> int:
        """Layers in a group, its one cross-attention layer included; 0: the groups are not equal."""
        size, remainder = divmod(self.num_layers, len(self.cross_layers))
        equal = not remainder and self.cross_layers == tuple(range(self.cross_layers[0], self.num_layers, size))
        return size if equal and size > 1 else 0

    @property
    def self_layers(self) -> tuple[int, ...]:
        return tuple(i for i in range(self.num_layers) if i not in self.cross_layers)


class CrossBlock(nnx.Module):
    """Cross-attention of text to tiles: no positions, RMS norms on query and key heads, tanh gates on both branches."""

    def __init__(self, config: MllamaTextConfig, *, rngs, param_dtype, stack: Stack = ()):
        self.activation = config.activation
        width, head_dim, mlp_dim = config.embed_dim, config.head_dim, config.mlp_dim
        heads, kv_heads = config.num_heads, config.num_kv_heads
        init = dict(rngs=rngs, param_dtype=param_dtype, stack=stack)
        plain, eps = dict(use_bias=False, **init), dict(eps=config.norm_eps, **init)
        self.norm1 = RMSNorm(width, **eps)
        self.q = Dense("btd,dnh->btnh", (width, heads, head_dim), ("embed", "heads", "head_dim"), **plain)
        self.k = Dense("bmd,dkh->bmkh", (width, kv_heads, head_dim), ("embed", "kv_heads", "head_dim"), **plain)
        self.v = Dense("bmd,dkh->bmkh", (width, kv_heads, head_dim), ("embed", "kv_heads", "head_dim"), **plain)
        self.q_norm, self.k_norm = RMSNorm(head_dim, **eps), RMSNorm(head_dim, **eps)
        self.out = Dense("btnh,nhd->btd", (heads, head_dim, width), ("heads", "head_dim", "embed"), **plain)
        self.norm2 = RMSNorm(width, **eps)
        self.gate = Dense("btd,df->btf", (width, mlp_dim), ("embed", "mlp"), **plain)
        self.up = Dense("btd,df->btf", (width, mlp_dim), ("embed", "mlp"), **plain)
        self.down = Dense("btf,fd->btd", (mlp_dim, width), ("mlp", "embed"), **plain)
        self.attention_gate, self.mlp_gate = gate(**init), gate(**init)

    def keys_values(self, memory: jax.Array, lora=None) -> tuple[jax.Array, jax.Array]:
        """k, v: float[B, M, K, H] of the images' tokens float[B, M, D]. lora: as in `DecoderBlock`."""
        k, v = (constrain(adapted(self, lora, f, memory), "act_batch", "act_len", "act_heads", None) for f in "kv")
        return self.k_norm(k), v

    def __call__(self, x, keys_values, *, allowed, sees, mask_attention: bool, lora=None) -> jax.Array:
        """allowed: bool[B, T, M]. sees: bool[B, T] which tokens see an image; mask_attention: others get 0 from it."""
        run = partial(adapted, self, lora)
        k, v = (array.astype(x.dtype) for array in keys_values)
        q = self.q_norm(constrain(run("q", self.norm1(x)), "act_batch", "act_len", "act_heads", None))
        y = run("out", masked_attention(q, k, v, allowed))
        y = jnp.where(sees[..., None], y, 0) if mask_attention else y
        x = x + gated(y, self.attention_gate)
        y = self.norm2(x)
        hidden = ACTIVATIONS[self.activation](run("gate", y)) * run("up", y)
        hidden = constrain(hidden, "act_batch", "act_len", "act_mlp")
        y = jnp.where(sees[..., None], run("down", hidden), 0)
        return constrain(x + gated(y, self.mlp_gate), "act_batch", "act_len", "act_embed")


class MllamaAdapters(nnx.Module):
    """`blocks` and `cross`: adapters of the self-attention and of the cross-attention layers."""

    def __init__(self, text: MllamaTextConfig, config: LoraConfig, *, rngs: nnx.Rngs, param_dtype=jnp.float32):
        self.blocks = Adapters(text, config, len(text.self_layers), rngs=rngs, param_dtype=param_dtype)
        self.cross = Adapters(text, config, len(text.cross_layers), rngs=rngs, param_dtype=param_dtype)


class MllamaDecoder(nnx.Module):
    """Embedding, layers (self-attention in `blocks`, cross-attention in `cross`), final norm, head."""

    def __init__(self, config: MllamaTextConfig, *, rngs: nnx.Rngs, param_dtype=jnp.float32, unroll: int, remat: str):
        init = dict(rngs=rngs, param_dtype=param_dtype)
        self.config, self.unroll, self.remat = config, unroll, remat
        width = config.embed_dim
        self.embed = Embedding(config.vocab_size + EXTRA_ROWS, width, ("vocab", "embed"), **init)
        self.blocks = DecoderBlock(
            width, config.num_heads, config.num_kv_heads, config.head_dim, config.mlp_dim,
            eps=config.norm_eps, activation=config.activation, stack=(len(config.self_layers),), **init,
        )  # fmt: skip
        self.cross = CrossBlock(config, stack=(len(config.cross_layers),), **init)
        self.norm = RMSNorm(width, eps=config.norm_eps, **init)
        self.head = Dense("...d,dv->...v", (width, config.vocab_size), ("embed", "vocab"), use_bias=False, **init)

    def __call__(self, x, *, angles, segment_ids, cache, visibility, memory, attention: str, lora=None, at=None):
        """(float[B, T, D] after the final norm, the new cache: (self k and v, cross k and v or None), or None).

        at: int[B, L]; the first result is float[B, L, D], at these positions; None: at all. The last layer computes no
          others, if equal groups are unrolled and there is no cache.
        cache: None, or {"k", "v", "segment_ids", "index"} as `DecoderBlock` takes it, for all self-attention layers.
        visibility: keyword arguments of `CrossBlock`. memory: the images' tokens float[B, M, D], or the cross k and v
          of all layers from an earlier call, which are then not returned again; None: no images, and the
          cross-attention layers are skipped.
        lora: None, or `MllamaAdapters`.
        """
        config = self.config
        if not config.group_size:
            x, states = self._one_by_one(x, angles, segment_ids, cache, visibility, memory, attention, lora)
            return self.norm(x if at is None else take_positions(x, at)), states
        groups, cross_index = len(config.cross_layers), config.cross_layers[0]
        graphdef, params = nnx.split(self.blocks)
        grouped = lambda tree: jax.tree.map(lambda w: w.reshape(groups, -1, *w.shape[1:]), tree)
        # Cast before the scan, as `run_stack` does.
        params = grouped(jax.tree.map(partial(cast, dtype=x.dtype), params))
        lora_graph: Any = None
        cross_graph: Any = None
        self_lora = cross_lora = None
        if lora is not None:
            (lora_graph, self_lora), (cross_graph, cross_lora) = nnx.split(lora.blocks), nnx.split(lora.cross)
            self_lora = grouped(self_lora)
        slots = None if cache is None else grouped((cache["k"], cache["v"]))
        shared = {} if cache is None else {name: cache[name] for name in ("segment_ids", "index")}
        known = memory if isinstance(memory, tuple) else None

        def body(cross, x, group, at=None):
            params, slots, cached_pair, self_lora, cross_lora = group
            pairs, cross_pair = list[tuple[jax.Array, jax.Array]](), None
            cross_adapters = None if lora is None else nnx.merge(cross_graph, cross_lora)
            for i in range(config.group_size):
                layer_at = at if i == config.group_size - 1 else None
                if i == cross_index:
                    seen = visibility
                    if layer_at is not None:
                        x, seen = take_positions(x, layer_at), visibility_at(visibility, layer_at)
                    if memory is not None:
                        cross_pair = cross.keys_values(memory, cross_adapters) if cached_pair is None else None
                        x = cross(x, cross_pair or cached_pair, lora=cross_adapters, **seen)
                    continue
                j = len(pairs)
                layer = lambda tree, j=j: jax.tree.map(lambda w: w[j], tree)
                block = nnx.merge(graphdef, layer(params))
                adapters = None if lora is None else nnx.merge(lora_graph, layer(self_lora))
                slot = None if slots is None else {"k": slots[0][j], "v": slots[1][j], **shared}
                options = dict(angles=angles, segment_ids=segment_ids, lora=adapters, implementation=attention)
                x, pair = block(x, cache=slot, at=layer_at, **options)
                pairs.append(pair)
            return x, None if slots is None else (jax.tree.map(lambda *layers: jnp.stack(layers), *pairs), cross_pair)

        # Rematerialisation works on whole groups.
        per_group = (params, slots, known, self_lora, cross_lora)
        unrolled = layers_at_once(groups, self.unroll) == groups
        last = partial(body, at=at) if at is not None and cache is None and unrolled else None
        x, states = run_stack(self.cross, body, x, per_group, unroll=self.unroll, remat=self.remat, last=last)
        if at is not None and last is None:
            x = take_positions(x, at)
        if states is not None:
            states = jax.tree.map(lambda w: w.reshape(-1, *w.shape[2:]), states[0]), states[1]
        return self.norm(x), states

    def _one_by_one(self, x, angles, segment_ids, cache, visibility, memory, attention, lora):
        """As `__call__` before the final norm, where cross-attention layers form no equal groups; nothing is scanned."""
        shared = {} if cache is None else {name: cache[name] for name in ("segment_ids", "index")}
        policy = REMAT_POLICIES[self.remat]
        run = (lambda step: step) if self.remat == "none" else partial(jax.checkpoint, policy=policy)
        pairs, cross_pairs, index, cross = [], [], 0, 0
        for layer in range(self.config.num_layers):
            if layer not in self.config.cross_layers:
                slot = None if cache is None else {"k": cache["k"][index], "v": cache["v"][index], **shared}
                step = partial(layer_of(self.blocks, index, x.dtype), angles=angles, segment_ids=segment_ids)
                adapters = None if lora is None else layer_of(lora.blocks, index, x.dtype)
                step = partial(step, implementation=attention, cache=slot, lora=adapters)
                x, pair = run(step)(x)
                pairs.append(pair)
                index += 1
                continue
            block: Any = layer_of(self.cross, cross, x.dtype)
            adapters = None if lora is None else layer_of(lora.cross, cross, x.dtype)
            if memory is not None:
                known = isinstance(memory, tuple)
                pair = jax.tree.map(lambda w, i=cross: w[i], memory) if known else block.keys_values(memory, adapters)
                step = partial(block, keys_values=pair, lora=adapters, **visibility)
                x = run(step)(x)
                cross_pairs += [] if known else [pair]
            cross += 1
        if cache is None:
            return x, None
        stacked = [
            jax.tree.map(lambda *layers: jnp.stack(layers), *kind) if kind else None for kind in (pairs, cross_pairs)
        ]
        return x, tuple(stacked)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32[..., V] for hidden[..., D]."""
        kernel = self.head.kernel[...].astype(hidden.dtype)
        return jnp.einsum(self.head.equation, hidden, kernel, preferred_element_type=jnp.float32)


def visibility_at(visibility: dict | None, at: jax.Array) -> dict | None:
    """`CrossBlock`'s arguments for the tokens at positions `at` int[B, L] alone."""
    if visibility is None:
        return None
    return visibility | {name: take_positions(visibility[name], at) for name in ("allowed", "sees")}


def layer_of(blocks: nnx.Module, index: int, dtype) -> nnx.Module:
    """One layer of a stack, its parameters in `dtype`."""
    graphdef, params = nnx.split(blocks)
    return nnx.merge(graphdef, jax.tree.map(lambda w: cast(w[index], dtype), params))


def images_in_view(is_image: jax.Array, before=None) -> tuple[jax.Array, jax.Array]:
    """(first, following), int32[B, T] each: a token sees the row's images first .. following - 1.

    is_image: bool[B, T]. before: the result, int32[B] each, for the last token in the cache; None: no cache.

    Example: is_image  0 1 0 1 1 0 0  gives first  0 0 0 1 1 1 1  and following  0 1 1 2 3 3 3.
    """
    old_first, old_following = (jnp.zeros(len(is_image), jnp.int32),) * 2 if before is None else before
    following = old_following[:, None] + jnp.cumsum(is_image, axis=1, dtype=jnp.int32)
    opens = is_image & ~jnp.pad(is_image, ((0, 0), (1, 0)))[:, :-1]
    first = jax.lax.cummax(jnp.where(opens, following - 1, old_first[:, None]), axis=1)
    return first, following
