"""Intervals and paired tests of a grid's scores: Wilson, exact McNemar, a hierarchical bootstrap, Holm.

Everything is computed from what a grid leaves in its workdir: `results.csv`, `predictions/`, `config.json`.
"""

import csv
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from scipy.stats import binomtest

from medcg_jax.eval.intervals import wilson

# name, table, arm, against: what `summarise` compares, in the order of the report.
EFFECTS = (
    ("pairs", "trained", "baseline_plus"),
    ("pairs", "trained", "baseline"),
    ("pairs", "baseline_plus", "baseline"),
    ("triples", "trained", "baseline_plus"),
    ("triples", "trained", "baseline"),
    ("detection_pairs", "trained", "baseline"),
    ("ablation", "all_related", "all_unrelated"),
    ("ablation", "all_related", "wo_modality"),
    ("ablation", "all_related", "wo_area"),
    ("ablation", "all_related", "wo_task"),
    ("ablation", "all_related", "random_removal"),
    ("ablation", "all_related", "same_task"),
    ("ablation", "all_related", "all_data"),
    ("ablation", "all_related", "baseline"),
    ("ablation", "random_removal", "wo_modality"),
    ("ablation", "random_removal", "wo_area"),
    ("ablation", "random_removal", "wo_task"),
    ("multi_task", "multi_task", "single_task"),
    ("multi_task", "multi_task", "baseline"),
    ("multi_task", "single_task", "baseline"),
)
BOOTSTRAP_DRAWS = 10_000


def mcnemar(only_a: int, only_b: int) -> float:
    """The exact two-sided McNemar p-value: records that only a, or only b, answered rightly."""
    discordant = only_a + only_b
    return float(binomtest(only_a, discordant, 0.5).pvalue) if discordant else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values adjusted by Holm's step-down method over the whole list."""
    p = np.asarray(p_values, float)
    order = np.argsort(p, kind="stable")
    # The smallest is multiplied by how many there are, the next by one less, and none falls below one before it.
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted.tolist()


@dataclass(frozen=True)
class Comparison:
    """Two arms on the same records: n, both accuracies, who alone was right how often, exact McNemar."""

    n: int
    accuracy_a: float
    accuracy_b: float
    only_a: int
    only_b: int
    p: float

    @property
    def difference(self) -> float:
        return self.accuracy_a - self.accuracy_b


def compare(predictions_a: Mapping[str, bool], predictions_b: Mapping[str, bool]) -> Comparison:
    """Arm a against arm b, paired by record.

    predictions_a, predictions_b: record id -> whether the answer was right (`correct_by_id` reads them from a file).

    Raises:
      ValueError: the two were not asked the same records.
    """
    if predictions_a.keys() != predictions_b.keys():
        odd = sorted(predictions_a.keys() ^ predictions_b.keys())
        raise ValueError(f"the two arms were not asked the same records: {len(odd)} differ, e.g. {odd[0]}")
    n = len(predictions_a)
    only_a = sum(right and not predictions_b[key] for key, right in predictions_a.items())
    only_b = sum(right and not predictions_a[key] for key, right in predictions_b.items())
    a, b = sum(predictions_a.values()), sum(predictions_b.values())
    return Comparison(n, a / n if n else 0.0, b / n if n else 0.0, only_a, only_b, mcnemar(only_a, only_b))


def correct_by_id(path: Path, subset: str) -> dict[str, bool]:
    """Record id -> whether the likeliest letter was the answer, of one subset in a predictions file."""
    with open(path, encoding="utf-8") as lines:
        records = (json.loads(line) for line in lines)
        return {r["id"]: r["predicted"] == r["answer"] for r in records if r["subset"] == subset}


@dataclass(frozen=True)
class Unit:
    """One row of one target and seed: how the two arms' answers differ, over n records."""

    target: str
    seed: int
    n: int
    only_a: int
    only_b: int


