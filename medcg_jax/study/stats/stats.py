"""The effects that a grid shows, computed from its `results.csv`, `predictions/`, `controls/` and `config.json`.

The statistics themselves are in `paired` and `controls`.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from medcg_jax.config import REMOVAL_ARMS
from medcg_jax.data.phantom.world import ceiling
from medcg_jax.study.design.mat import ELEMENTS
from medcg_jax.study.design.overlap import LAPSES, printed_lapses, printed_repeats
from medcg_jax.study.design.suite import Row
from medcg_jax.study.stats.answers import Answers
from medcg_jax.study.stats.calibration import calibration_of_answers
from medcg_jax.study.stats.controls import controls_of_answers
from medcg_jax.study.stats.grid_files import read_cells, read_results, training_of
from medcg_jax.study.stats.paired import (
    Comparison,
    Unit,
    by_patient,
    compare,
    detectable,
    estimate,
    flipped,
    grouped,
    holm,
    mean_difference,
    mixed_interval,
    patient_sums,
    target_means,
    unit_of,
)
from medcg_jax.study.stats.results import read_config_file
from medcg_jax.study.stats.verdict import BESIDE, MEMBERS, Arms, is_equivalent, members, verdicts
from medcg_jax.untrusted import FileError, check_number, shown

# Arms that stand beside the trained one of a table, after its baselines.
DECIDING = {table: (*members(k)[0], "words_only", "no_images") for table, k in MEMBERS.items()}
# (table, arm, against): the comparisons of `summarise`, in the order of the report.
EFFECTS = (
    ("pairs", "trained", "baseline_plus"),
    ("pairs", "trained", "baseline"),
    ("pairs", "baseline_plus", "baseline"),
    *(("pairs", "trained", arm) for arm in DECIDING["pairs"]),
    ("triples", "trained", "baseline_plus"),
    ("triples", "trained", "baseline"),
    *(("triples", "trained", arm) for arm in DECIDING["triples"]),
    ("detection_pairs", "trained", "baseline_plus"),
    ("detection_pairs", "trained", "baseline"),
    *(("detection_pairs", "trained", arm) for arm in DECIDING["detection_pairs"]),
    ("ablation", "all_related", "all_unrelated"),
    ("ablation", "all_related", "wo_modality"),
    ("ablation", "all_related", "wo_area"),
    ("ablation", "all_related", "wo_task"),
    *(("ablation", "all_related", f"random_removal_{element}") for element in ELEMENTS),
    ("ablation", "all_related", "same_task"),
    ("ablation", "all_related", "all_data"),
    ("ablation", "all_related", "baseline"),
    *(("ablation", f"random_removal_{element}", f"wo_{element}") for element in ELEMENTS),
    *(("ablation", "all_related", f"{arm}_updates") for arm in REMOVAL_ARMS),
    *(("ablation", f"random_removal_{element}_updates", f"wo_{element}_updates") for element in ELEMENTS),
    ("multi_task", "multi_task", "single_task"),
    ("multi_task", "multi_task", "baseline"),
    ("multi_task", "single_task", "baseline"),
)


def summarise(
    workdir: str | Path,
    results: Sequence[Mapping] | None = None,
    answers: Answers | None = None,
    cells: Sequence[Mapping] | None = None,
) -> dict:
    """The headline effects of a grid, and what they say of composition.

    results, answers, cells: the rows of results.csv (`read_results`), the answers and the rows of cells.csv
    (`read_cells`), where they were read already.

    All accuracies and differences are fractions; intervals are 95 %. "n" counts distinct questions: one that several
    rows ask of a target counts once, and test records read from files count once for all seeds. "trainings" counts
    distinct trainings (`training_of`). A part without finished cells is left out.

    {
      "verdicts": [...],                  # composition or transfer, by table and direction: `verdict.verdicts`, with "n",
                                          # "trainings" and "target_names" of the arms that decide, in rows that can tell
      "accuracy": [                       # one per (table, part, arm), tables and arms in results.csv's order
        {"table": "pairs", "part": "fixed_area", "arm": "trained", "accuracy": .77, "targets": 8, "seeds": 3,
         "ceiling": 1.0, "n": 7200},      # phantoms: of a reader who knows only the elements in the training
                                          # (`phantom.world.ceiling`);
                                          # accuracy: mean over rows and seeds; part "": all parts
      ],
      "effects": [                        # one per line of EFFECTS and part that the grid has, part "" first
        {"table": "pairs", "part": "", "arm": "trained", "against": "baseline_plus",
         "mean": .36, "ci_low": .33, "ci_high": .39,     # `estimate` over targets and seeds
         "targets": 8, "seeds": 3, "rows": 24, "n": 7200, "trainings": 90,
         "wins": 22, "losses": 2,                        # rows (pooled over seeds) above, below
         "significant": 20, "significant_losses": 0,     # rows with Holm-adjusted p of these models < .05
         "by_target": {"ct-liver-grade": .31}, "by_seed": {"0": .35},
         "p_overall": .008, "p_smallest": None,          # and the least p that the layout allows; None: any
         "test": "two-way t of 8 targets and 3 seeds",   # with one seed sign flips of the targets
         "up": True, "down": False,       # shown to be above (below) 0, by interval and test
         "equivalent": False,             # shown to be within `verdict.EQUIVALENCE` of 0; never with one seed
         "p_overall_holm": .03},         # Holm over the parts of this table and comparison; part "" stands alone
      ],
      "rows": [                           # one per row, target and comparison
        {"table": "pairs", "part": "fixed_area", "row": "fixed_area/ct-liver-grade", "target": "ct-liver-grade",
         "arm": "trained", "against": "baseline_plus", "seeds": [0, 1, 2], "n": 900,
         "patients": None,                # patients or lesions among them, where they are known
         "accuracy_a": .81, "accuracy_b": .44, "difference": .37, "only_a": 350, "only_b": 17,
         "p": 1e-80, "p_holm": 2e-79,     # of these models; Holm over this table's distinct trainings compared so
         "p_recipe": .02,                 # of other seeds too (`Mixed.p`); None with one seed
         "ci_low": .31, "ci_high": .43,   # `mixed_interval`: over records and seeds; over records alone with one seed
         "sd_seeds": .02, "sd_records": .6,   # the two sources of variation; sd_seeds None with one seed
         "detectable": .045},             # smallest true difference that n (or as many patients) shows with 80 % power,
                                          # given this row's share of discordant answers; None where there is none
      ],
      "without_lapses": [                 # of printed rows that share more or less with their target than they say
        {"left_out": ["whole triplet"],   # kinds of `overlap.LAPSES`, one more in each entry; [] where there is none
         "rows_left_out": 5,              # printed rows
         "verdicts": [...], "effects": [...]},   # of pairs, triples and detection pairs without these rows
      ],
      "curves": [                         # efficiency: accuracy over target records, averaged over targets and seeds
        {"curve": "with_related", "records": 30, "accuracy": .7, "ci_low": .6, "ci_high": .8, "targets": 4, "seeds": 3,
         "n": 3600},                      # ci: `estimate`; curve "target_only" is the other
      ],
      "controls": {"wo_modality": {...}, "wo_area": {...}, "wo_task": {...}},  # the effects random_removal_X - wo_X: what
                                          # an element does beyond less data; "same_task": all_related - same_task;
                                          # "wo_X_updates": the same at equal updates
      "controls_of_answers": [...],       # letters, numbers of options, generation, runs without images and the like:
                                          # `controls.controls_of_answers`
      "calibration": [...],               # of each table and arm: `calibration.calibration_of_answers`
    }

    "part" is the first part of a row's name: the direction in `pairs` ("fixed_modality", "fixed_area", "fixed_task",
    "modality_area"), "in_distribution" or "out_of_distribution" in `multi_task`, the curve in `efficiency`, else "".
    Records are paired by id within a seed. Where all seeds have the same test records (released data), a record counts
    once: as a win for the arm that was right on it at more seeds; "ci_low" and "ci_high" are then of records crossed
    with seeds, else of records nested in seeds. Records of one patient, where predictions name it, are one draw of a
    row's tests and intervals. Printed rows that repeat an earlier one (`overlap.printed_repeats`) are left out of all but
    "controls_of_answers" and "calibration".
    """
    workdir = Path(workdir)
    recorded = read_config_file(workdir)
    results = read_results(workdir) if results is None else results
    answers = answers or Answers(workdir)
    if cells is None:
        count = check_number(recorded.get("cells"), f"{workdir / 'config.json'}: cells", least=1, whole=True)
        cells = read_cells(workdir, int(count))
    trainings = {cell["cell"]: training_of(cell) for cell in cells}
    # Phantoms are drawn by the seed.
    fresh = recorded["config"]["data"]["source"] == "phantom"
    counted = [row for row in results if row["published"] not in printed_repeats()]
    planned = [cell for cell in cells if Row.parse(cell["table"], cell["row"]).published not in printed_repeats()]
    effects, rows = _effects(counted, answers, fresh, trainings)
    return {
        "verdicts": _verdicts(counted, answers, fresh, planned),
        "accuracy": _accuracies(counted, fresh, _ceilings(planned, recorded["config"]["data"])),
        "effects": effects,
        "rows": rows,
        "without_lapses": _without_lapses(counted, answers, fresh, trainings, planned),
        "curves": _curves(counted, fresh),
        "controls": _controls(effects),
        "controls_of_answers": controls_of_answers(answers, results, fresh),
        "calibration": calibration_of_answers(answers, results, fresh),
    }


def _effects(
    results: Sequence[Mapping], answers: Answers, fresh: bool, trainings: Mapping[str, tuple]
) -> tuple[list[dict], list[dict]]:
    """("effects", "rows") of `summarise`."""
    rows, effects = [], []
    for table, arm, against in EFFECTS:
        compared, units = _compared(results, answers, table, arm, against, fresh, trainings)
        for row, p in zip(compared, _distinct_holm(compared), strict=True):
            row["p_holm"] = p
        parts = sorted({row["part"] for row in compared})
        overall = [_effect(table, "", arm, against, compared, units, fresh)] if parts else []
        by_part = [_effect(table, part, arm, against, compared, units, fresh) for part in parts if part]
        for effect, p in zip(by_part, holm([effect["p_overall"] for effect in by_part]), strict=True):
            effect["p_overall_holm"] = p
        effects += [effect | {"p_overall_holm": effect["p_overall"]} for effect in overall] + by_part
        rows += [{key: value for key, value in row.items() if key not in ("trainings", "asked")} for row in compared]
    return effects, rows


def _without_lapses(
    results: Sequence[Mapping], answers: Answers, fresh: bool, trainings: Mapping[str, tuple], cells: Sequence[Mapping]
) -> list[dict]:
    """Verdicts and effects of pairs, triples and detection pairs once more, without one kind of lapse after the other."""
    kept, left_out, levels = [row for row in results if row["table"] in MEMBERS], [], []
    num_rows = len({row["published"] for row in kept if row["published"]})
    for name in LAPSES:
        fewer = [row for row in kept if printed_lapses().get(row["published"]) != name]
        if len(fewer) < len(kept):
            kept, left_out = fewer, [*left_out, name]
            effects, _ = _effects(kept, answers, fresh, trainings)
            others = [
                cell
                for cell in cells
                if printed_lapses().get(Row.parse(cell["table"], cell["row"]).published) not in left_out
            ]
            num_kept = len({row["published"] for row in kept if row["published"]})
            levels.append(
                {"left_out": left_out, "rows_left_out": num_rows - num_kept, "effects": effects,
                 "verdicts": _verdicts(kept, answers, fresh, others)}
            )  # fmt: skip
    return levels


def _verdicts(results: Sequence[Mapping], answers: Answers, fresh: bool, cells: Sequence[Mapping]) -> list[dict]:
    trainings = {cell["cell"]: training_of(cell) for cell in cells}
    lines = []
    for table, k in MEMBERS.items():
        of_table = [r for r in results if r["table"] == table]
        deciding = {"trained", "baseline_plus", *members(k)[0], *members(k)[1]}
        arms, patients = _arms([r for r in of_table if r["arm"] in (deciding | {*BESIDE})], answers)
        planned: dict[str, set] = defaultdict(set)
        for cell in cells:
            if cell["table"] == table:
                planned[cell["arm"]] |= {(cell["row"], name, int(cell["seed"])) for name in cell["target"].split("+")}
        for line in verdicts(arms, table, planned, patients, same_records=not fresh):
            keys = {*line.pop("keys")}
            used = [r for r in of_table if r["arm"] in deciding and (r["row"], r["target"], r["seed"]) in keys]
            distinct = {trainings[r["cell"]] for r in used if trainings[r["cell"]][0]}
            lines.append(line | {"n": _questions(((r["target"], r["seed"], r["n"]) for r in used), fresh),
                                 "trainings": len(distinct), "target_names": sorted({r["target"] for r in used})})  # fmt: skip
    return lines


def _arms(results: Sequence[Mapping], answers: Answers) -> tuple[Arms, dict[str, list[str]]]:
    """The answers of one table's cells; target -> patient of each record ("": not known), where one is known.

    Raises:
      FileError: two arms of one target and seed were asked different records.
    """
    arms: dict[str, dict] = defaultdict(dict)
    asked: dict[tuple, tuple[str, list[str]]] = {}
    patients: dict[str, list[str]] = {}
    for r in results:
        right = answers.correct_by_id(r["cell"], r["target"])
        ids = sorted(right)
        first_cell, expected = asked.setdefault((r["target"], r["seed"]), (r["cell"], ids))
        if ids != expected:
            raise _other_records(first_cell, r["cell"], r["target"], len({*ids} ^ {*expected}))
        arms[r["arm"]][r["row"], r["target"], r["seed"]] = np.array([right[name] for name in ids], bool)
        if known := answers.patients(r["cell"], r["target"]):
            patients[r["target"]] = [known.get(name, "") for name in ids]
    return arms, patients


def _other_records(cell: str, other: str, target: str, number: int) -> FileError:
    return FileError(
        f"predictions/{cell}.jsonl and {other}.jsonl: {number} records of {shown(target)} are in one of them alone"
    )


def _questions(asked: Iterable[tuple[str, int, int]], fresh: bool) -> int:
    """The number of distinct questions. asked: (target, seed, records); all rows of a target and seed ask the same."""
    return sum({(target, seed if fresh else None): n for target, seed, n in asked}.values())


def _distinct_holm(rows: Sequence[Mapping]) -> list[float]:
    """Each row's p adjusted by Holm over distinct comparisons: rows of the same trainings and target are one."""
    keys = [(row["trainings"], row["only_a"], row["only_b"], row["p"]) for row in rows]
    distinct = list(dict.fromkeys(keys))
    adjusted = dict(zip(distinct, holm([p for *_, p in distinct]), strict=True))
    return [adjusted[key] for key in keys]


