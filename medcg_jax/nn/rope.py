"""Rotary position embedding, the half-split ("rotate half") form of Llama."""

import jax
import jax.numpy as jnp

Angles = tuple[jax.Array, jax.Array]


def rope_angles(positions: jax.Array, head_dim: int, theta: float) -> Angles:
    """Cosines and sines, each float32[B, T, 1, H/2], of position times inverse frequency.

    positions: int[B, T] position of each token in its sequence, from 0.
    Dimension i of the first half turns by positions * theta**(-2i/H).
    """
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, angles: Angles) -> jax.Array:
    """x[B, T, N, H] with the pair (i, i + H/2) of every head turned by its angle; computed in float32."""
    cos, sin = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def count_positions(segment_ids: jax.Array) -> jax.Array:
    """int32[B, T]: how many real tokens (segment_ids != 0) of the row stand before each token; 0 on left padding."""
    return jnp.maximum(jnp.cumsum(segment_ids != 0, axis=-1, dtype=jnp.int32) - 1, 0)
