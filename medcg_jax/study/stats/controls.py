"""Controls of a grid's answers: letters, numbers of options, generation, and answers to changed questions.

Computed from `predictions/` and, where the grid has it, `controls/`. A line of `controls/CELL.jsonl` has the fields of
a prediction, the id of the unchanged record, and "control": "shuffled_images" (another record's image), "blank_images"
(a grey image), "text_only" (no image), "shift_N" (the options moved on by N places, N from 1 to one less than there are
options) or "two_options" (the right option and one other).
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from medcg_jax.eval.generation import LETTERS
from medcg_jax.eval.predictions import wilson
from medcg_jax.study.stats.answers import PLAIN, Answers
from medcg_jax.study.stats.paired import mcnemar
from medcg_jax.untrusted import FileError, shown

SHUFFLED, TWO, SHIFT = "shuffled_images", "two_options", "shift_"
# Controls that do not show the record's image: their accuracy is what the text and the letters alone give.
BLIND = (SHUFFLED, "blank_images", "text_only")
# Columns that identify a record. `controls_of_answers` adds "seed": one value for all seeds where the test records are
# the same at every seed.
RECORD = ["seed", "subset", "id"]


def controls_of_answers(answers: Answers, results: Sequence[Mapping], fresh: bool) -> list[dict]:
    """The controls of each table and arm, in the order of results.csv; the efficiency curves are left out.

    results: rows of results.csv (`grid_files.read_results`). fresh: each seed has other test records.

    [
      {"table": "pairs", "part": "", "arm": "trained", "n": 7200, "records": 2400,  # answers, and records behind them
       "accuracy": .77,
       "letters": {"A": .26, "B": .25},           # share of each letter among the predicted ones
       "most_frequent": "A", "most_frequent_accuracy": .25,     # what answering that letter always would give
       "prior_corrected_accuracy": .78,           # see `prior_corrected`
       "by_options": [{"options": 2, "n": 3600, "accuracy": .8, "chance": .5}],
       "generation": {"n": 7200, "likelihood": .77, "generated": .75,     # accuracies on the same records
                      "agreement": .95,           # share where the free answer gives the likeliest letter
                      "only_likelihood": 60, "only_generated": 12, "p": 1e-8},    # exact McNemar
       "circular": {"n": 7200, "plain": .77, "accuracy": .7,    # right as asked and at every shift
                    "by_shift": {"1": .76, "2": .75, "3": .76}},
       "two_options": {"n": 7200, "plain": .77, "accuracy": .85},
       "shuffled_images": {"n": 7200, "accuracy": .3, "ci_low": .29, "ci_high": .32, "chance": .31, "at_chance": True},
       "blank_images": None, "text_only": None,                 # as "shuffled_images"
       "not_shuffled": []},                       # subsets without such answers: none, or one image in their tests
    ]

    Accuracies are fractions of answers. Answers to one record in several rows or seeds are not independent, so the
    record counts once: in McNemar's test by its majority, in Wilson's interval by its share. "generation" to
    "text_only" are None where the grid has no such answers. "n" counts answers, "chance" is the mean of
    1 / options.

    Raises:
      FileError: a file of controls does not fit the predictions beside it; the message names the file and the record.
    """
    cells: dict[tuple[str, str], dict[str, tuple[int, set[str]]]] = defaultdict(dict)
    for row in results:
        if row["table"] != "efficiency":
            _, targets = cells[row["table"], row["arm"]].setdefault(row["cell"], (row["seed"], set()))
            targets.add(row["target"])
    entries = []
    first_questions: dict[tuple[int, str], tuple[str, set]] = {}
    for (table, arm), arm_cells in cells.items():
        frames = []
        for cell, (seed, targets) in arm_cells.items():
            frame = _cell_answers(answers, cell, targets)
            for target in targets:
                changed = frame[(frame["control"] != PLAIN) & (frame["subset"] == target)]
                questions = set(zip(changed["control"], changed["id"], strict=True))
                first_cell, expected = first_questions.setdefault((seed, target), (cell, questions))
                if questions != expected:
                    example = "{}, {}".format(*min(questions ^ expected))
                    raise FileError(
                        f"{answers.path(cell, 'controls')}: of {shown(target)} other questions are asked again than in "
                        f"{first_cell}.jsonl, as {shown(example)[1:-1]}; expected the same in all"
                    )
            frames.append(frame.assign(cell=cell, seed=seed if fresh else 0))
        entries.append({"table": table, "part": "", "arm": arm} | controls_of_arm(pd.concat(frames, ignore_index=True)))
    return entries


def controls_of_arm(answers: pd.DataFrame) -> dict:
    """One arm's entry of `controls_of_answers`, without its table and name.

    answers: the columns of `Answers`, "cell" and "seed".
    """
    plain = answers[answers["control"] == PLAIN]
    blind = {name: answers[answers["control"] == name] for name in BLIND}
    letters = plain["predicted"].value_counts().sort_index() / len(plain)
    most_frequent = letters.idxmax()
    return {
        "n": len(plain),
        "records": _num_records(plain),
        "accuracy": _mean(plain["right"]),
        "letters": letters.to_dict(),
        "most_frequent": most_frequent,
        "most_frequent_accuracy": _mean(plain["answer"] == most_frequent),
        "prior_corrected_accuracy": _mean(prior_corrected(plain))
        if "A" in plain and plain["A"].notna().all()
        else None,
        "by_options": [
            {"options": int(count), "n": len(group), "accuracy": _mean(group["right"]), "chance": 1 / int(count)}
            for count, group in plain.groupby("options")
        ],
        "generation": _generation(plain[plain["read"].notna()]),
        "circular": _circular(plain, answers[answers["control"].str.startswith(SHIFT)]),
        "two_options": _two_options(plain, answers[answers["control"] == TWO]),
        **{name: _blind(asked) for name, asked in blind.items()},
        "not_shuffled": sorted({*plain["subset"]} - {*blind[SHUFFLED]["subset"]}),
    }


def prior_corrected(answers: pd.DataFrame) -> list[bool]:
    """Whether each answer would be right without the arm's bias for letters; not in the order of `answers`.

    The probabilities of the offered letters, normalized to sum to 1, are divided by their means over the answers with
    as many options; the letter with the largest quotient is the new answer. Where all letters are right equally often,
    an unbiased model keeps its answers.
    """
    right = []
    for count, group in answers.groupby("options"):
        logprobs = group[list(LETTERS[:count])].to_numpy(float)
        shares = np.exp(logprobs - logprobs.max(1, keepdims=True))
        shares /= shares.sum(1, keepdims=True)
        means = shares.mean(0)
        # A letter with probability 0 in all answers never wins.
        corrected = np.divide(shares, means, out=np.zeros_like(shares), where=means > 0).argmax(1)
        right += [LETTERS[i] == answer for i, answer in zip(corrected, group["answer"], strict=True)]
    return right


def _generation(asked: pd.DataFrame) -> dict | None:
    if asked.empty:
        return None
    read_right = asked["read"] == asked["answer"]
    lead = (asked["right"].astype(int) - read_right).groupby([asked[key] for key in RECORD]).sum()
    only_likelihood, only_generated = int((lead > 0).sum()), int((lead < 0).sum())
    return {
        "n": len(asked),
        "likelihood": _mean(asked["right"]),
        "generated": _mean(read_right),
        "agreement": _mean(asked["read"] == asked["predicted"]),
        "only_likelihood": only_likelihood,
        "only_generated": only_generated,
        "p": mcnemar(only_likelihood, only_generated),
    }


def _circular(plain: pd.DataFrame, shifts: pd.DataFrame) -> dict | None:
    if shifts.empty:
        return None
    at_every_shift = shifts.groupby(["cell", *RECORD])["right"].all().rename("at_every_shift").reset_index()
    asked = plain.merge(at_every_shift)
    by_shift = shifts.groupby(shifts["control"].str.removeprefix(SHIFT).astype(int))["right"]
    return {
        "n": len(asked),
        "plain": _mean(asked["right"]),
        "accuracy": _mean(asked["right"] & asked["at_every_shift"]),
        "by_shift": {str(n): _mean(right) for n, right in by_shift},
    }


def _two_options(plain: pd.DataFrame, two: pd.DataFrame) -> dict | None:
    if two.empty:
        return None
    asked = plain.merge(two[["cell", *RECORD]])
    return {"n": len(two), "plain": _mean(asked["right"]), "accuracy": _mean(two["right"])}


def _blind(answers: pd.DataFrame) -> dict | None:
    if answers.empty:
        return None
    accuracy, chance, records = _mean(answers["right"]), _mean(1 / answers["options"]), _num_records(answers)
    low, high = wilson(accuracy * records, records)
    return {
        "n": len(answers),
        "accuracy": accuracy,
        "ci_low": low,
        "ci_high": high,
        "chance": chance,
        "at_chance": low <= chance <= high,
    }


def _num_records(answers: pd.DataFrame) -> int:
    return len(answers[RECORD].drop_duplicates())


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(np.asarray(values)))


def _cell_answers(answers: Answers, cell: str, targets: set[str]) -> pd.DataFrame:
    """One cell's answers on its targets, to unchanged and changed questions."""
    plain = answers.frame(cell)
    plain = plain[plain["subset"].isin(targets)]
    path = answers.path(cell, "controls")
    if not path.exists():
        return plain
    controls = answers.frame(cell, "controls")
    controls = controls[controls["subset"].isin(targets)]
    options = dict(zip(zip(plain["subset"], plain["id"], strict=True), plain["options"], strict=True))
    controls_of: dict[tuple[str, str], set[str]] = defaultdict(set)
    for control, subset, name in zip(controls["control"], controls["subset"], controls["id"], strict=True):
        where = f"{path}, record {shown(name)[1:-1]} of {shown(subset)[1:-1]}"
        if (subset, name) not in options:
            raise FileError(f"{where}: not among the predictions of the cell")
        known = {*BLIND, TWO, *_shifts(options[subset, name])}
        if control not in known:
            raise FileError(f"{where}: control '{shown(control)[1:-1]}'; each of {', '.join(sorted(known))} once")
        controls_of[subset, name].add(control)
    for (subset, name), names in controls_of.items():
        missing = set(_shifts(options[subset, name])) - names
        if missing and any(control.startswith(SHIFT) for control in names):
            where = f"{path}, record {shown(name)[1:-1]} of {shown(subset)[1:-1]}"
            raise FileError(f"{where}: no {min(missing)}; all shifts or none")
    return pd.concat([plain, controls], ignore_index=True)


def _shifts(options: int) -> list[str]:
    return [f"{SHIFT}{n}" for n in range(1, options)]
