"""Tables of the study as lists of cells: what each trains on, how many records of it, and what it is tested on.

`expand` is a pure function of the study's configuration and the available subsets; cells.csv has its order.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from medcg_jax.config import (
    BOX_TABLES,
    DECIDING_ARMS,
    MODELS,
    PUBLISHED_DETECTION,
    PUBLISHED_PAIRS,
    ConfigError,
    RunConfig,
    StudyConfig,
)
from medcg_jax.data.records import Subset
from medcg_jax.families import registry
from medcg_jax.study.design import arms, combos, mat

# Arms that may train on (other records of) what they are tested on: the references of tables 1 and 2, and the
# efficiency curve.
SEES_TARGET = ("single_task", "multi_task", "efficiency")
# Family -> the published table whose rows its pairs repeat; a family without one repeats LLaVA's. The same for its
# detection pairs, whose two tables have the same eight rows.
PAIR_TABLES, DETECTION_TABLES = (
    {family.name: family.tables[kind][0] for family in registry.families() if kind in family.tables}
    for kind in ("pairs", "detection_pairs")
)
# Published row's direction -> ours.
DIRECTIONS = {
    "fixed modality": "fixed_modality",
    "fixed area": "fixed_area",
    "fixed task": "fixed_task",
    "modality-area pair": "modality_area",
    "three sources": "one_each",
}


@dataclass(frozen=True)
class Row:
    """A row of a table; `str` gives the text in cells.csv and results.csv, such as "fixed_area/03/t3r14".

    Attributes:
      part: the direction in pairs and triples, "in_distribution" or "out_of_distribution" in multi_task and detection,
        the curve in efficiency; "dose" in dose; "" in ablation.
      subset: the target; in multi_task the only training subset; "" where the row has many.
      published: (table, row) of the published row that it repeats.
    """

    part: str
    subset: str = ""
    published: tuple[int, int] | None = None

    def __str__(self) -> str:
        number = "t{}r{}".format(*self.published) if self.published else ""
        return "/".join(filter(None, (self.part, self.subset, number)))

    @classmethod
    def parse(cls, table: str, text: str) -> "Row":
        """The inverse of `str`."""
        if table == "ablation":
            return cls("", text)
        part, _, subset = text.partition("/")
        match = re.fullmatch(r"(.+)/t(\d{1,9})r(\d{1,9})", subset, re.ASCII)
        return cls(part, match[1], (int(match[2]), int(match[3]))) if match else cls(part, subset)


@dataclass(frozen=True)
class Cell:
    """One fine-tune of one model and its evaluation, for one row of a table.

    Attributes:
      id: stable, and a safe file name: `pairs.fixed_area.ct-liver-grade.trained.s0`; unique among a model's cells.
      related: its training subsets; none: the base itself.
      num_records: training records of each of them.
      target: its test subsets.
      model: the model's name, of `config.MODELS`.
      update_records: records that its updates are counted from; 0: its own.
      blank: whether all images of its training are the same grey one (`data.controls.BLANK`); its tests have their own.
      has_boxes: whether it trains on boxes.
    """

    id: str
    table: str
    row: Row
    arm: str
    seed: int
    related: tuple[str, ...]
    num_records: tuple[int, ...]
    target: tuple[str, ...]
    notes: str = ""
    model: str = ""
    update_records: int = 0
    blank: bool = False
    has_boxes: bool = False

    def __post_init__(self):
        if len(self.related) != len(self.num_records):
            raise ValueError(f"{self.id}: {len(self.related)} training subsets with {len(self.num_records)} counts")
        if len(set(self.related)) < len(self.related):
            raise ValueError(f"{self.id}: a training subset stands there twice: {', '.join(self.related)}")
        if not self.sees_target and set(self.related) & set(self.target):
            raise ValueError(f"{self.id}: a target is among its training subsets")

    @property
    def sees_target(self) -> bool:
        """Whether it may train on other records of its test subsets."""
        return self.arm.startswith(SEES_TARGET) and self.row.part != "out_of_distribution"

    @property
    def training(self) -> tuple[tuple[str, int], ...]:
        """(subset, number of its training records), by name."""
        return tuple(sorted((name, n) for name, n in zip(self.related, self.num_records, strict=True) if n))

    @property
    def total_records(self) -> int:
        return sum(self.num_records)


@dataclass(frozen=True)
class World:
    """The subsets and options that tables are expanded from.

    Attributes:
      subsets: those of choice questions.
      targets: names of the requested targets; none: all subsets.
      released: whether the subsets are Med-MAT's.
      boxes: detection subsets; only `detection` is tested on them.
      pair_table, detection_table: the published tables whose rows pairs and detection pairs repeat.
      study: which arms there are, and the settings of Baseline+, budgets and curves.
      available: subset -> training records that it has, where these are more than its share of a set (`num_train`).
    """

    subsets: tuple[Subset, ...]
    targets: tuple[str, ...] = ()
    released: bool = False
    boxes: tuple[Subset, ...] = ()
    pair_table: int = 3
    detection_table: int = 5
    study: StudyConfig = field(default_factory=StudyConfig)
    available: Mapping[str, int] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Subset:
        return next(s for s in (*self.subsets, *self.boxes) if s.name == name)

    def target_subsets(self) -> tuple[Subset, ...]:
        return tuple(self[name] for name in self.targets) if self.targets else self.subsets

    def has(self, *names: str) -> bool:
        return set(names) <= {s.name for s in (*self.subsets, *self.boxes)}


def expand(
    run: RunConfig, subsets: Sequence[Subset], boxes: Sequence[Subset] = (), available: Mapping[str, int] | None = None
) -> list[Cell]:
    """Every cell of the tables in `run.study`, table by table, row by row, seed by seed.

    Args:
      subsets: those of choice questions.
      boxes: detection subsets, for `BOX_TABLES`.
      available: as `World`'s.

    Raises:
      ConfigError: a target is no subset, or a table has no cell for these subsets.
    """
    cells: list[Cell] = []
    for table in run.study.tables:
        own_boxes = tuple(boxes) if table in BOX_TABLES else ()
        cells += _cells_of(table, run, tuple(subsets), own_boxes, available or {})
    for cell_id, count in Counter(cell.id for cell in cells).most_common(1):
        if count > 1:
            raise ValueError(f"two cells have the id {cell_id}")
    with_boxes = {subset.name for subset in boxes}
    return [
        dataclasses.replace(cell, model=run.model.name, has_boxes=not with_boxes.isdisjoint(cell.related))
        for cell in cells
    ]


def _cells_of(
    table: str, run: RunConfig, subsets: tuple[Subset, ...], boxes: tuple[Subset, ...], available: Mapping[str, int]
) -> list[Cell]:
    family, published, study = MODELS[run.model.name], run.study.published_table, run.study
    if table in BOX_TABLES and family not in DETECTION_TABLES:
        raise ConfigError(f"study.tables={table!r}: {run.model.name} gives no boxes; {', '.join(DETECTION_TABLES)} do")
    targets = study.targets_of.get(table, study.targets)
    pair_table = published if published in PUBLISHED_PAIRS else PAIR_TABLES.get(family, 3)
    detection_table = published if published in PUBLISHED_DETECTION else DETECTION_TABLES.get(family, 5)
    world = World(subsets, targets, run.data.source == "release", boxes, pair_table, detection_table, study, available)
    names = [s.name for s in subsets]
    for name in targets:
        if name not in names:
            raise ConfigError(f"study.targets={name!r}: expected one of {', '.join(names)}")
    cells = [cell for seed in study.seeds for cell in _TABLES[table](world, seed)]
    arms_there, parts = {cell.arm for cell in cells}, {cell.row.part or cell.row.subset for cell in cells}
    cells = [cell for cell in cells if not study.arms or cell.arm in study.arms]
    cells = [cell for cell in cells if not study.parts or (cell.row.part or cell.row.subset) in study.parts]
    if not cells:
        raise ConfigError(
            f"study.tables={table!r}: no target has the related subsets it needs (targets: "
            f"{', '.join(targets) or 'all'}; subsets: {', '.join(s.name for s in (*subsets, *boxes))}; "
            f"arms there: {', '.join(sorted(arms_there)) or 'none'}; parts: {', '.join(sorted(parts)) or 'none'})"
        )
    order = {row: i for i, row in enumerate(dict.fromkeys(cell.row for cell in cells))}
    return sorted(cells, key=lambda cell: order[cell.row])  # stable: a row's seeds and arms stay in order


def _cell(
    table: str,
    row: Row,
    arm: str,
    seed: int,
    training: Sequence[Subset],
    targets: Sequence[Subset],
    counts: Sequence[int] | None = None,
    notes: str = "",
    id_row: Row | None = None,
    **fields,
) -> Cell:
    """A cell with its id.

    counts: records of each training subset; None: all. id_row: the row in the id, where it is not `row`. fields: others
    of `Cell`.
    """
    counts = [s.num_train for s in training] if counts is None else counts
    used = [(s.name, count) for s, count in zip(training, counts, strict=True) if count]
    text = ".".join((table, *str(id_row or row).split("/"), arm, f"s{seed}"))
    cell_id = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in text)
    names, counts = tuple(name for name, _ in used), tuple(count for _, count in used)
    return Cell(cell_id, table, row, arm, seed, names, counts, tuple(t.name for t in targets), notes, **fields)


def _arm(table: str, row: Row, arm: arms.Arm, seed: int, target: Subset, notes: str = "") -> Cell:
    """The cell of one arm of a row."""
    training, counts = zip(*arm.training, strict=True)
    notes = "; ".join(filter(None, (notes, arm.note)))
    budget = dict(update_records=arm.update_records, blank=arm.blank)
    return _cell(table, row, arm.name, seed, training, (target,), counts, notes, **budget)


def _arms(
    table: str, row: Row, seed: int, world: World, training: Sequence[Subset], target: Subset, notes: str
) -> Iterator[Cell]:
    """Baseline, Baseline+, Trained and the arms that decide of one row; Trained's notes say which are absent, and why."""
    yield _cell(table, row, "baseline", seed, (), (target,), notes=notes)
    members = arms.Members(target, tuple(training), world.subsets, world.boxes, world.available, seed)
    row_arms, absent = arms.row_arms(members, world.study)
    for arm in row_arms:
        own_notes = absent if arm.name == "trained" else ()
        yield _arm(table, row, arm, seed, target, "; ".join(filter(None, (notes, *own_notes))))


