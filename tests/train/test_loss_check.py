"""The first loss after a restore: the same passes; other data, other parameters or another program stop the run."""

import json
import shutil
from pathlib import Path

import micro
import pytest
from train_toys import TRAIN, Stream, same_bits

from medcg_jax.config import MeshConfig, replace
from medcg_jax.train.loop import Cell, fit
from medcg_jax.train.loss_check import LossCheck, LossDiffers
from medcg_jax.train.optim import hparams_from


@pytest.fixture(scope="module")
def toy():
    return micro.setup(MeshConfig())


def quietly(*_):
    pass


def go(toy, path: Path, *, steps: int = 9, seed: int = 0, stop_at: int | None = None, **options):
    """Trains, or stops without saving more when it draws this batch."""

    def change(position, rows):
        if position == stop_at:
            raise StopAsyncIteration  # as a kill: nothing is saved
        return rows

    cell = Cell(
        "run", hparams_from(replace(TRAIN, steps=steps), 1), lambda at: Stream(at, seed, change=change),
        checkpoints=path / "c", metrics=path / "m.jsonl",
    )  # fmt: skip
    return fit(*toy, [cell], checkpoint_every_steps=3, log_every_steps=1, progress=quietly, **options)


def stopped(toy, path: Path, **how) -> None:
    with pytest.raises(StopAsyncIteration):
        go(toy, path, **how)


def logged(path: Path) -> dict[int, float]:
    lines = map(json.loads, (path / "c" / "losses.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines}


def test_the_same_run_goes_on(toy, tmp_path):
    alone, _ = go(toy, tmp_path / "alone")
    stopped(toy, tmp_path, stop_at=7)
    assert sorted(logged(tmp_path)) == [4, 7]
    before = logged(tmp_path)
    state, _ = go(toy, tmp_path)
    assert same_bits(state, alone) and logged(tmp_path) == before == logged(tmp_path / "alone")


def test_other_data_stops_the_run_after_one_step(toy, tmp_path):
    stopped(toy, tmp_path, stop_at=7)
    expected = logged(tmp_path)[7]
    with pytest.raises(LossDiffers, match=f"run: after the restore step 7 has loss .*, and {expected:.9g} was logged"):
        go(toy, tmp_path, seed=1, steps=9)
    assert sorted(p.name for p in (tmp_path / "c").iterdir() if p.name.isdigit()) == ["3", "6"]


def test_parameters_of_another_run_stop_it(toy, tmp_path):
    stopped(toy, tmp_path / "a", stop_at=7)
    stopped(toy, tmp_path / "b", stop_at=7, seed=50)
    # A whole checkpoint of the same step, its digests right.
    shutil.rmtree(tmp_path / "a" / "c" / "6")
    shutil.copytree(tmp_path / "b" / "c" / "6", tmp_path / "a" / "c" / "6")
    with pytest.raises(LossDiffers):
        go(toy, tmp_path / "a")


def test_another_mesh_is_the_same_within_the_wider_tolerance(toy, tmp_path):
    stopped(toy, tmp_path, stop_at=7)
    other = micro.setup(MeshConfig(data=4, fsdp=2))
    _, [result] = go(other, tmp_path)
    assert result.step == 9
    stopped(toy, tmp_path / "b", stop_at=7)
    with pytest.raises(LossDiffers, match="on other devices"):
        go(other, tmp_path / "b", seed=1)


def test_tolerances_lines_cut_off_and_no_line_at_all(tmp_path):
    said = []

    def check(conditions="x"):
        made = LossCheck(tmp_path, {"mesh": conditions}, said.append)
        made.restored(4)
        return made

    check().look("run", 5, 2.0)  # nothing was logged for it
    with (tmp_path / "losses.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    check().look("run", 5, 2.0)
    check().look("run", 5, 2.00001)
    assert len(said) == 1 and "not bit for bit" in said[0]
    with pytest.raises(LossDiffers, match="has loss 2.001, and 2.00001 was logged for it"):
        check().look("run", 5, 2.001)
    check("y").look("run", 5, 2.001)
    with pytest.raises(LossDiffers):
        check().look("run", 5, float("nan"))
