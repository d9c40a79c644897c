"""ChatML conversations as token ids, with the supervised ones marked: Qwen2-VL's prompt.

    <|im_start|>system\\n{system}<|im_end|>\\n
    <|im_start|>user\\n<|vision_start|><|image_pad|><|vision_end|>{question}<|im_end|>\\n
    <|im_start|>assistant\\n{answer}<|im_end|>\\n

written without line breaks but those spelled out. Built piece by piece: special tokens by their ids, the text between
two of them by itself. An answer follows `assistant\\n` without a space, and its letters have other ids than after one.
Source: the chat template of Qwen/Qwen2-VL-7B-Instruct; the labels are the answers with their <|im_end|>.
"""

from __future__ import annotations

from collections.abc import Sequence

from medcg_jax.data.records import LETTERS, DataError, Turn
from medcg_jax.data.row_format import Tokens
from medcg_jax.data.tokenizer import Tokenizer

QWEN2 = "You are a helpful assistant."
START, END = "<|im_start|>", "<|im_end|>"
BEFORE_IMAGE, IMAGE, AFTER_IMAGE = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"
ANSWERS = "assistant\n"


def system_text(system_prompt: str) -> str:
    """The system's sentence: `qwen2` means Qwen2-VL's, anything else itself; "" leaves the system out.

    Raises:
      DataError: the name is that of another model's sentence.
    """
    if system_prompt == "vicuna":
        raise DataError("data.system_prompt='vicuna' is LLaVA-1.5's; here 'qwen2' or a sentence is accepted")
    return QWEN2 if system_prompt == "qwen2" else system_prompt


def conversation(
    tokenizer: Tokenizer, turns: Sequence[Turn], *, system_prompt: str, num_image_tokens: int = 0
) -> Tokens:
    """Ids and marks of a whole conversation, the image's placeholder repeated `num_image_tokens` times (0: no image).

    Raises:
      DataError: no turns, an empty answer (it would leave nothing to learn), or text that cannot be tokenised.
    """
    if not turns:
        raise DataError("a conversation has no turns, so no token is supervised")
    ids: list[int] = []
    marks: list[bool] = []
    for number, turn in enumerate(turns):
        if not turn.answer.strip():
            raise DataError(f"the answer of turn {number + 1} is empty, so no token of it is supervised")
        ids += _encode(tokenizer, _pieces(turns, number, system_prompt, num_image_tokens))
        prompt, whole = tokenizer.encode(ANSWERS), tokenizer.encode(ANSWERS + turn.answer)
        if whole[: len(prompt)] != prompt:
            raise DataError(f"the answer {turn.answer[:40]!r} changes the tokens of its prompt")
        answer = [*whole[len(prompt) :], tokenizer.special(END)]
        closing = tokenizer.encode("\n")
        marks += [False] * (len(ids) - len(marks)) + [True] * len(answer) + [False] * len(closing)
        ids += answer + closing
    return Tokens(ids, marks)


def evaluation_prompt(
    tokenizer: Tokenizer, turns: Sequence[Turn], *, system_prompt: str, num_image_tokens: int = 0
) -> list[int]:
    """Ids up to and including the last `assistant\\n`; the last turn's answer is not used."""
    if not turns:
        raise DataError("a conversation has no turns, so there is nothing to ask")
    rest = dict(system_prompt=system_prompt, num_image_tokens=num_image_tokens)
    earlier = conversation(tokenizer, turns[:-1], **rest).ids if len(turns) > 1 else []
    return earlier + _encode(tokenizer, _pieces(turns, len(turns) - 1, system_prompt, num_image_tokens))


def option_ids(tokenizer: Tokenizer, turns: Sequence[Turn], num_options: int, *, system_prompt: str, has_image: bool):
    """list[int]: the token id of each option's letter right after the evaluation prompt's last token.

    Raises:
      DataError: a letter would change the prompt's tokens, is not one token, or shares its id with another.
    """
    return tokenizer.letter_ids(ANSWERS, LETTERS[:num_options], between="")


def template(turns: Sequence[Turn], *, system_prompt: str, has_image: bool) -> str:
    """The conversation as one text, with the special tokens spelled out: what reports show."""
    return "".join(
        f"{''.join(_pieces(turns, number, system_prompt, int(has_image)))}{turn.answer}{END}\n"
        for number, turn in enumerate(turns)
    )


def _pieces(turns: Sequence[Turn], number: int, system_prompt: str, num_image_tokens: int) -> list[str]:
    """What stands before the answer of turn `number`, from the end of the turn before: special tokens, and texts."""
    system = system_text(system_prompt)
    question = turns[number].question
    pieces = [START, f"system\n{system}", END, "\n"] if system and not number else []
    if num_image_tokens and not number:
        pieces += [START, "user\n", BEFORE_IMAGE, *[IMAGE] * num_image_tokens, AFTER_IMAGE, question]
    else:
        pieces += [START, f"user\n{question}"]
    return [*pieces, END, "\n", START, ANSWERS]


def _encode(tokenizer: Tokenizer, pieces: Sequence[str]) -> list[int]:
    specials = {name: [tokenizer.special(name)] for name in (START, END, BEFORE_IMAGE, IMAGE, AFTER_IMAGE)}
    return [i for piece in pieces for i in specials.get(piece) or tokenizer.encode(piece)]
