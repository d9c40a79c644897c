"""Checkpoints: every bit comes back on any mesh, a damaged one is noticed and the one before it taken; room on disk."""

import dataclasses
import json
import os
import resource
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import damage_checkpoints
import jax
import micro
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from train_toys import CONFIG, TRAIN, Stream, run, same_bits, setup

from medcg_jax import cli
from medcg_jax.config import ConfigError, MeshConfig, replace
from medcg_jax.families import build
from medcg_jax.mesh import make_mesh
from medcg_jax.train import checkpoint, checksums
from medcg_jax.train.checkpoint import CheckpointError, Checkpoints, SaveError, load_params, read_meta, save_params
from medcg_jax.train.loop import RunSpec, fit
from medcg_jax.train.optim import hparams_from
from medcg_jax.train.step import with_shardings

EIGHT = MeshConfig(data=2, fsdp=2, tensor=2)


def abstract(program):
    _, params = build.abstract(CONFIG)
    return program.abstract_state(build.split_trainable(params, ("projector", "decoder"))[0])


@pytest.fixture(scope="module")
def one():
    program, trainable, _ = setup()
    return program, program.start(trainable)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def damage_all(damage, folder: Path) -> None:
    """Damages every file that holds arrays: some hold the same, and which one is read is Orbax's affair."""
    files = [path for path in folder.rglob("d/*") if path.is_file()]
    assert files
    for path in files:
        damage(path)


def test_from_one_device_to_eight_and_back(one, tmp_path):
    program, state = one
    many, _, _ = setup(EIGHT)
    checkpoints = Checkpoints(tmp_path / "a")
    checkpoints.save(4, state, {"position": 4})
    on_eight, meta = checkpoints.restore(abstract(many))
    checkpoints.close()
    assert meta["position"] == 4 and same_bits(state, on_eight)
    assert jax.tree.map(lambda x: x.sharding, on_eight) == many.state_shardings
    again = Checkpoints(tmp_path / "b")
    again.save(4, on_eight, {"position": 4})
    back, _ = again.restore(abstract(program))
    again.close()
    assert same_bits(state, back)


def test_the_newest_are_kept(one, tmp_path):
    program, state = one
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.restore(abstract(program)) is None and checkpoints.latest() is None
    for step in (1, 2, 3, 3):
        checkpoints.save(step, state, {"position": step})
    assert checkpoints.latest() == tmp_path / "3"
    checkpoints.close()
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.isdigit()) == ["2", "3"]


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, Path.unlink])
def test_a_damaged_checkpoint_is_set_aside(one, tmp_path, damage):
    program, state = one
    said = []
    checkpoints = Checkpoints(tmp_path / "c", report=said.append)
    for step in (1, 2):
        checkpoints.save(step, state, {"position": step})
    checkpoints.close()
    damage_all(damage, tmp_path / "c" / "2")
    checkpoints = Checkpoints(tmp_path / "c", report=said.append)
    found, meta = checkpoints.restore(abstract(program))
    assert meta["position"] == 1 and same_bits(found, state)
    assert len(said) == 1 and "checkpoint 2 is damaged" in said[0] and "going on from 1" in said[0]
    assert (tmp_path / "c-damaged-2").is_dir()
    # Its step can be saved again.
    checkpoints.save(2, state, {"position": 2})
    assert checkpoints.restore(abstract(program))[1]["position"] == 2 and len(said) == 1
    checkpoints.close()


def test_none_that_can_be_read_is_an_error_and_not_a_new_start(one, tmp_path):
    program, state = one
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(1, state, {"position": 1})
    checkpoints.wait()
    damage_all(truncate, tmp_path / "c" / "1")
    with pytest.raises(CheckpointError, match="no checkpoint can be read"):
        checkpoints.restore(abstract(program))
    checkpoints.close()


def test_parameters_with_their_meta(tmp_path):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    _, params = build.create(CONFIG, mesh, seed=3)
    path = tmp_path / "base"
    assert read_meta(path) is None
    save_params(path, params, CONFIG, {"fingerprint": "abc"})
    save_params(path, params, CONFIG, {"fingerprint": "def"})
    graphdef, found, meta = load_params(path, CONFIG, make_mesh(EIGHT))
    assert meta["fingerprint"] == "def" == read_meta(path)["fingerprint"]
    assert same_bits(params, found) and jax.tree.structure(found) == jax.tree.structure(params)
    assert jax.tree.map(lambda x: x.sharding, found) == build.shardings(CONFIG, make_mesh(EIGHT))
    assert [p.name for p in tmp_path.iterdir()] == ["base"]
    damage_all(flip_a_bit, path)
    with pytest.raises(CheckpointError, match="base: parameters are damaged"):
        load_params(path, CONFIG, mesh)
    (path / "meta.json").write_text(json.dumps({})[:-1])
    with pytest.raises(CheckpointError, match="meta.json is missing"):
        load_params(path, CONFIG, mesh)


