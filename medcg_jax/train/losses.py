"""Training losses, as sums that add up over any split of a batch: text, and NExT-Chat's boxes and masks.

Text has cross-entropy at the supervised positions only. NExT-Chat adds losses of boxes in its first two stages and of
masks in the third; weights mark the real boxes. The original instead appends a mock row to every batch, and gives the
last value of each mean a weight of 1e-10: `original_loss_quirks` computes that, for parity with its numbers.
Source: NExT-ChatV/NExT-Chat:mllm/models/nextchat/nextchat_base.py:forward, mllm/models/sam/sam_loss.py at 1e6c20f;
generalised IoU as arXiv 1902.09630.
"""

import jax
import jax.numpy as jnp

# Weights of the terms in the loss.
TERMS = {"ce": 1.0, "l1": 2.0, "giou": 0.2, "cycle1": 1.0, "cycle2": 1.0}
FOCAL_WEIGHT, FOCAL_ALPHA, FOCAL_GAMMA, DICE_SMOOTH = 20.0, 0.8, 2.0, 1.0
# For the IoU of a predicted mask, pixels with at least this logit are in the mask.
MASK_LOGIT = 0.5
MOCK_WEIGHT = 1e-10


def token_loss(model, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """(sum of the targets' negative log-likelihoods in nats, sum of their weights), both float32[].

    The loss of a batch is their quotient; over microbatches, each is summed first. The head runs only at
    `target_positions`: L positions a row instead of T.

    model: has `image_keys`, `hidden(tokens, images, segment_ids=...)` and `logits(hidden)`, as `families.llava.Llava`.
    batch: tokens and segment_ids int32[B, T], the model's images, target_positions and targets int32[B, L],
      target_weights float32[B, L] (0 where unused, and in rows that only fill the batch).
    """
    images = {key: batch[key] for key in model.image_keys}
    at_targets, _ = model.hidden(
        batch["tokens"], images, segment_ids=batch["segment_ids"], at=batch["target_positions"]
    )
    nll = negative_log_likelihood(model.logits(at_targets), batch["targets"])
    weights = batch["target_weights"].astype(jnp.float32)
    # `where`, because a value without weight may overflow, and 0 * inf is not 0.
    return jnp.where(weights > 0, nll * weights, 0.0).sum(), weights.sum()


def negative_log_likelihood(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """float32[...] nats: -log softmax(logits)[target], over the full vocabulary in float32.

    logits: float[..., V]. targets: int[...].
    """
    logits = logits.astype(jnp.float32)
    logits -= jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    # A masked sum, not a gather: with the vocabulary split over devices, each device adds its own share.
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    target_logit = jnp.where(is_target, logits, 0.0).sum(axis=-1)
    return jnp.log(jnp.exp(logits).sum(axis=-1)) - target_logit


def box_loss(model, batch: dict[str, jax.Array], *, original_loss_quirks: bool = False):
    """(loss times weight, number of supervised tokens), both float32[]: the weighted sum of `box_terms`.

    Their quotient is the loss of a batch. The terms are means over different counts; over microbatches the loss is the
    mean weighted by tokens, which is exact for text and approximate for boxes.
    batch: as `box_terms`.
    """
    terms = box_terms(model, batch, original_loss_quirks=original_loss_quirks)
    weight = batch["target_weights"].astype(jnp.float32).sum()
    return weight * sum(TERMS[name] * value for name, value in terms.items()), weight


def box_terms(model, batch: dict[str, jax.Array], *, original_loss_quirks: bool = False) -> dict[str, jax.Array]:
    """float32[] unweighted mean of each term in `TERMS`; 0 where a batch has nothing to average.

    ce: negative log-likelihood of the supervised tokens. l1, giou: between the boxes decoded at `<at>` and the true
    boxes, per coordinate and per box (boxes with corners out of order have no giou). cycle1: squared difference between
    the hidden states and the decoded boxes, encoded again. cycle2: absolute difference between the given boxes and
    themselves, encoded and decoded.

    model: as `families.next_chat.NextChat`.
    batch: as `token_loss`, and `boxes` float32[B, N, 4] in reading order with `box_weights` [B, N] (0 where unused),
      `at_positions` int32[B, M] of the `<at>` in answers with `at_boxes` float32[B, M, 4] and `at_weights` [B, M].
    original_loss_quirks: the last row is the mock: its text does not count, and the last box of each mean has a weight
      of 1e-10. In giou that may be a real box (without any box the original divides by 0; here giou is 0).
    """
    images = {key: batch[key] for key in model.image_keys}
    num_targets = batch["targets"].shape[1]
    hidden, _ = model.hidden(
        batch["tokens"], images, segment_ids=batch["segment_ids"], boxes=batch["boxes"],
        at=jnp.concatenate([batch["target_positions"], batch["at_positions"]], axis=1),
    )  # fmt: skip
    nll = negative_log_likelihood(model.logits(hidden[:, :num_targets]), batch["targets"])
    token_weights = batch["target_weights"].astype(jnp.float32)
    if original_loss_quirks:
        token_weights = token_weights.at[-1].set(0)
    at, target = hidden[:, num_targets:].astype(jnp.float32), batch["at_boxes"]
    decoded, given = model.boxes.decode(at), batch["boxes"]
    at_weights = batch["at_weights"].astype(jnp.float32)
    ordered = at_weights * (decoded[..., 2:] >= decoded[..., :2]).all(axis=-1)
    weigh = _mock_last if original_loss_quirks else lambda weights: weights
    redecoded = model.boxes.decode(model.boxes.encode(given))
    return {
        "ce": _mean(nll, token_weights),
        "l1": _mean(jnp.abs(decoded - target).mean(axis=-1), weigh(at_weights)),
        "giou": _mean(1 - generalized_iou(decoded, target, ordered > 0), weigh(ordered)),
        "cycle1": _mean(jnp.square(model.boxes.encode(decoded) - at).mean(axis=-1), weigh(at_weights)),
        "cycle2": _mean(jnp.abs(redecoded - given).mean(axis=-1), weigh(batch["box_weights"].astype(jnp.float32))),
    }


def generalized_iou(boxes: jax.Array, others: jax.Array, valid: jax.Array) -> jax.Array:
    """float[...] generalised IoU, -1 to 1, of boxes[..., 4] with others[..., 4]; 1 where not valid[...].

    A box is left, top, right, bottom; others have an area.
    """
    # Where a box does not count, its gradient must be 0, not NaN.
    unit = jnp.array([0.0, 0.0, 1.0, 1.0])
    boxes, others = (jnp.where(valid[..., None], x, unit) for x in (boxes, others))
    inner = _area(jnp.maximum(boxes[..., :2], others[..., :2]), jnp.minimum(boxes[..., 2:], others[..., 2:]))
    outer = _area(jnp.minimum(boxes[..., :2], others[..., :2]), jnp.maximum(boxes[..., 2:], others[..., 2:]))
    union = _area(boxes[..., :2], boxes[..., 2:]) + _area(others[..., :2], others[..., 2:]) - inner
    return inner / union - (outer - union) / outer


def mask_loss(model, batch: dict[str, jax.Array], *, original_loss_quirks: bool = False):
    """(loss of stage 3, 1), both float32[]; (loss, 0) for a batch without a mask. batch: as `mask_terms`."""
    focal, dice, iou, weights = mask_terms(model, batch, original_loss_quirks=original_loss_quirks)
    return mask_total(focal, dice, iou, weights), (weights.sum() > 0).astype(jnp.float32)


def mask_total(focal: jax.Array, dice: jax.Array, iou: jax.Array, weights: jax.Array) -> jax.Array:
    """float32[] loss as in the original: 20 focal + dice, summed over the masks of a batch, plus the mean of iou."""
    per_mask = FOCAL_WEIGHT * focal + dice
    return jnp.where(weights > 0, weights * per_mask, 0.0).sum() + _mean(iou, weights)


def mask_terms(model, batch: dict[str, jax.Array], *, original_loss_quirks: bool = False):
    """float32[B, M] focal loss, dice loss, squared error of the predicted IoU, and the weight of each mask.

    batch: `tokens`, `segment_ids`, the model's images and those of `NextChat.encode_sam_images`; `boxes`,
      `at_positions` and `at_weights` as in `box_terms`; `at_masks` bool or float[B, M, s, s], s SAM's image size.
    original_loss_quirks: the number of masks replaces focal's alpha and dice's smoothing.
    """
    images = {key: batch[key] for key in model.image_keys}
    at_hidden, _ = model.hidden(
        batch["tokens"], images, segment_ids=batch["segment_ids"], boxes=batch["boxes"], at=batch["at_positions"]
    )
    masks, iou = model.masks(at_hidden, model.encode_sam_images(batch))
    target, weights = batch["at_masks"].astype(jnp.float32), batch["at_weights"].astype(jnp.float32)
    logits = jax.image.resize(masks, target.shape, "bilinear")
    num = weights.sum()
    alpha, smooth = (jnp.where(original_loss_quirks, num, usual) for usual in (FOCAL_ALPHA, DICE_SMOOTH))
    # As in the original, the focal factor is computed from the mean over pixels, not for each pixel.
    bce = (jax.nn.softplus(logits) - logits * target).mean(axis=(-2, -1))
    focal = alpha * (1 - jnp.exp(-bce)) ** FOCAL_GAMMA * bce
    drawn, pixels = jax.nn.sigmoid(logits), (-2, -1)
    shared = (drawn * target).sum(axis=pixels)
    dice = 1 - (2 * shared + smooth) / (drawn.sum(axis=pixels) + target.sum(axis=pixels) + smooth)
    return focal, dice, jnp.square(iou - mask_iou(logits, target)), weights


def mask_iou(logits: jax.Array, target: jax.Array) -> jax.Array:
    """float32[...] intersection over union of the pixels with logits[..., s, s] of at least 0.5 and a 0/1 target."""
    drawn = (logits >= MASK_LOGIT).astype(jnp.float32)
    inner = (drawn * target).sum(axis=(-2, -1))
    return inner / (drawn.sum(axis=(-2, -1)) + target.sum(axis=(-2, -1)) - inner + 1e-7)


def _area(low: jax.Array, high: jax.Array) -> jax.Array:
    return jnp.maximum(high - low, 0).prod(axis=-1)


def _mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    total = weights.sum()
    # `where`, because a value without weight may overflow, and 0 * inf is not 0.
    return jnp.where(weights > 0, values * weights, 0.0).sum() / jnp.where(total > 0, total, 1.0)


def _mock_last(weights: jax.Array) -> jax.Array:
    """`weights` with their last value that is not 0, in reading order, set to 1e-10."""
    flat = weights.reshape(-1)
    last = jnp.where(flat > 0, jnp.arange(flat.size), -1).max()
    return jnp.where(jnp.arange(flat.size) == last, MOCK_WEIGHT, flat).reshape(weights.shape)
