"""The training step of every family on 8 simulated devices is that of one: phantoms in its own format, its own loss."""

import functools

import family_toys
import jax
import numpy as np
import pytest
from family_toys import MESHES, TINY, WITH_BOXES
from train_toys import others_long

from medcg_jax.axes import RULES
from medcg_jax.config import MeshConfig, RunConfig, TrainConfig, replace
from medcg_jax.data import pipeline
from medcg_jax.families import build
from medcg_jax.train.optim import hparams_from, make_optimizer
from medcg_jax.train.setup import open_setup
from medcg_jax.train.step import make_step

# Every part that has a gradient: more than a fine-tune trains.
TRAINABLE = {
    "llava": ("vision", "projector", "decoder"),
    "qwen2_vl": ("vision", "projector", "decoder"),
    "mllama": ("vision", "projector", "decoder"),
    "minigpt_v2": ("vision", "projector", "decoder", "lora"),
    "next_chat": ("vision", "projector", "decoder", "boxes"),
}
STEPS = 4
TRAIN = TrainConfig(learning_rate=1e-3, steps=STEPS, batch_size=8, weight_decay=0.1, warmup_frac=0.0)
HPARAMS = hparams_from(TRAIN, 1)
TOLERANCE = 1e-5


@functools.cache
def program(family: str, mesh: str | None):
    """(the program of the step, the same compiled)."""
    found = family_toys.setup(family, mesh)
    graphdef, _ = build.abstract(found.model)
    places = build.split_trainable(build.shardings(found.model, found.mesh), TRAINABLE[family])
    step = make_step(found.mesh, graphdef, *places, make_optimizer(TRAIN), loss_fn=found.loss)
    trainable, frozen = build.split_trainable(family_toys.placed(family, mesh), TRAINABLE[family])
    hparams, rows = step.put_hparams(HPARAMS), jax.device_put(batch(family, 0), step.batch_sharding)
    return step, family_toys.compiled(found.mesh, step.jitted, step.start(trainable), frozen, hparams, rows)


def batch(family: str, number: int) -> dict[str, np.ndarray]:
    """Eight rows: of every subset, so that rows with and without boxes are in one batch."""
    rows = family_toys.training_rows(family)
    return rows.rows(places(family, number))[0]


def places(family: str, number: int) -> np.ndarray:
    return (number + np.arange(8) * 5) % len(family_toys.training_rows(family))


def train(family: str, mesh: str | None, *, steps: int = STEPS, params=None, change=lambda rows: rows):
    """(the state, losses, norms of gradients) after so many steps."""
    step, run = program(family, mesh)
    params = family_toys.placed(family, mesh) if params is None else params
    trainable, frozen = build.split_trainable(params, TRAINABLE[family])
    state, hparams = step.start(trainable), step.put_hparams(HPARAMS)
    found = []
    for number in range(steps):
        state, metrics = run(state, frozen, hparams, jax.device_put(change(batch(family, number)), step.batch_sharding))
        found.append(jax.device_get((metrics["loss"], metrics["grad_norm"])))
    return state, *map(np.array, zip(*found, strict=True))


@functools.cache
def alone(family: str):
    return train(family, None)


@pytest.mark.parametrize("mesh", others_long(MESHES))
@pytest.mark.parametrize("family", TINY)
def test_eight_devices_train_as_one(family, mesh):
    _, losses, norms = alone(family)
    state, split_losses, split_norms = train(family, mesh)
    assert np.abs(split_losses - losses).max() < TOLERANCE
    assert np.allclose(split_norms, norms, rtol=1e-4)
    # It moves, so that a step that does nothing would be seen.
    assert np.abs(np.diff(losses)).min() > 100 * TOLERANCE and int(state.step) == STEPS


@pytest.mark.parametrize("family", TINY)
def test_weights_that_lie_in_another_order_are_seen(family):
    """The same program on the mesh, the query heads shifted by one device; and a row that is lost."""
    mesh = "data, fsdp, tensor"
    params = jax.tree.map(lambda w: w, family_toys.placed(family, mesh))
    kernel = params["decoder"]["blocks"]["q"]["kernel"]
    params["decoder"]["blocks"]["q"]["kernel"] = jax.device_put(np.roll(kernel, 4, axis=2), kernel.sharding)
    losses = alone(family)[1]
    assert abs(train(family, mesh, steps=1, params=params)[1][0] - losses[0]) > 100 * TOLERANCE

    def lost(rows):
        return rows | {"target_weights": rows["target_weights"] * (np.arange(8) < 7)[:, None]}

    assert abs(train(family, mesh, steps=1, change=lost)[1][0] - losses[0]) > 100 * TOLERANCE


