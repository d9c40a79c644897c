"""Broken checkpoints by the thousand, given to the product's own readers: each must be taken rightly or refused.

    python -m tests.families.fuzz_checkpoints 5000 0 [--kinds=bin,index] [--workers=2]

The harness is that of `tests/data/fuzz_inputs.py`. What hangs, kills its process, raises anything but the product's
own refusals, takes memory past a bound, or gives numbers that are not finite is a failure; its input is kept, and the
exit status is 1. The same seed gives the same inputs.
"""

import argparse
import io
import json
import os
import struct
import sys
import tempfile
import time
import zipfile
from functools import cache, partial
from pathlib import Path
from random import Random

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "data")]

import numpy as np
from fuzz_inputs import Subject, fuzz, print_result
from fuzz_mutations import IMAGE_CLASSES, JSON_CLASSES, mutated

from medcg_jax.config import ConfigError
from medcg_jax.data.records import DataError
from medcg_jax.data.tokenizer import SMALL, load_tokenizer

# Floods are of pieces that image formats have.
BYTE_CLASSES = tuple(name for name in IMAGE_CLASSES if name != "flood")
FAMILIES = ("llava", "qwen2_vl", "mllama", "minigpt_v2", "next_chat")
# Kind -> the file of the folder of that name in which mutations are.
FILES = {
    **{f"config_{family}": "config.json" for family in FAMILIES},
    "model_json": "model.json",
    "safetensors": "model.safetensors",
    "safetensors_header": "model.safetensors",
    "index": "model.safetensors.index.json",
    "bin": "pytorch_model.bin",
    "bin_pickle": "pytorch_model.bin",
    "bin_old": "pytorch_model.bin",
    "adapter_config": "adapter_config.json",
    "adapter_weights": "adapter_model.safetensors",
    "tokenizer_json": "tokenizer.json",
    "tokenizer_model": "tokenizer.model",
}
KINDS = tuple(FILES)
TOKENIZERS = ("tokenizer_json", "tokenizer_model")
# torch and JAX reserve far more than they use.
ADDRESS_SPACE_BYTES = 32 * 2**30
# A whole SAM is traced for one config.json, on a machine that may be busy.
MAX_SECONDS = 60.0
MAX_LINE = 2500
TEXT = "USER: What is it? A B"


def build(pack: Path) -> None:
    """Writes one small whole checkpoint for each kind into `pack`."""
    import torch
    from releases import CONFIGS, random_params, released, tensors_of, write
    from safetensors.numpy import save_file

    from medcg_jax.families.weights.convert import MODEL_FILE, save_params
    from medcg_jax.families.weights.families import module_of

    params = random_params(CONFIGS["llava"])
    tensors = {
        n: np.ascontiguousarray(x) for n, x in released(CONFIGS["llava"], tensors_of(CONFIGS["llava"], params)).items()
    }
    abouts = {name: module_of(config).config_to_json(config, "float32") for name, config in CONFIGS.items()}
    for family in FAMILIES:
        config = CONFIGS[family]
        write(pack / f"config_{family}", released(config, tensors_of(config, random_params(config))), abouts[family])
    for kind in ("safetensors", "safetensors_header", "base"):
        write(pack / kind, tensors, abouts["llava"])
    for kind in ("index", "bin", "bin_pickle", "bin_old", "adapter_config", "adapter_weights", *TOKENIZERS):
        (pack / kind).mkdir()
        if kind == "index" or kind.startswith("bin"):
            (pack / kind / "config.json").write_text(json.dumps(abouts["llava"]))
    names, half = list(tensors), len(tensors) // 2
    shards = {f"model-0000{i + 1}-of-00002.safetensors": part for i, part in enumerate((names[:half], names[half:]))}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, pack / "index" / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (pack / "index" / FILES["index"]).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    for kind in ("bin", "bin_pickle", "bin_old"):
        state = {name: torch.from_numpy(value) for name, value in tensors.items()}
        torch.save(state, pack / kind / FILES[kind], _use_new_zipfile_serialization=kind != "bin_old")
    name = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_{}.weight"
    width = tensors["language_model.model.layers.0.self_attn.q_proj.weight"].shape
    for kind in ("adapter_config", "adapter_weights"):
        arrays = {
            name.format("A"): np.ones((2, width[1]), np.float32),
            name.format("B"): np.ones((width[0], 2), np.float32),
        }
        save_file(arrays, pack / kind / "adapter_model.safetensors")
        settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "target_modules": ["q_proj"]}
        (pack / kind / "adapter_config.json").write_text(json.dumps(settings))
    save_params(pack / "model_json", params, CONFIGS["llava"])
    assert (pack / "model_json" / MODEL_FILE).is_file()
    (pack / "tokenizer_json" / "tokenizer.json").write_bytes(SMALL.read_bytes())
    _sentencepiece(pack / "tokenizer_model" / "tokenizer.model")


