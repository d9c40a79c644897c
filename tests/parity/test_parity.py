"""`medcg parity`: equal numbers pass, each kind of difference fails, and recorded numbers need no PyTorch."""

import sys
from pathlib import Path

import hf_tiny
import numpy as np
import pytest
from flax import nnx

from medcg_jax.config import ConfigError
from medcg_jax.families.weights import llava
from medcg_jax.families.weights.files import WeightsError
from medcg_jax.parity import llava as parity_llava
from medcg_jax.parity import verb as parity_lib
from medcg_jax.parity.llava import example, port_inputs
from medcg_jax.parity.pytorch import Reference
from medcg_jax.parity.rows import Row, compared, report
from medcg_jax.parity.verb import parity


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    directory = tmp_path_factory.mktemp("released")
    hf_tiny.reference().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def recorded(released, tmp_path_factory):
    """(file, arrays) as another machine would write them: HF's arguments, logits and loss."""
    from medcg_jax.parity.pytorch import open_reference

    inputs = hf_tiny.inputs(side="left")
    stages = open_reference(released, parity_llava).stages(inputs)
    arrays = {**inputs, "logits": stages["logits"], "loss": stages["loss"]}
    path = tmp_path_factory.mktemp("recorded") / "inputs.npz"
    np.savez(path, **arrays)
    return path, arrays


def test_the_released_model_and_its_port_are_equal(released, capsys):
    result = parity(released)
    assert (result["ok"], result["exit_status"]) == (True, 0)
    assert result["trained"] == ["projector", "decoder"]
    stages = [row["stage"] for row in result["rows"]]
    assert stages[0] == "weights"
    assert "telling weights: gradient lm_head.weight" in stages
    assert {"vision.embed", "projector", "decoder.layer2", "logits", "loss"} <= set(stages)
    assert {"gradient lm_head.weight", "loss before step 9"} <= set(stages)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith(f"equal within 0.0001: {len(stages)} arrays; ") and len(lines) <= 20
    # Every array is in one part, and the parts are those of a model.
    parts = [line for line in lines[1:] if line.endswith(": ok")]
    names = [line.split("  ")[0].strip() for line in parts]
    assert {"weights", "vision tower", "projector", "decoder", "logits", "loss", "gradients"} <= set(names)


def test_a_fault_in_the_port_differs_and_the_stages_say_where(released, recorded, capsys, monkeypatch):
    from medcg_jax.families.llava import model

    monkeypatch.setattr(model, "gelu", lambda x: x * 0.5)
    result = parity(released, inputs=recorded[0])
    assert (result["ok"], result["exit_status"]) == (False, 1)
    assert "NOT equal" in capsys.readouterr().out
    _, graphdef, params = hf_tiny.port(hf_tiny.reference())
    inputs, theirs = hf_tiny.inputs(), Reference(hf_tiny.reference(), parity_llava)
    rows = parity_lib.stage_rows(nnx.merge(graphdef, params), theirs.stages(inputs), inputs)
    assert next(row.stage for row in rows if not row.ok) == "projector"


def test_recorded_numbers_that_differ_fail(released, recorded, tmp_path):
    _, arrays = recorded
    changed = dict(arrays, logits=arrays["logits"] + 0.01)
    np.savez(tmp_path / "other.npz", **changed)
    result = parity(released, inputs=tmp_path / "other.npz")
    assert result["exit_status"] == 1
    assert [row["ok"] for row in result["rows"]] == [False, True]
    bad = dict(arrays, logits=arrays["logits"] * np.nan)
    np.savez(tmp_path / "nan.npz", **bad)
    assert parity(released, inputs=tmp_path / "nan.npz")["exit_status"] == 1


