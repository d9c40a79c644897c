"""Triplets of the paper's subsets and its published rows; related, unrelated and reduced sets, with properties."""

import csv

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from worlds import SMALL, random_worlds, subset, world

from medcg_jax.data.catalogue import printed_rows
from medcg_jax.data.records import Subset
from medcg_jax.study.design import combos, mat
from medcg_jax.study.design.mat import ELEMENTS, shared
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
    assert shared(subsets["04"], subsets["06"]) == {"modality", "task"}
    assert shared(subsets["03"], subsets["26"]) == {"task"}  # COVID or not is a State too
    assert shared(subsets["02"], subsets["24"]) == set()
    assert shared(subsets["05"], subsets["28"]) == shared(subsets["28"], subsets["05"])


@pytest.mark.parametrize("table", range(3, 9))
def test_published_rows_supply_the_target_and_never_hold_it(table):
    subsets = mat.paper_subsets()
    rows = mat.paper_rows(table)
    assert len(rows) == {3: 42, 4: 9, 5: 8, 6: 8, 7: 8, 8: 8}[table]
    for row in rows:
        target, training = subsets[row.target], [subsets[name] for name in row.related]
        assert row.target not in row.related
        assert combos.supplied(target, training) == set(mat.ELEMENTS), row


def test_published_pairs_fit_their_direction():
    subsets = mat.paper_subsets()
    for row in mat.paper_rows(3):
        given = [set(shared(subsets[name], subsets[row.target])) for name in row.related]
        if (3, row.row) in ODD_ROWS:
            assert sorted(given, key=sorted) == sorted(ODD_ROWS[3, row.row], key=sorted)
            continue
        wanted = combos.PATTERNS[DIRECTIONS[row.direction]]
        fits = any(all(w <= g for w, g in zip(wanted, order, strict=True)) for order in (given, given[::-1]))
        assert fits, (row, given)


def test_tables_are_the_shared_ones(shared_dir):
    lists = {"table9_subsets", "table10_11_datasets"}  # the catalogue has them
    for path in (shared_dir / "paper").glob("table*.csv"):
        read = printed_rows if path.stem in lists else mat.paper_csv
        with open(path, encoding="utf-8") as file:
            assert read(path.stem) == list(csv.DictReader(file)), path.name


# ------------------------------------------------------------------ sets to train on

TARGET = SMALL[0]


def names(subsets):
    return [s.name for s in subsets]


def pairs(target, subsets):
    sets = {direction: combos.combinations(target, subsets, direction) for direction in combos.PAIR_DIRECTIONS}
    return {direction: found for direction, found in sets.items() if found}


def test_small_world():
    assert names(combos.related(TARGET, SMALL)) == names(SMALL[1:7])
    assert names(combos.unrelated(TARGET, SMALL)) == ["mri-brain-stage", "xray-skin-grade"]
    assert names(combos.without(TARGET, SMALL, "modality")) == ["mri-lung-state", "mri-lung-stage", "mri-brain-state"]
    assert names(combos.without(TARGET, SMALL, "area")) == ["ct-brain-state", "ct-skin-stage", "mri-brain-state"]
    assert names(combos.without(TARGET, SMALL, "task")) == ["ct-lung-grade", "ct-skin-stage", "mri-lung-stage"]
    assert names(combos.same_task(TARGET, SMALL)) == ["mri-brain-state"]
    found = {direction: [names(p) for p in sets] for direction, sets in pairs(TARGET, SMALL).items()}
    assert found == {
        "fixed_modality": [["ct-lung-grade", "ct-brain-state"]],
        "fixed_area": [["ct-lung-grade", "mri-lung-state"]],
        "fixed_task": [["ct-brain-state", "mri-lung-state"]],
        "modality_area": [["ct-lung-grade", "mri-brain-state"]],
    }
    assert [names(t) for t in combos.combinations(TARGET, SMALL, "one_each")] == [
        ["ct-skin-stage", "mri-lung-stage", "mri-brain-state"]
    ]
    for element in ELEMENTS:  # each takes 3 of the 6 away: all have the same draw
        kept, counts = combos.random_removal(TARGET, SMALL, element, 0)
        assert (kept, counts) == combos.random_removal(TARGET, SMALL, "task", 0) and counts == (100, 100, 100)
        assert combos.supplied(TARGET, kept) == set(ELEMENTS)


