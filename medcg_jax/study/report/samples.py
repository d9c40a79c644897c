"""Cards of test images with question, answer and right answer; the most confident mistakes of a subset."""

import base64
import hashlib
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from PIL import Image, ImageDraw

from medcg_jax.data.records import LETTERS, DataError
from medcg_jax.eval import boxes as box_scores
from medcg_jax.eval.boxes import BoxAnswer
from medcg_jax.study.report.load_grid import Grid, arm_name, letter_logprobs
from medcg_jax.study.report.text import PARTS

# (table, arm) of the shown answers, the first that the grid has: the arm that carries the study's claim.
SHOWN = (
    ("pairs", "trained"), ("triples", "trained"), ("ablation", "all_related"), ("multi_task", "multi_task"),
    ("efficiency", "efficiency_0"),
)  # fmt: skip
# Arms of the same row whose answers are named beside it.
BESIDE = ("baseline", "baseline_plus")
NUM_EACH, NUM_BOXES = 6, 8
# Training subsets of a model that are named.
MOST_NAMED = 4
# Mistakes on a subset's page. Their images take at most some 300 kB, so pages of 53 subsets take 16 MB.
NUM_MISTAKES = 12
# Errors after which images are not shown: the data are gone or changed, or config.json names no source.
NOT_SHOWN = (DataError, OSError, KeyError, TypeError, ValueError, OverflowError)
# Small images are enlarged by whole factors to about this size; larger ones are reduced to twice this size.
SIDE_PX = 160
# Colours of the page: the boxes asked for, those answered.
TRUTH, ANSWER = "#009e73", "#d55e00"


@dataclass(frozen=True)
class Option:
    letter: str
    text: str
    probability: float | None  # among the offered letters


@dataclass(frozen=True)
class Card:
    """One test record with its question and answers.

    Attributes:
      image: the address of an embedded PNG or JPEG. alt: what it shows. answered: the answers in words.
      answer, predicted: letters; "" where boxes were asked for.
    """

    record: str
    image: str
    alt: str
    question: str
    answered: str
    options: tuple[Option, ...] = ()
    answer: str = ""
    predicted: str = ""


@dataclass(frozen=True)
class Cards:
    """Cards of one model's answers; `absent` says why there are none.

    Attributes:
      model: its arm, row, seed and training subsets. num_answers, num_wrong: of all its answers, shown or not.
    """

    model: str = ""
    right: tuple[Card, ...] = ()
    wrong: tuple[Card, ...] = ()
    absent: str = ""
    num_answers: int = 0
    num_wrong: int = 0


def samples(grid: Grid) -> Cards:
    """Right and wrong answers of the model that `shown_cell` names, spread over its targets."""
    if not grid.seeds:
        return Cards(absent="No cell is finished, so there is nothing to show.")
    cell = shown_cell(grid)
    if not cell:
        return Cards(absent=f"No finished cell of seed {grid.seeds[0]} has an arm that is shown here.")
    queues: dict[tuple[str, bool], list[dict]] = {}
    for record in grid.predictions(cell["cell"]):
        queues.setdefault((record["subset"], record["predicted"] == record["answer"]), []).append(record)
    chosen: dict[bool, list[dict]] = {}
    for is_right in (True, False):
        # Round by round: every target's first record, then every target's second.
        ranked = [
            (rank, subset, record)
            for (subset, kind), queue in queues.items()
            if kind is is_right
            for rank, record in enumerate(sorted(queue, key=_drawn))
        ]
        chosen[is_right] = [record for _, _, record in sorted(ranked, key=lambda entry: entry[:2])[:NUM_EACH]]
    cards, absent = _cards(lambda: [letter_card(grid, cell, record) for record in chosen[True] + chosen[False]])
    right, wrong = (tuple(c for c in cards if (c.predicted == c.answer) is kind) for kind in (True, False))
    return Cards(_model_words(grid, cell), right, wrong, absent)


