"""The answer in words follows the numbers: shown, not shown and reversed effects, planted."""

import re

import pytest
from report_grids import make_grid, run_of, score_again, skill_of

from medcg_jax.study.report.load_grid import Grid
from medcg_jax.study.report.table import points
from medcg_jax.study.report.text import Answer, below_chance, letter_habits, limits, no_loss, state, summary_text
from medcg_jax.study.stats import stats

TARGETS = ("mri-brain-state", "ct-liver-grade", "photo-skin-state", "oct-skin-grade")
SIX = (*TARGETS, "photo-eye-state", "mri-liver-cancer")
DECIDING = ("trained", "baseline_plus", "single_1", "single_2", "filler_1", "filler_2")
COMPOSED = {"trained": 0.9, "baseline_plus": 0.0, "single_1": 0.1, "single_2": 0.2, "filler_1": 0.1, "filler_2": 0.1}


def answer_of(folder, skills=None, **changes) -> Answer:
    """The answer of a grid whose arms have these skills."""
    skills = skills or {}
    changes = {"study__targets": TARGETS, "study__seeds": (0, 1), "data__test_records_per_subset": 40} | changes
    workdir = make_grid(folder / "w", run_of(**changes), skill=lambda cell: skills.get(cell.arm, skill_of(cell)))
    return Answer(Grid(workdir), stats.summarise(workdir))


def pairs_of(folder, skills, arms=DECIDING, **changes) -> Answer:
    """One direction of pairs on six targets and three seeds."""
    changes = {"study__targets": SIX, "study__seeds": (0, 1, 2)} | changes
    return answer_of(folder, skills, study__arms=arms, study__parts=("fixed_task",), **changes)


def test_composition_is_said_with_what_it_rests_on(tmp_path):
    answer = pairs_of(tmp_path, COMPOSED)
    line = answer.verdict
    assert line["verdict"] == "composition"
    assert answer.opening.startswith(
        "Composition, on phantoms, not patients: it is above every one of its subsets alone"
    )
    text = " ".join(answer.first())
    before, after = (f"{100 * line['accuracy'][arm]:.1f} %" for arm in ("baseline_plus", "trained"))
    assert f"From {before} (unrelated data) to {after} (pairs of related subsets)" in text
    gain = line["gain"]
    assert f"{points(gain['mean'], True)} points (95 % interval {points(gain['ci_low'])} to " in text
    assert re.search(
        r"chance \d\d\.\d %; 720 distinct questions on 6 targets never trained on, 3 seeds, \d+ trainings", text
    )
    assert "overall p" in text and "(two-way t of 6 targets and 3 seeds; no least p)" in text
    assert "over the first (" in text and "over the second (" in text and "interaction" in text.lower()
    assert "Not asked: subsets that share the task alone and the same training without images." in text


def test_transfer_names_the_single_that_is_not_beaten(tmp_path):
    answer = pairs_of(tmp_path, COMPOSED | {"single_2": 0.9, "filler_2": 0.9})
    assert answer.opening.startswith("Transfer from one subset, on phantoms")
    assert "not shown: " in " ".join(answer.first()) or "no loss (within 3.0 points)" in " ".join(answer.first())
    assert "composition" not in answer.opening.lower()


def test_absent_arms_are_named(tmp_path):
    answer = pairs_of(tmp_path, COMPOSED, arms=("trained", "baseline_plus", "single_1", "single_2"))
    assert answer.opening.startswith("A gain over unrelated data, cause not tested, on phantoms")
    assert "(First with unrelated and Second with unrelated)" in answer.opening


def test_one_seed_speaks_of_these_models_alone(tmp_path):
    answer = pairs_of(tmp_path, COMPOSED, study__seeds=(0,))
    assert answer.opening.startswith(
        "Not shown (one seed: nothing is said of the recipe; these models alone: composition), on phantoms"
    )
    text = " ".join(answer.first())
    assert "; one seed: nothing is said of the recipe)" in text
    assert "overall p .031 (exact sign flips of 6 targets; the least p .031)" in text
    few = pairs_of(tmp_path / "few", COMPOSED, study__seeds=(0,), study__targets=TARGETS)
    assert "4 targets cannot show a gain, since no p can be below 0.125" in few.opening


def test_no_gain_and_the_reverse(tmp_path):
    none = pairs_of(tmp_path / "none", dict.fromkeys(DECIDING, 0.0))
    assert none.opening.startswith("Not shown, on phantoms, not patients: no gain over unrelated data is shown")
    down = pairs_of(tmp_path / "down", {"trained": -0.5, "baseline_plus": 0.6}, arms=("trained", "baseline_plus"))
    assert down.opening.startswith("The reverse, on phantoms")


