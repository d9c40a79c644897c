"""Predictions of choice questions: their file, its checks, and their summary."""

import dataclasses
import functools
import json
import math
import string
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medcg_jax.eval.generation import LETTERS, parse_answer
from medcg_jax.files import write_whole
from medcg_jax.untrusted import FileError, article_of, check_number, json_lines, shown

if TYPE_CHECKING:
    from medcg_jax.data.encoding import Encoded
    from medcg_jax.data.tokenizer import Tokenizer

# Decimals of a log-probability in the file; meshes differ by less.
DECIMALS = 4
# A file of answers: 100,000 records with long options take some 60 MB.
MAX_ANSWER_BYTES = 2**27
# In float32 the logarithm of a probability near 1 may be a little above 0.
MOST_LOGPROB = 0.01


class NonFiniteScores(ValueError):
    """Log-probabilities are not finite; the message names the record."""


@dataclass(frozen=True)
class Prediction:
    """A model's answer to one record; the fields are the keys of a line of the predictions file.

    Attributes:
      options: the texts, in letter order. answer: the right letter.
      predicted: the offered letter with the largest log-probability (the first of equals).
      logprobs: of each offered letter in nats, over the full vocabulary.
      generated: text of the free answer; None without one.
      group: patient or lesion of the record; "" if unknown, and then no key of the line.
    """

    id: str
    subset: str
    options: tuple[str, ...]
    answer: str
    predicted: str
    logprobs: tuple[float, ...]
    generated: str | None = None
    group: str = ""


def predictions_of(
    encoded: "Encoded", logprobs: np.ndarray, tokens: np.ndarray | None, tokenizer: "Tokenizer"
) -> list[Prediction]:
    """The predictions of these rows. logprobs: float32[N, K]; tokens: int32[N, num_new] that were generated, or None.

    Raises:
      NonFiniteScores: log-probabilities that are not finite, with the record named.
    """
    predictions = []
    for i, record in enumerate(encoded.records.records):
        scores = logprobs[i, : len(record.options)]
        if not np.isfinite(scores).all():
            raise NonFiniteScores(f"record {record.id}: the letters' log-probabilities are {scores.tolist()}")
        generated = None if tokens is None else tokenizer.decode(tokens[i].tolist())
        predictions.append(
            Prediction(
                record.id, record.subset, tuple(record.options), record.answer, LETTERS[int(scores.argmax())],
                tuple(round(float(x), DECIMALS) + 0.0 for x in scores), generated,
                record.group,
            )
        )  # fmt: skip
    return predictions


def write_predictions(path: Path, predictions: Iterable[Prediction]) -> None:
    """Writes one JSON line for each prediction, in their order; the file appears whole or not at all."""
    write_whole(path, "".join(_line(p) + "\n" for p in predictions))


def write_controls(path: Path, controls: Mapping[str, Iterable[Prediction]]) -> None:
    """Writes controls like predictions, with the control's name under a further key, "control"."""
    lines = (_line(p, control=name) + "\n" for name, predictions in controls.items() for p in predictions)
    write_whole(path, "".join(lines))


def _line(prediction: Prediction, **more: str) -> str:
    fields = dataclasses.asdict(prediction) | more
    if not prediction.group:
        del fields["group"]
    shown = [f"{x:.{DECIMALS}f}" for x in prediction.logprobs]
    # Numbers with a fixed number of decimals, so that equal predictions are equal bytes.
    fields["logprobs"] = None
    text = json.dumps(fields, ensure_ascii=False)
    return text.replace('"logprobs": null', f'"logprobs": [{", ".join(shown)}]', 1)


def prediction_lines(path: str | Path) -> Iterator[dict[str, Any]]:
    """The lines of a predictions file, or of a controls file, whose lines also have "control"; in order.

    Each has "id", "subset" text; "options" texts; "answer", "predicted" one of the offered letters; "logprobs" a finite
    number for each option, or None; "generated" text or None; "group" text, where the record's patient or lesion is known.
    No question occurs twice.

    Raises:
      FileError: the file cannot be read, or a line is not of this form; the message names file, line and field.
    """
    asked: dict[tuple[str, str, str], int] = {}
    for number, line in json_lines(path, max_bytes=MAX_ANSWER_BYTES):
        name = f"{path}, line {number}"
        checked = {"logprobs": None, "generated": None, **line}
        check_line(checked, name)
        first = asked.setdefault((checked["subset"], checked["id"], checked.get("control", "")), number)
        if first != number:
            raise FileError(f"{name}: record {shown(line['id'])} stands in line {first} already")
        yield checked


