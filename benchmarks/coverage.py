"""How often intervals cover and verdicts are wrong: `python -m benchmarks.coverage [--grids=300] [--json=FILE]`.

Simulates the answers of whole grids of pairs and asks the product's own statistics about them (`verdict.verdicts`,
`stats.summarise`). An answer is right where a normal score, half of whose variance is the record's and so common to all
arms, lies below the quantile of the arm's accuracy. That is the sum, in points, of the arm's mean, a target's effect on
the arm, a seed's effect on the arm (the same for all targets), and the training's own. The standard deviations are of
differences of two arms: 8 of targets; 0, 4 or 6 of the common seed effect; 4.7 between two trainings (measured on 12
pairs).

Printed, for each layout (targets x seeds x rows of a target) and seed effect: the least share of 95 % intervals that hold
the true value, over the contrasts of a grid and those of its first direction, all truths together; and for each truth the
share of each verdict. Then the verdicts of whole grids by `summarise`, where nothing is true and of pure transfer. Ends
with status 1 where a bound is broken: intervals cover .93 wherever there are two seeds; a gain where nothing is true,
composition where it is not, and transfer where the pair is above both members, in .05 at most; in whole grids composition in at most 5 of 100. Minutes.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import ndtri

from benchmarks.records import write_record
from medcg_jax.config import RunConfig
from medcg_jax.eval.predictions import wilson
from medcg_jax.study.stats import stats
from medcg_jax.study.stats.answers import PLAIN, Answers
from medcg_jax.study.stats.verdict import COMPOSITION, NO_CAUSE, NOT_TESTED, TRANSFER, Arms, verdicts

# Targets, seeds, rows of a target.
LAYOUTS = ((4, 1, 4), (3, 3, 1), (8, 3, 4), (14, 1, 3))
SEED_POINTS = (0, 4, 6)
TRAINING_POINTS, TARGET_POINTS = 4.7, 8.0
RECORDS = 100
DIRECTIONS = ("fixed_modality", "fixed_area", "fixed_task", "modality_area")
ARMS = ("trained", "baseline_plus", "single_1", "single_2", "filler_1", "filler_2")
# Truth -> mean accuracy of each of `ARMS` in points.
TRUTHS: dict[str, tuple[float, ...]] = {
    "nothing": (50, 50, 50, 50, 50, 50),
    # One subset does what the pair does, with and without fillers: the interaction is 0.
    "transfer": (75, 50, 75, 50, 75, 50),
    # Two subsets that each do it: the interaction is below 0.
    "transfer from either": (75, 50, 75, 75, 75, 75),
    # As good as one subset, and the interaction is above 0.
    "transfer, disturbed by fillers": (75, 50, 75, 50, 58, 50),
    # Above both, and the interaction is 0.
    "sum of two gains": (70, 50, 60, 60, 60, 60),
    "composition": (70, 45, 55, 50, 50, 47),
}
GAINS = (COMPOSITION, TRANSFER, NO_CAUSE, NOT_TESTED)
# Truth -> verdicts that are wrong of it, where they are others than "composition".
WRONG_VERDICTS = {"nothing": GAINS, "composition": (TRANSFER,), "sum of two gains": (COMPOSITION, TRANSFER)}
COVERED, WRONG, WRONG_GRIDS = 0.93, 0.05, 5


def main(argv: list[str] | None = None) -> int:
    """Prints the figures; 1 where a bound is broken."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--grids", type=int, default=300, help="of each layout, seed effect and truth")
    parser.add_argument("--summarised", type=int, default=100, help="whole grids of either kind")
    parser.add_argument("--json", default="", help="a file for the figures")
    args = parser.parse_args(argv)
    rows = []
    for layout in LAYOUTS:
        for points in SEED_POINTS:
            rows.append(measure(layout, points, args.grids))
            show(rows[-1])
    # More seeds: what they are worth.
    rows += [measure((8, 5, 4), points, args.grids, ("nothing", "transfer", "composition")) for points in SEED_POINTS]
    for row in rows[-len(SEED_POINTS) :]:
        show(row)
    grids = [summarised(truth, args.summarised) for truth in ("nothing", "transfer")]
    for grid in grids:
        print(f"{grid['grids']} grids by summarise, {grid['truth']}: {grid['verdicts']}")
    broken = broken_bounds(rows, grids)
    print("\n".join(broken) or "every bound holds")
    figures = {"command": "python -m benchmarks.coverage", "grids": args.grids, "records": RECORDS}
    write_record(args.json, figures | {"truths": TRUTHS, "rows": rows, "summarised": grids})
    return 1 if broken else 0


