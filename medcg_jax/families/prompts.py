"""Conversations as token ids with marks for the supervised ones; Vicuna's turns.

A family describes the prompt before an answer as pieces: special tokens, the image, and texts that are tokenised
separately. `Prompts` tokenises them, adds the answers, and marks every answer and its end token as supervised.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from medcg_jax.data.records import LETTERS, DataError, Turn
from medcg_jax.data.row_format import Tokens
from medcg_jax.data.tokenizer import Tokenizer

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


class Text(NamedTuple):
    """Text that is tokenised separately. start: whether it opens a chunk, as in `Tokenizer.encode`."""

    text: str
    start: bool = True


# A piece is a `Text`, the name of a special token, `BOS` (the begin token), or `IMAGE` (the image's token, once for
# each of its features).
BOS, IMAGE = "bos", "image"
Piece = Text | str


class Prompts:
    """How a family writes conversations; each family has a subclass with its `pieces`."""

    # Special token for an image's features; "": the tokenizer's.
    image = ""
    # Special token that ends an answer; "": the tokenizer's.
    end = ""
    # Text behind that token, before the next turn.
    closing = ""
    # The text between the last piece and the answer, which are tokenised together; None: the answer is stripped and
    # tokenised separately.
    between: str | None = " "
    # Special token that is never supervised.
    unsupervised = ""
    # The system prompt that the family was released with, as `data.system_prompt` names it.
    released_system_prompt = ""

    def pieces(self, turn: Turn, *, first: bool, system_prompt: str, has_image: bool, training: bool) -> list[Piece]:
        """The pieces between the end of the previous turn and the answer of this one; the last is a `Text`.

        first: whether this is the first turn, with the system prompt and the image.

        Raises:
          DataError: the family does not support this system prompt.
        """
        raise NotImplementedError

    def conversation(
        self, tokenizer: Tokenizer, turns: Sequence[Turn], *, system_prompt: str, num_image_tokens: int = 0
    ) -> Tokens:
        """Ids and marks of a whole conversation. num_image_tokens: repeats of the image's token; 0: no image.

        Raises:
          DataError: no turns, an empty answer, text that cannot be tokenised, a system prompt that the family does not
            support, or a tokenizer of another family.
        """
        if not turns:
            raise DataError("a conversation has no turns, so no token is supervised")
        unsupervised = tokenizer.special(self.unsupervised) if self.unsupervised else None
        ids: list[int] = []
        supervised: list[bool] = []
        for number, turn in enumerate(turns):
            if not turn.answer.strip():
                raise DataError(f"the answer of turn {number + 1} is empty, so no token of it is supervised")
            has_image = num_image_tokens > 0 and not number
            pieces = self.pieces(
                turn, first=not number, system_prompt=system_prompt, has_image=has_image, training=True
            )
            prompt = self._encode(tokenizer, pieces, num_image_tokens)
            end = tokenizer.special(self.end) if self.end else tokenizer.eos_id
            answer = [*self.answer(tokenizer, pieces[-1], turn.answer), end]
            closing = tokenizer.encode(self.closing) if self.closing else []
            ids += prompt + answer + closing
            supervised += [False] * len(prompt) + [i != unsupervised for i in answer] + [False] * len(closing)
        return Tokens(ids, supervised)

    def evaluation_prompt(
        self, tokenizer: Tokenizer, turns: Sequence[Turn], *, system_prompt: str, num_image_tokens: int = 0
    ) -> list[int]:
        """Ids up to where the last turn's answer would begin, without a space at the end.

        Raises:
          DataError: as `conversation`.
        """
        if not turns:
            raise DataError("a conversation has no turns, so there is nothing to ask")
        *earlier, last = turns
        options: Any = {"system_prompt": system_prompt, "num_image_tokens": num_image_tokens}
        ids = self.conversation(tokenizer, earlier, **options).ids if earlier else []
        has_image = num_image_tokens > 0 and not earlier
        pieces = self.pieces(last, first=not earlier, system_prompt=system_prompt, has_image=has_image, training=False)
        return ids + self._encode(tokenizer, pieces, num_image_tokens)

    def option_ids(
        self, tokenizer: Tokenizer, turns: Sequence[Turn], num_options: int, *, system_prompt: str, has_image: bool
    ) -> list[int]:
        """The token id of each option's letter, as the answer directly behind the evaluation prompt.

        Raises:
          DataError: a letter would change the prompt's tokens, is not one token, or shares its id with another.
        """
        first, letters = len(turns) == 1, LETTERS[:num_options]
        last = self.pieces(
            turns[-1], first=first, system_prompt=system_prompt, has_image=has_image and first, training=False
        )[-1]
        ids = []
        for letter in letters:
            answer = self.answer(tokenizer, last, letter)
            if len(answer) != 1:
                raise DataError(f"option {letter!r} is {len(answer)} tokens; one is needed to score it")
            ids += answer
        if len(set(ids)) != len(ids):
            raise DataError(f"options {', '.join(letters)} share a token: ids {ids}")
        return ids

    def answer(self, tokenizer: Tokenizer, last: Piece, answer: str) -> list[int]:
        """The ids that an answer adds behind a prompt with the last piece `last`, without the token that ends it."""
        if self.between is None:
            return tokenizer.encode(answer.strip())
        assert isinstance(last, Text)
        prompt = self.encode_text(tokenizer, last)
        whole = self.encode_text(tokenizer, Text(f"{last.text}{self.between}{answer}", last.start))
        if whole[: len(prompt)] != prompt:
            raise DataError(f"the answer {answer[:40]!r} changes the tokens of its prompt")
        return whole[len(prompt) :]

    def encode_text(self, tokenizer: Tokenizer, piece: Text) -> list[int]:
        return tokenizer.encode(piece.text, piece.start)

    def _encode(self, tokenizer: Tokenizer, pieces: Sequence[Piece], num_image_tokens: int) -> list[int]:
        ids: list[int] = []
        for piece in pieces:
            if isinstance(piece, Text):
                ids += self.encode_text(tokenizer, piece)
            elif piece == IMAGE:
                ids += [tokenizer.special(self.image) if self.image else tokenizer.image_id] * num_image_tokens
            elif piece == BOS:
                ids += [] if tokenizer.bos_id is None else [tokenizer.bos_id]
            else:
                ids.append(tokenizer.special(piece))
        return ids


class Vicuna(Prompts):
    """Vicuna v1, as LLaVA-1.5 writes it.

        <system> USER: <image>\\n{question} ASSISTANT: {answer}</s>USER: {question} ASSISTANT: {answer}</s>

    There is no space between </s> and the next `USER`, as in a slow Llama tokenizer with `legacy: false`.
    Source: haotian-liu/LLaVA (c121f04) llava/conversation.py:conv_vicuna_v1, llava/mm_utils.py:tokenizer_image_token,
    llava/train/train.py:preprocess_v1 (the labels: answers with their </s>).
    """

    released_system_prompt = "vicuna"

    def pieces(self, turn, *, first, system_prompt, has_image, training):
        if not first:
            return [Text(f"USER: {turn.question} ASSISTANT:", start=False)]
        opening = self.opening(system_prompt)
        if not has_image:
            return [BOS, Text(f"{opening}{turn.question} ASSISTANT:")]
        # The original strips the turn in which it moves the image to the front.
        return [BOS, Text(opening), IMAGE, Text(f"\n{turn.question.strip()} ASSISTANT:")]

    def opening(self, system_prompt: str) -> str:
        """The text before the image. system_prompt: "vicuna" for LLaVA-1.5's sentence, or a text."""
        system = VICUNA if system_prompt == "vicuna" else system_prompt
        return f"{system} USER: " if system else "USER: "