def _compared(
    results: Sequence[Mapping],
    answers: Answers,
    table: str,
    arm: str,
    against: str,
    fresh: bool,
    trainings: Mapping[str, tuple],
) -> tuple[list[dict], dict[str, list[Unit]]]:
    """(rows where both arms are finished, part -> their units)."""
    cells = {(r["arm"], r["row"], r["target"], r["seed"]): r for r in results if r["table"] == table}
    keys = grouped([k[1:] for k in cells if k[0] == arm and (against, *k[1:]) in cells], lambda k: k[:2])
    rows, units = [], defaultdict(list)
    for (row, target), group in keys.items():
        seeds = sorted(seed for _, _, seed in group)
        part = cells[arm, row, target, seeds[0]]["part"]
        pairs, patients, trained = [], [], [target]
        for seed in seeds:
            names = [cells[side, row, target, seed]["cell"] for side in (arm, against)]
            a, b = (answers.correct_by_id(name, target) for name in names)
            if a.keys() != b.keys():
                raise _other_records(*names, target, len(a.keys() ^ b.keys()))
            pairs.append((a, b))
            patients.append(answers.patients(names[0], target))
            trained += [trainings[name] for name in names]
            leads = np.array([int(right) - int(b[name]) for name, right in a.items()])
            units[part].append(unit_of(target, seed, leads, [patients[-1].get(name, "") for name in a]))
        pooled, num_patients = _pooled(pairs, patients, fresh)
        rows.append(
            {"table": table, "part": part, "row": row, "target": target, "arm": arm, "against": against, "seeds": seeds}
            | asdict(pooled)
            | {"patients": num_patients, "difference": pooled.difference, "trainings": tuple(trained)}
            | {"asked": [(target, seed, len(a)) for seed, (a, _) in zip(seeds, pairs, strict=True)]}
            | _spread(pairs, patients, fresh)
            | {"detectable": detectable(num_patients or pooled.n, (pooled.only_a + pooled.only_b) / pooled.n)}
        )
    return rows, units


