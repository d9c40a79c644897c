"""What `bench_gpu` does with the fastest step that it has found: a trace of it, and other flags of XLA."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

from medcg_jax.bench import stages
from medcg_jax.bench.stage_train import Case, Steps, cases
from medcg_jax.bench.stages import Ask
from medcg_jax.config import ConfigError
from medcg_jax.families.flops import Flops, forward, training

TRACED_STEPS = 2
REPEATS = 3


@dataclass(frozen=True)
class Way:
    """Another way to compile the same step: options of XLA, and fields of the model's configuration."""

    name: str
    options: dict = field(default_factory=dict)
    model: dict = field(default_factory=dict)


# One device has no collectives to hide, but copies and prefetches; a command buffer (a CUDA graph) spares launches;
# a scan slices its layer's weights out of the stack, which a fusion with the product, or several layers at once, may
# spare; cuBLASLt, Triton and cuDNN are ways to a product that autotuning times against each other.
WAYS = (
    Way("as it is"),
    Way("as medcg train has it", {"xla_gpu_deterministic_ops": True, "xla_gpu_enable_latency_hiding_scheduler": True}),
    Way("four layers at a time", model={"scan_unroll": 4}),
    Way("fp8 products", model={"matmul": "fp8"}),
    Way("int8 products", model={"matmul": "int8"}),
    Way("slices in fusions", {"xla_gpu_enable_dynamic_slice_fusion": True}),
    Way("latency hiding", {"xla_gpu_enable_latency_hiding_scheduler": True}),
    Way("no command buffers", {"xla_gpu_enable_command_buffer": ""}),
    Way("loops in two halves", {"xla_gpu_enable_while_loop_double_buffering": True}),
    Way("no Triton products", {"xla_gpu_enable_triton_gemm": False}),
    Way("products in cuDNN fusions", {"xla_gpu_cudnn_gemm_fusion_level": 2}),
)


def best_case(ask: Ask) -> Case:
    """The case of the training step with the most samples/s so far; where none is known the first that there is."""
    rows = [row for stage in ("train", "train_fp32") for row in ask.so_far.get(stage, {}).get("rows", [])]
    rows = [row for row in rows if row.get("samples_per_s")]
    if rows:
        best = max(rows, key=lambda row: row["samples_per_s"])
        return Case(**{field.name: best[field.name] for field in dataclasses.fields(Case)})
    try:
        first = cases("train", ask)[0]
        first.settings(ask.model)
    except ConfigError:  # a version whose state is float32 alone
        return cases("train_fp32", ask)[0]
    return first


def trace(ask: Ask, save: Callable) -> None:
    """Saves where the device's time goes in `TRACED_STEPS` steps of the fastest case, and what limits it."""
    import jax

    from medcg_jax.bench import trace_read

    case, steps = best_case(ask), Steps(ask)
    batch = steps.batch(case)
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
    found = trace_read.read(folder, steps=TRACED_STEPS)
    lines = [f"{case.name}: {seconds * 1e3:.1f} ms a step untraced, {found['span_s'] / TRACED_STEPS * 1e3:.1f} traced"]
    lines += limits(found, executed(steps, case, batch), ask.matrix_rate())
    save(trace=found, limits=lines)
    print("\n".join(f"   {text}" for text in [*trace_read.text_of(found), *lines]), flush=True)
    if jax.default_backend() != "cpu" and found["device"].startswith("/host"):
        raise RuntimeError("the trace holds no operation of the device: its driver may not let this user trace it")


def executed(steps: Steps, case: Case, batch: dict) -> dict[str, float]:
    """FLOPs of one step as it is executed, padding and what is computed again included, by kind of operation."""
    from medcg_jax.bench import steps as bench

    config, trainable = steps.port.config, case.settings(steps.ask.model)[0].trainable
    rows, length = batch["tokens"].shape
    one = forward(config, length=length, num_logits=batch["targets"].shape[1])
    attention = rows * training(Flops(attention=one.attention), trainable=trainable, remat=config.remat)
    whole = bench.step_flops(config, batch, trainable)["executed"]
    return {"matrix products": whole - attention, "attention": attention}


def limits(trace: dict, flops: dict[str, float], rate: float | None) -> list[str]:
    """Lines that say what keeps a step from the time that its products need at the measured rate, the most first.

    trace: `trace_read.read`'s. flops: of a step, `executed`'s. rate: FLOP/s of the best product measured, or None.
    """
    step = trace["span_s"] / trace["steps"]
    took = {kind: one["seconds"] / trace["steps"] for kind, one in trace["kinds"].items()}
    products = took["matrix products"]
    if not rate or not products:
        return []
    ideal = flops["matrix products"] / rate
    lines = [
        f"a step's products: {flops['matrix products'] / 1e12:.1f} TFLOP in {products * 1e3:.1f} ms, "
        f"{flops['matrix products'] / products / rate:.1%} of the measured rate, which would need "
        f"{ideal * 1e3:.1f} ms: {ideal / step:.1%} of the step"
    ]
    lost = {"products below the measured rate": products - ideal}
    lost |= {kind: seconds for kind, seconds in took.items() if kind != "matrix products"}
    for name, seconds in sorted(lost.items(), key=lambda item: -item[1]):
        if seconds > 0:
            lines.append(f"lost to {name}: {seconds * 1e3:.1f} ms a step, {seconds / step:.1%}")
    return lines


def flags(ask: Ask, save: Callable) -> None:
    """Saves the time of the fastest case's step compiled in each of `WAYS`, and its ratio to the first of them."""
    case, steps = best_case(ask), Steps(ask)
    batch = steps.batch(case)
    save(case=case.name)
    first: list[float] = []

    def one(way: Way, row: dict) -> None:
        from medcg_jax.bench import steps as bench

        row |= {"options": way.options, "model": way.model}
        steps.take(case, **way.model)
        row |= steps.port.compile(batch, way.options or None)
        times = bench.take_turns({"port": steps.port.seconds}, REPEATS)["port"]
        row |= steps.figures(case, batch, times)
        first.append(row["step_s"]["median"])
        row["speed_of_first"] = first[0] / first[-1]
        print(f"   {way.name}: {first[-1] * 1e3:.1f} ms, {row['speed_of_first']:.3f} of the first's speed, "
              f"compiled in {row['compile_s']:.0f} s", flush=True)  # fmt: skip

    rows = stages.in_turn(ask, WAYS, one, larger=lambda small, other: False, save=save)
    if "step_s" not in rows[0]:
        raise RuntimeError(f"{case.name} as it is: {rows[0].get('error') or rows[0].get('does_not_fit')}")
