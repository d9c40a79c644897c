"""Rows of LLaVA-1.5: Vicuna's turns; images padded to a square and resized, all with as many tokens."""

from __future__ import annotations

import numpy as np

from medcg_jax.data import images
from medcg_jax.data.row_format import Arrays, Format
from medcg_jax.families.prompts import Vicuna

PROMPTS = Vicuna()


def row_format(config) -> Format:
    """The format of a model's rows; of its `LlavaConfig`, `image_size_px` and `num_image_tokens` are read."""

    def preprocess(image: np.ndarray) -> Arrays:
        return {"pixels": images.preprocess(image, config.image_size_px)}

    return Format(PROMPTS, preprocess, config.num_image_tokens)
