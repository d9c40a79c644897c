"""A tree that the tests of leaks and contamination copy and plant them in."""

import pytest

from medcg_jax.data.phantom.source import PhantomSource, write_release


@pytest.fixture(scope="session")
def clean_tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("clean") / "tree"
    write_release(PhantomSource(5, 4, 4), root)
    return root
