"""Prompts and labels of every family: against tokenisations of the whole text, the originals' steps, and each other."""

import json
import re

import numpy as np
import prompt_files
import pytest
from prompt_files import ADDED, IGNORED, SENTINEL, Original
from record_sets import plant_space

from medcg_jax.data.records import DataError, Turn
from medcg_jax.data.tokenizer import Tokenizer, load_tokenizer
from medcg_jax.families.llava import rows as llava
from medcg_jax.families.minigpt_v2 import rows as minigpt_v2
from medcg_jax.families.minigpt_v2.boxes import format_boxes
from medcg_jax.families.mllama import rows as mllama
from medcg_jax.families.next_chat import rows as next_chat
from medcg_jax.families.prompts import VICUNA
from medcg_jax.families.qwen2_vl import rows as qwen2_vl

PROMPTS = {
    name: rows.PROMPTS
    for name, rows in {
        "llava": llava, "qwen2_vl": qwen2_vl, "mllama": mllama, "minigpt_v2": minigpt_v2, "next_chat": next_chat,
    }.items()
}  # fmt: skip
QUESTION = "Which category?\nA: left\nB: right"
ONE = (Turn(QUESTION, "B"),)
THREE = (Turn("Which lung?", "A"), Turn("and this one?\nA: Normal", "the answer is D"), Turn("and this?", "C"))
BOX = next_chat.box_answer(1)
TALKS = {
    "one turn": ONE,
    "three turns": THREE,
    "box": (Turn("Where is the lung?", BOX),),
    "boxes": (Turn("Where are the lungs ?", next_chat.box_answer(2)), Turn("and this?", "C")),
    "box asked": (Turn("Is this <at> <boxes> or <at> <boxes>, the lung?", "the answer is D"), Turn("where?", BOX)),
    "box first": (Turn("<at> <boxes>", "<at> <boxes>"),),
}
IMAGE = 3


@pytest.fixture(scope="module")
def files(llama_model_file, tmp_path_factory):
    """Family -> file or folder of a tokenizer with that family's rules."""
    return prompt_files.write_all(tmp_path_factory.mktemp("tokenizers"), llama_model_file)


@pytest.fixture(scope="module")
def tokenizers(files):
    return {family: load_tokenizer(path) for family, path in files.items()}


def supervised(tokens) -> list[int]:
    return [i for i, yes in zip(tokens.ids, tokens.supervised, strict=True) if yes]


# ------------------------------------------------------------------ all families


@pytest.mark.parametrize("family", PROMPTS)
@pytest.mark.parametrize("num_image", [0, 2])
def test_an_evaluation_prompt_is_the_beginning_of_the_training_row(tokenizers, family, num_image):
    prompts, tokenizer = PROMPTS[family], tokenizers[family]
    for turns in TALKS.values() if family == "next_chat" else (ONE, THREE):
        options = dict(system_prompt="", num_image_tokens=num_image)
        whole = prompts.conversation(tokenizer, turns, **options)
        asked = prompts.evaluation_prompt(tokenizer, turns, **options)
        if family == "minigpt_v2":
            # One <s> more, and one space less where the last turn has an image or others before it.
            assert asked[:2] == [tokenizer.bos_id] * 2
            asked = asked[1:]
            if num_image or len(turns) > 1:
                assert asked[-len(tokenizer.encode(" [/INST]")) :] != whole.ids[: len(asked)]
                continue
        assert whole.ids[: len(asked)] == asked
        assert whole.supervised[len(asked)] and not whole.supervised[len(asked) - 1]


@pytest.mark.parametrize("family", PROMPTS)
@pytest.mark.parametrize("has_image", [True, False])
def test_option_ids_are_what_training_predicts_behind_the_prompt(tokenizers, family, has_image):
    prompts, tokenizer = PROMPTS[family], tokenizers[family]
    questions = [QUESTION, f"Is <at> <boxes> of these?\n{QUESTION}"] if family == "next_chat" else [QUESTION]
    for question in questions:
        options = prompts.option_ids(tokenizer, (Turn(question, "A"),), 2, system_prompt="", has_image=has_image)
        for option, letter in zip(options, "AB", strict=True):
            turns = (Turn(question, letter),)
            whole = prompts.conversation(tokenizer, turns, system_prompt="", num_image_tokens=int(has_image))
            assert option == whole.ids[int(np.flatnonzero(whole.supervised)[0])]