def show(row: dict) -> None:
    print(f"{'x'.join(map(str, row['layout']))}, seeds {row['seed_points']} points: covered {row['covered']:.3f}")
    for truth, shares in row["verdicts"].items():
        print(f"  {truth}: {', '.join(f'{kind} {share:.3f}' for kind, share in shares.items())}", flush=True)


def broken_bounds(rows: Sequence[Mapping], grids: Sequence[Mapping], slack: float = 0.0) -> list[str]:
    """The bounds that the figures break, in words. slack: allowed beyond each, for few grids."""
    broken = []
    for row in rows:
        where = f"{row['layout']}, {row['seed_points']} points"
        if row["layout"][1] > 1 and row["covered"] < COVERED - slack:
            broken.append(f"{where}: covered {row['covered']:.3f}, below {COVERED}")
        for truth, shares in row["verdicts"].items():
            wrong = WRONG_VERDICTS.get(truth, (COMPOSITION,))
            share = sum(shares.get(kind, 0) for kind in wrong)
            if share > WRONG + slack:
                broken.append(f"{where}, {truth}: {' or '.join(wrong)} {share:.3f}, above {WRONG}")
    for grid in grids:
        number = grid["verdicts"].get(COMPOSITION, 0)
        if number > WRONG_GRIDS * grid["grids"] / 100:
            broken.append(f"{grid['truth']}: composition in {number} of {grid['grids']} grids")
    return broken


def measure(
    layout: tuple[int, int, int], seed_points: float, grids: int, truths: Sequence[str] = tuple(TRUTHS)
) -> dict:
    """Shares over simulated grids of each truth: of intervals that cover, and of verdicts."""
    rng = np.random.default_rng([*layout, int(seed_points)])
    covered: Counter = Counter()
    verdict_shares: dict[str, dict[str, float]] = {}
    by_part: dict[str, dict[str, float]] = {}
    for truth in truths:
        kinds: Counter = Counter()
        kinds_of_parts: Counter = Counter()
        for _ in range(grids):
            whole, *parts = verdicts(simulate(rng, layout, seed_points, truth), "pairs")
            kinds[whole["verdict"]] += 1
            kinds_of_parts.update({line["verdict"] for line in parts})
            covered.update(held(whole, truth))
            covered.update(f"first direction: {name}" for name in held(parts[0], truth))
        verdict_shares[truth] = {kind: count / grids for kind, count in kinds.most_common()}
        by_part[truth] = {kind: count / grids for kind, count in kinds_of_parts.most_common()}
    shares = {name: count / grids / len(truths) for name, count in covered.items()}
    return {
        "layout": list(layout), "seed_points": seed_points, "covered": min(shares.values()),
        "covered_by_contrast": shares, "verdicts": verdict_shares, "in_any_direction": by_part,
    }  # fmt: skip


def held(line: Mapping, truth: str) -> Iterator[str]:
    """The contrasts of a verdict whose interval holds the true value."""
    mean = {arm: points / 100 for arm, points in zip(ARMS, TRUTHS[truth], strict=True)}
    together = mean["trained"] - mean["filler_1"] - mean["filler_2"] + mean["baseline_plus"]
    contrasts = {
        "trained - baseline_plus": (line["gain"], mean["trained"] - mean["baseline_plus"]),
        "trained - single_1": (line["over"]["single_1"], mean["trained"] - mean["single_1"]),
        "trained - single_2": (line["over"]["single_2"], mean["trained"] - mean["single_2"]),
        "single_1 - baseline_plus": (line["gains"]["single_1"], mean["single_1"] - mean["baseline_plus"]),
        "interaction": (line["interaction"], together),
    }
    yield from (
        name for name, (contrast, value) in contrasts.items() if contrast["ci_low"] <= value <= contrast["ci_high"]
    )


