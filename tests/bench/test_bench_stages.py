"""The framework of `medcg bench`: no stage loses another's results, each is ended in time, and what is missing is said."""

import dataclasses
import importlib.util
import json
import os
import pickle
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from medcg_jax.bench import __main__ as command
from medcg_jax.bench import cases, checks, text
from medcg_jax.bench import run as bench
from medcg_jax.bench.cases import Case
from medcg_jax.bench.run import Ask, Stage
from medcg_jax.chips import Peak
from medcg_jax.cli import main
from medcg_jax.config import ConfigError, DataConfig, ModelConfig, RunConfig, RunError

ROOT = Path(__file__).resolve().parents[2]
TINY = RunConfig(
    name="tiny", model=ModelConfig(), data=DataConfig(system_prompt="", max_text_tokens=24, max_target_tokens=4)
)


def in_file(path: Path) -> dict:
    return json.loads(path.read_text())


# ------------------------------------------------------------------ processes


def run_script(tmp_path, monkeypatch, body: str, limits: dict, more: tuple[str, ...] = ()) -> dict:
    """What a bench leaves whose stages (name -> limit in seconds) are a script; `more` are flags."""
    script = tmp_path / "stage.py"
    script.write_text(
        "import json, os, signal, sys, time\n"
        "flags = dict(arg[2:].split('=', 1) for arg in sys.argv[1:])\n"
        "json.dump({'found': 1}, open(flags['json'], 'w'))\n" + body
    )
    real = subprocess.Popen
    monkeypatch.setattr(
        bench.subprocess, "Popen", lambda argv, **rest: real([sys.executable, str(script), *argv[3:]], **rest)
    )
    monkeypatch.setattr(bench, "STAGES", {name: Stage("", "", limit) for name, limit in limits.items()})
    monkeypatch.setattr(bench, "KNOWN", tuple(limits))
    out = tmp_path / "out.json"
    return {"exit": command.main([f"--json={out}", f"--stages={','.join(limits)}", *more]), **in_file(out)}


def test_stages_that_hang_or_die_keep_what_they_wrote_and_the_others_still_run(tmp_path, monkeypatch):
    began = time.monotonic()
    body = (
        "time.sleep(60 if flags['stage'] == 'slow' else 0)\n"
        "os.kill(os.getpid(), signal.SIGKILL) if flags['stage'] == 'dies' else None\n"
    )
    result = run_script(tmp_path, monkeypatch, body, {"slow": 6, "dies": 30, "lives": 30})
    assert time.monotonic() - began < 40 and result["exit"] == 1
    assert result["stages"]["slow"]["status"].startswith("stopped")
    assert result["stages"]["dies"]["status"] == "failed with exit status -9"
    assert result["stages"]["lives"]["status"] == "done"
    assert [result[name] for name in ("slow", "dies", "lives")] == [{"found": 1}] * 3
    assert any(line.startswith("slow: stopped") for line in result["conclusions"]["lines"])


def test_what_a_running_stage_has_written_is_already_in_the_file(tmp_path, monkeypatch):
    """So that a machine taken away in the middle of a stage leaves what was known."""
    body = (
        f"out = {str(tmp_path / 'out.json')!r}\n"
        "for _ in range(100):\n"
        "    time.sleep(.1)\n"
        "    seen = json.load(open(out))\n"
        "    if seen.get('one', {}).get('found'):\n"
        "        json.dump({'found': 2, 'seen': seen['stages']['one']['status']}, open(flags['json'], 'w'))\n"
        "        break\n"
    )
    result = run_script(tmp_path, monkeypatch, body, {"one": 30})
    assert result["one"]["seen"] == "running" and result["stages"]["one"]["status"] == "done"


