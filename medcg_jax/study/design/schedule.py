"""Cells as work: what is trained once for several cells, and in which order.

A training depends on the cells and the configuration alone, never on finished or concurrent work. So a grid that is
stopped and restarted, with any number of processes, ends in the same bytes.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from medcg_jax.config import BOX_TABLES, MODELS, MOST_RECORDS, DataConfig, RunConfig, parts_of, replace
from medcg_jax.config_file import with_flags
from medcg_jax.data.general import num_general
from medcg_jax.data.records import Source, Subset
from medcg_jax.data.sources import open_source, require_subsets
from medcg_jax.study.design.suite import DETECTION_TABLES, Cell, expand
from medcg_jax.train.optim import num_steps

# Times a subset's share of a set that a grid can read of it: a triple's member alone stands for three.
SPARE = 3


@dataclass(frozen=True)
class Job:
    """One training (`steps` 0: none, the base itself) and the cells that it serves, all of one model and seed.

    Attributes:
      id: the first cell's id; unique among a model's jobs.
      training: (subset, number of its training records), by name.
      blank: whether all of its images are the same grey one.
    """

    id: str
    seed: int
    training: tuple[tuple[str, int], ...]
    steps: int
    cells: tuple[Cell, ...]
    blank: bool = False

    @property
    def model(self) -> str:
        return self.cells[0].model

    @property
    def has_boxes(self) -> bool:
        """Whether it trains on boxes: such rows may be longer, so they share no program with others."""
        return self.cells[0].has_boxes

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of all subsets that its cells are tested on, sorted."""
        return tuple(sorted({name for cell in self.cells for name in cell.target}))


@dataclass(frozen=True)
class Plan:
    """A grid's cells, and the trainings they share in the order of work.

    Attributes:
      runs: model -> its configuration, whose `study.models` is empty.
    """

    cells: tuple[Cell, ...]
    jobs: tuple[Job, ...]
    runs: Mapping[str, RunConfig] = dataclasses.field(default_factory=dict)

    def of(self, model: str) -> "Plan":
        """The plan of one of the grid's models."""
        cells = tuple(cell for cell in self.cells if cell.model == model)
        return Plan(cells, tuple(job for job in self.jobs if job.model == model), {model: self.runs[model]})


def runs_by_model(run: RunConfig) -> dict[str, RunConfig]:
    """Model -> its run; the run itself where `study.models` is empty.

    A model that gives no boxes has no tables that train on boxes; trainable parts that a model lacks are left out.

    Raises:
      ConfigError: `study.model_flags` sets a value that cannot be used.
    """
    if not run.study.models:
        return {run.model.name: run}
    runs = {}
    for model in run.study.models:
        family = MODELS[model]
        model_run = replace(
            run,
            name=f"{run.name}_{model}",
            model__name=model,
            model__trainable=parts_of(family, run.model.trainable, lora_rank=run.model.lora_rank),
            study__tables=tuple(t for t in run.study.tables if t not in BOX_TABLES or family in DETECTION_TABLES),
            study__models=(),
            study__model_flags={},
            study__jobs=1,
        )
        flags = run.study.model_flags.get(model, ())
        values = {key: value for key, _, value in (flag.partition("=") for flag in flags)}
        runs[model] = with_flags(model_run, values)
    return runs


def seeded(run: RunConfig, seed: int) -> RunConfig:
    """The run with one of the study's seeds added to the seeds of its data, base and fine-tunes."""
    return replace(
        run, data__seed=run.data.seed + seed, base__seed=run.base.seed + seed, train__seed=run.train.seed + seed
    )


def make_plan(run: RunConfig, source: Source | None = None) -> Plan:
    """The grid of a configuration. source: in place of the configuration's data; only its subsets are read.

    Raises:
      ConfigError, DataError: as `runs_by_model` and `expand`, or the data cannot be read.
    """
    return plan_of(runs_by_model(run), source)


def plan_of(runs: Mapping[str, RunConfig], source: Source | None = None) -> Plan:
    """As `make_plan`, of models with a configuration each."""
    cells, jobs = [], []
    for run in runs.values():
        model_cells = _cells_of(run, source)
        cells += model_cells
        jobs += jobs_of(model_cells, run)
    return Plan(tuple(cells), tuple(jobs), dict(runs))


def spare_data(data: DataConfig) -> DataConfig:
    """The data with more training records of a subset than its share of a set (`data.train_records_per_subset`).

    A member of a pair or triple that is trained on alone takes as many records as the whole set has.
    """
    most = min(MOST_RECORDS, SPARE * data.train_records_per_subset)
    return dataclasses.replace(data, train_records_per_subset=most)


def _cells_of(run: RunConfig, source: Source | None) -> list[Cell]:
    study, most = run.study, run.data.train_records_per_subset
    source = source or open_source(spare_data(seeded(run, study.seeds[0]).data))
    targets_of = [name for names in study.targets_of.values() for name in names]
    require_subsets(source, [*study.targets, *targets_of, *study.box_subsets])

    def capped(subsets: Sequence[Subset]) -> list[Subset]:
        return [dataclasses.replace(s, num_train=min(s.num_train, most)) for s in subsets]

    # Detection files are read only where a table uses them.
    boxes = list(source.detection_subsets) if set(study.tables) & set(BOX_TABLES) else []
    boxes = [subset for subset in boxes if not study.box_subsets or subset.name in study.box_subsets]
    available = {subset.name: subset.num_train for subset in (*source.subsets, *boxes)}
    return expand(run, capped(source.subsets), capped(boxes), available)


def jobs_of(cells: Sequence[Cell], run: RunConfig) -> list[Job]:
    """The distinct trainings of one model's cells, in the order of work: equal ones of all rows and tables run once.

    Seeds keep their order, since all cells of a seed need its base. Within a seed untrained jobs come first, then the
    longest, so that processes end together.
    """
    groups: dict[tuple[int, tuple[tuple[str, int], ...], int, bool], list[Cell]] = {}
    for cell in cells:
        recipe = dataclasses.replace(run.train, epochs=run.study.epochs_of.get(cell.table, run.train.epochs))
        records = cell.update_records or cell.total_records
        records += num_general(records, run.data.imagewikiqa_share)
        steps = num_steps(recipe, records) if cell.training else 0
        groups.setdefault((cell.seed, cell.training, steps, cell.blank), []).append(cell)
    jobs = [
        Job(group[0].id, seed, training, steps, tuple(group), blank)
        for (seed, training, steps, blank), group in groups.items()
    ]
    seeds = list(dict.fromkeys(job.seed for job in jobs))
    return sorted(jobs, key=lambda job: (seeds.index(job.seed), job.steps > 0, -job.steps, job.id))
