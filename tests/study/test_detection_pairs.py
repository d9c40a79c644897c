"""Pairs of a detection subset and one of choice questions: small worlds, the published rows, phantoms and the pack."""

from dataclasses import replace as changed
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import SMALL, random_worlds, world

from medcg_jax.config import ConfigError, DataConfig, RunConfig, StudyConfig, replace
from medcg_jax.config_checks import check
from medcg_jax.config_file import load
from medcg_jax.data.phantom.source import PhantomSource
from medcg_jax.data.phantom.world import REPORT_TARGETS
from medcg_jax.data.release import ReleaseSource
from medcg_jax.study.design import combos, mat, schedule, suite
from medcg_jax.study.design.mat import shared

BOXES = world("ct-lung-det", "mri-brain-det", "mri-lung-det")
PAPER = tuple(changed(s, num_train=100, num_test=10) for s in mat.paper_subsets().values())
CHOICE, DETECTION = PAPER[:37], PAPER[37:]


def study(source="phantom", model="minigpt_v2_tiny", **fields):
    fields = {f"study__{key}": value for key, value in {"tables": ("detection_pairs",), **fields}.items()}
    return replace(RunConfig(), data__source=source, model__name=model, **fields)


def test_small_world():
    cells = suite.expand(study(targets=("ct-lung-state",)), SMALL, BOXES)
    assert [(c.row, c.arm, c.related) for c in cells] == [
        ("fixed_modality/ct-lung-state", "baseline", ()),
        ("fixed_modality/ct-lung-state", "trained", ("ct-lung-det", "ct-brain-state")),
        ("fixed_area/ct-lung-state", "baseline", ()),
        ("fixed_area/ct-lung-state", "trained", ("ct-lung-det", "mri-lung-state")),
        ("modality_area/ct-lung-state", "baseline", ()),
        ("modality_area/ct-lung-state", "trained", ("ct-lung-det", "mri-brain-state")),
    ]
    assert {c.id for c in cells} >= {"detection_pairs.fixed_area.ct-lung-state.trained.s0"}
    # Baselines are the base itself, and shared with those of the pairs.
    both = suite.expand(study(tables=("pairs", "detection_pairs"), targets=("ct-lung-state",)), SMALL, BOXES)
    assert len({c.training_key for c in both if c.arm == "baseline"}) == 1
    pairs = suite.expand(study(tables=("pairs",), targets=("ct-lung-state",)), SMALL)
    assert [c for c in both if c.table == "pairs"] == pairs


def test_detection_subsets_are_in_no_other_table_and_no_target():
    others = study(tables=("pairs", "triples", "ablation", "multi_task", "efficiency"), targets=("ct-lung-state",))
    assert suite.expand(others, SMALL, BOXES) == suite.expand(others, SMALL)
    with pytest.raises(ConfigError, match="study.targets='ct-lung-det': one of ct-lung-state"):
        suite.expand(study(targets=("ct-lung-det",)), SMALL, BOXES)
    with pytest.raises(ConfigError, match="study.tables='detection_pairs': no target has the related subsets"):
        suite.expand(study(), SMALL)
    check(study())
    with pytest.raises(ConfigError, match="study.tables='boxes': one of pairs, .*detection_pairs"):
        check(study(tables=("boxes",)))


def test_detection_holds_out_what_the_targets_name_if_its_elements_are_left():
    boxes = world("ct-lung-det", "ct-brain-det", "mri-lung-det", "mri-brain-det")
    cells = suite.expand(study(tables=("detection",), targets=("ct-lung-state",)), SMALL, boxes)
    inside = ("ct-brain-det", "mri-lung-det", "mri-brain-det")
    assert [(c.row, c.arm, c.related, c.target) for c in cells] == [
        ("in_distribution", "baseline", (), inside),
        ("in_distribution", "multi_task", inside, inside),
        ("out_of_distribution", "baseline", (), ("ct-lung-det",)),
        ("out_of_distribution", "multi_task", inside, ("ct-lung-det",)),
    ]
    assert len({c.training_key for c in cells}) == 2
    # Without targets the first that can be held out; without such a one, nothing is.
    anyone = suite.expand(study(tables=("detection",)), SMALL, boxes)
    assert {c.target for c in anyone if c.row == "out_of_distribution"} == {("ct-lung-det",)}
    lone = suite.expand(study(tables=("detection",), targets=("ct-lung-state",)), SMALL, boxes[:2])
    assert {c.row for c in lone} == {"in_distribution"}


