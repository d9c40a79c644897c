"""LLaVA-1.5 checkpoints that hold a part of the model, and the Llama which the rest of it is.

Forms: a projector alone (stage 1's `mm_projector.bin`), or adapters with whatever else was trained
(`adapter_model.bin` and `non_lora_trainables.bin`), which are added to the weights as they are read.
Source: haotian-liu/LLaVA:llava/model/builder.py and llava/train/train.py at c121f04; peft's names, old and new.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from medcg_jax.families.weights.engine import canonical_names
from medcg_jax.families.weights.fields import section
from medcg_jax.families.weights.files import Tensors, WeightsError, joined, open_bin, open_tensors, read_json
from medcg_jax.families.weights.peft_files import are_adapters, with_adapters, without_prefix

PROJECTOR_FILE, OTHERS_FILE = "mm_projector.bin", "non_lora_trainables.bin"
BASE_REPO = "lmsys/vicuna-7b-v1.5"


def is_part(src: Path) -> bool:
    """Whether the directory holds a projector or adapters instead of a whole decoder."""
    return are_adapters(src) or (src / PROJECTOR_FILE).is_file()


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
    if not are_adapters(src):
        return joined(*sources, _opened(src / PROJECTOR_FILE, canonical))
    if (src / OTHERS_FILE).is_file():
        sources.append(_opened(src / OTHERS_FILE, canonical))
    else:
        raise WeightsError(
            f"{src} holds adapters and no {OTHERS_FILE}, which LLaVA's training writes at its end and which has the "
            "projector that was trained with them; the directory that the training wrote last is accepted"
        )
    return with_adapters(*joined(*sources), src, canonical, whole=False)


def _check_base(src: Path, base: Path, decoder_config: Callable) -> None:
    mine, found = (read_json(directory / "config.json") for directory in (src, base))
    ours, theirs = (decoder_config(section(each, "", "text_config") or each, "") for each in (mine, found))
    for name in ("num_heads", "num_kv_heads", "head_dim", "rope_theta", "norm_eps"):
        wanted, stated = getattr(ours, name), getattr(theirs, name)
        if wanted != stated:
            raise WeightsError(
                f"{base / 'config.json'} states {name}={stated}; {wanted}, as in {src / 'config.json'}, is accepted"
            )


def _opened(file: Path, canonical) -> tuple[Tensors, dict[str, str]]:
    tensors = open_bin(file)
    return tensors, canonical_names(tensors.shapes, lambda name: canonical(without_prefix(name)), str(file))