def _combination_rows(
    world: World, seed: int, name: str, table: int, directions: Sequence[str] = combos.PAIR_DIRECTIONS
) -> Iterator[Cell]:
    """The arms of a published table's rows, and of one set in each direction of other targets.

    In a phantom world all rows follow the rule. In a released tree only targets that the paper's rows do not test get
    such rows, and the paper's own subsets only where requested by name: else a full tree would exceed its table.
    """
    requested = {s.name for s in world.target_subsets()}
    rows = mat.paper_rows(table) if world.released else ()
    published = [row for row in rows if world.has(*row.related, row.target) and row.target in requested]
    for row in published:
        cell_row = Row(DIRECTIONS[row.direction], row.target, (table, row.row))
        notes = f"arXiv v1 table {table} row {row.row}, reading: {row.confidence} confidence"
        yield from _arms(name, cell_row, seed, world, [world[n] for n in row.related], world[row.target], notes)
    tested = {row.target for row in published}
    if world.released and not world.targets:
        tested |= set(mat.paper_subsets())
    for target in world.target_subsets():
        for direction in directions if target.name not in tested else ():
            if name == "detection_pairs":
                sets = combos.detection_pairs(target, world.subsets, world.boxes, direction)
            else:
                sets = combos.combinations(target, world.subsets, direction)
            if sets:
                training = combos.choose(sets, direction, target, seed)
                notes = f"1 of {len(sets)} sets, drawn by the seed"
                yield from _arms(name, Row(direction, target.name), seed, world, training, target, notes)


