"""What a model's rows look like: its prompts, its images as arrays, and how many tokens an image takes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from medcg_jax.data import images, prompts

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Format:
    """How the rows of one model are made of records.

    Attributes:
      prompts: a module with `conversation`, `evaluation_prompt`, `option_ids` and `template`, as `data.prompts` has them.
      preprocess: uint8[h, w, 3] -> the arrays of one image by batch key, always of the same shapes and dtypes.
      max_image_tokens: the most tokens that an image takes, which every row reserves.
      num_image_tokens: tokens of an image of (height, width) pixels; None: all have the most.
    """

    prompts: ModuleType
    preprocess: Callable[[np.ndarray], Arrays]
    max_image_tokens: int
    num_image_tokens: Callable[[int, int], int] | None = None

    @functools.cached_property
    def blank(self) -> Arrays:
        """The arrays of a row without an image: zeros."""
        return {key: np.zeros_like(array) for key, array in self.preprocess(np.zeros((28, 28, 3), np.uint8)).items()}


def llava(image_size_px: int, num_image_tokens: int) -> Format:
    """LLaVA-1.5: Vicuna's turns; images padded to a square and resized, all with as many tokens."""

    def preprocess(image: np.ndarray) -> Arrays:
        return {"pixels": images.preprocess(image, image_size_px)}

    return Format(prompts, preprocess, num_image_tokens)
