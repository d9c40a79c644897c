"""The stages of `bench_gpu`: none loses another's results, too little memory is a result, and what is missing is said.

Whole stages run in processes of their own, at the tiny size and with packages blocked."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from medcg_jax.bench import gpu as bench_gpu
from medcg_jax.bench import stage_best, stage_checks, stage_train
from medcg_jax.bench import stages as bench_stages
from medcg_jax.bench.gpu_text import conclusions
from medcg_jax.bench.stage_train import Case, larger
from medcg_jax.bench.stages import Ask
from medcg_jax.config import ConfigError, ModelConfig
from medcg_jax.families.llava import model as llava

ROOT = Path(__file__).resolve().parents[2]
TINY = "llava15_tiny"


def found_in(path: Path) -> dict:
    return json.loads(path.read_text())


# ------------------------------------------------------------------ stages and their files


def test_a_stage_that_fails_loses_nothing_it_had_found(tmp_path, monkeypatch):
    def measure(self, case, row):
        if case.batch_size == 2:
            raise RuntimeError("broken")
        row["samples_per_s"] = 1.0

    monkeypatch.setattr(stage_train.Steps, "measure", measure)
    assert bench_stages.run("train_fp32", tmp_path / "out.json", Ask(TINY, batches=(1, 2, 4))) == 1
    found = found_in(tmp_path / "out.json")
    assert found["rows"][0]["samples_per_s"] == 1.0 and "RuntimeError: broken" in found["error"]
    # The case after the broken one ran too.
    assert [("error" in row) for row in found["rows"]] == [False, True, False]


@dataclasses.dataclass(frozen=True)
class Size:
    number: int

    @property
    def name(self) -> str:
        return str(self.number)


def in_turn(ask, sizes, one, saved):
    return bench_stages.in_turn(
        ask, [Size(number) for number in sizes], one, larger=lambda small, other: other.number >= small.number,
        save=lambda rows: saved.append([dict(row) for row in rows]),
    )  # fmt: skip


@pytest.mark.parametrize("message", ["RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes", "CUDA out of memory."])
def test_cases_stop_at_the_first_that_does_not_fit_and_smaller_ones_go_on(message):
    tried, saved = [], []

    def one(size, row):
        tried.append(size.number)
        if size.number > 4:
            raise RuntimeError(message)
        row["samples_per_s"] = 1.0

    rows = in_turn(Ask(TINY), [2, 8, 16, 4], one, saved)
    assert tried == [2, 8, 4]
    assert message in rows[1]["does_not_fit"] and "smaller" in rows[2]["left_out"]
    assert [len(at) for at in saved] == [1, 2, 3, 4] and saved[0] == [{"case": "2", "samples_per_s": 1.0}]
    bench_stages.check_rows(rows)
    with pytest.raises(RuntimeError, match="nothing of 8 could be run"):
        bench_stages.check_rows(rows[1:2])


def test_cases_are_left_out_where_the_last_took_longer_than_is_left(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(bench_stages.time, "monotonic", lambda: clock[0])

    def one(size, row):
        clock[0] += size.number

    rows = in_turn(Ask(TINY, limit_s=50.0, began=0.0), [10, 20, 1], one, [])
    assert [row.get("left_out") for row in rows] == [None, None, "no time left"]


def run_script(tmp_path, monkeypatch, body: str, stages: dict, more: tuple[str, ...] = ()) -> dict:
    """What a run leaves whose stages (name -> limit in seconds) are a script; `more` are flags."""
    script = tmp_path / "stage.py"
    script.write_text(
        "import json, os, signal, sys, time\n"
        "flags = dict(arg[2:].split('=', 1) for arg in sys.argv[1:])\n"
        "json.dump({'found': 1}, open(flags['json'], 'w'))\n" + body
    )
    real = subprocess.Popen
    monkeypatch.setattr(
        bench_gpu.subprocess, "Popen", lambda command, **rest: real([sys.executable, str(script), *command[3:]], **rest)
    )
    monkeypatch.setattr(bench_gpu, "STAGES", {name: bench_gpu.Stage(limit, "") for name, limit in stages.items()})
    out = tmp_path / "out.json"
    flags = [f"--json={out}", f"--model={TINY}", f"--stages={','.join(stages)}", *more]
    before = signal.getsignal(signal.SIGTERM)
    try:
        return {"exit": bench_gpu.main(flags), **found_in(out)}
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_stage_over_its_time_is_ended_and_the_others_still_run(tmp_path, monkeypatch):
    """A stage that hangs keeps what it wrote; the exit status says that something was missed."""
    began = time.monotonic()
    body = "time.sleep(60 if flags['stage'] == 'slow' else 0)\n"
    found = run_script(tmp_path, monkeypatch, body, {"slow": 6, "quick": 30})
    assert time.monotonic() - began < 40 and found["exit"] == 1
    assert found["stages"]["slow"]["status"].startswith("stopped") and found["stages"]["slow"]["found"] == 1
    assert found["stages"]["quick"]["status"] == "done" and found["stages"]["quick"]["found"] == 1
    assert any(line.startswith("slow: stopped") for line in found["conclusions"]["lines"])


def test_a_stage_that_is_killed_keeps_what_it_wrote(tmp_path, monkeypatch):
    body = "os.kill(os.getpid(), signal.SIGKILL) if flags['stage'] == 'dies' else None\n"
    found = run_script(tmp_path, monkeypatch, body, {"dies": 30, "lives": 30})
    assert found["stages"]["dies"]["status"] == "failed with exit status -9" and found["stages"]["dies"]["found"] == 1
    assert found["stages"]["lives"]["status"] == "done" and found["exit"] == 1


def test_what_a_running_stage_has_written_is_already_in_the_file(tmp_path, monkeypatch):
    """So that a machine taken away in the middle of a stage leaves what was known."""
    body = (
        "out = flags['so_far']\n"
        "for _ in range(100):\n"
        "    time.sleep(.1)\n"
        "    seen = json.load(open(out))['stages']['one']\n"
        "    if seen.get('found'):\n"
        "        json.dump({'found': 2, 'seen': seen['status']}, open(flags['json'], 'w'))\n"
        "        break\n"
    )
    found = run_script(tmp_path, monkeypatch, body, {"one": 30})
    assert found["stages"]["one"]["seen"] == "running" and found["stages"]["one"]["status"] == "done"


def test_told_to_stop_it_ends_its_stage_and_keeps_the_file(tmp_path, monkeypatch):
    body = (
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        "os.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(60)\n"
    )
    with pytest.raises(SystemExit, match="143"):
        run_script(tmp_path, monkeypatch, body, {"one": 50, "two": 50})
    stages = found_in(tmp_path / "out.json")["stages"]
    assert stages["one"]["found"] == 1 and "two" not in stages
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_without_time_every_stage_says_so(tmp_path, monkeypatch):
    found = run_script(tmp_path, monkeypatch, "", {"a": 30, "b": 30}, more=("--time=3",))
    assert {stage["status"] for stage in found["stages"].values()} == {"no time left"} and found["exit"] == 1


def test_an_earlier_files_stages_are_kept(tmp_path, monkeypatch):
    (tmp_path / "earlier.json").write_text('{"stages": {"b": {"status": "done", "found": 7}}}')
    found = run_script(tmp_path, monkeypatch, "", {"a": 30}, more=(f"--so_far={tmp_path}/earlier.json",))
    assert found["stages"]["b"]["found"] == 7 and found["stages"]["a"]["found"] == 1 and found["exit"] == 0


@pytest.mark.parametrize("flag", ["--stages=machine,step", "--batches=8,many"])
def test_wrong_flags_are_one_line(tmp_path, flag, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench_gpu.main([f"--json={tmp_path}/out.json", flag])
    assert flag.partition("=")[0] in capsys.readouterr().err.splitlines()[-1]


def test_every_stage_has_a_place(tmp_path):
    assert set(bench_stages.WHERE) == set(bench_gpu.STAGES)
    for where in bench_stages.WHERE.values():
        module, function = where.split(".")
        assert callable(getattr(__import__(f"medcg_jax.bench.{module}", fromlist=[function]), function))


# ------------------------------------------------------------------ what stages do


def test_7b_has_rows_of_704_tokens():
    least, most = stage_train.DEFAULT_TEXT_TOKENS
    assert (least, llava.llava15_7b().num_image_tokens + most) == (64, 704)


def test_memory_grows_with_batches_and_with_what_is_kept():
    assert larger(Case(8, "dots"), Case(8, "none")) and larger(Case(8, "dots"), Case(16, "dots"))
    assert not larger(Case(8, "dots"), Case(64, "full")) and not larger(Case(8, "dots"), Case(4, "none"))
    assert not larger(Case(8, "dots"), Case(16, "dots", "float32"))


def test_what_a_configuration_does_not_know_is_refused():
    with pytest.raises(ConfigError, match="ModelConfig has no colour"):
        stage_train.known(ModelConfig, {"name": TINY, "colour": 1})


def test_a_plan_above_the_devices_memory_is_not_run(monkeypatch):
    class Device:
        @staticmethod
        def memory_stats():
            return {"bytes_limit": 10, "peak_bytes_in_use": 3}

    monkeypatch.setattr(jax, "devices", lambda: [Device])
    program = jax.jit(lambda x: x @ x).lower(jax.ShapeDtypeStruct((64, 64), jnp.float32)).compile()
    row = {}
    with pytest.raises(MemoryError) as error:
        stage_train.check_plan(row, program)
    assert bench_stages.out_of_memory(error.value)
    assert row["limit_bytes"] == 10 and row["peak_bytes_before"] == 3 and row["plan_peak_bytes"] >= 2 * 64 * 64 * 4


def test_the_fastest_case_is_taken_up_again():
    rows = [
        {"samples_per_s": speed, "case": "", **dataclasses.asdict(case)}
        for speed, case in ((3.0, Case(16, "dots")), (5.0, Case(64, "full")), (4.0, Case(8, "none")))
    ]
    so_far = {"train": {"rows": [*rows, {"case": "x", "does_not_fit": "y"}]}}
    assert stage_best.best_case(Ask(TINY, so_far=so_far)) == Case(64, "full")


def test_ways_are_known_to_the_compiler():
    names = {name for way in stage_best.WAYS for name in way.options}
    assert len(names) >= 6
    lowered = jax.jit(lambda x: x + 1).lower(1.0)
    for way in stage_best.WAYS:
        lowered.compile(way.options)
        dataclasses.replace(ModelConfig(), **way.model)
    with pytest.raises(Exception, match="xla_gpu_no_such_flag"):
        lowered.compile({"xla_gpu_no_such_flag": True})


def test_what_limits_a_step_is_in_order():
    kinds = {"matrix products": 6.0, "attention": 1.0, "other fusions": 2.0, "copies": 0.0, "idle": 1.0}
    trace = {"span_s": 10.0, "steps": 2, "kinds": {kind: {"seconds": s} for kind, s in kinds.items()}}
    lines = stage_best.limits(trace, {"matrix products": 12e12, "attention": 1e12}, 8e12)
    # 12 TFLOP at 8 TFLOP/s need 1.5 of the 3 seconds that they took, in a step of 5.
    assert "50.0% of the measured rate" in lines[0] and "30.0% of the step" in lines[0]
    assert [line.split(": ")[0] for line in lines[1:]] == [
        "lost to products below the measured rate", "lost to other fusions", "lost to attention", "lost to idle"
    ]  # fmt: skip
    assert "1500.0 ms a step, 30.0%" in lines[1] and stage_best.limits(trace, {}, None) == []


def test_conclusions_compare_like_with_like():
    def row(what, speed, size, dtype="bfloat16", remat="none", **more):
        return {"case": what, "what": what, "samples_per_s": speed, "batch_size": size, "param_dtype": dtype,
                "remat": remat, **more}  # fmt: skip

    stages = {
        "train": {"status": "done", "rows": [
            row("a", 6.0, 8, plan_peak_bytes=90, peak_bytes=100, peak_bytes_before=50), row("b", 9.0, 64, remat="full"),
            {"case": "c", "does_not_fit": ""}]},
        "train_fp32": {"status": "done", "rows": [row("d", 5.0, 8, "float32")]},
        "eval": {"status": "done", "rows": [row("e", 80.0, 8, num_new=0), row("f", 40.0, 8, num_new=4),
                                            row("g", 100.0, 32, num_new=0)]},
        "torch": {"status": "done", "rows": [row("train", 3.0, 8), row("train", 4.0, 16, remat="full"),
                                             row("generate", 8.0, 8), row("forward", 20.0, 8)]},
        "torch_fp32": {"status": "skipped"},
    }  # fmt: skip
    found = conclusions(stages)
    assert found["ratios"] == {
        "train_best": 9 / 4, "train_same_batch": 2.0, "letters_vs_generate": 10.0, "letters_best_vs_generate": 12.5,
        "letters_vs_forward": 4.0, "letters_best_vs_forward": 5.0,
    }  # fmt: skip
    assert any("(0.900 of it): a" in line for line in found["lines"]) and "torch_fp32: skipped" in found["lines"]
    stages["torch"]["rows"][0]["samples_per_s"] = 1.5
    assert conclusions(stages)["ratios"]["train_same_batch"] == 4.0
    assert conclusions({}) == {"ratios": {}, "lines": []}


# ------------------------------------------------------------------ checks


def test_attention_is_compared_with_plain(tmp_path):
    assert bench_stages.run("attention", tmp_path / "out.json", Ask(TINY)) == 0
    results = found_in(tmp_path / "out.json")["results"]
    assert results["auto"]["uses"] == "plain"
    for name, error in results["plain"]["relative_error"].items():
        assert 1e-4 < error < 2e-2, name  # bfloat16 has 8 bits: about 4e-3


def test_numerics_that_differ_are_named(tmp_path, monkeypatch):
    def ten_steps(device, dtype, precision):
        off = {"float32": 1e-3 if precision is None else 0.0, "bfloat16": float("nan")}[dtype]
        return {"losses": [1.0, 0.5 + off], "grad_norms": [2.0], "weights": [1.0, -3.0]}

    monkeypatch.setattr(stage_checks, "ten_steps", ten_steps)
    assert bench_stages.run("numerics", tmp_path / "out.json", Ask(TINY)) == 1
    found = found_in(tmp_path / "out.json")
    assert found["rows"]["float32"]["losses"] == 0.0
    assert found["rows"]["float32, default products"]["losses"] == pytest.approx(1e-3)
    # What is shown alone is not judged; a NaN is.
    assert found["error"].startswith("RuntimeError: bfloat16: losses nan")


def test_the_parity_stage_compares_two_tiny_models_and_names_what_is_wrong(tmp_path, monkeypatch):
    """The comparison itself is tested beside its code; here is what it is given, and what becomes of its answer."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from medcg_jax.families.weights.convert import read_config
    from medcg_jax.parity import verb as parity

    def compare(src):
        config = read_config(src)
        ok = config.text.num_kv_heads == 2
        return {"rows": [{"stage": "logits", "difference": 0.5, "scale": 2.0, "ok": ok}], "ok": ok}

    monkeypatch.setattr(parity, "parity", compare)
    monkeypatch.setattr(stage_checks, "run_pytest", lambda save, tests: pytest.fail("after a difference"))
    assert bench_stages.run("parity", tmp_path / "out.json", Ask(TINY)) == 1
    found = found_in(tmp_path / "out.json")
    assert [model["ok"] for model in found["models"].values()] == [True, False]
    assert "grouped_heads: logits" in found["error"] and "own_heads" not in found["error"]


