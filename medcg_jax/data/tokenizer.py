"""Text to token ids and back, from a `tokenizer.json`, a SentencePiece model, or a directory with either.

Text is encoded without special tokens: `families.prompts` adds those. Tools and their versions differ in the spaces
beside special tokens; the rule here is that SentencePiece models of the Llama family put a space before text that opens
a chunk (`start=True`), and none before text that follows a special token.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from medcg_jax.data.records import DataError
from medcg_jax.data.tokenizer_limits import (
    MAX_TOKENIZER_BYTES,
    added_in_config,
    added_tokens,
    library_errors,
    named_tokens,
    one_line,
    read_tokenizer_json,
    short,
)
from medcg_jax.untrusted import read_bytes, shown

SMALL = Path(__file__).parent / "tokenizer" / "tokenizer.json"
SPACE = "▁"
IMAGE = "<image>"
# Tokens that open a sequence, end a turn, fill rows, and stand for an image, by family. Files are tried in this order for
# the token that ends a turn.
FAMILIES = (
    ("<s>", "</s>", "<pad>", IMAGE),
    ("<|begin_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>", "<|image|>"),
    ("", "<|im_end|>", "<|endoftext|>", "<|image_pad|>"),
)
# Added tokens of these names are special even if the file lists them as ordinary, as it does NExT-Chat's.
KNOWN = {*(name for family in FAMILIES for name in family if name), "<unk>"}
KNOWN |= {"<im_patch>", "<im_start>", "<im_end>", "<at>", "<boxes>"}
# A line of tiktoken's form: a piece's bytes in base 64, and its rank.
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\n")
# Fields of the protocol buffer with a SentencePiece model's rules for rewriting characters; Llama's has no rules.
_NORMALIZER, _CHARACTER_MAP = 3, 2
# Distinct texts in the cache of ids: questions repeat across records and epochs.
_CACHED_TEXTS = 1 << 16


class Tokenizer:
    """Encodes and decodes text; knows the ids of the special tokens.

    Attributes:
      bos_id: opens a sequence; None if the family has no such token.
      eos_id: closes an assistant's turn.
      pad_id: fills rows; never attended.
      image_id: placeholder of image features; the first free id if a SentencePiece model has no such token.
      vocab_size: number of ids, the image's included.
      text_ids: 1 more than the largest id of text and of the end of a turn.
      fingerprint: digest of the file.
      path: of the file, or None.
    """

    def __init__(
        self,
        encode: Callable[[str, bool], list[int]],
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
          start: whether the text opens a chunk (SentencePiece then puts a space before it) or follows a special token.

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

        That tokenizer encodes the text as if it opened a chunk and strips the space from the first piece. If the vocabulary
        lacks the stripped piece ("▁Pick" but no "Pick"), the id is the unknown token, which such models saw in training.
        Tokenizers of another kind give the ids without a space (`start=False`).

        Raises:
          DataError: as `encode`.
        """
        if self._bare is None or not text or text.startswith(" "):
            return self.encode(text, start=False)
        first, *others = self.encode(text)
        if not self.decode([first]).strip():  # the space alone
            return others
        return [self._bare(first), *others]

    def special(self, name: str) -> int:
        """The id of a special token by its name, such as "<|start_header_id|>".

        Raises:
          DataError: the file has no such token.
        """
        if name not in self._special:
            raise DataError(f"the tokenizer has no special token {name}; it has {', '.join(self._special) or 'none'}")
        return self._special[name]

    def known(self, name: str) -> int | None:
        """The id of a special token by its name, or None."""
        return self._special.get(name)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these ids; special tokens are left out."""
        special = self._forbidden
        return self._decode([int(i) for i in ids if int(i) not in special and 0 <= int(i) < self.vocab_size])


def load_tokenizer(path: str | Path = "", small: str = SMALL.stem) -> Tokenizer:
    """The tokenizer of a `.json` or `.model` file or of a directory with one; "" takes the package's own named `small`.

    A directory's `tokenizer.model` is preferred if it can be read, since every library reads it alike.

    Raises:
      DataError: the file does not exist or cannot be read, or a special token is missing.
    """
    path = Path(path) if path else SMALL.with_stem(small)
    if not path.is_dir():
        if not path.exists():
            reason = "no such file; expected a tokenizer.json, tokenizer.model or directory"
            raise DataError(f"tokenizer {path}: {reason}, in --config.model.tokenizer=PATH")
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
    return _from_sentencepiece(path) if path.suffix == ".model" else _from_json(path)


def _from_json(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json.

    Only added tokens are special: an ordinary piece may be spelled like a special one. The files beside tokenizer.json
    may name another token for images or padding.

    Raises:
      DataError: the file cannot be read, could do harm, or lacks a token that every family has.
    """
    import tokenizers

    parsed, content = read_tokenizer_json(path)
    is_llama = _is_llama(parsed)
    if is_llama and _blanks_come_first(parsed):
        _put_blanks_last(parsed)
        text = json.dumps(parsed)
    else:
        text = content.decode("utf-8")
    with library_errors(f"tokenizer {path}"):
        inner = tokenizers.Tokenizer.from_str(text)
        inner.no_truncation()
        inner.no_padding()
        if is_llama:
            inner.normalizer = inner.pre_tokenizer = None
    added = _added(parsed, inner, path)
    special = {name: number for name, (number, is_special) in added.items() if is_special or name in KNOWN}
    named = named_tokens(path.parent)
    family = _family(added, special, named, path)
    bos, _, pad, image = (special.get(name) for name in family)
    eos = special[family[1]]
    unk = special.get("<unk>", _unknown(parsed, inner))
    pad = special.get(named.get("pad_token", ""), unk if pad is None else pad)
    if pad is None:
        raise DataError(f"tokenizer {path}: neither {family[2]} nor <unk> is there to fill rows with")
    vocab = parsed["model"]["vocab"]
    ids = vocab.values() if isinstance(vocab, dict) else range(len(vocab))
    size = max(max(ids, default=-1), *(number for number, _ in added.values()), -1) + 1
    image = _image_id(special, named, image, size)

    def plain(text: str) -> list[int]:
        with library_errors(f"text {short(text)} cannot be tokenised"):
            return inner.encode(text, add_special_tokens=False).ids

    def encode(text: str, start: bool) -> list[int]:
        if is_llama:
            # As SentencePiece does it; the files' own rules for spaces differ by version.
            text = text.replace(" ", SPACE)
            return plain(SPACE + text if start and text else text)
        # The file's normaliser decides about the space after a special token, so it must see one.
        return plain(text) if start else plain(family[1] + text)[1:]

    def decode(ids: list[int]) -> str:
        with library_errors(f"tokenizer {path}: ids cannot be decoded"):
            return inner.decode(ids)

    def bare(number: int) -> int:
        known = inner.token_to_id(inner.id_to_token(number).removeprefix(SPACE))
        return unk if known is None else known

    return Tokenizer(
        encode,
        decode,
        bos_id=bos,
        eos_id=eos,
        pad_id=pad,
        image_id=image,
        unk_id=unk,
        vocab_size=max(size, image + 1),
        fingerprint=hashlib.sha256(content).hexdigest()[:16],
        special=special,
        text_ids=max(set(ids) | {n for n, _ in added.values()} - {*special.values(), pad, image} | {eos}) + 1,
        bare=bare if is_llama and unk is not None else None,
        path=path,
    )


