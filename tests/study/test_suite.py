"""Expansion of tables into cells: golden small worlds, the published rows, pairs with boxes, what no cell may do."""

from collections import Counter
from contextlib import nullcontext
from dataclasses import replace as changed

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import PAPER_ARMS, SMALL, random_worlds, subset, world

from medcg_jax.config import DECIDING_ARMS, TABLES, ConfigError, DataConfig, RunConfig, StudyConfig, replace
from medcg_jax.config_checks import check
from medcg_jax.data.phantom.source import PhantomSource, write_release
from medcg_jax.data.phantom.world import REPORT_TARGETS
from medcg_jax.data.release import ReleaseSource
from medcg_jax.study.design import combos, mat, schedule, suite
from medcg_jax.study.design.mat import shared

RUN = RunConfig()
ALL = tuple(changed(s, num_train=100 + int(s.name), num_test=10) for s in mat.paper_subsets().values())
PAPER, DETECTION = ALL[:37], ALL[37:]
DECIDING = tuple(arm for arm in DECIDING_ARMS if not arm.endswith("_3"))  # of pairs
BOXES = world("ct-lung-det", "mri-brain-det", "mri-lung-det")


def study(source="phantom", model="llava15_tiny", **fields):
    fields = {f"study__{key}": value for key, value in fields.items()}
    return replace(RUN, data__source=source, model__name=model, **fields)


def boxed(source="phantom", model="minigpt_v2_tiny", tables=("detection_pairs",), **fields):
    return study(source, model, tables=tables, **fields)


GOLDEN = """\
pairs.fixed_modality.T.baseline.s0 | fixed_modality/T | baseline |  | T
pairs.fixed_modality.T.baseline_plus.s0 | fixed_modality/T | baseline_plus | mri-brain-stage xray-skin-grade | T
pairs.fixed_modality.T.trained.s0 | fixed_modality/T | trained | ct-lung-grade ct-brain-state | T
pairs.fixed_area.T.baseline.s0 | fixed_area/T | baseline |  | T
pairs.fixed_area.T.baseline_plus.s0 | fixed_area/T | baseline_plus | mri-brain-stage xray-skin-grade | T
pairs.fixed_area.T.trained.s0 | fixed_area/T | trained | ct-lung-grade mri-lung-state | T
pairs.fixed_task.T.baseline.s0 | fixed_task/T | baseline |  | T
pairs.fixed_task.T.baseline_plus.s0 | fixed_task/T | baseline_plus | mri-brain-stage xray-skin-grade | T
pairs.fixed_task.T.trained.s0 | fixed_task/T | trained | ct-brain-state mri-lung-state | T
pairs.modality_area.T.baseline.s0 | modality_area/T | baseline |  | T
pairs.modality_area.T.baseline_plus.s0 | modality_area/T | baseline_plus | mri-brain-stage xray-skin-grade | T
pairs.modality_area.T.trained.s0 | modality_area/T | trained | ct-lung-grade mri-brain-state | T
triples.one_each.T.baseline.s0 | one_each/T | baseline |  | T
triples.one_each.T.baseline_plus.s0 | one_each/T | baseline_plus | mri-brain-stage xray-skin-grade | T
triples.one_each.T.trained.s0 | one_each/T | trained | ct-skin-stage mri-lung-stage mri-brain-state | T
ablation.T.baseline.s0 | T | baseline |  | T
ablation.T.all_related.s0 | T | all_related | ct-lung-grade ct-brain-state mri-lung-state ct-skin-stage \
mri-lung-stage mri-brain-state | T
ablation.T.all_unrelated.s0 | T | all_unrelated | mri-brain-stage xray-skin-grade | T
ablation.T.wo_modality.s0 | T | wo_modality | mri-lung-state mri-lung-stage mri-brain-state | T
ablation.T.wo_area.s0 | T | wo_area | ct-brain-state ct-skin-stage mri-brain-state | T
ablation.T.wo_task.s0 | T | wo_task | ct-lung-grade ct-skin-stage mri-lung-stage | T
ablation.T.random_removal_modality.s0 | T | random_removal_modality | {random} | T
ablation.T.random_removal_area.s0 | T | random_removal_area | {random} | T
ablation.T.random_removal_task.s0 | T | random_removal_task | {random} | T
ablation.T.same_task.s0 | T | same_task | mri-brain-state | T
ablation.T.all_data.s0 | T | all_data | {others} | T
multi_task.in_distribution.baseline.s0 | in_distribution | baseline |  | {inside}
multi_task.in_distribution.multi_task.s0 | in_distribution | multi_task | {others} | {inside}
"""


