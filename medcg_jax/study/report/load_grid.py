"""What a grid left in its workdir, read for its report, and what can be counted from it without a test."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

from medcg_jax.config import BOX_TABLES, MODELS, TABLES, ConfigError, DataConfig
from medcg_jax.data.phantom.source import DETECTION_TRIPLETS
from medcg_jax.data.phantom.world import TRIPLETS
from medcg_jax.data.records import LETTERS, DataError, Source
from medcg_jax.data.sources import open_source
from medcg_jax.data.tree import read_manifest, subset_table
from medcg_jax.eval.boxes import BoxAnswer, read_answers
from medcg_jax.eval.generation import parse_answer
from medcg_jax.eval.predictions import prediction_lines
from medcg_jax.study.design import mat
from medcg_jax.study.report.escape import ELEMENT_CHARACTERS, short_label
from medcg_jax.study.stats import contamination, grid_files, stats
from medcg_jax.study.stats.answers import Answers
from medcg_jax.study.stats.grid_files import ARMS
from medcg_jax.study.stats.results import read_config_file
from medcg_jax.train.log import read_metrics
from medcg_jax.untrusted import FileError, check_number, shown

# Cells whose predictions stay in memory, since pages of subsets and cards read the same few again and again. One with
# the answers to 53 subsets of released data takes some 50 MB.
NUM_KEPT_CELLS = 8


def arm_name(arm: str) -> str:
    """An arm for people; "efficiency_30" -> "30 target records"."""
    if arm.startswith("efficiency_"):
        return f"{arm.removeprefix('efficiency_')} target records"
    return ARMS.get(arm, arm)


@dataclass(frozen=True)
class Score:
    """An accuracy over n test answers with its Wilson interval, all as fractions.

    Attributes:
      seeds: the finished seeds, in order.
    """

    accuracy: float
    low: float
    high: float
    n: int
    seeds: tuple[int, ...]


@dataclass
class Letters:
    """What one arm of a table answered: letter counts, probability mass on the offered letters, free answers."""

    n: int = 0
    right: int = 0
    predicted: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    answers: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    mass: float = 0.0
    num_mass: int = 0
    generated: int = 0
    unparsed: int = 0
    generated_right: int = 0

    def add(self, record: dict) -> None:
        self.n += 1
        self.right += record["predicted"] == record["answer"]
        self.predicted[record["predicted"]] += 1
        self.answers[record["answer"]] += 1
        logprobs = letter_logprobs(record)
        if logprobs:
            self.mass += sum(math.exp(value) for value in logprobs.values())
            self.num_mass += 1
        if record["generated"] is not None:
            letter = parse_answer(record["generated"], record["options"])
            self.generated += 1
            self.unparsed += letter == ""
            self.generated_right += letter == record["answer"]


def letter_logprobs(record: dict) -> dict[str, float]:
    """Letter -> log-probability of one prediction; {} where the file has none."""
    return {LETTERS[i]: float(value) for i, value in enumerate(record["logprobs"] or ())}


class Grid:
    """The files of one grid, which agree with each other.

    Attributes:
      run: config.json. config: its configuration. cells, results: rows of cells.csv and results.csv.
      predictions: cell -> its predictions, a function (FileError: a line is none; file and line are named).
      notes: what was left out, with the file's name; a report says it.

    Raises:
      FileNotFoundError: the folder lacks a file that every grid has; one line.
      FileError: one of them is broken, or says something else than the others.
    """

    def __init__(self, workdir: str | Path):
        self.workdir = Path(workdir)
        for name in ("config.json", "cells.csv", "results.csv"):
            if not (self.workdir / name).exists():
                raise FileNotFoundError(f"{self.workdir} has no {name}: expected the workdir of a grid")
        self.run = read_config_file(self.workdir)
        path = self.workdir / "config.json"
        self.config: dict = self.run["config"]
        if self.config["model"]["name"] not in MODELS:
            name = shown(self.config["model"]["name"])
            raise FileError(f"{path}: config.model.name={name}: expected one of {', '.join(MODELS)}")
        count = check_number(self.run.get("cells"), f"{path}: cells", least=1, whole=True)
        self.cells = grid_files.read_cells(self.workdir, count)
        self.results = grid_files.read_results(self.workdir)
        self.answers = Answers(self.workdir)
        grid_files.check_results(self.answers, self.cells, self.results)
        self.notes: list[str] = []
        self.predictions = lru_cache(NUM_KEPT_CELLS)(
            lambda cell: list(prediction_lines(self.workdir / "predictions" / f"{cell}.jsonl"))
        )
        self._chance: dict[str, list[float]] = {}  # target -> sum of 1 / options, number of answers
        self._sources: dict[int, Source] = {}
        self._scores: dict[str, dict[tuple[str, str], dict[str, Score]]] = {}

    @property
    def is_phantom(self) -> bool:
        return self.config["data"]["source"] == "phantom"

    @property
    def of_phantoms(self) -> bool:
        """Whether the images are phantoms, from memory or from files."""
        names = {name for cell in self.done() for name in cell["target"].split("+")}
        known = {triplet.name for triplet in (*TRIPLETS, *DETECTION_TRIPLETS)}
        return self.is_phantom or (bool(names) and names <= known)

    def source(self, seed: int | None = None) -> Source:
        """The source that the cells of one seed (default: the first) were tested on.

        Raises:
          DataError: it is not there, or is not what the grid recorded.
        """
        seed = self.seeds[0] if seed is None else seed
        if seed not in self._sources:
            fields = {key: tuple(v) if isinstance(v, list) else v for key, v in self.config["data"].items()}
            # A seed of the study draws the data too.
            source = open_source(DataConfig(**fields | {"seed": fields.get("seed", 0) + seed}))
            recorded = self.run.get("data", {}).get(str(seed))
            # Behind the choice records' fingerprint stands that of the boxes, where a table trains on them.
            if recorded and source.fingerprint() != recorded.partition(" ")[0]:
                raise DataError(
                    f"the data have changed since the grid (fingerprint {recorded} then, {source.fingerprint()} now)"
                )
            self._sources[seed] = source
        return self._sources[seed]

    def describe(self, subset: str) -> str:
        """Such as "MRI, Brain, State", of a numbered subset; "" where its name says it, or nothing is known of it."""
        modality, area, task = self.triplets.get(subset, ("", "", ""))
        elements = (modality, area, mat.task_elements(task)[0]) if modality else ()
        return ", ".join(short_label(element, ELEMENT_CHARACTERS) for element in elements)

    @cached_property
    def triplets(self) -> dict[str, tuple[str, str, str]]:
        """Numbered subset -> (modality, area, task); {} of phantoms, whose names say it."""
        if self.of_phantoms:
            return {}
        try:
            listed = read_manifest(Path(self.config["data"]["root"]))
        except (DataError, ConfigError):
            listed = {}
        keys = ("modality", "area", "task")
        return subset_table() | {name: tuple(entry[key] for key in keys) for name, entry in listed.items()}

    @cached_property
    def seeds(self) -> tuple[int, ...]:
        return tuple(sorted({int(cell["seed"]) for cell in self.done()}))

    @cached_property
    def tables(self) -> tuple[str, ...]:
        """Tables with a finished cell, in the study's order."""
        finished = {cell["table"] for cell in self.done()}
        return tuple(name for name in (*TABLES, *BOX_TABLES) if name in finished)

    def done(self, table: str = "") -> list[dict]:
        return [c for c in self.cells if c["status"] == "done" and table in ("", c["table"])]

    def cells_of(self, table: str, row: str, arm: str) -> list[dict]:
        """The finished cells of one arm of a row, one per seed."""
        return [c for c in self.done(table) if (c["row"], c["arm"]) == (row, arm)]

    def failed(self) -> list[dict]:
        return [c for c in self.cells if c["status"].startswith("failed")]

    def waiting(self) -> list[dict]:
        return [c for c in self.cells if c["status"] == "waiting"]

    def boxes(self, cell: str) -> list[BoxAnswer]:
        """A cell's answers about boxes; [] where it was asked for none."""
        path = self.workdir / "boxes" / f"{cell}.jsonl"
        return read_answers(path) if path.exists() else []

    @cached_property
    def contamination(self) -> list[dict[str, str]]:
        """The lines of contamination.csv. Raises FileError: one is broken, or of no cell of the grid."""
        lines, known = contamination.read(self.workdir), {cell["cell"] for cell in self.cells}
        for line in lines:
            if line["cell"] not in known:
                path = self.workdir / contamination.FILE
                raise FileError(f"{path}: cell={line['cell']}: expected one of cells.csv")
        return lines

    def metrics(self, cell: dict) -> list[dict]:
        """What a cell's training logged; [] where it left nothing, or a file that ends before the training did.

        A training that serves several cells logs under the first one's name; cells of one training agree in what they
        were trained on, seed, steps and seconds.
        """
        path = self.workdir / "metrics" / f"{cell['cell']}.jsonl"
        if not path.exists() and cell["related"]:
            path = self._trainings.get(_training(cell), path)
        lines = read_metrics(path)
        last = lines[-1]["step"] if lines else 0
        if path.exists() and last != int(cell["steps"]):
            note = f"{path} ends at step {last:,} of {int(cell['steps']):,}: left out of the losses."
            self.notes += [note] if note not in self.notes else []
            return []
        return lines

    @cached_property
    def _trainings(self) -> dict[tuple, Path]:
        paths = {_training(cell): self.workdir / "metrics" / f"{cell['cell']}.jsonl" for cell in reversed(self.cells)}
        return {key: path for key, path in paths.items() if path.exists()}

    def scores(self, table: str) -> dict[tuple[str, str], dict[str, Score]]:
        """(row, target) -> arm -> score over the finished seeds, in the order of results.csv."""
        if table not in self._scores:
            grouped: dict[tuple[str, str], dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
            for result in self.results:
                if result["table"] == table:
                    grouped[result["row"], result["target"]][result["arm"]].append(result)
            self._scores[table] = {
                key: {arm: self.score(rows) for arm, rows in arms.items()} for key, arms in grouped.items()
            }
        return self._scores[table]

    def score(self, rows: Sequence[dict]) -> Score:
        """One arm's seeds as one accuracy.

        Phantoms are drawn anew with every seed, so n counts them all. Released test records return with every seed:
        the accuracy is then the mean over seeds, and n and the interval are those of the records.
        """
        seeds = tuple(sorted(row["seed"] for row in rows))
        if self.is_phantom:
            n, correct = sum(row["n"] for row in rows), sum(row["correct"] for row in rows)
            return Score(correct / n if n else 0.0, *stats.wilson(correct, n), n, seeds)
        n = max(row["n"] for row in rows)
        accuracy = sum(row["correct"] / row["n"] for row in rows if row["n"]) / len(rows)
        return Score(accuracy, *stats.wilson(accuracy * n, n), n, seeds)

    @cached_property
    def letters(self) -> dict[tuple[str, str], Letters]:
        """(table, arm) -> what it answered, over all finished cells; also finds every target's chance."""
        answered: dict[tuple[str, str], Letters] = {}
        asked = {row["cell"] for row in self.results}
        for cell in (c for c in self.done() if c["cell"] in asked):
            letters = answered.setdefault((cell["table"], cell["arm"]), Letters())
            for record in self.predictions(cell["cell"]):
                letters.add(record)
                if cell["arm"] == "baseline" or record["subset"] not in self._chance:
                    share = self._chance.setdefault(record["subset"], [0.0, 0])
                    share[0] += 1 / max(1, len(record["options"]))
                    share[1] += 1
        return answered

    def chance(self, target: str) -> float | None:
        """The accuracy of answering at random, from the options offered; None for an unknown target."""
        self.letters  # noqa: B018 - reads the predictions once
        total, n = self._chance.get(target, (0.0, 0))
        return total / n if n else None


def _training(cell: dict) -> tuple[str, str, str, str]:
    return cell["related"], cell["seed"], cell["steps"], cell["seconds"]
