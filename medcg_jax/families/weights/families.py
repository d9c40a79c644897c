"""Which weights module belongs to which model: one for each family, all with the same functions.

A module has `table(config)`, `read_release(src, parts)`, `open_release(src, parts)`, `released_name(name)` and
`config_to_json(config, dtype)`; `parts` are files or directories of a release that lie elsewhere, by name: `clip`,
`base`, `eva`, `minigpt`, `sam` (`medcg convert --help` says what they are).
"""

from pathlib import Path
from types import ModuleType

from medcg_jax.families.llava.model import LlavaConfig
from medcg_jax.families.minigpt_v2.model import MiniGPTv2Config
from medcg_jax.families.mllama.model import MllamaConfig
from medcg_jax.families.next_chat.model import NextChatConfig
from medcg_jax.families.qwen2_vl.model import Qwen2VLConfig
from medcg_jax.families.weights import llava, minigpt_v2, mllama, next_chat, qwen2_vl
from medcg_jax.families.weights.fields import quoted
from medcg_jax.families.weights.files import WeightsError, read_json

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
    """The weights module of an architecture's family."""
    return FAMILIES[family_of(config)][1]


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
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        raise WeightsError(f"{src / 'config.json'} has model_type={quoted(kind)}; accepted: {', '.join(MODEL_TYPES)}")
    return FAMILIES[MODEL_TYPES[kind]][1]
