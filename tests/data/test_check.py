"""What people and accidents leave in a tree is found by the check, and refused by every reader in one line."""

import json
import os
import unicodedata

import pytest
from trees import raw_box_record, raw_record, read_file, write_image, write_subset, write_tree, write_tree_with_boxes

from medcg_jax.cli import main
from medcg_jax.config import DataConfig
from medcg_jax.data import tree
from medcg_jax.data.check import check_tree, print_report
from medcg_jax.data.prepare import TooManyBad, prepare
from medcg_jax.data.records import DataError
from medcg_jax.data.release import ReleaseSource
from medcg_jax.data.schema import RecordError, ReleaseError, parse_choice
from medcg_jax.data.sources import subset_names
from medcg_jax.data.stats import write_stats
from medcg_jax.data.tree import Tree, near_misses, read_manifest
from medcg_jax.study.design.ledger import read_ledger


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
    assert "12 x 8 pixels pad to 12 x 12; expected at most 100" in report.problems[0].reason


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


CONFIG = DataConfig(source="release")
ENTRY = {"subset": "04", "modality": "CT", "area": "Lung", "task": "State"}


def kinds(root) -> list[tuple[str, str]]:
    return [(problem.file, problem.kind) for problem in check_tree(root, workers=1).problems]


def parsed(**changes):
    return parse_choice(raw_record(1, **changes), "04", "train")


@pytest.mark.parametrize("kind", ["a FIFO", "a device", "a folder"])
def test_a_subset_file_that_is_no_regular_one_is_not_waited_for(tmp_path, kind, capsys):
    root = write_tree(tmp_path / "tree", train=2, test=1)
    path = root / "Aggregated_Subsets" / "Subset--05-train.json"
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    assert kinds(root) == [(path.name, "unreadable")]
    message = f"Subset--05-train.json: no regular file ({kind})"
    assert message in read_ledger(root).faults
    for verb in (["check", str(root)], ["prepare", str(root), str(tmp_path / "out")]):
        assert main(["data", *verb]) == 2
        assert message in capsys.readouterr().out
    with pytest.raises(ReleaseError, match="no regular file"):
        ReleaseSource(root, CONFIG)


def test_a_file_beyond_its_limits_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("[" + "1," * 40 + "1]")
    monkeypatch.setattr(tree, "MAX_VALUES", 40)
    with pytest.raises(ReleaseError, match="a.json: 41 values; at most 40 are read"):
        read_file(path, tmp_path)
    monkeypatch.setattr(tree, "MAX_FILE_BYTES", 10)
    with pytest.raises(ReleaseError, match="a.json: 83 bytes; at most 10 are read"):
        read_file(path, tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (json.dumps({"subsets": [ENTRY]}).encode("utf-16"), "not UTF-8 (byte 0)"),
        (b'{"subsets": [], "subsets": []}', 'the key "subsets" stands twice'),
        (b'{"subsets": {"04": 1}}', "expected a list of objects"),
        (b'{"subsets": [3]}', "expected a list of objects"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"subsets": [{"subset": "\\ud800"}]}', "half a surrogate pair"),
        (json.dumps({"subsets": [ENTRY, ENTRY]}).encode(), "subset 04: stands twice"),
        (
            json.dumps({"subsets": [ENTRY | {"area": "Lung\0"}]}).encode(),
            r"subset 04: area 'Lung\x00'; expected one line",
        ),
        (json.dumps({"subsets": [ENTRY | {"task": "x" * 201}]}).encode(), "at most 200 signs"),
        (json.dumps({"subsets": [ENTRY | {"modality": " CT"}]}).encode(), "modality ' CT'; expected one line"),
        (json.dumps({"subsets": [{**ENTRY, "subset": 4}]}).encode(), "subset in place 1: subset must be text"),
        (
            json.dumps({"subsets": [ENTRY, ENTRY | {"subset": "05", "modality": "ct"}]}).encode(),
            "subset 05: modality 'ct' looks like 'CT' elsewhere",
        ),
    ],
)
def test_a_manifest_is_read_strictly(tmp_path, content, reason):
    root = write_tree(tmp_path, train=2, test=1)
    (root / "manifest.json").write_bytes(content)
    (problem,) = check_tree(root, workers=1).problems
    assert (problem.file, problem.kind) == ("manifest.json", "manifest")
    assert reason in str(problem) and len(str(problem)) < 300 and "\n" not in str(problem)
    with pytest.raises(ReleaseError):
        ReleaseSource(root, CONFIG)
    assert any(reason in fault for fault in read_ledger(root).faults)


