"""The prompts of every family with released tokenizers, held against what the originals give for 36 conversations.

Needs the folder `shared` (tokenizers, and ids of the original code); without it the tests are skipped.
"""

import importlib
import json

import pytest

from medcg_jax.data.records import DataError, Turn
from medcg_jax.data.tokenizer import load_tokenizer
from medcg_jax.families import registry

IMAGE = -200
# Directory -> (bos, eos, pad, image, number of ids).
IDS = {
    "vicuna": (1, 2, 0, 32000, 32001),
    "llama2_chat": (1, 2, 0, 32000, 32001),
    "next_chat": (1, 2, 0, 32005, 32006),
    "llava_hf": (1, 2, 32001, 32000, 32002),
    "llama32_vision": (128000, 128009, 128004, 128256, 128257),
    "qwen2_vl_json_alone": (None, 151645, 151643, 151655, 151657),
}
# Directory of the tokenizer, system's sentence, reference, whether it says what is supervised, rows, of which refused.
FAMILIES = {
    "llava": ("llava_hf", "vicuna", "ref_llava_437", True, 72, 0),
    "minigpt_v2": ("llama2_chat", "", "ref_minigpt", True, 72, 0),
    "mllama": ("llama32_vision", "", "ref_llama3", False, 72, 0),
    "mllama of Meta": ("llama32_vision", "", "ref_meta", False, 72, 0),
    "qwen2_vl": ("qwen2_vl_json_alone", "qwen2", "ref_qwen", False, 72, 2),
    "next_chat": ("next_chat", "vicuna", "ref_next", False, 80, 0),
}
# Rows that the original masks wrongly: questions that spell "ASSISTANT: ".
MASKED_WRONGLY = {"llava": {50, 51, 52, 53}}


@pytest.fixture(scope="module")
def folder(shared_dir):
    if not (shared_dir / "tokenizers").is_dir():
        pytest.skip("../shared has no tokenizers")
    return shared_dir


@pytest.fixture(scope="module")
def tokenizers(folder):
    return {name: load_tokenizer(folder / "tokenizers" / name) for name in IDS}


@pytest.mark.parametrize("name", IDS)
def test_special_ids_of_released_tokenizers(tokenizers, name):
    found = tokenizers[name]
    assert (found.bos_id, found.eos_id, found.pad_id, found.image_id, found.vocab_size) == IDS[name]


def test_an_ordinary_piece_spelled_like_a_special_token_is_text(tokenizers):
    qwen = tokenizers["qwen2_vl_json_alone"]
    assert qwen.decode(qwen.encode("<s> ends in </s>")) == "<s> ends in </s>"
    assert registry.family("qwen2_vl").token_ids(qwen)["image_token_id"] == 151655


def conversations(folder, file="cases.json"):
    talks = json.loads((folder / "golden" / "prompts" / file).read_text())
    return [(tuple(Turn(*turn) for turn in talk), has_image) for talk in talks for has_image in (True, False)]


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_the_originals(folder, tokenizers, family):
    name, system, file, has_labels, rows, refused = FAMILIES[family]
    prompts = importlib.import_module(f"medcg_jax.families.{family.split()[0]}.rows").PROMPTS
    tokenizer = tokenizers[name]
    references = json.loads((folder / "golden" / "prompts" / f"{file}.json").read_text())
    talks = conversations(folder) + (conversations(folder, "cases_next.json") if family == "next_chat" else [])
    image = tokenizer.special("<im_patch>") if family == "next_chat" else tokenizer.image_id
    assert len(references) == len(talks) == rows
    wrong, not_encoded, rest = [], 0, dict(system_prompt=system)
    for number, ((turns, has_image), expected) in enumerate(zip(talks, references, strict=True)):
        try:
            found = prompts.conversation(tokenizer, turns, num_image_tokens=int(has_image), **rest)
            asked = prompts.evaluation_prompt(tokenizer, turns, num_image_tokens=int(has_image), **rest)
        except DataError:
            not_encoded += 1
            continue

        def as_original(ids):
            return [image if i == IMAGE else i for i in ids]

        if found.ids != as_original(expected["ids"]):
            wrong.append((number, "ids"))
        if expected["eval"] is not None and asked != as_original(expected["eval"]):
            wrong.append((number, "evaluation"))
        if has_labels and number not in MASKED_WRONGLY.get(family, ()):
            labels = [i if yes else -100 for i, yes in zip(found.ids, found.supervised, strict=True)]
            if labels != expected["labels"]:
                wrong.append((number, "labels"))
    assert not wrong
    assert not_encoded == refused
