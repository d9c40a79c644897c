"""`python -m tests.golden`: folders of original code, where they are; folders of other sizes; and planted faults."""

from pathlib import Path

import numpy as np
import pytest

from medcg_jax.families.weights.files import WeightsError, open_safetensors, write_safetensors
from medcg_jax.parity.verb import parity
from tests.golden import __main__ as golden
from tests.golden import like

SHARED = sorted(path for path in (Path(__file__).resolve().parents[3] / "shared" / "golden").glob("*/variant_*"))
# NExT-Chat's 300 arrays take three times as long as MiniGPT-v2's.
LONG = {"next_chat": (pytest.mark.long,)}


@pytest.mark.skipif(not SHARED, reason="../shared/golden is not on this machine")
@pytest.mark.parametrize(
    "folder",
    [pytest.param(path, marks=LONG.get(path.parent.name, ()), id=f"{path.parent.name}-{path.name}") for path in SHARED],
)
def test_every_array_is_the_originals(folder, capsys):
    assert golden.main([str(folder)]) == 0
    assert "equal within" in capsys.readouterr().out.splitlines()[-1]


@pytest.fixture(scope="module")
def minigpt(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        return like.minigpt(tmp_path_factory.mktemp("minigpt"), patch)


def with_weights(folder, out, change):
    """A copy of `folder` in `out`, its tensors changed by `change` (a dict to a dict)."""
    out.mkdir()
    for file in folder.iterdir():
        if file.name != "weights.safetensors":
            (out / file.name).symlink_to(file)
    opened = open_safetensors(folder / "weights.safetensors")
    tensors = change({name: np.array(opened.read(name)) for name in opened.shapes})
    write_safetensors(out, {name: (x.shape, x.dtype) for name, x in tensors.items()}, tensors.items())
    (out / "model.safetensors").rename(out / "weights.safetensors")
    return out


def exchanged(tensors, first, second):
    swap = {first: second, second: first}

    def source(name):
        return next((name.replace(a, b) for a, b in swap.items() if a in name), name)

    return {name: tensors[source(name)] for name in tensors}


def test_minigpt_of_other_sizes(minigpt):
    result = golden.compare_folder(minigpt)
    assert [row["stage"] for row in result["rows"] if not row["ok"]] == []
    stages = {row["stage"] for row in result["rows"]}
    assert {"vit_block_1", "llm_layer_1", "gen_margin", "pos_embed_interpolated"} <= stages


def test_exchanged_layers_are_named(minigpt, tmp_path, capsys):
    def swap(tensors):
        return exchanged(tensors, ".model.layers.0.", ".model.layers.1.")

    folder = with_weights(minigpt, tmp_path / "wrong", swap)
    assert golden.main([str(folder)]) == 1
    assert "the first: llm_layer_0, " in capsys.readouterr().out.splitlines()[-1]


def test_a_renamed_tensor_is_named(minigpt, tmp_path, capsys):
    def rename(tensors):
        return {name.replace("blocks.1.norm2", "blocks.1.norm3"): x for name, x in tensors.items()}

    assert golden.main([str(with_weights(minigpt, tmp_path / "wrong", rename))]) == 2
    error = capsys.readouterr().err
    assert "missing: visual_encoder.blocks.1.norm2.weight" in error and "norm3" in error and error.count("\n") == 1


@pytest.mark.parametrize(("lost", "added"), [("gen_margin", None), (None, "vit_block_2")])
def test_no_array_is_left_out(minigpt, tmp_path, lost, added):
    folder = with_weights(minigpt, tmp_path / "wrong", dict)
    with np.load(minigpt / "expected.npz") as file:
        arrays = {name: file[name] for name in file.files if name != lost}
    (folder / "expected.npz").unlink()
    np.savez(folder / "expected.npz", **arrays, **({added: np.zeros(2)} if added else {}))
    with pytest.raises(WeightsError, match=str(lost or added)):
        golden.compare_folder(folder)


def test_other_folders_are_refused_and_the_verb_names_this_command(minigpt, tmp_path, capsys):
    assert golden.main([]) == golden.main([str(tmp_path)]) == 2
    assert "has none of expected.npz" in capsys.readouterr().err
    with pytest.raises(WeightsError, match="python -m tests.golden"):
        parity(minigpt)


@pytest.mark.long
def test_next_chat_of_other_sizes(tmp_path, monkeypatch):
    """All that is recorded of NExT-Chat, by more than 300 comparisons."""
    folder = like.next_chat_folder(tmp_path / "next", monkeypatch)
    result = golden.compare_folder(folder)
    assert [row["stage"] for row in result["rows"] if not row["ok"]] == []
    assert len(result["rows"]) > 300
