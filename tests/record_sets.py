"""Small sets of choice records, phantoms with four options, and a tokenizer of words, that tests share."""

import dataclasses
from pathlib import Path

import numpy as np
import tokenizers

from medcg_jax.data.phantom.source import PhantomSource
from medcg_jax.data.phantom.world import choice as choice_text
from medcg_jax.data.records import LETTERS, Record, RecordSet, Turn

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


FOUR_LABELS = ("mild", "severe", "early", "advanced")


def with_four_options(records: RecordSet) -> RecordSet:
    """The same images and first lines of the questions, with four options; each is right as often, at every letter."""
    made = []
    for i, record in enumerate(records.records):
        options = tuple(FOUR_LABELS[(k + i // 4) % 4] for k in range(4))
        letter = LETTERS[options.index(FOUR_LABELS[i % 4])]
        question = choice_text(record.turns[0].question.partition("\n")[0], options)
        made.append(dataclasses.replace(record, turns=(Turn(question, letter),), options=options, answer=letter))
    return RecordSet(made, records.images)


class PhantomsWithFourOptions(PhantomSource):
    """The phantom world, whose questions have two options, but four in one subset."""

    FOUR = "oct-skin-grade"

    def __init__(self, *sizes):
        super().__init__(*sizes)
        four = {self.FOUR: FOUR_LABELS}
        self.subsets = tuple(dataclasses.replace(s, labels=four.get(s.name, s.labels)) for s in self.subsets)

    def records(self, subset: str, split: str) -> RecordSet:
        found = super().records(subset, split)
        return with_four_options(found) if subset == self.FOUR else found


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
