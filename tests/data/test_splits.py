"""Splits by patient, and caps: nobody on both sides, shares of labels, and the split of old where nobody is known."""

import hashlib
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medcg_jax.data.records import Record, Subset
from medcg_jax.data.splits import balanced, is_out_of_distribution, shared_groups, train_test_split


def split_by_image(labels: dict[str, str]) -> set[str]:
    """The images tested on where no patient is known, as written before there were patients: a tenth by digest."""
    images: dict[str, list[str]] = {}
    for image, label in labels.items():
        images.setdefault(label, []).append(image)
    test: set[str] = set()
    for found in images.values():
        found.sort(key=lambda image: hashlib.sha256(image.encode()).digest())
        test.update(found[: round(len(found) * 0.1)])
    return test


names = st.text(st.characters(codec="utf-8"), max_size=4)
items_without_groups = st.lists(st.tuples(names, st.sampled_from("abc"), st.just("")), max_size=120)
# Some images occur twice, in one group or in two.
items_with_groups = st.lists(
    st.tuples(st.integers(0, 150).map(str), st.sampled_from("abcd"), st.sampled_from(["", *map(str, range(25))])),
    max_size=200,
)


@given(items_without_groups)
def test_without_groups_it_is_a_tenth_of_each_labels_images_by_digest(items):
    labels: dict[str, str] = {}
    for image, label, _ in items:
        labels.setdefault(image, label)
    wanted = split_by_image(labels)
    assert train_test_split(items) == [image in wanted for image, _, _ in items]


def gap(items, tested) -> int:
    """Over all labels, by how many images the test has too many or too few."""
    label_of: dict[str, str] = {}
    for image, label, _ in items:
        label_of.setdefault(image, label)
    on_test = {image for (image, _, _), test in zip(items, tested, strict=True) if test}
    whole, part = Counter(label_of.values()), Counter(label_of[image] for image in on_test)
    return sum(abs(part[label] - round(whole[label] * 0.1)) for label in whole)


@given(items_with_groups)
@settings(deadline=None)
def test_nobody_is_on_both_sides_and_no_one_moved_brings_it_nearer(items):
    tested = train_test_split(items)
    assert len(tested) == len(items)
    sides: dict[tuple[str, str], set[bool]] = defaultdict(set)
    for (image, _, group), test in zip(items, tested, strict=True):
        sides["image", image].add(test)
        if group:
            sides["group", group].add(test)
    assert all(len(side) == 1 for side in sides.values())
    for moved in {group for _, _, group in items if group}:
        other = [test != (group == moved) for (_, _, group), test in zip(items, tested, strict=True)]
        joined = {image for image, _, group in items if group == moved}
        if all(group in ("", moved) for image, _, group in items if image in joined):
            other = [test != (image in joined) for (image, _, _), test in zip(items, tested, strict=True)]
            assert gap(items, other) >= gap(items, tested)


