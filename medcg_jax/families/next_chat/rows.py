"""Images and boxes for NExT-Chat: a white square for CLIP, a zero-padded one for SAM, boxes as shares of that square.

Both squares have the image in the middle, so one box fits both.
Source: NExT-ChatV/NExT-Chat (1e6c20f) mllm/dataset/utils/transform.py:expand2square, box_xyxy_expand2square,
norm_box_xyxy; mllm/models/sam/transforms.py:ResizeAndPad, whose resize is PIL's bilinear filter on uint8.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from medcg_jax.data.images import pad_to_square, resize

FILL = (255, 255, 255)

Size = tuple[int, int]


def preprocess(image: np.ndarray, size_px: int) -> dict[str, np.ndarray]:
    """`pixels` uint8[size_px, size_px, 3] of uint8[h, w, 3]; normalised where the model runs."""
    return {"pixels": resize(pad_to_square(image, FILL), size_px)}


def to_square(boxes: np.ndarray, size: Size) -> np.ndarray:
    """float64[N, 4] in 0 to 1 of the padded square, cut at its edges.

    boxes: [N, 4] of x1, y1, x2, y2 in pixels of an image of size (height, width).
    """
    shift, side = _shift(size)
    return np.clip((np.asarray(boxes, np.float64) + shift) / side, 0, 1)


def from_square(boxes: np.ndarray, size: Size) -> np.ndarray:
    """float64[N, 4] in pixels of the image: the inverse of `to_square`; boxes may reach beyond the image."""
    shift, side = _shift(size)
    return np.asarray(boxes, np.float64) * side - shift


def preprocess_sam(image: np.ndarray, size_px: int) -> dict[str, np.ndarray]:
    """`sam_pixels` uint8[size_px, size_px, 3] and `sam_extent` int32[2], height and width of the image in its middle.

    What surrounds the image is to be 0 after normalisation, which no byte is before it.
    """
    resized = _resize_longest(image, size_px)
    return {"sam_pixels": _centred(resized, size_px), "sam_extent": np.array(resized.shape[:2], np.int32)}


def preprocess_masks(masks: np.ndarray, size_px: int) -> np.ndarray:
    """bool[K, size_px, size_px] of masks bool[K, h, w], laid out as `preprocess_sam` lays the image."""
    resized = [_resize_longest(mask.astype(np.uint8), size_px) for mask in masks]
    return np.array([_centred(mask, size_px) for mask in resized], bool).reshape(-1, size_px, size_px)


def _shift(size: Size) -> tuple[np.ndarray, int]:
    """(x, y, x, y that a box moves by in the square, the square's side), in whole pixels as `pad_to_square`."""
    height, width = size
    side = max(size)
    return np.tile(((side - width) // 2, (side - height) // 2), 2), side


def _resize_longest(image: np.ndarray, size_px: int) -> np.ndarray:
    """uint8[h', w', ...], the longer side `size_px`."""
    scale = size_px / max(image.shape[:2])
    # A side of less than half a pixel would be none.
    height, width = (max(1, int(side * scale + 0.5)) for side in image.shape[:2])
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def _centred(image: np.ndarray, size_px: int) -> np.ndarray:
    height, width = image.shape[:2]
    square = np.zeros((size_px, size_px, *image.shape[2:]), np.uint8)
    top, left = (size_px - height) // 2, (size_px - width) // 2
    square[top : top + height, left : left + width] = image
    return square
