"""Whether a model sees its images: other pixels must give other numbers. A wrong image token, for one, shows nowhere
else: nothing fails, losses fall, and the model answers from the text alone.
"""

from collections.abc import Callable, Mapping

import numpy as np

from medcg_jax.config import ConfigError
from medcg_jax.processes import gather

# What other pixels change at least, of a number's size: far more than rounding, far less than any image.
LEAST_CHANGE = 1e-6

Batch = Mapping[str, np.ndarray]


class BlindModel(ConfigError):
    """The model does not see its images."""


def pixel_keys(blank: Batch) -> tuple[str, ...]:
    """The keys of a format's images (`Format.blank`) whose pixels the language model is to see; SAM's are none."""
    return tuple(key for key, x in blank.items() if x.dtype == np.uint8 and not key.startswith("sam_"))


def check_sees(score: Callable[[Batch], list[np.ndarray]], batch: Batch, keys: tuple[str, ...], what: str) -> bool:
    """Whether the batch has an image at all, on any process; it is then known that the model sees them.

    score: the numbers that the model makes of a batch, the same on every process; called with other pixels, too.
    keys: of the pixels, uint8. what: names the run or its subset in the message.

    Raises:
      BlindModel: images are there, and with the negative of each the numbers are the same.
    """
    if not any(gather("whether a batch has images", any(bool(batch[key].any()) for key in keys))):
        return False
    negative = {**batch, **{key: 255 - batch[key] for key in keys}}
    for seen, other in zip(score(batch), score(negative), strict=True):
        finite = np.isfinite(seen) & np.isfinite(other)
        # What is not finite is another fault, which is told elsewhere.
        with np.errstate(invalid="ignore"):
            near = np.abs(np.where(finite, seen - other, np.inf)) <= LEAST_CHANGE * np.maximum(np.abs(seen), 1e-3)
        if not (near | (seen == other)).all():
            return True
    raise BlindModel(
        f"{what}: the model does not see images (other pixels change none of its numbers); model.tokenizer with the "
        "checkpoint's own image token, and weights whose vision tower and projector are trained, are accepted"
    )


def has_closed_gates(params) -> bool:
    """Whether the decoder's cross-attention adds nothing yet, as in a Llama-3.2-Vision of random weights."""
    cross = params["decoder"].get("cross") if "decoder" in params else None
    return cross is not None and "attention_gate" in cross and not np.any(np.asarray(cross["attention_gate"]))
