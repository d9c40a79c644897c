"""The loss: the head at supervised positions only, in sums over tokens that any split of a batch adds up to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from train_toys import CONFIG, ROWS, TARGETS, batch

from medcg_jax.families.llava.model import Llava
from medcg_jax.train.losses import negative_log_likelihood, token_loss


@pytest.fixture(scope="module")
def model():
    return nnx.jit(lambda: Llava(CONFIG, rngs=nnx.Rngs(0)))()


@pytest.fixture(scope="module")
def loss(model):
    graphdef, params = nnx.split(model)
    jitted = jax.jit(lambda params, rows: token_loss(nnx.merge(graphdef, params), rows))
    return lambda rows: jitted(params, rows)


def by_hand(model, rows) -> tuple[float, float]:
    """The sums from logits at every position, in float64."""
    forward = nnx.jit(lambda m, rows: m(rows["tokens"], {"pixels": rows["pixels"]}, segment_ids=rows["segment_ids"]))
    logits = np.asarray(forward(model, rows), np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    logprobs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    total = 0.0
    for row in range(len(logits)):
        for slot in range(TARGETS):
            at = logprobs[row, rows["target_positions"][row, slot], rows["targets"][row, slot]]
            total -= float(at) * rows["target_weights"][row, slot]
    return total, float(rows["target_weights"].sum())


def test_equals_the_logits_of_the_whole_row(model, loss):
    rows = batch(0)
    expected = by_hand(model, rows)
    assert np.allclose(loss(rows), expected, rtol=1e-5)
    # A loss that looks one position too far is another one.
    moved = {**rows, "target_positions": rows["target_positions"] + 1}
    assert abs(float(loss(moved)[0]) - expected[0]) > 1e-2


class Linear:
    """Logits from the token alone, so that hypothesis may try many batches."""

    image_keys = ("pixels",)

    def hidden(self, tokens, images, *, segment_ids, at):
        tokens = jnp.take_along_axis(tokens, at, axis=1)
        return jax.nn.one_hot(tokens, 40) * 3.0 + jnp.sin(tokens[..., None] * jnp.arange(1.0, 41.0)), None

    def logits(self, hidden):
        return hidden


def check_padding(loss, seed: int, scale: float) -> None:
    """Rows of weight 0 behind a batch change neither sum, whatever they hold."""
    rows, more = batch(seed, 4), batch(seed + 1, 2)
    more["target_weights"] *= scale
    both = {key: np.concatenate([rows[key], more[key]]) for key in rows}
    expected, found = loss(rows), loss(both)
    assert np.allclose(expected, found, rtol=1e-6)


linear_loss = jax.jit(lambda rows: token_loss(Linear(), rows))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000))
def test_rows_without_weight_change_nothing(seed):
    check_padding(linear_loss, seed, 0.0)


def test_rows_with_weight_do():
    with pytest.raises(AssertionError):
        check_padding(linear_loss, 0, 1.0)


def test_a_mean_over_slots_is_caught():
    def mean_over_slots(rows):
        total, weight = linear_loss(rows)
        return total / rows["targets"].size, weight

    with pytest.raises(AssertionError):
        check_padding(mean_over_slots, 0, 0.0)


def test_an_infinite_loss_without_weight_does_not_count():
    class Overflows(Linear):
        def logits(self, hidden):
            return jnp.where(jnp.arange(hidden.shape[0])[:, None, None] == 1, -jnp.inf, hidden)

    rows = batch(0, 2)
    rows["target_weights"][1] = 0
    assert np.isfinite(token_loss(Overflows(), rows)[0])
    rows["target_weights"][1] = 1
    assert not np.isfinite(token_loss(Overflows(), rows)[0])


def test_parts_of_a_batch_add_up(loss):
    rows = batch(3)
    parts = [loss({k: v[i : i + 4] for k, v in rows.items()}) for i in range(0, ROWS, 4)]
    assert np.allclose(np.sum(parts, axis=0), loss(rows), rtol=1e-6)


def test_log_likelihood_is_in_float32_over_the_whole_vocabulary():
    found = negative_log_likelihood(jnp.asarray([[1000.0, 996.0, 0.0]], jnp.bfloat16), jnp.asarray([1]))
    assert found.dtype == jnp.float32 and abs(float(found[0]) - np.log1p(np.exp(4.0))) < 1e-6
