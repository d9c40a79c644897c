"""`medcg bench`: what a run's stages cost here, and the training and evaluation of the PyTorch reference beside them.

Weights are random, records the run's own. Both sides take turns (a second of one, a second of the other, again and
again) in one process, so that what else runs on the machine slows both; what is compared are ratios of such pairs.
"""

import gc
import os
import resource
from collections.abc import Callable, Sequence

import jax
import numpy as np

from medcg_jax.bench import host as bench_host
from medcg_jax.bench import text as bench_text
from medcg_jax.bench.clock import Spent, matrix_rate, now, ratio, times, turns
from medcg_jax.bench.evaluation import Evaluation, needed_flops
from medcg_jax.bench.rows import Rows, loader_rows, open_rows, question_rows, training_batch
from medcg_jax.bench.steps import Port, about_here, describe, memory, rates, step_flops
from medcg_jax.config import MODELS, ConfigError, RunConfig, RunError
from medcg_jax.families import build

STAGES = ("train", "eval", "generate", "loader", "convert", "startup")
STARTUP_LIMIT_S = 900.0
# Rows of a batch when HF answers, as `bench_torch.EVAL_BATCH`, which cannot be imported without PyTorch.
EVAL_MULTIPLE = 8


def bench(
    run: RunConfig,
    *,
    stages: Sequence[str] = STAGES,
    against: str = "",
    repeats: int = 5,
    steps_per_repeat: int = 0,
    matrix_sizes: Sequence[int] = (),
    clock: Callable[[], Spent] = now,
) -> dict:
    """What `medcg bench` prints and writes: about the machine, one section for each stage, and `ratios`.

    A ratio is the port's samples per CPU-second over the reference's on a CPU, and per second elsewhere (`ratio`):
    "train_vs_eager" and "train_vs_compile"; "eval_vs_generate" and "eval_vs_forward" of letters; with the stage
    "generate" also "generate_vs_generate". One that could not be measured is missing, and `notes` says why.

    stages: of `STAGES`. against: "torch" adds the reference to training, evaluation and generation.
    steps_per_repeat: of every runner; 0 takes as many as last about a second.
    matrix_sizes: as `matrix_rate`'s sizes. clock: what time and CPU time are read from.

    Raises:
      ConfigError: an unknown stage, another model than LLaVA against torch, a batch that does not fit the mesh, or the
        reference's packages are not installed.
      DataError: as `open_rows`.
      RunError: the stage startup failed, or both sides do not do the same work.
    """
    check(run, stages, against)
    found: dict = {"stages": [stage for stage in STAGES if stage in stages], "notes": []}
    if "startup" in stages:
        # First: until now this process holds no device.
        found["startup"] = bench_host.startup(run, STARTUP_LIMIT_S)
    if against:
        # Else JAX takes most of a GPU's memory at once.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        from medcg_jax.bench import pytorch  # says what is missing, before anything is measured

        found["attention"] = pytorch.attentions()
    rows = open_rows(run)
    model, setup = run.model, rows.setup
    found |= about_here() | {
        "name": run.name, "model": model.name, "mesh": dict(setup.mesh.shape), "compute_dtype": model.compute_dtype,
        "trainable": list(model.trainable), "remat": model.remat,
        "accumulation_steps": run.train.accumulation_steps, "against": against, "ratios": {},
    }  # fmt: skip
    if rows.note:
        found["notes"].append(rows.note)
    by = "cpu" if jax.default_backend() == "cpu" else "wall"
    measure = Measure(repeats, steps_per_repeat, clock, by)
    sections: dict[str, Callable[[], dict]] = {
        "train": lambda: training(rows, against, measure, matrix_rate(model.compute_dtype, sizes=matrix_sizes)),
        "answers": lambda: answers(rows, stages, against, measure),
        "loader": lambda: {"loader": bench_host.loader(setup, loader_rows(setup), repeats)},
        "convert": lambda: {"convert": bench_host.conversion(setup, min(repeats, 3))},
    }
    for name, section in sections.items():
        if name in stages or (name == "answers" and {"eval", "generate"} & set(stages)):
            made = section()
            found["ratios"] |= made.pop("ratios", {})
            found["notes"] += made.pop("notes", [])
            found |= made
            gc.collect()  # weights of a stage are not the next one's burden
            if against:
                pytorch.free()
    found["memory"] = {
        "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "device_peak_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
    }
    bench_text.show(found)
    return found


