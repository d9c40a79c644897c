"""AdamW without a learning rate inside, and the learning rate as a function of run-time values.

Number of steps, warm-up, learning rate and seed are arrays (`hparams`), so that cells with different values share one
compiled step. The schedule and the steps of an epoch are those of the reference, whose first warm-up step has the rate
0: huggingface/transformers:optimization.py:get_cosine_schedule_with_warmup (5.23.0).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from medcg_jax.config import MOST_STEPS, ConfigError, TrainConfig

Hparams = Mapping[str, Any]  # arrays on the devices, or numpy scalars before
# Last names of the parameters without weight decay: biases, and the scales of norms.
NOT_DECAYED = ("bias", "scale")


class Optimizer(NamedTuple):
    """An `optax.GradientTransformation` whose `init` returns the state in the dtype that it is stored in.

    `update` takes and returns float32. param_dtype: in which trainable parameters are stored between updates.
    """

    init: Callable
    update: Callable
    param_dtype: str


def make_optimizer(config: TrainConfig, rows: Sequence[int] = ()) -> Optimizer:
    """AdamW's direction of ascent, to be scaled by minus the learning rate: clip, Adam, decoupled weight decay.

    Of `config`, state and program depend on clip_norm, b1, b2, eps, weight_decay, param_dtype and moment_dtype only.
    rows: of the embedding, the only ones that change; (): all.
    Source: huggingface/peft:src/peft/tuners/trainable_tokens (rows alone).
    """
    parts = [_only_rows(rows)] if rows else []
    parts += [_clip(config.clip_norm)] if config.clip_norm else []
    parts.append(_adam(config.b1, config.b2, config.eps))
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=decay_mask))
    if rows and config.weight_decay:
        parts.append(_only_rows(rows))
    chain = optax.chain(*parts)

    def init(params):
        # From float32 parameters, as `update` has them. All arrays but the count of updates are moments.
        state = chain.init(widen(params))
        return jax.tree.map(lambda x: x.astype(config.moment_dtype) if x.dtype == jnp.float32 else x, state)

    return Optimizer(init, chain.update, config.param_dtype)


def _clip(max_norm: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm`, by one factor for all arrays.

    Optax selects between each array and the scaled one, with a division for each number, which a CPU's compiler does in
    passes of their own.
    """

    def update(updates, params):
        factor = jnp.minimum(1.0, max_norm / optax.global_norm(updates))
        return jax.tree.map(lambda g: g * factor, updates)

    return optax.stateless(update)


def _adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """`optax.scale_by_adam`, which divides each number by the two corrections; here they are factors.

    A pass over parameter, gradient and moments then has one division and one root, and is bound by memory alone.
    """
    reference = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)

    def update(updates, state, params=None):
        count = optax.safe_increment(state.count)
        mu = jax.tree.map(lambda g, m: (1 - b1) * g + b1 * m, updates, state.mu)
        nu = jax.tree.map(lambda g, v: (1 - b2) * jnp.square(g) + b2 * v, updates, state.nu)
        # 1 - b**count, without the digits that its difference from 1 would cost.
        first, second = (-1 / jnp.expm1(count * math.log(b)) if b else 1.0 for b in (b1, b2))
        ascent = jax.tree.map(lambda m, v: (m * first) / (jnp.sqrt(v * second) + eps), mu, nu)
        return ascent, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    return optax.GradientTransformation(reference.init, update)


def _only_rows(rows: Sequence[int]) -> optax.GradientTransformation:
    """Sets the updates of the other rows of tables (parameters named "table") to zero."""

    def keep(path, update):
        if last_name(path) != "table":
            return update
        kept = jnp.isin(jnp.arange(update.shape[-2]), jnp.asarray(rows))
        return jnp.where(kept[:, None], update, 0)

    return optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(keep, updates))


def decay_mask(params):
    """True for each parameter with weight decay. By name, as layers are stacked and a norm's scale has two axes."""
    return jax.tree_util.tree_map_with_path(lambda path, _: last_name(path) not in NOT_DECAYED, params)


def last_name(path) -> str:
    """The last name of a leaf's path: "bias" for decoder.head.bias."""
    return str(getattr(path[-1], "key", getattr(path[-1], "name", path[-1])))


