"""Compositional generalization of multimodal LLMs in medical imaging (Med-MAT, arXiv 2412.20070), in JAX.

The names for Python; everything else is the command `medcg`:

    import medcg_jax as m

    model = m.load("runs/first")                                        a checkpoint of any of the five families
    model.ask("scan.png", "What is this?")                              free text
    model.ask("scan.png", "Is it normal?", options=["yes", "no"])       an `Answer` with probabilities
    m.train("configs/phantom.py:tiny", "runs/tiny")                     `medcg train`
    m.report("runs/demo")                                               the page of a grid
    m.__version__

Research software: no medical device, and an answer is no diagnosis.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from medcg_jax.eval.ask import Answer, Model, load
    from medcg_jax.study.report import report
    from medcg_jax.train.run import train_config as train

__all__ = ["Answer", "Model", "__version__", "load", "report", "train"]

# Name -> its module, imported at first use: JAX takes seconds. `train` is a package that can be called.
_MODULES = {
    "Answer": "medcg_jax.eval.ask",
    "Model": "medcg_jax.eval.ask",
    "load": "medcg_jax.eval.ask",
    "report": "medcg_jax.study.report",
}


def __getattr__(name: str):
    if name == "__version__":
        from importlib.metadata import version

        return version("medcg-jax")
    if name == "train":
        return importlib.import_module("medcg_jax.train")
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
