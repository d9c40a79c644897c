"""The step: accumulation, mesh and neighbours in one program change nothing; a run that is over stays as it is."""

import dataclasses

import jax
import jax.numpy as jnp
import micro
import numpy as np
import pytest
import train_toys
from micro import setup
from train_toys import CONFIG, ROWS, TRAIN, TRAINABLE, batch, run, same_bits

from medcg_jax.config import MeshConfig, replace
from medcg_jax.families import build
from medcg_jax.plan import hlo
from medcg_jax.train import step as step_module
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
    total, weight = micro.loss(model, rows)
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
    kernel = after.params["decoder"]
    assert kernel.addressable_shards[0].data.size * 2 == kernel.size
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
    program = alone[0]
    trainable, frozen = jax.eval_shape(lambda *params: params, *alone[1:3])
    lowered, compiled, *seconds = program.compile(trainable, frozen, batch(0))
    state_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(program.abstract_state(trainable)))
    # The donated state's memory is the new state's.
    assert compiled.memory_analysis().alias_size_in_bytes >= state_bytes
    assert min(seconds) > 0 and "donor" in lowered.as_text() or "aliasing" in lowered.as_text()


# ------------------------------------------------------------------ several runs in one program

# Cells of different length, rate and warm-up.
ALL_HPARAMS = [
    hparams_from(replace(TRAIN, steps=steps, learning_rate=rate, warmup_frac=frac), 1)
    for steps, rate, frac in ((10, 1e-2, 0.1), (6, 3e-3, 0.0), (10, 1e-3, 0.3), (3, 5e-3, 0.0))
]
CELL_MESH = MeshConfig(cell=2, data=1, fsdp=2, tensor=2)


@pytest.fixture(scope="module")
def one_by_one():
    return [run(*setup(), [c], STEPS, seeds=[100 * i]) for i, c in enumerate(ALL_HPARAMS)]


@pytest.fixture(scope="module")
def on_cell_mesh():
    program, trainable, frozen = setup(CELL_MESH, num_cells=4)
    return program, trainable, frozen, *run(program, trainable, frozen, ALL_HPARAMS, STEPS)


def check_alike(one_by_one, program, state, metrics) -> None:
    for i, (alone, expected) in enumerate(one_by_one):
        steps = int(ALL_HPARAMS[i]["total_steps"])
        assert metrics["active"][:, i].tolist() == [True] * steps + [False] * (STEPS - steps)
        assert np.abs(metrics["loss"][:steps, i] - expected["loss"][:steps]).max() < 1e-5
        assert np.allclose(metrics["grad_norm"][:steps, i], expected["grad_norm"][:steps], rtol=1e-4)
        cell = program.take(state, i)
        assert int(cell.step) == int(alone.step) == steps
        for x, y in zip(jax.tree.leaves(cell.params), jax.tree.leaves(alone.params), strict=True):
            assert np.allclose(x, y, atol=1e-3)


def test_four_at_a_time_on_one_device(one_by_one):
    program, trainable, frozen = setup(num_cells=4)
    check_alike(one_by_one, program, *run(program, trainable, frozen, ALL_HPARAMS, STEPS))
    assert program.jitted._cache_size() == 1


def test_four_at_a_time_on_a_mesh_with_cells(one_by_one, on_cell_mesh):
    program, _, _, state, metrics = on_cell_mesh
    check_alike(one_by_one, program, state, metrics)
    assert program.jitted._cache_size() == 1
    with pytest.raises(AssertionError):
        check_alike(one_by_one[::-1], program, state, metrics)


def test_a_cell_that_is_over_keeps_every_bit_while_others_move(on_cell_mesh):
    program, trainable, frozen, _, _ = on_cell_mesh
    state, _ = run(program, trainable, frozen, ALL_HPARAMS, 3)
    before = jax.device_get(state)
    after, metrics = run(program, trainable, frozen, ALL_HPARAMS, 1, state=state)
    assert metrics["active"].tolist() == [[True, True, True, False]]
    cell = lambda tree, i: jax.tree.map(lambda x: np.asarray(x)[i], tree)
    assert [same_bits(cell(before, i), cell(after, i)) for i in range(4)] == [False, False, False, True]


