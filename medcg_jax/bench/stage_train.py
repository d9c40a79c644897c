"""Training steps of `bench_gpu`: full fine-tuning and adapters, by batch size, rematerialisation and kept precision."""

import dataclasses
import gc
import math
from collections.abc import Callable
from dataclasses import dataclass

from medcg_jax.bench import stages
from medcg_jax.bench.stages import Ask
from medcg_jax.config import ConfigError, ModelConfig, TrainConfig

# Text tokens of a row, least and most: Med-MAT's questions with LLaVA's system prompt.
TEXT_TOKENS = {"llava15_tiny": (24, 48)}
DEFAULT_TEXT_TOKENS = (64, 128)
NUM_TARGETS = 8
REPEATS = 4
FULL = ("projector", "decoder")
# Recomputes more from left to right, and keeps less.
REMATS = ("none", "dots", "full")


@dataclass(frozen=True)
class Case:
    """One training step. param_dtype: of trained parameters and AdamW's moments between steps.

    rank: of adapters, which are then trained in the decoder's place; base_dtype: how the rest is kept.
    """

    batch_size: int
    remat: str
    param_dtype: str = "bfloat16"
    rank: int = 0
    base_dtype: str = "float32"

    @property
    def name(self) -> str:
        kept = f"LoRA {self.rank} on {self.base_dtype}" if self.rank else f"{self.param_dtype} state"
        return f"{kept}, batch {self.batch_size}, remat {self.remat}"

    def settings(self, model: str) -> tuple[ModelConfig, TrainConfig]:
        """The configurations of the step.

        Raises:
          ConfigError: this version of them has no field for what the case needs.
        """
        trainable = ("projector", "lora") if self.rank else FULL
        asked = dict(name=model, remat=self.remat, compute_dtype="bfloat16", trainable=trainable)
        if self.rank:
            asked |= dict(lora_rank=self.rank, base_dtype=self.base_dtype)
        if model == "llava15_tiny":
            asked["scan_unroll"] = 1  # one layer at a time, as accelerators have it by default
        kept = {} if self.param_dtype == "float32" else dict.fromkeys(("param_dtype", "moment_dtype"), self.param_dtype)
        return known(ModelConfig, asked), known(TrainConfig, kept)


def known(config: type, asked: dict):
    missing = set(asked) - {field.name for field in dataclasses.fields(config)}
    if missing:
        raise ConfigError(f"{config.__name__} has no {', '.join(sorted(missing))}")
    return config(**asked)


def larger(small: Case, other: Case) -> bool:
    """Whether `other` needs no less memory than `small`."""
    kept = (small.param_dtype, small.rank, small.base_dtype) == (other.param_dtype, other.rank, other.base_dtype)
    return kept and other.batch_size >= small.batch_size and REMATS.index(other.remat) <= REMATS.index(small.remat)


# Sizes that XLA's own plan for one H200 (133 GiB at 95 %) takes to its edge and beyond. In GiB, with a bfloat16 state:
# 82 at dots/16, 112 at dots/32, 127 at dots/40, 97 at none/8, 119 at none/12; with a float32 one: 111 at full/32, 109
# at dots/4.
CASES = {
    "train": (
        Case(16, "dots"), Case(8, "none"), Case(32, "dots"), Case(12, "none"), Case(64, "full"), Case(40, "dots"),
        Case(128, "full"), Case(16, "none"), Case(48, "dots"),
    ),
    "train_fp32": (
        Case(32, "full", "float32"), Case(8, "dots", "float32"), Case(64, "full", "float32"),
        Case(2, "none", "float32"), Case(12, "dots", "float32"), Case(96, "full", "float32"),
    ),
    "lora": (
        Case(16, "dots", "float32", 128, "bfloat16"), Case(16, "dots", "float32", 128, "int8"),
        Case(16, "dots", "float32", 128, "nf4"), Case(32, "dots", "float32", 128, "bfloat16"),
        Case(16, "none", "float32", 128, "bfloat16"), Case(1, "full", "float32", 128, "nf4"),
    ),
}  # fmt: skip


def cases(name: str, ask: Ask) -> list[Case]:
    """The stage's cases, or its first one at each of `ask.batches`; of a tiny model three are enough."""
    if ask.batches:
        return [dataclasses.replace(CASES[name][0], batch_size=size) for size in ask.batches]
    if ask.model == "llava15_tiny":
        return [dataclasses.replace(case, batch_size=4, rank=case.rank and 4) for case in CASES[name][:3]]
    return list(CASES[name])


def train(ask: Ask, save: Callable, *, name: str = "train") -> None:
    """Saves a row for each case: compile time, bytes by the plan and by the device, step time, rates and MFU."""
    steps = Steps(ask)
    rows = stages.in_turn(ask, cases(name, ask), steps.measure, larger=larger, save=save)
    stages.check_rows(rows)


