"""QA formatting: six instructions a subset, letters and wrong options drawn uniformly, trees that the reader takes."""

import csv
import json
import re
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from trees import raw_record, write_image, write_subset

from medcg_jax import files as files_module
from medcg_jax.cli import main
from medcg_jax.config import DataConfig
from medcg_jax.data.check import check_tree
from medcg_jax.data.labels import read_labels
from medcg_jax.data.questions import CLOSING, choice_record, format_labels, instructions
from medcg_jax.data.records import SPLITS, DataError
from medcg_jax.data.release import ReleaseSource
from medcg_jax.data.schema import CHOICE_KEYS, parse_choice, parse_options
from medcg_jax.data.tree import subset_table

LABELS = ("a", "b", "c", "d", "e", "f")
ASKED = tuple(f"Which {number}?" for number in range(6))


def test_every_subset_has_six_instructions_of_its_own(shared_dir):
    seen: dict[str, str] = {}
    for number, (modality, area, task) in subset_table().items():
        own = instructions(modality, area, task)
        assert len(set(own)) == len(own) == 6
        # What the six have in common beyond small words: the modality's name, the area's and the task's.
        words = [set(re.findall(r"[\w-]+", sentence.lower())) - {"this", "the", "of"} for sentence in own]
        assert len(set.intersection(*words)) >= 3, (number, own)
        assert all(area.lower() in sentence.lower() for sentence in own)
        for sentence in own:
            assert seen.setdefault(sentence, number) == number
            assert sentence == sentence.strip() and sentence.isprintable() and sentence[-1] in ".?"
            assert not parse_options(sentence) and "{" not in sentence
    assert len(seen) == 6 * 53
    # They are not those of the pack, which are its own.
    pack = json.loads((shared_dir / "data" / "medmat-mini" / "manifest.json").read_text())["subsets"]
    assert not set(seen) & {sentence for entry in pack for sentence in entry.get("instructions", ())}


def test_names_of_ones_own_stand_as_they_are():
    own = instructions("PET", "Whole Body", "Tumor Burden Classification")
    assert len(set(own)) == 6
    assert all(name in sentence for sentence in own for name in ("PET image", "whole body", "tumor burden"))


def many(count: int, labels=LABELS, seed: int = 0) -> list[dict]:
    return [
        choice_record(f"x/{i}.png", labels[i % len(labels)], [x for x in labels if x != labels[i % len(labels)]], ASKED,
                      f"{seed}/38")
        for i in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("num_labels", [2, 3, 4, 6])
def test_letters_instructions_and_wrong_options_are_uniform(num_labels):
    labels = LABELS[:num_labels]
    raws = many(6000, labels)
    letters, asked = Counter(raw["Answer-choice"] for raw in raws), Counter(raw["Question"] for raw in raws)
    assert len(letters) == min(4, num_labels) and len(asked) == 6
    for counts in (letters, asked):
        assert chisquare(list(counts.values())).pvalue > 1e-4
    # Where several wrong options stand for one answer: each of them, at each letter.
    places: dict[str, Counter] = defaultdict(Counter)
    for raw in raws:
        for place, option in enumerate(parse_options(raw["Question-choice"])):
            if option != raw["Answer"]:
                places[raw["Answer"]][option, place] += 1
    for answer, counts in places.items():
        assert len(counts) == (num_labels - 1) * min(4, num_labels), answer
        assert chisquare(list(counts.values())).pvalue > 1e-4
    # And the letter tells nothing of the label.
    for label in labels:
        own = Counter(raw["Answer-choice"] for raw in raws if raw["Answer"] == label)
        assert chisquare(list(own.values())).pvalue > 1e-4


texts = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=12)


@given(st.lists(texts, min_size=2, max_size=8, unique=True), texts, st.text(max_size=5))
def test_every_question_is_accepted_by_the_reader(labels, image, key):
    raw = choice_record(image, labels[0], labels[1:], ASKED, key, "12")
    assert {name: type(value) for name, value in raw.items()} == CHOICE_KEYS and list(raw) == list(CHOICE_KEYS)
    record = parse_choice(raw, "38", "train")
    assert record.label == labels[0] and set(record.options) <= set(labels)
    assert len(record.options) == min(4, len(labels)) == len(set(record.options))
    first, *options, last = raw["Question-choice"].split("\n")
    assert (first, last) == (raw["Question"], CLOSING) and len(options) == len(record.options)
    assert first in ASKED and CLOSING == "Answer with the option's letter from the given choices directly."
    assert raw == choice_record(image, labels[0], labels[1:], ASKED, key, "12")


