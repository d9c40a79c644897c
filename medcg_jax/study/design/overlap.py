"""What training subsets share with their target, and which printed rows of the paper share more or less than they say.

By the product's task table (`paper/task_elements.csv`) some printed rows train on a subset with all three elements of
the target, some lack what their direction says, and some triples have a source with two elements. A report says so
beside these rows, and gives its effects once more without them.
"""

from collections.abc import Sequence
from functools import cache
from itertools import permutations

from medcg_jax.data.records import Subset
from medcg_jax.study.design import combos, mat
from medcg_jax.study.design.suite import DIRECTIONS

LETTERS = {"modality": "M", "area": "A", "task": "T"}
# The lapses of a row, the gravest first, in words for a table.
WHOLE = "whole triplet"
PATTERN = "not its direction"
TWO = "two elements in one"
LAPSES = {
    WHOLE: "a training subset has all three elements of the target",
    PATTERN: "what the subsets share with the target is not what the direction says",
    TWO: "a source of one element has two",
}
COMBINATIONS = range(3, 9)  # published tables of pairs, triples and detection pairs


def overlap(target: Subset, training: Sequence[Subset]) -> tuple[str, ...]:
    """What each training subset shares with the target: ("MA", "MT"); "–" where nothing."""
    common = [mat.shared(subset, target) for subset in training]
    return tuple("".join(LETTERS[e] for e in mat.ELEMENTS if e in elements) or "–" for elements in common)


def lapse(target: Subset, training: Sequence[Subset], direction: str) -> str:
    """The gravest lapse of a row, one of `LAPSES`; "" where it is what its direction says.

    direction: of `combos.PATTERNS`. A pair may share more than the pattern, as long as no member shares everything.
    """
    common = [mat.shared(subset, target) for subset in training]
    if any(len(elements) == len(mat.ELEMENTS) for elements in common):
        return WHOLE
    pattern = combos.PATTERNS[direction]
    if not any(
        all(wanted <= given for wanted, given in zip(pattern, order, strict=True)) for order in permutations(common)
    ):
        return PATTERN
    return TWO if direction == "one_each" and any(len(elements) > 1 for elements in common) else ""


@cache
def printed_lapses() -> dict[tuple[int, int], str]:
    """(table, row) -> lapse, of the printed rows of tables 3 to 8 that have one."""
    subsets = mat.paper_subsets()
    lapses = {
        (table, row.row): lapse(subsets[row.target], [subsets[name] for name in row.related], DIRECTIONS[row.direction])
        for table in COMBINATIONS
        for row in mat.paper_rows(table)
    }
    return {key: name for key, name in lapses.items() if name}


@cache
def printed_repeats() -> frozenset[tuple[int, int]]:
    """(table, row) of printed rows that read as an earlier row of their table (`mat.repeats`): no second experiment."""
    return frozenset((table, row) for table in COMBINATIONS for row in mat.repeats(table))
