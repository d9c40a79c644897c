"""The catalogue of Med-MAT: complete, at one with itself and with the printed tables, and asked in one way."""

import csv
import dataclasses
import json
import re
from collections import Counter
from importlib import resources

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medcg_jax.data import catalogue
from medcg_jax.data.catalogue import datasets, group_of, numbers, printed_rows, related_datasets, subsets
from medcg_jax.data.tree import subset_table

DATA_NUMBERS = [str(i) for i in range(1, 110)]
SUBSET_NUMBERS = [f"{i:02d}" for i in range(1, 54)]


def table(name):
    """A printed table's rows by number, wherever it lies."""
    if name in ("table9_subsets", "table10_11_datasets"):
        return {next(iter(row.values())): row for row in printed_rows(name)}
    text = resources.files("medcg_jax.study").joinpath("design", "paper", f"{name}.csv").read_text(encoding="utf-8")
    keys, *lines = csv.reader(text.splitlines())
    return {line[0]: dict(zip(keys, line, strict=True)) for line in lines}


def unprinted(slips):
    """The slips whose printed value stands nowhere in their table."""
    found = []
    for slip in slips:
        row = table(slip.table).get(slip.number, {})
        if slip.table == "table10_11_datasets" and slip.field == "subsets":
            row = {"subsets": datasets()[slip.number].printed["subsets"]}
        if slip.printed != row.get(slip.field, ""):
            found.append(slip)
    return found


def lone_members(members, listed):
    """Members of subsets that are no dataset."""
    return {number for own in members for number in own} - set(listed)


def test_numbers_are_complete():
    assert list(datasets()) == DATA_NUMBERS
    assert list(subsets()) == SUBSET_NUMBERS
    assert all(d.name and d.description for d in datasets().values() if d.number != "46")
    for own in subsets().values():
        assert own.modality and own.area and own.task and own.datasets
        assert own.released == (int(own.number) <= 37)
        assert own.distribution in (("in", "out") if own.released else ("",))
    assert Counter(s.distribution for s in subsets().values()) == {"in": 25, "out": 12, "": 16}
    assert subset_table() == {s.number: (s.modality, s.area, s.task) for s in subsets().values()}


def test_every_member_is_a_dataset_and_says_so():
    assert not lone_members([s.datasets for s in subsets().values()], DATA_NUMBERS)
    for own in subsets().values():
        assert all(own.number in datasets()[number].subsets for number in own.datasets)
    for own in datasets().values():
        assert all(own.number in subsets()[number].datasets for number in own.subsets)
    members = Counter(number for s in subsets().values() for number in s.datasets)
    assert sorted(set(DATA_NUMBERS) - set(members), key=int) == ["43", "64", "83"]
    assert set(members.values()) == {1}  # 44 too, once mended
    assert lone_members([("109", "110")], DATA_NUMBERS) == {"110"}


def test_what_is_printed_stays_beside_what_is_used():
    assert (datasets()["44"].subsets, datasets()["44"].printed["subsets"]) == (("22",), "18, 22")
    assert (
        "44" not in subsets()["18"].datasets and subsets()["18"].printed["datasets"] == "33, 36-38, 39-41, 44, 65, 70"
    )
    assert [slip.number for slip in datasets()["44"].slips] == ["18"]
    assert datasets()["46"].addresses == () and datasets()["46"].name == ""
    assert datasets()["46"].printed["url"] == datasets()["41"].addresses[0]
    assert datasets()["63"].addresses == (datasets()["50"].printed["url"],) != datasets()["50"].addresses
    assert len(datasets()["12"].addresses) == len(datasets()["93"].addresses) == 2
    assert "%20" in datasets()["12"].printed["url"] and not any("%20" in a for a in datasets()["12"].addresses)
    assert datasets()["54"].description == "Tuberculosis" and "COVID" in datasets()["54"].printed["description"]
    assert subsets()["32"].modality == "X-ray" and subsets()["32"].slips[0].override == "none"
    assert subsets()["53"].datasets == ("109",) and not subsets()["53"].printed
    for number in ("43", "64", "83"):
        (slip,) = datasets()[number].slips
        assert (slip.field, slip.override, datasets()[number].subsets) == ("subsets", "none", ())


def test_every_slip_names_what_is_printed():
    slips = catalogue.slips()
    assert not unprinted(slips) and len({(s.table, s.number, s.field) for s in slips}) == len(slips)
    assert all(len(slip.why) > 10 and slip.override and slip.override != slip.printed for slip in slips)
    wrong = dataclasses.replace(slips[0], printed="OCT, Retina, Diseases")
    assert unprinted([*slips, wrong]) == [wrong]


def test_every_difference_from_the_print_is_a_slip():
    for own in datasets().values():
        mended = {slip.field for slip in own.slips if slip.override != "none"}
        for name in ("name", "description", "citation"):
            assert (getattr(own, name) == own.printed[name]) == (name not in mended), (own.number, name)
        assert (", ".join(own.addresses) == own.printed["url"]) == ("url" not in mended), own.number
    for own in subsets().values():
        mended = {slip.field for slip in own.slips if slip.override != "none"}
        for name in ("modality", "area", "task") if own.printed else ():
            assert (getattr(own, name) == own.printed[name]) == (name not in mended)
        assert not own.printed or (own.datasets == numbers(own.printed["datasets"])) == ("datasets" not in mended)


