"""Evaluation of `bench_gpu`: letters by their likelihood, and greedy generation, with weights in bfloat16."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from medcg_jax.bench import stages
from medcg_jax.bench.stage_train import DEFAULT_TEXT_TOKENS, REPEATS, TEXT_TOKENS, Case, check_plan, peak_bytes
from medcg_jax.bench.stages import Ask

NUM_NEW = 4  # of `EvalConfig.max_new_tokens`
NUM_OPTIONS = 4


@dataclass(frozen=True)
class Asked:
    """Prompts of one batch: their letters alone, or `num_new` tokens generated beside."""

    batch_size: int
    num_new: int

    @property
    def name(self) -> str:
        what = f"letters and {self.num_new} tokens" if self.num_new else "letters"
        return f"{what}, batch {self.batch_size}"


CASES = (Asked(8, 0), Asked(8, NUM_NEW), Asked(32, 0), Asked(32, NUM_NEW), Asked(128, 0), Asked(128, NUM_NEW))


def larger(small: Asked, other: Asked) -> bool:
    return other.batch_size >= small.batch_size and other.num_new >= small.num_new


def prompts(config, model: str, batch_size: int, seed: int = 0) -> dict[str, np.ndarray]:
    """A random batch of the shapes that `data.encoding.encode_eval` makes: one image and a question in each row."""
    from medcg_jax.bench import steps as bench

    text = TEXT_TOKENS.get(model, DEFAULT_TEXT_TOKENS)
    rows = bench.example_batch(config, batch_size=batch_size, text_tokens=text, num_targets=1, seed=seed)
    options = np.random.default_rng(seed).integers(1, config.image_token_id, (batch_size, NUM_OPTIONS), dtype=np.int32)
    last = rows["segment_ids"].sum(axis=1, dtype=np.int32) - 1
    kept = {key: rows[key] for key in ("tokens", "segment_ids", "pixels")}
    return kept | {"last_position": last, "option_ids": options}


def evaluate(ask: Ask, save: Callable) -> None:
    """Saves samples/s of each case, in time order of its measurement; the batch is put on the device every time."""
    import jax
    import jax.numpy as jnp

    from medcg_jax.bench import steps as bench
    from medcg_jax.eval.letters import make_evaluator
    from medcg_jax.families import build
    from medcg_jax.mesh import batch_sharding, make_mesh, put_batch
    from medcg_jax.plan import flops

    config = bench.architecture(Case(1, "none", "float32").settings(ask.model)[0])
    mesh = make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        graphdef, params = build.create(config, mesh, seed=0, param_dtype=jnp.bfloat16)
    shardings = build.shardings(config, mesh)

    def one(asked: Asked, row: dict) -> None:
        batch = prompts(config, ask.model, asked.batch_size)
        # No token is the end: random weights generate as long as they are asked to.
        evaluator = make_evaluator(
            mesh, graphdef, shardings, eos_id=-1, max_new_tokens=asked.num_new, generate=asked.num_new > 0
        )
        with jax.set_mesh(mesh):
            program = evaluator.jitted.lower(params, put_batch(batch, batch_sharding(mesh))).compile()
        row |= dataclasses.asdict(asked) | {"attention": bench.attention_in(program.as_text())}
        check_plan(row, program)

        def seconds(count: int) -> float:
            return stages.timed(lambda: jax.device_get([evaluator(params, batch) for _ in range(count)]))

        times = bench.take_turns({"port": seconds}, REPEATS)["port"]
        lengths = batch["segment_ids"].sum(axis=1)
        needed = sum(
            flops.evaluation(config, num_rows=1, length=int(length), num_new=asked.num_new or 1) for length in lengths
        )
        row |= {"seconds": bench.spread(times), "flops": needed, "peak_bytes": peak_bytes()}
        row["samples_per_s"] = asked.batch_size / row["seconds"]["median"]
        text = f"{row['seconds']['median'] * 1e3:.1f} ms, {row['samples_per_s']:.1f} samples/s"
        if rate := ask.matrix_rate():
            row["share_of_measured"] = needed / row["seconds"]["median"] / rate
            text += f", {row['share_of_measured']:.1%} of the measured matrix rate"
        print(f"   {asked.name}: {text}, attention {row['attention']}", flush=True)

    sizes = ask.batches or ((2, 4) if ask.model == "llava15_tiny" else ())
    asked = [Asked(size, num_new) for size in sizes for num_new in (0, NUM_NEW)] or CASES
    stages.check_rows(stages.in_turn(ask, asked, one, larger=larger, save=save))
