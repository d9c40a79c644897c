"""Which map belongs to which model: one module for each family, all with the same functions.

A module has `table(config)`, `read_release(src, stated, parts)`, `open_release(src, stated, parts)`, `canonical(name)`,
`released_name(name)` and `config_to_json(config, dtype)`; `stated` is the config.json of `src`, and `parts` are files or
directories of a release that lie elsewhere, by name: `clip`, `base`, `eva`, `minigpt`, `sam` (`medcg convert --help` says
what they are).
"""

from types import ModuleType

from medcg_jax.families.llava.model import LlavaConfig
from medcg_jax.families.minigpt_v2.model import MiniGPTv2Config
from medcg_jax.families.mllama.model import MllamaConfig
from medcg_jax.families.next_chat.model import NextChatConfig
from medcg_jax.families.qwen2_vl.model import Qwen2VLConfig
from medcg_jax.families.weights import llava, minigpt_v2, mllama, next_chat, qwen2_vl
from medcg_jax.families.weights.fields import quoted
from medcg_jax.families.weights.files import WeightsError

# Name of the family -> (type of its config, its module).
FAMILIES: dict[str, tuple[type, ModuleType]] = {
    "llava": (LlavaConfig, llava),
    "qwen2_vl": (Qwen2VLConfig, qwen2_vl),
    "mllama": (MllamaConfig, mllama),
    "minigpt_v2": (MiniGPTv2Config, minigpt_v2),
    "next_chat": (NextChatConfig, next_chat),
}
# model_type in a released config.json -> family. Llama alone is a part of MiniGPT-v2's release.
MODEL_TYPES = {
    "llava": "llava", "llava_llama": "llava", "qwen2_vl": "qwen2_vl", "mllama": "mllama", "minigpt_v2": "minigpt_v2",
    "llama": "minigpt_v2", "nextchat": "next_chat",
}  # fmt: skip


def family_of(config) -> str:
    """The family that an architecture belongs to."""
    return next(name for name, (kind, _) in FAMILIES.items() if isinstance(config, kind))


def module_of(config) -> ModuleType:
    """The map of an architecture's family."""
    return FAMILIES[family_of(config)][1]


def module_of_release(stated: dict) -> ModuleType:
    """The map for the release whose config.json is `stated`.

    Raises:
      WeightsError: it is of a model that is not ported.
    """
    kind = "llava" if llava.is_original(stated) else stated.get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        raise WeightsError(f"model_type={quoted(kind)}; accepted: {', '.join(MODEL_TYPES)}")
    return FAMILIES[MODEL_TYPES[kind]][1]
