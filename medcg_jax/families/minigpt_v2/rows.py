"""Images for MiniGPT-v2: squashed to a square, nothing cut off and nothing added, so boxes scale with their image.

Source: Vision-CAIR/MiniGPT-4 (d94738a) minigpt4/processors/blip_processors.py:Blip2ImageTrainProcessor, whose resize is
PIL's bicubic filter on uint8, the same in training and evaluation.
"""

from __future__ import annotations

import numpy as np

from medcg_jax.data.images import resize


def preprocess(image: np.ndarray, size_px: int) -> dict[str, np.ndarray]:
    """`pixels` uint8[size_px, size_px, 3] of uint8[h, w, 3]; normalised where the model runs."""
    return {"pixels": resize(image, size_px)}
