"""Where a grid's time went: a file for each process, their sum, and the table of the report."""

import json
import re

import pytest
from report_grids import make_grid, run_of

from medcg_jax.config import ConfigError, RunConfig, replace
from medcg_jax.study.report.file_tables import time_spent
from medcg_jax.study.report.load_grid import Grid
from medcg_jax.study.report.sections import _facts
from medcg_jax.study.run.grid import check_start
from medcg_jax.study.stats import results
from medcg_jax.train import goodput


def test_processes_write_apart_and_know_what_others_have_done(tmp_path):
    with (
        results.process_goodput(tmp_path, restarted=False, writes=True) as first,
        first.step({"job": 3}, compiles=True),
    ):
        pass
    parts = results.goodput_parts(tmp_path)
    assert len(parts) == 1 and parts[0]["seconds"]["restart"] == 0.0
    [file] = (tmp_path / "state" / "goodput").iterdir()
    known = json.loads(file.read_text())
    known["starts"][0]["reached"] = {"job": 3}
    file.write_text(json.dumps(known))
    with results.process_goodput(tmp_path, restarted=True, writes=True) as second:
        assert [second._fresh({"job": step}) for step in (3, 4)] == [0.0, 1.0]
        assert second.summary()["num_starts"] == 1  # what stands in another file is not counted here again
    with results.process_goodput(tmp_path, restarted=True, writes=False):
        pass  # not the first process of several: it shares the first one's time
    parts = results.goodput_parts(tmp_path)
    assert len(parts) == 2 and sorted(part["seconds"]["restart"] > 0 for part in parts) == [False, True]
    assert goodput.write(tmp_path / goodput.FILE, parts)["num_starts"] == 2


def test_the_report_has_each_kind_where_a_grid_has_written_it(tmp_path):
    workdir = make_grid(tmp_path / "grid", run_of(study__targets=("mri-brain-state",)))
    assert not time_spent(Grid(workdir)).rows
    seconds = dict(zip(goodput.KINDS, (60, 20, 10, 5, 3, 2, 0), strict=True))
    goodput.write(workdir / goodput.FILE, [{"seconds": seconds, "reached": {}}] * 2)
    rows = time_spent(Grid(workdir)).rows
    assert [(row["kind"], row["seconds"], row["share"]) for row in rows] == [
        (kind, 2 * s, pytest.approx(s / 100)) for kind, s in seconds.items()
    ]


def test_what_a_grid_cost_is_on_its_page(tmp_path):
    workdir = make_grid(tmp_path / "grid", run_of(study__targets=("mri-brain-state",), data__test_records_per_subset=6))
    start = {"seconds": dict.fromkeys(goodput.KINDS, 0.0) | {"productive": 9000.0}, "reached": {}}
    times = goodput.Goodput(devices=("NVIDIA H200", 8))._times()
    assert times["devices"] == {"kind": "NVIDIA H200", "count": 8}
    goodput.write(workdir / goodput.FILE, [start | {"devices": times["devices"]}] * 2)
    assert goodput.device_hours(goodput.read_starts(workdir / goodput.FILE)) == {"NVIDIA H200": 40.0}
    facts = dict(_facts(Grid(workdir)))
    assert facts["devices"] == "8 x NVIDIA H200" and facts["cost"] == "40 NVIDIA H200 device-hours, the base included"
    assert re.fullmatch(r"\d+ trainings, .* with their tests, without the base; median .*", facts["trainings"])
    # A start that does not say what it ran on: its hours are said, and of no device.
    goodput.write(workdir / goodput.FILE, [start | {"devices": times["devices"]}, start])
    facts = dict(_facts(Grid(workdir)))
    assert "devices" not in facts and facts["cost"] == "5 h of all processes together, the base included"


@pytest.mark.parametrize("devices", [3, {"kind": 1, "count": 1}, {"kind": "cpu", "count": 0}, {"kind": "cpu"}])
def test_devices_that_are_none_cost_the_times_alone(tmp_path, devices, capsys):
    goodput.write(tmp_path / goodput.FILE, [{"seconds": {"other": 1.0}, "reached": {}, "devices": devices}])
    assert goodput.read_starts(tmp_path / goodput.FILE) == []
    assert "the time of earlier starts is not counted" in capsys.readouterr().err


def test_a_trace_of_a_grid_is_refused():
    with pytest.raises(ConfigError, match="log.profile_steps='2:3'"):
        check_start(replace(RunConfig(), log__profile_steps="2:3"))