def mistakes(grid: Grid, target: str) -> tuple[Cards, list[dict]]:
    """(the most confident mistakes about a subset, of the model that `shown_cell` names; all its answers)."""
    cell = shown_cell(grid, target)
    if not cell:
        return Cards(), []
    answers = [record for record in grid.predictions(cell["cell"]) if record["subset"] == target]
    wrong = [record for record in answers if record["predicted"] != record["answer"]]
    chosen = sorted(wrong, key=lambda record: (-confidence(record), record["id"]))[:NUM_MISTAKES]
    cards, absent = _cards(lambda: [letter_card(grid, cell, record) for record in chosen])
    return Cards(_model_words(grid, cell, target), (), cards, absent, len(answers), len(wrong)), answers


def box_samples(grid: Grid) -> Cards:
    """Images of the trained arm's first cell out of distribution (else in distribution), drawn by a hash."""
    cells = [cell for cell in grid.done("detection") if cell["related"]]
    if not cells:
        return Cards()
    cell = max(cells, key=lambda cell: (cell["row"].startswith("out"), -int(cell["seed"])))
    answers = sorted(grid.boxes(cell["cell"]), key=lambda a: hashlib.sha256(f"{a.id}/{a.label}".encode()).digest())
    cards, absent = _cards(lambda: [box_card(grid, int(cell["seed"]), answer) for answer in answers[:NUM_BOXES]])
    return Cards(right=cards, absent=absent)


def _cards(make: Callable[[], Iterable[Card]]) -> tuple[tuple[Card, ...], str]:
    """(cards, ""), or ((), the reason why there are none)."""
    try:
        return tuple(make()), ""
    except NOT_SHOWN as error:
        return (), f"The images cannot be shown: {error}"


