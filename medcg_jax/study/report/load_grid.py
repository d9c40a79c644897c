"""Reads a grid's workdir for its report, and counts scores and letters."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from medcg_jax.config import MODELS, STUDY_TABLES, ConfigError, DataConfig, model_title
from medcg_jax.data.phantom.source import DETECTION_TRIPLETS
from medcg_jax.data.phantom.world import TRIPLETS
from medcg_jax.data.records import LETTERS, DataError, Source, Subset
from medcg_jax.data.sources import open_source
from medcg_jax.data.tree import read_manifest, subset_table
from medcg_jax.eval.boxes import BoxAnswer, read_answers
from medcg_jax.eval.predictions import prediction_lines, wilson
from medcg_jax.study.design import mat, overlap
from medcg_jax.study.report.escape import ELEMENT_CHARACTERS, short_label
from medcg_jax.study.stats import contamination, grid_files, probe, stats
from medcg_jax.study.stats.answers import Answers
from medcg_jax.study.stats.grid_files import ARMS
from medcg_jax.study.stats.results import read_config_file
from medcg_jax.train import goodput
from medcg_jax.train.log import read_metrics
from medcg_jax.untrusted import FileError, check_number, shown

# Cells whose predictions stay in memory, since subset pages and cards read the same few cells repeatedly. A cell with
# answers to 53 subsets of released data takes some 50 MB.
NUM_KEPT_CELLS = 8


def arm_name(arm: str) -> str:
    """The name of an arm on the page; "efficiency_30" -> "30 target records"."""
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
    """Counts of one arm's answers in a table: letters, probability mass on the offered letters, generated answers."""

    n: int = 0
    right: int = 0
    predicted: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    answers: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    mass: float = 0.0
    num_mass: int = 0
    generated: int = 0
    unparsed: int = 0
    generated_right: int = 0

    def add(self, answers: pd.DataFrame) -> None:
        """Adds answers (a frame of `Answers`) to the counts."""
        self.n += len(answers)
        self.right += int(answers["right"].sum())
        for counts, column in ((self.predicted, "predicted"), (self.answers, "answer")):
            for letter, count in answers[column].value_counts().items():
                counts[letter] += int(count)
        if "A" in answers:
            recorded = answers.loc[answers["A"].notna(), [letter for letter in LETTERS if letter in answers]]
            self.mass += float(np.nansum(np.exp(recorded.to_numpy(float))))
            self.num_mass += len(recorded)
        generated = answers[answers["read"].notna()]
        self.generated += len(generated)
        self.unparsed += int((generated["read"] == "").sum())
        self.generated_right += int((generated["read"] == generated["answer"]).sum())


def letter_logprobs(record: Mapping) -> dict[str, float]:
    """Letter -> log-probability of one prediction; {} where the file has none."""
    return {LETTERS[i]: float(value) for i, value in enumerate(record["logprobs"] or ())}


