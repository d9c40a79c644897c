"""Tables of the study as lists of cells: what each trains on, how many records of it, and what it is tested on.

`expand` is a pure function of the study's configuration and the available subsets; cells.csv has its order.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from medcg_jax.config import (
    BOX_TABLES,
    MODELS,
    PUBLISHED_DETECTION,
    PUBLISHED_PAIRS,
    ConfigError,
    RunConfig,
    StudyConfig,
)
from medcg_jax.data.records import Subset
from medcg_jax.families import registry
from medcg_jax.study.design import combos, mat

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
        the curve in efficiency; "" in ablation.
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
      id: stable, and a safe file name: `pairs.fixed_area.ct-lung-grade.trained.s0`; unique among a model's cells.
      related: its training subsets; none: the base itself.
      num_records: training records of each of them.
      target: its test subsets.
      model: the model's name, of `config.MODELS`.
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

    def __post_init__(self):
        if len(self.related) != len(self.num_records):
            raise ValueError(f"{self.id}: {len(self.related)} training subsets with {len(self.num_records)} counts")
        if not self.sees_target and set(self.related) & set(self.target):
            raise ValueError(f"{self.id}: a target is among its training subsets")

    @property
    def sees_target(self) -> bool:
        """Whether it may train on other records of its test subsets."""
        return self.arm.startswith(SEES_TARGET) and self.row.part != "out_of_distribution"

    @property
    def training(self) -> tuple[tuple[str, int], ...]:
        """(subset, number of its training records), by name. Cells of one seed and model with equal ones train once."""
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
      study: the settings of Baseline+ and of the efficiency curve.
    """

    subsets: tuple[Subset, ...]
    targets: tuple[str, ...] = ()
    released: bool = False
    boxes: tuple[Subset, ...] = ()
    pair_table: int = 3
    detection_table: int = 5
    study: StudyConfig = field(default_factory=StudyConfig)

    def __getitem__(self, name: str) -> Subset:
        return next(s for s in (*self.subsets, *self.boxes) if s.name == name)

    def target_subsets(self) -> tuple[Subset, ...]:
        return tuple(self[name] for name in self.targets) if self.targets else self.subsets

    def has(self, *names: str) -> bool:
        return set(names) <= {s.name for s in (*self.subsets, *self.boxes)}


def expand(run: RunConfig, subsets: Sequence[Subset], boxes: Sequence[Subset] = ()) -> list[Cell]:
    """Every cell of the tables in `run.study`, table by table, row by row, seed by seed.

    Args:
      subsets: those of choice questions.
      boxes: detection subsets, for `BOX_TABLES`.

    Raises:
      ConfigError: a target is no subset, or a table has no cell for these subsets.
    """
    cells: list[Cell] = []
    for table in run.study.tables:
        cells += _cells_of(table, run, tuple(subsets), tuple(boxes) if table in BOX_TABLES else ())
    for cell_id, count in Counter(cell.id for cell in cells).most_common(1):
        if count > 1:
            raise ValueError(f"two cells have the id {cell_id}")
    return [dataclasses.replace(cell, model=run.model.name) for cell in cells]


