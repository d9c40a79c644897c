"""What the tests of a grid share: a tree that leaks are planted in, and a finished grid with its report."""

import pytest
from record_sets import PhantomsWithFourOptions

from medcg_jax.data.phantom.source import write_release


@pytest.fixture(scope="session")
def clean_tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("clean") / "tree"
    write_release(PhantomsWithFourOptions(5, 4, 4), root)
    return root


@pytest.fixture(scope="session")
def full_grid(tmp_path_factory):
    """A grid of all tables with two targets and seeds, its tests asked again, and its report in every form."""
    from report_grids import make_full_grid

    from medcg_jax.study.report.page import write_report

    workdir = make_full_grid(tmp_path_factory.mktemp("full") / "w")
    write_report(workdir, ("md", "tex"))
    return workdir


@pytest.fixture(scope="session")
def full_summary(full_grid):
    """(its files as the report reads them, its statistics)."""
    from medcg_jax.study.report.load_grid import Grid
    from medcg_jax.study.stats import stats

    grid = Grid(full_grid)
    return grid, stats.summarise(full_grid, grid.results, grid.answers)


@pytest.fixture(scope="session")
def clean_grid(tmp_path_factory):
    """A finished grid of five cells with a file of each kind that a workdir may hold; for copies."""
    from report_grids import small_grid

    return small_grid(tmp_path_factory.mktemp("small") / "w")
