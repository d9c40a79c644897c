"""The arms of a row that tell composition from transfer: each member alone, each with fillers, the task's words, no images.

All arms of a row have as many records in all (N) as its pair or triple, and as many updates (U), so that they differ in
what they are trained on alone. A composition is shown where the pair is above every single member, and where the
members gain more together than each adds to unrelated records.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from medcg_jax.config import StudyConfig
from medcg_jax.data.records import Subset
from medcg_jax.study.design import combos, mat

# (subset, number of its training records) of one arm.
Training = tuple[tuple[Subset, int], ...]


@dataclass(frozen=True)
class Arm:
    """What an arm of a row is trained on.

    Attributes:
      name: of `config.ARMS`.
      update_records: records that its updates are counted from; 0: its own.
      blank: whether its images are blank.
      note: what a reader must know of it, such as a shortage of records.
    """

    name: str
    training: Training
    update_records: int = 0
    blank: bool = False
    note: str = ""


@dataclass(frozen=True)
class Members:
    """The training subsets of a pair or triple, and what other arms can be drawn from.

    Attributes:
      target: the test subset.
      members: the training subsets, in the row's order; each gives all of its `num_train` records.
      subsets, boxes: all subsets of choice questions, and with boxes.
      available: subset -> its training records, where it has more than its `num_train`.
      seed: of the draws.
    """

    target: Subset
    members: tuple[Subset, ...]
    subsets: tuple[Subset, ...]
    boxes: tuple[Subset, ...] = ()
    available: Mapping[str, int] = field(default_factory=dict)
    seed: int = 0

    @property
    def num_records(self) -> int:
        """N: the records of the pair or triple."""
        return sum(s.num_train for s in self.members)

    def fillers(self, replaced: Sequence[Subset], num_records: int = 0, num_subsets: int = 0) -> Training | None:
        """Unrelated records in place of some members: of boxes for members with boxes, else of choice questions.

        num_records, num_subsets: in all; 0: as many as the replaced members have. None: no unrelated subset of a kind.
        """
        with_boxes, fillers = {s.name for s in self.boxes}, []
        # A few printed rows have a member that shares nothing with the target: it fills no other member's place.
        kept = {s.name for s in self.members} if len(replaced) < len(self.members) else set()
        total = sum(s.num_train for s in replaced)
        for pool, is_boxed in ((self.subsets, False), (self.boxes, True)):
            alike = [s for s in replaced if (s.name in with_boxes) == is_boxed]
            if not alike:
                continue
            records = sum(s.num_train for s in alike)
            if num_records:
                records = max(1, round(num_records * records / total))
            count = max(1, round(num_subsets * len(alike) / len(replaced))) if num_subsets else len(alike)
            pool = [s for s in pool if s.name not in kept]
            drawn = combos.baseline_plus(self.target, pool, count, records, self.seed, self.available)
            if not drawn[0]:
                return None
            fillers += zip(*drawn, strict=True)
        return tuple(fillers)


def row_arms(row: Members, study: StudyConfig) -> tuple[list[Arm], list[str]]:
    """(arms of a pair or triple, why others are absent). Arms that `study.arms` leaves out are neither.

    No arm but `trained` and `no_images`, which repeat the row, is trained on a subset with the target's whole triplet:
    a few printed rows of the paper have such a member, so they have no `single_K` and `filler_K` of it.
    """
    arms, absent = [], []

    def add(name: str, training: Training | None, why: str, wanted: int = 0, **fields) -> None:
        if study.arms and name not in study.arms:
            return
        if training:
            arms.append(Arm(name, training, note=_shortage(training, wanted or row.num_records), **fields))
        else:
            absent.append(f"no {name}: {why}")

    equal = dict(update_records=row.num_records)
    no_unrelated = "no subset of its kind shares no element with the target"
    own_number = 0 if study.baseline_plus_records == "related" else int(study.baseline_plus_records)
    num_subsets = {"related": len(row.members), "all": len(row.subsets)}.get(study.baseline_plus_subsets)
    unrelated = row.fillers(row.members, own_number, num_subsets or int(study.baseline_plus_subsets))
    # As drawn by the study; with a number of its own it has the epochs of all arms, and not the row's updates.
    add("baseline_plus", unrelated, no_unrelated, own_number, update_records=0 if own_number else row.num_records)
    add("trained", tuple((s, s.num_train) for s in row.members), "it has no members")
    is_whole = [len(mat.shared(s, row.target)) == len(mat.ELEMENTS) for s in row.members]
    for k, member in enumerate(row.members, 1):
        count = min(row.num_records, row.available.get(member.name, member.num_train))
        single = None if is_whole[k - 1] else ((member, count),)
        add(f"single_{k}", single, _whole(member), **equal)
    for k, member in enumerate(row.members, 1):
        fillers = row.fillers([s for s in row.members if s is not member])
        why = _whole(member) if is_whole[k - 1] else no_unrelated
        mixed = ((member, member.num_train), *fillers) if fillers and not is_whole[k - 1] else None
        add(f"filler_{k}", mixed, why, **equal)
    words = combos.words_only(row.target, row.subsets, len(row.members), row.num_records, row.seed, row.available)
    add("words_only", tuple(zip(*words, strict=True)), "no subset shares the task alone", **equal)
    add("no_images", tuple((s, s.num_train) for s in row.members), "", blank=True, **equal)
    return arms, absent


def _whole(member: Subset) -> str:
    return f"subset {member.name} has modality, area and task of the target"


def _shortage(training: Training, wanted: int) -> str:
    total = sum(count for _, count in training)
    return f"only {total} records for {wanted}" if total < wanted else ""


def ablation_arms(
    target: Subset, subsets: Sequence[Subset], budgets: Sequence[str], available: Mapping[str, int], seed: int
) -> list[Arm]:
    """Figure 4's arms and its controls; an arm without subsets is not defined for the target.

    budgets: of `config.BUDGETS`. "epochs": every arm has the same number of passes, as in the paper. "updates": arms
    with `_updates` at the end of their names have as many updates as `all_related`, which stands for both.
    """
    related = combos.related(target, subsets)

    def whole(chosen: Sequence[Subset]) -> Training:
        return tuple((s, s.num_train) for s in chosen)

    sets: dict[str, Training] = {
        "all_related": whole(related),
        "all_unrelated": whole(combos.unrelated(target, subsets)),
        **{f"wo_{e}": whole(combos.without(target, subsets, e)) for e in mat.ELEMENTS},
    }
    for element in mat.ELEMENTS:
        removal = combos.random_removal(target, subsets, element, seed, available)
        sets[f"random_removal_{element}"] = tuple(zip(*removal, strict=True)) if removal else ()
    sets |= {"same_task": whole(combos.same_task(target, subsets)), "all_data": whole(combos.usable(target, subsets))}
    arms, total = [], sum(s.num_train for s in related)
    for name, training in sets.items():
        if training and ("epochs" in budgets or name == "all_related"):
            arms.append(Arm(name, training, note=_removal_note(name, training, sets)))
    for name, training in sets.items():
        if training and "updates" in budgets and name != "all_related":
            note = _removal_note(name, training, sets)
            arms.append(Arm(f"{name}_updates", training, update_records=total, note=note))
    return arms


def _removal_note(name: str, training: Training, sets: Mapping[str, Training]) -> str:
    if not name.startswith("random_removal_"):
        return ""
    without_element = sets[f"wo_{name.removeprefix('random_removal_')}"]
    return _shortage(training, sum(count for _, count in without_element))


def dose_arms(
    target: Subset,
    subsets: Sequence[Subset],
    counts: Sequence[int],
    num_records: int,
    available: Mapping[str, int],
    seed: int,
) -> list[Arm]:
    """`dose_K`: K subsets for each element that share it alone, or as many as there are, at equal records and updates.

    A larger dose holds every subset of a smaller one, with fewer records of each. `dose_0` is unrelated records. A dose
    that adds no subset to the one before is left out.

    num_records: of each dose; 0: as many as one subset an element gives.
    """
    ordered = combos.doses(target, subsets, seed)
    if not ordered:
        return []
    smallest = [members[0] for members in ordered.values()]
    total = num_records or sum(s.num_train for s in smallest)
    arms: list[Arm] = []
    for count in counts:
        notes = [f"{len(m)} of {count} share {e} alone" for e, m in ordered.items() if len(m) < count]
        chosen = [s for members in ordered.values() for s in members[:count]]
        if count:
            most = [available.get(s.name, s.num_train) for s in chosen]
            drawn = tuple(zip(chosen, combos.spread(total, most), strict=True))
        else:
            drawn = tuple(
                zip(*combos.baseline_plus(target, subsets, len(smallest), total, seed, available), strict=True)
            )
        if not drawn or (arms and {s.name for s, _ in drawn} == {s.name for s, _ in arms[-1].training}):
            continue
        notes.append(_shortage(drawn, total))
        arms.append(Arm(f"dose_{count}", drawn, update_records=total, note="; ".join(filter(None, notes))))
    return arms
