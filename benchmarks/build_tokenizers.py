"""Builds the tiny models' tokenizers, one for each kind of prompt: `python -m benchmarks.build_tokenizers`.

Whole words for the study's own text, characters and bytes for everything else.

A Unigram model with given pieces: nothing is trained, and every build gives the same file. The words of the phantom world
and of `tokenizer/words.txt` (modalities, areas, tasks and labels of the paper's tables, common words of questions about
medical images, LLaVA-1.5's system sentence) are one token each; other words are split into known pieces and single
characters; other characters become their UTF-8 bytes. Spaces and line breaks are dropped: the piece that begins a word
starts with "▁", so `A` is one token, the same in an option and in an answer. The colon after a single capital (`A: mild`)
is dropped too: rows are a sixth shorter, and a letter stands right before its option. Each part of a prompt's frame
(`ASSISTANT:`, `[INST]`) is one token.
"""

from __future__ import annotations

import re
import string
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from medcg_jax.data.phantom.world import words
from medcg_jax.data.tokenizer import SMALL

FOLDER = SMALL.parent
# File -> special tokens, the first of which fills rows, and pieces of the prompt's frame.
KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "tokenizer": (("<pad>", "<s>", "</s>", "<image>"), ("USER:", "ASSISTANT:")),
    "chatml": (
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"),
        ("user", "assistant", "system"),
    ),
    "llama3": (
        (
            "<|finetune_right_pad_id|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
            "<|image|>",
        ),
        ("user", "assistant", "system"),
    ),
    "next_chat": (
        ("<pad>", "<s>", "</s>", "<im_patch>", "<im_start>", "<im_end>", "<at>", "<boxes>"),
        ("USER:", "ASSISTANT:"),
    ),
    "minigpt_v2": (("<pad>", "<s>", "</s>", "<image>"), ("[INST]", "[/INST]", "<Img>", "</Img>", "[vqa]", "[detection]")),
}  # fmt: skip
_WORD = re.compile(r"[A-Za-z]+")
# Endings and beginnings of words outside the list; whole words are always preferred.
_AFFIXES = (
    "ing", "ed", "es", "er", "ly", "ion", "tion", "al", "ic", "ity", "ment", "ness", "ous", "oma", "itis", "ology",
    "graphy", "graph", "scopy", "emia", "path", "osis",
)  # fmt: skip


def build(kind: str = "tokenizer") -> tokenizers.Tokenizer:
    """The tokenizer of a kind. The first ids are its special tokens, in their order."""
    special, frame = KINDS[kind]
    tokenizer = tokenizers.Tokenizer(models.Unigram(_pieces(special, frame), unk_id=0, byte_fallback=True))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    # Words of letters; every other character except space alone. Roles keep their colon, option letters do not.
    marked = "".join(re.escape(piece) + "|" for piece in frame if not piece.isalpha())
    pattern = Regex(marked + r"\p{L}[\p{L}\p{M}]*|(?<!\b[A-Z]):|[^\s:]")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, behavior="removed", invert=True),
            pre_tokenizers.Metaspace(prepend_scheme="always", split=False),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def write(path: Path, kind: str = "tokenizer") -> int:
    """Writes the file of a kind; the number of tokens."""
    tokenizer = build(kind)
    path.write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
    return tokenizer.get_vocab_size()


def _pieces(special: tuple[str, ...], frame: tuple[str, ...]) -> list[tuple[str, float]]:
    """(piece, score): any whole word beats any way to spell it, longer parts beat characters, characters beat bytes."""
    listed = (FOLDER / "words.txt").read_text("utf-8").split()
    known = {word for text in words() for word in _WORD.findall(text)} | set(listed)
    marks = string.digits + string.punctuation
    pieces_of_words = sorted(word for word in known if len(word) > 1 and word not in frame)
    whole = [*frame, *string.ascii_letters, *marks, *pieces_of_words]
    pieces = [(token, 0.0) for token in special]
    pieces += [(f"▁{word}", -1.0) for word in whole]
    pieces += [("▁", -8.0)]
    pieces += [(affix, -9.0) for affix in _AFFIXES]
    pieces += [(letter, -10.0) for letter in string.ascii_letters]
    return pieces + [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]


if __name__ == "__main__":
    for kind in KINDS:
        print(f"{write(FOLDER / f'{kind}.json', kind)} tokens: {FOLDER / f'{kind}.json'}")