def pairs(world: World, seed: int) -> Iterator[Cell]:
    """Table 3 (7, 8 of other models): two subsets that share elements with the target in one of four directions."""
    return _combination_rows(world, seed, "pairs", world.pair_table)


def triples(world: World, seed: int) -> Iterator[Cell]:
    """Table 4: three subsets, one element each."""
    return _combination_rows(world, seed, "triples", 4, ("one_each",))


def detection_pairs(world: World, seed: int) -> Iterator[Cell]:
    """Tables 5 and 6: pairs as in table 3 of a detection subset and a choice-question subset.

    The paper has no Baseline+ there; here it is unrelated records of either kind.
    """
    return _combination_rows(world, seed, "detection_pairs", world.detection_table)


def detection(world: World, seed: int) -> Iterator[Cell]:
    """Boxes of lesions: one model of all detection subsets but those held out, tested on both; not in the paper.

    Held out are the subsets with a requested target's modality and area; without targets, the first subset whose
    elements other subsets still cover.
    """
    requested = {(t.modality, t.area) for t in world.target_subsets()} if world.targets else None
    held_out: tuple[Subset, ...] = ()
    for subset in world.boxes:
        others = [s for s in world.boxes if s not in (*held_out, subset)]
        is_covered = all(combos.is_composable(s, others) for s in (*held_out, subset))
        if is_covered and (not held_out if requested is None else (subset.modality, subset.area) in requested):
            held_out += (subset,)
    inside = tuple(s for s in world.boxes if s not in held_out)
    for part, targets in (("in_distribution", inside), ("out_of_distribution", held_out)):
        if inside and targets:
            yield _cell("detection", Row(part), "baseline", seed, (), targets)
            yield _cell("detection", Row(part), "multi_task", seed, inside, targets)


