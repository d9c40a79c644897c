"""`medcg reproduce --dry`: every cell of a grid with its data, steps and cost; nothing runs.

It needs neither weights nor data: without a Med-MAT tree it takes the paper's subsets with nominal sizes.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from medcg_jax.chips import CHIPS, chip_hours
from medcg_jax.config import ARMS, BOX_TABLES, DECIDING_ARMS, ConfigError, RunConfig, has_any_size
from medcg_jax.data.records import Source, Subset
from medcg_jax.data.sources import open_source
from medcg_jax.study.design import mat
from medcg_jax.study.design.schedule import Job, Plan, make_plan, runs_by_model, seeded, spare_data
from medcg_jax.study.design.suite import short_of_records


@dataclass(frozen=True)
class NominalSource:
    """A source without records: subsets with names and numbers of records only."""

    subsets: tuple[Subset, ...]
    detection_subsets: tuple[Subset, ...]


def nominal_source(num_train: int) -> NominalSource:
    """The paper's 53 subsets with `num_train` training records each, and no test records: no test size is published."""
    subsets = [dataclasses.replace(s, num_train=num_train) for s in mat.paper_subsets().values()]
    boxes = tuple(s for s in subsets if mat.has_boxes(s))
    return NominalSource(tuple(s for s in subsets if s not in boxes), boxes)


def subsets_source(run: RunConfig) -> Source | NominalSource:
    """The run's data; where its tree does not exist, `nominal_source`, and a printed line."""
    data = seeded(run, run.study.seeds[0]).data
    if data.source != "release" or (data.root and Path(data.root).exists()):
        return open_source(spare_data(data))
    share, most = data.train_records_per_subset, spare_data(data).train_records_per_subset
    nominal = f"the paper's 53 subsets with {share} training records each for a set of several, {most} alone"
    print(f"data.root={data.root!r} does not exist: {nominal}; an upper bound")
    return nominal_source(most)


@dataclass(frozen=True)
class Cost:
    """The cost of training: samples, tokens of their padded rows, FLOPs of forward and backward."""

    samples: int = 0
    tokens: int = 0
    flops: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.samples + other.samples, self.tokens + other.tokens, self.flops + other.flops)

    def __str__(self) -> str:
        return f"{self.samples:,} samples, {_short(self.tokens / 1e6)} M tokens, {_short(self.flops / 1e15)} PFLOP"

    def as_dict(self) -> dict[str, float]:
        return {"samples": self.samples, "tokens": self.tokens, "pflop": self.flops / 1e15}


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"


def costs(run: RunConfig, jobs: Sequence[Job]) -> dict[str, Cost]:
    """Job id -> the cost of its training; zero for the base itself.

    FLOPs are of padded rows (`families.flops`): attention over the full square, without rematerialization. Rows with
    boxes have a length of their own.
    """
    from medcg_jax.families import flops

    config, data = architecture_of(run), run.data

    def of_row(with_boxes: bool) -> tuple[int, float]:
        text = with_boxes and data.max_box_text_tokens or data.max_text_tokens
        targets = with_boxes and data.max_box_target_tokens or data.max_target_tokens
        length = config.num_image_tokens + text
        row = flops.forward(config, length=length, num_logits=targets)
        return length, flops.training(row, trainable=run.model.trainable)

    rows = {with_boxes: of_row(with_boxes) for with_boxes in (False, True)}
    cost_of = {}
    for job in jobs:
        samples = job.steps * run.train.batch_size
        length, flops_of_row = rows[job.has_boxes]
        cost_of[job.id] = Cost(samples, samples * length, samples * flops_of_row)
    return cost_of


def architecture_of(run: RunConfig):
    """The architecture of the run's model; a tiny model has its tokenizer's vocabulary size."""
    from medcg_jax.families.build import TINY, architecture

    if run.model.name not in TINY:
        return architecture(run.model)
    from medcg_jax.train.setup import model_config, run_tokenizer

    return model_config(run.model, run_tokenizer(run.model))


