"""TFDS's `med_mat` holds the prepared records, and is written and read without TensorFlow."""

import os
import subprocess
import sys
from pathlib import Path

import grain
import numpy as np
import pytest
from trees import raw_record, write_subset, write_tree, write_tree_with_boxes

from medcg_jax.config import DataConfig
from medcg_jax.data.layouts import Layout
from medcg_jax.data.phantom.source import PhantomSource, write_release
from medcg_jax.data.prepare import prepare
from medcg_jax.data.prepared import PreparedSource
from medcg_jax.data.records import SPLITS, DataError

tfds_builder = pytest.importorskip("medcg_jax.data.tfds_builder", reason="tensorflow-datasets is not installed")
CONFIG = DataConfig()


def prepared(root: Path, out: Path) -> PreparedSource:
    prepare(root, out, CONFIG, Layout("keep", 0))
    return PreparedSource(out, CONFIG)


def assert_equal(source: PreparedSource, examples, subsets, split):
    at = 0
    for subset in subsets:
        records = source.records(subset.name, split)
        for place, record in enumerate(records.records):
            own, image = tfds_builder.record_of(examples[at])
            assert own == record
            np.testing.assert_array_equal(image, records.image(place))
            assert examples[at]["modality"].decode() == subset.modality
            at += 1
    assert at == len(examples)


def test_every_configuration_is_there():
    names = [config.name for config in tfds_builder.MedMat.BUILDER_CONFIGS]
    assert names == [f"{number:02d}" for number in range(1, 54)] + ["all"]


def test_the_records_are_the_prepared_ones(tmp_path):
    root = write_tree_with_boxes(tmp_path / "tree", train=12, test=4, boxes=20)
    raws = [raw_record(i, image=f"med-mat/nine/{i}.png", group=f"p{i % 2}") for i in range(9)]
    write_subset(root, "Subset--09-train", raws)
    source = prepared(root, tmp_path / "out")
    for config in ("04", "47", "all"):
        builder = tfds_builder.build(tmp_path / "out", config, tmp_path / "tfds")
        subsets = [s for s in (*source.subsets, *source.detection_subsets) if config in (s.name, "all")]
        for split in SPLITS:
            assert_equal(source, builder.as_data_source(split), subsets, split)
    files = [path.name for path in (tmp_path / "tfds").rglob("*train*")]
    assert files and all(".array_record-" in name for name in files)
    examples = grain.MapDataset.source(builder.as_data_source("train")).shuffle(seed=1).map(tfds_builder.record_of)
    assert sorted(record.id for record, _ in examples) == sorted(
        record.id for subset in subsets for record in source.records(subset.name, "train").records
    )
    with pytest.raises(DataError, match="config '05'; expected 04, 09, 47 or all of this folder"):
        tfds_builder.build(tmp_path / "out", "05", tmp_path / "tfds")


@pytest.mark.long
def test_phantoms_go_through_too(tmp_path):
    write_release(PhantomSource(0, 3, 2), tmp_path / "tree")
    source = prepared(tmp_path / "tree", tmp_path / "out")
    builder = tfds_builder.build(tmp_path / "out", "all", tmp_path / "tfds")
    subsets = (*source.subsets, *source.detection_subsets)
    assert_equal(source, builder.as_data_source("test"), subsets, "test")
    name = source.subsets[0].name
    one = tfds_builder.build(tmp_path / "out", name, tmp_path / "tfds")
    assert_equal(source, one.as_data_source("train"), source.subsets[:1], "train")


PROGRAM = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("jax", "torch"):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)
sys.meta_path.insert(0, Block())
from medcg_jax.data.tfds_builder import build, record_of
print(record_of(build(sys.argv[1], "04", sys.argv[2]).as_data_source("train")[0])[1].shape)
"""


@pytest.mark.timeout(180)
def test_it_is_written_where_tensorflow_cannot_be_imported(tmp_path):
    prepared(write_tree(tmp_path / "tree"), tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "out"), str(tmp_path / "tfds")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.strip().endswith("(8, 12, 3)"), done.stderr[-2000:]
