"""The source that a configuration names, and subsets that do not exist."""

import pytest
from trees import write_tree

from medcg_jax.config import DataConfig
from medcg_jax.data.records import DataError
from medcg_jax.data.release import ReleaseSource
from medcg_jax.data.sources import open_source, require_subsets


def test_a_release_is_opened(tmp_path):
    source = open_source(DataConfig(source="release", root=str(write_tree(tmp_path))))
    assert isinstance(source, ReleaseSource)
    require_subsets(source, ["04"])


def test_unknown_names_get_one_line_with_what_is_close(tmp_path):
    source = open_source(DataConfig(source="release", root=str(write_tree(tmp_path))))
    with pytest.raises(DataError, match=r"^subset '4' does not exist; did you mean 04\? there are 04$"):
        require_subsets(source, ["04", "4"])
    with pytest.raises(DataError, match=r"^subset 'lung' does not exist; there are 04$"):
        require_subsets(source, ["lung"])


def test_unknown_source_and_missing_root():
    with pytest.raises(DataError, match="data.source='tree'; phantom or release or prepared is accepted"):
        open_source(DataConfig(source="tree"))
    with pytest.raises(DataError, match="data.root=''"):
        open_source(DataConfig(source="release"))