@pytest.mark.parametrize(
    "name",
    [
        "Subset--04-Test.json", "Subset--04-test.jsonl", "Subset--04-test (1).json", "Subset--04-test.json.txt",
        "Subset--04_test.json", "Subset--04-val.json", "subset--04-test.json", "SUBSET-04-TEST.JSON",
        "../subset_04_test.json", "../aggregated_subsets/Subset--04-test.json", "../Manifest.json",
    ],
)  # fmt: skip
def test_a_test_file_of_nearly_the_right_name_is_not_passed_over(tmp_path, name):
    root = write_tree(tmp_path / "tree", train=20, test=2)
    if "anifest" in name:
        (root / "Manifest.json").write_text(json.dumps({"subsets": [ENTRY]}))
    else:
        (root / "aggregated_subsets").mkdir()
        (root / "Aggregated_Subsets" / "Subset--04-test.json").rename(root / "Aggregated_Subsets" / name)
    (found,) = check_tree(root, workers=1).problems
    assert found.kind == "file_name" and found.file.endswith(name.removeprefix("../"))
    assert ("manifest.json" if "anifest" in name else "Aggregated_Subsets/Subset--04-test.json") in found.reason
    with pytest.raises(ReleaseError, match="is not read under this name"):
        ReleaseSource(root, CONFIG)
    with pytest.raises(TooManyBad, match="file_name 1"):
        prepare(root, tmp_path / "out", CONFIG, max_bad_frac=1.0)
    assert any("not read under this name" in fault for fault in read_ledger(root).faults)


def test_a_copy_beside_a_whole_subset_is_named_and_refuses_nothing(tmp_path, capsys):
    root = write_tree(tmp_path / "tree", train=4, test=2)
    (root / "manifest.json").write_text(json.dumps({"subsets": [ENTRY]}))
    for name in ("Subset--04-test (1).json", "Subset--04-train.json.bak", "subsets.md", "manifest.json.old"):
        (root / "Aggregated_Subsets" / name).write_text("[]")
    (root / "Aggregated_Subsets" / "._Subset--04-test.json").write_text("of macOS")
    report = check_tree(root, workers=1)
    assert report.ok and {notice.kind for notice in report.notices} == {"file_name"} and len(report.notices) == 4
    assert len(ReleaseSource(root, CONFIG).records("04", "test")) == 2
    assert main(["data", "check", str(root), f"--json={tmp_path / 'r.json'}"]) == 0
    assert "warning: Aggregated_Subsets/Subset--04-test (1).json: is not read" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "r.json").read_text())["notices"]) == 4
    # A train file's backup stands in for no test file.
    (root / "Aggregated_Subsets" / "Subset--04-test.json").unlink()
    (root / "Aggregated_Subsets" / "Subset--04-test (1).json").unlink()
    files = Tree(root).files
    assert len(files) == 1 and not any(near.is_wanted for near in near_misses(root, files))


def test_one_duplicate_file_hides_nothing_else(tmp_path):
    root = write_tree(tmp_path, train=4, test=2)
    write_subset(root, "Subset-04-train", [raw_record(9)], folder=".")
    write_subset(root, "Subset--05-train", [raw_record(1, image="../x.png")], images=False)
    report = check_tree(root, workers=1)
    assert [problem.kind for problem in report.problems] == ["duplicate_file", "path"]
    assert (report.num_files, report.num_records) == (3, 7)


