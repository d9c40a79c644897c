"""Cells as work: what is trained once for several cells, and which trainings share one program.

The schedule depends on the cells and the configuration alone, never on what is done already, so that a grid which is
stopped and started again trains the same groups and ends in the same bytes.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from medcg_jax.data.records import Source, Subset
from medcg_jax.data.sources import open_source, require_subsets
from medcg_jax.run_config import BOX_TABLES, RunConfig, replace
from medcg_jax.study.suite import Cell, expand
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
    def targets(self) -> tuple[str, ...]:
        return tuple(sorted({name for cell in self.cells for name in cell.target}))


@dataclass(frozen=True)
class Group:
    """Jobs of one seed that are trained at once in one program; named after its first job."""

    name: str
    seed: int
    jobs: tuple[Job, ...]

    @property
    def steps(self) -> int:
        return max(job.steps for job in self.jobs)


def jobs_of(cells: Sequence[Cell], run: RunConfig) -> list[Job]:
    """The distinct trainings of the cells, in the order of their first cells."""
    serves: dict[tuple, list[Cell]] = {}
    for cell in cells:
        (seed, training), recipe = cell.training_key, run.train
        if cell.table in run.study.epochs_of:
            recipe = dataclasses.replace(recipe, epochs=run.study.epochs_of[cell.table])
        steps = num_steps(recipe, sum(count for _, count in training)) if training else 0
        serves.setdefault((seed, training, steps), []).append(cell)
    jobs = []
    for (seed, training, steps), group in serves.items():
        jobs.append(Job(group[0].id, seed, training, steps, tuple(group)))
    return jobs


def groups_of(jobs: Sequence[Job], cells_at_once: int) -> list[Group]:
    """The jobs in groups of at most `cells_at_once`, in the order to take them.

    Seeds in their order (a seed's base is needed by all its cells); within one the longest first, so that the last
    groups are short and the processes end together; what is not trained stands alone, and first. Trainings with boxes
    share no group with others: their rows may be longer.
    """
    groups = []
    for seed in dict.fromkeys(job.seed for job in jobs):
        own = [job for job in jobs if job.seed == seed]
        trained = sorted((job for job in own if job.steps), key=lambda job: (-job.steps, job.id))
        parts = []
        for with_boxes in (True, False):
            alike = [job for job in trained if (job.cells[0].table in BOX_TABLES) == with_boxes]
            parts += [alike[i : i + cells_at_once] for i in range(0, len(alike), cells_at_once)]
        parts.sort(key=lambda part: (-part[0].steps, part[0].id))
        parts = [[job] for job in own if not job.steps] + parts
        groups += [Group(part[0].id, seed, tuple(part)) for part in parts]
    return groups


@dataclass(frozen=True)
class Plan:
    """A grid laid out: its cells, the trainings they share, and the groups that are trained at once."""

    cells: tuple[Cell, ...]
    jobs: tuple[Job, ...]
    groups: tuple[Group, ...]


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
    jobs = jobs_of(cells, run)
    return Plan(tuple(cells), tuple(jobs), tuple(groups_of(jobs, run.study.cells_at_once)))
