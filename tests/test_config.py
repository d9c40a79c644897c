"""Config files and overrides: what is accepted, and the one line that refuses the rest."""

import dataclasses
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medcg_jax.config_file import from_config_dict, load, to_config_dict
from medcg_jax.run_checks import check
from medcg_jax.run_config import ConfigError, RunConfig, TrainConfig, replace

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
FILE = str(Path(__file__).parents[1] / "configs" / "llava15_7b.py")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_builds_and_passes_its_checks(path):
    assert isinstance(load(str(path)), RunConfig)


def test_a_config_survives_the_way_through_a_config_dict():
    run = replace(RunConfig(), train__learning_rate=1.0, study__targets=("04", "07"), data__subset_weights={"04": 2.0})
    assert from_config_dict(to_config_dict(run)) == run


def test_a_config_dict_is_locked():
    with pytest.raises(KeyError):
        to_config_dict(RunConfig())["train"]["learning_rat"] = 1.0


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("train.learning_rate", "1", 1.0),
        ("train.steps", "7", 7),
        ("study.targets", "04,05", ("04", "05")),
        ("study.targets", "", ()),
        ("study.seeds", "(1, 2)", (1, 2)),
        ("eval.generate", "false", False),
        ("data.root", "3", "3"),
        ("data.subset_weights", "{'04': 2}", {"04": 2.0}),
    ],
)
def test_an_override_is_read_as_its_field_s_type(key, text, expected):
    value = load(FILE, {key: text})
    for name in key.split("."):
        value = getattr(value, name)
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("train.learning_rat", "1", "did you mean config.train.learning_rate"),
        ("trane.learning_rate", "1", "did you mean config.train"),
        ("train.batch_size", "1.5", "an int is accepted"),
        ("train.batch_size", "true", "an int is accepted"),
        ("train", "1", "is a section"),
        ("train.batch_size.x", "1", "has no keys below"),
        ("eval.generate", "1", "true or false"),
        ("model.name", "llava", "one of llava15_tiny"),
        ("train.batch_size", "0", "at least 1"),
        ("train.learning_rate", "-1", "above 0"),
        ("train.learning_rate", "float('nan')", "a float is accepted"),
        ("train.accumulation_steps", "5", "does not divide"),
        ("data.subset_weights", "{'04': -1}", "above 0"),
        ("study.tables", "table3", "one of pairs"),
        ("study.seeds", "", "one seed or more"),
    ],
)
def test_a_wrong_override_is_refused_in_one_line(key, text, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")) as error:
        load(FILE, {key: text})
    assert "\n" not in str(error.value) and key.split(".")[0] in str(error.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "defines no get_config"),
        ("def get_config(): return 3", "returned int"),
        ("def get_config(): return 1 / 0", "ZeroDivisionError"),
        ("def get_config(:", "SyntaxError"),
        ("from medcg_jax.config_file import *\ndef get_config():\n c = to_config_dict(RunConfig())\n c.tran = 1", "tran"),
    ],
)
def test_a_broken_config_file_is_refused_in_one_line(tmp_path, source, message):
    path = tmp_path / "broken.py"
    path.write_text(source)
    with pytest.raises(ConfigError, match=message) as error:
        load(str(path))
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load(str(tmp_path / "none.py"))


def test_a_missing_key_is_named():
    config = dataclasses.asdict(RunConfig())
    del config["train"]["epochs"]
    with pytest.raises(ConfigError, match="config.train.epochs is missing"):
        from_config_dict(config)


@given(st.sampled_from([field.name for field in dataclasses.fields(TrainConfig)]), st.floats())
def test_no_number_passes_the_checks_unless_training_could_use_it(name, value):
    """Whatever the field, NaN, infinity and negative numbers never get through."""
    run = replace(RunConfig(), **{f"train__{name}": value})
    try:
        check(run)
    except ConfigError:
        return
    assert name == "seed" or 0 <= value < math.inf


def test_targets_of_single_tables_are_read_and_checked():
    run = load(FILE, {"study.targets_of": "{'triples': ['04']}"})
    assert run.study.targets_of == {"triples": ("04",)}
    with pytest.raises(ConfigError, match="study.targets_of='table4': one of"):
        load(FILE, {"study.targets_of": "{'table4': ['04']}"})
    with pytest.raises(ConfigError, match="a comma-separated list of str"):
        load(FILE, {"study.targets_of": "{'pairs': 4}"})
