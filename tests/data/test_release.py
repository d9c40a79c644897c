"""Reading Med-MAT trees: what comes out of good ones, and what is refused of choice and detection records."""

import json
import math
from collections import Counter

import numpy as np
import pytest
from trees import raw_box_record, raw_record, read_file, write_image, write_subset, write_tree, write_tree_with_boxes

from medcg_jax.config import DataConfig
from medcg_jax.data import tree
from medcg_jax.data.check import check_tree, inspect, print_report
from medcg_jax.data.images import ImageError
from medcg_jax.data.records import Box, DataError
from medcg_jax.data.release import ReleaseSource
from medcg_jax.data.schema import (
    RecordError,
    ReleaseError,
    detection_problems,
    parse_choice,
    parse_detection,
    parse_options,
)
from medcg_jax.data.sources import open_source, require_subsets
from medcg_jax.data.tree import subset_table


def release(root, **config):
    return ReleaseSource(root, DataConfig(source="release", **config))


def test_the_pack_is_read_whole(shared_dir):
    source = release(shared_dir / "data" / "medmat-mini")
    manifest = json.loads((shared_dir / "data" / "medmat-mini" / "manifest.json").read_text())["subsets"]
    wanted = {entry["subset"]: entry for entry in manifest if entry["kind"] == "choice"}
    assert [subset.name for subset in source.subsets] == sorted(wanted)
    assert [subset.name for subset in source.detection_subsets] == ["38", "43", "47", "63"]
    for subset in source.subsets:
        entry = wanted[subset.name]
        assert (subset.modality, subset.area, subset.task) == (entry["modality"], entry["area"], entry["task"])
        assert (list(subset.labels), subset.num_train, subset.num_test) == (
            sorted(entry["labels"]),
            entry["train"],
            entry["test"],
        )
        for split in ("train", "test"):
            records = source.records(subset.name, split)
            assert Counter(r.label for r in records.records) == entry[f"{split}_per_label"]
            assert len({record.id for record in records.records}) == len(records) == entry[split]
            assert {record.data_no for record in records.records} <= {d["data-no"] for d in entry["datasets"]}
    record = source.records("04", "train").records[0]
    assert (record.id, record.options, record.answer) == ("04/train/1", ("Malignant", "Normal", "Benign"), "C")
    assert record.turns[0].question.startswith("Please sort this lung CT") and record.turns[0].answer == "C"
    assert source.records("04", "train").image(0).shape[2] == 3


def test_the_table_is_the_papers(shared_dir):
    lines = (shared_dir / "paper" / "table9_subsets.csv").read_text().splitlines()[1:]
    printed = {line.split(",")[0]: tuple(line.split(",")[1:4]) for line in lines}
    assert len(printed) == 52
    assert subset_table() == printed | {"53": ("FP", "Fundus", "Optic Disc Seg")}


def test_triplets_come_from_the_table_or_the_trees_manifest(tmp_path):
    write_tree(tmp_path)
    (subset,) = release(tmp_path).subsets
    assert (subset.modality, subset.area, subset.task) == ("CT", "Lung", "Lung Cancer Classification")
    assert subset.labels == ("Benign", "Normal")
    write_subset(tmp_path, "Subset--77-train", [raw_record(2001)])
    with pytest.raises(ReleaseError, match="subset 77 is neither in the tree's manifest.json nor"):
        release(tmp_path)
    entry = {"subset": "77", "modality": "CT", "area": "Knee", "task": "State"}
    (tmp_path / "manifest.json").write_text(json.dumps({"subsets": [entry]}))
    assert release(tmp_path).subsets[1].area == "Knee"
    (tmp_path / "manifest.json").write_text(json.dumps({"subsets": [entry | {"area": 3}]}))
    with pytest.raises(ReleaseError, match="manifest.json: subset 77: modality, area and task must be text"):
        release(tmp_path)


