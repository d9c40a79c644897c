"""Tables of the study as lists of cells: what each is trained on, how much of it, and what it is tested on.

`expand` is a pure function of the study's configuration and the subsets there are; its order is the order of cells.csv.
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

# Arms that may be trained on what they are tested on (other records of it): the references of tables 1 and 2, and the
# efficiency curve.
SEES_TARGET = ("single_task", "multi_task", "efficiency")
# Family -> the published table whose rows its pairs repeat, LLaVA's where it has none of its own; and its detection
# pairs, whose two tables have the same eight.
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
    """A row of a table; `str` gives it as cells.csv and results.csv have it, such as "fixed_area/03/t3r14".

    Attributes:
      part: the direction in pairs and triples, "in_distribution" or "out_of_distribution" in multi_task and detection,
        the curve in efficiency; "" in ablation.
      subset: the target; in multi_task the one subset that is trained on; "" where the row is of many.
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
        """The row that `str` gave as `text`."""
        if table == "ablation":
            return cls("", text)
        part, _, subset = text.partition("/")
        match = re.fullmatch(r"(.+)/t(\d{1,9})r(\d{1,9})", subset, re.ASCII)
        return cls(part, match[1], (int(match[2]), int(match[3]))) if match else cls(part, subset)


@dataclass(frozen=True)
class Cell:
    """One fine-tune of one model with its evaluation, as one row of a table wants it.

    Attributes:
      id: stable, and a safe file name: `pairs.fixed_area.ct-lung-grade.trained.s0`; unique among a model's cells.
      related: the subsets it is trained on; none: the base itself.
      num_records: training records of each of them.
      target: the subsets it is tested on.
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
        """Whether it may be trained on other records of what it is tested on."""
        return self.arm.startswith(SEES_TARGET) and self.row.part != "out_of_distribution"

    @property
    def training(self) -> tuple[tuple[str, int], ...]:
        """(subset, number of its training records), by name. Of one seed and model, equal trainings are done once."""
        return tuple(sorted((name, n) for name, n in zip(self.related, self.num_records, strict=True) if n))

    @property
    def total_records(self) -> int:
        return sum(self.num_records)


@dataclass(frozen=True)
class World:
    """What tables are expanded over.

    Attributes:
      subsets: those of choice questions.
      targets: the names asked for; none: all of them.
      released: whether they are Med-MAT's.
      boxes: detection subsets; `detection` alone is tested on some.
      pair_table, detection_table: the published ones whose rows pairs and detection pairs repeat.
      study: what it says of Baseline+ and of the efficiency curve.
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

    def asked(self) -> tuple[Subset, ...]:
        return tuple(self[name] for name in self.targets) if self.targets else self.subsets

    def has(self, *names: str) -> bool:
        return set(names) <= {s.name for s in (*self.subsets, *self.boxes)}


