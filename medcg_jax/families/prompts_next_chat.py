"""NExT-Chat's conversations as token ids, with the supervised ones marked, and the places of boxes in them.

    <system> USER: <im_start><im_patch>...<im_end> Where is it? ASSISTANT: Answer: <at> <boxes> .</s>

Vicuna's turns, as LLaVA's. A box is spelled `<at> <boxes>` in questions and answers; `<boxes>` itself is never
supervised. Text is cut at the added tokens and each piece tokenised apart: spaces beside an added token are swallowed,
and pieces but the first are cut into words as after a space, without it (`Tokenizer.encode_behind_added`), as a slow
Llama tokenizer with `legacy: false` has it in transformers 4.31 (later versions differ).
Source: NExT-ChatV/NExT-Chat (1e6c20f) mllm/dataset/process_function/chat_process_function.py,
box_process_function.py:BoxFormatProcess, models/nextchat/nextchat_base.py:generate_rec.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from medcg_jax.data.records import LETTERS, DataError, Turn
from medcg_jax.data.row_format import Tokens
from medcg_jax.data.tokenizer import IMAGE, Tokenizer
from medcg_jax.families.prompts import system_text

PATCH, START, END, AT, BOX = "<im_patch>", "<im_start>", "<im_end>", "<at>", "<boxes>"
_ADDED = re.compile(f"({AT}|{BOX})")


class _Round(NamedTuple):
    """One exchange: text that opens the sequence before an image, the prompt, and whether it opens a chunk."""

    before_image: str | None
    prompt: str
    start: bool


def box_answer(num_boxes: int) -> str:
    """The answer to where something is: "Answer: <at> <boxes> ." for one box, that many pairs for several."""
    return f"Answer: {' '.join([f'{AT} {BOX}'] * num_boxes)} ."


def conversation(
    tokenizer: Tokenizer, turns: Sequence[Turn], *, system_prompt: str, num_image_tokens: int = 0
) -> Tokens:
    """Ids and marks of a whole conversation, the image's placeholder repeated `num_image_tokens` times (0: no image).

    Raises:
      DataError: no turns, an empty answer (it would leave nothing to learn), text that cannot be tokenised, or a
        tokenizer without the added tokens.
    """
    if not turns:
        raise DataError("a conversation has no turns, so no token is supervised")
    ids, marks = _open(tokenizer)
    unsupervised = tokenizer.special(BOX)
    for number, (turn, part) in enumerate(zip(turns, _rounds(turns, system_prompt, num_image_tokens > 0), strict=True)):
        if not turn.answer.strip():
            raise DataError(f"the answer of turn {number + 1} is empty, so no token of it is supervised")
        answer = [*_answer(tokenizer, part, turn.answer), tokenizer.eos_id]
        prompt = _prompt(tokenizer, part, num_image_tokens)
        ids += prompt + answer
        marks += [False] * len(prompt) + [i != unsupervised for i in answer]
    return Tokens(ids, marks)


def evaluation_prompt(
    tokenizer: Tokenizer, turns: Sequence[Turn], *, system_prompt: str, num_image_tokens: int = 0
) -> list[int]:
    """Ids up to and including the last `ASSISTANT:`; no space behind it, and the last turn's answer is not used."""
    if not turns:
        raise DataError("a conversation has no turns, so there is nothing to ask")
    rest = dict(system_prompt=system_prompt, num_image_tokens=num_image_tokens)
    ids = conversation(tokenizer, turns[:-1], **rest).ids if turns[:-1] else _open(tokenizer).ids
    return ids + _prompt(tokenizer, _rounds(turns, system_prompt, num_image_tokens > 0)[-1], num_image_tokens)


def rec_prompt(
    tokenizer: Tokenizer, turns: Sequence[Turn], *, system_prompt: str, num_image_tokens: int = 0
) -> tuple[list[int], int]:
    """(the evaluation prompt with a whole answer of one box behind it, the position of that answer's `<at>`).

    The original evaluates boxes so: nothing is generated, the box is decoded at `<at>`.
    """
    rest = dict(system_prompt=system_prompt, num_image_tokens=num_image_tokens)
    ids = evaluation_prompt(tokenizer, turns, **rest)
    part = _rounds(turns, system_prompt, num_image_tokens > 0)[-1]
    answer = [*_answer(tokenizer, part, box_answer(1)), tokenizer.eos_id]
    return ids + answer, len(ids) + answer.index(tokenizer.special(AT))


def option_ids(
    tokenizer: Tokenizer, turns: Sequence[Turn], num_options: int, *, system_prompt: str, has_image: bool
) -> list[int]:
    """The token id of each option's letter right after the evaluation prompt's last token.

    Raises:
      DataError: a letter would change the prompt's tokens, is not one token, or shares its id with another.
    """
    part = _rounds(turns, system_prompt, has_image)[-1]
    *before, last = _ADDED.split(part.prompt)
    last = last.lstrip() if before or part.before_image is not None else last
    return tokenizer.letter_ids(last, LETTERS[:num_options], part.start and not before)


