import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from medcg_jax.mesh import make_mesh
from medcg_jax.models import llava
from medcg_jax.run_config import MeshConfig, ModelConfig, TrainConfig
from medcg_jax.scale import bench, bench_gpu, bench_stages

ROOT = Path(__file__).resolve().parents[2]
CONFIG = bench.architecture(ModelConfig())


# Layers rolled into one loop body: a third of the time to compile.
ROLLED = ModelConfig(scan_unroll=1)


def test_a_batch_has_the_pipeline_s_shapes_and_supervises_real_tokens():
    batch = bench.example_batch(CONFIG, batch_size=16, text_tokens=(12, 24), num_targets=4)
    num_image = CONFIG.num_image_tokens
    assert batch["tokens"].shape == batch["segment_ids"].shape == (16, num_image + 24)
    assert batch["pixels"].shape == (16, 1, 32, 32, 3) and batch["pixels"].dtype == np.uint8
    assert (batch["tokens"] == CONFIG.image_token_id).sum(axis=1).tolist() == [num_image] * 16
    lengths = batch["segment_ids"].sum(axis=1)
    assert lengths.min() >= num_image + 12 and lengths.max() == num_image + 24 and len(set(lengths)) > 1
    following = np.take_along_axis(batch["tokens"], batch["target_positions"] + 1, axis=1)
    assert (following == batch["targets"]).all() and (batch["target_weights"] == 1).all()
    assert (batch["target_positions"].max(axis=1) + 1 < lengths).all() and batch["target_positions"].min() >= num_image
    assert (np.diff(batch["segment_ids"], axis=1) <= 0).all()


def test_the_reference_s_step_trains_what_the_port_s_does():
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from medcg_jax.models.build import abstract, num_params, split_trainable
    from medcg_jax.scale.bench_torch import Reference, hf_inputs

    batch = bench.example_batch(CONFIG, batch_size=4, text_tokens=(12, 24), num_targets=4)
    reference = Reference(CONFIG, batch, TrainConfig(learning_rate=1e-2), ModelConfig())
    trainable, _ = split_trainable(abstract(CONFIG)[1], ModelConfig().trainable)
    assert sum(weight.numel() for weight in reference.weights) == num_params(trainable)
    assert (hf_inputs(CONFIG, batch)["labels"] != -100).sum() == 16
    before = reference.weights[0].detach().clone()
    reference.seconds(1)
    assert not torch.equal(before, reference.weights[0])


def test_every_step_of_the_port_changes_its_weights():
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    port = bench.Port(bench.architecture(ROLLED), mesh, TrainConfig(learning_rate=1e-2), ROLLED)
    port.compile(bench.example_batch(CONFIG, batch_size=4, text_tokens=(12, 24), num_targets=4))
    port.seconds(1)
    first = port.loss
    port.seconds(6)
    assert int(port.state.step) == 7 and port.loss != first and np.isfinite(port.loss)


# --- stages


def test_a_stage_that_fails_loses_nothing_it_had_found(tmp_path, monkeypatch):
    def fails(model, trainable, batch_size):
        if batch_size == 4:
            raise RuntimeError("broken")
        return {"step_s": 1.0}

    monkeypatch.setattr(bench_stages, "time_step", fails)
    assert bench_stages.run("step", tmp_path / "out.json", "llava15_tiny", (2, 4)) == 1
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["rows"][0]["step_s"] == 1.0 and found["error"] == "RuntimeError: broken"


def test_batch_sizes_stop_at_the_first_that_does_not_fit(tmp_path, monkeypatch):
    tried = []

    def time_step(model, trainable, batch_size):
        tried.append((trainable, batch_size))
        if batch_size > 2 or (len(trainable) == 2 and model == "llava15_13b"):
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")
        return {"step_s": 1.0}

    monkeypatch.setattr(bench_stages, "time_step", time_step)
    assert bench_stages.run("step", tmp_path / "a.json", "llava15_7b", (2, 4, 8)) == 0
    assert tried == [(("projector", "decoder"), 2), (("projector", "decoder"), 4)]
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert rows[0]["step_s"] == 1.0 and "RESOURCE_EXHAUSTED" in rows[1]["does_not_fit"]
    tried.clear()
    assert bench_stages.run("step", tmp_path / "b.json", "llava15_13b", (2, 4)) == 0
    assert tried == [(("projector", "decoder"), 2), (("projector",), 2), (("projector",), 4)]


def test_a_stage_over_its_time_is_ended_and_the_others_still_run(tmp_path, monkeypatch):
    """A stage that hangs keeps what it wrote; the exit status says that something was missed."""
    script = tmp_path / "stage.py"
    script.write_text(
        "import json, sys, time\n"
        "flags = dict(arg[2:].split('=') for arg in sys.argv[1:])\n"
        "json.dump({'found': 1}, open(flags['json'], 'w'))\n"
        "time.sleep(60 if flags['stage'] == 'slow' else 0)\n"
    )
    real = subprocess.Popen
    monkeypatch.setattr(
        bench_gpu.subprocess, "Popen", lambda command, **rest: real([sys.executable, str(script), *command[3:]], **rest)
    )
    stages = {"slow": bench_gpu.Stage(6, ""), "quick": bench_gpu.Stage(30, "")}
    monkeypatch.setattr(bench_gpu, "STAGES", stages)
    began = time.monotonic()
    assert bench_gpu.main([f"--json={tmp_path}/out.json", "--model=llava15_tiny"]) == 1
    assert time.monotonic() - began < 30
    found = json.loads((tmp_path / "out.json").read_text())["stages"]
    assert found["slow"]["status"].startswith("stopped") and found["slow"]["found"] == 1
    assert found["quick"]["status"] == "done" and found["quick"]["found"] == 1


def test_attention_is_compared_with_plain(tmp_path):
    assert bench_stages.run("attention", tmp_path / "out.json", "llava15_tiny", ()) == 0
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert results["auto"]["uses"] == "plain"
    for name, error in results["plain"]["relative_error"].items():
        assert 1e-4 < error < 2e-2, name  # bfloat16 has 8 bits: about 4e-3


def test_the_machine_stage_names_versions(tmp_path):
    assert bench_stages.run("machine", tmp_path / "out.json", "llava15_tiny", ()) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["platform"] == "cpu" and {"jax", "flax", "optax", "python"} <= set(found["versions"])


def test_7b_has_rows_of_704_tokens():
    least, most = bench_stages.DEFAULT_TEXT_TOKENS
    assert (least, llava.llava15_7b().num_image_tokens + most) == (64, 704)


def test_the_parity_stage_compares_two_tiny_models_and_names_what_is_wrong(tmp_path, monkeypatch):
    """The comparison itself is tested beside its code; here is what it is given, and what becomes of its answer."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from medcg_jax.scale import parity
    from medcg_jax.weights.convert import read_config

    def compare(src):
        config = read_config(src)
        ok = config.text.num_kv_heads == 2
        return {"rows": [{"stage": "logits", "difference": 0.5, "scale": 2.0, "ok": ok}], "ok": ok}

    monkeypatch.setattr(parity, "parity", compare)
    monkeypatch.setattr(bench_stages, "run_pytest", lambda save, tests: pytest.fail("after a difference"))
    assert bench_stages.run("parity", tmp_path / "out.json", "llava15_tiny", ()) == 1
    found = json.loads((tmp_path / "out.json").read_text())
    assert [model["ok"] for model in found["models"].values()] == [True, False]
    assert "grouped_heads: logits" in found["error"] and "own_heads" not in found["error"]
