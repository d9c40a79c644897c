"""The arms that tell composition from transfer, removals of equal size, curves at equal updates and doses, as cells."""

from dataclasses import replace as changed

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import SMALL, random_worlds, subset, world

from medcg_jax.config import ARMS, DECIDING_ARMS, ConfigError, RunConfig, replace
from medcg_jax.config_checks import check
from medcg_jax.data.records import Subset
from medcg_jax.study.design import arms, combos, mat, schedule, suite
from medcg_jax.study.design.leaks import check_cell
from medcg_jax.study.design.mat import ELEMENTS, shared

RUN = replace(RunConfig(), train__epochs=2.0)
ROWS = ("pairs", "triples", "detection_pairs")
PLENTY = {s.name: 10**6 for s in SMALL}


def study(**fields):
    return replace(RUN, **{f"study__{key}": value for key, value in fields.items()})


def row_of(cells, part):
    """Arm -> {subset: records} of the cells of one row."""
    return {c.arm: dict(zip(c.related, c.num_records, strict=True)) for c in cells if c.row.part == part}


def jobs_by_cell(cells, run=RUN):
    return {cell.id: job for job in schedule.jobs_of(cells, run) for cell in job.cells}


# ------------------------------------------------------------------ two rows by hand


def test_the_arms_of_a_pair():
    cells = suite.expand(study(tables=("pairs",), targets=("ct-lung-state",)), SMALL, (), {s.name: 300 for s in SMALL})
    a, b, unrelated = "ct-lung-grade", "mri-lung-state", "xray-skin-grade"
    assert row_of(cells, "fixed_area") == {
        "baseline": {},
        "baseline_plus": {"mri-brain-stage": 100, unrelated: 100},
        "trained": {a: 100, b: 100},
        "single_1": {a: 200},
        "single_2": {b: 200},
        "filler_1": {a: 100, unrelated: 100},
        "filler_2": {b: 100, unrelated: 100},
        "words_only": {"mri-brain-state": 200},
        "no_images": {a: 100, b: 100},
    }
    row = [c for c in cells if c.row.part == "fixed_area"]
    assert [c.arm for c in row if c.blank] == ["no_images"]
    jobs = jobs_by_cell(cells)
    assert [jobs[c.id].steps for c in row] == [0] + [13] * 8  # 2 epochs of 200 records in batches of 32
    assert jobs["pairs.fixed_area.ct-lung-state.no_images.s0"] != jobs["pairs.fixed_area.ct-lung-state.trained.s0"]
    # The same member alone, and the same fillers, in another row of the target.
    for arm in ("single_1", "filler_1", "words_only", "baseline_plus"):
        assert jobs[f"pairs.fixed_area.ct-lung-state.{arm}.s0"] is jobs[f"pairs.fixed_modality.ct-lung-state.{arm}.s0"]


def test_the_arms_of_a_triple_of_unequal_sizes():
    sizes = {"ct-skin-stage": 40, "mri-lung-stage": 100, "mri-brain-state": 60}
    unequal = tuple(changed(s, num_train=sizes.get(s.name, 100)) for s in SMALL)
    available = {s.name: s.num_train for s in unequal} | {"ct-skin-stage": 120, "mri-lung-stage": 1000}
    run = study(tables=("triples",), targets=("ct-lung-state",))
    cells = suite.expand(run, unequal, (), available)
    a, b, c = sizes
    assert row_of(cells, "one_each") == {
        "baseline": {},
        "baseline_plus": {"mri-brain-stage": 100, "xray-skin-grade": 100},
        "trained": {a: 40, b: 100, c: 60},
        "single_1": {a: 120},
        "single_2": {b: 200},
        "single_3": {c: 60},
        "filler_1": {a: 40, "mri-brain-stage": 80, "xray-skin-grade": 80},
        "filler_2": {b: 100, "mri-brain-stage": 50, "xray-skin-grade": 50},
        "filler_3": {c: 60, "mri-brain-stage": 70, "xray-skin-grade": 70},
        "words_only": {c: 60},
        "no_images": {a: 40, b: 100, c: 60},
    }
    short = {c.arm: c.notes.rpartition("; ")[2] for c in cells if "only " in c.notes}
    assert short == {
        "single_1": "only 120 records for 200", "single_3": "only 60 records for 200",
        "words_only": "only 60 records for 200",
    }  # fmt: skip
    assert list(suite.short_of_records(cells).values()) == [[120, 200], [60, 200], [60, 200]]
    # Fewer records, as many updates.
    assert {job.steps for job in schedule.jobs_of(cells, run) if job.training} == {13}


