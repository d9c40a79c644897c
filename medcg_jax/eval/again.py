"""Evaluation of records that are asked again with the same images: what comes before a question is the model's once.

The keys and values of a row up to the end of its image are kept, and every question about the image goes on from them.
Only the letters' likelihood is looked at where a question is asked again; the free answer is of the question itself.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from medcg_jax.eval.choice import option_logprobs
from medcg_jax.eval.generate import greedy, with_room
from medcg_jax.eval.run import MAX_AHEAD, Prediction, predictions_of
from medcg_jax.mesh import batch_sharding, check_batch, own_rows, put_batch, replicated
from medcg_jax.train.preempt import stop_if_told

if TYPE_CHECKING:
    from medcg_jax.data.encoding import Encoded
    from medcg_jax.data.eval_batches import Asked
    from medcg_jax.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Asker:
    """The programs that ask one model on a mesh several questions about an image.

    start: (params, rows up to the end of their images) -> cache. ask, ask_freely: (params, cache, what follows) ->
    (float32[B, K] log-probabilities of the letters, int32[B, N] generated tokens); N is 0, or `num_new`.
    """

    mesh: Mesh
    start: Callable
    ask: Callable
    ask_freely: Callable
    num_new: int

    def score(self, params, before: dict[str, np.ndarray], *, asked: "Asked"):
        """What `ask` gives of these rows; before, asked: of a `data.eval_batches.Round`."""
        with jax.set_mesh(self.mesh):
            return (self.ask_freely if asked.free else self.ask)(params, self.start(params, before), asked.batch)


def make_asker(
    mesh: Mesh, graphdef: nnx.GraphDef, shardings, *, eos_id: int, max_new_tokens: int, generate: bool = True
) -> Asker:
    """The asker of a model; arguments as of `eval.run.make_evaluator`."""
    num_new = max_new_tokens if generate else 0
    placed = batch_sharding(mesh)

    def start(params, before):
        model = nnx.merge(graphdef, params)
        cache = model.init_cache(*before["tokens"].shape)
        images = {key: before[key] for key in model.image_keys}
        # Of what is computed only the cache is kept.
        nowhere = np.zeros((len(before["tokens"]), 1), np.int32)
        return model.hidden(before["tokens"], images, segment_ids=before["segment_ids"], cache=cache, at=nowhere)[1]

    def ask(params, cache, batch, num_new: int):
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

    def asking(num_new: int) -> Callable:
        jitted = jax.jit(ask, static_argnames="num_new", out_shardings=replicated(mesh))
        return lambda params, cache, batch: jitted(params, cache, put_batch(batch, placed), num_new=num_new)

    started, letters = jax.jit(start, in_shardings=(shardings, placed)), asking(0)
    freely = asking(num_new) if num_new else letters
    return Asker(mesh, lambda params, before: started(params, put_batch(before, placed)), letters, freely, num_new)


def evaluate_again(
    asker: Asker, params, encoded: "Encoded", again: Mapping[str, "Encoded"], tokenizer: "Tokenizer", *,
    batch_size: int, image_token_id: int,
) -> tuple[list[Prediction], dict[str, list[Prediction]]]:  # fmt: skip
    """(the predictions of `eval.run.evaluate`, those of each control of `again` without a free answer).

    again: name -> the records of `encoded` asked again (`data.controls.AskedAgain`).

    Raises:
      ConfigError, NonFiniteScores: as `evaluate`.
    """
    from medcg_jax.data.eval_batches import rounds

    check_batch(asker.mesh, batch_size, "eval.batch_size")
    sets = [encoded, *again.values()]
    outputs, questions, own = [], [], own_rows(asker.mesh, batch_size)
    with jax.set_mesh(asker.mesh):
        for one in rounds(encoded, sets[1:], batch_size, image_token_id=image_token_id, rows=own):
            cache = asker.start(params, one.before)
            for asked in one.asked:
                outputs.append((asker.ask_freely if asked.free else asker.ask)(params, cache, asked.batch))
                questions.append(asked)
                stop_if_told()
                if len(outputs) > MAX_AHEAD:
                    jax.block_until_ready(outputs[-1 - MAX_AHEAD])
    total = sum(len(part) for part in sets)
    logprobs = np.zeros((total, encoded.arrays["option_ids"].shape[1]), np.float32)
    tokens = np.zeros((len(encoded), asker.num_new), np.int32)
    for asked, (letters, made) in zip(questions, jax.device_get(outputs), strict=True):
        logprobs[asked.questions] = letters[asked.rows]
        first = asked.questions < len(encoded)
        if asked.free:
            tokens[asked.questions[first]] = made[asked.rows[first]]
    starts = np.cumsum([0, *(len(part) for part in sets)])
    free = tokens if asker.num_new else None
    plain, *found = (
        predictions_of(part, logprobs[start : start + len(part)], None if start else free, tokenizer)
        for part, start in zip(sets, starts, strict=False)
    )
    return plain, dict(zip(again, found, strict=True))
