"""Questions asked again with other options or another image: what is kept, what moves, what is refused."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from record_sets import with_four_options

from medcg_jax.config import CONTROLS
from medcg_jax.data.controls import BLANK, blanked, control_sets, with_options
from medcg_jax.data.phantom.source import PhantomSource
from medcg_jax.data.records import LETTERS, DataError, Record, RecordSet, Turn

BLIND = ("shuffled_images", "blank_images", "text_only")


def made(sizes, answers) -> RecordSet:
    """Records with so many options; the image of record i is filled with i."""
    records = []
    for i, (size, answer) in enumerate(zip(sizes, answers, strict=True)):
        options = tuple(f"option {i} {k}" for k in range(size))
        lines = "".join(f"\n{LETTERS[k]}: {text}" for k, text in enumerate(options))
        letter = LETTERS[answer % size]
        question = f"Which?{lines}\nAnswer with the option's letter."
        records.append(Record(f"r{i}", "s", (Turn(question, letter),), options, letter, f"{i}.png"))
    images = np.arange(len(records), dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    return RecordSet(records, images)


@given(st.lists(st.tuples(st.integers(2, 4), st.integers(0, 3)), min_size=2, max_size=20), st.integers(0, 3))
def test_the_right_option_stays_right(drawn, seed):
    records = made(*zip(*drawn, strict=True))
    found = control_sets(records, CONTROLS, seed)
    by_id = {record.id: record for record in records.records}
    most = max(size for size, _ in drawn)
    shifts = {f"shift_{k}" for k in range(1, most)}
    assert found.keys() == {*BLIND, *shifts} | ({"two_options"} if most > 2 else set())
    for name, asked in found.items():
        for i, record in enumerate(asked.records):
            before = by_id[record.id]
            assert record.label == before.label and record.turns[0].answer == record.answer
            number = 2 if name == "two_options" else len(before.options)
            assert len(record.options) == number and set(record.options) <= set(before.options)
            for letter, option in zip(LETTERS, record.options, strict=False):
                assert f"\n{letter}: {option}\n" in record.turns[0].question
            assert record.turns[0].question.count("option ") == number
            own = int(record.id[1:])
            assert record.image == {"text_only": "", "shuffled_images": f"{asked.image(i)[0, 0, 0]}.png"}.get(
                name, before.image
            )
            if name != "text_only":
                assert (asked.image(i)[0, 0, 0] == own) == (name not in BLIND)
    for k in range(1, most):
        for record in found[f"shift_{k}"].records:
            before = by_id[record.id]
            place = LETTERS.index(before.answer)
            assert LETTERS.index(record.answer) == (place + k) % len(before.options)


def test_every_place_is_had_once_over_the_shifts():
    records = made([4] * 8, range(8))
    found = control_sets(records, ("circular",), 0)
    for i, record in enumerate(records.records):
        letters = {record.answer, *(found[f"shift_{k}"].records[i].answer for k in (1, 2, 3))}
        assert letters == set("ABCD")


def test_draws_are_the_seed_s():
    records = made([4] * 30, range(30))

    def drawn(seed):
        found = control_sets(records, CONTROLS, seed)
        return [(r.image, r.options) for name in ("shuffled_images", "two_options") for r in found[name].records]

    assert drawn(1) == drawn(1) != drawn(2)
    # Neither place is favoured, nor one of the others.
    firsts = [record.answer for record in control_sets(records, CONTROLS, 1)["two_options"].records]
    assert 5 < firsts.count("A") < 25


def test_questions_of_phantoms_can_be_asked_again():
    two = PhantomSource(3, 4, 40).records("oct-skin-grade", "test")
    assert set(control_sets(two, CONTROLS, 0)) == {*BLIND, "shift_1"}
    records = with_four_options(two)
    found = control_sets(records, CONTROLS, 0)
    assert set(found) == {*BLIND, "shift_1", "shift_2", "shift_3", "two_options"}
    assert all(len(asked) == 40 for asked in found.values())
    same = [np.array_equal(found["shuffled_images"].image(i), records.image(i)) for i in range(40)]
    assert not any(same)


def test_options_that_are_no_lines_are_refused():
    record = made([3], [0]).records[0]
    odd = replace(record, turns=(Turn("Which of a, b, c?", "A"),))
    with pytest.raises(DataError, match="r0: its options are no lines"):
        with_options(odd, odd.options[::-1], odd.label)


def test_a_lone_record_has_no_other_image():
    assert "shuffled_images" not in control_sets(made([2], [0]), CONTROLS, 0)


def with_images(numbers: list[int]) -> RecordSet:
    """Records whose images are filled with these numbers."""
    records = made([2] * len(numbers), [0] * len(numbers)).records
    return RecordSet(records, np.array(numbers, np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8))


@given(st.lists(st.integers(0, 4), min_size=2, max_size=20), st.integers(0, 3))
def test_no_record_is_asked_beside_its_own_image_under_another_name(numbers, seed):
    records = with_images(numbers)
    asked = control_sets(records, ("shuffled_images",), seed).get("shuffled_images")
    number_of = {record.id: number for record, number in zip(records.records, numbers, strict=True)}
    shown = [] if asked is None else [int(asked.image(i)[0, 0, 0]) for i in range(len(asked))]
    assert all(number_of[record.id] != number for record, number in zip(asked.records if asked else (), shown))
    # All that can be are asked, and no image more often than it is there.
    most = max(map(numbers.count, numbers))
    assert len(shown) == min(len(numbers), 2 * (len(numbers) - most))
    assert all(shown.count(number) <= numbers.count(number) for number in numbers)


def test_one_image_for_all_and_questions_alone_cannot_be_exchanged():
    assert control_sets(with_images([3, 3, 3]), ("shuffled_images",), 0) == {}
    texts = [replace(record, image="") for record in made([2] * 4, [0] * 4).records]
    assert control_sets(RecordSet(texts, np.zeros((4, 1, 1, 3), np.uint8)), ("shuffled_images",), 0) == {}


def test_blank_images_are_all_the_same():
    records = RecordSet(
        [*made([2, 2], [0, 1]).records, replace(made([2], [0]).records[0], id="text", image="")],
        [np.full((3, 5, 3), 9, np.uint8), np.full((4, 2, 3), 200, np.uint8), np.zeros((1, 1, 3), np.uint8)],
    )
    blank = blanked(records)
    assert blank.image_size(0) == blank.image_size(1) and blank.image_digest(0) == blank.image_digest(1)
    assert np.ptp(BLANK) == 0 and blank.records == records.records
    # A record without an image is asked in neither control.
    for asked in control_sets(records, ("blank_images", "text_only"), 0).values():
        assert [record.id for record in asked.records] == ["r0", "r1"]
    texts = RecordSet([records.records[2]], [records.images[2]])
    assert control_sets(texts, ("blank_images", "text_only"), 0) == {}
