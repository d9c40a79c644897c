"""Cells as work: what is trained once for several cells, and in which order.

A training depends on the cells and the configuration alone, never on what is done already or is trained beside it, so
that a grid which is stopped and started again, by however many processes, ends in the same bytes.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from medcg_jax.config import BOX_TABLES, RunConfig, replace
from medcg_jax.data.general import num_general
from medcg_jax.data.records import Source, Subset
from medcg_jax.data.sources import open_source, require_subsets
from medcg_jax.study.design.suite import Cell, expand
from medcg_jax.train.optim import num_steps


@dataclass(frozen=True)
class Job:
    """One training (none where `steps` is 0: the base itself) and the cells that it serves.

    Attributes:
      id: that of its first cell.
      training: (subset, number of its training records), by name.
      targets: every subset that one of the cells is tested on, by name.
    """

    id: str
    seed: int
    training: tuple[tuple[str, int], ...]
    steps: int
    cells: tuple[Cell, ...]

    @property
    def has_boxes(self) -> bool:
        """Whether a table of boxes wants it: its rows may be longer than others, so it shares no program with them."""
        return self.cells[0].table in BOX_TABLES

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(sorted({name for cell in self.cells for name in cell.target}))


def jobs_of(cells: Sequence[Cell], run: RunConfig) -> list[Job]:
    """The distinct trainings of the cells, in the order to take them.

    Seeds in their order (a seed's base is needed by all its cells); within one what is not trained first, then the
    longest, so that processes end together.
    """
    serves: dict[tuple, list[Cell]] = {}
    for cell in cells:
        (seed, training), recipe = cell.training_key, run.train
        if cell.table in run.study.epochs_of:
            recipe = dataclasses.replace(recipe, epochs=run.study.epochs_of[cell.table])
        records = sum(count for _, count in training)
        records += num_general(records, run.data.imagewikiqa_share)
        steps = num_steps(recipe, records) if training else 0
        serves.setdefault((seed, training, steps), []).append(cell)
    jobs = []
    for (seed, training, steps), group in serves.items():
        jobs.append(Job(group[0].id, seed, training, steps, tuple(group)))
    seeds = list(dict.fromkeys(job.seed for job in jobs))
    return sorted(jobs, key=lambda job: (seeds.index(job.seed), job.steps > 0, -job.steps, job.id))


@dataclass(frozen=True)
class Plan:
    """A grid laid out: its cells, and the trainings they share in the order to take them."""

    cells: tuple[Cell, ...]
    jobs: tuple[Job, ...]


def seeded(run: RunConfig, seed: int) -> RunConfig:
    """The run of one of the study's seeds, which draws the data, the base and the fine-tunes alike."""
    return replace(
        run, data__seed=run.data.seed + seed, base__seed=run.base.seed + seed, train__seed=run.train.seed + seed
    )


def capped(subsets: Sequence[Subset], run: RunConfig) -> tuple[Subset, ...]:
    """Subsets with the numbers of records that a grid uses of them."""
    most = run.data.train_records_per_subset
    return tuple(dataclasses.replace(s, num_train=min(s.num_train, most)) for s in subsets)


def make_plan(run: RunConfig, source: Source | None = None) -> Plan:
    """The grid of a configuration; of its subsets alone `source` need know, in place of the configuration's data.

    Raises:
      ConfigError, DataError: as `expand`, or the data cannot be read.
    """
    source = source or open_source(seeded(run, run.study.seeds[0]).data)
    targets_of = [name for names in run.study.targets_of.values() for name in names]
    require_subsets(source, [*run.study.targets, *targets_of, *run.study.box_subsets])
    # Detection files are looked at where a table wants them, and only there.
    boxes = capped(source.detection_subsets, run) if set(run.study.tables) & set(BOX_TABLES) else ()
    boxes = tuple(subset for subset in boxes if not run.study.box_subsets or subset.name in run.study.box_subsets)
    cells = expand(run, capped(source.subsets, run), boxes)
    return Plan(tuple(cells), tuple(jobs_of(cells, run)))
