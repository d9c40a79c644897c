"""Low-rank adapters as files: peft's read, merged into weights, and written.

Functions that take a `family` take the module of its map (`weights.llava`, ...).
Source: huggingface/peft:src/peft/utils/save_and_load.py and tuners/lora/config.py at 0.21.2; names, old and new.
"""

import dataclasses
import json
import re
from collections.abc import Callable
from os.path import commonprefix
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save

from medcg_jax.families.weights import engine
from medcg_jax.families.weights.engine import Leaf, Stored
from medcg_jax.families.weights.fields import expect, number, quoted
from medcg_jax.families.weights.files import Tensors, WeightsError, joined, open_bin, open_safetensors, read_json
from medcg_jax.families.weights.hub import REPOSITORY
from medcg_jax.families.weights.tables import Entry, entries, lora_halves
from medcg_jax.nn.quant import is_quantized

ADAPTER_JSON = "adapter_config.json"
ADAPTER_FILES = {"adapter_model.safetensors": open_safetensors, "adapter_model.bin": open_bin}
HALF = re.compile(r"\.lora_([AB])(\.default)?\.weight$")
PREFIX = "base_model.model."
# Accepted initialisations. Others (pissa, olora, loftq, corda ...) subtract the start from the base, which is then not
# the named one.
STARTS = (True, False, "gaussian", "eva")
# Settings that do not change the values of adapters.
NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_dropout", "megatron_config", "megatron_core", "modules_to_save", "peft_type", "peft_version",
    "qalora_group_size", "r", "revision", "runtime_config", "target_modules", "task_type", "bias",
}  # fmt: skip
# Parts of our parameters that a peft directory can hold.
PEFT_PARTS = ("lora", "projector")


def are_adapters(src: Path) -> bool:
    """Whether the directory holds peft's adapters."""
    return (src / ADAPTER_JSON).is_file()