def test_letters_elsewhere_are_other_tokens(tokenizers):
    """The trap: a letter with another space before it was never trained."""
    llama, chatml, llama3 = (tokenizers[family] for family in ("llava", "qwen2_vl", "mllama"))
    assert llama.encode("A", start=False) != llama.encode("ASSISTANT: A")[-1:]
    options = PROMPTS["qwen2_vl"].option_ids(chatml, ONE, 2, system_prompt="", has_image=True)
    assert options != [chatml.encode(f"assistant\n {letter}")[-1] for letter in "AB"]
    assert llama3.encode(" A") != PROMPTS["mllama"].option_ids(llama3, ONE, 1, system_prompt="", has_image=True)
    with pytest.raises(DataError, match="option 'E' is 2 tokens"):
        turns = (Turn(QUESTION, "E"),)
        PROMPTS["minigpt_v2"].option_ids(tokenizers["minigpt_v2"], turns, 5, system_prompt="", has_image=True)


@pytest.mark.parametrize("family", PROMPTS)
def test_what_cannot_be_learnt_or_asked_is_refused(tokenizers, word_tokenizer, family):
    prompts, tokenizer, options = PROMPTS[family], tokenizers[family], dict(system_prompt="")
    for function in (prompts.conversation, prompts.evaluation_prompt):
        with pytest.raises(DataError, match="no turns"):
            function(tokenizer, (), **options)
    with pytest.raises(DataError, match="turn 4 is empty"):
        prompts.conversation(tokenizer, (*THREE, Turn("x", " ")), **options)
    spelled = {"llava": "</s>", "qwen2_vl": "<|im_end|>", "mllama": "<|image|>"}.get(family, "</s>")
    with pytest.raises(DataError, match="special or unknown"):
        prompts.conversation(tokenizer, (Turn(f"what {spelled}", "A"),), **options)
    if family == "qwen2_vl":
        with pytest.raises(DataError, match="changes the tokens of its prompt"):
            prompts.conversation(tokenizer, (Turn("x", "\nB"),), **options)
    first = {"qwen2_vl": r"<\|im_start\|>", "mllama": r"<\|begin_of_text\|>", "next_chat": "<boxes>"}.get(family)
    if first:
        with pytest.raises(DataError, match=f"no special token {first}"):
            prompts.conversation(word_tokenizer, ONE, **options)
        if family != "next_chat":
            with pytest.raises(DataError, match="system_prompt='vicuna' is LLaVA-1.5's"):
                prompts.evaluation_prompt(tokenizer, ONE, system_prompt="vicuna")
    if family == "minigpt_v2":
        with pytest.raises(DataError, match="system_prompt='vicuna': MiniGPT-v2's prompt has no"):
            prompts.evaluation_prompt(tokenizer, ONE, system_prompt="vicuna")


@pytest.mark.parametrize("family", ["mllama", "minigpt_v2"])
def test_packaged_tokenizers_ask_and_score_too(family):
    prompts, small = PROMPTS[family], load_tokenizer("", {"mllama": "llama3"}.get(family, family))
    whole = prompts.conversation(small, ONE, system_prompt="", num_image_tokens=1)
    option = prompts.option_ids(small, ONE, 2, system_prompt="", has_image=True)[1]
    assert whole.ids[-2:] == [option, small.eos_id] and whole.ids.count(small.image_id) == 1


# ------------------------------------------------------------------ against the whole text


