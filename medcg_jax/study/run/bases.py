"""Bases: the parameters that a seed's cells start from, trained once and kept by the fingerprint of what made them.

They lie in `study.base_dir`, else in `bases` beside the workdir, so that grids share them.
"""

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
from medcg_jax.data.records import Turn
from medcg_jax.families.build import join, split_trainable
from medcg_jax.study.design.schedule import seeded
from medcg_jax.train.checkpoint import load_params, read_meta, save_params
from medcg_jax.train.goodput import Goodput
from medcg_jax.train.loop import fit, loop_options
from medcg_jax.train.run import run_spec, step_program
from medcg_jax.train.setup import Setup, model_config, peak_flops, run_tokenizer, start_params

# What `frame_tokens` is in Vicuna's turns without a system's sentence, which `pretraining.MAX_TEXT_TOKENS` counts in.
VICUNA_FRAME = 13
# Image tokens that a reading exercise has in place of an image.
EXERCISE_TOKENS = 16


def num_pretraining_records(base: TrainConfig) -> int:
    """Records that `base.steps` see in `base.epochs` passes; with epochs 0 every record is new."""
    seen = base.steps * base.batch_size
    return math.ceil(seen / base.epochs) if base.epochs else seen


def base_model(model: ModelConfig) -> ModelConfig:
    """The model of a base: no adapters but MiniGPT-v2's, and all of it in float32, whatever fine-tunes have."""
    plain = ModelConfig()
    adapters = () if MODELS[model.name] == "minigpt_v2" else ("lora_rank", "lora_alpha", "lora_targets")
    return dataclasses.replace(model, **{name: getattr(plain, name) for name in (*adapters, "base_dtype")})


def made_of(run: RunConfig) -> dict:
    """Everything the base of a run (of one seed: `schedule.seeded`) is made of, as in JSON."""
    free, later = free_fields(), marked("later")
    base = {k: v for k, v in dataclasses.asdict(run.base).items() if f"base.{k}" not in free}
    model, plain = dataclasses.asdict(base_model(run.model)), dataclasses.asdict(ModelConfig())
    # With their defaults: they stand in the fingerprints of bases that are there.
    model |= {k: v for k, v in plain.items() if f"model.{k}" in free}
    # Left out where they have their default: bases of before there were adapters are still the same.
    model = {k: v for k, v in model.items() if f"model.{k}" not in later or v != plain[k]}
    parts = {
        "model": model | {"trainable": TRAINABLE},
        "tokenizer": run_tokenizer(run.model).fingerprint,
        "base": base,
        "data": pretraining.pretraining_fingerprint(run.base.seed, num_pretraining_records(run.base)),
        "system_prompt": run.data.system_prompt,
    }
    return json.loads(json.dumps(parts))


def base_path(run: RunConfig, workdir: Path, seed: int) -> Path | None:
    """The directory of a seed's base, whose name is a digest of what makes it; None: none is trained."""
    if not run.base.steps:
        return None
    text = json.dumps(made_of(seeded(run, seed)), sort_keys=True)
    folder = Path(run.study.base_dir or workdir.absolute().parent / "bases")
    return folder / hashlib.sha256(text.encode()).hexdigest()[:16]


def is_ready(path: Path | None) -> bool:
    """Whether cells can start from the base: it is there, or none is trained (`model.checkpoint` is the base)."""
    return path is None or read_meta(path) is not None


def load_base(path: Path | None, setup: Setup) -> tuple[nnx.GraphDef, nnx.State]:
    """(graphdef, params) of a base on the mesh. path: `base_path`'s."""
    if path is None:
        return start_params(setup, seed=setup.run.base.seed)
    return load_params(path, setup.model, setup.mesh, seed=setup.run.base.seed)[:2]


def frame_tokens(setup: Setup) -> int:
    """Tokens that a pre-training row has beside its words and image: roles, ends of turns, the system's sentence."""
    turns = (Turn("A", "B"),) * pretraining.NUM_EXERCISES
    conversation = setup.format.prompts.conversation(
        setup.tokenizer, turns, system_prompt=setup.run.data.system_prompt, num_image_tokens=1
    )
    # Reading exercises stand where other records have their image.
    missing = max(0, EXERCISE_TOKENS - setup.format.max_image_tokens)
    return len(conversation.ids) - 1 - 2 * len(turns) + missing


def train_base(
    path: Path, setup: Setup, *, name: str, metrics: Path, report: Callable[[int], None], goodput: Goodput
) -> None:
    """Trains a seed's base, all of it, on pre-training records, and keeps it in `path`.

    name: of its training. metrics: file of its metrics. report: called with the steps made. goodput: the process's clock.

    Raises:
      NonFiniteLoss: it diverged.
    """
    config, model = setup.run.base, base_model(setup.run.model)
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
    saved = path.with_name(f"{path.name}.checkpoints")
    recipe = made_of(setup.run)
    checkpoints = saved if config.checkpoint_every_steps else None
    spec = run_spec(name, setup, encoded, config, TRAINABLE, metrics=metrics, checkpoints=checkpoints, config=recipe)
    state, result = fit(
        step_program(setup, graphdef, config, TRAINABLE),
        trainable,
        frozen,
        spec,
        progress=lambda steps, _: report(steps[name]),
        peak_flops=peak_flops(setup.mesh),
        goodput=goodput,
        **loop_options(config),
    )
    meta = {"made_of": recipe, "loss": result.metrics["loss"]}
    save_params(path, join(state.params, frozen), setup.model, meta)
    if jax.process_index() == 0:
        shutil.rmtree(saved, ignore_errors=True)