def template(turns: Sequence[Turn], *, system_prompt: str, has_image: bool) -> str:
    """The conversation as one text, with `<image>` and `</s>` spelled out: what reports show."""
    rounds = _rounds(turns, system_prompt, has_image)
    return "".join(
        ("" if part.before_image is None else part.before_image + IMAGE) + f"{part.prompt} {turn.answer}</s>"
        for turn, part in zip(turns, rounds, strict=True)
    )


def box_arrays(
    tokenizer: Tokenizer, tokens: Tokens, boxes: np.ndarray, *, max_boxes: int, max_answers: int
) -> dict[str, np.ndarray]:
    """What a row of `train.losses.box_terms` has of boxes: those of the whole text, and those in answers with their `<at>`.

    `boxes` float32[max_boxes, 4], `box_weights` float32[max_boxes], `at_positions` int32[max_answers], `at_boxes`
    float32[max_answers, 4], `at_weights` float32[max_answers]; weights are 0 where unused.

    Args:
      boxes: [N, 4] in 0 to 1 of the padded square, one for each `<boxes>` of the text, in reading order.

    Raises:
      DataError: another number of boxes than the text has, or more than fit.
    """
    at, box = tokenizer.special(AT), tokenizer.special(BOX)
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
    places = [place for place, i in enumerate(tokens.ids) if i == box]
    if len(places) != len(boxes):
        raise DataError(f"{len(boxes)} boxes for {len(places)} {BOX} in the text")
    answered = [n for n, place in enumerate(places) if tokens.ids[place - 1] == at and tokens.supervised[place - 1]]
    if len(boxes) > max_boxes or len(answered) > max_answers:
        raise DataError(f"{len(boxes)} boxes, {len(answered)} in answers; at most {max_boxes} and {max_answers} fit")
    found = {
        "boxes": np.zeros((max_boxes, 4), np.float32), "box_weights": np.zeros(max_boxes, np.float32),
        "at_positions": np.zeros(max_answers, np.int32), "at_boxes": np.zeros((max_answers, 4), np.float32),
        "at_weights": np.zeros(max_answers, np.float32),
    }  # fmt: skip
    found["boxes"][: len(boxes)], found["box_weights"][: len(boxes)] = boxes, 1
    found["at_positions"][: len(answered)] = [places[n] - 1 for n in answered]
    found["at_boxes"][: len(answered)], found["at_weights"][: len(answered)] = boxes[answered], 1
    return found


def _open(tokenizer: Tokenizer) -> Tokens:
    first = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return Tokens(first, [False] * len(first))


def _rounds(turns: Sequence[Turn], system_prompt: str, has_image: bool) -> list[_Round]:
    system = system_text(system_prompt)
    opening = f"{system} " if system else ""
    first = turns[0].question
    if has_image:
        rounds = [_Round(f"{opening}USER: ", f" {first.strip()} ASSISTANT:", False)]
    else:
        rounds = [_Round(None, f"{opening}USER: {first} ASSISTANT:", True)]
    return rounds + [_Round(None, f"USER: {turn.question} ASSISTANT:", False) for turn in turns[1:]]


def _prompt(tokenizer: Tokenizer, part: _Round, num_image_tokens: int) -> list[int]:
    ids: list[int] = []
    if part.before_image is not None:
        image = [tokenizer.special(PATCH)] * num_image_tokens
        ids = [*tokenizer.encode(part.before_image.rstrip()), tokenizer.special(START), *image, tokenizer.special(END)]
    return ids + _encode(tokenizer, part, part.prompt)


def _answer(tokenizer: Tokenizer, part: _Round, answer: str) -> list[int]:
    """What the answer adds to its prompt's tokens; </s> swallows the spaces before it."""
    prompt = _encode(tokenizer, part, part.prompt)
    whole = _encode(tokenizer, part, f"{part.prompt} {answer.rstrip()}")
    if whole[: len(prompt)] != prompt:
        raise DataError(f"the answer {answer[:40]!r} changes the tokens of its prompt")
    return whole[len(prompt) :]


def _encode(tokenizer: Tokenizer, part: _Round, text: str) -> list[int]:
    """Ids of a text of the round with `<at>` and `<boxes>` in it; behind an image, its spaces in front are dropped."""
    ids: list[int] = []
    pieces = _ADDED.split(text)
    for number, piece in enumerate(pieces):
        if number % 2:
            ids.append(tokenizer.special(piece))
            continue
        piece = piece.lstrip() if number or part.before_image is not None else piece
        piece = piece.rstrip() if number < len(pieces) - 1 else piece
        if piece:
            opens = part.start and not number
            ids += tokenizer.encode(piece) if opens else tokenizer.encode_behind_added(piece)
    return ids
