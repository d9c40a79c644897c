"""What a base is pre-trained on: phantom images, asked in words that no question of the study has.

Code words name the quadrants and the properties, four words each; pairs of words name the values 0 and 1. So a base
learns to look where it is told, for the property it is told, and to answer with a word or with the letter of an option.
Textures and outlines are in its images, but nothing that it is asked depends on them: what a modality, an area or a task
means is left to fine-tuning.

In some images all quadrants are alike, so the area does not matter; in others all properties of a quadrant agree, so
the modality does not matter. There, a word that means nothing often stands in its place: the base learns what to do
with a word that it does not know, so that a new word can be learnt while others are still unknown.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import numpy as np

from medcg_jax.data.phantom import images, world
from medcg_jax.data.phantom.images import NUM_SITES, QUADRANT_OF_SITE, Scene, draw_scene, render
from medcg_jax.data.phantom.world import (
    AREAS,
    DESCRIBE,
    MODALITIES,
    NUM_QUADRANTS,
    PROPERTIES,
    PROPERTY_NAMES,
    QUADRANT_NAMES,
    QUESTION,
    VALUE_WORDS,
    Draws,
    base_words,
    choice_turn,
    study_words,
)
from medcg_jax.data.records import Record, RecordSet, Turn

# Shares of the images where the area does not matter, and where the modality does not.
SAME_QUADRANTS_FRAC, SAME_PROPERTIES_FRAC = 0.15, 0.15
# Shares of the rows: descriptions, and questions answered with a word; the others are answered with a letter.
DESCRIBE_FRAC, PLAIN_FRAC = 0.15, 0.25
NUM_TURNS = {"describe": 3, "plain": 4, "choice": 3}
# How often a word that does not matter is replaced by a filler, and how often options are the first pair of words.
FILLER_FRAC, FIRST_PAIR_FRAC = 0.7, 0.6
NUM_FILLERS, NUM_TASK_FILLERS = 240, 20
# What a record needs of `data.max_text_tokens`, beside the frame of the prompt, and of `data.max_target_tokens`.
MAX_TEXT_TOKENS, MAX_TARGET_TOKENS = 30, 15
_WORD_FILE = Path(__file__).parents[1] / "tokenizer" / "words.txt"


@functools.cache
def fillers() -> tuple[str, ...]:
    """Words of the tokenizer's list that mean nothing in the phantom world, lower-case ones first."""
    used = {*study_words(), *base_words(), *DESCRIBE.lower().split()}
    listed = [w for w in _WORD_FILE.read_text("utf-8").split() if len(w) > 2 and w.isalpha() and w.lower() not in used]
    return tuple(sorted(listed, key=lambda word: not word.islower())[:NUM_FILLERS])


def pretraining_scene(seed: int, num: int) -> tuple[Scene, np.ndarray, Draws]:
    """(scene, kind int[N], the draws that go on): 1 where the area does not matter, 2 where the modality does not."""
    draws = Draws(f"{seed}/pretraining", np.arange(num))
    values, which = draws.integer(2, NUM_QUADRANTS, len(PROPERTIES)), draws.uniform()
    kind = np.where(which < SAME_QUADRANTS_FRAC, 1, np.where(which < SAME_QUADRANTS_FRAC + SAME_PROPERTIES_FRAC, 2, 0))
    values[kind == 1] = values[kind == 1, :1]
    values[kind == 2] = values[kind == 2, :, :1]
    modality, area = draws.integer(len(MODALITIES)), draws.integer(len(AREAS))
    return draw_scene(draws, modality=modality, area=area, values=values, test=False), kind, draws