def line(cell):
    """A cell on one line, T for the target; a subset of which not all 100 records are taken with how many."""
    parts = zip(cell.related, cell.num_records, strict=True)
    training = " ".join(name if count == 100 else f"{name}:{count}" for name, count in parts)
    text = f"{cell.id} | {cell.row} | {cell.arm} | {training} | {' '.join(cell.target)}"
    return text.replace("ct-lung-state", "T")


def test_golden_small_world():
    numbered = [f"efficiency_{n}" for n in (0, 10, 30, 100)]
    run = study(tables=TABLES, targets=("ct-lung-state",), arms=(*PAPER_ARMS, *numbered), efficiency_budget="epochs")
    cells = suite.expand(run, SMALL)
    # All elements take three of the six away: one draw.
    removal, counts = combos.random_removal(SMALL[0], SMALL, "task", 0)
    assert counts == (100, 100, 100)
    inside = " ".join(s.name for s in SMALL[1:])
    golden = GOLDEN.format(random=" ".join(s.name for s in removal), others=inside, inside=inside).splitlines()
    lines = [line(cell) for cell in cells]
    assert lines[: len(golden)] == golden
    rest = lines[len(golden) :]
    singles = [
        f"multi_task.in_distribution.{s.name}.single_task.s0 | in_distribution | single_task | {s.name} | {s.name}"
        for s in SMALL[1:]
    ]
    assert rest[: len(singles)] == singles
    assert [x.split(" | ")[1:3] for x in rest[len(singles) :]] == [
        ["out_of_distribution", "baseline"],
        ["out_of_distribution", "multi_task"],
        *[[f"out_of_distribution/{s.name}", "single_task"] for s in SMALL[1:]],
        *[[f"{curve}/T", arm] for curve in ("with_related", "with_unrelated", "target_only") for arm in numbered],
    ]
    keys = {cell.id: (cell.seed, cell.training) for cell in cells}
    # No record of the target: the efficiency curves start at cells of the ablation, trained once.
    keys = {name.replace("ct-lung-state", "T"): key for name, key in keys.items()}
    assert keys["efficiency.with_related.T.efficiency_0.s0"] == keys["ablation.T.all_related.s0"]
    assert keys["efficiency.target_only.T.efficiency_0.s0"] == keys["ablation.T.baseline.s0"]
    assert keys["pairs.fixed_area.T.baseline_plus.s0"] == keys["ablation.T.all_unrelated.s0"]
    assert keys["multi_task.out_of_distribution.multi_task.s0"] == keys["ablation.T.all_data.s0"]
    assert [cell for cell in cells if (cell.seed, cell.training) == (0, ())][0].total_records == 0


def test_order_is_the_same_and_seeds_stand_together():
    run = study(tables=("pairs", "ablation"), seeds=(3, 1))
    cells = suite.expand(run, SMALL)
    assert cells == suite.expand(run, SMALL)
    assert [c.seed for c in cells[:18]] == [3] * 9 + [1] * 9
    assert len({c.id for c in cells}) == len(cells)
    assert all(set(c.id) <= set("abcdefghijklmnopqrstuvwxyz0123456789._-") for c in cells)


@given(random_worlds(), st.sets(st.integers(0, 3), min_size=1, max_size=2), st.booleans())
@settings(max_examples=40, deadline=None)
def test_no_cell_is_trained_on_its_target(drawn, seeds, named):
    subsets, target = drawn
    by_name = {s.name: s for s in subsets}
    world_ = suite.World(subsets, (target.name,) if named else ())
    for table in (*TABLES, "dose"):
        for cell in (cell for seed in sorted(seeds) for cell in suite._TABLES[table](world_, seed)):
            assert cell.target and len(set(cell.related)) == len(cell.related)
            assert all(0 < n <= by_name[name].num_train for name, n in zip(cell.related, cell.num_records, strict=True))
            if cell.arm.startswith("efficiency") or cell.row.part == "in_distribution":
                continue
            for name in cell.target:
                assert all(len(shared(by_name[other], by_name[name])) < 3 for other in cell.related), cell


@pytest.mark.parametrize(("arm", "part", "refused"), [
    ("trained", "fixed_area", True), ("multi_task", "in_distribution", False), ("multi_task", "out_of_distribution", True)
])  # fmt: skip
def test_a_cell_with_its_target_in_training_is_refused(arm, part, refused):
    with pytest.raises(ValueError, match="a target is among its training subsets") if refused else nullcontext():
        suite.Cell("x", "pairs", suite.Row(part), arm, 0, ("a", "b"), (1, 1), ("b",))