def test_an_arm_that_cannot_be_had_is_absent_and_said():
    without = tuple(s for s in SMALL if s.name not in ("mri-brain-state", "mri-brain-stage", "xray-skin-grade"))
    cells = suite.expand(study(tables=("pairs",), targets=("ct-lung-state",)), without)
    row = [c for c in cells if c.row.part == "fixed_area"]
    assert [c.arm for c in row] == ["baseline", "trained", "single_1", "single_2", "no_images"]
    reasons = row[1].notes.split("; ")[1:]
    assert [reason.partition(":")[0] for reason in reasons] == [
        "no baseline_plus", "no filler_1", "no filler_2", "no words_only"
    ]  # fmt: skip
    assert reasons[-1] == "no words_only: no subset shares the task alone"
    # What was not asked for is not missed.
    asked = study(tables=("pairs",), targets=("ct-lung-state",), arms=("trained", "single_1"))
    assert not any("no " in c.notes for c in suite.expand(asked, without))


def test_printed_rows_with_the_targets_whole_triplet_have_no_arm_of_that_member_alone():
    """Table 3 has rows with a member of the target's three elements, such as 28 (X-ray, Lung, Diseases)."""
    subsets = tuple(changed(s, num_train=100) for s in mat.paper_subsets().values() if not mat.has_boxes(s))
    by_name = {s.name: s for s in subsets}
    cells = suite.expand(replace(study(tables=("pairs",)), data__source="release"), subsets)
    rows: dict = {}
    for cell in cells:
        check_cell(cell, by_name)  # the guard passes all that is left
        rows.setdefault(cell.row, {})[cell.arm] = cell
    whole = 0
    for row in rows.values():
        for k, name in enumerate(row["trained"].related, 1):
            is_whole = len(shared(by_name[name], by_name[row["trained"].target[0]])) == 3
            assert row.keys().isdisjoint({f"single_{k}", f"filler_{k}"}) == is_whole
            reason = f"no single_{k}: subset {name} has modality, area and task of the target"
            assert (reason in row["trained"].notes) == is_whole
            if is_whole:
                whole += 1
                alone = changed(row[f"single_{3 - k}"], related=(name,), num_records=(200,))
                with pytest.raises(ConfigError, match=f"holds subset {name}, which has modality, area and task"):
                    check_cell(alone, by_name)
        assert row["trained"].related == row["no_images"].related
    assert whole >= 3


# ------------------------------------------------------------------ properties


@st.composite
def sized_worlds(draw):
    """(subsets, boxes, target, available): the first half of more records than the subsets give to a set."""
    subsets, target = draw(random_worlds())
    boxes = tuple(changed(s, name=f"{s.name}-det") for s in draw(random_worlds())[0])
    spare = draw(st.integers(1, 4))
    return subsets, boxes, target, {s.name: spare * s.num_train for s in (*subsets, *boxes)}


