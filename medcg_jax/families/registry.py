"""The families of models, one line each: a name, and the package whose `FAMILY` describes it.

Importing this module imports nothing heavy (no JAX, no PIL): a `Family` holds names and small values, and imports a
module that it names on first use. docs/families.md shows how to add a family.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

FAMILIES = {
    "llava": "medcg_jax.families.llava",
    "qwen2_vl": "medcg_jax.families.qwen2_vl",
    "mllama": "medcg_jax.families.mllama",
    "minigpt_v2": "medcg_jax.families.minigpt_v2",
    "next_chat": "medcg_jax.families.next_chat",
}


@dataclass(frozen=True)
class Family:
    """What the rest of the code needs to know about a family.

    Its package has a module `model`, with the architecture, and a module `rows`, whose `row_format(config)` makes the
    `data.row_format.Format` of a model.

    Attributes:
      package: the package's import name.
      config, module: names in `model` of the configuration's dataclass (whose `family` is the family's name) and of
        the `nnx.Module` made from it.
      released: size -> repository on the Hugging Face hub, "" where it is not there in this form.
      tiny: sizes without a vocabulary of their own. Sizes are functions in `model` that return a configuration.
      tokenizer: the packaged tokenizer of the tiny sizes.
      tokens: field of the configuration -> special token, beside those that every tokenizer has.
      weights: import name of the weight map (`families.weights`), "" if none.
      model_types: `model_type` in the config.json of released checkpoints.
      parity: import name of the reference in PyTorch (`medcg_jax.parity`), "" if none.
      loss: "module:function" of a fine-tune's loss.
      parts: parts of the model that can be trained and that no other family has.
      options: fields of `config.ModelConfig` that no other family takes.
      title: what the paper calls the model.
      tables: kind of table (`config.TABLES`, `BOX_TABLES`) -> (number in the paper, file of its rows).
      recipes: files in `configs/` with the released models' settings.
    """

    name: str
    package: str
    config: str
    module: str
    tiny: tuple[str, ...]
    tokenizer: str
    released: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    weights: str = ""
    model_types: tuple[str, ...] = ()
    parity: str = ""
    loss: str = "medcg_jax.train.losses:token_loss"
    parts: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    title: str = ""
    tables: dict[str, tuple[int, str]] = field(default_factory=dict)
    recipes: tuple[str, ...] = ()

    @property
    def sizes(self) -> tuple[str, ...]:
        return (*self.tiny, *self.released)

    @property
    def model(self) -> ModuleType:
        return importlib.import_module(f"{self.package}.model")

    @property
    def config_type(self) -> type:
        return getattr(self.model, self.config)

    @property
    def module_type(self) -> type:
        return getattr(self.model, self.module)

    @property
    def weight_map(self) -> ModuleType:
        return importlib.import_module(self.weights)

    @property
    def reference(self) -> ModuleType:
        return importlib.import_module(self.parity)

    @property
    def loss_fn(self):
        module, _, name = self.loss.partition(":")
        return getattr(importlib.import_module(module), name)

    @property
    def gives_boxes(self) -> bool:
        """Whether the study has tables of boxes for the family."""
        return "detection_pairs" in self.tables

    def token_ids(self, tokenizer) -> dict[str, int]:
        """The token ids that a configuration takes from its tokenizer, by field.

        Raises:
          DataError: the tokenizer lacks one, so it is of another family.
        """
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_id") for name in ("image", "pad", "eos")}
        return ids | {name: tokenizer.special(token) for name, token in self.tokens.items()}

    def row_format(self, config, *, with_masks: bool = False):
        """The `data.row_format.Format` of a model's rows. config: an instance of `config_type`.

        with_masks: rows have masks too, and images as the mask decoder's encoder takes them.

        Raises:
          DataError: `with_masks` for a model that draws none.
        """
        rows = importlib.import_module(f"{self.package}.rows")
        if not with_masks:
            return rows.row_format(config)
        if getattr(config, "sam", None) is None:
            from medcg_jax.data.records import DataError

            raise DataError(f"{self.name} without SAM draws no masks; NExT-Chat with SAM does")
        return rows.row_format(config, with_masks=True)


@functools.cache
def family(name: str) -> Family:
    return importlib.import_module(FAMILIES[name]).FAMILY


def families() -> tuple[Family, ...]:
    return tuple(family(name) for name in FAMILIES)


def of_model(name: str) -> Family:
    """The family that has the size `name` ("llava15_7b"), or that is called so ("llava")."""
    return next(entry for entry in families() if name in (entry.name, *entry.sizes))


def of(config: Any) -> Family:
    """The family of an architecture's configuration."""
    return family(config.family)


def models() -> dict[str, str]:
    """What a model can be called -> the name of its family: every size, and every family for a model of any size."""
    return {name: entry.name for entry in families() for name in (*entry.sizes, entry.name)}
