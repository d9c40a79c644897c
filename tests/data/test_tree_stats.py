"""The page about a tree says what is in it."""

import json

import numpy as np
import pytest
from PIL import Image
from record_sets import choices
from trees import raw_record, write_subset, write_tree_with_boxes

from medcg_jax.data.notices import letter_counts
from medcg_jax.data.records import DataError, RecordSet
from medcg_jax.data.stats import THUMB_PX, contact_sheet, write_stats


@pytest.fixture
def tree(tmp_path):
    root = write_tree_with_boxes(tmp_path / "tree", train=12, test=4, boxes=20)
    return root


def page(root, out):
    path = write_stats(root, out)
    content = json.loads((out / "stats.json").read_text("utf-8"))
    return path.read_text("utf-8"), content, {own["name"]: own for own in content["subsets"]}


def test_numbers_are_the_trees(tree, tmp_path):
    html, content, subsets = page(tree, tmp_path / "out")
    assert (content["records"], content["images"], content["problems"]) == (36, 36, {})
    own = subsets["04"]
    assert (own["train"], own["test"], own["labels"]) == (12, 4, [["Benign", 9, 3], ["Normal", 3, 1]])
    assert own["letters"] == {"A": 12, "B": 4} and own["sizes"] == [["12 x 8", 16]] and own["side_px"] == [8, 12]
    assert (subsets["47"]["kind"], subsets["47"]["labels"][0][0]) == ("detection", "Skin lesion")
    assert "sheets/near.jpg" not in html and content["near"] == []
    assert "Nothing is wrong" in html and 'src="sheets/04.jpg"' in html and content["shared"] == []
    with Image.open(tmp_path / "out/sheets/04.jpg") as sheet:
        assert sheet.height > 2 * THUMB_PX


def test_copies_and_what_is_wrong_are_said(tree, tmp_path):
    with Image.open(tree / "med-mat/a b/1 [1]%.png") as image:
        image.save(tree / "med-mat/a b/2 [1]%.png", compress_level=0)  # another file, the same picture
        image.save(tree / "med-mat/a b/1002 [1]%.png", compress_level=1)
        image.save(tree / "med-mat/boxes/3.png")
    raws = [raw_record(i, image=f"med-mat/eight/{i}.png") for i in range(1, 11)]
    raws[0]["Answer-choice"] = "Q"
    write_subset(tree, "Subset--08-train", raws)
    (tree / "med-mat/eight/4.png").write_bytes(b"no image <b>")
    html, content, subsets = page(tree, tmp_path / "out")
    # The test record is set aside, and with it its image: one pair is left in the subset.
    assert subsets["04"]["duplicates"] == 2 and subsets["04"]["across"] == 1 and subsets["04"]["test"] == 3
    assert [(own["subsets"], own["same"], own["near"]) for own in content["shared"]] == [(["04", "47"], 1, 0)]
    assert subsets["08"]["problems"] == {"letter": 1, "image": 1} and "records are bad" in html
    assert "<b>" not in html.replace("<b></b>", "")


def test_nearly_the_same_images_of_two_subsets_are_counted(tree, tmp_path):
    y, x = np.mgrid[:96, :128]
    picture = Image.fromarray((np.sin(x / 9) * np.cos(y / 13) * 90 + 120).astype(np.uint8))
    raws = [raw_record(i, image=f"med-mat/nine/{i}.png") for i in range(1, 13)]
    write_subset(tree, "Subset--09-train", raws)
    picture.save(tree / "med-mat/nine/3.png")
    picture.save(tree / "med-mat/a b/3 [1]%.png")
    picture.resize((64, 48)).save(tree / "med-mat/nine/4.png")
    _, content, _ = page(tree, tmp_path / "out")
    # One picture in both, and in subset 09 once more in another size: subset 04 has no second image to pair that with.
    assert [(own["subsets"], own["same"], own["near"]) for own in content["shared"]] == [(["04", "09"], 1, 0)]
    picture.point(lambda grey: min(255, grey + 6)).save(tree / "med-mat/a b/3 [1]%.png")
    _, content, _ = page(tree, tmp_path / "out")
    assert [(own["subsets"], own["same"], own["near"]) for own in content["shared"]] == [(["04", "09"], 0, 1)]


def test_near_pairs_are_pictured(tree, tmp_path):
    y, x = np.mgrid[:96, :128]
    picture = Image.fromarray((np.sin(x / 9) * np.cos(y / 13) * 90 + 120).astype(np.uint8))
    picture.save(tree / "med-mat/a b/5 [1]%.png")
    picture.resize((64, 48)).save(tree / "med-mat/a b/1003 [1]%.png")
    html, content, _ = page(tree, tmp_path / "out")
    assert [(own["record"], own["test_record"]) for own in content["near"]] == [("record 5", "record 1003")]
    assert 'src="sheets/near.jpg"' in html and (tmp_path / "out/sheets/near.jpg").is_file()


def test_an_older_page_alone_is_replaced(tree, tmp_path):
    page(tree, tmp_path / "out")
    (tmp_path / "out" / "sheets" / "old.jpg").write_text("")
    page(tree, tmp_path / "out")
    assert not (tmp_path / "out" / "sheets" / "old.jpg").exists()
    with pytest.raises(DataError, match="holds something else"):
        write_stats(tree, tree / "med-mat")
    assert not list(tmp_path.glob(".*partial"))


def test_uneven_letters_are_seen():
    even = choices(400)
    letters, p = letter_counts(even.records)
    assert sum(letters.values()) == 400 and p > 0.01
    lopsided = RecordSet([r for r in even.records if r.answer == "A"], np.zeros((200, 1, 1, 3), np.uint8))
    assert letter_counts(lopsided.records)[1] < 1e-6
    assert letter_counts(()) == ({}, None)
    assert contact_sheet([RecordSet([], np.zeros((0, 1, 1, 3), np.uint8))], np.random.default_rng(0)) is None