def _pooled(
    pairs: Sequence[tuple[dict, dict]], patients: Sequence[Mapping[str, str]], fresh: bool
) -> tuple[Comparison, int | None]:
    """One row over its seeds, and its number of patients (None: unknown).

    A record that all seeds share counts once, by its majority.
    """
    if fresh or len(pairs) == 1:
        joined = [_joined([pair[side] for pair in pairs]) for side in (0, 1)]
        known = {name: f"{name.partition('/')[0]}/{patient}" for name, patient in _joined(patients).items()}
        return compare(*joined, known), _num_patients(joined[0], known)
    lead: dict[str, int] = defaultdict(int)
    for a, b in pairs:
        for key in a:
            lead[key] += int(a[key]) - int(b[key])
    accuracies = (float(np.mean([np.mean(list(pair[side].values())) for pair in pairs])) for side in (0, 1))
    only_a, only_b = sum(v > 0 for v in lead.values()), sum(v < 0 for v in lead.values())
    p = flipped(patient_sums({key: int(np.sign(value)) for key, value in lead.items()}, patients[0]))
    return Comparison(len(lead), *accuracies, only_a, only_b, p), _num_patients(lead, patients[0])


def _joined(by_seed: Sequence[Mapping]) -> dict:
    return {f"{i}/{key}": value for i, values in enumerate(by_seed) for key, value in values.items()}


