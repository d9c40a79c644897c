"""One question to a tiny checkpoint of every family: the numbers and texts of `medcg eval`; examples of docstrings."""

import functools
import io
import json
from pathlib import Path

import family_toys
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dicom_files import dicom_bytes
from docstrings import run_examples
from eval_toys import others_long
from family_toys import SOURCE, SUBSETS, WITH_BOXES
from PIL import Image
from releases import CONFIGS, random_release, replaced
from toy_checkpoints import converted, trained, with_more_boxes

import medcg_jax
from medcg_jax.cli import main
from medcg_jax.config import ConfigError
from medcg_jax.data.encoding import encode_boxes, encode_eval
from medcg_jax.data.eval_batches import eval_batches
from medcg_jax.data.records import DataError, RecordSet
from medcg_jax.eval import ask, grounding
from medcg_jax.eval.letters import make_evaluator, run_ahead
from medcg_jax.families import build
from medcg_jax.families.llava.model import llava15_7b
from medcg_jax.families.weights import convert
from medcg_jax.nn.base import Base
from medcg_jax.train.sanity import BlindModel

FAMILIES = list(family_toys.TINY)
NEW = 8


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    """family -> its toy checkpoint, opened."""
    return functools.cache(lambda family: ask.load(trained(tmp_path_factory.mktemp(family) / "params", family)))


def questions() -> RecordSet:
    """A question with two options and one with four, about different images."""
    first, second = (SOURCE.records(name, "test") for name in SUBSETS)
    return RecordSet([first.records[0], second.records[1]], [first.image(0), second.image(1)])


@functools.cache
def evaluated(family: str) -> tuple[np.ndarray, list[str]]:
    """(float32[2, 4] log-probabilities of the letters, generated texts) of `questions`, by the evaluation's program."""
    toy = family_toys.setup(family)
    encoded = encode_eval(questions(), toy.tokenizer, toy.run.data, toy.format)
    graphdef, places = build.abstract(toy.model)[0], build.shardings(toy.model, toy.mesh)
    evaluator = make_evaluator(toy.mesh, graphdef, places, eos_id=toy.tokenizer.eos_id, max_new_tokens=NEW)
    batch, _ = encoded.rows(np.arange(2))
    logprobs, tokens = jax.device_get(evaluator(family_toys.placed(family, None), batch))
    return logprobs, [toy.tokenizer.decode(row) for row in tokens.tolist()]


@pytest.mark.parametrize("family", others_long(FAMILIES))
def test_choices_have_the_probabilities_of_the_evaluation(family, model_of):
    logprobs, _ = evaluated(family)
    records, model = questions(), model_of(family)
    for index, record in enumerate(records.records):
        asked, options = record.turns[0].question.partition("\n")[0], record.options
        answer = model.ask(records.image(index), asked, options)
        own = np.exp(logprobs[index, : len(options)].astype(np.float64))
        np.testing.assert_allclose(list(answer.probabilities.values()), own / own.sum(), atol=1e-5)
        np.testing.assert_allclose(answer.letter_mass, own.sum(), atol=1e-5)
        assert list(answer.probabilities) == list(options)
        assert (answer.letter, answer.text) == ("ABCD"[own.argmax()], options[own.argmax()])
        assert model.score(records.image(index), asked, options) == answer.probabilities
        # The other image, and the other order of the options, are other questions.
        other = model.score(records.image(1 - index), asked, options)
        assert np.abs(np.subtract(list(other.values()), list(answer.probabilities.values()))).max() > 1e-3


@pytest.mark.parametrize("family", others_long(FAMILIES))
def test_free_text_is_the_evaluation_s(family, model_of):
    _, texts = evaluated(family)
    records, model = questions(), model_of(family)
    for index, record in enumerate(records.records):
        assert model.ask(records.image(index), record.turns[0].question, max_new_tokens=NEW) == texts[index]
    assert texts[0] != texts[1]