def written(family: str, turns, system: str, num_image: int) -> str:
    """The conversation's text, spelled by hand, of families whose text can be tokenised as a whole."""
    text = {"mllama": "<|begin_of_text|>"}.get(family, "")
    if family == "qwen2_vl" and system:
        text = f"<|im_start|>system\n{system}<|im_end|>\n"
    elif family == "mllama" and system:
        text += f"<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>"
    elif system:
        text = f"{system} "
    for place, turn in enumerate(turns):
        question, answer = turn.question, turn.answer
        num = 0 if place else num_image
        if family == "llava":
            text += f"USER: {'<image>' + chr(10) if num else ''}{question} ASSISTANT: {answer}</s>"
        elif family == "next_chat":
            image = f"<im_start>{'<im_patch>' * num}<im_end> " if num else ""
            text += f"USER: {image}{question} ASSISTANT: {answer}</s>"
        elif family == "qwen2_vl":
            image = f"<|vision_start|>{'<|image_pad|>' * num}<|vision_end|>" if num else ""
            text += f"<|im_start|>user\n{image}{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
        else:
            head = "<|start_header_id|>{}<|end_header_id|>\n\n"
            text += f"{head.format('user')}{'<|image|>' * num}{question.strip()}<|eot_id|>"
            text += f"{head.format('assistant')}{answer.strip()}<|eot_id|>"
    return text


@pytest.fixture(scope="module")
def whole_ids(files, llama_model_file):
    """Family -> function that tokenises a whole text as the original's library does."""
    import tokenizers as library

    def of_file(path):
        inner = library.Tokenizer.from_file(str(path))
        return lambda text: inner.encode(text, add_special_tokens=False).ids

    slow = prompt_files.slow_with_added(files["next_chat"]) if "next_chat" in files else None
    return {"qwen2_vl": of_file(files["qwen2_vl"]), "mllama": of_file(files["mllama"]), "next_chat": slow}


CASES = [
    *((family, talk) for family in ("qwen2_vl", "mllama") for talk in ("one turn", "three turns")),
    *(("next_chat", talk) for talk in TALKS),
]


@pytest.mark.parametrize(("family", "talk"), CASES)
@pytest.mark.parametrize("num_image", [0, 1])
def test_ids_are_those_of_the_whole_text(tokenizers, whole_ids, family, talk, num_image):
    own = {"qwen2_vl": ("qwen2", qwen2_vl.QWEN2), "next_chat": ("vicuna", VICUNA)}.get(family, ("Look well.",) * 2)
    for system, sentence in (own, ("", "")):
        text = written(family, TALKS[talk], sentence, num_image)
        options = dict(system_prompt=system, num_image_tokens=num_image)
        found = PROMPTS[family].conversation(tokenizers[family], TALKS[talk], **options)
        assert found.ids == whole_ids[family](text)
        # Supervised: every answer with its end, less `<boxes>`.
        end = {"qwen2_vl": "<|im_end|>", "mllama": "<|eot_id|>", "next_chat": "</s>"}[family]
        head = {"qwen2_vl": "assistant\n", "mllama": "assistant<|end_header_id|>\n\n", "next_chat": "ASSISTANT:"}[
            family
        ]
        inside = set()
        for answer in re.finditer(re.escape(head) + r"(.*?)" + re.escape(end), text, re.S):
            inside |= set(range(*(len(whole_ids[family](text[:stop])) for stop in (answer.start(1), answer.end()))))
        if family == "next_chat":
            box = tokenizers[family].special("<boxes>")
            inside -= {place for place, i in enumerate(found.ids) if i == box}
        assert {place for place, yes in enumerate(found.supervised) if yes} == inside


@pytest.mark.parametrize(("family", "talk"), [("qwen2_vl", "three turns"), ("mllama", "three turns"), *CASES[4:]])
def test_a_space_beside_a_special_token_is_seen(files, whole_ids, family, talk, monkeypatch):
    tokenizer = load_tokenizer(files[family])
    expected = whole_ids[family](written(family, TALKS[talk], "", 1))

    def found():
        return PROMPTS[family].conversation(tokenizer, TALKS[talk], system_prompt="", num_image_tokens=1).ids

    assert found() == expected
    plant_space(monkeypatch, tokenizer, **({"start": True} if family == "next_chat" else {}))
    assert found() != expected


# ------------------------------------------------------------------ Vicuna


