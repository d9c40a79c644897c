"""Several cells in one program: the same numbers as one by one, none that sees another, no collective between them."""

import re

import jax
import numpy as np
import pytest
from train_toys import CONFIG, TRAIN, TRAINABLE, batch, run, same_bits, setup

from medcg_jax.models import build
from medcg_jax.run_config import MeshConfig, replace
from medcg_jax.train.cells import stack_cells, take_cell
from medcg_jax.train.optim import control_from

STEPS = 10
# Cells of different length, rate and warm-up.
CONTROLS = [
    control_from(replace(TRAIN, steps=steps, learning_rate=rate, warmup_frac=frac), 1)
    for steps, rate, frac in ((10, 1e-2, 0.1), (6, 3e-3, 0.0), (10, 1e-3, 0.3), (3, 5e-3, 0.0))
]
CELL_MESH = MeshConfig(cell=2, data=1, fsdp=2, tensor=2)


@pytest.fixture(scope="module")
def one_by_one():
    program, trainable, frozen = setup()
    return [run(program, trainable, frozen, [c], STEPS, seeds=[100 * i]) for i, c in enumerate(CONTROLS)]


@pytest.fixture(scope="module")
def on_cell_mesh():
    program, trainable, frozen = setup(CELL_MESH, num_cells=4)
    return program, trainable, frozen, *run(program, trainable, frozen, CONTROLS, STEPS)


def check_alike(one_by_one, state, metrics) -> None:
    for i, (alone, expected) in enumerate(one_by_one):
        steps = int(CONTROLS[i]["total_steps"])
        assert metrics["active"][:, i].tolist() == [True] * steps + [False] * (STEPS - steps)
        assert np.abs(metrics["loss"][:steps, i] - expected["loss"][:steps]).max() < 1e-5
        assert np.allclose(metrics["grad_norm"][:steps, i], expected["grad_norm"][:steps], rtol=1e-4)
        own = take_cell(state, i, 4)
        assert int(own.step) == int(alone.step) == steps
        for x, y in zip(jax.tree.leaves(own.params), jax.tree.leaves(alone.params), strict=True):
            assert np.allclose(x, y, atol=1e-3)


def test_four_at_a_time_on_one_device(one_by_one):
    program, trainable, frozen = setup(num_cells=4)
    check_alike(one_by_one, *run(program, trainable, frozen, CONTROLS, STEPS))
    assert program.jitted._cache_size() == 1


def test_four_at_a_time_on_a_mesh_with_cells(one_by_one, on_cell_mesh):
    program, _, _, state, metrics = on_cell_mesh
    check_alike(one_by_one, state, metrics)
    assert program.jitted._cache_size() == 1
    with pytest.raises(AssertionError):
        check_alike(one_by_one[::-1], state, metrics)


def test_a_cell_that_is_over_keeps_every_bit_while_others_move(on_cell_mesh):
    program, trainable, frozen, _, _ = on_cell_mesh
    state, _ = run(program, trainable, frozen, CONTROLS, 3)
    before = jax.device_get(state)
    after, metrics = run(program, trainable, frozen, CONTROLS, 1, state=state)
    assert metrics["active"].tolist() == [[True, True, True, False]]
    cell = lambda tree, i: jax.tree.map(lambda x: np.asarray(x)[i], tree)  # noqa: E731
    assert [same_bits(cell(before, i), cell(after, i)) for i in range(4)] == [False, False, False, True]


def test_a_neighbour_that_diverges_is_not_felt(on_cell_mesh):
    program, trainable, frozen, state, metrics = on_cell_mesh
    sick = [CONTROLS[0], {**CONTROLS[1], "learning_rate": np.float32(np.inf)}, *CONTROLS[2:]]
    after, found = run(program, trainable, frozen, sick, STEPS)
    assert not np.isfinite(found["loss"][2:6, 1]).any()
    for i in (0, 2, 3):
        assert same_bits(found["loss"][:, i], metrics["loss"][:, i])
        assert same_bits(take_cell(after, i, 4), take_cell(state, i, 4))


def test_cells_are_taken_out_and_put_back(on_cell_mesh):
    program, _, _, state, _ = on_cell_mesh
    cells = [take_cell(state, i, 4) for i in range(4)]
    devices = [sorted(d.id for d in cell.step.sharding.device_set) for cell in cells]
    assert devices == [[0, 1, 2, 3]] * 2 + [[4, 5, 6, 7]] * 2
    back = stack_cells(cells, program.state_shardings)
    assert same_bits(state, back)
    assert jax.tree.map(lambda x: x.sharding, back) == jax.tree.map(lambda x: x.sharding, state)
    assert not same_bits(state, stack_cells(cells[::-1], program.state_shardings))


def test_cells_that_the_mesh_cannot_hold_are_refused():
    with pytest.raises(ValueError, match="3 cells over mesh.cell=2; a multiple of 2"):
        setup(CELL_MESH, num_cells=3)


# ------------------------------------------------------------------ no collective leaves a cell


def groups_of_devices(hlo: str) -> list[list[int]]:
    """The partitions that each collective of a compiled program joins.

    Raises:
      ValueError: a collective whose groups are written in a way this reader does not know.
    """
    found = []
    for line in hlo.splitlines():
        if not re.search(r"= .* (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\(", line):
            continue
        if pairs := re.search(r"source_target_pairs=\{(.*?)\}(?=,|$| )", line.replace("},{", ";")):
            found += [[int(x) for x in pair.split(",")] for pair in pairs[1].strip("{}").split(";")]
        elif groups := re.search(r"replica_groups=\{\{(.*?)\}\}", line):
            found += [[int(x) for x in group.split(",")] for group in groups[1].split("},{")]
        elif iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
            shape, dims = ([int(x) for x in iota[i].split(",")] for i in (1, 2))
            ids = np.arange(np.prod(dims)).reshape(dims)
            ids = ids.transpose([int(x) for x in iota[3].split(",")]) if iota[3] else ids
            found += ids.reshape(shape).tolist()
        else:
            raise ValueError(f"unknown groups: {line.strip()[:200]}")
    return found


def crossings(hlo: str, num_devices: int = 8, num_groups: int = 2) -> tuple[int, int]:
    """(collective groups, those of them that join devices of different cells)."""
    groups = groups_of_devices(hlo)
    size = num_devices // num_groups
    return len(groups), sum(len({device // size for device in group}) > 1 for group in groups)


def compiled_text(spmd_axis_name, monkeypatch) -> str:
    vmap = jax.vmap
    with monkeypatch.context() as patch:
        patch.setattr(jax, "vmap", lambda f, **kw: vmap(f, **{**kw, "spmd_axis_name": spmd_axis_name}))
        program, _, _ = setup(CELL_MESH, num_cells=4)
        _, params = build.abstract(CONFIG)
        return program.compile(*build.split_trainable(params, TRAINABLE), batch(0))[1].as_text()


def test_no_collective_leaves_a_cell(monkeypatch):
    total, across = crossings(compiled_text("cell", monkeypatch))
    assert total > 10 and across == 0


def test_a_program_that_forgets_the_cell_axis_is_caught(monkeypatch):
    # Its numbers are right all the same: no test of losses sees it.
    assert crossings(compiled_text(None, monkeypatch))[1] > 0