def bootstrap_interval(units: Sequence[Unit], draws: int = BOOTSTRAP_DRAWS, level: float = 0.95) -> tuple[float, float]:
    """A percentile interval of the mean difference (a - b) over targets and seeds.

    Targets are drawn anew, seeds within each target, and records within each (row, target, seed), so the interval
    speaks of other targets, seeds and records of the same kind. Rows of one target and seed are averaged, targets
    weigh alike. With few targets or seeds it is rough, and too narrow.
    """
    rng = np.random.default_rng(0)
    tree: dict[str, dict[int, list[Unit]]] = defaultdict(lambda: defaultdict(list))
    for unit in units:
        tree[unit.target][unit.seed].append(unit)
    per_target = []  # float[draws] per target: the mean over its drawn seeds
    for _, seeds in sorted(tree.items()):
        drawn = np.stack([_resampled(seeds[seed], rng, draws) for seed in sorted(seeds)])  # [seeds, draws]
        pick = rng.integers(0, len(drawn), (len(drawn), draws))
        per_target.append(np.take_along_axis(drawn, pick, 0).mean(0))
    targets = np.stack(per_target)
    pick = rng.integers(0, len(targets), (len(targets), draws))
    means = np.take_along_axis(targets, pick, 0).mean(0)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _resampled(units: Sequence[Unit], rng: np.random.Generator, draws: int) -> np.ndarray:
    """float[draws] mean difference over one target's and seed's rows, with the records drawn anew."""
    total = np.zeros(draws)
    for unit in units:
        shares = np.array([unit.only_a, unit.only_b, unit.n - unit.only_a - unit.only_b]) / unit.n
        counts = rng.multinomial(unit.n, shares, draws)
        total += (counts[:, 0] - counts[:, 1]) / unit.n
    return total / len(units)


def mean_difference(units: Sequence[Unit]) -> float:
    """Mean of a - b: rows averaged within a target and seed, seeds within a target, targets alike."""
    by_target = _by(units, lambda u: u.target)
    return float(np.mean([_target_mean(group) for group in by_target.values()]))


def _target_mean(units: Sequence[Unit]) -> float:
    return float(np.mean([np.mean([_diff(u) for u in rows]) for rows in _by(units, lambda u: u.seed).values()]))


def _diff(unit: Unit) -> float:
    return (unit.only_a - unit.only_b) / unit.n


def _by(items: Sequence, key: Callable) -> dict:
    groups = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return dict(sorted(groups.items()))


def summarise(workdir: str | Path) -> dict:
    """The headline effects of a grid, from `results.csv`, `predictions/` and `config.json` alone.

    All accuracies and differences are fractions; intervals are 95 %. A part without finished cells is left out.

    {
      "accuracy": [                       # one per (table, part, arm), tables and arms in results.csv's order
        {"table": "pairs", "part": "fixed_area", "arm": "trained", "accuracy": .77, "targets": 8, "seeds": 3,
         "n": 7200},                      # mean over rows and seeds; n test answers in all; part "": all parts
      ],
      "effects": [                        # one per line of EFFECTS and part that the grid has, part "" first
        {"table": "pairs", "part": "", "arm": "trained", "against": "baseline_plus",
         "mean": .36, "ci_low": .33, "ci_high": .39,     # `bootstrap_interval` over targets, seeds and records
         "targets": 8, "seeds": 3, "rows": 24,
         "wins": 22, "losses": 2,                        # rows (pooled over seeds) above, below
         "significant": 20, "significant_losses": 0,     # rows with Holm-adjusted McNemar p < .05
         "by_target": {"ct-lung-grade": .31}, "by_seed": {"0": .35}},
      ],
      "rows": [                           # one per row, target and comparison
        {"table": "pairs", "part": "fixed_area", "row": "fixed_area/ct-lung-grade", "target": "ct-lung-grade",
         "arm": "trained", "against": "baseline_plus", "seeds": [0, 1, 2], "n": 900,
         "accuracy_a": .81, "accuracy_b": .44, "difference": .37, "only_a": 350, "only_b": 17,
         "p": 1e-80, "p_holm": 2e-79},    # Holm over this table's rows of this comparison
      ],
      "curves": [                         # efficiency: accuracy over target records, averaged over targets and seeds
        {"curve": "with_related", "records": 30, "accuracy": .7, "ci_low": .6, "ci_high": .8, "targets": 4, "seeds": 3,
         "n": 3600},                      # ci: from targets and seeds drawn anew; curve "target_only" is the other
      ],
      "controls": {"wo_modality": {...}, "wo_area": {...}, "wo_task": {...}},  # the effects random_removal - wo_X: what
                                          # an element does beyond less data; "same_task": all_related - same_task
    }

    `part` is what a row's name starts with: the direction in `pairs` ("fixed_modality", "fixed_area", "fixed_task",
    "modality_area"), "in_distribution" or "out_of_distribution" in `multi_task`, the curve in `efficiency`, else "".
    Records are paired by id within a seed. Where the test records are the same for every seed (released data), a record
    counts once: it is a win for an arm when that arm was right on it at more seeds.
    """
    workdir = Path(workdir)
    results = read_results(workdir)
    read = _cached_reader(workdir)
    fresh = _fresh_per_seed(workdir)
    rows, effects = [], []
    for table, arm, against in EFFECTS:
        found, units = _compared(results, read, table, arm, against, fresh)
        for row, p in zip(found, holm([row["p"] for row in found]), strict=True):
            row["p_holm"] = p
        rows += found
        parts = sorted({row["part"] for row in found})
        for part in ["", *parts] if parts and parts != [""] else parts:
            effects.append(_effect(table, part, arm, against, found, units))
    return {
        "accuracy": _accuracies(results),
        "effects": effects,
        "rows": rows,
        "curves": _curves(results),
        "controls": _controls(effects),
    }