@pytest.fixture(scope="module")
def original(llama_model_file):
    pytest.importorskip("google.protobuf", reason="protobuf is not installed")
    return Original(llama_model_file)


@pytest.mark.parametrize("turns", [ONE, THREE], ids=["one turn", "three turns"])
@pytest.mark.parametrize("image", [True, False], ids=["image", "text"])
@pytest.mark.parametrize("system", ["vicuna", "Look well.", ""])
def test_vicunas_ids_and_labels_are_the_originals(original, tokenizers, turns, image, system):
    ids, labels = original.labels(written("llava", turns, VICUNA if system == "vicuna" else system, image))
    options = dict(system_prompt=system, num_image_tokens=int(image))
    found = PROMPTS["llava"].conversation(tokenizers["llava"], turns, **options)
    assert [SENTINEL if i == tokenizers["llava"].image_id else i for i in found.ids] == ids
    assert [i if yes else IGNORED for i, yes in zip(found.ids, found.supervised, strict=True)] == labels


@pytest.mark.parametrize(
    ("turns", "image", "before"),
    [(ONE, True, ""), (THREE, False, " ")],
    ids=["none behind an image", "one behind </s>"],
)
def test_vicunas_wrong_spaces_behind_special_tokens_are_seen(original, files, monkeypatch, turns, image, before):
    tokenizer = load_tokenizer(files["llava"])
    ids, _ = original.labels(written("llava", turns, "", image))

    def found():
        ids = PROMPTS["llava"].conversation(tokenizer, turns, system_prompt="", num_image_tokens=int(image)).ids
        return [SENTINEL if i == tokenizer.image_id else i for i in ids]

    assert found() == ids
    plant_space(monkeypatch, tokenizer, before=before)
    assert found() != ids
    assert original.slow("a</s>USER: b") != original.slow("a") + [2] + original.slow("USER: b")[1:]


def test_the_turn_with_the_image_is_stripped_as_the_original_does(tokenizers):
    padded, plain = (
        PROMPTS["llava"].conversation(tokenizers["llava"], (Turn(text, "A"),), system_prompt="", num_image_tokens=1)
        for text in (" \n" + QUESTION + "\n ", QUESTION)
    )
    assert padded == plain


# ------------------------------------------------------------------ ids written down


def test_chatmls_ids(tokenizers):
    """256 bytes (`!` is the first, a line break 198), words (system 260, user 263, assistant 271), special from 282."""
    tokenizer = tokenizers["qwen2_vl"]
    assert [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.image_id] == [None, 284, 282, 287]
    assert tokenizer.decode([284, *tokenizer.encode("user answer"), 282]) == "user answer"
    found = PROMPTS["qwen2_vl"].conversation(tokenizer, (Turn("!", "!"),), system_prompt="!", num_image_tokens=2)
    system = [283, 260, 198, 0, 284, 198]
    user = [283, 263, 198, 285, 287, 287, 286, 0, 284, 198]
    assert found.ids == [*system, *user, 283, 271, 198, 0, 284, 198]
    assert [i for i, yes in enumerate(found.supervised) if yes] == [19, 20]


def test_llama3s_ids(tokenizers):
    """256 bytes and 17 joined pieces, so the special tokens are 273 to 278."""
    tokenizer = tokenizers["mllama"]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.image_id, tokenizer.pad_id) == (273, 276, 277, 278)
    found = PROMPTS["mllama"].conversation(tokenizer, (Turn("a", " A "),), system_prompt="", num_image_tokens=1)
    user, assistant, breaks, a, letter = 258, 266, 267, 64, 32
    assert found.ids == [273, 274, user, 275, breaks, 277, a, 276, 274, assistant, 275, breaks, letter, 276]
    assert found.supervised == [False] * 12 + [True] * 2


# ------------------------------------------------------------------ MiniGPT-v2


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


