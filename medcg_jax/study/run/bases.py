"""Bases: the parameters that a seed's cells start from, trained once and kept by the fingerprint of what made them."""

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
from flax import nnx

from medcg_jax.config import MODELS, TRAINABLE, ModelConfig, RunConfig, TrainConfig, free_fields, marked
from medcg_jax.data.phantom import pretraining
from medcg_jax.data.pipeline import Batches
from medcg_jax.data.records import Turn
from medcg_jax.families.build import join, shardings, split_trainable
from medcg_jax.mesh import own_rows
from medcg_jax.study.design.schedule import seeded
from medcg_jax.train.checkpoint import load_params, read_meta, save_params
from medcg_jax.train.goodput import Goodput
from medcg_jax.train.loop import RunSpec, fit, loop_options
from medcg_jax.train.optim import hparams_from, make_optimizer
from medcg_jax.train.setup import Setup, model_config, peak_flops, run_tokenizer, start_params, step_flops
from medcg_jax.train.step import make_step

# What `frame_tokens` is in Vicuna's turns without a system's sentence, which `pretraining.MAX_TEXT_TOKENS` counts in.
VICUNA_FRAME = 13
# Tokens of an image whose place the reading exercises fill.
EXERCISE_PLACES = 16


def num_pretraining_records(base: TrainConfig) -> int:
    """Records that `base.steps` see in `base.epochs` passes; with epochs 0 every record is new."""
    seen = base.steps * base.batch_size
    return math.ceil(seen / base.epochs) if base.epochs else seen


def base_model(model: ModelConfig) -> ModelConfig:
    """The model of a base: no adapters but MiniGPT-v2's, and all of it in float32, whatever fine-tunes have."""
    plain = ModelConfig()
    own = () if MODELS[model.name] == "minigpt_v2" else ("lora_rank", "lora_alpha", "lora_targets")
    return dataclasses.replace(model, **{name: getattr(plain, name) for name in (*own, "base_dtype")})


def made_of(run: RunConfig) -> dict:
    """Everything the base of a run (of one seed: `schedule.seeded`) is made of, as in JSON."""
    free, later = free_fields(), marked("later")
    base = {k: v for k, v in dataclasses.asdict(run.base).items() if f"base.{k}" not in free}
    model, plain = dataclasses.asdict(base_model(run.model)), dataclasses.asdict(ModelConfig())
    # With their defaults: they stand in the fingerprints of bases that are there.
    model |= {k: v for k, v in plain.items() if f"model.{k}" in free}
    # Left out where they say nothing: bases of before there were adapters are still the same.
    model = {k: v for k, v in model.items() if f"model.{k}" not in later or v != plain[k]}
    parts = {
        "model": model | {"trainable": TRAINABLE},
        "tokenizer": run_tokenizer(run.model).fingerprint,
        "base": base,
        "data": pretraining.pretraining_fingerprint(run.base.seed, num_pretraining_records(run.base)),
        "system_prompt": run.data.system_prompt,
    }
    return json.loads(json.dumps(parts))


def frame_tokens(setup: Setup) -> int:
    """Tokens that a pre-training row has beside its words and image: roles, ends of turns, the system's sentence."""
    turns = (Turn("A", "B"),) * pretraining.NUM_EXERCISES
    whole = setup.format.prompts.conversation(
        setup.tokenizer, turns, system_prompt=setup.run.data.system_prompt, num_image_tokens=1
    )
    # Reading exercises stand where other records have their image.
    missing = max(0, EXERCISE_PLACES - setup.format.max_image_tokens)
    return len(whole.ids) - 1 - 2 * len(turns) + missing