@given(items_with_groups, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_the_order_of_the_items_does_not_matter(items, random):
    # One label an image: of several the first would count.
    items = [(image, "ab"[int(image) % 2], group) for image, _, group in items]
    shuffled = random.sample(items, len(items))
    both = [dict(zip(own, train_test_split(own), strict=True)) for own in (items, shuffled)]
    assert both[0] == both[1]


def test_shares_are_met_where_patients_are_small():
    rng = np.random.default_rng(0)
    items, labels = [], ["a"] * 6 + ["b"] * 3 + ["c"]
    for patient in range(400):
        for film in range(rng.integers(1, 6)):
            items.append((f"{patient}-{film}", labels[rng.integers(10)], f"p{patient}"))
    assert gap(items, train_test_split(items)) == 0
    # The patients tested on are no larger than others.
    sizes = Counter(group for _, _, group in items)
    tested = {group for (_, _, group), test in zip(items, train_test_split(items), strict=True) if test}
    assert abs(np.mean([sizes[group] for group in tested]) - np.mean(list(sizes.values()))) < 0.5


def test_exchanges_find_what_one_pass_does_not():
    # 100 images: whoever of 15 comes first is taken, and leaves no room for the two of 5.
    items = [(f"{group}-{i}", "a", group) for group in "uvwxyz" for i in range(15)]
    items += [(f"{group}-{i}", "a", group) for group in ("s", "t") for i in range(5)]
    assert gap(items, train_test_split(items)) <= 5
    items = [(f"{group}-{i}", "a", group) for group, size in (("p", 13), ("q", 10), ("r", 77)) for i in range(size)]
    assert {group for (_, _, group), test in zip(items, train_test_split(items), strict=True) if test} == {"q"}


def test_a_patient_with_everything_is_trained_on():
    assert train_test_split([(str(i), "a", "one") for i in range(50)]) == [False] * 50


@pytest.mark.parametrize(("count", "wanted"), [(2999, True), (3000, False), (0, True)])
def test_out_of_distribution_is_what_cannot_fill_the_cap(count, wanted):
    assert is_out_of_distribution(Subset("04", "CT", "Lung", "State", num_train=count)) is wanted


@pytest.mark.parametrize(
    ("counts", "limit", "wanted"),
    [
        ({"a": 10, "b": 2, "c": 10}, 12, {"a": 5, "b": 2, "c": 5}),
        ({"a": 10, "b": 10, "c": 10}, 10, {"a": 3, "b": 3, "c": 4}),
        ({"a": 3, "b": 3}, 6, {"a": 3, "b": 3}),
        ({"a": 3, "b": 3}, 0, {"a": 3, "b": 3}),
        ({"a": 1, "b": 50}, 20, {"a": 1, "b": 19}),
    ],
)
def test_balance(counts, limit, wanted):
    labels = [label for label, count in counts.items() for _ in range(count)]
    assert Counter(labels[i] for i in balanced(labels, limit, 0)) == wanted


@given(st.lists(st.sampled_from("abcde"), max_size=80), st.integers(0, 90), st.integers(0, 5))
def test_caps_take_as_many_of_each_label_as_there_are(labels, limit, seed):
    places = balanced(labels, limit, seed)
    assert places == sorted(set(places)) and len(places) == (min(limit, len(labels)) if limit else len(labels))
    whole, part = Counter(labels), Counter(labels[place] for place in places)
    # A label of which some are left out has at most one less than any other.
    short = [part[label] for label in whole if part[label] < whole[label]]
    assert not short or max(part.values()) - min(short) <= 1


def record(name: str, data_no: str, *, group: str = "", image: str = "a.png", subset: str = "04") -> Record:
    return Record(f"{subset}/{name}", subset, (), image=image, data_no=data_no, group=group)


def shared(training: list[Record], test: list[Record]) -> dict[str, tuple[list[str], list[str]]]:
    found = shared_groups(training, test)
    return {key: ([r.id for r in both[0]], [r.id for r in both[1]]) for key, both in found.items()}


def test_a_patient_on_both_sides_is_found_with_all_its_records():
    training = [record(str(i), "5", group=name) for i, name in enumerate(["p1", "p2", "p1", ""])]
    test = [record(f"t{i}", "5", group=name, subset="05") for i, name in enumerate(["p3", "p1", ""])]
    assert shared(training, test) == {"5/p1": (["04/0", "04/2"], ["05/t1"])}
    assert shared(training, test[:1]) == {}


def test_a_patients_name_holds_within_one_data_set():
    assert shared([record("0", "5", group="p1")], [record("1", "6", group="p1")]) == {}
    assert shared([record("0", "", group="p1")], [record("1", "", group="p1")]) == {"/p1": (["04/0"], ["04/1"])}


def test_image_names_tell_the_patient_where_the_record_does_not():
    left, right = record("0", "53", image="a/9120059L.jpg"), record("1", "53", image="b/9120059R.jpg")
    assert list(shared([left], [right])) == ["53/9120059"]
    assert list(shared([left], [record("1", "53", group="9120059")])) == ["53/9120059"]
    assert shared([left], [record("1", "53", image="b/9120059R.jpg", group="another")]) == {}


def test_data_sets_of_one_origin_number_their_patients_alike():
    """61 is a sample of 80, NIH's films; 53 and 78 are others, whatever their names."""
    for a, b in (("61", "80"), ("80", "61")):
        films = [record("0", a, image="a/00000013_005.png")], [record("1", b, image="b/00000013_001.png", subset="05")]
        assert shared(*films) == {"61/00000013": (["04/0"], ["05/1"])}
    # 54 and 81 may share images; that is not sure.
    assert shared([record("0", "54", group="1")], [record("1", "81", group="1")]) == {}