@pytest.mark.parametrize(
    ("options", "label"),
    [
        (("Naevus", "naevus"), "Naevus"),
        (("N\u00e4vus", unicodedata.normalize("NFD", "N\u00e4vus")), "N\u00e4vus"),
        (("torn lateral", "torn  lateral"), "torn lateral"),
        (("1", "1.0"), "1"),
        (("grade 2", "Grade 02"), "grade 2"),
        (("stage II", "stage \u2161"), "stage II"),
        (("benign", "be\u200bnign"), "benign"),
        (("T-1", "T\u20131"), "T-1"),
    ],
)
def test_options_that_look_alike_are_refused_so_that_they_can_be_told_apart(options, label):
    with pytest.raises(RecordError, match="the options .* look alike; expected one") as error:
        parsed(options=options, label=label)
    first, second = str(error.value).partition("the options ")[2].partition(" look")[0].split(" and ")
    assert error.value.kind == "options" and first != second and str(error.value).isascii()


def test_labels_that_differ_are_taken():
    for options in (("1", "10"), ("0.5", "5"), ("1.0", "1.1"), ("grade 1", "grade 11"), ("<5 mm", ">5 mm")):
        assert parsed(options=options, label=options[0]).options == options


def test_an_answer_of_another_form_is_shown_so_that_it_can_be_told_apart():
    with pytest.raises(RecordError) as error:
        parsed(options=("N\u00e4vus", "x"), label="N\u00e4vus", Answer=unicodedata.normalize("NFD", "N\u00e4vus"))
    assert r"names 'N\xe4vus', but Answer is 'Na\u0308vus'" in str(error.value)


@pytest.mark.parametrize(
    "mark", ["<image>", "<|image_pad|>", "<|image|>", "<Img>", "<ImageHere>", "<|im_end|>", "</s>", "<IMAGE>", "[INST]"]
)
def test_marks_of_prompts_in_a_question_are_named(tmp_path, mark):
    question = f"{mark}\nWhich one is it?\nA: Benign\nB: Normal"
    with pytest.raises(RecordError) as error:
        parsed(**{"Question-choice": question})
    assert error.value.kind == "text" and f"spells '{mark}'" in str(error.value) and "take it out" in str(error.value)
    root = write_tree(tmp_path, train=2, test=1)
    write_subset(root, "Subset--04-train", [raw_record(1, **{"Question-choice": question})])
    assert kinds(root) == [("Subset--04-train.json", "text")]
    with pytest.raises(ReleaseError, match="spells"):
        ReleaseSource(root, CONFIG).records("04", "train")


@pytest.mark.parametrize("question", ["Is it < 5 mm or > 7 mm?", "Is <lesion> seen?", "a < b|c|> d"])
def test_signs_that_are_no_marks_are_taken(question):
    assert parsed(**{"Question-choice": f"{question}\nA: Benign\nB: Normal"}).label == "Benign"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"Question-choice": "Is it?\x1b[2J\nA: Benign\nB: Normal"}, r"has the control character '\x1b'"),
        ({"data-no": "5\x07"}, "cannot be printed"),
        ({"group": "1" * 5000}, "5,000 signs"),
    ],
)
def test_control_characters_are_refused(changes, reason):
    with pytest.raises(RecordError) as error:
        parsed(**changes)
    assert error.value.kind == "text" and reason in str(error.value) and len(str(error.value)) < 300


def test_ten_options_are_taken_and_eleven_named(tmp_path):
    assert len(parsed(options=tuple(f"option {n}" for n in "abcdefgh"), label="option a").options) == 8
    lines = "\n".join(f"{letter}: {letter}x" for letter in "ABCDEFGHIJK")
    with pytest.raises(RecordError, match="has 11 options; at most 10 can be scored"):
        parsed(**{"Question-choice": lines, "Answer": "Ax"})
    root = write_tree(tmp_path, train=2, test=1)
    write_subset(root, "Subset--04-test", [raw_record(9, **{"Question-choice": lines, "Answer": "Ax"})])
    assert kinds(root) == [("Subset--04-test.json", "options")]


