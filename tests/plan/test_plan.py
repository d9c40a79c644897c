"""`medcg plan`: a run's own programs, compiled for devices that need not be there, and what is said of them."""

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from medcg_jax import cli
from medcg_jax.chips import V5E
from medcg_jax.config import (
    ConfigError,
    DataConfig,
    EvalConfig,
    MeshConfig,
    ModelConfig,
    RunConfig,
    RunError,
    TrainConfig,
    replace,
)
from medcg_jax.families import registry
from medcg_jax.families.llava.model import llava15_tiny
from medcg_jax.mesh import make_mesh
from medcg_jax.plan import hlo, programs, search, topology
from medcg_jax.plan import text as plan_text
from medcg_jax.plan import verb as plan
from medcg_jax.train.step import make_step

ROOT = Path(__file__).parents[2]
RUN = RunConfig(
    mesh=MeshConfig(data=2, fsdp=4),
    model=ModelConfig(name="llava15_tiny", scan_unroll=1),
    data=DataConfig(max_text_tokens=30, max_target_tokens=2),
    train=TrainConfig(batch_size=16),
    eval=EvalConfig(batch_size=8, max_new_tokens=2, features_gib=0.0625),
)
TINY = {"llava": "llava15_tiny", "qwen2_vl": "qwen2_vl_tiny", "mllama": "llama32_vision_tiny",
        "minigpt_v2": "minigpt_v2_tiny", "next_chat": "next_chat_tiny"}  # fmt: skip
GIB = 1 << 30
SMALL = llava15_tiny(
    64, 63, image_size_px=16, embed_dim=16, num_vision_layers=2, vision_mlp_dim=32, num_layers=2, mlp_dim=32,
    scan_unroll=1,
)  # fmt: skip
OWN = programs.architecture_of


@pytest.fixture(autouse=True, scope="module")
def compiled_once():
    """A small LLaVA in place of the tiny one, and programs that are compiled once for all tests."""
    kept = {}

    def once(build_it):
        def made(planned_run, *rest):
            run = planned_run.run
            key = repr((build_it.__name__, run.model, run.data, run.mesh, run.eval, rest))
            if key not in kept:
                kept[key] = build_it(planned_run, *rest)
            return kept[key]

        return made

    def architecture_of(model):
        return dataclasses.replace(SMALL, remat=model.remat) if model.name == "llava15_tiny" else OWN(model)

    with pytest.MonkeyPatch.context() as patch:
        for module in (programs, search):
            patch.setattr(module, "architecture_of", architecture_of)
        for name in ("compile_training", "compile_tests"):
            patch.setattr(plan, name, once(getattr(programs, name)))
        yield


@pytest.fixture(scope="module")
def planned():
    return plan.plan(RUN, "local", memory_bytes=GIB, grid={"steps": 10, "samples": 160, "test_rows": 80})


def test_what_is_said_of_a_run(planned):
    train, tests = planned["train"], planned["eval"]
    assert planned["fits"] and train["fits"] and tests["fits"] and "exit_status" not in planned
    assert planned["mesh"] == {"cell": 1, "data": 2, "fsdp": 4, "tensor": 1}
    # The state is donated whole, and a quarter of it lies on each device.
    assert train["alias_bytes"] >= train["state_bytes"]
    assert "donation-lost" not in {finding["rule"] for finding in train["findings"]}
    assert train["held_bytes"] == pytest.approx(train["state_bytes"] / 3, rel=0.01)
    assert train["collectives"]["all-gather"]["bytes"] > train["held_bytes"]
    assert tests["collectives"]["all-gather"]["count"] > 0 and tests["not_counted"] == ""
    assert train["rows"] == 16 and tests["rows"] == 8 and train["flops"]["executed"] >= train["flops"]["full"] > 0
    # Nothing is said about the speed of what has no published peaks.
    assert planned["peak"] is None and train["bound"] is None and planned["grid"]["chip_hours"] is None
    json.dumps(planned)


