"""The effects that a grid shows, computed from its `results.csv`, `predictions/`, `controls/` and `config.json`.

The statistics themselves are in `paired` and `controls`.
"""

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from medcg_jax.study.design.mat import ELEMENTS
from medcg_jax.study.stats.answers import Answers
from medcg_jax.study.stats.calibration import calibration_of_answers
from medcg_jax.study.stats.controls import controls_of_answers
from medcg_jax.study.stats.grid_files import read_results
from medcg_jax.study.stats.paired import (
    Comparison,
    Unit,
    bootstrap_interval,
    compare,
    detectable,
    grouped,
    holm,
    mcnemar,
    mean_difference,
    mixed_interval,
    overall_test,
    target_means,
)
from medcg_jax.study.stats.results import read_config_file
from medcg_jax.untrusted import FileError, shown

# (table, arm, against): the comparisons of `summarise`, in the order of the report.
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


def summarise(workdir: str | Path, results: Sequence[Mapping] | None = None, answers: Answers | None = None) -> dict:
    """The headline effects of a grid.

    results, answers: the rows of results.csv (`read_results`) and the answers, where they were read already.

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
         "by_target": {"ct-lung-grade": .31}, "by_seed": {"0": .35},
         "p_overall": .008, "p_smallest": .008,          # `overall_test` over the targets; the smallest p they allow
         "test": "exact sign flips of 8 targets",
         "p_overall_holm": .03},         # Holm over the parts of this table and comparison; part "" stands alone
      ],
      "rows": [                           # one per row, target and comparison
        {"table": "pairs", "part": "fixed_area", "row": "fixed_area/ct-lung-grade", "target": "ct-lung-grade",
         "arm": "trained", "against": "baseline_plus", "seeds": [0, 1, 2], "n": 900,
         "accuracy_a": .81, "accuracy_b": .44, "difference": .37, "only_a": 350, "only_b": 17,
         "p": 1e-80, "p_holm": 2e-79,     # Holm over this table's rows of this comparison
         "ci_low": .31, "ci_high": .43,   # `mixed_interval`: over records and seeds; over records alone with one seed
         "sd_seeds": .02, "sd_records": .6,   # the two sources of variation; sd_seeds None with one seed
         "detectable": .045},             # smallest true difference that n shows with 80 % power, given this row's
                                          # share of discordant answers; None where there is none (`paired.detectable`)
      ],
      "curves": [                         # efficiency: accuracy over target records, averaged over targets and seeds
        {"curve": "with_related", "records": 30, "accuracy": .7, "ci_low": .6, "ci_high": .8, "targets": 4, "seeds": 3,
         "n": 3600},                      # ci: from targets and seeds drawn anew; curve "target_only" is the other
      ],
      "controls": {"wo_modality": {...}, "wo_area": {...}, "wo_task": {...}},  # the effects random_removal - wo_X: what
                                          # an element does beyond less data; "same_task": all_related - same_task
      "controls_of_answers": [...],       # letters, numbers of options, generation, runs without images and the like:
                                          # `controls.controls_of_answers`
      "calibration": [...],               # of each table and arm: `calibration.calibration_of_answers`
    }

    "part" is the first part of a row's name: the direction in `pairs` ("fixed_modality", "fixed_area", "fixed_task",
    "modality_area"), "in_distribution" or "out_of_distribution" in `multi_task`, the curve in `efficiency`, else "".
    Records are paired by id within a seed. Where all seeds have the same test records (released data), a record counts
    once: as a win for the arm that was right on it at more seeds; "ci_low" and "ci_high" are then of records crossed
    with seeds, else of records nested in seeds.
    """
    workdir = Path(workdir)
    results = read_results(workdir) if results is None else results
    answers = answers or Answers(workdir)
    # Phantoms are drawn by the seed.
    fresh = read_config_file(workdir)["config"]["data"]["source"] == "phantom"
    rows, effects = [], []
    for table, arm, against in EFFECTS:
        compared, units = _compared(results, answers, table, arm, against, fresh)
        for row, p in zip(compared, holm([row["p"] for row in compared]), strict=True):
            row["p_holm"] = p
        rows += compared
        parts = sorted({row["part"] for row in compared})
        overall = [_effect(table, "", arm, against, compared, units)] if parts else []
        by_part = [_effect(table, part, arm, against, compared, units) for part in parts if part]
        for effect, p in zip(by_part, holm([effect["p_overall"] for effect in by_part]), strict=True):
            effect["p_overall_holm"] = p
        effects += [effect | {"p_overall_holm": effect["p_overall"]} for effect in overall] + by_part
    return {
        "accuracy": _accuracies(results),
        "effects": effects,
        "rows": rows,
        "curves": _curves(results),
        "controls": _controls(effects),
        "controls_of_answers": controls_of_answers(answers, results, fresh),
        "calibration": calibration_of_answers(answers, results, fresh),
    }


def _compared(
    results: Sequence[Mapping], answers: Answers, table: str, arm: str, against: str, fresh: bool
) -> tuple[list[dict], dict[str, list[Unit]]]:
    """(rows where both arms are finished, part -> their units)."""
    cells = {(r["arm"], r["row"], r["target"], r["seed"]): r for r in results if r["table"] == table}
    keys = grouped([k[1:] for k in cells if k[0] == arm and (against, *k[1:]) in cells], lambda k: k[:2])
    rows, units = [], defaultdict(list)
    for (row, target), group in keys.items():
        seeds = sorted(seed for _, _, seed in group)
        part = cells[arm, row, target, seeds[0]]["part"]
        pairs = []
        for seed in seeds:
            names = [cells[side, row, target, seed]["cell"] for side in (arm, against)]
            a, b = (answers.correct_by_id(name, target) for name in names)
            if a.keys() != b.keys():
                raise FileError(
                    f"predictions/{names[0]}.jsonl and {names[1]}.jsonl: "
                    f"{len(a.keys() ^ b.keys())} records of {shown(target)} are in one of them alone"
                )
            comparison = compare(a, b)
            pairs.append((a, b))
            units[part].append(Unit(target, seed, comparison.n, comparison.only_a, comparison.only_b))
        pooled = _pooled(pairs, fresh)
        rows.append(
            {"table": table, "part": part, "row": row, "target": target, "arm": arm, "against": against, "seeds": seeds}
            | asdict(pooled)
            | {"difference": pooled.difference}
            | _spread(pairs, fresh)
            | {"detectable": detectable(pooled.n, (pooled.only_a + pooled.only_b) / pooled.n)}
        )
    return rows, units


