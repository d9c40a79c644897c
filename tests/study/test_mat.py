"""Triplets of the paper's subsets, and every published row read as subset numbers."""

import csv

import pytest

from medcg_jax.data.catalogue import printed_rows
from medcg_jax.data.records import Subset
from medcg_jax.study.design import combos, mat
from medcg_jax.study.design.suite import DIRECTIONS

# Rows whose reading does not fit its printed direction, with what the two subsets do share with the target.
ODD_ROWS = {
    (3, 23): [{"area"}, {"modality", "task"}],
    (3, 25): [{"area", "task"}, {"modality"}],
    (3, 28): [{"area"}, {"modality", "task"}],
    (3, 29): [{"area"}, {"modality", "task"}],
}


def test_the_53_subsets():
    subsets = mat.paper_subsets()
    assert list(subsets) == [f"{i:02d}" for i in range(1, 54)]
    assert subsets["53"] == Subset("53", "FP", "Fundus", "Optic Disc Seg")


def test_every_task_of_table_9_has_elements_and_a_reason():
    listed = {row["task"]: row for row in mat.paper_csv("task_elements")}
    assert {subset.task for subset in mat.paper_subsets().values()} <= listed.keys()
    assert all(row["elements"] and len(row["reason"]) >= 5 for row in listed.values())
    assert mat.task_elements("COVID-19 Classification") == ("COVID", "State")
    assert mat.task_elements("grade") == ("grade",)


def test_split_of_tables_1_and_2():
    inside, outside = mat.paper_split()
    assert (len(inside), len(outside)) == (25, 12)
    assert not set(inside) & set(outside)
    assert set(inside) | set(outside) == {f"{i:02d}" for i in range(1, 38)}
    for own, name in ((inside, "table1_in_distribution"), (outside, "table2_out_of_distribution")):
        assert set(own) == {row["subset"] for row in mat.paper_csv(name)}


def test_shared_elements():
    subsets = mat.paper_subsets()
    assert mat.shared(subsets["04"], subsets["06"]) == {"modality", "task"}
    assert mat.shared(subsets["03"], subsets["26"]) == {"task"}  # COVID or not is a State too
    assert mat.shared(subsets["02"], subsets["24"]) == set()
    assert mat.shared(subsets["05"], subsets["28"]) == mat.shared(subsets["28"], subsets["05"])


@pytest.mark.parametrize("table", range(3, 9))
def test_published_rows_supply_the_target_and_never_hold_it(table):
    subsets = mat.paper_subsets()
    rows = mat.paper_rows(table)
    assert len(rows) == {3: 42, 4: 9, 5: 8, 6: 8, 7: 8, 8: 8}[table]
    for row in rows:
        target, training = subsets[row.target], [subsets[name] for name in row.related]
        assert row.target not in row.related
        assert combos.supplied(target, training) == set(mat.ELEMENTS), row


@pytest.mark.parametrize("row", mat.paper_rows(3), ids=lambda row: f"row{row.row}")
def test_published_pairs_fit_their_direction(row):
    subsets = mat.paper_subsets()
    given = [set(mat.shared(subsets[name], subsets[row.target])) for name in row.related]
    if (3, row.row) in ODD_ROWS:
        assert sorted(given, key=sorted) == sorted(ODD_ROWS[3, row.row], key=sorted)
        return
    wanted = combos.PATTERNS[DIRECTIONS[row.direction]]
    fits = any(all(w <= g for w, g in zip(wanted, order, strict=True)) for order in (given, given[::-1]))
    assert fits, (row, given)


def test_tables_are_the_shared_ones(shared_dir):
    lists = {"table9_subsets", "table10_11_datasets"}  # the catalogue has them
    for path in (shared_dir / "paper").glob("*.csv"):
        read = printed_rows if path.stem in lists else mat.paper_csv
        with open(path, encoding="utf-8") as file:
            assert read(path.stem) == list(csv.DictReader(file)), path.name