def shown_cell(grid: Grid, target: str = "") -> dict | None:
    """The cell whose answers are shown: of the first arm of `SHOWN` with finished ones, at the first seed, that with the
    median accuracy (the lower one of two). target: of its tests, and of that accuracy; "": any, and all."""
    cells = _candidates(grid, target)
    scores: dict[str, list[int]] = {}
    for row in grid.results:
        if not target or row["target"] == target:
            score = scores.setdefault(row["cell"], [0, 0])
            score[0] += row["correct"]
            score[1] += row["n"]
    # A cell that is tested on boxes alone has no row there.
    ranked = [(scores[c["cell"]][0] / scores[c["cell"]][1], c["cell"], c) for c in cells if c["cell"] in scores]
    return sorted(ranked, key=lambda entry: entry[:2])[(len(ranked) - 1) // 2][2] if ranked else None


def _candidates(grid: Grid, target: str) -> list[dict]:
    for table, arm in SHOWN:
        cells = [c for c in grid.done(table) if c["arm"] == arm and int(c["seed"]) == grid.seeds[0]]
        cells = [cell for cell in cells if not target or target in cell["target"].split("+")]
        if cells:
            return cells
    return []


def _model_words(grid: Grid, cell: dict, target: str = "") -> str:
    """Such as "Trained (pairs, fixed area/03, seed 0; trained on 11 + 25), the median of 8 such models"."""
    part, *others = cell["row"].split("/")
    row = "/".join([PARTS.get(part, part), *others])
    table, subsets = cell["table"].replace("_", "-"), cell["related"].split("+")
    related = " + ".join(subsets) if len(subsets) <= MOST_NAMED else f"{len(subsets)} subsets"
    words = f"{arm_name(cell['arm'])} ({table}, {row}, seed {cell['seed']}; trained on {related})"
    number = len(_candidates(grid, target))
    return f"{words}, by accuracy the median of {number} such models" if number > 1 else words


def _drawn(prediction: dict) -> str:
    """A sort key: a hash of the record's id."""
    return hashlib.sha256(prediction["id"].encode()).hexdigest()


def probabilities(prediction: dict) -> dict[str, float]:
    """Letter -> its probability among the offered ones; {} where none was recorded."""
    weights = {letter: math.exp(value) for letter, value in letter_logprobs(prediction).items()}
    total = sum(weights.values())
    return {letter: weight / total for letter, weight in weights.items()} if total else {}


def confidence(prediction: dict) -> float:
    return probabilities(prediction).get(prediction["predicted"], 0.0)


def letter_card(grid: Grid, cell: dict, prediction: dict) -> Card:
    """The card of an answer to a choice question. Raises KeyError: the source has no such record."""
    records = grid.source().records(prediction["subset"], "test")
    number = _number_of(records, prediction["id"])
    # The other arms' answers to the same record.
    beside = [
        (arm_name(arm), str(line["predicted"]))
        for arm in BESIDE
        for other in grid.cells_of(cell["table"], cell["row"], arm)
        if other["seed"] == cell["seed"]
        for line in grid.predictions(other["cell"])
        if line["id"] == prediction["id"]
    ]
    answer, predicted = str(prediction["answer"]), str(prediction["predicted"])
    answered = Markup("answered <b>{}</b>, right is <b>{}</b>").format(predicted, answer)
    answered += "".join(f"; {arm}: {letter}" for arm, letter in beside)
    if prediction.get("generated") is not None:
        answered += f"; generated “{prediction['generated']}”"
    shares = probabilities(prediction)
    options = tuple(
        Option(letter, str(text), shares.get(letter))
        for letter, text in zip(LETTERS, prediction["options"], strict=False)
    )
    question = records.records[number].turns[-1].question.partition("\n")[0]
    right = next((option.text for option in options if option.letter == answer), answer)
    alt = f"test image of {_subset_words(grid, prediction['subset'])}; right is {right}"
    return Card(prediction["id"], embedded(records.image(number)), alt, question, answered, options, answer, predicted)


def box_card(grid: Grid, seed: int, answer: BoxAnswer) -> Card:
    """The card of an answer about boxes. Raises KeyError: the source has no such record."""
    records = grid.source(seed).records(answer.subset, "test")
    image = with_boxes(records.image(_number_of(records, answer.id)), answer.truth, answer.predicted or ())
    num_correct = box_scores.summary([answer])["correct"]
    answered = f"{num_correct} of {len(answer.truth)} found; generated “{answer.generated}”"
    alt = (
        f"test image of {_subset_words(grid, answer.subset)} with {len(answer.truth)} boxes asked for and "
        f"{len(answer.predicted or ())} answered"
    )
    return Card(answer.id, embedded(image), alt, answer.label, answered)


def _subset_words(grid: Grid, name: str) -> str:
    """Such as "subset 02 (CT, Lung, Cancer)", and "ct-liver-state", which says it."""
    what = grid.describe(name)
    return f"subset {name} ({what})" if what else name


def _number_of(records, record_id: str) -> int:
    for number, record in enumerate(records.records):
        if record.id == record_id:
            return number
    raise KeyError(f"record {record_id} is not in the source")


def with_boxes(image: np.ndarray, truth: Sequence[Sequence[float]], answered: Sequence[Sequence[float]]) -> np.ndarray:
    """uint8[h, w, 3]: the image in the page's size with the boxes' outlines, which a later reduction would blur."""
    picture, longest = Image.fromarray(image), max(image.shape[:2])
    small = longest <= 2 * SIDE_PX
    factor = max(1, SIDE_PX // longest) if small else 2 * SIDE_PX / longest
    size = [max(1, round(side * factor)) for side in picture.size]
    picture = picture.resize(size, Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS)
    pencil = ImageDraw.Draw(picture)
    for boxes, colour in ((truth, TRUTH), (answered, ANSWER)):
        for box in boxes:
            # Regressed corners may be out of order, and a box thinner than its outline.
            x0, y0, x1, y1 = (min(max(x * factor, -3.0), max(picture.size) + 3.0) for x in box)
            left, top = min(x0, x1), min(y0, y1)
            corners = (left, top, max(left, max(x0, x1) - 1), max(top, max(y0, y1) - 1))
            pencil.rectangle(corners, outline=colour, width=2)
    return np.asarray(picture)


def embedded(image: np.ndarray) -> str:
    """An image as a data URL: a small one as PNG, enlarged by a whole factor, a larger one as JPEG.

    Real images take 5 to 25 kB (the median of 80 of medmat-mini is 12), noise 50 to 100.
    """
    picture, data = Image.fromarray(image), io.BytesIO()
    kind = "png" if max(picture.size) <= SIDE_PX else "jpeg"
    if kind == "png":
        factor = max(1, SIDE_PX // max(picture.size))
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
        picture.save(data, format="PNG", optimize=True)
    else:
        picture.thumbnail((SIDE_PX * 2, SIDE_PX * 2))
        picture.convert("RGB").save(data, format="JPEG", quality=82, optimize=True)
    return f"data:image/{kind};base64," + base64.b64encode(data.getvalue()).decode()
