"""The weight map of each family: a module, all with the same functions.

These are `table(config)`, `read_release(src, stated, parts)`, `open_release(src, stated, parts)`, `canonical(name)`,
`released_name(name)` and `config_to_json(config, dtype)`; `stated` is the config.json of `src`, and `parts` are files
or directories of a release outside `src`, by name: `clip`, `base`, `eva`, `minigpt`, `sam` (`medcg convert --help`).
"""

from types import ModuleType

from medcg_jax.families import registry
from medcg_jax.families.weights import llava
from medcg_jax.families.weights.fields import quoted
from medcg_jax.families.weights.files import WeightsError


def family_of(config) -> str:
    """The family that an architecture belongs to."""
    return config.family


def module_of(config) -> ModuleType:
    """The map of an architecture's family."""
    return registry.of(config).weight_map


def module_of_release(stated: dict) -> ModuleType:
    """The map for the release whose config.json is `stated`.

    Raises:
      WeightsError: the model is not ported, or its weights are quantised.
    """
    if (quantised := stated.get("quantization_config")) is not None:
        raise WeightsError(
            f"config.json has quantization_config={quoted(quantised)}; expected weights that are not quantised, of the "
            "release that these were made of (model.base_dtype quantises on the devices)"
        )
    families = {kind: family for family in registry.families() for kind in family.model_types}
    kind = "llava" if llava.is_original(stated) else stated.get("model_type")
    if not isinstance(kind, str) or kind not in families:
        raise WeightsError(f"model_type={quoted(kind)}; accepted: {', '.join(families)}")
    return families[kind].weight_map
