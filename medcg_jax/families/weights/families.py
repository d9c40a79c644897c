"""Which weights module belongs to which model: one for each family, all with the same functions.

A module has `table(config)`, `read_release(src, parts)`, `open_release(src, parts)`, `released_name(name)` and
`config_to_json(config, dtype)`; `parts` are files or directories of a release that lie elsewhere, by name: `clip`,
`base`, `eva`, `minigpt`, `sam` (`medcg convert --help` says what they are).
"""

from pathlib import Path
from types import ModuleType

from medcg_jax.families import registry
from medcg_jax.families.weights.fields import quoted
from medcg_jax.families.weights.files import WeightsError, read_json


def family_of(config) -> str:
    """The family that an architecture belongs to."""
    return config.family


def module_of(config) -> ModuleType:
    """The weights module of an architecture's family."""
    return registry.of(config).weight_map


def is_original(found: dict) -> bool:
    """Whether a config.json is in the form of the original LLaVA's code, and not in transformers'."""
    return found.get("model_type") != "nextchat" and ("mm_vision_tower" in found or "mm_projector_type" in found)


def module_of_release(src: Path) -> ModuleType:
    """The weights module for the released directory `src`.

    Raises:
      WeightsError: its config.json is broken, or of a model that is not ported.
    """
    found = read_json(src / "config.json")
    # The original LLaVA's config.json bears the decoder's name in some releases.
    kind = "llava" if is_original(found) else found.get("model_type")
    families = {name: family for family in registry.families() for name in family.model_types}
    if not isinstance(kind, str) or kind not in families:
        raise WeightsError(f"{src / 'config.json'} has model_type={quoted(kind)}; accepted: {', '.join(families)}")
    return families[kind].weight_map
