"""A tree that the tests of leaks and contamination copy and plant them in."""

import pytest

from medcg_jax.data.phantom.source import PhantomSource, write_release


@pytest.fixture
def no_base(monkeypatch):
    """Jobs that nothing is trained for: they start from no parameters."""
    from flax import nnx

    monkeypatch.setattr("medcg_jax.study.run.bases.load_base", lambda path, setup: (None, nnx.State({})))


@pytest.fixture(scope="session")
def clean_tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("clean") / "tree"
    write_release(PhantomSource(5, 4, 4), root)
    return root