def test_a_state_after_some_steps_comes_back_whole(one, tmp_path):
    program, _ = one
    _, trainable, frozen = setup()
    state, _ = run(program, trainable, frozen, [hparams_from(TRAIN, 1)], 2)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, state, {"position": 2})
    wanted = with_shardings(state, jax.tree.map(lambda x: x.sharding, state))
    found, _ = checkpoints.restore(wanted)
    checkpoints.close()
    assert jax.tree.structure(found) == jax.tree.structure(state) and same_bits(found, state)


def test_good_ones_are_kept_by_their_steps(one, tmp_path):
    program, state = one
    checkpoints = Checkpoints(tmp_path, keep=1, keep_every_steps=4)
    for step in (2, 4, 6, 7, 8, 9):
        checkpoints.save(step, state, {"position": step})
    checkpoints.close()
    assert checkpoints.steps() == [4, 8, 9]


def test_what_a_kill_has_left_is_no_checkpoint_and_is_removed(one, tmp_path):
    program, state = one
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, {"position": 1})
    checkpoints.close()
    # Files of Orbax without digests, and an older checkpoint that was about to be removed.
    shutil.copytree(tmp_path / "1", tmp_path / "2.part")
    shutil.copytree(tmp_path / "1", tmp_path / "0-old.part")
    said = []
    checkpoints = Checkpoints(tmp_path, report=said.append)
    assert [p.name for p in tmp_path.iterdir()] == ["1"]
    assert checkpoints.restore(abstract(program))[1]["position"] == 1 and not said and not checkpoints.skipped
    checkpoints.close()


def test_nothing_appears_before_it_is_summed_and_nothing_goes_before_that(one, tmp_path, monkeypatch):
    program, state = one
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, state, {"position": 1})
    checkpoints.wait()
    seen = []
    write_share = checksums.write_share

    def look(directory, index, count):
        seen.append((checkpoints.steps(), directory.name, (directory / "state" / "manifest.ocdbt").is_file()))
        write_share(directory, index, count)

    monkeypatch.setattr(checksums, "write_share", look)
    checkpoints.save(2, state, {"position": 2})
    checkpoints.close()
    [(steps, name, there)] = seen
    assert steps == [1] and name.startswith("2-") and there and checkpoints.steps() == [2]


def test_a_checkpoint_under_another_name_is_not_loaded(one, tmp_path):
    program, state = one
    checkpoints = Checkpoints(tmp_path / "c", report=lambda line: None)
    for step in (1, 2):
        checkpoints.save(step, state, {"position": step})
    checkpoints.wait()
    shutil.rmtree(tmp_path / "c" / "2")
    shutil.copytree(tmp_path / "c" / "1", tmp_path / "c" / "2")
    assert checkpoints.restore(abstract(program))[1]["position"] == 1
    assert "it is the checkpoint of step 1" in checkpoints.skipped[0]
    checkpoints.close()


# ------------------------------------------------------------------ digests of files

FILES = {"a": b"first", "d/b": b"second file", "d/e/c": b"", "meta.json": b"{}"}


def written(top: Path, count: int) -> None:
    for name, data in FILES.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_bytes(data)
    for index in range(count):
        assert not checksums.shares_are_there(top, count)
        checksums.write_share(top, index, count)
    assert checksums.shares_are_there(top, count)


def faults(top: Path, readers: int) -> list[str]:
    return [fault for index in range(readers) if (fault := checksums.first_fault(top, index, readers))]


