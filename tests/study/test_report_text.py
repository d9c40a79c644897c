"""The answer in words follows the numbers: shown, not shown and reversed effects, planted."""

import re

import pytest
from made_arms import PAIR, arms_of, without
from report_grids import make_grid, run_of, score_again, skill_of

from medcg_jax.study.report.load_grid import Grid
from medcg_jax.study.report.table import points
from medcg_jax.study.report.text import Answer, below_chance, letter_habits, limits, no_loss, state, summary_text
from medcg_jax.study.stats import stats
from medcg_jax.study.stats.verdict import verdicts

TARGETS = ("mri-brain-state", "ct-liver-grade", "photo-skin-stage", "oct-eye-cancer")


def answer_of(folder, skills=None, **changes) -> Answer:
    """The answer of a grid whose arms have these skills."""
    skills = skills or {}
    changes = {"study__targets": TARGETS, "study__seeds": (0, 1), "data__test_records_per_subset": 40} | changes
    workdir = make_grid(folder / "w", run_of(**changes), skill=lambda cell: skills.get(cell.arm, skill_of(cell)))
    return Answer(Grid(workdir), stats.summarise(workdir))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """(grid, summary) of one direction of pairs, with a gain over no training and one over unrelated data."""
    run = run_of(
        study__targets=TARGETS, study__seeds=(0, 1, 2), study__parts=("fixed_task",), data__test_records_per_subset=12
    )
    grid = Grid(make_grid(tmp_path_factory.mktemp("pairs") / "w", run))
    return grid, stats.summarise(grid.workdir, grid.results, grid.answers, grid.cells)


def answer_with(pairs, points, **changes) -> Answer:
    """The answer of that grid with the verdict of other answers."""
    grid, summary = pairs
    lines = [
        line | {"n": 4800, "trainings": 99, "target_names": TARGETS}
        for line in verdicts(arms_of(points, **changes), "pairs")
    ]
    return Answer(grid, summary | {"verdicts": lines})


def test_the_first_lines_are_of_the_grids_own_numbers(pairs):
    grid, summary = pairs
    answer = Answer(grid, summary)
    line, effect = answer.verdict, answer.find("pairs", "trained", "baseline_plus")
    assert line["gain"]["mean"] == pytest.approx(effect["mean"])
    assert (line["gain"]["ci_low"], line["p"]) == (effect["ci_low"], effect["p_overall"])
    assert line["missing"] == dict.fromkeys(("single_1", "single_2", "filler_1", "filler_2"), 12)
    text = " ".join(answer.first())
    before, after = (f"{100 * line['accuracy'][arm]:.1f} %" for arm in ("baseline_plus", "trained"))
    assert (
        f"From {before} (unrelated data) to {after} (pairs of related subsets): {points(effect['mean'], True)}" in text
    )
    assert f"(95 % interval {points(effect['ci_low'])} to {points(effect['ci_high'])})" in text
    chance = 100 * sum(map(grid.chance, effect["by_target"])) / 4
    sizes = (
        f"chance {chance:.1f} %; 144 distinct questions on 4 targets never trained on, 3 seeds, {line['trainings']} tr"
    )
    assert sizes in text and effect["n"] == 144
    assert "overall p" in text and "(two-way t of 4 targets and 3 seeds; no least p)" in text
    lines = summary_text(grid, answer, ["a limit"]).split("\n\n")
    assert lines[0].replace("\n", " ").startswith(answer.opening) and lines[-1] == "- a limit\n"
    assert lines[1].startswith("made: ")


def test_composition_is_said_with_what_it_rests_on(pairs):
    answer = answer_with(pairs, PAIR)
    assert answer.opening.startswith(
        "Composition, on phantoms, not patients: it is above every one of its subsets alone"
    )
    text, over = " ".join(answer.first()), answer.verdict["over"]
    for name, words in (("single_1", "first"), ("single_2", "second")):
        assert f"{points(over[name]['mean'], True)} over the {words} ({points(over[name]['ci_low'])} to" in text
    assert f"unrelated data: {points(answer.verdict['interaction']['mean'], True)} (" in text
    assert "Not asked: subsets that share the task alone and the same training without images." in text
    beside = " ".join(answer_with(pairs, PAIR | {"words_only": 80, "no_images": 45}).first())
    assert re.search(r"Beside it: \S+ over subsets that share the task alone \(\S+ to \S+, not shown\)", beside)
    assert re.search(r"and \S+ over the same training without images \(\S+ to \S+\)\.", beside)


def test_transfer_says_what_the_single_loses(pairs):
    answer = answer_with(pairs, PAIR | {"single_2": 80}, noise=1)
    assert answer.opening.startswith("Transfer from one subset, on phantoms, not patients: a subset alone gains")
    assert "not above: alone no loss (within 3.0 points)" in " ".join(answer.first())
    noisy = " ".join(answer_with(pairs, PAIR | {"single_2": 78}, noise=9).first())
    assert re.search(r"not shown to be above it; a gain of up to \S+ is not excluded", noisy) and "no loss" not in noisy


