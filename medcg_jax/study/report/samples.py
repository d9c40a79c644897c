"""Test images with question, options and answers, and how the arms used the letters."""

import base64
import hashlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from medcg_jax.config import DataConfig
from medcg_jax.data.records import LETTERS, DataError, Source
from medcg_jax.data.sources import open_source
from medcg_jax.study.report.load_grid import Grid, Letters, arm_name, letter_logprobs
from medcg_jax.study.report.tables import Column, Table

# Whose answers are shown, the first that the grid has: the arm that carries the study's claim.
SHOWN = (
    ("pairs", "trained"), ("triples", "trained"), ("ablation", "all_related"), ("multi_task", "multi_task"),
    ("efficiency", "efficiency_0"),
)  # fmt: skip
# Arms of the same row whose answers stand beside it.
BESIDE = ("baseline", "baseline_plus")
NUM_EACH = 6
# Why images of a grid's data cannot be shown: they are gone, are others, or config.json says what is no source.
NOT_SHOWN = (DataError, OSError, KeyError, TypeError, ValueError, OverflowError)
# Small images are enlarged by whole factors to about this size; larger ones are made this small.
SIDE_PX = 160


@dataclass(frozen=True)
class Option:
    letter: str
    text: str
    probability: float | None  # among the offered letters


@dataclass(frozen=True)
class Sample:
    """One test record as it was asked, and what was answered.

    Attributes:
      image: the address of an embedded PNG or JPEG.
      others: (arm for people, its letter).
    """

    record: str
    subset: str
    image: str
    question: str
    options: tuple[Option, ...]
    answer: str
    predicted: str
    generated: str | None
    others: tuple[tuple[str, str], ...]

    @property
    def is_right(self) -> bool:
        return self.predicted == self.answer


@dataclass(frozen=True)
class Samples:
    """Samples of one arm; `absent` says why there are none."""

    arm: str = ""
    table: str = ""
    right: tuple[Sample, ...] = ()
    wrong: tuple[Sample, ...] = ()
    absent: str = ""


def samples(grid: Grid) -> Samples:
    """Right and wrong answers of the first arm of `SHOWN`, at the grid's first seed, one per target first."""
    if not grid.seeds:
        return Samples(absent="No cell is finished, so there is nothing to show.")
    seed, found = grid.seeds[0], None
    for table, arm in SHOWN:
        cells = [c for c in grid.done(table) if c["arm"] == arm and int(c["seed"]) == seed]
        if cells:
            found = (table, arm, cells)
            break
    if found is None:
        return Samples(absent=f"No finished cell of seed {seed} has an arm that is shown here.")
    table, arm, cells = found
    try:
        source = open_as_recorded(grid, seed)
    except NOT_SHOWN as error:
        return Samples(arm, table, absent=f"The images cannot be shown: {error}")
    right, wrong = chosen(grid, cells)
    try:
        made = [tuple(sample(grid, source, table, cell, r) for cell, r in part) for part in (right, wrong)]
    except NOT_SHOWN as error:
        return Samples(arm, table, absent=f"The images cannot be shown: {error}")
    return Samples(arm_name(arm), table.replace("_", "-"), *made)


def open_as_recorded(grid: Grid, seed: int) -> Source:
    """The source that the cells of one seed were tested on.

    Raises:
      DataError: it is not there, or is not what the grid recorded.
    """
    fields = {key: tuple(v) if isinstance(v, list) else v for key, v in grid.config["data"].items()}
    # A seed of the study draws the data too.
    source = open_source(DataConfig(**fields | {"seed": fields.get("seed", 0) + seed}))
    recorded = grid.run.get("data", {}).get(str(seed))
    # Behind the choice records' fingerprint stands that of the boxes, where a table trains on them.
    if recorded and source.fingerprint() != recorded.partition(" ")[0]:
        raise DataError(
            f"the data have changed since the grid (fingerprint {recorded} then, {source.fingerprint()} now)"
        )
    return source


def chosen(grid: Grid, cells: Sequence[dict]) -> tuple[list, list]:
    """(right, wrong): (cell, prediction) in an order drawn from a hash of the record ids, targets in turn."""
    queues: dict[tuple[str, bool], list] = {}
    for cell in cells:
        for record in grid.predictions(cell["cell"]):
            queues.setdefault((record["subset"], record["predicted"] == record["answer"]), []).append((cell, record))
    parts = []
    for is_right in (True, False):
        # Round by round: every target's first record, then every target's second.
        ranked = []
        for (subset, kind), queue in queues.items():
            if kind is is_right:
                # A record may be tested in several rows; once is enough.
                unique = {record["id"]: (cell, record) for cell, record in sorted(queue, key=_drawn)}
                ranked += [(place, subset, item) for place, item in enumerate(unique.values())]
        parts.append([item for _, _, item in sorted(ranked, key=lambda entry: entry[:2])[:NUM_EACH]])
    return parts[0], parts[1]