@pytest.mark.parametrize(("table", "row", "text"), [
    ("pairs", suite.Row("fixed_area", "03", (3, 14)), "fixed_area/03/t3r14"),
    ("pairs", suite.Row("fixed_area", "t3r14"), "fixed_area/t3r14"),
    ("efficiency", suite.Row("with_related", "a/b"), "with_related/a/b"),
    ("ablation", suite.Row("", "a/t3r14"), "a/t3r14"), ("multi_task", suite.Row("in_distribution"), "in_distribution"),
])  # fmt: skip
def test_a_row_comes_back_from_its_text(table, row, text):
    assert str(row) == text and suite.Row.parse(table, text) == row


def test_published_rows_become_cells():
    cells = suite.expand(study("release", tables=("pairs", "triples")), PAPER)
    trained = {c.row.published: c for c in cells if c.arm == "trained"}
    assert set(trained) == {(3, i) for i in range(1, 43)} | {(4, i) for i in range(1, 10)}
    for table in (3, 4):
        for row in mat.paper_rows(table):
            cell = trained[table, row.row]
            assert (cell.related, cell.target) == (row.related, (row.target,))
            assert row.confidence in cell.notes
    plus = {c.row.published: c for c in cells if c.arm == "baseline_plus"}
    assert set(plus) == set(trained)
    for key, cell in trained.items():
        assert plus[key].total_records == cell.total_records or "; only " in plus[key].notes


def test_published_rows_only_where_their_subsets_are_there():
    tree = tuple(s for s in PAPER if s.name in ("07", "08", "14", "18", "21"))
    own = (mat.Subset("64", "Der", "Cell", "State Classification", num_train=50, num_test=10),)
    cells = suite.expand(study("release", tables=("pairs",)), tree + own)
    assert {str(c.row) for c in cells} == {"modality_area/08/t3r30", "modality_area/07/t3r33", "modality_area/21/t3r38"}


def test_split_of_the_full_tree_is_the_papers():
    inside, outside = suite.split(suite.World(PAPER, released=True))
    assert tuple(s.name for s in inside) == mat.paper_split()[0]
    assert tuple(s.name for s in outside) == mat.paper_split()[1]


def test_split_of_a_phantom_world_leaves_every_element_in():
    many = world(*(f"m{i}-a{j}-t{k}" for i in range(4) for j in range(4) for k in range(3) if (i + j + k) % 2))
    inside, outside = suite.split(suite.World(many))
    assert round(len(many) / 4) < len(outside) <= round(len(many) * 12 / 37)
    assert all(combos.is_composable(t, inside) for t in outside)
    assert set(inside) | set(outside) == set(many)


def test_matched_samples():
    cells = suite.expand(study(tables=("multi_task",)), tuple(subset(s.name, 50 + i) for i, s in enumerate(SMALL)))
    multi = next(c for c in cells if c.arm == "multi_task")
    per_subset = dict(zip(multi.related, multi.num_records, strict=True))
    outside = next(c.target for c in cells if c.row.part == "out_of_distribution")
    for start, targets in (("in_dist", {(name,) for name in per_subset}), ("out_of_distribution/", {outside})):
        singles = [c for c in cells if c.arm == "single_task" and str(c.row).startswith(start)]
        assert {c.related[0]: c.num_records[0] for c in singles} == per_subset and len(singles) == len(per_subset)
        assert {c.target for c in singles} == targets
    # Each of these models is trained once and tested on both.
    assert len({(c.seed, c.training) for c in cells if c.arm == "single_task"}) == len(per_subset)


def test_baseline_plus_takes_the_records_and_subsets_that_are_asked_for():
    def plus(**fields):
        run = study(tables=("pairs",), targets=("ct-lung-state",), **fields)
        return next(c for c in suite.expand(run, SMALL) if c.arm == "baseline_plus")

    assert plus().num_records == (100, 100)
    assert plus(baseline_plus_records="30").num_records == (15, 15)
    assert sum(plus(baseline_plus_records="30", baseline_plus_subsets="1").num_records) == 30
    assert len(plus(baseline_plus_records="30", baseline_plus_subsets="1").related) == 1
    many = tuple(subset(f"us-skin-grade{i}") for i in range(9))
    run = study(tables=("pairs",), targets=("ct-lung-state",), baseline_plus_subsets="all")
    spread = next(c for c in suite.expand(run, SMALL + many) if c.arm == "baseline_plus")
    assert len(spread.related) == 11 and sum(spread.num_records) == 200


