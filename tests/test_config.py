"""Config files and overrides: what is accepted, and the one line that refuses the rest."""

import dataclasses
import functools
import math
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medcg_jax.config import ConfigError, RunConfig, TrainConfig, marked, replace
from medcg_jax.config_checks import check
from medcg_jax.config_checks import settings as settings_of
from medcg_jax.config_file import from_config_dict, load, to_config_dict, with_flags

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
FILE = str(Path(__file__).parents[1] / "configs" / "llava15_7b.py")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_builds_and_passes_its_checks(path):
    assert isinstance(load(str(path)), RunConfig)


FIELDS = {key: field.metadata for field, key, _ in settings_of(RunConfig())}
BOUNDS = {key: (marks["least"], marks["most"]) for key, marks in FIELDS.items() if marks.get("least") is not None}
ONCE = [key for key, marks in FIELDS.items() if marks.get("once")]


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
        ("train.batch_size", "1.5", "expected an int"),
        ("train.batch_size", "true", "expected an int"),
        ("train", "1", "is a section"),
        ("train.batch_size.x", "1", "has no keys below"),
        ("eval.generate", "1", "true or false"),
        ("model.name", "llava2", "one of auto, llava15_tiny"),
        ("train.batch_size", "0", "at least 1"),
        ("train.learning_rate", "-1", "above 0"),
        ("train.learning_rate", "float('nan')", "expected a float"),
        ("train.accumulation_steps", "5", "expected a divisor"),
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
        (
            "from medcg_jax.config_file import *\ndef get_config():\n c = to_config_dict(RunConfig())\n c.tran = 1",
            "tran",
        ),
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


@settings(deadline=None)
@given(st.sampled_from([field.name for field in dataclasses.fields(TrainConfig)]), st.floats())
def test_no_number_passes_the_checks_unless_training_could_use_it(name, value):
    """Whatever the field, NaN, infinity and negative numbers never get through."""
    run = replace(RunConfig(), **{f"train__{name}": value})
    try:
        check(run)
    except ConfigError:
        return
    assert name == "seed" or 0 <= value < math.inf


def numeric_fields(cls=RunConfig, prefix="") -> list[str]:
    names = []
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            names += numeric_fields(field.type, f"{prefix}{field.name}.")
        elif {int, float} & {field.type, *(arg for arg in getattr(field.type, "__args__", ()) if arg is not ...)}:
            names.append(prefix + field.name)
    return names


def test_every_field_of_numbers_has_bounds():
    assert set(numeric_fields()) - {"study.published_table"} == set(BOUNDS)


HUGE = ("99999999999999999999", "-1", "-7", "-99999999999999999999", "1e400", "1e300", "float('nan')", "nan", "1e-400", "9" * 5000,
        "(" * 5000, "[[1]]", "2147483648", "0", "None", "True", "'1'", "{'a': 1e400}", "{'pairs': -3.0}", "(1, 10**3)",
        "(1, 99999999999999999999)", "1e400,2", "\x00", "3" * 400)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(numeric_fields()), st.sampled_from(HUGE) | st.integers().map(str) | st.floats().map(str))
def test_a_number_is_within_its_bounds_or_refused_in_one_line(key, text):
    try:
        run = with_flags(RunConfig(), {key: text})
    except ConfigError as error:
        assert (
            "\n" not in str(error) and key in str(error) or "expected a divisor" in str(error) or "rising" in str(error)
        )
        assert len(str(error)) < 700
        return
    value = functools.reduce(getattr, key.split("."), run)
    least, most = BOUNDS.get(key, (0, 8))
    for number in value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else [value]:
        assert least <= number <= most and most < 2**31 or isinstance(number, float)


@pytest.mark.parametrize("key", ONCE)
def test_what_makes_sense_once_is_accepted_once(key):
    value = {"study.seeds": "(1,1)", "study.targets_of": "{'pairs': ['04', '04']}",
             "model.trainable": "decoder,decoder", "study.tables": "pairs,pairs",
             "study.models": "llava15_tiny,llava15_tiny",
                 "study.ablation_budgets": "epochs,epochs"}.get(key, "a,a")  # fmt: skip
    with pytest.raises(ConfigError, match=f"{key}.* twice"):
        load(FILE, {key: value})


def test_a_path_starts_in_the_home_folder_and_nowhere_else(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = ("model.checkpoint", "model.tokenizer", "data.root", "data.general_records", "study.base_dir")
    assert marked("path") == set(paths)
    run = load(FILE, dict.fromkeys(paths, "~/x/~y"))
    assert {functools.reduce(getattr, key.split("."), run) for key in paths} == {f"{tmp_path}/x/~y"}
    for key in paths:
        with pytest.raises(ConfigError, match=f"config.{key}=~nosuch/x: no home folder is known for ~nosuch"):
            load(FILE, {key: "~nosuch/x"})


def test_files_of_the_same_name_in_two_folders_are_two(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "shared_parts").mkdir(parents=True)
        (tmp_path / name / "shared_parts" / "__init__.py").write_text("")
        (tmp_path / name / "shared_parts" / "lr.py").write_text(f"NAME = {name!r}")
        (tmp_path / name / "shared_base.py").write_text(
            f"from medcg_jax.config import RunConfig\nRUN = RunConfig(name={name!r})"
        )
        (tmp_path / name / "shared_top.py").write_text(
            "import shared_base\nfrom medcg_jax.config_file import to_config_dict\n"
            "def get_config():\n    from shared_parts import lr\n    assert lr.NAME == shared_base.RUN.name\n"
            "    return to_config_dict(shared_base.RUN)"
        )
    before = set(sys.modules)
    for name in ("a", "b", "a"):
        assert load(str(tmp_path / name / "shared_top.py")).name == name
    assert not {"shared_base", "shared_parts", "shared_parts.lr"} & set(sys.modules)
    assert "medcg_jax.config" in before <= set(sys.modules)


def test_targets_of_single_tables_are_read_and_checked():
    run = load(FILE, {"study.targets_of": "{'triples': ['04']}"})
    assert run.study.targets_of == {"triples": ("04",)}
    with pytest.raises(ConfigError, match="study.targets_of='table4': expected one of"):
        load(FILE, {"study.targets_of": "{'table4': ['04']}"})
    with pytest.raises(ConfigError, match="a comma-separated list of str"):
        load(FILE, {"study.targets_of": "{'pairs': 4}"})