def ablation(world: World, seed: int) -> Iterator[Cell]:
    """Figure 4: all related, all unrelated, without an element, all data; controls; at equal epochs and equal updates."""
    for target in world.target_subsets():
        if not combos.is_composable(target, world.subsets):
            continue
        row = Row("", target.name)
        yield _cell("ablation", row, "baseline", seed, (), (target,))
        budgets = world.study.ablation_budgets
        for arm in arms.ablation_arms(target, world.subsets, budgets, world.available, seed):
            yield _arm("ablation", row, arm, seed, target)


def dose(world: World, seed: int) -> Iterator[Cell]:
    """Accuracy by number of related subsets for each element, at equal records and updates; not in the paper."""
    study = world.study
    for target in world.target_subsets():
        for arm in arms.dose_arms(target, world.subsets, study.dose_subsets, study.dose_records, world.available, seed):
            yield _arm("dose", Row("dose", target.name), arm, seed, target)


def split(world: World) -> tuple[tuple[Subset, ...], tuple[Subset, ...]]:
    """(in distribution, out of distribution) of the multi-task table.

    Out of distribution are the requested targets. Without targets they are the paper's 12 of a released tree (tables 1
    and 2), and of all other subsets an equal share (12 of 37) whose elements in-distribution subsets still cover.
    A subset with the same triplet as a held-out one is in neither, except in the paper's own split.
    """
    published_in, published_out = mat.paper_split() if world.released and not world.targets else ((), ())
    if world.targets:
        held_out = set(world.targets)
    else:
        held_out = {s.name for s in world.subsets if s.name in published_out}
        free = [s for s in world.subsets if s.name not in (*published_in, *published_out)]
        for subset in free[::3][: round(len(free) * 12 / 37)]:
            larger = held_out | {subset.name}
            others = [s for s in world.subsets if s.name not in larger]
            # The subsets held out before must not lose an element either.
            if all(combos.is_composable(world[name], others) for name in larger - set(published_out)):
                held_out = larger
    outside = tuple(s for s in world.subsets if s.name in held_out)
    unseen = [t for t in outside if t.name not in published_out]
    inside = [s for s in world.subsets if s.name not in held_out]
    return tuple(s for s in inside if all(len(mat.shared(s, t)) < 3 for t in unseen)), outside


