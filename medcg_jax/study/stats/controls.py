"""Controls of a grid's answers: letters, numbers of options, generation, and the tests asked again in another way.

From `predictions/` and, where the grid left them, `controls/`. A line of `controls/CELL.jsonl` has the fields of a line
of predictions, with the id of the record as it was asked plainly, and "control": "shuffled_images" (another record's
image), "shift_N" (the options moved on by N places, N from 1 to one less than there are options) or "two_options" (the
right option and one other).
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medcg_jax.eval.generation import LETTERS, parse_answer
from medcg_jax.eval.predictions import prediction_lines, wilson
from medcg_jax.study.stats.paired import grouped, mcnemar
from medcg_jax.untrusted import FileError, shown

PLAIN = ""
SHUFFLED, TWO, SHIFT = "shuffled_images", "two_options", "shift_"


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of one cell.

    Attributes:
      cell, control: where it is from; control `PLAIN` for the predictions.
      record: the same wherever the same record is asked: (seed or None, subset, id).
      options: number K of the offered letters. logprobs: float[K] nats of them; None where they were not recorded.
      read: the letter of the free answer, "" where it gives none; None where none was asked for.
    """

    cell: str
    control: str
    record: tuple
    answer: str
    predicted: str
    options: int
    logprobs: tuple[float, ...] | None
    read: str | None

    @property
    def right(self) -> bool:
        return self.predicted == self.answer