def test_addresses_are_whole_and_those_printed_twice_are_known():
    shared = Counter(d.printed["url"] for d in datasets().values())
    for own in datasets().values():
        assert all(re.fullmatch(r"https?://[^\s,]+", address) for address in own.addresses), own.number
        if shared[own.printed["url"]] > 1:
            others = {d.number for d in datasets().values() if d.printed["url"] == own.printed["url"]} - {own.number}
            assert others <= set(related_datasets(own.number)), own.number


def test_counts_stated_and_printed():
    found = catalogue.counts()
    assert {name: (c.stated, c.printed) for name, c in found.items()} == {
        "datasets": (106, 105), "subsets": (53, 52), "modalities": (11, 11), "areas": (14, 16), "tasks": (13, 49),
    }  # fmt: skip
    assert all(len(c.names) == c.printed and c.note for c in found.values())
    # 106 is what is in a subset once 53 is there.
    assert len({number for s in subsets().values() for number in s.datasets}) == found["datasets"].stated
    assert "not reconciled" in found["areas"].note and "not reconciled" in found["tasks"].note


@given(st.lists(st.tuples(st.integers(1, 109), st.integers(0, 5)), min_size=1))
def test_printed_lists_are_read_back(ranges):
    text = ", ".join(str(first) if not more else f"{first}-{first + more}" for first, more in ranges)
    assert numbers(text) == tuple(str(n) for first, more in ranges for n in range(first, first + more + 1))


def test_lineage_runs_both_ways():
    for own in datasets().values():
        for other, why in related_datasets(own.number).items():
            assert other != own.number and related_datasets(other)[own.number] == why
    assert "one address" in related_datasets("37")["70"]
    assert set(related_datasets("80")) == {"61", "73", "81", "85", "102", "106"}
    assert "57" not in related_datasets("54")  # both may be in 81; nothing says that they share
    assert related_datasets("1") == related_datasets("0") == {}
    for row in printed_rows("lineage"):
        assert row["sure"] in ("printed", "inferred", "possible") and row["why"]
        assert not row["hub"] or row["hub"] in numbers(row["datasets"])
        assert set(numbers(row["datasets"])) <= set(DATA_NUMBERS)


@pytest.mark.parametrize(
    ("number", "image", "group"),
    [
        ("53", "med-mat/Knee/test/3/9120059R.jpg", "9120059"),
        ("53", "med-mat/Knee/test/3/9120059L.png", "9120059"),
        ("53", "med-mat/9120059R/other.jpg", ""),
        ("80", "images/00000013_005.png", "00000013"),
        ("61", "images/00000013_005.png", "00000013"),
        ("77", "CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg", "patient00001"),
        ("78", "Mass-Training_P_00001_LEFT_CC/1-1.jpg", "P_00001"),
        ("78", "jpeg/1.3.6.1.4.1.9590.100.1.2.100018879311824535125115145152454291132/1-263.jpg", ""),
        ("36", "breast/benign/SOB/adenosis/SOB_B_A_14-22549AB/40X/SOB_B_A-14-22549AB-40-001.png", "14-22549AB"),
        ("60", "train/PNEUMONIA/person88_virus_167.jpg", "person88"),
        ("60", "train/NORMAL/IM-0115-0001.jpg", ""),
        ("68", "training/123_left.jpg", "123"),
        ("103", "train/case123/case123_day20/scans/slice_0001_266_266_1.50_1.50.png", "case123"),
        ("103", "case123_day20_slice_0001.png", "case123"),
        ("34", "images/16B0001851_Block_Region_1_0_1_xini_6803_yini_59786.jpg", "16B0001851"),
        ("11", "images/PAT_1516_1765_530.png", "PAT_1516"),
        ("1", "9120059R.jpg", ""),
        ("999", "9120059R.jpg", ""),
    ],
)
def test_groups_from_names(number, image, group):
    assert group_of(number, image) == group


def test_group_patterns_have_one_group_each():
    for row in printed_rows("groups"):
        assert re.compile(row["pattern"]).groups == 1 and row["dataset"] in DATA_NUMBERS
        assert row["names"] in ("patient", "lesion", "slide", "case", "study") and row["naming_as_generally_known"]


def test_groups_of_the_packs_knees_and_children(shared_dir):
    images = {}
    for path in sorted((shared_dir / "data" / "medmat-mini" / "Aggregated_Subsets").glob("*.json")):
        for raw in json.loads(path.read_text("utf-8")):
            images.setdefault((raw["data-no"], "train" in path.name), set()).add(raw["image"])
    split = {train: {group_of("53", image) for image in images["53", train]} for train in (True, False)}
    assert "" not in split[True] | split[False] and not split[True] & split[False]  # SOURCES.md: split by patient
    assert len(split[True] | split[False]) < len(images["53", True] | images["53", False])
    children = images["60", True] | images["60", False]
    assert all(group_of("60", image).startswith("person") == ("person" in image) for image in children)
