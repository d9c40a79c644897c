"""A `tokenizer.json` read: its family, its special tokens, and Llama's pieces as SentencePiece makes them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from medcg_jax.data.records import DataError
from medcg_jax.data.tokenizer_limits import (
    added_in_config,
    library_errors,
    named_tokens,
    one_line,
    read_tokenizer_json,
    short,
    shown,
)

SPACE = "▁"
IMAGE = "<image>"
# Tokens that open a sequence, end a turn, fill rows, and stand for an image: by family, in the order in which a file is
# tried for the second.
FAMILIES = (
    ("<s>", "</s>", "<pad>", IMAGE),
    ("<|begin_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>", "<|image|>"),
    ("", "<|im_end|>", "<|endoftext|>", "<|image_pad|>"),
)
# Added tokens of these names are special, whatever the file says: NExT-Chat's are listed as ordinary ones.
KNOWN = {*(name for family in FAMILIES for name in family if name), "<unk>"} | {
    "<im_patch>", "<im_start>", "<im_end>", "<at>", "<boxes>"
}  # fmt: skip


def from_tokenizers(path: Path) -> dict[str, Any]:
    """What `Tokenizer` takes, of a tokenizer.json.

    Which ids are special is said by its added tokens alone: an ordinary piece may be spelled like one. The files beside
    it may name another token for an image, or for padding.

    Raises:
      DataError: it cannot be read, could do harm, or lacks a token that every family has.
    """
    import tokenizers

    found, content = read_tokenizer_json(path)
    is_llama = _is_llama(found)
    if is_llama and _blanks_come_first(found):
        _put_blanks_last(found)
        text = json.dumps(found)
    else:
        text = content.decode("utf-8")
    with library_errors(f"tokenizer {path}"):
        inner = tokenizers.Tokenizer.from_str(text)
        inner.no_truncation()
        inner.no_padding()
        if is_llama:
            inner.normalizer = inner.pre_tokenizer = None
    added = _added(found, inner, path)
    special = {name: number for name, (number, is_special) in added.items() if is_special or name in KNOWN}
    named = named_tokens(path.parent)
    family = _family(added, special, named, path)
    bos, eos, pad, image = (special.get(name) for name in family)
    unk = special.get("<unk>", _unknown(found, inner))
    pad = special.get(named.get("pad_token", ""), unk if pad is None else pad)
    if pad is None:
        raise DataError(f"tokenizer {path}: neither {family[2]} nor <unk> is there to fill rows with")
    vocab = found["model"]["vocab"]
    ids = vocab.values() if isinstance(vocab, dict) else range(len(vocab))
    size = max(max(ids, default=-1), *(number for number, _ in added.values()), -1) + 1
    image = image_id(special, named, image, size)

    def plain(text: str) -> list[int]:
        with library_errors(f"text {short(text)} cannot be tokenised"):
            return inner.encode(text, add_special_tokens=False).ids

    def encode(text: str, start: bool) -> list[int]:
        if is_llama:
            # As SentencePiece does it, whatever the version that wrote the file says of spaces.
            text = text.replace(" ", SPACE)
            return plain(SPACE + text if start and text else text)
        # After a special token the file's own normaliser says what becomes of the space: let it see one.
        return plain(text) if start else plain(family[1] + text)[1:]

    def decode(ids: list[int]) -> str:
        with library_errors(f"tokenizer {path}: ids cannot be decoded"):
            return inner.decode(ids)

    def bare(number: int) -> int:
        known = inner.token_to_id(inner.id_to_token(number).removeprefix(SPACE))
        return unk if known is None else known

    return dict(
        encode=encode, decode=decode, bos_id=bos, eos_id=eos, pad_id=pad, image_id=image, unk_id=unk,
        vocab_size=max(size, image + 1), fingerprint=hashlib.sha256(content).hexdigest()[:16], special=special,
        text_ids=max(set(ids) | {n for n, _ in added.values()} - {*special.values(), pad, image} | {eos}) + 1,
        bare=bare if is_llama and unk is not None else None, path=path,
    )  # fmt: skip


def image_id(special: dict[str, int], named: dict[str, str], of_family: int | None, free: int) -> int:
    """The id that stands for an image: of the token that the files name, the family's, another family's; or `free`."""
    if named.get("image_token") in special:
        return special[named["image_token"]]
    if of_family is not None:
        return of_family
    return next((special[family[3]] for family in FAMILIES if family[3] in special), free)


def _added(found: dict[str, Any], inner, path: Path) -> dict[str, tuple[int, bool]]:
    """Text of each added token -> (its id, whether the file calls it special).

    Raises:
      DataError: the library or tokenizer_config.json beside the file has it under another id.
    """
    added = {t["content"]: (t["id"], bool(t.get("special"))) for t in found.get("added_tokens") or []}
    for name, (number, _) in added.items():
        if inner.token_to_id(name) != number:
            raise DataError(
                f"tokenizer {path}: added_tokens states {number} for {shown(name)}, which is "
                f"{inner.token_to_id(name)} by the vocabulary; equal ids are accepted"
            )
    with one_line():
        for number, name, place in added_in_config(path.parent) if path.name == "tokenizer.json" else ():
            own = added[name][0] if name in added else inner.token_to_id(name)
            if own != number:
                raise DataError(f"tokenizer {place} states {number} for {shown(name)}; {path.name} beside it has {own}")
    return added


def _family(added, special: dict[str, int], named: dict[str, str], path: Path) -> tuple[str, str, str, str]:
    ends = [family for family in FAMILIES if family[1] in special]
    # One that the file itself calls special, then one that tokenizer_config.json names, then the first.
    ends.sort(key=lambda family: (not added[family[1]][1], family[1] != named.get("eos_token")))
    if not ends:
        names = " or ".join(family[1] for family in FAMILIES)
        raise DataError(
            f"tokenizer {path}: the token that ends a turn is missing; {names} is accepted, as a special one"
        )
    return ends[0]


def _unknown(found: dict[str, Any], inner) -> int | None:
    """The id that the model itself gives to what it does not know; None: it knows everything."""
    model = found["model"]
    if model.get("type") == "Unigram":
        return model.get("unk_id")
    name = model.get("unk_token")
    return inner.token_to_id(name) if isinstance(name, str) else None


def _is_llama(found: dict[str, Any]) -> bool:
    """Whether the pieces are Llama's kind: BPE with bytes, and a mark in place of each space."""
    model, rules = found["model"], json.dumps([found.get("normalizer"), found.get("pre_tokenizer")], ensure_ascii=False)
    return model.get("type", "BPE") == "BPE" and bool(model.get("byte_fallback")) and SPACE in rules


def _merge(entry: str | list[str]) -> tuple[str, str]:
    left, _, right = entry.partition(" ") if isinstance(entry, str) else (entry[0], "", entry[1])
    return left, right


def _is_blank(entry: str | list[str]) -> bool:
    return not "".join(_merge(entry)).strip(SPACE)


def _blanks_come_first(found: dict[str, Any]) -> bool:
    """Whether it is Llama's own vocabulary with its merges in the order of the ids, as transformers 5 writes them.

    In the SentencePiece model runs of blanks have the first ids and the lowest scores: they are merged last.
    """
    vocab, merges = found["model"]["vocab"], found["model"].get("merges") or []
    if not isinstance(vocab, dict):
        return False
    of_llama = (vocab.get(SPACE * 2), vocab.get(f"{SPACE}t"), vocab.get(SPACE)) == (259, 260, 29871)
    return of_llama and bool(merges) and _is_blank(merges[0])


def _put_blanks_last(found: dict[str, Any]) -> None:
    merges = found["model"]["merges"]
    found["model"]["merges"] = [m for m in merges if not _is_blank(m)] + [m for m in merges if _is_blank(m)]