# ------------------------------------------------------------------ a bare machine

BLOCK = """
import sys
from importlib.machinery import PathFinder
class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {packages!r} else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""
MISSING = ("grain", "ml_collections", "tensorflow_datasets", "torch", "transformers", "PIL", "qwix", "pytest")


def test_a_bare_machine_runs_the_command(tmp_path):
    """One process for each stage, with nothing but jax, flax and optax to import."""
    (tmp_path / "sitecustomize.py").write_text(BLOCK.format(packages=MISSING))
    here = {"PYTHONPATH": str(tmp_path), "PYTHON": sys.executable, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = ["bash", "launch/bench_gpu.sh", str(tmp_path / "out.json"), f"--model={TINY}", "--batches=2",
               "--time=3000", "--stages=machine,train_fp32,eval,trace,torch,parity"]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | here, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=900,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    stages = found_in(tmp_path / "out.json")["stages"]
    assert stages["torch"]["status"] == stages["parity"]["status"] == "skipped"
    assert "torch" in stages["torch"]["why"]
    machine = stages["machine"]
    assert machine["platform"] == "cpu" and {"jax", "flax", "optax", "python"} <= set(machine["versions"])
    assert machine["matmul"]["flops_per_s"] == max(machine["matmul"]["shapes"].values()) > 0
    assert machine["memory_bytes_per_s"] > 0
    (row,) = stages["train_fp32"]["rows"]
    assert row["mfu_of_measured"] > 0 and row["plan_peak_bytes"] > 0 and row["batch"]["size"] == 2
    assert [row["num_new"] for row in stages["eval"]["rows"]] == [0, 4]
    assert all(row["samples_per_s"] > 0 for row in stages["eval"]["rows"])
    trace = stages["trace"]
    assert trace["trace"]["steps"] == 2 and trace["trace"]["kinds"]["matrix products"]["seconds"] > 0
    assert any("lost to" in line for line in trace["limits"]) and "== what it comes to" in done.stdout
