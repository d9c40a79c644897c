"""Vicuna v1 conversations as token ids, with the supervised ones marked.

    <system> USER: <image>\\n{question} ASSISTANT: {answer}</s>USER: {question} ASSISTANT: {answer}</s>

Built piece by piece: the text before and after an image is tokenised apart, as the original does, and an answer's
tokens are what it adds to its prompt's, so the labels need no second tokenisation of the whole.
Source: haotian-liu/LLaVA (c121f04) llava/conversation.py:conv_vicuna_v1, llava/mm_utils.py:tokenizer_image_token,
llava/train/train.py:preprocess_v1 (whose labels these are: answers with their </s>). After </s> the next `USER` has no
space before it, as in a slow Llama tokenizer with `legacy: false`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

from medcg_jax.data.records import LETTERS, DataError, Turn
from medcg_jax.data.row_format import Tokens
from medcg_jax.data.tokenizer import IMAGE, Tokenizer

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


class _Round(NamedTuple):
    """One exchange: text that opens the sequence before an image, the prompt, and whether it opens a chunk."""

    before_image: str | None
    prompt: str
    start: bool


def system_text(system_prompt: str) -> str:
    """The sentence before the first turn: `vicuna` means LLaVA-1.5's, anything else itself."""
    return VICUNA if system_prompt == "vicuna" else system_prompt


def conversation(
    tokenizer: Tokenizer, turns: Sequence[Turn], *, system_prompt: str, num_image_tokens: int = 0
) -> Tokens:
    """Ids and marks of a whole conversation, the image's placeholder repeated `num_image_tokens` times (0: no image).

    Raises:
      DataError: no turns, an empty answer (it would leave nothing to learn), or text that cannot be tokenised.
    """
    if not turns:
        raise DataError("a conversation has no turns, so no token is supervised")
    ids, marks = _open(tokenizer)
    for number, (turn, part) in enumerate(zip(turns, _rounds(turns, system_prompt, num_image_tokens > 0), strict=True)):
        if not turn.answer.strip():
            raise DataError(f"the answer of turn {number + 1} is empty, so no token of it is supervised")
        prompt = _add_prompt(tokenizer, part, num_image_tokens, ids, marks)
        whole = tokenizer.encode(f"{part.prompt} {turn.answer}", part.start)
        if whole[: len(prompt)] != prompt:
            raise DataError(f"the answer {turn.answer[:40]!r} changes the tokens of its prompt")
        answer = [*whole[len(prompt) :], tokenizer.eos_id]
        ids += answer
        marks += [True] * len(answer)
    return Tokens(ids, marks)


def evaluation_prompt(
    tokenizer: Tokenizer, turns: Sequence[Turn], *, system_prompt: str, num_image_tokens: int = 0
) -> list[int]:
    """Ids up to and including the last `ASSISTANT:`; no space behind it, and the last turn's answer is not used."""
    if not turns:
        raise DataError("a conversation has no turns, so there is nothing to ask")
    earlier, last = turns[:-1], len(turns) - 1
    if earlier:
        ids, marks = conversation(tokenizer, earlier, system_prompt=system_prompt, num_image_tokens=num_image_tokens)
    else:
        ids, marks = _open(tokenizer)
    part = _rounds(turns, system_prompt, num_image_tokens > 0)[last]
    _add_prompt(tokenizer, part, num_image_tokens, ids, marks)
    return ids


def option_ids(tokenizer: Tokenizer, turns: Sequence[Turn], num_options: int, *, system_prompt: str, has_image: bool):
    """list[int]: the token id of each option's letter right after the evaluation prompt's last token.

    Raises:
      DataError: a letter would change the prompt's tokens, is not one token, or shares its id with another.
    """
    part = _rounds(turns, system_prompt, has_image)[-1]
    return tokenizer.letter_ids(part.prompt, LETTERS[:num_options], part.start)


def template(turns: Sequence[Turn], *, system_prompt: str, has_image: bool) -> str:
    """The conversation as one text, with `<image>` and `</s>` spelled out: what reports show."""
    rounds = _rounds(turns, system_prompt, has_image)
    return "".join(
        ("" if part.before_image is None else part.before_image + IMAGE) + f"{part.prompt} {turn.answer}</s>"
        for turn, part in zip(turns, rounds, strict=True)
    )


def fingerprint(tokenizer: Tokenizer, system_prompt: str) -> str:
    """A digest of the prompt's format and of the tokens it becomes: two runs with equal ones asked alike."""
    turns = (Turn("Is it?\nA: no\nB: yes", "B"), Turn("Is it?\nA: yes\nB: no", "A"))
    texts = [template(turns, system_prompt=system_prompt, has_image=has_image) for has_image in (True, False)]
    return hashlib.sha256("\0".join([*texts, tokenizer.fingerprint]).encode()).hexdigest()[:16]


def _open(tokenizer: Tokenizer) -> Tokens:
    first = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return Tokens(first, [False] * len(first))


def _rounds(turns: Sequence[Turn], system_prompt: str, has_image: bool) -> list[_Round]:
    system = system_text(system_prompt)
    opening = f"{system} " if system else ""
    first = turns[0].question
    rounds = []
    if has_image:
        # The original strips the turn that the image is moved to the front of.
        rounds.append(_Round(f"{opening}USER: ", f"\n{first.strip()} ASSISTANT:", True))
    else:
        rounds.append(_Round(None, f"{opening}USER: {first} ASSISTANT:", True))
    rounds += [_Round(None, f"USER: {turn.question} ASSISTANT:", False) for turn in turns[1:]]
    return rounds


def _add_prompt(tokenizer: Tokenizer, part: _Round, num_image_tokens: int, ids: list[int], marks: list[bool]):
    """Appends the round's prompt to both lists; list[int]: the ids of its last chunk."""
    size = len(ids)
    if part.before_image is not None:
        ids += tokenizer.encode(part.before_image)
        ids += [tokenizer.image_id] * num_image_tokens
    prompt = tokenizer.encode(part.prompt, part.start)
    ids += prompt
    marks += [False] * (len(ids) - size)
    return prompt