def check_line(line: dict, name: str) -> None:
    """Raises FileError if a line is no prediction. name: of the file and line."""
    for key in ("id", "subset", *(key for key in ("control", "group") if key in line)):
        check_text(line, key, name)
    options = line.get("options")
    most = len(string.ascii_uppercase)
    if not isinstance(options, list) or not 0 < len(options) <= most or not all(isinstance(o, str) for o in options):
        raise FileError(f"{name}: {field(line, 'options')}: expected a list of 1 to {most} texts")
    letters = string.ascii_uppercase[: len(options)]
    for key in ("answer", "predicted"):
        if not isinstance(line.get(key), str) or len(line[key]) != 1 or line[key] not in letters:
            raise FileError(f"{name}: {field(line, key)}: expected one of {', '.join(letters)}")
    logprobs = line["logprobs"]
    if logprobs is not None:
        if not isinstance(logprobs, list) or len(logprobs) != len(options):
            count = f"{len(logprobs)} values" if isinstance(logprobs, list) else article_of(logprobs)
            raise FileError(f"{name}: logprobs: {count}; expected a number for each of the {len(options)} options")
        for value in logprobs:
            check_number(value, f"{name}: logprobs", most=MOST_LOGPROB)
    if line["generated"] is not None:
        check_text(line, "generated", name, empty=True)


def check_text(line: dict, key: str, name: str, *, empty: bool = False) -> None:
    """Raises FileError if a field of a line is no text, or is empty although `empty` is false."""
    if not isinstance(line.get(key), str) or not (line[key] or empty):
        raise FileError(f"{name}: {field(line, key)}: expected text")


def field(line: dict, key: str) -> str:
    """A field with its value for a message: `answer="E"`, or that it is missing."""
    return f"{key}={shown(line[key])}" if key in line else f"{key} is missing"


def summary(predictions: Sequence[Prediction]) -> dict:
    """Scores of predictions; shares are 0-1, and None without predictions.

    n, correct, accuracy, ci_low, ci_high: by the letters' likelihoods, with Wilson's 95 % interval.
    letters, answers: how often each letter was predicted, and was the right one.
    letter_mass: mean of the offered letters' total probability; near 0 if the prompt or the token ids are wrong.
    generated_accuracy, unparsed_rate: of the free answers; an answer that cannot be parsed counts as wrong.
    """
    n = len(predictions)
    correct = sum(p.predicted == p.answer for p in predictions)
    read = [parse_answer(p.generated, p.options) for p in predictions if p.generated is not None]
    asked = [p.answer for p in predictions if p.generated is not None]
    hits = sum(a == b for a, b in zip(read, asked, strict=True))
    return {
        "n": n,
        "correct": correct,
        "accuracy": correct / n if n else None,
        **dict(zip(("ci_low", "ci_high"), wilson(correct, n), strict=True)),
        "letters": dict(sorted(Counter(p.predicted for p in predictions).items())),
        "answers": dict(sorted(Counter(p.answer for p in predictions).items())),
        "letter_mass": sum(sum(math.exp(x) for x in p.logprobs) for p in predictions) / n if n else None,
        "generated_accuracy": hits / len(read) if read else None,
        "unparsed_rate": read.count("") / len(read) if read else None,
    }


def baselines(predictions: Sequence[Prediction]) -> dict:
    """What answers without a look at the image reach, 0-1: {"chance": a drawn letter on average, "majority": always the
    most frequent label, the text of the right option}; None without predictions."""
    labels = Counter(p.options[LETTERS.index(p.answer)] for p in predictions)
    n = len(predictions)
    return {
        "chance": sum(1 / len(p.options) for p in predictions) / n if n else None,
        "majority": max(labels.values()) / n if n else None,
    }


# Cached, as a report needs the same few counts thousands of times.
@functools.lru_cache(1 << 14)
def wilson(correct: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of an accuracy, as fractions; (0, 1) if n is 0."""
    if not n:
        return 0.0, 1.0
    # With pandas and scipy.stats it takes a second, which a refusal and an answer should not wait for.
    from statsmodels.stats.proportion import proportion_confint

    return proportion_confint(correct, n, alpha=1 - level, method="wilson")