@given(sized_worlds(), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_no_arm_holds_the_targets_triplet_and_totals_are_equal(drawn, seed):
    subsets, boxes, target, available = drawn
    by_name = {s.name: s for s in (*subsets, *boxes)}
    world_ = suite.World(subsets, (target.name,), boxes=boxes, available=available)
    for table in ROWS:
        cells = list(suite._TABLES[table](world_, seed))
        totals = {c.row: c.total_records for c in cells if c.arm == "trained"}
        for cell in cells:
            used = [by_name[name] for name in cell.related]
            assert all(len(shared(s, target)) < 3 for s in used), cell
            assert all(0 < n <= available[s.name] for s, n in zip(used, cell.num_records, strict=True)), cell
            if cell.arm in DECIDING_ARMS or cell.arm == "baseline_plus":
                assert cell.update_records == totals[cell.row]
                assert cell.total_records == totals[cell.row] or f"only {cell.total_records} records" in cell.notes
            if cell.arm.startswith("single"):
                assert len(used) == 1
                assert cell.total_records == min(totals[cell.row], available[cell.related[0]])
            if cell.arm.startswith("filler"):
                assert sum(bool(shared(s, target)) for s in used) == 1
            if cell.arm == "words_only":
                assert all(shared(s, target) == {"task"} for s in used)
            if cell.arm == "baseline_plus":
                assert not any(shared(s, target) for s in used)


@given(sized_worlds(), st.integers(0, 2))
@settings(max_examples=30, deadline=None)
def test_equal_trainings_are_one_job_and_a_member_alone_is_one_over_rows_and_targets(drawn, seed):
    subsets, _, _, available = drawn
    run = study(tables=("pairs", "triples"), seeds=(seed,))
    world_ = suite.World(subsets, available=available)
    cells = [cell for table in run.study.tables for cell in suite._TABLES[table](world_, seed)]
    jobs = schedule.jobs_of(cells, run)
    keys = [(job.seed, job.training, job.steps, job.blank) for job in jobs]
    assert len(set(keys)) == len(keys) and sum(len(job.cells) for job in jobs) == len(cells)
    job_of = {cell.id: job for job in jobs for cell in job.cells}
    trained = {cell.row: job_of[cell.id].steps for cell in cells if cell.arm == "trained" and cell.table == "pairs"}
    singles = {}
    for cell in cells:
        job = job_of[cell.id]
        assert job.training == cell.training and job.blank == cell.blank
        if cell.arm in DECIDING_ARMS and cell.table == "pairs":
            assert job.steps == trained[cell.row]
        if cell.arm.startswith("single"):
            same = singles.setdefault((cell.related, cell.num_records, job.steps), job)
            assert same is job


# ------------------------------------------------------------------ which arms


def test_chosen_arms_are_the_only_ones():
    run = study(tables=("pairs",), targets=("ct-lung-state",), arms=("trained", "single_2"))
    assert [c.arm for c in suite.expand(run, SMALL)] == ["trained", "single_2"] * 4


@pytest.mark.parametrize(("arm", "hint"), [
    ("singel_1", "did you mean single_1"), ("no_image", "did you mean no_images"),
    ("filler", "did you mean filler_"), ("efficiency_x", "expected one or more of baseline"), ("dose_", "dose_N"),
])  # fmt: skip
def test_an_unknown_arm_is_refused(arm, hint):
    with pytest.raises(ConfigError, match=f"study.arms='{arm}': .*{hint}") as error:
        check(study(arms=("trained", arm)))
    assert "\n" not in str(error.value)


def test_every_arm_is_known_and_has_a_name():
    from medcg_jax.study.stats import grid_files

    check(study(arms=(*ARMS, "efficiency_30", "dose_2")))
    assert set(ARMS) <= set(grid_files.ARMS)
    run = study(tables=("pairs", "triples", "ablation", "multi_task", "efficiency", "dose"), targets=("ct-lung-state",))
    for cell in suite.expand(run, SMALL):
        assert grid_files.arm(cell.arm) == cell.arm
        check(study(arms=(cell.arm,)))


# ------------------------------------------------------------------ ablation


def test_a_removal_at_equal_updates_and_at_equal_epochs():
    run = study(tables=("ablation",), targets=("ct-lung-state",))
    cells = suite.expand(run, SMALL)
    jobs, by_arm = jobs_by_cell(cells), {c.arm: c for c in cells}
    steps = {arm: jobs[c.id].steps for arm, c in by_arm.items()}
    related = steps["all_related"]
    assert related == 38 and {arm: n for arm, n in steps.items() if arm.endswith("_updates")} == {
        f"{arm}_updates": related
        for arm in (
            "all_unrelated", "wo_modality", "wo_area", "wo_task", *(f"random_removal_{e}" for e in ELEMENTS),
            "same_task", "all_data",
        )
    }  # fmt: skip
    for element in ELEMENTS:
        assert steps[f"wo_{element}"] == steps[f"random_removal_{element}"] == 19
        for arm in (f"wo_{element}", f"random_removal_{element}"):
            assert by_arm[f"{arm}_updates"].training == by_arm[arm].training
    # All three remove three subsets of equal sizes: one random removal for them.
    assert len({jobs[by_arm[f"random_removal_{e}_updates"].id].id for e in ELEMENTS}) == 1
    epochs = suite.expand(replace(run, study__ablation_budgets=("epochs",)), SMALL)
    assert epochs == [c for c in cells if not c.arm.endswith("_updates")]
    updates = suite.expand(replace(run, study__ablation_budgets=("updates",)), SMALL)
    assert updates == [c for c in cells if c.arm.endswith("_updates") or c.arm in ("baseline", "all_related")]


def test_a_random_removal_takes_as_many_records_as_the_elements_own():
    large = tuple(changed(s, num_train=30) if s.name == "mri-brain-state" else s for s in SMALL)
    by_arm = {
        arm.name: arm for arm in arms.ablation_arms(large[0], large, ("epochs",), {s.name: 200 for s in large}, 0)
    }
    totals = {name: sum(n for _, n in arm.training) for name, arm in by_arm.items()}
    assert [totals[f"wo_{e}"] for e in ELEMENTS] == [230, 230, 300]
    for element in ELEMENTS:
        assert totals[f"random_removal_{element}"] == totals[f"wo_{element}"]
        assert len(by_arm[f"random_removal_{element}"].training) == len(by_arm[f"wo_{element}"].training)


# ------------------------------------------------------------------ curves


def test_the_efficiency_curves_have_equal_updates_and_one_of_unrelated_records():
    run = study(tables=("efficiency",), targets=("ct-lung-state",), efficiency_records=(0, 10))
    cells = suite.expand(run, SMALL, (), PLENTY)
    jobs = jobs_by_cell(cells, run)
    curves = {c.row.part: row_of(cells, c.row.part) for c in cells}
    assert list(curves) == ["with_related", "with_unrelated", "target_only"]
    for curve, points in curves.items():
        others = {"target_only": 0}.get(curve, 600)
        assert {arm: sum(counts.values()) for arm, counts in points.items()} == {
            "efficiency_0": others, "efficiency_10": others + 10, "efficiency_100": others + 100
        }  # fmt: skip
    assert set(curves["with_unrelated"]["efficiency_0"]) == {"mri-brain-stage", "xray-skin-grade"}
    assert {jobs[c.id].steps for c in cells if c.training} == {44}  # 2 epochs of 700 records
    epochs = suite.expand(replace(run, study__efficiency_budget="epochs"), SMALL, (), PLENTY)
    steps = {str(c.row): jobs_by_cell(epochs, run)[c.id].steps for c in epochs if c.arm == "efficiency_10"}
    assert list(steps.values()) == [39, 39, 1]
    short = suite.expand(run, SMALL)
    assert {c.notes for c in short if c.row.part == "with_unrelated"} == {"only 200 unrelated records for 600"}


def test_doses_are_nested_and_of_equal_records_and_updates():
    many = world(
        "ct-lung-state", *(f"ct-a{i}-t{i}" for i in range(5)), *(f"m{i}-lung-t{i}" for i in range(5)),
        "mri-brain-state", "us-bone-state", "ct-lung-grade", "oct-eye-risk", "oct-skin-risk",
    )  # fmt: skip
    run = study(tables=("dose",), targets=("ct-lung-state",))
    cells = suite.expand(run, many, (), {s.name: 400 for s in many})
    assert [(c.arm, str(c.row)) for c in cells] == [(f"dose_{k}", "dose/ct-lung-state") for k in (0, 1, 2, 4, 8)]
    by_arm = {c.arm: c for c in cells}
    target = many[0]
    for k, per_element in ((1, (1, 1, 1)), (2, (2, 2, 2)), (4, (4, 4, 2)), (8, (5, 5, 2))):
        chosen = [subset(name) for name in by_arm[f"dose_{k}"].related]
        assert tuple(sum(shared(s, target) == {e} for s in chosen) for e in ELEMENTS) == per_element
        assert len(chosen) == sum(per_element)  # never the subset of two elements
        assert max(by_arm[f"dose_{k}"].num_records) - min(by_arm[f"dose_{k}"].num_records) <= 1
    assert not any(shared(subset(name), target) for name in by_arm["dose_0"].related)
    for less, more in zip(cells[1:], cells[2:], strict=False):
        assert set(less.related) < set(more.related)
    assert {c.total_records for c in cells} == {300}
    assert {job.steps for job in schedule.jobs_of(cells, run)} == {19}
    assert by_arm["dose_8"].notes == "5 of 8 share modality alone; 5 of 8 share area alone; 2 of 8 share task alone"
    # A dose that would repeat the last one is left out, as is a target whose element nothing has alone.
    again = suite.expand(replace(run, study__dose_subsets=(4, 8, 16), study__dose_records=60), many)
    assert [(c.arm, c.total_records) for c in again] == [("dose_4", 60), ("dose_8", 60)]
    assert not arms.dose_arms(target, [s for s in many if s.task != "state"], (1,), 0, {}, 0)


@given(random_worlds(), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_doses_of_any_world(drawn, seed):
    subsets, target = drawn
    ordered = combos.doses(target, subsets, seed)
    assert ordered == combos.doses(target, subsets[::-1], seed)
    last: set[str] = set()
    for arm in arms.dose_arms(target, subsets, (1, 2, 4, 8), 0, {s.name: 10**6 for s in subsets}, seed):
        names = {s.name for s, _ in arm.training}
        assert last < names and {e for s, _ in arm.training for e in shared(s, target)} == set(ELEMENTS)
        assert sum(n for _, n in arm.training) == arm.update_records == sum(m[0].num_train for m in ordered.values())
        last = names


def test_the_members_kinds_decide_what_fills_their_place():
    boxes = world("ct-lung-det", "mri-brain-det", "us-bone-det")
    target = SMALL[0]
    row = arms.Members(target, (boxes[0], subset("ct-brain-state", 60)), SMALL, boxes)
    filled = row.fillers(row.members)
    assert [(s.name.endswith("-det"), n) for s, n in filled] == [(False, 60), (True, 100)]
    assert [n for _, n in row.fillers(row.members, 32)] == [12, 20]
    assert arms.Members(target, row.members, SMALL, boxes[:1]).fillers(row.members) is None
    assert isinstance(filled[0][0], Subset)


def test_a_member_that_shares_nothing_fills_no_other_members_place():
    """As in a few printed rows; it would stand in the training set twice."""
    stranger, related = subset("mri-brain-stage"), subset("ct-lung-grade")
    for seed in range(4):
        row = arms.Members(SMALL[0], (stranger, related), SMALL, seed=seed)
        found, _ = arms.row_arms(row, RUN.study)
        by_arm = {arm.name: [s.name for s, _ in arm.training] for arm in found}
        assert by_arm["filler_1"] == ["mri-brain-stage", "xray-skin-grade"]
        assert set(by_arm["baseline_plus"]) == {"mri-brain-stage", "xray-skin-grade"}
    with pytest.raises(ValueError, match="a training subset stands there twice"):
        suite.Cell("x", "pairs", suite.Row("fixed_area"), "filler_1", 0, ("a", "a"), (1, 1), ("b",))
