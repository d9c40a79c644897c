"""The port's training step for benchmarks: random weights, a random batch, time, memory and FLOPs.

The speed of a step does not depend on the values of weights and batches. Needs no data and no tokenizer.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import Mesh

from medcg_jax.bench.clock import spread
from medcg_jax.chips import utilisation
from medcg_jax.config import MASK_PARTS, ModelConfig, TrainConfig
from medcg_jax.families import build, flops
from medcg_jax.families.build import Config
from medcg_jax.families.llava.model import LlavaConfig
from medcg_jax.mesh import put_batch
from medcg_jax.plan.hlo import attention_in
from medcg_jax.train.losses import token_loss
from medcg_jax.train.optim import hparams_from, make_optimizer
from medcg_jax.train.step import Program, make_step

# The tiny models' vocabulary, where no tokenizer is read: it matters only to the speed of the head.
TINY_VOCABULARY = 512
# Batch size of HF's answers.
HF_BATCH = 8


def architecture(model: ModelConfig) -> LlavaConfig:
    """The architecture of `model`; a tiny one with `TINY_VOCABULARY`, about the size of the packaged tokenizer's."""
    tiny = {"vocab_size": TINY_VOCABULARY, "image_token_id": TINY_VOCABULARY - 1} if model.name in build.TINY else {}
    return cast(LlavaConfig, build.architecture(model, **tiny))


def example_batch(
    config: LlavaConfig, *, batch_size: int, text_tokens: tuple[int, int], num_targets: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """A random batch with the data pipeline's shapes: a row is one image, then `text_tokens` (least, most) of text."""
    rng = np.random.default_rng(seed)
    least, most = text_tokens
    num_image, length = config.num_image_tokens, config.num_image_tokens + most
    lengths = num_image + rng.integers(max(least, num_targets + 1), most + 1, batch_size)
    lengths[0] = length
    usable = min(config.text.vocab_size, config.image_token_id)
    tokens = rng.integers(1, usable, (batch_size, length), dtype=np.int32)
    tokens[:, :num_image] = config.image_token_id
    real = np.arange(length) < lengths[:, None]
    last = lengths[:, None] - num_targets - 1
    return {
        "tokens": np.where(real, tokens, config.pad_token_id).astype(np.int32),
        "segment_ids": real.astype(np.int32),
        "pixels": rng.integers(0, 256, (batch_size, 1, config.image_size_px, config.image_size_px, 3), dtype=np.uint8),
        "target_positions": (last + np.arange(num_targets)).astype(np.int32),
        "targets": np.take_along_axis(tokens, last + 1 + np.arange(num_targets), axis=1),
        "target_weights": np.ones((batch_size, num_targets), np.float32),
    }


@dataclass(frozen=True)
class Compiled:
    """The step for one shape of batch. call: runs the step. batch: on the devices."""

    call: Callable
    program: jax.stages.Compiled
    batch: dict[str, jax.Array]


class Port:
    """Random weights, optimizer state and a step on `mesh`: first `compile(batch)`, then `seconds(steps)`.

    loss_fn: as of `train.step.make_step`.
    """

    state: Any = None
    compiled: Any = None

    def __init__(
        self, config: Config, mesh: Mesh, train: TrainConfig, model: ModelConfig, *, loss_fn: Callable = token_loss
    ):
        self.mesh = mesh
        graphdef, abstract = build.abstract(config)
        self.split = partial(build.split_trainable, names=model.trainable)
        self.abstract = self.split(abstract)
        self.program: Program = make_step(
            mesh, graphdef, *self.split(build.shardings(config, mesh)), make_optimizer(train),
            loss_fn=loss_fn, accumulation_steps=train.accumulation_steps, compute_dtype=model.compute_dtype,
        )  # fmt: skip
        # The end of the learning-rate schedule is never reached.
        hparams = hparams_from(TrainConfig(steps=1_000_000, learning_rate=train.learning_rate), num_records=0)
        self.hparams = self.program.put_hparams(hparams)
        self.config = config

    def compile(self, batch: dict[str, np.ndarray], options: dict | None = None) -> dict:
        """Compiles the step for this batch, on which `seconds` then runs; returns compile times and bytes.

        The state is allocated only after the program has compiled. options: of XLA's compiler.
        """
        _, compiled, lower_s, compile_s = self.program.compile(*self.abstract, batch, options)
        if self.state is None:
            with jax.set_mesh(self.mesh):
                _, params = build.create(self.config, self.mesh, seed=0)
            trainable, self.frozen = self.split(params)
            del params
            self.state = self.program.start(trainable)
        # A program compiled ahead of time refuses 4-bit arrays ("layouts disagree", jax 0.10); the jitted step does not.
        call = self.program if self.config.base.dtype == "nf4" else compiled
        self.compiled = Compiled(call, compiled, put_batch(batch, self.program.batch_sharding))
        about = {"lower_s": lower_s, "compile_s": compile_s, "attention": attention_in(compiled.as_text())}
        return about | memory(compiled)

    def seconds(self, steps: int) -> float:
        """Seconds that `steps` steps took, the last one finished."""
        with jax.set_mesh(self.mesh):
            began = time.perf_counter()
            for _ in range(steps):
                self.state, metrics = self.compiled.call(self.state, self.frozen, self.hparams, self.compiled.batch)
            jax.block_until_ready((self.state, metrics))
        self.loss = float(metrics["loss"])
        return time.perf_counter() - began


def step_flops(config: Config, batch: dict[str, np.ndarray], trainable: tuple[str, ...]) -> dict | None:
    """`flops.step` of the batch, one image a row; None where masks are trained, for which there is no formula."""
    if set(trainable) & set(MASK_PARTS):
        return None
    return flops.step(
        config,
        batch["segment_ids"].astype(bool).sum(axis=1),
        padded_length=batch["tokens"].shape[1],
        num_images=1,
        num_logits=batch["targets"].shape[1],
        trainable=trainable,
    )


def rates(seconds: list[float], batch: dict[str, np.ndarray], needed: dict | None) -> dict:
    """Step time, and from its median: samples/s, real tokens/s, TFLOP/s and the three utilisations.

    needed: from `step_flops`; None: no TFLOP/s and no utilisations.
    """
    median = statistics.median(seconds)
    figures = {
        "step_s": spread(seconds),
        "samples_per_s": len(batch["tokens"]) / median,
        "tokens_per_s": int((batch["segment_ids"] != 0).sum()) / median,
    }
    if needed is None:
        return figures
    used = utilisation(needed, median, jax.devices()[0].device_kind, jax.device_count())
    return {**figures, "tflops_per_s": needed["full"] / median / 1e12, **used}


def memory(compiled: jax.stages.Compiled) -> dict:
    """Bytes on each device: the compiler's estimate for the program, and the peak of this process so far."""
    analysis, needed = compiled.memory_analysis(), None
    if analysis is not None:
        new = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        needed = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes + new
    return {"program_bytes": needed, "peak_bytes": peak_bytes()}


def peak_bytes() -> int | None:
    """Peak bytes of this process on the device so far; None: not known."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def describe(batch: dict[str, np.ndarray]) -> dict:
    rows, length = batch["tokens"].shape
    real = int((batch["segment_ids"] != 0).sum())
    return {"size": rows, "length": length, "real_tokens": real, "targets_per_row": batch["targets"].shape[1]}