@given(random_worlds(), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_held_out_boxes_are_never_trained_on_and_keep_their_elements(drawn, seed):
    subsets, _ = drawn
    boxes = tuple(changed(s, name=f"{s.name}-det") for s in subsets)
    by_name = {s.name: s for s in boxes}
    for cell in suite.detection(suite.World(subsets, boxes=boxes), seed):
        related = [by_name[name] for name in cell.related]
        if cell.row == "out_of_distribution":
            assert not set(cell.related) & set(cell.target)
            for name in cell.target if related else ():
                assert combos.supplied(by_name[name], related) == set(mat.ELEMENTS)
        elif related:
            assert cell.related == cell.target


def test_only_the_detection_subsets_that_are_asked_for_are_used():
    run = study(tables=("detection",), box_subsets=("ct-liver-det", "mri-liver-det", "ct-brain-det"))
    run = replace(run, data__train_records_per_subset=4, data__test_records_per_subset=4)
    used = {name for cell in schedule.make_plan(run).cells for name in (*cell.related, *cell.target)}
    assert used == {"ct-liver-det", "mri-liver-det", "ct-brain-det"}
    with pytest.raises(ValueError, match="subset 'ct-livr-det' does not exist; did you mean ct-liver-det"):
        schedule.make_plan(replace(run, study__box_subsets=("ct-livr-det",)))


@given(random_worlds(), random_worlds(), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_every_pair_has_one_of_each_and_supplies_the_target(drawn, other, seed):
    subsets, target = drawn
    boxes = tuple(changed(s, name=f"{s.name}-det") for s in other[0])
    for direction in combos.PAIR_DIRECTIONS:
        for pair in combos.detection_pairs(target, subsets, boxes, direction):
            assert sorted(s.name.endswith("-det") for s in pair) == [False, True]
            assert combos.supplied(target, pair) == set(mat.ELEMENTS)
            assert all(len(shared(s, target)) < 3 for s in pair)
    asked = suite.World(subsets, (target.name,), boxes=boxes)
    for cell in suite.detection_pairs(asked, seed):
        assert cell.target == (target.name,) and cell.arm in ("baseline", "trained")
        assert len(cell.related) == (2 if cell.arm == "trained" else 0)


@pytest.mark.parametrize(("model", "table"), [("minigpt_v2_7b", 6), ("next_chat_7b_336", 5)])
def test_published_rows_become_cells(model, table):
    cells = suite.expand(study("release", model), CHOICE, DETECTION)
    trained = {suite.paper_row(c.row): c for c in cells if c.arm == "trained"}
    assert set(trained) == {(table, i) for i in range(1, 9)} and len(cells) == 16
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


def test_both_tables_have_the_same_rows():
    assert [(r.related, r.target) for r in mat.paper_rows(5)] == [(r.related, r.target) for r in mat.paper_rows(6)]
    assert set(suite.DETECTION_TABLES.values()) == {5, 6}


def test_phantoms_have_three_directions_for_every_target():
    source = PhantomSource(0, 12, 8)
    run = study(targets=REPORT_TARGETS, seeds=(0, 1))
    cells = suite.expand(run, source.subsets, source.detection_subsets)
    rows = {c.row.split("/")[0] for c in cells}
    assert rows == {"fixed_modality", "fixed_area", "modality_area"}
    assert len(cells) == 8 * 3 * 2 * 2
    for cell in (c for c in cells if c.arm == "trained"):
        det, _ = cell.related
        assert det == "-".join([*cell.target[0].split("-")[:2], "det"]) and cell.num_records == (12, 12)


def test_the_plan_takes_detection_subsets_from_the_source():
    run = replace(
        study(targets=("ct-liver-stage",)), data__train_records_per_subset=12, data__test_records_per_subset=8
    )
    plan = schedule.make_plan(run)
    assert [c.arm for c in plan.cells] == ["baseline", "trained"] * 3 and len(plan.jobs) == 4
    assert all("ct-liver-det" in c.related for c in plan.cells if c.arm == "trained")


def test_the_packs_rows(shared_dir):
    source = ReleaseSource(shared_dir / "data" / "medmat-mini", DataConfig(source="release"))
    cells = suite.expand(study("release"), source.subsets, source.detection_subsets)
    trained = {c.row: c for c in cells if c.arm == "trained"}
    # The one published row whose subsets it has, and rows by rule for its own subsets.
    published = trained["modality_area/08/t6r7"]
    assert (published.related, published.num_records, published.target) == (("38", "14"), (350, 280), ("08",))
    assert [row for row in trained if suite.paper_row(row)] == ["modality_area/08/t6r7"]
    for cell in (c for row, c in trained.items() if "/t6" not in row):
        assert set(cell.related) & {"38", "43", "47", "63"} and cell.target[0] >= "60"
    assert ("47", "67") == trained["fixed_area/64"].related


def test_a_tree_with_broken_boxes_still_has_its_other_tables(tmp_path):
    from medcg_jax.data.phantom.source import write_release

    write_release(PhantomSource(0, 4, 4), tmp_path / "tree")
    (tmp_path / "tree" / "Subset--38-det-train.json").write_text("{]")
    data = {"data__source": "release", "data__root": str(tmp_path / "tree")}
    run = replace(RunConfig(study=StudyConfig(targets=("ct-liver-stage",))), **data)
    assert schedule.make_plan(run).cells
    with pytest.raises(ValueError, match="Subset--38-det-train.json: no JSON"):
        schedule.make_plan(replace(run, model__name="minigpt_v2_tiny", study__tables=("detection_pairs",)))


def test_a_model_without_boxes_is_refused():
    with pytest.raises(
        ConfigError, match="study.tables='detection_pairs': qwen2_vl_tiny gives no boxes; next_chat, minigpt_v2 do"
    ):
        suite.expand(study(model="qwen2_vl_tiny", targets=("ct-lung-state",)), SMALL, BOXES)


@pytest.mark.parametrize(
    ("config", "table", "rows"),
    [("llava15_7b", 3, 42), ("next_chat_7b", 5, 8), ("minigpt_v2_7b", 6, 8), ("qwen2_vl_7b", 7, 8),
     ("llama32_vision_11b", 8, 8)],
)  # fmt: skip
def test_each_full_size_config_runs_the_published_rows_of_its_model(config, table, rows):
    run = load(str(Path(__file__).parents[2] / "configs" / f"{config}.py"))
    found = {suite.paper_row(c.row) for c in suite.expand(run, CHOICE, DETECTION) if c.arm == "trained"}
    assert found == {(table, row) for row in range(1, rows + 1)}
