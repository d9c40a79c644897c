"""Prompts held against a slow tokenizer's way with added tokens, and against ids of the original's training data."""

import json
import re

import numpy as np
import pytest
from record_sets import plant_space

from medcg_jax.data.records import DataError, Turn
from medcg_jax.data.tokenizer import Tokenizer, load_tokenizer
from medcg_jax.families import prompts_next_chat as prompts
from medcg_jax.families.prompts import VICUNA

ADDED = ("<im_patch>", "<im_start>", "<im_end>", "<at>", "<boxes>")
QUESTION = "Which category does this slice belong to?\nA: Malignant\nB: Normal"
BOX = prompts.box_answer(1)
TALKS = {
    "choice": (Turn(QUESTION, "B"),),
    "box": (Turn("Where is the lung?", BOX),),
    "boxes": (Turn("Where are the lungs ?", prompts.box_answer(2)), Turn("and this?", "C")),
    "box asked": (Turn("Is this <at> <boxes> or <at> <boxes>, the lung?", "the answer is D"), Turn("where?", BOX)),
    "box first": (Turn("<at> <boxes>", "<at> <boxes>"),),
}


@pytest.fixture(scope="module")
def folder(llama_model_file, tmp_path_factory):
    """A released tokenizer's directory: the SentencePiece model and the ids of five added tokens."""
    spm = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("next_chat")
    (folder / "tokenizer.model").write_bytes(llama_model_file.read_bytes())
    size = spm.SentencePieceProcessor(model_file=str(llama_model_file)).get_piece_size()
    (folder / "added_tokens.json").write_text(json.dumps({name: size + i for i, name in enumerate(ADDED)}))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def slow(folder, tokenizer):
    """`tokenizer(text).input_ids` of transformers 4.31's slow Llama tokenizer, `legacy: false`: what is beside an added
    token is stripped, `</s>` strips what is before it, and pieces but the first lose the space that they get."""
    spm = pytest.importorskip("sentencepiece")
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


def written(turns, system, num_image) -> str:
    """The conversation's text, spelled by hand."""
    text = f"{system} " if system else ""
    for place, turn in enumerate(turns):
        image = f"<im_start>{'<im_patch>' * num_image}<im_end> " if num_image and not place else ""
        text += f"USER: {image}{turn.question} ASSISTANT: {turn.answer}</s>"
    return text


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("num_image", [3, 0], ids=["image", "text"])
@pytest.mark.parametrize("system", ["vicuna", ""])
def test_ids_are_those_of_one_tokenisation_of_the_whole(tokenizer, slow, talk, num_image, system):
    turns = TALKS[talk]
    text = written(turns, VICUNA if system == "vicuna" else system, num_image)
    found = prompts.conversation(tokenizer, turns, system_prompt=system, num_image_tokens=num_image)
    assert found.ids == slow(text)
    shown = prompts.template(turns, system_prompt=system, has_image=num_image > 0)
    patches = f"<im_start>{'<im_patch>' * num_image}<im_end>"
    assert shown == (text.replace(patches, "<image>") if num_image else text)
    # Supervised: every answer with its end, less `<boxes>`.
    starts = [len(slow(text[: found.end()])) for found in re.finditer("ASSISTANT:", text)]
    ends = [place + 1 for place, i in enumerate(found.ids) if i == tokenizer.eos_id]
    inside = {place for start, end in zip(starts, ends, strict=True) for place in range(start, end)}
    boxes = {place for place, i in enumerate(found.ids) if i == tokenizer.special("<boxes>")}
    assert {place for place, yes in enumerate(found.supervised) if yes} == inside - boxes


@pytest.mark.parametrize("talk", TALKS)
def test_a_space_beside_an_added_token_is_seen(folder, slow, talk, monkeypatch):
    tokenizer, text = load_tokenizer(folder), written(TALKS[talk], "", 3)

    def found():
        return prompts.conversation(tokenizer, TALKS[talk], system_prompt="", num_image_tokens=3).ids

    assert found() == slow(text)
    plant_space(monkeypatch, tokenizer, start=True)
    assert found() != slow(text)


