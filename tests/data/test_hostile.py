"""Every case of medmat-mini/hostile/expected.json is judged as it says, by itself and in a tree of all of them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from trees import raw_record, read_file

from medcg_jax.cli import main
from medcg_jax.config import DataConfig
from medcg_jax.data.images import ImageError, image_size, load_image
from medcg_jax.data.layouts import Layout
from medcg_jax.data.prepare import TooManyBad, prepare
from medcg_jax.data.prepared import PreparedSource
from medcg_jax.data.schema import RecordError, ReleaseError, parse_detection
from medcg_jax.data.tree import Contents, SubsetFile

PACK = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "medmat-mini"
EXPECTED = PACK / "hostile" / "expected.json"
CASES = json.loads(EXPECTED.read_text())["cases"] if EXPECTED.is_file() else []
MAX_PIXELS = DataConfig().max_pixels

# What the message must say, so that a refusal for another reason does not pass.
REASONS = {
    "images/truncated.jpg": "truncated",
    "images/zero_bytes.png": "not an image",
    "images/text_named.jpg": "not an image",
    "images/bomb_20000x20000.png": "pixels",
    "images/bomb_header_only.png": "pixels",
    "record_parent_path.json": "climbs out",
    "record_parent_path_hidden.json": "climbs out",
    "record_absolute_path.json": "is absolute",
    "record_missing_key.json": "the key Question-choice is missing",
    "record_bad_letter.json": "Answer-choice is 'D'; the options are A, B",
    "record_letter_disagrees.json": "Answer-choice A names 'Abnormal', but Answer is 'Normal'",
    "record_missing_file.json": "cannot be opened",
    "record_empty_image.json": "is no path",
    "record_wrong_types.json": 'id is "one", a str; expected int',
    "duplicate_ids.json": "the id 1 occurs twice",
    "not_a_list.json": "a dict; expected a list",
    "cut_in_half.json": "no JSON",
    "not_utf8.json": "not UTF-8",
}


def cases(kind: str, accept: bool):
    found = [case for case in CASES if case["kind"] == kind and case["accept"] is accept]
    empty = pytest.param(None, marks=pytest.mark.skip(reason="../shared is not on this machine"))
    return [pytest.param(case, id=case["file"]) for case in found] or [empty]


def test_every_case_is_tried():
    if not CASES:
        pytest.skip("../shared is not on this machine")
    kinds = {(case["kind"], case["accept"]) for case in CASES}
    assert kinds == {("image", True), ("image", False), ("json", True), ("json", False), ("json-detection", False)}
    refused = {case["file"] for case in CASES if not case["accept"] and case["kind"] != "json-detection"}
    assert refused == set(REASONS)


@pytest.mark.parametrize("case", cases("image", False))
def test_image_is_refused(case):
    with pytest.raises(ImageError, match=REASONS[case["file"]]) as error:
        load_image(PACK / "hostile" / case["file"], MAX_PIXELS)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("case", cases("image", True))
def test_image_is_taken(case):
    path = PACK / "hostile" / case["file"]
    found, wanted = load_image(path, MAX_PIXELS), case["as"]
    width, height = wanted.get("size") or wanted["size_after_exif"]
    assert found.shape == (height, width, 3) and found.dtype == np.uint8
    assert image_size(path, MAX_PIXELS) == (height, width)
    assert found.std() > 0 or found.size == 3
    if wanted.get("mode_in_file") == "I;16":
        assert (found.min(), found.max()) == (wanted["min16"] // 257, wanted["max16"] // 257)
        # Clipping saturates: it would leave next to nothing between black and white.
        assert ((found > 0) & (found < 255)).mean() > 0.3
    if "frames" in wanted:
        with Image.open(path) as first:
            np.testing.assert_array_equal(found, np.asarray(first.convert("RGB")))


@pytest.mark.parametrize("case", cases("json", True))
def test_file_is_taken(case):
    records = read_file(PACK / "hostile" / case["file"], PACK)
    assert len(records) == case["as"]["records"]
    assert all(len(record.options) == 2 and record.id.startswith("64/train/") for record in records)


@pytest.mark.parametrize("case", cases("json", False))
def test_file_is_refused(case):
    with pytest.raises(ReleaseError) as error:
        read_file(PACK / "hostile" / case["file"], PACK)
    message = str(error.value)
    assert REASONS[case["file"]] in message and "\n" not in message
    assert message.startswith(case["file"] + ": ")
    if case["file"].startswith("record_"):
        assert message.split(": ")[1].startswith("record ")


def read_list(path: Path) -> list:
    return Contents(SubsetFile(path, "1", "train"), Path).raws


@pytest.mark.parametrize("case", cases("json-detection", False))
def test_detection_records_are_refused(case):
    path, found = PACK / "hostile" / case["file"], []
    for raw in read_list(path):
        size = image_size(PACK / raw["image"], MAX_PIXELS)
        with pytest.raises(RecordError) as error:
            parse_detection(raw, "47", "train", size)
        found.append(error.value)
    assert [error.kind for error in found] == ["box", "box", "size"]
    swapped, outside, wrong_size = (e.reason for e in found)
    assert "x1 < x2" in swapped and "not inside the image of 160 x 160" in outside and "999 x 160" in wrong_size
    with pytest.raises(ReleaseError, match="^det_bad_boxes.json: record 1: bbox .*x1 < x2"):
        read_file(path, PACK, detection=True)


@pytest.mark.parametrize(
    "text, kind, said",
    [
        ("[" * 100_000, "json", "nested too deep"),
        ("[" + "1" * 5000 + "]", "json", "no JSON: Exceeds the limit"),
        ("[NaN]", "json", "NaN is no JSON number"),
        ("[-Infinity]", "json", "-Infinity is no JSON number"),
        ('[{"id": 1, "a": 2, "id": 1}]', "json", 'the key "id" stands twice'),
        ('["\\ud800"]', "json", "half a surrogate pair"),
        ('[{"\\uDFFF": 1}]', "json", "half a surrogate pair"),
    ],
)
def test_json_that_no_record_comes_of(tmp_path, text, kind, said):
    path = tmp_path / "Subset--04-train.json"
    path.write_text(text)
    with pytest.raises(ReleaseError) as error:
        read_list(path)
    assert error.value.kind == kind and said in str(error.value) and "\n" not in str(error.value)


def test_json_that_is_right_stays(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('["\\ud83d\\ude00", "\\\\ud800", 1e5, {"a": 1, "b": {"a": 1}}]')
    assert read_list(path) == ["\U0001f600", "\\ud800", 1e5, {"a": 1, "b": {"a": 1}}]


def test_values_nested_too_deep_to_write_are_shown_short(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"id": ' + "[" * 900 + "]" * 900 + ', "image": "a", "boxes": []}]')
    with pytest.raises(RecordError) as error:
        parse_detection(read_list(path)[0], "1", "train", (1, 1))
    assert len(str(error.value)) < 200


@pytest.fixture
def hostile(shared_dir, tmp_path):
    """(root, subset file -> its case, case file -> record name) of a tree of all cases."""
    pack = shared_dir / "data" / "medmat-mini" / "hostile"
    cases = json.loads((pack / "expected.json").read_text("utf-8"))["cases"]
    root = tmp_path / "tree"
    shutil.copytree(pack, root / "hostile")
    (root / "Aggregated_Subsets").mkdir()
    files, images = {}, []
    for number, case in enumerate(cases, start=1):
        detection = "-det" if case["kind"] == "json-detection" else ""
        if case["kind"] == "image":
            images.append((number, case))
        else:
            name = f"Subset--{number:02d}{detection}-train.json"
            shutil.copy(pack / case["file"], root / "Aggregated_Subsets" / name)
            files[name] = case
    raws = [raw_record(number, image=f"hostile/{case['file']}") for number, case in images]
    (root / "Aggregated_Subsets" / "Subset--53-train.json").write_text(json.dumps(raws), "utf-8")
    return root, files, {f"record {number}": case for number, case in images}


def test_each_is_judged_as_expected(hostile, tmp_path, capsys):
    root, files, images = hostile
    assert main(["data", "check", str(root), f"--json={tmp_path / 'report.json'}"]) == 2
    problems = json.loads((tmp_path / "report.json").read_text("utf-8"))["problems"]
    for name, case in files.items():
        own = [p for p in problems if p["file"] == name]
        if case["accept"]:
            # An empty list is valid, and said.
            assert [p["kind"] for p in own] == (["no_records"] if case["as"]["records"] == 0 else []), (case, own)
        else:
            assert own, case
    assert len([p for p in problems if files.get(p["file"], {}).get("kind") == "json-detection"]) == 3
    refused = {p["record"] for p in problems if p["file"] == "Subset--53-train.json"}
    assert refused == {record for record, case in images.items() if not case["accept"]}
    assert "bad records: " in capsys.readouterr().out


def test_what_is_good_of_it_can_be_prepared(hostile, tmp_path):
    root, files, images = hostile
    with pytest.raises(TooManyBad, match="files of the tree cannot be used .*json 1"):
        prepare(root, tmp_path / "out", DataConfig(), Layout("keep", 0), max_bad_frac=1.0)
    for name, case in files.items():
        if case["file"] in ("not_a_list.json", "cut_in_half.json", "not_utf8.json"):
            (root / "Aggregated_Subsets" / name).unlink()
    done = prepare(root, tmp_path / "out", DataConfig(), Layout("keep", 0), max_bad_frac=1.0)
    assert done.manifest["set_aside"]["records"] > 10
    source = PreparedSource(tmp_path / "out", DataConfig())
    kept = [records.image(place).shape for split in ("train", "test")
            for records in [source.records("53", split)] for place in range(len(records))]  # fmt: skip
    assert len(kept) == sum(case["accept"] for case in images.values()) and (1, 1, 3) in kept and (160, 100, 3) in kept