@pytest.mark.parametrize("family", others_long(FAMILIES))
def test_the_examples_of_the_docstrings_run(family, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained(Path("runs/first/params"), family)
    Image.fromarray(SOURCE.records(SUBSETS[0], "test").image(0)).save("scan.png")
    if family in WITH_BOXES:
        trained(Path("runs/boxes/params"), family)
    names = ["ask", "score", *(["locate"] if family in WITH_BOXES else [])]
    run_examples(medcg_jax.load, medcg_jax.Answer, *(getattr(medcg_jax.Model, name) for name in names))


@pytest.mark.long
@pytest.mark.parametrize("family", WITH_BOXES)
def test_boxes_are_those_of_the_evaluation(family, tmp_path):
    toy = family_toys.setup(family)
    change = with_more_boxes if family == "next_chat" else lambda params: params
    model = ask.load(trained(tmp_path / "params", family, change))
    records = SOURCE.records("ct-liver-det", "test").select(range(2))
    encoded = encode_boxes(records, toy.tokenizer, toy.run.data, toy.format)
    graphdef, places = build.abstract(toy.model)[0], build.shardings(toy.model, toy.mesh)
    eos_id = toy.tokenizer.eos_id
    locator = grounding.make_locator(toy.mesh, graphdef, places, eos_id=eos_id, max_new_tokens=NEW)
    params = jax.device_put(change(family_toys.weights(family)), places)
    outputs = run_ahead(lambda item: locator(params, item[0]), eval_batches(encoded, 2))
    expected = grounding.boxes_of(encoded, outputs, toy.tokenizer, batch_size=2)
    for index, asked in enumerate(encoded.asked):
        answer = model.locate(encoded.records.image(index), asked.question, max_new_tokens=NEW)
        assert answer.text == expected[index].generated
        np.testing.assert_allclose(answer.boxes, expected[index].predicted or (), atol=0.02)
    assert family != "next_chat" or any(answer.predicted for answer in expected)


@pytest.mark.long
def test_boxes_in_minigpt_s_text_are_in_pixels_of_the_image(model_of, monkeypatch):
    model = model_of("minigpt_v2")
    monkeypatch.setattr(model._tokenizer, "decode", lambda ids: "{<25><40><50><100>}<delim>{<0><0><10><10>}")
    found = model.locate(np.zeros((20, 200), np.uint8), "Where is it?", max_new_tokens=NEW)
    assert found.boxes == ((50, 8, 100, 20), (0, 0, 20, 2))


def test_boxes_are_refused_where_a_family_has_none(model_of):
    with pytest.raises(
        DataError, match="LLaVA-1.5-7B gives no boxes; expected a checkpoint of MiniGPT-v2 or NExT-Chat"
    ):
        model_of("llava").locate(np.zeros((9, 9), np.uint8), "Where is it?")


def test_a_dicom_file_answers_like_its_pixels(model_of, tmp_path):
    model, grey = model_of("llava"), SOURCE.records(SUBSETS[0], "test").image(0)[..., 0]
    (tmp_path / "a.dcm").write_bytes(dicom_bytes(np.ascontiguousarray(grey)))
    Image.fromarray(grey).save(tmp_path / "a.png")
    scores = [
        model.score(image, "Is it?", ["normal", "abnormal"])
        for image in (tmp_path / "a.dcm", tmp_path / "a.png", grey, Image.fromarray(grey))
    ]
    assert scores == scores[:1] * 4


def test_what_does_not_fit_or_is_no_question_is_refused(model_of):
    model, image = model_of("llava"), np.zeros((9, 9), np.uint8)
    with pytest.raises(ConfigError, match="max_new_tokens=511; expected at most 512 tokens"):
        model.generate(image, "Is it?", max_new_tokens=511)
    with pytest.raises(ConfigError, match="expected at most 512 tokens"):
        model.choose(image, "Is it? " * 300, ["yes", "no"])
    with pytest.raises(DataError, match="1 option; expected 2 to 10"):
        model.ask(image, "Is it?", ["yes"])
    with pytest.raises(DataError, match="spells </s>"):
        model.ask(image, "Is it? </s>", ["yes", "no"])
    with pytest.raises(DataError, match="float32"):
        model.ask(np.zeros((9, 9), np.float32), "Is it?")


def with_head_times(scale: float):
    def change(params):
        changed = jax.tree.map(np.copy, params)
        changed["decoder"]["head"]["kernel"] *= np.float32(scale)
        return changed

    return change


def test_a_model_that_sees_nothing_or_gives_no_numbers_does_not_answer(tmp_path):
    image = SOURCE.records(SUBSETS[0], "test").image(0)
    blind = ask.load(trained(tmp_path / "blind", "llava", with_head_times(0.0)))
    with pytest.raises(BlindModel, match="blind: the model does not see images"):
        blind.score(image, "Is it?", ["yes", "no"])
    with pytest.raises(ConfigError, match=r"head.kernel holds NaN or infinity"):
        ask.load(trained(tmp_path / "damaged", "llava", with_head_times(np.nan)))
    # Finite weights whose products are not.
    broken = ask.load(trained(tmp_path / "broken", "llava"))
    broken._params["decoder"]["head"]["kernel"] = jnp.full_like(broken._params["decoder"]["head"]["kernel"][...], 1e38)
    with pytest.raises(ConfigError, match="broken: the model answers with numbers that are not finite"):
        broken.score(image, "Is it?", ["yes", "no"])


# ------------------------------------------------------------------ checkpoints


def test_the_prompt_is_the_training_s_or_the_release_s(tmp_path):
    model = ask.load(trained(tmp_path / "trained", "llava"))
    assert (model.system_prompt, model.form.closing) == ("", "")
    model = ask.load(converted(tmp_path / "converted", "llava"))
    assert model.system_prompt == "vicuna" and "letter" in model.form.closing
    assert ask.load(tmp_path / "converted", system_prompt="").system_prompt == ""
    released = {family: family_toys.setup(family).format.prompts.released_system_prompt for family in FAMILIES}
    assert released == {"llava": "vicuna", "next_chat": "vicuna", "qwen2_vl": "qwen2", "mllama": "", "minigpt_v2": ""}


def test_a_conversion_keeps_the_form_of_the_training(tmp_path):
    src = trained(tmp_path / "trained", "llava")
    assert main(["convert", str(src), str(tmp_path / "copy")]) == 0
    first, copy = ask.load(src), ask.load(tmp_path / "copy")
    assert copy.form == first.form and copy.form.closing == ""
    image = SOURCE.records(SUBSETS[0], "test").image(0)
    assert copy.score(image, "Is it?", ["yes", "no"]) == first.score(image, "Is it?", ["yes", "no"])


# NExT-Chat's ids of boxes belong to its architecture, and a toy tokenizer has others.
@pytest.mark.parametrize("family", others_long(family for family in FAMILIES if family != "next_chat"))
def test_a_released_directory_of_any_size_opens(family, tmp_path, monkeypatch):
    src, _ = random_release(family, tmp_path)
    toy = family_toys.setup(family).tokenizer
    # Toy tokenizers have more ids than these releases' rows, and other ids of special tokens.
    monkeypatch.setattr(ask, "check_tokens", lambda *_: None)
    monkeypatch.setattr(ask, "check_token_ids", lambda *_: None)
    model = ask.load(src, tokenizer=toy.path)
    config = CONFIGS[family]
    assert (model.family, model.path, model._config.text) == (family, src, config.text)
    assert model._config.vision == config.vision


def test_a_tokenizer_of_another_release_is_refused(tmp_path):
    src, _ = random_release("llava", tmp_path)
    with pytest.raises(ConfigError, match="src has no tokenizer.model or tokenizer.json; give one"):
        ask.load(src)
    with pytest.raises(ConfigError, match="ids of text up to"):
        ask.load(src, tokenizer=family_toys.setup("llava").tokenizer.path)
    (tmp_path / "other").mkdir()
    other, _ = random_release("qwen2_vl", tmp_path / "other")
    with pytest.raises(DataError, match=r"no special token <\|"):
        ask.load(other, tokenizer=family_toys.setup("llava").tokenizer.path)


def test_rows_beyond_a_named_size_s_vocabulary_are_dropped(tmp_path):
    """llava-hf pads its tables to 32064 rows."""
    whole = llava15_7b()
    stated = convert.module_of(whole).config_to_json(replaced(whole, "text", vocab_size=32064), "float16")
    (tmp_path / "config.json").write_text(json.dumps(stated))
    assert convert.read_config(tmp_path).text.vocab_size == 32064
    assert ask.architecture(tmp_path).text == whole.text


@pytest.mark.parametrize(
    ("config", "dtype", "expected", "computed"),
    [
        (family_toys.setup("llava").model, "", "float32", "float32"),
        (llava15_7b(), "", "bfloat16", "bfloat16"),
        (llava15_7b(), "float32", "float32", "float32"),
        (family_toys.setup("llava").model, "nf4", "nf4", "bfloat16"),
        (llava15_7b(base=Base("nf4", ("lora",))), "", "nf4", "bfloat16"),
    ],
)
def test_a_large_model_is_never_float32_unasked(config, dtype, expected, computed):
    found = ask.with_dtype(config, dtype)
    assert (found.base.dtype, found.compute_dtype) == (expected, computed)
    # What was trained beside a quantised base stays as it was; of other bases all parts have the dtype.
    assert found.base.trained == (config.base.trained if expected == "nf4" == config.base.dtype else ())


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ConfigError, match="dtype='fp16'; expected float32, bfloat16, int8, nf4"):
        ask.with_dtype(llava15_7b(), "fp16")


