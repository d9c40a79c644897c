"""The documentation's site: `python -m sphinx --fail-on-warning -c docs . site` (extra `docs`).

The source folder is the checkout, so links between README, docs/, benchmarks/ and launch/ are the same files on the
site and in the repository.
"""

import inspect

import medcg_jax
from medcg_jax.train.run import train_config

project = "medcg-jax"
author = "the medcg-jax authors"
release = version = medcg_jax.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

root_doc = "docs/index"
include_patterns = [
    "*.md",
    "docs/*.md",
    "benchmarks/*.md",
    "launch/*/README.md",
    "medcg_jax/study/design/paper/README.md",
]
# Not walked through.
exclude_patterns = [".*", "site", "runs", "tests", "configs", "examples"]

myst_heading_anchors = 3
autodoc_member_order = "bysource"
# A class is shown by what it says of itself: `load` makes a Model.
autodoc_class_signature = "separated"
# A name in single backticks, as docstrings have them.
default_role = "code"
# Longer signatures have a line for each argument.
maximum_signature_line_length = 100
napoleon_use_ivar = True

html_theme = "alabaster"
html_theme_options = {
    "description": "Compositional generalization of multimodal LLMs in medical imaging, in JAX",
    "page_width": "1180px",
    "sidebar_width": "250px",
}
# The front page leads to docs/index.html.
html_extra_path = ["site"]
html_show_sourcelink = False
html_copy_source = False


def with_train_described(app, what, name, described, options, lines: list[str]) -> None:
    """Gives `medcg_jax.train`, a package that can be called, the docstring of the function that it calls."""
    if name == "medcg_jax.train":
        lines[:] = [*inspect.getdoc(train_config).splitlines(), ""]


def setup(app) -> None:
    # Before napoleon, which reads the sections of a docstring.
    app.connect("autodoc-process-docstring", with_train_described, priority=400)
