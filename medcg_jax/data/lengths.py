"""Static lengths of evaluation rows: few of them, so that few programs are compiled and short prompts stay short."""

from __future__ import annotations

import numpy as np

from medcg_jax.data.encoding import Encoded

# Programs of one kind that the lengths of rows may ask for, at most.
MOST = 4
# Rows come in multiples of so many tokens, or of a multiple of the last.
STEPS = (16, 32, 64)


def batch_length(encoded: Encoded, longest: int) -> int:
    """The length of a batch whose longest row has so many tokens: one of `MOST`, up to the length of all rows.

    Example, 576 image and at most 192 text tokens: 768, 704, 640 or 576.
    """
    # Rows differ by their text, and where images take as many tokens as they are large by these too.
    most, fmt = encoded.arrays["tokens"].shape[1], encoded.format
    step = _step(most if fmt.num_image_tokens is not None else most - fmt.max_image_tokens)
    return min(most, _up(max(longest, most - (MOST - 1) * step), step))


def suffix_length(encoded: Encoded, longest: int) -> int:
    """The same of the part of each row that follows its image; only rows without an image may ask for more lengths."""
    text = encoded.arrays["tokens"].shape[1] - encoded.format.max_image_tokens
    return _up(max(longest, 1), _step(text))


def eval_order(encoded: Encoded) -> np.ndarray:
    """int[N] the rows in the order in which evaluation takes them: by the length they need, the longest first, else as
    they stand. No other order gives shorter batches, and none gives fewer.
    """
    needed = [batch_length(encoded, int(length)) for length in encoded.arrays["length"]]
    return np.argsort(-np.asarray(needed, np.int32), kind="stable")


def _step(differing: int) -> int:
    """The smallest step of which `MOST` are no fewer than the tokens by which rows may differ."""
    return next((step for step in STEPS if MOST * step >= differing), STEPS[-1] * -(-differing // (MOST * STEPS[-1])))


def _up(number: int, step: int) -> int:
    return -(-number // step) * step