def test_a_smaller_dtype_gives_nearly_the_same_answer(model_of):
    image = SOURCE.records(SUBSETS[0], "test").image(0)
    model = model_of("llava")
    small = ask.load(model.path, dtype="bfloat16")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(small._params)} == {"bfloat16"} and small.dtype == "bfloat16"
    found, expected = (list(m.score(image, "Is it?", ["normal", "abnormal"]).values()) for m in (small, model))
    assert 0 < np.abs(np.subtract(found, expected)).max() < 0.2


# ------------------------------------------------------------------ drawing


def test_boxes_are_drawn_on_a_copy():
    image = np.zeros((60, 80, 3), np.uint8)
    picture = np.asarray(ask.draw_boxes(image, [(10, 20, 30, 40), (-50, -1e9, 1e9, 500)]))
    assert not image.any() and picture.shape == image.shape
    drawn = (picture == ask.BOX_COLOUR).all(-1)
    rows, columns = np.nonzero(drawn)
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == (10, 20, 29, 39) and drawn.sum() == 4 * 20 - 4


def test_a_picture_of_greys_can_be_drawn_on():
    grey = np.broadcast_to(np.zeros((9, 9, 1), np.uint8), (9, 9, 3))
    content = io.BytesIO()
    ask.draw_boxes(grey, [(1, 1, 4, 4)]).save(content, "PNG")
    assert Image.open(content).mode == "RGB"