def test_a_neighbour_that_diverges_is_not_felt(on_cell_mesh):
    program, trainable, frozen, state, metrics = on_cell_mesh
    sick = [ALL_HPARAMS[0], {**ALL_HPARAMS[1], "learning_rate": np.float32(np.inf)}, *ALL_HPARAMS[2:]]
    after, found = run(program, trainable, frozen, sick, STEPS)
    assert not np.isfinite(found["loss"][2:6, 1]).any()
    for i in (0, 2, 3):
        assert same_bits(found["loss"][:, i], metrics["loss"][:, i])
        assert same_bits(program.take(after, i), program.take(state, i))


def test_cells_are_taken_out_and_put_back(on_cell_mesh):
    program, trainable, frozen, state, _ = on_cell_mesh
    cells = [program.take(state, i) for i in range(4)]
    devices = [sorted(d.id for d in cell.step.sharding.device_set) for cell in cells]
    assert devices == [[0, 1, 2, 3]] * 2 + [[4, 5, 6, 7]] * 2
    ours = jax.tree.map(lambda x: x.sharding, state)
    back, placed = program.start(trainable), program.abstract_run(trainable)
    for i, cell in enumerate(cells):
        assert not same_bits(state, back)
        run_state = jax.tree.map(lambda x, like: jax.device_put(np.asarray(x), like.sharding), cell, placed)
        back = program.put(back, i, run_state)
    assert same_bits(state, back) and jax.tree.map(lambda x: x.sharding, back) == ours
    assert same_bits(program.start_run(trainable), program.take(program.start(trainable), 2))
    text = program.jitted_put.lower(program.abstract_state(trainable), placed, np.int32(0)).compile().as_text()
    assert not [line for line in text.splitlines() if "all-" in line or "collective" in line]


def test_cells_that_the_mesh_cannot_hold_are_refused():
    with pytest.raises(ValueError, match="3 cells over mesh.cell=2: expected a multiple of 2"):
        setup(CELL_MESH, num_cells=3)


# ------------------------------------------------------------------ no collective leaves a cell

# Every shape that a mesh of eight devices with cells can have here, and how many cells it trains.
MESHES = {
    "cell2_fsdp2_tensor2": (CELL_MESH, 4),
    "cell2_data2_fsdp2": (MeshConfig(cell=2, data=2, fsdp=2), 2),
    "cell2_fsdp4": (MeshConfig(cell=2, data=1, fsdp=4), 2),
    "cell4_fsdp2": (MeshConfig(cell=4, data=1, fsdp=2), 4),
    "cell4_tensor2": (MeshConfig(cell=4, data=1, tensor=2), 8),
}


def crossings(mesh: MeshConfig, num_cells: int, trainable, config=CONFIG) -> tuple[int, int]:
    """(collectives, those of them that join devices of different cells) of the compiled step."""
    # Not the cached program: some tests change what it is made of.
    program, _, _ = train_toys.setup.__wrapped__(mesh, config=config, num_cells=num_cells, trainable=trainable)
    _, params = build.abstract(config)
    compiled = program.compile(*build.split_trainable(params, trainable), batch(0))[1]
    found = hlo.collectives(compiled.as_text())
    return len(found), len(hlo.crossing(found, num_devices=8, num_groups=mesh.cell))


@pytest.mark.parametrize(
    "name", ["cell2_fsdp2_tensor2", *(pytest.param(n, marks=pytest.mark.long) for n in [*MESHES][1:])]
)
def test_no_collective_leaves_a_cell(name):
    total, across = crossings(*MESHES[name], TRAINABLE)
    assert total > 10 and across == 0


@pytest.mark.long
def test_nor_with_attention_that_each_device_runs_for_itself(monkeypatch):
    # As on a TPU; there the axis name matters most, for the arrays around it are laid out by hand.
    splash = dataclasses.replace(CONFIG, attention="splash")
    total, across = crossings(CELL_MESH, 4, TRAINABLE, splash)
    assert total > 10 and across == 0
    mapped = jax.vmap
    monkeypatch.setattr(jax, "vmap", lambda f, *args, spmd_axis_name=None, **rest: mapped(f, *args, **rest))
    total, across = crossings(CELL_MESH, 4, TRAINABLE, splash)
    assert total > 10 and across > 0


def test_nor_with_a_shared_embedding(monkeypatch):
    total, across = crossings(CELL_MESH, 4, ("projector",))
    assert total > 10 and across == 0
    # Left split, the shared table is resharded across cells; the numbers are right all the same.
    monkeypatch.setattr(step_module, "_replicate_tables", lambda frozen: frozen)
    assert crossings(CELL_MESH, 4, ("projector",))[1] > 0
