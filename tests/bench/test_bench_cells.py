"""The benchmark of cells at once: as many steps on both sides, and a command that leaves its numbers."""

import json
from pathlib import Path

import pytest

from benchmarks import cells as bench_cells
from medcg_jax.config_file import load

CONFIG = f"{Path(__file__).parents[2] / 'configs' / 'phantom.py'}:tiny"


def test_both_sides_make_the_same_steps(monkeypatch):
    made = []
    start = bench_cells.Training.run

    def run(self, num_steps):
        start(self, num_steps)
        made.append((self.num_cells, num_steps, self.state.step.tolist()))

    monkeypatch.setattr(bench_cells.Training, "run", run)
    small = dict.fromkeys(("train.batch_size", "base.batch_size", "eval.batch_size"), "8")
    found = bench_cells.bench_cells(load(CONFIG, small), num_cells=2, num_steps=1, num_blocks=2)
    assert [m[:2] for m in made] == [(2, 2), (1, 2), (2, 1), (1, 2), (2, 1), (1, 2)]
    assert made[-2][2] == [4, 4] and made[-1][2] == 6
    assert {len(s) for s in (*found["wall_s"].values(), *found["cpu_s"].values())} == {2}
    medians = [sum(found["wall_s"][name]) / 2 for name in ("at_once", "one_by_one")]
    assert found["ratio"] == pytest.approx(medians[0] / medians[1])


def test_the_command_leaves_its_numbers(tmp_path, monkeypatch, capsys):
    seen = {}

    def measured(run, *, num_cells):
        seen["cells"] = num_cells
        seconds = {"at_once": [3.0], "one_by_one": [2.0]}
        times = {"wall_s": seconds, "cpu_s": seconds, "ratio": 1.5, "ratio_cpu": 1.5}
        return {"num_cells": num_cells, "num_steps": 10} | times

    monkeypatch.setattr(bench_cells, "bench_cells", measured)
    file = tmp_path / "out.json"
    assert bench_cells.main([f"--config={CONFIG}", "--cells=3", f"--json={file}"]) == 0
    assert "3 cells at once take 1.50 times as long" in capsys.readouterr().out
    assert json.loads(file.read_text())["ratio"] == 1.5 and seen == {"cells": 3}
    assert bench_cells.main(["--config=configs/none.py"]) == 2
