"""Low-rank adapters as peft leaves them, added to the weights of the model that they belong to as these are read.

Source: huggingface/peft:src/peft/utils/save_and_load.py and tuners/lora/config.py at 0.21.2; names, old and new.
"""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from medcg_jax.families.weights.fields import expect, number, quoted
from medcg_jax.families.weights.files import Tensors, WeightsError, joined, open_bin, open_safetensors, read_json

ADAPTER_JSON = "adapter_config.json"
ADAPTER_FILES = {"adapter_model.safetensors": open_safetensors, "adapter_model.bin": open_bin}
HALF = re.compile(r"\.lora_([AB])(\.default)?\.weight$")
PREFIX = "base_model.model."
# How adapters may have begun. Others (pissa, olora, loftq, corda ...) take their start off the base, which is then
# not the one that is named.
STARTS = (True, False, "gaussian", "eva")
# Settings that say how adapters were made or found, and change nothing in what they are.
NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_dropout", "megatron_config", "megatron_core", "modules_to_save", "peft_type", "peft_version",
    "qalora_group_size", "r", "revision", "runtime_config", "target_modules", "task_type", "bias",
}  # fmt: skip


def are_adapters(src: Path) -> bool:
    """Whether the directory holds peft's adapters."""
    return (src / ADAPTER_JSON).is_file()


def without_prefix(name: str) -> str:
    """A name as the model has it."""
    return name.removeprefix(PREFIX)


def with_adapters(
    tensors: Tensors, names: dict[str, str], src: Path, canonical: Callable[[str], str | None], *, whole: bool
) -> tuple[Tensors, dict[str, str]]:
    """(tensors, canonical name -> name in them): those given, with the adapters of `src` in their weights.

    W + alpha / r * B A, summed in float32, in W's own dtype.
    canonical: the family's. whole: whether modules that were trained whole (`modules_to_save`) take the place of the
      model's.

    Raises:
      WeightsError: adapters of a kind that is not computed, or that do not fit the model.
    """
    rank, scale = _settings(src, whole)
    file = next((src / name for name in ADAPTER_FILES if (src / name).exists()), None)
    if file is None:
        raise WeightsError(f"{src} holds {ADAPTER_JSON} and no adapters; accepted: {', '.join(ADAPTER_FILES)}")
    adapters, halves, others = ADAPTER_FILES[file.name](file), {}, {}
    for name in adapters.shapes:
        half = HALF.search(name)
        target = canonical(without_prefix(HALF.sub(".weight", name)))
        if target not in names or not (half or whole):
            raise WeightsError(f"{file} holds {name}, which belongs to no weight of the model")
        if half:
            halves.setdefault(target, {})[half[1]] = name
        else:
            others[target] = name
    if not halves:
        raise WeightsError(f"{file} holds no adapters; lora_A and lora_B of at least one weight are accepted")
    tensors, names = joined((tensors, names), (adapters, others))
    for name, pair in halves.items():
        shapes = [adapters.shapes[pair[half]] if half in pair else None for half in "BA"]
        shape = tensors.shapes[name]
        if len(shape) != 2 or shapes != [(shape[0], rank), (rank, shape[1])]:
            raise WeightsError(f"{file} has lora_B, lora_A {shapes} for {name} {shape} and r={rank}")

    def read(name: str) -> np.ndarray:
        value = tensors.read(name)
        if name not in halves:
            return value
        b, a = (adapters.read(halves[name][half]).astype(np.float32) for half in "BA")
        return (value.astype(np.float32) + scale * (b @ a)).astype(value.dtype)

    def origin(name: str) -> str:
        return f"{tensors.origin(name)} with {file}" if name in halves else tensors.origin(name)

    return Tensors(tensors.shapes, read, tensors.dtype, origin), names


def _settings(src: Path, whole: bool) -> tuple[int, float]:
    """(rank, alpha / rank) of adapters that are computed here."""
    file = src / ADAPTER_JSON
    settings = read_json(file)
    expect(settings, "", file=str(file), peft_type="LORA", bias="none", fan_in_fan_out=False, use_dora=False,
           use_rslora=False, rank_pattern={}, alpha_pattern={}, init_lora_weights=STARTS)  # fmt: skip
    if not whole:
        expect(settings, "", file=str(file), modules_to_save=[])
    unknown = [key for key, value in settings.items() if key not in NEUTRAL and value]
    if unknown:
        key = unknown[0]
        raise WeightsError(
            f"{file} has {key}={quoted(settings[key])}; plain LoRA is accepted, in which it is null or false"
        )
    missing = [key for key in ("r", "lora_alpha") if key not in settings]
    if missing:
        raise WeightsError(f"{file} lacks {', '.join(missing)}")
    rank = number(settings, "", "r", None, "rank", file=str(file))
    return rank, number(settings, "", "lora_alpha", None, "alpha", kind=float, file=str(file)) / rank
