"""Choice questions, answered by the likelihood of the options' letters, and by generated free answers.

Several questions about one image (a test and its controls) share a cache: keys and values of a row up to the end of its
image are computed once. Controls are only scored by letters; free answers are generated for the test itself.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

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


def option_logprobs(logits: jax.Array, option_ids: jax.Array) -> jax.Array:
    """float32[B, K] nats: log-probability of each option's letter over the full vocabulary; -inf at pads.

    logits: float[B, V] at the last prompt position. option_ids: int32[B, K] token ids of the letters, -1 pads.
    """
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    chosen = jnp.take_along_axis(logprobs, jnp.maximum(option_ids, 0), axis=-1)
    return jnp.where(option_ids >= 0, chosen, -jnp.inf)


def letter_logits(model, batch: dict[str, jax.Array]) -> jax.Array:
    """float32[B, V]: the logits at each prompt's end, without a cache.

    batch: tokens, segment_ids int32[B, T] right-padded, the model's images, last_position int32[B].
    """
    images = {key: batch[key] for key in model.image_keys}
    hidden, _ = model.hidden(
        batch["tokens"], images, segment_ids=batch["segment_ids"], at=batch["last_position"][:, None]
    )
    return model.logits(hidden[:, 0])


def run_ahead(program: Callable, batches: Iterable) -> list:
    """The outputs of `program` for all batches, still on the devices. Raises Interrupted if told to stop."""
    outputs = []
    for batch in batches:
        outputs.append(program(batch))
        stop_if_told()
        if len(outputs) > MAX_AHEAD:
            jax.block_until_ready(outputs[-1 - MAX_AHEAD])
    return outputs


@dataclass(frozen=True)
class Evaluator:
    """The evaluation of one model on a mesh, compiled once for every set of parameters.

    num_new: tokens to generate; 0: none.
    """

    mesh: Mesh
    jitted: Callable
    num_new: int

    def __call__(self, params, batch: dict[str, np.ndarray]) -> tuple[jax.Array, jax.Array]:
        """(float32[B, K] log-probabilities of the letters, int32[B, num_new] generated tokens) of one batch.

        params: of the whole model, trainable and frozen joined.
        """
        arrays = {key: value for key, value in batch.items() if key != "row_mask"}
        with jax.set_mesh(self.mesh):
            return self.jitted(params, put_batch(arrays, batch_sharding(self.mesh)))


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
    from medcg_jax.data.eval_batches import eval_batches, eval_order

    check_batch(evaluator.mesh, batch_size, "eval.batch_size")
    batches = eval_batches(encoded, batch_size, rows=local_rows(evaluator.mesh, batch_size))
    outputs = run_ahead(lambda item: evaluator(params, item[0]), batches)
    if not outputs:
        return []
    logprobs, tokens = (np.concatenate(arrays) for arrays in zip(*jax.device_get(outputs), strict=True))
    # From the order of the batches back to that of the records.
    order = np.argsort(eval_order(encoded))
    return predictions_of(encoded, logprobs[order], tokens[order] if evaluator.num_new else None, tokenizer)


@dataclass(frozen=True)
class PrefixEvaluator:
    """The programs that ask a model several questions about an image, which is processed once.

    prefill: (params, rows up to the end of their images) -> cache. score, score_and_generate: (params, cache, rows
    after their images) -> (float32[B, K] log-probabilities of the letters, int32[B, N] generated tokens); N is 0 or
    `num_new`.
    """

    mesh: Mesh
    prefill: Callable
    score: Callable
    score_and_generate: Callable
    num_new: int

    def ask(self, params, cache, asked: "Asked"):
        """The outputs of `score` or `score_and_generate` for one question about each image in `cache`."""
        with jax.set_mesh(self.mesh):
            return (self.score_and_generate if asked.free else self.score)(params, cache, asked.batch)


def make_prefix_evaluator(
    mesh: Mesh, graphdef: nnx.GraphDef, shardings, *, eos_id: int, max_new_tokens: int, generate: bool = True
) -> PrefixEvaluator:
    """The prefix evaluator of a model; arguments as `make_evaluator`."""
    num_new = max_new_tokens if generate else 0
    rows_sharding = batch_sharding(mesh)

    def prefill_images(params, before):
        model = nnx.merge(graphdef, params)
        cache = model.init_cache(*before["tokens"].shape)
        images = {key: before[key] for key in model.image_keys}
        # Only the cache is used, so the hidden state of one position is enough.
        at = np.zeros((len(before["tokens"]), 1), np.int32)
        return model.hidden(before["tokens"], images, segment_ids=before["segment_ids"], cache=cache, at=at)[1]

    def score(params, cache, batch, num_new: int):
        model = nnx.merge(graphdef, params)
        cache = with_room(cache, batch["tokens"].shape[1] + max(num_new - 1, 0))
        hidden, cache = model.hidden(
            batch["tokens"], segment_ids=batch["segment_ids"], cache=cache, at=batch["last_position"][:, None]
        )
        logits = model.logits(hidden[:, 0])
        logprobs = option_logprobs(logits, batch["option_ids"])
        if not num_new:
            return logprobs, np.zeros((len(batch["tokens"]), 0), np.int32)
        return logprobs, greedy(model, logits, cache, num_new=num_new, eos_id=eos_id)[0]

    def scoring(num_new: int) -> Callable:
        jitted = jax.jit(score, static_argnames="num_new", out_shardings=replicated(mesh))
        return lambda params, cache, batch: jitted(params, cache, put_batch(batch, rows_sharding), num_new=num_new)

    def put_and_prefill(params, before):
        with jax.set_mesh(mesh):
            return jitted_prefill(params, put_batch(before, rows_sharding))

    jitted_prefill, letters = jax.jit(prefill_images, in_shardings=(shardings, rows_sharding)), scoring(0)
    return PrefixEvaluator(mesh, put_and_prefill, letters, scoring(num_new) if num_new else letters, num_new)


def evaluate_controls(
    evaluator: PrefixEvaluator,
    params,
    encoded: "Encoded",
    controls: Mapping[str, "Encoded"],
    tokenizer: "Tokenizer",
    *,
    batch_size: int,
    image_token_id: int,
) -> tuple[list[Prediction], dict[str, list[Prediction]]]:
    """(predictions as by `evaluate`, {control: its predictions, without free answers}).

    controls: name -> the records of `encoded` with changed questions (`data.controls.ControlSet`).

    Raises:
      ConfigError, NonFiniteScores: as `evaluate`.
    """
    from medcg_jax.data.eval_batches import rounds

    check_batch(evaluator.mesh, batch_size, "eval.batch_size")
    sets, rows, questions = [encoded, *controls.values()], local_rows(evaluator.mesh, batch_size), []

    def prompts():
        for turn in rounds(encoded, sets[1:], batch_size, image_token_id=image_token_id, rows=rows):
            cache = evaluator.prefill(params, turn.before)
            for asked in turn.asked:
                questions.append(asked)
                yield cache, asked

    outputs = run_ahead(lambda prompt: evaluator.ask(params, *prompt), prompts())
    starts = np.cumsum([0, *map(len, sets)])
    logprobs = np.zeros((starts[-1], encoded.arrays["option_ids"].shape[1]), np.float32)
    tokens = np.zeros((len(encoded), evaluator.num_new), np.int32)
    for asked, (letters, generated) in zip(questions, jax.device_get(outputs), strict=True):
        logprobs[asked.questions] = letters[asked.rows]
        if asked.free:
            first = asked.questions < len(encoded)
            tokens[asked.questions[first]] = generated[asked.rows[first]]
    plain = predictions_of(encoded, logprobs[: starts[1]], tokens if evaluator.num_new else None, tokenizer)
    return plain, {
        name: predictions_of(control, logprobs[start : start + len(control)], None, tokenizer)
        for (name, control), start in zip(controls.items(), starts[1:-1], strict=True)
    }
