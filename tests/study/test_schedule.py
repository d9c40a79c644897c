"""Cells as jobs, and the files a grid leaves."""

import datetime
import json

import pytest
from worlds import PAPER_ARMS, SMALL

from medcg_jax.config import TABLES, ConfigError, RunConfig, TrainConfig, replace
from medcg_jax.files import write_whole
from medcg_jax.study.design import schedule, suite
from medcg_jax.study.run import grid
from medcg_jax.study.stats import results

# Every arm with the same number of epochs, as in the paper: `test_arms.py` has those with equal updates.
RUN = replace(
    RunConfig(), study__tables=TABLES, study__targets=("ct-lung-state",), study__seeds=(0, 1), train__epochs=2.0,
    study__arms=(*PAPER_ARMS, *(f"efficiency_{n}" for n in (0, 10, 30, 100))), study__efficiency_budget="epochs",
)  # fmt: skip


@pytest.fixture(scope="module")
def cells():
    return suite.expand(RUN, SMALL, (), {subset.name: 300 for subset in SMALL})


def test_equal_trainings_are_one_job(cells):
    jobs = schedule.jobs_of(cells, RUN)
    assert sorted(c.id for j in jobs for c in j.cells) == sorted(c.id for c in cells)
    assert len({(j.seed, j.training) for j in jobs}) == len(jobs) <= 0.7 * len(cells)
    base = next(j for j in jobs if not j.training)
    assert base.steps == 0 and {c.arm for c in base.cells} == {"baseline", "efficiency_0"}
    assert set(base.targets) == {s.name for s in SMALL}
    pair = next(j for j in jobs if "pairs" in j.id and "trained" in j.id)
    assert pair.steps == 13  # 2 epochs of 200 records in batches of 32


def test_the_longest_come_first_within_their_seed(cells):
    jobs = schedule.jobs_of(cells, RUN)
    assert [j.seed for j in jobs] == sorted(j.seed for j in jobs)
    steps = [j.steps for j in jobs if j.seed == 0]
    assert steps[0] == 0 and steps[1:] == sorted(steps[1:], reverse=True) and len(set(steps)) > 2
    assert schedule.jobs_of(cells[::-1], RUN)[1].training == jobs[1].training or len(set(steps)) < len(steps)


def test_jobs_with_boxes_are_told_from_others():
    run = replace(
        RUN, model__name="next_chat_tiny", data__train_records_per_subset=8, data__test_records_per_subset=4,
        study__tables=("pairs", "detection_pairs", "detection"), study__targets=("ct-eye-stage",), study__seeds=(0,),
    )  # fmt: skip
    jobs = [job for job in schedule.make_plan(run).jobs if job.training]
    boxed = [any("-det" in name for name, _ in job.training) for job in jobs]
    assert [job.has_boxes for job in jobs] == boxed and set(boxed) == {True, False}


def test_epochs_are_equal_for_every_arm(cells):
    for job in schedule.jobs_of(cells, RUN):
        records = sum(count for _, count in job.training)
        assert job.steps * 32 / 2 - 32 < records <= job.steps * 32 / 2


