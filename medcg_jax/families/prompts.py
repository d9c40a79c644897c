"""Conversations as token ids, with the supervised ones marked: one machine, and Vicuna's turns.

A family describes what stands before an answer as pieces: special tokens, the image, and texts that are tokenised
apart. The machine tokenises them, adds the answers, and says what is supervised: every answer and the token that ends
it. No text is tokenised twice to find the labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from medcg_jax.data.records import LETTERS, DataError, Turn
from medcg_jax.data.row_format import Tokens
from medcg_jax.data.tokenizer import Tokenizer

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


class Text(NamedTuple):
    """Text that is tokenised by itself. start: whether it opens a chunk, as in `Tokenizer.encode`."""

    text: str
    start: bool = True


# A piece is a `Text`, the name of a special token, or one of these two: the beginning of a sequence, and the image's
# token as many times as the image has features.
BOS, IMAGE = "bos", "image"
Piece = Text | str


class Prompts:
    """How one family writes conversations; a family's own class says what `pieces` are."""

    # Special token that stands for an image's features; "": the tokenizer's.
    image = ""
    # Special token that ends an answer; "": the tokenizer's.
    end = ""
    # Text behind that token, before the next turn.
    closing = ""
    # The answer is tokenised together with the last piece, with this between them; None: by itself, stripped.
    between: str | None = " "
    # Special token that is never supervised.
    unsupervised = ""

    def pieces(self, turn: Turn, *, first: bool, system_prompt: str, has_image: bool, training: bool) -> list[Piece]:
        """What stands before the answer of a turn, from the end of the turn before; the last piece is a `Text`.

        first: whether it is the first turn, which has the system's sentence and the image.

        Raises:
          DataError: the family cannot have this system prompt.
        """
        raise NotImplementedError

    def conversation(
        self, tokenizer: Tokenizer, turns: Sequence[Turn], *, system_prompt: str, num_image_tokens: int = 0
    ) -> Tokens:
        """Ids and marks of a whole conversation. num_image_tokens: how often the image's token stands; 0: no image.

        Raises:
          DataError: no turns, an empty answer (it would leave nothing to learn), text that cannot be tokenised, a
            system prompt that the family cannot have, or a tokenizer of another family.
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
        """Ids up to the place of the last turn's answer, which is not used; no space behind them.

        Raises:
          DataError: as `conversation`.
        """
        if not turns:
            raise DataError("a conversation has no turns, so there is nothing to ask")
        *earlier, last = turns
        options = {"system_prompt": system_prompt, "num_image_tokens": num_image_tokens}
        ids = self.conversation(tokenizer, earlier, **options).ids if earlier else []
        has_image = num_image_tokens > 0 and not earlier
        pieces = self.pieces(last, first=not earlier, system_prompt=system_prompt, has_image=has_image, training=False)
        return ids + self._encode(tokenizer, pieces, num_image_tokens)

    def option_ids(
        self, tokenizer: Tokenizer, turns: Sequence[Turn], num_options: int, *, system_prompt: str, has_image: bool
    ) -> list[int]:
        """The token id of each option's letter as the answer right behind the evaluation prompt.

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

    def answer(self, tokenizer: Tokenizer, last: Text, answer: str) -> list[int]:
        """The ids that an answer adds to its prompt, whose last piece is `last`; without the token that ends it."""
        if self.between is None:
            return tokenizer.encode(answer.strip())
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

    After </s> the next `USER` has no space before it, as in a slow Llama tokenizer with `legacy: false`.
    Source: haotian-liu/LLaVA (c121f04) llava/conversation.py:conv_vicuna_v1, llava/mm_utils.py:tokenizer_image_token,
    llava/train/train.py:preprocess_v1 (whose labels these are: answers with their </s>).
    """

    def pieces(self, turn, *, first, system_prompt, has_image, training):
        if not first:
            return [Text(f"USER: {turn.question} ASSISTANT:", start=False)]
        opening = self.opening(system_prompt)
        if not has_image:
            return [BOS, Text(f"{opening}{turn.question} ASSISTANT:")]
        # The original strips the turn that the image is moved to the front of.
        return [BOS, Text(opening), IMAGE, Text(f"\n{turn.question.strip()} ASSISTANT:")]

    def opening(self, system_prompt: str) -> str:
        """What stands before the image. system_prompt: "vicuna" is LLaVA-1.5's sentence; anything else, itself."""
        system = VICUNA if system_prompt == "vicuna" else system_prompt
        return f"{system} USER: " if system else "USER: "