def _image_id(special: dict[str, int], named: dict[str, str], of_family: int | None, free: int) -> int:
    """The id of the image token: that which the files name, else the family's, else another family's, else `free`."""
    if named.get("image_token") in special:
        return special[named["image_token"]]
    if of_family is not None:
        return of_family
    return next((special[family[3]] for family in FAMILIES if family[3] in special), free)


def _added(parsed: dict[str, Any], inner, path: Path) -> dict[str, tuple[int, bool]]:
    """Text of each added token -> (its id, whether the file calls it special).

    Raises:
      DataError: the library or tokenizer_config.json beside the file has it under another id.
    """
    added = {t["content"]: (t["id"], bool(t.get("special"))) for t in parsed.get("added_tokens") or []}
    for name, (number, _) in added.items():
        if inner.token_to_id(name) != number:
            raise DataError(
                f"tokenizer {path}: added_tokens states {number} for {shown(name)}, which is "
                f"{inner.token_to_id(name)} by the vocabulary; expected equal ids"
            )
    with one_line():
        for number, name, where in added_in_config(path.parent) if path.name == "tokenizer.json" else ():
            by_vocab = added[name][0] if name in added else inner.token_to_id(name)
            if by_vocab != number:
                reason = f"states {number} for {shown(name)}; {path.name} beside it has {by_vocab}"
                raise DataError(f"tokenizer {where} {reason}")
    return added


