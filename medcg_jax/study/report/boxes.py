"""Boxes and masks on a grid's page: a table for each part, and images with what was asked for and what was answered."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

from medcg_jax.eval import boxes as box_scores
from medcg_jax.eval.boxes import BoxAnswer
from medcg_jax.study.report.load_grid import Grid, Score, arm_name
from medcg_jax.study.report.samples import NOT_SHOWN, SIDE_PX, embedded, open_as_recorded
from medcg_jax.study.report.tables import Column, Table
from medcg_jax.study.report.text import PARTS
from medcg_jax.study.stats import stats

TABLE = "detection"
ALL = "all subsets"
NUM_SHOWN = 8
# Colours of the page: what was asked for, what was answered.
TRUTH, ANSWER = "#009e73", "#d55e00"


@dataclass(frozen=True)
class BoxSample:
    """One answer. image: the address of an embedded PNG with both kinds of boxes; truth, found: how many were asked for
    and found."""

    record: str
    label: str
    image: str
    generated: str
    truth: int
    found: int


def tables(grid: Grid) -> list[Table]:
    """A table of boxes for each part of `detection`, its subsets below their sum."""
    return [table for part in ("in_distribution", "out_of_distribution") if (table := of_part(grid, part)).rows]


def of_part(grid: Grid, part: str) -> Table:
    made = Table(
        f"{TABLE}_{part}", f"Detection: {PARTS[part]}",
        "Boxes of the test images, asked for label by label. Found: boxes matched one to one with an answer at an IoU "
        "above 0.5, with its 95 % interval (images drawn anew; Wilson's where every question has one box). Other "
        "image: the same answers against the boxes of another image of the subset, what knowing the usual places "
        "alone is worth. IoU: mean over the boxes, and the sum of intersections over that of unions. Unread: answers "
        "that give no box. Dice: of the masks, as one for each question. All in %.",
        [Column("target", "Subset"), Column("what", "Combination"), Column("arm", "Arm"),
         Column("questions", "Questions", "count"), Column("n", "Boxes", "count"), Column("found", "Found", "score"),
         Column("by_chance", "Other image", "share"), Column("mean_iou", "Mean IoU", "score"),
         Column("cumulative_iou", "Cumulative IoU", "score"), Column("unparsed_rate", "Unread", "share"),
         Column("dice", "Dice", "score"), Column("seeds", "Seeds")],
    )  # fmt: skip
    for (target, arm, seeds), answers in grouped(grid, part).items():
        scores = box_scores.summary(answers)
        what = grid.describe(target) if target != ALL else ""
        made.add(
            {"target": target, "what": what or None, "arm": arm_name(arm), "questions": scores["questions"],
             "n": scores["n"], "by_chance": scores["by_chance"], "unparsed_rate": scores["unparsed_rate"],
             "found": score(scores, "accuracy", seeds), "mean_iou": score(scores, "mean_iou", seeds),
             "cumulative_iou": score(scores, "cumulative_iou", seeds), "dice": score(scores, "dice", seeds),
             "seeds": ", ".join(map(str, seeds))},
        )  # fmt: skip
    return made


def grouped(grid: Grid, part: str) -> dict[tuple[str, str, tuple[int, ...]], list[BoxAnswer]]:
    """(subset, arm, seeds) -> answers; `ALL` first.

    Phantoms are drawn anew with every seed, so the seeds are put together. Images from files return with every seed:
    there each seed stands by itself.
    """
    found: dict[tuple[str, str, tuple[int, ...]], list[BoxAnswer]] = {}
    cells = [c for c in grid.done(TABLE) if stats.part_of(TABLE, c["row"]) == part]
    by_subset: dict[tuple[str, str, tuple[int, ...]], list[BoxAnswer]] = {}
    for cell in cells:
        seed = int(cell["seed"])
        together = tuple(sorted(int(c["seed"]) for c in cells if c["arm"] == cell["arm"]))
        seeds = together if grid.is_phantom else (seed,)
        for answer in grid.boxes(cell["cell"]):
            # The same record of another seed is another image.
            own = replace(answer, id=f"{seed}/{answer.id}")
            found.setdefault((ALL, cell["arm"], seeds), []).append(own)
            by_subset.setdefault((answer.subset, cell["arm"], seeds), []).append(own)
    return found | dict(sorted(by_subset.items(), key=lambda item: item[0][0]))


def score(scores: dict, name: str, seeds: tuple[int, ...]) -> Score | None:
    """One of `eval.boxes.summary`'s shares with its interval; None where it has none."""
    if scores[name] is None:
        return None
    return Score(scores[name], scores[f"{name}_low"], scores[f"{name}_high"], scores["n"], seeds)


@dataclass(frozen=True)
class BoxSamples:
    """Answers of one arm; `absent` says why there are none, "" where none were asked for."""

    shown: tuple[BoxSample, ...] = ()
    absent: str = ""


def samples(grid: Grid) -> BoxSamples:
    """Images of the trained arm's first cell out of distribution (else in), drawn by a hash of their names."""
    cells = [c for c in grid.done(TABLE) if c["related"]]
    if not cells:
        return BoxSamples()
    cell = max(cells, key=lambda c: (c["row"].startswith("out"), -int(c["seed"])))
    try:
        source = open_as_recorded(grid, int(cell["seed"]))
        drawn = sorted(grid.boxes(cell["cell"]), key=lambda a: hashlib.sha256(f"{a.id}/{a.label}".encode()).digest())
        return BoxSamples(tuple(sample(source.records(a.subset, "test"), a) for a in drawn[:NUM_SHOWN]))
    except NOT_SHOWN as error:
        return BoxSamples(absent=f"The images cannot be shown: {error}")


def sample(records, answer: BoxAnswer) -> BoxSample:
    """Raises KeyError where the source has no such record."""
    place = {record.id: i for i, record in enumerate(records.records)}[answer.id]
    picture = with_boxes(records.image(place), answer.truth, answer.predicted or ())
    correct = box_scores.summary([answer])["correct"]
    return BoxSample(answer.id, answer.label, embedded(picture), answer.generated, len(answer.truth), correct)


def with_boxes(image: np.ndarray, truth: Sequence[Sequence[float]], answered: Sequence[Sequence[float]]) -> np.ndarray:
    """uint8[h, w, 3] of the image in the size that a page shows, with the boxes' outlines: drawn on a large image, they
    would be gone when it is made small."""
    picture, longest = Image.fromarray(image), max(image.shape[:2])
    if longest <= 2 * SIDE_PX:
        factor: float = max(1, SIDE_PX // longest)
        size = (round(picture.width * factor), round(picture.height * factor))
        picture = picture.resize(size, Image.Resampling.NEAREST)
    else:
        factor = 2 * SIDE_PX / longest
        picture = picture.resize([max(1, round(side * factor)) for side in picture.size], Image.Resampling.LANCZOS)
    pencil = ImageDraw.Draw(picture)
    for found, colour in ((truth, TRUTH), (answered, ANSWER)):
        for box in found:
            # Regressed corners may be out of order, and a box thinner than its outline.
            corners_px = [min(max(x * factor, -3.0), max(picture.size) + 3.0) for x in box]
            (left, right), (top, bottom) = (sorted((corners_px[i], corners_px[i + 2])) for i in (0, 1))
            corners = (left, top, max(left, right - 1), max(top, bottom - 1))
            pencil.rectangle(corners, outline=colour, width=2)
    return np.asarray(picture)