def check(run: RunConfig, stages: Sequence[str], against: str) -> None:
    """Raises ConfigError where `bench` is asked for what it has not."""
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown or not stages:
        raise ConfigError(f"stages={','.join(unknown)}: {', '.join(STAGES)} are accepted")
    if against not in ("", "torch"):
        raise ConfigError(f"against={against!r}: 'torch' is accepted, or nothing")
    if against and MODELS[run.model.name] != "llava":
        known = ", ".join(name for name, family in MODELS.items() if family == "llava")
        raise ConfigError(f"--against=torch with model.name={run.model.name}: LLaVA alone is accepted ({known})")
    if against and not {"train", "eval", "generate"} & set(stages):
        raise ConfigError(f"--against=torch with stages={','.join(stages)}: train, eval or generate is needed too")


class Measure:
    """How runners are measured: `turns` with these settings, and ratios by `by` ("cpu" or "wall")."""

    def __init__(self, repeats: int, steps: int, clock: Callable[[], Spent], by: str):
        self.repeats, self.steps, self.clock, self.by = repeats, steps, clock, by

    def turns(self, runners: dict[str, Callable[[int], object]]) -> dict[str, list[Spent]]:
        return turns(runners, self.repeats, self.steps, clock=self.clock)

    def ratios(self, spent: dict[str, list[Spent]], pairs: dict[str, tuple[str, str]]) -> dict:
        """{name: ratio of (ours, theirs)} of the pairs that were both measured."""
        return {
            name: ratio(spent[ours], spent[theirs], by=self.by)
            for name, (ours, theirs) in pairs.items()
            if ours in spent and theirs in spent
        }


TRAIN_PAIRS = {
    "train_vs_eager": ("port", "torch eager"),
    "train_vs_compile": ("port", "torch compile"),
    "train_vs_flash": ("port", "torch eager flash"),
}
ANSWER_PAIRS = {
    "eval_vs_generate": ("port letters", "torch generate"),
    "eval_vs_forward": ("port letters", "torch forward"),
    "generate_vs_generate": ("port generate", "torch generate"),
}


