"""The answer in words follows the numbers: shown, not shown and reversed effects, planted."""

import re

import pytest
from report_grids import make_grid, run_of, score_again, skill_of

from medcg_jax.study.report.load_grid import Grid
from medcg_jax.study.report.table import points
from medcg_jax.study.report.text import Answer, below_chance, letter_habits, limits, short_name, verdict
from medcg_jax.study.stats import stats

TARGETS = ("mri-brain-state", "ct-liver-grade", "photo-skin-state", "oct-skin-grade")


def answer_of(folder, skills=None, **changes) -> Answer:
    """The answer of a grid whose arms have these skills."""
    skills = skills or {}
    run = run_of(study__targets=TARGETS, study__seeds=(0, 1), data__test_records_per_subset=40, **changes)
    workdir = make_grid(folder / "w", run, skill=lambda cell: skills.get(cell.arm, skill_of(cell)))
    return Answer(Grid(workdir), stats.summarise(workdir))


def test_a_large_effect_is_a_yes(tmp_path):
    answer = answer_of(tmp_path, {"trained": 0.8})
    effect = answer.main
    assert (effect["table"], effect["arm"], effect["against"]) == ("pairs", "trained", "baseline_plus")
    assert answer.lead == "yes" and answer.opening == "Yes, on phantoms, not patients."
    text = " ".join(answer.sentences())
    assert f"raised accuracy by {points(effect['mean'])} points" in text
    assert f"95 % interval {points(effect['ci_low'])} to {points(effect['ci_high'])}" in text
    assert f"{effect['wins']} of 16 rows up, {effect['significant']} significantly" in text
    assert "Over 4 targets never trained on, 2 seeds and 1,280 test answers per arm" in text
    assert dict(answer.totals()).keys() == {"Shown"}


def test_no_effect_is_not_shown(tmp_path):
    answer = answer_of(tmp_path, {"trained": 0.0, "baseline_plus": 0.0})
    assert verdict(answer.main) == "open", "the draw of this test must have an interval with 0 in it"
    assert answer.lead == "not shown" and answer.opening.startswith("No effect is shown")
    text = " ".join(answer.sentences())
    assert "is not shown to change accuracy against training on unrelated ones" in text and "includes 0" in text
    assert "raised" not in text and "lowered" not in text
    assert "pairs over unrelated data" in dict(answer.totals())["Not shown"]


def test_a_reversed_effect_is_a_no(tmp_path):
    answer = answer_of(tmp_path, {"trained": -0.5, "baseline_plus": 0.5})
    assert answer.lead == "no" and answer.opening.startswith("No: the reverse")
    text = " ".join(answer.sentences())
    assert f"lowered accuracy by {points(-answer.main['mean'])} points" in text and "rows down" in text
    assert "against no training it is a loss of" in text
    assert "pairs over unrelated data" in dict(answer.totals())["The other way"]


def test_a_gain_that_the_same_task_gives_too_is_partial(tmp_path):
    skills = {"trained": 0.8, "all_related": 0.7, "same_task": 0.7, "wo_modality": 0.2, "wo_area": 0.2}
    answer = answer_of(tmp_path, skills, study__tables=("pairs", "ablation"))
    assert answer.lead == "partly"
    assert "more than the same task alone" in dict(answer.totals())["Not shown"]
    comparisons = [answer.main, *answer.checks]
    assert not all(verdict(effect) == "up" for effect in comparisons)
    named = [name for _, names in answer.totals() for name in names.split("; ")]
    assert sorted(named) == sorted(short_name(effect) for effect in comparisons)
    text = " ".join(answer.sentences())
    assert (
        "All related subsets together are not shown to change accuracy against training on subsets that share the task"
        in text
    )


@pytest.mark.parametrize(("without", "words"), [(0.0, "shown"), (0.65, "not shown"), (0.95, "a gain")])
def test_what_an_element_is_worth_is_said_as_it_is(tmp_path, without, words):
    answer = answer_of(tmp_path, {"wo_area": without, "all_related": 0.65}, study__tables=("ablation",))
    effect = answer.find("ablation", "all_related", "wo_area")
    said = next(text for text in answer.sentences() if text.startswith("Leaving out"))
    area = said.partition("area ")[2].partition(")")[0]
    state = {"shown": "up", "not shown": "open", "a gain": "down"}[words]
    assert verdict(effect) == state
    assert area.startswith(points(effect["mean"]))
    assert area.endswith(", not shown") == (state == "open") and area.endswith(", a gain") == (state == "down")
    key = {"up": "Shown", "open": "Not shown", "down": "The other way"}[state]
    assert short_name(effect) in dict(answer.totals())[key]


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
