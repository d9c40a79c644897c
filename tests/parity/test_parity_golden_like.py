"""Folders of recorded arrays of other sizes: the reader takes all of them from the folder, and sees what is changed."""

import golden_like
import numpy as np
import pytest

from medcg_jax.families.weights.files import WeightsError, open_safetensors, write_safetensors
from medcg_jax.parity.verb import parity


@pytest.fixture(scope="module")
def minigpt(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        return golden_like.minigpt(tmp_path_factory.mktemp("minigpt"), patch)


def with_weights(folder, out, change):
    """A copy of `folder` in `out`, its tensors changed by `change` (a dict to a dict)."""
    out.mkdir()
    for file in folder.iterdir():
        if file.name != "weights.safetensors":
            (out / file.name).symlink_to(file)
    opened = open_safetensors(folder / "weights.safetensors")
    found = change({name: np.array(opened.read(name)) for name in opened.shapes})
    write_safetensors(out, {name: (x.shape, x.dtype) for name, x in found.items()}, found.items())
    (out / "model.safetensors").rename(out / "weights.safetensors")
    return out


def exchanged(found, one, other):
    swap = {one: other, other: one}
    place = lambda name: next((name.replace(a, b) for a, b in swap.items() if a in name), name)
    return {name: found[place(name)] for name in found}


def test_minigpt_of_other_sizes(minigpt):
    result = parity(minigpt)
    assert [row["stage"] for row in result["rows"] if not row["ok"]] == []
    assert {"vit_block_1", "llm_layer_1", "gen_margin", "pos_embed_interpolated"} <= {
        r["stage"] for r in result["rows"]
    }


def test_exchanged_layers_are_named(minigpt, tmp_path, capsys):
    swap = lambda found: exchanged(found, ".model.layers.0.", ".model.layers.1.")
    result = parity(with_weights(minigpt, tmp_path / "wrong", swap))
    assert (result["exit_status"], result["first"]) == (1, "llm_layer_0")
    assert "the first: llm_layer_0, " in capsys.readouterr().out.splitlines()[-1]


def test_a_renamed_tensor_is_named(minigpt, tmp_path):
    rename = lambda found: {name.replace("blocks.1.norm2", "blocks.1.norm3"): x for name, x in found.items()}
    with pytest.raises(WeightsError, match=r"missing: visual_encoder\.blocks\.1\.norm2\.weight.*unused: .*norm3"):
        parity(with_weights(minigpt, tmp_path / "wrong", rename))


@pytest.mark.parametrize(("lost", "added"), [("gen_margin", None), (None, "vit_block_2")])
def test_no_array_is_left_out(minigpt, tmp_path, lost, added):
    folder = with_weights(minigpt, tmp_path / "wrong", dict)
    with np.load(minigpt / "expected.npz") as file:
        found = {name: file[name] for name in file.files if name != lost}
    (folder / "expected.npz").unlink()
    np.savez(folder / "expected.npz", **found, **({added: np.zeros(2)} if added else {}))
    with pytest.raises(WeightsError, match=str(lost or added)):
        parity(folder)


def test_next_chat_of_other_sizes(tmp_path, monkeypatch):
    """All that is recorded of NExT-Chat, by more than 300 comparisons."""
    folder = golden_like.next_chat_folder(tmp_path / "next", monkeypatch)
    result = parity(folder)
    assert [row["stage"] for row in result["rows"] if not row["ok"]] == []
    assert len(result["rows"]) > 300