def test_the_seed_changes_the_questions():
    assert many(200) == many(200) != many(200, seed=1)


def write_table(root: Path, header: str, rows: list) -> Path:
    path = root / "labels.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header.split(","), *rows])
    return path


@pytest.fixture
def classes(tmp_path):
    """60 images of three labels, 20 patients; one image has two labels."""
    rows = [(f"x/{i} é.png", ("Cyst", "Stone", "Tumour")[i % 3], f"p{i // 3}") for i in range(60)]
    for image, _, _ in rows:
        write_image(tmp_path, image)
    rows.append((rows[0][0], "Stone", "p0"))
    return tmp_path, rows


def written(root: Path, subset: str = "02", det: str = "") -> dict[str, list]:
    folder = root / "Aggregated_Subsets"
    return {split: json.loads((folder / f"Subset--{subset}{det}-{split}.json").read_text("utf-8")) for split in SPLITS}


def test_classes_become_a_tree_split_by_patient(classes):
    root, rows = classes
    done = format_labels(write_table(root, "image,label,group", rows), root, "02", data_no="7")
    assert (done["train"], done["test"], done["labels"]) == (55, 6, ["Cyst", "Stone", "Tumour"])
    assert check_tree(root).ok
    raws = written(root)
    patients = {split: {raw["group"] for raw in own} for split, own in raws.items()}
    assert not patients["train"] & patients["test"] and len(patients["train"] | patients["test"]) == 20
    for own in raws.values():
        assert [raw["id"] for raw in own] == list(range(1, len(own) + 1))
        assert {raw["data-no"] for raw in own} == {"7"} and all(raw["caption"] == raw["Answer"] for raw in own)
        assert [raw["image"] for raw in own] == sorted(raw["image"] for raw in own)
    # Of the image with two labels either is asked for, and the other is never a wrong answer.
    both = [raw for own in raws.values() for raw in own if raw["image"] == rows[0][0]]
    assert sorted(raw["Answer"] for raw in both) == ["Cyst", "Stone"]
    assert all(set(parse_options(raw["Question-choice"])) == {raw["Answer"], "Tumour"} for raw in both)
    assert {raw["Question"] for own in raws.values() for raw in own} == set(instructions(*subset_table()["02"]))
    (subset,) = ReleaseSource(root, DataConfig(source="release")).subsets
    assert (subset.area, subset.num_train, subset.num_test) == ("Kidney", 55, 6)


def test_bytes_depend_on_the_seed_not_on_the_order(classes):
    root, rows = classes
    found = {}
    for name, own, seed in (("first", rows, 0), ("turned", rows[::-1], 0), ("seeded", rows, 1)):
        format_labels(write_table(root, "image,label,group", own), root, "02", seed=seed, force=True)
        found[name] = {path.name: path.read_bytes() for path in (root / "Aggregated_Subsets").iterdir()}
    assert found["first"] == found["turned"] != found["seeded"]
    # A record stays what it is when others come or go, and the seed moves nothing between the splits.
    sides = written(root)["test"]
    format_labels(write_table(root, "image,label,group", rows), root, "02", force=True)
    assert [raw["image"] for raw in written(root)["test"]] == [raw["image"] for raw in sides]
    before = {(raw["image"], raw["Answer"]): raw["Question-choice"] for own in written(root).values() for raw in own}
    format_labels(write_table(root, "image,label,group", rows[6:]), root, "02", force=True)
    for raw in (raw for own in written(root).values() for raw in own):
        if raw["image"] != rows[0][0]:
            assert before[raw["image"], raw["Answer"]] == raw["Question-choice"]


