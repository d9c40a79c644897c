"""`medcg ask` as its user meets it: refusals in one line before a model is opened, and the answers of a tiny model."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import family_toys
import numpy as np
import pytest
from PIL import Image
from toy_checkpoints import trained, with_more_boxes

from medcg_jax import cli_ask
from medcg_jax.cli import main, parse
from medcg_jax.config import ConfigError

ROOT = Path(__file__).resolve().parents[1]
TWO = ["--option", "A=normal", "--option", "B=abnormal"]


@pytest.fixture
def image(tmp_path) -> str:
    path = tmp_path / "scan.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)).save(path)
    return str(path)


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("llava")
    trained(folder / "params", "llava")
    return str(folder)


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--option", "A=normal"], "1 option; expected 2 to 10"),
        (
            ["--option", "A=normal", "--option", "A=abnormal"],
            "the letter A stands twice; expected A, B, ... in this order",
        ),
        (["--option", "A=normal", "--option", "C=abnormal"], "the letter C is not B"),
        (["--option", "a=normal", "--option", "b=abnormal"], "the letter a is not A"),
        (["--option", "normal"], "--option=normal: expected a letter and its text"),
        (["--option", "A=normal", "--option", "B=normal"], "options A and B are both 'normal'"),
        (["--option", "A=normal", "--option", "B= "], "option B is empty"),
        ([x for letter in "ABCDEFGHIJK" for x in ("--option", f"{letter}={letter}{letter}")], "11 options"),
        ([*TWO, "--boxes"], "--option with --boxes: expected one of them"),
        (["--out=a.png"], "--out=a.png: expected with --boxes only"),
        (["--boxes", "--out=a.jpg"], "--out=a.jpg: expected a file name that ends in .png"),
        (["--max_new_tokens=0"], "max_new_tokens=0; expected a whole number from 1"),
        (["--max_new_tokens=x"], "--max_new_tokens"),
        (["--dtype=fp16"], "invalid choice: 'fp16'"),
        (["--dtpye=float32"], "--dtpye=float32 is not known to `medcg ask`"),
        (["--config.model.name=x"], "is not known to `medcg ask`"),
        (["--window=lungs"], "data.window='lungs'"),
        (["--max_pixels=10"], "scan.png: 30 x 20 pixels; expected at most 10"),
    ],
)
def test_a_wrong_flag_is_one_line_and_status_2(flags, message, tmp_path, image, capfd):
    began = time.process_time()
    assert main(["ask", str(tmp_path), image, "Is it normal?", *flags]) == 2
    error = capfd.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("medcg: ")
    assert time.process_time() - began < 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "CHECKPOINT"),
        (["checkpoints/llava", "IMAGE", "Is it?"], "checkpoints/llava: no such folder; expected"),
        (["FOLDER", "missing.png", "Is it?"], "missing.png: No such file"),
        (["FOLDER", "FOLDER", "Is it?"], "no regular file (a folder)"),
        (["FOLDER", "BROKEN", "Is it?"], "broken.png: not an image of a known format"),
        (["FOLDER", "IMAGE", "  "], "question="),
        (["FOLDER", "IMAGE", "Is it?"], "holds no checkpoint"),
        (["OTHER", "IMAGE", "Is it?"], "model_type='blip'; accepted: llava"),
    ],
)
def test_a_wrong_word_is_one_line_and_status_2(words, message, tmp_path, image, capfd):
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "blip"}')
    places = {
        "FOLDER": str(tmp_path),
        "OTHER": str(tmp_path / "other"),
        "IMAGE": image,
        "BROKEN": str(tmp_path / "broken.png"),
    }
    assert main(["ask", *(places.get(word, word) for word in words)]) == 2
    error = capfd.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("medcg: ")


def test_refusals_that_need_no_model_import_no_jax(tmp_path, image):
    """In a process of its own, whose only work is the refusal."""
    program = """