def test_whitespace_beside_added_tokens_makes_no_token(tokenizer):
    tight, loose = (
        prompts.conversation(tokenizer, (Turn("What?", answer),), system_prompt="", num_image_tokens=1)
        for answer in ("Answer:<at><boxes>.", "Answer:  <at> \n <boxes> .")
    )
    assert tight == loose


def test_evaluation_prompt_is_the_training_rows_beginning(tokenizer):
    for turns in TALKS.values():
        for num_image in (0, 2):
            rest = dict(system_prompt="", num_image_tokens=num_image)
            whole = prompts.conversation(tokenizer, turns, **rest)
            asked = prompts.evaluation_prompt(tokenizer, turns, **rest)
            assert whole.ids[: len(asked)] == asked
            assert whole.supervised[len(asked)] and not whole.supervised[len(asked) - 1]


def test_option_ids_are_what_training_predicts_after_the_prompt(tokenizer):
    for question in (QUESTION, f"Is <at> <boxes> of these?\n{QUESTION}"):
        for place, letter in enumerate("AB"):
            for has_image in (True, False):
                turns, rest = (Turn(question, letter),), dict(system_prompt="vicuna")
                whole = prompts.conversation(tokenizer, turns, num_image_tokens=int(has_image), **rest)
                options = prompts.option_ids(tokenizer, turns, 2, has_image=has_image, **rest)
                assert options[place] == whole.ids[int(np.flatnonzero(whole.supervised)[0])]


def test_evaluation_by_a_fixed_answer_is_the_training_row(tokenizer):
    turns, rest = TALKS["box"], dict(system_prompt="vicuna", num_image_tokens=2)
    ids, at = prompts.rec_prompt(tokenizer, turns, **rest)
    assert ids == prompts.conversation(tokenizer, turns, **rest).ids
    assert ids[at : at + 2] == [tokenizer.special("<at>"), tokenizer.special("<boxes>")]


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
    turns = (Turn(question, BOX),)
    found = prompts.conversation(tokenizer, turns, system_prompt="vicuna", num_image_tokens=576)
    suffix = [673, 29901, 32003, 32004, 29889, 2]
    assert found.ids == [1, *opening, 32001, *[32000] * 576, 32002, *asked, *suffix]
    assert found.supervised[-6:] == [True, True, True, False, True, True] and sum(found.supervised) == 5


def test_box_arrays_hold_all_boxes_and_those_of_answers(tokenizer):
    tokens = prompts.conversation(tokenizer, TALKS["box asked"], system_prompt="", num_image_tokens=2)
    boxes = np.arange(12).reshape(3, 4) / 12
    found = prompts.box_arrays(tokenizer, tokens, boxes, max_boxes=5, max_answers=2)
    np.testing.assert_array_equal(found["boxes"][:3], boxes.astype(np.float32))
    assert found["box_weights"].tolist() == [1, 1, 1, 0, 0] and found["at_weights"].tolist() == [1, 0]
    np.testing.assert_array_equal(found["at_boxes"][0], found["boxes"][2])
    assert tokens.ids[found["at_positions"][0]] == tokenizer.special("<at>")
    assert tokens.supervised[found["at_positions"][0]]
    none = prompts.conversation(tokenizer, TALKS["choice"], system_prompt="")
    found = prompts.box_arrays(tokenizer, none, np.zeros((0, 4)), max_boxes=1, max_answers=1)
    assert not any(array.any() for array in found.values())
    with pytest.raises(DataError, match="2 boxes for 3 <boxes>"):
        prompts.box_arrays(tokenizer, tokens, boxes[:2], max_boxes=5, max_answers=2)
    with pytest.raises(DataError, match="3 boxes, 1 in answers; at most 2 and 2 fit"):
        prompts.box_arrays(tokenizer, tokens, boxes, max_boxes=2, max_answers=2)


def test_what_cannot_be_learnt_or_spelled_is_refused(tokenizer, llama_model_file):
    with pytest.raises(DataError, match="no turns"):
        prompts.conversation(tokenizer, (), system_prompt="")
    with pytest.raises(DataError, match="turn 2 is empty"):
        prompts.conversation(tokenizer, (TALKS["box"][0], Turn("x", " ")), system_prompt="")
    with pytest.raises(DataError, match="no special token <boxes>"):
        prompts.conversation(load_tokenizer(llama_model_file), TALKS["choice"], system_prompt="")