def test_another_subset_of_the_same_triplet_is_never_used():
    twin = (*SMALL, subset("ct-lung-state"))
    twin = (*twin[:-1], twin[-1].__class__("twin", "ct", "lung", "state", num_train=100))
    assert "twin" not in names(combos.usable(TARGET, twin)) + names(combos.related(TARGET, twin))


@given(random_worlds(), st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_properties(drawn, seed):
    subsets, target = drawn
    related, unrelated = combos.related(target, subsets), combos.unrelated(target, subsets)
    sets = [related, unrelated, combos.same_task(target, subsets)]
    sets += [combos.without(target, subsets, element) for element in ELEMENTS]
    sets += [p for group in pairs(target, subsets).values() for p in group]
    sets += combos.combinations(target, subsets, "one_each")
    total = sum(s.num_train for s in related)
    plus = combos.baseline_plus(target, subsets, len(related), total, seed)
    for members in [*sets, plus[0]]:
        assert len(set(names(members))) == len(members)
        for member in members:
            assert member.name != target.name
            assert len(shared(member, target)) < 3
    assert not set(related) & set(unrelated)
    assert set(related) | set(unrelated) == set(combos.usable(target, subsets))
    for element in ELEMENTS:
        assert element not in combos.supplied(target, combos.without(target, subsets, element))
    for sets_of in (*pairs(target, subsets).values(), combos.combinations(target, subsets, "one_each")):
        assert all(combos.supplied(target, members) == set(ELEMENTS) for members in sets_of)
    for element in ELEMENTS:
        own, removal = combos.without(target, subsets, element), combos.random_removal(target, subsets, element, seed)
        assert (removal is None) == (len(own) in (0, len(related)))  # nothing is left, or removed
        if removal is None:
            continue
        kept, counts = removal
        assert len(kept) == len(own) and kept != own and set(kept) <= set(related)
        assert sum(counts) == min(sum(s.num_train for s in own), sum(s.num_train for s in kept))
        # With records to spare there are always as many as without the element.
        more = combos.random_removal(target, subsets, element, seed, {s.name: 10**6 for s in subsets})
        assert more[0] == kept and sum(more[1]) == sum(s.num_train for s in own)


@given(random_worlds(), st.integers(0, 5), st.integers(1, 2000), st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_baseline_plus_has_as_many_records(drawn, seed, wanted, count):
    subsets, target = drawn
    pool = combos.unrelated(target, subsets)
    plus = combos.baseline_plus(target, subsets, count, wanted, seed)
    there = sum(s.num_train for s in pool)
    got = sum(plus[1])
    assert got == min(wanted, there)
    assert set(plus[0]) <= set(pool)
    assert all(n <= s.num_train for s, n in zip(*plus, strict=True))
    assert plus == combos.baseline_plus(target, subsets[::-1], count, wanted, seed)


@given(st.integers(0, 500), st.lists(st.integers(0, 100), max_size=6))
@example(139, [70, 70])
def test_spread(total, capacities):
    parts = combos.spread(total, capacities)
    assert sum(parts) == min(total, sum(capacities))
    free = [p for p, c in zip(parts, capacities, strict=True) if p < c]
    assert not free or max(free) - min(free) <= 1
    assert all(p <= c for p, c in zip(parts, capacities, strict=True))
    # One that gives all it has may have got the odd record.
    assert not free or all(p <= max(free) + 1 for p in parts)


def test_draws_differ_by_seed_and_repeat():
    many = world(*(f"ct-a{i}-state" for i in range(30)), "mri-lung-state", "ct-lung-grade")
    target = subset("ct-lung-state")
    picks = {seed: combos.choose(pairs(target, many)["fixed_area"], "x", target, seed) for seed in range(3)}
    backwards = pairs(target, many)["fixed_area"][::-1]
    assert all(pick == combos.choose(backwards, "x", target, seed) for seed, pick in picks.items())
    removals = {tuple(names(combos.random_removal(target, many, "modality", seed)[0])) for seed in range(4)}
    assert len(removals) == 4
