"""`medcg bench`: stages, each in its own process, merged into one result. No stage can lose the figures of another.

    medcg bench --config=configs/bench_tiny.py --against=torch
    python -m medcg_jax.bench --json=FILE     # configs/bench_gpu.py; needs no ml-collections (`__main__`)

A stage writes each figure to its file at once, and the result has it within a second. Two sides that are compared take
turns in one process, so that other load on the machine slows both; ratios are of such pairs. This process never holds a
device.
"""

import importlib
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from medcg_jax.config import MODELS, ConfigError, ModelConfig, RunConfig, RunError, has_any_size, model_title
from medcg_jax.data.records import DataError
from medcg_jax.families.weights.hub import resolve
from medcg_jax.files import write_whole

ROOT = Path(__file__).resolve().parents[2]
REFUSALS = {error.__name__: error for error in (ConfigError, DataError, RunError)}


@dataclass(frozen=True)
class Stage:
    """function: "module.name" in this package, called as `function(ask, save)`; it calls `save(key=value)` as soon as a
    value is known. limit_s: in `python -m medcg_jax.bench`. whole_device: the stage needs more than JAX's default of
    three quarters of a GPU's memory. no_device: the stage must not take a device.
    """

    function: str
    about: str
    limit_s: float = 120.0
    whole_device: bool = False
    no_device: bool = False


STAGES = {
    "train": Stage("stages.train", "the run's training step"),
    "answers": Stage("stages.answers", "option letters of test questions, and generation"),
    "loader": Stage("stages.loader", "batches drained from the loader"),
    "convert": Stage("stages.convert", "conversion of weights, both ways"),
    "startup": Stage("stages.startup", "from the start of a process to its first step", 900.0, no_device=True),
    "machine": Stage("checks.machine", "versions, memory, the rate of bfloat16 matrix products and of memory", 60.0),
    "train_bf16": Stage(
        "cases.train", "full fine-tuning, parameters and moments in bfloat16", 170.0, whole_device=True
    ),
    "torch": Stage("cases.torch", "the same by Hugging Face transformers: training steps, forward, generate", 110.0),
    "letters": Stage("cases.letters", "option letters by their likelihood, and generation", 60.0, whole_device=True),
    "trace": Stage("cases.trace", "a trace of the fastest step, and where its time goes", 50.0, whole_device=True),
    "train_fp32": Stage("cases.train", "full fine-tuning with float32 weights and moments", 110.0, whole_device=True),
    "lora": Stage("cases.train", "adapters of rank 128 on a base in bfloat16, int8 and nf4", 80.0, whole_device=True),
    "attention": Stage("checks.attention", "the attention this platform gets, against plain attention", 50.0),
    "numerics": Stage("checks.numerics", "the tiny model on this device and on the CPU", 80.0),
    "torch_fp32": Stage("cases.torch", "transformers with float32 weights and autocast", 80.0),
    "parity": Stage("checks.parity", "two tiny models on this device, against PyTorch", 200.0),
}
# Families of which `pytorch_families` has a model in PyTorch.
COMPARED = ("llava", "qwen2_vl", "mllama", "minigpt_v2", "next_chat")
# One process measures both, since they are compared.
ANSWERS = ("eval", "generate")
# The stages of `medcg bench` where none are named.
DEFAULT = ("train", *ANSWERS, "loader", "convert", "startup")
KNOWN = (*DEFAULT, *(name for name in STAGES if name not in ("answers", *DEFAULT)))


@dataclass(frozen=True)
class Ask:
    """The request to a stage.

    stages: all requested stages, by the user's names. against: "torch" measures the reference beside the port.
    repeats, steps: of `clock.turns`. matrix_sizes: of `clock.matrix_rate`. batches: replace the sizes of `cases`.
    stage: the stage's name. limit_s: its seconds from `began` on. scratch: a folder for all stages. so_far: the result
    until now.
    """

    run: RunConfig
    stages: tuple[str, ...] = DEFAULT
    against: str = ""
    repeats: int = 5
    steps: int = 0
    matrix_sizes: tuple = ()
    batches: tuple[int, ...] = ()
    stage: str = ""
    limit_s: float = math.inf
    scratch: Path = Path(".")
    so_far: dict = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    def left_s(self) -> float:
        return self.limit_s - (time.monotonic() - self.began)

    def matrix_rate(self) -> float | None:
        """FLOP/s of the best bfloat16 product measured by the stage `machine` of this bench."""
        return self.so_far.get("machine", {}).get("matmul", {}).get("flops_per_s")


