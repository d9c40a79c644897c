"""MiniGPT-v2's prompts and labels, held against the original's ids and against its way of tokenising piece by piece."""

import json
import re

import numpy as np
import pytest
import tokenizers
from record_sets import plant_space

from medcg_jax.data.records import DataError, Turn
from medcg_jax.data.tokenizer import Tokenizer, load_tokenizer
from medcg_jax.families import prompts_minigpt as prompts
from medcg_jax.families.minigpt_v2.boxes import format_boxes

QUESTION = "Which lung?\nA: left\nB: right"
IMAGE = 3


@pytest.fixture(scope="module")
def stand_in():
    """The tokenizer of the golden arrays: `tN` is id N, and no space counts."""
    fixed = {"<s>": 1, "</s>": 2, "[INST]": 5, "[/INST]": 6, "<Img>": 7, "</Img>": 8}
    piece = re.compile(r"\s*(" + "|".join([*map(re.escape, fixed), r"t\d+"]) + ")")

    def encode(text: str, start: bool) -> list[int]:
        assert start, "the original tokenises every piece as a text of its own"
        found = piece.findall(text)
        assert piece.sub("", text).strip() == ""
        return [fixed[word] if word in fixed else int(word[1:]) for word in found]

    return Tokenizer(
        encode, str, bos_id=1, eos_id=2, pad_id=9, image_id=3, unk_id=None, vocab_size=131, fingerprint="stand-in"
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tokenizer.json with the Llama family's rules: a space before every text, spaces kept, bytes for the rest."""
    text = "[INST] <Img></Img> [vqa] Which lung?\nA: left\nB: right [/INST] A B C D {<12><40>}"
    special = ["<unk>", "<s>", "</s>", "<image>"]
    letters = sorted(set(text.replace(" ", "▁")) | set("0123456789"))
    vocab = {token: i for i, token in enumerate([*special, *(f"<0x{b:02X}>" for b in range(256)), *letters])}
    merges = [*(("▁", letter) for letter in "ABCD["), ("I", "N"), ("S", "T"), (">", "<")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    inner.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    inner.add_special_tokens(special)
    path = tmp_path_factory.mktemp("llama_json") / "tokenizer.json"
    inner.save(str(path))
    return load_tokenizer(path)


def golden_folders(shared_dir):
    return sorted(path.parent for path in (shared_dir / "golden" / "minigpt_v2").glob("*/inputs.json"))


def test_ids_are_the_originals(stand_in, shared_dir):
    """Training rows and evaluation prompts of the golden arrays, from their text."""
    for folder in golden_folders(shared_dir):
        inputs = json.loads((folder / "inputs.json").read_text())
        texts, num = inputs["stand_in_text"], json.loads((folder / "config.json").read_text())["num_image_tokens"]
        rest = dict(system_prompt="", num_image_tokens=num, task="")
        question = re.compile(r"</Img> (.*?) ?(?:\[/INST\])?$")
        for piece, asked, answer in zip(
            inputs["train"], texts["train_instruction"], texts["train_answer"], strict=True
        ):
            turns = (Turn(question.search(asked)[1], answer),)
            expected = [1, *piece["before_image"], *[IMAGE] * num, *piece["after_image"]]
            found = prompts.conversation(stand_in, turns, **rest)
            assert found.ids == expected + piece["answer"]
            assert found.supervised == [False] * len(expected) + [True] * len(piece["answer"])
            # `[BOS]` once, both before and behind the image spelled as the original's text.
            assert prompts.template(turns, system_prompt="", has_image=True, task="") == (
                f"<s>[INST] {asked} [/INST]{answer}</s>"
            )
        for piece, text in zip(inputs["generate"], texts["gen_text"], strict=True):
            turns = (Turn(question.search(text)[1], ""),)
            expected = [*piece["before_image"], *[IMAGE] * num, *piece["after_image"]]
            assert prompts.evaluation_prompt(stand_in, turns, **rest) == expected
            assert prompts.evaluation_prompt(stand_in, turns, **rest, double_bos=False) == expected[1:]


def test_pieces_are_tokenised_apart_each_with_its_own_space(llama):
    turns = (Turn(QUESTION, "B"),)
    found = prompts.conversation(llama, turns, system_prompt="", num_image_tokens=2)
    before, after = llama.encode("[INST] <Img>"), llama.encode(f"</Img> [vqa] {QUESTION}  [/INST]")
    assert found.ids == [llama.bos_id, *before, IMAGE, IMAGE, *after, *llama.encode("B"), llama.eos_id]
    assert [i for i, yes in zip(found.ids, found.supervised, strict=True) if yes] == found.ids[-2:]
    # What can be told apart here: a space more, and the text around the image as one.
    assert llama.encode("a [/INST]") != llama.encode("a  [/INST]")
    assert llama.encode("[INST] <Img></Img>") != [*llama.encode("[INST] <Img>"), *llama.encode("</Img>")]


def test_a_space_beside_a_special_token_is_seen(llama, monkeypatch):
    """Every piece opens a chunk here, the one behind an image too, and has one space of its own: not two."""
    turns = (Turn(QUESTION, "B"),)
    before, after = llama.encode("[INST] <Img>"), llama.encode(f"</Img> [vqa] {QUESTION}  [/INST]")
    expected = [llama.bos_id, *before, IMAGE, IMAGE, *after, *llama.encode("B"), llama.eos_id]

    def found():
        return prompts.conversation(llama, turns, system_prompt="", num_image_tokens=2).ids

    assert found() == expected
    plant_space(monkeypatch, llama, start=True)
    assert found() != expected


def test_evaluation_has_one_space_and_two_bos(llama):
    turns = (Turn(QUESTION, "B"),)
    found = prompts.evaluation_prompt(llama, turns, system_prompt="", num_image_tokens=2)
    after = llama.encode(f"</Img> [vqa] {QUESTION} [/INST]")
    assert found == [llama.bos_id, llama.bos_id, *llama.encode("[INST] <Img>"), IMAGE, IMAGE, *after]
    assert prompts.evaluation_prompt(llama, turns, system_prompt="", num_image_tokens=2, double_bos=False) == found[1:]


def test_an_options_letter_is_what_training_predicts(llama):
    for place, letter in enumerate("ABCD"):
        turns = (Turn(QUESTION, letter),)
        whole = prompts.conversation(llama, turns, system_prompt="", num_image_tokens=1)
        options = prompts.option_ids(llama, turns, 4, system_prompt="", has_image=True)
        assert options[place] == whole.ids[int(np.flatnonzero(whole.supervised)[0])]
    with pytest.raises(DataError, match="option 'E' is 2 tokens"):
        prompts.option_ids(llama, (Turn(QUESTION, "E"),), 5, system_prompt="", has_image=True)


def test_the_packaged_tokenizer_has_the_frame_as_words():
    small = load_tokenizer("", "minigpt_v2")
    turns = (Turn("What is this?\nA: mild\nB: severe", "B"),)
    whole = prompts.conversation(small, turns, system_prompt="", num_image_tokens=2)
    assert len(small.encode("[INST] <Img>")) == 2
    assert whole.ids[-2:] == [prompts.option_ids(small, turns, 2, system_prompt="", has_image=True)[1], small.eos_id]


def test_text_alone_and_later_turns(llama):
    turns = (Turn("Which?", "A"), Turn("[refer] the left", "{<12><40>}"))
    one, two = llama.encode("[INST] [vqa] Which? [/INST]"), llama.encode("[INST] [refer] the left  [/INST]")
    found = prompts.conversation(llama, turns, system_prompt="")
    bos, eos = [llama.bos_id], [llama.eos_id]
    first = bos + one + llama.encode("A") + eos
    assert found.ids == first + bos + two + llama.encode("{<12><40>}") + eos
    asked = prompts.evaluation_prompt(llama, turns, system_prompt="")
    assert asked == bos + first + bos + llama.encode("[INST] [refer] the left [/INST]")
    # The image stands in the first turn alone.
    with_image = prompts.evaluation_prompt(llama, turns, system_prompt="", num_image_tokens=3)
    assert with_image.count(IMAGE) == 3 and with_image[-4:] == asked[-4:]
    assert prompts.template(turns, system_prompt="", has_image=False) == (
        "<s>[INST] [vqa] Which? [/INST]A</s><s>[INST] [refer] the left  [/INST]{<12><40>}</s>"
    )


@pytest.mark.parametrize("task", [*prompts.TASKS, ""])
def test_a_question_is_tagged_unless_it_has_a_tag(task):
    def text(question):
        return prompts.template((Turn(question, "A"),), system_prompt="", has_image=True, task=task)

    tag = f"[{task}] " if task else ""
    assert text(" where? ") == f"<s>[INST] <Img><ImageHere></Img> {tag}where?  [/INST]A</s>"
    for name in prompts.TASKS:
        assert text(f"[{name}] where?") == f"<s>[INST] <Img><ImageHere></Img> [{name}] where?  [/INST]A</s>"
    assert text("[12] where?") == f"<s>[INST] <Img><ImageHere></Img> {tag}[12] where?  [/INST]A</s>"


def test_boxes_are_plain_text(llama):
    """`><` is one piece, digits stand alone."""
    ids = llama.encode(format_boxes([[12, 40, 99, 100]], (100, 100)))
    assert [llama.decode([i]) for i in ids] == list("▁{<12") + ["><"] + list("40") + ["><"] + [*"99", "><", *"100>}"]


@pytest.mark.parametrize(
    ("turns", "given", "reason"),
    [
        ((), {}, "no turns"),
        ((Turn("what?", " "),), {}, "answer of turn 1 is empty"),
        ((Turn("what?", "A"),), {"system_prompt": "vicuna"}, "system_prompt='vicuna': MiniGPT-v2's prompt has no"),
        ((Turn("what?", "A"),), {"task": "box"}, "task='box'; accepted: vqa, caption"),
        ((Turn("what </s> ?", "A"),), {}, "special or unknown"),
    ],
)
def test_what_cannot_be_asked_is_refused(llama, turns, given, reason):
    with pytest.raises(DataError, match=reason):
        prompts.conversation(llama, turns, **{"system_prompt": "", **given})
    if "empty" not in reason:
        with pytest.raises(DataError, match=reason):
            prompts.evaluation_prompt(llama, turns, **{"system_prompt": "", **given})
