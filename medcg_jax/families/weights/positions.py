"""Tables of learned positions carried over to an image of another size, as PyTorch does it."""

import numpy as np

# Of PyTorch's cubic convolution; jax.image has -0.5.
CUBIC = -0.75


def resize_positions(positions: np.ndarray, side: int) -> np.ndarray:
    """float32[1 + side * side, E]: the class token's row as it is, the square grid behind it by bicubic interpolation.

    positions: float[1 + s * s, E]. Equal to `torch.nn.functional.interpolate(mode="bicubic", align_corners=False)`.
    Source: Vision-CAIR/MiniGPT-4:minigpt4/models/eva_vit.py:interpolate_pos_embed at d94738a.
    """
    positions = np.asarray(positions, np.float64)
    old = round((len(positions) - 1) ** 0.5)
    grid = positions[1:].reshape(old, old, -1)
    weights = cubic_weights(old, side)
    resized = np.einsum("ia,jb,abe->ije", weights, weights, grid, optimize=True)
    return np.concatenate([positions[:1], resized.reshape(side * side, -1)]).astype(np.float32)


def cubic_weights(old: int, new: int) -> np.ndarray:
    """float64[new, old] how much each old point gives to each new one; pixel centres, the border repeated outwards."""
    places = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(places).astype(int)
    weights = np.zeros((new, old))
    for tap in range(-1, 3):
        distance = np.abs(places - (first + tap))
        near = ((CUBIC + 2) * distance - (CUBIC + 3)) * distance**2 + 1
        far = CUBIC * (((distance - 5) * distance + 8) * distance - 4)
        taken = np.clip(first + tap, 0, old - 1)
        np.add.at(weights, (np.arange(new), taken), np.where(distance <= 1, near, far))
    return weights
