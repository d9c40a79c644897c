"""General records in trainings: in every fine-tune of a grid and of `medcg train`, in no test, and counted."""

import json
from pathlib import Path

import numpy as np
import pytest

from medcg_jax.cli import main
from medcg_jax.config import replace
from medcg_jax.config_file import load
from medcg_jax.data.records import DataError
from medcg_jax.study.design.schedule import make_plan
from medcg_jax.study.run.grid import data_fingerprint, write_config
from medcg_jax.study.run.jobs import SeedData
from medcg_jax.train.setup import open_setup

CONFIGS = Path(__file__).parents[2] / "configs"
PARTS = (("ct-brain-state", 16), ("mri-brain-stage", 8))
QUESTION = "Which?\nA: no\nB: yes\nC: one\nD: two"


def raws(count: int) -> list[dict]:
    names = ("no", "yes", "one", "two")
    return [
        {
            "id": i, "caption": "", "image": "", "Question": "Which?", "Answer": names[i % 4],
            "Question-choice": QUESTION, "Answer-choice": "ABCD"[i % 4], "data-no": "",
        }
        for i in range(count)
    ]  # fmt: skip


@pytest.fixture
def path(tmp_path):
    (tmp_path / "general.json").write_text(json.dumps(raws(30)))
    return tmp_path / "general.json"


def tiny(share: float, path="", **changes):
    run = load(f"{CONFIGS / 'phantom.py'}:tiny", {})
    return replace(run, data__imagewikiqa_share=share, data__general_records=str(path), eval__batch_size=8, **changes)


def ids_of(run) -> list[str]:
    return [record.id for record in SeedData(open_setup(run, has_weights=True)).training(PARTS).records.records]


def test_a_cell_is_trained_on_its_share_of_them(path):
    plain, mixed = (SeedData(open_setup(tiny(share, path), has_weights=True)) for share in (0.0, 0.25))
    own, both = plain.training(PARTS), mixed.training(PARTS)
    assert (len(own), len(both)) == (24, 30)
    ids = [record.id for record in both.records.records]
    # Its own records are the same, in the same rows; the general ones stand behind them.
    assert ids[:24] == [record.id for record in own.records.records]
    assert all(name.startswith("general/") for name in ids[24:]) and len(set(ids[24:])) == 6
    for key, array in own.arrays.items():
        np.testing.assert_array_equal(array, both.arrays[key][:24])
    assert (both.arrays["target_weights"][24:].sum(1) > 0).all()
    assert ids == ids_of(tiny(0.25, path))
    test, same = (data.test("ct-brain-state") for data in (plain, mixed))
    assert test.records.records == same.records.records


def test_large_sets_are_mixed_too(path, monkeypatch):
    monkeypatch.setattr("medcg_jax.study.run.jobs.MEMORY_LIMIT_BYTES", 1)
    ids = ids_of(tiny(0.25, path))
    assert len(ids) == 30 and sum(name.startswith("general/") for name in ids) == 6


def test_steps_count_them(path):
    changes = {"train__epochs": 4.0, "train__steps": 0, "train__batch_size": 8}
    plans = [make_plan(tiny(share, path, **changes)) for share in (0.0, 0.5)]
    for before, after in zip(*(sorted(plan.jobs, key=lambda job: job.id) for plan in plans), strict=True):
        records = sum(count for _, count in before.training)
        assert (before.id, before.training) == (after.id, after.training)
        assert after.steps == -(-4 * (records + round(records / 2)) // 8) and before.steps == -(-4 * records // 8)


def test_a_grid_knows_of_them_and_of_too_few_before_it_trains(path, tmp_path):
    run = tiny(0.25, path)
    prints = {data_fingerprint(run), data_fingerprint(tiny(0.0))}
    path.write_text(json.dumps(raws(31)))
    assert len({*prints, data_fingerprint(run)}) == 3
    path.write_text(json.dumps(raws(1)))
    with pytest.raises(DataError, match="general.json' has 1 records; data.imagewikiqa_share=0.25 of"):
        write_config(run, tmp_path / "grid", make_plan(run))
    assert not (tmp_path / "grid").exists()


def test_medcg_train_mixes_them_and_refuses_in_one_line(path, tmp_path, capfd):
    argv = [
        "train", f"--config={CONFIGS / 'phantom.py'}:tiny", "--config.data.subsets=ct-brain-state",
        "--config.train.steps=2", "--config.train.batch_size=8", "--config.eval.batch_size=8",
        "--config.data.imagewikiqa_share=0.25",
    ]  # fmt: skip
    given, found = f"--config.data.general_records={path}", tmp_path / "found.json"
    assert main([*argv, given, f"--workdir={tmp_path / 'run'}", f"--json={found}"]) == 0
    assert json.loads(found.read_text())["records"] == 20
    for wrong, message in (
        ([], "data.general_records=''"),
        ([f"{given}x"], "data.general_records: general.jsonx: No such file"),
        ([given, "--config.data.imagewikiqa_share=2"], "data.imagewikiqa_share=2.0: 0 to below 1"),
    ):
        capfd.readouterr()
        assert main([*argv, *wrong, f"--workdir={tmp_path / 'other'}"]) == 2
        error = capfd.readouterr().err
        assert message in error and len(error.splitlines()) == 1
