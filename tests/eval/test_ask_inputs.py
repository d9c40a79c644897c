"""What is checked before a model is opened: the checkpoint's folder, the form of its training, pixels, options."""

import doctest
import io
import json
import subprocess
import sys

import numpy as np
import pytest
from dicom_files import dicom_bytes
from PIL import Image

from medcg_jax.config import ConfigError
from medcg_jax.data.images import ImageError, read_image
from medcg_jax.data.phantom.source import PhantomSource
from medcg_jax.data.questions import CLOSING, choice_record
from medcg_jax.data.records import MAX_OPTIONS, DataError
from medcg_jax.eval import inputs
from medcg_jax.eval.inputs import (
    Form,
    check_new_tokens,
    check_options,
    check_question,
    choice_question,
    local_checkpoint,
    pixels_of,
    read_form,
)

COLOUR = np.random.default_rng(0).integers(0, 256, (7, 9, 3)).astype(np.uint8)
GREY = COLOUR[..., 0]
DEEP = (GREY.astype(np.uint16) << 8) + 77


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


# ------------------------------------------------------------------ images


@pytest.mark.parametrize("form", [Form(), Form(deep_grey="percentile")])
@pytest.mark.parametrize("array", [COLOUR, GREY, DEEP, COLOUR[::-1, ::-1], np.zeros((1, 1), np.uint8)])
def test_an_array_and_an_image_of_pillow_are_read_as_their_file(array, form):
    expected, read_as = read_image(png(Image.fromarray(np.ascontiguousarray(array))), 1000, form.reading)
    for given in (array, Image.fromarray(np.ascontiguousarray(array))):
        found, how = pixels_of(given, form)
        assert (found.dtype, found.shape) == (np.uint8, (*array.shape[:2], 3))
        np.testing.assert_array_equal(found, expected)
        assert how == read_as
    assert bool(read_as) == (array.dtype == np.uint16)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_every_mode_of_an_image_is_read_as_its_file(mode):
    image = Image.fromarray(COLOUR).convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray(GREY))
    np.testing.assert_array_equal(pixels_of(image, Form())[0], read_image(png(image), 1000)[0])


def test_an_image_that_lies_on_its_side_is_turned_upright():
    turned = Image.fromarray(COLOUR)
    turned.getexif()[274] = 6
    assert pixels_of(turned, Form())[0].shape == (9, 7, 3)


def test_a_dicom_file_gives_the_pixels_of_the_same_png(tmp_path):
    (tmp_path / "a.dcm").write_bytes(dicom_bytes(GREY))
    (tmp_path / "a.png").write_bytes(png(Image.fromarray(GREY)))
    (found, read_as), (expected, _) = (pixels_of(tmp_path / f"a.{kind}", Form()) for kind in ("dcm", "png"))
    np.testing.assert_array_equal(found, expected)
    assert "DICOM" in read_as


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (COLOUR.astype(np.float32) / 255, r"an array float32\[7, 9, 3\]; expected uint8"),
        (COLOUR.astype(np.uint16), r"an array uint16\[7, 9, 3\]"),
        (COLOUR.astype(np.int64), "an array int64"),
        (GREY > 9, "an array bool"),
        (COLOUR[None], r"an array uint8\[1, 7, 9, 3\]"),
        (COLOUR[..., :2], r"an array uint8\[7, 9, 2\]"),
        (COLOUR[:0], r"an array uint8\[0, 9, 3\]"),
        (None, "an image of type NoneType; expected a path"),
        (b"bytes", "an image of type bytes"),
        (Image.fromarray(GREY.astype(np.float32)), "floating-point numbers"),
        ("/nonexistent/a.png", "/nonexistent/a.png: No such file"),
    ],
)
def test_another_image_is_refused_with_what_is_accepted(image, message):
    with pytest.raises(DataError, match=message) as error:
        pixels_of(image, Form())
    assert "\n" not in str(error.value)


def test_a_broken_image_names_its_file(tmp_path):
    content = png(Image.fromarray(COLOUR))
    for name, cut in (("cut.png", content[: len(content) // 2]), ("text.png", b"no image"), ("empty.png", b"")):
        (tmp_path / name).write_bytes(cut)
        with pytest.raises(ImageError, match=name):
            pixels_of(tmp_path / name, Form())
    with Image.open(tmp_path / "cut.png") as lazy, pytest.raises(ImageError, match="cannot be decoded"):
        pixels_of(lazy, Form())


def test_a_large_image_is_refused_in_every_form(tmp_path):
    (tmp_path / "a.png").write_bytes(png(Image.fromarray(GREY)))
    for image in (GREY, Image.fromarray(GREY), tmp_path / "a.png"):
        with pytest.raises(ImageError, match="9 x 7 pixels"):
            pixels_of(image, Form(max_pixels=62))


# ------------------------------------------------------------------ questions


def test_a_question_with_options_is_a_record_s():
    record = choice_record("a.png", "Benign", ["Normal", "Malignant"], ["Which?"], "0/04")
    options = [line[3:] for line in record["Question-choice"].splitlines()[1:-1]]
    assert choice_question("Which?", options, CLOSING) == record["Question-choice"]
    phantom = PhantomSource(0, 2, 2).records("ct-liver-state", "test").records[0]
    asked = phantom.turns[0].question
    assert choice_question(asked.partition("\n")[0], phantom.options, "") == asked


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "0 options; expected 2 to 10"),
        (["normal"], "1 option; expected 2 to 10"),
        ([str(i) for i in range(MAX_OPTIONS + 1)], "11 options; expected 2 to 10"),
        (["a", "b", " a "], "options A and C are both 'a'"),
        (["a", "  "], "option B is empty"),
        ("ab", "expected a list of texts"),
        ([1, 2], "expected a list of texts"),
    ],
)
def test_options_that_cannot_be_scored_are_refused(options, message):
    with pytest.raises(DataError, match=message):
        check_options(options)


