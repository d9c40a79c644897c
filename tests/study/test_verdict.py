"""The decision table of `verdict`, case by case; absent arms; directions; seeds and targets; equivalence."""

import itertools
from collections import Counter

import numpy as np
import pytest
from made_arms import PAIR, RECORDS, arms_of, without

from medcg_jax.study.stats.paired import LEVEL, Unit, estimate
from medcg_jax.study.stats.verdict import (
    CANNOT_TELL,
    COMPOSITION,
    EQUIVALENCE,
    MEMBERS,
    NO_CAUSE,
    NOT_SHOWN,
    NOT_TESTED,
    RANK,
    REVERSE,
    TRANSFER,
    is_equivalent,
    members,
    telling,
    verdicts,
    within,
)


def whole(points, table="pairs", **changes):
    return verdicts(arms_of(points, **changes), table)[0]


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, COMPOSITION),
        # Above the first single alone, which gains nothing by itself; the second does what the pair does.
        ({"single_2": 80}, TRANSFER),
        ({"single_2": 95}, TRANSFER),
        ({"single_1": 80, "single_2": 80}, TRANSFER),
        # Transfer with an interaction: fillers disturb.
        ({"single_1": 80, "filler_1": 42}, TRANSFER),
        # Above both singles, and the members' gains add up to the pair's: 80 - 40 = (60 - 40) + (60 - 40).
        ({"filler_1": 60, "filler_2": 60}, NO_CAUSE),
        ({"filler_1": 80, "filler_2": 50}, NO_CAUSE),
        # No gain over unrelated data, whatever the singles are.
        ({"baseline_plus": 80}, NOT_SHOWN),
        ({"baseline_plus": 80, "single_1": 30, "single_2": 30, "filler_1": 30, "filler_2": 30}, NOT_SHOWN),
        ({"baseline_plus": 90}, REVERSE),
    ],
)
def test_the_decision_table(changes, kind):
    assert whole(PAIR | changes)["verdict"] == kind


@pytest.mark.parametrize("absent", ["single_1", "single_2", "filler_1", "filler_2"])
def test_composition_needs_every_arm(absent):
    line = whole(without(PAIR, absent))
    assert line["verdict"] == NOT_TESTED and list(line["missing"]) == [absent]
    assert line["cells"] == line["missing"][absent] == 24


def test_without_unrelated_data_nothing_is_shown():
    line = whole(without(PAIR, "baseline_plus"))
    assert line["verdict"] == NOT_SHOWN and line["gain"] is None and "baseline_plus" in line["missing"]


def test_a_single_that_is_not_beaten_decides_though_the_other_arms_are_absent():
    assert whole(without(PAIR | {"single_2": 80}, "single_1", "filler_1", "filler_2"))["verdict"] == TRANSFER


def test_a_single_that_is_merely_not_beaten_is_no_transfer():
    """The pair is 8 points above its second member; targets spread so much that this is not shown."""
    arms = arms_of(PAIR | {"single_2": 72}, noise=14)
    line = verdicts(arms, "pairs")[0]
    assert not line["over"]["single_2"]["up"] and line["gains"]["single_2"]["up"]
    assert (line["over"]["single_2"]["relation"], line["verdict"]) == ("open", NO_CAUSE)


def test_transfer_needs_a_single_that_gains():
    """One target alone gives the pair's gain over the singles: neither is beaten, and neither is above FF."""
    arms = arms_of(PAIR | {"single_1": 40, "single_2": 40}, noise=0.5)
    for arm, wide in (("single_1", 45), ("single_2", 45)):
        for key in arms[arm]:
            up = wide if int(key[1][1:]) % 2 else -wide + 6
            arms[arm][key] = np.arange(RECORDS) < RECORDS * (45 + up) // 100
    line = verdicts(arms, "pairs")[0]
    assert not line["over"]["single_1"]["up"] and not line["gains"]["single_1"]["up"]
    assert line["verdict"] == NO_CAUSE


