"""A trained checkpoint's export in the hands of transformers: the same prompts, images and letters; and its model card."""

import dataclasses
import importlib.util
import json
import os
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import family_toys
import jax
import numpy as np
import pytest
from record_sets import PhantomsWithFourOptions

from medcg_jax.cli import main
from medcg_jax.config import replace
from medcg_jax.data.records import Turn
from medcg_jax.data.tokenizer import load_tokenizer
from medcg_jax.eval import subsets
from medcg_jax.eval.card import Training, model_card, training_of
from medcg_jax.families import build, registry
from medcg_jax.families.weights import processor
from medcg_jax.families.weights.convert import open_checkpoint
from medcg_jax.families.weights.processor import write_processor
from medcg_jax.nn.lora import LoraConfig
from medcg_jax.train.checkpoint import save_params

SHARED = Path(__file__).resolve().parents[3] / "shared" / "tokenizers"
FAMILIES = ("llava", "qwen2_vl", "mllama")
# Family -> a tokenizer that was released with it, and system prompts that its format takes.
RELEASED = {
    "llava": ("llava_hf", ("vicuna", "Be brief.", "")),
    "qwen2_vl": ("qwen2_vl_json_alone", ("qwen2", "Be brief.", "")),
    "mllama": ("llama32_vision", ("Be brief.", "")),
}
QUESTION = "What does this CT show?\nA: Fatty liver\nB: Normal 'liver', \"6.5 cm\"\nAnswer with the option's letter."
SUBSET = "ct-liver-state"
# The whole processor of Qwen2-VL needs torchvision, for its videos.
HAS_VIDEOS = importlib.util.find_spec("torchvision") is not None


def asked(question: str, image=None) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]


def config_of(family: str):
    """The toy of the family; Llama-3.2-Vision's tower as transformers reads it."""
    config = family_toys.setup(family).model
    return dataclasses.replace(config, intermediate_from="output") if family == "mllama" else config


def meta_of(system_prompt: str = "", **model) -> dict:
    sections = {
        "model": {"checkpoint": "", "trainable": ["projector", "decoder"], **model},
        "data": {
            "source": "release",
            "subsets": [SUBSET],
            "system_prompt": system_prompt,
            "train_records_per_subset": 450,
        },
        "train": {"epochs": 5.0, "learning_rate": 5e-6, "batch_size": 32},
    }
    return {"config": sections, "loss": 0.5}


def trained(family: str, folder: Path, params=None, **options) -> Path:
    """The folder of parameters that a training of the toy would have written."""
    setup, config = family_toys.setup(family), config_of(family)
    params = jax.device_put(params or family_toys.weights(family), build.shardings(config, setup.mesh))
    save_params(folder / "params", params, config, meta_of(), beside=(setup.tokenizer.path,), **options)
    return folder / "params"


# ------------------------------------------------------------------ prompts and files, without weights