def test_the_words_follow_the_summary(tmp_path):
    answer = pairs_of(tmp_path, COMPOSED)
    first = summary_text(answer.grid, answer, ["a limit"]).split("\n\n")
    assert first[0].replace("\n", " ").startswith(answer.opening)
    assert first[1].startswith("made: ") and first[-1] == "- a limit\n"


def test_grids_without_pairs_do_not_test_composition(tmp_path):
    answer = answer_of(tmp_path, study__tables=("ablation",), study__targets=TARGETS[:2])
    assert answer.verdict is None and answer.opening.startswith("Composition is not tested, on phantoms")


def test_an_effect_that_is_not_shown_is_not_said_to_be_absent(tmp_path):
    answer = answer_of(tmp_path, {"trained": 0.0, "baseline": 0.0}, study__parts=("fixed_area",))
    effect = answer.find("pairs", "trained", "baseline")
    assert state(effect) == "open" and not effect["equivalent"]
    text = " ".join(answer.sentences())
    assert "is not shown to change accuracy against no training" in text
    assert f"a loss of up to {points(-effect['ci_low'])} is not excluded" in text
    assert "raised" not in text and "lowered" not in text and "no loss" not in text


def test_no_loss_is_said_within_the_bound_alone():
    assert no_loss({"equivalent": True}, 0.02) == "no loss (within 3.0 points)"
    assert no_loss({"equivalent": False}, 0.021) == "a loss of up to 2.1 is not excluded"


@pytest.mark.parametrize(("without", "words"), [(-0.5, "shown"), (0.65, "not shown"), (0.99, "a gain")])
def test_what_an_element_is_worth_is_said_as_it_is(tmp_path, without, words):
    skills = {"wo_area": without, "all_related": 0.65 if words == "not shown" else 0.35}
    answer = answer_of(
        tmp_path, skills, study__tables=("ablation",), study__targets=SIX, study__seeds=(0, 1, 2),
        study__arms=("all_related", "wo_area", "random_removal_area"),
    )  # fmt: skip
    effect = answer.find("ablation", "all_related", "wo_area")
    said = next(text for text in answer.sentences() if text.startswith("Leaving out"))
    area = said.partition("area ")[2].partition(")")[0]
    wanted = {"shown": "up", "not shown": "open", "a gain": "down"}[words]
    assert state(effect) == wanted
    assert area.startswith(points(effect["mean"]))
    assert (", not shown; " in area) == (wanted == "open") and area.endswith(", a gain") == (wanted == "down")
    text = " ".join(answer.sentences())
    assert "Leaving out as many at random: area " in text and "Beyond the random removal: area " in text


def test_efficiency_is_paired_by_target_records(tmp_path):
    answer = answer_of(tmp_path, study__tables=("efficiency",))
    said = " ".join(answer.sentences())
    assert "What all related subsets add to training on the target itself, in points: 10 target records +" in said
    assert "100 target records" in said


def test_limits_name_seeds_controls_and_tuned_targets(tmp_path):
    one = make_grid(tmp_path / "a", run_of(study__targets=("oct-eye-grade", *TARGETS[:1])))
    said = " ".join(limits(Grid(one), stats.summarise(one)))
    assert "One seed" in said and "(oct-eye-grade)" in said and "Baseline+ trains on" in said
    assert "no evidence of one in patients" in said and "equal epochs" not in said
    two = make_grid(
        tmp_path / "b", run_of(study__targets=TARGETS[:1], study__seeds=(0, 1), study__tables=("ablation",))
    )
    said = " ".join(limits(Grid(two), stats.summarise(two)))
    assert "One seed" not in said and "chosen on some" not in said and "equal epochs" in said
    assert "With 2 seeds an interval over them is wide" in said and "of these models on these records" in said


def test_one_letter_for_all_and_worse_than_chance_are_said(tmp_path):
    skills = {"baseline_plus": -0.7}
    run = run_of(study__targets=TARGETS[:1], data__test_records_per_subset=40)
    workdir = make_grid(tmp_path / "w", run, skill=lambda cell: skills.get(cell.arm, skill_of(cell)))
    assert letter_habits(Grid(workdir)) == []
    (said,) = below_chance(Grid(workdir))
    assert said.startswith("4 of 4 accuracies of Baseline+ (pairs) lie below chance")
    for path in (workdir / "predictions").glob("*.trained.s0.jsonl"):
        path.write_text(re.sub(r'"predicted": "."', '"predicted": "A"', path.read_text()))
    score_again(workdir)
    (said,) = letter_habits(Grid(workdir))
    assert said.startswith("One letter makes up more than 90 % of all answers of Trained (pairs)")


@pytest.mark.parametrize(
    ("value", "sign", "text"),
    [
        (0.361, False, "36.1"),
        (0.361, True, "+36.1"),
        (-0.02, True, "−2.0"),
        (-0.0001, True, "+0.0"),
        (-0.0001, False, "0.0"),
    ],
)
def test_points(value, sign, text):
    assert points(value, sign) == text