def _pooled(pairs: Sequence[tuple[dict, dict]], fresh: bool) -> Comparison:
    """One row over its seeds; a record that all seeds share counts once, by its majority."""
    if fresh or len(pairs) == 1:
        joined = [{f"{i}/{key}": v for i, pair in enumerate(pairs) for key, v in pair[side].items()} for side in (0, 1)]
        return compare(*joined)
    lead: dict[str, int] = defaultdict(int)
    for a, b in pairs:
        for key in a:
            lead[key] += int(a[key]) - int(b[key])
    accuracies = (float(np.mean([np.mean(list(pair[side].values())) for pair in pairs])) for side in (0, 1))
    only_a, only_b = sum(v > 0 for v in lead.values()), sum(v < 0 for v in lead.values())
    return Comparison(len(lead), *accuracies, only_a, only_b, mcnemar(only_a, only_b))


def _spread(pairs: Sequence[tuple[dict, dict]], fresh: bool) -> dict[str, float | None]:
    """The interval of one row's mean difference, and its two sources of variation."""
    differences: list[Mapping[Hashable, float]] = [
        {(seed if fresh else None, key): int(right) - int(b[key]) for key, right in a.items()}
        for seed, (a, b) in enumerate(pairs)
    ]
    mixed = mixed_interval(differences)
    return {"ci_low": mixed.low, "ci_high": mixed.high, "sd_seeds": mixed.sd_seeds, "sd_records": mixed.sd_records}


def _effect(table: str, part: str, arm: str, against: str, rows: Sequence[dict], units: Mapping) -> dict:
    """rows, units: as `_compared` gives them; those of `part` are used ("": all)."""
    rows = [row for row in rows if part in ("", row["part"])]
    group = [u for name, units_of_part in units.items() if part in ("", name) for u in units_of_part]
    low, high = bootstrap_interval(group)
    by_target = target_means(group)
    overall = overall_test(list(by_target.values()))
    significant = [row for row in rows if row["p_holm"] < 0.05]
    return {
        "table": table,
        "part": part,
        "arm": arm,
        "against": against,
        "mean": mean_difference(group),
        "ci_low": low,
        "ci_high": high,
        **_sizes(group),
        "rows": len(rows),
        "wins": sum(row["difference"] > 0 for row in rows),
        "losses": sum(row["difference"] < 0 for row in rows),
        "significant": sum(row["difference"] > 0 for row in significant),
        "significant_losses": sum(row["difference"] < 0 for row in significant),
        "by_target": by_target,
        "by_seed": {str(seed): mean_difference(of_seed) for seed, of_seed in grouped(group, lambda u: u.seed).items()},
        "p_overall": overall.p,
        "p_smallest": overall.p_smallest,
        "test": overall.test,
    }


def _sizes(units: Sequence[Unit]) -> dict[str, int]:
    return {"targets": len({u.target for u in units}), "seeds": len({u.seed for u in units})}


def _units(rows: Sequence[Mapping]) -> list[Unit]:
    """Accuracies as differences to an arm that is never right."""
    return [Unit(r["target"], r["seed"], r["n"], r["correct"], 0) for r in rows]


def _accuracies(results: Sequence[Mapping]) -> list[dict]:
    groups: dict[tuple[str, str, str], list[Mapping]] = defaultdict(list)
    for row in results:
        for part in dict.fromkeys(("", row["part"])):
            groups[row["table"], part, row["arm"]].append(row)
    return [
        {
            "table": table,
            "part": part,
            "arm": arm,
            "accuracy": float(np.mean([r["accuracy"] for r in rows])),
            **_sizes(_units(rows)),
            "n": sum(r["n"] for r in rows),
        }
        for (table, part, arm), rows in groups.items()
        if table != "efficiency"
    ]


def _curves(results: Sequence[Mapping]) -> list[dict]:
    rows = [(row["part"], int(row["arm"].rsplit("_", 1)[1]), row) for row in results if row["table"] == "efficiency"]
    curves = []
    for (curve, records), group in grouped(rows, lambda item: item[:2]).items():
        units = _units([row for _, _, row in group])
        low, high = bootstrap_interval(units, draws=2000)
        curves.append(
            {
                "curve": curve,
                "records": records,
                "accuracy": mean_difference(units),
                "ci_low": low,
                "ci_high": high,
                **_sizes(units),
                "n": sum(u.n for u in units),
            }
        )
    return curves


def _controls(effects: Sequence[dict]) -> dict[str, dict]:
    """What an element does beyond less data, and beyond its task alone."""
    pairs = {f"wo_{element}": ("random_removal", f"wo_{element}") for element in ELEMENTS}
    pairs["same_task"] = ("all_related", "same_task")
    of_ablation = {(e["arm"], e["against"]): e for e in effects if e["table"] == "ablation"}
    return {name: of_ablation[pair] for name, pair in pairs.items() if pair in of_ablation}
