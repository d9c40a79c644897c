"""What `prepare` writes is what the tree holds, whoever writes it and however often it is interrupted."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from trees import raw_record, write_image, write_subset, write_tree_with_boxes

from medcg_jax.config import DataConfig
from medcg_jax.data import examine
from medcg_jax.data import prepare as prepare_module
from medcg_jax.data.layouts import Layout
from medcg_jax.data.pool import over
from medcg_jax.data.prepare import TooManyBad, prepare
from medcg_jax.data.prepared import PreparedSource, verify
from medcg_jax.data.records import SPLITS, DataError
from medcg_jax.data.release import ReleaseSource

KEEP, CONFIG = Layout("keep", 0), DataConfig()


def contents(out: Path) -> dict[str, bytes]:
    """Everything a preparation leaves for others, by name."""
    files = [path for path in sorted(out.rglob("*")) if path.is_file() and not path.name.startswith(".examined")]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


@pytest.fixture
def tree(tmp_path):
    root = write_tree_with_boxes(tmp_path / "tree", train=12, test=4, boxes=3)
    grey = np.random.default_rng(3).integers(0, 256, (8, 12), np.uint8)
    Image.fromarray(grey).save(root / "med-mat/a b/3 [1]%.png")
    return root


def assert_same_records(prepared: PreparedSource, source, layout: Layout):
    assert prepared.subsets == source.subsets and prepared.detection_subsets == source.detection_subsets
    for subset in (*source.subsets, *source.detection_subsets):
        for split in SPLITS:
            ours, theirs = prepared.records(subset.name, split), source.records(subset.name, split)
            assert ours.records == tuple(map(layout.record, theirs.records))
            for place in range(len(theirs)):
                np.testing.assert_array_equal(ours.image(place), layout.apply(theirs.image(place)))
                assert ours.image_digest(place) == theirs.image_digest(place)


@pytest.mark.parametrize("layout", [KEEP, Layout("square", 16), Layout("fit", 6), Layout("fit", 100)], ids=str)
def test_prepared_records_are_the_trees_own(tree, tmp_path, layout):
    prepare(tree, tmp_path / "out", CONFIG, layout)
    source = PreparedSource(tmp_path / "out", CONFIG)
    assert source.layout == layout
    assert_same_records(source, ReleaseSource(tree, CONFIG), layout)


@pytest.mark.long
def test_the_pack_survives_preparation(shared_dir, tmp_path):
    root = shared_dir / "data" / "medmat-mini"
    done = prepare(root, tmp_path / "out", CONFIG, Layout("fit", 64))
    assert (done.manifest["set_aside"]["records"], len(done.manifest["subsets"])) == (0, 23)
    prepared, source = PreparedSource(tmp_path / "out", CONFIG), ReleaseSource(root, CONFIG)
    for subset in (*source.subsets, *source.detection_subsets):
        for split in SPLITS:
            ours, theirs = prepared.records(subset.name, split), source.records(subset.name, split)
            assert ours.records == tuple(map(prepared.layout.record, theirs.records))
            np.testing.assert_array_equal(ours.image(0), prepared.layout.apply(theirs.image(0)))


def test_the_number_of_workers_changes_no_byte_and_a_second_run_does_nothing(tree, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare_module, "RECORDS_PER_SHARD", 3)
    prepare(tree, tmp_path / "one", CONFIG, KEEP, workers=1)
    first = prepare(tree, tmp_path / "two", CONFIG, KEEP, workers=2)
    assert first.shards_written == 7
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "two").rglob("*")}
    capsys.readouterr()
    again = prepare(tree, tmp_path / "two", CONFIG, KEEP)
    assert again.shards_written == 0 and "nothing to do" in capsys.readouterr().out and again.manifest == first.manifest
    changed = [path.name for path, time in times.items() if path.stat().st_mtime_ns != time]
    assert not [name for name in changed if not name.startswith(".") and name != "two"], changed


def test_images_are_examined_once(tree, tmp_path, monkeypatch):
    (tree / "med-mat/a b/4 [1]%.png").write_bytes(b"text")
    with pytest.raises(TooManyBad):
        prepare(tree, tmp_path / "out", CONFIG, KEEP)
    read = []
    monkeypatch.setattr(examine, "over", lambda one, items, **how: read.extend(items) or over(one, items, **how))
    prepare(tree, tmp_path / "out", CONFIG, KEEP, max_bad_frac=0.2)
    assert not read
    write_image(tree, "med-mat/a b/4 [1]%.png", seed=9)
    with pytest.raises(DataError, match="prepared from other records"):
        prepare(tree, tmp_path / "out", CONFIG, KEEP)
    assert len(read) == 1


def test_what_could_not_be_read_is_read_again(tree, tmp_path, monkeypatch):
    def fails(one, items, **how):
        for path, found in zip(items, over(one, items, **how), strict=True):
            yield examine.Examined(reason="Input/output error") if path.name == "3 [1]%.png" else found

    with monkeypatch.context() as patch, pytest.raises(TooManyBad, match="image 1"):
        patch.setattr(examine, "over", fails)
        prepare(tree, tmp_path / "out", CONFIG, KEEP)
    assert prepare(tree, tmp_path / "out", CONFIG, KEEP).manifest["set_aside"]["records"] == 0


def test_an_image_that_is_exchanged_after_it_was_examined_is_refused(tree, tmp_path, monkeypatch):
    inspected = prepare_module.inspect

    def exchange(*args, **kwargs):
        found = inspected(*args, **kwargs)
        write_image(tree, "med-mat/a b/5 [1]%.png", seed=41)  # of the same size
        return found

    monkeypatch.setattr(prepare_module, "inspect", exchange)
    with pytest.raises(DataError, match="record 04/train/5: image .* has changed since it was examined"):
        prepare(tree, tmp_path / "out", CONFIG, KEEP, workers=1)


def test_subsets_whose_names_begin_alike_are_kept_apart(tree, tmp_path):
    for name in ("own", "own-train-b"):
        raws = [raw_record(i, image=f"med-mat/{name}/{i}.png") for i in range(1, 13)]
        write_subset(tree, f"Subset--{name}-train", raws)
    entry = {"modality": "CT", "area": "Lung", "task": "State"}
    listed = {"subsets": [{"subset": name, **entry} for name in ("own", "own-train-b")]}
    (tree / "manifest.json").write_text(json.dumps(listed), "utf-8")
    prepare(tree, tmp_path / "out", CONFIG, KEEP)
    assert_same_records(PreparedSource(tmp_path / "out", CONFIG), ReleaseSource(tree, CONFIG), KEEP)


def test_near_images_are_left_out_where_that_is_asked(tree, tmp_path):
    with Image.open(shared_pixels(tree)) as image:
        image.convert("L").convert("RGB").save(tree / "med-mat/a b/1003 [1]%.png")
    kept = prepare(tree, tmp_path / "kept", CONFIG, KEEP).manifest
    dropped = prepare(tree, tmp_path / "dropped", CONFIG, KEEP, drop_near=True).manifest
    assert kept["near"] == {"training_records": 1, "kept": True}
    assert dropped["near"] == {"training_records": 1, "kept": False}
    ids = {name: [r.id for r in PreparedSource(tmp_path / name, CONFIG).records("04", "train").records]
           for name in ("kept", "dropped")}  # fmt: skip
    assert set(ids["kept"]) - set(ids["dropped"]) == {"04/train/5"} and len(ids["dropped"]) == 11
    aside = json.loads((tmp_path / "dropped/set_aside.jsonl").read_text("utf-8"))
    assert (aside["record"], aside["test_record"]) == ("record 5", "record 1003") and 0 <= aside["bits"] <= 20


def shared_pixels(tree: Path) -> Path:
    """A picture with shapes in it, in place of training record 5's noise."""
    y, x = np.mgrid[:96, :128]
    waves = [np.sin(x / 9 + phase) * np.cos(y / 13 - phase) * 90 + 120 for phase in (0, 0.1, 0.2)]
    path = tree / "med-mat/a b/5 [1]%.png"
    Image.fromarray(np.stack(waves, -1).astype(np.uint8)).save(path)
    return path


