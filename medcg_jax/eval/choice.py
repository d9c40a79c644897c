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


def letter_logits(model, batch: dict[str, jax.Array]) -> jax.Array:
    """float32[B, V]: the logits at each prompt's end, without a cache.

    batch: tokens, segment_ids int32[B, T] right-padded, the model's images, last_position int32[B].
    """
    images = {key: batch[key] for key in model.image_keys}
    hidden, _ = model.hidden(
        batch["tokens"], images, segment_ids=batch["segment_ids"], at=batch["last_position"][:, None]
    )
    return model.logits(hidden[:, 0])
