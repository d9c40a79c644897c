"""What printed rows share with their targets, beside what a methods review found by hand."""

from collections import Counter

import pytest
from worlds import subset

from medcg_jax.study.design import combos, mat, overlap
from medcg_jax.study.design.suite import DIRECTIONS

WHOLE = {
    *((3, row) for row in (11, 12, 13, 15, 16)), (5, 3), (5, 4), (6, 3), (6, 4),
    *((table, row) for table in (7, 8) for row in (2, 3, 4)),
}  # fmt: skip
NOT_ITS_DIRECTION = {*((3, row) for row in (23, 25, 28, 29)), (7, 5), (7, 6), (8, 5), (8, 6)}
TWO = {(4, row) for row in (4, 5, 6, 7, 9)}
PAIR_ROWS = 42 + 4 * 8


def test_the_rows_that_a_review_names():
    found = overlap.printed_lapses()
    assert {key for key, name in found.items() if name == overlap.WHOLE} == WHOLE and len(WHOLE) == 15
    assert {key for key, name in found.items() if name == overlap.PATTERN} == NOT_ITS_DIRECTION
    assert {key for key, name in found.items() if name == overlap.TWO} == TWO
    assert Counter(table for table, _ in found if table != 4).total() == 23 and PAIR_ROWS == 74
    assert overlap.printed_repeats() == {(3, 16), (7, 4), (8, 4)}


def test_what_each_member_shares():
    target = subset("ct-lung-grade")
    training = [subset(name) for name in ("ct-lung-state", "xray-brain-grade", "xray-brain-state")]
    assert overlap.overlap(target, training) == ("MA", "T", "–")
    by_number = mat.paper_subsets()
    # 28 and 30 are both X-ray, Lung, Diseases by the task table.
    assert overlap.overlap(by_number["30"], [by_number["28"], by_number["29"]]) == ("MAT", "MT")


@pytest.mark.parametrize(
    ("direction", "training", "expected"),
    [
        ("fixed_modality", ("ct-lung-state", "ct-brain-grade"), ""),
        ("fixed_modality", ("ct-brain-grade", "ct-lung-state"), ""),
        ("fixed_modality", ("ct-lung-state", "xray-brain-grade"), overlap.PATTERN),
        ("fixed_modality", ("ct-lung-grade", "ct-brain-grade"), overlap.WHOLE),
        ("modality_area", ("ct-lung-state", "xray-lung-grade"), ""),
        ("one_each", ("ct-brain-state", "xray-lung-state", "mri-skin-grade"), ""),
        ("one_each", ("ct-brain-state", "xray-lung-state", "mri-lung-grade"), overlap.TWO),
        ("one_each", ("ct-brain-state", "xray-lung-state", "mri-skin-state"), overlap.PATTERN),
    ],
)
def test_lapses(direction, training, expected):
    assert overlap.lapse(subset("ct-lung-grade"), [subset(name) for name in training], direction) == expected


def test_another_task_table_is_seen(monkeypatch):
    """Were tuberculosis no disease, rows 11 to 13 would train on no subset with the target's triplet."""
    elements = dict(mat._task_elements()) | {"Tuberculosis Classification": ("State",)}
    monkeypatch.setattr(mat, "_task_elements", lambda: elements)
    by_number = mat.paper_subsets()
    row = mat.paper_rows(3)[10]
    training = [by_number[name] for name in row.related]
    assert overlap.overlap(by_number[row.target], training) == ("MAT", "M")  # 28 is a State, too
    elements["Tuberculosis Classification"] = ("Tuberculosis",)
    assert overlap.lapse(by_number[row.target], training, DIRECTIONS[row.direction]) == overlap.PATTERN
    assert combos.supplied(by_number[row.target], training) == {"modality", "area"}
