"""Prompts and labels, held against the original's way of making them: whole text, re-tokenised pieces."""

import numpy as np
import pytest
from record_sets import plant_space

from medcg_jax.data.records import DataError, Turn
from medcg_jax.data.tokenizer import load_tokenizer
from medcg_jax.families import prompts

QUESTION = "Which lung cancer category does this slice belong to?\nA: Malignant\nB: Normal\nAnswer with the letter."
ONE = (Turn(QUESTION, "B"),)
THREE = (Turn("Which lung?", "A"), Turn("and this one?\nA: Normal", "the answer is D"), Turn("and this?", "C"))
IGNORED = -100
SENTINEL = -200


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


@pytest.fixture(scope="module")
def original(llama_model_file):
    pytest.importorskip("google.protobuf", reason="protobuf is not installed")
    return Original(llama_model_file)


@pytest.fixture(scope="module")
def llama(llama_model_file):
    return load_tokenizer(llama_model_file)


def written(turns, system, image) -> str:
    """The conversation's text, spelled by hand."""
    text = f"{system} " if system else ""
    for place, turn in enumerate(turns):
        tag = "<image>\n" if image and place == 0 else ""
        text += f"USER: {tag}{turn.question} ASSISTANT: {turn.answer}</s>"
    return text


@pytest.mark.parametrize("turns", [ONE, THREE], ids=["one turn", "three turns"])
@pytest.mark.parametrize("image", [True, False], ids=["image", "text"])
@pytest.mark.parametrize("system", ["vicuna", "Look well.", ""])
def test_ids_and_labels_are_the_originals(original, llama, turns, image, system):
    system_text = prompts.VICUNA if system == "vicuna" else system
    text = written(turns, system_text, image)
    ids, labels = original.labels(text)
    found = prompts.conversation(llama, turns, system_prompt=system, num_image_tokens=int(image))
    assert [SENTINEL if i == llama.image_id else i for i in found.ids] == ids
    assert [i if yes else IGNORED for i, yes in zip(found.ids, found.supervised, strict=True)] == labels
    assert prompts.template(turns, system_prompt=system, has_image=image) == text


@pytest.mark.parametrize(
    ("turns", "image", "before"),
    [(ONE, True, ""), (THREE, False, " ")],
    ids=["none behind an image", "one behind </s>"],
)
def test_wrong_spaces_behind_special_tokens_are_seen(original, llama_model_file, monkeypatch, turns, image, before):
    tokenizer = load_tokenizer(llama_model_file)
    ids, _ = original.labels(written(turns, "", image))

    def found():
        ids = prompts.conversation(tokenizer, turns, system_prompt="", num_image_tokens=int(image)).ids
        return [SENTINEL if i == tokenizer.image_id else i for i in ids]

    assert found() == ids
    plant_space(monkeypatch, tokenizer, before=before)
    assert found() != ids


def test_the_turn_with_the_image_is_stripped_as_the_original_does(llama):
    padded, plain = (
        prompts.conversation(llama, (Turn(text, "A"),), system_prompt="", num_image_tokens=1)
        for text in (" \n" + QUESTION + "\n ", QUESTION)
    )
    assert padded == plain


def test_the_oracle_tells_a_space_in_front_from_none(original):
    assert original.slow("a</s>USER: b") != original.slow("a") + [2] + original.slow("USER: b")[1:]


def test_supervised_tokens_are_the_answer_and_its_end(llama):
    found = prompts.conversation(llama, ONE, system_prompt="vicuna", num_image_tokens=3)
    supervised = [i for i, yes in zip(found.ids, found.supervised, strict=True) if yes]
    assert supervised == [llama.letter_ids("ASSISTANT:", ["B"])[0], llama.eos_id]
    assert found.ids.count(llama.image_id) == 3


def test_evaluation_prompt_is_the_training_rows_beginning(llama, word_tokenizer):
    words = (Turn("what is this ?", "A"), Turn("what is it ?\nA: mild", "B"))
    for tokenizer, turns in ((llama, ONE), (llama, THREE), (word_tokenizer, words)):
        for image_tokens in (0, 2):
            whole = prompts.conversation(tokenizer, turns, system_prompt="", num_image_tokens=image_tokens)
            asked = prompts.evaluation_prompt(tokenizer, turns, system_prompt="", num_image_tokens=image_tokens)
            assert whole.ids[: len(asked)] == asked
            assert whole.supervised[len(asked)] and not whole.supervised[len(asked) - 1]


def test_option_ids_are_what_training_predicts_after_the_prompt(llama):
    for place, letter in enumerate("AB"):
        turns = (Turn(QUESTION, letter),)
        whole = prompts.conversation(llama, turns, system_prompt="vicuna", num_image_tokens=1)
        options = prompts.option_ids(llama, turns, 2, system_prompt="vicuna", has_image=True)
        assert options[place] == whole.ids[int(np.flatnonzero(whole.supervised)[0])]


def test_letters_of_a_word_inside_are_other_tokens(llama):
    # The trap of MODELS.md: a letter encoded without its space is another id, and was never trained.
    inside = llama.encode("A", start=False)
    assert inside != llama.letter_ids("ASSISTANT:", ["A"])


@pytest.mark.parametrize(
    ("turns", "reason"),
    [((), "no turns"), ((Turn("what ?", " "),), "turn 1 is empty"), ((*THREE, Turn("x", "")), "turn 4 is empty")],
)
def test_nothing_to_learn_is_refused(llama, turns, reason):
    with pytest.raises(DataError, match=reason):
        prompts.conversation(llama, turns, system_prompt="")


def test_fingerprint_follows_format_and_tokenizer(llama, word_tokenizer):
    prints = {prompts.fingerprint(t, s) for t in (llama, word_tokenizer) for s in ("vicuna", "", "Look.")}
    assert len(prints) == 6
    assert prompts.fingerprint(llama, "vicuna") == prompts.fingerprint(llama, prompts.VICUNA)
