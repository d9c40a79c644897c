"""Controls of a grid's answers: letters, numbers of options, generation, and the tests asked again in another way.

From `predictions/` and, where the grid left them, `controls/`. A line of `controls/CELL.jsonl` has the fields of a line
of predictions, with the id of the record as it was asked plainly, and "control": "shuffled_images" (another record's
image), "shift_N" (the options moved on by N places, N from 1 to one less than there are options) or "two_options" (the
right option and one other).
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
# What is the same wherever the same record is asked. "seed" is a column that `controls_of_answers` adds: one value for
# all seeds where the test records are the same at every seed.
RECORD = ["seed", "subset", "id"]


def controls_of_answers(answers: Answers, results: Sequence[Mapping], fresh: bool) -> list[dict]:
    """The controls of each table and arm, in the order of results.csv; the efficiency curves are left out.

    results: rows of results.csv (`grid_files.read_results`). fresh: each seed has test records of its own.

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
       "not_shuffled": []},                       # subsets without such answers: none, or one image in their tests
    ]

    Accuracies are fractions of answers. A record that several rows or seeds ask counts once in tests and intervals: in
    McNemar's with its majority, in Wilson's with its share, for its answers are not independent. The four before the
    last are None where the grid left no such answers. "n" is of answers, "chance" the mean of 1 / options.

    Raises:
      FileError: a file of controls that does not fit the predictions beside it; it names the file and the record.
    """
    cells: dict[tuple[str, str], dict[str, tuple[int, set[str]]]] = defaultdict(dict)
    for row in results:
        if row["table"] != "efficiency":
            _, targets = cells[row["table"], row["arm"]].setdefault(row["cell"], (row["seed"], set()))
            targets.add(row["target"])
    entries = []
    first_asked: dict[tuple[int, str], tuple[str, set]] = {}
    for (table, arm), of_arm in cells.items():
        frames = []
        for cell, (seed, targets) in of_arm.items():
            frame = _cell_answers(answers, cell, targets)
            for target in targets:
                again = frame[(frame["control"] != PLAIN) & (frame["subset"] == target)]
                asked = set(zip(again["control"], again["id"], strict=True))
                other, theirs = first_asked.setdefault((seed, target), (cell, asked))
                if asked != theirs:
                    odd = "{}, {}".format(*min(asked ^ theirs))
                    raise FileError(
                        f"{answers.path(cell, 'controls')}: of {shown(target)} other questions are asked again than in "
                        f"{other}.jsonl, as {shown(odd)[1:-1]}; expected the same in all"
                    )
            frames.append(frame.assign(cell=cell, seed=seed if fresh else 0))
        entries.append({"table": table, "part": "", "arm": arm} | controls_of_arm(pd.concat(frames, ignore_index=True)))
    return entries


def controls_of_arm(answers: pd.DataFrame) -> dict:
    """The entry of `controls_of_answers` of one arm, without its table and name.

    answers: columns as of `Answers`, with "cell" and "seed".
    """
    plain = answers[answers["control"] == PLAIN]
    shuffled = answers[answers["control"] == SHUFFLED]
    letters = plain["predicted"].value_counts().sort_index() / len(plain)
    most = letters.idxmax()
    return {
        "n": len(plain),
        "records": _num_records(plain),
        "accuracy": _mean(plain["right"]),
        "letters": letters.to_dict(),
        "most_frequent": most,
        "most_frequent_accuracy": _mean(plain["answer"] == most),
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
        "shuffled_images": _shuffled(shuffled),
        "not_shuffled": sorted({*plain["subset"]} - {*shuffled["subset"]}),
    }


def prior_corrected(answers: pd.DataFrame) -> list[bool]:
    """Whether each answer would be right with the arm's liking for letters taken out; not in the answers' order.

    The probabilities of the offered letters, made to sum to 1, are divided by their means over the answers with as many
    options; the largest quotient is the answer. Where all letters are right equally often, a model without a liking for
    any keeps its answers.
    """
    right = []
    for count, group in answers.groupby("options"):
        logprobs = group[list(LETTERS[:count])].to_numpy(float)
        shares = np.exp(logprobs - logprobs.max(1, keepdims=True))
        shares /= shares.sum(1, keepdims=True)
        means = shares.mean(0)
        # A letter that no answer gives any probability wins nowhere.
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


def _shuffled(answers: pd.DataFrame) -> dict | None:
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
    """What one cell answered on its targets, as asked and in its controls."""
    plain = answers.frame(cell)
    plain = plain[plain["subset"].isin(targets)]
    path = answers.path(cell, "controls")
    if not path.exists():
        return plain
    controls = answers.frame(cell, "controls")
    controls = controls[controls["subset"].isin(targets)]
    options = dict(zip(zip(plain["subset"], plain["id"], strict=True), plain["options"], strict=True))
    asked: dict[tuple[str, str], set[str]] = defaultdict(set)
    for control, *record in zip(controls["control"], controls["subset"], controls["id"], strict=True):
        subset, name = record
        where = f"{path}, record {shown(name)[1:-1]} of {shown(subset)[1:-1]}"
        if (subset, name) not in options:
            raise FileError(f"{where}: not among the predictions of the cell")
        known = {SHUFFLED, TWO, *_shifts(options[subset, name])}
        if control not in known:
            raise FileError(f"{where}: control '{shown(control)[1:-1]}'; each of {', '.join(sorted(known))} once")
        asked[subset, name].add(control)
    for (subset, name), controls_of_record in asked.items():
        missing = set(_shifts(options[subset, name])) - controls_of_record
        if missing and any(control.startswith(SHIFT) for control in controls_of_record):
            where = f"{path}, record {shown(name)[1:-1]} of {shown(subset)[1:-1]}"
            raise FileError(f"{where}: no {min(missing)}; all shifts or none")
    return pd.concat([plain, controls], ignore_index=True)


def _shifts(options: int) -> list[str]:
    return [f"{SHIFT}{n}" for n in range(1, options)]