def with_adapters(
    tensors: Tensors, names: dict[str, str], src: Path, canonical: Callable[[str], str | None], *, whole: bool
) -> tuple[Tensors, dict[str, str]]:
    """(tensors, canonical name -> name in them), with the adapters of `src` added to the weights.

    W + alpha / r * B A, summed in float32, in W's own dtype.
    canonical: the family's. whole: modules that were trained whole (`modules_to_save`) replace the model's.

    Raises:
      WeightsError: adapters of a kind that is not supported, or that do not fit the model.
    """
    rank, scale = _settings(src, whole)
    file = next((src / name for name in ADAPTER_FILES if (src / name).exists()), None)
    if file is None:
        raise WeightsError(f"{src} holds {ADAPTER_JSON} and no adapters; accepted: {', '.join(ADAPTER_FILES)}")
    adapters = ADAPTER_FILES[file.name](file)
    halves: dict[str, dict[str, str]] = {}
    others: dict[str, str] = {}
    for name in adapters.shapes:
        half = HALF.search(name)
        target = canonical(HALF.sub(".weight", name).removeprefix(PREFIX))
        if target not in names or not (half or whole):
            raise WeightsError(f"{file} holds {name}, which belongs to no weight of the model")
        if half:
            halves.setdefault(target, {})[half[1]] = name
        else:
            others[target] = name
    if not halves:
        raise WeightsError(f"{file} holds no adapters; expected lora_A and lora_B of at least one weight")
    tensors, names = joined((tensors, names), (adapters, others))
    for name, pair in halves.items():
        shapes = [adapters.shapes[pair[half]] if half in pair else None for half in "BA"]
        shape = tensors.shapes[name]
        if len(shape) != 2 or shapes != [(shape[0], rank), (rank, shape[1])]:
            raise WeightsError(f"{file} has lora_B, lora_A {shapes} for {name} {shape} and r={rank}")

    def read(name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        value = tensors.read(name, index)
        if name not in halves:
            return value
        # The whole product: that of a slice could differ in a number's last bit.
        b, a = (adapters.read(halves[name][half]).astype(np.float32) for half in "BA")
        return (value.astype(np.float32) + scale * (b @ a)[index]).astype(value.dtype)

    def origin(name: str) -> str:
        return f"{tensors.origin(name)} with {file}" if name in halves else tensors.origin(name)

    return Tensors(tensors.shapes, read, tensors.dtype, origin), names


def _settings(src: Path, whole: bool) -> tuple[int, float]:
    """(rank, alpha / rank) of the adapters in `src`, which must be of a supported kind."""
    file = src / ADAPTER_JSON
    settings = read_json(file)
    expect(settings, "", file=str(file), peft_type="LORA", bias="none", fan_in_fan_out=False, use_dora=False,
           use_rslora=False, rank_pattern={}, alpha_pattern={}, init_lora_weights=STARTS)  # fmt: skip
    if not whole:
        expect(settings, "", file=str(file), modules_to_save=[])
    unknown = [key for key, value in settings.items() if key not in NEUTRAL and value]
    if unknown:
        key = unknown[0]
        raise WeightsError(f"{file} has {key}={quoted(settings[key])}; expected null or false, as in plain LoRA")
    missing = [key for key in ("r", "lora_alpha") if key not in settings]
    if missing:
        raise WeightsError(f"{file} lacks {', '.join(missing)}")
    rank = number(settings, "", "r", None, "rank", file=str(file))
    return rank, number(settings, "", "lora_alpha", None, "alpha", kind=float, file=str(file)) / rank


# ------------------------------------------------------------------ merged, and written


def merged(family, params, config):
    """(params, config) with adapters merged into the weights, unless the family's released layout has adapters.

    W + alpha / rank * A B, summed in float32, in W's dtype. params: arrays or `engine.Leaf`s; merged ones are `Leaf`s.
    """
    if config.lora is None or any(entry.path[0] == "lora" for entry in family.table(config)):
        return params, config
    # A copy, so that the caller's tree keeps its weights.
    tree = jax.tree.map(lambda leaf: leaf, dict(_by_part(params)), is_leaf=is_quantized)
    for path, adapter in _targets(tree.pop("lora")):
        layers = tree
        for key in path[:-1]:
            layers = layers[key]
        layers[path[-1]] = _sum(layers[path[-1]], adapter, config.lora.scale)
    return tree, dataclasses.replace(config, lora=None)


def _sum(kernel, adapter, scale: float) -> Leaf:
    kernel = engine.dequantized(kernel) if is_quantized(kernel) else kernel

    def merged_layer(layer: int) -> np.ndarray:
        a, b = (np.asarray(adapter[half][layer], np.float32) for half in "ab")
        total = np.asarray(kernel[layer]).astype(np.float32) + scale * np.tensordot(a, b, 1)
        return total.astype(kernel.dtype)

    def stored(layer: int | None) -> Stored:
        assert layer is not None  # of a stack
        return Stored.computed(kernel.shape[1:], lambda: merged_layer(layer))

    return Leaf(kernel.shape, kernel.dtype, stored, stacked=True)


def _targets(adapters):
    """(path of a kernel, its adapter {"a", "b"}) for every stack with an adapter."""
    # Llama-3.2-Vision's decoder has two kinds of layers.
    stacks = adapters if "blocks" in adapters else {"blocks": adapters}
    for stack, by_target in stacks.items():
        for target, adapter in by_target.items():
            yield ("decoder", stack, target, "kernel"), adapter


def _by_part(params) -> dict:
    return params.raw_mapping if isinstance(params, nnx.State) else params


def peft_entries(family, config, params) -> list[Entry]:
    """The table of a peft directory: peft's names of the adapters' halves, and their paths.

    The names are those of transformers' model, unless the family's `peft_name` gives others, or None for a weight that
    is not in the model that peft changes (for MiniGPT-v2 and NExT-Chat that is their Llama).
    """
    name_of = getattr(family, "peft_name", lambda name: f"model.{name}")
    kinds = slice(1, 3) if "blocks" in params["lora"] else slice(2, 3)
    kernels = {path: " ".join(("lora", *path[kinds])) for path, _ in _targets(params["lora"])}
    table = []
    for entry in family.table(config):
        if entry.path in kernels:
            path = kernels[entry.path]
            halves = lora_halves(name_of(entry.name).removesuffix(".weight"), path, path)
            table += entries(halves, PREFIX, layers=entry.layers)
        elif entry.path[0] == "projector" and "projector" in params and (name := name_of(entry.name)):
            table.append(dataclasses.replace(entry, name=PREFIX + name))
    return table


def export_peft(family, params, config, dst: Path, *, base: str = "") -> int:
    """Writes `adapter_model.safetensors` and `adapter_config.json` into `dst`; returns how many tensors.

    `peft.PeftModel.from_pretrained` loads them onto transformers' model, for MiniGPT-v2 and NExT-Chat onto their Llama
    (without the projector). A projector among `params` is written whole, as `modules_to_save`.
    base: the checkpoint that the adapters were trained on, for the reader.

    Raises:
      WeightsError: there are no adapters.
    """
    if config.lora is None:
        raise WeightsError(
            "there are no adapters here; expected parameters of a run with model.lora_rank above 0, or --to=hf"
        )
    params = {name: value for name, value in _by_part(params).items() if name in PEFT_PARTS}
    table = peft_entries(family, config, params)
    tops = {entry.path[0] for entry in table}
    specs, stream = engine.store(table, {name: value for name, value in params.items() if name in tops})
    modules = [name.removeprefix(PREFIX) for name in specs]
    kernels = [re.sub(r"\.lora_[AB]\.weight$", "", name) for name in modules if ".lora_" in name]
    # The parts before and after the number of a layer.
    split = [re.split(r"(?<=\.layers\.)\d+\.", name) for name in kernels]
    prefix, ends = re.escape(split[0][0]), sorted({end for _, end in split})
    others = [name.split(".") for name in modules if ".lora_" not in name]
    named, _, revision = base.partition("@") if REPOSITORY.fullmatch(base) else (base, "", "")
    tensors = {name: np.ascontiguousarray(value) for name, value in stream}
    (dst / next(iter(ADAPTER_FILES))).write_bytes(save(tensors, {"format": "pt"}))
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": named or None,
        "revision": revision or None,
        "task_type": None,
        "inference_mode": True,
        "r": config.lora.rank,
        "lora_alpha": config.lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "target_modules": rf"{prefix}\d+\.({'|'.join(map(re.escape, ends))})",
        "modules_to_save": [".".join(commonprefix(others))] if others else None,
    }
    (dst / ADAPTER_JSON).write_text(json.dumps(settings, indent=2) + "\n")
    return len(specs)


def whole_leaves(params):
    """`params` for files: every quantised matrix as a `Leaf` in float32; quantising it again gives the same matrix."""
    return jax.tree.map(lambda x: engine.dequantized(x) if is_quantized(x) else x, params, is_leaf=is_quantized)