def _num_patients(records: Mapping, patients: Mapping[str, str]) -> int | None:
    return len({patients.get(key, (key,)) for key in records}) if patients else None


def _spread(
    pairs: Sequence[tuple[dict, dict]], patients: Sequence[Mapping[str, str]], fresh: bool
) -> dict[str, float | None]:
    """The interval of one row's mean difference, its two sources of variation, and the test of the recipe."""
    differences: list[Mapping[Hashable, float]] = []
    for seed, ((a, b), known) in enumerate(zip(pairs, patients, strict=True)):
        values = by_patient({key: int(right) - int(b[key]) for key, right in a.items()}, known)
        differences.append({(seed if fresh else None, key): value for key, value in values.items()})
    mixed = mixed_interval(differences)
    return {
        "ci_low": mixed.low, "ci_high": mixed.high, "sd_seeds": mixed.sd_seeds, "sd_records": mixed.sd_records,
        "p_recipe": mixed.p if len(pairs) > 1 else None,
    }  # fmt: skip


def _effect(table: str, part: str, arm: str, against: str, rows: Sequence[dict], units: Mapping, fresh: bool) -> dict:
    """rows, units: as `_compared` gives them; those of `part` are used ("": all)."""
    rows = [row for row in rows if part in ("", row["part"])]
    group = [u for name, units_of_part in units.items() if part in ("", name) for u in units_of_part]
    contrast = estimate(group, same_records=not fresh)
    low, high = contrast.interval()
    significant = [row for row in rows if row["p_holm"] < 0.05]
    return {
        "table": table,
        "part": part,
        "arm": arm,
        "against": against,
        "mean": contrast.mean,
        "ci_low": low,
        "ci_high": high,
        **_sizes(group),
        "rows": len(rows),
        "n": _questions((asked for row in rows for asked in row["asked"]), fresh),
        "trainings": len({training for row in rows for training in row["trainings"][1:] if training[0]}),
        "wins": sum(row["difference"] > 0 for row in rows),
        "losses": sum(row["difference"] < 0 for row in rows),
        "significant": sum(row["difference"] > 0 for row in significant),
        "significant_losses": sum(row["difference"] < 0 for row in significant),
        "by_target": target_means(group),
        "by_seed": {str(seed): mean_difference(of_seed) for seed, of_seed in grouped(group, lambda u: u.seed).items()},
        "p_overall": contrast.p,
        "p_smallest": contrast.p_smallest,
        "test": contrast.test,
        "up": contrast.is_up,
        "down": contrast.is_down,
        "equivalent": is_equivalent(contrast),
    }