def parse_prices(text: str) -> dict[str, float]:
    """{chip: USD of a chip-hour} of "h100:2.5,v5e:1.2".

    Raises:
      ConfigError: no such chip, or no price above 0.
    """
    prices = {}
    for entry in filter(None, text.split(",")):
        chip, _, price = entry.strip().partition(":")
        if chip not in CHIPS:
            raise ConfigError(f"--price={entry}: expected CHIP:USD, CHIP one of {', '.join(CHIPS)}")
        try:
            prices[chip] = float(price)
        except ValueError:
            prices[chip] = 0.0
        if not 0 < prices[chip] < math.inf:
            raise ConfigError(f"--price={entry}: expected CHIP:USD with a price above 0, as {chip}:2.5")
    return prices


def dry(run: RunConfig, prices: Mapping[str, float] = {}) -> dict:
    """Prints every cell with its training subsets, sizes, steps and cost, and totals; trains nothing.

    prices: chip -> USD of a chip-hour.

    Returns {"cells": [fields of `suite.Cell`, "steps", "trained_as" and its cost], "arms" (as `by_arm`), "deciding" (as
    one of these, of all arms that tell composition from transfer), "trainings", "saved" (trained cells that share
    another cell's training), "steps", "bases", "nominal" (whether sizes are), "samples", "tokens", "pflop", "chip_hours", "usd" (by chip)}; for
    `study.models` {model: the same}.

    Raises:
      ConfigError, DataError: as `schedule.make_plan`.
    """
    if run.study.models:
        listings = {}
        for model, model_run in runs_by_model(run).items():
            print(f"-- {model}")
            listings[model] = dry(model_run, prices)
        return listings
    if has_any_size(run.model.name):
        from medcg_jax.train.start import with_checkpoint  # it imports JAX

        run = with_checkpoint(run)
    source = subsets_source(run)
    plan = make_plan(run, source)
    spent = costs(run, plan.jobs)
    job_of = {cell.id: job for job in plan.jobs for cell in job.cells}
    entries = []
    for cell in plan.cells:
        job = job_of[cell.id]
        training = ", ".join(f"{n} ({c})" for n, c in zip(cell.related, cell.num_records, strict=True)) or "nothing"
        size = f"{cell.total_records} records, {job.steps} steps"
        size += f", {spent[job.id]}" if job.steps else ""
        size += f"; trained as {job.id}" if job.steps and job.id != cell.id else ""
        notes = f" [{cell.notes}]" if cell.notes else ""
        print(f"{cell.id}: {training} -> {', '.join(cell.target)}; {size}{notes}")
        derived = {"row": str(cell.row), "steps": job.steps, "trained_as": job.id} | spent[job.id].as_dict()
        entries.append(dataclasses.asdict(cell) | derived)
    return {"cells": entries, "nominal": isinstance(source, NominalSource)} | totals(run, plan, spent, prices)


def grid_totals(run: RunConfig) -> dict:
    """The work of one model's whole grid: {"steps", "samples", "test_rows"}.

    Steps and samples are of all trainings, bases included; rows are of all tests, controls included, and 0 where no
    test size is known.

    Raises:
      ConfigError, DataError: as `schedule.make_plan`.
    """
    source = subsets_source(run)
    plan = make_plan(run, source)
    steps, bases = sum(job.steps for job in plan.jobs), len(run.study.seeds) * run.base.steps
    boxes = source.detection_subsets if set(run.study.tables) & set(BOX_TABLES) else ()
    tests = {subset.name: subset.num_test for subset in (*source.subsets, *boxes)}
    rows = sum(tests[name] for job in plan.jobs for name in job.targets)
    return {
        "steps": steps + bases,
        "samples": steps * run.train.batch_size + bases * run.base.batch_size,
        "test_rows": rows * (1 + len(run.eval.controls)),
    }


