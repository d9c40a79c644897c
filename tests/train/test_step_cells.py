"""Several cells in one program: the same numbers as one by one, none that sees another, no collective between them."""

import math
import re

import jax
import numpy as np
import pytest
from train_toys import CONFIG, TRAIN, TRAINABLE, batch, run, same_bits, setup

from medcg_jax.models import build
from medcg_jax.run_config import MeshConfig, replace
from medcg_jax.train import step
from medcg_jax.train.cells import take_cell
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
            found += [numbers(pair) for pair in pairs[1].strip("{}").split(";")]
        elif groups := re.search(r"replica_groups=\{\{(.*?)\}\}", line):
            found += [numbers(group) for group in groups[1].split("},{")]
        elif iota := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", line):
            found += device_order(iota[2]).reshape(numbers(iota[1])).tolist()
        elif named := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?\))\))? \{(.*?)\}", line):
            axes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
            shape = [int(size) for size in axes.values()]
            order = device_order(named[2] or f"[{math.prod(shape)}]").reshape(shape)
            joined = [list(axes).index(name) for name in re.findall(r"'(\w+)'", named[3])]
            last = np.moveaxis(order, joined, range(-len(joined), 0))
            found += last.reshape(-1, math.prod(shape[i] for i in joined)).tolist()
        else:
            raise ValueError(f"unknown groups: {line.strip()[:200]}")
    return found


def numbers(text: str) -> list[int]:
    return [int(x) for x in text.split(",")]


def device_order(text: str) -> np.ndarray:
    """The order written as "[2,2,2]T(1,0,2)": 0 .. 7 in this shape, transposed."""
    shape, turned = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    ids = np.arange(math.prod(numbers(shape))).reshape(numbers(shape))
    return ids.transpose(numbers(turned)) if turned else ids


def crossings(hlo: str, num_devices: int = 8, num_groups: int = 2) -> tuple[int, int]:
    """(collective groups, those of them that join devices of different cells)."""
    groups = groups_of_devices(hlo)
    size = num_devices // num_groups
    return len(groups), sum(len({device // size for device in group}) > 1 for group in groups)


def test_every_way_to_write_groups_is_read():
    line = "%x = f32[2] all-gather(%y), channel_id=1, replica_groups={}, dimensions={{0}}"
    for written, expected in (
        ("{{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
        ("mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 2], [1, 3]]),
    ):
        assert groups_of_devices(line.format(written)) == expected, written
    pairs = "%x = f32[2] collective-permute(%y), channel_id=1, source_target_pairs={{0,2},{1,3}}, metadata={}"
    assert groups_of_devices(pairs) == [[0, 2], [1, 3]]
    with pytest.raises(ValueError, match="unknown groups"):
        groups_of_devices(line.format("others"))


def compiled_text(trainable) -> str:
    program, _, _ = setup(CELL_MESH, num_cells=4, trainable=trainable)
    _, params = build.abstract(CONFIG)
    return program.compile(*build.split_trainable(params, trainable), batch(0))[1].as_text()


def test_no_collective_leaves_a_cell():
    total, across = crossings(compiled_text(TRAINABLE))
    assert total > 10 and across == 0


def test_nor_with_a_shared_embedding(monkeypatch):
    total, across = crossings(compiled_text(("projector",)))
    assert total > 10 and across == 0
    # Left split, the shared table is resharded across cells; the numbers are right all the same.
    monkeypatch.setattr(step, "_replicate_tables", lambda frozen: frozen)
    assert crossings(compiled_text(("projector",)))[1] > 0
