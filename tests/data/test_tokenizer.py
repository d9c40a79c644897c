"""Tokenizers: what they refuse to encode, ids of letters, files as others write them, and files that do harm."""

import base64
import json
import os
import re

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from medcg_jax.data import tokenizer_limits
from medcg_jax.data.records import DataError
from medcg_jax.data.tokenizer import SMALL, load_tokenizer
from medcg_jax.families import registry

CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
TEXTS = ("USER: a", "the  option's   letter", " A", "A ", "\nB: Normal\n", "é µ", "", "A chat between")


def test_special_ids_of_a_word_file(word_tokenizer):
    special = [getattr(word_tokenizer, f"{name}_id") for name in ("pad", "bos", "eos", "image")]
    assert special == [0, 1, 2, 3]
    assert word_tokenizer.vocab_size == 23
    assert word_tokenizer.decode(word_tokenizer.encode("what is this ?")) == "what is this ?"
    assert word_tokenizer.decode([1, *word_tokenizer.encode("A"), 2, 0]) == "A"


def test_image_gets_the_first_free_id_of_a_bare_model(llama_model_file):
    tokenizer = load_tokenizer(llama_model_file)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 0)
    assert tokenizer.image_id == 420 and tokenizer.vocab_size == 421


def test_directory_prefers_the_model_and_knows_added_tokens(llama_model_file, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(llama_model_file.read_bytes())
    (tmp_path / "tokenizer.json").write_text("broken")
    added = {"420": {"content": "<image>"}, "421": {"content": "<pad>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.image_id, tokenizer.pad_id, tokenizer.vocab_size) == (420, 421, 422)


def test_start_puts_a_space_in_front_and_its_absence_none(llama_model_file):
    tokenizer = load_tokenizer(llama_model_file)
    assert tokenizer.encode("USER: a") == tokenizer.encode(" USER: a", start=False)
    assert tokenizer.encode("USER: a") != tokenizer.encode("USER: a", start=False)
    text = "USER: a\nb  c é"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", ["what is <image> ?", "A</s>", "<s> A", "<pad>", "unheard word"])
def test_special_and_unknown_text_is_refused(word_tokenizer, text):
    with pytest.raises(DataError, match="special or unknown"):
        word_tokenizer.encode(text)


def test_missing_and_unfit_files_are_one_line(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        load_tokenizer(tmp_path / "none.json")
    with pytest.raises(DataError, match="neither tokenizer.model nor tokenizer.json"):
        load_tokenizer(tmp_path)
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="ends a turn is missing; expected </s> or"):
        load_tokenizer(tmp_path)


# ------------------------------------------------------------------ which ids are special


def write(path, found) -> None:
    path.write_text(json.dumps(found), encoding="utf-8")


def qwen(tmp_path, *more: str):
    """A byte-level BPE like Qwen2's: `</s>`, `<s>` and `<unk>` are ordinary pieces before its special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *more, "</s>", "<s>", "<unk>"]
    inner = tokenizers.Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CHATML])
    inner.save(str(tmp_path / "tokenizer.json"))
    return inner


def test_an_ordinary_piece_does_not_make_a_llama_tokenizer(tmp_path):
    inner = qwen(tmp_path)
    found = load_tokenizer(tmp_path)
    special = {name: inner.token_to_id(name) for name in CHATML}
    assert (found.bos_id, found.eos_id, found.pad_id) == (None, special["<|im_end|>"], special["<|endoftext|>"])
    assert found.image_id == special["<|image_pad|>"] and found.vocab_size == 256 + 3 + len(CHATML)
    assert registry.family("qwen2_vl").token_ids(found)["image_token_id"] == special["<|image_pad|>"]
    # Spelled in a text they are text.
    assert found.decode(found.encode("</s> and <s>")) == "</s> and <s>"


def test_a_tokenizer_of_another_family_names_its_own_image(tmp_path):
    """ChatML's tokens with `<image>` added, as a LLaVA around another decoder has it."""
    inner = qwen(tmp_path)
    found = json.loads((tmp_path / "tokenizer.json").read_text())
    found["added_tokens"] = [t for t in found["added_tokens"] if t["content"] != "<|image_pad|>"]
    write(tmp_path / "tokenizer.json", found)
    inner = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    inner.add_special_tokens(["<image>", "<picture>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).image_id == inner.token_to_id("<image>")
    for file, said in (
        ("processor_config.json", {"image_token": "<picture>"}),
        ("tokenizer_config.json", {"extra_special_tokens": {"image_token": "<image>"}}),
        ("tokenizer_config.json", {"image_token": {"content": "<picture>"}}),
    ):
        write(tmp_path / file, said)
        expected = "<image>" if "extra_special_tokens" in said else "<picture>"
        assert load_tokenizer(tmp_path).image_id == inner.token_to_id(expected)


def test_nothing_is_cut_or_filled_by_what_a_file_says(tmp_path):
    inner = qwen(tmp_path)
    inner.enable_truncation(3)
    inner.enable_padding(length=64)
    inner.save(str(tmp_path / "tokenizer.json"))
    assert len(load_tokenizer(tmp_path).encode("abcdefgh")) == 8


# ------------------------------------------------------------------ Llama's two forms


def llama_json(model_file, out, *, form: str, special: bool) -> dict[str, int]:
    """tokenizer.json of a SentencePiece model, as transformers 4 ("prepend") or 5 ("first") writes it."""
    spm = pytest.importorskip("sentencepiece")
    model = spm.SentencePieceProcessor(model_file=str(model_file))
    pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    pairs = [
        (piece[:cut], piece[cut:]) for piece in pieces[3:] for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab and not piece.startswith("<0x")
    ]  # fmt: skip
    inner = tokenizers.Tokenizer(models.BPE(vocab, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if form == "prepend":
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    added = ["<im_patch>", "<im_start>", "<im_end>", "<at>", "<boxes>"]
    inner.add_tokens([AddedToken(token, special=special) for token in added])
    inner.save(str(out / "tokenizer.json"))
    return {token: inner.token_to_id(token) for token in added}


@pytest.mark.parametrize("form", ["prepend", "first"])
def test_a_tokenizer_json_gives_the_ids_of_its_model(llama_model_file, tmp_path, form):
    added = llama_json(llama_model_file, tmp_path, form=form, special=False)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "tokenizer.model").write_bytes(llama_model_file.read_bytes())
    write(tmp_path / "m" / "added_tokens.json", added)
    ours, theirs = load_tokenizer(tmp_path), load_tokenizer(tmp_path / "m")
    # NExT-Chat's added tokens are ordinary ones in its tokenizer.json.
    assert {name: ours.special(name) for name in added} == added == {name: theirs.special(name) for name in added}
    for name in ("bos_id", "eos_id", "pad_id", "image_id", "vocab_size", "text_ids"):
        assert getattr(ours, name) == getattr(theirs, name), name
    for text in TEXTS:
        for start in (True, False):
            assert ours.encode(text, start) == theirs.encode(text, start), (text, start)
        assert ours.encode_behind_added(text) == theirs.encode_behind_added(text), text
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))


def test_llamas_runs_of_blanks_are_merged_last(tmp_path):
    """Llama's own vocabulary gives runs of blanks the first ids and the lowest scores; transformers 5 writes merges by id."""
    from medcg_jax.data import tokenizer

    vocab = {f"<0x{i:02X}>": i + 3 for i in range(256)} | {
        "▁▁": 259,
        "▁t": 260,
        "▁[": 518,
        "▁": 29871,
        "t": 29872,
        "[": 29873,
    }
    merges = [["▁", "▁"], ["▁", "t"], ["▁", "["]]
    found = {"model": {"vocab": vocab, "merges": merges}}
    assert tokenizer._blanks_come_first(found)
    tokenizer._put_blanks_last(found)
    assert found["model"]["merges"] == [["▁", "t"], ["▁", "["], ["▁", "▁"]]
    assert not tokenizer._blanks_come_first(found)


def test_words_behind_an_added_token_are_cut_as_after_a_space(llama_model_file):
    found = load_tokenizer(llama_model_file)
    for text in ("A", "the option", "USER: a"):
        first, *rest = found.encode(text)
        behind = found.encode_behind_added(text)
        assert behind[len(behind) - len(rest) :] == rest
        assert behind in ([found._bare(first), *rest], rest)


# ------------------------------------------------------------------ which file of a directory


def test_a_readable_file_of_a_directory_is_taken(tmp_path, llama_model_file):
    qwen(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"garbage" * 40)
    assert load_tokenizer(tmp_path).path.name == "tokenizer.json"
    lines = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))
    (tmp_path / "tokenizer.model").write_bytes(lines)
    assert load_tokenizer(tmp_path).path.name == "tokenizer.json"
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(
        DataError, match="tokenizer.model: it is in tiktoken's form.*tokenizer.json of the same release"
    ):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"garbage" * 40)
    with pytest.raises(DataError, match="tokenizer.model: no SentencePiece model: ") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------ files that do harm


def changed(tmp_path, **parts) -> DataError:
    """How a tokenizer.json with these parts is refused."""
    qwen(tmp_path)
    found = json.loads((tmp_path / "tokenizer.json").read_text())
    model = found["model"] | parts.pop("model", {})
    write(tmp_path / "tokenizer.json", found | {"model": model} | parts)
    with pytest.raises(DataError) as error:
        load_tokenizer(tmp_path)
    line = str(error.value)
    assert "tokenizer.json" in line and "\n" not in line and len(line) < 600
    return error.value


GROW = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
TOKEN = {"content": "<x>", "special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"normalizer": {"type": "Sequence", "normalizers": [GROW] * 9}}, "make a text 100 times as long; at most 16"),
        ({"normalizer": {"type": "Replace", "pattern": {"Regex": ""}, "content": "b" * 99}}, "100 times as long"),
        ({"decoder": {"type": "Sequence", "decoders": [GROW] * 3}}, "the decoder's Replace rules"),
        ({"normalizer": {"type": "Prepend", "prepend": "a" * 999}}, "normalizer.prepend"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, 'type="Precompiled"; accepted'),
        ({"normalizer": ["NFC"]}, "normalizer has type"),
        ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}},
         r'pre_tokenizer.pattern="\(a\+\)\+\$": it repeats what holds a repeat'),
        ({"model": {"continuing_subword_prefix": "#" * 1000}}, "model.continuing_subword_prefix"),
        ({"model": {"dropout": 0.5}}, "model.dropout=0.5: ids would be drawn at random"),
        ({"model": {"vocab": {"a": -1}}}, r'model.vocab\["a"\]=-1: expected a whole number of at least 0'),
        ({"model": {"vocab": {"a": 10**12}}}, "at most 1,048,575"),
        ({"model": {"vocab": {"a" * 2000: 1}}}, "pieces of at most 1024 characters"),
        ({"model": {"vocab": 5}}, "model.vocab is a number"),
        ({"model": {"type": "Zip"}}, 'model.type="Zip"; accepted: BPE'),
        ({"added_tokens": [TOKEN | {"id": -1}]}, r'added_tokens\["<x>"\]=-1: expected a whole number'),
        ({"added_tokens": [TOKEN | {"id": 10**12}]}, "1,048,575"),
        ({"added_tokens": [TOKEN | {"id": "7"}]}, r'\["<x>"\]="7": expected a whole number'),
        ({"added_tokens": [TOKEN | {"id": 5}]}, "added_tokens states 5 for"),
        ({"added_tokens": {"<x>": 1}}, "a list of at most"),
    ],
    ids=str,
)  # fmt: skip
def test_what_could_do_harm_is_refused_by_its_structure(tmp_path, parts, message):
    assert re.search(message, str(changed(tmp_path, **parts)))


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"{}", b"[]", b"\xff\xfe{", b'{"model": null}', b"[" * 100_000, b'{"model": {"vocab": {"a": NaN}}}'],
)
def test_what_is_no_json_is_one_line(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match="tokenizer.json") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_limits_of_size_have_errors_of_their_own(tmp_path, monkeypatch):
    qwen(tmp_path)
    monkeypatch.setattr(tokenizer_limits, "MAX_TOKENIZER_ITEMS", 10)
    with pytest.raises(DataError, match="entries; at most 10 are read"):
        load_tokenizer(tmp_path)
    monkeypatch.setattr(tokenizer_limits, "MAX_TOKENIZER_BYTES", 10)
    with pytest.raises(DataError, match="bytes; at most 10 are read"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match="no regular file"):
        load_tokenizer(tmp_path)