def _sentencepiece(path: Path) -> None:
    import sentencepiece

    sentences = [f"what is it number {i} naevus or knee {i * 7}" for i in range(300)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, vocab_size=300, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
    path.write_bytes(model.getvalue())


@cache
def _seed(kind: str, pack: Path) -> bytes:
    return (pack / kind / FILES[kind]).read_bytes()


def make(kinds: tuple[str, ...], seed: int, index: int, pack: Path) -> tuple[str, str, bytes, Random]:
    """(kind, class, content of its file, the source of further choices) of one input."""
    kind, turn = kinds[index % len(kinds)], index // len(kinds)
    random, content = Random(f"{seed}/{index}"), _seed(kind, pack)
    if FILES[kind].endswith(".json"):
        where = JSON_CLASSES[turn % len(JSON_CLASSES)]
        return kind, where, mutated("json", where, content, random), random
    where = BYTE_CLASSES[turn % len(BYTE_CLASSES)]
    if kind in ("safetensors_header", "adapter_weights"):
        # The header is JSON, and mostly as long as it says.
        where, length = JSON_CLASSES[turn % len(JSON_CLASSES)], int.from_bytes(content[:8], "little")
        header = mutated("json", where, content[8 : 8 + length], random)
        stated = random.choice((len(header),) * 5 + (length, 2**63, 0, len(header) - 1))
        return kind, where, struct.pack("<Q", max(0, stated)) + header + content[8 + length :], random
    if kind == "bin_pickle":
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            records = {info.filename: archive.read(info) for info in archive.infolist()}
        made = io.BytesIO()
        with zipfile.ZipFile(made, "w") as archive:
            for name, record in records.items():
                archive.writestr(name, mutated(kind, where, record, random) if name.endswith("data.pkl") else record)
        return kind, where, made.getvalue(), random
    return kind, where, mutated(kind, where, content, random), random


def read_one(kind: str, content: bytes, random: Random, pack: Path, scratch: Path) -> bool:
    """Whether the product takes the input; it is refused with its own exception of one line.

    Raises:
      AssertionError: what it says or gives is not as it must be; anything else: what it lets through.
    """
    directory = scratch / kind
    if not directory.exists():
        directory.mkdir()
        for file in (pack / kind).iterdir():
            (directory / file.name).symlink_to(file)
    path = directory / FILES[kind]
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    try:
        if kind in TOKENIZERS:
            ids = load_tokenizer(path).encode(TEXT)
            assert all(isinstance(i, int) and 0 <= i < 2**31 for i in ids), ids
            return True
        return _open(directory, pack, random)
    except (ConfigError, DataError) as error:
        line = str(error)
        assert line and "\n" not in line and len(line) < MAX_LINE, f"message {line[:300]!r}"
        return False


def _open(directory: Path, pack: Path, random: Random) -> bool:
    import jax

    from medcg_jax.families.weights.convert import open_leaves

    parts = {"base": pack / "base"} if directory.name.startswith("adapter") else {}
    leaves = jax.tree.leaves(open_leaves(directory, parts=parts))
    for leaf in random.sample(leaves, 3):
        value = np.asarray(leaf)
        assert value.shape == leaf.shape and np.isfinite(value).all()
    return True


def warm(kinds: tuple[str, ...], pack: Path, scratch: Path) -> None:
    """Each unbroken file is taken."""
    for kind in kinds:
        assert read_one(kind, _seed(kind, pack), Random(0), pack, scratch), kind


def subject(kinds: tuple[str, ...] = KINDS) -> Subject:
    """What `fuzz` needs to know of these kinds."""
    return Subject(partial(make, kinds), partial(warm, kinds), ADDRESS_SPACE_BYTES, MAX_SECONDS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("count", type=int, nargs="?", default=5000)
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "medcg-fuzz-checkpoints")
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder))
        kinds = tuple(args.kinds.split(","))
        result = fuzz(Path(folder), args.count, args.seed, args.workers, args.keep, read_one, subject(kinds))
    print_result(result)
    print(f"{args.count} inputs of seed {args.seed} in {time.monotonic() - began:.0f} s")
    return 1 if result.failures else 0


if __name__ == "__main__":
    sys.exit(main())