def multi_task(world: World, seed: int) -> Iterator[Cell]:
    """Tables 1 and 2: one model of all in-distribution subsets, and one model for each of them.

    The paper prints no single-task scores out of distribution; here each single-task model is tested there too.
    """
    inside, outside = split(world)
    for part, targets in (("in_distribution", inside), ("out_of_distribution", outside)):
        if not inside or not targets:
            continue
        all_subsets = Row(part)
        yield _cell("multi_task", all_subsets, "baseline", seed, (), targets)
        yield _cell("multi_task", all_subsets, "multi_task", seed, inside, targets)
        for subset in inside:
            row = Row(part, subset.name)
            if part == "in_distribution":  # one row of the table: each model is tested on its own subset
                yield _cell("multi_task", all_subsets, "single_task", seed, (subset,), (subset,), id_row=row)
            else:
                yield _cell("multi_task", row, "single_task", seed, (subset,), outside)


def efficiency(world: World, seed: int) -> Iterator[Cell]:
    """Accuracy by number of the target's own training records: with all its related subsets, with as many unrelated
    records, and alone.

    The only table that trains on its target, though never on test records. With `study.efficiency_budget` "updates"
    all points of a target have the updates of the largest training; with "epochs" as many as their records need.
    """
    for target in world.target_subsets():
        if not combos.is_composable(target, world.subsets):
            continue
        related = combos.related(target, world.subsets)
        num_related = sum(s.num_train for s in related)
        unrelated = combos.baseline_plus(target, world.subsets, len(related), num_related, seed, world.available)
        shortage = f"only {sum(unrelated[1])} unrelated records for {num_related}"
        curves = {
            "with_related": (related, [s.num_train for s in related], ""),
            "with_unrelated": (*unrelated, shortage if sum(unrelated[1]) < num_related else ""),
            "target_only": ((), (), ""),
        }
        of_updates = num_related + target.num_train if world.study.efficiency_budget == "updates" else 0
        fewer = [count for count in world.study.efficiency_records if count < target.num_train]
        for curve, (others, counts, notes) in curves.items():
            if curve == "with_unrelated" and not others:
                continue
            for count in (*fewer, target.num_train):
                row, arm = Row(curve, target.name), f"efficiency_{count}"
                training = tuple(zip((*others, target), (*counts, count), strict=True))
                point = arms.Arm(arm, training, update_records=of_updates, note=notes)
                yield _arm("efficiency", row, point, seed, target)


def short_of_records(cells: Sequence[Cell]) -> dict[str, list[int]]:
    """Cell of a pair or triple -> [its training records, those of the row's `trained`], where it has fewer.

    A member alone that is short is a weaker control, which makes a pair look better: readers must know of it.
    """
    return {
        cell.id: [cell.total_records, cell.update_records]
        for cell in cells
        if cell.arm in (*DECIDING_ARMS, "baseline_plus") and cell.total_records < cell.update_records
    }


_TABLES: dict[str, Callable[[World, int], Iterator[Cell]]] = {
    "pairs": pairs,
    "triples": triples,
    "ablation": ablation,
    "multi_task": multi_task,
    "efficiency": efficiency,
    "detection_pairs": detection_pairs,
    "detection": detection,
    "dose": dose,
}