def training(rows: Rows, against: str, measure: Measure, matrix: dict) -> dict:
    """{"train", "matrix", "ratios", "notes"}: the training step, alone and beside the reference's."""
    setup, run, notes = rows.setup, rows.setup.run, []
    batch = training_batch(rows)
    port = Port(setup.model, setup.mesh, run.train, run.model, loss_fn=setup.loss)
    runners: dict[str, Callable[[int], object]] = {"port": port.seconds}
    executed = None
    if against:
        from medcg_jax.bench import pytorch

        reference = pytorch.Reference(setup.model, batch, run.train, run.model)
        check_alike(work_of(port, batch), reference.work())
    compiled = port.compile(batch)
    if against:
        length = reference.inputs["input_ids"].shape[1]
        executed = pytorch.executed(setup.model, len(batch["tokens"]), length, run.model.trainable)
        runners["torch eager"] = reference.seconds
        try:
            reference.compiled_seconds(1)
            runners["torch compile"] = reference.compiled_seconds
        except Exception as error:  # torch's own classes: no compiler, an operator it does not know
            notes.append(f"torch.compile failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        if "flash_attention_2" in pytorch.attentions():
            flash = pytorch.Reference(setup.model, batch, run.train, run.model, attention="flash_attention_2")
            runners["torch eager flash"] = flash.seconds
    spent = measure.turns(runners)
    needed = step_flops(setup.model, batch, run.model.trainable)
    found = {name: figures(taken, batch, needed, matrix) for name, taken in spent.items()}
    section = {"batch": describe(batch), "flops": needed, "compile": compiled, "runners": found}
    if executed:
        section["torch_length"] = length
        for name in found:
            if name != "port":
                found[name]["executed_flops"] = executed
                found[name]["peak_bytes"] = pytorch.peak_bytes()
    found["port"] |= {"peak_bytes": memory(port.compiled.program)["peak_bytes"], "loss": port.loss}
    if not rows.note:
        steps = max(2, min(50, round(2.0 / found["port"]["step_s"]["median"])))
        section["data_wait"] = bench_host.data_wait(port, setup, loader_rows(setup)["decoded when drawn"], steps)
    return {"train": section, "matrix": matrix, "ratios": measure.ratios(spent, TRAIN_PAIRS), "notes": notes}


def figures(taken: list[Spent], batch: dict, needed: dict | None, matrix: dict) -> dict:
    """`times` and `rates` of a step; and its MFU against the matrix product measured in this run, by wall time
    ("mfu_matrix", both conventions) and by CPU time ("mfu_matrix_cpu", which other processes do not lower)."""
    row = times(taken, len(batch["tokens"])) | rates([one.wall_s for one in taken], batch, needed)
    if needed is None:
        return row
    # Devices that a CPU simulates share its cores.
    devices = 1 if jax.default_backend() == "cpu" else jax.device_count()
    wall, cpu = row["step_s"]["median"], row["cpu_s"]["median"]
    return row | {
        "mfu_matrix": needed["full"] / wall / (devices * matrix["flops_per_s"]),
        "mfu_matrix_causal": needed["causal"] / wall / (devices * matrix["flops_per_s"]),
        "mfu_matrix_cpu": needed["full"] / max(cpu, 1e-9) / matrix["flops_per_cpu_s"],
    }


def work_of(port: Port, batch: dict) -> dict[str, int]:
    """As `bench_torch.Reference.work`, of the port."""
    return {
        "rows": len(batch["tokens"]),
        "tokens": int((batch["segment_ids"] != 0).sum()),
        "targets": int(batch["target_weights"].sum()),
        "trained": build.num_params(port.abstract[0]),
    }


def check_alike(port: dict[str, int], reference: dict[str, int]) -> None:
    """Raises RunError where the sides do not have the same rows, tokens, supervised tokens and trained parameters."""
    different = [f"{name} {port[name]} against {reference[name]}" for name in port if port[name] != reference[name]]
    if different:
        raise RunError(f"port and reference do not do the same work: {', '.join(different)}")


def answers(rows: Rows, stages: Sequence[str], against: str, measure: Measure) -> dict:
    """{"answers", "ratios"}: letters of test questions without generation, generation, and the reference's of both."""
    setup, run = rows.setup, rows.setup.run
    encoded, num_new = question_rows(rows, EVAL_MULTIPLE), run.eval.max_new_tokens
    with jax.set_mesh(setup.mesh):
        graphdef, params = build.create(setup.model, setup.mesh, seed=0)
    runners: dict[str, Callable[[int], object]] = {}
    needed = {}
    if "eval" in stages:
        runners["port letters"] = Evaluation(setup, graphdef, params, encoded, num_new=0).run
        needed["port letters"] = needed_flops(setup, encoded, num_new=0)
    if "generate" in stages:
        runners["port generate"] = Evaluation(setup, graphdef, params, encoded, num_new=num_new).run
        needed["port generate"] = needed_flops(setup, encoded, num_new=num_new)
    asked = None
    if against:
        from medcg_jax.bench import pytorch

        questions = encoded.rows(np.arange(len(encoded)))[0]
        asked = pytorch.Answers(setup.model, [questions], run.model, num_new=num_new)
        check_alike({"rows": len(encoded)}, {"rows": asked.num_rows})
        if "eval" in stages:
            runners["torch forward"] = asked.forward
        runners["torch generate"] = asked.generate
    spent = measure.turns(runners)
    found = {name: times(taken, len(encoded)) for name, taken in spent.items()}
    for name, flops in needed.items():
        found[name] |= {"flops": flops, "tflops_per_s": flops / found[name]["step_s"]["median"] / 1e12}
    section = {
        "rows": len(encoded), "length": encoded.arrays["tokens"].shape[1],
        "real_tokens": int(encoded.arrays["length"].sum()), "batch_size": run.eval.batch_size,
        "max_new_tokens": num_new, "runners": found,
    }  # fmt: skip
    if asked:
        section["torch_batch_size"] = pytorch.EVAL_BATCH
        section["torch_generated_tokens"] = asked.generated.shape[1]
    return {"answers": section, "ratios": measure.ratios(spent, ANSWER_PAIRS)}
