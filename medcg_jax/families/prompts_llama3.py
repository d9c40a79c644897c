"""Llama 3 conversations as token ids, with the supervised ones marked.

    <|begin_of_text|><|start_header_id|>user<|end_header_id|>\\n\\n<|image|>{question}<|eot_id|>
    <|start_header_id|>assistant<|end_header_id|>\\n\\n{answer}<|eot_id|>...      (one line, without the break)

Built piece by piece, as Meta's own code does: special tokens by id, what a header ends in (two line breaks), and the
stripped text, each tokenised apart. So an answer's first token has no space before it, and is the same in training and
evaluation. An image is one token, which opens the first question. A system prompt is a turn of its own.
Source: meta-llama/llama-models:llama3/chat_format.py at a9c89c4; the same ids as the whole text's by Llama 3's
tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence

from medcg_jax.data.records import LETTERS, DataError, Turn
from medcg_jax.data.row_format import Tokens
from medcg_jax.data.tokenizer import Tokenizer

BEGIN, START, END, TURN_END = "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
IMAGE = "<|image|>"
BREAK = "\n\n"


def conversation(
    tokenizer: Tokenizer, turns: Sequence[Turn], *, system_prompt: str, num_image_tokens: int = 0
) -> Tokens:
    """Ids and marks of a whole conversation; num_image_tokens: 1 with an image, 0 without.

    Raises:
      DataError: no turns, an empty answer (it would leave nothing to learn), text that cannot be tokenised, or a
        tokenizer of another family.
    """
    if not turns:
        raise DataError("a conversation has no turns, so no token is supervised")
    ids = _open(tokenizer, system_prompt)
    marks = [False] * len(ids)
    for number, turn in enumerate(turns):
        answer = turn.answer.strip()
        if not answer:
            raise DataError(f"the answer of turn {number + 1} is empty, so no token of it is supervised")
        asked = _question(tokenizer, turn, 0 if number else num_image_tokens)
        said = [*tokenizer.encode(answer), tokenizer.special(TURN_END)]
        ids += asked + said
        marks += [False] * len(asked) + [True] * len(said)
    return Tokens(ids, marks)


def evaluation_prompt(
    tokenizer: Tokenizer, turns: Sequence[Turn], *, system_prompt: str, num_image_tokens: int = 0
) -> list[int]:
    """Ids up to and including the last assistant header's line breaks; the last turn's answer is not used."""
    if not turns:
        raise DataError("a conversation has no turns, so there is nothing to ask")
    *earlier, last = turns
    if not earlier:
        return _open(tokenizer, system_prompt) + _question(tokenizer, last, num_image_tokens)
    said = conversation(tokenizer, earlier, system_prompt=system_prompt, num_image_tokens=num_image_tokens)
    return said.ids + _question(tokenizer, last, 0)


def option_ids(
    tokenizer: Tokenizer, turns: Sequence[Turn], num_options: int, *, system_prompt: str, has_image: bool
) -> list[int]:
    """The token id of each option's letter right after the evaluation prompt: without a space.

    Raises:
      DataError: a letter is not one token, or shares its id with another.
    """
    found = []
    for letter in LETTERS[:num_options]:
        ids = tokenizer.encode(letter)
        if len(ids) != 1:
            raise DataError(f"option {letter!r} is {len(ids)} tokens; one is needed to score it")
        found += ids
    if len(set(found)) != len(found):
        raise DataError(f"options {', '.join(LETTERS[:num_options])} share a token: ids {found}")
    return found


def template(turns: Sequence[Turn], *, system_prompt: str, has_image: bool) -> str:
    """The conversation as one text, special tokens spelled out: what reports show."""
    text = BEGIN + (_spelled("system", system_prompt) if system_prompt else "")
    for number, turn in enumerate(turns):
        image = IMAGE if has_image and not number else ""
        text += _spelled("user", image + turn.question.strip()) + _spelled("assistant", turn.answer)
    return text


def _spelled(role: str, text: str) -> str:
    return f"{START}{role}{END}{BREAK}{text.strip()}{TURN_END}"


def _open(tokenizer: Tokenizer, system_prompt: str) -> list[int]:
    if system_prompt == "vicuna":
        raise DataError("system_prompt='vicuna' is LLaVA-1.5's sentence; the text itself is accepted, or '' for none")
    ids = [tokenizer.special(BEGIN)]
    if system_prompt:
        ids += [*_header(tokenizer, "system"), *tokenizer.encode(system_prompt.strip()), tokenizer.special(TURN_END)]
    return ids


def _header(tokenizer: Tokenizer, role: str) -> list[int]:
    return [tokenizer.special(START), *tokenizer.encode(role), tokenizer.special(END), *tokenizer.encode(BREAK)]


def _question(tokenizer: Tokenizer, turn: Turn, num_image_tokens: int) -> list[int]:
    """A user's turn, and the assistant's header behind it."""
    ids = _header(tokenizer, "user") + [tokenizer.special(IMAGE)] * num_image_tokens
    ids += [*tokenizer.encode(turn.question.strip()), tokenizer.special(TURN_END)]
    return ids + _header(tokenizer, "assistant")
