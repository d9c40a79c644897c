"""Test images that are not there: a training needs none of them, goes on, and says so."""

import pytest
from trees import write_tree

from medcg_jax.config import DataConfig, RunConfig, replace
from medcg_jax.data.records import DataError
from medcg_jax.data.release import ReleaseSource
from medcg_jax.train.run import left_out

RUN = replace(RunConfig(), data__source="release")


@pytest.mark.parametrize("missing", [0, 1, 3])
def test_a_training_goes_on_without_them_and_counts_them(tmp_path, capsys, missing):
    write_tree(tmp_path, train=12, test=4)
    for number in range(1001, 1001 + missing):
        (tmp_path / f"med-mat/a b/{number} [1]%.png").unlink()
    source = ReleaseSource(tmp_path, DataConfig())
    assert left_out(RUN, source, ("04",), None) == frozenset()
    out = capsys.readouterr().out
    if not missing:
        assert out == ""
        return
    assert out.startswith(f"warning: {missing} test records have no image, as 04/test/1001: no training needs them")
    assert out.count("\n") == 1
    with pytest.raises(DataError, match="cannot be opened"):  # what is tested must be there
        source.records("04", "test")


def test_the_tests_that_are_there_are_still_compared(tmp_path, capsys):
    write_tree(tmp_path, train=12, test=4)
    folder = tmp_path / "med-mat/a b"
    (folder / "1001 [1]%.png").unlink()
    (folder / "1002 [1]%.png").write_bytes((folder / "3 [1]%.png").read_bytes())
    with pytest.raises(DataError, match="04/train/3"):
        left_out(RUN, ReleaseSource(tmp_path, DataConfig()), ("04",), None)
    assert "1 test records have no image" in capsys.readouterr().out


def test_other_faults_of_a_test_are_no_missing_image(tmp_path):
    write_tree(tmp_path, train=12, test=4)
    file = next(tmp_path.rglob("Subset--04-test.json"))
    file.write_text(file.read_text().replace("1001 [1]%.png", "../1001.png"))
    with pytest.raises(DataError, match="climbs out of its folder"):
        left_out(RUN, ReleaseSource(tmp_path, DataConfig()), ("04",), None)
