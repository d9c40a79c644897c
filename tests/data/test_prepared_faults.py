"""A prepared folder that is not as it was written is refused when it is read; nothing is written through links."""

import json
import shutil

import pytest
from trees import write_tree_with_boxes

from medcg_jax.cli import main
from medcg_jax.config import DataConfig
from medcg_jax.data import prepare as prepare_module
from medcg_jax.data.layouts import Layout
from medcg_jax.data.prepare import prepare
from medcg_jax.data.prepared import PreparedSource, verify
from medcg_jax.data.records import DataError

KEEP, CONFIG = Layout("keep", 0), DataConfig()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(tree, its preparation in shards of four records)."""
    folder = tmp_path_factory.mktemp("prepared")
    root = write_tree_with_boxes(folder / "tree", train=8, test=4, boxes=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "RECORDS_PER_SHARD", 4)
        prepare(root, folder / "out", CONFIG, KEEP, workers=1)
    return root, folder / "out"


@pytest.fixture
def out(written, tmp_path):
    return shutil.copytree(written[1], tmp_path / "out")


def shard(out, name):
    return out / "records" / f"{name}.arrayrecord"


def exchange(first, second):
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def read_all(out, subset="04", split="train"):
    records = PreparedSource(out, CONFIG).records(subset, split)
    return [records.image(place) for place in range(len(records))]


def test_what_was_written_is_read(out):
    assert len(read_all(out)) == 8 and verify(out) == []


@pytest.mark.parametrize(
    ("first", "second", "place"),
    [
        ("04-train-00000-of-00002", "04-train-00001-of-00002", 1),  # of one subset and split
        ("04-train-00001-of-00002", "04-test-00000-of-00001", 5),  # of training and test
        ("04-train-00000-of-00002", "47-train-00000-of-00001", 1),  # of two subsets
    ],
)
def test_exchanged_shards_are_refused_by_name(out, first, second, place):
    exchange(shard(out, first), shard(out, second))
    message = rf"{first}.arrayrecord: record {place} of 8: not 04/train/{place}, which the list of records has there"
    with pytest.raises(DataError, match=message):
        read_all(out)
    assert verify(out) == [
        f"{name}.arrayrecord: its bytes are not those that were written"
        for name in sorted((first, second), key=lambda name: (name[:2], "test" in name, name))
    ]


def test_a_flipped_bit_of_any_record_is_refused(out):
    path = shard(out, "04-train-00001-of-00002")
    content = path.read_bytes()
    place = content.index(b"\n", content.index(b'"04/train/7"')) + 50  # among the pixels of that record
    path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
    with pytest.raises(DataError, match=r"04-train-00001-of-00002.arrayrecord: record 7 of 8: .*hash mismatch"):
        read_all(out)


@pytest.mark.parametrize("left", [0, 1000, 100_000])
def test_a_truncated_shard_is_refused_by_name(out, left):
    path = shard(out, "04-train-00001-of-00002")
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(DataError, match=r"04-train-00001-of-00002.arrayrecord cannot be read: .*medcg data prepare"):
        read_all(out)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"answer":"A"', '"answer":"B"', "not 04/train/"),
        ('"answer":"A"', '"answer":"C"', "line [0-9]+: no record as it was written"),
        ('"04/train/2"', '"04/train/3"', "record 2 of 8: not 04/train/3"),
        ('"subset":"04"', '"subset":"05"', "line 1: no record as it was written"),
        ('"shape":[8,12]', '"shape":[-8,12]', "line 1: no record"),
        ('"turns":[[', '"turns":[[1,', "line 1: no record"),
        ('"id":', '"id":1,"id":', 'line 1: no JSON: the key "id" stands twice'),
        ("{", "{{", "line 1: no JSON"),
    ],
)
def test_an_edited_list_of_records_is_refused(out, old, new, message):
    path = out / "records" / "04-train.jsonl"
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), "utf-8")
    with pytest.raises(DataError, match=message) as error:
        read_all(out)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert verify(out) == ["records/*.jsonl: not the records that were written; run `medcg data prepare` again"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format="medcg prepared 1"), 'format="medcg prepared 1", where .* again, into a new folder'),
        (lambda m: m.pop("subsets"), "subsets=null is no list of objects"),
        (lambda m: m.pop("settings"), "settings=null has no text `image`"),
        (lambda m: m["subsets"].append(3), "is no list of objects"),
        (lambda m: m["subsets"].append(m["subsets"][0]), 'subset "04" is no name, or stands twice'),
        (lambda m: m["subsets"][0].update(subset="../x"), "is no name"),
        (lambda m: m["subsets"][0].pop("shards"), "subset 04: shards=null is no dict"),
        (lambda m: m["subsets"][0]["shards"].pop("test"), "subset 04: shards of 04-test: null is no list"),
        (lambda m: m["subsets"][0].update(train=True), "subset 04: train=true is no int"),
        (lambda m: m["subsets"][0].update(train=9), "04-train has 9 records, its shards 8"),
        (lambda m: m["subsets"][0].update(kind="both"), "kind=.* is none of choice, detection"),
        (lambda m: m["subsets"][0].update(labels=[1]), "are not all text"),
        (lambda m: m["subsets"][0]["shards"]["train"][0].update(file="../x"), "stands where 04-train-00000-of-00002"),
        (lambda m: m["subsets"][0]["shards"]["train"].reverse(), "stands where 04-train-00000-of-00002"),
        (lambda m: m["subsets"][0]["shards"]["train"][0].pop("sha256"), "no text `sha256`"),
    ],
)
def test_a_manifest_that_prepare_did_not_write_is_one_line(out, change, message, capsys):
    manifest = json.loads((out / "manifest.json").read_text())
    change(manifest)
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=message):
        PreparedSource(out, CONFIG)
    assert main(["data", "check", str(out)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_folder_of_another_version_is_not_gone_on_with(written, out):
    plan = json.loads((out / ".plan.json").read_text())
    (out / ".plan.json").write_text(json.dumps(plan | {"format": "medcg prepared 1"}))
    with pytest.raises(DataError, match="was prepared by another version of medcg; choose another folder, or remove"):
        prepare(written[0], out, CONFIG, KEEP, workers=1)


def test_a_nested_manifest_is_one_line(out, capsys):
    (out / "manifest.json").write_text("[" * 100_000)
    assert main(["data", "check", str(out)]) == 2
    assert "manifest.json: no JSON that is read: nested too deep" in capsys.readouterr().err


def test_going_on_a_shard_of_other_records_is_written_again(written, out):
    whole = {path.name: path.read_bytes() for path in (out / "records").iterdir()}
    exchange(shard(out, "04-train-00000-of-00002"), shard(out, "04-test-00000-of-00001"))
    (out / "manifest.json").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "RECORDS_PER_SHARD", 4)
        prepare(written[0], out, CONFIG, KEEP, workers=1)
    assert {path.name: path.read_bytes() for path in (out / "records").iterdir()} == whole and verify(out) == []


@pytest.mark.parametrize("name", ["records", ".examined.jsonl", ".plan.json", "manifest.json", "records/x.jsonl"])
def test_nothing_is_written_or_removed_through_a_link(written, tmp_path, name):
    victim, out = tmp_path / "victim", tmp_path / "out"
    victim.mkdir()
    (victim / ".bashrc").write_text("mine")
    (victim / "file").write_text("mine")
    out.mkdir()
    (out / ".examined.jsonl").touch()
    if "/" in name:
        (out / "records").mkdir()
    (out / name).unlink(missing_ok=True)
    (out / name).symlink_to(victim if name == "records" else victim / "file")
    with pytest.raises(DataError, match=f"{name} is a link, and nothing is written through it"):
        prepare(written[0], out, CONFIG, KEEP, workers=1)
    assert {path.name: path.read_text() for path in victim.iterdir()} == {".bashrc": "mine", "file": "mine"}


def test_hidden_files_that_are_not_its_own_stay(written, tmp_path):
    records = tmp_path / "out" / "records"
    records.mkdir(parents=True)
    (tmp_path / "out" / ".examined.jsonl").touch()
    own = records / ".04-train-00000-of-00002.arrayrecord.0123456789ab"
    for path in (own, records / ".bashrc", records / ".04-train.jsonl"):
        path.write_text("x")
    prepare(written[0], tmp_path / "out", CONFIG, KEEP, workers=1)
    assert not own.exists() and (records / ".bashrc").exists() and (records / ".04-train.jsonl").exists()
