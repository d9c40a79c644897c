"""Rotary position embedding, the half-split ("rotate half") form of Llama."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

Angles = tuple[jax.Array, jax.Array]


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3's longer context: wavelengths above `original_positions / low` are stretched `factor` times.

    Those below `original_positions / high` stay, the ones between are blended.
    Source: huggingface/transformers:modeling_rope_utils.py:_compute_llama3_parameters at 5.23.0.
    """

    factor: float = 8.0
    low: float = 1.0
    high: float = 4.0
    original_positions: int = 8192


def frequencies(head_dim: int, theta: float, scaling: Llama3Scaling | None = None) -> np.ndarray:
    """float32[H/2] radians per position: theta**(-2i/H), scaled where asked."""
    freqs = (theta ** (-np.arange(0, head_dim, 2) / head_dim)).astype(np.float32)
    if scaling is None:
        return freqs
    turns = scaling.original_positions * freqs / np.float32(2 * math.pi)
    blend = np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0, 1)
    return (freqs * (blend + (1 - blend) / scaling.factor)).astype(np.float32)


def rope_angles(positions: jax.Array, head_dim: int, theta: float, scaling: Llama3Scaling | None = None) -> Angles:
    """Cosines and sines, each float32[B, T, 1, H/2], of position times frequency.

    positions: int[B, T] position of each token in its sequence, from 0.
    """
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies(head_dim, theta, scaling)
    return jnp.cos(angles), jnp.sin(angles)


def counted_angles(
    positions: jax.Array, length: int, head_dim: int, theta: float, scaling: Llama3Scaling | None = None
) -> Angles:
    """`rope_angles` for positions below `length`, looked up in a table made while tracing.

    Otherwise a compiler may compute sines and cosines again in every layer (on a CPU it does).
    """
    angles = np.arange(length, dtype=np.float32)[:, None, None] * frequencies(head_dim, theta, scaling)
    return jnp.asarray(np.cos(angles))[positions], jnp.asarray(np.sin(angles))[positions]


def rotate(x: jax.Array, angles: Angles) -> jax.Array:
    """x[B, T, N, H] with the pair (i, i + H/2) of every head rotated by its angle; computed in float32."""
    cos, sin = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def count_positions(segment_ids: jax.Array) -> jax.Array:
    """int32[B, T]: the number of real tokens (segment_ids != 0) before each token of the row; 0 on left padding.

    Padding behind a token has the position of that token.
    """
    return jnp.maximum(jnp.cumsum(segment_ids != 0, axis=-1, dtype=jnp.int32) - 1, 0)