def train_fp32(ask: Ask, save: Callable) -> None:
    train(ask, save, name="train_fp32")


def lora(ask: Ask, save: Callable) -> None:
    train(ask, save, name="lora")


class Steps:
    """Steps of one model; cases that keep the same state share it."""

    def __init__(self, ask: Ask):
        self.ask, self.port, self.of = ask, None, None

    def measure(self, case: Case, row: dict) -> None:
        """Adds to `row` what the case's step needs and how fast it is. Raises what compiling and running raise."""
        from medcg_jax.bench import steps as bench

        row |= dataclasses.asdict(case)
        batch = self.batch(case)
        row |= {"batch": bench.describe(batch)}
        self.take(case)
        row |= self.port.compile(batch)
        check_plan(row, self.port.compiled.program)
        times = bench.take_turns({"port": self.port.seconds}, REPEATS)["port"]
        row |= self.figures(case, batch, times)
        row["peak_bytes"] = peak_bytes()
        print(f"   {case.name}: {line(row)}", flush=True)

    def batch(self, case: Case) -> dict:
        from medcg_jax.bench import steps as bench

        text = TEXT_TOKENS.get(self.ask.model, DEFAULT_TEXT_TOKENS)
        config = bench.architecture(case.settings(self.ask.model)[0])
        return bench.example_batch(config, batch_size=case.batch_size, text_tokens=text, num_targets=NUM_TARGETS)

    def take(self, case: Case, **changes) -> None:
        """Makes `self.port` the case's, with the state of the last one where it keeps the same and still has it.

        changes: of the model's configuration.
        """
        import jax

        from medcg_jax.bench import steps as bench
        from medcg_jax.mesh import make_mesh

        model, train = case.settings(self.ask.model)
        model = dataclasses.replace(model, **changes)
        of = dataclasses.replace(case, batch_size=0, remat="none")
        port = bench.Port(bench.architecture(model), make_mesh(devices=jax.devices()[:1]), train, model)
        if self.of == of and self.port.state is not None:
            # A step that failed has taken its state with it.
            if not any(x.is_deleted() for x in jax.tree.leaves(self.port.state)):
                port.state, port.frozen = self.port.state, self.port.frozen
        self.port, self.of = None, None
        gc.collect()
        self.port, self.of = port, of

    def figures(self, case: Case, batch: dict, times: list[float]) -> dict:
        """Rates of the steps that took `times`, and the loss. Raises RuntimeError where that is not finite."""
        from medcg_jax.bench import steps as bench

        if not math.isfinite(self.port.loss):
            raise RuntimeError(f"the loss is {self.port.loss} after random weights")
        needed = bench.step_flops(self.port.config, batch, case.settings(self.ask.model)[0].trainable)
        found = bench.rates(times, batch, needed) | {"flops": needed, "loss": self.port.loss}
        if measured := self.ask.matrix_rate():
            shares = {"mfu_of_measured": "full", "mfu_causal_of_measured": "causal", "hfu_of_measured": "executed"}
            seconds = found["step_s"]["median"]
            found |= {key: needed[name] / seconds / measured for key, name in shares.items()}
        return found


def check_plan(row: dict, program) -> None:
    """Adds to `row` the peak that `medcg plan` would give, of the very program, and what the device lends.

    Raises:
      MemoryError: the first is above the second, so that running it would only fail.
    """
    import jax

    plan = getattr(program.memory_analysis(), "peak_memory_in_bytes", 0) or None
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    row |= {"plan_peak_bytes": plan, "limit_bytes": limit, "peak_bytes_before": peak_bytes()}
    if plan and limit and plan > limit:
        raise MemoryError(f"out of memory by the compiler's plan: {plan / 2**30:.1f} of {limit / 2**30:.1f} GiB")


def peak_bytes() -> int | None:
    """The most that this process had in use on the device so far."""
    import jax

    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def line(row: dict) -> str:
    """One line for people of a measured row."""
    text = f"{row['step_s']['median'] * 1e3:.1f} ms, {row['samples_per_s']:.2f} samples/s"
    if row.get("mfu_of_measured") is not None:
        text += f", {row['mfu_of_measured']:.1%} of the measured matrix rate"
        text += f" (causal {row['mfu_causal_of_measured']:.1%}, executed {row['hfu_of_measured']:.1%})"
    if row.get("mfu") is not None:
        text += f", MFU {row['mfu']:.1%}"
    plan, peak = row.get("plan_peak_bytes"), row.get("peak_bytes")
    text += f", plan {plan / 2**30:.1f} GiB" if plan else ""
    text += f", device {peak / 2**30:.1f} GiB" if peak else ""
    return f"{text}, compiled in {row['compile_s']:.0f} s, attention {row['attention']}"
