"""Stages that measure several cases on one device with random rows: training, transformers, letters; and a trace of the
fastest step. They need only jax, flax and optax.

A stage is `stage(ask, save)`, in a process of its own (`run`).
"""

import dataclasses
import gc
import math
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from medcg_jax.bench import trace_read
from medcg_jax.bench.checks import lacks_torch
from medcg_jax.bench.clock import seconds_of, spread
from medcg_jax.bench.run import Ask, out_of_memory, short
from medcg_jax.bench.steps import HF_BATCH, Port, architecture, describe, example_batch, peak_bytes, rates, step_flops
from medcg_jax.bench.text import rate_text
from medcg_jax.chips import peak_of
from medcg_jax.config import ModelConfig, TrainConfig
from medcg_jax.eval.letters import make_evaluator
from medcg_jax.families import build, flops
from medcg_jax.mesh import batch_sharding, make_mesh, put_batch
from medcg_jax.plan import schedule
from medcg_jax.plan.hlo import attention_in
from medcg_jax.plan.simulate import Machine, simulate

REPEATS = 4
FULL = ("projector", "decoder")
# From the most memory to the most recomputation.
REMATS = ("none", "dots", "full")
NUM_NEW = 4  # generated tokens, of `EvalConfig.max_new_tokens`
NUM_OPTIONS = 4
TRACED_STEPS = 2
SMALL = 4


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    what: "train" of this port; "torch train", "torch compiled", "torch forward" or "torch generate" of transformers;
      "letters" of this port, which also generates `num_new` tokens.
    param_dtype: of trained parameters and AdamW's moments between steps. rank: of adapters, trained in place of the
      decoder; 0: none. base_dtype: of the frozen weights under adapters.
    """

    what: str
    batch_size: int
    remat: str = "none"
    param_dtype: str = "bfloat16"
    rank: int = 0
    base_dtype: str = "float32"
    num_new: int = 0

    @property
    def name(self) -> str:
        if self.what == "letters":
            return f"letters{f' and {self.num_new} tokens' * bool(self.num_new)}, batch {self.batch_size}"
        state = f"LoRA {self.rank} on {self.base_dtype}" if self.rank else f"{self.param_dtype} state"
        name = f"{state}, batch {self.batch_size}, remat {self.remat}"
        return name if self.what == "train" else f"{self.what}, {name}"

    def settings(self, ask: Ask) -> tuple[ModelConfig, TrainConfig]:
        """The configurations of the step."""
        model = dataclasses.replace(
            ask.run.model, remat=self.remat, compute_dtype="bfloat16", lora_rank=self.rank or ModelConfig.lora_rank,
            trainable=("projector", "lora") if self.rank else FULL, base_dtype=self.base_dtype,
            # One layer at a time, the default on accelerators.
            scan_unroll=1 if ask.run.model.name in build.TINY else ask.run.model.scan_unroll,
        )  # fmt: skip
        return model, dataclasses.replace(ask.run.train, param_dtype=self.param_dtype, moment_dtype=self.param_dtype)

    def needs_no_less_than(self, other: "Case") -> bool:
        """Whether this case needs at least as much memory as `other`."""
        same = ("what", "param_dtype", "rank", "base_dtype")
        return (
            all(getattr(self, name) == getattr(other, name) for name in same)
            and self.batch_size >= other.batch_size
            and self.num_new >= other.num_new
            and REMATS.index(self.remat) <= REMATS.index(other.remat)
        )


# Sizes up to the limit of one H200 (133 GiB at 95 %) and beyond. Peaks by XLA's plan in GiB, with a bfloat16 state: 82
# at dots/16, 112 at dots/32, 127 at dots/40, 97 at none/8, 119 at none/12; with a float32 state: 111 at full/32, 109 at
# dots/4.
CASES = {
    "train_bf16": (
        Case("train", 16, "dots"), Case("train", 8, "none"), Case("train", 32, "dots"), Case("train", 12, "none"), Case("train", 64, "full"), Case("train", 40, "dots"),
        Case("train", 128, "full"), Case("train", 16, "none"), Case("train", 48, "dots"),
    ),
    "train_fp32": (
        Case("train", 32, "full", "float32"), Case("train", 8, "dots", "float32"), Case("train", 64, "full", "float32"),
        Case("train", 2, "none", "float32"), Case("train", 12, "dots", "float32"), Case("train", 96, "full", "float32"),
    ),
    "lora": (
        Case("train", 16, "dots", "float32", 128, "bfloat16"), Case("train", 16, "dots", "float32", 128, "int8"),
        Case("train", 16, "dots", "float32", 128, "nf4"), Case("train", 32, "dots", "float32", 128, "bfloat16"),
        Case("train", 16, "none", "float32", 128, "bfloat16"), Case("train", 1, "full", "float32", 128, "nf4"),
    ),
    "letters": tuple(Case("letters", size, num_new=num_new) for size in (8, 32, 128) for num_new in (0, NUM_NEW)),
    "torch": (
        Case("torch train", 8), Case("torch generate", HF_BATCH), Case("torch forward", HF_BATCH),
        Case("torch train", 16, "full"), Case("torch train", 32, "full"), Case("torch train", 16),
        Case("torch compiled", 8), Case("torch train", 64, "full"),
    ),
    "torch_fp32": (Case("torch train", 8, "full", "float32"), Case("torch train", 32, "full", "float32")),
}  # fmt: skip


def cases(ask: Ask, stage: str = "") -> list[Case]:
    """The cases of a stage, by default `ask.stage`; its first ones at each of `ask.batches`; of a tiny model all of them,
    at the batch size and the rank `SMALL`: the same code at a size for a CPU."""
    chosen = list(CASES[stage or ask.stage])
    if ask.batches:
        first = [case for case in chosen if case.batch_size == chosen[0].batch_size and case.remat == chosen[0].remat]
        first = [case for case in first if case.what in (chosen[0].what, "letters")]
        return [dataclasses.replace(case, batch_size=size) for size in ask.batches for case in first]
    if ask.run.model.name in build.TINY:
        small = [dataclasses.replace(case, batch_size=SMALL, rank=case.rank and SMALL) for case in chosen]
        return list(dict.fromkeys(small))
    return chosen


def in_turn(ask: Ask, cases: Iterable, measure: Callable, *, save: Callable) -> list[dict]:
    """A row for every case: what `measure(case, row)` adds to it, or why it was not measured. Each row is saved at once.

    A case is left out where less time is left than the longest one took, or where a case with smaller needs did not fit.
    Any other error stands in the row.

    Raises:
      RuntimeError: a row has an error, or no case was measured.
    """
    rows, too_large, longest = [], [], 0.0
    for case in cases:
        row = {"case": case.name}
        rows.append(row)
        if ask.left_s() < longest * 1.2 + 3:
            row["left_out"] = "no time left"
        elif any(case.needs_no_less_than(other) for other in too_large):
            row["left_out"] = "a smaller one did not fit"
        else:
            began = time.monotonic()
            try:
                measure(case, row)
            except Exception as error:
                if out_of_memory(error):
                    row["does_not_fit"] = short(error, 300)
                    too_large.append(case)
                else:
                    traceback.print_exc()
                    row["error"] = f"{type(error).__name__}: {short(error)}"
            longest = max(longest, time.monotonic() - began)
        for key in ("does_not_fit", "left_out", "error"):
            if key in row:
                print(f"   {case.name}: {f'{key}: {row[key]}'.replace('_', ' ')[:160]}", flush=True)
        save(rows=rows)
    wrong = [f"{row['case']}: {row['error']}" for row in rows if "error" in row]
    if wrong:
        raise RuntimeError("; ".join(wrong))
    if rows and all({"does_not_fit", "left_out"} & set(row) for row in rows):
        raise RuntimeError(f"nothing of {', '.join(row['case'] for row in rows)} could be run")
    return rows


def rows_of(case: Case, ask: Ask) -> dict[str, np.ndarray]:
    """The training batch of a case for both sides: rows of half to all of the run's text tokens."""
    most, config = ask.run.data.max_text_tokens, architecture(case.settings(ask)[0])
    return example_batch(
        config, batch_size=case.batch_size, text_tokens=(most // 2, most), num_targets=ask.run.data.max_target_tokens
    )


def questions(case: Case, ask: Ask) -> dict[str, np.ndarray]:
    """A random batch with the shapes of `data.encoding.encode_eval`: one image and one question in each row."""
    batch, rng = rows_of(case, ask), np.random.default_rng(0)
    usable = architecture(ask.run.model).image_token_id
    options = rng.integers(1, usable, (case.batch_size, NUM_OPTIONS), dtype=np.int32)
    last = batch["segment_ids"].sum(axis=1, dtype=np.int32) - 1
    return {key: batch[key] for key in ("tokens", "segment_ids", "pixels")} | {
        "last_position": last, "option_ids": options
    }  # fmt: skip


def check_plan(row: dict, program: jax.stages.Compiled, ask: Ask, open_trips: int | None = None) -> None:
    """Adds to `row` the program's peak and its simulated seconds as `medcg plan` gives them, and the device's memory limit.

    open_trips: of a loop that says none, which is the one over generated tokens.

    Raises:
      MemoryError: the peak is above the limit, so that running the program would fail.
    """
    plan = getattr(program.memory_analysis(), "peak_memory_in_bytes", 0) or None
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    row |= {"plan_peak_bytes": plan, "limit_bytes": limit, "peak_bytes_before": peak_bytes()}
    row["simulated"] = simulated(program, ask, open_trips)
    if plan and limit and plan > limit:
        raise MemoryError(f"out of memory by the compiler's plan: {plan / 2**30:.1f} of {limit / 2**30:.1f} GiB")


def simulated(program: jax.stages.Compiled, ask: Ask, open_trips: int | None = None) -> dict:
    """Seconds that the program's schedule takes on this device by `plan.simulate`, with the two bounds around them.

    Returns {"published", "measured"}: {"step_s", "overlapped_s", "in_turn_s"} at the device's published peaks, and at the
    rates that the stage `machine` measured; or {"not_read": why} where the rates or the schedule are not known.
    """
    kind = jax.devices()[0].device_kind
    peak, flops_per_s = peak_of(kind), ask.matrix_rate()
    memory_bytes_per_s = ask.so_far.get("machine", {}).get("memory_bytes_per_s")

    def published() -> Machine:
        if peak is None:
            raise ValueError(f"no peak is published for {kind}")
        return Machine.published(peak, (0,))

    def measured() -> Machine:
        if not flops_per_s or not memory_bytes_per_s:
            raise ValueError("the stage machine has not measured the rates")
        # One device has no links.
        return Machine(flops_per_s, memory_bytes_per_s, 1.0, 1.0, (0,))

    times = {}
    for name, machine in (("published", published), ("measured", measured)):
        try:
            bound = simulate(schedule.read(program.as_text() or "", open_trips=open_trips), machine()).bound()
            times[name] = {
                "step_s": bound.simulated_s, "overlapped_s": bound.overlapped_s, "in_turn_s": bound.in_turn_s
            }  # fmt: skip
        except Exception as error:  # a text that cannot be read must not lose the measurement
            times[name] = {"not_read": f"{type(error).__name__}: {short(error, 200)}"}
    return times


# ------------------------------------------------------------------ training


def train(ask: Ask, save: Callable) -> None:
    """Saves a row for each case: compile time, bytes by the plan and by the device, step time, rates and MFU."""
    in_turn(ask, cases(ask), Steps(ask).measure, save=save)


class Steps:
    """Training steps of one model; cases with the same state share its arrays."""

    port: Any = None
    state_of: Case | None = None

    def __init__(self, ask: Ask):
        self.ask = ask

    def measure(self, case: Case, row: dict) -> None:
        """Adds to `row` the memory and the speed of the case's step. Raises what compiling and running raise."""
        batch = rows_of(case, self.ask)
        row |= dataclasses.asdict(case) | {"batch": describe(batch)}
        self.take(case)
        row |= self.port.compile(batch)
        check_plan(row, self.port.compiled.program, self.ask)
        self.time(case, batch, row)
        plan = f", plan {row['plan_peak_bytes'] / 2**30:.3g} GiB" if row["plan_peak_bytes"] else ""
        print(f"   {case.name}: {rate_text(row)}{plan}, compiled in {row['compile_s']:.0f} s", flush=True)

    def take(self, case: Case, **changes) -> None:
        """Makes `self.port` the case's; it takes over the last port's state where that is alike and not deleted.

        changes: of the model's configuration.
        """
        model, train = case.settings(self.ask)
        model = dataclasses.replace(model, **changes)
        state_of = dataclasses.replace(case, batch_size=0, remat="none")
        port = Port(architecture(model), make_mesh(devices=jax.devices()[:1]), train, model)
        # A failed step has deleted its donated state.
        if self.state_of == state_of and self.port.state is not None and not any(
            x.is_deleted() for x in jax.tree.leaves(self.port.state)
        ):  # fmt: skip
            port.state, port.frozen = self.port.state, self.port.frozen
        self.port, self.state_of = None, None
        gc.collect()
        self.port, self.state_of = port, state_of

    def time(self, case: Case, batch: dict, row: dict) -> None:
        """Adds rates of the compiled step, and the loss. Raises RuntimeError where that is not finite."""
        seconds = seconds_of(self.port.seconds, REPEATS)
        if not math.isfinite(self.port.loss):
            raise RuntimeError(f"the loss is {self.port.loss} after random weights")
        needed = step_flops(self.port.config, batch, case.settings(self.ask)[0].trainable)
        row |= rates(seconds, batch, needed) | {"flops": needed, "loss": self.port.loss, "peak_bytes": peak_bytes()}
        if rate := self.ask.matrix_rate():
            shares = {"mfu_of_measured": "full", "mfu_causal_of_measured": "causal", "hfu_of_measured": "executed"}
            row |= {key: needed[name] / row["step_s"]["median"] / rate for key, name in shares.items()}


# ------------------------------------------------------------------ answers, and transformers


def letters(ask: Ask, save: Callable) -> None:
    """Saves samples/s of each case with bfloat16 weights; every call puts its batch on the device."""
    config = architecture(Case("train", 1).settings(ask)[0])
    mesh = make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        graphdef, params = build.create(config, mesh, seed=0, param_dtype=jnp.bfloat16)
    shardings = build.shardings(config, mesh)

    def measure(case: Case, row: dict) -> None:
        batch = questions(case, ask)
        # No token ends a row, so that random weights generate all `num_new` tokens.
        evaluator = make_evaluator(
            mesh, graphdef, shardings, eos_id=-1, max_new_tokens=case.num_new, generate=case.num_new > 0
        )
        with jax.set_mesh(mesh):
            program = evaluator.jitted.lower(params, put_batch(batch, batch_sharding(mesh))).compile()
        row |= dataclasses.asdict(case) | {"attention": attention_in(program.as_text())}
        check_plan(row, program, ask, max(case.num_new - 1, 1))
        seconds = spread(
            seconds_of(lambda steps: jax.device_get([evaluator(params, batch) for _ in range(steps)]), REPEATS)
        )
        needed = sum(
            flops.evaluation(config, num_rows=1, length=int(length), num_new=case.num_new or 1)
            for length in batch["segment_ids"].sum(axis=1)
        )
        row |= {"step_s": seconds, "flops": needed, "peak_bytes": peak_bytes()}
        row["samples_per_s"] = case.batch_size / seconds["median"]
        if rate := ask.matrix_rate():
            row["share_of_measured"] = needed / seconds["median"] / rate
        print(f"   {case.name}: {row['samples_per_s']:.1f} samples/s, attention {row['attention']}", flush=True)

    in_turn(ask, cases(ask), measure, save=save)


def torch(ask: Ask, save: Callable) -> None:
    """Saves samples/s and memory of each case of transformers; "skipped" where PyTorch or transformers are missing.

    Rows, trained parts, optimizer and clipping are the port's; weights and moments are bfloat16, or float32 with
    bfloat16 autocast.
    """
    if lacks_torch(save):
        return
    from medcg_jax.bench import pytorch

    def measure(case: Case, row: dict) -> None:
        row |= dataclasses.asdict(case)
        gc.collect()
        pytorch.reset_memory()
        run = reference(case, ask)

        def steps(count: int) -> None:
            run(count)
            pytorch.finish()

        row["step_s"] = spread(seconds_of(steps, REPEATS))
        row |= {"samples_per_s": case.batch_size / row["step_s"]["median"], "peak_bytes": pytorch.peak_bytes()}
        print(f"   {case.name}: {row['samples_per_s']:.2f} samples/s", flush=True)

    in_turn(ask, cases(ask), measure, save=save)


def reference(case: Case, ask: Ask) -> Callable[[int], object]:
    """A runner of steps of transformers: training steps, or answers to all questions of the batch."""
    from medcg_jax.bench import pytorch

    model, train = case.settings(ask)
    if case.what in ("torch forward", "torch generate"):
        model = dataclasses.replace(model, compute_dtype=case.param_dtype)
        answers = pytorch.Answers(architecture(model), questions(case, ask), model, num_new=NUM_NEW)
        return answers.forward if case.what == "torch forward" else answers.generate
    pure = case.param_dtype == "bfloat16"
    # float32 stands for "no autocast" here.
    model = dataclasses.replace(model, compute_dtype="float32" if pure else "bfloat16")
    side = pytorch.Reference(architecture(model), rows_of(case, ask), train, model)
    if pure:
        # In place: the optimizer keeps its parameters, and makes its moments of them at the first step.
        side.model.to(pytorch.torch.bfloat16)
        side.pieces = [pytorch.on(side.device, piece, pytorch.torch.bfloat16) for piece in side.pieces]
    return side.compiled_seconds if case.what == "torch compiled" else side.seconds


# ------------------------------------------------------------------ the fastest step


def best_case(ask: Ask) -> Case:
    """The training case with the most samples/s so far; the first case where none is measured."""
    rows = [row for stage in ("train_bf16", "train_fp32") for row in ask.so_far.get(stage, {}).get("rows", [])]
    rows = [row for row in rows if row.get("samples_per_s")]
    if rows:
        best = max(rows, key=lambda row: row["samples_per_s"])
        return Case(**{field.name: best[field.name] for field in dataclasses.fields(Case)})
    return cases(ask, "train_bf16")[0]


def trace(ask: Ask, save: Callable) -> None:
    """Saves how the device spends its time in `TRACED_STEPS` steps of the fastest case, and what limits the step."""
    case, steps = best_case(ask), Steps(ask)
    batch = rows_of(case, ask)
    save(case=case.name)
    steps.take(case)
    save(**steps.port.compile(batch))
    steps.port.seconds(2)
    seconds = steps.port.seconds(TRACED_STEPS) / TRACED_STEPS
    save(untraced_step_s=seconds)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    folder = ask.scratch / "trace"
    jax.profiler.start_trace(folder, profiler_options=options)
    try:
        steps.port.seconds(TRACED_STEPS)
    finally:
        jax.profiler.stop_trace()
    trace = trace_read.read(folder, steps=TRACED_STEPS)
    lines = [f"{case.name}: {seconds * 1e3:.1f} ms a step untraced, {trace['span_s'] / TRACED_STEPS * 1e3:.1f} traced"]
    lines += limits(trace, executed(steps.port.config, batch, case.settings(ask)[0].trainable), ask.matrix_rate())
    save(trace=trace, limits=lines)
    print("\n".join(f"   {text}" for text in [*trace_read.text_of(trace), *lines]), flush=True)
    if jax.default_backend() != "cpu" and trace["device"].startswith("/host"):
        raise RuntimeError("the trace holds no operation of the device: its driver may not let this user trace it")


def executed(config: build.Config, batch: dict, trainable: tuple[str, ...]) -> dict[str, float]:
    """Executed FLOPs of one step by kind of operation, padding and recomputation included."""
    rows, length = batch["tokens"].shape
    forward = flops.forward(config, length=length, num_logits=batch["targets"].shape[1])
    attended = flops.Flops(attention=forward.attention)
    attention = rows * flops.training(attended, trainable=trainable, remat=config.remat)
    whole = step_flops(config, batch, trainable)["executed"]
    return {"matrix products": whole - attention, "attention": attention}


def limits(trace: dict, flops: dict[str, float], rate: float | None) -> list[str]:
    """Lines that say where a step loses time against its products at the measured rate, the largest loss first.

    trace: of `trace_read.read`. flops: of `executed`. rate: FLOP/s of the best measured product, or None.
    """
    step = trace["span_s"] / trace["steps"]
    took = {kind: times["seconds"] / trace["steps"] for kind, times in trace["kinds"].items()}
    products = took["matrix products"]
    if not rate or not products:
        return []
    ideal = flops["matrix products"] / rate
    lines = [
        (
            f"a step's products: {flops['matrix products'] / 1e12:.3g} TFLOP in {products * 1e3:.1f} ms, "
            f"{flops['matrix products'] / products / rate:.1%} of the measured rate, which would need "
            f"{ideal * 1e3:.1f} ms: {ideal / step:.1%} of the step"
        )
    ]
    lost = {"products below the measured rate": products - ideal}
    lost |= {kind: seconds for kind, seconds in took.items() if kind != "matrix products"}
    for name, seconds in sorted(lost.items(), key=lambda item: -item[1]):
        if seconds > 0:
            lines.append(f"lost to {name}: {seconds * 1e3:.1f} ms a step, {seconds / step:.1%}")
    return lines
