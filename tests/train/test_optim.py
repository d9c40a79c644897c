"""AdamW and its schedule against closed forms and against PyTorch; how many steps a run has."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from medcg_jax.config import TrainConfig
from medcg_jax.train.optim import decay_mask, hparams_from, learning_rate, make_optimizer, num_steps, stack_hparams

CONFIG = TrainConfig(steps=40, learning_rate=2e-3, warmup_frac=0.1, weight_decay=0.1, clip_norm=1.0, b2=0.98)


def reference_rate(step: int, peak: float, warmup: int, total: int, end: float) -> float:
    if step < warmup:
        return peak * step / max(1, warmup)
    progress = (step - warmup) / max(1, total - warmup)
    return peak * (end + (1 - end) * 0.5 * (1 + math.cos(math.pi * progress)))


def check_schedule(rate, shift: int = 0) -> None:
    for total, frac, end in ((40, 0.1, 0.0), (7, 0.03, 0.0), (100, 0.0, 0.1), (1, 0.03, 0.0)):
        config = TrainConfig(steps=total, learning_rate=3e-4, warmup_frac=frac, end_learning_rate_frac=end)
        hparams = hparams_from(config, 1)
        warmup = math.ceil(frac * total)
        found = [float(rate(jnp.int32(step + shift), hparams)) for step in range(total)]
        expected = [reference_rate(step, 3e-4, warmup, total, end) for step in range(total)]
        assert np.allclose(found, expected, atol=1e-9), (total, frac)


def test_schedule():
    check_schedule(learning_rate)


def test_a_schedule_one_step_late_is_caught():
    with pytest.raises(AssertionError):
        check_schedule(learning_rate, shift=1)


def test_schedule_is_the_references():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-3)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=4, num_training_steps=40)
    hparams = hparams_from(CONFIG, 1)
    for step in range(40):
        assert abs(schedule.get_last_lr()[0] - float(learning_rate(jnp.int32(step), hparams))) < 1e-9
        optimizer.step()
        schedule.step()


def params_and_grads(steps: int = 10):
    rng = np.random.default_rng(0)

    def tree(scale):
        return {
            "dense": {"kernel": rng.normal(0, scale, (4, 3)), "bias": rng.normal(0, scale, (2, 3))},
            "norm": {"scale": rng.normal(1, scale, (2, 4))},
        }

    cast = lambda t: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), t)
    return cast(tree(0.5)), [cast(tree(1.0 + i)) for i in range(steps)]


def ours(config: TrainConfig):
    params, grads = params_and_grads()
    optimizer, hparams = make_optimizer(config), hparams_from(config, 1)
    state = optimizer.init(params)
    for step, grad in enumerate(grads):
        updates, state = optimizer.update(grad, state, params)
        rate = learning_rate(jnp.int32(step), hparams)
        params = optax.apply_updates(params, jax.tree.map(lambda u, rate=rate: -rate * u, updates))
    return params


def by_hand(config: TrainConfig, *, decayed=("kernel",), clip=True):
    """AdamW as in arXiv 1711.05101, in float64."""
    params, grads = params_and_grads()
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    m = jax.tree.map(np.zeros_like, params)
    v = jax.tree.map(np.zeros_like, params)
    for step, grad in enumerate(grads):
        grad = jax.tree.map(lambda x: np.asarray(x, np.float64), grad)
        norm = math.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(grad)))
        factor = min(1.0, config.clip_norm / norm) if clip else 1.0
        rate = reference_rate(step, config.learning_rate, 4, 40, 0.0)

        def one(path, p, g, m, v, factor=factor, rate=rate, step=step):
            g = g * factor
            m[...] = config.b1 * m + (1 - config.b1) * g
            v[...] = config.b2 * v + (1 - config.b2) * g**2
            up = (m / (1 - config.b1 ** (step + 1))) / (np.sqrt(v / (1 - config.b2 ** (step + 1))) + config.eps)
            decay = config.weight_decay * p if path[-1].key in decayed else 0.0
            return p - rate * (up + decay)

        params = jax.tree_util.tree_map_with_path(one, params, grad, m, v)
    return params


def close(a, b) -> bool:
    return all(np.allclose(x, y, atol=1e-6) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_ten_steps_are_adamws():
    assert close(ours(CONFIG), by_hand(CONFIG))


@pytest.mark.parametrize("fault", [{"decayed": ("kernel", "bias", "scale")}, {"decayed": ()}, {"clip": False}])
def test_decayed_biases_missing_decay_and_missing_clipping_are_caught(fault):
    # The gradients are far above the clip; Adam forgets their scale but not how it changes from step to step.
    assert not close(ours(CONFIG), by_hand(CONFIG, **fault))


def test_ten_steps_are_pytorchs():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    params, grads = params_and_grads()
    leaves = jax.tree_util.tree_leaves_with_path(params)
    named = [(path, torch.tensor(np.asarray(x)).requires_grad_()) for path, x in leaves]
    groups = [
        {"params": [x for path, x in named if (path[-1].key == "kernel") == decayed], "weight_decay": 0.1 * decayed}
        for decayed in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=CONFIG.learning_rate, betas=(CONFIG.b1, CONFIG.b2), eps=CONFIG.eps)
    for step, grad in enumerate(grads):
        for (_, x), g in zip(named, jax.tree.leaves(grad), strict=True):
            x.grad = torch.tensor(np.asarray(g))
        torch.nn.utils.clip_grad_norm_([x for _, x in named], CONFIG.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = reference_rate(step, CONFIG.learning_rate, 4, 40, 0.0)
        optimizer.step()
    assert close(ours(CONFIG), [x.detach().numpy() for _, x in named])


def test_decay_mask_goes_by_name():
    mask = decay_mask({"a": {"kernel": 0, "bias": 0}, "norm": {"scale": 0}, "embed": {"table": 0}})
    assert mask == {"a": {"kernel": True, "bias": False}, "norm": {"scale": False}, "embed": {"table": True}}


def test_number_of_steps():
    assert num_steps(TrainConfig(epochs=5, batch_size=32), 300) == 47  # 46.875
    assert num_steps(TrainConfig(epochs=5, batch_size=32), 640) == 100
    assert num_steps(TrainConfig(epochs=0.1, batch_size=32), 3200) == 10
    assert num_steps(TrainConfig(epochs=5, batch_size=32), 1) == 1
    assert num_steps(TrainConfig(steps=7), 300) == 7
    with pytest.raises(ValueError, match="nothing to train"):
        num_steps(TrainConfig(), 0)


def test_control():
    hparams = hparams_from(TrainConfig(steps=100, warmup_frac=0.03, learning_rate=1e-3), 1)
    assert {k: v.item() for k, v in hparams.items()} == {
        "learning_rate": pytest.approx(1e-3), "end_frac": 0.0, "warmup_steps": 3, "total_steps": 100, "seed": 0
    }  # fmt: skip
    stacked = stack_hparams([hparams, hparams_from(TrainConfig(steps=9), 1)])
    assert stacked["total_steps"].tolist() == [100, 9] and stacked["total_steps"].dtype == np.int32


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, np.nan])
def test_clip_and_adam_are_optaxs(scale):
    """Below the limit, above it, for no gradient at all, and for one that is not a number."""
    config = TrainConfig(steps=40, weight_decay=0.0, clip_norm=1.0)
    params, grads = params_and_grads()
    grads = [jax.tree.map(lambda g: g * scale, grad) for grad in grads]
    reference = optax.chain(
        optax.clip_by_global_norm(config.clip_norm), optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    )
    optimizer = make_optimizer(config)
    state, expected_state = optimizer.init(params), reference.init(params)
    assert jax.tree.structure(state) == jax.tree.structure(expected_state)  # of a checkpoint
    for grad in grads:
        found, state = optimizer.update(grad, state, params)
        expected, expected_state = reference.update(grad, expected_state, params)
        # In float32 optax's 1 - b2**count has an error of up to 6e-5.
        for ours, theirs, within in ((found, expected, 5e-5), (state, expected_state, 2e-6)):
            for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
                np.testing.assert_allclose(x, y, rtol=within, atol=1e-7)
