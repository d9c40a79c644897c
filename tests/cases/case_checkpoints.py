"""Rows about checkpoints and tokenizers: what `medcg convert` takes, and what it refuses in one line."""

import copy
import json
import math
import shutil
import sys
import zipfile
from pathlib import Path

from harness import CHECKOUT, SHARED, call, medcg, refused, told

HOSTILE, INPUTS = SHARED / "cases" / "hostile", SHARED / "cases" / "inputs"


def whole_checkpoint(folder: Path, **config) -> Path:
    """A tiny LLaVA as transformers writes it (safetensors), with fields of its config.json exchanged."""

    def write() -> int:
        import hf_tiny

        hf_tiny.reference().save_pretrained(folder)
        return 0

    assert call(write).status == 0, "the reference could not be written"
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def bin_checkpoint(folder: Path, change) -> Path:
    """The same as pytorch_model.bin. change: state dict -> what is saved in its place."""

    def write() -> int:
        import hf_tiny
        import torch

        model = hf_tiny.reference()
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(model.config.to_dict(), default=str))
        torch.save(change(model.state_dict()), folder / "pytorch_model.bin")
        return 0

    assert call(write).status == 0, "the reference could not be written"
    return folder


def refused_whole(src: Path, folder: Path, *words: str, flags: tuple = ()) -> str:
    """`medcg convert` refuses `src` in a line with the words, and leaves nothing where the result would be."""
    out = folder / "out"
    line = refused(medcg("convert", src, out, *flags), *words)
    assert not out.exists(), "something was left behind"
    assert not list(folder.glob(".out*")), "a part was left behind"
    return line


class Evil:
    def __reduce__(self):
        return print, ("code of the file ran",)


