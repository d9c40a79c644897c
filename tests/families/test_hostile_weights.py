"""Checkpoints that are damaged, hostile or of another kind: each is one line and exit status 2, and leaves nothing."""

import copy
import json
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
from releases import CONFIGS, random_params, released, tensors_of, write
from safetensors.numpy import save_file

from medcg_jax import cli
from medcg_jax.families.weights import engine, files
from medcg_jax.families.weights.convert import open_leaves, read_config
from medcg_jax.families.weights.families import module_of
from medcg_jax.families.weights.files import WeightsError, open_bin, open_safetensors, open_tensors

CONFIG = CONFIGS["llava"]
TENSORS = tensors_of(CONFIG, random_params(CONFIG))
EMBED = "language_model.model.embed_tokens.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A whole LLaVA in llava-hf's layout; tests change copies of its parts."""
    about = module_of(CONFIG).config_to_json(CONFIG, "float32")
    return write(tmp_path_factory.mktemp("source"), released(CONFIG, TENSORS), about)


@pytest.fixture
def src(source, tmp_path):
    """A directory with the source's files as links, so that one of them can be another."""
    directory = tmp_path / "src"
    directory.mkdir()
    for file in source.iterdir():
        (directory / file.name).symlink_to(file)
    return directory


def replaced(directory, name: str, content) -> None:
    (directory / name).unlink(missing_ok=True)
    (directory / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def refused(src, capsys, *flags: str) -> str:
    """The line that `medcg convert` refuses with; nothing is written."""
    capsys.readouterr()
    out = src.parent / "out"
    assert cli.main(["convert", str(src), str(out), *flags]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("medcg: ") and printed.err.count("\n") == 1
    assert [path.name for path in src.parent.iterdir() if "out" in path.name] == []
    return printed.err


# ------------------------------------------------------------------ safetensors


def raw_safetensors(header, data: bytes = b"\0" * 16) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(begin=0, end=16, shape=(2, 2), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


TWICE = b'{"a":{"dtype":"F16","shape":[8],"data_offsets":[0,16]},"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'
HEADERS = {
    "overlap": {"a": entry(), "b": entry()},
    "hole": {"a": entry(0, 8, (2,)), "b": entry(12, 16, (1,))},
    "before the data": {"a": entry(-8, 8)},
    "no offsets": {"a": {"dtype": "F32", "shape": [4]}},
    "three offsets": {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8, 16]}},
    "boolean shape": {"a": entry(shape=(True, 4))},
    "text offsets": {"a": {"dtype": "F32", "shape": [4], "data_offsets": ["0", "16"]}},
    "huge shape": {"a": entry(shape=(2**62, 2**62))},
    "bytes left over": {"a": entry(0, 8, (2,))},
    "list": [1],
    "null": b"null",
    "entry is no object": {"a": 1},
    "name twice": TWICE,
    "other numbers in metadata": {"__metadata__": {"a": 1}, "a": entry()},
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_a_safetensors_header_that_does_not_cover_its_file_once_is_refused(header, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw_safetensors(header))
    with pytest.raises(WeightsError, match=f"^{path}") as error:
        open_safetensors(path)
    assert "\n" not in str(error.value)


def test_a_whole_header_is_read_bfloat16_included(tmp_path):
    path = tmp_path / "model.safetensors"
    data = np.array([1, -2, 0.5, 3], np.float32).tobytes() + np.array([0x3F80, 0xC000], "<u2").tobytes()
    path.write_bytes(raw_safetensors({"a": entry(0, 16), "b": entry(16, 20, (2,), "BF16")}, data))
    tensors = open_safetensors(path)
    assert tensors.read("a").tolist() == [[1, -2], [0.5, 3]]
    assert tensors.read("b").astype(np.float32).tolist() == [1, -2]


def test_a_header_beyond_the_limit_is_not_read(tmp_path):
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 2**30))
        file.truncate(2**31)  # sparse
    with pytest.raises(WeightsError, match="header of 1,073,741,824 bytes; at most 16,777,216 are read"):
        open_safetensors(path)


