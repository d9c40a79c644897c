"""Rows of MiniGPT-v2: Llama 2's instructions; images squashed to a square; boxes as text.

Images are neither cropped nor padded, so boxes scale with them.
Source: Vision-CAIR/MiniGPT-4 (d94738a) minigpt4/models/minigpt_base.py:prompt_wrap, preparing_embedding,
get_context_emb; conversation/conversation.py:CONV_VISION_minigptv2; datasets/datasets/multitask_conversation.py (later
turns); processors/blip_processors.py:Blip2ImageTrainProcessor, whose resize is PIL's bicubic filter on uint8, the same
in training and evaluation.
"""

from __future__ import annotations

import re
from functools import partial

import numpy as np

from medcg_jax.data.boxes import Asked, corners
from medcg_jax.data.images import resize
from medcg_jax.data.records import DataError, Record, Turn
from medcg_jax.data.row_format import Format
from medcg_jax.families.minigpt_v2.boxes import format_boxes, parse_boxes
from medcg_jax.families.prompts import BOS, IMAGE, Prompts, Text

TASKS = ("vqa", "caption", "grounding", "refer", "identify", "detection")
_TAGGED = re.compile(rf"\[({'|'.join(TASKS)})\]( |$)")


class Instructions(Prompts):
    """Llama 2's instructions.

        <s>[INST] <Img><ImageHere></Img> [vqa] {question}  [/INST]{answer}</s>            training: two spaces
        <s><s>[INST] <Img><ImageHere></Img> [vqa] {question} [/INST]                      evaluation: one, and two <s>

    The texts before and behind the image and the answer are tokenised separately: a SentencePiece model puts a space
    before each. Tags such as `[vqa]` are plain text.
    """

    between = None

    def __init__(self, task: str = "vqa"):
        """task: one of `TASKS`, the tag for questions that begin with none; "": no tag."""
        self.task = task

    def pieces(self, turn, *, first, system_prompt, has_image, training):
        if system_prompt:
            raise DataError(f"system_prompt={system_prompt!r}: MiniGPT-v2's prompt has no system sentence; expected ''")
        question = turn.question.strip()
        if self.task and not _TAGGED.match(question):
            question = f"[{self.task}] {question}"
        # In the original, rows without an image have one space in training too.
        space = "  " if training and (has_image or not first) else " "
        if has_image:
            return [BOS, Text("[INST] <Img>"), IMAGE, Text(f"</Img> {question}{space}[/INST]")]
        return [BOS, Text(f"[INST] {question}{space}[/INST]")]

    def evaluation_prompt(self, tokenizer, turns, *, system_prompt, num_image_tokens=0):
        """As `Prompts`, with a second <s> in front.

        The original's evaluation writes <s> and its tokenizer adds another; the released figures were made so.
        """
        options = {"system_prompt": system_prompt, "num_image_tokens": num_image_tokens}
        return self._encode(tokenizer, [BOS], 0) + super().evaluation_prompt(tokenizer, turns, **options)


PROMPTS = Instructions()


def row_format(config) -> Format:
    """The format of a model's rows. config: its `MiniGPTv2Config`."""
    return Format(
        PROMPTS, partial(preprocess, size_px=config.image_size_px), config.num_image_tokens, box_turn=box_turn,
        box_question=box_question, read_boxes=read_boxes,
    )  # fmt: skip


def preprocess(image: np.ndarray, size_px: int) -> dict[str, np.ndarray]:
    """`pixels` uint8[size_px, size_px, 3] of uint8[h, w, 3]; normalised where the model runs."""
    return {"pixels": resize(image, size_px)}


def box_turn(record: Record, asked: Asked) -> Turn:
    """Question and answer as MiniGPT-v2 writes boxes."""
    return Turn(box_question(asked.question), format_boxes(corners(asked.boxes), record.size_px))


def box_question(question: str) -> str:
    """The question with MiniGPT-v2's tag for boxes; one that begins with a tag keeps its own."""
    return question if _TAGGED.match(question) else f"[detection] {question}"


def read_boxes(text: str, boxes: np.ndarray | None, size: tuple[int, int]) -> np.ndarray | None:
    return parse_boxes(text, size)