def test_the_page_is_narrow_and_says_what_it_is(planned):
    page = plan_text.text_of(planned)
    assert max(map(len, page.splitlines())) <= plan_text.WIDTH
    assert "llava15_tiny on local: 8 x cpu, mesh data 2 x fsdp 4 x tensor 1" in page and "no peaks of cpu" in page
    assert page.count(" fits") == 2 and "least effort" in page


@pytest.fixture
def as_v5e(monkeypatch):
    """Peaks for the devices here, so that there is a bound."""
    monkeypatch.setattr(plan, "peak_of", lambda kind: V5E)
    monkeypatch.setattr(search, "peak_of", lambda kind: V5E)


def test_the_bound_and_the_grid(as_v5e):
    grid = {"steps": 1000, "samples": 16_000, "test_rows": 800}
    found = plan.plan(RUN, "local", memory_bytes=GIB, grid=grid, price=2.0)
    train, tests = found["train"]["bound"], found["eval"]["bound"]
    assert train["overlapped_s"] == max(train[f"{part}_s"] for part in ("compute", "memory", "network"))
    assert train["in_turn_s"] == pytest.approx(sum(train[f"{part}_s"] for part in ("compute", "memory", "network")))
    assert found["train"]["samples_per_s"] == pytest.approx(16 / train["overlapped_s"])
    for program in (found["train"], found["eval"]):
        bound, simulated = program["bound"], program["schedule"]
        assert bound["overlapped_s"] <= bound["simulated_s"] <= bound["in_turn_s"] and bound["unknown"] == ()
        # A CPU's collectives are not asynchronous: all are exposed.
        assert simulated["exposed_s"] == pytest.approx(simulated["collectives_s"]) and len(simulated["longest"]) == 5
        assert bound["simulated_s"] == pytest.approx(simulated["busy_s"] + simulated["exposed_s"])
    assert found["train"]["samples_per_s_simulated"] == pytest.approx(16 / train["simulated_s"])
    hours = (1000 * train["overlapped_s"] + 100 * tests["overlapped_s"]) / 3600 * 8
    assert found["grid"]["chip_hours"] == pytest.approx(hours) and found["grid"]["usd"] == pytest.approx(2 * hours)
    assert found["grid"]["usd_in_turn"] > found["grid"]["usd"]
    page = plan_text.text_of(found)
    assert "ms simulated, by the schedule" in page and "training step: waits for collectives" in page
    assert "no measurement" in page and "chip-hours" in page and "16,000 samples, 800 tests" in page
    assert "--price" in plan_text.text_of(plan.plan(RUN, "local", memory_bytes=GIB, grid=grid))


def test_a_schedule_that_cannot_be_read_is_said_and_the_bound_leaves_memory_out(as_v5e, monkeypatch):
    def read(text, **rest):
        raise ValueError("fusion.1: the work of new_kernel is not known here")

    monkeypatch.setattr(plan.schedule, "read", read)
    found = plan.plan(RUN, "local", memory_bytes=GIB)
    bound = found["train"]["bound"]
    assert bound["simulated_s"] is None and bound["memory_s"] is None and bound["network_s"] > 0
    assert found["train"]["samples_per_s_simulated"] is None
    assert "bytes over memory are not known: fusion.1: the work of new_kernel" in plan_text.text_of(found).replace(
        "\n    ", " "
    )


def test_generation_counts_as_often_as_it_is_said_to_run():
    planned_run = programs.plan_run(RUN, make_mesh(RUN.mesh, jax.devices()))
    text = plan.compile_tests(planned_run).program.as_text()
    sums = [sum(c.total_bytes for c in hlo.collectives(text, open_trips=trips)) for trips in (1, 2, 3)]
    assert sums[0] < sums[1] and sums[2] - sums[1] == sums[1] - sums[0]
    with pytest.raises(ValueError, match="unknown trips"):
        hlo.collectives(text)


