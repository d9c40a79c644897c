"""`medcg_jax.report`: the page of a grid from Python."""

from pathlib import Path

import pytest
from docstrings import run_examples
from report_grids import small_grid

import medcg_jax
from medcg_jax.config import ConfigError


def test_the_example_runs_and_what_is_no_grid_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_grid(Path("runs/demo"))
    run_examples(medcg_jax.report)
    assert Path("runs/demo/report/index.html").is_file()
    with pytest.raises(FileNotFoundError):
        medcg_jax.report(tmp_path / "runs")
    with pytest.raises(ConfigError, match="--format=pdf"):
        medcg_jax.report("runs/demo", "pdf")
