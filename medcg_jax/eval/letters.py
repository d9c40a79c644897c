"""Choice questions, answered by the likelihood of the options' letters, and by generated free answers.

Tests run as one queue: a batch of the next set follows a batch of the last one, and answers are read when they are there.
Further questions about an image (controls that move options, or show another record's image) go on from the keys and
values of the record's own row, so that what both have in common, image and often question, is computed once. Free answers
are generated for the record's own question alone.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from medcg_jax.eval.features import image_input
from medcg_jax.eval.generation import greedy, prefill, with_room
from medcg_jax.eval.predictions import Prediction, predictions_of
from medcg_jax.mesh import batch_sharding, check_batch, local_rows, put_batch, replicated
from medcg_jax.train.preempt import stop_if_told

if TYPE_CHECKING:
    from medcg_jax.data.encoding import Encoded
    from medcg_jax.data.eval_batches import Asked
    from medcg_jax.data.tokenizer import Tokenizer

# Batches dispatched before the host waits for the oldest.
MAX_AHEAD = 4
# Caches of prompts on the devices at once, each of a batch whose further questions are asked.
MAX_CACHES = 2


def option_logprobs(logits: jax.Array, option_ids: jax.Array) -> jax.Array:
    """float32[B, K] nats: log-probability of each option's letter over the full vocabulary; -inf at pads.

    logits: float[B, V] at the last prompt position. option_ids: int32[B, K] token ids of the letters, -1 pads.
    """
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    chosen = jnp.take_along_axis(logprobs, jnp.maximum(option_ids, 0), axis=-1)
    return jnp.where(option_ids >= 0, chosen, -jnp.inf)


def letter_logits(model, batch: dict[str, Any]) -> jax.Array:
    """float32[B, V]: the logits at each prompt's end, without a cache.

    batch: tokens, segment_ids int32[B, T] right-padded, images or features (`features.image_input`), last_position
    int32[B].
    """
    hidden, _ = model.hidden(
        batch["tokens"],
        **image_input(model, batch),
        segment_ids=batch["segment_ids"],
        at=batch["last_position"][:, None],
    )
    return model.logits(hidden[:, 0])


class Queue:
    """Outputs of dispatched programs, by number; the host waits for the oldest beyond `MAX_AHEAD`, and fetches it."""

    def __init__(self):
        self._outputs: dict[int, Any] = {}
        self._on_devices: deque[int] = deque()
        self._count = 0

    def add(self, output: Any) -> int:
        """The output's number. Raises Interrupted if the process is told to stop."""
        number, self._count = self._count, self._count + 1
        self._outputs[number] = output
        self._on_devices.append(number)
        stop_if_told()
        if len(self._on_devices) > MAX_AHEAD:
            self.wait_for(self._on_devices[0])
        return number

    def wait_for(self, number: int) -> None:
        """Fetches an output that is still on the devices."""
        if number in self._on_devices:
            self._on_devices.remove(number)
            self._outputs[number] = jax.device_get(self._outputs[number])

    def take(self, numbers: Iterable[int]) -> list[Any]:
        """These outputs on the host, which the queue then forgets; waits for those that are not there yet."""
        taken = []
        for number in numbers:
            self.wait_for(number)
            taken.append(self._outputs.pop(number))
        return taken


def run_ahead(program: Callable, batches: Iterable) -> list:
    """The outputs of `program` for all batches, on the host. Raises Interrupted if told to stop."""
    queue = Queue()
    return queue.take([queue.add(program(batch)) for batch in batches])