def test_the_larger_p_of_the_singles_counts():
    line = whole(PAIR | {"single_2": 70}, noise=4)
    over = line["over"]
    assert over["single_1"]["p"] < over["single_2"]["p"]
    assert line["verdict"] == COMPOSITION and line["p"] >= over["single_2"]["p"]


def test_three_members():
    points = PAIR | {"single_3": 50, "filler_3": 42}
    assert members(3) == (("single_1", "single_2", "single_3"), ("filler_1", "filler_2", "filler_3"))
    assert whole(points, "triples")["verdict"] == COMPOSITION
    # 80 - 45 - 50 - filler_3 + 2 * 40: the third filler's gain takes the interaction to 0.
    assert whole(points | {"filler_3": 65}, "triples")["verdict"] == NO_CAUSE
    assert whole(points | {"single_3": 80}, "triples")["verdict"] == TRANSFER
    assert whole(PAIR, "triples")["verdict"] == NOT_TESTED


def test_one_seed_says_nothing_of_the_recipe():
    line = whole(PAIR, seeds=1)
    assert (line["verdict"], line["these_models"]) == (NOT_SHOWN, COMPOSITION)
    assert line["test"] == "exact sign flips of 8 targets" and line["p"] == line["p_smallest"] == 2 / 2**8
    few = whole(PAIR, seeds=1, targets=4)
    assert (few["verdict"], few["these_models"], few["p_smallest"]) == (NOT_SHOWN, NOT_SHOWN, 2 / 2**4)
    assert whole(PAIR)["these_models"] is None


def test_seeds_that_unrelated_data_lack_do_not_count():
    """Trained at three seeds, unrelated data at one: the gain is of one seed, and so of these models alone."""
    arms = arms_of(PAIR)
    arms["baseline_plus"] = {key: right for key, right in arms["baseline_plus"].items() if key[2] == 0}
    planned = {arm: set(by_key) for arm, by_key in arms_of(PAIR).items()}
    line = verdicts(arms, "pairs", planned)[0]
    assert (line["seeds"], line["rows"], line["verdict"]) == (1, 8, NOT_SHOWN)
    assert line["these_models"] == NOT_TESTED and line["missing"]["baseline_plus"] == 16


def test_missing_cells_of_the_pair_are_named():
    arms = arms_of(PAIR)
    planned = {arm: set(by_key) for arm, by_key in arms.items()}
    del arms["trained"]["fixed_area/t3", "t3", 1]
    line = verdicts(arms, "pairs", planned)[0]
    assert (line["verdict"], line["missing"]) == (NOT_TESTED, {"trained": 1})


def test_a_direction_without_a_row_that_can_tell_is_no_member_of_the_family():
    arms = arms_of(PAIR, parts=("fixed_area", "fixed_task", "modality_area"), noise=9)
    for name in ("single_1", "filler_1"):
        arms[name] = {key: right for key, right in arms[name].items() if not key[0].startswith("fixed_area")}
    _, of_area, of_task, _ = verdicts(arms, "pairs")
    assert (of_area["verdict"], of_area["rows"], of_area["rows_left_out"]) == (CANNOT_TELL, 0, 8)
    assert of_task["verdict"] == COMPOSITION and of_task["p_holm"] <= 2 * of_task["p"]


def test_accuracies_and_their_difference_agree_where_cells_are_missing():
    arms = arms_of(PAIR, noise=8)
    planned = {arm: set(by_key) for arm, by_key in arms.items()}
    for s in (0, 1):
        del arms["trained"]["fixed_area/t3", "t3", s]
    line = verdicts(arms, "pairs", planned)[0]
    accuracy = line["accuracy"]
    assert line["gain"]["mean"] == pytest.approx(accuracy["trained"] - accuracy["baseline_plus"])


