"""What can be set, as the terminal shows it: config files with their arguments, fields with their meanings."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from medcg_jax import config_list
from medcg_jax.cli import main
from medcg_jax.config import ConfigError, RunConfig, free_fields
from medcg_jax.config_checks import settings
from medcg_jax.config_fields import fields_of, meanings
from medcg_jax.config_file import close_fields, load
from medcg_jax.families import registry

ROOT = Path(__file__).parents[1]
FILES = [config_list.read(path) for path in config_list.project_files()]
CASES = [
    (file, f"{file.path}:{arg}{second and ','}{second}")
    for file in FILES
    for arg in file.args
    for second in ("", *file.second_args)
]


@pytest.mark.parametrize(("file", "name"), CASES, ids=lambda value: Path(value).name if isinstance(value, str) else "")
def test_every_argument_that_a_file_names_loads(file, name):
    assert isinstance(load(name), RunConfig)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.path.stem)
def test_what_is_read_without_running_a_file_is_what_it_does(file):
    assert file.summary.endswith(".") and all(text for text in (file.args | file.second_args).values())
    assert ("get_config(arg" in file.path.read_text("utf-8")) == bool(file.args)
    if file.args:
        assert file.default in file.args and load(str(file.path)) == load(f"{file.path}:{file.default}")
    else:
        with pytest.raises(ConfigError, match="takes no argument"):
            load(f"{file.path}:x")


def test_a_table_takes_every_backbone_that_there_is():
    import_name = {file.path.stem: file for file in FILES}
    backbones = {name for family in registry.families() for name in family.recipes}
    tiny = {"minigpt_v2_tiny", "qwen2_vl_tiny", "llama32_vision_tiny", "next_chat_tiny", "llava15_tiny"}
    assert set(import_name["paper"].args) == backbones | tiny
    with_boxes = {
        name for family in registry.families() if family.gives_boxes for name in (*family.recipes, *family.tiny)
    }
    assert set(import_name["table5"].args) == with_boxes & (backbones | tiny)


@pytest.mark.parametrize("form", ["configs/phantom.py:tiny", "phantom.py:tiny"])
def test_a_name_means_the_same_from_any_folder(form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load(form).name == "phantom_tiny"
    for away in ("other/phantom.py", "../configs/phantom.py", str(tmp_path / "phantom.py")):
        with pytest.raises(ConfigError, match=r"there is no such file; did you mean configs/phantom.py\?"):
            load(away)
    own = tmp_path / "configs" / "phantom.py"
    own.parent.mkdir()
    text = "from medcg_jax.config import RunConfig\nfrom medcg_jax.config_file import to_config_dict\n"
    own.write_text(text + "def get_config():\n    return to_config_dict(RunConfig(name='own'))\n")
    # What lies in the working directory comes first.
    assert load("configs/phantom.py").name == "own" and load("phantom.py:tiny").name == "phantom_tiny"


def test_a_package_with_its_configs_in_it_finds_them_too(tmp_path):
    package = tmp_path / "site" / "medcg_jax"
    shutil.copytree(ROOT / "medcg_jax", package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "configs", package / "configs")
    program = "from medcg_jax import config_list as c; print(c.find('phantom.py')); print(c.find('configs/table3.py'))"
    done = subprocess.run(
        [
            sys.executable,
            "-S",
            "-c",
            f"import sys; sys.path[:0] = {sys.path[1:] + [str(tmp_path / 'site')]!r}[::-1]; {program}",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(package / "configs" / name) for name in ("phantom.py", "table3.py")]


# ------------------------------------------------------------------ fields


INFOS = fields_of(RunConfig())


@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.key)
def test_every_field_has_a_meaning_in_plain_words(info):
    assert info.meaning.endswith((".", '"')) and len(info.meaning.split()) > 3
    assert info.is_free == (info.key in free_fields())
    if info.kind in ("whole number", "number") and not info.key.endswith(("seed", "_rate", "decay", "b1", "b2", "eps")):
        unitless = ("clip_norm", "lora_rank", "lora_alpha", "published_table")
        assert info.unit or info.key.rpartition(".")[2] in unitless


def test_a_meaning_is_the_comment_above_the_field_and_no_other():
    from dataclasses import dataclass

    assert meanings(Sample) == {"a": "First line, and a second one.", "b": "", "c": "Of c."}
    assert dataclass(Sample) is not None


class Sample:
    """Fields."""

    # First line,
    # and a second one.
    a: int = 0
    b: int = 0
    # Of nobody.

    # Of c.
    c: int = 0


def test_every_field_is_shown_with_its_value(capsys, tmp_path):
    found = tmp_path / "found.json"
    flags = ["--config.train.batch_size=48", f"--json={found}"]
    assert main(["config", f"{ROOT}/configs/phantom.py:tiny", *flags]) == 0
    out = capsys.readouterr().out
    keys = re.findall(r"^([\w.]+) = ", out, re.MULTILINE)
    assert keys == [key for _, key, _ in settings(RunConfig())]
    assert "train.batch_size = 48\n    Rows of an update, on all devices together.\n    [default 32; " in out
    assert max(map(len, out.splitlines())) <= 120
    listed = {field["key"]: field for field in json.loads(found.read_text())["fields"]}
    assert listed["model.remat"]["choices"] == ["none", "full", "dots"] and not listed["model.remat"]["changes_results"]
    assert listed["train.batch_size"]["value"] == 48 and listed["train.batch_size"]["default"] == 32
    assert listed["train.batch_size"]["unit"] == "rows" and listed["train.batch_size"]["changes_results"]


def test_settings_are_found_by_a_word(capsys):
    assert main(["config", "phantom.py", "--grep=Warm"]) == 0
    out = capsys.readouterr().out
    assert "train.warmup_frac = 0.06" in out and "train.learning_rate = " in out and "mesh.data" not in out
    assert main(["config", "phantom.py", "--grep=lerning"]) == 2
    assert "did you mean learning?" in capsys.readouterr().err


def test_without_a_file_the_files_are_listed(capsys):
    assert main(["config"]) == 0
    out = capsys.readouterr().out
    assert "configs/phantom.py[:quick|study|negative|null|tiny]\n    The study on the embedded phantom world" in out
    assert all(f"configs/{path.name}" in out for path in config_list.project_files())
    assert main(["config", "--grep=x"]) == 2


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("learning_rate", ["train.learning_rate", "base.learning_rate"]),
        ("tokenizer", ["model.tokenizer"]),
        ("lerning_rate", ["train.learning_rate", "base.learning_rate"]),
        ("zebra", []),
    ],
)
def test_fields_of_any_section_are_near(name, fields):
    assert close_fields(name) == fields


def test_a_field_of_another_section_is_named():
    with pytest.raises(ConfigError, match=r"config.data.tokenizer is unknown; did you mean config.model.tokenizer\?"):
        load("phantom.py", {"data.tokenizer": "x"})