def test_the_efficiency_curve_ends_with_all_that_the_subset_has():
    some = tuple(subset(s.name, 137) for s in SMALL)
    run = study(tables=("efficiency",), targets=("ct-lung-state",), parts=("target_only",))
    assert [c.total_records for c in suite.expand(run, some)] == [0, 10, 30, 100, 137]
    run = replace(run, study__efficiency_records=(5, 137, 300))
    assert [c.arm for c in suite.expand(run, some)] == ["efficiency_5", "efficiency_137"]


def test_parts_of_tables():
    run = study(tables=("pairs",), targets=("ct-lung-state",), arms=PAPER_ARMS)
    whole = suite.expand(run, SMALL)
    some = suite.expand(replace(run, study__parts=("fixed_area", "fixed_task")), SMALL)
    assert some == [c for c in whole if c.row.part in ("fixed_area", "fixed_task")] and len(some) == 6
    with pytest.raises(ConfigError, match="parts: fixed_area, fixed_modality, fixed_task, modality_area"):
        suite.expand(replace(run, study__parts=("fixed",)), SMALL)


def test_unknown_target_and_empty_table():
    with pytest.raises(ConfigError, match="study.targets='ct-lung-cancer'.*ct-lung-state"):
        suite.expand(study(targets=("ct-lung-cancer",)), SMALL)
    with pytest.raises(ConfigError, match="study.tables='pairs': no target"):
        suite.expand(study(), SMALL[:2])


@pytest.mark.parametrize(("model", "table"), [("llava15_13b", 3), ("qwen2_vl_7b", 7), ("llama32_vision_11b", 8)])
def test_pairs_repeat_the_published_table_of_the_models_own_family(model, table):
    cells = suite.expand(replace(study("release"), model__name=model), PAPER)
    found = {cell.row.published for cell in cells} - {None}
    printed = {(table, row.row) for row in mat.paper_rows(table)}
    assert found == printed and len(printed) == {3: 42, 7: 8, 8: 8}[table]


# ------------------------------------------------------------------ tables of boxes


def test_detection_pairs_of_a_small_world():
    cells = suite.expand(boxed(targets=("ct-lung-state",)), SMALL, BOXES)
    parts = {"fixed_modality": "ct-brain-state", "fixed_area": "mri-lung-state", "modality_area": "mri-brain-state"}
    unrelated_boxes, unrelated = "mri-brain-det", "xray-skin-grade"  # a filler has boxes where the member has
    assert [(str(c.row), c.arm, c.related) for c in cells] == [
        (f"{part}/ct-lung-state", arm, related)
        for part, second in parts.items()
        for arm, related in (
            ("baseline", ()),
            ("baseline_plus", (unrelated, unrelated_boxes)),
            ("trained", ("ct-lung-det", second)),
            ("single_1", ("ct-lung-det",)),
            ("single_2", (second,)),
            ("filler_1", ("ct-lung-det", unrelated)),
            ("filler_2", (second, unrelated_boxes)),
            ("words_only", ("mri-brain-state",)),
            ("no_images", ("ct-lung-det", second)),
        )
    ]
    for cell in cells:
        assert cell.has_boxes == any(name.endswith("-det") for name in cell.related)
    assert {c.id for c in cells} >= {"detection_pairs.fixed_area.ct-lung-state.trained.s0"}
    # Baselines are the base itself, and shared with those of the pairs.
    both = suite.expand(boxed(tables=("pairs", "detection_pairs"), targets=("ct-lung-state",)), SMALL, BOXES)
    assert len({(c.seed, c.training) for c in both if c.arm == "baseline"}) == 1
    pairs = suite.expand(boxed(tables=("pairs",), targets=("ct-lung-state",)), SMALL)
    assert [c for c in both if c.table == "pairs"] == pairs
    # A member alone is the same training beside boxes and beside questions.
    jobs = schedule.jobs_of(both, boxed())
    alone = next(job for job in jobs if job.training == (("ct-brain-state", 100),))
    assert {(c.table, c.arm) for c in alone.cells} >= {("pairs", "single_2"), ("detection_pairs", "single_2")}
    assert not alone.has_boxes