import sys
from medcg_jax.cli import main
asked = ("x/y/z", "{0}", "q"), ("{1}", "no.png", "q"), ("{1}", "{0}", "q", "--option=A=a")
print([main(["ask", *words]) for words in asked], "jax" in sys.modules)
"""
    command = [sys.executable, "-c", program.replace("{0}", image).replace("{1}", str(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout.strip() == "[2, 2, 2] False", done.stderr
    assert done.stderr.count("\n") == 3


def test_a_file_that_is_there_is_never_written_over(tmp_path, image, capfd):
    before = Path(image).read_bytes()
    for out in (image, str(tmp_path / "scan2.png")):
        Path(out).write_bytes(before)
        assert main(["ask", str(tmp_path), image, "Where is it?", "--boxes", f"--out={out}"]) == 2
        assert f"--out={out} exists; expected a new file" in capfd.readouterr().err
        assert Path(out).read_bytes() == before
    picture = Image.open(image)
    with pytest.raises(ConfigError, match="exists"):  # it came while the model was asked
        cli_ask.write_new_png(image, picture)
    with pytest.raises(OSError):
        cli_ask.write_new_png(str(Path(image) / "below" / "a.png"), picture)
    assert Path(image).read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == [
        "scan.png",
        "scan2.png",
    ]
    cli_ask.write_new_png(str(tmp_path / "new" / "a.png"), picture)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.png"]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "new" / "a.png")), np.asarray(picture))


def test_a_family_without_boxes_is_refused_before_its_weights_are_read(llava, image, capfd, monkeypatch):
    from medcg_jax.eval import ask

    monkeypatch.setattr(ask, "load", lambda *_, **__: pytest.fail("the weights were read"))
    assert main(["ask", llava, image, "Where is it?", "--boxes"]) == 2
    assert "LLaVA-1.5-7B gives no boxes; expected a checkpoint of MiniGPT-v2 or NExT-Chat" in capfd.readouterr().err


# ------------------------------------------------------------------ what is printed


def test_options_keep_their_text_and_help_says_what_it_is_not(capsys):
    assert cli_ask.read_options(["A=x = y", "B= two\nlines"]) == ["x = y", " two\nlines"]
    args = parse(["ask", "c", "i", "q", *TWO])
    assert (args.option, args.window, args.out) == (["A=normal", "B=abnormal"], None, "")
    with pytest.raises(SystemExit):
        parse(["ask", "--help"])
    assert cli_ask.CAUTION in " ".join(capsys.readouterr().out.split())


def test_lines_of_an_answer():
    from medcg_jax.eval.ask import Answer

    chosen = Answer("abnormal", "B", {"normal": 0.3125, "abnormal": 0.6875}, letter_mass=0.9)
    assert cli_ask.answer_lines(chosen, False, 9) == [
        "B: abnormal", "A  normal    0.312", "B  abnormal  0.688",
        "probability of these letters together, among all tokens: 0.9",
    ]  # fmt: skip
    text = Answer(" a\nlesion\x1b[2J \x00", is_whole=False)
    cut = "(cut off after 9 tokens; --max_new_tokens=N gives more)"
    assert cli_ask.answer_lines(text, False, 9) == ["a\nlesion\ufffd[2J \ufffd", cut]
    assert cli_ask.answer_lines(Answer(" "), False, 9) == ["(no text)"]
    located = Answer("here", boxes=((1, 2.25, 3, 4),))
    assert cli_ask.answer_lines(located, True, 9) == ["here", "1.0 2.2 3.0 4.0"]
    assert cli_ask.answer_lines(Answer("here"), True, 9) == ["here", "(no box could be read)"]


def test_a_choice_is_printed_and_written(llava, image, tmp_path, capfd):
    found = tmp_path / "found.json"
    assert main(["ask", llava, image, "Is it normal?", *TWO, f"--json={found}"]) == 0
    out = capfd.readouterr().out.splitlines()
    written = json.loads(found.read_text())
    assert out[0] == f"{written['letter']}: {written['text']}" and len(out) == 5
    assert out[1].split() == ["A", "normal", f"{written['probabilities']['normal']:.3f}"]
    assert out[-1].startswith(f"llava from {llava}/params in float32 on cpu, ") and out[-1].endswith(" s")
    assert abs(sum(written["probabilities"].values()) - 1) < 1e-6 and 0 < written["letter_mass"] < 1
    assert (written["checkpoint"], written["family"], written["dtype"]) == (f"{llava}/params", "llava", "float32")
    assert (written["system_prompt"], written["closing"], written["question"]) == ("", "", "Is it normal?")


def test_free_text_is_printed(llava, image, capfd):
    assert main(["ask", llava, image, "What is this?", "--max_new_tokens=3"]) == 0
    out = capfd.readouterr().out.splitlines()
    assert out[0] and out[-1].startswith("llava from ") and len(out) in (2, 3)


@pytest.mark.long
@pytest.mark.parametrize("family", family_toys.WITH_BOXES)
def test_boxes_are_drawn_on_a_copy(family, tmp_path, image, capfd):
    out, found = tmp_path / "drawn.png", tmp_path / "found.json"
    change = with_more_boxes if family == "next_chat" else lambda params: params
    checkpoint = str(trained(tmp_path / family, family, change))
    before = Path(image).read_bytes()
    flags = ["--boxes", f"--out={out}", "--max_new_tokens=12", f"--json={found}"]
    assert main(["ask", checkpoint, image, "Where is the liver?", *flags]) == 0
    lines, answer = capfd.readouterr().out.splitlines(), json.loads(found.read_text())
    assert Path(image).read_bytes() == before
    if family == "minigpt_v2":  # random weights write no box, so there is nothing to draw
        assert "(no box could be read)" in lines and answer["out"] == "" and not out.exists()
        return
    assert str(out) in lines and answer["out"] == str(out)
    drawn = np.asarray(Image.open(out))
    assert drawn.shape == (20, 30, 3) and not np.array_equal(drawn, np.asarray(Image.open(image)))


@pytest.mark.long
def test_the_second_answer_compiles_nothing(llava, image, tmp_path):
    """Two processes, the second with the programs that the first has kept: as a user runs it."""
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_LOG_COMPILES": "1"}
    del env["JAX_COMPILATION_CACHE_DIR"]
    command = [sys.executable, "-m", "medcg_jax.cli", "ask", llava, image, "Is it normal?", *TWO]
    misses = []
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=env)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1].startswith("llava from ") and "XLA flags" not in done.stdout
        misses.append(len(list((tmp_path / "cache" / "medcg_jax" / "xla").glob("*-cache"))))
    assert misses[0] == misses[1] > 0