@pytest.mark.long
def test_the_largest_batch_that_fits():
    peaks = {}
    for rows in (8, 16):
        planned_run = programs.plan_run(RUN, make_mesh(RUN.mesh, jax.devices()))
        memory = plan.compile_training(planned_run, rows).program.memory_analysis()
        peaks[rows] = memory.peak_memory_in_bytes
    held = plan.plan(RUN, "local", memory_bytes=GIB)["train"]["held_bytes"]
    between = (sum(peaks.values()) / 2 + held) / 0.9
    found = plan.plan(RUN, "local", memory_bytes=between)
    assert not found["fits"] and found["exit_status"] == 3 and found["largest_batch"] == 8
    assert "largest train.batch_size that fits this mesh: 8" in plan_text.text_of(found)
    # Not even the state: nothing is compiled to see that.
    none = plan.plan(RUN, "local", memory_bytes=1000.0)
    assert none["largest_batch"] == 0 and none["exit_status"] == 3
    assert "what stays takes" in plan_text.text_of(none)


def test_a_step_that_keeps_its_old_state_is_found(monkeypatch):
    """`donate_argnums` taken from the step's program: the plan says so."""

    def without_donation(*args, **rest):
        jit = jax.jit
        monkeypatch.setattr(jax, "jit", lambda f, donate_argnums=(), **kw: jit(f, **kw))
        program = make_step(*args, **rest)
        monkeypatch.setattr(jax, "jit", jit)
        return program

    monkeypatch.setattr(programs, "make_step", without_donation)
    planned_run = programs.plan_run(RUN, make_mesh(RUN.mesh, jax.devices()))
    found = plan.training(planned_run, programs.compile_training(planned_run, 8), GIB, None)
    [lost] = [finding for finding in found["findings"] if finding["rule"] == "donation-lost"]
    assert lost["num_bytes"] == pytest.approx(found["state_bytes"])
    assert "donation-lost: 0.00 GB of the state's" in plan_text.text_of(page_of(found))


def page_of(train):
    """The least of a result that a page is made of."""
    return {
        "model": "m", "topology": "local", "num_devices": 8, "device": "cpu", "mesh": {}, "num_cells": 1,
        "batch_size": 8, "compute_dtype": "float32", "base_dtype": "float32", "remat": "none", "trainable": [], "versions": {},
        "full_effort": False, "usable_bytes": GIB, "margin": 0.1, "peak": None, "whole_on_every_device": [],
        "train": train, "eval": train,
    }  # fmt: skip


# ------------------------------------------------------------------ every family


@pytest.mark.parametrize("family", TINY)
def test_rows_of_every_family_are_the_data_rooms_own(family):
    run = replace(RUN, model__name=TINY[family])
    planned_run = programs.plan_run(run, make_mesh(run.mesh, jax.devices()))
    batch = programs.batch_of(programs.train_rows(planned_run.setup), 16)
    length = planned_run.setup.model.num_image_tokens + 30
    assert batch["tokens"].shape == (16, length) == batch["segment_ids"].shape
    assert batch["targets"].shape == (16, 2) and batch["pixels"].shape[:2] == (16, 1)
    tests = programs.batch_of(programs.eval_rows(planned_run.setup), 8)
    assert tests["tokens"].shape == (8, length) and tests["option_ids"].shape == (8, 4)
    assert registry.family(family).tokenizer and set(batch) >= {*tests} - {"option_ids", "last_position"}


def test_rows_with_boxes_are_as_long_as_the_grids():
    run = replace(RUN, model__name="minigpt_v2_tiny", study__tables=("detection_pairs",), data__max_box_text_tokens=70)
    planned_run = programs.plan_run(run, make_mesh(run.mesh, jax.devices()))
    batch = programs.batch_of(programs.train_rows(planned_run.setup), 8)
    assert batch["tokens"].shape[1] == planned_run.setup.model.num_image_tokens + 70


def test_a_released_size_keeps_its_vocabulary():
    run = replace(RUN, model__name="llava15_7b", model__compute_dtype="bfloat16")
    planned_run = programs.plan_run(run, make_mesh(run.mesh, jax.devices()))
    assert planned_run.setup.model.text.vocab_size == 32000
    state = plan.device_bytes(planned_run.state())
    numbers = plan.build.num_params(planned_run.trainable)
    assert numbers > 6.7e9 and state == pytest.approx(12 * numbers / 4, rel=1e-3)
    layout = plan.layout_of(planned_run)
    assert layout.layer_bytes == pytest.approx(2 * 202_383_360, rel=0.01)  # one block of Llama-7B
    assert 1e6 < layout.whole_bytes < 1e7  # norms and biases


