"""What gives a test record away: the same image, question or patient, and near images; and what does not."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from trees import raw_record, write_subset

from medcg_jax.config import DataConfig
from medcg_jax.data import leaks
from medcg_jax.data.layouts import Layout
from medcg_jax.data.leaks import Leak, NearImage, find_leaks, hashed, joined, remedy, words
from medcg_jax.data.prepare import prepare
from medcg_jax.data.prepared import PreparedSource
from medcg_jax.data.records import Record, RecordSet, Turn
from medcg_jax.data.release import ReleaseSource


def record(split: str, number: int, *, subset="04", stem="Which?", options=("Benign", "Normal"), **fields) -> Record:
    lines = "".join(f"\n{letter}: {text}" for letter, text in zip("ABCD", options, strict=False))
    turn = Turn(f"{stem}{lines}\nAnswer with the option's letter.", "A")
    return Record(f"{subset}/{split}/{number}", subset, (turn,), options, "A", **{"data_no": "5"} | fields)


def found_in(training: list[Record], test: list[Record], **options) -> list[Leak]:
    sets = (hashed(RecordSet(records, [None] * len(records))) for records in (training, test))
    return find_leaks(*sets, **options)


# --- patients


@pytest.mark.parametrize("subset", ["04", "05"])
def test_a_stated_patient_on_both_sides_is_found_within_a_subset_and_across(subset):
    training = [record("train", i, subset=subset, group=name) for i, name in enumerate(["p1", "p2", "p1", ""])]
    test = [record("test", i, group=name) for i, name in enumerate(["p3", "p1", "", "p1"])]
    assert found_in(training, test) == [
        Leak(f"{subset}/train/0", "04/test/1", "same group"), Leak(f"{subset}/train/2", "04/test/1", "same group")
    ]  # fmt: skip
    assert found_in([replace(one, data_no="6") for one in training], test) == []


def test_a_patient_that_file_names_tell_is_likely_the_same():
    right = record("test", 0, data_no="53", image="a/9120059R.jpg")
    left = record("train", 0, data_no="53", image="a/9120059L.jpg")
    likely = [Leak("04/train/0", "04/test/0", "likely same group")]
    images = np.zeros((1, 2, 2, 3), np.uint8)

    def told(training: Record, test: Record) -> list[Leak]:
        return find_leaks(*(hashed(RecordSet([one], images + k)) for k, one in enumerate((training, test))))

    assert told(left, right) == likely
    # One side alone states it: so does the other's name.
    assert told(replace(left, group="9120059"), right) == likely
    assert told(replace(left, group="9120059"), replace(right, group="9120059"))[0].kind == "same group"
    assert told(replace(left, group="someone else"), right) == []


def test_without_a_data_set_a_name_is_sure_within_its_subset_alone():
    test = [record("test", 0, group="1", data_no="")]
    assert found_in([record("train", 0, group="1", data_no="")], test)[0].kind == "same group"
    (leak,) = found_in([record("train", 0, subset="05", group="1", data_no="")], test)
    assert leak.kind == "likely same group"


def test_the_very_image_says_the_patient_too():
    images = np.ones((1, 2, 2, 3), np.uint8)
    sets = (hashed(RecordSet([record(split, 0, group="p1", image="x.png")], images)) for split in ("train", "test"))
    assert [leak.kind for leak in find_leaks(*sets)] == ["same bytes"]


def test_a_split_of_the_products_own_has_every_patient_on_one_side(tmp_path):
    raws = [
        raw_record(i, label=("Benign", "Normal")[i % 2]) | {"group": f"p{i % 13}" if i % 4 else ""} for i in range(80)
    ]
    write_subset(tmp_path, "Subset--04-train", raws)
    source = ReleaseSource(tmp_path, DataConfig())
    sets = [source.records("04", split) for split in ("train", "test")]
    assert len(sets[1]) > 4 and any(one.group for one in sets[1].records)
    assert find_leaks(*map(hashed, sets)) == []


# --- questions


def test_a_question_with_its_options_is_found_in_any_order():
    test = [record("test", 0, stem="Which  finding\nis it?", options=("Benign", "Normal", "Cyst"))]
    general = [
        record("train", 1, subset="general", stem="which finding is it?", options=("Cyst", "benign ", "Normal")),
        record("train", 2, subset="general", stem="Which finding is it?", options=("Benign", "Normal")),
        record("train", 3, subset="general", stem="Which is it?", options=("Benign", "Normal", "Cyst")),
    ]
    assert found_in(general, test, questions=True) == [Leak("general/train/1", "04/test/0", "same question")]
    # All records of a medical subset ask the same: there it tells nothing.
    assert found_in(general, test) == []


# --- near images


def test_a_near_image_is_told_with_how_it_was_changed(monkeypatch):
    near = {1: NearImage(7, "mirrored", 0)}
    monkeypatch.setattr(leaks, "nearest_images", lambda training, test, bits: near if bits == 20 else {})
    (leak,) = found_in([record("train", 0), record("train", 1)], [record("test", 0)], near_bits=20)
    assert leak == Leak("04/train/1", "04/test/0", "near", 7, "mirrored")
    assert words(leak) == (
        "training record 04/train/1 has an image nearly that of test record 04/test/0 (mirrored, 7 of 256 bits apart)"
    )
    assert "study.near_duplicates=drop" in remedy(leak)


# --- prepared


def test_a_prepared_image_is_known_by_its_files_pixels(tmp_path, monkeypatch):
    """Whatever its size became: from the lines of its records, without a shard, and nothing is hashed again."""
    tree, others = tmp_path / "tree", tmp_path / "others"
    for root, split in ((tree, "train"), (tree, "test"), (others, "train")):
        write_subset(root, f"Subset--04-{split}", [raw_record(i, image=f"{split}-{i}.png") for i in range(3)])
    # Other bytes, and another image that is prepared alike.
    Image.open(tree / "test-0.png").save(others / "train-1.png", compress_level=0)
    Image.open(tree / "test-1.png").resize((24, 16), 0).save(others / "train-2.png")
    prepare(tree, tmp_path / "out", DataConfig(), Layout("square", 12))
    held = PreparedSource(tmp_path / "out", DataConfig()).records("04", "test")
    training = hashed(ReleaseSource(others, DataConfig()).records("04", "train"), {})
    wanted = [Leak("04/train/1", "04/test/0", "same pixels")]
    decoded = hashed(ReleaseSource(tree, DataConfig()).records("04", "test"), {})
    monkeypatch.setattr("medcg_jax.data.prepared.pixels", lambda *of: pytest.fail("a shard was read"))
    monkeypatch.setattr(leaks, "image_hashes", lambda *of: pytest.fail("an image was hashed"))
    assert hashed(held) == hashed(held, {}) == decoded
    assert find_leaks(training, hashed(held)) == wanted
    assert find_leaks(joined([training]), joined([hashed(held)] * 2)) == wanted