def test_instructions_are_the_originals(stand_in, shared_dir):
    """Training rows and evaluation prompts of the golden arrays, from their text."""
    prompts = minigpt_v2.Instructions(task="")
    for path in sorted((shared_dir / "golden" / "minigpt_v2").glob("*/inputs.json")):
        inputs = json.loads(path.read_text())
        num = json.loads((path.parent / "config.json").read_text())["num_image_tokens"]
        texts, options = inputs["stand_in_text"], dict(system_prompt="", num_image_tokens=num)
        question = re.compile(r"</Img> (.*?) ?(?:\[/INST\])?$")
        for piece, asked, answer in zip(
            inputs["train"], texts["train_instruction"], texts["train_answer"], strict=True
        ):
            expected = [1, *piece["before_image"], *[IMAGE] * num, *piece["after_image"]]
            found = prompts.conversation(stand_in, (Turn(question.search(asked)[1], answer),), **options)
            assert found.ids == expected + piece["answer"]
            assert found.supervised == [False] * len(expected) + [True] * len(piece["answer"])
        for piece, text in zip(inputs["generate"], texts["gen_text"], strict=True):
            expected = [*piece["before_image"], *[IMAGE] * num, *piece["after_image"]]
            assert prompts.evaluation_prompt(stand_in, (Turn(question.search(text)[1], ""),), **options) == expected


def test_instructions_are_tokenised_piece_by_piece(files, monkeypatch):
    """Every piece opens a chunk, the one behind an image too, and has one space of its own: not two."""
    tokenizer, prompts = load_tokenizer(files["minigpt_v2"]), PROMPTS["minigpt_v2"]
    options = dict(system_prompt="", num_image_tokens=2)
    bos, eos, encode = [tokenizer.bos_id], [tokenizer.eos_id], tokenizer.encode
    before, after = encode("[INST] <Img>"), encode(f"</Img> [vqa] {QUESTION}  [/INST]")
    expected = [*bos, *before, IMAGE, IMAGE, *after, *encode("B"), *eos]
    found = prompts.conversation(tokenizer, ONE, **options)
    assert found.ids == expected and supervised(found) == expected[-2:]
    asked = [*bos, *bos, *before, IMAGE, IMAGE, *encode(f"</Img> [vqa] {QUESTION} [/INST]")]
    assert prompts.evaluation_prompt(tokenizer, ONE, **options) == asked
    # Text alone, and later turns.
    turns = (Turn("Which?", "A"), Turn("[refer] the left", "{<12><40>}"))
    first = bos + encode("[INST] [vqa] Which? [/INST]") + encode("A") + eos
    second = bos + encode("[INST] [refer] the left  [/INST]") + encode("{<12><40>}") + eos
    assert prompts.conversation(tokenizer, turns, system_prompt="").ids == first + second
    asked = prompts.evaluation_prompt(tokenizer, turns, system_prompt="")
    assert asked == bos + first + bos + encode("[INST] [refer] the left [/INST]")
    # The image stands in the first turn alone.
    assert prompts.evaluation_prompt(tokenizer, turns, system_prompt="", num_image_tokens=3).count(IMAGE) == 3
    plant_space(monkeypatch, tokenizer, start=True)
    assert prompts.conversation(tokenizer, ONE, **options).ids != expected


@pytest.mark.parametrize("task", [*minigpt_v2.TASKS, ""])
def test_a_question_is_tagged_unless_it_has_a_tag(task):
    def text(question):
        options = dict(first=True, system_prompt="", has_image=True, training=True)
        return minigpt_v2.Instructions(task).pieces(Turn(question, "A"), **options)[-1].text

    tag = f"[{task}] " if task else ""
    assert text(" where? ") == f"</Img> {tag}where?  [/INST]"
    for name in minigpt_v2.TASKS:
        assert text(f"[{name}] where?") == f"</Img> [{name}] where?  [/INST]"
    assert text("[12] where?") == f"</Img> {tag}[12] where?  [/INST]"


def test_boxes_are_plain_text(tokenizers):
    """`><` is one piece, digits stand alone."""
    llama = tokenizers["minigpt_v2"]
    ids = llama.encode(format_boxes([[12, 40, 99, 100]], (100, 100)))
    assert [llama.decode([i]) for i in ids] == list("▁{<12") + ["><"] + list("40") + ["><"] + [*"99", "><", *"100>}"]


