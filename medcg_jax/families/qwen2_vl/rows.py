"""Rows of Qwen2-VL: ChatML's turns; images of any size, resized to whole blocks of patches and cut into patches.

Images are equal bit for bit to transformers' `Qwen2VLImageProcessorPil` before it normalises; its second frame, a copy
of the first, is made on the device.
Source: huggingface/transformers:models/qwen2_vl/image_processing_pil_qwen2_vl.py at 5.23.0; the chat template of
Qwen/Qwen2-VL-7B-Instruct.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image

from medcg_jax.data.images import ImageError
from medcg_jax.data.records import DataError
from medcg_jax.data.row_format import Format
from medcg_jax.families.prompts import IMAGE, Prompts, Text

QWEN2 = "You are a helpful assistant."
START, END = "<|im_start|>", "<|im_end|>"


class ChatML(Prompts):
    """ChatML; every line break is written as \\n:

        <|im_start|>system\\n{system}<|im_end|>\\n
        <|im_start|>user\\n<|vision_start|><|image_pad|><|vision_end|>{question}<|im_end|>\\n
        <|im_start|>assistant\\n{answer}<|im_end|>\\n

    An answer follows `assistant\\n` without a space; its letters have other ids than after one.
    """

    image, end, closing, between = "<|image_pad|>", END, "\n", ""
    released_system_prompt = "qwen2"

    def pieces(self, turn, *, first, system_prompt, has_image, training):
        if system_prompt == "vicuna":
            raise DataError("data.system_prompt='vicuna' is LLaVA-1.5's; expected 'qwen2', a sentence, or ''")
        system = QWEN2 if system_prompt == "qwen2" else system_prompt
        pieces = [START, Text(f"system\n{system}"), END, Text("\n")] if system and first else []
        if has_image:
            pieces += [START, Text("user\n"), "<|vision_start|>", IMAGE, "<|vision_end|>", Text(turn.question)]
        else:
            pieces += [START, Text(f"user\n{turn.question}")]
        return [*pieces, END, Text("\n"), START, Text("assistant\n")]


PROMPTS = ChatML()


def row_format(config) -> Format:
    """The format of a model's rows. config: its `Qwen2VLConfig`."""
    vision = config.vision
    sizes = ImageSizes(vision.patch_size_px, vision.merge, config.min_pixels, config.max_pixels)
    return Format(
        PROMPTS, partial(preprocess, sizes=sizes), sizes.max_image_tokens, partial(num_image_tokens, sizes=sizes)
    )


# Images with a larger ratio of the longer to the shorter side are refused.
MAX_RATIO = 200


@dataclass(frozen=True)
class ImageSizes:
    """The size of patches and of blocks (`merge` x `merge` patches), and of images after resizing, in pixels."""

    patch_size_px: int = 14
    merge: int = 2
    min_pixels: int = 3136
    max_pixels: int = 1_003_520

    @property
    def max_image_tokens(self) -> int:
        return self.max_pixels // (self.patch_size_px * self.merge) ** 2

    @property
    def num_slots(self) -> int:
        """Patches in an image's array, padding included."""
        return self.max_image_tokens * self.merge**2


def smart_resize(height: int, width: int, sizes: ImageSizes) -> tuple[int, int]:
    """(height, width) in pixels after resizing: whole blocks, about the same shape, an area within the limits.

    Raises:
      ImageError: the image is too narrow for its length.
    """
    side = sizes.patch_size_px * sizes.merge
    ratio = max(height, width) / min(height, width)
    if ratio > MAX_RATIO:
        raise ImageError(
            f"{width} x {height} pixels: one side is {ratio:.0f} times the other; expected at most {MAX_RATIO}"
        )
    # Rounds halves to even, like the original.
    rows, columns = round(height / side), round(width / side)
    if rows * columns * side * side > sizes.max_pixels:
        shrink = math.sqrt(height * width / sizes.max_pixels)
        rows, columns = (max(1, math.floor(x / shrink / side)) for x in (height, width))
    elif rows * columns * side * side < sizes.min_pixels:
        grow = math.sqrt(sizes.min_pixels / (height * width))
        rows, columns = (math.ceil(x * grow / side) for x in (height, width))
    if rows * columns > sizes.max_image_tokens:
        raise ImageError(
            f"{width} x {height} pixels become {columns} x {rows} tokens; expected at most {sizes.max_image_tokens}"
        )
    return rows * side, columns * side


def num_image_tokens(height: int, width: int, sizes: ImageSizes) -> int:
    """The number of tokens of an image of this size in pixels; raises as `smart_resize`."""
    height, width = smart_resize(height, width, sizes)
    return height * width // (sizes.patch_size_px * sizes.merge) ** 2


def preprocess(image: np.ndarray, sizes: ImageSizes) -> dict[str, np.ndarray]:
    """`pixels` uint8[num_slots, 3 * patch * patch], the image's patches and then zeros; `grids` int32[2].

    image: uint8[h, w, 3]. `grids`: rows and columns of patches. Patches are in the order of blocks; the
    numbers of a patch are in the order channel, row, column.

    Raises:
      ImageError: as `smart_resize`.
    """
    height, width = smart_resize(image.shape[0], image.shape[1], sizes)
    if image.shape[:2] != (height, width):
        image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    patch, merge = sizes.patch_size_px, sizes.merge
    rows, columns = height // patch, width // patch
    blocks = image.reshape(rows // merge, merge, patch, columns // merge, merge, patch, 3)
    patches = blocks.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns, -1)
    pixels = np.zeros((sizes.num_slots, patches.shape[1]), np.uint8)
    pixels[: len(patches)] = patches
    return {"pixels": pixels, "grids": np.array([rows, columns], np.int32)}
