"""Hugging Face transformers on the same card, for `bench_gpu`: training steps, forward passes and generation.

In a process of its own, after the port's has given its memory back. Rows, trained parts, optimizer and clipping are the
port's (`bench_torch`); weights and moments are bfloat16, or float32 with bfloat16 autocast.
"""

import dataclasses
import gc
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from medcg_jax.bench import stages
from medcg_jax.bench.stage_eval import NUM_NEW, prompts
from medcg_jax.bench.stage_train import DEFAULT_TEXT_TOKENS, FULL, NUM_TARGETS, REMATS, REPEATS, TEXT_TOKENS, Case
from medcg_jax.bench.stages import Ask

EVAL_BATCH = 8


@dataclass(frozen=True)
class Theirs:
    """One thing that transformers does. what: "train", "train compiled", "forward" or "generate"."""

    what: str
    batch_size: int
    remat: str = "none"
    param_dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        again = ", gradient checkpointing" if self.remat != "none" else ""
        return f"transformers {self.what}, {self.param_dtype} weights, batch {self.batch_size}{again}"


CASES = {
    "torch": (
        Theirs("train", 8), Theirs("generate", EVAL_BATCH), Theirs("forward", EVAL_BATCH), Theirs("train", 16, "full"),
        Theirs("train", 32, "full"), Theirs("train", 16), Theirs("train compiled", 8), Theirs("train", 64, "full"),
    ),
    "torch_fp32": (Theirs("train", 8, "full", "float32"), Theirs("train", 32, "full", "float32")),
}  # fmt: skip


def larger(small: Theirs, other: Theirs) -> bool:
    same = (small.what, small.param_dtype) == (other.what, other.param_dtype)
    return same and other.batch_size >= small.batch_size and REMATS.index(other.remat) <= REMATS.index(small.remat)


def torch(ask: Ask, save: Callable, *, name: str = "torch") -> None:
    """Saves samples/s and memory of each case; "skipped" where PyTorch or transformers are not installed."""
    missing = [package for package in ("torch", "transformers") if not importlib.util.find_spec(package)]
    if missing:
        save(status="skipped", why=f"not installed: {', '.join(missing)}")
        return
    cases = CASES[name]
    if ask.model == "llava15_tiny":
        cases = [dataclasses.replace(case, batch_size=4) for case in cases if case.what != "train compiled"]
    rows = stages.in_turn(ask, cases, lambda case, row: measure(ask, case, row), larger=larger, save=save)
    stages.check_rows(rows)


def torch_fp32(ask: Ask, save: Callable) -> None:
    torch(ask, save, name="torch_fp32")


def measure(ask: Ask, case: Theirs, row: dict) -> None:
    """Adds to `row` what transformers needs for `case` and how fast it is."""
    from medcg_jax.bench import pytorch
    from medcg_jax.bench import steps as bench

    row |= dataclasses.asdict(case)
    gc.collect()
    free_cache(pytorch.torch)
    run = trainer(ask, case) if case.what.startswith("train") else answerer(ask, case)

    def seconds(count: int) -> float:
        return stages.timed(lambda: (run(count), finish(pytorch.torch)))

    times = bench.take_turns({"theirs": seconds}, REPEATS)["theirs"]
    spread = bench.spread(times)
    row |= {"seconds": spread, "samples_per_s": case.batch_size / spread["median"]}
    row["peak_bytes"] = peak(pytorch.torch)
    memory = f", {row['peak_bytes'] / 2**30:.1f} GiB" if row["peak_bytes"] else ""
    print(f"   {case.name}: {spread['median'] * 1e3:.1f} ms, {row['samples_per_s']:.2f} samples/s{memory}", flush=True)


def trainer(ask: Ask, case: Theirs) -> Callable[[int], object]:
    """Takes a number of training steps, of the very rows that the port's case of this size has."""
    from medcg_jax.bench import pytorch
    from medcg_jax.bench import steps as bench

    pure = case.param_dtype == "bfloat16"
    model, train = Case(case.batch_size, case.remat, "float32").settings(ask.model)
    # float32 stands for "no autocast" here.
    model = dataclasses.replace(model, compute_dtype="float32" if pure else "bfloat16", trainable=FULL)
    config, text = bench.architecture(model), TEXT_TOKENS.get(ask.model, DEFAULT_TEXT_TOKENS)
    batch = bench.example_batch(config, batch_size=case.batch_size, text_tokens=text, num_targets=NUM_TARGETS)
    reference = pytorch.Reference(config, batch, train, model)
    if pure:
        # The parameters stay the optimizer's own; its moments are made of them at the first step.
        reference.model.to(pytorch.torch.bfloat16)
        reference.inputs["pixel_values"] = reference.inputs["pixel_values"].to(pytorch.torch.bfloat16)
    return reference.compiled_seconds if case.what == "train compiled" else reference.seconds


def answerer(ask: Ask, case: Theirs) -> Callable[[int], object]:
    """Answers the rows that the port's letters of this size are asked, so many times."""
    from medcg_jax.bench import pytorch
    from medcg_jax.bench import steps as bench

    model = dataclasses.replace(Case(1, "none", "float32").settings(ask.model)[0], compute_dtype=case.param_dtype)
    config = bench.architecture(model)
    answers = pytorch.Answers(config, [prompts(config, ask.model, case.batch_size)], model, num_new=NUM_NEW)
    return getattr(answers, case.what)


def finish(torch) -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free_cache(torch) -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak(torch) -> int | None:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
