"""Rows of Llama-3.2-Vision: Llama 3's turns; images fitted into the best rectangle of at most four tiles, and cut.

Images are equal bit for bit to transformers' `MllamaImageProcessorPil` before it normalises (bilinear, by PIL on
uint8).
Source: huggingface/transformers:models/mllama/image_processing_pil_mllama.py at 5.23.0;
meta-llama/llama-models:llama3/chat_format.py at a9c89c4.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from PIL import Image

from medcg_jax.data.records import DataError
from medcg_jax.data.row_format import Format
from medcg_jax.families.prompts import IMAGE, Piece, Prompts, Text

TURN_END = "<|eot_id|>"


class Llama3(Prompts):
    """Llama 3's turns, in one line:

        <|begin_of_text|><|start_header_id|>user<|end_header_id|>\\n\\n<|image|>{question}<|eot_id|>
        <|start_header_id|>assistant<|end_header_id|>\\n\\n{answer}<|eot_id|>...

    Role, line breaks and the stripped text are tokenised separately, as in Meta's code; Llama 3's tokenizer gives the
    same ids for the whole text. An image is one token.
    """

    image, end, between = "<|image|>", TURN_END, None

    def pieces(self, turn, *, first, system_prompt, has_image, training):
        if system_prompt == "vicuna":
            raise DataError("system_prompt='vicuna' is LLaVA-1.5's sentence; expected the text itself, or '' for none")
        pieces: list[Piece] = ["<|begin_of_text|>"] if first else []
        if system_prompt and first:
            pieces += [*header("system"), Text(system_prompt.strip()), TURN_END]
        pieces += [*header("user"), *([IMAGE] if has_image else []), Text(turn.question.strip()), TURN_END]
        return pieces + header("assistant")


def header(role: str) -> list[Piece]:
    return ["<|start_header_id|>", Text(role), "<|end_header_id|>", Text("\n\n")]


PROMPTS = Llama3()


def row_format(config) -> Format:
    """The format of a model's rows. config: its `MllamaConfig`."""
    return Format(PROMPTS, partial(preprocess, tile_px=config.image_size_px), 1)


NUM_TILES = 4
# (rows, columns) of tiles; aspect_ratio_ids count them from 1.
GRIDS = ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))


def preprocess(image: np.ndarray, tile_px: int) -> dict[str, np.ndarray]:
    """The arrays of one image, uint8[h, w, 3] of any shape.

    pixels: uint8[NUM_TILES, tile_px, tile_px, 3] tiles row by row; black below and right of the image, and in tiles
      that the image does not have.
    aspect_ratio_ids: int32[] number of the grid, from 1. num_tiles: int32[] tiles of the image. Zeros in all three mean
      no image.
    """
    height, width = image.shape[:2]
    rows, columns = grid = choose_grid(height, width, tile_px)
    size = fitted_size(height, width, grid, tile_px)
    canvas = np.zeros((rows * tile_px, columns * tile_px, 3), np.uint8)
    canvas[: size[0], : size[1]] = _resize(image, *size)
    tiles = canvas.reshape(rows, tile_px, columns, tile_px, 3).swapaxes(1, 2)
    pixels = np.zeros((NUM_TILES, tile_px, tile_px, 3), np.uint8)
    pixels[: rows * columns] = tiles.reshape(-1, tile_px, tile_px, 3)
    return {
        "pixels": pixels, "aspect_ratio_ids": np.array(GRIDS.index(grid) + 1, np.int32),
        "num_tiles": np.array(rows * columns, np.int32),
    }  # fmt: skip


def choose_grid(height: int, width: int, tile_px: int) -> tuple[int, int]:
    """The grid that enlarges the image least; if all shrink it, the one that shrinks it least.

    Among equal scales the grid with the fewest tiles, then the first in `GRIDS`.
    """
    scales = [min(rows * tile_px / height, columns * tile_px / width) for rows, columns in GRIDS]
    enlarging = [scale for scale in scales if scale >= 1]
    best = min(enlarging) if enlarging else max(scales)
    return min((grid for grid, scale in zip(GRIDS, scales, strict=True) if scale == best), key=np.prod)


def fitted_size(height: int, width: int, grid: tuple[int, int], tile_px: int) -> tuple[int, int]:
    """(height, width) of the image in the canvas: its own size, but at least a tile and at most what fits."""
    most_high, most_wide = (min(max(side, tile_px), count * tile_px) for side, count in zip((height, width), grid))
    scale_high, scale_wide = most_high / height, most_wide / width
    if scale_wide < scale_high:
        return min(int(height * scale_wide) or 1, most_high), most_wide
    return most_high, min(int(width * scale_high) or 1, most_wide)


def _resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
