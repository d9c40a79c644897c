"""Room on disk: too little, or none that can be written, is said before a run; a full disk loses no checkpoint."""

import resource
from contextlib import contextmanager
from pathlib import Path

import jax
import micro
import pytest
from train_toys import TRAIN, Stream, same_bits

from medcg_jax import cli
from medcg_jax.config import ConfigError, MeshConfig, replace
from medcg_jax.train import disk
from medcg_jax.train.checkpoint import Checkpoints, SaveError
from medcg_jax.train.loop import Cell, fit
from medcg_jax.train.optim import hparams_from
from medcg_jax.train.step import with_shardings


@contextmanager
def small_files(most_bytes: int):
    """No file can grow beyond so many bytes: what a full disk does, for this process alone."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_both_amounts_are_named(tmp_path, monkeypatch):
    disk.check_room(tmp_path / "new", 1000, "a test")
    assert (tmp_path / "new").is_dir() and not list((tmp_path / "new").iterdir())
    monkeypatch.setattr(disk, "free_bytes", lambda _: 2_000_000_000)
    with pytest.raises(ConfigError, match=r"3.0 GB are needed there \(a test\), 2.0 GB are free"):
        disk.check_room(tmp_path, 3_000_000_000, "a test")
    # What an earlier start has left makes way.
    (tmp_path / "old").write_bytes(b"x" * 1000)
    disk.check_room(tmp_path, 2_000_001_000, "a test")


def test_a_folder_that_cannot_be_written_is_refused():
    with pytest.raises(ConfigError, match="/proc/1/x cannot be written .*1.0 MB are needed"):
        disk.check_room(Path("/proc/1/x"), 1_000_000, "a test")


@pytest.mark.parametrize("workdir", ["/proc/1/x", ""])
def test_train_says_so_before_anything_is_allocated(tmp_path, monkeypatch, capsys, workdir):
    monkeypatch.setattr("medcg_jax.train.run.start_params", lambda *_, **__: pytest.fail("parameters were made"))
    monkeypatch.setattr(disk, "free_bytes", lambda _: 10)
    config = ["--config=configs/phantom.py:tiny", "--config.eval.batch_size=96"]
    assert cli.main(["train", *config, f"--workdir={workdir or tmp_path}"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "MB are needed there (3 checkpoints of" in line


@pytest.fixture(scope="module")
def toy():
    return micro.setup(MeshConfig(fsdp=2))


def test_a_disk_that_fills_up_stops_the_run_and_loses_no_checkpoint(toy, tmp_path):
    program, trainable, frozen = toy
    made = Cell("run", hparams_from(replace(TRAIN, steps=9), 1), Stream, checkpoints=tmp_path / "c")
    with pytest.raises(SaveError, match="could not be written; it needs .* kB and .* are free; there is no other"):
        with small_files(1000):
            fit(program, trainable, frozen, [made], checkpoint_every_steps=2, progress=lambda *_: None)
    alone, _ = fit(program, trainable, frozen, [replace_checkpoints(made, tmp_path / "d")], progress=lambda *_: None)
    state, _ = fit(program, trainable, frozen, [made], checkpoint_every_steps=2, progress=lambda *_: None)
    assert same_bits(state, alone)


def replace_checkpoints(cell: Cell, path: Path) -> Cell:
    return Cell(cell.name, cell.hparams, cell.open_stream, checkpoints=path)


def test_the_last_good_one_is_named_and_kept(toy, tmp_path):
    program, trainable, _ = toy
    state = program.start(trainable)
    store = Checkpoints(tmp_path / "c", keep=1)
    store.save(1, state, {"position": 1})
    store.wait()
    with small_files(1000):
        with pytest.raises(SaveError, match="checkpoint of step 2 could not be written.*last good one is of step 1"):
            store.save(2, state, {"position": 2})
            store.wait()
    assert store.steps() == [1]
    store.close()
    store = Checkpoints(tmp_path / "c", keep=1)
    wanted = with_shardings(state, jax.tree.map(lambda x: x.sharding, state))
    assert same_bits(store.restore(wanted)[0], state)
    store.save(2, state, {"position": 2})
    store.close()
    assert store.steps() == [2]
