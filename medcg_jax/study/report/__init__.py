"""The page of a grid, with its tables and plots."""

import os
from pathlib import Path

from medcg_jax.config import ConfigError


def report(workdir: str | Path, formats: str = "") -> Path:
    """Writes the page of a grid, as `medcg report` does, and returns its path.

    workdir: of `medcg reproduce`; of a grid with several models, each model's page is written and one for all of them.
    formats: beside the page, of "md,tex,csv".

    Raises:
      ConfigError: `workdir` is not a grid's, a file of the grid is broken, or a format is unknown; an earlier page stays.

    Example:
      >>> import medcg_jax as m
      >>> page = m.report("runs/demo")
      >>> print(page.as_posix())
      runs/demo/report/index.html
    """
    from medcg_jax.files import user_path
    from medcg_jax.study.report.compare import models_in, write_models_page
    from medcg_jax.study.report.page import check_formats, write_report

    folder, names = Path(user_path(str(workdir), "workdir")), check_formats(formats)
    check_grid(folder)
    models = models_in(folder)
    for model in models:
        write_report(folder / model, names)
    return write_models_page(folder, models) if models else write_report(folder, names)


def check_grid(folder: str | Path) -> None:
    """Raises ConfigError if `folder` is no workdir of a grid; the message says what it is where that is known."""
    path = Path(folder)
    if not path.is_dir():
        raise ConfigError(f"{folder}: no such folder; expected the workdir of a grid (`medcg reproduce`)")
    if os.path.lexists(path / "config.json") or any(path.glob("*/config.json")):
        return
    if (path / "params" / "model.json").is_file() or (path / "metrics" / "train.jsonl").is_file():
        raise ConfigError(
            f"{folder} is a run of `medcg train`, and has no report: `medcg eval --config=FILE.py --workdir={folder}` "
            "scores it; a report is of a grid (`medcg reproduce`)"
        )
    raise ConfigError(f"{folder} has no config.json: expected the workdir of a grid (`medcg reproduce`)")
