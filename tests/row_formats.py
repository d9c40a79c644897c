"""Formats of rows by their sizes alone, without a model (and without JAX)."""

from types import SimpleNamespace

from medcg_jax.data.row_format import Format
from medcg_jax.families import registry


def row_format(family: str, image_size_px: int, num_image_tokens: int = 1, max_boxes: int = 8) -> Format:
    sizes = SimpleNamespace(image_size_px=image_size_px, num_image_tokens=num_image_tokens, max_boxes=max_boxes)
    return registry.family(family).row_format(sizes)


def llava(image_size_px: int, num_image_tokens: int) -> Format:
    return row_format("llava", image_size_px, num_image_tokens)