def test_detection_subsets_are_in_no_other_table_and_no_target():
    others = boxed(tables=("pairs", "triples", "ablation", "multi_task", "efficiency"), targets=("ct-lung-state",))
    assert suite.expand(others, SMALL, BOXES) == suite.expand(others, SMALL)
    with pytest.raises(ConfigError, match="study.targets='ct-lung-det': expected one of ct-lung-state"):
        suite.expand(boxed(targets=("ct-lung-det",)), SMALL, BOXES)
    with pytest.raises(ConfigError, match="study.tables='detection_pairs': no target has the related subsets"):
        suite.expand(boxed(), SMALL)
    check(boxed())
    with pytest.raises(ConfigError, match="study.tables='boxes': expected one of pairs, .*detection_pairs"):
        check(boxed(tables=("boxes",)))


def test_detection_holds_out_what_the_targets_name_if_its_elements_are_left():
    boxes = world("ct-lung-det", "ct-brain-det", "mri-lung-det", "mri-brain-det")
    cells = suite.expand(boxed(tables=("detection",), targets=("ct-lung-state",)), SMALL, boxes)
    inside = ("ct-brain-det", "mri-lung-det", "mri-brain-det")
    assert [(str(c.row), c.arm, c.related, c.target) for c in cells] == [
        ("in_distribution", "baseline", (), inside),
        ("in_distribution", "multi_task", inside, inside),
        ("out_of_distribution", "baseline", (), ("ct-lung-det",)),
        ("out_of_distribution", "multi_task", inside, ("ct-lung-det",)),
    ]
    assert len({(c.seed, c.training) for c in cells}) == 2
    # Without targets the first that can be held out; without such a one, nothing is.
    anyone = suite.expand(boxed(tables=("detection",)), SMALL, boxes)
    assert {c.target for c in anyone if c.row.part == "out_of_distribution"} == {("ct-lung-det",)}
    lone = suite.expand(boxed(tables=("detection",), targets=("ct-lung-state",)), SMALL, boxes[:2])
    assert {c.row.part for c in lone} == {"in_distribution"}


