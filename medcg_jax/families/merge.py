"""Image features put where the prompt holds image tokens, with static shapes and within each row."""

import jax
import jax.numpy as jnp


def merge_images(embedded: jax.Array, features: jax.Array, is_image: jax.Array) -> jax.Array:
    """float[B, T, D]: `embedded`, where the n-th True of each row of `is_image` has the row's n-th feature.

    embedded: float[B, T, D] the tokens' embeddings.
    features: float[B, P, D] the row's image features, all its images one behind the other: of packed rows those of the
      segments that have one, in their order.
    is_image: bool[B, T]. A row may hold fewer than P; one with more repeats the last feature (the data room
      refuses such rows, here nothing can be raised).

    Example, P = 2: is_image 0 1 1 0 gives  e0 f0 f1 e3.
    """
    slots = jnp.clip(jnp.cumsum(is_image, axis=1) - 1, 0, features.shape[1] - 1)
    gathered = jnp.take_along_axis(features, slots[..., None], axis=1)
    return jnp.where(is_image[..., None], gathered.astype(embedded.dtype), embedded)