def bin_deflated(folder: Path) -> str:
    src = bin_checkpoint(folder / "src", lambda state: state)
    path = src / "pytorch_model.bin"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(folder / "new", "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.namelist():
            new.writestr(entry, old.read(entry))
    shutil.move(folder / "new", path)
    result = medcg("convert", src, folder / "out")
    if result.status == 0:
        raise AssertionError("taken: compare the numbers")
    return refused(result, "pytorch_model.bin")


def bin_torch_advice(folder: Path) -> str:
    src = bin_checkpoint(folder / "src", lambda state: {**state, "evil": Evil()})
    result = medcg("convert", src, folder / "out")
    assert "code of the file ran" not in result.text
    line = refused(result, "pytorch_model.bin")
    assert not any(word in result.text for word in ("weights_only", "can still be loaded", "only if you trust")), line
    return line


def bin_tracebacks(folder: Path) -> str:
    def on_meta(state):
        import torch

        return {name: torch.empty(value.shape, device="meta") for name, value in state.items()}

    src = bin_checkpoint(folder / "ints", lambda state: dict(enumerate(state.values())))
    lines = [refused_whole(src, folder, "pytorch_model.bin")]
    lines.append(refused_whole(bin_checkpoint(folder / "meta", on_meta), folder, "pytorch_model.bin"))
    # A pickle of five million marks within a whole zip file.
    marks = bin_checkpoint(folder / "marks", lambda state: state)
    path = marks / "pytorch_model.bin"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(folder / "new", "w") as new:
        for entry in old.namelist():
            new.writestr(entry, b"\x80\x02" + b"(" * 5_000_000 if entry.endswith("data.pkl") else old.read(entry))
    shutil.move(folder / "new", path)
    lines.append(refused_whole(marks, folder, "pytorch_model.bin"))
    return lines[-1]


NUMBERS = {
    "text_config.hidden_size": (0, -40, "40", 40.0, 2**63, None, [40], True),
    "text_config.num_attention_heads": (0, -4, "4", 2**31),
    "text_config.num_key_value_heads": (0, "two", 3, -1),
    "text_config.num_hidden_layers": (0, -1, 10**9, 2.5, "3"),
    "text_config.rms_norm_eps": (float("nan"), "1e-5", [1], -1.0, float("inf"), True),
    "text_config.intermediate_size": (0, 2**62),
    "text_config.vocab_size": (0, -5, "101", 10**15),
    "vision_config.patch_size": (0, -7, "7", 10**9),
    "vision_config.image_size": (0, "21", [21, 14]),
    "vision_config.num_hidden_layers": (0, 10**9),
    "vision_config.layer_norm_eps": (float("nan"), "x"),
    "image_token_index": (-1, 10**12, "97", 1.5),
    "vision_feature_layer": ("x", 10**6),
    "text_config": ("llama", [], 5),
    "vision_config": ("clip", []),
    "model_type": (["llava"], 5, {}),
    "text_config.rope_parameters": ("default", [1], {"rope_type": "default", "rope_theta": 0},
                                    {"rope_type": "default", "rope_theta": -1.0},
                                    {"rope_type": "linear", "rope_theta": 500.0, "factor": 0},
                                    {"rope_type": "linear", "rope_theta": 500.0, "factor": "2"}),
}  # fmt: skip


# Words of messages that name fields by what is common to their spellings.
ALIKE = {"rope_parameters": "rop", "num_key_value_heads": "num_k"}


def config_json_numbers(folder: Path) -> str:
    src, count = whole_checkpoint(folder / "src"), 0
    config = json.loads((src / "config.json").read_text())
    for field, values in NUMBERS.items():
        *parents, last = field.split(".")
        for value in values:
            changed = copy.deepcopy(config)
            section = changed
            for name in parents:
                section = section[name]
            section[last] = value
            (src / "config.json").write_text(json.dumps(changed))
            is_number = not isinstance(value, float) or math.isfinite(value)  # else no JSON, of which no field is known
            try:
                refused_whole(src, folder, "config.json", ALIKE.get(last, last) if is_number else "no JSON number")
            except AssertionError as error:
                if value is None and "status 0" in str(error):
                    continue  # null is "not stated"
                raise AssertionError(f"{field}={value!r}: {error}") from error
            count += 1
            shutil.rmtree(folder / "out", ignore_errors=True)
    (src / "config.json").write_text('{"a":' * 200_000)
    refused_whole(src, folder, "config.json")
    return f"{count + 1} values, each refused with its field"


def nan_weights(folder: Path) -> str:
    def with_nan(state):
        state["model.language_model.layers.1.mlp.up_proj.weight"][3, 2] = float("nan")
        return state

    src = bin_checkpoint(folder / "src", with_nan)
    result = medcg("convert", src, folder / "out")
    return told(result, "layers.1.mlp.up_proj", status=(0, 2))


def safetensors_offsets(folder: Path) -> str:
    from medcg_jax.families.weights.files import WeightsError, open_tensors

    samples = [
        path for path in sorted((HOSTILE / "safetensors_offsets").iterdir()) if (path / "model.safetensors").is_file()
    ]
    for sample in samples:
        try:
            tensors = open_tensors(sample)
            for name in tensors.shapes:
                tensors.read(name)
        except WeightsError as error:
            assert "\n" not in str(error) and str(sample) in str(error), f"{sample.name}: {error}"
        else:
            raise AssertionError(f"{sample.name}: taken")
    for kind in ("negative", "another's"):
        src = whole_checkpoint(folder / kind)
        with_offsets(src / "model.safetensors", kind)
        refused_whole(src, folder, "model.safetensors")
    return f"{len(samples)} damaged files and two checkpoints refused"


def with_offsets(path: Path, kind: str) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    victim, other = next((a, b) for a in names for b in names if a != b and header[a]["shape"] == header[b]["shape"])
    begin, end = header[other]["data_offsets"]
    header[victim]["data_offsets"] = [begin - end, 0] if kind == "negative" else [begin, end]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def tokenizer_bombs(folder: Path) -> str:
    from medcg_jax.data.records import DataError
    from medcg_jax.data.tokenizer import load_tokenizer

    added = {
        f"sp_added_{i}": text
        for i, text in enumerate(("{", "[]", '{"<image>": "x"}', '{"<image>": -1}', '{"<image>": 1000000000000}'))
    }
    for name, text in added.items():
        (folder / name).mkdir()
        shutil.copy(SHARED / "tokenizers" / "vicuna" / "tokenizer.model", folder / name)
        (folder / name / "added_tokens.json").write_text(text)
    files = [*sorted((HOSTILE / "tokenizer_bombs").iterdir()), *(folder / name for name in added)]

    def read(path: Path) -> int:
        try:
            tokenizer = load_tokenizer(path)
            tokenizer.encode("aaaaaaaaa" * 40 + " What is it?")
        except DataError as error:
            print(f"medcg: {error}", file=sys.stderr)
            return 2
        return 0

    for path in files:
        try:
            line = refused(call(lambda path=path: read(path)), path.name)
        except AssertionError as error:
            raise AssertionError(f"{path.name}: {error}") from error
    return line


def chat_template_lost(folder: Path) -> str:
    src = INPUTS / "chat_template_lost" / "ckpt"
    names = sorted(path.name for path in src.iterdir() if path.name not in ("config.json", "model.safetensors"))
    told(medcg("convert", src, folder / "out"))
    told(medcg("convert", folder / "out", folder / "back", "--to=hf"))
    for step in ("out", "back"):
        missing = [name for name in names if not (folder / step / name).is_file()]
        assert not missing, f"{step} lacks {missing}"
    return f"carried both ways: {', '.join(names)}"


def config_types(folder: Path) -> str:
    refused_whole(INPUTS / "config_types" / "str", folder, "config.json")
    return refused_whole(INPUTS / "config_types" / "null", folder, "config.json")


def hf_peft_directory(folder: Path) -> str:
    def make() -> int:
        import runpy

        sys.argv = ["make.py", str(CHECKOUT), str(folder)]
        runpy.run_path(str(INPUTS / "hf_peft_directory" / "make.py"))
        return 0

    assert call(make, timeout_s=120).status == 0
    lines = []
    for name in ("peft", "peft_cfg"):
        result = medcg("convert", folder / name, folder / f"out_{name}", f"--base={folder / 'llava'}")
        lines.append(told(result) if result.status == 0 else refused(result, "peft"))
    return lines[-1]


def index_json_broken(folder: Path) -> str:
    samples = {path.stem: path.read_bytes() for path in (INPUTS / "index_json_broken" / "indexes").iterdir()}
    samples["pointer"] = (INPUTS / "index_json_broken" / "ckpt" / "model.safetensors.index.json").read_bytes()
    for name, content in samples.items():
        src = shutil.copytree(INPUTS / "index_json_broken" / "ckpt", folder / name)
        (src / "model.safetensors.index.json").write_bytes(content)
        try:
            line = refused_whole(src, folder, "model.safetensors.index.json")
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
    return line


def made_by_the_row(name: str, folder: Path) -> Path:
    def make() -> int:
        import runpy

        sys.argv = ["make.py", str(CHECKOUT), str(folder / "in")]
        runpy.run_path(str(INPUTS / name / "make.py"))
        return 0

    call(make, timeout_s=180)  # where the product refuses what was made, it ends there
    return folder / "in"


def lora_checkpoint_without_projector(folder: Path) -> str:
    made = made_by_the_row("lora_checkpoint_without_projector", folder)
    result = medcg("convert", made / "lora", folder / "out", f"--base={made / 'llava_base'}", f"--clip={made / 'clip'}")
    return told(result, "non_lora_trainables.bin", status=(0, 2))


def pissa_adapter(folder: Path) -> str:
    made = made_by_the_row("pissa_adapter", folder)
    flags = (f"--base={made / 'vicuna'}", f"--clip={made / 'clip'}")
    shutil.copytree(made / "lora_pissa", made / "lora_olora", dirs_exist_ok=True)
    path = made / "lora_olora" / "adapter_config.json"
    path.write_text(path.read_text().replace('"pissa"', '"olora"'))
    for kind in ("pissa", "olora"):
        line = refused_whole(made / f"lora_{kind}", folder, "init_lora_weights", kind, flags=flags)
    told(medcg("convert", made / "lora_True", folder / "out", *flags))
    return line


def prefix_of_wrappers(folder: Path) -> str:
    """The prefix is taken off: the numbers are those of the same checkpoint without it."""
    from medcg_jax.families.weights.files import open_tensors

    src = INPUTS / "prefix_of_wrappers" / "ckpt"
    told(medcg("convert", src, folder / "out"))
    line = told(medcg("convert", folder / "out", folder / "back", "--to=hf"))
    both = map(open_tensors, (src, folder / "back"))
    before, after = (sorted(tensors.read(name).tobytes() for name in tensors.shapes) for tensors in both)
    assert before == after, "the numbers are others"
    return line


def safetensors_header(folder: Path) -> str:
    refused_whole(INPUTS / "safetensors_header" / "overlap", folder, "model.safetensors")
    return refused_whole(INPUTS / "safetensors_header" / "no_offsets", folder, "model.safetensors")


def single_file_and_index(folder: Path) -> str:
    result = medcg("convert", INPUTS / "single_file_and_index" / "ckpt", folder / "out")
    return told(result, "model.safetensors.index.json", status=(0, 2))


def tokenizer_of_another_model(folder: Path) -> str:
    from medcg_jax.config import ConfigError, DataConfig, EvalConfig, ModelConfig, RunConfig, TrainConfig

    tree = INPUTS / "tokenizer_of_another_model" / "tree"

    def start(path: str) -> int:
        import tokenizers

        from medcg_jax.data.records import DataError
        from medcg_jax.data.tokenizer import SMALL
        from medcg_jax.train.setup import open_setup

        if path:
            added = tokenizers.Tokenizer.from_file(str(SMALL))
            added.add_tokens([f"pad{i}word" for i in range(32_100 - added.get_vocab_size())])
            added.add_tokens(["Benign", "Malignant"])
            added.save(path)
        model = ModelConfig(name="llava15_7b", tokenizer=path, checkpoint=str(tree))
        data = DataConfig(source="release", root=str(tree), subsets=("03",), max_text_tokens=192, system_prompt="")
        run = RunConfig(model=model, data=data, train=TrainConfig(batch_size=8), eval=EvalConfig(batch_size=8))
        try:
            open_setup(run)
        except (ConfigError, DataError) as error:
            print(f"medcg: {error}", file=sys.stderr)
            return 2
        return 0

    refused(call(lambda: start(str(folder / "big_tokenizer.json"))), "tokenizer")
    return refused(call(lambda: start("")), "tokenizer")


def vocabulary_rows_dropped(folder: Path) -> str:
    lines = []
    for name in ("ckpt", "uneven"):
        result = medcg("convert", INPUTS / "vocabulary_rows_dropped" / name, folder / name)
        lines.append(told(result, "rows", status=(0, 2)))
    return lines[-1]


ROWS = {
    run.__name__: run
    for run in (
        bin_deflated, bin_torch_advice, bin_tracebacks, config_json_numbers, nan_weights, safetensors_offsets,
        tokenizer_bombs, chat_template_lost, config_types, hf_peft_directory, index_json_broken,
        lora_checkpoint_without_projector, pissa_adapter, prefix_of_wrappers, safetensors_header, single_file_and_index,
        tokenizer_of_another_model, vocabulary_rows_dropped,
    )
}  # fmt: skip