class Grid:
    """The files of one grid, after a check that they agree.

    Attributes:
      run: config.json. config: its configuration. cells, results: rows of cells.csv and results.csv.
      predictions: a function, cell -> its predictions. It raises FileError for an invalid line, with file and line.
      notes: files that were left out, and why, for the report.

    Raises:
      FileNotFoundError: the folder lacks a file that every grid has.
      FileError: a file is broken, or contradicts another.
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
        self.cells = grid_files.read_cells(self.workdir, int(count))
        self.results = grid_files.read_results(self.workdir)
        self.answers = Answers(self.workdir)
        grid_files.check_results(self.answers, self.cells, self.results)
        self.notes: list[str] = []
        self.predictions = lru_cache(NUM_KEPT_CELLS)(
            lambda cell: list(prediction_lines(self.workdir / "predictions" / f"{cell}.jsonl"))
        )
        self._sources: dict[int, Source] = {}
        self._scores: dict[str, dict[tuple[str, str], dict[str, Score]]] = {}

    @cached_property
    def summary(self) -> dict:
        """`stats.summarise` of these files."""
        return stats.summarise(self.workdir, self.results, self.answers, self.cells)

    @property
    def model(self) -> str:
        """The model's name for people."""
        model = self.config["model"]
        return model_title(model["name"], model.get("checkpoint", ""))

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
        """The data source of one seed (default: the first).

        Raises:
          DataError: it does not exist, or differs from the recorded fingerprint.
        """
        seed = self.seeds[0] if seed is None else seed
        if seed not in self._sources:
            fields: dict = {key: tuple(v) if isinstance(v, list) else v for key, v in self.config["data"].items()}
            # A seed of the study draws the data too.
            source = open_source(DataConfig(**fields | {"seed": fields.get("seed", 0) + seed}))
            recorded = self.run.get("data", {}).get(str(seed))
            # The fingerprint of the boxes follows that of the choice records, where a table trains on boxes.
            if recorded and source.fingerprint() != recorded.partition(" ")[0]:
                raise DataError(
                    f"the data have changed since the grid (fingerprint {recorded} then, {source.fingerprint()} now)"
                )
            self._sources[seed] = source
        return self._sources[seed]

    def describe(self, subset: str) -> str:
        """Such as "MRI, Brain, State", for a numbered subset; "" where its name says it, or it is unknown."""
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

    def subset(self, name: str) -> Subset | None:
        """A subset's elements, without sizes; None for one that is not known."""
        triplets = {t.name: t for t in (*TRIPLETS, *DETECTION_TRIPLETS)} if self.of_phantoms else self.triplets
        return Subset(name, *triplets[name]) if name in triplets else None

    def shares(self, related: str, target: str) -> str | None:
        """What each training subset shares with the target, as "MA + MT"; None where a subset is not known.

        related: as in cells.csv, "03+06".
        """
        training, tested = [self.subset(name) for name in related.split("+") if related], self.subset(target)
        known = [subset for subset in training if subset]
        return " + ".join(overlap.overlap(tested, known)) if tested and known and len(known) == len(training) else None

    @cached_property
    def seeds(self) -> tuple[int, ...]:
        return tuple(sorted({int(cell["seed"]) for cell in self.done()}))

    @cached_property
    def tables(self) -> tuple[str, ...]:
        """Tables with a finished cell, in the study's order."""
        finished = {cell["table"] for cell in self.done()}
        return tuple(name for name in STUDY_TABLES if name in finished)

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
        """A cell's answers about boxes; [] where it has none."""
        path = self.workdir / "boxes" / f"{cell}.jsonl"
        return read_answers(path) if path.exists() else []

    @cached_property
    def contamination(self) -> list[dict[str, str]]:
        """The rows of contamination.csv. Raises FileError: a row is broken, or of no cell of the grid."""
        lines, known = contamination.read(self.workdir), {cell["cell"] for cell in self.cells}
        for line in lines:
            if line["cell"] not in known:
                path = self.workdir / contamination.FILE
                raise FileError(f"{path}: cell={line['cell']}: expected one of cells.csv")
        return lines

    @cached_property
    def probes(self) -> list[dict]:
        """The rows of probe.csv, where a linear probe has read the base. Raises FileError: the file is broken."""
        return probe.read(self.workdir)

    @cached_property
    def starts(self) -> list[dict]:
        """The times of all processes and starts (`goodput.read_starts`); [] where there are none, or they are broken."""
        return goodput.read_starts(self.workdir / goodput.FILE)

    def metrics(self, cell: dict) -> list[dict]:
        """The log of a cell's training; [] where there is none, or it ends before the training did.

        A training that serves several cells logs under the first one's name; its cells have equal training subsets,
        seed, steps and seconds.
        """
        path = self.workdir / "metrics" / f"{cell['cell']}.jsonl"
        if not path.exists() and cell["related"]:
            path = self._trainings.get(grid_files.training_of(cell), path)
        lines = read_metrics(path)
        last = lines[-1]["step"] if lines else 0
        if path.exists() and last != int(cell["steps"]):
            note = f"{path} ends at step {last:,} of {int(cell['steps']):,}: left out of the losses."
            self.notes += [note] if note not in self.notes else []
            return []
        return lines

    @cached_property
    def _trainings(self) -> dict[tuple, Path]:
        paths = {
            grid_files.training_of(cell): self.workdir / "metrics" / f"{cell['cell']}.jsonl"
            for cell in reversed(self.cells)
        }
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

        Each seed draws other phantoms, so n counts them all. All seeds have the same released test records: the
        accuracy is then the mean over seeds, and n and the interval are of the records.
        """
        seeds = tuple(sorted(row["seed"] for row in rows))
        if self.is_phantom:
            n, correct = sum(row["n"] for row in rows), sum(row["correct"] for row in rows)
            return Score(correct / n if n else 0.0, *wilson(correct, n), n, seeds)
        n = max(row["n"] for row in rows)
        accuracy = sum(row["correct"] / row["n"] for row in rows if row["n"]) / len(rows)
        return Score(accuracy, *wilson(accuracy * n, n), n, seeds)

    @property
    def letters(self) -> dict[tuple[str, str], Letters]:
        """(table, arm) -> counts of its answers, over all finished cells."""
        return self._counts[0]

    @cached_property
    def _counts(self) -> tuple[dict[tuple[str, str], Letters], dict[str, list[float]]]:
        """(`letters`, target -> [sum of the chances of its answers, number of answers]): predictions are read once."""
        counts: dict[tuple[str, str], Letters] = {}
        chances: dict[str, list[float]] = {}
        with_letters = {row["cell"] for row in self.results}
        for cell in (c for c in self.done() if c["cell"] in with_letters):
            letters = counts.setdefault((cell["table"], cell["arm"]), Letters())
            answers = self.answers.frame(cell["cell"])
            letters.add(answers)
            for subset, options in answers.groupby("subset")["options"]:
                if cell["arm"] == "baseline" or subset not in chances:
                    share = chances.setdefault(subset, [0.0, 0])
                    share[0] += float((1 / options).sum())
                    share[1] += len(options)
        return counts, chances

    def chance(self, target: str) -> float | None:
        """The accuracy of answering at random, from the options offered; None for an unknown target."""
        total, n = self._counts[1].get(target, (0.0, 0))
        return total / n if n else None
