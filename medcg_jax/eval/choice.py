"""Scoring a choice question: the likelihood of each option's letter as the next token after the prompt."""

import jax
import jax.numpy as jnp


def option_logprobs(logits: jax.Array, option_ids: jax.Array) -> jax.Array:
    """float32[B, K] nats: log-probability of each option's letter over the full vocabulary; -inf where there is none.

    logits: float[B, V] at the last prompt position. option_ids: int32[B, K] token ids of the letters, -1 pads.
    """
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    chosen = jnp.take_along_axis(logprobs, jnp.maximum(option_ids, 0), axis=-1)
    return jnp.where(option_ids >= 0, chosen, -jnp.inf)