def test_told_to_stop_it_ends_its_stage_and_keeps_the_file(tmp_path, monkeypatch):
    body = (
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        "os.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(60)\n"
    )
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"):
        run_script(tmp_path, monkeypatch, body, {"one": 50, "two": 50})
    assert signal.getsignal(signal.SIGTERM) is before
    result = in_file(tmp_path / "out.json")
    assert result["one"] == {"found": 1} and "two" not in result["stages"]
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_time_that_is_over_and_earlier_files(tmp_path, monkeypatch):
    earlier = {"stages": {"b": {"status": "done"}}, "b": {"found": 7}}
    (tmp_path / "earlier.json").write_text(json.dumps(earlier))
    more = ("--time=3", f"--so_far={tmp_path}/earlier.json")
    result = run_script(tmp_path, monkeypatch, "", {"a": 30}, more)
    assert result["stages"]["a"]["status"] == "no time left" and result["exit"] == 1 and result["b"]["found"] == 7


def test_a_stage_of_the_verb_that_fails_is_the_verbs_error(tmp_path):
    def error(message):
        return bench.failure("train", {"status": "failed with exit status 1", "error": message})

    assert isinstance(error("ConfigError: no"), ConfigError) and str(error("ConfigError: no")) == "no"
    assert type(error("JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory")) is RuntimeError
    other = error("KeyError: 'x'")
    assert isinstance(other, RunError) and "stage train: KeyError" in str(other)


@pytest.mark.parametrize("flag", ["--stages=machine,step", "--batches=8,many"])
def test_wrong_flags_of_the_module_are_one_line(tmp_path, flag, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main([f"--json={tmp_path}/out.json", flag])
    assert flag.partition("=")[0] in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stages=train,evel"], "stages=evel: expected some of train, eval, generate, loader, convert, startup"),
        (["--against=tensorflow"], "invalid choice: 'tensorflow'"),
        (["--stages=torch", "--config.model.name=qwen2_vl_tiny"], "model.name=qwen2_vl_tiny: expected a LLaVA"),
        (
            [
                "--against=torch",
                "--config.model.lora_rank=4",
                "--config.model.base_dtype=nf4",
                "--config.model.trainable=('projector','lora')",
            ],
            "model.base_dtype=nf4: PyTorch's frozen weights are float32",
        ),
        (["--against=torch", "--stages=loader"], "train, eval or generate is needed"),
        (["--stages=train", "--config.train.batch_size=12"], "cannot be split over data x fsdp = 8"),
        (
            ["--config.model.checkpoint=checkpoints/nowhere"],
            "model.checkpoint=checkpoints/nowhere: there is no checkpoint; for llava15_bench with random weights leave it",
        ),
    ],
)
def test_wrong_use_of_the_verb_is_one_line(flags, message, capfd):
    assert main(["bench", "--config=configs/bench_tiny.py", *flags]) == 2
    error = capfd.readouterr().err
    assert message in error and error.count("\n") == 1