def bench(
    run: RunConfig,
    *,
    stages: Sequence[str] = DEFAULT,
    against: str = "",
    out: Path | None = None,
    time_s: float = math.inf,
    scale: float = math.inf,
    earlier: dict | None = None,
    **options,
) -> dict:
    """Runs the stages and prints the result: about the machine, a section for each stage, `ratios`, `conclusions`.

    A ratio is the port's samples per CPU-second on a CPU, per second elsewhere, over the reference's (`clock.ratio`):
    "train_vs_eager" and "train_vs_compile"; "eval_vs_generate" and "eval_vs_forward" of letters; with the stage
    "generate" also "generate_vs_generate". A ratio that could not be measured is missing, and `notes` says why.

    stages: of `KNOWN`, in running order. against, options: fields of `Ask`.
    out: a file that always has the result so far; the error of a failed stage is then written there and not raised.
    time_s: seconds for all stages. scale: factor of the stages' limits. earlier: a result whose other stages are kept.

    Raises:
      ConfigError: an unknown stage, a model that the stages or PyTorch do not have, a batch that does not fit the mesh,
        a checkpoint that is not there, or the reference's packages are not installed.
      DataError: the run's records cannot be read.
      RunError: a stage failed, or the two sides do different work.
      RuntimeError: a stage does not fit in the device's memory.
    """
    from medcg_jax.bench import text

    if has_any_size(run.model.name):
        from medcg_jax.train.start import with_checkpoint  # it imports JAX

        run = with_checkpoint(run)
    check(run, stages, against)
    result = dict(earlier or {})
    result |= {
        "name": run.name, "model": model_title(run.model.name, run.model.checkpoint), "compute_dtype": run.model.compute_dtype,
        "trainable": list(run.model.trainable), "remat": run.model.remat,
        "accumulation_steps": run.train.accumulation_steps, "against": against,
    }  # fmt: skip
    for key, empty in (("stages", {}), ("ratios", {}), ("notes", []), ("memory", {})):
        result.setdefault(key, empty)
    ends = time.monotonic() + time_s
    # SIGTERM ends the running stage too, at the next poll: an exception inside Popen.wait may leave its lock held.
    signals: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: signals.append(number))
    try:
        with tempfile.TemporaryDirectory() as scratch:
            for name in dict.fromkeys("answers" if stage in ANSWERS else stage for stage in stages):
                limit = min(STAGES[name].limit_s * scale, ends - time.monotonic())
                ask = Ask(run, tuple(stages), against, limit_s=limit, scratch=Path(scratch), so_far=result, **options)
                result = run_and_merge(name, ask, result, out, signals)
    finally:
        signal.signal(signal.SIGTERM, before)
    result["conclusions"] = text.conclusions(result)
    if out:
        write_json(out, result)
    print(text.text_of(result), flush=True)
    return result


def check(run: RunConfig, stages: Sequence[str], against: str) -> None:
    """Raises ConfigError for unknown stages or sides, or a model that they do not cover."""
    unknown = [stage for stage in stages if stage not in KNOWN]
    if unknown or not stages:
        raise ConfigError(f"stages={','.join(unknown)}: expected some of {', '.join(KNOWN)}")
    if against not in ("", "torch"):
        raise ConfigError(f"against={against!r}: expected 'torch', or nothing")
    check_checkpoint(run.model)
    family = MODELS[run.model.name]
    special = [name for name in stages if name not in (*DEFAULT, "machine")]
    if special and family != "llava":
        known = ", ".join(name for name, family in MODELS.items() if family == "llava")
        raise ConfigError(f"{', '.join(special)} with model.name={run.model.name}: expected a LLaVA ({known})")
    if against and family not in COMPARED:
        raise ConfigError(
            f"--against=torch with model.name={run.model.name}: {family} has no model in bench/pytorch_families.py, and "
            f"is not compared; expected one of {', '.join(COMPARED)}"
        )
    if against and run.model.base_dtype != "float32":
        raise ConfigError(
            f"--against=torch with model.base_dtype={run.model.base_dtype}: PyTorch's frozen weights are float32 here; "
            "expected float32"
        )
    if against and not {"train", *ANSWERS} & set(stages):
        raise ConfigError(f"--against=torch with stages={','.join(stages)}: train, eval or generate is needed too")


def check_checkpoint(model: ModelConfig) -> None:
    """Raises ConfigError if `model` names a checkpoint that is not there: what it states would not be what is measured."""
    if model.checkpoint and not resolve(model.checkpoint, weights=False).is_dir():
        raise ConfigError(
            f"model.checkpoint={model.checkpoint}: there is no checkpoint; for {model.name} with random weights leave it "
            "empty (--config.model.checkpoint=)"
        )


def run_and_merge(name: str, ask: Ask, result: dict, out: Path | None, signals: list[int]) -> dict:
    """`result` with the section of the stage, which is run; `out` gets it as it grows.

    Raises:
      what `bench` raises, where the stage fails and `out` is None; SystemExit after a signal.
    """
    print(f"== {name}: {STAGES[name].about}", flush=True)
    file, merged = ask.scratch / f"{name}.json", result

    def keep(status: str, seconds: float) -> None:
        nonlocal merged
        about = {"status": status, "seconds": round(seconds, 1)}
        if math.isfinite(ask.limit_s):
            about["limit_s"] = round(ask.limit_s, 1)
        merged = merge(result, name, about, read_json(file))
        if out:
            write_json(out, merged)

    def poll(seconds: float) -> None:
        if file.exists():
            keep("running", seconds)
        if signals:
            sys.exit(128 + signals[0])

    status, seconds = "no time left", 0.0
    if ask.limit_s >= 5:
        keep("running", 0.0)
        status, seconds = run_stage(name, ask, file, poll)
    keep(status, seconds)
    stage = merged["stages"][name]
    if out:
        print("\n".join(f"   {text}" for text in (stage.get("error"), f"{stage['status']} after {seconds:.0f} s") if text),
              flush=True)  # fmt: skip
    elif stage["status"] not in ("done", "skipped"):
        raise failure(name, stage)
    return merged


