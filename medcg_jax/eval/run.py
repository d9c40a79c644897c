"""Evaluation of one set of parameters on records: predictions, the file they are kept in, and their summary."""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from medcg_jax.eval.choice import letter_logits, option_logprobs
from medcg_jax.eval.generate import LETTERS, greedy, parse_answer, prefill
from medcg_jax.eval.intervals import wilson
from medcg_jax.eval.prediction_lines import prediction_lines
from medcg_jax.files import write_whole
from medcg_jax.mesh import batch_sharding, check_batch, own_rows, put_batch, replicated
from medcg_jax.train.preempt import stop_if_told
from medcg_jax.untrusted import FileError

if TYPE_CHECKING:
    from medcg_jax.data.encoding import Encoded
    from medcg_jax.data.tokenizer import Tokenizer

# Decimals of a log-probability in the file: differences between meshes lie below.
DECIMALS = 4
# Batches handed to the device before the host waits for one of them.
MAX_AHEAD = 4


class NonFiniteScores(ValueError):
    """Log-probabilities are not numbers; the message names the record."""


@dataclass(frozen=True)
class Prediction:
    """One record's outcome; the fields are the keys of a line of the predictions file.

    Attributes:
      options: the texts, in letter order. answer: the right letter.
      predicted: the offered letter with the largest log-probability (the first of equals).
      logprobs: of each offered letter in nats, over the full vocabulary.
      generated: text of the free answer; None where none was asked for.
    """

    id: str
    subset: str
    options: tuple[str, ...]
    answer: str
    predicted: str
    logprobs: tuple[float, ...]
    generated: str | None = None


