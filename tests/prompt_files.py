"""Tokenizer files with the rules of every family, written from a few pieces; and two originals' ways to tokenise."""

import json
import re
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from medcg_jax.data.tokenizer import load_tokenizer

IGNORED, SENTINEL = -100, -200
ADDED = ("<im_patch>", "<im_start>", "<im_end>", "<at>", "<boxes>")
CHATML = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
LLAMA3 = (
    "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|image|>",
    "<|finetune_right_pad_id|>",
)  # fmt: skip
# How both cut text into words; Llama 3's numbers have up to three digits.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_MERGES = [
    ("u", "s"), ("e", "r"), ("us", "er"), ("a", "s"), ("s", "i"), ("as", "si"), ("s", "t"), ("assi", "st"), ("a", "n"),
    ("an", "t"), ("assist", "ant"), ("Ċ", "Ċ"), (":", "Ċ"), ("Ġ", "A"), ("Ġ", "B"), ("?", "Ċ"), ("ĊĊ", "A"),
]  # fmt: skip


def write_all(folder: Path, llama_model_file: Path) -> dict[str, Path]:
    """Family -> file, or folder, of its tokenizer."""
    words = ("system", "user", "assistant", "ĠA", "ĠB", ":Ċ", "ĊĊ", "Ġanswer")
    merges = list(dict.fromkeys((word[: end - 1], word[end - 1]) for word in words for end in range(2, len(word) + 1)))
    return {
        "llava": llama_model_file,
        "qwen2_vl": byte_level(folder / "chatml.json", merges, PATTERN.format(digits=""), CHATML),
        "mllama": byte_level(folder / "llama3.json", LLAMA3_MERGES, PATTERN.format(digits="{1,3}"), LLAMA3),
        "minigpt_v2": llama2(folder / "llama2.json"),
        "next_chat": next_chat(folder / "next_chat", llama_model_file),
    }


def byte_level(path: Path, merges: list[tuple[str, str]], pattern: str, special: tuple[str, ...]) -> Path:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate([*alphabet, *dict.fromkeys(a + b for a, b in merges)])}
    inner = tokenizers.Tokenizer(models.BPE(vocab, merges))
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(list(special))
    inner.save(str(path))
    return path


def llama2(path: Path) -> Path:
    """The Llama family's rules: a space before every text, spaces kept, bytes for the rest."""
    text = (
        "[INST] <Img></Img> [vqa] Which category lung?\nA: left\nB: right [/INST] A B C D {<12><40>}and this one the "
        "answer is Normal"
    )
    special = ["<unk>", "<s>", "</s>", "<image>"]
    letters = sorted(set(text.replace(" ", "▁")) | set("0123456789"))
    vocab = {token: i for i, token in enumerate([*special, *(f"<0x{b:02X}>" for b in range(256)), *letters])}
    merges = [*(("▁", letter) for letter in "ABCD["), ("I", "N"), ("S", "T"), (">", "<")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    inner = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    inner.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    inner.add_special_tokens(special)
    inner.save(str(path))
    return path


def next_chat(folder: Path, llama_model_file: Path) -> Path:
    """A released tokenizer's directory: the SentencePiece model and the ids of five added tokens."""
    import sentencepiece as spm

    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(llama_model_file.read_bytes())
    size = spm.SentencePieceProcessor(model_file=str(llama_model_file)).get_piece_size()
    (folder / "added_tokens.json").write_text(json.dumps({name: size + i for i, name in enumerate(ADDED)}))
    return folder


def slow_with_added(folder: Path):
    """`tokenizer(text).input_ids` of transformers 4.31's slow Llama tokenizer, `legacy: false`.

    What is beside an added token is stripped, `</s>` strips what is before it, and pieces but the first lose the space
    that they get.
    """
    import sentencepiece as spm

    tokenizer = load_tokenizer(folder)
    model = spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))

    def behind(piece: str) -> list[int]:
        first, *rest = model.encode(piece, out_type=str)
        # As `LlamaTokenizer._tokenize`, whose pieces become ids one by one.
        return [model.piece_to_id(p) for p in [*([first[1:]] if first != "▁" else []), *rest]]

    def ids(text: str) -> list[int]:
        found, pieces = [model.bos_id()], re.split("(" + "|".join([*ADDED, "</s>"]) + ")", text)
        for place, piece in enumerate(pieces):
            if piece in ADDED:
                found.append(tokenizer.special(piece))
            elif piece == "</s>":
                found.append(model.eos_id())
            else:
                before, after = pieces[place - 1] if place else "", pieces[place + 1] if place + 1 < len(pieces) else ""
                piece = piece.lstrip() if before in ADDED else piece
                piece = piece.rstrip() if after in (*ADDED, "</s>") else piece
                found += (behind(piece) if place else model.encode(piece)) if piece else []
        return found

    return ids


class Original:
    """LLaVA's steps over a slow Llama tokenizer with `legacy: false`, from transformers 4.37's rules.

    Text behind a special token gets no space in front, which here is a second model with that switched off.
    """

    def __init__(self, model_file):
        import sentencepiece as spm
        from sentencepiece import sentencepiece_model_pb2 as proto

        self.first = spm.SentencePieceProcessor(model_file=str(model_file))
        spec = proto.ModelProto.FromString(model_file.read_bytes())
        spec.normalizer_spec.add_dummy_prefix = False
        self.later = spm.SentencePieceProcessor(model_proto=spec.SerializeToString())

    def slow(self, text: str) -> list[int]:
        """`tokenizer(text).input_ids`: BOS first, `</s>` found in the text."""
        ids = [self.first.bos_id()]
        for place, piece in enumerate(text.split("</s>")):
            ids += [self.first.eos_id()] if place else []
            ids += (self.later if place else self.first).encode(piece) if piece else []
        return ids

    def with_image(self, text: str) -> list[int]:
        """Chunks around `<image>` tokenised apart, the later ones' BOS dropped."""
        chunks = [self.slow(chunk) for chunk in text.split("<image>")]
        return chunks[0] + [i for chunk in chunks[1:] for i in [SENTINEL, *chunk[1:]]]

    def labels(self, text: str) -> tuple[list[int], list[int]]:
        """Ids, and labels by the lengths of re-tokenised rounds."""
        ids = self.with_image(text)
        labels = list(ids)
        # The original subtracts 1 in later rounds, which is what Llama's `▁USER` has more than its `USER`.
        extra = len(self.first.encode("USER:")) - len(self.later.encode("USER:"))
        labels[:1], at = [IGNORED], 1
        for place, whole in enumerate(text.split("</s>")):
            if not whole:
                break
            instruction = whole.split(" ASSISTANT: ")[0] + " ASSISTANT: "
            off = extra if place else 0
            asked = len(self.with_image(instruction)) - 2 - off
            labels[at : at + asked] = [IGNORED] * asked
            at += len(self.with_image(whole)) - off
        assert at == len(ids)
        return ids, labels
