"""Builds the tiny model's tokenizer: whole words for the study's own text, characters and bytes for everything else.

A Unigram model with given pieces, so nothing is trained and the file is the same wherever it is built:
the words of the phantom world and of `tokenizer/words.txt` (modalities, areas, tasks and labels of the paper's tables,
common words of questions about medical images, LLaVA-1.5's system sentence) are one token each; other words are split
into known pieces and single characters; other characters become their UTF-8 bytes. Space and line breaks are dropped: a
piece that opens a word has "▁" before it, so `A` is one token, the same in an option and in an answer. The colon behind a
lone capital (`A: mild`) is dropped too: rows are a sixth shorter, and a letter stands right before its option.
`ASSISTANT:` and `USER:` are one token each.
"""

from __future__ import annotations

import re
import string
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from medcg_jax.data import phantom_text

FOLDER = Path(__file__).parent / "tokenizer"
SPECIAL = ("<pad>", "<s>", "</s>", "<image>")
ROLES = ("USER:", "ASSISTANT:")
_WORD = re.compile(r"[A-Za-z]+")
# Endings and beginnings that words outside the list share; whole words are always preferred.
_PARTS = tuple("ing ed es er ly ion tion al ic ity ment ness ous oma itis ology graphy graph scopy emia path osis".split())


def build() -> tokenizers.Tokenizer:
    """The tokenizer. Ids 0 to 3 are `<pad>`, `<s>`, `</s>`, `<image>`."""
    tokenizer = tokenizers.Tokenizer(models.Unigram(_pieces(), unk_id=0, byte_fallback=True))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    # Words of letters; anything else but space by itself. Roles keep their colon, option letters do not.
    pattern = Regex(r"USER:|ASSISTANT:|\p{L}[\p{L}\p{M}]*|(?<!\b[A-Z]):|[^\s:]")
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


def write(path: Path = FOLDER / "tokenizer.json") -> int:
    """Writes the file; the number of tokens."""
    tokenizer = build()
    path.write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
    return tokenizer.get_vocab_size()


def _pieces() -> list[tuple[str, float]]:
    """(piece, score): any whole word beats any way to spell it, longer parts beat characters, characters beat bytes."""
    listed = (FOLDER / "words.txt").read_text("utf-8").split()
    known = {word for text in phantom_text.words() for word in _WORD.findall(text)} | set(listed)
    marks = string.digits + string.punctuation
    whole = [*ROLES, *string.ascii_letters, *marks, *sorted(word for word in known if len(word) > 1)]
    pieces = [(token, 0.0) for token in SPECIAL]
    pieces += [(f"▁{word}", -1.0) for word in whole]
    pieces += [("▁", -8.0)]
    pieces += [(part, -9.0) for part in _PARTS]
    pieces += [(letter, -10.0) for letter in string.ascii_letters]
    return pieces + [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]


if __name__ == "__main__":
    print(f"{write()} tokens: {FOLDER / 'tokenizer.json'}")
