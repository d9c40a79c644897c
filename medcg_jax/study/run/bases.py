"""Bases: the parameters that a seed's cells start from, trained once and stored under a fingerprint of their recipe.

They are in `study.base_dir`, else in `bases` beside the workdir, so that grids share them.
"""

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from medcg_jax.config import MODELS, TRAINABLE, ModelConfig, RunConfig, TrainConfig, free_fields, marked
from medcg_jax.data.encoding import cut_rows
from medcg_jax.data.phantom import pretraining
from medcg_jax.data.phantom.images import NUM_SITES, SITES_PER_SIDE
from medcg_jax.data.records import Turn
from medcg_jax.families.build import join, split_trainable
from medcg_jax.study.design.schedule import seeded
from medcg_jax.train.checkpoint import load_params, save_params
from medcg_jax.train.goodput import Goodput
from medcg_jax.train.loop import fit, loop_options
from medcg_jax.train.losses import negative_log_likelihood, token_loss
from medcg_jax.train.meta import read_meta
from medcg_jax.train.run import run_spec, step_program
from medcg_jax.train.setup import Setup, model_config, peak_flops, run_tokenizer, start_params

# Weight of a site's classes beside the tokens' loss. Without them a tower learns to see from captions alone, in four times
# as many steps.
SITE_WEIGHT = 0.3


def num_pretraining_records(base: TrainConfig) -> int:
    """Number of records that `base.steps` read in `base.epochs` passes; with epochs 0 no record is read twice."""
    seen = base.steps * base.batch_size
    return math.ceil(seen / base.epochs) if base.epochs else seen


def base_model(model: ModelConfig) -> ModelConfig:
    """The model of a base: without adapters (but MiniGPT-v2's) and in float32, whatever its fine-tunes use."""
    defaults = ModelConfig()
    adapters = () if MODELS[model.name] == "minigpt_v2" else ("lora_rank", "lora_alpha", "lora_targets")
    names = (*adapters, "base_dtype", "trainable_words")
    return dataclasses.replace(model, **{name: getattr(defaults, name) for name in names})


def base_recipe(run: RunConfig) -> dict:
    """Everything that determines the base of a run (of one seed: `schedule.seeded`), as JSON values."""
    free, later = free_fields(), marked("later")
    base = {k: v for k, v in dataclasses.asdict(run.base).items() if f"base.{k}" not in free}
    model, defaults = dataclasses.asdict(base_model(run.model)), dataclasses.asdict(ModelConfig())
    # Existing fingerprints contain the defaults of these fields.
    model |= {k: v for k, v in defaults.items() if f"model.{k}" in free}
    # Fields younger than existing bases are left out at their defaults.
    model = {k: v for k, v in model.items() if f"model.{k}" not in later or v != defaults[k]}
    recipe = {
        "model": model | {"trainable": TRAINABLE},
        "tokenizer": run_tokenizer(run.model).fingerprint,
        "base": base,
        "data": pretraining.pretraining_fingerprint(run.base.seed, num_pretraining_records(run.base)),
        "system_prompt": run.data.system_prompt,
    }
    return json.loads(json.dumps(recipe))


def base_path(run: RunConfig, workdir: Path, seed: int) -> Path | None:
    """The directory of a seed's base, named by a digest of its recipe; None where no base is trained."""
    if not run.base.steps:
        return None
    text = json.dumps(base_recipe(seeded(run, seed)), sort_keys=True)
    folder = Path(run.study.base_dir or workdir.absolute().parent / "bases")
    return folder / hashlib.sha256(text.encode()).hexdigest()[:16]


def is_ready(path: Path | None) -> bool:
    """Whether cells can start: the base exists, or none is trained (`model.checkpoint` is the base)."""
    return path is None or read_meta(path) is not None


def load_base(path: Path | None, setup: Setup) -> tuple[nnx.GraphDef, nnx.State]:
    """(graphdef, params) of a base on the mesh. path: `base_path`'s."""
    if path is None:
        return start_params(setup, seed=setup.run.base.seed)
    return load_params(path, setup.model, setup.mesh, seed=setup.run.base.seed)[:2]


def frame_tokens(setup: Setup) -> int:
    """Tokens of a pre-training row beside its words and image: roles, ends of turns, the system prompt."""
    turns = (Turn("A", "B"),) * max(pretraining.NUM_TURNS.values())
    conversation = setup.format.prompts.conversation(
        setup.tokenizer, turns, system_prompt=setup.run.data.system_prompt, num_image_tokens=1
    )
    return len(conversation.ids) - 1 - 2 * len(turns)