# ------------------------------------------------------------------ wrong use


@pytest.mark.parametrize(
    ("change", "where", "says"),
    [
        ({}, "v5q:4x4", "topology=v5q:4x4"),
        ({"train__batch_size": 12}, "local", "train.batch_size per accumulation step=12"),
        ({"eval__batch_size": 12}, "local", "eval.batch_size=12"),
        ({"mesh__fsdp": 3}, "local", "needs"),
        ({"study__cells_at_once": 3, "mesh__cell": 2, "mesh__data": 1}, "local", "3 cells over mesh.cell=2"),
        ({"data__max_text_tokens": 4}, "local", "data.max_text_tokens=4"),
    ],
)
def test_wrong_use_is_one_line(change, where, says):
    with pytest.raises(ValueError) as error:
        plan.plan(replace(RUN, **change), where, memory_bytes=GIB)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_what_cannot_be_compiled_is_told():
    def fails():
        raise NotImplementedError("Unsupported sequence length Q 193, KV 193.")

    with pytest.raises(RunError, match="the training step cannot be compiled: NotImplementedError: Unsupported"):
        programs.compiled("the training step", {}, fails)


def test_numbers_of_a_refusal():
    text = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (26.32G) exceeds available HBM (15.75G)."
    )

    def refuses():
        raise jax.errors.JaxRuntimeError(text)

    made = programs.compiled("x", {}, refuses)
    found = plan.needs(made, 1.0, 15e9)
    assert not found["fits"] and found["peak_bytes"] == pytest.approx(26.32 * GIB) and "26.32G" in found["refused"]


def test_what_the_compiler_writes_is_caught(capfd):
    output = []
    with programs.captured_stderr(output):
        os.write(2, b"from a library\n")
    assert output == ["from a library\n"] and capfd.readouterr().err == ""
    with pytest.raises(ZeroDivisionError), programs.captured_stderr([]):
        os.write(2, b"before a failure\n")
        raise ZeroDivisionError
    assert "before a failure" in capfd.readouterr().err


# ------------------------------------------------------------------ search


def test_candidates_divide_everything():
    run = replace(RUN, train__batch_size=8)
    found = list(search.candidates(run, 8, V5E))
    meshes = {(c.run.mesh.data, c.run.mesh.fsdp, c.run.mesh.tensor) for c in found}
    assert all(math.prod(mesh) == 8 for mesh in meshes) and (1, 8, 1) in meshes and (2, 2, 2) in meshes
    heads = SMALL.text.num_heads
    for one in found:
        rows = one.run.mesh.data * one.run.mesh.fsdp
        assert one.run.train.batch_size % rows == 0 == one.run.eval.batch_size % rows
        assert heads % one.run.mesh.tensor == 0
    # More kept for the backward pass needs more memory and less arithmetic.
    by = {c.run.model.remat: c for c in found if c.run.mesh.fsdp == 8 and c.run.train.batch_size == 8}
    assert by["full"].least_bytes < by["dots"].least_bytes < by["none"].least_bytes
    assert by["full"].seconds > by["dots"].seconds > by["none"].seconds


@pytest.mark.long
def test_search_ranks_what_fits(as_v5e, monkeypatch, capsys):
    monkeypatch.setattr(search, "BATCHES", (1,))
    found = search.search(RUN, "local", memory_bytes=GIB, most_compiles=2)
    capsys.readouterr()
    assert len(found["ranked"]) == 2 and "exit_status" not in found
    rates = [row["samples_per_s_per_chip_simulated"] for row in found["ranked"]]
    assert rates == sorted(rates, reverse=True)
    page = search.table(found)
    assert "the first: --config.mesh.data=" in page and max(map(len, page.splitlines())) <= plan_text.WIDTH
    json.dumps(found)
    none = search.search(RUN, "local", memory_bytes=1000.0, most_compiles=2)
    assert none["exit_status"] == 3 and none["num_too_large"] == none["num_candidates"]
    assert "nothing that was compiled fits" in search.table(none)


