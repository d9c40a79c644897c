"""Which subsets a target may be trained on: related, unrelated, without one element, pairs, triples, controls.

Pure functions of a target and the available subsets. No result holds the target or a subset with the same triplet, so
the combination stays unseen.
"""

from collections.abc import Mapping, Sequence
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
# Draws in search of a random removal that keeps every element.
REMOVAL_DRAWS = 200
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


def random_removal(
    target: Subset, subsets: Sequence[Subset], element: str, seed: int, available: Mapping[str, int] | None = None
) -> tuple[tuple[Subset, ...], tuple[int, ...]] | None:
    """Control of `without(element)`: related subsets less as many at random; (subsets, records of each), or None.

    Both keep equally many subsets, and equally many records in all, as far as the kept subsets have them. What is kept
    still supplies every element where the draw finds such a set, and is never the set without the element. Elements
    whose removals are equally large share one draw. None: every removal of that size is the element's own.

    available: as `draw`.
    """
    candidates = related(target, subsets)
    without_element = without(target, subsets, element)
    if not without_element or len(without_element) == len(candidates):
        return None  # without this element nothing is left, or nothing is removed
    random, fallback = _random("random_removal", target, seed), None
    for _ in range(REMOVAL_DRAWS):
        kept_places = sorted(random.sample(range(len(candidates)), len(without_element)))
        kept = tuple(candidates[i] for i in kept_places)
        if kept == without_element:
            continue
        if supplied(target, kept) == set(ELEMENTS):
            return kept, _counts(kept, sum(s.num_train for s in without_element), available)
        fallback = fallback or kept
    return fallback and (fallback, _counts(fallback, sum(s.num_train for s in without_element), available))


def draw(
    pool: Sequence[Subset],
    purpose: str,
    target: Subset,
    num_subsets: int,
    num_records: int,
    seed: int,
    available: Mapping[str, int] | None = None,
) -> tuple[tuple[Subset, ...], tuple[int, ...]]:
    """(random subsets of the pool, records of each): `num_records` in all, or as many as there are.

    `num_subsets` subsets are drawn, and more where these hold too few records. The draw depends on (purpose, target,
    size, seed) alone: rows of one target share it, and a smaller draw is part of a larger one.

    available: subset -> its training records, where it has more than its `num_train` (the share that it gives to a set
      of several); used where the whole pool holds too few.
    """
    ordered = sorted(pool, key=lambda s: s.name)
    _random(purpose, target, seed).shuffle(ordered)
    count = min(num_subsets, len(ordered))
    while count < len(ordered) and sum(s.num_train for s in ordered[:count]) < num_records:
        count += 1
    chosen = tuple(sorted(ordered[:count], key=lambda s: s.name))
    return chosen, _counts(chosen, num_records, available)


def baseline_plus(
    target: Subset,
    subsets: Sequence[Subset],
    num_subsets: int,
    num_records: int,
    seed: int,
    available: Mapping[str, int] | None = None,
) -> tuple[tuple[Subset, ...], tuple[int, ...]]:
    """`draw` of unrelated subsets: Baseline+, and fillers in place of related members.

    Rows of one target and size share it; in the printed table 7 of 13 targets have one value in all their rows.
    `stats.results.choices` lists what the paper leaves open.
    """
    return draw(unrelated(target, subsets), "baseline_plus", target, num_subsets, num_records, seed, available)


def words_only(
    target: Subset,
    subsets: Sequence[Subset],
    num_subsets: int,
    num_records: int,
    seed: int,
    available: Mapping[str, int] | None = None,
) -> tuple[tuple[Subset, ...], tuple[int, ...]]:
    """`draw` of subsets that share the Task alone: what its words, asked of other modalities and areas, are worth."""
    return draw(same_task(target, subsets), "words_only", target, num_subsets, num_records, seed, available)


def doses(target: Subset, subsets: Sequence[Subset], seed: int) -> dict[str, tuple[Subset, ...]]:
    """Element -> the subsets that share exactly this element, in drawn order: a dose of k takes the first k of each.

    {} where an element has none, so that no dose supplies the target.
    """
    candidates = sorted(usable(target, subsets), key=lambda s: s.name)
    ordered = {element: [s for s in candidates if shared(s, target) == {element}] for element in ELEMENTS}
    for element, sets in ordered.items():
        _random(f"dose/{element}", target, seed).shuffle(sets)
    return {element: tuple(sets) for element, sets in ordered.items()} if all(ordered.values()) else {}


def _counts(chosen: Sequence[Subset], num_records: int, available: Mapping[str, int] | None) -> tuple[int, ...]:
    """`spread` over the subsets' shares; over all that they have where the shares are too few."""
    shares = [s.num_train for s in chosen]
    if available and sum(shares) < num_records:
        shares = [max(s.num_train, available.get(s.name, 0)) for s in chosen]
    return spread(num_records, shares)


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