def test_a_table_may_have_epochs_of_its_own(cells):
    """Then it shares no training with another table, and its controls say so."""
    longer = replace(RUN, study__epochs_of={"triples": 4.0})
    before, after = (schedule.jobs_of(cells, run) for run in (RUN, longer))
    assert len(after) >= len(before)
    for job in after:
        tables = {cell.table for cell in job.cells}
        records = sum(count for _, count in job.training)
        if job.training:
            assert "triples" not in tables or tables == {"triples"}
            assert job.steps == -(-records * (4 if tables == {"triples"} else 2) // 32)
    base = next(job for job in after if not job.training)
    assert {"pairs", "triples"} <= {cell.table for cell in base.cells}


def fill(workdir, jobs):
    outcomes = {}
    for job in jobs:
        bad = "single_task" in job.id
        outcomes[job.id] = {"status": "failed: loss is nan, at step 3" if bad else "done", "seconds": 1.25}
        for cell in () if bad else job.cells:
            lines = [
                {
                    "id": f"{t}/{i}",
                    "subset": t,
                    "options": ["x", "y"],
                    "answer": "A",
                    "predicted": "AB"[i % 2],
                    "logprobs": None,
                    "generated": "A",
                }
                for t in cell.target
                for i in range(4)
            ]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            write_whole(workdir / "predictions" / f"{cell.id}.jsonl", text)
        results.mark_done(workdir, job.id, outcomes[job.id])
    return outcomes


def test_tables(tmp_path, cells):
    jobs = schedule.jobs_of(cells, RUN)
    tables = results.Tables(tmp_path, cells, jobs)
    tables.write({})
    assert (tmp_path / "results.csv").read_text() == ",".join(results.RESULTS_HEADER) + "\n"
    assert (tmp_path / "cells.csv").read_text().count(",waiting,0.0\n") == len(cells)
    outcomes = fill(tmp_path, jobs)
    assert results.all_outcomes(tmp_path, jobs) == outcomes
    tables.write(outcomes)
    lines = (tmp_path / "results.csv").read_text().splitlines()
    assert lines[1] == (
        "pairs.fixed_modality.ct-lung-state.baseline.s0,pairs,fixed_modality/ct-lung-state,baseline,0,ct-lung-state,"
        "4,2,0.500000,0.150039,0.849961"
    )
    scored = [c for j in jobs if outcomes[j.id]["status"] == "done" for c in j.cells]
    assert 0 < len(scored) < len(cells)
    assert [x.split(",")[0] for x in lines[1:]] == [c.id for c in cells if c in scored for _ in c.target]
    assert "failed: loss is nan, at step 3" in (tmp_path / "cells.csv").read_text()
    assert not list(tmp_path.rglob(".*"))


class Later(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return super().now(tz) + datetime.timedelta(days=1)


def test_another_commit_is_said_and_no_reason_to_refuse(tmp_path, monkeypatch, capsys):
    run = replace(RunConfig(), study__tables=("pairs",), study__targets=("mri-brain-state",))
    plan = schedule.make_plan(run)
    monkeypatch.setattr(grid, "commit", lambda: "aaa")
    grid.write_config(run, tmp_path, plan)
    monkeypatch.setattr(grid, "commit", lambda: "bbb+")
    grid.write_config(run, tmp_path, plan)
    assert "commit aaa -> bbb+" in capsys.readouterr().err
    assert json.loads((tmp_path / "config.json").read_text())["commit"] == "bbb+"
    # A grid from before commits were recorded goes on without a word.
    recorded = json.loads((tmp_path / "config.json").read_text())
    for key in ("commit", "date"):
        del recorded[key]
    (tmp_path / "config.json").write_text(json.dumps(recorded))
    grid.write_config(run, tmp_path, plan)
    assert capsys.readouterr().err == ""


def test_config_json_guards_its_grid(tmp_path, monkeypatch):
    run = replace(RunConfig(), study__tables=("pairs",), study__targets=("mri-brain-state",))
    plan = schedule.make_plan(run)
    grid.write_config(run, tmp_path, plan)
    before = (tmp_path / "config.json").read_bytes()
    # The date is that of the first start.
    assert json.loads(before)["date"] and isinstance(json.loads(before)["commit"], str)
    monkeypatch.setattr(grid.datetime, "datetime", Later)
    grid.write_config(replace(run, study__jobs=2, train__log_every_steps=3), tmp_path, plan)
    grid.write_config(run, tmp_path, plan)
    assert (tmp_path / "config.json").read_bytes() == before
    for change, field in (
        ({"train__learning_rate": 1e-3}, "train.learning_rate=5e-06, not 0.001"),
        ({"study__seeds": (0, 1)}, r"study.seeds=\[0\], not \[0, 1\]"),
        ({"data__subset_weights": {"a": 1.0}}, "data.subset_weights"),
    ):
        with pytest.raises(ConfigError, match=field) as error:
            grid.write_config(replace(run, **change), tmp_path, plan)
        assert "\n" not in str(error.value)
    assert (tmp_path / "config.json").read_bytes() == before


def test_the_configuration_comes_back_from_its_file(tmp_path):
    from medcg_jax.study.run.worker import read_config

    run = replace(RUN, data__subset_weights={"a": 2.0}, study__targets=("mri-brain-state",))
    run = replace(run, train=TrainConfig(epochs=1))
    grid.write_config(run, tmp_path, schedule.make_plan(run))
    assert read_config(tmp_path) == run


def test_seeds_move_every_seed():
    run = replace(RunConfig(), data__seed=10, base__seed=20, train__seed=30)
    moved = schedule.seeded(run, 2)
    assert (moved.data.seed, moved.base.seed, moved.train.seed) == (12, 22, 32)
