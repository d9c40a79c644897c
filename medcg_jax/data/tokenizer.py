"""Text to token ids and back, from a `tokenizer.json`, a SentencePiece model, or a directory with either.

Pieces of text are encoded without special tokens: `prompts` puts those itself. What tools do to the spaces beside
special tokens differs by version, so the rule is stated here: SentencePiece models of the Llama family put a space
before text that opens a chunk (`start=True`), and none before text that goes on after a special token.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from medcg_jax.data.records import DataError

SMALL = Path(__file__).parent / "tokenizer" / "tokenizer.json"
IMAGE = "<image>"
# A tokenizer.json's tokens that open a sequence, end a turn, fill rows, and stand for an image: by family, in the
# order in which a file is tried for the second.
FAMILIES = (
    ("<s>", "</s>", "<pad>", IMAGE),
    ("<|begin_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>", "<|image|>"),
    ("", "<|im_end|>", "<|endoftext|>", "<|image_pad|>"),
)

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
      fingerprint: digest of the file.
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
    ):
        self._encode = functools.lru_cache(_CACHED_TEXTS)(lambda text, start: tuple(encode(text, start)))
        self._decode = decode
        self.bos_id, self.eos_id, self.pad_id, self.image_id = bos_id, eos_id, pad_id, image_id
        self.vocab_size, self.fingerprint = vocab_size, fingerprint
        self._special = special or {}
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
            raise DataError(f"text {_short(text)} has special or unknown tokens (ids {sorted(bad)})")
        return list(ids)

    def special(self, name: str) -> int:
        """The id of a special token by its name, such as "<|start_header_id|>".

        Raises:
          DataError: the file has no such token.
        """
        if name not in self._special:
            raise DataError(f"the tokenizer has no special token {name}; it has {', '.join(self._special) or 'none'}")
        return self._special[name]

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

    A directory's `tokenizer.model` is preferred: it says the same to every library.

    Raises:
      DataError: no such file, or a special token is missing.
    """
    path = Path(path) if path else SMALL.with_stem(small)
    if path.is_dir():
        found = [path / name for name in ("tokenizer.model", "tokenizer.json") if (path / name).is_file()]
        if not found:
            raise DataError(f"tokenizer {path}: the directory has neither tokenizer.model nor tokenizer.json")
        path = found[0]
    if not path.is_file():
        raise DataError(f"tokenizer {path}: no such file; a tokenizer.json, tokenizer.model or directory is accepted")
    return _from_sentencepiece(path) if path.suffix == ".model" else _from_tokenizers(path)


def _from_tokenizers(path: Path) -> Tokenizer:
    import tokenizers

    try:
        inner = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"tokenizer {path}: {error}") from error
    family = next((names for names in FAMILIES if inner.token_to_id(names[1]) is not None), None)
    if family is None:
        ends = " or ".join(names[1] for names in FAMILIES)
        raise DataError(f"tokenizer {path}: the token that ends a turn is missing; {ends} is accepted")
    bos, eos, pad, image = map(inner.token_to_id, family)
    unk = inner.token_to_id("<unk>")
    pad = unk if pad is None else pad
    if pad is None:
        raise DataError(f"tokenizer {path}: neither {family[2]} nor <unk> is there to fill rows with")
    size = inner.get_vocab_size(with_added_tokens=True)
    special = {token.content: i for i, token in inner.get_added_tokens_decoder().items() if token.special}

    def ids(text: str) -> list[int]:
        try:
            return inner.encode(text, add_special_tokens=False).ids
        except Exception as error:
            raise DataError(f"text {_short(text)} cannot be tokenised: {error}") from error

    def encode(text: str, start: bool) -> list[int]:
        # After a special token the file's own normaliser says what becomes of the space: let it see one.
        return ids(text) if start else ids(family[1] + text)[1:]

    return Tokenizer(
        encode,
        lambda found: inner.decode(found),
        bos_id=bos,
        eos_id=eos,
        pad_id=pad,
        image_id=size if image is None else image,
        unk_id=unk,
        vocab_size=size + 1 if image is None else size,
        fingerprint=_digest(path),
        special=special,
    )


def _from_sentencepiece(path: Path) -> Tokenizer:
    try:
        import sentencepiece
    except ImportError as error:
        reason = "a SentencePiece model needs the package sentencepiece; a tokenizer.json does not"
        raise DataError(f"tokenizer {path}: {reason}") from error
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    added = _added_tokens(path.parent)
    size = model.get_piece_size()
    image = added.get(IMAGE, size)
    # Nothing joins a line break, so the text behind one is encoded without the space that opens a chunk.
    opening = model.encode("\n")

    def encode(text: str, start: bool) -> list[int]:
        if start:
            return model.encode(text)
        found = model.encode("\n" + text)
        if found[: len(opening)] != opening:
            raise DataError(f"tokenizer {path}: line breaks are not kept; a Llama-like model is needed")
        return found[len(opening) :]

    return Tokenizer(
        encode,
        lambda found: model.decode([i for i in found if i < size]),
        bos_id=model.bos_id(),
        eos_id=model.eos_id(),
        pad_id=added.get("<pad>", model.unk_id()),
        image_id=image,
        unk_id=model.unk_id(),
        vocab_size=max([size, image + 1, *(i + 1 for i in added.values())]),
        fingerprint=_digest(path),
        special=added,
    )


def _added_tokens(directory: Path) -> dict[str, int]:
    """Tokens that a HF directory adds beside its SentencePiece model: content -> id."""
    found: dict[str, int] = {}
    if (directory / "added_tokens.json").is_file():
        found |= json.loads((directory / "added_tokens.json").read_text("utf-8"))
    if (directory / "tokenizer_config.json").is_file():
        listed = json.loads((directory / "tokenizer_config.json").read_text("utf-8")).get("added_tokens_decoder", {})
        found |= {token["content"]: int(i) for i, token in listed.items()}
    return found


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
