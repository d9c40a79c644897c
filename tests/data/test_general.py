"""General records: what is read, how many a training gets and which, and what is refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trees import raw_record, write_image

from medcg_jax.config import DataConfig
from medcg_jax.data.general import GeneralRecords, num_general, open_general
from medcg_jax.data.records import DataError

FOUR = ("no", "yes", "one", "two")


def general_raws(count: int) -> list[dict]:
    """Every second one has an image."""
    raws = [raw_record(i, label=FOUR[i % 4], options=FOUR, image="q.png") for i in range(count)]
    return [raw | {"image": "" if raw["id"] % 2 else "q.png"} for raw in raws]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("general")
    write_image(folder, "q.png")
    (folder / "general.json").write_text(json.dumps(general_raws(40)))
    return folder / "general.json"


def config(path, share=0.25, **changes):
    return DataConfig(imagewikiqa_share=share, general_records=str(path), **changes)


def test_nothing_is_read_where_the_share_is_0(path):
    assert open_general(config(path, 0.0)) is None and open_general(config("none.json", 0.0)) is None


def test_a_record_is_a_question_with_or_without_an_image(path):
    records = GeneralRecords(config(path, 0.5)).draw((("04", 80),))
    assert [record.id for record in records.records] == [f"general/train/{i}" for i in range(40)]
    assert all(record.options == FOUR and record.subset == "general" for record in records.records)
    assert records.image(0).shape == (8, 12, 3) and records.records[1].image == ""


@given(st.lists(st.tuples(st.sampled_from(["04", "05"]), st.integers(0, 60)), max_size=2), st.integers(0, 3))
def test_a_training_draws_its_share_without_repetition(path, training, seed):
    training = tuple(sorted(training))
    supply = GeneralRecords(config(path, seed=seed))
    drawn = [record.id for record in supply.draw(training).records]
    assert len(drawn) == len(set(drawn)) == num_general(sum(count for _, count in training), 0.25)
    assert drawn == [record.id for record in GeneralRecords(config(path, seed=seed)).draw(training).records]


def test_the_seed_and_the_training_decide_what_is_drawn(path):
    supplies = [GeneralRecords(config(path, seed=seed)) for seed in (0, 1)]
    trainings = ((("04", 60),), (("05", 60),), (("04", 30), ("05", 30)))
    drawn = {tuple(r.id for r in supply.draw(own).records) for supply in supplies for own in trainings}
    assert len(drawn) == 6


def test_every_record_comes_up(path):
    supply = GeneralRecords(config(path))
    seen = {r.id for i in range(40) for r in supply.draw(((str(i), 40),)).records}
    assert len(seen) == 40


def test_too_few_are_counted(path):
    supply = GeneralRecords(config(path))
    supply.require(161)
    for ask in (lambda: supply.require(163), lambda: supply.draw((("04", 100), ("05", 63)))):
        with pytest.raises(DataError, match="has 40 records; data.imagewikiqa_share=0.25 of 163 wants 41"):
            ask()


def test_fingerprint_follows_records_and_images(tmp_path):
    def print_of(count, seed):
        write_image(tmp_path, "q.png", seed=seed)
        (tmp_path / "g.json").write_text(json.dumps(general_raws(count)))
        return GeneralRecords(config(tmp_path / "g.json")).fingerprint()

    prints = [print_of(4, 0), print_of(4, 0), print_of(5, 0), print_of(4, 1)]
    assert prints[0] == prints[1] and len(set(prints)) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "data.general_records: g.json: No such file"),
        ("{", "data.general_records: g.json: no JSON"),
        ([raw_record(1)], "data.general_records: g.json: record 1: 2 options; expected 4"),
        ([general_raws(2)[1] | {"Answer": "none"}], "g.json: record 1: Answer-choice B names 'yes', but Answer"),
        ([general_raws(1)[0] | {"image": "../q.png"}], "g.json: record 0: image '../q.png' climbs out"),
        (general_raws(1) * 2, "g.json: record 0: the id 0 occurs twice"),
    ],
)
def test_broken_files_are_one_line(tmp_path, content, message):
    write_image(tmp_path, "q.png")
    if content is not None:
        (tmp_path / "g.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(DataError, match=message) as error:
        GeneralRecords(config(tmp_path / "g.json"))
    assert "\n" not in str(error.value)