def test_what_is_no_regular_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"model.safetensors: no regular file \(a FIFO\)"):
        open_tensors(tmp_path)


def test_a_pointer_of_git_lfs_is_called_so(src, capsys):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 4800\n"
    replaced(src, "model.safetensors", pointer)
    assert "it is a pointer of git-lfs: `git lfs pull` fetches the file" in refused(src, capsys)
    (src / "model.safetensors").unlink()
    replaced(src, "pytorch_model.bin", pointer)
    assert "git lfs pull" in refused(src, capsys)
    replaced(src, "config.json", pointer)
    assert "config.json: no JSON" in (line := refused(src, capsys)) and "git lfs pull" in line


@pytest.mark.parametrize("name", ["x" * 5000, "x" * 200 + "é" * 100])
def test_an_endless_name_of_a_shard_is_one_short_line(src, capsys, name):
    (src / "model.safetensors").unlink()
    (src / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name, "b" * 9000: name}}))
    line = refused(src, capsys)
    assert "model.safetensors.index.json" in line and len(line) < 2200


# ------------------------------------------------------------------ NaN


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_number_that_is_not_finite_is_refused_by_the_name_of_its_tensor(value, src, capsys):
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    tensors = {key: np.ascontiguousarray(x) for key, x in released(CONFIG, TENSORS).items()}
    tensors[name] = tensors[name].copy()
    tensors[name][-1, -1] = value
    (src / "model.safetensors").unlink()
    save_file(tensors, src / "model.safetensors")
    for to in ("orbax", "hf"):
        line = refused(src, capsys, f"--to={to}")
        assert f"model.safetensors: {name} holds NaN or infinity (1 of {tensors[name].size:,} numbers)" in line


def test_no_tensor_is_read_twice_to_look_for_nan(src, tmp_path, monkeypatch):
    reads, get = [], files.open_safetensors

    def counting(path):
        tensors = get(path)
        return files.Tensors(
            tensors.shapes, lambda *a: reads.append(a) or tensors.read(*a), tensors.dtype, tensors.origin
        )

    monkeypatch.setattr(files, "open_safetensors", counting)
    assert cli.main(["convert", str(src), str(tmp_path / "dst")]) == 0
    assert len(reads) == len({name for name, *_ in reads}) == len(TENSORS)


def test_nan_in_what_was_converted_is_refused_too(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(engine, "check_finite", lambda value, name: None)
    wrong = released(CONFIG, {**TENSORS, "language_model.norm.weight": np.full(64, np.nan, np.float32)})
    about = json.loads((source / "config.json").read_text())
    assert cli.main(["convert", str(write(tmp_path / "nan", wrong, about)), str(tmp_path / "src")]) == 0
    monkeypatch.undo()
    assert "params: decoder.norm.scale holds NaN" in refused(tmp_path / "src", capsys, "--to=hf")


# ------------------------------------------------------------------ index, names, rows


def test_an_index_that_is_broken_is_named(src, capsys):
    index = "model.safetensors.index.json"
    (src / "model.safetensors").unlink()
    for content, message in (
        (b"", "empty"), (b'{"weight_map": {"a', "no JSON"), ({}, "is no index of shards"), ([], "holds a list"),
        ({"weight_map": ["a"]}, "is no index of shards"), ({"weight_map": {"a": 1}}, "is no index of shards"),
        (b'\xef\xbb\xbf{"weight_map": {}}', "BOM"), (b"\xff\xfe{}", "not UTF-8 (byte 0)"), ({"weight_map": {}}, "names no"),
        ({"weight_map": {"a": "../x"}}, "outside its directory"), ({"weight_map": {"a": ""}}, "outside its directory"),
        (b"[" * 200_000, "nested too deep"),
    ):  # fmt: skip
        replaced(src, index, content)
        line = refused(src, capsys)
        assert f"{src / index}" in line and message in line


def test_an_index_that_places_a_tensor_where_it_is_not_is_refused(src, capsys):
    (src / "model.safetensors").rename(src / "model-00001-of-00001.safetensors")
    replaced(src, "model.safetensors.index.json", {"weight_map": {"gone.weight": "model-00001-of-00001.safetensors"}})
    assert "places gone.weight in model-00001-of-00001.safetensors, which does not hold it" in refused(src, capsys)


def test_a_whole_file_beside_shards_is_refused_and_beside_a_leftover_index_is_taken(src, capsys):
    index = {"weight_map": {EMBED: "model-00001-of-00002.safetensors"}}
    replaced(src, "model.safetensors.index.json", index)
    assert read_config(src) and open_tensors(src).shapes  # transformers takes the whole file, and no shard is there
    (src / "model-00001-of-00002.safetensors").symlink_to((src / "model.safetensors").resolve())
    line = refused(src, capsys)
    assert "holds model.safetensors and shards that model.safetensors.index.json names: two checkpoints" in line


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "base_model.model."])
def test_what_wrappers_put_before_names_is_taken_off(prefix, src):
    (src / "model.safetensors").unlink()
    save_file(
        {prefix + n: np.ascontiguousarray(x) for n, x in released(CONFIG, TENSORS).items()}, src / "model.safetensors"
    )
    leaves = open_leaves(src)
    np.testing.assert_array_equal(
        np.asarray(leaves["decoder"]["embed"]["table"]), TENSORS["language_model.embed_tokens.weight"]
    )


