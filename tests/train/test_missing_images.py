"""Test images that are not there: a training needs none of them, and says so."""

import pytest
from trees import write_tree

from medcg_jax.config import DataConfig, RunConfig
from medcg_jax.data.phantom.source import PhantomSource
from medcg_jax.data.release import ReleaseSource
from medcg_jax.train.run import left_out, missing_tests


@pytest.mark.parametrize("missing", [0, 1, 3])
def test_missing_test_images_are_counted_and_one_is_named(tmp_path, missing):
    write_tree(tmp_path, train=12, test=4)
    for number in range(1001, 1001 + missing):
        (tmp_path / f"med-mat/a b/{number} [1]%.png").unlink()
    warning = missing_tests(ReleaseSource(tmp_path, DataConfig()), ("04",))
    if missing:
        assert warning.startswith(f"warning: {missing} test records have no image, as 04/test/1001: they are not needed")
    else:
        assert warning == ""


def test_phantoms_have_all_their_images():
    source = PhantomSource(0, 4, 4)
    assert missing_tests(source, [source.subsets[0].name]) == ""


def test_a_search_for_leaks_passes_over_them(tmp_path):
    write_tree(tmp_path, train=12, test=4)
    (tmp_path / "med-mat/a b/1001 [1]%.png").unlink()
    assert left_out(RunConfig(), ReleaseSource(tmp_path, DataConfig()), ("04",), None) == frozenset()