def test_search_needs_peaks_and_a_mesh(monkeypatch):
    with pytest.raises(ConfigError, match="no peaks of cpu"):
        search.search(RUN, "local", memory_bytes=GIB)
    monkeypatch.setattr(search, "peak_of", lambda kind: V5E)
    with pytest.raises(ConfigError, match="--compiles=0"):
        search.search(RUN, "local", memory_bytes=GIB, most_compiles=0)
    # Four heads, so at least two ways to split the rows.
    monkeypatch.setattr(search, "BATCHES", (1,))
    with pytest.raises(ConfigError, match="batch of 1 rows"):
        search.search(replace(RUN, train__batch_size=1), "local", memory_bytes=GIB)


# ------------------------------------------------------------------ the verb


def test_the_verb(tmp_path, capfd):
    file = tmp_path / "plan.json"
    flags = ["plan", f"--config={ROOT / 'configs' / 'phantom.py'}:tiny", "--topology=local", f"--json={file}"]
    flags += ["--config.mesh.data=8", "--config.eval.batch_size=8", "--config.model.scan_unroll=1"]
    assert cli.main(flags) == 0
    found = json.loads(file.read_text())
    assert found["fits"] and found["grid"]["samples"] > 0 and found["grid"]["test_rows"] > 0
    # Of eight CPU devices that share this host's memory, a tenth left free.
    assert found["usable_bytes"] == pytest.approx(topology.host_bytes() / 8 * 0.9)
    shown = capfd.readouterr()
    assert "training step" in shown.out and "the limit is this host's memory, which its CPU devices share" in shown.out
    assert shown.err == "", "what XLA says about this machine is of no use here"
    # A tiny model's bytes are told apart, and not 0.00.
    peak = next(line for line in shown.out.splitlines() if line.startswith("GiB a device: peak"))
    assert all(float(word) > 0 for word in peak.split()[-2:])
    assert max(map(len, shown.out.splitlines())) <= plan_text.WIDTH and shown.out.count("fusion.") <= 20
    assert cli.main([*flags, "--memory_gib=0.00001"]) == 3
    assert not json.loads(file.read_text())["fits"]
    capfd.readouterr()
    assert cli.main([*flags, "--topology=v9:4x4"]) == 2
    assert capfd.readouterr().err.count("\n") == 1


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed: medcg-jax[tpu]")
def test_a_tpu_that_is_not_there(tmp_path):
    """A tiny model for v5e:2x2, in a process of its own: libtpu takes a lock."""
    file = tmp_path / "plan.json"
    # Flags for the CPU's compiler end libtpu, which does not know them.
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    env |= {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    done = subprocess.run(
        [
            sys.executable, "-m", "medcg_jax.cli", "plan", f"--config={ROOT / 'configs' / 'phantom.py'}:tiny",
            "--topology=v5e:2x2", "--config.mesh.data=1", "--config.mesh.fsdp=4", "--config.eval.batch_size=8",
            f"--json={file}",
        ],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False, env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(file.read_text())
    assert found["device"] == "TPU v5 lite" and found["train"]["attention"] == "splash" and found["fits"]
    assert found["train"]["bound"]["overlapped_s"] > 0 and found["train"]["collectives"]
    for part in (found["train"], found["eval"]):
        assert part["products"]["flops"] > 0 and part["products"]["not_counted"] == ""
        assert part["bound"]["overlapped_s"] <= part["schedule"]["step_s"] <= part["bound"]["in_turn_s"]
        assert all("--full_effort" in wait["remedy"] for wait in part["schedule"]["longest"] if not wait["is_async"])


def test_a_run_alone_keeps_nothing_beside_its_programs():
    grid, alone = (plan.plan(RUN, "local", memory_bytes=GIB, alone=alone) for alone in (False, True))
    assert grid["train"]["held_bytes"] > 0
    # Beside a grid's tests lie the state and, as the tower is frozen, features of the images.
    assert grid["eval"]["held_bytes"] == grid["train"]["state_bytes"] + RUN.eval.features_gib * GIB
    assert alone["train"]["held_bytes"] == alone["eval"]["held_bytes"] == 0
    assert alone["train"]["peak_bytes"] == grid["train"]["peak_bytes"]