def test_caps_balance_labels_by_seed(tmp_path):
    write_tree(tmp_path, train=40, test=40)
    picks = {}
    for seed in (0, 0, 1):
        source = release(tmp_path, train_records_per_subset=16, test_records_per_subset=8, seed=seed)
        assert (source.subsets[0].num_train, source.subsets[0].num_test) == (16, 8)
        records = source.records("04", "train").records
        assert Counter(r.label for r in records) == {"Benign": 8, "Normal": 8}
        assert Counter(r.label for r in source.records("04", "test").records) == {"Benign": 4, "Normal": 4}
        picks.setdefault(seed, []).append([r.id for r in records])
    assert picks[0][0] == picks[0][1] != picks[1][0]
    numbers = [int(name.split("/")[-1]) for name in picks[0][0]]
    assert numbers == sorted(numbers)


def test_a_subset_without_test_file_is_split_by_image_and_label(tmp_path):
    labels = ["Benign", "Benign", "Benign", "Normal"]
    # Two questions to each image: both go the same way.
    raws = [raw_record(i, label=labels[i // 2 % 4], image=f"m/{i // 2}.png") for i in range(160)]
    write_subset(tmp_path, "Subset-04-train", raws, folder=".")
    tests = []
    for seed in (0, 1):
        source = release(tmp_path, seed=seed)
        train, test = (source.records("04", split).records for split in ("train", "test"))
        assert (source.subsets[0].num_train, source.subsets[0].num_test) == (len(train), len(test)) == (144, 16)
        assert not {r.image for r in train} & {r.image for r in test}
        assert Counter(r.label for r in test) == {"Benign": 12, "Normal": 4}
        assert all(record.id.split("/")[1] == "test" for record in test)
        tests.append(test)
    # A seed of the data must not move records that another seed trained on into the test.
    assert tests[0] == tests[1]


def test_patients_stay_together_where_the_records_name_them(tmp_path):
    raws = [raw_record(i, label=["Benign", "Normal"][i % 2], image=f"m/{i}.png") for i in range(200)]
    for raw in raws:
        # Two datasets that number their patients alike.
        raw["data-no"] = "5" if raw["id"] < 100 else "6"
        raw["group"] = str(raw["id"] % 100 // 4)
    write_subset(tmp_path, "Subset-04-train", raws, folder=".")
    source = release(tmp_path)
    train, test = (source.records("04", split).records for split in ("train", "test"))
    assert (len(train), len(test)) == (180, 20)
    assert not {(r.data_no, r.group) for r in train} & {(r.data_no, r.group) for r in test}
    assert {r.data_no for r in test} == {"5", "6"}
    # Patients of the two datasets with one number are two patients: some are on different sides.
    assert {r.group for r in train} & {r.group for r in test}
    write_subset(tmp_path, "Subset-04-train", [raw | {"group": 3} for raw in raws], folder=".", images=False)
    with pytest.raises(ReleaseError, match="record 0: group is 3, a int; expected str"):
        release(tmp_path)


def test_fingerprint_follows_records_images_and_caps(tmp_path):
    write_tree(tmp_path)
    prints = [release(tmp_path).fingerprint(), release(tmp_path).fingerprint(), release(tmp_path, seed=1).fingerprint()]
    prints.append(release(tmp_path, train_records_per_subset=4).fingerprint())
    write_image(tmp_path, raw_record(1)["image"], seed=99)
    (tmp_path / raw_record(1)["image"]).open("ab").write(b"0")
    prints.append(release(tmp_path).fingerprint())
    write_subset(tmp_path, "Subset--04-train", [raw_record(1, caption="other")])
    prints.append(release(tmp_path).fingerprint())
    prints.append(release(tmp_path, window="lung").fingerprint())
    assert prints[0] == prints[1] and len(set(prints)) == 6


def test_a_file_is_read_once_whoever_asks(tmp_path, monkeypatch):
    root, read = write_tree_with_boxes(tmp_path, train=12, test=4, boxes=12), []
    parsed = tree._parsed_list
    monkeypatch.setattr(tree, "_parsed_list", lambda content, path: read.append(path.name) or parsed(content, path))
    found = inspect(root, workers=1)
    source = ReleaseSource(found.tree, DataConfig(source="release"), skip=found.report.bad_records)
    source.fingerprint(), source.detection_fingerprint()
    sizes = [len(source.records(number, split)) for number in ("04", "47") for split in ("train", "test")]
    assert sizes == [12, 4, 11, 1] and sorted(read) == sorted(file.path.name for file in found.tree.files)


def test_what_is_no_tree_is_one_line(tmp_path):
    for root in ("", tmp_path / "none"):
        with pytest.raises(DataError, match="no such folder"):
            release(root)
    with pytest.raises(DataError, match="no Med-MAT tree: no Subset--NN-train.json"):
        release(tmp_path)
    write_tree(tmp_path)
    write_subset(tmp_path, "Subset-04-train", [], folder=".")
    with pytest.raises(ReleaseError, match="the same subset and split as Aggregated_Subsets/Subset--04-train.json"):
        release(tmp_path)


def test_unknown_subset(tmp_path):
    with pytest.raises(DataError, match="subset '05' is no subset of"):
        release(write_tree(tmp_path)).records("05", "train")


def test_a_broken_record_stops_its_own_subset_only(tmp_path):
    write_tree(tmp_path)
    write_subset(tmp_path, "Subset--05-train", [raw_record(1), raw_record(2, **{"Answer-choice": "E"})])
    write_subset(tmp_path, "Subset--05-test", [])
    source = release(tmp_path)
    assert len(source.records("04", "train")) == 12
    with pytest.raises(ReleaseError, match=r"^Subset--05-train.json: record 2: Answer-choice is 'E'"):
        source.records("05", "train")


def test_a_broken_image_is_named_when_it_is_decoded(tmp_path):
    write_tree(tmp_path)
    image = raw_record(1)["image"]
    (tmp_path / image).write_bytes(b"not one")
    records = release(tmp_path).records("04", "train")
    with pytest.raises(ImageError, match=r"image 'med-mat/a b/1 \[1\]%.png': not an image"):
        records.image(0)
    assert records.image(1).shape == (8, 12, 3)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_links_that_lead_out_are_refused(tmp_path, kind):
    root, outside = tmp_path / "tree", tmp_path / "outside"
    write_image(outside, "secret.png")
    (root / "med-mat").mkdir(parents=True)
    if kind == "file":
        (root / "med-mat" / "secret.png").symlink_to(outside / "secret.png")
    else:
        (root / "med-mat" / "sub").symlink_to(outside)
    image = "med-mat/secret.png" if kind == "file" else "med-mat/sub/secret.png"
    write_subset(root, "Subset--04-train", [raw_record(1, image=image)], images=False)
    path = root / "Aggregated_Subsets" / "Subset--04-train.json"
    with pytest.raises(ReleaseError, match="leads out of the tree by a link"):
        read_file(path, root)
    (root / "inside.png").write_bytes((outside / "secret.png").read_bytes())
    (root / "med-mat" / "kept.png").symlink_to(root / "inside.png")
    write_subset(root, "Subset--04-train", [raw_record(1, image="med-mat/kept.png")], images=False)
    (tmp_path / "alias").symlink_to(root)
    assert len(read_file(path, tmp_path / "alias")) == 1


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ("", "is no path"),
        (" ", "is no path"),
        ("a\0b.png", "is no path"),
        ("C:\\x.png", "is absolute"),
        ("\\\\host\\x.png", "is absolute"),
        ("..\\x.png", "climbs out"),
        ("med-mat/..", "climbs out"),
        ("med-mat", "is no file"),
        ("x" * 5000, "cannot be opened"),
    ],
)
def test_odd_paths_are_refused(tmp_path, image, reason):
    (tmp_path / "med-mat").mkdir()
    write_subset(tmp_path, "Subset--04-train", [raw_record(1) | {"image": image}], images=False)
    with pytest.raises(ReleaseError, match=f"^Subset--04-train.json: record 1: .*{reason}"):
        read_file(tmp_path / "Aggregated_Subsets" / "Subset--04-train.json", tmp_path)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ("text", "a str; expected an object"),
        (raw_record(1) | {"id": True}, "id is true, a bool; expected int"),
        (raw_record(1) | {"Answer": None}, "Answer is null, a NoneType; expected str"),
        (raw_record(1) | {"Question-choice": "Which?\nA: Benign"}, r"options \['Benign'\]; expected two or more"),
        (raw_record(1) | {"Question-choice": "Which?\nA: Benign\nB: Benign"}, "two or more different"),
        (raw_record(1) | {"Question-choice": "Which?"}, r"has the options \[\]"),
        (raw_record(1) | {"Answer-choice": "AB"}, "Answer-choice is 'AB'"),
        (raw_record(1) | {"Answer-choice": ""}, "Answer-choice is ''"),
        (raw_record(1) | {"Answer-choice": "a"}, "Answer-choice is 'a'"),
    ],
)
def test_broken_choice_records_are_refused(raw, reason):
    with pytest.raises(RecordError, match=reason):
        parse_choice(raw, "04", "train")


