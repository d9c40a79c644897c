"""Which subsets a target may be trained on: related, unrelated, without one element, pairs, triples, controls.

Pure functions of a target and the available subsets. No result holds the target or a subset with the same triplet, so
the combination stays unseen.
"""

from collections.abc import Sequence
from itertools import product
from random import Random

from medcg_jax.data.records import Subset
from medcg_jax.study.design.mat import ELEMENTS, shared

# Direction -> what each member of the set shares with the target: table 3's four, and table 4's.
PATTERNS: dict[str, tuple[frozenset[str], ...]] = {
    "fixed_modality": (frozenset({"modality", "area"}), frozenset({"modality", "task"})),
    "fixed_area": (frozenset({"modality", "area"}), frozenset({"area", "task"})),
    "fixed_task": (frozenset({"modality", "task"}), frozenset({"area", "task"})),
    "modality_area": (frozenset({"modality", "area"}), frozenset({"task"})),
    "one_each": (frozenset({"modality"}), frozenset({"area"}), frozenset({"task"})),
}
PAIR_DIRECTIONS = ("fixed_modality", "fixed_area", "fixed_task", "modality_area")


def usable(target: Subset, subsets: Sequence[Subset]) -> tuple[Subset, ...]:
    """What may be trained on when `target` is the test: every subset that does not share its whole triplet."""
    return tuple(s for s in subsets if s.name != target.name and len(shared(s, target)) < len(ELEMENTS))


def related(target: Subset, subsets: Sequence[Subset]) -> tuple[Subset, ...]:
    """Subsets that share at least one element with the target."""
    return tuple(s for s in usable(target, subsets) if shared(s, target))


def unrelated(target: Subset, subsets: Sequence[Subset]) -> tuple[Subset, ...]:
    """Subsets that share no element with the target."""
    return tuple(s for s in usable(target, subsets) if not shared(s, target))


def supplied(target: Subset, training: Sequence[Subset]) -> frozenset[str]:
    """The elements of the target that the training subsets cover together."""
    return frozenset().union(*(shared(s, target) for s in training))


def is_composable(target: Subset, subsets: Sequence[Subset]) -> bool:
    """Whether the related subsets together supply all three elements of the target."""
    return supplied(target, related(target, subsets)) == set(ELEMENTS)


def without(target: Subset, subsets: Sequence[Subset], element: str) -> tuple[Subset, ...]:
    """The related subsets that do not share `element` (of `ELEMENTS`) with the target (figure 4's "w/o")."""
    return tuple(s for s in related(target, subsets) if element not in shared(s, target))


def combinations(target: Subset, subsets: Sequence[Subset], direction: str) -> tuple[tuple[Subset, ...], ...]:
    """Every training set of one direction of `PATTERNS`, members in the pattern's order.

    fixed_modality, target (M, A, T) -> ((M, A, .), (M, ., T)), ...
    """
    candidates = usable(target, subsets)
    pattern = PATTERNS[direction]
    return tuple(product(*([s for s in candidates if shared(s, target) == elements] for elements in pattern)))


def detection_pairs(
    target: Subset, subsets: Sequence[Subset], boxes: Sequence[Subset], direction: str
) -> tuple[tuple[Subset, ...], ...]:
    """Every pair of a direction with one member of `subsets` (choice questions) and one of `boxes`."""
    with_boxes = {s.name for s in boxes}
    pairs = combinations(target, (*subsets, *boxes), direction)
    return tuple(pair for pair in pairs if sum(s.name in with_boxes for s in pair) == 1)


def same_task(target: Subset, subsets: Sequence[Subset]) -> tuple[Subset, ...]:
    """Control: subsets that share the target's Task but neither its modality nor its area."""
    return tuple(s for s in usable(target, subsets) if shared(s, target) == {"task"})


def random_removal(target: Subset, subsets: Sequence[Subset], seed: int) -> tuple[Subset, ...]:
    """Control: the related subsets less a random draw of as many as `without` removes on average over the elements."""
    candidates = related(target, subsets)
    counts = [len(candidates) - len(without(target, subsets, element)) for element in ELEMENTS]
    count = round(sum(counts) / len(counts))
    removed = set(_random("random_removal", target, seed).sample(range(len(candidates)), count))
    return tuple(s for i, s in enumerate(candidates) if i not in removed)


def baseline_plus(
    target: Subset, subsets: Sequence[Subset], num_subsets: int, num_records: int, seed: int
) -> tuple[tuple[Subset, ...], tuple[int, ...]]:
    """(random unrelated subsets, records of each): `num_records` training records in all, or as many as there are.

    `num_subsets` subsets are drawn, and more where these hold too few records. The draw depends on (target, size, seed)
    alone: rows of one target share it, as equal values in the printed table suggest. `stats.results.choices` lists what
    the paper leaves open.
    """
    pool = sorted(unrelated(target, subsets), key=lambda s: s.name)
    _random("baseline_plus", target, seed).shuffle(pool)
    count = min(num_subsets, len(pool))
    while count < len(pool) and sum(s.num_train for s in pool[:count]) < num_records:
        count += 1
    chosen = sorted(pool[:count], key=lambda s: s.name)
    return tuple(chosen), spread(num_records, [s.num_train for s in chosen])


def spread(total: int, capacities: Sequence[int]) -> tuple[int, ...]:
    """`total` divided as evenly as the capacities allow; the capacities where their sum is less.

    spread(10, [2, 9, 9]) -> (2, 4, 4)
    """
    shares = [0] * len(capacities)
    order = sorted(range(len(capacities)), key=lambda i: (capacities[i], i))
    for rank, i in enumerate(order):
        shares[i] = min(capacities[i], (total - sum(shares)) // (len(order) - rank))
    return tuple(shares)


def choose(sets: Sequence[tuple[Subset, ...]], purpose: str, target: Subset, seed: int) -> tuple[Subset, ...]:
    """One of several sets, drawn by (purpose, target, seed)."""
    return _random(purpose, target, seed).choice(sorted(sets, key=lambda members: [s.name for s in members]))


def _random(purpose: str, target: Subset, seed: int) -> Random:
    return Random(f"{purpose}/{target.name}/{seed}")  # seeded by the text: the same on every machine and Python