def test_boxes_that_are_shares_of_the_image_are_refused(tmp_path):
    root = write_tree_with_boxes(tmp_path, boxes=3, train=2, test=1)
    shares = [{"label": "x", "bbox": [0.1, 0.2, 0.5, 1]}]
    write_subset(root, "Subset--47-det-train", [raw_box_record(n, boxes=shares) for n in (1, 2)], images=False)
    assert kinds(root) == [("Subset--47-det-train.json", "box_units")]
    with pytest.raises(ReleaseError, match="all corners of 2 boxes are 0 to 1, so they are shares of the image"):
        ReleaseSource(root, CONFIG).records("47", "train")
    assert any("shares of the image" in fault for fault in read_ledger(root).box_faults)
    # One larger box, and small ones may be meant.
    raws = [raw_box_record(1, boxes=shares), raw_box_record(2)]
    write_subset(root, "Subset--47-det-train", raws, images=False)
    assert check_tree(root, workers=1).ok


@pytest.fixture
def boxes_alone(tmp_path):
    """A tree of which every subset has boxes: 60 images of one patient or label each, without a test file."""
    root = tmp_path / "boxes"
    raws = [raw_box_record(n, label="rare" if n % 3 == 0 else "frequent") for n in range(1, 61)]
    write_subset(root, "Subset--47-det-train", raws, images=False)
    for raw in raws:
        write_image(root, raw["image"])
    return root


def test_a_tree_of_boxes_alone_is_one(boxes_alone, tmp_path):
    assert check_tree(boxes_alone, workers=1).ok
    source = ReleaseSource(boxes_alone, CONFIG)
    assert source.subsets == () and [subset.name for subset in source.detection_subsets] == ["47"]
    with pytest.raises(DataError, match="no subset of choice questions, of boxes 47; name these in data.subsets"):
        subset_names(source, CONFIG)
    ledger = read_ledger(boxes_alone)
    state = next(state for state in ledger.subsets if state.number == "47")
    assert not ledger.faults and (state.train, state.test) == (54, 6)
    done = prepare(boxes_alone, tmp_path / "out", CONFIG, workers=1)
    assert [(own["kind"], own["train"], own["test"]) for own in done.manifest["subsets"]] == [("detection", 54, 6)]
    assert "47" in write_stats(boxes_alone, tmp_path / "page", workers=1).read_text("utf-8")


def test_splits_and_caps_of_boxes_are_balanced_by_their_labels(boxes_alone):
    def labels(**config):
        records = ReleaseSource(boxes_alone, DataConfig(source="release", **config)).records("47", "train").records
        return [record.boxes[0].label for record in records]

    test = ReleaseSource(boxes_alone, CONFIG).records("47", "test").records
    assert sorted(record.boxes[0].label for record in test) == ["frequent"] * 4 + ["rare"] * 2
    assert (labels().count("frequent"), labels().count("rare")) == (36, 18)
    capped = labels(train_records_per_subset=20)
    assert (capped.count("frequent"), capped.count("rare")) == (10, 10)


def test_an_older_page_with_other_files_and_links_are_left_alone(tmp_path):
    root = write_tree(tmp_path / "tree", train=2, test=1)
    (tmp_path / "out").mkdir()
    for name in ("stats.json", "thesis.tex"):
        (tmp_path / "out" / name).write_text("mine")
    (tmp_path / ".new.partial").mkdir()
    (tmp_path / ".new.partial" / "mine").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "tree")
    for name in ("out", "link"):
        with pytest.raises(DataError, match="holds something else"):
            write_stats(root, tmp_path / name, workers=1)
    write_stats(root, tmp_path / "new", workers=1)
    assert (tmp_path / "out" / "thesis.tex").exists() and (tmp_path / ".new.partial" / "mine").exists()
    assert not list(tmp_path.glob(".new.?*[!l]")) and read_manifest(root) == {}
