"""`check_tree` finds every problem by record and kind, and goes on."""

import json

import pytest
from trees import raw_record, write_image, write_subset, write_tree

from medcg_jax.data.check import check_tree, print_report
from medcg_jax.data.records import DataError


def test_a_good_tree_has_nothing_wrong(tmp_path):
    report = check_tree(write_tree(tmp_path))
    assert report.ok and (report.num_files, report.num_records, report.num_images) == (2, 16, 16)
    assert json.loads(json.dumps(report.as_dict()))["problems"] == []


@pytest.mark.long
def test_the_pack_has_nothing_wrong(shared_dir):
    report = check_tree(shared_dir / "data" / "medmat-mini")
    assert report.ok and (report.num_files, report.num_records, report.num_images) == (46, 6352, 5612)
    assert (report.num_detection, report.num_boxes) == (984, 3765)


def test_everything_wrong_is_reported_and_nothing_else(tmp_path):
    write_tree(tmp_path, train=4, test=3)
    train = [raw_record(i) for i in range(1, 9)]
    train[0]["Answer-choice"] = "C"
    train[1]["id"] = 1
    del train[2]["Answer"]
    train[3]["image"] = "../x.png"
    train[4]["Answer"] = "Normal"
    write_subset(tmp_path, "Subset--07-train", train, images=False)
    for raw in train[5:]:
        write_image(tmp_path, raw["image"])
    (tmp_path / train[5]["image"]).write_bytes(b"\xff\xd8\xff")
    (tmp_path / train[6]["image"]).unlink()
    # The bytes of a training image of another subset, under a name of its own.
    test = [raw_record(1, image="other/name.png"), "text"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "name.png").write_bytes((tmp_path / train[7]["image"]).read_bytes())
    write_subset(tmp_path, "Subset--08-test", test, images=False)
    (tmp_path / "Aggregated_Subsets" / "Subset--09-train.json").write_text("{]")
    write_subset(tmp_path, "Subset--99-train", [])
    boxes = {"label": "x", "bbox": [1, 1, 5, 5]}
    lesion = {"id": 1, "image": train[7]["image"], "width": 12, "height": 8, "boxes": [boxes], "data-no": "1"}
    write_subset(tmp_path, "Subset--38-det-train", [lesion, lesion | {"id": 2, "width": 99}], images=False)
    report = check_tree(tmp_path, workers=2)
    found = {(problem.file.removeprefix("Subset--"), problem.record, problem.kind) for problem in report.problems}
    assert found == {
        ("07-train.json", "record 1", "letter"),
        ("07-train.json", "record 1", "duplicate_id"),
        ("07-train.json", "record 3", "key"),
        ("07-train.json", "record 4", "path"),
        ("07-train.json", "record 5", "answer"),
        ("07-train.json", "record 6", "image"),
        ("07-train.json", "record 7", "missing_file"),
        ("08-test.json", "record 1", "duplicate_across_splits"),
        ("08-test.json", "record in place 2", "type"),
        ("09-train.json", "", "json"),
        ("99-train.json", "subset 99", "unknown_subset"),
        ("99-train.json", "", "no_records"),
        ("38-det-train.json", "record 2", "size"),
    }
    assert len(report.problems) == 13 and report.counts()["letter"] == 1
    shared = next(problem for problem in report.problems if problem.kind == "duplicate_across_splits")
    assert "record 8" in shared.reason and str(shared).startswith("Subset--08-test.json: record 1: the same image")


def test_pixels_are_held_to_the_limit(tmp_path):
    report = check_tree(write_tree(tmp_path, train=1, test=1), max_pixels=100)
    assert report.counts() == {"image": 2}
    assert "12 x 8 pixels pad to 12 x 12; at most 100" in report.problems[0].reason


def test_progress_sees_every_image(tmp_path):
    seen = []

    def watch(images, total):
        for image in images:
            seen.append(total)
            yield image

    check_tree(write_tree(tmp_path, train=3, test=1), progress=watch)
    assert seen == [4] * 4


def test_a_folder_that_is_no_tree(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        check_tree(tmp_path / "none")
    with pytest.raises(DataError, match="no Med-MAT tree"):
        check_tree(tmp_path)


def test_the_printed_report_shortens_long_lists(tmp_path, capsys):
    write_tree(tmp_path, train=5, test=1)
    for image in sorted((tmp_path / "med-mat").rglob("*.png"))[:5]:
        image.write_bytes(b"")
    print_report(check_tree(tmp_path), limit=2)
    out = capsys.readouterr().out
    assert "image: 5" in out and "and 3 more" in out and out.count("not an image") == 2
