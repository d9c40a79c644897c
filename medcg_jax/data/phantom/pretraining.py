"""What a base is pre-trained on: neutral images and phantoms, asked in words that no task uses, and reading exercises.

Images of simple objects, with questions about them, teach to see. Phantoms of every pair of modality and area, with
lesions, are asked for the names of the two alone. No task and no label occurs, and no pose or cell that is reserved for
test. The reading exercises have no image: which letter stands before a word. Without them a model this small names what
it sees but does not learn to answer with a letter.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from medcg_jax.data.phantom import images, world
from medcg_jax.data.phantom.images import LESION_SHAPES, Scene, draw_scene, render
from medcg_jax.data.phantom.world import (
    AREAS,
    COUNT_WORDS,
    DESCRIBE,
    MODALITIES,
    NAMING,
    NEUTRAL,
    READ,
    SHAPES,
    SITE_WORDS,
    SIZE_WORDS,
    TASKS,
    Draws,
    caption,
    choice_turn,
)
from medcg_jax.data.records import Record, RecordSet, Turn

# Of all records the exercises; of those with an image the neutral ones, and those with plain questions, not a caption.
READING_FRAC, NEUTRAL_FRAC, PLAIN_FRAC = 0.33, 0.8, 0.25
# As many reading exercises as fit where another record has its image.
NUM_EXERCISES = 4
# What a record needs of `data.max_text_tokens` and `data.max_target_tokens`, with an empty system prompt.
MAX_TEXT_TOKENS, MAX_TARGET_TOKENS = 45, 11
_WORD_FILE = Path(__file__).parents[1] / "tokenizer" / "words.txt"
_TASK_WORDS = {*TASKS, *(label for labels in TASKS.values() for label in labels)}


def pretraining_records(seed: int, num: int) -> RecordSet:
    """Records of three or four turns, choice questions (with two to four options) and plain ones.

    An image's are two choice questions and, before or after them, a caption or two questions without options; other
    records are reading exercises alone.
    """
    draws = Draws(f"{seed}/pretraining", np.arange(num))
    neutral = draws.uniform() < NEUTRAL_FRAC
    # An empty image answers no question of shape or size: one in eight is enough.
    count = np.where(draws.uniform() < 0.125, 0, 1 + draws.integer(3))
    scene = draw_scene(
        draws,
        modality=np.where(neutral, -1, draws.integer(len(MODALITIES))),
        area=np.where(neutral, -1, draws.integer(len(AREAS))),
        count=count,
        shape=np.where(neutral, draws.integer(len(SHAPES)), np.asarray(LESION_SHAPES)[draws.integer(2)]),
        size=draws.integer(2),
        test=False,
    )
    pictures = render(scene, draws)
    writer = _Writer(draws, scene)
    records = []
    for i in range(num):
        name = f"pretraining/train/{i + 1}"
        if writer.reading[i]:
            records.append(Record(name, "pretraining", writer.exercises(i)))
        else:
            records.append(Record(name, "pretraining", writer.conversation(i), image=f"pretraining/{i + 1}"))
    return RecordSet(records, pictures)


def pretraining_fingerprint(seed: int, num: int) -> str:
    """A digest of the seed, the number and the code that `pretraining_records` draws with."""
    digest = hashlib.sha256(repr((seed, num)).encode())
    for path in [world.__file__, images.__file__, __file__, _WORD_FILE]:
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()[:16]


_OWN_WORDS = (*MODALITIES, *AREAS, *SHAPES, *COUNT_WORDS, *SIZE_WORDS, *SITE_WORDS)
NUM_OWN_WORDS = len(_OWN_WORDS)


def reading_words() -> tuple[str, ...]:
    """Words of the reading exercises: first the pre-training's own, then every second one of the tokenizer's list.

    A model that has to tell many words apart learns to compare any two."""
    listed = [w for w in _WORD_FILE.read_text("utf-8").split() if w.islower() and len(w) > 2 and w not in _TASK_WORDS]
    return tuple(dict.fromkeys([*_OWN_WORDS, *listed[::2]]))


class _Writer:
    """The turns of each record, from draws made for all at once."""

    def __init__(self, draws: Draws, scene: Scene):
        self.scene, self.words = scene, reading_words()
        self.reading = draws.uniform() < READING_FRAC
        self.told_first, self.plain = draws.integer(2), draws.uniform() < PLAIN_FRAC
        self.asked, self.order = draws.order(len(NEUTRAL)), draws.order(len(AREAS))
        self.num_options, self.place = draws.uniform(2), draws.uniform(NUM_EXERCISES)
        # Easy exercises, of two of the pre-training's own words, are learnt early; those of three of all words go on.
        self.more_words = draws.integer(2, NUM_EXERCISES)
        first, third = draws.integer(len(self.words), NUM_EXERCISES), draws.integer(len(self.words), NUM_EXERCISES)
        second = first + 1 + draws.integer(NUM_OWN_WORDS - 1, NUM_EXERCISES)
        self.word = np.stack([first, second, third], -1)

    def exercises(self, i: int) -> tuple[Turn, ...]:
        turns = []
        for words, more, position in zip(self.word[i], self.more_words[i], self.place[i], strict=True):
            places = words % len(self.words) if more else words[:2] % NUM_OWN_WORDS
            options = tuple(dict.fromkeys(self.words[k] for k in places))
            right = options[int(position * len(options))]
            turns.append(choice_turn(READ.format(word=right), options, right))
        return tuple(turns)

    def conversation(self, i: int) -> tuple[Turn, ...]:
        about = self._about(i)
        asked = [about[k] for k in self.asked[i] if k < len(about)]
        turns = []
        for turn, (question, options, right) in enumerate(asked[:2]):
            number = 2 + int(self.num_options[i, turn] * (min(len(options), 4) - 1))
            turns.append(choice_turn(question, self._some(i, options, right, number, self.place[i, turn]), right))
        told = [Turn(question, right) for question, _, right in asked[-2:]] if self.plain[i] else [self._caption(i)]
        return tuple([*told, *turns] if self.told_first[i] else [*turns, *told])

    def _about(self, i: int) -> list[tuple[str, tuple[str, ...], str]]:
        """(question, all options, the right one) for each thing that can be asked of one image."""
        scene, count = self.scene, self.scene.count[i]
        if scene.area[i] >= 0:
            right = {"modality": MODALITIES[scene.modality[i]], "area": AREAS[scene.area[i]]}
            return [(*NAMING[key], right[key]) for key in right]
        right = {"count": COUNT_WORDS[count]}
        if count:
            right |= {"shape": SHAPES[scene.shape[i]], "size": SIZE_WORDS[scene.size[i]]}
        # Whether there is any object is the easiest question: asked of half the images that have some.
        if not count or i % 2:
            right |= {"any": ("no", "yes")[int(count > 0)]}
        return [(*NEUTRAL[key], right[key]) for key in right]

    def _caption(self, i: int) -> Turn:
        scene = self.scene
        if scene.area[i] >= 0:
            return Turn(DESCRIBE, f"{MODALITIES[scene.modality[i]]} {AREAS[scene.area[i]]}")
        return Turn(DESCRIBE, caption(scene.shape[i], scene.size[i], scene.site[i, : scene.count[i]]))

    def _some(self, i: int, options: tuple[str, ...], right: str, number: int, position: float):
        """tuple[str, ...]: `number` of the options in a random order, the right one among them."""
        others = [options[k] for k in self.order[i] if k < len(options) and options[k] != right][: number - 1]
        others.insert(int(position * number), right)
        return tuple(others)