def test_a_missing_shard_alone_is_written_again(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "RECORDS_PER_SHARD", 3)
    prepare(tree, tmp_path / "out", CONFIG, KEEP)
    whole = contents(tmp_path / "out")
    (tmp_path / "out/records/04-train-00001-of-00004.arrayrecord").unlink()
    (tmp_path / "out/records/.04-test-00000-of-00002.arrayrecord.0123456789ab").write_text("half")
    with pytest.raises(DataError, match="04-train-00001-of-00004.arrayrecord is missing; run `medcg data"):
        PreparedSource(tmp_path / "out", CONFIG).records("04", "train")
    assert prepare(tree, tmp_path / "out", CONFIG, KEEP).shards_written == 1
    assert contents(tmp_path / "out") == whole


def test_a_changed_shard_is_seen(tree, tmp_path):
    prepare(tree, tmp_path / "out", CONFIG, KEEP)
    assert verify(tmp_path / "out") == []
    path = tmp_path / "out/records/04-test-00000-of-00001.arrayrecord"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert verify(tmp_path / "out") == [f"{path.name}: its bytes are not those that were written"]


def test_bad_records_end_the_run_unless_so_many_are_accepted(tree, tmp_path):
    raws = [raw_record(i, image=f"med-mat/eight/{i}.png") for i in range(1, 11)]
    raws[2]["Answer-choice"] = "Z"
    write_subset(tree, "Subset--08-train", raws)
    (tree / "med-mat/eight/5.png").write_bytes(b"text")
    out = tmp_path / "out"
    with pytest.raises(TooManyBad, match="2 of 29 records are bad .*letter 1.*--max_bad_frac=0.0690 would") as error:
        prepare(tree, out, CONFIG, KEEP)
    assert error.value.report.counts() == {"letter": 1, "image": 1} and not (out / "manifest.json").exists()
    done = prepare(tree, out, CONFIG, KEEP, max_bad_frac=0.1)
    assert done.manifest["set_aside"] == {"records": 2, "of": 29, "problems": {"letter": 1, "image": 1}}
    aside = [json.loads(line) for line in (out / "set_aside.jsonl").read_text("utf-8").splitlines()]
    assert [(line["record"], line["kind"]) for line in aside] == [("record 3", "letter"), ("record 5", "image")]
    kept = PreparedSource(out, CONFIG)
    ids = [r.id.rpartition("/")[2] for split in SPLITS for r in kept.records("08", split).records]
    assert sorted(ids, key=int) == ["1", "2", "4", "6", "7", "8", "9", "10"]


