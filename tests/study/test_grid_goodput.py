"""Where a grid's time went: a file for each process, their sum, and the table of the report."""

import json

import pytest
from report_grids import make_grid, run_of

from medcg_jax.config import ConfigError, RunConfig, replace
from medcg_jax.study.report.file_tables import time_spent
from medcg_jax.study.report.load_grid import Grid
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


@pytest.mark.parametrize(("name", "value"), [("wandb", "project"), ("profile_steps", "2:3")])
def test_what_a_grid_has_no_use_for_is_refused(name, value):
    with pytest.raises(ConfigError, match=f"log.{name}='{value}'"):
        check_start(replace(RunConfig(), **{f"log__{name}": value}))