@dataclass(frozen=True)
class Evaluator:
    """The evaluation of one model on a mesh, compiled once and used for every set of parameters.

    `num_new` tokens are generated; 0: none.
    """

    mesh: Mesh
    jitted: object
    num_new: int

    def __call__(self, params, batch: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """(float32[B, K] log-probabilities of the letters, int32[B, num_new] generated tokens) of one batch.

        params: of the whole model, trainable and frozen joined.
        """
        arrays = {key: value for key, value in batch.items() if key != "row_mask"}
        with jax.set_mesh(self.mesh):
            return self.jitted(params, put_batch(arrays, batch_sharding(self.mesh)))


def make_evaluator(
    mesh: Mesh, graphdef: nnx.GraphDef, shardings, *, eos_id: int, max_new_tokens: int, generate: bool = True
) -> Evaluator:
    """The evaluator of a model. shardings: NamedSharding of each of its parameters."""
    num_new = max_new_tokens if generate else 0

    def evaluate_batch(params, batch):
        model = nnx.merge(graphdef, params)
        if not num_new:
            logprobs = option_logprobs(letter_logits(model, batch), batch["option_ids"])
            return logprobs, np.zeros((len(batch["tokens"]), 0), np.int32)
        logits, cache = prefill(model, batch, num_new - 1)
        logprobs = option_logprobs(logits, batch["option_ids"])
        return logprobs, greedy(model, logits, cache, num_new=num_new, eos_id=eos_id)[0]

    jitted = jax.jit(evaluate_batch, in_shardings=(shardings, batch_sharding(mesh)), out_shardings=replicated(mesh))
    return Evaluator(mesh, jitted, num_new)


def evaluate(
    evaluator: Evaluator, params, encoded: "Encoded", tokenizer: "Tokenizer", *, batch_size: int
) -> list[Prediction]:
    """A prediction for every record, in the order of `encoded` (`data.encoding.encode_eval`'s).

    params: of the whole model, on the evaluator's mesh. batch_size: rows of a batch over all devices; records of about
    one length share a batch, and the last one is filled up. Its size changes the rounding of scores alone: of 384
    phantoms' records 5 had another fourth decimal, none another letter.

    Raises:
      ConfigError: the mesh cannot split the batch.
      ValueError: log-probabilities that are not finite, with the record named.
    """
    from medcg_jax.data.eval_batches import eval_batches, eval_order

    check_batch(evaluator.mesh, batch_size, "eval.batch_size")
    outputs: list[tuple] = []
    for batch, _ in eval_batches(encoded, batch_size, rows=own_rows(evaluator.mesh, batch_size)):
        outputs.append(evaluator(params, batch))
        stop_if_told()
        if len(outputs) > MAX_AHEAD:
            jax.block_until_ready(outputs[-1 - MAX_AHEAD])
    if not outputs:
        return []
    outputs = jax.device_get(outputs)
    logprobs, tokens = (np.concatenate(parts) for parts in zip(*outputs, strict=True))
    # Back from the order of the batches.
    found = np.argsort(eval_order(encoded))
    return predictions_of(encoded, logprobs[found], tokens[found] if evaluator.num_new else None, tokenizer)


def predictions_of(
    encoded: "Encoded", logprobs: np.ndarray, tokens: np.ndarray | None, tokenizer: "Tokenizer"
) -> list[Prediction]:
    """The predictions of these rows. logprobs: float32[N, K]; tokens: int32[N, num_new] that were generated, or None.

    Raises:
      NonFiniteScores: log-probabilities that are not finite, with the record named.
    """
    predictions = []
    for i, record in enumerate(encoded.records.records):
        own = logprobs[i, : len(record.options)]
        if not np.isfinite(own).all():
            raise NonFiniteScores(f"record {record.id}: the letters' log-probabilities are {own.tolist()}")
        generated = None if tokens is None else tokenizer.decode(tokens[i].tolist())
        predictions.append(
            Prediction(
                record.id, record.subset, tuple(record.options), record.answer, LETTERS[int(own.argmax())],
                tuple(round(float(x), DECIMALS) + 0.0 for x in own), generated,
            )
        )  # fmt: skip
    return predictions


def write_predictions(path: Path, predictions: Iterable[Prediction]) -> None:
    """Writes one JSON line for each prediction, in their order; the file appears whole or not at all."""
    write_whole(path, "".join(_line(p) + "\n" for p in predictions))


def write_controls(path: Path, controls: Mapping[str, Iterable[Prediction]]) -> None:
    """The same of questions asked again, with the control's name as a further key, "control"."""
    lines = (_line(p, control=name) + "\n" for name, predictions in controls.items() for p in predictions)
    write_whole(path, "".join(lines))


def read_predictions(path: Path) -> list[Prediction]:
    """What `write_predictions` wrote. Raises FileError as `prediction_lines`, or without log-probabilities."""
    predictions = []
    for line in prediction_lines(path):
        if line["logprobs"] is None:
            raise FileError(f"{path}: record {line['id']} has no log-probabilities")
        values = {name.name: line[name.name] for name in dataclasses.fields(Prediction)}
        predictions.append(Prediction(**values | {key: tuple(values[key]) for key in ("options", "logprobs")}))
    return predictions


def summary(predictions: Sequence[Prediction]) -> dict:
    """How predictions turned out; shares are 0-1, and None where nothing was asked.

    n, correct, accuracy, ci_low, ci_high: by the letters' likelihoods, with Wilson's 95 % interval.
    letters, answers: how often each letter was predicted, and was right.
    letter_mass: mean probability of the offered letters together; near 0 the prompt or the ids are wrong.
    generated_accuracy, unparsed_rate: of the free answers; an unparsed one is no right one.
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


def _line(prediction: Prediction, **more: str) -> str:
    fields = dataclasses.asdict(prediction) | more
    shown = [f"{x:.{DECIMALS}f}" for x in prediction.logprobs]
    # Numbers with all their decimals, whatever they are, so that equal predictions are equal bytes.
    fields["logprobs"] = None
    text = json.dumps(fields, ensure_ascii=False)
    return text.replace('"logprobs": null', f'"logprobs": [{", ".join(shown)}]', 1)