def base_loss(model, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """`token_loss` plus the cross-entropy of what each site of the image shows, read from the features of its tokens.

    The readout is random and fixed: the tower and the projector learn to be read by it.
    batch: of `token_loss`, and `site_labels` int32[B, 16, 5] (`pretraining.site_labels`).
    """
    total, weight = token_loss(model, batch)
    tokens, cells = model.image_tokens({key: batch[key] for key in model.image_keys}, SITES_PER_SIDE)
    is_of_site = jax.nn.one_hot(cells, NUM_SITES)
    features = jnp.einsum("bps,bpd->bsd", is_of_site / jnp.maximum(is_of_site.sum(1, keepdims=True), 1), tokens)
    features *= jax.lax.rsqrt(jnp.square(features).mean(-1, keepdims=True) + 1e-6)
    bounds = np.cumsum((0, *pretraining.SITE_CLASSES))
    readout = jax.random.normal(jax.random.key(0), (features.shape[-1], bounds[-1])) * 2 / features.shape[-1] ** 0.5
    logits = features @ readout
    # Rows that only fill a batch have no segment.
    is_row, loss = (batch["segment_ids"].max(-1) > 0)[:, None], jnp.float32(0)
    for labels, start, end in zip(jnp.moveaxis(batch["site_labels"], -1, 0), bounds, bounds[1:]):
        has_label = is_row & (labels >= 0)
        nll = negative_log_likelihood(logits[..., start:end], labels)
        loss += jnp.where(has_label, nll, 0).sum() / jnp.maximum(has_label.sum(), 1)
    return total + weight * SITE_WEIGHT * loss, weight


def with_common_start(params: nnx.State, tokens: np.ndarray) -> nnx.State:
    """The params with one embedding for all tokens that do not occur in `tokens`: the mean of those that do.

    A word that a base has not read otherwise starts at a random embedding, which the base may take for a word it knows:
    an untrained word would then have a meaning by accident.
    Source: the mean of huggingface/transformers:modeling_utils.py:resize_token_embeddings (5.23.0), without its noise.
    """

    def start(table: jax.Array) -> jax.Array:
        is_read = jnp.isin(jnp.arange(table.shape[0]), np.unique(tokens))[:, None]
        mean = jnp.where(is_read, table, 0).sum(0) / is_read.sum()
        return jnp.where(is_read, table, mean)

    embed = params["decoder"]["embed"]
    embed["table"] = jax.jit(start, out_shardings=embed["table"].sharding)(embed["table"])
    return params


def train_base(
    path: Path, setup: Setup, *, name: str, metrics: Path, report: Callable[[int], None], goodput: Goodput
) -> None:
    """Trains all parameters of a seed's base on pre-training records, and saves it in `path`.

    name: of its training. metrics: file of its metrics. report: called with the steps done. goodput: the process's clock.

    Raises:
      NonFiniteLoss: it diverged.
    """
    config, model = setup.run.base, base_model(setup.run.model)
    run = dataclasses.replace(setup.run, model=model)
    setup = dataclasses.replace(setup, run=run, model=model_config(model, setup.tokenizer))
    num = num_pretraining_records(config)
    # Row lengths depend on these records alone: grids of other data share the base.
    encoded = setup.encode(
        pretraining.pretraining_records(config.seed, num),
        max_text_tokens=pretraining.MAX_TEXT_TOKENS + frame_tokens(setup),
        max_target_tokens=pretraining.MAX_TARGET_TOKENS,
    )
    encoded = cut_rows(encoded, int(encoded.arrays["length"].max()))
    sites = pretraining.site_labels(pretraining.pretraining_scene(config.seed, num)[0])
    encoded = dataclasses.replace(encoded, arrays=encoded.arrays | {"site_labels": sites})
    graphdef, params = start_params(setup, seed=config.seed)
    trainable, frozen = split_trainable(params, TRAINABLE)
    recipe, folder = base_recipe(setup.run), path.with_name(f"{path.name}.checkpoints")
    checkpoints = folder if config.checkpoint_every_steps else None
    spec = run_spec(name, setup, encoded, config, TRAINABLE, metrics=metrics, checkpoints=checkpoints, config=recipe)
    state, result = fit(
        step_program(setup, graphdef, config, TRAINABLE, loss_fn=base_loss),
        trainable,
        frozen,
        spec,
        progress=lambda steps, _: report(steps[name]),
        peak_flops=peak_flops(setup.mesh),
        goodput=goodput,
        **loop_options(config),
    )
    meta = {"made_of": recipe, "loss": result.metrics["loss"]}
    params = with_common_start(join(state.params, frozen), encoded.arrays["tokens"])
    save_params(path, params, setup.model, meta, beside=setup.companions)
    if jax.process_index() == 0:
        shutil.rmtree(folder, ignore_errors=True)