@pytest.mark.parametrize("family", TINY)
def test_what_an_empty_row_holds_is_not_felt(family):
    """The rows with which a batch is padded for devices that do not divide it: three of eight, of any records."""

    def emptied(held: int):
        def change(rows):
            rows = {key: np.concatenate([array[:5], array[[held] * 3]]) for key, array in rows.items()}
            return pipeline.emptied(rows, np.arange(8) < 5)

        return train(family, "data, fsdp, tensor", steps=2, change=change)[1:]

    (losses, norms), (other_losses, other_norms) = emptied(0), emptied(6)
    assert np.isfinite(norms).all()
    assert np.abs(losses - other_losses).max() < TOLERANCE and np.allclose(norms, other_norms, rtol=1e-5)
    assert abs(losses[0] - alone(family)[1][0]) > 100 * TOLERANCE


@pytest.mark.parametrize("family", WITH_BOXES)
def test_rows_with_boxes_are_in_the_batches(family):
    """Without them the loss is another: the boxes are trained, as text or by `box_loss`."""
    rows = family_toys.training_rows(family)
    for number in range(STEPS):
        boxed = [bool(rows.records.records[i].boxes) for i in places(family, number)]
        assert any(boxed) and not all(boxed)
    if family == "next_chat":
        blind = lambda rows: rows | {"at_weights": rows["at_weights"] * 0}
        loss = train(family, None, steps=1, change=blind)[1][0]
        assert abs(loss - alone(family)[1][0]) > 100 * TOLERANCE


@pytest.mark.parametrize("family", TINY)
def test_every_rule_splits_a_parameter_and_its_moments(family):
    """Read from the shards that the devices hold before and after training, not from the specs."""
    mesh = "data, fsdp, tensor"
    config = family_toys.setup(family, mesh).model
    names = jax.tree.leaves(build.axis_names(config), is_leaf=lambda x: isinstance(x, tuple))
    split: dict[str, set[int]] = {}
    params = family_toys.placed(family, mesh)
    for leaf, axes in zip(jax.tree.leaves(params), names, strict=True):
        shard = leaf.addressable_shards[0].data.shape
        for name, whole, part in zip(axes, leaf.shape, shard, strict=True):
            split.setdefault(name, set()).add(whole // part)
    sizes = family_toys.setup(family, mesh).mesh.shape
    product = lambda axes: int(np.prod([sizes[axis] for axis in ([axes] if isinstance(axes, str) else axes or ())]))
    assert split == {name: {product(RULES[name])} for name in split}
    expected = {"vocab", "embed", "mlp", "heads", "kv_heads", "vision_embed", "vision_mlp", "vision_heads"}
    assert expected <= set(split)
    state = train(family, mesh, steps=1)[0]
    trained = build.split_trainable(params, TRAINABLE[family])[0]
    moment = jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu"))[0].mu
    for held in (state.params, moment):
        for leaf, before in zip(jax.tree.leaves(held), jax.tree.leaves(trained), strict=True):
            assert leaf.addressable_shards[0].data.shape == before.addressable_shards[0].data.shape


@pytest.mark.parametrize("family", TINY)
def test_what_is_replicated_is_named_and_printed(family, capsys):
    """Two key heads over eight devices, or over four as a run says; more than enough, and nothing is said."""
    found = family_toys.setup(family, "tensor")
    names = build.replicated(found.model, found.mesh)
    few = found.model.text.num_kv_heads < 8
    assert bool(names) == few == (family in ("qwen2_vl", "mllama"))
    assert all("kv_heads" in _axes(found.model, name) for name in names)
    params = family_toys.placed(family, "tensor")
    for name in names:
        leaf = functools.reduce(lambda tree, key: tree[key], name.split("."), params)
        assert leaf.addressable_shards[0].data.shape == leaf.shape
    run = replace(RunConfig(), model__name=TINY[family], mesh=MeshConfig(data=2, tensor=4))
    open_setup(run)
    said = capsys.readouterr().out
    assert ("so every device holds whole: " in said) == few
    assert all(name in said for name in names)


def _axes(config, name: str) -> tuple[str, ...]:
    return functools.reduce(lambda tree, key: tree[key], name.split("."), build.axis_names(config))