def test_a_prefix_that_is_not_known_is_no_advice_to_fetch_another_tower(src, capsys):
    (src / "model.safetensors").unlink()
    save_file(
        {"my." + n: np.ascontiguousarray(x) for n, x in released(CONFIG, TENSORS).items()}, src / "model.safetensors"
    )
    assert "no tensor has a name that LLaVA's have; the first is my." in refused(src, capsys)


# ------------------------------------------------------------------ .bin


@pytest.fixture
def binary(src):
    """(write a state dict as pytorch_model.bin, its path)."""
    torch = pytest.importorskip("torch")
    (src / "model.safetensors").unlink()
    path = src / "pytorch_model.bin"
    return lambda state, **options: torch.save(state, path, **options), path


def state():
    import torch

    return {name: torch.from_numpy(np.array(value)) for name, value in released(CONFIG, TENSORS).items()}


def test_a_bin_file_that_was_packed_again_is_refused(binary, src, capsys, tmp_path):
    save, path = binary
    save(state())
    assert cli.main(["convert", str(src), str(tmp_path / "dst")]) == 0
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    assert "is compressed, as by a tool that has packed the file again" in refused(src, capsys)


def test_code_in_a_bin_file_is_refused_in_the_products_own_words(binary, src, capsys, tmp_path):
    save, path = binary

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    for protocol_of_old in (False, True):
        save({"a": Evil()}, _use_new_zipfile_serialization=not protocol_of_old)
        line = refused(src, capsys)
        assert f"{path} names posix.system, which is no tensor and no plain value; nothing of it was run" in line
        assert "weights_only" not in line and not (tmp_path / "ran").exists()
    save({"a": bytearray(10)})  # PyTorch's own reader makes as many bytes as are named
    assert "names builtins.bytearray" in refused(src, capsys) or "names __builtin__.bytearray" in refused(src, capsys)