def _cells_of(table: str, run: RunConfig, subsets: tuple[Subset, ...], boxes: tuple[Subset, ...]) -> list[Cell]:
    family, published, study = MODELS[run.model.name], run.study.published_table, run.study
    if table in BOX_TABLES and family not in DETECTION_TABLES:
        raise ConfigError(f"study.tables={table!r}: {run.model.name} gives no boxes; {', '.join(DETECTION_TABLES)} do")
    targets = study.targets_of.get(table, study.targets)
    pair_table = published if published in PUBLISHED_PAIRS else PAIR_TABLES.get(family, 3)
    detection_table = published if published in PUBLISHED_DETECTION else DETECTION_TABLES.get(family, 5)
    world = World(subsets, targets, run.data.source == "release", boxes, pair_table, detection_table, study)
    names = [s.name for s in subsets]
    for name in targets:
        if name not in names:
            raise ConfigError(f"study.targets={name!r}: expected one of {', '.join(names)}")
    cells = [cell for seed in study.seeds for cell in _TABLES[table](world, seed)]
    arms, parts = {cell.arm for cell in cells}, {cell.row.part or cell.row.subset for cell in cells}
    cells = [cell for cell in cells if not study.arms or cell.arm in study.arms]
    cells = [cell for cell in cells if not study.parts or (cell.row.part or cell.row.subset) in study.parts]
    if not cells:
        raise ConfigError(
            f"study.tables={table!r}: no target has the related subsets it needs (targets: "
            f"{', '.join(targets) or 'all'}; subsets: {', '.join(s.name for s in (*subsets, *boxes))}; "
            f"arms there: {', '.join(sorted(arms)) or 'none'}; parts: {', '.join(sorted(parts)) or 'none'})"
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
) -> Cell:
    """A cell with its id.

    counts: records of each training subset; None: all. id_row: the row in the id, where it is not `row`.
    """
    counts = [s.num_train for s in training] if counts is None else counts
    used = [(s.name, count) for s, count in zip(training, counts, strict=True) if count]
    text = ".".join((table, *str(id_row or row).split("/"), arm, f"s{seed}"))
    cell_id = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in text)
    names, counts = tuple(name for name, _ in used), tuple(count for _, count in used)
    return Cell(cell_id, table, row, arm, seed, names, counts, tuple(t.name for t in targets), notes)


def _arms(
    table: str, row: Row, seed: int, world: World, training: Sequence[Subset], target: Subset, notes: str
) -> Iterator[Cell]:
    """Baseline, Baseline+ (not in detection pairs) and Trained of one row."""
    yield _cell(table, row, "baseline", seed, (), (target,), notes=notes)
    if table not in BOX_TABLES:
        records, subsets = world.study.baseline_plus_records, world.study.baseline_plus_subsets
        num_records = sum(s.num_train for s in training) if records == "related" else int(records)
        num_subsets = {"related": len(training), "all": len(world.subsets)}.get(subsets) or int(subsets)
        unrelated, counts = combos.baseline_plus(target, world.subsets, num_subsets, num_records, seed)
        if unrelated:
            shortage = f"only {sum(counts)} unrelated records for {num_records}" if sum(counts) < num_records else ""
            all_notes = "; ".join(filter(None, (notes, shortage)))
            yield _cell(table, row, "baseline_plus", seed, unrelated, (target,), counts, all_notes)
    yield _cell(table, row, "trained", seed, training, (target,), notes=notes)


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
    """Tables 5 and 6: pairs as in table 3 of a detection subset and a choice-question subset; without Baseline+."""
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
    """Figure 4: all related, all unrelated, without an element, all data; and two controls."""
    for target in world.target_subsets():
        if not combos.is_composable(target, world.subsets):
            continue
        sets = {
            "all_related": combos.related(target, world.subsets),
            "all_unrelated": combos.unrelated(target, world.subsets),
            **{f"wo_{e}": combos.without(target, world.subsets, e) for e in mat.ELEMENTS},
            "random_removal": combos.random_removal(target, world.subsets, seed),
            "same_task": combos.same_task(target, world.subsets),
            "all_data": combos.usable(target, world.subsets),
        }
        row = Row("", target.name)
        yield _cell("ablation", row, "baseline", seed, (), (target,))
        for arm, training in sets.items():
            if training:  # an arm without subsets is not defined for this target
                yield _cell("ablation", row, arm, seed, training, (target,))


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
    """Accuracy by number of the target's own training records, with all its related subsets and without them.

    The only table that trains on its target, though never on test records.
    """
    for target in world.target_subsets():
        if not combos.is_composable(target, world.subsets):
            continue
        related = combos.related(target, world.subsets)
        for curve, others in (("with_related", related), ("target_only", ())):
            fewer = [count for count in world.study.efficiency_records if count < target.num_train]
            for count in (*fewer, target.num_train):
                counts = (*(s.num_train for s in others), count)
                row, arm = Row(curve, target.name), f"efficiency_{count}"
                yield _cell("efficiency", row, arm, seed, (*others, target), (target,), counts)


_TABLES: dict[str, Callable[[World, int], Iterator[Cell]]] = {
    "pairs": pairs,
    "triples": triples,
    "ablation": ablation,
    "multi_task": multi_task,
    "efficiency": efficiency,
    "detection_pairs": detection_pairs,
    "detection": detection,
}
