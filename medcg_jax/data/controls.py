"""Controls: test questions asked again with options moved, with two options, beside another image, a blank one or none."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from random import Random

import numpy as np

from medcg_jax.config import CONTROLS
from medcg_jax.data.records import LETTERS, DataError, Record, RecordSet, Turn

# Controls without the images of the test; the others' are `ControlSet`s.
WITHOUT_IMAGES = ("blank_images", "text_only")
# A blank image: mid grey, square, so that no padding frames it and neither size nor shape tells one from another.
BLANK = np.full((224, 224, 3), 128, np.uint8)


class ControlSet(RecordSet):
    """Questions about images of another set: question i has the image of that set's record `places[i]`."""

    def __init__(self, records: Sequence[Record], asked_of: RecordSet, places: Sequence[int]):
        super().__init__(records, asked_of.select(places).images)
        self.places = tuple(places)


def blanked(records: RecordSet) -> RecordSet:
    """The records with `BLANK` in place of every image; those without an image stay without."""
    return RecordSet(records.records, [BLANK] * len(records), records.masks)


def are_blank(records: RecordSet) -> bool:
    """Whether all images are `BLANK` itself, as `blanked` makes them."""
    return len(records) > 0 and all(image is BLANK for image in records.images)


def control_sets(records: RecordSet, names: Sequence[str], seed: int) -> dict[str, RecordSet]:
    """Control -> its choice questions, with the records' ids; controls without questions are left out.

    names: of `CONTROLS`.
      "shuffled_images": each question beside another image of the set, which does not show the answer. Records without
        an image, or for which there is no other image, are left out.
      "circular": "shift_1", "shift_2", ...: the options rotated by so many letters, for questions with more options.
      "two_options": the right option and a drawn wrong one, in drawn order, for questions with more options.
      "blank_images": each question beside a grey image (`blanked`). "text_only": without an image. Records
        without an image are left out of both.

    Raises:
      DataError: a question does not hold its options as lines "A: ...", or an image cannot be read.
    """
    sets: dict[str, RecordSet] = {}
    for name in names:
        sets |= _MAKERS[name](records, Random(f"{name}/{seed}"))
    return {name: asked for name, asked in sets.items() if len(asked)}


def with_options(record: Record, options: Sequence[str], right: str) -> Record:
    """The record with other options in its question, of which `right` is the answer."""
    (turn,) = record.turns
    before, after = _lines(record.options), _lines(options)
    if turn.question.count(before) != 1:
        raise DataError(f"record {record.id}: its options are no lines “A: ...” of its question, and cannot be moved")
    answer = LETTERS[list(options).index(right)]
    turns = (Turn(turn.question.replace(before, after), answer),)
    return dataclasses.replace(record, turns=turns, options=tuple(options), answer=answer)


def _lines(options: Sequence[str]) -> str:
    return "".join(f"\n{letter}: {option}" for letter, option in zip(LETTERS, options, strict=False))


def _shuffled(records: RecordSet, random: Random) -> dict[str, RecordSet]:
    indices = [i for i, record in enumerate(records.records) if record.image]
    if len(indices) < 2:
        return {}
    order = random.sample(indices, len(indices))
    images = {index: records.image_digest(index) for index in order}
    first = {images[index]: i for i, index in reversed(list(enumerate(order)))}
    order.sort(key=lambda index: first[images[index]])  # records of one image next to each other, else as drawn
    most = max(Counter(images.values()).values())
    # Rotated by `most`, no record gets its own image, unless more than half of all have the same.
    image_of = dict(zip(order, order[most:] + order[:most], strict=True))
    image_at = {index: image_of[index] for index in indices if images[image_of[index]] != images[index]}
    changed = [
        dataclasses.replace(records.records[index], image=records.records[other].image)
        for index, other in image_at.items()
    ]
    return {"shuffled_images": ControlSet(changed, records, list(image_at.values()))}


def _shifted(records: RecordSet, _: Random) -> dict[str, RecordSet]:
    sets: dict[str, RecordSet] = {}
    for shift in range(1, max((len(record.options) for record in records.records), default=0)):
        indices = [i for i, record in enumerate(records.records) if shift < len(record.options)]
        changed = [
            with_options(record, record.options[-shift:] + record.options[:-shift], record.label)
            for record in (records.records[i] for i in indices)
        ]
        sets[f"shift_{shift}"] = ControlSet(changed, records, indices)
    return sets


def _two_options(records: RecordSet, random: Random) -> dict[str, RecordSet]:
    indices = [i for i, record in enumerate(records.records) if len(record.options) > 2]
    changed = []
    for record in (records.records[i] for i in indices):
        other = random.choice([option for option in record.options if option != record.label])
        changed.append(with_options(record, random.sample([record.label, other], 2), record.label))
    return {"two_options": ControlSet(changed, records, indices)}


def _with_images(records: RecordSet) -> RecordSet:
    return records.select(i for i, record in enumerate(records.records) if record.image)


def _blank(records: RecordSet, _: Random) -> dict[str, RecordSet]:
    return {"blank_images": blanked(_with_images(records))}


def _text_only(records: RecordSet, _: Random) -> dict[str, RecordSet]:
    asked = _with_images(records)
    return {"text_only": RecordSet([dataclasses.replace(r, image="") for r in asked.records], asked.images)}


_MAKERS = dict(zip(CONTROLS, (_shuffled, _shifted, _two_options, _blank, _text_only), strict=True))
