"""Runs the examples in docstrings."""

import doctest


def run_examples(*documented) -> None:
    """Runs the examples of each object's own docstring in the working directory; every one must have some, and hold."""
    runner = doctest.DocTestRunner(verbose=False)
    for item in documented:
        [examples] = doctest.DocTestFinder(recurse=False).find(item, item.__qualname__, globs={})
        assert examples.examples, item
        runner.run(examples)
    assert not runner.failures