REAL_PATTERNS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{M}]*[\p{Ll}\p{M}]+(?i:'s|'t)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s+",
)


@pytest.mark.parametrize("pattern", REAL_PATTERNS)
def test_patterns_of_released_tokenizers_are_taken(pattern):
    tokenizer_limits.check_pattern(pattern, "x")


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+$", "(a|a)*$", "(a|aa)+", "((ab)*c?){2,}", r"(.+)\1+", "a*a*a*b", "(?:a{1,50}){1,50}", "(a", "a)", "a" * 5000,
     "(?=(a+)+)b", "a{1,3}+$", "([a-z]+)*x"],
)  # fmt: skip
def test_patterns_that_may_not_end_are_refused(pattern):
    with pytest.raises(tokenizer_limits.FileError, match="x="):
        tokenizer_limits.check_pattern(pattern, "x")


def test_a_panic_of_the_library_is_an_error_of_the_file(tmp_path, capfd, monkeypatch):
    """What the structure does not show ends in one line, too."""
    monkeypatch.setattr(tokenizer_limits, "check_pattern", lambda *_: None)
    qwen(tmp_path)
    found = json.loads((tmp_path / "tokenizer.json").read_text())
    found["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    write(tmp_path / "tokenizer.json", found)
    with pytest.raises(DataError, match="cannot be tokenised: the library has failed"):
        load_tokenizer(tmp_path).encode("a" * 40 + "b")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("added_tokens.json", {"<image>": -1}, r'added_tokens.json\["<image>"\]=-1'),
        ("added_tokens.json", {"<image>": 10**12}, "at most 1,048,575"),
        ("added_tokens.json", {"<image>": "420"}, "a whole number"),
        ("added_tokens.json", {"<image>": 5}, 'id 5, which is "<0x02>" in the model'),
        ("added_tokens.json", {"<image>": 420, "<pad>": 420}, 'of "<pad>" and of "<image>"'),
        ("added_tokens.json", ["<image>"], "holds a list"),
        ("tokenizer_config.json", {"added_tokens_decoder": []}, ""),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"-1": {"content": "<image>"}}},
            r'added_tokens_decoder\["-1"\]',
        ),
        ("tokenizer_config.json", {"added_tokens_decoder": {"420": "<image>"}}, "ids with the content of their tokens"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"421": {"content": None}}}, "ids with the content"),
        ("tokenizer_config.json", {"added_tokens_decoder": 7}, "is a number; expected an object of ids"),
        ("tokenizer_config.json", {"pad_token": 7}, "pad_token is a number"),
        ("tokenizer_config.json", "{", "no JSON"),
        ("processor_config.json", {"image_token": [1]}, "image_token is a list"),
    ],
)
def test_files_beside_a_model_are_read_within_limits(llama_model_file, tmp_path, file, content, message):
    (tmp_path / "tokenizer.model").write_bytes(llama_model_file.read_bytes())
    if isinstance(content, str):
        (tmp_path / file).write_text(content)
    else:
        write(tmp_path / file, content)
    if not message:
        assert load_tokenizer(tmp_path).image_id == 420
        return
    with pytest.raises(DataError, match=message) as error:
        load_tokenizer(tmp_path)
    assert file in str(error.value) or "the files beside it" in str(error.value)
    assert "\n" not in str(error.value)


