"""Loading tokenizers, what they refuse to encode, and the ids of option letters."""

import json

import pytest
import tokenizers

from medcg_jax.data.records import DataError
from medcg_jax.data.tokenizer import load_tokenizer


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


def test_letters_are_one_token_each(word_tokenizer):
    ids = word_tokenizer.letter_ids("what ?\nASSISTANT:", "ABCD")
    assert [word_tokenizer.decode([i]) for i in ids] == list("ABCD")


def bytes_tokenizer(tmp_path, merges):
    """Byte-level BPE, whose merges may cross from the prompt into the answer."""
    vocab = {c: i for i, c in enumerate(["<pad>", "</s>", "Ġ", ":", *"ABCDE"])}
    for left, right in merges:
        vocab[left + right] = len(vocab)
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.add_special_tokens(["<pad>", "</s>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    return load_tokenizer(tmp_path)


def test_a_letter_that_changes_the_prompt_is_refused(tmp_path):
    tokenizer = bytes_tokenizer(tmp_path, [(":", "Ġ"), (":Ġ", "A")])
    with pytest.raises(DataError, match="'A' changes the tokens of the prompt"):
        tokenizer.letter_ids("E:", "A")


def test_a_letter_of_two_tokens_is_refused(tmp_path):
    tokenizer = bytes_tokenizer(tmp_path, [("Ġ", "A")])
    assert len(tokenizer.letter_ids("E:", "A")) == 1
    with pytest.raises(DataError, match="'B' is 2 tokens"):
        tokenizer.letter_ids("E:", "AB")
    with pytest.raises(DataError, match="share a token"):
        tokenizer.letter_ids("E:", "AA")


def test_missing_and_unfit_files_are_one_line(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        load_tokenizer(tmp_path / "none.json")
    with pytest.raises(DataError, match="neither tokenizer.model nor tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="tokenizer.json"):
        load_tokenizer(tmp_path)
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="ends a turn is missing; </s> or"):
        load_tokenizer(tmp_path)
