"""Checkpoints: every bit comes back on any mesh, a damaged one is noticed and the one before it taken."""

import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from train_toys import CONFIG, TRAIN, run, same_bits, setup

from medcg_jax.config import MeshConfig
from medcg_jax.families import build
from medcg_jax.mesh import make_mesh
from medcg_jax.train import checksums
from medcg_jax.train.bit_sums import bit_sums
from medcg_jax.train.checkpoint import CheckpointError, Checkpoints, load_params, read_meta, save_params
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
    checkpoints = Checkpoints(tmp_path / "c", say=said.append)
    for step in (1, 2):
        checkpoints.save(step, state, {"position": step})
    checkpoints.close()
    damage_all(damage, tmp_path / "c" / "2")
    checkpoints = Checkpoints(tmp_path / "c", say=said.append)
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


def test_bit_sums_are_of_bits_and_the_same_on_every_mesh():
    tree = {"a": np.arange(24, dtype=np.float32).reshape(8, 3), "b": np.int32(7)}
    sharding = jax.NamedSharding(make_mesh(EIGHT), jax.P(("data", "fsdp", "tensor")))
    assert bit_sums(tree) == bit_sums({"a": jax.device_put(tree["a"], sharding), "b": tree["b"]})
    expected = int(tree["a"].view(np.uint32).sum(dtype=np.uint32))
    assert bit_sums(tree) == [expected, 7]
    tree["a"][3, 1] = np.nextafter(tree["a"][3, 1], np.float32(100))
    assert bit_sums(tree) != [expected, 7]


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
    checkpoints = Checkpoints(tmp_path, say=said.append)
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
    checkpoints = Checkpoints(tmp_path / "c", say=lambda line: None)
    for step in (1, 2):
        checkpoints.save(step, state, {"position": step})
    checkpoints.wait()
    shutil.rmtree(tmp_path / "c" / "2")
    shutil.copytree(tmp_path / "c" / "1", tmp_path / "c" / "2")
    assert checkpoints.restore(abstract(program))[1]["position"] == 1
    assert "it is the checkpoint of step 1" in checkpoints.skipped[0]
    checkpoints.close()