def learning_rate(step: jax.Array, hparams: Hparams) -> jax.Array:
    """float32[] learning rate of update number `step` (from 0): linear warm-up from 0, then half a cosine.

    hparams: learning_rate (the peak), end_frac (the last rate over the peak, 0-1), warmup_steps, total_steps.
    """
    step = jnp.asarray(step, jnp.float32)
    warmup = jnp.asarray(hparams["warmup_steps"], jnp.float32)
    total = jnp.asarray(hparams["total_steps"], jnp.float32)
    rising = step / jnp.maximum(warmup, 1.0)
    progress = jnp.clip((step - warmup) / jnp.maximum(total - warmup, 1.0), 0.0, 1.0)
    end = jnp.asarray(hparams["end_frac"], jnp.float32)
    falling = end + (1.0 - end) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
    peak = jnp.asarray(hparams["learning_rate"], jnp.float32)
    return peak * jnp.where(step < warmup, rising, falling)


def num_steps(config: TrainConfig, num_records: int) -> int:
    """Updates of a run: `config.steps`, or as many batches as `config.epochs` passes over the records need.

    Raises:
      ConfigError: neither steps nor epochs, no records, or more updates than can be counted.
    """
    if config.steps:
        return config.steps
    if config.epochs <= 0 or num_records <= 0:
        raise ConfigError(f"epochs={config.epochs} over {num_records} records with steps=0: there is nothing to train")
    # Rounded first, so that 0.1 of 3,200 records is 10 batches of 32, not 11.
    steps = max(1, math.ceil(round(config.epochs * num_records / config.batch_size, 6)))
    if steps > MOST_STEPS:
        raise ConfigError(
            f"epochs={config.epochs} over {num_records:,} records are {steps:,} steps, more than {MOST_STEPS:,}"
        )
    return steps


def hparams_from(config: TrainConfig, num_records: int) -> Hparams:
    """A training's run-time values as numpy scalars: learning_rate, end_frac, warmup_steps, total_steps, seed."""
    total = num_steps(config, num_records)
    return {
        "learning_rate": np.float32(config.learning_rate),
        "end_frac": np.float32(config.end_learning_rate_frac),
        "warmup_steps": np.int32(math.ceil(round(config.warmup_frac * total, 6))),
        "total_steps": np.int32(total),
        "seed": np.uint32(config.seed % 2**32),
    }


def stack_hparams(cells: Sequence[Hparams]) -> Hparams:
    """The hyper-parameters of several cells, each value with a leading cell axis."""
    return {key: np.stack([hparams[key] for hparams in cells]) for key in cells[0]}


def widen(tree):
    """`tree` with its floating arrays in float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def narrow(tree, like, seed: jax.typing.ArrayLike, step: jax.Array):
    """`tree` in the dtypes of `like`; a leaf that loses digits is rounded with noise of (seed, step, leaf index).

    So the same update gives the same bits on every mesh, after every resumption, and in every slot of a program.

    seed: uint32[] of the run. step: int32[].
    """
    leaves, treedef = jax.tree.flatten(tree)
    dtypes = [x.dtype for x in jax.tree.leaves(like)]
    if all(x.dtype == dtype for x, dtype in zip(leaves, dtypes, strict=True)):
        return tree
    key = jax.random.fold_in(jax.random.key(seed), step)
    rounded = [
        x if x.dtype == dtype else round_at_random(x, jax.random.fold_in(key, index))
        for index, (x, dtype) in enumerate(zip(leaves, dtypes, strict=True))
    ]
    return jax.tree.unflatten(treedef, rounded)


def round_at_random(x: jax.Array, key: jax.Array) -> jax.Array:
    """bfloat16[...] whose mean over keys is x, float32[...]; a number that bfloat16 can hold stays the same.

    A bfloat16 is the upper half of a float32. Noise added to the lower half carries into the upper one with a
    probability in proportion to the lower half.
    """
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    upper = (jax.lax.bitcast_convert_type(x, jnp.uint32) + noise) >> 16
    rounded = jax.lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)
    # A carry could turn a NaN into a number.
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))