def _sizes(units: Sequence[Unit]) -> dict[str, int]:
    return {"targets": len({u.target for u in units}), "seeds": len({u.seed for u in units})}


def _units(rows: Sequence[Mapping]) -> list[Unit]:
    """Accuracies of one arm."""
    return [Unit(r["target"], r["seed"], r["n"], r["correct"], r["correct"]) for r in rows]


def _ceilings(cells: Sequence[Mapping[str, str]], data: Mapping) -> dict[tuple[str, str], float]:
    """(cell, target) -> `phantom.world.ceiling` of the elements that its training subsets share with the target.

    {} for data of others. Where a rule is drawn for each subset, nothing but the target's own records is of use.
    """
    if data["source"] != "phantom":
        return {}
    decoys, is_drawn, ceilings = data.get("phantom_decoys", 1.0), data.get("phantom_rule") == "drawn", {}
    for cell in cells:
        trained = [] if cell["arm"] == "no_images" else cell["related"].split("+")
        for target in cell["target"].split("+"):
            triplet = dict(zip(ELEMENTS, target.split("-")))
            if len(triplet) < len(ELEMENTS):
                return {}  # no phantom's name: files that something else has written
            shared = [
                e for i, e in enumerate(ELEMENTS) if any(name.split("-")[i:][:1] == [triplet[e]] for name in trained)
            ]
            is_useless = is_drawn and target not in trained
            ceilings[cell["cell"], target] = ceiling(() if is_useless else shared, decoys)
    return ceilings