def _family(added, special: dict[str, int], named: dict[str, str], path: Path) -> tuple[str, str, str, str]:
    ends = [family for family in FAMILIES if family[1] in special]
    # First one that the file itself calls special, then one that tokenizer_config.json names.
    ends.sort(key=lambda family: (not added[family[1]][1], family[1] != named.get("eos_token")))
    if not ends:
        names = " or ".join(family[1] for family in FAMILIES)
        raise DataError(f"tokenizer {path}: the token that ends a turn is missing; expected {names}, as a special one")
    return ends[0]


def _unknown(parsed: dict[str, Any], inner) -> int | None:
    """The model's id for unknown text; None: nothing is unknown."""
    model = parsed["model"]
    if model.get("type") == "Unigram":
        return model.get("unk_id")
    name = model.get("unk_token")
    return inner.token_to_id(name) if isinstance(name, str) else None


def _is_llama(parsed: dict[str, Any]) -> bool:
    """Whether the model is of Llama's kind: BPE with byte pieces, and a mark in place of each space."""
    model, rules = (
        parsed["model"],
        json.dumps([parsed.get("normalizer"), parsed.get("pre_tokenizer")], ensure_ascii=False),
    )
    return model.get("type", "BPE") == "BPE" and bool(model.get("byte_fallback")) and SPACE in rules


def _merge(entry: str | list[str]) -> tuple[str, str]:
    left, _, right = entry.partition(" ") if isinstance(entry, str) else (entry[0], "", entry[1])
    return left, right


def _is_blank(entry: str | list[str]) -> bool:
    return not "".join(_merge(entry)).strip(SPACE)


def _blanks_come_first(parsed: dict[str, Any]) -> bool:
    """Whether it is Llama's own vocabulary with merges in the order of the ids, as transformers 5 writes them.

    In the SentencePiece model, runs of blanks have the first ids but the lowest scores: they are merged last.
    """
    vocab, merges = parsed["model"]["vocab"], parsed["model"].get("merges") or []
    if not isinstance(vocab, dict):
        return False
    of_llama = (vocab.get(SPACE * 2), vocab.get(f"{SPACE}t"), vocab.get(SPACE)) == (259, 260, 29871)
    return of_llama and bool(merges) and _is_blank(merges[0])


def _put_blanks_last(parsed: dict[str, Any]) -> None:
    merges = parsed["model"]["merges"]
    parsed["model"]["merges"] = [m for m in merges if not _is_blank(m)] + [m for m in merges if _is_blank(m)]


