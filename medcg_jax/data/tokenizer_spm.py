"""A SentencePiece model of the Llama family read, with the tokens that the files beside it add."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medcg_jax.data.records import DataError
from medcg_jax.data.tokenizer_json import IMAGE, SPACE, image_id
from medcg_jax.data.tokenizer_limits import (
    MAX_TOKENIZER_BYTES,
    added_tokens,
    library_errors,
    named_tokens,
    one_line,
    short,
    shown,
)
from medcg_jax.untrusted import read_bytes

# A line of tiktoken's form: a piece's bytes in base 64, and its rank.
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\n")
# The rules by which a model rewrites characters before all else: Llama's has none. Fields of the protocol buffer.
_NORMALIZER, _CHARACTER_MAP = 3, 2


def from_sentencepiece(path: Path) -> dict[str, Any]:
    """What `Tokenizer` takes, of a SentencePiece model of the Llama family.

    Raises:
      DataError: it cannot be read, is in another form, or the files beside it contradict it.
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
            "tokenizer.json of the same release is accepted"
        )
    if rules := _character_map(content):
        raise DataError(
            f"tokenizer {path}: rules for characters of {rules:,} bytes; a model without, as Llama's, is accepted"
        )
    with library_errors(f"tokenizer {path}: no SentencePiece model"):
        model = sentencepiece.SentencePieceProcessor(model_proto=content)
        size = model.get_piece_size()
        # Nothing joins a line break, so the text behind one is encoded without the space that opens a chunk.
        opening = model.encode("\n")
    bos, eos, unk = model.bos_id(), model.eos_id(), model.unk_id()
    if eos < 0:
        raise DataError(f"tokenizer {path}: the token that ends a turn is missing; a model with </s> is accepted")
    added = added_tokens(path.parent)
    for name, number in added.items():
        if number < size and model.id_to_piece(number) != name:
            raise DataError(
                f"tokenizer {path}: the files beside it add {shown(name)} with the id {number}, which is "
                f"{shown(model.id_to_piece(number))} in the model; {size} and above are free"
            )
    own = {model.id_to_piece(number): number for number in (unk, bos, eos) if number >= 0}
    special, named = own | added, named_tokens(path.parent)
    image = image_id(special, named, added.get(IMAGE), max([size, *(i + 1 for i in added.values())]) if added else size)
    pad = special.get(named.get("pad_token", ""), special.get("<pad>", unk))
    # What other libraries take for one token where a text spells it.
    spelled = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))))

    def encode(text: str, start: bool) -> list[int]:
        if match := spelled.search(text):
            raise DataError(
                f"text {short(text)} has special or unknown tokens: it spells {match.group()}; take that out of the text"
            )
        if start:
            return model.encode(text)
        ids = model.encode("\n" + text)
        if ids[: len(opening)] != opening:
            raise DataError(f"tokenizer {path}: line breaks are not kept; a Llama-like model is needed")
        return ids[len(opening) :]

    def bare(number: int) -> int:
        return model.piece_to_id(model.id_to_piece(number).removeprefix(SPACE))

    return dict(
        encode=encode,
        decode=lambda ids: model.decode([i for i in ids if i < size]),
        bos_id=bos if bos >= 0 else None,
        eos_id=eos,
        pad_id=pad,
        image_id=image,
        unk_id=unk,
        vocab_size=max([size, image + 1, *(i + 1 for i in added.values())]),
        fingerprint=hashlib.sha256(content).hexdigest()[:16],
        special=special,
        text_ids=size,
        bare=bare,
        path=path,
    )


def _character_map(content: bytes) -> int:
    """Bytes of the model's rules for characters; 0: it has none. A file that is no protocol buffer has none either."""
    return sum(
        len(value) for number, part in _fields(content) if number == _NORMALIZER
        for inner, value in _fields(part) if inner == _CHARACTER_MAP
    )  # fmt: skip


def _fields(content: bytes) -> Iterator[tuple[int, bytes]]:
    """(number, bytes) of each field of a protocol buffer that has a length; ends where it is damaged."""
    place, end = 0, len(content)

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while place < end and shift < 64:
            byte = content[place]
            place, value, shift = place + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value
        place = end
        return 0

    while place < end:
        key = varint()
        kind = key & 7
        if kind == 0:
            varint()
        elif kind in (1, 5):
            place += 8 if kind == 1 else 4
        elif kind == 2:
            length = varint()
            yield key >> 3, content[place : min(place + length, end)]
            place += length
        else:
            return