@dataclass(frozen=True)
class Evaluator:
    """The evaluation of one model on a mesh, compiled once for every set of parameters.

    num_new: tokens to generate; 0: none.
    """

    mesh: Mesh
    jitted: Callable
    num_new: int

    def __call__(
        self, params, batch: dict[str, np.ndarray], features: Mapping[str, Any] | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """(float32[B, K] log-probabilities of the letters, int32[B, num_new] generated tokens) of one batch.

        params: of the whole model, trainable and frozen joined. features: of `FeatureStore`, where the batch holds no
        images.
        """
        with jax.set_mesh(self.mesh):
            return self.jitted(params, on_devices(self.mesh, batch, features))


def on_devices(mesh: Mesh, batch: dict[str, np.ndarray], features: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A batch's arrays on the mesh, with the features that are there already."""
    arrays = {key: value for key, value in batch.items() if key != "row_mask"}
    return {**put_batch(arrays, batch_sharding(mesh)), **(features or {})}


def make_evaluator(
    mesh: Mesh, graphdef: nnx.GraphDef, shardings, *, eos_id: int, max_new_tokens: int, generate: bool = True
) -> Evaluator:
    """The evaluator of a model. shardings: NamedSharding of each parameter."""
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

    params: of the whole model, on the evaluator's mesh. batch_size: rows over all devices; records of similar length
    share a batch, and the last batch is padded. The batch size changes only the rounding of scores: of 384 phantom
    records, 5 had another fourth decimal and none another letter.

    Raises:
      ConfigError: the mesh cannot split the batch.
      NonFiniteScores: log-probabilities that are not finite, with the record named.
    """
    from medcg_jax.data.eval_batches import eval_batches

    check_batch(evaluator.mesh, batch_size, "eval.batch_size")
    batches = eval_batches(encoded, batch_size, rows=local_rows(evaluator.mesh, batch_size))
    outputs = run_ahead(lambda item: evaluator(params, item[0]), batches)
    return answers_of(encoded, outputs, tokenizer, generated=bool(evaluator.num_new))


def answers_of(
    encoded: "Encoded", outputs: Sequence[tuple[np.ndarray, np.ndarray]], tokenizer: "Tokenizer", *, generated: bool
) -> list[Prediction]:
    """The predictions of `eval_rows`' batches of `encoded`, in the order of its records.

    outputs: an evaluator's for each batch. generated: whether their tokens are free answers.

    Raises:
      NonFiniteScores: log-probabilities that are not finite, with the record named.
    """
    from medcg_jax.data.eval_batches import eval_order

    if not outputs:
        return []
    logprobs, tokens = (np.concatenate(arrays) for arrays in zip(*outputs, strict=True))
    # From the order of the batches back to that of the records.
    order = np.argsort(eval_order(encoded))
    return predictions_of(encoded, logprobs[order], tokens[order] if generated else None, tokenizer)


def further_answers(
    controls: Mapping[str, "Encoded"], asked: Sequence["Asked"], outputs: Sequence[np.ndarray], tokenizer: "Tokenizer"
) -> dict[str, list[Prediction]]:
    """Control -> its predictions, without free answers.

    asked: all of `further_questions` about `controls`. outputs: log-probabilities of the letters for each.

    Raises:
      NonFiniteScores: as `answers_of`.
    """
    starts = np.cumsum([0, *map(len, controls.values())])
    answers: dict[str, list[Prediction]] = {}
    if not asked:
        return answers
    logprobs = np.full((starts[-1], outputs[0].shape[1]), np.nan, np.float32)
    for questions, output in zip(asked, outputs, strict=True):
        logprobs[questions.questions] = output[questions.rows]
    for (name, control), start in zip(controls.items(), starts[:-1], strict=True):
        answers[name] = predictions_of(control, logprobs[start : start + len(control)], None, tokenizer)
    return answers


@dataclass(frozen=True)
class FollowedEvaluator:
    """An evaluator after whose questions others about the same images are asked.

    first: (params, batch) -> (an evaluator's outputs, the cache of the rows). again: (params, cache, batch, a further
    question of each row) -> float32[B, K] log-probabilities of the letters.
    """

    mesh: Mesh
    first: Callable
    again: Callable
    num_new: int

    def __call__(
        self, params, batch: dict[str, np.ndarray], features: Mapping[str, Any], asked: Sequence["Asked"]
    ) -> Iterable[Any]:
        """Yields an evaluator's outputs for a batch, then those of `again` for each of `asked`, as they are dispatched."""
        with jax.set_mesh(self.mesh):
            placed = on_devices(self.mesh, batch, features)
            output, cache = self.first(params, placed)
        yield output
        for questions in asked:
            with jax.set_mesh(self.mesh):
                further = put_batch(questions.batch, batch_sharding(self.mesh))
                output = self.again(params, cache, placed, further)
            yield output


def make_followed_evaluator(
    mesh: Mesh, graphdef: nnx.GraphDef, shardings, *, eos_id: int, max_new_tokens: int, generate: bool = True
) -> FollowedEvaluator:
    """The followed evaluator of a model; arguments as `make_evaluator`."""
    num_new = max_new_tokens if generate else 0

    def ask(params, batch):
        model = nnx.merge(graphdef, params)
        logits, cache = prefill(model, batch, max(num_new - 1, 0))
        logprobs, tokens = option_logprobs(logits, batch["option_ids"]), jnp.zeros((len(logits), 0), jnp.int32)
        states = states_of(cache)
        if num_new:
            tokens, cache = greedy(model, logits, cache, num_new=num_new, eos_id=eos_id)
        # Those after generation, so that no copy of the largest arrays is made; what was generated lies behind the rows.
        return (logprobs, tokens), states | {key: cache[key] for key in ("k", "v")}

    def ask_again(params, states, batch, further):
        model = nnx.merge(graphdef, params)
        cache = with_room(back_at(model, states, batch, further["kept"]), further["tokens"].shape[1])
        hidden, _ = model.hidden(
            further["tokens"], segment_ids=further["segment_ids"], cache=cache, at=further["last_position"][:, None]
        )
        return option_logprobs(model.logits(hidden[:, 0]), further["option_ids"])

    first = jax.jit(ask, in_shardings=(shardings, batch_sharding(mesh)), out_shardings=(replicated(mesh), None))
    again = jax.jit(ask_again, out_shardings=replicated(mesh))
    return FollowedEvaluator(mesh, first, again, num_new)


def states_of(cache: dict[str, Any]) -> dict[str, jax.Array]:
    """Those arrays of a cache that are made of hidden states."""
    return {key: x for key, x in cache.items() if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating)}


def back_at(model, states: dict[str, jax.Array], batch: dict[str, Any], kept: jax.Array) -> dict[str, Any]:
    """The model's cache as it was when only the first `kept` int[B] tokens of each row had been read.

    states: `states_of` the whole rows. A decoder sees no later token, so they hold for the first tokens as well. What
    else a cache holds is counted from tokens: it comes from a pass over the first tokens, of which XLA keeps only that.
    """
    tokens = batch["tokens"]
    rows, length = tokens.shape
    segment_ids = batch["segment_ids"] * (jnp.arange(length) < kept[:, None])
    options = {"cache": model.init_cache(rows, length), "at": np.zeros((rows, 1), np.int32)}
    _, counted = model.hidden(tokens, **image_input(model, batch), segment_ids=segment_ids, **options)
    return counted | states | {key: states[key][:, :, :length] for key in ("k", "v")}