def _from_sentencepiece(path: Path) -> Tokenizer:
    """The tokenizer of a SentencePiece model of the Llama family.

    Raises:
      DataError: the file cannot be read, has another form, or contradicts the files beside it.
    """
    try:
        import sentencepiece
    except ImportError as error:
        reason = "a SentencePiece model needs the package sentencepiece; a tokenizer.json does not"
        raise DataError(f"tokenizer {path}: {reason}") from error
    with one_line():
        content = read_bytes(path, MAX_TOKENIZER_BYTES)
    if _TIKTOKEN.match(content):
        raise DataError(
            f"tokenizer {path}: it is in tiktoken's form, as in the folder original of Llama 3's release; the "
            "tokenizer.json of the same release is read"
        )
    if rules := _character_map(content):
        raise DataError(
            f"tokenizer {path}: rules for characters of {rules:,} bytes; expected a model without, as Llama's"
        )
    with library_errors(f"tokenizer {path}: no SentencePiece model"):
        model = sentencepiece.SentencePieceProcessor(model_proto=content)
        size = model.get_piece_size()
        # No piece spans a line break, so text after one is encoded without the space that opens a chunk.
        opening = model.encode("\n")
    bos, eos, unk = model.bos_id(), model.eos_id(), model.unk_id()
    if eos < 0:
        raise DataError(f"tokenizer {path}: the token that ends a turn is missing; expected a model with </s>")
    added = added_tokens(path.parent)
    for name, number in added.items():
        if number < size and model.id_to_piece(number) != name:
            raise DataError(
                f"tokenizer {path}: the files beside it add {shown(name)} with the id {number}, which is "
                f"{shown(model.id_to_piece(number))} in the model; {size} and above are free"
            )
    special = {model.id_to_piece(number): number for number in (unk, bos, eos) if number >= 0} | added
    named, vocab_size = named_tokens(path.parent), max(size, *(number + 1 for number in added.values()), 0)
    image = _image_id(special, named, added.get(IMAGE), vocab_size)
    pad = special.get(named.get("pad_token", ""), special.get("<pad>", unk))
    # Spellings that other libraries would encode as one special token.
    spelled = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))))

    def encode(text: str, start: bool) -> list[int]:
        if match := spelled.search(text):
            reason = f"it spells {match.group()}; take that out of the text"
            raise DataError(f"text {short(text)} has special or unknown tokens: {reason}")
        if start:
            return model.encode(text)
        ids = model.encode("\n" + text)
        if ids[: len(opening)] != opening:
            raise DataError(f"tokenizer {path}: line breaks are not kept; a Llama-like model is needed")
        return ids[len(opening) :]

    def bare(number: int) -> int:
        return model.piece_to_id(model.id_to_piece(number).removeprefix(SPACE))

    return Tokenizer(
        encode,
        lambda ids: model.decode([i for i in ids if i < size]),
        bos_id=bos if bos >= 0 else None,
        eos_id=eos,
        pad_id=pad,
        image_id=image,
        unk_id=unk,
        vocab_size=max(vocab_size, image + 1),
        fingerprint=hashlib.sha256(content).hexdigest()[:16],
        special=special,
        text_ids=size,
        bare=bare,
        path=path,
    )


def _character_map(content: bytes) -> int:
    """Bytes of the model's rules for characters; 0 without rules, or if the file is no protocol buffer."""
    return sum(
        len(value)
        for number, field in _fields(content)
        if number == _NORMALIZER
        for inner, value in _fields(field)
        if inner == _CHARACTER_MAP
    )


def _fields(content: bytes) -> Iterator[tuple[int, bytes]]:
    """(number, bytes) of each length-delimited field of a protocol buffer; stops at damage."""
    offset, end = 0, len(content)

    def varint() -> int:
        nonlocal offset
        value = shift = 0
        while offset < end and shift < 64:
            byte = content[offset]
            offset, value, shift = offset + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value
        offset = end
        return 0

    while offset < end:
        key = varint()
        kind = key & 7
        if kind == 0:
            varint()
        elif kind in (1, 5):
            offset += 8 if kind == 1 else 4
        elif kind == 2:
            length = varint()
            yield key >> 3, content[offset : min(offset + length, end)]
            offset += length
        else:
            return
