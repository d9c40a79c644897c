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
    for folder, why in (
        (tmp_path / "runs/none", "no such folder"),
        (tmp_path / "runs/demo/plots", "has no config.json"),
    ):
        folder.parent.mkdir(exist_ok=True)
        (folder.parent / "plots").mkdir(exist_ok=True)
        with pytest.raises(ConfigError, match=f"{why}.* the workdir of a grid") as error:
            medcg_jax.report(folder)
        assert "\n" not in str(error.value) and str(folder) in str(error.value)
    with pytest.raises(ConfigError, match="--format=pdf"):
        medcg_jax.report("runs/demo", "pdf")