def test_the_tables_own_split_is_kept(classes):
    root, rows = classes
    own = [(image, label, "test" if int(image[2:].split(" ")[0]) % 2 else "train") for image, label, _ in rows]
    format_labels(write_table(root, "image,label,split", own), root, "02")
    assert {raw["image"] for raw in written(root)["test"]} == {image for image, _, split in own if split == "test"}


@pytest.fixture
def box_table(tmp_path):
    """40 images: two labels, one image with both, and every fifth without a finding."""
    rows = []
    for i in range(40):
        write_image(tmp_path, f"y/{i}.png")
        rows.append((f"y/{i}.png", *(("Mass", 1, 2, 5.5, 6) if i % 5 else ("", "", "", "", ""))))
    rows += [("y/1.png", "Nodule", 0, 0, 2, 2)]
    for place in range(2, 40, 2):
        if rows[place][1]:
            rows[place] = (rows[place][0], "Nodule", *rows[place][2:])
    return write_table(tmp_path, "image,label,x1,y1,x2,y2", rows), tmp_path


def test_boxes_become_detection_records_or_questions(box_table):
    table, root = box_table
    done = format_labels(table, root, "43", data_no="97")
    assert (done["kind"], done["train"], done["test"], done["left_out"]) == ("detection", 35, 5, 0)
    assert check_tree(root, workers=1).ok
    raws = written(root, "43", "-det")
    one = next(raw for own in raws.values() for raw in own if raw["image"] == "y/1.png")
    boxes = [{"label": "Nodule", "bbox": [0, 0, 2, 2]}, {"label": "Mass", "bbox": [1, 2, 5.5, 6]}]
    assert one == {"id": one["id"], "image": "y/1.png", "width": 12, "height": 8, "boxes": boxes, "data-no": "97"}
    assert sum(not raw["boxes"] for own in raws.values() for raw in own) == 8
    # As questions: of images with one label, on the side that they have among the boxes.
    with pytest.raises(DataError, match="Subset--43-det-test.json: subset 43 has detection files; choose another"):
        format_labels(table, root, "43", as_choice=True, force=True)
    named = ("US", "Chest", "Cancer Classification")
    done = format_labels(table, root, "mine", as_choice=True, triplet=named)
    assert done["left_out"] == 9 and done["train"] + done["test"] == 31
    asked = written(root, "mine")
    for split in SPLITS:
        wanted = {raw["image"] for raw in raws[split] if len({box["label"] for box in raw["boxes"]}) == 1}
        assert {raw["image"] for raw in asked[split]} == wanted
    entry = json.loads((root / "manifest.json").read_text())["subsets"]
    assert entry == [{"subset": "mine", "kind": "choice"} | dict(zip(("modality", "area", "task"), named, strict=True))]
    source = ReleaseSource(root, DataConfig(source="release"))
    assert [s.name for s in source.subsets] == ["mine"] and source.subsets[0].task == named[2]
    assert [s.name for s in source.detection_subsets] == ["43"]


def test_a_manifest_keeps_what_else_it_holds(box_table):
    table, root = box_table
    other = {"subset": "77", "modality": "CT", "area": "Knee", "task": "State", "more": 1}
    (root / "manifest.json").write_text(json.dumps({"name": "mine", "subsets": [other]}))
    format_labels(table, root, "77", as_choice=True)
    format_labels(table, root, "78", as_choice=True, triplet=("MRI", "Knee", "State"))
    manifest = json.loads((root / "manifest.json").read_text())
    assert manifest["name"] == "mine" and manifest["subsets"][0] == other
    assert manifest["subsets"][1]["modality"] == "MRI"
    assert any("knee" in raw["Question"] for raw in written(root, "77")["train"])


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([("x/0 é.png", "Cyst")], {}, r"labels.csv: the labels \['Cyst'\]; expected two or more"),
        ([("x/0 é.png", "Cyst"), ("x/1 é.png", "Stone")], {}, "labels.csv: no test record of 2 images"),
        ([(f"x/{i} é.png", "ab"[i < 50]) for i in range(60)] + [("x/0 é.png", "a")], {}, "'x/0 é.png' has all labels"),
        (None, {"subset": "99"}, "subset '99' is neither in the tree's manifest.json nor"),
        (None, {"subset": "a/b"}, "subset 'a/b': expected letters, digits and hyphens"),
        (None, {"subset": "a-det"}, "subset 'a-det': expected letters"),
        (None, {"triplet": ("CT", "", "State")}, "area '' of subset 02: expected one line of text in all three"),
        (None, {"as_choice": True}, "--as=choice is for boxes and masks"),
    ],
)
def test_what_cannot_be_written_leaves_nothing(classes, rows, changes, message):
    root, own = classes
    table = write_table(root, "image,label", rows or [row[:2] for row in own])
    before = {str(path) for path in root.rglob("*")}
    with pytest.raises(DataError, match=message) as error:
        format_labels(table, root, **{"subset": "02"} | changes)
    assert len(str(error.value).splitlines()) == 1
    assert {str(path) for path in root.rglob("*")} == before


