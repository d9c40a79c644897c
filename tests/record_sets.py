"""Small sets of choice records, and a tokenizer of their words, that the data tests share."""

from pathlib import Path

import numpy as np
import tokenizers

from medcg_jax.data.records import Record, RecordSet, Turn

SPECIAL = ["<pad>", "<s>", "</s>", "<image>", "<unk>"]
WORDS = [*SPECIAL, *"USER ASSISTANT : A B C D E what is this it \n benign normal severe mild ?".split(" ")]


def write_word_tokenizer(path: Path) -> Path:
    """A tokenizer.json of whole words and punctuation marks, with the special tokens of the package's own."""
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    split = tokenizers.pre_tokenizers
    inner.pre_tokenizer = split.Sequence(
        [split.Split("\n", "isolated"), split.Split(" ", "removed"), split.Punctuation()]
    )
    inner.add_special_tokens(SPECIAL)
    inner.save(str(path))
    return path


def choice(index: int, *, subset: str = "04", split: str = "train", image: bool = True) -> Record:
    letter = "AB"[index % 2]
    return Record(
        id=f"{subset}/{split}/{index}",
        subset=subset,
        turns=(Turn("what is this ?\nA: benign\nB: normal", letter),),
        options=("benign", "normal"),
        answer=letter,
        image=f"{index}.png" if image else "",
        data_no="1",
    )


def choices(count: int, *, subset: str = "04", size_px: int = 4) -> RecordSet:
    """Choice records whose image is filled with the record's index."""
    pixels = np.empty((count, size_px, size_px, 3), np.uint8)
    pixels[:] = np.arange(count, dtype=np.uint8)[:, None, None, None]
    return RecordSet([choice(i, subset=subset) for i in range(count)], pixels)


class CountedImage:
    """A stored image filled with `value` that notes it in `decoded` when it is decoded; `pixels` may be replaced."""

    def __init__(self, value: int, decoded: list[int], size: tuple[int, int] = (4, 4)):
        self.value, self.decoded, self.size_px = value, decoded, size

    def pixels(self) -> np.ndarray:
        self.decoded.append(self.value)
        return np.full((*self.size_px, 3), self.value, np.uint8)

    def size(self) -> tuple[int, int]:
        return self.size_px

    def file_digest(self) -> bytes:
        return bytes([self.value])

    def kept_hashes(self) -> None:
        return None


def plant_space(monkeypatch, tokenizer, *, before: str = " ", start: bool = False) -> None:
    """The fault of tools that read spaces beside special tokens in another way: each piece of text behind a special
    token gets one in front; `before` and `start` say what comes before every piece and whether it opens a chunk."""
    right = tokenizer._encode
    monkeypatch.setattr(tokenizer, "_encode", lambda text, _: right(before + text, start))
