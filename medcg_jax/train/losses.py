"""The training loss: cross-entropy at the supervised positions only, as sums that add up over any split of a batch."""

import jax
import jax.numpy as jnp


def token_loss(model, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """(sum of the targets' negative log-likelihoods in nats, sum of their weights), both float32[].

    The loss of a batch is the quotient of the two; over parts of a batch, of the two sums. The head runs at
    `target_positions` alone: L positions a row instead of T.

    model: has `image_keys`, `hidden(tokens, images, segment_ids=...)` and `logits(hidden)`, as `models.llava.Llava`.
    batch: tokens and segment_ids int32[B, T], the model's images, target_positions and targets int32[B, L],
      target_weights float32[B, L] (0 where unused, so a row that only fills a batch has zeros).
    """
    images = {key: batch[key] for key in model.image_keys}
    at_targets, _ = model.hidden(
        batch["tokens"], images, segment_ids=batch["segment_ids"], at=batch["target_positions"]
    )
    nll = negative_log_likelihood(model.logits(at_targets), batch["targets"])
    weights = batch["target_weights"].astype(jnp.float32)
    # A row without weight must not count even where its numbers overflow: 0 * inf is no 0.
    return jnp.where(weights > 0, nll * weights, 0.0).sum(), weights.sum()


def negative_log_likelihood(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """float32[...] nats: -log softmax(logits)[target], over the full vocabulary in float32.

    logits: float[..., V]. targets: int[...].
    """
    logits = logits.astype(jnp.float32)
    logits -= jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    # A masked sum and no gather: with the vocabulary split over devices each adds its own part.
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    target_logit = jnp.where(is_target, logits, 0.0).sum(axis=-1)
    return jnp.log(jnp.exp(logits).sum(axis=-1)) - target_logit