def pickled_as_bin(path, content: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in (("data.pkl", content), ("version", b"3\n"), ("byteorder", b"little")):
            archive.writestr(f"archive/{name}", text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x02" + b"(" * 5_000_000 + b".", "of more than 500,000 operations is not read"),
        (b"\x80\x02.", "is damaged or no PyTorch file"),
        (b"", "is damaged or no PyTorch file"),
        (b"\x80\x02h\x05.", "is damaged or no PyTorch file"),
        (b"\x80\x02}K\x01K\x02s.", "holds other things than tensors by name"),
        (pickle.dumps([1, 2], 2), "holds other things than tensors by name"),
        (b"\x80\x02c\xff\xfe\nx\n.", "is damaged or no PyTorch file"),
    ],
)
def test_a_pickle_that_is_no_state_dict_is_refused_before_it_costs_memory(content, message, binary, src, capsys):
    pickled_as_bin(binary[1], content)
    assert message in refused(src, capsys)
    # As before PyTorch 1.6: the same without an archive around it.
    replaced(src, "pytorch_model.bin", content)
    assert "pytorch_model.bin" in refused(src, capsys)


def test_tensors_without_all_their_numbers_are_refused(binary, src, capsys):
    import torch

    save, path = binary
    whole = torch.zeros(4, 4)
    for name, tensor, message in (
        ("meta", torch.zeros(4, device="meta"), "has no numbers (device meta)"),
        ("sparse", whole.to_sparse(), "is a sparse_coo tensor"),
        ("repeated", torch.zeros(1).expand(2**40), "repeats the 4 bytes that it holds"),
        ("quantised", torch.quantize_per_tensor(whole, 1.0, 0, torch.qint8), "is a quantised tensor"),
    ):
        save({"a.weight": whole, name: tensor})
        with pytest.raises(WeightsError, match=f"{path}: {name} ") as error:
            open_bin(path)
        assert message in str(error.value)
    save({1: whole})
    assert "holds other things than tensors by name" in refused(src, capsys)


def test_views_and_parameters_of_one_storage_are_read_rightly(binary):
    import torch

    save, path = binary
    block = torch.arange(24.0).reshape(4, 6)
    save(
        {
            "rows": block[1:3],
            "columns": block.T,
            "trained": torch.nn.Parameter(block[:, ::2]),
            "half": block.bfloat16().T,
        }
    )
    tensors = open_bin(path)
    expected = {"rows": block[1:3], "columns": block.T, "trained": block[:, ::2], "half": block.T}
    for name, value in expected.items():
        np.testing.assert_array_equal(tensors.read(name).astype(np.float32), value.numpy())


def test_a_storage_that_states_other_bytes_than_its_record_is_refused(binary):
    import torch

    save, path = binary
    save({"a": torch.arange(16.0), "b": torch.arange(16.0)})
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content.replace(b"K\x10tq", b"K\x20tq") if name.endswith("data.pkl") else content)
    with pytest.raises(WeightsError, match="no record of its file has so many|damaged"):
        open_bin(path)


# ------------------------------------------------------------------ config.json


def numbers_in(found: dict, path: tuple = ()) -> list[tuple]:
    """Paths of all numbers, in lists too."""
    paths = []
    for key, value in found.items():
        if isinstance(value, dict):
            paths += numbers_in(value, (*path, key))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            paths.append((*path, key))
    return paths


def changed(found: dict, path: tuple, value) -> dict:
    copied = copy.deepcopy(found)
    inner = copied
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return copied


# Fields that say nothing of the model, or that a number beyond its limits does not reach.
NOT_READ = {"image_seq_length", "num_image_tokens", "lora_scale", "max_num_tiles", "num_channels", "in_channels"}


