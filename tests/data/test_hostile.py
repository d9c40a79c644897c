"""Every case of medmat-mini/hostile/expected.json is judged as it says."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medcg_jax.data.check import detection_problems
from medcg_jax.data.images import ImageError, load_image
from medcg_jax.data.schema import DETECTION_KEYS, ReleaseError, check_keys, read_choice_file, read_list
from medcg_jax.run_config import DataConfig

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
    "record_wrong_types.json": "id is \"one\", a str; int is accepted",
    "duplicate_ids.json": "the id 1 occurs twice",
    "not_a_list.json": "a dict; a list",
    "cut_in_half.json": "not JSON",
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
    records = read_choice_file(PACK / "hostile" / case["file"], PACK, subset="64", split="train")
    assert len(records) == case["as"]["records"]
    assert all(len(record.options) == 2 and record.id.startswith("64/train/") for record in records)


@pytest.mark.parametrize("case", cases("json", False))
def test_file_is_refused(case):
    with pytest.raises(ReleaseError) as error:
        read_choice_file(PACK / "hostile" / case["file"], PACK)
    message = str(error.value)
    assert REASONS[case["file"]] in message and "\n" not in message
    assert message.startswith(case["file"] + ": ")
    if case["file"].startswith("record_"):
        assert message.split(": ")[1].startswith("record ")


@pytest.mark.parametrize("case", cases("json-detection", False))
def test_detection_records_are_refused(case):
    raws = read_list(PACK / "hostile" / case["file"])
    found = []
    for raw in raws:
        check_keys(raw, DETECTION_KEYS, case["file"], str(raw["id"]))
        height, width = load_image(PACK / raw["image"], MAX_PIXELS).shape[:2]
        found.append(detection_problems(raw, (height, width)))
    (swapped,), (outside,), (size,) = found
    assert swapped[0] == "box" and "x1 < x2" in swapped[1]
    assert outside[0] == "box" and "not inside the image of 160 x 160" in outside[1]
    assert size[0] == "size" and "999 x 160" in size[1]
