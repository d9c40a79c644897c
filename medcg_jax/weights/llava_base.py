"""LLaVA-1.5 checkpoints that hold a part of the model, and the Llama which the rest of it is.

Forms: a projector alone (stage 1's `mm_projector.bin`), or adapters with whatever else was trained
(`adapter_model.bin` and `non_lora_trainables.bin`), which are added to the weights as they are read.
Source: haotian-liu/LLaVA:llava/model/builder.py and llava/train/train.py at c121f04; peft's names, old and new.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from medcg_jax.weights.engine import canonical_names
from medcg_jax.weights.fields import expect
from medcg_jax.weights.files import Tensors, WeightsError, joined, open_bin, open_safetensors, open_tensors, read_json

PROJECTOR_FILE, OTHERS_FILE, ADAPTER_JSON = "mm_projector.bin", "non_lora_trainables.bin", "adapter_config.json"
ADAPTER_FILES = {"adapter_model.safetensors": open_safetensors, "adapter_model.bin": open_bin}
BASE_REPO = "lmsys/vicuna-7b-v1.5"
HALF = re.compile(r"\.lora_([AB])(\.default)?\.weight$")


def is_part(src: Path) -> bool:
    """Whether the directory holds a projector or adapters instead of a whole decoder."""
    return (src / ADAPTER_JSON).is_file() or (src / PROJECTOR_FILE).is_file()


def open_with_base(
    src: Path, parts: Mapping[str, Path], canonical: Callable[[str], str | None], decoder_config: Callable
) -> tuple[Tensors, dict[str, str]]:
    """(tensors, canonical name -> name in them) of the part in `src` and the Llama that `parts` names as `base`.

    canonical, decoder_config: the family's.

    Raises:
      WeightsError: no base, one of another architecture, or adapters that do not fit it.
    """
    base = parts.get("base")
    if base is None:
        raise WeightsError(
            f"{src} holds a part of LLaVA alone; pass --base=DIR with the Llama that it was trained on, {BASE_REPO} "
            f"of the Hugging Face hub (`hf download {BASE_REPO} --local-dir DIR`) unless its config.json names another"
        )
    _check_base(src, base, decoder_config)
    llama = open_tensors(base)
    sources = [(llama, canonical_names(llama.shapes, canonical, str(base)))]
    if not (src / ADAPTER_JSON).is_file():
        return joined(*sources, _opened(src / PROJECTOR_FILE, canonical))
    if (src / OTHERS_FILE).is_file():
        sources.append(_opened(src / OTHERS_FILE, canonical))
    return _merged(*joined(*sources), src, canonical)


def _check_base(src: Path, base: Path, decoder_config: Callable) -> None:
    mine, found = (read_json(directory / "config.json") for directory in (src, base))
    ours, theirs = decoder_config(mine, ""), decoder_config(found.get("text_config") or found, "")
    for name in ("num_heads", "num_kv_heads", "head_dim", "rope_theta", "norm_eps"):
        wanted, stated = getattr(ours, name), getattr(theirs, name)
        if wanted != stated:
            raise WeightsError(
                f"{base / 'config.json'} states {name}={stated}; {wanted}, as in {src / 'config.json'}, is accepted"
            )


def _opened(file: Path, canonical) -> tuple[Tensors, dict[str, str]]:
    tensors = open_bin(file)
    return tensors, canonical_names(tensors.shapes, lambda name: canonical(_without_peft(name)), str(file))


def _without_peft(name: str) -> str:
    return name.removeprefix("base_model.model.")


def _merged(tensors: Tensors, names: dict[str, str], src: Path, canonical) -> tuple[Tensors, dict[str, str]]:
    """`tensors` with the adapters of `src` in their weights: W + alpha / r * B A, summed in float32."""
    settings = read_json(src / ADAPTER_JSON)
    expect(settings, "", file=ADAPTER_JSON, peft_type="LORA", bias="none", fan_in_fan_out=False, use_dora=False,
           use_rslora=False, modules_to_save=[], rank_pattern={}, alpha_pattern={})  # fmt: skip
    missing = [key for key in ("r", "lora_alpha") if key not in settings]
    if missing:
        raise WeightsError(f"{src / ADAPTER_JSON} lacks {', '.join(missing)}")
    scale = settings["lora_alpha"] / settings["r"]
    file = next((src / name for name in ADAPTER_FILES if (src / name).is_file()), None)
    if file is None:
        raise WeightsError(f"{src} holds {ADAPTER_JSON} and no adapters; accepted: {', '.join(ADAPTER_FILES)}")
    adapters, halves = ADAPTER_FILES[file.name](file), {}
    for name in adapters.shapes:
        half = HALF.search(name)
        target = canonical(_without_peft(HALF.sub(".weight", name))) if half else None
        if target not in names:
            raise WeightsError(f"{file} holds {name}, which belongs to no weight of the model")
        halves.setdefault(names[target], {})[half[1]] = name
    for name, found in halves.items():
        shapes = [adapters.shapes[found[half]] if half in found else None for half in "BA"]
        out, inputs = tensors.shapes[name]
        if shapes != [(out, settings["r"]), (settings["r"], inputs)]:
            raise WeightsError(f"{file} has lora_B, lora_A {shapes} for {name} {(out, inputs)} and r={settings['r']}")

    def read(name: str) -> np.ndarray:
        value = tensors.read(name)
        if name not in halves:
            return value
        b, a = (adapters.read(halves[name][half]).astype(np.float32) for half in "BA")
        return (value.astype(np.float32) + scale * (b @ a)).astype(value.dtype)

    return Tensors(tensors.shapes, read, tensors.dtype, tensors.origin), names