def test_a_file_that_cannot_be_read_is_not_accepted_at_any_share(tree, tmp_path):
    (tree / "Aggregated_Subsets/Subset--09-train.json").write_text("[{", "utf-8")
    with pytest.raises(TooManyBad, match="cannot be used .json 1."):
        prepare(tree, tmp_path / "out", CONFIG, KEEP, max_bad_frac=1.0)


def test_caps_hold_and_are_settings(tree, tmp_path):
    out, config = tmp_path / "out", dataclasses.replace(CONFIG, train_records_per_subset=6, test_records_per_subset=2)
    prepare(tree, out, config, KEEP)
    assert_same_records(PreparedSource(out, CONFIG), ReleaseSource(tree, config), KEEP)
    less = dataclasses.replace(CONFIG, train_records_per_subset=4)
    assert len(PreparedSource(out, less).records("04", "train")) == 4
    assert PreparedSource(out, less).subsets[0].num_train == 4
    assert PreparedSource(out, less).fingerprint() != PreparedSource(out, CONFIG).fingerprint()
    with pytest.raises(DataError, match="train_records_per_subset=6, not 3000; test_records.*choose another folder"):
        prepare(tree, out, CONFIG, KEEP)


def test_a_changed_tree_is_refused_and_a_foreign_folder_left_alone(tree, tmp_path):
    prepare(tree, tmp_path / "out", CONFIG, KEEP)
    write_image(tree, "med-mat/a b/2 [1]%.png", seed=77)
    with pytest.raises(DataError, match="prepared from other records or images"):
        prepare(tree, tmp_path / "out", CONFIG, KEEP)
    with pytest.raises(DataError, match="holds something else"):
        prepare(tree, tree / "med-mat", CONFIG, KEEP)
    with pytest.raises(DataError, match="the tree itself"):
        prepare(tree, tree, CONFIG, KEEP)
    assert not (tree / "records").exists()


