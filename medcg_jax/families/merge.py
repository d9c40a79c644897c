"""Image features in place of image tokens, row by row and with static shapes."""

import jax
import jax.numpy as jnp


def merge_images(embedded: jax.Array, features: jax.Array, is_image: jax.Array) -> jax.Array:
    """float[B, T, D]: `embedded`, where the n-th True of each row of `is_image` has the row's n-th feature.

    embedded: float[B, T, D] the tokens' embeddings.
    features: float[B, P, D] the row's image features, one image after the other.
    is_image: bool[B, T], with up to P True a row; beyond P the last feature repeats (`medcg_jax.data` refuses such
      rows, compiled code cannot).

    Example, P = 2: is_image 0 1 1 0 gives  e0 f0 f1 e3.
    """
    slots = jnp.clip(jnp.cumsum(is_image, axis=1) - 1, 0, features.shape[1] - 1)
    gathered = jnp.take_along_axis(features, slots[..., None], axis=1)
    return jnp.where(is_image[..., None], gathered.astype(embedded.dtype), embedded)
