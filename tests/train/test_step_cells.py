"""Several cells in one program: the same numbers as one by one, none that sees another, no collective between them."""

import dataclasses

import jax
import numpy as np
import pytest
import train_toys
from train_toys import CONFIG, TRAIN, TRAINABLE, batch, run, same_bits, setup

from medcg_jax.config import MeshConfig, replace
from medcg_jax.families import build
from medcg_jax.plan import hlo
from medcg_jax.train import step
from medcg_jax.train.cells import take_cell
from medcg_jax.train.optim import hparams_from

STEPS = 10
# Cells of different length, rate and warm-up.
ALL_HPARAMS = [
    hparams_from(replace(TRAIN, steps=steps, learning_rate=rate, warmup_frac=frac), 1)
    for steps, rate, frac in ((10, 1e-2, 0.1), (6, 3e-3, 0.0), (10, 1e-3, 0.3), (3, 5e-3, 0.0))
]
CELL_MESH = MeshConfig(cell=2, data=1, fsdp=2, tensor=2)


@pytest.fixture(scope="module")
def one_by_one():
    program, trainable, frozen = setup()
    return [run(program, trainable, frozen, [c], STEPS, seeds=[100 * i]) for i, c in enumerate(ALL_HPARAMS)]


@pytest.fixture(scope="module")
def on_cell_mesh():
    program, trainable, frozen = setup(CELL_MESH, num_cells=4)
    return program, trainable, frozen, *run(program, trainable, frozen, ALL_HPARAMS, STEPS)


def check_alike(one_by_one, state, metrics) -> None:
    for i, (alone, expected) in enumerate(one_by_one):
        steps = int(ALL_HPARAMS[i]["total_steps"])
        assert metrics["active"][:, i].tolist() == [True] * steps + [False] * (STEPS - steps)
        assert np.abs(metrics["loss"][:steps, i] - expected["loss"][:steps]).max() < 1e-5
        assert np.allclose(metrics["grad_norm"][:steps, i], expected["grad_norm"][:steps], rtol=1e-4)
        own = take_cell(state, i, 4)
        assert int(own.step) == int(alone.step) == steps
        for x, y in zip(jax.tree.leaves(own.params), jax.tree.leaves(alone.params), strict=True):
            assert np.allclose(x, y, atol=1e-3)


def test_four_at_a_time_on_one_device(one_by_one):
    program, trainable, frozen = setup(num_cells=4)
    check_alike(one_by_one, *run(program, trainable, frozen, ALL_HPARAMS, STEPS))
    assert program.jitted._cache_size() == 1


def test_four_at_a_time_on_a_mesh_with_cells(one_by_one, on_cell_mesh):
    program, _, _, state, metrics = on_cell_mesh
    check_alike(one_by_one, state, metrics)
    assert program.jitted._cache_size() == 1
    with pytest.raises(AssertionError):
        check_alike(one_by_one[::-1], state, metrics)


def test_a_cell_that_is_over_keeps_every_bit_while_others_move(on_cell_mesh):
    program, trainable, frozen, _, _ = on_cell_mesh
    state, _ = run(program, trainable, frozen, ALL_HPARAMS, 3)
    before = jax.device_get(state)
    after, metrics = run(program, trainable, frozen, ALL_HPARAMS, 1, state=state)
    assert metrics["active"].tolist() == [[True, True, True, False]]
    cell = lambda tree, i: jax.tree.map(lambda x: np.asarray(x)[i], tree)  # noqa: E731
    assert [same_bits(cell(before, i), cell(after, i)) for i in range(4)] == [False, False, False, True]


def test_a_neighbour_that_diverges_is_not_felt(on_cell_mesh):
    program, trainable, frozen, state, metrics = on_cell_mesh
    sick = [ALL_HPARAMS[0], {**ALL_HPARAMS[1], "learning_rate": np.float32(np.inf)}, *ALL_HPARAMS[2:]]
    after, found = run(program, trainable, frozen, sick, STEPS)
    assert not np.isfinite(found["loss"][2:6, 1]).any()
    for i in (0, 2, 3):
        assert same_bits(found["loss"][:, i], metrics["loss"][:, i])
        assert same_bits(take_cell(after, i, 4), take_cell(state, i, 4))


def test_cells_are_taken_out_and_put_back(on_cell_mesh):
    program, trainable, frozen, state, _ = on_cell_mesh
    cells = [take_cell(state, i, 4) for i in range(4)]
    devices = [sorted(d.id for d in cell.step.sharding.device_set) for cell in cells]
    assert devices == [[0, 1, 2, 3]] * 2 + [[4, 5, 6, 7]] * 2
    ours = jax.tree.map(lambda x: x.sharding, state)
    back, placed = program.start(trainable), program.abstract_one(trainable)
    for i, cell in enumerate(cells):
        assert not same_bits(state, back)
        one = jax.tree.map(lambda x, like: jax.device_put(np.asarray(x), like.sharding), cell, placed)
        back = program.put(back, i, one)
    assert same_bits(state, back) and jax.tree.map(lambda x: x.sharding, back) == ours
    assert same_bits(program.start_one(trainable), take_cell(program.start(trainable), 2, 4))
    hlo = program.jitted_put.lower(program.abstract_state(trainable), placed, np.int32(0)).compile().as_text()
    assert not [line for line in hlo.splitlines() if "all-" in line or "collective" in line]


def test_cells_that_the_mesh_cannot_hold_are_refused():
    with pytest.raises(ValueError, match="3 cells over mesh.cell=2; a multiple of 2"):
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


def crossings(mesh: MeshConfig, num_cells: int, trainable) -> tuple[int, int]:
    """(collectives, those of them that join devices of different cells) of the compiled step."""
    program, _, _ = setup(mesh, num_cells=num_cells, trainable=trainable)
    _, params = build.abstract(CONFIG)
    compiled = program.compile(*build.split_trainable(params, trainable), batch(0))[1]
    found = hlo.collectives(compiled.as_text())
    return len(found), len(hlo.crossing(found, num_devices=8, num_groups=mesh.cell))


@pytest.mark.parametrize("name", MESHES)
def test_no_collective_leaves_a_cell(name):
    total, across = crossings(*MESHES[name], TRAINABLE)
    assert total > 10 and across == 0


def test_nor_with_attention_that_each_device_runs_for_itself(monkeypatch):
    # As on a TPU; there the axis name matters most, for the arrays around it are laid out by hand.
    monkeypatch.setattr(train_toys, "CONFIG", dataclasses.replace(CONFIG, attention="splash"))
    total, across = crossings(CELL_MESH, 4, TRAINABLE)
    assert total > 10 and across == 0
    mapped = jax.vmap
    monkeypatch.setattr(jax, "vmap", lambda f, *args, spmd_axis_name=None, **rest: mapped(f, *args, **rest))
    total, across = crossings(CELL_MESH, 4, TRAINABLE)
    assert total > 10 and across > 0


def test_nor_with_a_shared_embedding(monkeypatch):
    total, across = crossings(CELL_MESH, 4, ("projector",))
    assert total > 10 and across == 0
    # Left split, the shared table is resharded across cells; the numbers are right all the same.
    monkeypatch.setattr(step, "_replicate_tables", lambda frozen: frozen)
    assert crossings(CELL_MESH, 4, ("projector",))[1] > 0