def controls_of_answers(workdir: Path, results: Sequence[Mapping], fresh: bool) -> list[dict]:
    """The controls of each table and arm, in the order of results.csv; the efficiency curves are left out.

    results: rows of results.csv (`stats.read_results`). fresh: each seed has test records of its own.

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
    found = []
    again: dict[tuple[int, str], tuple[str, frozenset]] = {}
    for (table, arm), own in cells.items():
        answers = []
        for cell, (seed, targets) in own.items():
            of_cell = _cell_answers(workdir, cell, seed if fresh else None, targets)
            for target in targets:
                asked = frozenset((a.control, a.record[2]) for a in of_cell if a.control and a.record[1] == target)
                other, theirs = again.setdefault((seed, target), (cell, asked))
                if asked != theirs:
                    odd = "{}, {}".format(*min(asked ^ theirs))
                    raise FileError(
                        f"{workdir / 'controls' / cell}.jsonl: of {shown(target)} other questions are asked again than in "
                        f"{other}.jsonl, as {shown(odd)[1:-1]}; the same in all are accepted"
                    )
            answers += of_cell
        found.append({"table": table, "part": "", "arm": arm} | controls_of_arm(answers))
    return found


def controls_of_arm(answers: Sequence[Answer]) -> dict:
    """The entry of `controls_of_answers` of one arm, without its table and name."""
    by_control = grouped(answers, lambda a: a.control)
    plain = by_control.pop(PLAIN)
    letters = grouped(plain, lambda a: a.predicted)
    most = max(letters, key=lambda letter: len(letters[letter]))
    return {
        "n": len(plain),
        "records": len({a.record for a in plain}),
        "accuracy": _accuracy(plain),
        "letters": {letter: len(own) / len(plain) for letter, own in letters.items()},
        "most_frequent": most,
        "most_frequent_accuracy": _mean(a.answer == most for a in plain),
        "prior_corrected_accuracy": _mean(prior_corrected(plain)) if all(a.logprobs for a in plain) else None,
        "by_options": [
            {"options": count, "n": len(own), "accuracy": _accuracy(own), "chance": 1 / count}
            for count, own in grouped(plain, lambda a: a.options).items()
        ],
        "generation": _generation([a for a in plain if a.read is not None]),
        "circular": _circular(plain, {c: own for c, own in by_control.items() if c.startswith(SHIFT)}),
        "two_options": _two_options(plain, by_control.get(TWO, [])),
        "shuffled_images": _shuffled(by_control.get(SHUFFLED, [])),
        "not_shuffled": sorted({a.record[1] for a in plain} - {a.record[1] for a in by_control.get(SHUFFLED, [])}),
    }


def prior_corrected(answers: Sequence[Answer]) -> list[bool]:
    """Whether each answer would be right with the arm's liking for letters taken out; not in the answers' order.

    The probabilities of the offered letters, made to sum to 1, are divided by their means over the answers with as many
    options; the largest quotient is the answer. Where all letters are right equally often, a model without a liking for
    any keeps its answers.
    """
    right = []
    for own in grouped(answers, lambda a: a.options).values():
        logprobs = np.array([a.logprobs for a in own])
        shares = np.exp(logprobs - logprobs.max(1, keepdims=True))
        shares /= shares.sum(1, keepdims=True)
        means = shares.mean(0)
        # A letter that no answer gives any probability wins nowhere.
        corrected = np.divide(shares, means, out=np.zeros_like(shares), where=means > 0).argmax(1)
        right += [LETTERS[place] == a.answer for place, a in zip(corrected, own, strict=True)]
    return right


def _generation(asked: Sequence[Answer]) -> dict | None:
    if not asked:
        return None
    lead: dict[tuple, int] = defaultdict(int)
    for a in asked:
        lead[a.record] += int(a.right) - int(a.read == a.answer)
    only_likelihood, only_generated = sum(v > 0 for v in lead.values()), sum(v < 0 for v in lead.values())
    return {
        "n": len(asked), "likelihood": _accuracy(asked), "generated": _mean(a.read == a.answer for a in asked),
        "agreement": _mean(a.read == a.predicted for a in asked),
        "only_likelihood": only_likelihood, "only_generated": only_generated,
        "p": mcnemar(only_likelihood, only_generated),
    }  # fmt: skip


def _circular(plain: Sequence[Answer], shifts: Mapping[str, Sequence[Answer]]) -> dict | None:
    if not shifts:
        return None
    all_right = {(a.cell, a.record): a.right for own in shifts.values() for a in own}
    for own in shifts.values():
        for a in own:
            all_right[a.cell, a.record] &= a.right
    asked = _same_records(plain, all_right)
    return {
        "n": len(asked), "plain": _accuracy(asked),
        "accuracy": _mean(a.right and all_right[a.cell, a.record] for a in asked),
        "by_shift": {
            str(n): _accuracy(own) for n, own in sorted((int(c.removeprefix(SHIFT)), own) for c, own in shifts.items())
        },
    }  # fmt: skip


def _two_options(plain: Sequence[Answer], two: Sequence[Answer]) -> dict | None:
    if not two:
        return None
    asked = _same_records(plain, {(a.cell, a.record) for a in two})
    return {"n": len(two), "plain": _accuracy(asked), "accuracy": _accuracy(two)}


def _shuffled(answers: Sequence[Answer]) -> dict | None:
    if not answers:
        return None
    accuracy, chance = _accuracy(answers), _mean(1 / a.options for a in answers)
    records = len({a.record for a in answers})
    low, high = wilson(accuracy * records, records)
    return {
        "n": len(answers), "accuracy": accuracy, "ci_low": low, "ci_high": high, "chance": chance,
        "at_chance": low <= chance <= high,
    }  # fmt: skip


def _same_records(plain: Sequence[Answer], keys) -> list[Answer]:
    return [a for a in plain if (a.cell, a.record) in keys]


def _accuracy(answers: Iterable[Answer]) -> float:
    return _mean(a.right for a in answers)


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _cell_answers(workdir: Path, cell: str, seed: int | None, targets: set[str]) -> list[Answer]:
    """What one cell answered on its targets, as asked and in its controls."""
    plain = list(_read(workdir / "predictions" / f"{cell}.jsonl", cell, seed, targets))
    path = workdir / "controls" / f"{cell}.jsonl"
    if not path.exists():
        return plain
    controls = list(_read(path, cell, seed, targets))
    options = {a.record: a.options for a in plain}
    asked: dict[tuple, list[str]] = defaultdict(list)
    for a in controls:
        place = _place(path, a.record)
        if a.record not in options:
            raise FileError(f"{place}: not among the predictions of the cell")
        known = {SHUFFLED, TWO, *_shifts(options[a.record])}
        if a.control not in known or a.control in asked[a.record]:
            raise FileError(f"{place}: control '{shown(a.control)[1:-1]}'; each of {', '.join(sorted(known))} once")
        asked[a.record].append(a.control)
    for record, names in asked.items():
        missing = set(_shifts(options[record])) - set(names)
        if missing and any(name.startswith(SHIFT) for name in names):
            raise FileError(f"{_place(path, record)}: no {min(missing)}; all shifts or none")
    return plain + controls


def _place(path: Path, record: tuple) -> str:
    return f"{path}, record {shown(record[2])[1:-1]} of {shown(record[1])[1:-1]}"


def _shifts(options: int) -> list[str]:
    return [f"{SHIFT}{n}" for n in range(1, options)]


def _read(path: Path, cell: str, seed: int | None, targets: set[str]) -> Iterable[Answer]:
    for line in prediction_lines(path):
        if line["subset"] in targets:
            text = line["generated"]
            yield Answer(
                cell, line.get("control", PLAIN), (seed, line["subset"], line["id"]), line["answer"],
                line["predicted"], len(line["options"]), line["logprobs"] and tuple(line["logprobs"]),
                None if text is None else parse_answer(text, line["options"]),
            )  # fmt: skip
