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
    found = (theta ** (-np.arange(0, head_dim, 2) / head_dim)).astype(np.float32)
    if scaling is None:
        return found
    turns = scaling.original_positions * found / np.float32(2 * math.pi)
    blend = np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0, 1)
    return (found * (blend + (1 - blend) / scaling.factor)).astype(np.float32)


def rope_angles(positions: jax.Array, head_dim: int, theta: float, scaling: Llama3Scaling | None = None) -> Angles:
    """Cosines and sines, each float32[B, T, 1, H/2], of position times frequency.

    positions: int[B, T] position of each token in its sequence, from 0.
    """
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies(head_dim, theta, scaling)
    return jnp.cos(angles), jnp.sin(angles)


def counted_angles(
    positions: jax.Array, length: int, head_dim: int, theta: float, scaling: Llama3Scaling | None = None
) -> Angles:
    """As `rope_angles` of positions below `length`, looked up in a table that is made while tracing.

    Compilers otherwise take sines and cosines anew wherever layers turn their queries and keys (a CPU's does).
    """
    angles = np.arange(length, dtype=np.float32)[:, None, None] * frequencies(head_dim, theta, scaling)
    return jnp.asarray(np.cos(angles))[positions], jnp.asarray(np.sin(angles))[positions]


def rotate(x: jax.Array, angles: Angles) -> jax.Array:
    """x[B, T, N, H] with the pair (i, i + H/2) of every head turned by its angle; computed in float32."""
    cos, sin = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def count_positions(segment_ids: jax.Array) -> jax.Array:
    """int32[B, T]: how many real tokens (segment_ids != 0) of the row stand before each token; 0 on left padding.

    Padding behind a token has that token's position.
    """
    return jnp.maximum(jnp.cumsum(segment_ids != 0, axis=-1, dtype=jnp.int32) - 1, 0)