def totals(run: RunConfig, plan: Plan, spent: dict[str, Cost], prices: Mapping[str, float]) -> dict:
    """Prints the grid's numbers, and returns them. prices: as of `dry`."""
    listed = arm_totals(plan, spent)
    trained = [job for job in plan.jobs if job.steps]
    cells = sum(len(job.cells) for job in trained)
    # As in the paper: tables 1 and 2 have a row for each test subset, though a cell tests many at once.
    rows = {
        (cell.table, cell.row.part if cell.table == "multi_task" else cell.row, target)
        for cell in plan.cells
        for target in cell.target
    }
    factors = {"rows": len(rows), "arms": len({c.arm for c in plan.cells}), "seeds": len(run.study.seeds)}
    all_cells = len(plan.cells)
    joint, equals = (" x ", " =") if math.prod(factors.values()) == all_cells else (", ", ":")
    named = [f"{number} {name}" for name, number in factors.items() if name != "seeds" or number > 1]
    print(f"{joint.join(named)}{equals} {all_cells} cells")
    saved, bases = cells - len(trained), len(run.study.seeds) if run.base.steps else 0
    shared = f"{len(trained)} trainings, {saved} saved by equal cells"
    print(f"{all_cells - cells} cells are the base itself, {cells} are trained: {shared}")
    steps, cost = sum(job.steps for job in trained), sum((spent[job.id] for job in trained), Cost())
    print(f"{len(trained)} trainings, {steps} steps; {bases} bases of {run.base.steps} steps")
    print(f"trainings without bases and tests: {cost} (forward and backward, rows at padded length)")
    hours = chip_hours(cost.flops)
    listed_hours = ", ".join(f"{_short(value)} on {chip}" for chip, value in hours.items())
    print(f"chip-hours at least, at published bf16 peaks, which no run reaches: {listed_hours}")
    usd = {chip: price * hours[chip] for chip, price in prices.items()}
    if usd:
        print(f"USD at least: {', '.join(f'{_short(value)} on {chip}' for chip, value in usd.items())}")
    numbers = {"trainings": len(trained), "saved": saved, "steps": steps, "bases": bases}
    return numbers | cost.as_dict() | {"chip_hours": hours, "usd": usd} | listed


def arm_totals(plan: Plan, spent: Mapping[str, Cost]) -> dict:
    """Prints a line for each arm, and what those that decide add; {"arms", "deciding"} as `dry` returns them."""
    arms = by_arm(plan, spent)
    print("by arm; a training that several arms share counts for the first of them:")
    for arm, share in arms.items():
        print(f"  {arm}: {share['cells']} cells, {share['trainings']} trainings, {share['cost']}")
    deciding = [share for arm, share in arms.items() if arm in DECIDING_ARMS]
    added = {key: sum(share[key] for share in deciding) for key in ("cells", "trainings")}
    added["cost"] = sum((share["cost"] for share in deciding), Cost())
    if deciding:
        words = f"{added['cells']} cells, {added['trainings']} trainings, {added['cost']}"
        print(f"arms that tell composition from transfer ({DECIDING_ARMS[0]} to {DECIDING_ARMS[-1]}) add {words}")
    if short := short_of_records(plan.cells):
        cell, (count, wanted) = next(iter(short.items()))
        print(f"{len(short)} cells have fewer records than their row, as {cell}: {count} of {wanted}")
    return {"arms": {arm: _as_dict(share) for arm, share in arms.items()}, "deciding": _as_dict(added)}


def by_arm(plan: Plan, spent: Mapping[str, Cost]) -> dict[str, dict]:
    """Arm -> {"cells", "trainings", "cost"} in the order of `config.ARMS`, the paper's arms before those that decide.

    A training that serves several arms counts for the first of them only, so that the arms add up to the whole.
    """

    def place(arm: str) -> tuple:
        name, _, number = arm.rpartition("_")  # numbered ones behind the others, by number
        return (arm in DECIDING_ARMS, *((ARMS.index(arm),) if arm in ARMS else (len(ARMS), name, int(number))))

    arms = {
        arm: {"cells": 0, "trainings": 0, "cost": Cost()}
        for arm in sorted({cell.arm for cell in plan.cells}, key=place)
    }
    for cell in plan.cells:
        arms[cell.arm]["cells"] += 1
    for job in plan.jobs:
        first = arms[min((cell.arm for cell in job.cells), key=place)]
        first["trainings"] += job.steps > 0
        first["cost"] += spent[job.id]
    return arms


def _as_dict(share: dict) -> dict:
    return {"cells": share["cells"], "trainings": share["trainings"]} | share["cost"].as_dict()