def test_inputs_that_do_not_fit_are_refused(released, recorded, tmp_path):
    _, arrays = recorded
    cases = {
        "lacks logits; it holds attention_mask": {name: x for name, x in arrays.items() if name != "logits"},
        r"hold \[18, 18, 18\] image tokens for 5 images of 9": dict(arrays, pixel_values=arrays["pixel_values"][:5]),
        r"pixel_values \(6, 3, 14, 21\)": dict(arrays, pixel_values=arrays["pixel_values"][:, :, :14]),
        "recorded": dict(arrays, logits=arrays["logits"][:, :-1]),
    }
    for i, (message, case) in enumerate(cases.items()):
        np.savez(tmp_path / f"{i}.npz", **case)
        with pytest.raises(WeightsError, match=message):
            parity(released, inputs=tmp_path / f"{i}.npz")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(WeightsError, match="is no readable .npz file"):
        parity(released, inputs=tmp_path / "text.npz")


def test_without_pytorch_the_way_out_is_named(released, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(
        WeightsError, match=r"pip install '\.\[parity\]'` in the project's folder brings them, or compare"
    ):
        parity(released)


def test_a_report_of_hundreds_of_arrays_is_twenty_lines_and_says_where_it_differs(capsys):
    stages = [f"vision.layer{i}" for i in range(24)] + ["projector"] + [f"decoder.layer{i}" for i in range(32)]
    stages += ["logits", "loss", *(f"gradient model.layers.{i}.mlp.weight" for i in range(200))]
    stages += [f"telling weights: {stage}" for stage in stages] + [f"loss before step {i}" for i in range(10)]
    rows = [Row(stage, 1e-6, 2.0) for stage in stages]
    result = report(Path("SRC"), rows, [f"note {i}" for i in range(50)])
    lines = capsys.readouterr().out.splitlines()
    assert result["ok"] and len(result["rows"]) == len(rows) and len(lines) <= 20
    assert any(line.split() == ["decoder", "32", "5.0e-07", "decoder.layer0:", "ok"] for line in lines)
    rows[stages.index("decoder.layer7")] = Row("decoder.layer7", 0.5, 2.0)
    result = report(Path("SRC"), rows, [])
    lines = capsys.readouterr().out.splitlines()
    assert result["exit_status"] == 1 and result["first"] == "decoder.layer7"
    assert any(line.split() == ["decoder", "32", "2.5e-01", "decoder.layer7:", "1", "DIFFER"] for line in lines)
    assert lines[-1].startswith("NOT equal within 0.0001: 1 of")


def test_a_checkpoint_in_our_form_has_no_reference_of_its_own(tmp_path):
    (tmp_path / "model.json").write_text('{"family": "llava"}')
    with pytest.raises(ConfigError, match="give --against=DIR, the released directory that it was made from"):
        parity(tmp_path)


def test_no_checkpoint_is_one_line():
    with pytest.raises(WeightsError, match="holds no checkpoint") as error:
        parity(Path("/nowhere"))
    assert "\n" not in str(error.value)


def test_images_go_to_the_rows_that_hold_their_tokens():
    config = llava.config_from_json(
        {"model_type": "llava", "image_token_index": 97, "vision_config": hf_tiny.VISION, "text_config": hf_tiny.TEXT}
    )
    ids = np.full((3, 20), 5)
    ids[0, :9], ids[2, :18] = 97, 97
    images = np.arange(3, dtype=np.float32)[:, None, None, None] * np.ones((3, 3, 21, 21), np.float32) + 1
    pixels = np.asarray(port_inputs(config, {"input_ids": ids, "pixel_values": images})["images"]["pixels"])
    assert pixels[..., 0, 0, 0].tolist() == [[1, 0], [0, 0], [2, 3]]
    inputs = example(config)
    assert (inputs["labels"] != -100).sum() > 10
    assert ((inputs["input_ids"] == 97).sum(axis=1) == 9).all()


def test_differences_are_measured_against_the_references_size():
    assert Row("x", 9e-6, 0.1).ok
    assert not Row("x", 2e-5, 0.1).ok
    assert Row("x", 9e-5, 0.1, floor=1.0).ok
    assert Row("x", 0.0, 0.0).ok
    assert not Row("x", 1e-9, 0.0).ok
    assert Row("x", 2e-4, 10.0).ok
    assert not compared("x", np.array([np.nan]), np.array([1.0])).ok