def _accuracies(results: Sequence[Mapping], fresh: bool, ceilings: Mapping[tuple[str, str], float]) -> list[dict]:
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
            "ceiling": float(np.mean([ceilings[r["cell"], r["target"]] for r in rows])) if ceilings else None,
            **_sizes(_units(rows)),
            "n": _questions(((r["target"], r["seed"], r["n"]) for r in rows), fresh),
        }
        for (table, part, arm), rows in groups.items()
        if table != "efficiency"
    ]


def _curves(results: Sequence[Mapping], fresh: bool) -> list[dict]:
    rows = [(row["part"], int(row["arm"].rsplit("_", 1)[1]), row) for row in results if row["table"] == "efficiency"]
    curves = []
    for (curve, records), group in grouped(rows, lambda item: item[:2]).items():
        units = _units([row for _, _, row in group])
        mean_accuracy = estimate(units, same_records=not fresh)
        low, high = mean_accuracy.interval()
        curves.append(
            {
                "curve": curve,
                "records": records,
                "accuracy": mean_accuracy.mean,
                "ci_low": max(0.0, low),
                "ci_high": high,
                **_sizes(units),
                "n": _questions(((u.target, u.seed, u.n) for u in units), fresh),
            }
        )
    return curves


def _controls(effects: Sequence[dict]) -> dict[str, dict]:
    """What an element does beyond less data, and beyond its task alone."""
    elements = [f"{element}{budget}" for budget in ("", "_updates") for element in ELEMENTS]
    pairs = {f"wo_{element}": (f"random_removal_{element}", f"wo_{element}") for element in elements}
    pairs["same_task"] = ("all_related", "same_task")
    of_ablation = {(e["arm"], e["against"]): e for e in effects if e["table"] == "ablation"}
    return {name: of_ablation[pair] for name, pair in pairs.items() if pair in of_ablation}