# ------------------------------------------------------------------ NExT-Chat


def test_whitespace_beside_added_tokens_makes_no_token(tokenizers):
    tight, loose = (
        PROMPTS["next_chat"].conversation(tokenizers["next_chat"], (Turn("What?", answer),), system_prompt="")
        for answer in ("Answer:<at><boxes>.", "Answer:  <at> \n <boxes> .")
    )
    assert tight == loose


def test_ids_of_the_originals_mock_row():
    """Pieces of text and their ids, as the row that the original adds to every batch has them."""
    opening = [319, 13563, 1546, 263, 12758, 1404, 322, 385, 23116, 21082, 20255, 29889, 450, 20255, 4076, 8444, 29892,
               13173, 29892, 322, 1248, 568, 6089, 304, 278, 1404, 29915, 29879, 5155, 29889, 3148, 1001, 29901]  # fmt: skip
    asked = [3524, 403, 5107, 4480, 304, 22780, 372, 297, 278, 1967, 319, 1799, 9047, 13566, 29901]
    question = "Locate picture closest to touching it in the image"
    pieces = {
        (f"{VICUNA} USER:", True): opening,
        (f"{question} ASSISTANT:", False): asked,
        (f"{question} ASSISTANT: Answer:", False): [*asked, 673, 29901],
        (".", False): [29889],
    }
    special = {name: 32000 + i for i, name in enumerate(ADDED)}
    tokenizer = Tokenizer(
        lambda text, start: pieces[text, start], str, bos_id=1, eos_id=2, pad_id=0, image_id=32000, unk_id=0,
        vocab_size=32005, fingerprint="", special=special,
    )  # fmt: skip
    options = dict(system_prompt="vicuna", num_image_tokens=576)
    found = PROMPTS["next_chat"].conversation(tokenizer, (Turn(question, BOX),), **options)
    suffix = [673, 29901, 32003, 32004, 29889, 2]
    assert found.ids == [1, *opening, 32001, *[32000] * 576, 32002, *asked, *suffix]
    assert found.supervised[-6:] == [True, True, True, False, True, True] and sum(found.supervised) == 5


def test_box_arrays_hold_all_boxes_and_those_of_answers(tokenizers):
    tokenizer, prompts = tokenizers["next_chat"], PROMPTS["next_chat"]
    tokens = prompts.conversation(tokenizer, TALKS["box asked"], system_prompt="", num_image_tokens=2)
    boxes = np.arange(12).reshape(3, 4) / 12
    found = next_chat.box_arrays(tokenizer, tokens, boxes, max_boxes=5)
    np.testing.assert_array_equal(found["boxes"][:3], boxes.astype(np.float32))
    assert found["box_weights"].tolist() == [1, 1, 1, 0, 0] and found["at_weights"].tolist() == [1, 0, 0, 0, 0]
    np.testing.assert_array_equal(found["at_boxes"][0], found["boxes"][2])
    assert tokens.ids[found["at_positions"][0]] == tokenizer.special("<at>")
    assert tokens.supervised[found["at_positions"][0]]
    assert {name: array.dtype.name for name, array in found.items()} == {
        "boxes": "float32", "box_weights": "float32", "at_positions": "int32", "at_boxes": "float32",
        "at_weights": "float32",
    }  # fmt: skip
    none = next_chat.box_arrays(
        tokenizer, prompts.conversation(tokenizer, ONE, system_prompt=""), np.zeros((0, 4)), max_boxes=1
    )
    assert not any(array.any() for array in none.values())
    assert {name: array.shape for name, array in none.items()} == {
        name: (1, *array.shape[1:]) for name, array in found.items()
    }
    with pytest.raises(DataError, match="2 boxes for 3 <boxes>"):
        next_chat.box_arrays(tokenizer, tokens, boxes[:2], max_boxes=5)
    with pytest.raises(DataError, match="3 boxes; at most 2 fit"):
        next_chat.box_arrays(tokenizer, tokens, boxes, max_boxes=2)
