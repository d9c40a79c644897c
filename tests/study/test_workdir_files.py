"""Files of a grid's workdir that something else has written over: one line that names the file, or as if not there."""

import dataclasses
import json

import pytest
from report_grids import run_of

from medcg_jax.run_config import ConfigError
from medcg_jax.study import results
from medcg_jax.study.worker import read_config
from medcg_jax.train import goodput
from medcg_jax.train.checkpoint import META_FILE, read_meta
from medcg_jax.train.log import read_metrics
from medcg_jax.untrusted import FileError


def recorded() -> dict:
    config = dataclasses.asdict(run_of())
    return json.loads(json.dumps({"config": config, "versions": {"jax": "1"}, "data": {"0": "ab"}, "cells": 2}))


def changed(key: str, value) -> str:
    whole = recorded()
    *parents, last = key.split(".")
    place = whole
    for name in parents:
        place = place[name]
    place[last] = value
    return json.dumps(whole)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        ("[]", "holds a list"),
        (json.dumps(recorded())[:300], "no JSON"),
        ('{"config": {}}', "config.name is missing"),
        ("{}", '"config" is missing'),
        (changed("config", [1]), '"config" holds a list'),
        (changed("config.model", 3), "config.model=3: an object"),
        (changed("config.data.source", 3), "config.data.source=3: a string"),
        (changed("config.train.steps", "7"), "config.train.steps='7': an int"),
        (changed("config.study.tables", 3), "config.study.tables=3"),
        (changed("versions", []), '"versions" holds a list'),
        (changed("data.0", 3), "data.0 holds a number"),
    ],
)
def test_a_config_json_that_no_grid_wrote_is_refused_in_one_line(tmp_path, text, said):
    (tmp_path / "config.json").write_text(text)
    for read in (results.read_config_file, read_config):
        with pytest.raises(ConfigError) as refused:
            read(tmp_path)
        assert said in str(refused.value) and str(tmp_path / "config.json") in str(refused.value)
        assert "\n" not in str(refused.value)


def test_a_config_json_of_an_earlier_version_is_read(tmp_path):
    whole = recorded()
    del whole["config"]["model"]["scan_unroll"], whole["versions"]
    (tmp_path / "config.json").write_text(json.dumps(whole))
    assert results.read_config_file(tmp_path)["config"] == whole["config"]
    (tmp_path / "config.json").write_text(json.dumps(recorded()))
    assert read_config(tmp_path) == run_of()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"status": 1, "seconds": 2}', '{"status": "done", "seconds": NaN}'])
def test_an_outcome_that_is_none_is_named(tmp_path, text):
    results.mark_done(tmp_path, "a", {"status": "done", "seconds": 1.0})
    assert results.outcome_of(tmp_path, "a") == {"status": "done", "seconds": 1.0}
    (tmp_path / "state/done/a.json").write_text(text)
    with pytest.raises(FileError, match="a.json"):
        results.outcome_of(tmp_path, "a")


@pytest.mark.parametrize("text", ["", "[]", '{"starts": 3}', '{"starts": [{"seconds": {"other": "1"}, "reached": {}}]}'])
def test_the_time_of_earlier_starts_that_cannot_be_read_is_not_counted_and_that_is_said(tmp_path, text, capsys):
    path = tmp_path / "goodput.json"
    path.write_text(text)
    assert goodput.read_starts(path) == []
    assert str(path) in capsys.readouterr().err


def test_a_metrics_line_that_is_none_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"step": 1, "grad_norm": Infinity}\n{"step": 2}\n{"st')
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    for line in ("[]", '{"step": "2"}', "{", '{"loss": 1}'):
        path.write_text(f'{{"step": 1}}\n{line}\n')
        with pytest.raises(FileError, match="line 2"):
            read_metrics(path)


def test_a_meta_that_is_no_object_is_none(tmp_path):
    for text in ("", "[]", "3", "\xff"):
        (tmp_path / META_FILE).write_text(text, encoding="latin-1")
        assert read_meta(tmp_path) is None
