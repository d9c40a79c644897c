"""The step of one run: accumulation, mesh and compilation change nothing; a run that is over stays as it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train_toys import CONFIG, ROWS, TRAIN, TRAINABLE, batch, run, same_bits, setup

from medcg_jax.config import MeshConfig, replace
from medcg_jax.families import build
from medcg_jax.train.losses import token_loss
from medcg_jax.train.optim import hparams_from

HPARAMS = hparams_from(TRAIN, 1)
STEPS = 10


@pytest.fixture(scope="module")
def alone():
    """(program, trainable, frozen, state, metrics) of ten steps on one device."""
    program, trainable, frozen = setup()
    return program, trainable, frozen, *run(program, trainable, frozen, [HPARAMS], STEPS)


def largest(a, b) -> float:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in pairs)


def test_it_learns_with_one_compilation(alone):
    program, _, _, state, metrics = alone
    assert program.jitted._cache_size() == 1
    assert np.isfinite(metrics["loss"]).all() and int(state.step) == STEPS
    assert metrics["step"].tolist() == list(range(1, STEPS + 1))
    assert metrics["lr"][0] == 0 and metrics["lr"][1] == pytest.approx(TRAIN.learning_rate)


def test_steps_and_rate_are_run_time_values(alone):
    program, trainable, frozen, state, _ = alone
    other = hparams_from(replace(TRAIN, steps=3, learning_rate=1e-3, warmup_frac=0.5), 1)
    after, metrics = run(program, trainable, frozen, [other], 4)
    assert program.jitted._cache_size() == 1
    assert metrics["active"].tolist() == [True] * 3 + [False] and largest(after.params, state.params) > 1e-3
    # The count has teeth: another batch size is another program.
    hparams = program.put_hparams(HPARAMS)
    rows = jax.device_put(batch(0, 4), program.batch_sharding)
    program(program.start(trainable), frozen, hparams, rows)
    assert program.jitted._cache_size() == 2


def test_callers_parameters_outlive_the_donation(alone):
    _, trainable, frozen, _, _ = alone
    assert not any(x.is_deleted() for x in jax.tree.leaves((trainable, frozen)))


def test_a_run_that_is_over_keeps_every_bit(alone):
    program, trainable, frozen, state, _ = alone
    before = jax.device_get(state)
    copy = jax.tree.map(lambda x: jnp.array(x, copy=True), state)
    after, metrics = run(program, trainable, frozen, [HPARAMS], 1, state=copy)
    assert not metrics["active"].any() and same_bits(before, after)
    longer = hparams_from(replace(TRAIN, steps=20), 1)
    copy = jax.tree.map(lambda x: jnp.array(x, copy=True), state)
    moved, _ = run(program, trainable, frozen, [longer], 1, state=copy)
    assert not same_bits(before, moved)


def mean_of_micro_batch(model, rows):
    """The mistake: every micro-batch counts alike, however many tokens it supervises."""
    total, weight = token_loss(model, rows)
    return total / weight, jnp.float32(1.0)


def test_accumulation_is_the_large_batch(alone):
    _, _, _, _, expected = alone
    _, metrics = run(*setup(accumulation_steps=4), [HPARAMS], 3)
    assert np.allclose(metrics["loss"], expected["loss"][:3], atol=1e-6)
    assert np.allclose(metrics["grad_norm"], expected["grad_norm"][:3], rtol=1e-6)


def test_a_mean_of_means_is_caught(alone):
    _, _, _, _, expected = alone
    _, metrics = run(*setup(accumulation_steps=4, loss_fn=mean_of_micro_batch), [HPARAMS], 1)
    assert abs(metrics["loss"][0] - expected["loss"][0]) > 1e-3


def test_eight_devices_are_one(alone):
    _, _, _, state, expected = alone
    program, trainable, frozen = setup(MeshConfig(data=2, fsdp=2, tensor=2))
    after, metrics = run(program, trainable, frozen, [HPARAMS], STEPS)
    assert np.abs(metrics["loss"] - expected["loss"]).max() < 1e-5
    assert np.allclose(metrics["grad_norm"], expected["grad_norm"], rtol=1e-4)
    assert largest(after.params, state.params) < 1e-3  # Adam divides small numbers by small ones
    assert program.jitted._cache_size() == 1
    # Parameters and moments are really split.
    kernel = after.params["decoder"]["blocks"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 4 == kernel.size
    moment = jax.tree.leaves(after.opt_state, is_leaf=lambda x: hasattr(x, "mu"))[0].mu
    assert jax.tree.map(lambda x: x.sharding, moment) == jax.tree.map(lambda x: x.sharding, after.params)


def test_a_row_lost_on_the_way_is_caught(alone):
    program, trainable, frozen, _, expected = alone
    rows = batch(0)
    rows["target_weights"][ROWS - 1] = 0
    hparams = program.put_hparams(HPARAMS)
    _, metrics = program(program.start(trainable), frozen, hparams, jax.device_put(rows, program.batch_sharding))
    assert abs(float(metrics["loss"]) - expected["loss"][0]) > 1e-5


def test_bfloat16_computes_near_float32_and_keeps_float32_weights(alone):
    _, _, _, _, expected = alone
    state, metrics = run(*setup(compute_dtype="bfloat16"), [HPARAMS], 2)
    assert {str(x.dtype) for x in jax.tree.leaves(state.params)} == {"float32"}
    difference = np.abs(metrics["loss"] - expected["loss"][:2]).max()
    assert 0 < difference < 0.05


def test_compiles_ahead_of_time_from_shapes_alone(alone):
    program, _, _, _, _ = alone
    _, params = build.abstract(CONFIG)
    trainable, frozen = build.split_trainable(params, TRAINABLE)
    lowered, compiled, *seconds = program.compile(trainable, frozen, batch(0))
    state_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(program.abstract_state(trainable)))
    # The donated state's memory is the new state's.
    assert compiled.memory_analysis().alias_size_in_bytes >= state_bytes
    assert min(seconds) > 0 and "donor" in lowered.as_text() or "aliasing" in lowered.as_text()
