"""The rows of a benchmark: the run's records where they can be opened, else phantoms or random rows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medcg_jax.bench.steps import HF_BATCH, example_batch
from medcg_jax.config import ConfigError, RunConfig, replace
from medcg_jax.data.encoding import Encoded, encode
from medcg_jax.data.pipeline import Batches
from medcg_jax.data.records import DataError, RecordSet, Split, concat
from medcg_jax.train.setup import Setup, open_setup, with_small_tokenizer

# Most subsets to take records from; each is read whole.
NUM_SUBSETS = 4
# Least number of records that the loader draws from.
LOADER_RECORDS = 256
# Least number of test questions.
QUESTIONS = 32


@dataclass(frozen=True)
class Rows:
    """The setup whose records are used. note: what replaces the run's records; "" where they are used."""

    setup: Setup
    note: str


def open_rows(run: RunConfig) -> Rows:
    """The run's setup with random weights, and with phantoms where its records cannot be opened.

    Raises:
      ConfigError, DataError: as `open_setup`, for a reason other than the records.
    """
    try:
        return Rows(open_setup(with_small_tokenizer(run), has_weights=True), "")
    except (ConfigError, DataError) as error:
        if run.data.source == "phantom":
            raise
        why = str(error)
    data = {"data__source": "phantom", "data__root": "", "data__subsets": (), "data__subset_weights": {}}
    run = replace(with_small_tokenizer(run), **data, data__general_records="", data__imagewikiqa_share=0.0)
    setup = open_setup(run, has_weights=True)
    return Rows(setup, f"phantoms stand in for the run's records, which cannot be opened ({why})")


def training_batch(rows: Rows) -> dict[str, np.ndarray]:
    """The run's first batch; for a LLaVA without records, random rows of half to all of `data.max_text_tokens`."""
    run, setup = rows.setup.run, rows.setup
    if rows.note and setup.model.family == "llava":
        most = run.data.max_text_tokens
        return example_batch(
            setup.model, batch_size=run.train.batch_size, text_tokens=(most // 2, most),
            num_targets=run.data.max_target_tokens,
        )  # fmt: skip
    stream = Batches(setup.encode(some_records(setup, "train", run.train.batch_size)), seed=0, prefetch=0,
                     batch_size=run.train.batch_size)  # fmt: skip
    batch = next(stream)[0]
    stream.close()
    return batch


def question_rows(rows: Rows) -> Encoded:
    """At least `QUESTIONS` test questions with letters, a multiple of `eval.batch_size` and of HF's batch size."""
    both = math.lcm(rows.setup.run.eval.batch_size, HF_BATCH)
    count = -(-QUESTIONS // both) * both
    return rows.setup.encode_eval(some_records(rows.setup, "test", count, letters=True))


def loader_rows(setup: Setup) -> dict[str, Encoded]:
    """Training rows with decoded images in memory, and the same rows with images decoded when drawn; a run's loader does
    either, by the size of its data."""
    records = some_records(setup, "train", max(LOADER_RECORDS, setup.run.train.batch_size))
    drawn = encode(records, setup.tokenizer, setup.run.data, setup.format, memory_limit_bytes=0)
    return {"decoded before": setup.encode(records), "decoded when drawn": drawn}


def some_records(setup: Setup, split: Split, count: int, *, letters: bool = False) -> RecordSet:
    """`count` records of up to `NUM_SUBSETS` of the run's subsets, repeated where the subsets have fewer.

    letters: only subsets of choice questions; the source's where the run has none.
    """
    choice = [subset.name for subset in setup.source.subsets]
    names: Sequence[str] = setup.run.data.subsets or choice
    if letters:
        names = [name for name in names if not setup.has_boxes(name)] or choice
    names = names[:: -(-len(names) // NUM_SUBSETS)]
    each = -(-count // len(names))
    sets = [setup.source.records(name, split) for name in names]
    records = concat([subset_records.select(range(min(each, len(subset_records)))) for subset_records in sets])
    if not len(records):
        raise DataError(f"subsets {', '.join(names)} have no {split} records")
    return records.select(i % len(records) for i in range(count))
