"""ChatML prompts held against one tokenisation of the whole text, and against ids written down."""

import numpy as np
import pytest
import tokenizers
from record_sets import plant_space
from tokenizers import decoders, models, pre_tokenizers

from medcg_jax.data.records import DataError, Turn
from medcg_jax.data.tokenizer import load_tokenizer
from medcg_jax.families import prompts_chatml as prompts

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
# Qwen2's way to cut text into words.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QUESTION = "Which category?\nA: mild\nB: severe\nAnswer with the letter."
ONE = (Turn(QUESTION, "B"),)
THREE = (Turn("Which lung?", "A"), Turn("and this one?\nA: Normal", "the answer is D"), Turn("and this?", "C"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(path, the tokenizers library's own reading of it): byte-level BPE with a few whole words."""
    merges = {}
    for word in ("system", "user", "assistant", "ĠA", "ĠB", ":Ċ", "ĊĊ", "Ġanswer"):
        for end in range(2, len(word) + 1):
            merges[word[: end - 1], word[end - 1]] = None
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate([*alphabet, *dict.fromkeys(a + b for a, b in merges)])}
    inner = tokenizers.Tokenizer(models.BPE(vocab, list(merges)))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(list(SPECIAL))
    path = tmp_path_factory.mktemp("qwen") / "tokenizer.json"
    inner.save(str(path))
    return path, inner


@pytest.fixture(scope="module")
def qwen(files):
    return load_tokenizer(files[0])


def written(turns, system, num_image) -> str:
    """The conversation's text, spelled by hand."""
    text = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    for place, turn in enumerate(turns):
        image = f"<|vision_start|>{'<|image_pad|>' * num_image}<|vision_end|>" if num_image and not place else ""
        text += f"<|im_start|>user\n{image}{turn.question}<|im_end|>\n<|im_start|>assistant\n{turn.answer}<|im_end|>\n"
    return text


@pytest.mark.parametrize("turns", [ONE, THREE], ids=["one turn", "three turns"])
@pytest.mark.parametrize("num_image", [0, 5])
@pytest.mark.parametrize("system", ["qwen2", "Look well.", ""])
def test_ids_are_those_of_the_whole_text(files, qwen, turns, num_image, system):
    text = written(turns, prompts.QWEN2 if system == "qwen2" else system, num_image)
    found = prompts.conversation(qwen, turns, system_prompt=system, num_image_tokens=num_image)
    assert found.ids == files[1].encode(text).ids
    supervised = [i for i, yes in zip(found.ids, found.supervised, strict=True) if yes]
    end = qwen.special("<|im_end|>")
    assert supervised == [i for turn in turns for i in [*qwen.encode(turn.answer), end]]
    shown = prompts.template(turns, system_prompt=system, has_image=num_image > 0)
    assert shown == written(turns, prompts.QWEN2 if system == "qwen2" else system, min(num_image, 1))


def test_a_space_behind_a_special_token_is_seen(files, monkeypatch):
    tokenizer, whole = load_tokenizer(files[0]), files[1].encode(written(THREE, "", 5)).ids

    def found():
        return prompts.conversation(tokenizer, THREE, system_prompt="", num_image_tokens=5).ids

    assert found() == whole
    plant_space(monkeypatch, tokenizer)
    assert found() != whole


def test_ids_written_down(qwen):
    """256 bytes (`!` is the first, a line break 198), words (system 260, user 263, assistant 271), SPECIAL from 282."""
    found = prompts.conversation(qwen, (Turn("!", "!"),), system_prompt="!", num_image_tokens=2)
    system = [283, 260, 198, 0, 284, 198]
    user = [283, 263, 198, 285, 287, 287, 286, 0, 284, 198]
    assert found.ids == [*system, *user, 283, 271, 198, 0, 284, 198]
    assert [i for i, yes in enumerate(found.supervised) if yes] == [19, 20]


def test_evaluation_prompt_is_the_training_rows_beginning(qwen):
    for turns in (ONE, THREE):
        for num_image in (0, 2):
            whole = prompts.conversation(qwen, turns, system_prompt="qwen2", num_image_tokens=num_image)
            asked = prompts.evaluation_prompt(qwen, turns, system_prompt="qwen2", num_image_tokens=num_image)
            assert whole.ids[: len(asked)] == asked
            assert whole.supervised[len(asked)] and not whole.supervised[len(asked) - 1]


def test_option_ids_are_what_training_predicts_after_the_prompt(qwen):
    for place, letter in enumerate("AB"):
        whole = prompts.conversation(qwen, (Turn(QUESTION, letter),), system_prompt="qwen2", num_image_tokens=1)
        options = prompts.option_ids(qwen, ONE, 2, system_prompt="qwen2", has_image=True)
        assert options[place] == whole.ids[int(np.flatnonzero(whole.supervised)[0])]
    # The trap: a letter behind a space is another token, and was never trained.
    assert options != qwen.letter_ids("assistant\n", "AB")


def test_special_tokens_in_text_are_refused(qwen):
    for text in ("what?<|im_end|>", "<|image_pad|>", "a <|video_pad|>"):
        with pytest.raises(DataError, match="special or unknown"):
            prompts.conversation(qwen, (Turn(text, "A"),), system_prompt="")
    with pytest.raises(DataError, match="system_prompt='vicuna' is LLaVA-1.5's"):
        prompts.conversation(qwen, ONE, system_prompt="vicuna")


@pytest.mark.parametrize(
    ("turns", "reason"),
    [((), "no turns"), ((*THREE, Turn("x", " ")), "turn 4 is empty"), ((Turn("x", "\nB"),), "changes")],
)
def test_nothing_to_learn_is_refused(qwen, turns, reason):
    with pytest.raises(DataError, match=reason):
        prompts.conversation(qwen, turns, system_prompt="")


def test_the_family_is_known_by_its_tokens(qwen, word_tokenizer):
    assert [qwen.bos_id, qwen.eos_id, qwen.pad_id, qwen.image_id] == [None, 284, 282, 287]
    assert qwen.vocab_size == 289
    assert qwen.decode([284, *qwen.encode("user answer"), 282]) == "user answer"
    with pytest.raises(DataError, match=r"no special token <\|im_start\|>; it has <pad>, <s>"):
        prompts.conversation(word_tokenizer, ONE, system_prompt="")
