"""MiniGPT-v2's conversations as token ids, with the supervised ones marked.

    <s>[INST] <Img><ImageHere></Img> [vqa] {question}  [/INST]{answer}</s>            training: two spaces
    <s><s>[INST] <Img><ImageHere></Img> [vqa] {question} [/INST]                      evaluation: one, and two <s>

What stands before the image, behind it, and the answer are tokenised apart, each as a text of its own: a SentencePiece
model puts a space before each. `[vqa]` and its like are plain text.
Source: Vision-CAIR/MiniGPT-4 (d94738a) minigpt4/models/minigpt_base.py:prompt_wrap, preparing_embedding,
get_context_emb; conversation/conversation.py:CONV_VISION_minigptv2; datasets/datasets/multitask_conversation.py (later
turns).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from medcg_jax.data.records import LETTERS, DataError, Turn
from medcg_jax.data.row_format import Tokens
from medcg_jax.data.tokenizer import Tokenizer

TASKS = ("vqa", "caption", "grounding", "refer", "identify", "detection")
IMAGE = "<ImageHere>"
_TAGGED = re.compile(rf"\[({'|'.join(TASKS)})\]( |$)")


def conversation(
    tokenizer: Tokenizer, turns: Sequence[Turn], *, system_prompt: str, num_image_tokens: int = 0, task: str = "vqa"
) -> Tokens:
    """Ids and marks of a whole conversation in the training form.

    num_image_tokens: times that the image's placeholder stands in the first turn; 0: no image.
    system_prompt: "", since the model has none.
    task: what a question that does not open with `[task]` itself is tagged with; "": nothing.

    Raises:
      DataError: no turns, an empty answer (it would leave nothing to learn), text that cannot be tokenised, an unknown
        task, or a system prompt.
    """
    _check(turns, system_prompt, task)
    ids: list[int] = []
    marks: list[bool] = []
    for number, turn in enumerate(turns):
        answer = turn.answer.strip()
        if not answer:
            raise DataError(f"the answer of turn {number + 1} is empty, so no token of it is supervised")
        has_image = num_image_tokens > 0 and not number
        asked = _asked(turn, task, has_image, not number, "  ")
        prompt = _opening(tokenizer) + _ids(tokenizer, asked, num_image_tokens)
        said = [*tokenizer.encode(answer), tokenizer.eos_id]
        ids += prompt + said
        marks += [False] * len(prompt) + [True] * len(said)
    return Tokens(ids, marks)


def evaluation_prompt(
    tokenizer: Tokenizer,
    turns: Sequence[Turn],
    *,
    system_prompt: str,
    num_image_tokens: int = 0,
    task: str = "vqa",
    double_bos: bool = True,
) -> list[int]:
    """Ids up to and including the last `[/INST]`; the last turn's answer is not used, earlier turns are as in training.

    double_bos: the original's evaluation spells <s> out and lets its tokenizer put another one, and the released
      model's figures were made so; False: one.

    Raises:
      DataError: as `conversation`.
    """
    _check(turns, system_prompt, task)
    *earlier, last = turns
    rest = dict(system_prompt=system_prompt, num_image_tokens=num_image_tokens, task=task)
    ids = _opening(tokenizer) if double_bos else []
    ids += conversation(tokenizer, earlier, **rest).ids if earlier else []
    has_image = num_image_tokens > 0 and not earlier
    asked = _asked(last, task, has_image, not earlier, " ")
    return ids + _opening(tokenizer) + _ids(tokenizer, asked, num_image_tokens)


def option_ids(
    tokenizer: Tokenizer, turns: Sequence[Turn], num_options: int, *, system_prompt: str, has_image: bool
) -> list[int]:
    """The token id of each option's letter as an answer: tokenised alone, as in training.

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


def template(turns: Sequence[Turn], *, system_prompt: str, has_image: bool, task: str = "vqa") -> str:
    """The conversation in the training form as one text, <s>, </s> and the image spelled out: for reports."""
    return "".join(
        f"<s>{IMAGE.join(_asked(turn, task, has_image and not number, not number, '  '))}{turn.answer.strip()}</s>"
        for number, turn in enumerate(turns)
    )


def _check(turns: Sequence[Turn], system_prompt: str, task: str) -> None:
    if not turns:
        raise DataError("a conversation has no turns, so nothing is asked")
    if system_prompt:
        raise DataError(f"system_prompt={system_prompt!r}: MiniGPT-v2's prompt has no system sentence; '' is accepted")
    if task and task not in TASKS:
        raise DataError(f"task={task!r}; accepted: {', '.join(TASKS)}, or '' for none")


def _asked(turn: Turn, task: str, has_image: bool, is_first: bool, space: str) -> list[str]:
    """The prompt's pieces of text: one, or what stands before and behind the image. space: before `[/INST]`."""
    question = turn.question.strip()
    if task and not _TAGGED.match(question):
        question = f"[{task}] {question}"
    if has_image:
        return ["[INST] <Img>", f"</Img> {question}{space}[/INST]"]
    # The original's rows of text alone have one space in training too.
    return [f"[INST] {question}{' ' if is_first else space}[/INST]"]


def _opening(tokenizer: Tokenizer) -> list[int]:
    return [] if tokenizer.bos_id is None else [tokenizer.bos_id]


def _ids(tokenizer: Tokenizer, pieces: list[str], num_image_tokens: int) -> list[int]:
    *before, last = (tokenizer.encode(piece) for piece in pieces)
    image = [tokenizer.image_id] * num_image_tokens
    return [*(before[0] + image if before else []), *last]
