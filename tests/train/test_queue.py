"""More cells than slots: each ends as alone, whatever its slot and neighbours; nothing is compiled again."""

import jax
import numpy as np
import pytest
from train_toys import TRAIN, Stream, run, same_bits, setup

from medcg_jax.config import MeshConfig, replace
from medcg_jax.train.loop import Cell, fit_queue
from medcg_jax.train.optim import hparams_from

LENGTHS = (7, 3, 5, 2, 6, 1, 4)


def hparams(steps: int, **changes):
    return hparams_from(replace(TRAIN, steps=steps, **changes), 1)


def cell(i: int, **fields) -> Cell:
    """Cell i has its own length, rate and data."""
    made = dict(hparams=hparams(LENGTHS[i], learning_rate=1e-2 / (i + 1)), open_stream=lambda p: Stream(p, 50 * i))
    return Cell(f"c{i}", **made | fields)


def ended(toy, cells, **options) -> dict:
    """{name: (result, state on the host)} of a queue of cells."""
    left, found = list(cells), {}

    def end(result, state):
        found[result.name] = (result, jax.device_get(state))

    fit_queue(*toy, lambda: left.pop(0) if left else None, end, progress=lambda *_: None, **options)
    assert not left and list(found) != [c.name for c in cells] or toy[0].num_cells == 1
    return found


@pytest.fixture(scope="module")
def one():
    return setup()


@pytest.fixture(scope="module")
def alone(one):
    found = {}
    for i, steps in enumerate(LENGTHS):
        state, metrics = run(*one, [cell(i).hparams], steps, seeds=[50 * i])
        found[f"c{i}"] = jax.device_get(state), metrics
    return found


def check_alike(found: dict, alone: dict) -> None:
    assert found.keys() == alone.keys()
    for name, (result, state) in found.items():
        expected, metrics = alone[name]
        steps = len(metrics["loss"])
        assert (result.error, result.step, int(state.step)) == (None, steps, steps)
        assert np.allclose(result.metrics["grad_norm"], metrics["grad_norm"][-1], rtol=1e-4)
        pairs = zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True)
        assert all(np.allclose(x, y, atol=1e-4) for x, y in pairs)


@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(cell=2, data=1, fsdp=2, tensor=2)], ids=["1", "cell2"])
def test_seven_cells_in_four_slots_end_as_alone(alone, mesh):
    toy = setup(mesh, num_cells=4)
    cells = [cell(i) for i in range(7)]
    found = ended(toy, cells, log_every_steps=2)
    check_alike(found, alone)
    assert toy[0].jitted._cache_size() == toy[0].jitted_put._cache_size() == 1
    # In another order, so in other slots and beside others: the same bits.
    again = ended(toy, cells[::-1], log_every_steps=3)
    assert all(same_bits(found[name][1], again[name][1]) for name in found)
    with pytest.raises(AssertionError):
        check_alike({"c0": found["c1"], "c1": found["c0"]}, {name: alone[name] for name in ("c0", "c1")})


def test_one_slot_takes_one_after_another(one, alone):
    found = ended(one, [cell(i) for i in range(7)])
    assert all(same_bits(found[name][1], alone[name][0]) for name in found)


def test_a_cell_that_diverges_is_reported_and_its_slot_used_again(alone):
    toy = setup(num_cells=2)
    sick = cell(1, hparams={**cell(1).hparams, "learning_rate": np.float32(np.inf)})
    found = ended(toy, [cell(0), sick, *(cell(i) for i in range(2, 7))])
    error = found.pop("c1")[0].error
    assert error.step == 2 and error.records[0] == "1/0"
    check_alike(found, {name: value for name, value in alone.items() if name != "c1"})


def test_cells_go_on_from_their_checkpoints_in_whatever_slot(tmp_path):
    toy = setup(num_cells=2)
    kept = [cell(i, checkpoints=tmp_path / str(i)) for i in range(7)]
    whole = ended(toy, [cell(i) for i in range(7)])

    class Stop(Exception):
        pass

    def stop_late(steps, _):
        if steps.get("c2", 0) >= 4:
            raise Stop

    left = list(kept)
    options = dict(log_every_steps=1, checkpoint_every_steps=2)
    with pytest.raises(Stop):
        fit_queue(*toy, lambda: left.pop(0) if left else None, lambda *_: None, progress=stop_late, **options)
    assert (tmp_path / "2" / "2").exists()
    found = ended(toy, kept[::-1], **options)
    assert all(same_bits(found[name][1], whole[name][1]) for name in whole)


def test_a_queue_with_nothing_in_it_ends_at_once(one):
    fit_queue(*one, lambda: None, lambda *_: pytest.fail("nothing ended"), progress=lambda *_: None)


def test_a_slot_that_stays_empty_is_offered_again(alone):
    """A cell that can be had later than a slot was free for it is trained all the same."""
    toy, given = setup(num_cells=2), iter([cell(0), None, None, cell(1), None, None, None])
    found = {}
    fit_queue(
        *toy, lambda: next(given, None), lambda r, s: found.update({r.name: (r, jax.device_get(s))}),
        log_every_steps=1, progress=lambda *_: None,
    )  # fmt: skip
    check_alike(found, {name: alone[name] for name in ("c0", "c1")})