@pytest.mark.parametrize("family", CONFIGS)
def test_every_number_of_a_config_is_of_its_type_and_within_its_limits(family, tmp_path):
    config = CONFIGS[family]
    about = module_of(config).config_to_json(config, "float32")
    paths = [path for path in numbers_in(about) if path[-1] not in NOT_READ]
    assert len(paths) > 15
    (tmp_path / "config.json").write_text(json.dumps(about))
    assert read_config(tmp_path)
    taken = []
    for path in paths:
        for value in ("40", -(2**40), 2**63, 1e9 + 0.5, True, [1, 2], {"a": 1}, 10**400):
            (tmp_path / "config.json").write_text(json.dumps(changed(about, path, value)))
            try:
                read_config(tmp_path)
                taken.append((path, value))
            except WeightsError as error:
                assert "\n" not in str(error) and "config.json" in str(error)
                assert len(str(error)) < 1000
    # Ids of special tokens are lists in some releases, and what follows from other fields is compared with them.
    meant = {"eos_token_id": [1, 2], "rope_theta": 1e9 + 0.5}
    assert [(path, value) for path, value in taken if meant.get(path[-1]) != value] == []


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("text_config.hidden_size", 0, "text_config.hidden_size=0: expected a whole number of at least 1"),
        ("text_config.hidden_size", 40.0, "text_config.hidden_size=40.0: expected a whole number"),
        (
            "text_config.num_hidden_layers",
            10**9,
            "num_hidden_layers=1000000000: expected a whole number of at least 1 and at most 1,024",
        ),
        ("text_config.num_hidden_layers", None, "text_config.num_hidden_layers=null"),
        ("text_config.num_attention_heads", 0, "num_attention_heads=0"),
        ("text_config.num_key_value_heads", "two", 'num_key_value_heads="two"'),
        ("text_config.rms_norm_eps", "1e-5", 'rms_norm_eps="1e-5": expected a finite number'),
        ("text_config.rms_norm_eps", 0, "rms_norm_eps=0: expected a finite number"),
        ("text_config.rope_theta", 0, "rope_theta=0"),
        ("text_config.rope_parameters", "default", "rope_parameters='default' (text); expected an object"),
        ("text_config.rope_parameters", [1], "rope_parameters=[1] (a list)"),
        ("text_config.attention_bias", "false", "attention_bias='false'; expected true or false"),
        ("text_config", "llama", "text_config='llama' (text); expected an object"),
        ("vision_config.patch_size", 0, "vision_config.patch_size=0"),
        ("vision_config.image_size", [28, 28.0], "image_size"),
        ("model_type", ["llava"], "model_type=['llava']; accepted: llava"),
        ("tie_word_embeddings", 1, "tie_word_embeddings=1; expected true or false"),
        ("vision_feature_layer", "last", 'vision_feature_layer="last"'),
        ("eos_token_id", [2, "x"], 'eos_token_id="x"'),
    ],
)
def test_a_field_of_the_wrong_kind_is_named_with_its_value(field, value, message, source, src, capsys):
    about = json.loads((source / "config.json").read_text())
    path = tuple(field.split("."))
    if path[-1] not in (about if len(path) == 1 else about[path[0]]):
        about = changed(about, path, None)
    replaced(src, "config.json", changed(about, path, value))
    if field == "vision_config.image_size":
        return  # both sides are one number
    assert message in refused(src, capsys)


def test_text_that_json_does_not_have_is_refused(src, source, capsys):
    text = (source / "config.json").read_text()
    for wrong, message in (
        (text.replace("1e-05", "NaN", 1), "NaN is no JSON number"), ("[" * 200_000, "nested too deep"),
        ('{"model_type": "llava", "model_type": "mllama"}', "stands twice"),
    ):  # fmt: skip
        replaced(src, "config.json", wrong.encode())
        assert message in refused(src, capsys)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("trained_on", 5, "trained_on=5"), ("parts", "projector", "parts='projector'"), ("parts", ["projector", 3], "parts="),
        ("text", None, "text=null"), ("image_token_id", 1e400, "no JSON number|image_token_id"), ("text", [], "text"),
        ("attention", "fast", 'attention="fast"; accepted: "auto"'), ("family", ["llava"], "family="),
    ],
)  # fmt: skip
def test_a_model_json_is_checked_as_a_config_is(field, value, message, tmp_path, capsys):
    import dataclasses
    import re

    about = {"family": "llava", **dataclasses.asdict(CONFIG)}
    if field in ("trained_on", "parts"):
        about |= {"trained_on": str(tmp_path / "nowhere"), "parts": ["projector"]}
    src = tmp_path / "src"
    src.mkdir()
    (src / "model.json").write_text(json.dumps({**about, field: value}))
    assert re.search(message, refused(src, capsys))


# ------------------------------------------------------------------ destination


def test_a_destination_that_is_there_is_not_lost(src, tmp_path, capsys):
    dst = tmp_path / "dst"
    dst.mkdir()
    (dst / "mine").write_text("kept")
    assert cli.main(["convert", str(src), str(dst)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert (dst / "mine").read_text() == "kept"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").write_text("kept")
    (tmp_path / ".other.part").symlink_to(elsewhere)
    assert cli.main(["convert", str(src), str(tmp_path / "other")]) == 2
    assert "is in the way" in capsys.readouterr().err
    assert (elsewhere / "mine").read_text() == "kept" and not (tmp_path / "other").exists()
