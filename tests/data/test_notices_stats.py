"""What `data check` warns of, with counts, and the page that says what is in a tree."""

import json

import numpy as np
import pytest
from PIL import Image
from record_sets import choices
from trees import raw_box_record, raw_record, write_subset, write_tree_with_boxes

from medcg_jax.cli import main
from medcg_jax.data.check import check_tree
from medcg_jax.data.notices import box_range, letter_counts
from medcg_jax.data.records import DataError, RecordSet
from medcg_jax.data.schema import parse_choice
from medcg_jax.data.stats import THUMB_PX, contact_sheet, write_stats

WORDS = ("alpha", "beta", "gamma", "delta")


def notices(tmp_path, train, test=()):
    """(file, kind) -> (count, of, reason) of a tree of one subset."""
    write_subset(tmp_path, "Subset--04-train", list(train))
    write_subset(tmp_path, "Subset--04-test", list(test) or [raw_record(9000)])
    report = check_tree(tmp_path, workers=1)
    assert report.ok
    return {(own.file, own.kind): (own.count, own.of, own.reason) for own in report.notices}


def asked(number, right, *, options=WORDS, stem="Which?", **changes):
    """A record whose right option stands in place `right`."""
    lines = "\n".join(f"{letter}: {option}" for letter, option in zip("ABCDEFGH", options, strict=False))
    question = {"Question-choice": f"{stem}\n{lines}\nAnswer with a letter."}
    return raw_record(number, options=options, label=options[right], **question, **changes)


def test_balanced_letters_are_not_warned_of(tmp_path):
    assert notices(tmp_path, [asked(n, n % 4) for n in range(40)]) == {}


def test_always_one_letter_is(tmp_path):
    found = notices(tmp_path, [asked(n, 1) for n in range(24)])
    count, of, reason = found["subset 04", "letters"]
    assert (count, of) == (24, 25) and "the letter B is right in 24 of 25 questions (A 1, B 24, C 0, D 0;" in reason


def test_always_the_last_option_is_whatever_its_letter(tmp_path):
    # By letters alone 2, 3 and 4 options in turn look nearly even.
    raws = [asked(n, n % 3 + 1, options=WORDS[: n % 3 + 2]) for n in range(60)]
    records = [parse_choice(raw, "04", "train") for raw in raws]
    assert letter_counts(records, from_end=True)[0] == {"0": 60, "1": 0, "2": 0, "3": 0}
    _, _, reason = notices(tmp_path, raws)["subset 04", "letters"]
    assert "not balanced" in reason and "p=" in reason


def test_few_questions_are_not_tested(tmp_path):
    assert notices(tmp_path, [asked(n, 1) for n in range(18)]) == {}


@pytest.mark.parametrize(
    ("stem", "is_told"),
    [
        ("It shows {right}. Which?", True),
        ("It shows {RIGHT}, see left. Which?", True),
        ("It shows {right} or {wrong}. Which?", False),
        ("It shows {right}s. Which?", False),
        ("Which?", False),
    ],
)
def test_the_answer_in_the_question_is_counted(tmp_path, stem, is_told):
    def question(right):
        wrong = WORDS[(right + 1) % 4]
        return stem.format(right=WORDS[right], RIGHT=WORDS[right].upper(), wrong=wrong)

    found = notices(tmp_path, [asked(n, n % 4, stem=question(n % 4)) for n in range(12)])
    if not is_told:
        assert found == {}
        return
    count, of, reason = found["Subset--04-train.json", "answer_in_question"]
    assert (count, of) == (12, 12)
    assert "12 of 12 questions hold the text of their right option and of no other, such as record 0 ('al" in reason


def test_a_word_of_every_question_is_no_hint(tmp_path):
    # "alpha" stands in all, and is right in a quarter of them.
    assert notices(tmp_path, [asked(n, n % 4, stem="Which kind of alpha?") for n in range(40)]) == {}


def test_patients_on_both_sides_are_named(tmp_path, capsys):
    train = [asked(n, n % 4, group=f"p{n % 6}") for n in range(12)]
    test = [asked(100 + n, n % 4, group=f"p{n}") for n in range(4, 8)] + [asked(200, 0, **{"data-no": "6"}, group="p1")]
    count, of, reason = notices(tmp_path, train, test)["Subset--04-test.json", "shared_group"]
    # Two of the test's are trained on; patient p1 of another dataset is somebody else.
    assert (count, of) == (2, 5) and "2 patients or lesions" in reason and "'5/p4', '5/p5'" in reason
    assert "2 of 5 test records share them with 4 training records: a leak" in reason
    assert main(["data", "check", str(tmp_path), f"--json={tmp_path / 'r.json'}"]) == 0
    out = capsys.readouterr().out
    assert "warning: Subset--04-test.json: 2 patients" in out and "nothing is wrong" not in out
    assert [own["kind"] for own in json.loads((tmp_path / "r.json").read_text())["notices"]] == ["shared_group"]


def test_two_spellings_of_one_label_are_named(tmp_path):
    raws = [asked(n, 0, options=("Naevus", "x")) for n in range(3)]
    raws += [asked(n, 0, options=("naevus ", "x")) for n in range(3, 5)]
    for raw in raws:
        raw["Answer"] = raw["Answer"].strip()
    count, of, reason = notices(tmp_path, raws)["subset 04", "labels_alike"]
    assert (count, of) == (2, 6) and "'Naevus' and 'naevus' look alike: 2 of 6" in reason


def test_names_of_two_subsets_that_look_alike_are_told(tmp_path):
    write_subset(tmp_path, "Subset--mine-train", [raw_record(n) for n in range(1, 13)])
    write_subset(tmp_path, "Subset--04-train", [raw_record(n) for n in range(101, 113)])
    entry = {"subset": "mine", "modality": "ct", "area": "Lung", "task": "Own"}
    (tmp_path / "manifest.json").write_text(json.dumps({"subsets": [entry]}))
    (found,) = check_tree(tmp_path, workers=1).notices
    assert str(found) == "subset mine: its modality 'ct' looks like 'CT' of subset 04, and is another one"


def test_corners_of_a_scale_are_named():
    def notice(corner, size, number=24):
        corners = [[5, 5, corner - n, corner - n] for n in range(number)]
        raws = [raw_box_record(n, boxes=[{"label": "x", "bbox": own}]) for n, own in enumerate(corners)]
        return box_range("f.json", [(raw, size) for raw in raws])

    assert "at most 1,000, and no image has a side below 1500" in notice(999, (1500, 2000)).reason
    assert "at most 1,000, and 24 boxes lead out of their images" in notice(999, (600, 800)).reason
    assert "at most 100, and no image" in notice(100, (512, 512)).reason
    assert notice(900, (1024, 1024)) is None and notice(999, (1024, 1024)) is None
    assert notice(999, (1500, 2000), number=3) is None


def test_a_tree_of_boxes_has_none(tmp_path):
    root = write_tree_with_boxes(tmp_path, train=8, test=4, boxes=30)
    assert check_tree(root, workers=1).notices == ()


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
    assert subsets["08"]["problems"] == {"letter": 1, "image": 1} and "cannot be used" in html
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
