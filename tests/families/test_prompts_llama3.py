"""Llama 3 prompts held against golden ids, and against the whole text tokenised at once by a file like Llama 3's."""

import numpy as np
import pytest
import tokenizers
from record_sets import plant_space
from tokenizers import decoders, models, pre_tokenizers

from medcg_jax.data.records import DataError, Turn
from medcg_jax.data.tokenizer import SMALL, load_tokenizer
from medcg_jax.families import prompts_llama3 as prompts

SPECIAL = (
    "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|image|>",
    "<|finetune_right_pad_id|>",
)  # fmt: skip
# Llama 3's rule of what is never joined.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MERGES = [
    ("u", "s"), ("e", "r"), ("us", "er"), ("a", "s"), ("s", "i"), ("as", "si"), ("s", "t"), ("assi", "st"), ("a", "n"),
    ("an", "t"), ("assist", "ant"), ("Ċ", "Ċ"), (":", "Ċ"), ("Ġ", "A"), ("Ġ", "B"), ("?", "Ċ"), ("ĊĊ", "A"),
]  # fmt: skip
QUESTION = "Which one is it?\nA: Normal\nB: Malignant\nC: Benign\nAnswer with the letter."
ONE = (Turn(QUESTION, "B"),)
TWO = (Turn("  Is it?\n", " no "), Turn(QUESTION, "A"))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate([*alphabet, *("".join(pair) for pair in MERGES)])}
    inner = tokenizers.Tokenizer(models.BPE(vocab, MERGES))
    split = pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(list(SPECIAL))
    path = tmp_path_factory.mktemp("llama3") / "tokenizer.json"
    inner.save(str(path))
    return path


@pytest.fixture(scope="module")
def llama3(file):
    return load_tokenizer(file)


def test_golden_ids(llama3):
    """256 bytes and 17 joined pieces, so the special tokens are 273 to 278."""
    assert [llama3.special(name) for name in SPECIAL] == [273, 274, 275, 276, 277, 278]
    assert (llama3.bos_id, llama3.eos_id, llama3.image_id, llama3.pad_id) == (273, 276, 277, 278)
    found = prompts.conversation(llama3, (Turn("a", "A"),), system_prompt="", num_image_tokens=1)
    user, assistant, breaks, a, letter = 258, 266, 267, 64, 32
    assert found.ids == [273, 274, user, 275, breaks, 277, a, 276, 274, assistant, 275, breaks, letter, 276]
    assert found.supervised == [False] * 12 + [True] * 2


@pytest.mark.parametrize("turns", [ONE, TWO], ids=["one turn", "two turns"])
@pytest.mark.parametrize("image", [0, 1])
@pytest.mark.parametrize("system", ["", "Look well."])
def test_ids_are_those_of_the_whole_text(file, llama3, turns, image, system):
    text = "<|begin_of_text|>"
    if system:
        text += f"<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>"
    for place, turn in enumerate(turns):
        tag = "<|image|>" if image and not place else ""
        text += f"<|start_header_id|>user<|end_header_id|>\n\n{tag}{turn.question.strip()}<|eot_id|>"
        text += f"<|start_header_id|>assistant<|end_header_id|>\n\n{turn.answer.strip()}<|eot_id|>"
    assert prompts.template(turns, system_prompt=system, has_image=bool(image)) == text
    whole = tokenizers.Tokenizer.from_file(str(file)).encode(text, add_special_tokens=False).ids
    found = prompts.conversation(llama3, turns, system_prompt=system, num_image_tokens=image)
    assert found.ids == whole
    asked = prompts.evaluation_prompt(llama3, turns, system_prompt=system, num_image_tokens=image)
    assert whole[: len(asked)] == asked
    assert found.supervised[len(asked) :] == [True, True]


def test_a_space_behind_a_special_token_is_seen(file, monkeypatch):
    tokenizer, inner = load_tokenizer(file), tokenizers.Tokenizer.from_file(str(file))
    whole = inner.encode(prompts.template(TWO, system_prompt="", has_image=True), add_special_tokens=False).ids

    def found():
        return prompts.conversation(tokenizer, TWO, system_prompt="", num_image_tokens=1).ids

    assert found() == whole
    plant_space(monkeypatch, tokenizer)
    assert found() != whole


def test_supervised_are_the_answers_and_their_ends(llama3):
    found = prompts.conversation(llama3, TWO, system_prompt="", num_image_tokens=1)
    said = [i for i, yes in zip(found.ids, found.supervised, strict=True) if yes]
    assert said == [*llama3.encode("no"), 276, *llama3.encode("A"), 276]


def test_option_ids_are_what_training_predicts_after_the_prompt(llama3):
    options = prompts.option_ids(llama3, ONE, 3, system_prompt="", has_image=True)
    for letter, option in zip("ABC", options, strict=True):
        found = prompts.conversation(llama3, (Turn(QUESTION, letter),), system_prompt="", num_image_tokens=1)
        assert option == found.ids[int(np.flatnonzero(found.supervised)[0])]
    # The trap: with a space before it, or joined to the line breaks, a letter is another token.
    assert llama3.encode(" A") != options[:1]


def test_the_packaged_tokenizer_asks_and_scores_too():
    small = load_tokenizer(SMALL.parent / "llama3.json")
    found = prompts.conversation(small, ONE, system_prompt="", num_image_tokens=1)
    asked = prompts.evaluation_prompt(small, ONE, system_prompt="", num_image_tokens=1)
    assert found.ids[: len(asked)] == asked
    assert found.ids[len(asked) :] == [
        prompts.option_ids(small, ONE, 2, system_prompt="", has_image=True)[1],
        small.eos_id,
    ]
    assert found.ids.count(small.image_id) == 1


def test_what_cannot_be_asked_or_learnt_is_refused(llama3, word_tokenizer):
    with pytest.raises(DataError, match="no turns"):
        prompts.conversation(llama3, (), system_prompt="")
    with pytest.raises(DataError, match="no turns"):
        prompts.evaluation_prompt(llama3, (), system_prompt="")
    with pytest.raises(DataError, match="turn 2 is empty"):
        prompts.conversation(llama3, (*ONE, Turn("x", " ")), system_prompt="")
    with pytest.raises(DataError, match="special or unknown"):
        prompts.conversation(llama3, (Turn("what is <|image|>", "A"),), system_prompt="")
    with pytest.raises(DataError, match="system_prompt='vicuna' is LLaVA-1.5's sentence"):
        prompts.evaluation_prompt(llama3, ONE, system_prompt="vicuna")
    with pytest.raises(DataError, match=r"no special token <\|begin_of_text\|>"):
        prompts.conversation(word_tokenizer, ONE, system_prompt="")