def pretraining_records(seed: int, num: int) -> RecordSet:
    """Records of one image each, with three or four turns: descriptions, plain questions or choice questions."""
    scene, kind, draws = pretraining_scene(seed, num)
    pictures = render(scene, draws)
    turns = max(NUM_TURNS.values())
    layout, quadrant, asked = (
        draws.uniform(),
        draws.integer(NUM_QUADRANTS, turns),
        draws.integer(len(PROPERTIES), turns),
    )
    use_filler, filler = draws.uniform(turns) < FILLER_FRAC, draws.integer(NUM_FILLERS, turns)
    # In the task's place is a filler or any code word, which does not count there.
    codes = [word for words in (*PROPERTY_NAMES, *QUADRANT_NAMES) for word in words]
    synonym, words = draws.integer(len(PROPERTY_NAMES[0]), 2, turns), (*codes, *fillers())
    in_task = np.where(
        draws.integer(3, turns) == 0,
        len(codes) + draws.integer(NUM_TASK_FILLERS, turns),
        draws.integer(len(codes), turns),
    )
    first_pair = draws.uniform(turns) < FIRST_PAIR_FRAC
    pair = np.where(first_pair, 0, draws.integer(len(VALUE_WORDS), turns))
    flipped = draws.integer(2, turns)

    def describe(i: int, k: int) -> Turn:
        q = quadrant[i, k]
        names = [pair[value] for pair, value in zip(PROPERTIES.values(), scene.values[i, q], strict=True)]
        return Turn(DESCRIBE.format(quadrant=QUADRANT_NAMES[q][0]), " ".join(names))

    def question(i: int, k: int) -> str:
        modality = PROPERTY_NAMES[asked[i, k]][synonym[i, 0, k]]
        area = QUADRANT_NAMES[quadrant[i, k]][synonym[i, 1, k]]
        if use_filler[i, k] and kind[i] == 1:
            area = words[len(codes) + filler[i, k]]
        if use_filler[i, k] and kind[i] == 2:
            modality = words[len(codes) + filler[i, k]]
        return QUESTION.format(modality=modality, area=area, task=words[in_task[i, k]])

    def value(i: int, k: int) -> int:
        return int(scene.values[i, quadrant[i, k], asked[i, k]])

    def plain(i: int, k: int) -> Turn:
        return Turn(question(i, k), VALUE_WORDS[0][value(i, k)])

    def choose(i: int, k: int) -> Turn:
        options = VALUE_WORDS[pair[i, k]]
        right = options[value(i, k)]
        return choice_turn(question(i, k), options[::-1] if flipped[i, k] else options, right)

    writers = {"describe": describe, "plain": plain, "choice": choose}
    records = []
    for i in range(num):
        name = (
            "describe" if layout[i] < DESCRIBE_FRAC else "plain" if layout[i] < DESCRIBE_FRAC + PLAIN_FRAC else "choice"
        )
        conversation = tuple(writers[name](i, k) for k in range(NUM_TURNS[name]))
        records.append(Record(f"pretraining/train/{i + 1}", "pretraining", conversation, image=f"pretraining/{i + 1}"))
    return RecordSet(records, pictures)


# Classes of each thing that a site's features are trained to tell: its object's colour or none, shape and size (where
# there is an object), its place, its quadrant.
SITE_CLASSES = (5, 2, 2, NUM_SITES, NUM_QUADRANTS)


def site_labels(scene: Scene) -> np.ndarray:
    """int32[N, 16, 5]: the class of each site in each of SITE_CLASSES; -1 where there is none."""
    shape, size, light, hue = np.moveaxis(scene.values[:, QUADRANT_OF_SITE], -1, 0)
    present = scene.present
    colour = np.where(present, 1 + 2 * light + hue, 0)
    sites = np.broadcast_to(np.arange(NUM_SITES), present.shape)
    objects = [np.where(present, values, -1) for values in (shape, size)]
    return np.stack([colour, *objects, sites, QUADRANT_OF_SITE[sites]], -1).astype(np.int32)


def pretraining_fingerprint(seed: int, num: int) -> str:
    """A digest of the seed, the number and the code that `pretraining_records` draws with."""
    digest = hashlib.sha256(repr((seed, num)).encode())
    for path in [world.__file__, images.__file__, __file__, _WORD_FILE]:
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()[:16]
