"""Files of a grid's workdir that something else has written over: one line that names the file, or as if not there.

And with which other values of its configuration a grid goes on.
"""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import pytest
from report_grids import run_of

from medcg_jax.config import ConfigError, free_fields, replace
from medcg_jax.config_file import load
from medcg_jax.study.report.load_grid import Grid
from medcg_jax.study.run import grid
from medcg_jax.study.run.bases import base_recipe
from medcg_jax.study.run.worker import read_config
from medcg_jax.study.stats import results
from medcg_jax.train import goodput
from medcg_jax.train.checkpoint import META_FILE, read_meta
from medcg_jax.train.log import read_metrics
from medcg_jax.train.meta import identity
from medcg_jax.untrusted import FileError

CONFIGS = Path(__file__).parents[2] / "configs"


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
        (changed("config.model", 3), "config.model=3: expected an object"),
        (changed("config.data.source", 3), "config.data.source=3: expected a string"),
        (changed("config.train.steps", "7"), "config.train.steps='7': expected an int"),
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


@pytest.mark.parametrize(
    "text", ["", "[]", '{"starts": 3}', '{"starts": [{"seconds": {"other": "1"}, "reached": {}}]}']
)
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


# ------------------------------------------------------------------ with which values a grid goes on


def test_a_grid_goes_on_with_other_values_of_what_changes_no_result(tmp_path):
    run = run_of()
    others = {
        "name": "other", "mesh.cell": 2, "mesh.data": 4, "mesh.fsdp": 2, "mesh.tensor": 2, "mesh.elastic": True, "mesh.sparse_cores": True,
            "model.attention": "plain",
        "model.remat": "full", "model.scan_unroll": 1, "study.jobs": 3, "study.base_dir": "/b", "study.cells_at_once": 4,
        "log.tensorboard": False, "log.wandb": "w", "log.profile_steps": "1:2", "eval.features_gib": 0.5,
    } | {f"{part}.{name}": 7 for part in ("base", "train")
         for name in ("log_every_steps", "checkpoint_every_steps", "keep_checkpoints", "keep_every_steps")}  # fmt: skip
    assert free_fields() == set(others)
    changed = replace(run, **{key.replace(".", "__"): value for key, value in others.items()})
    old = recorded()
    grid.check_same(old, old | {"config": json.loads(json.dumps(dataclasses.asdict(changed)))}, tmp_path)
    assert identity(changed) == identity(run) and base_recipe(changed) == base_recipe(run)
    for key, value in (("model__compute_dtype", "bfloat16"), ("train__learning_rate", 1.0), ("data__seed", 3)):
        other = replace(run, **{key: value})
        with pytest.raises(ConfigError, match=key.replace("__", ".")):
            grid.check_same(old, old | {"config": json.loads(json.dumps(dataclasses.asdict(other)))}, tmp_path)
        assert identity(other) != identity(run)


def test_bases_that_are_there_keep_their_names():
    """Of everything in the fingerprint but the digests of modules and the tokenizer, which move when these do."""
    parts = base_recipe(load(str(CONFIGS / "phantom.py") + ":tiny")) | {"data": "", "tokenizer": ""}
    assert hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16] == "03f910e3489f247b"


def test_a_model_of_any_size_is_known_by_its_family_and_its_checkpoint(clean_grid, tmp_path):
    shutil.copytree(clean_grid, tmp_path / "w")
    file = tmp_path / "w" / "config.json"
    whole = json.loads(file.read_text())
    whole["config"]["model"] |= {"name": "llava", "checkpoint": "microsoft/llava-med@abc"}
    file.write_text(json.dumps(whole))
    assert Grid(tmp_path / "w").model == "llava (llava-med)"
    whole["config"]["model"]["name"] = "auto"  # a grid knows its family before it writes this file
    file.write_text(json.dumps(whole))
    with pytest.raises(FileError, match='config.model.name="auto": expected one of llava15_tiny'):
        Grid(tmp_path / "w")