@settings(deadline=None, max_examples=25)
@given(st.data(), st.integers(1, 5), st.integers(1, 5))
def test_any_bit_of_any_file(data, writers, readers):
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder)
        written(top, writers)
        assert not faults(top, readers)
        path = data.draw(st.sampled_from([p for p in sorted(top.rglob("*")) if p.is_file() and p.stat().st_size]))
        found = bytearray(path.read_bytes())
        bit = data.draw(st.integers(0, 8 * len(found) - 1))
        found[bit // 8] ^= 1 << bit % 8
        path.write_bytes(found)
        [*named] = faults(top, readers)
        assert named and all(path.name in fault for fault in named)


def test_files_that_come_and_go(tmp_path):
    written(tmp_path, 3)
    (tmp_path / "d" / "new").write_bytes(b"")
    assert faults(tmp_path, 2) == ["d/new is no file of it"] * 2
    (tmp_path / "d" / "new").unlink()
    (tmp_path / "checksums.3-of-4.json").write_bytes(b"")
    assert all("checksums.0-of-4.json is missing" in fault for fault in faults(tmp_path, 2))
    (tmp_path / "checksums.3-of-4.json").unlink()
    (tmp_path / ".checksums.0-of-3.json.1234").write_bytes(b"")
    assert all("no file of it" in fault for fault in faults(tmp_path, 1))
    (tmp_path / ".checksums.0-of-3.json.1234").unlink()
    (tmp_path / "checksums.1-of-3.json").rename(tmp_path / "x")
    assert all("checksums.1-of-3.json is missing" in fault for fault in faults(tmp_path, 1))
    (tmp_path / "x").rename(tmp_path / "checksums.1-of-3.json")
    assert not faults(tmp_path, 4)
    os.replace(tmp_path / "a", tmp_path / "gone")
    assert faults(tmp_path, 1) == ["a is missing"]


def test_no_digests_at_all(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    assert checksums.first_fault(tmp_path) == "checksums.0-of-1.json is missing"


@pytest.mark.parametrize("number", [24, pytest.param(130, marks=pytest.mark.long)])
def test_every_kind_of_file_damaged_in_every_way(tmp_path, number):
    done = damage_checkpoints.run_all(tmp_path, number, seed=1)
    assert sum(done.values()) == number
    assert {damage for _, damage in done} == {damage.__name__ for damage in damage_checkpoints.DAMAGES}
    names = {name for name, _ in done}
    assert number < 100 or {"meta.json", "state/d/*", "state/manifest.ocdbt", "parameters: params/d/*"} <= names


# ------------------------------------------------------------------ room on disk


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
    checkpoint.check_room(tmp_path / "new", 1000, "a test")
    assert (tmp_path / "new").is_dir() and not list((tmp_path / "new").iterdir())
    monkeypatch.setattr(checkpoint, "free_bytes", lambda _: 2_000_000_000)
    with pytest.raises(ConfigError, match=r"3.0 GB are needed there \(a test\), 2.0 GB are free"):
        checkpoint.check_room(tmp_path, 3_000_000_000, "a test")
    # What an earlier start has left makes way.
    (tmp_path / "old").write_bytes(b"x" * 1000)
    checkpoint.check_room(tmp_path, 2_000_001_000, "a test")


def test_a_folder_that_cannot_be_written_is_refused():
    with pytest.raises(ConfigError, match="/proc/1/x cannot be written .*1.0 MB are needed"):
        checkpoint.check_room(Path("/proc/1/x"), 1_000_000, "a test")


@pytest.mark.parametrize("workdir", ["/proc/1/x", ""])
def test_train_says_so_before_anything_is_allocated(tmp_path, monkeypatch, capsys, workdir):
    monkeypatch.setattr("medcg_jax.train.run.start_params", lambda *_, **__: pytest.fail("parameters were made"))
    monkeypatch.setattr(checkpoint, "free_bytes", lambda _: 10)
    config = ["--config=configs/phantom.py:tiny", "--config.eval.batch_size=96"]
    assert cli.main(["train", *config, f"--workdir={workdir or tmp_path}"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "MB are needed there (3 checkpoints of" in line


@pytest.fixture(scope="module")
def toy():
    return micro.setup(MeshConfig(fsdp=2))


def test_a_disk_that_fills_up_stops_the_run_and_loses_no_checkpoint(toy, tmp_path):
    program, trainable, frozen = toy
    spec = RunSpec("run", hparams_from(replace(TRAIN, steps=9), 1), Stream, checkpoints=tmp_path / "c")
    with pytest.raises(SaveError, match="could not be written; it needs .* kB and .* are free; there is no other"):
        with small_files(1000):
            fit(program, trainable, frozen, spec, checkpoint_every_steps=2, progress=lambda *_: None)
    alone, _ = fit(
        program, trainable, frozen, dataclasses.replace(spec, checkpoints=tmp_path / "d"), progress=lambda *_: None
    )
    state, _ = fit(program, trainable, frozen, spec, checkpoint_every_steps=2, progress=lambda *_: None)
    assert same_bits(state, alone)


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
