"""Detection files: what is read of good ones, the rules that boxes must keep, and subsets with boxes of a tree."""

import math
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from trees import raw_box_record, raw_record, read_file, write_subset, write_tree

from medcg_jax.config import DataConfig
from medcg_jax.data.check import check_tree, print_report
from medcg_jax.data.images import ImageError, image_size, load_image
from medcg_jax.data.records import Box, DataError
from medcg_jax.data.release import ReleaseSource
from medcg_jax.data.schema import RecordError, ReleaseError, detection_problems, parse_detection

PIXELS = DataConfig().max_pixels


def release(root, **config):
    return ReleaseSource(root, DataConfig(source="release", **config))


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ({"label": "x", "bbox": [0, 0, 12, 8]}, None),
        ({"label": "x", "bbox": [0.5, 0, 11.5, 8], "score": 1}, None),
        ({"label": "x", "bbox": [5, 0, 5, 8]}, "x1 < x2"),
        ({"label": "x", "bbox": [0, 8, 5, 0]}, "y1 < y2"),
        ({"label": "x", "bbox": [0, 0, 12.5, 8]}, "not inside"),
        ({"label": "x", "bbox": [-1, 0, 12, 8]}, "not inside"),
        ({"label": "x", "bbox": [0, 0, 12, 10**400]}, "not inside"),
        ({"label": "x", "bbox": [0, 0, 12, math.inf]}, "not inside"),
        ({"label": "x", "bbox": [float("nan"), 0, 12, 8]}, "x1 < x2"),
        ({"label": "x", "bbox": [0, 0, 12]}, "four numbers"),
        ({"label": "x", "bbox": [0, 0, 12, True]}, "four numbers"),
        ({"label": "x", "bbox": [0, 0, 12, "8"]}, "four numbers"),
        ({"label": "x"}, "four numbers"),
        ({"label": "", "bbox": [0, 0, 12, 8]}, "no label"),
        ({"label": " ", "bbox": [0, 0, 12, 8]}, "no label"),
        ({"label": 3, "bbox": [0, 0, 12, 8]}, "no label"),
        ({"label": ["x"], "bbox": [0, 0, 12, 8]}, "no label"),
        ({"label": "a\nb", "bbox": [0, 0, 12, 8]}, "no label"),
        ("box", "no label"),
    ],
)
def test_boxes(box, reason):
    raw = raw_box_record(1, boxes=[box])
    found = detection_problems(raw, (8, 12))
    assert [kind for kind, _ in found] == (["box"] if reason else [])
    if not reason:
        assert parse_detection(raw, "38", "train", (8, 12)).boxes == (Box("x", *map(float, box["bbox"])),)
        return
    with pytest.raises(RecordError, match=reason) as error:
        parse_detection(raw, "38", "train", (8, 12))
    assert error.value.kind == "box" and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("raw", "kind", "reason"),
    [
        (raw_box_record(1, width=13), "size", "13 x 8; the image has 12 x 8 pixels"),
        (raw_box_record(1, width=8, height=12), "size", "8 x 12; the image has 12 x 8"),
        (raw_box_record(1, width="12"), "type", 'width is "12", a str; int is accepted'),
        (raw_box_record(1, boxes={"label": "x"}), "type", "boxes is .* a dict; list is accepted"),
        ({k: v for k, v in raw_box_record(1).items() if k != "boxes"}, "key", "the key boxes is missing"),
        ([], "type", "a list; an object is accepted"),
    ],
)
def test_broken_records_are_refused(raw, kind, reason):
    with pytest.raises(RecordError, match=reason) as error:
        parse_detection(raw, "38", "train", (8, 12))
    assert error.value.kind == kind


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"image": "../x.png"}, "path"),
        ({"image": "med-mat/none.png"}, "missing_file"),
        ({"id": 2}, "duplicate_id"),
        ({"image": "med-mat/text.png"}, "image"),
    ],
)
def test_a_file_stops_at_what_is_wrong(tmp_path, change, kind):
    write_subset(tmp_path, "Subset--38-det-train", [raw_box_record(2)])
    (tmp_path / "med-mat" / "text.png").write_text("text")
    write_subset(tmp_path, "Subset--38-det-train", [raw_box_record(2), raw_box_record(3) | change], images=False)
    path = tmp_path / "Aggregated_Subsets" / "Subset--38-det-train.json"
    with pytest.raises(ReleaseError, match="^Subset--38-det-train.json: record") as error:
        read_file(path, tmp_path, detection=True)
    assert error.value.kind == kind


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_header_gives_the_upright_size(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("a.jpg", "a.png"):
        Image.new("RGB", (12, 8)).save(tmp_path / name, exif=exif)
        assert image_size(tmp_path / name, PIXELS) == load_image(tmp_path / name, PIXELS).shape[:2]
    with pytest.raises(ImageError, match="at most 90"):
        image_size(tmp_path / "a.png", 90)


def test_a_tree_with_boxes(tmp_path):
    write_tree(tmp_path)
    before = release(tmp_path).fingerprint()
    train = [raw_box_record(i, label="Benign" if i % 4 else "Malignant") for i in range(1, 25)]
    write_subset(tmp_path, "Subset--43-det-train", train)
    write_subset(tmp_path, "Subset--43-det-test", [raw_box_record(101, boxes=[])])
    source = release(tmp_path)
    assert [s.name for s in source.subsets] == ["04"]
    (subset,) = source.detection_subsets
    assert (subset.name, subset.modality, subset.area, subset.task) == ("43", "US", "Chest", "Cancer Det/Seg")
    assert (subset.labels, subset.num_train, subset.num_test) == (("Benign", "Malignant"), 24, 1)
    records = source.records("43", "train")
    first = records.records[0]
    assert (first.id, first.boxes, first.size_px) == ("43/train/1", (Box("Benign", 1.0, 2.0, 5.0, 6.0),), (8, 12))
    assert not first.turns and not first.options and first.label == "" and records.mask(0) is None
    assert records.image(0).shape == (8, 12, 3)
    assert source.records("43", "test").records[0].boxes == ()
    # Detection files change nothing of the choice records, nor of their fingerprint.
    assert source.fingerprint() == before
    capped = release(tmp_path, train_records_per_subset=12)
    assert Counter(r.boxes[0].label for r in capped.records("43", "train").records) == {"Benign": 6, "Malignant": 6}
    assert capped.detection_subsets[0].num_train == 12
    prints = [source.detection_fingerprint(), release(tmp_path).detection_fingerprint(), capped.detection_fingerprint()]
    write_subset(tmp_path, "Subset--43-det-test", [raw_box_record(101)], images=False)
    assert prints[0] == prints[1] and len({*prints, release(tmp_path).detection_fingerprint()}) == 3
    assert release(tmp_path).fingerprint() == before


def test_a_detection_subset_without_test_file_is_split(tmp_path):
    write_tree(tmp_path)
    write_subset(tmp_path, "Subset--43-det-train", [raw_box_record(i, label="xy"[i % 2]) for i in range(1, 41)])
    source = release(tmp_path)
    train, test = (source.records("43", split).records for split in ("train", "test"))
    assert (len(train), len(test)) == (36, 4) and not {r.image for r in train} & {r.image for r in test}
    (subset,) = source.detection_subsets
    assert (subset.labels, subset.num_train, subset.num_test) == (("x", "y"), 36, 4)


def test_broken_detection_files_leave_choice_records_alone(tmp_path):
    write_tree(tmp_path)
    write_subset(tmp_path, "Subset--38-det-train", [raw_box_record(1, width=99)])
    write_subset(tmp_path, "Subset--38-det-test", [])
    (tmp_path / "Aggregated_Subsets" / "Subset--98-det-train.json").write_text("{]")
    source = release(tmp_path)
    assert len(source.records("04", "train")) == 12
    with pytest.raises(ReleaseError, match="Subset--38-det-train.json: record 1: width and height are 99 x 8"):
        source.records("38", "train")
    with pytest.raises(DataError, match="subset '97' is no subset of"):
        source.records("97", "train")
    with pytest.raises(ReleaseError, match="subset 98 is neither"):
        source.detection_subsets  # noqa: B018


def test_a_number_has_options_or_boxes(tmp_path):
    write_tree(tmp_path)
    write_subset(tmp_path, "Subset--04-det-test", [raw_box_record(1)])
    with pytest.raises(ReleaseError, match="the number of .*Subset--04-det-test.json; a subset has options or boxes"):
        release(tmp_path)
    assert check_tree(tmp_path).counts() == {"duplicate_file": 2}


def test_extra_keys_of_choice_records_are_still_ignored(tmp_path):
    write_subset(tmp_path, "Subset--04-train", [raw_record(1, boxes=[{"label": "x"}]), raw_record(2, label="Normal")])
    write_subset(tmp_path, "Subset--04-test", [raw_record(3)])
    assert release(tmp_path).subsets[0].labels == ("Benign", "Normal")


def test_the_check_counts_boxes(tmp_path, capsys):
    write_tree(tmp_path, train=2, test=1)
    empty = [{"label": "x", "bbox": [0, 0, 0, 1]}]
    raws = [raw_box_record(1), raw_box_record(2, boxes=[]), raw_box_record(3, boxes=empty)]
    write_subset(tmp_path, "Subset--38-det-train", raws)
    report = check_tree(tmp_path)
    assert [(p.record, p.kind) for p in report.problems] == [("record 3", "box")]
    assert (report.num_records, report.as_dict()["detection_records"], report.as_dict()["boxes"]) == (6, 3, 2)
    print_report(report)
    assert "of these 3 detection records, 2 boxes" in capsys.readouterr().out


WANTED = {
    "38": ({"Skin lesion": 476}, 350, 126),
    "43": ({"Benign lesion": 126, "Malignant lesion": 122}, 180, 64),
    "47": ({"Left lung": 43, "Right lung": 43}, 26, 18),
    "63": ({"Platelet": 222, "Red blood cell": 2509, "White blood cell": 224}, 160, 60),
}


def test_the_packs_detection_subsets_are_read_whole(shared_dir):
    source = release(shared_dir / "data" / "medmat-mini")
    sizes = {s.name: (s.num_train, s.num_test) for s in source.detection_subsets}
    assert sizes == {name: wanted[1:] for name, wanted in WANTED.items()}
    for subset in source.detection_subsets:
        found = Counter()
        for split in ("train", "test"):
            records = source.records(subset.name, split)
            for i, record in enumerate(records.records):
                height, width = record.size_px
                assert records.image(i).shape == (height, width, 3)
                assert record.boxes and record.data_no and not record.turns
                corners = np.array([box.corners for box in record.boxes])
                assert (corners[:, :2] >= 0).all() and (corners[:, 2:] <= [width, height]).all()
                assert (corners[:, 2:] > corners[:, :2]).all()
                found.update(box.label for box in record.boxes)
        assert found == WANTED[subset.name][0] and subset.labels == tuple(sorted(found))