def test_two_files_that_contradict_each_other_are_refused(llama_model_file, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(llama_model_file.read_bytes())
    write(tmp_path / "added_tokens.json", {"<image>": 420})
    write(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": {"421": {"content": "<image>"}}})
    with pytest.raises(DataError, match='"<image>" has the id 421, and 420 elsewhere'):
        load_tokenizer(tmp_path)
    (tmp_path / "j").mkdir()
    inner = qwen(tmp_path / "j")
    end = inner.token_to_id("<|im_end|>")
    write(tmp_path / "j" / "tokenizer_config.json", {"added_tokens_decoder": {"9": {"content": "<|im_end|>"}}})
    with pytest.raises(
        DataError, match=f'states 9 for "<|im_end|>"; tokenizer.json beside it has {end}'.replace("|", r"\|")
    ):
        load_tokenizer(tmp_path / "j")


def test_a_model_that_rewrites_characters_is_refused(tmp_path):
    spm = pytest.importorskip("sentencepiece")
    prefix = str(tmp_path / "tokenizer")
    text = ["USER: what is this? ASSISTANT: A"] * 20
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_prefix=prefix, vocab_size=60, hard_vocab_limit=False, minloglevel=2
    )
    with pytest.raises(DataError, match="rules for characters of [0-9,]+ bytes"):
        load_tokenizer(tmp_path / "tokenizer.model")


def test_text_that_spells_a_special_token_is_refused_by_a_model_too(llama_model_file, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(llama_model_file.read_bytes())
    write(tmp_path / "added_tokens.json", {"<image>": 420})
    for path, text in ((tmp_path, "\n<image>\nwhat?"), (tmp_path, "A</s>"), (SMALL, "<image> what?")):
        with pytest.raises(DataError, match="it spells <(image|/s)>; take that out of the text"):
            load_tokenizer(path).encode(text)


def test_pieces_in_a_list_are_no_vocabulary_of_merges(tmp_path):
    whole = json.loads(SMALL.read_text("utf-8"))
    whole["model"]["vocab"] = [[piece, 0.0] for piece in whole["model"]["vocab"]]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(whole), "utf-8")
    with pytest.raises(DataError, match="tokenizer.json"):
        load_tokenizer(path)
