"""The page of a grid, with its tables and plots."""

from pathlib import Path


def report(workdir: str | Path, formats: str = "") -> Path:
    """Writes the page of a grid, as `medcg report` does, and returns its path.

    workdir: of `medcg reproduce`; of a grid with several models, each model's page is written and one for all of them.
    formats: beside the page, of "md,tex,csv".

    Raises:
      FileNotFoundError: `workdir` is not a grid's.
      ConfigError: a file of the grid is broken, or a format is unknown; an earlier page stays.

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
    models = models_in(folder)
    for model in models:
        write_report(folder / model, names)
    return write_models_page(folder, models) if models else write_report(folder, names)