def expected_ids(tokenizer, family: str, system_prompt: str, num_image_tokens: int) -> list[int]:
    fmt = registry.family(family).row_format(config_of(family))
    turns = (Turn(QUESTION, "A"),)
    return fmt.prompts.evaluation_prompt(
        tokenizer, turns, system_prompt=system_prompt, num_image_tokens=num_image_tokens
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_chat_template_is_the_prompt_of_the_training(family, tmp_path):
    from transformers import AutoTokenizer

    name, system_prompts = RELEASED[family]
    if not (SHARED / name).is_dir():
        pytest.skip(f"{SHARED / name} is not there")
    for number, system_prompt in enumerate(system_prompts):
        folder = tmp_path / str(number)
        shutil.copytree(SHARED / name, folder)
        write_processor(folder, config_of(family), system_prompt)
        theirs = AutoTokenizer.from_pretrained(folder)
        text = theirs.apply_chat_template(asked(QUESTION), tokenize=False, add_generation_prompt=True)
        found = theirs(text, add_special_tokens=not text.startswith(theirs.bos_token or "none"))["input_ids"]
        assert found == expected_ids(load_tokenizer(folder), family, system_prompt, 1), text


@pytest.mark.parametrize("family", FAMILIES)
def test_files_of_the_start_stay_unless_the_weights_were_trained_here(family, tmp_path):
    tokenizer = family_toys.setup(family).tokenizer
    own = {
        "chat_template.json": '{"chat_template": "x"}',
        "preprocessor_config.json": "{}",
        "generation_config.json": "{}",
    }
    for name, system_prompt in (("converted", None), ("trained", "")):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(tokenizer.path, folder / "tokenizer.json")
        for file, content in own.items():
            (folder / file).write_text(content)
        write_processor(folder, config_of(family), system_prompt)
        kept = {
            file for file, content in own.items() if (folder / file).exists() and (folder / file).read_text() == content
        }
        assert kept == ({*own} if system_prompt is None else {"generation_config.json"})
        assert (folder / "chat_template.jinja").exists() == (system_prompt is not None)
    images = json.loads((tmp_path / "trained" / "preprocessor_config.json").read_text())
    assert images["image_processor_type"].lower().startswith(family.replace("_", "")[:6]) and images["do_normalize"]


# ------------------------------------------------------------------ the model card


def test_the_card_has_data_recipe_and_results_with_their_intervals(tmp_path):
    from huggingface_hub import ModelCard

    params = trained("llava", tmp_path / "run", trained_on="")
    training = training_of(params)
    card = model_card(open_checkpoint(params), training, "hf")
    assert (
        "Not tested: no predictions" in card and f"`{SUBSET}`" in card and "| `train.learning_rate` | `5e-06` |" in card
    )
    answers = [answer_of(i, right=i < 30) for i in range(40)]
    subsets.write_tested(tmp_path / "run", SUBSET, answers)
    card = model_card(open_checkpoint(params), training_of(params), "hf")
    assert f"| `{SUBSET}` | letter | 40 | 0.750 | 0.598 to 0.858 | 0.500 |" in card
    assert str(tmp_path) not in card and "No medical device" in card and "random weights" in card
    data = ModelCard(card).data.to_dict()
    assert (data["library_name"], data["pipeline_tag"], data["license"]) == (
        "transformers",
        "image-text-to-text",
        "other",
    )
    os.utime(tmp_path / "run" / "predictions" / f"{SUBSET}.jsonl", (1, 1))
    assert "is older than these weights" in model_card(open_checkpoint(params), training_of(params), "hf")


def test_the_card_names_the_start_by_its_name_and_never_by_a_path_of_this_machine(tmp_path):
    from huggingface_hub import ModelCard

    folder = trained("llava", tmp_path / "run")
    for checkpoint, shown in (
        ("llava-hf/llava-1.5-7b-hf@v1", "llava-hf/llava-1.5-7b-hf"),
        (f"{tmp_path}/secret/start", None),
    ):
        meta = meta_of(checkpoint=checkpoint)
        (folder / "meta.json").write_text(json.dumps(meta))
        card = model_card(open_checkpoint(folder), training_of(folder), "peft")
        assert ModelCard(card).data.to_dict().get("base_model") == shown and str(tmp_path) not in card


def test_the_card_says_where_transformers_tokenizer_cuts_otherwise(tmp_path, monkeypatch):
    """As `medcg convert` prints it: a reader of the export alone would not know."""
    src = trained("llava", tmp_path / "run")
    for alike, folder in ((True, "alike"), (False, "otherwise")):
        monkeypatch.setattr(processor, "reads_alike", lambda *_, alike=alike: alike)
        assert main(["convert", str(src), str(tmp_path / folder), "--to=hf"]) == 0
        said = "In this export transformers' tokenizer cuts prompts into other tokens than were trained" in (
            tmp_path / folder / "README.md"
        ).read_text(encoding="utf-8")
        assert said is not alike


def test_damaged_parameters_are_neither_exported_nor_compared(tmp_path, capfd):
    src = trained("llava", tmp_path / "run")
    file = max((src / "params").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    assert main(["convert", str(src), str(tmp_path / "out"), "--to=hf"]) == 2
    assert "parameters are damaged" in capfd.readouterr().err and not (tmp_path / "out").exists()
    np.savez(tmp_path / "inputs.npz", input_ids=[[1]], pixel_values=[1.0], logits=[[[1.0]]])
    assert main(["parity", str(src), f"--inputs={tmp_path}/inputs.npz"]) == 2
    assert f"{src}: parameters are damaged" in capfd.readouterr().err


def answer_of(number: int, right: bool):
    from medcg_jax.eval.predictions import Prediction

    return Prediction(str(number), SUBSET, ("a", "b"), "A", "A" if right else "B", (-0.1, -2.4))


# ------------------------------------------------------------------ the same letters


def processor_of(family: str, folder: Path):
    """transformers' processor; of Qwen2-VL without torchvision its two parts."""
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    if family != "qwen2_vl" or HAS_VIDEOS:
        return partial(
            AutoProcessor.from_pretrained(folder).apply_chat_template,
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        )  # fmt: skip
    tokenizer, images = AutoTokenizer.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)

    def process(messages):
        seen = images(messages[0]["content"][0]["image"], return_tensors="pt")
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        number = int(seen["image_grid_thw"].prod()) // images.merge_size**2
        tokens = tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * number), return_tensors="pt")
        kinds = (tokens["input_ids"] == tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
        return {**tokens, **seen, "mm_token_type_ids": kinds}

    return process


def their_outputs(model, process, records, encoded):
    """For each record: (float32[D] the last hidden state, the log-probabilities of its letters), of transformers.

    The prompt is found to be ours first.
    """
    import torch
    from PIL import Image

    for i, record in enumerate(records.records):
        inputs = process(asked(record.turns[-1].question, Image.fromarray(np.asarray(records.image(i)))))
        length = int(encoded.arrays["last_position"][i]) + 1
        assert inputs["input_ids"][0].tolist() == encoded.arrays["tokens"][i, :length].tolist(), record.id
        with torch.no_grad():
            out = model(**inputs, output_hidden_states=True)
        options = torch.from_numpy(np.asarray(encoded.arrays["option_ids"][i][: len(record.options)])).long()
        yield out.hidden_states[-1][0, -1].numpy(), out.logits[0, -1].log_softmax(-1)[options].numpy()


def balanced(family: str, hidden: np.ndarray, letters: np.ndarray):
    """The toy's weights with a head that prefers no letter where the last hidden state is `hidden`."""
    params = jax.tree.map(np.copy, family_toys.weights(family))
    head = params["decoder"]["head"]["kernel"]
    for letter in np.unique(letters):
        head[:, letter] -= hidden @ head[:, letter] / (hidden @ hidden) * hidden
    return params


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_gives_the_same_letters_on_200_records(family, tmp_path):
    pytest.importorskip("torch")
    from transformers import AutoModelForImageTextToText

    setup, config = family_toys.setup(family), config_of(family)
    records = PhantomsWithFourOptions(5, 4, 200).records(SUBSET, "test")
    ours = dataclasses.replace(setup, model=config, run=replace(setup.run, eval__generate=False, eval__batch_size=40))
    encoded = ours.encode_eval(records)

    def exported(name: str, params=None):
        folder = tmp_path / name
        assert main(["convert", str(trained(family, folder, params)), str(folder / "out"), "--to=hf"]) == 0
        model = AutoModelForImageTextToText.from_pretrained(folder / "out").eval()
        return partial(their_outputs, model, processor_of(family, folder / "out"))

    # A random head has a favourite letter, which would hide what the images say.
    few = records.select(range(40))
    hidden = np.mean([state for state, _ in exported("first")(few, ours.encode_eval(few))], axis=0)
    params = balanced(family, hidden, encoded.arrays["option_ids"])
    graphdef, _ = build.abstract(config)
    placed = jax.device_put(params, build.shardings(config, setup.mesh))
    predicted = subsets.Tester(ours, graphdef)(placed, encoded)
    theirs = [scores for _, scores in exported("second", params)(records, encoded)]
    for prediction, scores in zip(predicted, theirs, strict=True):
        np.testing.assert_allclose(scores, prediction.logprobs, atol=2e-3)
    letters = ["AB"[int(scores.argmax())] for scores in theirs]
    assert len(letters) == 200 and letters == [prediction.predicted for prediction in predicted]
    assert min(map(letters.count, "AB")) > 10


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pipeline_answers_and_peft_s_adapters_are_the_merged_weights(family, tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from flax import nnx
    from PIL import Image
    from transformers import AutoModelForImageTextToText, pipeline

    plain, setup = config_of(family), family_toys.setup(family)
    config = dataclasses.replace(plain, lora=LoraConfig(2, 4.0, ("q", "down")))
    rng, (_, shapes) = np.random.default_rng(1), build.abstract(config)
    adapters = jax.tree.map(
        lambda leaf: jax.numpy.asarray(rng.normal(0, 0.2, leaf.shape), "float32"), nnx.State({"lora": shapes["lora"]})
    )
    base, folder = trained(family, tmp_path / "base"), tmp_path / "adapters" / "params"
    save_params(folder, adapters, config, meta_of(), trained_on=str(base), beside=(setup.tokenizer.path,))
    for src, out, to in ((base, "start", "hf"), (folder, "merged", "hf"), (folder, "peft", "peft")):
        assert main(["convert", str(src), str(tmp_path / out), f"--to={to}"]) == 0
    assert (tmp_path / "peft" / "README.md").read_text().startswith("---\nlibrary_name: peft")
    image = Image.fromarray(np.asarray(setup.source.records(SUBSET, "test").image(0)))
    question = setup.source.records(SUBSET, "test").records[0].turns[-1].question
    inputs = processor_of(family, tmp_path / "merged")(asked(question, image))
    load = AutoModelForImageTextToText.from_pretrained
    adapted = peft.PeftModel.from_pretrained(load(tmp_path / "start"), tmp_path / "peft").eval()
    with torch.no_grad():
        both = [model(**inputs).logits.numpy() for model in (load(tmp_path / "merged").eval(), adapted)]
        start = load(tmp_path / "start").eval()(**inputs).logits.numpy()
    np.testing.assert_allclose(both[0], both[1], atol=2e-3)
    assert np.abs(both[0] - start).max() > 0.05
    if family != "qwen2_vl" or HAS_VIDEOS:
        answer = pipeline("image-text-to-text", model=str(tmp_path / "merged"))(
            text=asked(question, image), max_new_tokens=3, return_full_text=False
        )
        assert isinstance(answer[0]["generated_text"], str)


@pytest.mark.parametrize("family", ("minigpt_v2", "next_chat"))
def test_families_that_transformers_lacks_say_what_reads_them(family):
    config = family_toys.setup(family).model
    checkpoint = SimpleNamespace(config=config, src=Path("weights"), trained_on="")
    card = model_card(checkpoint, Training(), "hf")
    checkpoint.src = Path("hub/models--owner--some-model/snapshots/abc")
    assert "The weights of `owner/some-model@abc`" in model_card(checkpoint, Training(), "hf")
    assert "library_name: pytorch" in card and "transformers has no such model" in card and "GitHub" in card
