"""Tables of the study as lists of cells: what each is trained on, how much of it, and what it is tested on.

`expand` is a pure function of the study's configuration and the subsets there are; its order is the order of cells.csv.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from medcg_jax import config as run_config
from medcg_jax.config import BOX_TABLES, MODELS, ConfigError, RunConfig, StudyConfig
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
class Cell:
    """One fine-tune with its evaluation, as one row of a table wants it.

    Attributes:
      id: stable, and a safe file name: `pairs.fixed_area.ct-lung-grade.trained.s0`.
      row: `DIRECTION/TARGET` (and `/t3r14` where it is a published row) in pairs and triples, `TARGET` in ablation,
        `in_distribution` or `out_of_distribution` in multi_task (there `out_of_distribution/SUBSET` where one subset
        alone is trained on), `with_related/TARGET` or `target_only/TARGET` in efficiency.
      related: the subsets it is trained on; none: the base itself.
      num_records: training records of each of them.
      target: the subsets it is tested on.
    """

    id: str
    table: str
    row: str
    arm: str
    seed: int
    related: tuple[str, ...]
    num_records: tuple[int, ...]
    target: tuple[str, ...]
    notes: str = ""

    def __post_init__(self):
        if len(self.related) != len(self.num_records):
            raise ValueError(f"{self.id}: {len(self.related)} training subsets with {len(self.num_records)} counts")
        if not self.sees_target and set(self.related) & set(self.target):
            raise ValueError(f"{self.id}: a target is among its training subsets")

    @property
    def sees_target(self) -> bool:
        """Whether it may be trained on other records of what it is tested on."""
        return self.arm.startswith(SEES_TARGET) and not self.row.startswith("out_of_distribution")

    @property
    def training_key(self) -> tuple:
        """What decides the trained weights: cells with equal keys are trained once."""
        used = sorted((name, count) for name, count in zip(self.related, self.num_records, strict=True) if count)
        return (self.seed, tuple(used))

    @property
    def total_records(self) -> int:
        return sum(self.num_records)


def paper_row(row: str) -> tuple[int, int] | None:
    """(table, row) of the published row that a row repeats: "fixed_area/03/t3r14" -> (3, 14)."""
    last = row.rsplit("/", 1)[-1]
    if not last.startswith("t") or "r" not in last:
        return None
    table, _, number = last[1:].partition("r")
    return (int(table), int(number)) if table.isdigit() and number.isdigit() else None


@dataclass(frozen=True)
class World:
    """What tables are expanded over.

    Attributes:
      subsets: those of choice questions. targets: the names asked for; none: all of them. released: whether they are
        Med-MAT's.
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
      subsets: those of choice questions. boxes: detection subsets, for `detection_pairs`.

    Raises:
      ConfigError: a target is no subset, or a table has no cell for these subsets.
    """
    cells = []
    family, published = MODELS[run.model.name], run.study.published_table
    pair_table = published if published in run_config.PUBLISHED_PAIRS else PAIR_TABLES.get(family, 3)
    detection_table = published if published in run_config.PUBLISHED_DETECTION else DETECTION_TABLES.get(family, 5)
    for table in run.study.tables:
        if table in BOX_TABLES and family not in DETECTION_TABLES:
            raise ConfigError(
                f"study.tables={table!r}: {run.model.name} gives no boxes; {', '.join(DETECTION_TABLES)} do"
            )
        targets = run.study.targets_of.get(table, run.study.targets)
        world = World(
            tuple(subsets), targets, run.data.source == "release", tuple(boxes) if table in BOX_TABLES else (),
            pair_table, detection_table, run.study,
        )  # fmt: skip
        for name in targets:
            if name not in {s.name for s in subsets}:
                raise ConfigError(f"study.targets={name!r}: one of {', '.join(s.name for s in subsets)} is accepted")
        found = [cell for seed in run.study.seeds for cell in _TABLES[table](world, seed)]
        arms, parts = {cell.arm for cell in found}, {cell.row.split("/")[0] for cell in found}
        if run.study.arms:
            found = [cell for cell in found if cell.arm in run.study.arms]
        if run.study.parts:
            found = [cell for cell in found if cell.row.split("/")[0] in run.study.parts]
        if not found:
            raise ConfigError(
                f"study.tables={table!r}: no target has the related subsets it needs (targets: "
                f"{', '.join(world.targets) or 'all'}; subsets: {', '.join(s.name for s in (*subsets, *world.boxes))}; "
                f"arms there: {', '.join(sorted(arms)) or 'none'}; parts: {', '.join(sorted(parts)) or 'none'})"
            )
        rows = {row: place for place, row in enumerate(dict.fromkeys(cell.row for cell in found))}
        cells += sorted(found, key=lambda cell: rows[cell.row])  # stable: a row's seeds and arms stay in order
    _check_ids(cells)
    return cells


def _check_ids(cells: Sequence[Cell]) -> None:
    seen = set()
    for cell in cells:
        if cell.id in seen:
            raise ValueError(f"two cells have the id {cell.id}")
        seen.add(cell.id)


def _cell(table: str, row: str, arm: str, seed: int, training: Sequence[Subset], target, counts=None, notes="") -> Cell:
    """A cell with its id; every training record of its subsets unless `counts` says fewer."""
    counts = tuple(s.num_train for s in training) if counts is None else tuple(counts)
    kept = [(s.name, count) for s, count in zip(training, counts, strict=True) if count]
    names, counts = zip(*kept, strict=True) if kept else ((), ())
    target = tuple(t.name for t in target)
    return Cell(_id(table, row, arm, seed), table, row, arm, seed, tuple(names), tuple(counts), target, notes)


def _id(table: str, row: str, arm: str, seed: int) -> str:
    text = ".".join((table, *row.split("/"), arm, f"s{seed}"))
    return "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in text)


def _three_arms(table, row, seed, world: World, training, target: Subset, notes) -> Iterator[Cell]:
    """Baseline, Baseline+ and Trained of one row."""
    yield _cell(table, row, "baseline", seed, (), (target,), notes=notes)
    records, subsets = world.study.baseline_plus_records, world.study.baseline_plus_subsets
    wanted = sum(s.num_train for s in training) if records == "related" else int(records)
    count = {"related": len(training), "all": len(world.subsets)}.get(subsets) or int(subsets)
    plus = combos.baseline_plus(target, world.subsets, count, wanted, seed)
    if plus.subsets:
        got = sum(plus.num_records)
        short = f"only {got} unrelated records for {wanted}" if got < wanted else ""
        note = "; ".join(n for n in (notes, short) if n)
        yield _cell(table, row, "baseline_plus", seed, plus.subsets, (target,), plus.num_records, note)
    yield _cell(table, row, "trained", seed, training, (target,), notes=notes)


def _two_arms(table, row, seed, world: World, training, target: Subset, notes) -> Iterator[Cell]:
    """Baseline and Trained of one row."""
    yield _cell(table, row, "baseline", seed, (), (target,), notes=notes)
    yield _cell(table, row, "trained", seed, training, (target,), notes=notes)


def _published(world: World, table: int) -> list[mat.PaperRow]:
    """Printed rows whose subsets are all there and whose target is asked for."""
    rows = mat.paper_rows(table) if world.released else ()
    wanted = {s.name for s in world.asked()}
    return [row for row in rows if world.has(*row.related, row.target) and row.target in wanted]


def _derived_targets(world: World, published: Sequence[mat.PaperRow]) -> tuple[Subset, ...]:
    """Targets whose rows are made by rule.

    In a phantom world all; in a released tree those that the paper's rows do not test, and of the paper's own subsets
    only those asked for by name (else a full tree would get more than its table).
    """
    tested = {row.target for row in published}
    left = tuple(s for s in world.asked() if s.name not in tested)
    if world.released and not world.targets:
        left = tuple(s for s in left if s.name not in mat.paper_subsets())
    return left


def _combination_rows(
    world: World, seed: int, name: str, table: int, directions: Sequence[str], sets_of, arms=_three_arms
) -> Iterator[Cell]:
    """The arms of a published table's rows, and of one set in each direction of other targets.

    sets_of: (target, direction) -> the sets there are.
    """
    published = _published(world, table)
    for row in published:
        training = tuple(world[n] for n in row.related)
        text = f"{DIRECTIONS[row.direction]}/{row.target}/t{table}r{row.row}"
        notes = f"arXiv v1 table {table} row {row.row}, reading: {row.confidence} confidence"
        yield from arms(name, text, seed, world, training, world[row.target], notes)
    for target in _derived_targets(world, published):
        for direction in directions:
            sets = sets_of(target, direction)
            if sets:
                training = combos.choose(sets, direction, target, seed)
                notes = f"1 of {len(sets)} sets, drawn by the seed"
                yield from arms(name, f"{direction}/{target.name}", seed, world, training, target, notes)


def pairs(world: World, seed: int) -> Iterator[Cell]:
    """Table 3 (7, 8 of other models): two subsets which share elements with the target in one of four directions."""
    yield from _combination_rows(world, seed, "pairs", world.pair_table, combos.PAIR_DIRECTIONS, _choice_sets(world))


def triples(world: World, seed: int) -> Iterator[Cell]:
    """Table 4: three subsets, one element each."""
    yield from _combination_rows(world, seed, "triples", 4, ("one_each",), _choice_sets(world))


def detection_pairs(world: World, seed: int) -> Iterator[Cell]:
    """Tables 5 and 6: pairs as in table 3 of a detection subset and one of choice questions; they have no Baseline+."""

    def sets_of(target: Subset, direction: str):
        return combos.detection_pairs(target, world.subsets, world.boxes, direction)

    number = world.detection_table
    yield from _combination_rows(world, seed, "detection_pairs", number, combos.PAIR_DIRECTIONS, sets_of, _two_arms)


def detection(world: World, seed: int) -> Iterator[Cell]:
    """Boxes of lesions: one model of all detection subsets but those held out, tested on both; the paper has none such.

    Held out are those of the modality and area of a target asked for, else the first whose elements are left elsewhere.
    """
    wanted = {(t.modality, t.area) for t in world.asked()} if world.targets else None
    held: tuple[Subset, ...] = ()
    for subset in world.boxes:
        rest = [s for s in world.boxes if s not in (*held, subset)]
        enough = all(combos.is_composable(s, rest) for s in (*held, subset))
        if enough and ((subset.modality, subset.area) in wanted if wanted is not None else not held):
            held += (subset,)
    inside = tuple(s for s in world.boxes if s not in held)
    for row, targets in (("in_distribution", inside), ("out_of_distribution", held)):
        if inside and targets:
            yield _cell("detection", row, "baseline", seed, (), targets)
            yield _cell("detection", row, "multi_task", seed, inside, targets)


def _choice_sets(world: World):
    return lambda target, direction: combos.combinations(target, world.subsets, direction)


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
        yield _cell("ablation", target.name, "baseline", seed, (), (target,))
        for arm, training in sets.items():
            if training:  # no unrelated subset, or none left: the arm is not defined for this target
                yield _cell("ablation", target.name, arm, seed, training, (target,))


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
            rest = [s for s in world.subsets if s.name not in tried]
            # Those held before must not lose an element by it either.
            if all(combos.is_composable(world[name], rest) for name in tried - set(published_out)):
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
    for row, targets in (("in_distribution", inside), ("out_of_distribution", outside)):
        if not inside or not targets:
            continue
        yield _cell("multi_task", row, "baseline", seed, (), targets)
        yield _cell("multi_task", row, "multi_task", seed, inside, targets)
        for subset in inside:
            name = f"{row}/{subset.name}"
            if row == "in_distribution":
                cell = _cell("multi_task", row, "single_task", seed, (subset,), (subset,))
                yield _renamed(cell, _id("multi_task", name, "single_task", seed))
            else:
                yield _cell("multi_task", name, "single_task", seed, (subset,), outside)


def _renamed(cell: Cell, cell_id: str) -> Cell:
    return Cell(**{**vars(cell), "id": cell_id})


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
                row, arm = f"{curve}/{target.name}", f"efficiency_{count}"
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
