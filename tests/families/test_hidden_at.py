"""`hidden(at=...)`: hidden states at some positions, of whose last layer no more is computed."""

import dataclasses

import family_toys
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from medcg_jax.families import build
from medcg_jax.nn.attention import attention, attention_at, take_positions


def model_of(family: str, unroll: int) -> nnx.Module:
    config = dataclasses.replace(family_toys.setup(family).model, scan_unroll=unroll)
    graphdef, _ = build.abstract(config)
    return nnx.merge(graphdef, jax.tree.map(jnp.asarray, family_toys.weights(family)))


def rows_of(family: str) -> dict:
    batch, _ = family_toys.training_rows(family).rows(np.arange(3))
    return batch


@pytest.mark.parametrize("family", family_toys.TINY)
def test_equals_the_hidden_states_of_the_whole_row(family):
    batch = rows_of(family)
    rng = np.random.default_rng(0)
    at = rng.integers(0, batch["segment_ids"].sum(axis=1).min(), (3, 4)).astype(np.int32)
    at[0, 1] = at[0, 0]  # as unused places of `target_positions` are: one position twice

    def run(unroll, at):
        model = model_of(family, unroll)
        images = {key: batch[key] for key in model.image_keys}
        return model.hidden(batch["tokens"], images, segment_ids=batch["segment_ids"], at=at)[0]

    whole = jax.jit(lambda: run(1, None))()
    expected = take_positions(whole, at)
    for unroll in (1, 2):
        hidden = jax.jit(lambda at, unroll=unroll: run(unroll, at))(at)
        assert np.allclose(hidden, expected, atol=1e-4, rtol=1e-4)
        # One position beside it is another hidden state.
        assert np.abs(hidden - take_positions(whole, at + 1)).max() > 1e-2


@pytest.mark.parametrize("cross_layer", [0, 1])
def test_the_last_layer_of_mllama_is_of_either_kind(cross_layer):
    """Self-attention in the released sizes, cross-attention in the tiny ones; the layers' weights are the same here."""
    batch, at = rows_of("mllama"), np.array([[3, 17], [5, 5], [0, 20]], np.int32)
    config = family_toys.setup("mllama").model
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, cross_layers=(cross_layer,)))
    assert config.text.group_size == 2
    model = nnx.merge(build.abstract(config)[0], jax.tree.map(jnp.asarray, family_toys.weights("mllama")))
    features = jax.jit(model.encode_images)({key: batch[key] for key in model.image_keys})
    for given in (None, features):
        options = dict(segment_ids=batch["segment_ids"], image_features=given)
        run = lambda at, options=options: model.hidden(batch["tokens"], at=at, **options)[0]
        whole, hidden = jax.jit(lambda run=run: run(None))(), jax.jit(run)(at)
        assert np.allclose(hidden, take_positions(whole, at), atol=1e-4, rtol=1e-4)
    alone, everywhere = (jax.jit(run).lower(x).compile().cost_analysis()["flops"] for x in (at[:, :1], None))
    assert alone < 0.8 * everywhere


@pytest.mark.parametrize(("family", "remat"), [("llava", "none"), ("llava", "full"), ("mllama", "full")])
def test_the_gradients_are_those_of_the_whole_row(family, remat):
    batch = rows_of(family)
    at = np.array([[3, 17], [5, 5], [0, 20]], np.int32)
    config = dataclasses.replace(family_toys.setup(family).model, remat=remat)
    params = jax.tree.map(jnp.asarray, family_toys.weights(family))

    def loss(params, unroll, alone):
        graphdef, _ = build.abstract(dataclasses.replace(config, scan_unroll=unroll))
        model = nnx.merge(graphdef, params)
        images, segment_ids = {key: batch[key] for key in model.image_keys}, batch["segment_ids"]
        hidden, _ = model.hidden(batch["tokens"], images, segment_ids=segment_ids, at=at if alone else None)
        hidden = hidden if alone else take_positions(hidden, at)
        return jnp.sin(hidden).sum()

    expected = jax.jit(jax.grad(lambda params: loss(params, 1, False)))(params)
    gradients = jax.jit(jax.grad(lambda params: loss(params, 2, True)))(params)
    norm = np.linalg.norm
    most = max(norm(right) for right in jax.tree.leaves(expected))
    for (path, right), ours in zip(
        jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(gradients), strict=True
    ):
        # The gradient of a key bias is 0 but for rounding.
        assert norm(ours - right) <= 1e-4 * norm(right) + 1e-6 * most, jax.tree_util.keystr(path)


def test_the_last_layer_computes_no_more():
    """FLOPs by XLA's own count, which sees the loop over layers once: of an unrolled one that is all."""
    batch = rows_of("llava")

    def flops(at):
        model = model_of("llava", 2)
        run = jax.jit(lambda: model.hidden(batch["tokens"], {"pixels": batch["pixels"]}, at=at)[0])
        return run.lower().compile().cost_analysis()["flops"]

    assert flops(np.zeros((3, 1), np.int32)) < 0.8 * flops(None)


def test_few_queries_see_what_they_see_among_all():
    """Packed rows: a query sees its own segment, and nothing of padding."""
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (2, 12, heads, 8)) for key, heads in zip(keys, (4, 2, 2), strict=True))
    segment_ids = jnp.array([[1] * 5 + [2] * 4 + [0] * 3, [1] * 12])
    at = jnp.array([[4, 7, 5], [11, 0, 6]])
    whole = attention(q, k, v, causal=True, segment_ids=segment_ids, implementation="plain")
    run = lambda segment_ids: attention_at(take_positions(q, at), k, v, at=at, segment_ids=segment_ids)
    assert np.allclose(run(segment_ids), take_positions(whole, at), atol=1e-6)
    assert np.abs(run(None) - take_positions(whole, at)).max() > 1e-2
