"""What is asked and answered about phantoms and neutral images, in the release's form of a choice question."""

from __future__ import annotations

from collections.abc import Sequence

from medcg_jax.data.phantom_images import SHAPES
from medcg_jax.data.phantom_world import AREAS, MODALITIES, TASKS
from medcg_jax.data.records import LETTERS, Turn

# Every question of a task names the modality, the area and the task.
TEMPLATES = {
    "state": (
        "What is the state of the {area} on this {modality}?",
        "Tell the {area} state from the {modality}.",
        "{modality} of the {area}: which state?",
    ),
    "cancer": (
        "What is the cancer type of the {area} on this {modality}?",
        "Tell the {area} cancer from the {modality}.",
        "{modality} of the {area}: which cancer?",
    ),
    "stage": (
        "What is the stage of the {area} on this {modality}?",
        "Tell the {area} stage from the {modality}.",
        "{modality} of the {area}: which stage?",
    ),
    "grade": (
        "What is the grade of the {area} on this {modality}?",
        "Tell the {area} grade from the {modality}.",
        "{modality} of the {area}: which grade?",
    ),
}

# Words of the pre-training alone; none is a label or a task.
COUNTS = ("none", "one", "two", "three")
SIZES = ("little", "large")
NEUTRAL = {
    "any": ("Any object?", ("no", "yes")),
    "count": ("How many?", COUNTS),
    "shape": ("Which shape?", SHAPES),
    "size": ("Which size?", SIZES),
}
NAMING = {"modality": ("Which modality?", MODALITIES), "area": ("Which area?", AREAS)}
DESCRIBE = "Describe."
READ = "Pick {word}."
# Names of the sites, row by row from the top left: a caption says where each object is.
SITES = tuple("alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi".split())


def choice(question: str, options: Sequence[str]) -> str:
    """The question with its options on lines of their own. The release's closing "Answer with the option's letter
    from the given choices directly." is left out: it would double the length of a row and say nothing new.

    Example: `choice("Which?", ("no", "yes")) == "Which?\\nA: no\\nB: yes"`.
    """
    return "\n".join([question, *(f"{letter}: {option}" for letter, option in zip(LETTERS, options))])


def choice_turn(question: str, options: Sequence[str], right: str) -> Turn:
    """The exchange whose answer is the letter of the right option."""
    return Turn(choice(question, options), LETTERS[options.index(right)])


def caption(shape: int, size: int, sites: Sequence[int]) -> str:
    """Such as "two large star beta pi" for objects at the sites 15 and 1, or "none"."""
    if not len(sites):
        return COUNTS[0]
    return " ".join([COUNTS[len(sites)], SIZES[size], SHAPES[shape], *(SITES[site] for site in sorted(sites))])


def words() -> list[str]:
    """Every text that a phantom's question, options, caption or answer is made of."""
    texts = [template for templates in TEMPLATES.values() for template in templates]
    texts += [question for question, _ in (NEUTRAL | NAMING).values()] + [DESCRIBE, READ.format(word="")]
    texts += [option for _, options in (NEUTRAL | NAMING).values() for option in options]
    return texts + [*TASKS, *(label for labels in TASKS.values() for label in labels), *SITES]
