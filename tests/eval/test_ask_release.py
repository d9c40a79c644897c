"""A tiny LLaVA as transformers saves it, with llava-hf's own tokenizer: `medcg ask` answers as transformers does."""

import json
import os
import shutil
import subprocess
import sys

import hf_tiny
import numpy as np
import pytest
from PIL import Image
from prompt_files import SENTINEL, Original
from small_hub import Repository, SmallHub

from medcg_jax.cli import main
from medcg_jax.data.questions import CLOSING
from medcg_jax.families.prompts import VICUNA

IMAGE_TOKEN, PAD, EOS = 32000, 32001, 2
QUESTION, OPTIONS = "Does the slice show a lesion?", ("No lesion", "A lesion, 7 mm")
NEW = 6


@pytest.fixture(scope="module")
def release(shared_dir, tmp_path_factory):
    """(folder of a release, its model in transformers, its tokenizer's file)."""
    pytest.importorskip("torch")
    tokenizer = shared_dir / "tokenizers" / "llava_hf"
    if not tokenizer.is_dir():
        pytest.skip("../shared has no tokenizers")
    model = hf_tiny.reference(vocab_size=32064, max_position_embeddings=512, pad_token_id=PAD)
    model.config.image_token_index, model.config.pad_token_id = IMAGE_TOKEN, PAD
    folder = tmp_path_factory.mktemp("llava")
    model.save_pretrained(folder)
    for path in tokenizer.iterdir():
        shutil.copy(path, folder / path.name)
    return folder, model, tokenizer / "tokenizer.model"


@pytest.fixture
def scan(tmp_path):
    path = tmp_path / "scan.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 44, 3)).astype(np.uint8)).save(path)
    return path


def inputs(model_file, scan, question: str) -> dict:
    """What transformers takes for this question, by the steps of LLaVA's own code."""
    import torch
    from transformers import LlavaImageProcessorPil

    text = f"{VICUNA} USER: <image>\n{question} ASSISTANT:"
    ids = [
        i for piece in Original(model_file).with_image(text)
        for i in ([IMAGE_TOKEN] * hf_tiny.PATCHES if piece == SENTINEL else [piece])
    ]  # fmt: skip
    side = hf_tiny.VISION["image_size"]
    processor = LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": side}, crop_size=side)
    pixels = processor(Image.open(scan), return_tensors="pt")["pixel_values"]
    return {"input_ids": torch.tensor([ids]), "pixel_values": pixels, "attention_mask": torch.ones(1, len(ids)).long()}


@pytest.mark.long
def test_letters_have_transformers_probabilities(release, scan, tmp_path, capfd):
    import sentencepiece as spm
    import torch

    folder, model, model_file = release
    flags = [f"--option={letter}={text}" for letter, text in zip("AB", OPTIONS)]
    assert main(["ask", str(folder), str(scan), QUESTION, *flags, f"--json={tmp_path / 'found.json'}"]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    asked = "\n".join([QUESTION, *(f"{letter}: {text}" for letter, text in zip("AB", OPTIONS)), CLOSING])
    pieces = spm.SentencePieceProcessor(model_file=str(model_file))
    with torch.no_grad():
        whole = model(**inputs(model_file, scan, asked)).logits[0, -1].softmax(-1)
    own = whole[[pieces.piece_to_id(f"▁{letter}") for letter in "AB"]].numpy().astype(np.float64)
    np.testing.assert_allclose(list(found["probabilities"].values()), own / own.sum(), atol=1e-4)
    np.testing.assert_allclose(found["letter_mass"], own.sum(), rtol=1e-3)
    assert list(found["probabilities"]) == list(OPTIONS) and found["text"] == OPTIONS[own.argmax()]
    assert (found["system_prompt"], found["closing"], found["dtype"]) == ("vicuna", CLOSING, "float32")
    assert capfd.readouterr().out.splitlines()[0] == f"{found['letter']}: {found['text']}"


@pytest.mark.long
def test_free_text_is_that_of_transformers(release, scan, tmp_path):
    import sentencepiece as spm

    folder, model, model_file = release
    found = tmp_path / "found.json"
    assert main(["ask", str(folder), str(scan), QUESTION, f"--max_new_tokens={NEW}", f"--json={found}"]) == 0
    given = inputs(model_file, scan, QUESTION)
    made = model.generate(**given, do_sample=False, max_new_tokens=NEW, pad_token_id=PAD, eos_token_id=EOS)
    new = [i for i in made[0, given["input_ids"].shape[1] :].tolist() if i < IMAGE_TOKEN]
    pieces = spm.SentencePieceProcessor(model_file=str(model_file))
    assert json.loads(found.read_text())["text"].strip() == pieces.decode(new).strip()


@pytest.mark.long
def test_a_name_on_the_hub_is_asked_as_its_folder_is(release, scan, tmp_path):
    """The repository is fetched once; the second answer comes without the hub."""
    folder, *_ = release
    with SmallHub() as hub:
        hub.repositories["models/owner/tiny-llava"] = Repository({p.name: p.read_bytes() for p in folder.iterdir()})
        home = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home")}
        answers = [
            ask_in_a_process(checkpoint, scan, tmp_path / "found.json", environment)
            for checkpoint, environment in (
                ("owner/tiny-llava", home), ("owner/tiny-llava", home | {"HF_HUB_OFFLINE": "1"}), (str(folder), {}),
            )
        ]  # fmt: skip
        assert "model.safetensors" in hub.fetched()
    assert answers[0] == answers[1] == answers[2] and answers[0]["letter"] in ("A", "B")


def ask_in_a_process(checkpoint: str, scan, file, environment: dict[str, str]) -> dict:
    """Letter and probabilities of `medcg ask`, from an empty folder."""
    flags = [f"--option={letter}={text}" for letter, text in zip("AB", OPTIONS)]
    command = [sys.executable, "-m", "medcg_jax", "ask", checkpoint, str(scan), QUESTION, *flags, f"--json={file}"]
    done = subprocess.run(
        command, env=os.environ | environment, cwd=file.parent, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(file.read_text())
    return {name: answer[name] for name in ("letter", "probabilities", "letter_mass")}