def failure(name: str, stage: dict) -> Exception:
    """The error of a failed stage, to be raised in this process."""
    kind, _, message = stage.get("error", "").partition(": ")
    if kind in REFUSALS:
        return REFUSALS[kind](message)
    if out_of_memory(message):
        return RuntimeError(message)
    return RunError(f"stage {name}: {stage.get('error') or stage['status']}")


def merge(result: dict, name: str, status: dict, values: dict) -> dict:
    """`result` with a stage's saved values: its section, and those outside of sections (ratios, notes, about, memory)."""
    section = dict(values)
    outcome = {key: section.pop(key) for key in ("status", "error", "why") if key in section}
    about, memory = section.pop("about", {}), section.pop("memory", {})
    ratios, notes = section.pop("ratios", {}), section.pop("notes", [])
    most = {key: max(filter(None, (result["memory"].get(key), value)), default=None) for key, value in memory.items()}
    return result | about | {
        "stages": result["stages"] | {name: status | outcome},
        "ratios": result["ratios"] | ratios,
        "notes": list(dict.fromkeys([*result["notes"], *notes])),
        "memory": result["memory"] | most,
    } | ({name: section} if section else {})  # fmt: skip


# ------------------------------------------------------------------ a stage's process


def run_stage(
    name: str, ask: Ask, file: Path, poll: Callable[[float], object] = lambda seconds: None, env: dict | None = None
) -> tuple[str, float]:
    """(status, seconds) of a stage in its own process group, which is killed at the time limit.

    file: where the stage saves. poll: called every second with the seconds so far. env: more variables.
    """
    began = time.monotonic()
    asked = file.with_suffix(".pickle")
    asked.write_bytes(pickle.dumps(replace(ask, began=began)))
    command = [sys.executable, "-m", "medcg_jax.bench", f"--stage={name}", f"--ask={asked}", f"--json={file}"]
    process = subprocess.Popen(
        command, env=environment(name, ask) | (env or {}), stdin=subprocess.DEVNULL, start_new_session=True
    )
    status = f"stopped at its limit of {ask.limit_s:.0f} s"
    try:
        while (seconds := time.monotonic() - began) < ask.limit_s:
            try:
                code = process.wait(timeout=min(1.0, ask.limit_s - seconds))
                status = "done" if code == 0 else f"failed with exit status {code}"
                break
            except subprocess.TimeoutExpired:
                poll(time.monotonic() - began)
    finally:
        # Even where the stage has ended: its child processes must not hold the device's memory.
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
    return status, time.monotonic() - began


def environment(name: str, ask: Ask) -> dict[str, str]:
    """Environment variables of a stage's process; the user's own have precedence."""
    defaults, stage = {"TF_CPP_MIN_LOG_LEVEL": "2"}, STAGES.get(name)
    if stage and stage.whole_device:
        # Stages share their compiled programs.
        defaults |= {
            "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
            "JAX_COMPILATION_CACHE_DIR": str(ask.scratch / "compiled"),
        }
    elif ask.against or stage and not stage.function.startswith("stages."):
        defaults["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return defaults | os.environ | {"PYTHONPATH": path}


def run_here(name: str, ask: Ask, file: Path) -> int:
    """Runs a stage in this process, writes its values or its error to `file`, and returns the exit status."""
    saved: dict = {}

    def save(**values) -> None:
        saved.update(values)
        write_json(file, saved)

    stage = STAGES.get(name, Stage(f"stages.{name}", ""))
    try:
        module, function = stage.function.split(".")
        getattr(importlib.import_module(f"medcg_jax.bench.{module}"), function)(replace(ask, stage=name), save)
    except Exception as error:
        if type(error).__name__ not in REFUSALS:
            traceback.print_exc()
        save(error=f"{type(error).__name__}: {short(error)}")
        return 1
    finally:
        if not stage.no_device:
            save(memory=most_memory())
    return 0


def most_memory() -> dict:
    import resource

    import jax

    return {
        "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "device_peak_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
    }


def out_of_memory(error: BaseException | str) -> bool:
    return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()


def short(error: BaseException | str, characters: int = 400) -> str:
    return " ".join(str(error).split())[:characters]


def read_json(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def write_json(path: Path, value: dict) -> None:
    write_whole(path, json.dumps(value, indent=1) + "\n")
