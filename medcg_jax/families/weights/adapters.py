"""Low-rank adapters as files: merged into the weights that they change, written as peft's, or alone beside their base.

Source: huggingface/peft:src/peft/utils/save_and_load.py and tuners/lora/config.py at 0.21.
"""

import dataclasses
import json
import re
from os.path import commonprefix
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save

from medcg_jax.families.weights import engine
from medcg_jax.families.weights.engine import Entry, Leaf, linear
from medcg_jax.families.weights.families import module_of
from medcg_jax.families.weights.files import WeightsError
from medcg_jax.nn.quant import is_quantized

ADAPTER_FILE, ADAPTER_JSON = "adapter_model.safetensors", "adapter_config.json"
# Parts that a peft directory can hold.
PEFT_PARTS = ("lora", "projector")


def has_own(config) -> bool:
    """Whether the family's released layout holds adapters itself."""
    return config.family == "minigpt_v2"


def without(params, config):
    """(params, config) without the adapters that the family's released layout does not hold."""
    if config.lora is None or has_own(config):
        return params, config
    kept = {name: part for name, part in _parts(params).items() if name != "lora"}
    return kept, dataclasses.replace(config, lora=None)


def merged(params, config):
    """(params, config) with such adapters in the weights: W + alpha / rank * A B, summed in float32, in W's dtype.

    params: arrays or `engine.Leaf`s; what changes is a `Leaf`.
    """
    if config.lora is None or has_own(config):
        return params, config
    # A copy of the tree: what the caller holds keeps its weights.
    found = jax.tree.map(lambda leaf: leaf, dict(_parts(params)), is_leaf=is_quantized)
    for path, adapter in _targets(found.pop("lora")):
        layers = found
        for key in path[:-1]:
            layers = layers[key]
        layers[path[-1]] = _sum(layers[path[-1]], adapter, config.lora.scale)
    return found, dataclasses.replace(config, lora=None)


def _sum(kernel, adapter, scale: float) -> Leaf:
    kernel = engine.dequantized(kernel) if is_quantized(kernel) else kernel

    def read(layer: int | None) -> np.ndarray:
        if layer is None:
            return np.stack([read(i) for i in range(kernel.shape[0])])
        a, b = (np.asarray(adapter[half][layer], np.float32) for half in "ab")
        found = np.asarray(kernel[layer]).astype(np.float32) + scale * np.tensordot(a, b, 1)
        return found.astype(kernel.dtype)

    return Leaf(kernel.shape, kernel.dtype, read)


def _targets(adapters):
    """(path of a kernel, its adapter {"a", "b"}) for every stack of the decoder's layers that has one."""
    # Llama-3.2-Vision's decoder has two kinds of layers.
    stacks = adapters if "blocks" in adapters else {"blocks": adapters}
    for stack, own in stacks.items():
        for target in own:
            yield ("decoder", stack, target, "kernel"), own[target]


def _parts(params) -> dict:
    return params.raw_mapping if isinstance(params, nnx.State) else params


# ------------------------------------------------------------------ peft


def peft_entries(config, params) -> list[Entry]:
    """The lines of a table for a peft directory: names of the adapters' halves, as peft has them, and their paths."""
    kinds = slice(1, 3) if "blocks" in params["lora"] else slice(2, 3)
    wanted = {path: ("lora", *path[kinds]) for path, _ in _targets(params["lora"])}
    entries = []
    for entry in module_of(config).table(config):
        if entry.path in wanted:
            name = f"base_model.model.{module_name(config, entry.name).removesuffix('.weight')}"
            entries += halves(name, wanted[entry.path], entry.layers)
        elif entry.path[0] == "projector" and "projector" in params and _has_projector(config):
            name = f"base_model.model.{module_name(config, entry.name)}"
            entries.append(dataclasses.replace(entry, name=name))
    return entries


def halves(name: str, path: tuple[str, ...], layers: range) -> list[Entry]:
    """The lines of a table for the adapters at `path`, whose module is called `name`."""
    made = {"a": linear(inputs=2 if path[-1] == "out" else 1), "b": linear()}
    return [Entry(f"{name}.lora_{half.upper()}.weight", (*path, half), made[half], layers) for half in "ab"]


def module_name(config, name: str) -> str:
    """The name in transformers' model of what the table calls so; of MiniGPT-v2 and NExT-Chat in their Llama."""
    if config.family == "minigpt_v2":
        return name.removeprefix("llama_model.")
    if config.family == "next_chat":
        return module_of(config).released_name(name)
    return f"model.{name}"


def _has_projector(config) -> bool:
    return config.family not in ("minigpt_v2", "next_chat")


def export_peft(params, config, dst: Path, *, base: str = "") -> int:
    """Writes `adapter_model.safetensors` and `adapter_config.json` into `dst`; returns how many tensors.

    `peft.PeftModel.from_pretrained` loads them onto transformers' model; of MiniGPT-v2 and NExT-Chat onto their Llama,
    and without the projector, which is not in it. A projector among `params` is written whole, as `modules_to_save`.
    base: what the adapters were trained on, for the reader.

    Raises:
      WeightsError: there are no adapters.
    """
    if config.lora is None:
        raise WeightsError("there are no adapters here; parameters of a run with model.lora_rank above 0 are accepted")
    params = {name: part for name, part in _parts(params).items() if name in PEFT_PARTS}
    entries = peft_entries(config, params)
    if not _has_projector(config):
        params = {"lora": params["lora"]}
    found, stream = engine.store(entries, params)
    modules = [name.removeprefix("base_model.model.") for name in found]
    kernels = [re.sub(r"\.lora_[AB]\.weight$", "", name) for name in modules if ".lora_" in name]
    prefix = re.escape(re.match(r"(.*\.layers\.)\d+\.", kernels[0])[1])
    ends = sorted({re.sub(r".*\.layers\.\d+\.", "", name) for name in kernels})
    others = [name.split(".") for name in modules if ".lora_" not in name]
    tensors = {name: np.ascontiguousarray(value) for name, value in stream}
    (dst / ADAPTER_FILE).write_bytes(save(tensors, {"format": "pt"}))
    about = {
        "peft_type": "LORA", "base_model_name_or_path": base or None, "task_type": None, "inference_mode": True,
        "r": config.lora.rank, "lora_alpha": config.lora.alpha, "lora_dropout": 0.0, "bias": "none",
        "fan_in_fan_out": False, "use_rslora": False, "use_dora": False,
        "target_modules": rf"{prefix}\d+\.({'|'.join(map(re.escape, ends))})",
        "modules_to_save": [".".join(commonprefix(others))] if others else None,
    }  # fmt: skip
    (dst / ADAPTER_JSON).write_text(json.dumps(about, indent=2) + "\n")
    return len(found)


def whole_leaves(params):
    """`params` for files: every quantised matrix as a `Leaf` in float32, which quantised again is the same."""
    return jax.tree.map(lambda x: engine.dequantized(x) if is_quantized(x) else x, params, is_leaf=is_quantized)