def expand(run: RunConfig, subsets: Sequence[Subset], boxes: Sequence[Subset] = ()) -> list[Cell]:
    """Every cell of the tables that `run.study` asks for, table by table, row by row, seed by seed.

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
    """A cell with its id, which is made of `id_row` where that is not its row.

    counts: records of each training subset; None: all of them.
    """
    counts = [s.num_train for s in training] if counts is None else counts
    used = [(s.name, count) for s, count in zip(training, counts, strict=True) if count]
    text = ".".join((table, *str(id_row or row).split("/"), arm, f"s{seed}"))
    cell_id = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in text)
    names, counts = tuple(name for name, _ in used), tuple(count for _, count in used)
    return Cell(cell_id, table, row, arm, seed, names, counts, tuple(t.name for t in targets), notes)


def _arms(table: str, row: Row, seed: int, world: World, training, target: Subset, notes: str) -> Iterator[Cell]:
    """Baseline, Baseline+ (the detection pairs have none) and Trained of one row."""
    yield _cell(table, row, "baseline", seed, (), (target,), notes=notes)
    if table not in BOX_TABLES:
        records, subsets = world.study.baseline_plus_records, world.study.baseline_plus_subsets
        wanted = sum(s.num_train for s in training) if records == "related" else int(records)
        count = {"related": len(training), "all": len(world.subsets)}.get(subsets) or int(subsets)
        plus, counts = combos.baseline_plus(target, world.subsets, count, wanted, seed)
        if plus:
            short = f"only {sum(counts)} unrelated records for {wanted}" if sum(counts) < wanted else ""
            both = "; ".join(filter(None, (notes, short)))
            yield _cell(table, row, "baseline_plus", seed, plus, (target,), counts, both)
    yield _cell(table, row, "trained", seed, training, (target,), notes=notes)


def _combination_rows(
    world: World, seed: int, name: str, table: int, directions: Sequence[str], sets_of
) -> Iterator[Cell]:
    """The arms of a published table's rows, and of one set in each direction of other targets.

    In a phantom world all rows are made by rule; in a released tree those of targets that the paper's rows do not test,
    and of the paper's own subsets only those asked for by name (else a full tree would get more than its table).

    sets_of: (target, direction) -> the sets there are.
    """
    asked = {s.name for s in world.asked()}
    rows = mat.paper_rows(table) if world.released else ()
    published = [row for row in rows if world.has(*row.related, row.target) and row.target in asked]
    for row in published:
        ours = Row(DIRECTIONS[row.direction], row.target, (table, row.row))
        notes = f"arXiv v1 table {table} row {row.row}, reading: {row.confidence} confidence"
        yield from _arms(name, ours, seed, world, [world[n] for n in row.related], world[row.target], notes)
    tested = {row.target for row in published}
    if world.released and not world.targets:
        tested |= set(mat.paper_subsets())
    for target in world.asked():
        for direction in directions if target.name not in tested else ():
            sets = sets_of(target, direction)
            if sets:
                training = combos.choose(sets, direction, target, seed)
                notes = f"1 of {len(sets)} sets, drawn by the seed"
                yield from _arms(name, Row(direction, target.name), seed, world, training, target, notes)


def pairs(world: World, seed: int) -> Iterator[Cell]:
    """Table 3 (7, 8 of other models): two subsets which share elements with the target in one of four directions."""
    sets_of = _choice_sets(world)
    yield from _combination_rows(world, seed, "pairs", world.pair_table, combos.PAIR_DIRECTIONS, sets_of)


def triples(world: World, seed: int) -> Iterator[Cell]:
    """Table 4: three subsets, one element each."""
    yield from _combination_rows(world, seed, "triples", 4, ("one_each",), _choice_sets(world))


def detection_pairs(world: World, seed: int) -> Iterator[Cell]:
    """Tables 5 and 6: pairs as in table 3 of a detection subset and one of choice questions; they have no Baseline+."""

    def sets_of(target: Subset, direction: str):
        return combos.detection_pairs(target, world.subsets, world.boxes, direction)

    number = world.detection_table
    yield from _combination_rows(world, seed, "detection_pairs", number, combos.PAIR_DIRECTIONS, sets_of)


def _choice_sets(world: World):
    return lambda target, direction: combos.combinations(target, world.subsets, direction)


def detection(world: World, seed: int) -> Iterator[Cell]:
    """Boxes of lesions: one model of all detection subsets but those held out, tested on both; the paper has none such.

    Held out are those of the modality and area of a target asked for, else the first whose elements are left elsewhere.
    """
    wanted = {(t.modality, t.area) for t in world.asked()} if world.targets else None
    held: tuple[Subset, ...] = ()
    for subset in world.boxes:
        others = [s for s in world.boxes if s not in (*held, subset)]
        enough = all(combos.is_composable(s, others) for s in (*held, subset))
        if enough and ((subset.modality, subset.area) in wanted if wanted is not None else not held):
            held += (subset,)
    inside = tuple(s for s in world.boxes if s not in held)
    for part, targets in (("in_distribution", inside), ("out_of_distribution", held)):
        if inside and targets:
            yield _cell("detection", Row(part), "baseline", seed, (), targets)
            yield _cell("detection", Row(part), "multi_task", seed, inside, targets)


def ablation(world: World, seed: int) -> Iterator[Cell]:
    """Figure 4: all related, all unrelated, without an element, all data; and the two controls."""
    for target in world.asked():
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
            if training:  # no unrelated subset, or none left: the arm is not defined for this target
                yield _cell("ablation", row, arm, seed, training, (target,))


def split(world: World) -> tuple[tuple[Subset, ...], tuple[Subset, ...]]:
    """(in distribution, out of distribution) of the multi-task table.

    Out of distribution are the targets asked for; else the paper's own 12 of a released tree (tables 1 and 2); else,
    and for subsets that are not the paper's, as large a share (12 of 37), all their elements left in distribution.
    A subset of the whole triplet of one held out is in neither (but in the paper's own split, which has such).
    """
    published_in, published_out = mat.paper_split() if world.released and not world.targets else ((), ())
    if world.targets:
        held = set(world.targets)
    else:
        held = {s.name for s in world.subsets if s.name in published_out}
        free = [s for s in world.subsets if s.name not in (*published_in, *published_out)]
        for subset in free[::3][: round(len(free) * 12 / 37)]:
            tried = held | {subset.name}
            others = [s for s in world.subsets if s.name not in tried]
            # Those held before must not lose an element by it either.
            if all(combos.is_composable(world[name], others) for name in tried - set(published_out)):
                held = tried
    outside = tuple(s for s in world.subsets if s.name in held)
    unseen = [t for t in outside if t.name not in published_out]
    inside = [s for s in world.subsets if s.name not in held]
    return tuple(s for s in inside if all(len(mat.shared(s, t)) < 3 for t in unseen)), outside


def multi_task(world: World, seed: int) -> Iterator[Cell]:
    """Tables 1 and 2: one model of all in-distribution subsets, and one model each of the same records.

    The paper prints no single-task scores out of distribution; here each of those models is tested there too.
    """
    inside, outside = split(world)
    for part, targets in (("in_distribution", inside), ("out_of_distribution", outside)):
        if not inside or not targets:
            continue
        whole = Row(part)
        yield _cell("multi_task", whole, "baseline", seed, (), targets)
        yield _cell("multi_task", whole, "multi_task", seed, inside, targets)
        for subset in inside:
            row = Row(part, subset.name)
            if part == "in_distribution":  # one row of the table: each model is tested on its own subset
                yield _cell("multi_task", whole, "single_task", seed, (subset,), (subset,), id_row=row)
            else:
                yield _cell("multi_task", row, "single_task", seed, (subset,), outside)


def efficiency(world: World, seed: int) -> Iterator[Cell]:
    """Accuracy over N training records of the target itself, with all its related subsets and without them.

    The one table whose target is trained on; its test records never are.
    """
    for target in world.asked():
        if not combos.is_composable(target, world.subsets):
            continue
        helpers = combos.related(target, world.subsets)
        for curve, others in (("with_related", helpers), ("target_only", ())):
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
