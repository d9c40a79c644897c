"""Phantoms train the same from memory, from files, and prepared; a run stopped on one goes on from another."""

import jax
import numpy as np
import pytest

from medcg_jax.config import DataConfig, RunConfig, TrainConfig, replace
from medcg_jax.data.check import check_tree
from medcg_jax.data.layouts import Layout
from medcg_jax.data.phantom.source import PhantomSource, write_release
from medcg_jax.data.prepare import prepare
from medcg_jax.data.records import DataError
from medcg_jax.families.weights.convert import load_checkpoint
from medcg_jax.train.run import train
from medcg_jax.train.setup import open_setup

SUBSETS = ("ct-brain-state", "mri-liver-grade")


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, dict[str, str]]:
    """How the same phantoms are named in a configuration."""
    folder = tmp_path_factory.mktemp("phantoms")
    write_release(PhantomSource(0, 12, 4), folder / "tree")
    assert check_tree(folder / "tree").ok
    prepare(folder / "tree", folder / "keep", DataConfig(), Layout("keep", 0))
    prepare(folder / "tree", folder / "square", DataConfig(), Layout("square", 64))
    return {
        "memory": {"source": "phantom"},
        "files": {"source": "release", "root": str(folder / "tree")},
        "prepared": {"source": "prepared", "root": str(folder / "keep")},
        "square": {"source": "prepared", "root": str(folder / "square")},
    }


def run_of(names: dict[str, str], **changes) -> RunConfig:
    caps = {"train_records_per_subset": 12, "test_records_per_subset": 4}
    data = DataConfig(subsets=SUBSETS, max_text_tokens=64, **caps, **names)
    return replace(RunConfig(data=data, train=TrainConfig(steps=3, batch_size=8, log_every_steps=1)), **changes)


@pytest.mark.long
def test_a_run_ends_in_the_same_metrics_and_parameters(sources, tmp_path):
    found = {}
    for name in ("memory", "files", "prepared"):
        train(run_of(sources[name]), tmp_path / name)
        lines = (tmp_path / name / "metrics" / "train.jsonl").read_text().splitlines()
        found[name] = [line.partition('"lr"')[0] for line in lines]  # what follows is of this machine's speed
    assert len(found["memory"]) == 3 and found["files"] == found["memory"] == found["prepared"]
    setup = open_setup(run_of(sources["memory"]))
    params = {name: load_checkpoint(tmp_path / name / "params", setup.model, setup.mesh)[1] for name in found}
    for name in ("files", "prepared"):
        equal = jax.tree.map(lambda a, b: bool((a == b).all()), params["memory"], params[name])
        assert all(jax.tree.leaves(equal)), name


def test_rows_are_equal(sources):
    setups = {name: open_setup(run_of(names)) for name, names in sources.items() if name != "square"}
    subsets = setups["memory"].source.subsets
    assert len(subsets) == 32
    for subset in subsets[::5]:
        for split in ("train", "test"):
            rows = {name: s.encode(s.source.records(subset.name, split)) for name, s in setups.items()}
            places = np.arange(len(rows["memory"]))
            batch, ids = rows["memory"].rows(places)
            for name, own in rows.items():
                other, other_ids = own.rows(places)
                assert other_ids == ids and other.keys() == batch.keys()
                for key, array in batch.items():
                    np.testing.assert_array_equal(other[key], array, err_msg=f"{name} {subset.name} {split} {key}")


def test_images_that_another_model_was_prepared_for_are_refused(sources):
    size = open_setup(run_of(sources["prepared"])).model.image_size_px
    assert size != 64
    with pytest.raises(DataError, match=f"lie as square:64.*--image=square:{size}, fit:SIZE or keep"):
        open_setup(run_of(sources["square"]))