def test_absent_arms_are_named(pairs):
    answer = answer_with(pairs, without(PAIR, "filler_1", "single_2"))
    assert answer.opening.startswith("A gain over unrelated data, cause not tested, on phantoms")
    assert "are absent (Second alone and First with unrelated)." in answer.opening
    assert answer_with(pairs, without(PAIR, "baseline_plus")).opening.endswith(
        "no arm of unrelated data to compare with."
    )


def test_controls_with_fewer_records_are_said(pairs, monkeypatch):
    grid, _ = pairs
    controls = [cell["cell"] for cell in grid.done("pairs") if cell["arm"] == "baseline_plus"]
    monkeypatch.setitem(grid.run, "short", {})
    assert "fewer training records" not in " ".join(answer_with(pairs, PAIR).first())
    monkeypatch.setitem(grid.run, "short", {controls[0]: [120, 200], "of another table": [1, 2]})
    said = f"1 of {len(controls)} controls had fewer training records than their row"
    assert said in " ".join(answer_with(pairs, PAIR).first())


def test_one_seed_speaks_of_these_models_alone(pairs):
    answer = answer_with(pairs, PAIR, seeds=1)
    assert answer.opening.startswith(
        "Not shown (one seed: nothing is said of the recipe; these models alone: composition), on phantoms"
    )
    text = " ".join(answer.first())
    assert "; one seed: nothing is said of the recipe)" in text
    assert "overall p .008 (exact sign flips of 8 targets; the least p .008)" in text
    few = answer_with(pairs, PAIR, seeds=1, targets=4)
    assert few.opening.endswith("4 targets cannot show a gain, since no p can be below 0.125.")


def test_no_gain_and_the_reverse(pairs):
    none = answer_with(pairs, dict.fromkeys(PAIR, 50))
    assert none.opening == "Not shown, on phantoms, not patients: no gain over unrelated data is shown."
    assert answer_with(pairs, PAIR | {"baseline_plus": 90}).opening.startswith("The reverse, on phantoms")


def test_directions_stand_behind(pairs):
    parts = ("fixed_area", "fixed_task")
    answer = answer_with(pairs, PAIR | {"trained": {"fixed_area": 80, "fixed_task": 60}}, parts=parts)
    said = "By direction (Holm-adjusted): fixed area: composition; fixed task: transfer from one subset."
    assert said in answer.first()


def test_grids_without_pairs_do_not_test_composition(pairs):
    grid, summary = pairs
    assert Answer(grid, summary | {"verdicts": []}).opening == (
        "Composition is not tested, on phantoms, not patients: no pairs or triples are finished."
    )
    assert Answer(grid, summary | {"verdicts": [], "effects": []}).opening.startswith("No answer yet")


def test_an_effect_is_said_as_it_is(pairs):
    answer = Answer(*pairs)
    effect = answer.find("pairs", "trained", "baseline")
    shown = {"up": True, "down": False, "equivalent": False, "mean": 0.2, "ci_low": 0.1, "ci_high": 0.3}
    said = answer.statement(effect | shown, "training", "none")
    assert said.startswith("training raised accuracy by 20.0 points against none (10.0 to 30.0; ")
    turned = {"up": False, "down": True, "mean": -0.2, "ci_low": -0.3, "ci_high": -0.1}
    assert answer.statement(effect | turned, "training", "none").startswith("training lowered accuracy by 20.0 points")
    open_one = {"up": False, "down": False, "ci_low": -0.07, "ci_high": 0.09, "equivalent": False}
    said = answer.statement(effect | open_one, "all data", "none")
    assert "all data are not shown to change accuracy against none" in said
    assert "a loss of up to 7.0 is not excluded" in said and "no loss" not in said
    one = answer.statement(effect | shown | {"seeds": 1}, "training", "none")
    assert "(10.0 to 30.0; one seed: nothing is said of the recipe; " in one


def test_no_loss_is_said_within_the_bound_alone():
    assert no_loss({"equivalent": True}, 0.02) == "no loss (within 3.0 points)"
    assert no_loss({"equivalent": False}, 0.021) == "a loss of up to 2.1 is not excluded"


@pytest.mark.parametrize(("cost", "words"), [(-0.5, "shown"), (0.65, "not shown"), (0.99, "a gain")])
def test_what_an_element_is_worth_is_said_as_it_is(tmp_path, cost, words):
    skills = {"wo_area": cost, "all_related": 0.65 if words == "not shown" else 0.35}
    answer = answer_of(
        tmp_path, skills, study__tables=("ablation",), study__seeds=(0, 1, 2),
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
    one = make_grid(tmp_path / "a", run_of(study__targets=("photo-brain-grade", *TARGETS[:1])))
    said = " ".join(limits(Grid(one), stats.summarise(one)))
    assert "One seed" in said and "(photo-brain-grade)" in said and "Baseline+ trains on" in said
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