def simulate(
    rng: np.random.Generator, layout: tuple[int, int, int], seed_points: float, truth: str, records: int = RECORDS
) -> Arms:
    """The answers of one grid as `verdict.Arms`."""
    targets, seeds, rows = layout
    # A difference of two arms has twice the variance of one.
    of_seed = rng.normal(0, seed_points, (len(ARMS), seeds)) / 2**0.5
    of_target = rng.normal(0, TARGET_POINTS, (len(ARMS), targets)) / 2**0.5
    arms: dict[str, dict] = {arm: {} for arm in ARMS}
    for target in range(targets):
        for seed in range(seeds):
            common = rng.normal(0, 0.5**0.5, records)
            trainings = rng.normal(0, TRAINING_POINTS, (len(ARMS), rows)) / 2**0.5
            trainings[1] = trainings[1, 0]  # one training on unrelated data serves all rows of a target
            noise = rng.normal(0, 0.5**0.5, (len(ARMS), rows, records))
            noise[1] = noise[1, 0]
            for a, (arm, mean) in enumerate(zip(ARMS, TRUTHS[truth], strict=True)):
                for row in range(rows):
                    accuracy = mean + of_seed[a, seed] + of_target[a, target] + trainings[a, row]
                    key = (f"{DIRECTIONS[row]}/t{target:02}", f"t{target:02}", seed)
                    arms[arm][key] = common + noise[a, row] < ndtri(np.clip(accuracy / 100, 0.001, 0.999))
    return arms


def summarised(truth: str, grids: int, layout: tuple[int, int, int] = (8, 3, 1), records: int = 60) -> dict:
    """The verdicts of whole grids by `stats.summarise`, with a common seed effect of 4 points."""
    rng = np.random.default_rng([*layout, len(truth)])
    counts: Counter = Counter()
    with tempfile.TemporaryDirectory() as folder:
        config = {"config": dataclasses.asdict(RunConfig()), "versions": {}, "data": {}}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        for _ in range(grids):
            grid = SimulatedAnswers(folder, simulate(rng, layout, 4, truth, records))
            counts[stats.summarise(folder, grid.results, grid, grid.cells)["verdicts"][0]["verdict"]] += 1
    return {"truth": truth, "layout": list(layout), "records": records, "grids": grids, "verdicts": dict(counts)}


class SimulatedAnswers(Answers):
    """The answers of a simulated grid, with its rows of results.csv and cells.csv."""

    def __init__(self, folder: str | Path, arms: Arms):
        super().__init__(folder)
        self.results: list[dict] = []
        self.cells: list[dict] = []
        self._by_cell: dict[str, pd.DataFrame] = {}
        for arm, by_key in arms.items():
            for (row, target, seed), right in by_key.items():
                cell = f"pairs.{row.replace('/', '.')}.{arm}.s{seed}"
                n, correct = len(right), int(right.sum())
                key = {"cell": cell, "table": "pairs", "row": row, "arm": arm, "seed": seed, "target": target}
                low, high = wilson(correct, n)
                scores = {"n": n, "correct": correct, "accuracy": correct / n, "ci_low": low, "ci_high": high}
                self.results.append(key | scores | {"part": row.partition("/")[0], "published": None})
                self.cells.append(key | {"related": arm, "steps": "1", "seconds": "1.0"})
                self._by_cell[cell] = pd.DataFrame(
                    {"control": PLAIN, "subset": target, "id": [str(i) for i in range(n)], "options": 2, "answer": "A",
                     "predicted": np.where(right, "A", "B"), "right": right, "read": None, "group": "",
                     "A": -0.7, "B": -0.7}
                )  # fmt: skip

    def frame(self, cell: str, folder: str = "predictions") -> pd.DataFrame:
        return self._by_cell[cell]


if __name__ == "__main__":
    sys.exit(main())