@given(random_worlds(), st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_held_out_boxes_are_never_trained_on_and_keep_their_elements(drawn, seed):
    subsets, _ = drawn
    boxes = tuple(changed(s, name=f"{s.name}-det") for s in subsets)
    by_name = {s.name: s for s in boxes}
    for cell in suite.detection(suite.World(subsets, boxes=boxes), seed):
        related = [by_name[name] for name in cell.related]
        if cell.row.part == "out_of_distribution":
            assert not set(cell.related) & set(cell.target)
            for name in cell.target if related else ():
                assert combos.supplied(by_name[name], related) == set(mat.ELEMENTS)
        elif related:
            assert cell.related == cell.target


def test_only_the_detection_subsets_that_are_asked_for_are_used():
    run = boxed(tables=("detection",), box_subsets=("ct-liver-det", "mri-liver-det", "ct-brain-det"))
    run = replace(run, data__train_records_per_subset=4, data__test_records_per_subset=4)
    used = {name for cell in schedule.make_plan(run).cells for name in (*cell.related, *cell.target)}
    assert used == {"ct-liver-det", "mri-liver-det", "ct-brain-det"}
    with pytest.raises(ValueError, match="subset 'ct-livr-det' does not exist; did you mean ct-liver-det"):
        schedule.make_plan(replace(run, study__box_subsets=("ct-livr-det",)))


@given(random_worlds(), random_worlds(), st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_every_pair_has_one_of_each_and_supplies_the_target(drawn, other, seed):
    subsets, target = drawn
    boxes = tuple(changed(s, name=f"{s.name}-det") for s in other[0])
    for direction in combos.PAIR_DIRECTIONS:
        for pair in combos.detection_pairs(target, subsets, boxes, direction):
            assert sorted(s.name.endswith("-det") for s in pair) == [False, True]
            assert combos.supplied(target, pair) == set(mat.ELEMENTS)
            assert all(len(shared(s, target)) < 3 for s in pair)
    asked = suite.World(subsets, (target.name,), boxes=boxes)
    by_name = {s.name: s for s in (*subsets, *boxes)}
    for cell in suite.detection_pairs(asked, seed):
        assert cell.target == (target.name,)
        assert all(len(shared(by_name[name], target)) < 3 for name in cell.related)
        if cell.arm in ("trained", "baseline_plus", "filler_1", "filler_2") and "only" not in cell.notes:
            # More subsets where one holds too few records, and as many records with boxes as the pair has.
            with_boxes = [name for name in cell.related if name.endswith("-det")]
            assert with_boxes and len(with_boxes) < len(cell.related)


@pytest.mark.parametrize(("model", "table"), [("minigpt_v2_7b", 6), ("next_chat_7b_336", 5)])
def test_published_detection_rows_become_cells(model, table):
    cells = suite.expand(boxed("release", model), PAPER, DETECTION)
    trained = {c.row.published: c for c in cells if c.arm == "trained"}
    assert set(trained) == {(table, i) for i in range(1, 9)}
    # Two rows have a member with the target's whole triplet: neither alone nor with unrelated records.
    assert Counter(c.arm for c in cells) == {
        arm: 6 if arm in ("single_1", "filler_1") else 8 for arm in ("baseline", "baseline_plus", "trained", *DECIDING)
    }
    for row in mat.paper_rows(table):
        cell = trained[table, row.row]
        assert (cell.related, cell.target) == (row.related, (row.target,)) and row.confidence in cell.notes
        by_name = mat.paper_subsets()
        assert [name in {s.name for s in DETECTION} for name in row.related] == [True, False]
        # The paper's own 49 (X-ray, Bones, Spinal Anomaly Det) counts as diseases of bones, which its target 27 is:
        # the two rows with it are kept as printed, and no derived row has such a pair.
        whole = [name for name in row.related if len(shared(by_name[name], by_name[row.target])) == 3]
        assert whole == (["49"] if row.row in (3, 4) else [])
    printed = mat.paper_csv({5: "table5_nextchat_detection", 6: "table6_minigptv2_detection"}[table])
    assert [int(row["row"]) for row in printed] == list(range(1, 9))


def test_phantoms_have_three_directions_for_every_target():
    source = PhantomSource(0, 12, 8)
    run = boxed(targets=REPORT_TARGETS, seeds=(0, 1))
    cells = suite.expand(run, source.subsets, source.detection_subsets)
    rows = {c.row.part for c in cells}
    assert rows == {"fixed_modality", "fixed_area", "modality_area"}
    assert len(cells) == 8 * 3 * 2 * 9
    for cell in (c for c in cells if c.arm == "trained"):
        det, _ = cell.related
        assert det == "-".join([*cell.target[0].split("-")[:2], "det"]) and cell.num_records == (12, 12)


def test_the_plan_takes_detection_subsets_from_the_source():
    run = replace(
        boxed(targets=(REPORT_TARGETS[0],)), data__train_records_per_subset=12, data__test_records_per_subset=8
    )
    plan = schedule.make_plan(replace(run, study__arms=("baseline", "trained")))
    assert [c.arm for c in plan.cells] == ["baseline", "trained"] * 3 and len(plan.jobs) == 4
    assert all("ct-brain-det" in c.related for c in plan.cells if c.arm == "trained")


def test_the_packs_rows(shared_dir):
    source = ReleaseSource(shared_dir / "data" / "medmat-mini", DataConfig(source="release"))
    cells = suite.expand(boxed("release"), source.subsets, source.detection_subsets)
    trained = {str(c.row): c for c in cells if c.arm == "trained"}
    # The one published row whose subsets it has, and rows by rule for its own subsets.
    published = trained["modality_area/08/t6r7"]
    assert (published.related, published.num_records, published.target) == (("38", "14"), (350, 280), ("08",))
    assert [str(c.row) for c in trained.values() if c.row.published] == ["modality_area/08/t6r7"]
    for cell in (c for row, c in trained.items() if "/t6" not in row):
        assert set(cell.related) & {"38", "43", "47", "63"} and cell.target[0] >= "60"
    assert trained["fixed_area/64"].related == ("47", "67")


def test_a_tree_with_broken_boxes_still_has_its_other_tables(tmp_path):
    write_release(PhantomSource(0, 4, 4), tmp_path / "tree")
    (tmp_path / "tree" / "Subset--38-det-train.json").write_text("{]")
    data = {"data__source": "release", "data__root": str(tmp_path / "tree")}
    run = replace(RunConfig(study=StudyConfig(targets=REPORT_TARGETS[:1])), **data)
    assert schedule.make_plan(run).cells
    with pytest.raises(ValueError, match="Subset--38-det-train.json: no JSON"):
        schedule.make_plan(replace(run, model__name="minigpt_v2_tiny", study__tables=("detection_pairs",)))


def test_a_model_without_boxes_is_refused():
    with pytest.raises(
        ConfigError, match="study.tables='detection_pairs': qwen2_vl_tiny gives no boxes; minigpt_v2, next_chat do"
    ):
        suite.expand(boxed(model="qwen2_vl_tiny", targets=("ct-lung-state",)), SMALL, BOXES)
