"""probe.csv: what the jobs of bases leave, joined in the plan's order; what it must not hold; the table made of it."""

from types import SimpleNamespace

import pandas as pd
import pytest

from medcg_jax.eval.predictions import wilson
from medcg_jax.eval.probe import ProbeResult
from medcg_jax.study.report.file_tables import knowledge
from medcg_jax.study.stats import probe
from medcg_jax.untrusted import FileError

PLAN = SimpleNamespace(jobs=[SimpleNamespace(id=name) for name in ("b.s0", "trained", "b.s1")])


def written(workdir, correct=(14, 20)):
    (workdir / "probe").mkdir()
    for seed in (1, 0):
        results = [
            ProbeResult(features, 30, 24, right, 0.01, 0.75)
            for features, right in zip(("mean", "tokens"), correct, strict=True)
        ]
        probe.write_probes(workdir, f"b.s{seed}", seed, {"x": results, "none": []})
    probe.join(workdir, PLAN)
    return workdir


def test_jobs_files_are_joined_in_the_order_of_the_plan(tmp_path):
    rows = probe.read(written(tmp_path))
    assert [(r["seed"], r["target"], r["features"], r["correct"]) for r in rows] == [
        (0, "x", "mean", 14), (0, "x", "tokens", 20), (1, "x", "mean", 14), (1, "x", "tokens", 20),
    ]  # fmt: skip
    assert rows[0]["accuracy"] == pytest.approx(14 / 24, abs=1e-6) and rows[0]["strength"] == 0.01
    assert (rows[0]["ci_low"], rows[0]["ci_high"]) == pytest.approx(wilson(14, 24), abs=1e-6)


def test_a_grid_that_is_not_probed_has_no_file(tmp_path):
    probe.join(tmp_path, PLAN)
    assert probe.read(tmp_path) == [] and not (tmp_path / probe.FILE).exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("0,x,mean,30,24,14", "0,x,mean,30,24,15", "target x: its shares do not follow from correct=15 of n=24"),
        ("0,x,mean,30,24,14", "0,x,mean,30,24,25", "its shares do not follow from correct=25"),
        ("0,x,mean", "0,x,median", 'line 2: features="median": expected mean or tokens'),
        ("1,x,mean", "0,x,mean", "features mean of seed 0 stand there twice"),
        ("0,x,mean,30,24", "0,x,mean,30,0", 'n="0": expected a whole number of at least 1'),
    ],
)
def test_a_file_that_was_edited_is_refused(tmp_path, old, new, message):
    path = written(tmp_path) / probe.FILE
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(FileError, match=message) as error:
        probe.read(tmp_path)
    assert str(path) in str(error.value)


class Answers:
    def __init__(self, workdir, frames):
        self.workdir, self.frames = workdir, frames

    def path(self, cell, folder):
        path = self.workdir / f"{cell}.{folder}"
        if (cell, folder) in self.frames:
            path.touch()
        return path

    def frame(self, cell, folder):
        return self.frames[cell, folder]


def frame(*rows):
    return pd.DataFrame(rows, columns=["control", "subset", "id", "right"]).astype({"right": bool})


def test_the_table_sets_the_probe_beside_answers_without_images(tmp_path):
    plain = frame(("", "x", "a", 1), ("", "x", "b", 0), ("", "y", "c", 1))
    blind = frame(("blank_images", "x", "a", 0), ("text_only", "x", "a", 1), ("text_only", "x", "b", 1))
    cells = [
        {"cell": name, "table": "pairs", "arm": arm, "seed": "0", "target": "x"}
        for name, arm in (("b", "baseline"), ("t1", "trained"), ("t2", "trained"))
    ]
    frames = {("b", "predictions"): plain, ("t1", "predictions"): plain, ("t2", "predictions"): plain[:1]}
    grid = SimpleNamespace(
        probes=probe.read(written(tmp_path)), answers=Answers(tmp_path, frames | {("b", "controls"): blind}),
        done=lambda table: cells if table == "pairs" else [], results=[{"target": "x"}, {"target": "y"}],
        is_phantom=True, describe=lambda target: "", chance=lambda target: 0.5,
    )  # fmt: skip
    (row,) = knowledge(grid).rows
    assert (row["target"], row["probe_mean"].n, row["probe_tokens"].accuracy) == ("x", 48, pytest.approx(20 / 24))
    assert (row["base"].accuracy, row["base"].n) == (0.5, 2)
    assert row["base_blank_images"].accuracy == 0.0 and row["base_text_only"].accuracy == 1.0
    # Two rows of one target: three answers to two records.
    assert (row["trained"].accuracy, row["trained"].n) == (pytest.approx(2 / 3), 2)
    assert row["trained_text_only"] is None
    # Records read from files return with every seed.
    grid.is_phantom = False
    assert knowledge(grid).rows[0]["probe_mean"].n == 24
    grid.probes, grid.answers = [], Answers(tmp_path, frames)
    (tmp_path / "b.controls").unlink()
    assert not knowledge(grid).rows
