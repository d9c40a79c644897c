"""The loop over layers: the same numbers whatever the unrolling and the rematerialisation, which really happens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from medcg_jax.nn import blocks, context
from medcg_jax.nn.blocks import ClipBlock, run_stack


@pytest.fixture(scope="module")
def stack():
    return ClipBlock(12, 2, 20, eps=1e-5, rngs=nnx.Rngs(0), param_dtype=jnp.float32, stack=(3,))


def loss(block_stack, x, **how):
    def body(block, x, own):
        return block(x, implementation="plain"), None if own is None else own * 2

    y, outs = run_stack(block_stack, body, x, jnp.arange(3.0), **how)
    return jnp.sin(y).sum(), outs


def test_a_stack_is_its_layers_one_after_another(stack):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 12)), jnp.float32)
    graphdef, params = nnx.split(stack)
    y = x
    for i in range(3):
        y = nnx.merge(graphdef, jax.tree.map(lambda w, i=i: w[i], params))(y, implementation="plain")
    expected = jnp.sin(y).sum()
    reference = None
    for unroll, remat in ((0, "none"), (1, "none"), (2, "full"), (1, "dots")):
        run = jax.value_and_grad(lambda x, how=dict(unroll=unroll, remat=remat): loss(stack, x, **how), has_aux=True)
        (value, outs), grad = jax.jit(run)(x)
        assert abs(value - expected) < 1e-4
        assert outs.tolist() == [0, 2, 4]
        reference = grad if reference is None else reference
        assert jnp.abs(grad - reference).max() < 1e-5


def test_unrolling_follows_the_platform(stack, monkeypatch):
    x = jnp.ones((1, 2, 12))

    def unroll(**how):
        jaxpr = jax.make_jaxpr(lambda x: loss(stack, x, **how))(x)
        return next(eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan").params["unroll"]

    assert unroll(unroll=0, remat="none") == 3
    assert unroll(unroll=2, remat="none") == 2
    monkeypatch.setattr(blocks, "platform", lambda: "tpu")
    assert unroll(unroll=0, remat="none") == 1


def test_remat_is_a_checkpoint_and_unknown_names_are_refused(stack):
    x = jnp.ones((1, 2, 12))
    assert "prevent_cse" not in str(jax.make_jaxpr(lambda x: loss(stack, x, unroll=1, remat="none"))(x))
    assert "prevent_cse" in str(jax.make_jaxpr(lambda x: loss(stack, x, unroll=1, remat="full"))(x))
    with pytest.raises(ValueError, match="remat='all'; accepted: none, full, dots"):
        loss(stack, x, unroll=1, remat="all")


def test_without_a_mesh_nothing_is_constrained():
    x = jnp.ones((2, 3))
    assert context.current_mesh() is None
    assert context.constrain(x, "act_batch", None) is x
    assert context.platform() == jax.default_backend()


def test_a_split_stack_has_the_gradient_of_two_slices():
    rng = np.random.default_rng(0)
    w, a, b = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((3, 4, 2), (2, 4, 2), (4, 2)))

    def loss(w, split):
        first, last = split(w)
        return (first * a).sum() + (jnp.sin(last) * b).sum()

    ours, slices = (jax.grad(loss)(w, split) for split in (blocks.split_last, lambda w: (w[:-1], w[-1])))
    assert (ours == slices).all()
    numbers = jnp.arange(6, dtype=jnp.int8).reshape(3, 2)
    assert [x.tolist() for x in blocks.split_last(numbers)] == [[[0, 1], [2, 3]], [4, 5]]
