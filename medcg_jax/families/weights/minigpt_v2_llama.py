"""MiniGPT-v2's decoder as a plain Llama of transformers: the adapters merged into the weights."""

import json
from pathlib import Path

import jax
import numpy as np

from medcg_jax.families.minigpt_v2.model import MiniGPTv2Config
from medcg_jax.families.weights import engine
from medcg_jax.families.weights.files import write_safetensors
from medcg_jax.families.weights.minigpt_v2 import llama_json, table


def export_llama(params, config: MiniGPTv2Config, dst: Path, *, dtype=None) -> None:
    """Writes config.json and safetensors of a `LlamaForCausalLM` into `dst`, one tensor on the host at a time.

    dtype: of the file; None: the parameters'. The sum of weight and adapters is taken in float32.
    """
    dtype = np.dtype(jax.tree.leaves(params)[0].dtype if dtype is None else dtype)
    entries = [entry for entry in table(config) if entry.path[0] == "decoder"]
    found, stream = engine.store(entries, {"decoder": params["decoder"]})
    slots = engine.slots(entries, {"decoder": params["decoder"]})

    def tensors():
        for name, value in stream:
            path, layer = slots[name].entry.path, slots[name].layer
            if path[1] == "blocks" and path[2] in config.lora.targets:
                value = value.astype(np.float32) + added(params["lora"][path[2]], layer, config.lora.scale)
            yield name.removeprefix("llama_model."), value.astype(dtype)

    dst.mkdir(parents=True, exist_ok=True)
    specs = {name.removeprefix("llama_model."): (shape, dtype) for name, (shape, _) in found.items()}
    write_safetensors(dst, specs, tensors())
    (dst / "config.json").write_text(json.dumps(llama_json(config, dtype.name), indent=2) + "\n")


def added(adapter, layer: int, scale: float) -> np.ndarray:
    """float32[out, in]: what a layer's adapter adds to a product's weight, in PyTorch's orientation."""
    a, b = (np.asarray(adapter[half][layer], np.float32) for half in "ab")
    return scale * (a.reshape(-1, len(b)) @ b.reshape(len(b), -1)).T