def test_wrong_use_leaves_nothing(tree, tmp_path):
    for changes, message in (({"window": "lungs"}, "data.window='lungs'"), ({"frame": "-3"}, "data.frame='-3'")):
        with pytest.raises(DataError, match=message):
            prepare(tree, tmp_path / "out", dataclasses.replace(CONFIG, **changes), KEEP)
    with pytest.raises(DataError, match="is no Med-MAT tree"):
        prepare(tree / "med-mat", tmp_path / "out", CONFIG, KEEP)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_loses_nothing(tree, tmp_path, monkeypatch):
    from array_record.python import array_record_module

    class Full(array_record_module.ArrayRecordWriter):
        def close(self):
            super().close()
            raise RuntimeError("write() failed: No space left on device; writing /somewhere")

    with monkeypatch.context() as patch:
        patch.setattr(array_record_module, "ArrayRecordWriter", Full)
        with pytest.raises(OSError, match="04-train-.* cannot be written: write.. failed: No space left on device$"):
            prepare(tree, tmp_path / "out", CONFIG, KEEP, workers=1)
    assert not list((tmp_path / "out" / "records").glob("*.arrayrecord"))
    assert prepare(tree, tmp_path / "out", CONFIG, KEEP, workers=1).shards_written == 3
    prepare(tree, tmp_path / "whole", CONFIG, KEEP)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_subsets_that_do_not_reach_the_cap_are_out_of_distribution(tree, tmp_path):
    done = prepare(tree, tmp_path / "out", dataclasses.replace(CONFIG, train_records_per_subset=6), KEEP)
    assert {own["subset"]: own["out_of_distribution"] for own in done.manifest["subsets"]} == {"04": False, "47": True}


def test_an_unfinished_folder_is_no_source(tree, tmp_path):
    prepare(tree, tmp_path / "out", CONFIG, KEEP)
    (tmp_path / "out/manifest.json").unlink()
    with pytest.raises(DataError, match="not finished; run `medcg data prepare` again"):
        PreparedSource(tmp_path / "out", CONFIG)
    with pytest.raises(DataError, match="not prepared"):
        PreparedSource(tree, CONFIG)


PROGRAM = """
import sys
from medcg_jax.data import prepare
from medcg_jax.data.layouts import Layout
from medcg_jax.config import DataConfig

prepare.RECORDS_PER_SHARD = 2
if __name__ == "__main__":
    print("started", flush=True)
    prepare.prepare(sys.argv[1], sys.argv[2], DataConfig(), Layout("square", 700), workers=int(sys.argv[3]))
"""


@pytest.mark.long
def test_killed_at_any_moment_it_ends_in_the_same_bytes(tree, tmp_path):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM, "utf-8")

    def start(out: str, workers: int) -> subprocess.Popen:
        command = [sys.executable, str(script), str(tree), str(tmp_path / out), str(workers)]
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, env=env, text=True)
        process.stdout.readline()
        return process

    begun = time.monotonic()
    assert start("whole", 1).wait(60) == 0
    took, draw, killed = time.monotonic() - begun, random.Random(5), 0
    for _ in range(12):
        process = start("often", draw.choice((1, 2)))
        try:
            process.wait(draw.uniform(0, took))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.wait(60)
    assert start("often", 2).wait(60) == 0 and killed
    assert contents(tmp_path / "often") == contents(tmp_path / "whole")


def test_dicom_and_deep_greys_are_read_as_asked_and_say_so(shared_dir, tmp_path):
    odd = shared_dir / "data" / "medmat-mini" / "odd-formats"
    root, names = tmp_path / "tree", sorted(path.name for path in odd.iterdir())
    assert len(names) == 4
    raws = [raw_record(i, image=f"med-mat/{name}", label=("Benign", "Normal")[i % 2]) for i, name in enumerate(names)]
    for split in SPLITS:
        write_subset(root, f"Subset--04-{split}", raws if split == "train" else [raw_record(9)], images=split == "test")
    for name in names:
        (root / "med-mat" / name).write_bytes((odd / name).read_bytes())
    found = {}
    for window in ("", "lung"):
        data, out = dataclasses.replace(CONFIG, window=window), tmp_path / f"out{window}"
        prepare(root, out, data, KEEP)
        lines = [json.loads(line) for line in (out / "records/04-train.jsonl").read_text("utf-8").splitlines()]
        found[window] = {line["image"].rpartition("/")[2]: line["read_as"] for line in lines}
        assert_same_records(PreparedSource(out, data), ReleaseSource(root, data), KEEP)
        text = (out / "records/04-train.jsonl").read_text("utf-8")
        assert "CompressedSamples" not in text  # the patient's name in both files
    assert found["lung"]["CT_small.dcm"] == "DICOM window lung -600/1500"
    assert found[""]["CT_small.dcm"].startswith("DICOM ") and found[""]["MR_small.dcm"].startswith("DICOM ")
    assert "lung is for CT in HU" in found["lung"]["MR_small.dcm"] and found[""]["CT_small_16bit.png"]