def read_results(workdir: Path) -> list[dict]:
    """The rows of results.csv with numbers as numbers."""
    with open(Path(workdir) / "results.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row.update({key: int(row[key]) for key in ("seed", "n", "correct")})
        row.update({key: float(row[key]) for key in ("accuracy", "ci_low", "ci_high")})
    return rows


def part_of(table: str, row: str) -> str:
    """The part of a table that a row belongs to: see `summarise`."""
    return "" if table == "ablation" else row.split("/")[0]


def _fresh_per_seed(workdir: Path) -> bool:
    """Whether each seed has test records of its own (phantoms are drawn by the seed)."""
    return json.loads((workdir / "config.json").read_text(encoding="utf-8"))["config"]["data"]["source"] == "phantom"


def _cached_reader(workdir: Path) -> Callable[[str, str], dict[str, bool]]:
    kept: dict[tuple[str, str], dict[str, bool]] = {}

    def read(cell: str, subset: str) -> dict[str, bool]:
        if (cell, subset) not in kept:
            kept[cell, subset] = correct_by_id(workdir / "predictions" / f"{cell}.jsonl", subset)
        return kept[cell, subset]

    return read


def _compared(results, read, table, arm, against, fresh) -> tuple[list[dict], dict[str, list[Unit]]]:
    """Rows where both arms are finished, and part -> units."""
    cells = {(r["arm"], r["row"], r["target"], r["seed"]): r["cell"] for r in results if r["table"] == table}
    keys = _by([k[1:] for k in cells if k[0] == arm and (against, *k[1:]) in cells], lambda k: k[:2])
    rows, units = [], defaultdict(list)
    for (row, target), group in keys.items():
        part, seeds = part_of(table, row), sorted(seed for _, _, seed in group)
        pairs = []
        for seed in seeds:
            a = read(cells[arm, row, target, seed], target)
            b = read(cells[against, row, target, seed], target)
            one = compare(a, b)
            pairs.append((a, b))
            units[part].append(Unit(target, seed, one.n, one.only_a, one.only_b))
        pooled = _pooled(pairs, fresh)
        rows.append(
            {"table": table, "part": part, "row": row, "target": target, "arm": arm, "against": against, "seeds": seeds}
            | asdict(pooled)
            | {"difference": pooled.difference}
        )
    return rows, units


def _pooled(pairs: Sequence[tuple[dict, dict]], fresh: bool) -> Comparison:
    """One row over its seeds; where records return with every seed, each counts once, by its majority."""
    if fresh or len(pairs) == 1:
        joined = [{f"{i}/{key}": v for i, pair in enumerate(pairs) for key, v in pair[side].items()} for side in (0, 1)]
        return compare(*joined)
    lead: dict[str, int] = defaultdict(int)
    for a, b in pairs:
        for key in a:
            lead[key] += int(a[key]) - int(b[key])
    a, b = (float(np.mean([np.mean(list(pair[side].values())) for pair in pairs])) for side in (0, 1))
    only_a, only_b = sum(v > 0 for v in lead.values()), sum(v < 0 for v in lead.values())
    return Comparison(len(lead), a, b, only_a, only_b, mcnemar(only_a, only_b))


def _effect(table: str, part: str, arm: str, against: str, rows: Sequence[dict], units: Mapping) -> dict:
    own = [row for row in rows if part in ("", row["part"])]
    mine = [u for name, group in units.items() if part in ("", name) for u in group]
    low, high = bootstrap_interval(mine)
    sure = [row for row in own if row["p_holm"] < 0.05]
    return {
        "table": table, "part": part, "arm": arm, "against": against,
        "mean": mean_difference(mine), "ci_low": low, "ci_high": high,
        "targets": len({u.target for u in mine}), "seeds": len({u.seed for u in mine}), "rows": len(own),
        "wins": sum(row["difference"] > 0 for row in own), "losses": sum(row["difference"] < 0 for row in own),
        "significant": sum(row["difference"] > 0 for row in sure),
        "significant_losses": sum(row["difference"] < 0 for row in sure),
        "by_target": {target: _target_mean(group) for target, group in _by(mine, lambda u: u.target).items()},
        "by_seed": {str(seed): mean_difference(group) for seed, group in _by(mine, lambda u: u.seed).items()},
    }  # fmt: skip


def _accuracies(results: Sequence[dict]) -> list[dict]:
    groups: dict[tuple[str, str, str], list[dict]] = defaultdict(list)
    for row in results:
        part = part_of(row["table"], row["row"])
        for name in dict.fromkeys(("", part)):
            groups[row["table"], name, row["arm"]].append(row)
    return [
        {"table": table, "part": part, "arm": arm, "accuracy": float(np.mean([r["accuracy"] for r in rows])),
         "targets": len({r["target"] for r in rows}), "seeds": len({r["seed"] for r in rows}),
         "n": sum(r["n"] for r in rows)}
        for (table, part, arm), rows in groups.items()
        if table != "efficiency"
    ]  # fmt: skip


def _curves(results: Sequence[dict]) -> list[dict]:
    groups: dict[tuple[str, int], list[dict]] = defaultdict(list)
    for row in results:
        if row["table"] == "efficiency":
            groups[part_of("efficiency", row["row"]), int(row["arm"].rsplit("_", 1)[1])].append(row)
    curves = []
    for (curve, records), rows in sorted(groups.items()):
        # An accuracy is a difference against never being right.
        units = [Unit(r["target"], r["seed"], r["n"], r["correct"], 0) for r in rows]
        low, high = bootstrap_interval(units, draws=2000)
        curves.append(
            {"curve": curve, "records": records, "accuracy": mean_difference(units), "ci_low": low, "ci_high": high,
             "targets": len({r["target"] for r in rows}), "seeds": len({r["seed"] for r in rows}),
             "n": sum(r["n"] for r in rows)}
        )  # fmt: skip
    return curves


def _controls(effects: Sequence[dict]) -> dict[str, dict]:
    find = partial(_find, effects)
    found = {f"wo_{x}": find("random_removal", f"wo_{x}") for x in ("modality", "area", "task")}
    found["same_task"] = find("all_related", "same_task")
    return {name: effect for name, effect in found.items() if effect}


def _find(effects: Sequence[dict], arm: str, against: str) -> dict | None:
    return next((e for e in effects if (e["table"], e["arm"], e["against"]) == ("ablation", arm, against)), None)