def test_every_stage_has_its_function(monkeypatch):
    for stage in bench.STAGES.values():
        module, function = stage.function.split(".")
        assert callable(getattr(__import__(f"medcg_jax.bench.{module}", fromlist=[function]), function))
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    env = bench.environment("letters", Ask(TINY))
    assert env["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5" and "XLA_PYTHON_CLIENT_PREALLOCATE" not in env
    assert bench.environment("torch", Ask(TINY))["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"


# ------------------------------------------------------------------ cases


def measured_in_turn(ask, sizes, measure):
    saved = []
    try:
        cases.in_turn(
            ask, [Case("train", size) for size in sizes], measure,
            save=lambda rows: saved.append([dict(row) for row in rows]),
        )  # fmt: skip
    except RuntimeError as error:
        saved.append(str(error))
    return saved


@pytest.mark.parametrize("message", ["RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes", "CUDA out of memory."])
def test_cases_stop_at_the_first_that_does_not_fit_and_smaller_ones_go_on(message):
    tried = []

    def measure(case, row):
        tried.append(case.batch_size)
        if case.batch_size > 4:
            raise RuntimeError(message)
        row["samples_per_s"] = 1.0

    saved = measured_in_turn(Ask(TINY), [2, 8, 16, 4], measure)
    assert tried == [2, 8, 4] and [len(rows) for rows in saved] == [1, 2, 3, 4]
    assert message in saved[-1][1]["does_not_fit"] and "smaller" in saved[-1][2]["left_out"]
    assert "nothing of bfloat16 state, batch 8" in measured_in_turn(Ask(TINY), [8], measure)[-1]


def test_a_case_that_breaks_is_named_and_the_next_one_runs():
    def measure(case, row):
        if case.batch_size == 2:
            raise KeyError("broken")

    saved = measured_in_turn(Ask(TINY), [1, 2, 4], measure)
    assert ["error" in row for row in saved[2]] == [False, True, False] and "KeyError: 'broken'" in saved[-1]


def test_cases_are_left_out_where_the_last_took_longer_than_is_left(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(cases.time, "monotonic", lambda: clock[0])

    def measure(case, row):
        clock[0] += case.batch_size

    saved = measured_in_turn(Ask(TINY, limit_s=50.0, began=0.0), [10, 20, 1], measure)
    assert [row.get("left_out") for row in saved[-1]] == [None, None, "no time left"]


def test_memory_grows_with_batches_and_with_what_is_kept():
    def at_least(case, other):
        return Case("train", *case).needs_no_less_than(Case("train", *other))

    assert at_least((8, "none"), (8, "dots")) and at_least((16, "dots"), (8, "dots"))
    assert not at_least((64, "full"), (8, "dots")) and not at_least((4, "none"), (8, "dots"))
    assert not at_least((16, "dots", "float32"), (8, "dots"))


def test_a_plan_above_the_devices_memory_is_not_run(monkeypatch):
    class Device:
        device_kind = "cpu"

        @staticmethod
        def memory_stats():
            return {"bytes_limit": 10, "peak_bytes_in_use": 3}

    monkeypatch.setattr(jax, "devices", lambda: [Device])
    program = jax.jit(lambda x: x @ x).lower(jax.ShapeDtypeStruct((64, 64), jnp.float32)).compile()
    row = {}
    with pytest.raises(MemoryError) as error:
        cases.check_plan(row, program, Ask(TINY))
    assert bench.out_of_memory(error.value)
    assert row["limit_bytes"] == 10 and row["peak_bytes_before"] == 3 and row["plan_peak_bytes"] >= 2 * 64 * 64 * 4


def test_a_step_is_simulated_at_published_and_at_measured_rates(monkeypatch):
    """A product of 64 x 64 matrices, by hand: 2 x 64^3 FLOPs, or three arrays over the memory."""
    program = jax.jit(lambda x, y: x @ y).lower(*[jax.ShapeDtypeStruct((64, 64), jnp.float32)] * 2).compile()
    machine = {"matmul": {"flops_per_s": 1e6}, "memory_bytes_per_s": 1e5}
    times = cases.simulated(program, Ask(TINY, so_far={"machine": machine}))
    assert times["published"] == {"not_read": "ValueError: no peak is published for cpu"}
    products, moved = 2 * 64**3 / 1e6, 3 * 64 * 64 * 4 / 1e5
    assert times["measured"] == pytest.approx(
        {"step_s": max(products, moved), "overlapped_s": max(products, moved), "in_turn_s": products + moved}
    )
    monkeypatch.setattr(cases, "peak_of", lambda kind: Peak(2e6, 4e5, None, None, ""))
    times = cases.simulated(program, Ask(TINY))
    assert times["published"]["step_s"] == pytest.approx(max(products / 2, moved / 4))
    assert "has not measured" in times["measured"]["not_read"]
    # What the reader does not know must not cost the measured time.
    monkeypatch.setattr(cases.schedule, "read", lambda text, open_trips: {}["unknown"])
    assert cases.simulated(program, Ask(TINY))["published"] == {"not_read": "KeyError: 'unknown'"}


def test_simulated_and_measured_steps_stand_side_by_side():
    row = {"case": "c", "samples_per_s": 1.0, "plan_peak_bytes": 2**30, "step_s": {"median": 0.5}, "simulated": {
        "published": {"step_s": 0.4, "overlapped_s": 0.3, "in_turn_s": 0.6}, "measured": {"not_read": "no rates"}}}  # fmt: skip
    (line,) = text.plan_lines({"letters": {"rows": [row]}})
    assert line == (
        "plan beside the device: c: peak 1 GiB by the plan, the device tells none; step 400 ms simulated at published peaks "
        "(bounds 300 and 600), 500 measured (0.80 of it)"
    )
    row["simulated"] = dict.fromkeys(("published", "measured"), {"not_read": "ValueError: a loop without an end"})
    (line,) = text.plan_lines({"letters": {"rows": [row]}})
    assert line.endswith("the device tells none; no step simulated: a loop without an end")
    row |= {"peak_bytes": 2**31, "peak_bytes_before": 2**31}
    assert "the device's is of an earlier case" in text.plan_lines({"lora": {"rows": [row]}})[0]


def test_a_tiny_model_runs_every_kind_of_case():
    """At another size, and none is left out: what a GPU runs is what a CPU has run."""

    def kinds(case):
        return dataclasses.replace(case, batch_size=0, rank=bool(case.rank))

    for stage, full in cases.CASES.items():
        small = cases.cases(Ask(TINY, stage=stage))
        assert {kinds(case) for case in small} == {kinds(case) for case in full}, stage
        assert {case.batch_size for case in small} == {cases.SMALL} and len(set(small)) == len(small)


def test_the_time_of_a_lent_machine_is_kept():
    """10 minutes a command, 15 in all: the stages that the figures are from cannot starve one another."""
    config = runpy.run_path(ROOT / "configs" / "bench_gpu.py")
    limits = {name: bench.STAGES[name].limit_s for name in config["STAGES"]}
    first = config["STAGES"][: config["STAGES"].index("trace") + 1]
    assert first == ("machine", "train_bf16", "torch", "letters", "trace")
    assert sum(limits[name] for name in first) == 450 <= config["TIME_S"] <= 580


def test_the_fastest_case_is_taken_up_again():
    rows = [
        {"samples_per_s": speed, "case": "", **dataclasses.asdict(Case("train", *case))}
        for speed, case in ((3.0, (16, "dots")), (5.0, (64, "full")), (4.0, (8, "none")))
    ]
    so_far = {"train_bf16": {"rows": [*rows, {"case": "x", "does_not_fit": "y"}]}}
    assert cases.best_case(Ask(TINY, so_far=so_far)) == Case("train", 64, "full")


def test_what_limits_a_step_is_in_order():
    kinds = {"matrix products": 6.0, "attention": 1.0, "other fusions": 2.0, "copies": 0.0, "idle": 1.0}
    trace = {"span_s": 10.0, "steps": 2, "kinds": {kind: {"seconds": s} for kind, s in kinds.items()}}
    lines = cases.limits(trace, {"matrix products": 12e12, "attention": 1e12}, 8e12)
    # 12 TFLOP at 8 TFLOP/s need 1.5 of the 3 seconds that they took, in a step of 5.
    assert "50.0% of the measured rate" in lines[0] and "30.0% of the step" in lines[0]
    assert [line.split(": ")[0] for line in lines[1:]] == [
        "lost to products below the measured rate", "lost to other fusions", "lost to attention", "lost to idle"
    ]  # fmt: skip
    assert "1500.0 ms a step, 30.0%" in lines[1] and cases.limits(trace, {}, None) == []


def test_stages_are_told_with_and_without_a_limit():
    stages = {
        "machine": {"status": "done", "seconds": 3.2, "limit_s": 60.0},
        "train": {"status": "done", "seconds": 58.1},
        "letters": {"status": "failed", "error": "no memory"},
    }
    assert text.stage_lines({"stages": stages}) == [
        "seconds of the stages: machine 3 of 60, train 58",
        "letters: failed (no memory)",
    ]


def test_conclusions_compare_like_with_like():
    def row(what, speed, size, dtype="bfloat16", remat="none", **more):
        return {"case": what, "what": what, "samples_per_s": speed, "batch_size": size, "param_dtype": dtype,
                "remat": remat, **more}  # fmt: skip

    result = {
        "stages": {"train_bf16": {"status": "done"}, "torch_fp32": {"status": "skipped"}},
        "train_bf16": {"rows": [
            row("train", 6.0, 8, plan_peak_bytes=90, peak_bytes=100, peak_bytes_before=50),
            row("train", 9.0, 64, remat="full"), {"case": "c", "does_not_fit": ""}]},
        "train_fp32": {"rows": [row("train", 5.0, 8, "float32")]},
        "letters": {"rows": [row("letters", 80.0, 8, num_new=0), row("letters", 40.0, 8, num_new=4),
                             row("letters", 100.0, 32, num_new=0)]},
        "torch": {"rows": [row("torch train", 3.0, 8), row("torch train", 4.0, 16, remat="full"),
                           row("torch generate", 8.0, 8), row("torch forward", 20.0, 8)]},
    }  # fmt: skip
    concluded = text.conclusions(result)
    assert concluded["ratios"] == {
        "train_best": 9 / 4, "train_same_batch": 2.0, "letters_vs_generate": 10.0, "letters_best_vs_generate": 12.5,
        "letters_vs_forward": 4.0, "letters_best_vs_forward": 5.0,
    }  # fmt: skip
    assert (
        "plan beside the device: train: peak 8.38e-08 GiB by the plan, 9.31e-08 the device's (0.900 of it)"
        in concluded["lines"]
    )
    assert "torch_fp32: skipped" in concluded["lines"]
    result["torch"]["rows"][0]["samples_per_s"] = 1.5
    assert text.conclusions(result)["ratios"]["train_same_batch"] == 4.0
    assert text.conclusions({"stages": {}}) == {"ratios": {}, "lines": []}


# ------------------------------------------------------------------ checks


def test_attention_is_compared_with_plain(tmp_path):
    assert bench.run_here("attention", Ask(TINY), tmp_path / "out.json") == 0
    results = in_file(tmp_path / "out.json")["results"]
    assert results["auto"]["uses"] == "plain"
    for name, error in results["plain"]["relative_error"].items():
        assert 1e-4 < error < 2e-2, name  # bfloat16 has 8 bits: about 4e-3


def test_numerics_that_differ_are_named(tmp_path, monkeypatch):
    def ten_steps(device, dtype, precision):
        off = {"float32": 1e-3 if precision is None else 0.0, "bfloat16": float("nan")}[dtype]
        return {"losses": [1.0, 0.5 + off], "grad_norms": [2.0], "weights": [1.0, -3.0]}

    monkeypatch.setattr(checks, "ten_steps", ten_steps)
    assert bench.run_here("numerics", Ask(TINY), tmp_path / "out.json") == 1
    result = in_file(tmp_path / "out.json")
    assert result["rows"]["float32"]["losses"] == 0.0
    assert result["rows"]["float32, default products"]["losses"] == pytest.approx(1e-3)
    # What is shown alone is not judged; a NaN is.
    assert result["error"].startswith("RuntimeError: bfloat16: losses nan")


@pytest.mark.long
def test_the_parity_stage_names_the_model_that_is_wrong(tmp_path, monkeypatch):
    """The comparison itself is tested beside its code; here is what it is given, and what becomes of its answer."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from medcg_jax.families.weights.convert import read_config
    from medcg_jax.parity import verb as parity

    def compare(src):
        ok = read_config(src).text.num_kv_heads == 2
        return {"rows": [{"stage": "logits", "difference": 0.5, "scale": 2.0, "ok": ok}], "ok": ok}

    monkeypatch.setattr(parity, "parity", compare)
    assert bench.run_here("parity", Ask(TINY), tmp_path / "out.json") == 1
    result = in_file(tmp_path / "out.json")
    assert [model["ok"] for model in result["models"].values()] == [True, False]
    assert "grouped_heads: logits" in result["error"] and "own_heads" not in result["error"]


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
MISSING = (
    "grain", "ml_collections", "tensorflow_datasets", "torch", "transformers", "tokenizers", "PIL", "qwix", "pytest"
)  # fmt: skip


@pytest.mark.parametrize(
    "stages", ["machine,torch,parity", pytest.param("machine,train_fp32,letters,trace", marks=pytest.mark.long)]
)
def test_a_bare_machine_runs_the_command(tmp_path, stages):
    """One process for each stage, with nothing but jax, flax and optax to import."""
    (tmp_path / "sitecustomize.py").write_text(BLOCK.format(packages=MISSING))
    here = {"PYTHONPATH": str(tmp_path), "PYTHON": sys.executable, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    argv = ["bash", "launch/bench_gpu.sh", str(tmp_path / "out.json"), "--model=llava15_tiny", "--batches=2",
            "--time=3000", f"--stages={stages}"]  # fmt: skip
    done = subprocess.run(
        argv, cwd=ROOT, env=os.environ | here, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=900,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = in_file(tmp_path / "out.json")
    machine = result["machine"]
    assert machine["platform"] == "cpu" and {"jax", "flax", "optax", "python"} <= set(result["versions"])
    rates = [row["flops_per_s"] for row in machine["matmul"]["by_size"].values()]
    assert machine["matmul"]["flops_per_s"] == max(rates) > 0 and machine["memory_bytes_per_s"] > 0
    assert "== what it comes to" in done.stdout
    if "torch" in stages:
        assert result["stages"]["torch"]["status"] == result["stages"]["parity"]["status"] == "skipped"
        assert "torch" in result["stages"]["torch"]["why"]
        return
    (row,) = result["train_fp32"]["rows"]
    assert row["mfu_of_measured"] > 0 and row["plan_peak_bytes"] > 0 and row["batch"]["size"] == 2
    assert [row["num_new"] for row in result["letters"]["rows"]] == [0, 4]
    assert all(row["samples_per_s"] > 0 for row in result["letters"]["rows"])
    assert result["trace"]["trace"]["steps"] == 2
    assert result["trace"]["trace"]["kinds"]["matrix products"]["seconds"] > 0
    assert any("lost to" in line for line in result["trace"]["limits"])


@pytest.mark.long
def test_the_whole_script_runs_on_a_cpu(tmp_path):
    """Every stage, by the code of a GPU and at a tiny size, and a summary that says what was measured where."""
    argv = ["bash", "launch/bench_gpu.sh", str(tmp_path / "out.json"), "--model=llava15_tiny", "--time=20000"]
    here = {"PYTHON": sys.executable, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(
        argv, cwd=ROOT, env=os.environ | here, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=1800,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = in_file(tmp_path / "out.json")
    stages = runpy.run_path(ROOT / "configs" / "bench_gpu.py")["STAGES"]
    status = {name: result["stages"][name]["status"] for name in stages}
    has_torch = importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")
    of_torch = dict.fromkeys(("torch", "torch_fp32", "parity"), "done" if has_torch else "skipped")
    assert status == dict.fromkeys(stages, "done") | of_torch
    for stage in cases.CASES:
        rows = result.get(stage, {}).get("rows", [])
        measured = [row["case"] for row in rows if row.get("samples_per_s")]
        assert measured == ([case.name for case in cases.cases(Ask(TINY, stage=stage))] if rows else [])
        assert rows or not has_torch
    lines = result["conclusions"]["lines"]
    for row in result["train_bf16"]["rows"]:
        simulated = row["simulated"]["measured"]
        assert 0 < simulated["overlapped_s"] <= simulated["step_s"] <= simulated["in_turn_s"]
        assert any(line.startswith(f"plan beside the device: {row['case']}: peak") for line in lines)
    assert result["date"][:10] in lines[0] and "cpu" in lines[0] and f"jax {jax.__version__}" in lines[1]
    assert "no figure of a GPU" in lines[2] and lines[-1].startswith("seconds of the stages: machine")
    ratios = ("train_best", "train_same_batch", "letters_vs_generate", "letters_vs_forward") if has_torch else ()
    assert set(ratios) <= set(result["conclusions"]["ratios"])
    assert "\n".join(f"   {line}" for line in lines) in done.stdout


def test_a_stage_has_the_allocator_of_every_verb(tmp_path, monkeypatch):
    """Before anything of JAX is made: a step on a CPU takes a third longer without."""
    calls = []
    monkeypatch.setattr(command, "keep_freed_memory", lambda: calls.append("allocator"))
    monkeypatch.setattr(bench, "run_here", lambda *_: calls.append("stage") or 0)
    (tmp_path / "ask").write_bytes(pickle.dumps(Ask(RunConfig())))
    assert command.main(["--stage=train", f"--ask={tmp_path / 'ask'}", f"--json={tmp_path / 'out.json'}"]) == 0
    assert calls == ["allocator", "stage"]