def test_options_and_questions_lose_the_spaces_at_their_ends():
    assert check_options((" a", "b ")) == ("a", "b") and check_question(" is it? ") == "is it?"
    for question in ("", " \n", None):
        with pytest.raises(DataError, match="question="):
            check_question(question)


def test_a_number_of_tokens_is_a_whole_number_from_1():
    check_new_tokens(1)
    for count in (0, -1, 2.0, "3"):
        with pytest.raises(ConfigError, match="max_new_tokens="):
            check_new_tokens(count)


def test_the_examples_run():
    done = doctest.testmod(inputs)
    assert done.attempted and not done.failed


def test_nothing_of_it_imports_jax():
    program = "import sys, medcg_jax.eval.inputs; print([name for name in ('jax', 'flax') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr


# ------------------------------------------------------------------ checkpoints


def test_a_workdir_stands_for_the_parameters_in_it(tmp_path):
    params = tmp_path / "run" / "params"
    params.mkdir(parents=True)
    # A converted checkpoint has its arrays in a folder of the same name.
    assert local_checkpoint(tmp_path / "run") == tmp_path / "run"
    (params / "model.json").write_text("{}")
    assert local_checkpoint(tmp_path / "run") == local_checkpoint(params) == params
    (tmp_path / "run" / "model.json").write_text("{}")
    assert local_checkpoint(str(tmp_path / "run")) == tmp_path / "run"


def test_what_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for name, what in (("checkpoints/llava", "no such folder"), (str(tmp_path / "file"), "a file")):
        with pytest.raises(ConfigError, match=f"{name}: {what}; expected"):
            local_checkpoint(name)


def trained(folder, meta) -> None:
    (folder / "meta.json").write_text(json.dumps(meta))


def test_the_form_is_that_of_the_training(tmp_path):
    assert read_form(tmp_path) == Form() and Form().closing == CLOSING and Form().system_prompt is None
    data = {"source": "release", "system_prompt": "qwen2", "window": "lung", "frame": "first", "seed": 3}
    trained(tmp_path, {"config": {"data": data}})
    assert read_form(tmp_path) == Form(system_prompt="qwen2", window="lung", frame="first")
    trained(tmp_path, {"config": {"data": data | {"source": "phantom", "max_pixels": 9}}})
    assert read_form(tmp_path) == Form(system_prompt="qwen2", closing="", window="lung", frame="first", max_pixels=9)
    # A base, whose questions have no closing sentence either.
    trained(tmp_path, {"made_of": {"system_prompt": "", "data": "digest"}})
    assert read_form(tmp_path) == Form(system_prompt="", closing="")
    for meta in ({}, {"config": None}, {"config": {"data": []}}, {"cell": "x"}):
        trained(tmp_path, meta)
        assert read_form(tmp_path) == Form()


def test_what_is_asked_for_replaces_the_training_s(tmp_path):
    trained(tmp_path, {"config": {"data": {"source": "phantom", "system_prompt": "qwen2", "window": "lung"}}})
    found = read_form(tmp_path, system_prompt="", closing="So?", window="-600/1500", deep_grey=None, frame=None)
    assert found == Form(system_prompt="", closing="So?", window="-600/1500")


@pytest.mark.parametrize(
    ("meta", "changes", "message"),
    [
        ({"config": {"data": {"system_prompt": 3}}}, {}, "meta.json: system_prompt=3: expected text"),
        ({"config": {"data": {"max_pixels": "9"}}}, {}, 'max_pixels="9": expected a whole number'),
        ({"config": {"data": {"max_pixels": True}}}, {}, "max_pixels=true: expected a whole number"),
        ({"config": {"data": {"window": None}}}, {}, "window=null: expected text"),
        ({}, {"max_pixels": 0}, "max_pixels=0: expected 1 or more"),
        ({}, {"window": "lungs"}, "data.window='lungs'"),
        ({}, {"frame": "last one"}, "data.frame='last one'"),
        ({}, {"deep_grey": "best"}, "data.deep_grey='best'"),
    ],
)
def test_a_form_that_is_none_is_refused(tmp_path, meta, changes, message):
    trained(tmp_path, meta)
    with pytest.raises((ConfigError, DataError), match=message):
        read_form(tmp_path, **changes)


def test_what_of_a_picture_is_not_shown_is_said(tmp_path):
    grey = [Image.new("L", (8, 8), level) for level in (0, 120, 255)]
    grey[0].save(tmp_path / "pages.tiff", save_all=True, append_images=grey[1:])
    assert pixels_of(tmp_path / "pages.tiff", Form())[1] == "frame 1 of 3"
    Image.new("RGBA", (8, 8), (9, 9, 9, 0)).save(tmp_path / "hole.png")
    assert pixels_of(tmp_path / "hole.png", Form())[1] == "transparent parts on black"
    Image.new("RGBA", (8, 8), (9, 9, 9, 255)).save(tmp_path / "whole.png")
    assert pixels_of(tmp_path / "whole.png", Form())[1] == ""