class Bases:
    """The bases of a grid, in `study.base_dir`, else in `bases` beside the workdir; `claims` is where they are claimed."""

    def __init__(self, run: RunConfig, workdir: Path):
        self._run, self._workdir = run, workdir
        self._folder = Path(run.study.base_dir or workdir.absolute().parent / "bases")
        self.claims = self._folder / "claims"
        self.claims.mkdir(parents=True, exist_ok=True)
        self._names: dict[int, str] = {}
        self._loaded: tuple[int, tuple[nnx.GraphDef, nnx.State]] | None = None

    def fingerprint(self, seed: int) -> str:
        """A digest of what makes the seed's base; also the name of its directory."""
        if seed not in self._names:
            text = json.dumps(made_of(seeded(self._run, seed)), sort_keys=True)
            self._names[seed] = hashlib.sha256(text.encode()).hexdigest()[:16]
        return self._names[seed]

    def ready(self, seed: int) -> bool:
        """Whether cells can start: the base is there, or none is trained (it is `model.checkpoint`)."""
        return not self._run.base.steps or read_meta(self._folder / self.fingerprint(seed)) is not None

    def path(self, seed: int) -> str:
        """The checkpoint that the seed's cells start from; "": there is none, and weights are random."""
        return str(self._folder / self.fingerprint(seed)) if self._run.base.steps else self._run.model.checkpoint

    def load(self, setup: Setup, seed: int) -> tuple[nnx.GraphDef, nnx.State]:
        """(graphdef, params) of the seed's base on the mesh; kept until another seed is asked for."""
        if self._loaded is None or self._loaded[0] != seed:
            self._loaded = None  # its memory is needed before the next one is read
            if self._run.base.steps:
                path = self._folder / self.fingerprint(seed)
                graphdef, params, _ = load_params(path, setup.model, setup.mesh, seed=setup.run.base.seed)
            else:
                graphdef, params = start_params(setup, seed=setup.run.base.seed)
            self._loaded = seed, (graphdef, params)
        return self._loaded[1]

    def train(self, setup: Setup, seed: int, report: Callable[[int], None], goodput: Goodput) -> None:
        """Trains the seed's base, all of it, on pre-training records, and keeps it. goodput: the process's clock.

        Raises:
          NonFiniteLoss: it diverged.
        """
        name, config = self.fingerprint(seed), setup.run.base
        model = base_model(setup.run.model)
        run = dataclasses.replace(setup.run, model=model)
        setup = dataclasses.replace(setup, run=run, model=model_config(model, setup.tokenizer))
        # Rows as long as these records need, whatever the cells' are: grids of other data share the base.
        encoded = setup.encode(
            pretraining.pretraining_records(config.seed, num_pretraining_records(config)),
            max_text_tokens=pretraining.MAX_TEXT_TOKENS - VICUNA_FRAME + frame_tokens(setup),
            max_target_tokens=pretraining.MAX_TARGET_TOKENS,
        )
        graphdef, params = start_params(setup, seed=config.seed)
        trainable, frozen = split_trainable(params, TRAINABLE)
        program = make_step(
            setup.mesh, graphdef, *split_trainable(shardings(setup.model, setup.mesh), TRAINABLE),
            make_optimizer(config), accumulation_steps=config.accumulation_steps,
            compute_dtype=setup.run.model.compute_dtype,
        )  # fmt: skip

        def stream(position: int) -> Batches:
            return Batches(
                encoded, batch_size=config.batch_size, seed=config.seed, position=position,
                rows=own_rows(setup.mesh, config.batch_size),
            )  # fmt: skip

        saved = self._folder / f"{name}.checkpoints"
        spec = RunSpec(
            f"base.s{seed}", hparams_from(config, len(encoded)), stream,
            metrics=self._workdir / "metrics" / f"base.s{seed}.jsonl",
            checkpoints=saved if config.checkpoint_every_steps else None,
            config=made_of(setup.run),
            pixels=setup.pixels,
            flops_per_step=step_flops(encoded, setup.model, trainable=TRAINABLE, batch_size=config.batch_size),
        )  # fmt: skip
        state, result = fit(
            program, trainable, frozen, spec, progress=lambda steps, _: report(steps[spec.name]),
            peak_flops=peak_flops(setup.mesh), goodput=goodput, **loop_options(config),
        )  # fmt: skip
        meta = {"made_of": spec.config, "loss": result.metrics["loss"]}
        save_params(self._folder / name, join(state.params, frozen), setup.model, meta)
        if jax.process_index() == 0:
            shutil.rmtree(saved, ignore_errors=True)