def test_records_of_a_patient_and_records_that_return_are_few_draws():
    """One target whose 20 patients are right or wrong as a whole, at three seeds that agree."""
    rights = {"trained": 14, "baseline_plus": 8}
    arms = {
        arm: {("fixed_area/t", "t", s): np.repeat(np.arange(20) < number, RECORDS // 20) for s in range(3)}
        for arm, number in rights.items()
    }
    patients = {"t": np.repeat([f"p{i}" for i in range(20)], RECORDS // 20).tolist()}

    def width(*args, **options) -> float:
        gain = verdicts(arms, "pairs", None, *args, **options)[0]["gain"]
        return gain["ci_high"] - gain["ci_low"]

    assert width(patients) == pytest.approx((RECORDS / 20) ** 0.5 * width(), rel=0.05)
    assert width(patients, same_records=True) == pytest.approx(3**0.5 * width(patients), rel=1e-6)


def test_one_target_says_nothing_of_others():
    assert whole(PAIR, targets=1)["verdict"] == NOT_SHOWN


def test_a_seed_effect_common_to_all_targets_is_no_effect():
    """Eight targets that move together: sign flips of one seed would be sure; two seeds that differ show nothing."""
    arms = arms_of(without(PAIR, "trained"), noise=0.5, seeds=2)
    arms["trained"] = {key: np.arange(RECORDS) < RECORDS * (0.9, 0.5)[key[2]] for key in arms["single_1"]}
    assert verdicts(arms, "pairs")[0]["verdict"] == NOT_SHOWN
    one = {arm: {key: right for key, right in by_key.items() if key[2] == 0} for arm, by_key in arms.items()}
    assert verdicts(one, "pairs")[0]["these_models"] == COMPOSITION


def test_directions_are_adjusted_by_holm():
    parts = ("fixed_area", "fixed_modality", "fixed_task", "modality_area")
    lines = verdicts(arms_of(PAIR | {"trained": dict.fromkeys(parts, 80) | {"fixed_task": 60}}, parts=parts), "pairs")
    assert [line["part"] for line in lines] == ["", *parts]
    of_part = {line["part"]: line for line in lines}
    assert of_part["fixed_area"]["verdict"] == COMPOSITION
    assert of_part["fixed_task"]["verdict"] == TRANSFER
    assert of_part["fixed_area"]["p_holm"] >= 2 * of_part["fixed_area"]["p"]
    assert of_part[""]["p_holm"] == of_part[""]["p"]


def test_a_direction_that_is_composition_by_itself_alone_is_not_after_holm():
    parts = ("fixed_area", "fixed_modality", "fixed_task", "modality_area")
    points = PAIR | {"trained": dict.fromkeys(parts, 40) | {"fixed_area": 80}}
    for seed in range(60):
        arms = arms_of(points, parts=parts, noise=12, seed=seed, targets=4)
        alone = {
            arm: {key: right for key, right in by_key.items() if key[0].startswith("fixed_area")}
            for arm, by_key in arms.items()
        }
        single, line = verdicts(alone, "pairs")[0], verdicts(arms, "pairs")[1]
        if single["verdict"] == COMPOSITION and line["verdict"] != COMPOSITION:
            assert single["p"] < LEVEL <= len(parts) * single["p"]
            return
    raise AssertionError("no draw between the two levels")


def test_an_absent_arm_never_strengthens():
    """Any arm, or any two, taken from random results never move the verdict up; every verdict occurs."""
    rng, before, lowered = np.random.default_rng(5), Counter(), 0
    for i in range(75):
        k = 2 + i % 2
        names = ("trained", "baseline_plus", *itertools.chain(*members(k)), "words_only", "no_images")
        points = {name: int(rng.choice([40, 55, 70, 85])) for name in names}
        if i % 3 == 0:  # else composition is rare
            points |= {"trained": 85} | dict.fromkeys(names[1:], 40)
            points[names[int(rng.integers(len(names)))]] = 60
        seeds = 1 + i % 3
        table = {count: name for name, count in MEMBERS.items() if name != "detection_pairs"}[k]
        arms = arms_of(points, targets=6, seeds=seeds, noise=3, seed=i)
        kind = "these_models" if seeds == 1 else "verdict"
        found = verdicts(arms, table)[0][kind]
        before[found] += 1
        for gone in (*((name,) for name in names), tuple(map(str, rng.choice(names, 2, replace=False)))):
            lines = verdicts(without(arms, *gone), table)
            now = lines[0][kind] if lines else NOT_SHOWN
            assert RANK[now] <= RANK[found], (points, gone, found, now)
            lowered += RANK[now] < RANK[found]
    assert before.keys() >= {COMPOSITION, TRANSFER, NO_CAUSE, NOT_SHOWN, REVERSE} and lowered > 50


def test_a_cell_that_failed_weakens_and_one_that_was_not_planned_is_left_out():
    arms = arms_of(PAIR, parts=("fixed_area", "fixed_task"))
    planned = {arm: set(by_key) for arm, by_key in arms.items()}
    key = ("fixed_area/t3", "t3", 1)
    del arms["single_1"][key]
    line = verdicts(arms, "pairs", planned)[0]
    assert (line["verdict"], line["missing"], line["cells"]) == (NOT_TESTED, {"single_1": 1}, 48)
    of_task = verdicts(arms, "pairs", planned)[2]
    assert (of_task["part"], of_task["verdict"]) == ("fixed_task", COMPOSITION)
    # The member has the target's whole triplet: the row cannot tell.
    for s in range(3):
        planned["single_1"] -= {("fixed_area/t3", "t3", s)}
        arms["trained"]["fixed_area/t3", "t3", s] = np.zeros(RECORDS, bool)
    line = verdicts(arms, "pairs", planned)[0]
    assert (line["verdict"], line["rows_left_out"], line["rows"], line["cells"]) == (COMPOSITION, 1, 15, 45)
    assert key not in telling(planned, 2)


def test_what_stands_beside_decides_nothing():
    line = whole(PAIR | {"words_only": 80, "no_images": 80, "baseline": 90})
    assert line["verdict"] == COMPOSITION
    assert not line["beside"]["no_images"]["up"] and line["beside"]["baseline"]["down"]
    assert whole(PAIR)["beside"] == {"baseline": None, "words_only": None, "no_images": None}


def test_accuracies_are_means_over_targets():
    line = whole(PAIR, noise=0)
    assert line["accuracy"] == pytest.approx({arm: value / 100 for arm, value in PAIR.items()})


# ------------------------------------------------------------------ equivalence


def spread(mean, sd, targets=8, seeds=3, n=4000):
    rng = np.random.default_rng(2)
    noise = rng.standard_normal((targets, seeds))
    noise -= noise.mean()
    return estimate(
        [
            Unit(f"t{t}", s, n, n * (mean + sd * noise[t, s]), n * abs(mean + sd * noise[t, s]))
            for t in range(targets)
            for s in range(seeds)
        ]
    )


@pytest.mark.parametrize(
    ("mean", "sd", "is_within", "is_same"),
    [
        (0.0, 0.01, True, True),
        (0.02, 0.005, True, True),
        (-0.2, 0.01, True, False),  # far below: no more than the bound above 0, and not equivalent
        (0.05, 0.01, False, False),
        (0.0, 0.2, False, False),  # too noisy
    ],
)
def test_equivalence_is_two_one_sided_tests(mean, sd, is_within, is_same):
    found = spread(mean, sd)
    assert (within(found), is_equivalent(found)) == (is_within, is_same)
    # The same as the 90 % interval within the bound.
    low, high = found.interval(0.9)
    assert within(found) == (high < EQUIVALENCE) and is_equivalent(found) == (low > -EQUIVALENCE and high < EQUIVALENCE)


def test_one_seed_is_never_equivalent():
    assert not is_equivalent(spread(0.0, 0.001, seeds=1)) and not is_equivalent(spread(0.0, 0.001, targets=1))


def test_relations_to_the_singles():
    over = whole(PAIR | {"single_1": 79, "single_2": 60}, noise=1)["over"]
    assert (over["single_1"]["relation"], over["single_2"]["relation"]) == ("within", "above")
    assert whole(PAIR | {"single_1": 72}, noise=40)["over"]["single_1"]["relation"] == "open"