@pytest.mark.parametrize(
    ("question", "options"),
    [
        ("Which?\nA: Benign\nB: Normal\nAnswer with ...", ("Benign", "Normal")),
        ("A: is it A: or B: ?\nA: x: y\nB: B: z", ("x: y", "B: z")),
        ("Which?\nA: a\nC: c\nB: b", ("a",)),
        ("Which?\r\nA: a\r\nB: b\r\n", ("a", "b")),
        ("Which? A: a B: b", ()),
    ],
)
def test_options_are_the_lines_in_letter_order(question, options):
    assert parse_options(question) == options


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
        (raw_box_record(1, width="12"), "type", 'width is "12", a str; expected int'),
        (raw_box_record(1, boxes={"label": "x"}), "type", "boxes is .* a dict; expected list"),
        ({k: v for k, v in raw_box_record(1).items() if k != "boxes"}, "key", "the key boxes is missing"),
        ([], "type", "a list; expected an object"),
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


BOXES_OF_THE_PACK = {
    "38": ({"Skin lesion": 476}, 350, 126),
    "43": ({"Benign lesion": 126, "Malignant lesion": 122}, 180, 64),
    "47": ({"Left lung": 43, "Right lung": 43}, 26, 18),
    "63": ({"Platelet": 222, "Red blood cell": 2509, "White blood cell": 224}, 160, 60),
}


def test_the_packs_detection_subsets_are_read_whole(shared_dir):
    source = release(shared_dir / "data" / "medmat-mini")
    sizes = {s.name: (s.num_train, s.num_test) for s in source.detection_subsets}
    assert sizes == {name: wanted[1:] for name, wanted in BOXES_OF_THE_PACK.items()}
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
        assert found == BOXES_OF_THE_PACK[subset.name][0] and subset.labels == tuple(sorted(found))


def test_unknown_names_get_one_line_with_what_is_close(tmp_path):
    source = open_source(DataConfig(source="release", root=str(write_tree(tmp_path))))
    with pytest.raises(DataError, match=r"^subset '4' does not exist; did you mean 04\? there are 04$"):
        require_subsets(source, ["04", "4"])
    with pytest.raises(DataError, match=r"^subset 'lung' does not exist; there are 04$"):
        require_subsets(source, ["lung"])


def test_unknown_source_and_missing_root():
    with pytest.raises(DataError, match="data.source='tree'; expected phantom or release or prepared"):
        open_source(DataConfig(source="tree"))
    with pytest.raises(DataError, match="data.root=''"):
        open_source(DataConfig(source="release"))