def test_files_are_replaced_on_demand_alone(classes):
    root, rows = classes
    table = write_table(root, "image,label,group", rows)
    format_labels(table, root, "02")
    with pytest.raises(DataError, match="Aggregated_Subsets/Subset--02-test.json exists; --force replaces it"):
        format_labels(table, root, "02")
    write_subset(root, "Subset-03-train", [raw_record(1)], folder=".")
    with pytest.raises(DataError, match="Subset-03-train.json: subset 03 lies at the tree's root"):
        format_labels(table, root, "03", force=True)


def test_both_files_appear_or_neither(classes, monkeypatch):
    root, rows = classes
    table = write_table(root, "image,label,group", rows)
    write_text = Path.write_text

    def full(path, text, **options):
        if "train" in path.name:
            raise OSError(28, "No space left on device")
        return write_text(path, text, **options)

    monkeypatch.setattr(files_module.Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        format_labels(table, root, "02")
    assert not list((root / "Aggregated_Subsets").iterdir())


def test_no_training_file_appears_before_its_test_file(classes, monkeypatch):
    """It would be read as a subset without a split, and be split again."""
    root, rows = classes
    renamed = []
    replace = files_module.os.replace
    monkeypatch.setattr(files_module.os, "replace", lambda part, path: (renamed.append(path.name), replace(part, path)))
    triplet = ("CT", "Kidney", "State")
    format_labels(write_table(root, "image,label,group", rows), root, "02", triplet=triplet)
    assert renamed == ["manifest.json", "Subset--02-test.json", "Subset--02-train.json"]


def test_the_packs_own_labels_come_back(shared_dir, tmp_path):
    """The pack's released records as a raw table: the same labels of the same images, in questions of the same form."""
    pack = shared_dir / "data" / "medmat-mini"
    rows = []
    for split in SPLITS:
        for raw in json.loads((pack / "Aggregated_Subsets" / f"Subset--22-{split}.json").read_text()):
            target = tmp_path / "own" / raw["image"]
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(pack / raw["image"], target)
            rows.append((f"own/{raw['image']}", raw["Answer"], split))
    done = format_labels(write_table(tmp_path, "image,label,split", rows), tmp_path, "22", data_no="45")
    assert (done["train"], done["test"], len(done["labels"])) == (320, 100, 4)
    assert check_tree(tmp_path).ok
    table = read_labels(tmp_path / "labels.csv", tmp_path, DataConfig().max_pixels)
    assert {(own.image, own.labels[0]) for own in table.images} == {row[:2] for row in rows}


def test_the_verb(box_table, capfd):
    table, root = box_table
    found = root / "found.json"
    argv = ["data", "format", str(table), str(root), "--subset=43", f"--json={found}"]
    assert main(argv) == 0 and json.loads(found.read_text())["train"] == 35
    assert "35 training and 5 test records" in capfd.readouterr().out
    assert main(argv) == 2 and "--force replaces it" in capfd.readouterr().err
    named = ["--modality=US", "--area=Chest", "--task=State", "--as=choice", "--data_no=97", "--seed=3"]
    assert main([*argv[:4], "--subset=mine", *named]) == 0
    assert written(root, "mine")["train"][0]["data-no"] == "97"
    assert main([*argv[:4], "--subset=mine2", *named[1:]]) == 2
    assert "modality '' of subset mine2" in capfd.readouterr().err