def _drawn(item: tuple[dict, dict]) -> tuple[str, str]:
    cell, record = item
    return hashlib.sha256(record["id"].encode()).hexdigest(), cell["cell"]


def sample(grid: Grid, source: Source, table: str, cell: dict, prediction: dict) -> Sample:
    """Raises KeyError when the source has no such record."""
    records = source.records(prediction["subset"], "test")
    places = {record.id: place for place, record in enumerate(records.records)}
    if prediction["id"] not in places:
        raise KeyError(f"record {prediction['id']} is not in the source")
    place = places[prediction["id"]]
    question = records.records[place].turns[-1].question.partition("\n")[0]
    return Sample(
        prediction["id"], prediction["subset"], embedded(records.image(place)), question, options(prediction),
        str(prediction["answer"]), str(prediction["predicted"]),
        None if prediction.get("generated") is None else str(prediction["generated"]),
        tuple(beside(grid, table, cell, prediction["id"])),
    )  # fmt: skip


def options(prediction: dict) -> tuple[Option, ...]:
    logprobs = letter_logprobs(prediction)
    total = sum(math.exp(value) for value in logprobs.values())
    return tuple(
        Option(letter, str(text), math.exp(logprobs[letter]) / total if letter in logprobs and total else None)
        for letter, text in zip(LETTERS, prediction["options"], strict=False)
    )


def beside(grid: Grid, table: str, cell: dict, record: str):
    """(arm, its letter) of the other arms on the same record."""
    for arm in BESIDE:
        for other in grid.done(table):
            if (other["row"], other["arm"], other["seed"]) == (cell["row"], arm, cell["seed"]):
                for line in grid.predictions(other["cell"]):
                    if line["id"] == record:
                        yield arm_name(arm), str(line["predicted"])


def embedded(image: np.ndarray) -> str:
    """An image inside an address: a small one as PNG, its pixels enlarged by a whole factor, a larger one as JPEG.

    Real images take 5 to 25 kB so (80 of medmat-mini: half of them below 12), pixels of noise 50 to 100.
    """
    picture, text = Image.fromarray(image), io.BytesIO()
    if max(picture.size) <= SIDE_PX:
        factor = max(1, SIDE_PX // max(picture.size))
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
        picture.save(text, format="PNG", optimize=True)
        kind = "png"
    else:
        picture.thumbnail((SIDE_PX * 2, SIDE_PX * 2))
        picture.convert("RGB").save(text, format="JPEG", quality=82, optimize=True)
        kind = "jpeg"
    return f"data:image/{kind};base64," + base64.b64encode(text.getvalue()).decode()


def letters_table(grid: Grid) -> Table:
    """How each arm of each table used the letters, and what it said when asked freely."""
    found = {key: value for key, value in grid.letters.items() if value.n}
    names = sorted({letter for value in found.values() for letter in (*value.predicted, *value.answers)})
    made = Table(
        "answers", "How the letters were used",
        "Per arm: the share of answers that are each letter (right answers in the first row of a table), the "
        "probability that the model puts on the offered letters before anything is ruled out, accuracy by likelihood "
        "of the offered letters (the study's measure), and, for greedily generated answers, how many are no offered "
        "letter and the accuracy when those count as wrong. All in %.",
        [Column("table", "Table"), Column("arm", "Arm"), Column("n", "Answers", "count"),
         *(Column(f"letter_{name}", name, "share") for name in names), Column("mass", "Mass on letters", "share"),
         Column("accuracy", "Accuracy", "share"), Column("unparsed", "Unparsed", "share"),
         Column("generated", "Accuracy, generated", "share")],
    )  # fmt: skip
    for (table, arm), value in found.items():
        words = table.replace("_", "-")
        if not any(row["table"] == words for row in made.rows):
            shares = {f"letter_{name}": value.answers.get(name, 0) / value.n for name in names}
            made.add({"table": words, "arm": "(right answers)", "n": value.n, **shares})
        made.add({"table": words, "arm": arm_name(arm), **letter_row(value, names)})
    return made


def letter_row(value: Letters, names: Sequence[str]) -> dict:
    return {
        "n": value.n,
        **{f"letter_{name}": value.predicted.get(name, 0) / value.n for name in names},
        "mass": value.mass / value.num_mass if value.num_mass else None,
        "accuracy": value.right / value.n,
        "unparsed": value.unparsed / value.generated if value.generated else None,
        "generated": value.generated_right / value.generated if value.generated else None,
    }
