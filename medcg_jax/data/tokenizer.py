"""Text to token ids and back, from a `tokenizer.json`, a SentencePiece model, or a directory with either.

Pieces of text are encoded without special tokens: `prompts` puts those itself. What tools do to the spaces beside
special tokens differs by version, so the rule is stated here: SentencePiece models of the Llama family put a space
before text that opens a chunk (`start=True`), and none before text that goes on after a special token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from medcg_jax.data.records import DataError
from medcg_jax.data.tokenizer_json import IMAGE, from_tokenizers
from medcg_jax.data.tokenizer_limits import short
from medcg_jax.data.tokenizer_spm import from_sentencepiece

__all__ = ["IMAGE", "SMALL", "Tokenizer", "load_tokenizer", "tokenizer_files"]

SMALL = Path(__file__).parent / "tokenizer" / "tokenizer.json"

Encode = Callable[[str, bool], list[int]]
# Distinct texts whose ids are kept: questions repeat across records and epochs.
_CACHED_TEXTS = 1 << 16


class Tokenizer:
    """Encodes and decodes text; knows the ids of the special tokens.

    Attributes:
      bos_id: opens a sequence; None where the family has none.
      eos_id: closes an assistant's turn.
      pad_id: fills rows; never attended.
      image_id: stands where image features go. A SentencePiece model without such a token gets the first free id.
      vocab_size: number of ids, the image's included.
      text_ids: 1 more than the largest id that text and the end of a turn can have.
      fingerprint: digest of the file.
      path: of the file; None: there is none.
    """

    def __init__(
        self,
        encode: Encode,
        decode: Callable[[list[int]], str],
        *,
        bos_id: int | None,
        eos_id: int,
        pad_id: int,
        image_id: int,
        unk_id: int | None,
        vocab_size: int,
        fingerprint: str,
        special: dict[str, int] | None = None,
        text_ids: int = 0,
        bare: Callable[[int], int] | None = None,
        path: Path | None = None,
    ):
        self._encode = functools.lru_cache(_CACHED_TEXTS)(lambda text, start: tuple(encode(text, start)))
        self._decode = decode
        self.bos_id, self.eos_id, self.pad_id, self.image_id = bos_id, eos_id, pad_id, image_id
        self.vocab_size, self.fingerprint = vocab_size, fingerprint
        self.text_ids, self.path = text_ids, path
        self._special, self._bare = special or {}, bare
        known = (bos_id, eos_id, pad_id, image_id, unk_id, *self._special.values())
        self._forbidden = {i for i in known if i is not None}

    def encode(self, text: str, start: bool = True) -> list[int]:
        """Ids of the text, without special tokens.

        Args:
          start: whether the text opens a chunk (SentencePiece then puts a space before it) or goes on after a
            special token.

        Raises:
          DataError: the text spells a special token, or has parts that the vocabulary cannot express.
        """
        ids = self._encode(text, start)
        bad = self._forbidden.intersection(ids)
        if bad:
            names = [name for name, number in self._special.items() if number in bad and name in text]
            spelled = f": it spells {', '.join(names)}; take that out of the text" if names else f" (ids {sorted(bad)})"
            raise DataError(f"text {short(text)} has special or unknown tokens{spelled}")
        return list(ids)

    def encode_behind_added(self, text: str) -> list[int]:
        """Ids of a text right behind an added token, as the slow Llama tokenizer of transformers 4.31 gives them.

        It encodes the text as one that opens a chunk and takes the space off the first piece, so that words are cut as
        after a space. A piece that the vocabulary lacks is then the unknown token, of which such models have seen many:
        of "▁Pick" there is no "Pick". A tokenizer of another kind gives the ids without a space (`start=False`).

        Raises:
          DataError: as `encode`.
        """
        if self._bare is None or not text or text.startswith(" "):
            return self.encode(text, start=False)
        first, *rest = self.encode(text)
        if not self.decode([first]).strip():  # the space alone
            return rest
        return [self._bare(first), *rest]

    def special(self, name: str) -> int:
        """The id of a special token by its name, such as "<|start_header_id|>".

        Raises:
          DataError: the file has no such token.
        """
        if name not in self._special:
            raise DataError(f"the tokenizer has no special token {name}; it has {', '.join(self._special) or 'none'}")
        return self._special[name]

    def known(self, name: str) -> int | None:
        """The id of a special token by its name; None: there is none."""
        return self._special.get(name)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these ids; special tokens are left out."""
        special = self._forbidden
        return self._decode([int(i) for i in ids if int(i) not in special and 0 <= int(i) < self.vocab_size])

    def letter_ids(self, prefix: str, letters: Sequence[str], start: bool = True, *, between: str = " ") -> list[int]:
        """The id that each letter has as the continuation of `prefix` after `between`.

        Raises:
          DataError: a letter changes the prefix's own tokens, is not one token, or two letters share one.
        """
        before = self.encode(prefix, start)
        found = []
        for letter in letters:
            after = self.encode(f"{prefix}{between}{letter}", start)
            if after[: len(before)] != before:
                raise DataError(f"option {letter!r} changes the tokens of the prompt that ends in {prefix[-20:]!r}")
            if len(after) != len(before) + 1:
                raise DataError(f"option {letter!r} is {len(after) - len(before)} tokens; one is needed to score it")
            found.append(after[-1])
        if len(set(found)) != len(found):
            raise DataError(f"options {', '.join(letters)} share a token: ids {found}")
        return found


def load_tokenizer(path: str | Path = "", small: str = SMALL.stem) -> Tokenizer:
    """The tokenizer of a `.json` or `.model` file or of a directory with one; "" takes the package's own named `small`.

    A directory's `tokenizer.model` is preferred, for it says the same to every library, where it can be read.

    Raises:
      DataError: no such file, none that can be read, or a special token is missing.
    """
    path = Path(path) if path else SMALL.with_stem(small)
    if not path.is_dir():
        if not path.exists():
            reason = "no such file; a tokenizer.json, tokenizer.model or directory is accepted"
            raise DataError(f"tokenizer {path}: {reason}")
        return _load(path)
    files = tokenizer_files(path)
    if not files:
        raise DataError(f"tokenizer {path}: the directory has neither tokenizer.model nor tokenizer.json")
    faults: list[DataError] = []
    for file in files:
        try:
            return _load(file)
        except DataError as error:
            faults.append(error)
    raise faults[-1] if len(files) == 1 else DataError("; and ".join(map(str, faults)))


def tokenizer_files(directory: Path) -> list[Path]:
    """The files of a directory that hold a tokenizer, the preferred one first."""
    return [directory / name for name in ("tokenizer.model", "tokenizer.json") if (directory / name).exists()]


def _load(path: Path) -> Tokenizer:
    return Tokenizer(**(from_sentencepiece(path) if path.suffix == ".model" else from_tokenizers(path)))
